"""HAT: the steepness of gates, the price of new units, and how much of a step each weight keeps out of."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clframe import IncrementalNet, Scenario, hookimpl, testing
from clframe.backbones import mlp
from clframe.errors import UsageError
from clframe.plugins.hat import HAT
from clframe.testing import SHAPE, Answers, Recorder, differing, seeded, unusual, usual
from clframe.toolkit.norms import TaskNorm
from clframe.toolkit.unit_gates import AttentionGate
from clframe.toolkit.weight_masks import find_modules

MOVERS: dict[str, dict[str, Any]] = {  # all that moves weights whose gradient is zero
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "decay": "all", "keep_optimizer": True},
    "sgd": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "decay": "all"},
}


class Witness(Answers):
    """Keeps answers after each experience, and after each step what the gates are."""

    def __init__(self) -> None:
        super().__init__()
        self.s: list[float] = []
        self.largest: list[float] = []

    @hookimpl
    def after_step(self, run, batch):
        super().after_step(run, batch)
        gates = list(find_modules(run.model, AttentionGate).values())
        (s,) = {gate.s for gate in gates}
        self.s.append(s)
        self.largest.append(max(gate.embeddings[-1].abs().max().item() for gate in gates))


learn = partial(testing.learn, model=usual(), epochs=4, **MOVERS["adam"])


@pytest.fixture
def stream(tiny: Any) -> Scenario:
    return tiny(shape=SHAPE, setting="task")


# ------------------------------------------------------------------------------------ within an epoch


@pytest.mark.parametrize("s_max", [400.0, 10.0])
def test_within_an_epoch_s_rises_from_1_over_s_max_to_s_max(stream: Scenario, s_max: float):
    """In equal steps (eq. 3); 24 images in batches of 5 are 5 batches."""
    witness = Witness()
    learn(stream, HAT(s_max=s_max), witness, epochs=2, batch_size=5)
    low = 1 / s_max
    epoch = [low + (s_max - low) * b / 4 for b in range(5)]
    assert witness.s == pytest.approx(epoch * 6, rel=1e-12)
    assert (witness.s[0], witness.s[4]) == (low, s_max)


def test_an_epoch_of_one_batch_has_the_largest_s(stream: Scenario):
    witness = Witness()
    learn(stream, HAT(s_max=30.0), witness, epochs=2, batch_size=24)
    assert witness.s == [30.0] * 6


def test_embeddings_stay_within_6(stream: Scenario):
    witness = Witness()
    learn(stream, HAT(), witness, lr=1.0)
    assert max(witness.largest) == 6.0


# -------------------------------------------------------------------------- drive it without an engine


def gated(build: Any = usual, tasks: int = 2) -> tuple[HAT, Any, Any]:
    """The plugin, as much of a run as it needs, and a network of so many tasks."""
    plugin, net = HAT(s_max=50.0), seeded(lambda: IncrementalNet(build(), [2] * tasks))
    generator = torch.Generator().manual_seed(0)
    run = SimpleNamespace(model=net, scenario=SimpleNamespace(input_shape=SHAPE), rng=lambda name: generator)
    for k in range(tasks):
        plugin.grow(run, SimpleNamespace(index=k, task=k))
    return plugin, run, net


def test_the_penalty_is_the_attention_to_units_that_are_free_by_their_number():
    """Serra et al., eq. 6, over the units of all layers together."""
    plugin, run, net = gated(lambda: seeded(lambda: mlp(SHAPE, hidden=[3, 2])))
    one, two = find_modules(net, AttentionGate).values()
    one.used.copy_(torch.tensor([1.0, 0.5, 0.0]))
    two.used.copy_(torch.tensor([0.25, 0.0]))
    with torch.no_grad():
        one.embeddings[-1].copy_(torch.tensor([1.0, -1.0, 0.5]))
        two.embeddings[-1].copy_(torch.tensor([0.0, 2.0]))
    one.s = two.s = 2.0

    def sigmoid(x: float) -> float:
        return torch.tensor(x, dtype=torch.float64).sigmoid().item()

    asked = 0.0 * sigmoid(2) + 0.5 * sigmoid(-2) + 1.0 * sigmoid(1) + 0.75 * sigmoid(0) + 1.0 * sigmoid(4)
    terms = plugin.penalty(run, None, None)
    assert terms.keys() == {"hat"}
    assert terms["hat"].item() == pytest.approx(0.75 * asked / (0.5 + 1.0 + 0.75 + 1.0), rel=1e-6)
    gradients = torch.autograd.grad(terms["hat"], [one.embeddings[-1], two.embeddings[-1]])
    slope = 0.75 / 3.25 * 2.0 * sigmoid(1) * (1 - sigmoid(1))
    assert gradients[0][2].item() == pytest.approx(slope, rel=1e-5)
    assert gradients[0][0] == 0
    for gate in (one, two):
        gate.used.fill_(1)
    assert plugin.penalty(run, None, None)["hat"] == 0


OPTIMIZERS: dict[str, Any] = {
    "adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
}


def three_steps(optimizer: str, used: float, protect: bool) -> list[list[Tensor]]:
    """The weights and biases of the layers before the first step and after each, from the same start."""
    plugin, run, net = gated()
    gates = find_modules(net, AttentionGate)
    for gate in gates.values():
        gate.used.fill_(used)
    layers = [p for gate in gates.values() for p in gate.layer.parameters()]
    stepper = OPTIMIZERS[optimizer](net.parameters())
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    seen = [[p.detach().clone() for p in layers]]
    for _ in range(3):
        stepper.zero_grad()
        net(x, torch.full((6,), 1)).logits.square().sum().backward()
        if protect:
            plugin.after_backward(run)
        else:
            for gate in gates.values():
                gate.compensate_gradient()
        stepper.step()
        if protect:
            plugin.after_step(run)
        seen.append([p.detach().clone() for p in layers])
    return seen


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_where_all_units_are_used_no_weight_moves(optimizer: str):
    before, *after = three_steps(optimizer, 1.0, True)
    assert all(same(weights, before) for weights in after)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_where_no_unit_is_used_the_step_is_the_optimizers(optimizer: str):
    protected, plain = three_steps(optimizer, 0.0, True), three_steps(optimizer, 0.0, False)
    assert all(same(one, other) for one, other in zip(protected, plain, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(protected[0], protected[1], strict=True))


def test_with_plain_sgd_it_is_the_paper_s_product_of_gradients():
    """g (1 - min(a_i, a_j)), eq. 2."""
    before, after, *_ = three_steps_of_sgd(None)
    used = [torch.rand(6, generator=torch.Generator().manual_seed(5)), torch.zeros(8)]
    held = three_steps_of_sgd(used)
    step = [b - a for a, b in zip(before, after, strict=True)]
    into = [torch.ones(1), used[0]]
    for k, (a, b) in enumerate(zip(held[0], held[1], strict=True)):
        share = torch.minimum(used[k][:, None], into[k][None])[:, :, None, None]
        torch.testing.assert_close(b - a, step[k] * (1 - share), rtol=1e-4, atol=1e-6)
    assert len(step) == 2


def three_steps_of_sgd(used: list[Tensor] | None) -> list[list[Tensor]]:
    """The convolutions before and after one step of plain SGD."""
    plugin, run, net = gated()
    gates = list(find_modules(net, AttentionGate).values())
    for gate, values in zip(gates, used or [], strict=used is not None):
        gate.used.copy_(values)
    layers = [gate.layer.weight for gate in gates]
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    before = [p.detach().clone() for p in layers]
    net(x, torch.full((6,), 1)).logits.square().sum().backward()
    plugin.after_backward(run)
    torch.optim.SGD(net.parameters(), 0.05).step()
    plugin.after_step(run)
    return [before, [p.detach().clone() for p in layers]]


# --------------------------------------------------------------------------------- little is forgotten


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("build", [usual, unusual])
def test_answers_to_earlier_tasks_hardly_change(stream: Scenario, build: Any, mover: str):
    """Gates are all but binary; without protection the same answers change by a hundred times as much."""
    witness, bare, train = Answers(), Answers(), MOVERS[mover] | {"clip": 1.0}
    learn(stream, HAT(), witness, model=build(), **train)

    class Bare(HAT):
        name = "bare"

        @hookimpl
        def after_step(self, run):
            pass

    learn(stream, Bare(), bare, model=build(), **train)
    assert witness.drift() < 0.01 * bare.drift()
    assert bare.drift() > 0.002


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("build", [usual, unusual])
def test_where_gates_are_saturated_no_bit_changes(stream: Scenario, build: Any, mover: str):
    witness = Witness()
    results = learn(stream, HAT(s_max=1e6), witness, model=build(), **MOVERS[mover])
    for gate in find_modules(witness.model, AttentionGate).values():
        attention = torch.stack([(1e6 * e).sigmoid() for e in gate.embeddings])
        assert ((attention == 0) | (attention == 1)).all()
    assert witness.drift() == 0
    assert results.measures["task"]["forgetting"] == 0


def test_later_tasks_change_nothing_that_no_gate_protects(stream: Scenario):
    """Norms are the task's own; what is in no layer rests after the first task."""
    recorder = Recorder()
    learn(stream, HAT(), recorder, model=unusual())
    states = recorder.after
    assert list(find_modules(recorder.model.backbone, TaskNorm)) == ["body.2"]
    for k in (0, 1):
        own = [f".norms.{k}.", f"embeddings.{k}", f"head.{k}.", "body.3.", "body.5."]
        names = [n for n in states[k] if any(part in n for part in own)]
        assert len(names) == 5 + 3 + 2 + 3
        assert not set(names) & set(differing(states[2], states[k]))
    assert all(p.requires_grad for p in recorder.model.parameters())


def test_a_layer_that_the_features_do_not_use_is_left_alone(stream: Scenario):
    class Spare(nn.Module):
        width = 4

        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(64, 4), nn.Linear(64, 4)

        def features(self, x: Tensor) -> Tensor:
            return self.used(x.flatten(1)).relu()

    witness, model = Witness(), seeded(Spare)
    before = model.spare.weight.detach().clone()
    learn(stream, HAT(s_max=1e6), witness, model=model)
    assert torch.equal(witness.model.backbone.spare.layer.weight, before)
    assert witness.drift() == 0


def test_curves_tell_what_is_open_and_what_is_free(stream: Scenario):
    recorder = Recorder()
    learn(stream, HAT(), recorder, epochs=1)
    told, gates = recorder.logged(), find_modules(recorder.model.backbone, AttentionGate)
    assert len(gates) == 2
    for name, gate in gates.items():
        is_open = torch.stack([e > 0 for e in gate.embeddings])
        assert told[f"hat/open/{name}"] == pytest.approx([part.float().mean().item() for part in is_open])
        free = [1 - is_open[: k + 1].any(0).float().mean().item() for k in range(3)]
        assert told[f"hat/free/{name}"] == pytest.approx(free)


# ------------------------------------------------------------------------------------------ afterwards


@pytest.mark.parametrize(("option", "value"), [("sparsity", -0.1), ("s_max", 0.0)])
def test_wrong_options_are_refused(option: str, value: float):
    with pytest.raises(UsageError, match=rf"`hat\.{option}`"):
        HAT(**{option: value})
