"""The functions of distillation, against their formulas and against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe import Batch
from clframe.toolkit.distill import (
    attention_distance,
    half_squared_distance,
    hard_cross_entropy,
    incremental_bce,
    kl_divergence,
    observe,
    sigmoid_cross_entropy,
    soft_cross_entropy,
    soft_cross_entropy_per_group,
)

B, C = 5, 6


def logits(seed: int, columns: int = C) -> Tensor:
    return 3 * torch.randn(B, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value, of)[0]


@pytest.fixture
def batch() -> Batch:
    zeros = torch.zeros(B, dtype=torch.int64)
    weight = torch.tensor([1.0, 1, 2, 0, 1])
    return Batch(torch.zeros(B, 1), zeros, zeros, zeros, weight, torch.tensor([0, 0, 0, 1, 1]))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_is_its_definition_and_has_the_gradient_of_the_cross_entropy(temperature: float) -> None:
    q, z = logits(1), logits(2).requires_grad_()
    p, s = (q / temperature).softmax(1), (z / temperature).softmax(1)
    found = kl_divergence(q, z, temperature)
    assert torch.allclose(found, (p * (p / s).log()).sum(1), rtol=1e-9)
    wanted = gradient(soft_cross_entropy(q, z, temperature).sum(), z)
    assert torch.allclose(gradient(found.sum(), z), wanted, rtol=1e-9)
    assert kl_divergence(q, q + 1).abs().max() < 1e-12


def test_divergence_gives_a_padded_class_no_share() -> None:
    """0 log 0 = 0; and the class is pushed down by its own share."""
    q, z = logits(1, C - 2), logits(2).requires_grad_()
    padded = torch.nn.functional.pad(q, (0, 2), value=-torch.inf)
    found = kl_divergence(padded, z)
    p, s = q.softmax(1), z.softmax(1)
    assert torch.allclose(found, (p * (p / s[:, : C - 2]).log()).sum(1), rtol=1e-9)
    assert torch.allclose(gradient(found.sum(), z)[:, C - 2 :], s[:, C - 2 :], rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_gradient_of_soft_cross_entropy_has_no_square_of_the_temperature(temperature: float) -> None:
    """(s_T(z) - s_T(q)) / (T B) for a batch mean; T^2 times as much would be Hinton's."""
    q, z = logits(0), logits(1).requires_grad_()
    got = gradient(soft_cross_entropy(q, z, temperature).mean(), z)
    wanted = ((z / temperature).softmax(1) - (q / temperature).softmax(1)) / (temperature * B)
    assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-12)


def test_soft_cross_entropy_of_equal_logits_is_the_entropy_and_does_not_pull() -> None:
    q = logits(0)
    z = q.clone().requires_grad_()
    value = soft_cross_entropy(q, z, 2.0)
    p = (q / 2).softmax(1)
    assert torch.allclose(value, -(p * p.log()).sum(1), rtol=1e-6)
    assert gradient(value.sum(), z).abs().max() < 1e-12


def test_soft_cross_entropy_does_not_see_a_shift_of_the_logits() -> None:
    q, z = logits(0), logits(1)
    assert torch.allclose(soft_cross_entropy(q + 7, z - 3, 2.0), soft_cross_entropy(q, z, 2.0), rtol=1e-9)


def test_a_score_of_minus_infinity_is_a_share_of_nothing() -> None:
    """Old logits padded by -inf: the targets are the old softmax, and 0 for what is new."""
    q, z = logits(0, 4), logits(1).requires_grad_()
    padded = torch.cat([q, torch.full((B, 2), -torch.inf, dtype=q.dtype)], 1)
    value = soft_cross_entropy(padded, z, 2.0)
    assert torch.allclose(value, -((q / 2).softmax(1) * (z / 2).log_softmax(1)[:, :4]).sum(1), rtol=1e-9)
    assert gradient(value.sum(), z).isfinite().all()


def test_a_hard_label_is_the_one_that_the_teacher_finds_likeliest() -> None:
    q, z = logits(0), logits(1).requires_grad_()
    got = hard_cross_entropy(q, z)
    assert torch.allclose(got, functional.cross_entropy(z, q.argmax(1), reduction="none"), rtol=1e-12)
    # as distillation of a teacher who is very sure, at temperature 1
    assert torch.allclose(got, soft_cross_entropy(1e6 * q, z, 1.0), rtol=1e-9)


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0, 1, 2], [3, 4, 5]], [[2, 3], [0, 5]], [[0, 1, 2], [3, 4]]])
def test_each_group_has_a_hard_label_of_its_own(groups: list[list[int]]) -> None:
    q, z = logits(0), logits(1)
    wanted = sum(hard_cross_entropy(q[:, g], z[:, g]) for g in groups)
    assert torch.allclose(soft_cross_entropy_per_group(q, z, groups, None), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "groups", [[[0, 1], [2, 3]], [[0, 1, 2], [3, 4, 5]], [[2, 3], [0, 5]], [[0, 1, 2], [3, 4]], [[4]], [[1, 0]]]
)
def test_groups_are_softmaxes_of_their_own(groups: list[list[int]]) -> None:
    """A sum over heads, for heads of one size or several, in a row or not."""
    q, z = logits(0), logits(1).requires_grad_()
    got = soft_cross_entropy_per_group(q, z, groups, 2.0)
    wanted = sum(soft_cross_entropy(q[:, g], z[:, g], 2.0) for g in groups)
    assert torch.allclose(got, wanted, rtol=1e-9)
    assert torch.allclose(gradient(got.sum(), z), gradient(wanted.sum(), z), atol=1e-12)


def test_one_softmax_over_all_old_heads_is_another_loss() -> None:
    """Guards against FACIL's LwF: heads concatenated, where the paper sums a softmax for each."""
    q, z = logits(0), logits(1)
    apart, together = soft_cross_entropy_per_group(q, z, [[0, 1], [2, 3]]), soft_cross_entropy(q[:, :4], z[:, :4])
    assert ((apart - together).abs() > 1e-2).all()


def per_group(q: Tensor, z: Tensor) -> Tensor:
    return soft_cross_entropy_per_group(q, z, [[0, 1], [3, 4, 5]])


def for_labels(q: Tensor, z: Tensor) -> Tensor:
    return incremental_bce(z, torch.arange(B), q[:, :4])


@pytest.mark.parametrize(
    "loss",
    [
        soft_cross_entropy,
        hard_cross_entropy,
        per_group,
        sigmoid_cross_entropy,
        for_labels,
        half_squared_distance,
        attention_distance,
    ],
)
def test_no_gradient_reaches_the_teacher(loss) -> None:
    q, z = logits(0).requires_grad_(), logits(1).requires_grad_()
    loss(q, z).sum().backward()
    assert q.grad is None
    assert z.grad.norm() > 0


def test_each_group_has_its_own_shift_and_its_own_entropy() -> None:
    """A constant added to one head changes nothing; equal logits give the sum of entropies, and no gradient."""
    groups = [[0, 1], [2, 3]]
    shift = torch.tensor([7.0, 7, -3, -3, 100, 5])
    q, z = logits(0), logits(1)
    value = soft_cross_entropy_per_group(q, z, groups, 2.0)
    assert torch.allclose(soft_cross_entropy_per_group(q - shift, z + shift, groups, 2.0), value, rtol=1e-9)
    same = q.clone().requires_grad_()
    value = soft_cross_entropy_per_group(q, same, groups, 2.0)
    p = (q[:, :4].unflatten(1, (2, 2)) / 2).softmax(2)
    assert torch.allclose(value, -(p * p.log()).sum((1, 2)), rtol=1e-6)
    assert gradient(value.sum(), same).abs().max() < 1e-12


def test_gradient_of_a_batch_mean_is_divided_by_its_weight(batch: Batch) -> None:
    """(s_T(z) - s_T(q)) / T times w / sum(w): 1/B for each of B rows of weight 1; a row of weight 0 has none."""
    q, z = logits(0), logits(1).requires_grad_()
    each = ((z / 2).softmax(1) - (q / 2).softmax(1)).detach() / 2
    got = gradient(batch.mean(soft_cross_entropy(q, z, 2.0)), z)
    share = torch.tensor([1.0, 1, 2, 0, 1], dtype=torch.float64)[:, None] / 5
    assert torch.allclose(got, share * each, rtol=1e-6, atol=1e-12)
    got = gradient(batch.mean(soft_cross_entropy(q, z, 2.0), batch.origin == 0), z)
    share = torch.tensor([1.0, 1, 2, 0, 0], dtype=torch.float64)[:, None] / 4
    assert torch.allclose(got, share * each, rtol=1e-6, atol=1e-12)
    batch.weight = torch.ones(B)
    got = gradient(batch.mean(soft_cross_entropy(q, z, 2.0)), z)
    assert torch.allclose(got, each / B, rtol=1e-6, atol=1e-12)


def test_sigmoid_cross_entropy_is_a_mean_over_columns() -> None:
    q, z = logits(0), logits(1).requires_grad_()
    value = sigmoid_cross_entropy(q, z)
    t, s = q.sigmoid(), z.sigmoid()
    assert torch.allclose(value, -(t * s.log() + (1 - t) * (1 - s).log()).mean(1), rtol=1e-9)
    assert torch.allclose(gradient(value.sum(), z), (s - t) / C, rtol=1e-6)


def test_half_squared_distance_is_a_sum() -> None:
    """Guards against a mean over the columns, which makes the strength depend on their number."""
    q, z = logits(0), logits(1).requires_grad_()
    value = half_squared_distance(q, z)
    assert torch.allclose(value, 0.5 * ((q - z) ** 2).sum(1), rtol=1e-12)
    assert torch.allclose(gradient(value.sum(), z), z - q, rtol=1e-12)


def test_incremental_bce_has_soft_targets_for_all_old_classes() -> None:
    """d/dz = (sigma(z) - target) / (B C); an old label is not told to its own column (iCaRL, algorithm 3)."""
    q, z = logits(0, 3), logits(1).requires_grad_()
    y = torch.tensor([0, 2, 3, 4, 5])  # two rows of old classes
    got = gradient(incremental_bce(z, y, q).mean(), z)
    targets = torch.zeros(B, C, dtype=torch.float64)
    targets[2, 3] = targets[3, 4] = targets[4, 5] = 1
    targets[:, :3] = q.sigmoid()
    assert torch.allclose(got, (z.sigmoid() - targets) / (B * C), rtol=1e-6, atol=1e-12)


def test_incremental_bce_without_a_teacher_is_plain() -> None:
    z, y = logits(1), torch.tensor([0, 1, 2, 3, 0])
    targets = torch.eye(C, dtype=torch.float64)[y]
    wanted = -(targets * z.sigmoid().log() + (1 - targets) * (1 - z.sigmoid()).log()).mean(1)
    assert torch.allclose(incremental_bce(z, y, None), wanted, rtol=1e-9)


def test_batch_mean_is_weighted(batch: Batch) -> None:
    values = torch.tensor([1.0, 2, 3, 100, 5], dtype=torch.float64)
    assert batch.mean(values).item() == pytest.approx((1 + 2 + 6 + 5) / 5)
    assert batch.mean(values).dtype == torch.float64


def test_batch_mean_over_chosen_rows(batch: Batch) -> None:
    values = torch.tensor([1.0, 2, 3, 100, 5])
    assert batch.mean(values, batch.origin == 0).item() == pytest.approx((1 + 2 + 6) / 4)
    assert batch.mean(values, batch.origin > 0).item() == pytest.approx(5.0)
    assert batch.mean(values, batch.origin > 7).item() == 0


def test_an_observed_output_is_what_the_graph_goes_through_and_the_observer_goes() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = logits(0, 3)
    plain = net(x)
    with observe(net[0]) as kept:
        seen = net(x)
    assert torch.equal(seen, plain)
    assert torch.equal(kept[0], net[0](x))  # not what the ReLU left in its place
    wanted = (net[0](x) > 0) * net[2].weight.sum(0)
    assert torch.allclose(gradient(seen.sum(), kept[0]), wanted, rtol=1e-12)
    net(x)
    assert len(kept) == 1
    assert not any(module._forward_hooks for module in net.modules())


def test_the_graph_begins_at_the_observed_output_of_a_frozen_network() -> None:
    """And no parameter gets a gradient; an error leaves no observer either."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double().requires_grad_(False)
    x = logits(0, 3)

    def look() -> None:
        with observe(net[0]) as kept:
            seen = net(x)
            assert kept[0].is_leaf
            wanted = (net[0](x) > 0) * net[2].weight.sum(0)
            assert torch.allclose(gradient(seen.sum(), kept[0]), wanted, rtol=1e-12)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
