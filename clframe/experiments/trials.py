"""One tuning: the search that is asked for, its trials as cells of their own, and what is chosen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe import registry
from clframe.errors import DataError
from clframe.experiments.cells import MOST_DEATHS, Cell, read_record, record_path, state_of
from clframe.experiments.methods import Method
from clframe.experiments.plan import make_cell
from clframe.experiments.search import Protocol, Values, apply
from clframe.experiments.study import Study
from clframe.experiments.values import Options
from clframe.metrics import Matrix
from clframe.runs.results import read_results
from clframe.strict_yaml import dump_yaml

if TYPE_CHECKING:
    from clframe.settings import Config

HELD_OUT = 0.1  # share of the training images that trials hold out where `train.val` names none
CarryOut = Callable[[Sequence[Cell]], None]


@dataclass(frozen=True)
class Trial:
    """Values to be tried.

    Attributes:
        values: of the searched options, by full name, in all experiences.
        experiences: number of experiences that the runs are given; None: all.
        per_experience: what single experiences have of their own.
    """

    values: Values
    experiences: int | None = None
    per_experience: tuple[Values, ...] = ()


@dataclass(frozen=True)
class Tuning:
    """The search of the options of one method for one scenario.

    Attributes:
        study: the settings that all cells share; its `seeds` are those of each trial.
        scenario: to learn.
        label: of the scenario in its study.
        method: whose options are searched.
        protocol: what the choice may look at.
        trials: number of values that are tried; for `per-experience` the most of each of its two stages.
    """

    study: Study
    scenario: Options
    label: str
    method: Method
    protocol: Protocol
    trials: int

    @property
    def name(self) -> str:
        """Return a name that a file may have."""
        parts = (self.method.name, self.label, str(self.protocol))
        return "-".join(re.sub(r"[^\w.,=+-]+", "-", part, flags=re.ASCII).strip("-.")[:60] for part in parts)

    @property
    def source(self) -> Options:
        """Return the scenario that the trials learn."""
        return {"name": self.protocol.scenario} if self.protocol.scenario else self.scenario

    def __str__(self) -> str:
        return f"{self.method.name} on {self.label}, {self.protocol.label}"


@dataclass(frozen=True)
class Chosen:
    """The outcome of a tuning.

    Attributes:
        tuning: what was asked for.
        method: with the values that were chosen.
        per_experience: what single experiences have of their own; empty if all have the same.
        accuracy: on validation images, from 0 to 1: the average accuracy of the best trial, or by `per-experience` the
            mean over experiences of the accuracy on each, right after it was learned.
        stamp: how they were chosen: protocol, trials, seeds and data.
        file: holds the choice.
    """

    tuning: Tuning
    method: Method
    per_experience: tuple[Values, ...]
    accuracy: float
    stamp: Options
    file: Path

    @property
    def _run(self) -> dict[str, Any]:
        entries = [dict(entry) for entry in self.per_experience]
        return {"per_experience": entries} if entries else {}

    def tuned_method(self, name: str) -> Method:
        """Return the method, called `name`, as a study runs it on the scenario that it was tuned for."""
        return replace(self.method, name=name, run=self._run, tuned=dict(self.stamp), scenarios=(self.tuning.label,))

    def to_yaml(self) -> str:
        """Return a file that `clframe run --config` takes, and a study as one of its methods."""
        study, method = self.tuning.study, self.method
        sets = study.settings_by_section()
        model = study.model_of(method)
        parts = {
            "scenario": {**sets.get("scenario", {}), **self.tuning.scenario},
            **({"model": model} if model else {}),
            "plugins": {name: {**sets.get(name, {}), **options} for name, options in method.plugins.items()},
            "train": {"threads": 1, **study.train, **sets.get("train", {}), **method.train},
            "run": {**self._run, "tuned": dict(self.stamp)},
        }
        return dump_yaml(parts)


class Bench:
    """What the tunings of one folder share: the folder, the data of each scenario, and the results of cells.

    Args:
        folder: of the tuning.
        carry_out: carries out the cells that it is given.
    """

    def __init__(self, folder: Path, carry_out: CarryOut) -> None:
        self.folder = folder
        self._carry_out = carry_out
        self._begun: set[Path] = set()
        self._scenarios: dict[str, tuple[int, str]] = {}

    def describe(self, config: Config) -> tuple[int, str]:
        """Return the number of experiences, and the SHA-256 of the data, of a scenario. Raises as `build_scenario`."""
        key = json.dumps(config.model_dump()["scenario"], sort_keys=True, default=str)
        if key not in self._scenarios:
            built = registry.build_scenario(config.scenario, config.run.model_copy(update={"seed": 0}))
            self._scenarios[key] = len(built), built.checksum
        return self._scenarios[key]

    def cells_of(self, tuning: Tuning, trial: Trial) -> list[Cell]:
        """Return the cells of a trial, one for each seed."""
        label = tuning.source["name"] if tuning.protocol.scenario else tuning.label
        cells = []
        for seed in tuning.study.seeds:
            config = configure(tuning, trial, seed)
            cells.append(make_cell(tuning.method.name, label, None, config, self.describe(config)[1], self.folder))
        return cells

    def carry_out(self, cells: Sequence[Cell]) -> None:
        """Carry out those of `cells` that are not finished, each once in the life of this object.

        Raises:
            DataError: if the processes of a cell died, which says nothing about its values.
        """
        cells = list({cell.folder: cell for cell in cells}.values())
        waiting = [cell for cell in cells if cell.folder not in self._begun and state_of(cell.folder) != "finished"]
        self._begun |= {cell.folder for cell in waiting}
        if waiting:
            self._carry_out(waiting)
        for cell in waiting:
            if state_of(cell.folder) == "failed" and read_record(record_path(cell.folder)).deaths >= MOST_DEATHS:
                raise DataError(
                    f"A trial could not be finished: {self.failure([cell])} The same command goes on with the tuning."
                )

    def accuracies(self, cells: Sequence[Cell]) -> list[Matrix] | None:
        """Return the accuracy matrix on validation images of each cell; None if the run of one failed."""
        if any(state_of(cell.folder) != "finished" for cell in cells):
            return None
        return [next(iter(read_results(cell.folder).validation.values())) for cell in cells]

    def failure(self, cells: Iterable[Cell]) -> str:
        """Return the sentence with which a cell failed; an empty text if none did."""
        records = [record_path(cell.folder) for cell in cells if state_of(cell.folder) == "failed"]
        return read_record(records[0]).failure if records else ""


def configure(tuning: Tuning, trial: Trial, seed: int) -> Config:
    """Return the configuration of a run of a trial: it is given no test image and no experience that is kept from it.

    Raises:
        UsageError: with one sentence for each mistake.
    """
    config = tuning.study.configure(tuning.source, apply(tuning.method, trial.values), {}, seed)
    if not config.train.val:
        config.train = config.train.model_copy(update={"val": HELD_OUT})
    kept = {
        "experiences": trial.experiences,
        "test": False,
        "predictions": False,
        "per_experience": [dict(entry) for entry in trial.per_experience] or None,
    }
    config.run = config.run.model_copy(update=kept)
    return config
