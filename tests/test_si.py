from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clframe import Plugin, Scenario, hookimpl, testing
from clframe.context import Run
from clframe.data.batch import Batch
from clframe.data.scenario import Experience
from clframe.errors import UsageError
from clframe.model import IncrementalNet
from clframe.plugins.lwf import LwF
from clframe.plugins.mas import MAS
from clframe.plugins.si import SI
from clframe.plugins.warm_up import WarmUp
from clframe.runs import checkpoint
from clframe.runs.state import load_plugin_state, read_plugin_state
from clframe.settings import TrainSettings
from clframe.testing import Recorder

Weights = dict[str, Tensor]
SGD = {"iterations": 8, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "clip": 0.0}
ADAM = SGD | {"optimizer": "adam", "lr": 0.01}


class Double(nn.Module):
    """A backbone in float64, so that identities can be asked for to many digits."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.net, self.width = nn.Sequential(*layers).double(), width

    def features(self, x: Tensor) -> Tensor:
        return self.net(x.double())


def mlp() -> Double:
    torch.manual_seed(1)
    return Double(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), width=8)


def cnn() -> Double:
    torch.manual_seed(1)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Double(*layers, width=4)


def copied(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Witness(Recorder):
    """Finds the path integrals by itself: the base loss's gradient by autograd on a copy of the network, at each step.

    Named before `si`, it is called before `si` clears its state. It also keeps what several codes take instead of the
    gradient of the base loss: with the penalties' (Avalanche, van de Ven), after clipping, with weight decay's share.
    """

    def __init__(self, si: SI | None) -> None:
        super().__init__()
        self.si = si
        self.start: list[Weights] = []
        self.end: list[Weights] = []
        self.omega: list[Weights] = []
        self.omega_of_si: list[Weights] = []
        self.importance: list[Weights] = []  # as `si` had it before it took in the experience
        self.wrong: list[dict[str, Weights]] = []
        self.by_penalties: list[Weights] = []  # gradients of all other terms than the base loss, by step
        self.before_step: list[Weights] = []

    @hookimpl
    def grow(self, run: Run, experience: Experience) -> None:
        self.start.append(copied(run.model))
        self.omega.append({name: torch.zeros_like(p) for name, p in self.start[-1].items()})
        kinds = ("with penalties", "clipped", "with weight decay")
        self.wrong.append({kind: {n: torch.zeros_like(p) for n, p in self.start[-1].items()} for kind in kinds})

    @hookimpl
    def after_backward(self, run: Run, batch: Batch) -> None:
        net = copy.deepcopy(run.model)
        moving = {name: p for name, p in net.named_parameters() if p.requires_grad}
        loss = run.loss(batch, net(batch.x, batch.task))
        gradients = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
        self.gradients = {n: g for n, g in zip(moving, gradients, strict=True) if g is not None}
        self.before_step.append(copied(run.model))
        self.total = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
        self.by_penalties.append({n: self.total[n] - g for n, g in self.gradients.items()})

    @hookimpl
    def after_step(self, run: Run, batch: Batch) -> None:
        super().after_step(run, batch)
        before, wrong = self.before_step[-1], self.wrong[-1]
        for name, p in run.model.named_parameters():
            if name in self.gradients:
                step, g = p.detach() - before[name], self.gradients[name]
                self.omega[-1][name] -= g * step
                wrong["with penalties"][name] -= self.total[name] * step
                wrong["clipped"][name] -= p.grad * step
                wrong["with weight decay"][name] -= (g + run.settings.weight_decay * before[name]) * step

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        super().after_experience(run, experience)
        self.end.append(copied(run.model))
        if self.si is not None:
            self.omega_of_si.append({name: value.clone() for name, value in self.si.omega.items()})
            self.importance.append({name: value.clone() for name, value in self.si.penalties.precision.items()})


def run(scenario: Scenario, si: SI | None, *others: Plugin, model: Any = None, **settings: Any) -> Witness:
    witness = Witness(si=si)
    testing.learn(scenario, witness, *others, *([si] if si else []), model=model or mlp(), **SGD | settings)
    return witness


def flat(values: Weights) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def apart(got: Weights, wanted: Weights) -> float:
    """The largest difference, relative to the largest value of each tensor."""
    assert got.keys() == wanted.keys()
    return max(
        ((got[n] - w).abs().max() / w.abs().max().clamp(min=torch.finfo(w.dtype).tiny)).item()
        for n, w in wanted.items()
        if got[n].any() or w.any()
    )


# ------------------------------------------------------------- losses whose path is known in closed form


class Given(Plugin):
    """A base loss of the weights alone, the same for every batch: ``sum_i g_i theta_i`` or ``1/2 sum_i a_i theta_i^2``.

    A penalty takes `share` of experience k times the slope off again, so that weights move as (1 - share) g says.
    """

    name = "given"

    def __init__(self) -> None:
        self.slope = self.curvature = 0.0
        self.shares: list[Callable[[Tensor], Tensor]] = []

    def of(self, p: Tensor) -> Tensor:
        """The coefficients of the weights `p`, of both signs, none 0."""
        return torch.linspace(-1, 2, p.numel() + 2, dtype=p.dtype)[1:-1].view_as(p) + 1e-3

    @hookimpl
    def base_loss(self, run: Run) -> Tensor:
        terms = [
            (self.slope * self.of(p) * p).sum() + 0.5 * (self.curvature * self.of(p).abs() * p**2).sum()
            for p in run.model.parameters()
        ]
        return torch.stack(terms).sum()

    @hookimpl
    def penalty(self, run: Run) -> dict[str, Tensor] | None:
        if not self.shares:
            return None
        share = self.shares[run.experience.index]
        terms = [(share(p) * self.slope * self.of(p) * p).sum() for p in run.model.parameters()]
        return {self.name: -torch.stack(terms).sum()}


def test_linear_loss_has_its_path_in_closed_form(tiny: Callable[..., Scenario]) -> None:
    """omega_i = n h g_i^2, and the sum of omega is what the loss went down by, exactly."""
    given, n, h = Given(), 10, 0.01
    given.slope = 1.0
    seen = run(tiny(1), SI(), given, lr=h, iterations=n)
    (omega,), (start,), (end,) = seen.omega_of_si, seen.start, seen.end
    assert omega.keys() == start.keys()
    for name, w in start.items():
        assert torch.allclose(omega[name], n * h * given.of(w) ** 2, rtol=1e-9)
    down = sum((given.of(start[name]) * (start[name] - end[name])).sum() for name in start)
    assert flat(omega).sum().item() == pytest.approx(down.item(), rel=1e-12)
    assert down > 1


def test_quadratic_loss_is_accounted_for_within_a_percent(tiny: Callable[..., Scenario]) -> None:
    """With lr times the largest curvature 0.01 the sum of omega is 1 / (1 - 0.01 / 2) of the loss's way at most."""
    given = Given()
    given.curvature = 0.5
    seen = run(tiny(1), SI(), given, lr=0.01, iterations=200)
    (omega,), (start,), (end,) = seen.omega_of_si, seen.start, seen.end
    total, down = 0.0, 0.0
    for name, w in start.items():
        a = given.curvature * given.of(w).abs()
        assert 0.009 < 0.01 * a.max() <= 0.01 or w.numel() < 20
        step = 0.5 * a * (w**2 - end[name] ** 2)
        assert torch.allclose(omega[name], step / (1 - 0.01 * a / 2), rtol=1e-9)
        total, down = total + omega[name].sum().item(), down + step.sum().item()
    assert total == pytest.approx(down, rel=0.01)
    assert total > down > 0.1


def test_importance_stays_above_zero_where_a_path_climbs(tiny: Callable[..., Scenario]) -> None:
    """Omega := max(0, Omega + omega / (way^2 + xi)): guards against Omega that is not clamped (FACIL, Mammoth).

    In the second experience another term of the loss takes 0 to 3 times the slope off, and weights climb the base loss
    where it is more than once. In the third all descend again, from what was kept.
    """
    given, n, h, xi = Given(), 8, 1.0, 0.1
    given.slope = 1.0

    def more_and_more(p: Tensor) -> Tensor:
        return torch.linspace(0, 3, p.numel(), dtype=p.dtype).view_as(p)

    given.shares = [torch.zeros_like, more_and_more, torch.zeros_like]
    si = SI(c=0.0, xi=xi)
    seen = run(tiny(3, setting="domain"), si, given, lr=h, iterations=n)

    def new(p: Tensor, share: Tensor) -> Tensor:
        g = given.of(p)
        return n * h * (1 - share) * g**2 / ((n * h * (1 - share) * g) ** 2 + xi)

    for name, w in seen.start[0].items():
        first = new(w, torch.zeros_like(w))
        raw = first + new(w, more_and_more(w))
        second = raw.clamp(min=0)
        assert torch.allclose(seen.importance[1][name], first, rtol=1e-9)
        assert torch.allclose(seen.importance[2][name], second, rtol=1e-9, atol=1e-12)
        assert torch.allclose(si.penalties.precision[name], second + first, rtol=1e-9)
        if w.numel() > 20:
            assert (raw < -0.1).any()  # would be a spring that pushes
            assert ((second > 0) & (second < first)).any()  # what climbs loses importance, it is not left out
    assert (flat(seen.omega_of_si[1]) < 0).any()


# ------------------------------------------------------------------ the path of real training


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({}, {"with penalties"}),
        ({"momentum": 0.9}, {"with penalties"}),
        ({"clip": 0.3}, {"with penalties", "clipped"}),
        ({"weight_decay": 0.5, "decay": "all"}, {"with penalties", "with weight decay"}),
        ({"optimizer": "adam", "lr": 0.01}, {"with penalties"}),
        (
            {"optimizer": "adam", "lr": 0.01, "clip": 0.02, "weight_decay": 0.5},
            {"with penalties", "clipped", "with weight decay"},
        ),
        (
            {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.5, "momentum": 0.0},
            {"with penalties", "with weight decay"},
        ),
    ],
    ids=["sgd", "momentum", "clipped", "weight decay", "adam", "adam, clipped, decay", "adamw, decay"],
)
def test_path_is_that_of_the_base_loss_alone(
    settings: dict[str, Any], wrong: set[str], tiny: Callable[..., Scenario]
) -> None:
    """omega is -g (after - before) with g of the base loss by autograd on a copy, and the step as it was made.

    Guards against the penalty's own gradient in omega (Avalanche, van de Ven), against clipped gradients, and against
    weight decay's share of them: each of these would give clearly other numbers here.
    """
    seen = run(tiny(), SI(c=3.0), **settings)
    for omega, wanted in zip(seen.omega_of_si, seen.omega, strict=True):
        assert apart(omega, wanted) < 1e-9
    for kind in wrong:
        assert apart(seen.wrong[2][kind], seen.omega[2]) > 0.01, kind
    assert all(flat(omega).abs().max() > 1e-3 for omega in seen.omega_of_si)


def test_path_of_convolutions_and_batch_norms(tiny: Callable[..., Scenario]) -> None:
    """Gradients are those of training, in train mode; running statistics are not weights and have no importance."""
    si = SI(c=3.0)
    seen = run(tiny(2), si, model=cnn(), **ADAM)
    for omega, wanted in zip(seen.omega_of_si, seen.omega, strict=True):
        assert apart(omega, wanted) < 1e-9
    assert "backbone.net.1.weight" in si.penalties.anchor
    assert not any("running" in name for name in si.penalties.anchor)


def test_a_huge_penalty_has_no_share_in_the_path(tiny: Callable[..., Scenario]) -> None:
    """Along a trajectory that a penalty dominates, omega is still found from the base loss's gradients."""
    seen = run(tiny(2), SI(c=1e6), **ADAM)
    assert max(step.losses["si"].item() / step.losses["base"].item() for step in seen.steps if "si" in step.losses) > 50
    assert apart(seen.omega_of_si[1], seen.omega[1]) < 1e-9
    assert apart(seen.wrong[1]["with penalties"], seen.omega[1]) > 10


@pytest.mark.parametrize("xi", [1e-3, 0.1])
def test_importance_is_the_path_by_the_way_squared(xi: float, tiny: Callable[..., Scenario]) -> None:
    """Omega_k = max(0, Omega_{k-1} + omega_k / ((theta_k - theta*)^2 + xi)), nothing else.

    theta* is the initial weights in the first experience, and for a new block of the head those that it was grown with.
    Guards against a fixed damping and against importance that is cut off at 1e-3 (Avalanche).
    """
    backbone = mlp()
    initial = {f"backbone.{name}": p for name, p in copied(backbone).items()}
    si = SI(c=3.0, xi=xi)
    seen = run(tiny(), si, model=backbone, **ADAM | {"lr": 0.05, "iterations": 20})
    assert all(torch.equal(seen.start[0][name], p) for name, p in initial.items())
    grown = [sorted(start.keys() - seen.start[0].keys()) for start in seen.start]
    assert grown[1:] == [
        ["head.1.bias", "head.1.weight"],
        [f"head.{k}.{p}" for k in (1, 2) for p in ("bias", "weight")],
    ]
    importance: Weights = {}
    for k, (start, end, omega) in enumerate(zip(seen.start, seen.end, seen.omega, strict=True)):
        for name, value in omega.items():
            new = value / ((end[name] - start[name]) ** 2 + xi)
            importance[name] = (importance.get(name, torch.zeros_like(new)) + new).clamp(min=0)
        got = (*seen.importance[1:], si.penalties.precision)[k]
        assert apart(got, importance) < 1e-9
        assert flat(importance).max() > 0.05
    assert all(torch.equal(si.penalties.anchor[name], w) for name, w in seen.end[-1].items())
    assert any((flat(omega) < 0).any() for omega in seen.omega)
    assert si.omega == si.start == {}  # a checkpoint between experiences holds the penalty alone


def test_penalty_has_no_half_and_one_anchor(tiny: Callable[..., Scenario]) -> None:
    """c sum Omega (theta - theta*)^2 with the gradient 2 c Omega (theta - theta*), theta* the latest weights."""
    c = 3.0
    si = SI(c=c)
    seen = run(tiny(), si)
    steps = len(seen.steps) // 3
    for step in (steps + 3, 2 * steps + 5):
        k = step // steps
        omega, anchor, theta = seen.importance[k], seen.end[k - 1], seen.before_step[step]
        value = sum((omega[n] * (theta[n] - anchor[n]) ** 2).sum().item() for n in anchor)
        assert seen.losses("si")[step] == pytest.approx(c * value, rel=1e-9)
        assert value > 1e-5
        pulls = {n: 2 * c * omega[n] * (theta[n] - anchor[n]) for n in anchor}
        assert apart({n: seen.by_penalties[step][n] for n in anchor}, pulls) < 1e-9
    assert seen.losses("si")[:steps] == [None] * steps
    assert seen.losses("si")[steps] == 0
    theta = {n: w + 1 for n, w in seen.end[-1].items()}
    net = IncrementalNet(mlp(), [2, 2, 2])
    net.load_state_dict(theta)
    term = si.penalty(Stub(net))["si"]
    assert term.item() == pytest.approx(c * flat(si.penalties.precision).sum().item(), rel=1e-9)


class Stub:
    """As much of a run as the hook `penalty` reads."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.settings = TrainSettings(optimizer="adam")


def test_first_experience_and_strength_0_are_finetuning(tiny: Callable[..., Scenario]) -> None:
    """To the bit, though the engine goes backward in two parts."""
    without, none, strong = run(tiny(), None), run(tiny(), SI(c=0.0)), run(tiny(), SI(c=10.0))
    for k in range(3):
        assert all(torch.equal(none.end[k][name], w) for name, w in without.end[k].items())
    assert all(torch.equal(strong.end[0][name], w) for name, w in without.end[0].items())
    assert not torch.equal(flat(strong.end[1]), flat(without.end[1]))


def test_a_strong_penalty_holds_the_weights_that_mattered(tiny: Callable[..., Scenario]) -> None:
    """The distance to the first weights, measured by their importance, shrinks at least tenfold."""
    distances = []
    for c in (0.0, 100.0):
        seen = run(tiny(2), SI(c=c), **ADAM | {"iterations": 30})
        importance, anchor = seen.importance[1], seen.end[0]
        distances.append(sum((importance[n] * (seen.end[1][n] - anchor[n]) ** 2).sum().item() for n in anchor))
    assert distances[1] < distances[0] / 10


# --------------------------------------------------------------------------- which weights


def test_heads_may_be_left_out(tiny: Callable[..., Scenario]) -> None:
    with_heads, without = SI(), SI(heads=False)
    run(tiny(2), with_heads)
    run(tiny(2), without)
    backbone = ["backbone.net.1.weight", "backbone.net.1.bias"]
    assert list(without.penalties.anchor) == backbone
    heads = ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]
    assert list(with_heads.penalties.anchor) == backbone + heads


class Freeze(Plugin):
    """Freezes the first layer's weights from experience `since` on."""

    name = "freeze"

    def __init__(self) -> None:
        self.since = 0

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        if experience.index >= self.since:
            run.model.backbone.get_parameter("net.1.weight").requires_grad_(False)


def test_frozen_weights_have_no_path(tiny: Callable[..., Scenario]) -> None:
    """Frozen from the start they have no spring; frozen later they keep the importance that they had."""
    frozen = "backbone.net.1.weight"
    si = SI()
    run(tiny(2, setting="domain"), si, Freeze())
    assert list(si.penalties.anchor) == ["backbone.net.1.bias", "head.0.weight", "head.0.bias"]
    later, si = Freeze(), SI()
    later.since = 1
    seen = run(tiny(3, setting="domain"), si, later)
    assert frozen in seen.omega_of_si[0]
    assert frozen not in seen.omega_of_si[1]
    assert torch.equal(si.penalties.precision[frozen], seen.importance[1][frozen])
    assert torch.equal(si.penalties.anchor[frozen], seen.end[0][frozen])


# ------------------------------------------------------------------------------ beside others


@pytest.mark.parametrize("setting", ["class", "task"])
def test_path_beside_a_warm_up(setting: str, tiny: Callable[..., Scenario]) -> None:
    """In the warm-up the penalty is on frozen weights: a term without gradient. The new head's path begins in it."""
    seen = run(tiny(2, setting=setting), SI(c=3.0), WarmUp())
    assert len(seen.steps) == 3 * SGD["iterations"]
    assert apart(seen.omega_of_si[1], seen.omega[1]) < 1e-9
    warm = seen.before_step[8:16]
    assert all(torch.equal(w["backbone.net.1.weight"], warm[0]["backbone.net.1.weight"]) for w in warm)
    assert not torch.equal(warm[-1]["head.1.weight"], warm[0]["head.1.weight"])
    assert seen.losses("si")[8:17] == [0.0] * 9
    assert seen.losses("si")[-1] > 0


@pytest.mark.parametrize("setting", ["class", "task"])
@pytest.mark.parametrize("warm_up", [0.0, 1.0])
def test_path_beside_lwf(warm_up: float, setting: str, tiny: Callable[..., Scenario]) -> None:
    """Distillation moves the old head, whose path in the new task's own loss is 0: it has no share in omega."""
    si = SI(c=3.0)
    seen = run(tiny(2, setting=setting), si, LwF(lambda_=2.0, warm_up=warm_up), momentum=0.5)
    assert apart(seen.omega_of_si[1], seen.omega[1]) < 1e-9
    assert (seen.end[1]["head.0.weight"] - seen.end[0]["head.0.weight"]).abs().max() > 1e-4
    assert seen.omega_of_si[1]["head.0.weight"].abs().max() == 0
    assert torch.equal(si.penalties.precision["head.0.weight"], seen.importance[1]["head.0.weight"])
    assert seen.losses("si")[-1] > 0
    assert seen.losses("lwf")[-1] > 0


# -------------------------------------------------------------------- large penalties and refusals


def test_sgd_learns_beside_a_penalty_that_it_would_overshoot(tiny: Callable[..., Scenario]) -> None:
    told: list[str] = []
    si = SI(c=1e5)
    witness = run(tiny(2), si, listeners=[testing.message_listener(told)], iterations=30)
    assert 0.1 * 2e5 * max(p.max().item() for p in si.penalties.precision.values()) > 2
    assert told == []
    assert all(w.isfinite().all() for w in witness.end[1].values())


@pytest.mark.parametrize(
    ("option", "value"), [("c", -1.0), ("c", float("inf")), ("xi", 0.0), ("xi", -0.1), ("heads", 2), ("lambda", 1.0)]
)
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"`si\.{option}`"):
        SI(**{option: value})


@pytest.mark.parametrize("cls", [SI, MAS])
def test_state_under_its_former_name_is_read(cls: type[SI | MAS]) -> None:
    """Checkpoints of earlier versions call the penalty `springs`."""
    saved, read = cls(), cls()
    saved.penalties.replace({"w": torch.tensor([2.0, 3.0])}, {"w": torch.tensor([0.5, -1.0])})
    former = {
        ("springs" if name == "penalties" else name): value
        for name, value in read_plugin_state(saved, cls.state).items()
    }
    tensors: dict[str, Tensor] = {}
    load_plugin_state(read, checkpoint.pack(former, tensors), tensors, {}, torch.device("cpu"))
    assert read.penalties.precision["w"].tolist() == [2.0, 3.0]
    assert read.penalties.anchor["w"].tolist() == [0.5, -1.0]
    assert not hasattr(read, "springs")
