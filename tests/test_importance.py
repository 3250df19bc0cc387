from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import clframe
from clframe import testing
from clframe.data.batch import Batch, ImageData
from clframe.data.transform import Transform
from clframe.errors import Interrupted, UsageError
from clframe.model import IncrementalNet
from clframe.runs import checkpoint
from clframe.settings import TrainSettings
from clframe.toolkit import importance
from clframe.toolkit.importance import (
    ImportanceMean,
    Labels,
    Quadratic,
    add_path_step,
    label_cotangents,
    norm_cotangents,
    path_importance,
    weighted_penalty,
)
from clframe.toolkit.per_sample import GradientSums, Reduce, zeros_for
from clframe.training import Phase

CLASSES = 4
IMAGE = (3, 9, 9)


class Backbone(nn.Module):
    def __init__(self, net: nn.Module, width: int) -> None:
        super().__init__()
        self.net, self.width = net, width

    def features(self, x: Tensor) -> Tensor:
        return self.net(x)


def flat(*layers: nn.Module, width: int) -> Backbone:
    return Backbone(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width)


class Twice(nn.Module):
    """One linear layer called twice, another once."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(5, 6), nn.Linear(6, 6)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.again(torch.tanh(self.again(torch.tanh(self.first(x))))))


class Tied(nn.Module):
    """Two layers that share one weight."""

    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight

    def features(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Direct(nn.Module):
    """Weights used by their layer and beside it, or only beside it; a parameter of no layer; a layer without use."""

    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 5), nn.Parameter(torch.rand(5))
        self.dropped = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)

    def features(self, x: Tensor) -> Tensor:
        self.dropped(x)
        x = torch.tanh(self.layer(x)) * self.scale
        return functional.linear(x, self.layer.weight.t()) + functional.linear(x, self.dropped.weight)


class Tokens(nn.Module):
    """A linear layer over positions, embeddings, attention and layer norm; `T` positions stand first if `first`."""

    width = 8

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.positions = nn.Embedding(5, 8)
        self.up, self.norm = nn.Linear(1, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = first

    def features(self, x: Tensor) -> Tensor:
        # [T, B, 8], with T as large as a batch, or [B, T, 8]
        x = self.up(x.t()[..., None]).transpose(0, 1) if self.first else self.up(x[..., None])
        x = self.norm(x + self.positions.weight)
        return self.attention(x, x, x)[0].mean(1)


class Branching(nn.Module):
    """Reads values, which `vmap` cannot."""

    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 5), nn.Parameter(torch.rand(5))

    def features(self, x: Tensor) -> Tensor:
        return torch.stack([row * self.scale if row.sum().item() > 0 else row - self.scale for row in self.layer(x)])


class OneRowOfParameters(nn.Module):
    """A linear layer whose rows are not samples, though they may be as many."""

    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.seeds, self.layer = nn.Parameter(torch.rand(5, 3)), nn.Linear(3, 5)

    def features(self, x: Tensor) -> Tensor:
        return x @ torch.tanh(self.layer(self.seeds))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 + self.weight.sum()


def convolutions() -> Backbone:
    return flat(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.SiLU(inplace=True),
        nn.Conv2d(4, 8, (2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1)),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect", groups=8),
        nn.Conv2d(8, 5, 2, padding=1, padding_mode="circular"),
        nn.Conv2d(5, 5, (2, 3), padding="same"),
        width=5,
    )


def bias_only() -> Backbone:
    net = flat(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), width=4)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return net


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (
        lambda: Backbone(
            nn.Sequential(nn.Flatten(), nn.Linear(243, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 6)), 6
        ),
        IMAGE,
    ),
    "convolutions": (convolutions, IMAGE),
    "group norm": (
        lambda: flat(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), width=4),
        IMAGE,
    ),
    "transposed": (lambda: flat(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), width=4), IMAGE),
    "parametrized": (
        lambda: Backbone(
            nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 6, bias=False)), 6
        ),
        (5,),
    ),
    "bias only": (bias_only, IMAGE),
    "twice": (Twice, (5,)),
    "tied": (Tied, (5,)),
    "direct": (Direct, (5,)),
    "tokens": (Tokens, (5,)),
    "positions first": (lambda: Tokens(first=True), (5,)),
    "branching": (Branching, (5,)),
    "rows of parameters": (OneRowOfParameters, (5,)),
    "subclass": (lambda: Backbone(nn.Sequential(Scaled(5, 5), nn.Tanh()), 5), (5,)),
}


def build(name: str, samples: int = 5, seed: int = 0) -> tuple[IncrementalNet, Tensor, Tensor]:
    torch.manual_seed(seed)
    make, shape = NETS[name]
    model = IncrementalNet(make(), [3, CLASSES - 3]).double()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model, torch.randn(samples, *shape, dtype=torch.float64), torch.randint(CLASSES, (samples,))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def per_sample(
    model: IncrementalNet,
    x: Tensor,
    losses: Callable[[Tensor, int], Sequence[tuple[float | Tensor, Tensor]]],
    reduce: Reduce = "square",
) -> dict[str, Tensor]:
    """By definition: sample by sample, `losses` gives weights and scalar losses, each differentiated by itself."""
    model = copy.deepcopy(model).eval()
    parameters = trainable(model)
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for b in range(len(x)):
        for weight, loss in losses(model(x[b : b + 1]).logits[0], b):
            gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += (weight * (gradient**2 if reduce == "square" else gradient.abs())).detach()
    return sums


def over_labels(logits: Tensor, b: int) -> list[tuple[Tensor, Tensor]]:
    log_p = logits.log_softmax(0)
    return [(log_p[c].exp(), log_p[c]) for c in range(len(logits))]


def statistics(
    model: IncrementalNet,
    x: Tensor,
    cotangents: Callable[[Tensor], Sequence[Tensor]],
    reduce: Reduce = "square",
    chunk: int | None = None,
    max_elements: int | None = None,
) -> dict[str, Tensor]:
    sums = zeros_for(trainable(model))
    gradients = GradientSums(model, sums, reduce, max_elements)
    for part in x.split(chunk or len(x)):
        gradients.add(part, None, cotangents)
    return sums


def fisher(
    model: IncrementalNet,
    x: Tensor,
    labels: Labels,
    y: Tensor | None = None,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    return statistics(model, x, lambda z: label_cotangents(z, labels, mask, y, generator))


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor], relative: float = 1e-6) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(
            got[name], wanted[name], rtol=relative, atol=relative * wanted[name].abs().max().item()
        ), name


@pytest.mark.parametrize("name", NETS)
def test_exact_fisher_is_the_explicit_sum_over_labels(name: str) -> None:
    model, x, _ = build(name)
    wanted = per_sample(model, x, over_labels)
    assert sum(value.sum().item() for value in wanted.values()) > 0
    assert_equal(fisher(model, x, "exact"), wanted)


@pytest.mark.parametrize("name", NETS)
def test_empirical_fisher_is_the_mean_of_squared_gradients_of_batches_of_one(name: str) -> None:
    model, x, y = build(name, seed=1)
    wanted = per_sample(model, x, lambda z, b: [(1.0, functional.cross_entropy(z, y[b]))])
    assert_equal(fisher(model, x, "empirical", y), wanted)


@pytest.mark.parametrize("name", ["mlp", "convolutions", "tokens", "twice", "branching"])
def test_absolute_gradients_are_taken_sample_by_sample(name: str) -> None:
    model, x, _ = build(name, seed=2)
    wanted = per_sample(model, x, lambda z, b: [(1.0, z.square().sum())], reduce="abs")
    assert_equal(statistics(model, x, lambda z: [2 * z], reduce="abs"), wanted)


def test_argmax_takes_the_likeliest_label() -> None:
    model, x, _ = build("mlp")
    wanted = per_sample(model, x, lambda z, b: [(1.0, z.log_softmax(0)[z.argmax()])])
    assert_equal(fisher(model, x, "argmax"), wanted)


def test_closed_forms_serve_linear_convolution_and_batch_norm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    original = GradientSums._add_rest

    def spied(self: GradientSums, parameters: dict[str, nn.Parameter], *rest: object) -> None:
        left.extend(parameters)
        original(self, parameters, *rest)

    monkeypatch.setattr(GradientSums, "_add_rest", spied)
    for name in ("mlp", "convolutions", "bias only"):
        model, x, _ = build(name)
        fisher(model, x, "exact")
    assert left == []
    model, x, _ = build("twice")
    fisher(model, x, "exact")
    assert left == ["backbone.again.weight", "backbone.again.bias"]


def test_fallback_by_vmap_and_sample_by_sample_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = build("group norm")
    by_vmap = fisher(model, x, "exact")

    def refuse(*_: object) -> dict[str, Tensor]:
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(GradientSums, "_sums_by_vmap", refuse)
    assert_equal(fisher(model, x, "exact"), by_vmap, 1e-12)


def test_softmax_regression_has_its_closed_form() -> None:
    """F_cj = E[p_c (1 - p_c) x_j^2] for z = W x."""
    torch.manual_seed(0)
    model = IncrementalNet(Backbone(nn.Identity(), 6), [CLASSES]).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    p = model(x).logits.softmax(1).detach()
    got = fisher(model, x, "exact")["head.0.weight"] / len(x)
    assert torch.allclose(got, torch.einsum("nc,nj->cj", p * (1 - p), x**2) / len(x), rtol=1e-6)


def test_sampled_fisher_converges_to_the_exact_one() -> None:
    model, x, _ = build("mlp", samples=2)
    exact = torch.cat([v.flatten() for v in fisher(model, x, "exact").values()])
    many = x.repeat(5_000, 1, 1, 1)
    drawn = fisher(model, many, "sampled", generator=torch.Generator().manual_seed(0))
    sampled = torch.cat([v.flatten() for v in drawn.values()]) / 5_000
    assert (sampled - exact).norm() < 0.05 * exact.norm()
    assert sampled.sum().item() == pytest.approx(exact.sum().item(), rel=0.05)


def test_sampled_labels_depend_on_the_generator_alone() -> None:
    model, x, _ = build("mlp", samples=20)
    first = fisher(model, x, "sampled", generator=torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    again = fisher(model, x, "sampled", generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_gradient_of_the_batch_mean_is_another_thing() -> None:
    """Squaring the mean gradient gives the per-sample value for equal samples only: the defect of several codes."""

    def squared_mean(model: IncrementalNet, x: Tensor, y: Tensor) -> Tensor:
        model = copy.deepcopy(model).eval()
        gradients = torch.autograd.grad(
            functional.cross_entropy(model(x).logits, y), list(model.parameters()), allow_unused=True
        )
        return torch.cat([g.flatten() for g in gradients if g is not None]) ** 2

    model, x, y = build("convolutions", samples=8)
    same_x, same_y = x[:1].repeat(8, 1, 1, 1), y[:1].repeat(8)
    same = torch.cat([v.flatten() for v in fisher(model, same_x, "empirical", same_y).values()]) / 8
    assert torch.allclose(squared_mean(model, same_x, same_y), same, rtol=1e-6)
    apart = torch.cat([v.flatten() for v in fisher(model, x, "empirical", y).values()]) / 8
    assert squared_mean(model, x, y).sum() < 0.8 * apart.sum()


@pytest.mark.parametrize("name", ["convolutions", "tokens", "group norm"])
def test_size_of_chunks_changes_nothing(name: str) -> None:
    model, x, _ = build(name, samples=7)
    whole = fisher(model, x, "exact")
    for chunk, max_elements in ((1, None), (3, None), (7, 1), (5, 2_000)):
        parts = statistics(model, x, lambda z: label_cotangents(z, "exact"), chunk=chunk, max_elements=max_elements)
        assert_equal(parts, whole, 1e-12)


@pytest.mark.parametrize("labels", ["exact", "sampled", "empirical", "argmax"])
def test_masked_labels_have_no_part(labels: Labels) -> None:
    """The Fisher information under a mask is that of a network whose head has the active labels only."""
    model, x, _ = build("mlp", samples=30)
    mask = torch.tensor([True, False, True, False])
    y = torch.randint(2, (30,))
    small = IncrementalNet(copy.deepcopy(model.backbone), [2]).double()
    with torch.no_grad():
        weight = torch.cat([block.weight for block in model.head])
        bias = torch.cat([block.bias for block in model.head])
        small.head[0].weight.copy_(weight[mask])
        small.head[0].bias.copy_(bias[mask])
    generators = [torch.Generator().manual_seed(1) for _ in range(3)]
    wanted = fisher(small, x, labels, y, generators[0])
    for form, generator in ((mask, generators[1]), (mask.expand(30, 4), generators[2])):
        got = fisher(model, x, labels, 2 * y, generator, form)
        head = torch.cat([got["head.0.weight"], got["head.1.weight"]])
        if labels == "sampled":  # the draws differ with the number of columns
            assert torch.isfinite(head).all()
        else:
            assert torch.allclose(head[mask], wanted["head.0.weight"], rtol=1e-6)
            shared = {name: value for name, value in got.items() if name.startswith("backbone")}
            assert_equal(shared, {name: wanted[name] for name in shared})
        assert head[~mask].abs().max() == 0


def test_rows_may_have_masks_of_their_own() -> None:
    model, x, _ = build("mlp", samples=4)
    mask = torch.tensor([[True, True, False, False]] * 2 + [[False, False, True, True]] * 2)
    first, second = fisher(model, x[:2], "exact", mask=mask[0]), fisher(model, x[2:], "exact", mask=mask[2])
    assert_equal(fisher(model, x, "exact", mask=mask), {name: first[name] + second[name] for name in first})


def test_a_sure_network_loses_no_digits_in_float32() -> None:
    logits = torch.tensor([[0.0, -20.0, -25.0], [-20.0, -25.0, 0.0], [-25.0, 0.0, -20.0], [0.0, -200.0, -300.0]])
    p = logits.double().softmax(1)
    rest = torch.stack([p[:, [i for i in range(3) if i != c]].sum(1) for c in range(3)], dim=1)  # 1 - p, each digit
    variance = sum(v.double() ** 2 for v in label_cotangents(logits, "exact"))
    assert torch.allclose(variance, p * rest, rtol=1e-5, atol=1e-40)
    y = torch.tensor([0, 2, 1, 0])
    (empirical,) = label_cotangents(logits, "empirical", y=y)
    of_label = empirical.double().gather(1, y[:, None])
    assert torch.allclose(of_label, rest.gather(1, y[:, None]), rtol=1e-5, atol=1e-40)


def test_one_active_label_has_no_information() -> None:
    model, x, _ = build("mlp")
    got = fisher(model, x, "exact", mask=torch.tensor([False, True, False, False]))
    assert all(value.abs().max() == 0 for value in got.values())


def test_logits_that_are_not_finite_show() -> None:
    columns = label_cotangents(torch.tensor([[torch.nan, 0.0, 0.0]]), "exact")
    assert torch.isnan(torch.stack(columns)).any()


def test_the_model_is_left_as_it_was() -> None:
    model, x, _ = build("convolutions")
    model.train()
    model.backbone.net[1].eval()
    model.head[0].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    fisher(model, x, "exact")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.0.bias"]
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_and_modes_are_put_back_after_an_error() -> None:
    model, x, _ = build("mlp")
    model.train()
    with pytest.raises(RuntimeError):
        fisher(model, x[:, :, :5], "exact")

    def fail(logits: Tensor) -> list[Tensor]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        statistics(model, x, fail)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_works_where_gradients_are_switched_off() -> None:
    model, x, _ = build("mlp")
    wanted = fisher(model, x, "exact")
    with torch.no_grad():
        assert_equal(fisher(model, x, "exact"), wanted, 0)


def test_sums_are_float32_under_autocast() -> None:
    model, x, _ = build("mlp")
    model, x = model.float(), x.float()
    wanted = fisher(model, x, "exact")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fisher(model, x, "exact")
    assert all(value.dtype == torch.float32 for value in got.values())
    assert_equal(got, wanted, 0)


def test_batch_norm_without_running_statistics_is_refused() -> None:
    model = IncrementalNet(flat(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), width=4), [2])
    with pytest.raises(UsageError, match=r"backbone\.net\.1.*track_running_stats"):
        GradientSums(model, zeros_for(dict(model.named_parameters())))


def test_a_network_that_mixes_images_is_refused() -> None:
    class Centred(nn.Module):
        width = 5

        def features(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    with pytest.raises(UsageError, match="depend on the others"):
        fisher(IncrementalNet(Centred(), [2]).double(), torch.randn(4, 5, dtype=torch.float64), "exact")


def test_only_the_parameters_asked_for_are_summed() -> None:
    model, x, _ = build("convolutions")
    everything = fisher(model, x, "exact")
    sums = zeros_for({name: p for name, p in model.named_parameters() if not name.startswith("head.")})
    GradientSums(model, sums).add(x, None, lambda z: label_cotangents(z, "exact"))
    assert_equal(sums, {name: everything[name] for name in sums}, 1e-12)
    assert "head.0.weight" not in sums


def penalties(seed: int = 0) -> tuple[dict[str, nn.Parameter], list[tuple[dict[str, Tensor], dict[str, Tensor]]]]:
    """Parameters, and three pairs of F_k (zeros and tiny values included) and theta_k."""
    torch.manual_seed(seed)
    shapes = {"w": (4, 3), "b": (3,)}
    theta = {name: nn.Parameter(torch.randn(shape, dtype=torch.float64)) for name, shape in shapes.items()}
    pairs = []
    for k in range(3):
        precision = {n: torch.rand(s, dtype=torch.float64) * 10.0 ** (6 * k - 6) for n, s in shapes.items()}
        precision["w"][k] = 0
        precision["w"][3] = 0
        pairs.append((precision, {n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items()}))
    return theta, pairs


def test_a_sum_of_quadratics_is_one_quadratic() -> None:
    """Value and gradient of the explicit sum of penalties, one for each experience."""
    theta, pairs = penalties()
    quadratic = Quadratic()
    for precision, anchor in pairs:
        quadratic.add(precision, anchor)
    explicit = sum(
        0.5 * (precision[n] * (theta[n] - anchor[n]) ** 2).sum() for precision, anchor in pairs for n in theta
    )
    value = quadratic(theta)
    assert value.item() == pytest.approx(explicit.item(), rel=1e-12)
    wanted = torch.autograd.grad(explicit, list(theta.values()))
    got = torch.autograd.grad(value, list(theta.values()))
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)
        assert a.abs().max() > 0


def test_adding_a_thousand_penalties_cancels_nothing_in_float32() -> None:
    """Anchors far from 0 and close together: the expanded form A theta^2 - 2 theta b + c would lose every digit."""
    torch.manual_seed(0)
    quadratic, theta = Quadratic(), {"w": nn.Parameter(torch.full((50,), 1000.0))}
    gradient = torch.zeros(50, dtype=torch.float64)
    for _ in range(1000):
        precision, anchor = torch.rand(50), 1000 + 0.01 * torch.randn(50)
        quadratic.add({"w": precision}, {"w": anchor})
        gradient += precision.double() * (1000.0 - anchor.double())
    with torch.no_grad():
        theta["w"] += 1.0
    gradient += quadratic.precision["w"].double()
    (got,) = torch.autograd.grad(quadratic(theta), theta["w"])
    assert torch.allclose(got.double(), gradient, rtol=1e-3)


def test_penalty_by_hand() -> None:
    quadratic = Quadratic()
    quadratic.add({"w": torch.tensor([2.0, 0.0, 1.0])}, {"w": torch.tensor([1.0, 5.0, -1.0]), "other": torch.ones(2)})
    theta = nn.Parameter(torch.tensor([2.0, 0.0, 2.0]))
    value = quadratic({"w": theta, "new": nn.Parameter(torch.ones(1))})
    value.backward()
    assert value.item() == 0.5 * (2 * 1 + 0 + 1 * 9)
    assert theta.grad is not None
    assert theta.grad.tolist() == [2.0, 0.0, 3.0]


def test_a_parameter_may_come_later() -> None:
    quadratic = Quadratic()
    quadratic.add({"a": torch.ones(1)}, {"a": torch.zeros(1)})
    quadratic.add({"a": torch.ones(1), "b": torch.full((1,), 4.0)}, {"a": torch.ones(1), "b": torch.ones(1)})
    quadratic.add({"b": torch.zeros(1)}, {"b": torch.full((1,), 7.0)})
    assert quadratic.anchor["a"].item() == 0.5
    assert quadratic.anchor["b"].item() == 1.0
    assert quadratic({"a": torch.full((1,), 0.5), "b": torch.ones(1)}).item() == 0.25  # what the two on `a` disagree on


def test_anchor_does_not_follow_the_parameter() -> None:
    quadratic, theta = Quadratic(), nn.Parameter(torch.zeros(2))
    precision = torch.ones(2)
    quadratic.add({"w": precision}, {"w": theta})
    with torch.no_grad():
        theta += 1
    precision *= 5
    assert quadratic({"w": theta}).item() == 1.0


def test_penalty_is_float32_under_autocast_and_survives_its_state() -> None:
    quadratic, theta = Quadratic(), nn.Parameter(torch.full((10_000,), 1.001))
    quadratic.add({"w": torch.ones(10_000)}, {"w": torch.ones(10_000)})
    quadratic.add({"w": torch.ones(10_000)}, {"w": torch.full((10_000,), 1.002)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = quadratic({"w": theta})
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(0.5 * 10_000 * 2e-6, rel=1e-3)
    again = Quadratic()
    again.load_state_dict(quadratic.state_dict())
    assert torch.equal(again({"w": theta}), quadratic({"w": theta}))


def test_replaced_penalty_forgets_the_earlier_ones() -> None:
    theta, pairs = penalties()
    quadratic, only = Quadratic(), Quadratic()
    for precision, anchor in pairs[:2]:
        quadratic.add(precision, anchor)
    quadratic.replace(*pairs[2])
    only.add(*pairs[2])
    assert torch.equal(quadratic(theta), only(theta))


# ------------------------------------------------------------------------- sensitivity (MAS)


def test_norm_cotangent_is_the_gradient_of_the_squared_norm() -> None:
    """Not of the norm (FACIL), and of the logits alone that take part; each row may have a mask of its own."""
    torch.manual_seed(0)
    z = torch.randn(5, CLASSES, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, True])
    for form in (None, mask, torch.stack([mask, ~mask, mask, ~mask, mask])):
        active = z if form is None else z * form
        (wanted,) = torch.autograd.grad(active.square().sum(), z)
        (got,) = norm_cotangents(z.detach(), form)
        assert torch.allclose(got, wanted, rtol=1e-12)
    assert wanted[1, 0] == 0
    assert wanted[1, 1] != 0


def test_sensitivity_grows_with_the_square_of_the_outputs() -> None:
    model, x, _ = build("convolutions")
    before = statistics(model, x, norm_cotangents, reduce="abs")
    with torch.no_grad():
        for p in model.head.parameters():
            p.mul_(3)
    after = statistics(model, x, norm_cotangents, reduce="abs")
    trunk = {name: 9 * value for name, value in before.items() if name.startswith("backbone")}
    assert_equal({name: after[name] for name in trunk}, trunk)
    assert sum(value.sum().item() for value in trunk.values()) > 0


@pytest.mark.parametrize("name", ["mlp", "convolutions", "group norm"])
def test_sensitivity_is_that_of_masked_single_images(name: str) -> None:
    model, x, _ = build(name, samples=8, seed=3)
    with torch.no_grad():  # logits of both signs
        for block, z in zip(model.head, copy.deepcopy(model).eval()(x).logits.split(model.blocks, 1), strict=True):
            block.bias -= z.mean(0)
    mask = torch.tensor([True, False, False, True])
    wanted = per_sample(model, x, lambda z, b: [(1.0, z[mask].square().sum())], reduce="abs")
    whole = statistics(model, x, lambda z: norm_cotangents(z, mask), reduce="abs")
    assert_equal(whole, wanted)
    assert_equal(statistics(model, x, lambda z: norm_cotangents(z, mask), reduce="abs", chunk=2), whole, 1e-12)
    parameters = trainable(copied := copy.deepcopy(model).eval())
    mean = torch.autograd.grad(copied(x).logits[:, mask].square().sum(), list(parameters.values()), allow_unused=True)
    # the absolute value of a sum of gradients is another thing (FACIL, Avalanche)
    assert sum(g.abs().sum() for g in mean if g is not None) < 0.9 * sum(v.sum() for v in wanted.values())


def by_hand(model: IncrementalNet, x: Tensor, reduce: Reduce) -> dict[str, Tensor]:
    """By sample and call of a plain layer, the gradient of ``sum(layer(a) * relu(layer(a)))``, the ReLU held fixed."""
    model = copy.deepcopy(model).eval()
    sums = zeros_for(trainable(model))
    names = {id(p): name for name, p in model.named_parameters()}
    calls: list[tuple[nn.Module, Tensor]] = []
    layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(lambda m, args, out: calls.append((m, args[0].clone())))
    with torch.no_grad():
        model(x)
    recorded = list(calls)
    for layer, inputs in recorded:
        for a in inputs:
            output = layer(a[None])
            parameters = [p for p in layer.parameters() if p.requires_grad]
            gradients = torch.autograd.grad((output * torch.relu(output).detach()).sum(), parameters)
            for p, gradient in zip(parameters, gradients, strict=True):
                sums[names[id(p)]] += gradient.square() if reduce == "square" else gradient.abs()
    return sums


@pytest.mark.parametrize("reduce", ["abs", "square"])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "bias only", "twice", "tokens", "parametrized", "subclass"])
def test_local_sums_are_products_of_activities(name: str, reduce: Reduce) -> None:
    """Whatever comes after a layer, in place or not; layers of other kinds, and subclasses, have none."""
    model, x, _ = build(name, seed=4)
    wanted = by_hand(model, x, reduce)
    for max_elements in (None, 1):
        sums = zeros_for(trainable(model))
        gradients = GradientSums(model, sums, reduce, max_elements)
        for part in x.split(3):
            gradients.add_local(part, None, torch.relu)
        assert_equal(sums, wanted)
    layers = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    assert any(wanted[f"{n}.bias"].max() > 0 for n in layers if f"{n}.bias" in wanted)
    rest = [n for n in wanted if n.rpartition(".")[0] not in layers]
    assert all(not wanted[n].any() for n in rest)


def test_local_sums_are_of_outputs_before_the_next_layer_works_in_place() -> None:
    torch.manual_seed(0)
    net = flat(nn.Conv2d(3, 4, 3), nn.SiLU(inplace=True), nn.Conv2d(4, 5, 3), nn.Hardtanh(0.1, 0.2, True), width=5)
    model, x = IncrementalNet(net, [2]).double(), torch.randn(4, *IMAGE, dtype=torch.float64)
    sums = zeros_for(trainable(model))
    GradientSums(model, sums, "abs").add_local(x, None, torch.relu)
    assert_equal(sums, by_hand(model, x, "abs"))


def test_local_sums_leave_the_model_as_it_was() -> None:
    model, x, _ = build("convolutions")
    model.train()
    model.backbone.net[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    sums = zeros_for({name: p for name, p in model.named_parameters() if name == "backbone.net.3.weight"})
    GradientSums(model, sums, "abs").add_local(x, None, torch.relu)
    assert list(sums) == ["backbone.net.3.weight"]
    assert sums["backbone.net.3.weight"].max() > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# ------------------------------------------------------------------------ path integrals (SI)


def test_path_by_hand() -> None:
    omega = [torch.tensor([1.0, 0.0]), torch.tensor([[2.0]])]
    gradients = [torch.tensor([3.0, -1.0]), torch.tensor([[0.5]])]
    after = [torch.tensor([0.0, 3.0]), torch.tensor([[1.0]])]
    add_path_step(omega, gradients, [torch.tensor([2.0, 1.0]), torch.tensor([[5.0]])], after)
    assert omega[0].tolist() == [1.0 + 3.0 * 2.0, 1.0 * 2.0]
    assert omega[1].tolist() == [[2.0 + 0.5 * 4.0]]
    assert [value.tolist() for value in (*gradients, *after)] == [[3.0, -1.0], [[0.5]], [0.0, 3.0], [[1.0]]]
    found = path_importance(torch.tensor([6.0, -1.0]), torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), 0.5)
    assert found.tolist() == [6.0 / 1.5, -2.0]


# ------------------------------------------------------------------------- the mean over images


def stub(model: IncrementalNet, batch_size: int, seed: int = 0, start: int = 0, stop: int | None = None) -> Any:
    """As much of a run as a mean over images needs; its ticks begin at `start`, and stop the pass after `stop`."""
    generator = torch.Generator().manual_seed(seed)

    def ticks(name: str, n: int, *, resumable: bool = False) -> Any:
        assert resumable
        for i in range(start, n):
            yield i
            if i + 1 == stop:
                raise KeyboardInterrupt

    def batch(rows: ImageData) -> Batch:
        made = Transform(scale=1).batch(rows)
        made.x = rows.x
        return made

    settings = SimpleNamespace(batch_size=batch_size)
    return SimpleNamespace(model=model, settings=settings, rng=lambda _: generator, ticks=ticks, batch=batch)


def add_exact(sums: GradientSums, batch: Batch) -> None:
    sums.add(batch.x, None, lambda z: label_cotangents(z, "exact"))


@pytest.mark.parametrize("samples", [None, 5, 11, 50])
def test_mean_over_images_is_that_of_one_pass(samples: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every size of chunks; `samples` of the images are a random choice without replacement."""
    model, x, y = build("mlp", samples=11)
    chosen = torch.randperm(11, generator=torch.Generator().manual_seed(0))[:samples]
    wanted = {name: total / len(chosen) for name, total in fisher(model, x[chosen], "exact").items()}
    for batch_size, chunk in ((1, 1), (4, 1), (11, 1), (100, 1), (2, 3 * x[0].numel()), (2, 1 << 19)):
        monkeypatch.setattr(importance, "CHUNK", chunk)
        mean = ImportanceMean()
        got = mean.over(stub(model, batch_size), "p", ImageData(x, y), samples, trainable(model), add_exact)
        assert_equal(got, wanted, 1e-12)
        assert mean.partial == {}
        assert len(mean.rows) == 0


def test_mean_over_images_goes_on_where_its_state_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with the images that were drawn before, whatever the generator would draw now."""
    monkeypatch.setattr(importance, "CHUNK", 1)
    model, x, y = build("mlp", samples=11)
    data, first, second = ImageData(x, y), ImportanceMean(), ImportanceMean()
    wanted = ImportanceMean().over(stub(model, 2), "p", data, 9, trainable(model), add_exact)
    with pytest.raises(KeyboardInterrupt):
        first.over(stub(model, 2, stop=2), "p", data, 9, trainable(model), add_exact)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    got = second.over(stub(model, 2, seed=99, start=2), "p", data, 9, trainable(model), add_exact)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


# ---------------------------------------------------------------------- how stiff springs may be


def test_largest_precision() -> None:
    quadratic = Quadratic()
    assert quadratic.largest() == {}
    quadratic.add({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([2.0]), "none": torch.empty(0)}, ANCHOR)
    quadratic.add({"a": torch.tensor([1.0, 0.5])}, ANCHOR)
    assert quadratic.largest() == {"a": 5.5, "b": 2.0}


ANCHOR = {"a": torch.zeros(2), "b": torch.zeros(1), "none": torch.empty(0)}


def under(theta: nn.Parameter, **settings: Any) -> Any:
    """A run of one parameter `w`, with these settings."""
    model = SimpleNamespace(named_parameters=lambda: [("w", theta)])
    return SimpleNamespace(settings=TrainSettings(**settings), phase=Phase("train"), model=model)


def one_spring(precision: float) -> Quadratic:
    quadratic = Quadratic()
    quadratic.add({"w": torch.tensor([precision, 0.01]).double()}, {"w": torch.zeros(2).double()})
    return quadratic


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)])
@pytest.mark.parametrize("times", [1.05, 50.0, 1e9])
def test_sgd_comes_to_rest_on_a_penalty_that_it_would_overshoot(momentum: float, nesterov: bool, times: float) -> None:
    """Without the limit the same steps diverge, as the curvature is above the bound of stability."""
    strength, lr = 3.0, 0.1
    bound = 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)
    quadratic = one_spring(times * bound / (strength * lr))
    sgd: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
    away = {}
    for limited in (True, False):
        theta = nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer = torch.optim.SGD([theta], **sgd)
        run = under(theta, optimizer="sgd", **sgd)
        for _ in range(500):
            optimizer.zero_grad()
            value = weighted_penalty(run, strength, quadratic) if limited else strength * quadratic({"w": theta})
            value.backward()
            optimizer.step()
            if not theta.isfinite().all() or theta.abs().max() > 1e100:
                break
        away[limited] = theta[0].abs().nan_to_num(1e100).item()
    assert away[True] < 1e-6
    assert away[False] > 1e2


def gradient(precision: float, strength: float = 2.0, phase: Phase | None = None, **settings: Any) -> list[float]:
    theta = nn.Parameter(torch.ones(2, dtype=torch.float64))
    run = under(theta, **{"optimizer": "sgd", "lr": 0.1} | settings)
    run.phase = phase or run.phase
    weighted_penalty(run, strength, one_spring(precision)).backward()
    assert theta.grad is not None
    return theta.grad.tolist()


def test_a_limited_curvature_is_half_of_the_bound_over_the_learning_rate() -> None:
    """Of each entry by itself: the other one, 2 * 0.01, is as it was."""
    assert gradient(4.9) == pytest.approx([9.8, 0.02])  # below 1 / 0.1
    assert gradient(60.0) == pytest.approx([10.0, 0.02])
    assert gradient(60.0, momentum=0.9) == pytest.approx([19.0, 0.02])
    assert gradient(60.0, momentum=0.9, nesterov=True) == pytest.approx([19.0 / 2.8, 0.02])
    assert gradient(60.0, lr=0.001) == pytest.approx([120.0, 0.02])
    assert gradient(60.0, phase=Phase("tuning", lr=0.5)) == pytest.approx([2.0, 0.02])
    assert gradient(60.0, head_lr=0.5) == pytest.approx([10.0, 0.02])
    assert gradient(60.0, strength=0.0) == [0.0, 0.0]


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_has_no_limit_of_curvature(optimizer: str) -> None:
    assert gradient(1e9, optimizer=optimizer) == pytest.approx([2e9, 0.02])


def test_the_head_is_limited_by_its_own_learning_rate() -> None:
    theta = {name: nn.Parameter(torch.ones(1)) for name in ("backbone.w", "head.0.weight")}
    quadratic = Quadratic()
    quadratic.add({name: torch.tensor([50.0]) for name in theta}, {name: torch.zeros(1) for name in theta})
    run: Any = SimpleNamespace(
        settings=TrainSettings(optimizer="sgd", lr=0.1, head_lr=0.5),
        phase=Phase("train"),
        model=SimpleNamespace(named_parameters=theta.items),
    )
    weighted_penalty(run, 2.0, quadratic).backward()
    assert [p.grad.item() for p in theta.values() if p.grad is not None] == pytest.approx([10.0, 2.0])


@pytest.mark.parametrize("precision", [math.inf, math.nan])
def test_a_precision_that_is_not_finite_stays_so(precision: float) -> None:
    """The run then stops with the sentence that names the loss term."""
    assert not math.isfinite(gradient(precision)[0])


def test_largest_precisions_follow_a_change() -> None:
    quadratic = one_spring(3.0)
    assert quadratic.largest() == {"w": 3.0}
    quadratic.add({"w": torch.tensor([4.0, 0.0]).double()}, {"w": torch.zeros(2).double()})
    assert quadratic.largest() == {"w": 7.0}
    quadratic.load_state_dict(one_spring(5.0).state_dict())
    assert quadratic.largest() == {"w": 5.0}


class Folded(nn.Module):
    """Its linear layer is given two rows for each image."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 6)

    def features(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 5)).reshape(len(x), 2, 6).mean(1)


def test_local_importance_of_a_layer_whose_rows_are_no_images_is_refused() -> None:
    model = IncrementalNet(Folded(), [CLASSES])
    sums = GradientSums(model, zeros_for(dict(model.named_parameters())), "abs")
    with pytest.raises(UsageError, match="A local importance cannot be computed"):
        sums.add_local(torch.randn(3, 10), None, torch.relu)


# --------------------------------------------------------------------------------- stopped within the pass


@pytest.mark.parametrize(
    ("name", "options"),
    [("ewc", {"labels": "sampled"}), ("mas", {"form": "global"}), ("mas", {"form": "local"})],
)
def test_a_run_stopped_within_the_pass_goes_on_to_the_same_penalty(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partial sums and the images of the pass are in the state; sampled labels go on where they were."""
    monkeypatch.setattr(importance, "CHUNK", 1)  # batches of the training's size, so that the pass has a middle
    scenario = {"name": "permuted-digits", "experiences": 2, "limit": 12}
    model, plugin = {"name": "mlp", "hidden": [16]}, {name: {"samples": 100, **options}}

    def begin(folder: Path, *listeners: Any) -> None:
        train: dict[str, Any] = {"epochs": 1, "batch_size": 32, "optimizer": "sgd", "lr": 0.05}
        testing.learn(scenario, plugin, model=model, output=str(folder), listeners=listeners, **train)

    def stop(record: dict[str, Any]) -> None:
        if record["kind"] == "tick" and record["i"] == 2:
            signal.raise_signal(signal.SIGINT)

    begin(tmp_path / "whole")
    with pytest.raises(Interrupted):
        begin(tmp_path / "stopped", stop)
    ticks: list[int] = []
    clframe.resume(tmp_path / "stopped", listeners=[lambda r: ticks.append(r["i"]) if r["kind"] == "tick" else None])
    assert ticks == [3, 4, 1, 2, 3, 4]
    whole, stopped = (checkpoint.load(tmp_path / run / "checkpoints", print)[1] for run in ("whole", "stopped"))
    assert testing.differing(whole, stopped) == []
    assert any(f"{name}/penalties" in key for key in whole)
    assert not any(f"{name}/mean/partial" in key for key in whole)
