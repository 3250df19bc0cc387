"""How two runs differ: settings, figures, environments, costs, and the trained models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clframe.config import list_settings
from clframe.errors import DataError
from clframe.runs import sums
from clframe.runs.files import ENVIRONMENT, MODEL
from clframe.runs.listing import (
    OF_THE_MACHINE,
    RunSummary,
    list_costs,
    list_entries,
    list_figures,
    list_sizes,
    open_run,
)
from clframe.system.reading import blame_file, read_json

OF_THE_START = ("seed", "command")  # what environment.json has beside the environment
ABSENT: Any = object()  # in place of the value of a setting that a run does not have


@dataclass(frozen=True)
class Difference:
    """A value that differs between two runs, by name; `ABSENT` where a run does not have it."""

    name: str
    first: Any
    second: Any

    @property
    def change(self) -> float | None:
        """Return how much larger the second number is; None if they are not two numbers."""
        numbers = [v for v in (self.first, self.second) if isinstance(v, int | float) and not isinstance(v, bool)]
        return numbers[1] - numbers[0] if len(numbers) == 2 else None


@dataclass(frozen=True)
class Comparison:
    """How two runs differ.

    Attributes:
        runs: the two.
        settings: settings that differ, by the names that ``--set`` takes.
        figures: measures and calibration that differ, such as ``class.average_accuracy``, as shares of 1; empty unless
            both runs are finished.
        entries: entries of the accuracy matrices that differ, such as ``class[2][1]``: on experience 1 after 2, counted
            from 1.
        environment: what differs between the environments: versions, device, threads, data.
        costs: seconds and bytes that differ.
        same_model: whether the tensors of the trained models are equal; None if a run is not finished.
    """

    runs: tuple[RunSummary, RunSummary]
    settings: list[Difference]
    figures: list[Difference] = field(default_factory=list)
    entries: list[Difference] = field(default_factory=list)
    environment: list[Difference] = field(default_factory=list)
    costs: list[Difference] = field(default_factory=list)
    same_model: bool | None = None

    @property
    def identical(self) -> bool | None:
        """Return whether all figures and the tensors of the models are equal; None if a run is not finished."""
        return None if self.same_model is None else self.same_model and not self.figures and not self.entries


def compare(first: Path, second: Path) -> Comparison:
    """Return how the runs in two folders differ. Raises `DataError` if one is not a run folder, or is damaged."""
    runs = (open_run(first), open_run(second))
    for run in runs:
        if run.problem is not None:
            raise DataError(run.problem)
    settings = [list_settings(run.config) if run.config else {} for run in runs]
    found: dict[str, Any] = {
        "settings": [one for one in _differences(*settings) if one.name not in OF_THE_MACHINE],
        "environment": [
            one for one in _differences(*map(_read_environment, (first, second))) if one.name not in OF_THE_START
        ],
    }
    results = [run.results for run in runs if run.results is not None]
    if len(results) == 2:
        for path in (first, second):
            sums.check(path, MODEL)
        found |= {
            "figures": _differences(*map(list_figures, results)),
            "entries": _differences(*map(list_entries, results)),
            "costs": _differences(*({**list_costs(one), **list_sizes(one)} for one in results)),
            "same_model": sums.digest(first / MODEL) == sums.digest(second / MODEL),
        }
    return Comparison(runs, **found)


def _read_environment(path: Path) -> dict[str, Any]:
    """Return the environment of a run; what is neither text nor number is JSON."""
    found = read_json(path / ENVIRONMENT)
    with blame_file(path / ENVIRONMENT):
        return {name: v if isinstance(v, str | int | float) else json.dumps(v) for name, v in found.items()}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Return what differs between two mappings, in the order of the first, then of the second."""
    pairs = [
        Difference(name, first.get(name, ABSENT), second.get(name, ABSENT)) for name in dict.fromkeys([*first, *second])
    ]
    return [pair for pair in pairs if pair.first != pair.second]
