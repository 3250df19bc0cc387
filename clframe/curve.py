"""Measures while learning: what a run forgets and learns between its evaluations at the ends of experiences.

With ``run.eval_every`` a run is evaluated every N steps or every epoch, and at the end of each experience, always on
the same images. A_n(j) is the accuracy (0 to 1) on experience j at evaluation n = 1 .. N_all, None where it was not
measured; e_j is the evaluation at the end of experience j, and T the number of experiences learned. Formulas count
experiences and evaluations from 1, the code from 0.

How low and how high the accuracy gets between two ends depends on how often one looks, so that a figure belongs to its
interval: `MeasureWhileLearning` holds both.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clframe.metrics import Measure, difference, mean

Every = int | Literal["epoch"]  # the interval of evaluations: steps, or epochs
Row = Sequence[float | None]

WINDOWS = (10, 100)  # D of the windowed measures, in evaluations
AREA = 10  # beta of the learning curve area, in evaluations
SOURCE = "De Lange, van de Ven & Tuytelaars 2023"


@dataclass(frozen=True)
class MeasureWhileLearning(Measure):
    """A measure of evaluations while learning, with their interval and images: only figures of one interval compare.

    Attributes:
        every: steps between two evaluations, or ``epoch``.
        images: how many test images of each class were evaluated; None: all.
    """

    every: Every
    images: int | None


@dataclass(frozen=True)
class Curve:
    """The accuracies of a run at all its evaluations, in one evaluation mode.

    Attributes:
        experience: for each evaluation, the index of the experience that was being learned.
        ends: the number of the evaluation at the end of an experience, from 0, by the index of the experience.
        rows: for each evaluation, the accuracy on each experience.
        counts: number of images on which each experience was evaluated.
    """

    experience: Sequence[int]
    ends: Mapping[int, int]
    rows: Sequence[Row]
    counts: Sequence[int]

    @property
    def learned(self) -> int:
        """Return T, the number of experiences that were learned."""
        return max(self.ends, default=-1) + 1

    def since(self, j: int) -> list[float | None]:
        """Return the accuracies on experience `j` since its learning began, from the first that was measured."""
        values = [row[j] for row in self.rows[bisect_left(self.experience, j) :]]
        first = next((n for n, value in enumerate(values) if value is not None), len(values))
        return values[first:]

    def within(self, j: int) -> list[float | None]:
        """Return the accuracies on experience `j` while it was learned; the one at its end is the last."""
        return [row[j] for row in self.rows[bisect_left(self.experience, j) : bisect_right(self.experience, j)]]

    def between(self, j: int, after: int, until: int) -> list[float | None] | None:
        """Return the accuracies on experience `j` after the end of one experience, until that of another, inclusive.

        None if the run was not evaluated at one of these ends, as it had not learned then.
        """
        if after not in self.ends or until not in self.ends:
            return None
        return [row[j] for row in self.rows[self.ends[after] + 1 : self.ends[until] + 1]]


def measures(curve: Curve, every: Every, images: int | None) -> dict[str, MeasureWhileLearning]:
    """Compute all measures of a curve, by name.

    Args:
        curve: the accuracies.
        every: steps between two evaluations, or ``epoch``.
        images: how many test images of each class were evaluated; None: all.
    """
    gaps = stability_gaps(curve)
    found = {
        "average_minimum_accuracy": (
            average_minimum_accuracy(curve),
            "mean over j<T of the min over n>e_j of A_n(j) (min-ACC): after learning j has ended",
            SOURCE,
        ),
        "worst_case_accuracy": (
            worst_case_accuracy(curve),
            "A_N(T) / T + (1 - 1/T) min-ACC, A_N(T) the accuracy on T at the last evaluation (WC-ACC)",
            SOURCE,
        ),
    }
    for name, measure, change, short in (
        ("forgetting", windowed_forgetting, "A_a(j) - A_b(j)", "WF"),
        ("plasticity", windowed_plasticity, "A_b(j) - A_a(j)", "WP"),
    ):
        for window in WINDOWS:
            found[f"windowed_{name}_{window}"] = (
                measure(curve, window),
                f"mean over j of the max, at least 0, of {change} over all a<b in {window} successive evaluations "
                f"({short}), counted from the first evaluation of j",
                SOURCE,
            )
    found |= {
        "mean_stability_gap": (
            mean(gaps),
            "mean over t<T and j<=t of A_{e_t}(j) - min of A_n(j) over the evaluations n of experience t+1",
            SOURCE,
        ),
        "largest_stability_gap": (
            None if None in gaps else max((gap for gap in gaps if gap is not None), default=None),
            "max over t<T and j<=t of A_{e_t}(j) - min of A_n(j) over the evaluations n of experience t+1",
            SOURCE,
        ),
        "learning_curve_area": (
            learning_curve_area(curve, AREA),
            f"mean over j of the mean of A_n(j) over the first {AREA} evaluations while j is learned, or all where "
            "there are fewer (LCA)",
            "Chaudhry et al. 2019 (A-GEM), who also count the accuracy before learning",
        ),
        "anytime_accuracy": (
            anytime_accuracy(curve),
            "mean over n of the accuracy on all evaluated images of the experiences seen by then (A_AUC)",
            "Koh et al. 2022 (i-Blurry)",
        ),
    }
    return {name: MeasureWhileLearning(*measure, every, images) for name, measure in found.items()}


def average_minimum_accuracy(curve: Curve) -> float | None:
    """Return the mean, over all experiences but the last, of the lowest accuracy after it was learned (min-ACC)."""
    last = curve.learned - 1
    return mean(_lowest(curve.between(j, j, last)) for j in range(last))


def worst_case_accuracy(curve: Curve) -> float | None:
    """Return min-ACC and the last accuracy on the last experience, weighted by their number of experiences (WC-ACC)."""
    n = curve.learned
    final = curve.rows[curve.ends[n - 1]][n - 1] if n else None
    if n == 1 or final is None:
        return final
    lowest = average_minimum_accuracy(curve)
    return None if lowest is None else final / n + (1 - 1 / n) * lowest


def windowed_forgetting(curve: Curve, window: int) -> float | None:
    """Return the mean, over all experiences, of the largest fall of accuracy in `window` evaluations (WF)."""
    return mean(_largest_fall(curve.since(j), window) for j in range(curve.learned))


def windowed_plasticity(curve: Curve, window: int) -> float | None:
    """Return the mean, over all experiences, of the largest rise of accuracy in `window` evaluations (WP)."""
    turned = [[None if value is None else -value for value in curve.since(j)] for j in range(curve.learned)]
    return mean(_largest_fall(values, window) for values in turned)


def stability_gaps(curve: Curve) -> list[float | None]:
    """Return how deep the accuracy on each experience falls below that at the end of an experience, in the next one.

    There is one depth for each experience t but the last, and each experience up to t. A depth below 0 means that the
    accuracy was higher than before at all evaluations.
    """
    depths = []
    for t in range(curve.learned - 1):
        for j in range(t + 1):
            before = curve.rows[curve.ends[t]][j] if t in curve.ends else None
            depths.append(difference(before, _lowest(curve.between(j, t, t + 1))))
    return depths


def learning_curve_area(curve: Curve, first: int) -> float | None:
    """Return the mean, over all experiences, of the mean accuracy over their `first` evaluations or fewer (LCA)."""
    return mean(mean(curve.within(j)[:first]) for j in range(curve.learned))


def anytime_accuracy(curve: Curve) -> float | None:
    """Return the mean, over all evaluations, of the accuracy on all images of the experiences seen by then (A_AUC)."""
    return mean(seen_accuracies(curve))


def seen_accuracies(curve: Curve) -> list[float | None]:
    """Return, for each evaluation, the accuracy on all images of the experiences seen by then."""
    return [
        _pool(row[: during + 1], curve.counts[: during + 1])
        for row, during in zip(curve.rows, curve.experience, strict=True)
    ]


def _pool(row: Row, counts: Sequence[int]) -> float | None:
    """Return the accuracy on the images of all experiences of `row` together, which has `counts` of them."""
    right = 0.0
    for accuracy, images in zip(row, counts, strict=True):
        if accuracy is None:
            return None
        right += accuracy * images
    return right / sum(counts) if sum(counts) else None


def _lowest(values: Sequence[float | None] | None) -> float | None:
    """Return the minimum; None if there are no values or any of them is None."""
    known = [value for value in values or () if value is not None]
    return min(known) if values and len(known) == len(values) else None


def _largest_fall(values: Sequence[float | None], window: int) -> float | None:
    """Return the max of values[a] - values[b] over a < b < a + `window`, at least 0; None if a value is missing.

    The highest value of the window is kept while it moves, in O(n). The authors' code skips every start that is not
    above all values before it; a rise from a low start, as that of .8 over .1 after .9, is then never found.
    """
    if not values:
        return None
    largest = 0.0
    starts: deque[tuple[int, float]] = deque()  # candidates for the highest value, each higher than those after it
    for b, value in enumerate(values):
        if value is None:
            return None
        while starts and starts[0][0] <= b - window:
            starts.popleft()
        if starts:
            largest = max(largest, starts[0][1] - value)
        while starts and starts[-1][1] <= value:
            starts.pop()
        starts.append((b, value))
    return largest


class Evaluations:
    """All evaluations of a run so far, for its measures while learning.

    Args:
        every: steps between two evaluations, or ``epoch``.
        images: how many test images of each class are evaluated; None: all.

    Attributes:
        experience: for each evaluation, the index of the experience that was being learned.
        total_step: for each evaluation, the steps of the run before it.
        ends: the number of the evaluation at the end of an experience, from 0, by the index of the experience.
        accuracy: the rows of all evaluations, by evaluation mode.
        counts: number of images of each experience, at the latest evaluation at an end.
        whole: whether these are all evaluations; a checkpoint of an earlier clframe holds none.
    """

    def __init__(self, every: Every, images: int | None) -> None:
        self.every = every
        self.images = images
        self.experience: list[int] = []
        self.total_step: list[int] = []
        self.ends: dict[int, int] = {}
        self.accuracy: dict[str, list[Row]] = {}
        self.counts: list[int] = []
        self.whole = True

    def __len__(self) -> int:
        return len(self.experience)

    def add(self, experience: int, total_step: int, accuracy: Mapping[Any, Row]) -> None:
        """Add an evaluation, with its rows by evaluation mode."""
        width = max(map(len, accuracy.values()), default=0)
        for mode in accuracy:
            self.accuracy.setdefault(str(mode), [[None] * width] * len(self))
        self.experience.append(experience)
        self.total_step.append(total_step)
        for mode, rows in self.accuracy.items():
            rows.append(accuracy.get(mode, [None] * width))

    def add_end(self, experience: int, total_step: int, accuracy: Mapping[Any, Row], counts: Sequence[int]) -> None:
        """Add the evaluation at the end of an experience, in the place of one after the same step, if any."""
        if self.total_step and self.total_step[-1] == total_step:
            del self.experience[-1], self.total_step[-1]
            for rows in self.accuracy.values():
                del rows[-1]
        self.add(experience, total_step, accuracy)
        self.ends[experience] = len(self) - 1
        self.counts = list(counts)

    def measures(self) -> dict[str, dict[str, MeasureWhileLearning]]:
        """Return the measures of each evaluation mode by name; without values if evaluations are missing."""
        nothing = Curve([], {}, [], [])
        return {
            mode: measures(
                Curve(self.experience, self.ends, rows, self.counts) if self.whole else nothing, self.every, self.images
            )
            for mode, rows in self.accuracy.items()
        }

    def describe(self) -> dict[str, Any]:
        """Return what `results.json` holds of the evaluations: their interval, images and number."""
        return {
            "every": self.every,
            "images_per_class": self.images,
            "test_images": self.counts,
            "evaluations": len(self) if self.whole else None,
        }

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: tensors, because a list would take ten times the bytes in its tree."""
        import torch

        end = torch.zeros(len(self), dtype=torch.bool)
        end[list(self.ends.values())] = True
        return {
            "experience": torch.tensor(self.experience, dtype=torch.int64),
            "total_step": torch.tensor(self.total_step, dtype=torch.int64),
            "end": end,
            "accuracy": {
                mode: torch.tensor(
                    [[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float64
                )
                for mode, rows in self.accuracy.items()
            },
            "counts": self.counts,
            "whole": self.whole,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with the evaluations of `state`. Raises `ValueError` if its entries do not fit each other."""
        n = len(state["experience"])
        series = (state["total_step"], state["end"], *state["accuracy"].values())
        if any(len(values) != n for values in series) or any(v.dim() != 2 for v in state["accuracy"].values() if n):
            raise ValueError("the evaluations while learning do not fit each other")
        self.experience = state["experience"].tolist()
        self.total_step = state["total_step"].tolist()
        self.ends = {self.experience[n]: n for n, end in enumerate(state["end"].tolist()) if end}
        self.accuracy = {
            mode: [[None if math.isnan(value) else value for value in row] for row in rows.tolist()]
            for mode, rows in state["accuracy"].items()
        }
        self.counts = state["counts"]
        self.whole = state["whole"]
