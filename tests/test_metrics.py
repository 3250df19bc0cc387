import math

import pytest
import torch

from clframe import metrics

# Three experiences with 100, 100 and 200 test images; the later ones are evaluated too.
R = [
    [0.9, 0.3, 0.2],
    [0.7, 0.8, 0.4],
    [0.5, 0.9, 0.6],
]
COUNTS = [100, 100, 200]


def values(matrix, counts=COUNTS, **given):
    return {name: measure.value for name, measure in metrics.measures(matrix, counts, **given).items()}


def test_every_measure_of_a_matrix_worked_out_by_hand():
    found = values(R, joint=[0.95, 0.9, 0.8], baseline=[0.1, 0.25, 0.3])
    assert found == {
        "average_accuracy": pytest.approx((0.5 + 0.9 + 0.6) / 3),
        # after 1: 0.9; after 2: (70 + 80) / 200; after 3: (50 + 90 + 120) / 400
        "average_incremental_accuracy": pytest.approx((0.9 + 0.75 + 0.65) / 3),
        # the second is best at the end: max over all i gives 0, not -0.1
        "forgetting": pytest.approx(((0.9 - 0.5) + 0.0) / 2),
        "backward_transfer": pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 2),
        "forward_transfer": pytest.approx(((0.3 - 0.25) + (0.4 - 0.3)) / 2),
        "intransigence": pytest.approx(((0.95 - 0.9) + (0.9 - 0.8) + (0.8 - 0.6)) / 3),
        "learning_accuracy": pytest.approx((0.9 + 0.8 + 0.6) / 3),
    }


def test_average_incremental_accuracy_counts_images_not_experiences():
    found = values(R, counts=[300, 100, 100])["average_incremental_accuracy"]
    assert found == pytest.approx((0.9 + (270 * 0.7 / 0.9 + 80) / 400 + (150 + 90 + 60) / 500) / 3)


def test_what_was_not_given_or_not_measured_is_none():
    lower = [[0.9, None, None], [0.7, 0.8, None], [0.5, 0.9, 0.6]]
    found = values(lower, baseline=[0.1, 0.1, 0.1])
    assert found["forward_transfer"] is None
    assert found["intransigence"] is None
    assert found["forgetting"] == pytest.approx(0.2)
    assert found["average_incremental_accuracy"] == pytest.approx((0.9 + 0.75 + 0.65) / 3)


def test_a_run_that_is_evaluated_once_at_the_end_has_an_accuracy_and_no_forgetting():
    none = [None, None, None]
    assert values([none, none, [0.5, 0.9, 0.6]]) == {
        "average_accuracy": pytest.approx(2 / 3),
        "average_incremental_accuracy": None,
        "forgetting": None,
        "backward_transfer": None,
        "forward_transfer": None,
        "intransigence": None,
        "learning_accuracy": None,
    }


def test_a_reading_that_a_run_does_not_have_is_none_throughout():
    assert set(values([[None, None, None]] * 3).values()) == {None}
    assert set(values([]).values()) == {None}


def test_the_first_row_alone_has_nothing_to_forget():
    found = values(R[:1])
    assert (found["average_accuracy"], found["average_incremental_accuracy"]) == (0.9, pytest.approx(0.9))
    assert (found["forgetting"], found["backward_transfer"]) == (None, None)


def test_a_run_in_progress_is_measured_over_what_it_has_seen():
    found = values(R[:2])
    assert found["average_accuracy"] == pytest.approx(0.75)
    assert found["forgetting"] == pytest.approx(0.2)
    assert found["backward_transfer"] == pytest.approx(-0.2)


def test_forgetting_is_exactly_zero_where_nothing_moves():
    found = values([[0.7, None], [0.7, 0.4]], counts=[3, 3])
    assert (found["forgetting"], found["backward_transfer"]) == (0.0, 0.0)


def test_every_measure_says_what_it_is():
    labelled = {**metrics.measures(R, COUNTS), **metrics.calibration(torch.zeros(1, 2), torch.tensor([0]))}
    assert all(measure.formula and measure.source for measure in labelled.values())


def scores_of(*probabilities):
    return torch.tensor(probabilities).log()


def test_ece_of_five_predictions_by_hand():
    # Bins of 1/15: 0.70 and 0.72 fall into the 11th (0.667, 0.733], 0.95 and 0.98 into the 15th.
    scores = scores_of([0.70, 0.30], [0.28, 0.72], [0.95, 0.05], [0.98, 0.02], [0.6, 0.4])
    labels = torch.tensor([0, 0, 0, 0, 1])
    bins = abs(1 - 0.70 - 0.72) + abs(2 - 0.95 - 0.98) + abs(0 - 0.6)
    assert metrics.expected_calibration_error(scores, labels) == pytest.approx(bins / 5, abs=1e-6)


def test_ece_puts_complete_certainty_into_the_last_bin_and_ignores_classes_that_are_ruled_out():
    scores = torch.tensor([[50.0, -50.0, -torch.inf], [50.0, -50.0, -torch.inf]])
    assert metrics.expected_calibration_error(scores, torch.tensor([0, 0])) == 0.0
    assert metrics.expected_calibration_error(scores, torch.tensor([0, 1])) == 0.5


def test_nll_by_hand():
    scores = scores_of([0.5, 0.5], [0.25, 0.75])
    found = metrics.negative_log_likelihood(scores, torch.tensor([0, 0]))
    assert found == pytest.approx((math.log(2) + math.log(4)) / 2)
    masked = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert metrics.negative_log_likelihood(masked, torch.tensor([1])) == pytest.approx(math.log(2))
    assert metrics.negative_log_likelihood(masked, torch.tensor([2])) == math.inf


def test_share_of_errors_among_the_confident():
    scores = scores_of([0.995, 0.005], [0.995, 0.005], [0.001, 0.999], [0.999, 0.001], [0.6, 0.4])
    labels = torch.tensor([0, 1, 1, 0, 1])
    assert metrics.confident_errors(scores, labels) == pytest.approx(0.25)
    assert metrics.confident_errors(scores[4:], labels[4:]) is None


def test_calibration_of_no_images_is_none():
    found = metrics.calibration(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert {name: measure.value for name, measure in found.items()} == {
        "ece": None,
        "nll": None,
        "confident_errors": None,
    }


def test_confusion_matrix_has_labels_as_rows_and_gives_the_accuracy_of_each_class():
    predicted = torch.tensor([0, 1, 1, 2, 0])
    labels = torch.tensor([0, 0, 1, 2, 2])
    confusion = metrics.confusion_matrix(predicted, labels, n_classes=4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert metrics.accuracy_per_class(confusion) == [0.5, 1.0, 0.5, None]
