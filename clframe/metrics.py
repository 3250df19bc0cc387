"""Measures of a run: functions of its accuracy matrix, or of scores and labels, each with formula and source.

An accuracy matrix R is a list of rows: R[i][j] is the accuracy (0 to 1) on the test images of experience j
after learning experience i, None where it was not measured. It has one row for each experience learned so far,
so the number of rows, T, is the number of experiences seen; a row may be longer, as later experiences can be
evaluated, too. Formulas count experiences from 1 to T.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Matrix = Sequence[Sequence[float | None]]

CONFIDENT = 0.99
BINS = 15
TEMPERATURES = (0.01, 100.0)  # the lowest and the highest temperature that is fitted
HALVINGS = 60  # of the interval of 1 / T: exact to the last digits


@dataclass(frozen=True)
class Measure:
    """A number with its formula and source; `value` is None where the measure is not defined."""

    value: float | None
    formula: str
    source: str


def measures(
    matrix: Matrix,
    counts: Sequence[int],
    joint: Sequence[float | None] | None = None,
    baseline: Sequence[float | None] | None = None,
) -> dict[str, Measure]:
    """Compute all measures of an accuracy matrix, by name.

    Args:
        matrix: R, one row for each experience learned.
        counts: number of test images of each experience.
        joint: accuracy on each experience of a run that learned all of them together.
        baseline: accuracy on each experience of the network as it was initialized.
    """
    return {
        "average_accuracy": Measure(
            average_accuracy(matrix), "mean over j of R[T,j]", "Lopez-Paz & Ranzato 2017 (GEM)"
        ),
        "average_incremental_accuracy": Measure(
            average_incremental_accuracy(matrix, counts),
            "mean over i of sum_{j<=i} n_j R[i,j] / sum_{j<=i} n_j, n_j the number of test images of j: the "
            "mean over steps, from the first, of the accuracy on all test images of the experiences seen",
            "Rebuffi et al. 2017 (iCaRL)",
        ),
        "forgetting": Measure(
            forgetting(matrix),
            "mean over j<T of max_i R[i,j] - R[T,j], i from 1 to T (so it is never negative; Chaudhry et al. "
            "leave out i = T, which differs where an experience is best at the end)",
            "Chaudhry et al. 2018 (RWalk)",
        ),
        "backward_transfer": Measure(
            backward_transfer(matrix), "mean over j<T of R[T,j] - R[j,j]", "Lopez-Paz & Ranzato 2017 (GEM)"
        ),
        "forward_transfer": Measure(
            forward_transfer(matrix, baseline),
            "mean over j>1 of R[j-1,j] - b_j, b_j the accuracy of the network as initialized",
            "Lopez-Paz & Ranzato 2017 (GEM)",
        ),
        "intransigence": Measure(
            intransigence(matrix, joint),
            "mean over j of a_j - R[j,j], a_j the accuracy on j of a run that learned all experiences at once "
            "(Chaudhry et al. compare with one that learned 1 to j)",
            "Chaudhry et al. 2018 (RWalk)",
        ),
        "learning_accuracy": Measure(learning_accuracy(matrix), "mean over j of R[j,j]", "Riemer et al. 2019 (MER)"),
    }


def average_accuracy(matrix: Matrix) -> float | None:
    """Return the mean of the last row over the experiences seen; None if it is not known."""
    return mean(matrix[-1][: len(matrix)]) if matrix else None


def average_incremental_accuracy(matrix: Matrix, counts: Sequence[int]) -> float | None:
    """Return the mean over all rows of the accuracy on all test images of the experiences seen by then."""
    rows = []
    for i, row in enumerate(matrix):
        seen = row[: i + 1]
        correct = [None if a is None else a * n for a, n in zip(seen, counts, strict=False)]
        right = mean(correct)
        images = sum(counts[: i + 1])
        rows.append(None if right is None or not images else right * len(seen) / images)
    return mean(rows)


def forgetting(matrix: Matrix) -> float | None:
    """Return the mean, over all experiences but the last, of the best accuracy ever on it minus the one at the end."""
    drops: list[float | None] = []
    for j in range(len(matrix) - 1):
        known = [row[j] for row in matrix]
        best = max((a for a in known if a is not None), default=None)
        drops.append(None if known[j] is None else difference(best, known[-1]))
    return mean(drops)


def backward_transfer(matrix: Matrix) -> float | None:
    """Return the mean, over all experiences but the last, of the accuracy at the end minus that just after learning."""
    return mean(difference(matrix[-1][j], matrix[j][j]) for j in range(len(matrix) - 1))


def forward_transfer(matrix: Matrix, baseline: Sequence[float | None] | None) -> float | None:
    """Return the mean, over all experiences but the first, of the accuracy just before learning minus `baseline`."""
    if baseline is None:
        return None
    return mean(difference(matrix[j - 1][j], baseline[j]) for j in range(1, len(matrix)))


def intransigence(matrix: Matrix, joint: Sequence[float | None] | None) -> float | None:
    """Return the mean, over all experiences, of the accuracy of a joint run minus that just after learning."""
    if joint is None:
        return None
    return mean(difference(joint[j], matrix[j][j]) for j in range(len(matrix)))


def learning_accuracy(matrix: Matrix) -> float | None:
    """Return the mean, over all experiences, of the accuracy just after learning."""
    return mean(matrix[j][j] for j in range(len(matrix)))


def calibration(scores: Tensor, labels: Tensor) -> dict[str, Measure]:
    """Compute the measures of how far the confidence of predictions can be trusted, by name.

    Args:
        scores: [N, C] logits, -inf for classes that are ruled out.
        labels: [N] int64.
    """
    return {
        "ece": Measure(
            expected_calibration_error(scores, labels),
            f"sum over {BINS} equal bins of confidence of |B|/N |accuracy(B) - mean confidence(B)|",
            "Guo et al. 2017",
        ),
        "nll": Measure(negative_log_likelihood(scores, labels), "mean over images of -ln p(label)", "Guo et al. 2017"),
        "confident_errors": Measure(
            confident_errors(scores, labels),
            f"share of errors among the predictions of confidence >= {CONFIDENT}",
            "this project",
        ),
    }


def expected_calibration_error(scores: Tensor, labels: Tensor, bins: int = BINS) -> float | None:
    """Return the ECE of logits [N, C], with bins of confidence ((m - 1) / M, m / M]; None without images."""
    if not len(labels):
        return None
    confidence, correct = _predictions(scores, labels)
    where = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = confidence.new_zeros(bins).index_add(0, where, correct - confidence)
    return float(gaps.abs().sum() / len(labels))


def negative_log_likelihood(scores: Tensor, labels: Tensor) -> float | None:
    """Return the mean -ln p(label) of logits [N, C], infinite if a label is ruled out; None without images."""
    if not len(labels):
        return None
    return float(-scores.double().log_softmax(1).gather(1, labels[:, None]).mean())


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    """Fit the temperature T > 0 for which the NLL of softmax(z / T) is lowest (Guo et al., ICML 2017).

    The likeliest class of an image does not depend on T. The NLL is convex in 1 / T; its derivative there is the mean
    over images of E[z] - z_y, with E under softmax(z / T), and its zero is found by halving an interval. Images whose
    label is ruled out are left out.

    Args:
        scores: z [N, C] logits, -inf for classes that are ruled out.
        labels: y [N] int64.

    Returns:
        T; 1 where nothing can be fitted: without images, or where the likeliest class is always right, for which lower
        temperatures are always better.
    """
    rows = scores.gather(1, labels[:, None]).isfinite().flatten()
    z, y = scores[rows].double(), labels[rows]
    if not len(y) or bool((z.argmax(1) == y).all()):
        return 1.0
    finite = z.masked_fill(~z.isfinite(), 0.0)  # the ruled-out classes' share of the softmax is 0
    own = z.gather(1, y[:, None]).flatten()

    def derivative(b: float) -> float:
        """Return the derivative of the NLL at b = 1 / T."""
        return float(((z * b).softmax(1) * finite).sum(1).sub(own).mean())

    low = 1 / TEMPERATURES[1]
    high = 1 / TEMPERATURES[0]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if derivative(middle) < 0:
            low = middle
        else:
            high = middle
    return 2 / (low + high)


def confident_errors(scores: Tensor, labels: Tensor, threshold: float = CONFIDENT) -> float | None:
    """Return the share of errors among predictions of confidence >= `threshold`; None if there is no such prediction.

    Args:
        scores: [N, C] logits.
        labels: [N] int64.
        threshold: from 0 to 1.
    """
    confidence, correct = _predictions(scores, labels)
    sure = confidence >= threshold
    return float(1 - correct[sure].mean()) if sure.any() else None


def confusion_matrix(predicted: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Return counts [C, C] int64: the row is the label, the column the predicted class (both [N] int64)."""
    return (labels * n_classes + predicted).bincount(minlength=n_classes**2).view(n_classes, n_classes)


def accuracy_per_class(confusion: Tensor) -> list[float | None]:
    """Return the accuracy on each class from a confusion matrix [C, C]; None for classes without images."""
    pairs = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True)
    return [right / images if images else None for right, images in pairs]


def _predictions(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the confidence [N] and the correctness [N] (1 or 0) of the likeliest classes, both float64."""
    confidence, predicted = scores.double().softmax(1).max(1)
    return confidence, (predicted == labels).double()


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None if there are no values or any of them is None."""
    known = list(values)
    total = 0.0
    for value in known:
        if value is None:
            return None
        total += value
    return total / len(known) if known else None


def difference(a: float | None, b: float | None) -> float | None:
    """Return a - b; None if either is None."""
    return None if a is None or b is None else a - b
