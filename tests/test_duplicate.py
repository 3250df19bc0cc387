"""Duplicate: each task has a network of its own, which begins as the original, and is only fine-tuned."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clframe import Plugin, Scenario, hookimpl, split_classes, testing
from clframe.plugins.duplicate import Copies, Duplicate
from clframe.testing import SHAPE, Answers, Small

MOVERS: dict[str, dict[str, Any]] = {  # all that moves weights whose gradient is zero
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "decay": "all", "keep_optimizer": True},
    "sgd": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "keep_optimizer": True},
}


class Alike(Plugin):
    """Gives every experience the same order of images and the same new head."""

    name = "alike"
    observer = True

    @hookimpl
    def before_experience(self, run, experience):
        run.rng("loader").manual_seed(4)
        with torch.no_grad():
            for parameter in run.model.head[-1].parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(4))


def network(state: dict[str, Tensor], task: int | None) -> dict[str, Tensor]:
    """The backbone of the task; None: of a network that has one."""
    prefix = "backbone." if task is None else f"backbone.copies.{task}."
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return len(one) == 12 and all(torch.equal(value, other[name]) for name, value in one.items())


learn = partial(testing.learn, model=Small(), **MOVERS["adam"])


@pytest.fixture
def stream(tiny: Any) -> Scenario:
    return tiny(shape=SHAPE, setting="task")


@pytest.mark.parametrize("start", ["original", "first"])
def test_each_copy_begins_as_the_original_or_as_the_first_task_left_it(stream: Scenario, start: Any):
    """With what its norms hold, to the bit; and is another when it is learnt."""
    witness = Answers()
    learn(stream, Duplicate(start=start), witness)
    original = Small().state_dict()
    assert same(network(witness.before[0], None), original)
    first = network(witness.evaluated[0], None)
    assert not same(first, original)
    for k in (1, 2):
        begun = network(witness.before[k], k)
        assert same(begun, first if start == "first" else original)
        assert not any(torch.equal(v, begun[n]) for n, v in network(witness.evaluated[k], k).items())


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("start", ["original", "first"])
def test_later_tasks_change_no_bit_of_earlier_networks_and_answers(stream: Scenario, start: Any, mover: str):
    witness = Answers()
    results = learn(stream, Duplicate(start=start), witness, **MOVERS[mover])
    assert witness.same()
    assert results.measures["task"]["forgetting"] == 0
    assert same(network(witness.evaluated[2], 0), network(witness.evaluated[0], None))
    assert same(network(witness.evaluated[2], 1), network(witness.evaluated[1], 1))
    for k in (0, 1):
        for name in (f"head.{k}.weight", f"head.{k}.bias"):
            assert torch.equal(witness.evaluated[2][name], witness.evaluated[k][name])


@pytest.mark.parametrize("mover", MOVERS)
def test_a_copy_is_what_fine_tuning_the_original_on_its_task_alone_gives(tiny_arrays: Any, mover: str):
    """The same bits, given the same batches and the same new head."""
    arrays, train = tiny_arrays(shape=SHAPE), MOVERS[mover] | {"keep_optimizer": False}

    def scenario(order: list[int]) -> Scenario:
        return split_classes("tiny", arrays, experiences=3, setting="task", order=order)

    witness = Answers()
    learn(scenario([0, 1, 2, 3, 4, 5]), Duplicate(), Alike(), witness, **train)
    for k, order in ((1, [2, 3, 0, 1, 4, 5]), (2, [4, 5, 0, 1, 2, 3])):
        alone = Answers()
        learn(scenario(order), Alike(), alone, **train)
        assert same(network(witness.evaluated[k], k), network(alone.evaluated[0], None))
        assert torch.equal(witness.evaluated[k][f"head.{k}.weight"], alone.evaluated[0]["head.0.weight"])


def test_a_task_costs_a_network_and_a_head(tiny_arrays: Any, tmp_path: Path):
    sizes = []
    for n in (3, 4):
        scenario = split_classes(
            "tiny", tiny_arrays(classes=2 * n, shape=SHAPE), experiences=n, setting="task", order=range(2 * n)
        )
        learn(scenario, Duplicate(), epochs=1, output=str(tmp_path / str(n)))
        sizes.append(sum(value.nbytes for value in load_file(tmp_path / str(n) / "model.safetensors").values()))
    assert sizes[1] - sizes[0] == sum(v.nbytes for v in Small().state_dict().values()) + 4 * (5 * 2 + 2)


def test_what_the_user_froze_is_frozen_in_each_copy(stream: Scenario):
    model, witness = Small(), Answers()
    model.conv.requires_grad_(False)
    learn(stream, Duplicate(), witness, model=model)
    original = Small().state_dict()
    for k in (1, 2):
        trained = {f"norm.{p}" for p in ("weight", "bias")} | {f"linear.{p}" for p in ("weight", "bias")}
        assert witness.trainable[k] == {f"backbone.copies.{k}.{n}" for n in trained} | {
            f"head.{k}.weight",
            f"head.{k}.bias",
        }
        assert torch.equal(network(witness.evaluated[2], k)["conv.weight"], original["conv.weight"])
    frozen = {n for n, p in witness.model.named_parameters() if not p.requires_grad}
    assert frozen == {f"backbone.copies.{k}.conv.{p}" for k in range(3) for p in ("weight", "bias")}


def test_copies_are_apart_from_the_first_and_each_answers_for_its_task():
    copies = Copies(Small()).eval()
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    copies.add()
    assert copies.width == 5
    assert same(copies.copies[1].state_dict(), copies.copies[0].state_dict())
    assert not {id(p) for p in copies.copies[0].parameters()} & {id(p) for p in copies.copies[1].parameters()}
    with torch.no_grad():
        copies.copies[1].linear.bias.add_(1)
        for task, expected in enumerate(copies.copies):
            copies.task = task
            assert torch.equal(copies.features(x), expected.features(x))
        assert not torch.equal(copies.copies[0].features(x), copies.copies[1].features(x))
