"""Curves of a run: which record gives which points, by which names, along which axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from clframe.data.pictures import draw_matrix
from clframe.metrics import average_accuracy, forgetting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clframe.context import Run
    from clframe.events import Event

Axis = Literal["total_step", "experiences"]  # steps of the run; experiences learned: 1, 2, ...

VALIDATION = "validation_"  # prefix of the groups of accuracies on held-out images
WHILE_LEARNING = "while_learning/"  # prefix of the groups of measures of evaluations within experiences
TITLES = {"class": "class-incremental", "task": "task-incremental", "domain": "domain-incremental"}


@dataclass(frozen=True, eq=False)
class Points:
    """The points that one record adds to the curves of a run, all at one place of one axis.

    Attributes:
        axis: the unit of `at`.
        at: the place.
        values: by the name of the curve, ``group/name``.
        pictures: [H, W, 3] uint8, by name.
    """

    axis: Axis
    at: int
    values: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


def points_of(run: Run, record: Event) -> Points | None:
    """Return the points of a record that the engine has just emitted; None for a kind that adds none.

    Accuracies and measures taken after an experience, and the images that a method shows, stand at the number of
    experiences learned; everything else stands at the step of the run.
    """
    kind = record["kind"]
    if kind == "step":
        values = {**_named("loss", record["losses"]), "learning_rate": record["lr"]}
        return Points("total_step", record["total_step"], values)
    if kind == "within":
        group = f"{_part(record)}within_{record['reading']}"
        return Points("total_step", record["total_step"], _named(group, by_experience(record["row"])))
    if kind == "log":
        return Points("total_step", record["total_step"], _named("log", record["values"]))
    if kind == "images":
        shown = {record["name"]: record["picture"].numpy()}
        return Points("experiences", record["experience"] + 1, pictures=shown)
    if kind == "eval":
        return _points_of_evaluation(run, record)
    return None


def _points_of_evaluation(run: Run, record: Event) -> Points:
    """Return the accuracies on each experience and, of the test images, the measures so far, while learning too."""
    values: dict[str, float] = {}
    learned = 0
    for reading, row in record["rows"].items():
        if _part(record):
            values |= _named(f"{VALIDATION}{reading}", by_experience(row))
            learned = len(run.validation[reading])
            continue
        matrix = run.accuracy[reading]
        learned = len(matrix)
        values |= _named(f"accuracy_{reading}", by_experience(row))
        values |= _named("average_accuracy", {reading: average_accuracy(matrix)})
        values |= _named("forgetting", {reading: forgetting(matrix)})
    if not _part(record) and run.config.run.eval_every != "experience" and run.evaluations is not None:
        for reading, measures in run.evaluations.measures().items():
            for name, measure in measures.items():
                values |= _named(f"{WHILE_LEARNING}{name}", {reading: measure.value})
    return Points("experiences", learned, values)


def final_points(run: Run) -> Points:
    """Return the pictures of the accuracy matrices of a run that has ended or stopped; none for an empty matrix."""
    learned = len(next(iter(run.accuracy.values()), []))
    drawn = {
        f"accuracy_matrix/{reading}": draw_matrix(matrix, TITLES[reading])
        for reading, matrix in run.accuracy.items()
        if any(accuracy is not None for row in matrix for accuracy in row)
    }
    return Points("experiences", learned, pictures=drawn)


def is_complete(run: Run) -> bool:
    """Return whether every experience of a run was learned and evaluated."""
    return bool(run.accuracy) and all(len(matrix) == len(run.scenario) for matrix in run.accuracy.values())


def hyperparameters(run: Run) -> dict[str, int | float | str]:
    """Return the part of a configuration that can change the results, flat, by the names that ``--set`` uses."""
    config = run.config.model_dump()
    observers = [plugin.name for plugin in run.plugins if plugin.observer]
    methods = {name: options for name, options in config["plugins"].items() if name not in observers}
    sections = {**{n: config[n] for n in ("scenario", "model", "train")}, **methods}
    flat = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    flat["plugins"] = ", ".join(methods) or "none"
    flat["seed"] = config["run"]["seed"]
    kept = {name: value for name, value in flat.items() if value is not None}
    return {name: v if type(v) in (int, float, str) else str(v) for name, v in kept.items()}


def readings(setting: str) -> list[str]:
    """Return the evaluation modes that a run of this setting can have."""
    return ["class", "task"] if setting == "class" else [setting]


def by_experience(row: Sequence[float | None]) -> dict[str, float | None]:
    """Return a row of accuracies by the name of the experience, counted from 1, in an order that sorts."""
    digits = len(str(len(row)))
    return {f"experience_{j:0{digits}}": accuracy for j, accuracy in enumerate(row, start=1)}


def _named(group: str, values: Mapping[str, float | None]) -> dict[str, float]:
    """Return `values` by the names of their curves; None adds no point."""
    return {f"{group}/{name}": value for name, value in values.items() if value is not None}


def _part(record: Event) -> str:
    """Return the prefix of the groups of a record's accuracies."""
    return VALIDATION if record.get("part") == "val" else ""
