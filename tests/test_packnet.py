"""PackNet: each task takes its share of what is free, and what it took stays to the last bit."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clframe import ImageData, Phase, Plugin, Scenario, hookimpl, testing
from clframe.errors import UsageError
from clframe.plugins.packnet import PackNet
from clframe.testing import SHAPE, Answers, Recorder, Small, state_copy
from clframe.toolkit.weight_masks import WeightOwner, find_modules

MOVERS: dict[str, dict[str, Any]] = {  # all that moves weights whose gradient is zero
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "decay": "all"},
    "kept": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "decay": "all", "keep_optimizer": True},
    "sgd": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "keep_optimizer": True},
}


class Witness(Answers):
    """Keeps answers, owners and the network after each step of each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: list[dict[str, Tensor]] = []
        self.at_step: dict[tuple[int, str], list[dict[str, Tensor]]] = {}

    @hookimpl
    def after_step(self, run, batch):
        super().after_step(run, batch)
        self.at_step.setdefault((run.experience.index, run.phase.name), []).append(state_copy(run.model))

    @hookimpl
    def after_eval(self, run):
        super().after_eval(run)
        self.owners.append({name: p.owner.clone() for name, p in find_modules(run.model.backbone, WeightOwner).items()})


learn = partial(testing.learn, model=Small(), **MOVERS["adam"])


@pytest.fixture
def stream(tiny: Any) -> Scenario:
    return tiny(shape=SHAPE, setting="task")


def weight(layer: str) -> str:
    return f"backbone.{layer}.parametrizations.weight.original"


SIZES = {"conv": 36, "linear": 320}


# --------------------------------------------------------------------------------------- who owns what


@pytest.mark.parametrize("prune", [0.75, 0.5])
def test_each_task_takes_its_share_of_each_layer_and_what_is_free_is_0(stream: Scenario, prune: float):
    witness = Witness()
    learn(stream, PackNet(prune=prune), witness)
    for name, size in SIZES.items():
        free, taken = size, []
        for k in range(3):
            taken.append(round((1 - prune) * free))
            free -= taken[-1]
            owner = witness.owners[k][name]
            assert [(owner == t).sum().item() for t in range(5)] == [free, *taken, *[0] * (3 - k)]
            assert (witness.evaluated[k][weight(name)][owner == 0] == 0).all()
            if k:
                before = witness.owners[k - 1][name]
                assert torch.equal(owner[before > 0], before[before > 0])


def test_what_is_taken_is_what_the_training_left_largest(stream: Scenario):
    """In magnitude, of the weights at the end of the phase `train`, which the pruning ends."""
    witness, unpruned = Witness(), Witness()
    learn(stream, PackNet(prune=0.75), witness)
    learn(stream, unpruned)
    for name in SIZES:
        trained = unpruned.at_step[0, "train"][-1][f"backbone.{name}.weight"].abs()
        mine = witness.owners[0][name] == 1
        assert trained[mine].min() >= trained[~mine].max()
        pruned = witness.at_step[0, "train"][-1][weight(name)]
        assert torch.equal(pruned.abs(), trained * mine)


def test_curves_tell_what_is_free(stream: Scenario):
    recorder = Recorder()
    learn(stream, PackNet(prune=0.5), recorder, epochs=1)
    told = recorder.logged()
    assert told["packnet/free/linear"] == [0.5, 0.25, 0.125]
    assert told["packnet/free/conv"] == pytest.approx([n / 36 for n in (18, 9, 5)])


# --------------------------------------------------------------------------------- nothing is forgotten


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("options", [{}, {"retrain": 0.0}, {"pretrained": True}])
def test_later_tasks_change_no_bit_of_what_earlier_ones_own_and_answer(stream: Scenario, options: Any, mover: str):
    witness = Witness()
    results = learn(stream, PackNet(**options), witness, **MOVERS[mover])
    assert witness.same()
    assert results.measures["task"]["forgetting"] == 0
    for k in (0, 1):
        for name in SIZES:
            mine = witness.owners[k][name] > 0
            assert torch.equal(witness.evaluated[2][weight(name)][mine], witness.evaluated[k][weight(name)][mine])
    fixed = [n for n in witness.evaluated[2] if n.startswith("backbone.") and "parametrizations" not in n]
    assert len(fixed) == 2 + 3 + 5  # biases, and what the two norms hold
    for state in witness.evaluated[1:]:
        assert all(torch.equal(state[n], witness.evaluated[1][n]) for n in fixed)
        renamed = {n: n.replace("plain.norm.", "plain.") for n in fixed}
        first = {n.replace("plain.norm.", "plain."): v for n, v in witness.evaluated[0].items()}
        assert all(torch.equal(state[n], first[short]) for n, short in renamed.items())
    given = Small().state_dict()
    assert torch.equal(given["linear.bias"], witness.evaluated[0]["backbone.linear.bias"]) == ("pretrained" in options)
    assert torch.equal(given["norm.running_mean"], witness.evaluated[0]["backbone.norm.running_mean"]) == (
        "pretrained" in options
    )


@pytest.mark.parametrize("mover", MOVERS)
def test_each_phase_moves_its_own_weights_alone(stream: Scenario, mover: str):
    """`train` those that nobody owns, `retrain` those that the task took, in every step."""
    witness = Witness()
    learn(stream, PackNet(prune=0.5), witness, **MOVERS[mover])
    for k in range(3):
        train, retrain = witness.at_step[k, "train"], witness.at_step[k, "retrain"]
        assert len(train) == 2 * len(retrain) == 6
        for name in SIZES:
            now = witness.owners[k][name]
            earlier = (now > 0) & (now <= k)
            states = [s[weight(name)] for s in (*train, *retrain)]
            moved = [a != b for a, b in pairwise(states)]
            assert not any((m & earlier).any() for m in moved)
            after = moved[len(train) :]  # from the pruned weights to those after each step
            assert not any((m & (now != k + 1)).any() for m in after)
            assert any((m & (now == k + 1)).any() for m in after)
            if not k:
                assert any((m & (now == 0)).any() for m in moved[: len(train) - 2])  # those that are given back, too
        assert not torch.equal(retrain[0][f"head.{k}.weight"], retrain[-1][f"head.{k}.weight"])
        assert all(torch.equal(train[0][f"head.{j}.weight"], retrain[-1][f"head.{j}.weight"]) for j in range(k))


def test_a_phase_that_another_brings_after_the_training_moves_no_free_weight(stream: Scenario):
    """A weight that is free is 0 when the next task comes."""

    class Tuning(Plugin):
        name = "tuning"

        @hookimpl
        def phases(self, run):
            return [Phase("tuning", "after", epochs=1)]

    witness = Witness()
    learn(stream, Tuning(), PackNet(), witness)
    assert (0, "tuning") in witness.at_step
    assert witness.same()
    for k in range(3):
        for name in SIZES:
            assert (witness.evaluated[k][weight(name)][witness.owners[k][name] == 0] == 0).all()


@pytest.mark.parametrize(("retrain", "steps"), [(0.0, 0), (0.1, 3), (0.5, 3), (1.0, 6), (2.0, 12)])
def test_retraining_is_as_long_as_its_share_of_the_training(stream: Scenario, retrain: float, steps: int):
    """An epoch at least."""
    witness = Witness()
    learn(stream, PackNet(retrain=retrain), witness)
    assert [len(witness.at_step.get((k, "retrain"), [])) for k in range(3)] == [steps] * 3


def test_afterwards_the_model_is_as_trainable_as_before(stream: Scenario):
    model, witness = Small(), Witness()
    model.conv.bias.requires_grad_(False)
    learn(stream, PackNet(), witness, model=model)
    assert [n for n, p in witness.model.named_parameters() if not p.requires_grad] == ["backbone.conv.bias"]


def test_a_layer_that_the_user_froze_is_not_pruned(stream: Scenario):
    """All tasks compute with the whole of it, and nobody is told that it is full."""
    model, witness = Small(), Witness()
    model.conv.weight.requires_grad_(False)
    learn(stream, PackNet(), witness, model=model, epochs=1, keep_optimizer=True)
    assert all(torch.equal(state[weight("conv")], Small().conv.weight) for state in witness.evaluated)
    assert witness.same()
    assert witness.messages() == []
    with torch.no_grad():
        for task in range(3):
            witness.model.select(task)
            assert torch.equal(witness.model.backbone.conv.weight, Small().conv.weight)


# ----------------------------------------------------------------------------------- hints and refusals


class Tiny(nn.Module):
    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)).relu()


def test_a_layer_that_is_full_is_told_of(tiny: Any):
    """Of 64 weights 1 in a hundred is given back: 1 after the first task, none after the second."""
    full, roomy = Recorder(), Recorder()
    learn(tiny(setting="task"), PackNet(prune=0.01), full, model=Tiny(), epochs=1)
    told = [record for record in full.records if record["kind"] in ("experience", "message")]
    assert [record["kind"] for record in told] == ["experience"] * 3 + ["message"]
    assert all(word in told[-1]["text"] for word in ("`packnet`", " linear:", "`packnet.prune`"))
    learn(tiny(setting="task"), PackNet(prune=0.5), roomy, model=Tiny(), epochs=1)
    assert roomy.messages() == []


@pytest.mark.parametrize("n", [255, 256])
def test_more_tasks_than_a_byte_tells_apart_are_refused(n: int):
    class Asked(Exception):
        pass

    def load(index: int, part: str) -> ImageData:
        raise Asked

    scenario = Scenario(
        "many", "task", [[2 * k, 2 * k + 1] for k in range(n)], [str(k) for k in range(2 * n)], (1, 4, 4), load
    )
    refused = n > 255
    with pytest.raises(UsageError if refused else Exception) as caught:
        learn(scenario, PackNet(), model=Tiny(), epochs=1)
    if refused:
        assert isinstance(caught.value, UsageError)
        (problem,) = caught.value.problems
        assert problem.startswith("`packnet` can distinguish 255 tasks, and the scenario has 256 experiences")
    else:
        assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize("prune", [0, 1, -0.5])
def test_a_share_that_prunes_nothing_or_all_is_refused(prune: float):
    with pytest.raises(UsageError, match=r"`packnet\.prune`"):
        PackNet(prune=prune)
