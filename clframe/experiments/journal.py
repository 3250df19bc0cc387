"""The trials of a tuning in Optuna's journal: what is asked next, and what came out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.errors import UsageError
from clframe.experiments.search import Range, Values

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.trial import FrozenTrial


ROUND = 4  # trials that are asked for together: none of them depends on another one's result


def import_optuna() -> Any:
    """Return the module `optuna`. Raises `UsageError` if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UsageError("Tuning needs `optuna`: pip install 'clframe[tune]'.") from error
    return optuna


class Journal:
    """The trials of a tuning, in Optuna's journal; what is asked next depends on the trials of earlier rounds alone.

    Args:
        path: of the journal, which holds the trials of all tunings of a folder.
        name: of the tuning in it.
        ranges: what is searched.
        seed: text from which, with the number of a trial, its seed is drawn.
    """

    def __init__(self, path: Path, name: str, ranges: Sequence[Range], seed: str) -> None:
        self._optuna = import_optuna()
        self._ranges = ranges
        self._seed = seed
        self._distributions = {range_.name: range_.distribution() for range_ in ranges}
        _mend(path)
        with self._quiet():
            from optuna.storages.journal import JournalFileBackend

            storage = self._optuna.storages.JournalStorage(JournalFileBackend(str(path)))
            self._study: OptunaStudy = self._optuna.create_study(
                storage=storage, study_name=name, direction="maximize", load_if_exists=True
            )

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keep Optuna from announcing studies inside."""
        logging = self._optuna.logging
        before = logging.get_verbosity()
        logging.set_verbosity(logging.WARNING)
        try:
            yield
        finally:
            logging.set_verbosity(before)

    @property
    def trials(self) -> list[FrozenTrial]:
        """Return the trials that have ended, in order."""
        return self._study.get_trials(deepcopy=False)

    def ask(self, most: int) -> tuple[int, list[Values]]:
        """Return the number of the first trial of the round under way, and the values of its trials, `most` in all.

        The first trial of all has the values that the method has without a tuning.
        """
        before = self.trials
        start = len(before) // ROUND * ROUND
        asked: list[Values] = []
        with self._quiet():
            memory = self._optuna.create_study(direction="maximize")
            memory.add_trials(before[:start])
            if not start and all(range_.holds(range_.start) for range_ in self._ranges):
                memory.enqueue_trial({range_.name: range_.start for range_ in self._ranges})
            for number in range(start, min(start + ROUND, most)):
                digest = hashlib.sha256(f"{self._seed}/{number}".encode()).digest()
                memory.sampler = self._optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4], "big"))
                found = memory.ask(self._distributions).params
                asked.append({range_.name: range_.rounded(found[range_.name]) for range_ in self._ranges})
        return start, asked

    def tell(self, start: int, asked: Sequence[Values], figures: Sequence[float | None]) -> None:
        """Write the trials of a round, the first of which has the number `start`; those that are there stay."""
        there = len(self.trials)
        states = self._optuna.trial.TrialState
        for number, (values, figure) in enumerate(zip(asked, figures, strict=True), start):
            if number >= there:
                trial = self._optuna.trial.create_trial(
                    params=dict(values),
                    distributions=self._distributions,
                    value=figure,
                    state=states.FAIL if figure is None else states.COMPLETE,
                )
                self._study.add_trial(trial)


def _mend(path: Path) -> None:
    """Remove what a killed process left of the journal: its lock, and the line that was being written.

    One process at a time works in the folder.
    """
    for lock in path.parent.glob(f"{path.name}.lock*"):
        lock.unlink(missing_ok=True)
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
