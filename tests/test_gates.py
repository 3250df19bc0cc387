"""Channel gates: an estimator without bias, gates that can open again, paths that are as they were."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe import ImageData, Transform, registry, snapshot
from clframe.model import IncrementalNet
from clframe.settings import Component
from clframe.toolkit.channel_gates import (
    ConditionalConv,
    Gate,
    OpenReLU,
    add_channel_gates,
    binarize_gates,
    finish_task,
    firing_rates,
    frozen_names,
    logistic_noise,
    unreachable_gates,
)
from clframe.toolkit.norms import TaskNorm
from clframe.toolkit.weight_masks import find_modules

BUILT_IN = {"cnn-small": (1, 8, 8), "resnet32": (3, 16, 16), "resnet18": (3, 32, 32)}


class Own(nn.Module):
    """A backbone whose activations are what `relus` gives for each of three convolutions, with norms in a list."""

    width = 6

    def __init__(self, *relus: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 4), (4, 5), (5, 6))])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(5), nn.BatchNorm2d(6)])
        self.relus = list(relus)
        self.modules_of_it = nn.ModuleList([relu for relu in relus if isinstance(relu, nn.Module)])

    def features(self, x: Tensor) -> Tensor:
        modules = iter(self.modules_of_it)
        for conv, norm, relu in zip(self.convs, list(self.norms)[:3], self.relus, strict=True):
            act = next(modules) if isinstance(relu, nn.Module) else relu
            x = act(norm(conv(x)))
        return x.mean((2, 3))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(shape, generator=generator(seed), **options)


def lived(name: str, shape: tuple[int, ...]) -> nn.Module:
    """A built-in backbone whose norms have statistics and scales of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = registry.build_backbone(Component(name), shape)
    for k, norm in enumerate(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.copy_(noise(norm.num_features, seed=k) / 4)
        norm.running_var.copy_(noise(norm.num_features, seed=k).square() + 0.5)
        nn.init.normal_(norm.weight, 1.0, 0.2, generator=generator(k))
        nn.init.normal_(norm.bias, 0.0, 0.2, generator=generator(k))
    return net


def gated(tasks: int = 2, bias: float = 0.3, net: nn.Module | None = None) -> IncrementalNet:
    """A network with gates of the first of `tasks`."""
    model = IncrementalNet(net or lived("cnn-small", (1, 8, 8)), [2])
    add_channel_gates(model.backbone, (1, 8, 8), tasks)
    for k, conv in enumerate(convs_of(model).values()):
        conv.add(bias, generator(k))
    model.select(0)
    return model


def convs_of(model: nn.Module) -> dict[str, ConditionalConv]:
    return find_modules(model, ConditionalConv)


def context(model: IncrementalNet, index: int = 0) -> Any:
    """What `firing` and `settle` need of a run."""
    return SimpleNamespace(
        model=model,
        config=SimpleNamespace(run=SimpleNamespace(eval_batch_size=3)),
        batch=Transform().batch,
        experience=SimpleNamespace(index=index),
        optimizer=None,
    )


# ----------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("temperature", [2 / 3, 1.0, 0.3])
def test_a_gate_is_binary_and_its_gradient_that_of_the_soft_one(temperature: float) -> None:
    logits = noise(5, 7, dtype=torch.float64).requires_grad_()
    drawn, up = noise(5, 7, seed=1, dtype=torch.float64), noise(5, 7, seed=2, dtype=torch.float64)
    gates = binarize_gates(logits, drawn, temperature)
    assert gates.tolist() == (logits + drawn > 0).double().tolist()
    assert set(gates.flatten().tolist()) == {0.0, 1.0}
    (gates * up).sum().backward()
    for k in range(logits.numel()):
        z = (logits + drawn).flatten()[k].item() / temperature
        s = 1 / (1 + math.exp(-z))
        expected = up.flatten()[k].item() * s * (1 - s) / temperature
        assert logits.grad.flatten()[k].item() == pytest.approx(expected, rel=1e-12)


def test_without_noise_a_logit_of_0_is_shut() -> None:
    assert binarize_gates(torch.tensor([-0.1, 0.0, 0.1])).tolist() == [0, 0, 1]


@pytest.mark.parametrize("logit", [0.0, -2.0, 0.7, 1.5])
def test_gates_fire_as_often_as_their_logit_says(logit: float) -> None:
    """One Gumbel draw in place of logistic noise would be 0.63 at a logit of 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        like = torch.empty(100_000)
        often = binarize_gates(torch.full_like(like, logit), logistic_noise(like)).mean().item()
        gumbel = -(-torch.rand_like(like).log()).log()
    assert often == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.01)
    if logit == 0:
        assert binarize_gates(torch.zeros_like(like), gumbel).mean().item() == pytest.approx(0.632, abs=0.01)


def test_noise_is_finite_whatever_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.tensor([0.0, 0.5, 1 - 2**-24]))
    low, middle, high = logistic_noise(torch.empty(3)).tolist()
    assert low == pytest.approx(-high, rel=0.01)
    assert middle == 0
    assert 15 < high < 17


def test_a_gate_of_one_image_uses_running_statistics_and_leaves_them() -> None:
    gate = Gate(3, 5, 1.5)
    gate.norm.running_mean.copy_(noise(16))
    gate.norm.running_var.copy_(noise(16, seed=1).square() + 0.1)
    x, before = noise(1, 3, 4, 4), copy.deepcopy(gate.state_dict())
    answered = gate.train()(x)
    assert torch.equal(answered, gate.eval()(x))
    assert answered.shape == (1, 5)
    assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())


def test_a_gate_is_two_linear_layers_on_the_average_pixel() -> None:
    gate = Gate(3, 5, 1.5).eval()
    assert gate.outer.bias.tolist() == [1.5] * 5
    x = noise(2, 3, 4, 4)
    hidden = gate.norm(x.mean((2, 3)) @ gate.inner.weight.T + gate.inner.bias)
    torch.testing.assert_close(gate(x), hidden.clamp(min=0) @ gate.outer.weight.T + gate.outer.bias)


# ------------------------------------------------------------------------------------------------ ReLU


@pytest.mark.parametrize(("most", "like"), [(None, nn.ReLU()), (6.0, nn.ReLU6())])
def test_an_open_relu_has_the_values_of_relu(most: float | None, like: nn.Module) -> None:
    x = torch.cat([noise(1000) * 5, torch.tensor([0.0, 6.0, -0.0, math.inf, -math.inf])])
    assert torch.equal(OpenReLU(most)(x), like(x))
    assert OpenReLU(most)(torch.tensor([math.nan])).isnan().all()  # it hides no divergence
    x = torch.tensor([-1.0, 0.0, 3.0], requires_grad=True)
    OpenReLU(most)(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1]


@pytest.mark.parametrize(("relu", "heard"), [(OpenReLU(), True), (nn.ReLU(), False)])
def test_a_shut_gate_has_a_gradient_through_an_open_relu_alone(relu: nn.Module, heard: bool) -> None:
    """The trap: the gradient of ReLU at 0, where a shut gate puts everything, is 0."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), relu)
    conv = ConditionalConv(net[0], None, 1)
    conv.active = OpenReLU()
    gates = torch.zeros(2, 4, requires_grad=True)
    conv.gate = lambda x: gates
    relu(conv(noise(2, 1, 6, 6))).sum().backward()
    assert bool(gates.grad.any()) is heard
    if heard:  # it is how much the open channel would add
        expected = net[0](noise(2, 1, 6, 6)).clamp(min=0).sum((2, 3))
        torch.testing.assert_close(gates.grad, expected)


def test_a_relu_that_stands_in_two_places_is_replaced_in_both() -> None:
    shared = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(1, 2, 3), shared, nn.Conv2d(2, 3, 3), shared, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.features, net.width = net.forward, 3
    add_channel_gates(net, (1, 8, 8), 1)
    assert [type(net[k]) for k in (1, 3)] == [OpenReLU, OpenReLU]
    assert not any(type(m) is nn.ReLU for m in net.modules())


# --------------------------------------------------------------------------------- gated convolutions


@pytest.mark.parametrize("name", BUILT_IN)
def test_with_all_gates_open_it_is_the_network_without_gates(name: str) -> None:
    shape = BUILT_IN[name]
    net = lived(name, shape)
    x, model = noise(3, *shape), gated_like(net, shape, bias=1e4)
    with torch.no_grad():
        assert torch.equal(model.backbone.eval().features(x), net.eval().features(x))
    assert all(conv.latest.all() for conv in convs_of(model).values())
    assert len(convs_of(model)) == sum(isinstance(m, nn.Conv2d) for m in net.modules())


def gated_like(net: nn.Module, shape: tuple[int, ...], bias: float) -> IncrementalNet:
    model = IncrementalNet(copy.deepcopy(net), [2])
    add_channel_gates(model.backbone, shape, 1)
    for conv in convs_of(model).values():
        conv.add(bias, generator())
    model.select(0)
    return model


def test_what_comes_out_of_a_shut_channel_is_0_and_of_an_open_one_what_it_was() -> None:
    net = lived("cnn-small", (1, 8, 8)).eval()
    x, model = noise(4, 1, 8, 8), gated(net=copy.deepcopy(net)).eval()
    (first, *_) = convs_of(model).values()
    with torch.no_grad():
        out, plain = first(x), net.net[:3](x)
    gates = first.latest
    assert 0 < gates.sum() < gates.numel()
    assert torch.equal(out, plain * gates[:, :, None, None])


def test_a_channel_that_never_fired_stays_shut_for_a_learnt_task_alone() -> None:
    model = gated(tasks=2, bias=1e4).eval()
    (conv, *_) = convs_of(model).values()
    conv.add(1e4, generator(5))
    conv.fired[0, 3] = False
    x = noise(2, 1, 8, 8)
    for task, shut in ((0, [3]), (1, [])):
        model.select(task)
        conv(x)
        assert (conv.latest == 0).nonzero()[:, 1].unique().tolist() == shut
    assert (~conv.used_channels(1)).nonzero().flatten().tolist() == [3]
    assert conv.used_channels(2).all()
    assert not conv.used_channels(0).any()


def test_renewal_changes_the_free_kernels_and_no_other_and_is_the_generators() -> None:
    for bias in (True, False):
        conv = ConditionalConv(nn.Conv2d(2, 6, 3, bias=bias), None, 1)
        before = copy.deepcopy(conv.layer.state_dict())
        free, state = torch.tensor([True, False, False, True, False, True]), torch.get_rng_state()
        drawn = []
        for seed in (1, 1, 2):
            conv.layer.load_state_dict(before)
            conv.reset_kernels(free, generator(seed))
            drawn.append(copy.deepcopy(conv.layer.state_dict()))
            for name, value in before.items():
                same = (drawn[-1][name] == value).flatten(1).all(1) if value.dim() > 1 else drawn[-1][name] == value
                assert torch.equal(same, ~free)
        assert torch.equal(drawn[0]["weight"], drawn[1]["weight"])
        assert not torch.equal(drawn[0]["weight"], drawn[2]["weight"])
        assert torch.equal(state, torch.get_rng_state())
        bound = 1 / math.sqrt(2 * 9)  # of torch's own initialisation
        assert all((value[free].abs() <= bound).all() for value in drawn[0].values())


def test_a_copy_can_be_made_within_a_step() -> None:
    """What fired has a graph then, which no deep copy can take along."""
    model = gated()
    x = noise(3, 1, 8, 8)
    model(x)
    assert all(conv.latest.requires_grad for conv in convs_of(model).values())
    copied = snapshot(model)
    with torch.no_grad():
        assert torch.equal(copied(x).logits, model.eval()(x).logits)
    assert all(conv.latest is not None for conv in convs_of(model).values())


# ---------------------------------------------------------------------------------- what fires, and is fixed


def images(n: int = 7) -> ImageData:
    x = torch.randint(0, 256, (n, 1, 8, 8), generator=generator(), dtype=torch.uint8)
    return ImageData(x, torch.arange(n) % 2)


def by_hand(model: IncrementalNet, rows: ImageData) -> dict[str, list[float]]:
    """How often each channel fires, from the logits of one image at a time."""
    counts = {name: [0] * conv.units for name, conv in convs_of(model).items()}

    def note(name: str) -> Any:
        def hook(conv: ConditionalConv, args: tuple[Tensor]) -> None:
            for k, logit in enumerate(conv.gates[0](args[0])[0].tolist()):
                counts[name][k] += logit > 0

        return hook

    hooks = [conv.register_forward_pre_hook(note(name)) for name, conv in convs_of(model).items()]
    model.eval()
    for image in rows.x:
        model.features(image[None] / 255)
    model.train()
    for hook in hooks:
        hook.remove()
    return {name.removeprefix("backbone."): [c / len(rows) for c in found] for name, found in counts.items()}


def test_firing_is_counted_image_by_image_in_eval_mode() -> None:
    model, rows = gated(bias=0.0), images()
    expected, before = by_hand(model, rows), copy.deepcopy(model.state_dict())
    often = firing_rates(context(model), rows)
    assert {name: values.tolist() for name, values in often.items()} == expected
    assert {0.0, 1.0} < {v for values in expected.values() for v in values}  # some never, some always, some at times
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_a_convolution_that_the_network_does_not_use_never_fires() -> None:
    net = Own(nn.ReLU(), nn.ReLU(), nn.ReLU())
    net.spare = nn.Conv2d(1, 3, 3)
    model = gated(bias=1e4, net=net)
    often = firing_rates(context(model), images())
    assert often["spare"].tolist() == [0, 0, 0]
    assert often["convs.0"].tolist() == [1] * 4
    assert "spare" not in unreachable_gates(Own(nn.ReLU(), nn.ReLU(), nn.ReLU()), (1, 8, 8))


def test_what_fired_is_settled_and_the_rest_begins_anew() -> None:
    model, rows = gated(bias=0.0), images()
    often, before = by_hand(model, rows), copy.deepcopy(model.state_dict())
    curves = finish_task(context(model), rows, generator(3))
    for name, conv in convs_of(model.backbone).items():
        fired = [o > 0 for o in often[name]]
        assert conv.fired.tolist() == [fired, [True] * conv.units]
        same = (conv.layer.weight == before[f"backbone.{name}.layer.weight"]).flatten(1).all(1)
        assert same.tolist() == fired
        assert curves[f"open/{name}"] == pytest.approx(sum(often[name]) / conv.units)
        assert curves[f"free/{name}"] == pytest.approx(1 - sum(fired) / conv.units)
    assert len(curves) == 6


def test_kernels_that_begin_anew_begin_without_the_moments_of_a_kept_optimizer() -> None:
    """Of a kernel that stays, and of what is not a kernel, they stay to the bit."""
    model, rows = gated(bias=0.0), images()
    often, convs = by_hand(model, rows), convs_of(model.backbone)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    assert all(state["exp_avg"].all() and state["exp_avg_sq"].all() for state in kept.values())
    run = context(model)
    run.optimizer = optimizer
    finish_task(run, rows, generator(3))
    kernels = {p: name for name, conv in convs.items() for p in conv.layer.parameters()}
    for parameter, before in kept.items():
        stays = torch.ones(len(parameter), dtype=torch.bool)
        if parameter in kernels:
            stays = torch.tensor([o > 0 for o in often[kernels[parameter]]])
            assert 0 < stays.sum() < len(stays)
        for moment in ("exp_avg", "exp_avg_sq"):
            now = optimizer.state[parameter][moment]
            assert torch.equal(now[stays], before[moment][stays])
            assert not now[~stays].any()
        assert optimizer.state[parameter]["step"] == before["step"] == 1


def test_a_users_own_norms_and_gates_and_head_are_told_apart_by_what_they_are() -> None:
    """`norms.0` of the backbone is not a norm of task 0, and `backbone.head` not the head."""
    net = Own(nn.ReLU(), nn.ReLU(), nn.ReLU())
    net.head = nn.Linear(6, 6)
    net.gates = nn.ModuleList([nn.Linear(2, 2)])
    net.norms.append(nn.BatchNorm2d(3))  # one that follows no convolution
    model = gated(bias=1e4, net=net)
    assert isinstance(net.norms[3], TaskNorm)
    assert frozen_names(model, 0) == []
    for conv in convs_of(model).values():
        conv.add(1.0, generator())
    for norm in find_modules(model, TaskNorm).values():
        norm.add()
    trains = {name for name, _ in model.named_parameters()} - set(frozen_names(model, 1))
    parts = [f"convs.{k}.{part}" for k in range(3) for part in ("layer", "norm.norms.1")] + ["norms.3.norms.1"]
    names = {f"backbone.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    gates = {
        f"backbone.convs.{k}.gates.1.{layer}.{kind}"
        for k in range(3)
        for layer in ("inner", "norm", "outer")
        for kind in ("weight", "bias")
    }
    assert trains == names | gates | {"head.0.weight", "head.0.bias"}


# ------------------------------------------------------------------------------------------------- deaf


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_built_in_network_is_deaf(name: str) -> None:
    assert unreachable_gates(registry.build_backbone(Component(name), BUILT_IN[name]), BUILT_IN[name]) == []


@pytest.mark.parametrize(
    ("relus", "expected"),
    [
        ((functional.relu, functional.relu, functional.relu), [0, 1, 2]),
        ((functional.relu, nn.ReLU(), nn.ReLU()), [0]),
        ((nn.ReLU(), functional.relu, nn.ReLU()), [1]),  # neither the one before it nor the one after
        ((nn.ReLU(), nn.ReLU(), functional.relu), [2]),
        ((nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU()), []),
        ((functional.leaky_relu, functional.gelu, nn.ReLU()), []),
        ((Tensor.relu_, nn.ReLU(), torch.relu), [0, 2]),
    ],
)
def test_convolutions_before_a_relu_that_is_no_module_are_deaf(relus: Any, expected: list[int]) -> None:
    net = Own(*relus)
    assert unreachable_gates(net, (1, 8, 8)) == [f"convs.{k}" for k in expected]


def test_to_ask_who_is_deaf_leaves_nothing_behind() -> None:
    net = lived("cnn-small", (1, 8, 8))
    net.net[1].eval()
    modes, before, state = [m.training for m in net.modules()], copy.deepcopy(net.state_dict()), torch.get_rng_state()
    unreachable_gates(net, (1, 8, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in net.modules()] == modes
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
