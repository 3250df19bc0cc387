"""The folder of a study: its lock, and what it holds of the cells that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import filelock

from clframe.errors import DataError, UsageError
from clframe.experiments.budget import Held
from clframe.experiments.cells import CELLS, read_record, read_records, record_path, state_of
from clframe.experiments.outcome import FinishedCell, StudyOutcome, UnfinishedCell, check_figures, describe_stamp
from clframe.experiments.plan import read_held, read_plan
from clframe.experiments.study import STUDY, Study
from clframe.runs.files import LOCK, read_config
from clframe.runs.results import read_results
from clframe.system.reading import quote_path, reason


@contextmanager
def lock_study(folder: Path) -> Iterator[None]:
    """Make the folder of a study if it is new, and keep other processes from working on it meanwhile.

    A folder in which no study was written is removed at the end, if it is empty.

    Raises:
        DataError: if another process works on it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise DataError(f"Another process is working on the study in {folder}; wait for it or stop it.") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"The folder {quote_path(folder)} cannot be written: {reason(error)}; name another with `--output`."
        ) from error
    try:
        yield
    finally:
        lock.release()
        if not (folder / STUDY).exists():
            with suppress(OSError):  # other files are in the folder
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()


def check_new(folder: Path, study: Study) -> None:
    """Refuse a folder that a new study cannot have: one with another study, or with other files.

    Raises:
        UsageError: with the differences to the study that the folder holds.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"The folder {quote_path(folder)} is a file: name another with `--output`.")
    if (folder / STUDY).is_file():
        check_same(study, folder)
    elif {path.name for path in folder.iterdir()} - {LOCK}:
        raise UsageError(
            f"The folder {quote_path(folder)} is not empty, and is not that of a study: name another with `--output`."
        )


def check_same(study: Study, folder: Path) -> None:
    """Refuse a study that is not the one in `folder`. Raises `UsageError` with the differences."""
    if different := study.differences(Study.read(folder)):
        raise UsageError(
            f"{quote_path(folder)} holds another study: {'; '.join(different)}; go on with that one by `clframe "
            f"compare {folder}`, or name another folder with `--output`."
        )


def read_study(folder: Path) -> StudyOutcome:
    """Return what the folder of a study holds of the cells that it asks for; nothing is resolved or imported for it.

    Raises:
        DataError: if the folder is not that of a study, or a file in it is damaged.
    """
    Study.read(folder)  # which refuses a folder without a study
    plan = read_plan(folder)
    held = read_held(plan)
    finished: list[FinishedCell] = []
    unfinished: list[UnfinishedCell] = []
    for cell in plan["cells"]:
        identity = (cell["method"], cell["scenario"], cell["seed"], cell["order"])
        path = folder / CELLS / cell["name"]
        state = state_of(path)
        if state != "finished":
            unfinished.append(UnfinishedCell(*identity, state, _explain(path, state)))
            continue
        results = read_results(path)
        check_figures(results, path)
        config = read_config(path)
        command = f"clframe run --config {CELLS}/{path.name}/config.yaml"
        how = describe_stamp(config.run.tuned)
        done = FinishedCell(*identity, path, results, config, command, bool(cell["stale"]), how)
        finished.append(replace(done, budget=_describe_budget(done, held.get(identity[:2], ()))))
    for refused in plan["refused"]:
        sentence = " ".join(refused["reasons"])
        unfinished.append(UnfinishedCell(refused["method"], refused["scenario"], -1, None, "refused", sentence))
    asked = {cell["name"] for cell in plan["cells"]}
    left_out = [record.folder.name for record in read_records(folder) if record.folder.name not in asked]
    return StudyOutcome(tuple(finished), tuple(unfinished), tuple(left_out), folder)


def _describe_budget(cell: FinishedCell, held: Sequence[Held]) -> str | None:
    """Return in a phrase what a finished cell has used of the study's budgets; None if it has none."""
    kept = cell.measure("bytes_kept", "")
    return "; ".join(one.describe(kept if one.kind == "bytes" else None) for one in held) or None


def _explain(path: Path, state: str) -> str:
    """Return the sentence with which a cell failed; an empty text for another state."""
    return read_record(record_path(path)).failure if state == "failed" else ""
