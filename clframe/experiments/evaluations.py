"""Evaluations while learning of finished runs, read from ``metrics.jsonl``: curves for reports.

A run has them with ``run.eval_every=N`` or ``epoch``. Its measures of these evaluations are in ``results.json``; the
accuracies themselves, from which a curve is drawn, are in ``metrics.jsonl`` alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clframe.curve import Curve, seen_accuracies
from clframe.errors import DataError
from clframe.experiments import statistics
from clframe.experiments.outcome import FinishedCell, Key
from clframe.experiments.rendering import count, thin_out
from clframe.experiments.statistics import Estimate, Unit
from clframe.system.reading import blame_file, parse_json, read_text

METRICS = "metrics.jsonl"
METRICS_LIMIT = 2**26  # bytes
POINTS = 100  # of the curve of a method; more are thinned out
# Columns of the table of a study; `results.json` has more measures.
MEASURES = (
    "anytime_accuracy",
    "average_minimum_accuracy",
    "worst_case_accuracy",
    "windowed_forgetting_10",
    "windowed_forgetting_100",
    "windowed_plasticity_10",
    "windowed_plasticity_100",
    "mean_stability_gap",
)


@dataclass(frozen=True)
class Evaluations:
    """All evaluations of a finished run in one evaluation mode.

    Attributes:
        steps: for each evaluation, the steps of the run before it.
        curve: the accuracies.
    """

    steps: Sequence[int]
    curve: Curve

    @property
    def ends(self) -> list[int]:
        """Return the steps of the run at the ends of experiences, in their order."""
        return [self.steps[n] for n in self.curve.ends.values()]

    @property
    def seen(self) -> dict[int, float]:
        """Return the accuracy on all images of the experiences seen so far, by steps of the run."""
        accuracies = seen_accuracies(self.curve)
        return {step: value for step, value in zip(self.steps, accuracies, strict=True) if value is not None}


@contextmanager
def read_metrics(folder: Path, *kinds: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of these kinds in ``metrics.jsonl`` of a run folder.

    Raises:
        DataError: the file is missing, too large or damaged, also where the block finds that a record is.
    """
    if not (folder / METRICS).is_file():
        raise DataError(f"{folder} has no {METRICS}.")
    lines = read_text(folder / METRICS, METRICS_LIMIT).splitlines()
    with blame_file(folder / METRICS):
        named = [line for line in lines if any(f'"{kind}"' in line for kind in kinds)]  # the others need no parsing
        records = (parse_json(line, folder / METRICS) for line in named)
        yield [record for record in records if record["kind"] in kinds]


def read_evaluations(cell: FinishedCell, mode: str) -> Evaluations | None:
    """Return the evaluations of a run on test images; None if ``run.eval_every`` asked for none.

    As in the run, the evaluation at the end of an experience replaces one after the same step.

    Raises:
        DataError: ``metrics.jsonl`` is missing, too large or damaged.
    """
    asked = cell.results.data.get("while_learning")
    if not asked:
        return None
    rows: dict[int, Sequence[float | None]] = {}
    during: dict[int, int] = {}
    ends: dict[int, int] = {}
    with read_metrics(cell.folder, "within", "eval") as records:
        for record in records:
            if record["part"] != "test":
                continue
            step, at_end = int(record["total_step"]), record["kind"] == "eval"
            row = record["rows"].get(mode) if at_end else record["row"] if record["reading"] == mode else None
            if row is None or (at_end and all(accuracy is None for accuracy in row)):
                continue  # another evaluation mode, or an experience in which nothing was learned
            during[step] = int(record["experience"])
            if at_end:
                ends[during[step]] = step
            if at_end and step in rows and asked["images_per_class"] is not None:
                continue  # the step was evaluated on the images of a run's other evaluations
            rows[step] = [None if accuracy is None else float(accuracy) for accuracy in row]
    steps = list(rows)
    numbers = {experience: steps.index(step) for experience, step in ends.items()}
    return Evaluations(steps, Curve(list(during.values()), numbers, list(rows.values()), asked["test_images"]))


def describe_interval(asked: Mapping[str, Any]) -> str:
    """Return in a phrase how often and on what a run was evaluated while learning, as ``results.json`` has it."""
    every = "epoch" if asked["every"] == "epoch" else count(asked["every"], "step")
    images = asked["images_per_class"]
    return f"every {every} on " + ("all test images" if images is None else f"{count(images, 'test image')} of a class")


def find_interval(cells: Sequence[FinishedCell]) -> tuple[Mapping[str, Any] | None, list[str]]:
    """Return how all of these runs that were evaluated while learning were, None if they differ; and all the ways."""
    found = [asked for cell in cells if (asked := cell.results.data.get("while_learning"))]
    phrases = list(dict.fromkeys(map(describe_interval, found)))
    return (found[0] if len(phrases) == 1 else None), phrases


def average_seen(evaluations: Mapping[Key, Evaluations], unit: Unit) -> list[tuple[int, Estimate]]:
    """Return the mean over units of the accuracy on all experiences seen so far, with the step of each point.

    Runs may differ in the steps of their evaluations: each counts with its latest one by then. The curve begins where
    all runs were evaluated once, and ends with the shortest run.

    Args:
        evaluations: of the runs of one method, by seed and class order.
        unit: what the mean is over.
    """
    curves = {key: sorted(found.seen.items()) for key, found in evaluations.items()}
    curves = {key: curve for key, curve in curves.items() if curve}
    if not curves:
        return []
    first = max(curve[0][0] for curve in curves.values())
    last = min(curve[-1][0] for curve in curves.values())
    steps = sorted({step for curve in curves.values() for step, _ in curve if first <= step <= last})
    points = []
    for step in (steps[i] for i in thin_out(len(steps), POINTS)):
        latest = {key: curve[bisect_right(curve, (step, math.inf)) - 1][1] for key, curve in curves.items()}
        points.append((step, statistics.mean_interval(list(statistics.average_by_unit(latest, unit).values()))))
    return points
