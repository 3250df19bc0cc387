"""Warm-up: a phase in which the new head alone moves, how long it is, and who else may ask for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clframe import Plugin, testing
from clframe.errors import UsageError
from clframe.plugins.finetune_fc import FinetuneFC
from clframe.plugins.lfl import LFL
from clframe.plugins.lwf import LwF
from clframe.plugins.warm_up import WarmUp
from clframe.testing import Recorder


class Small(nn.Module):
    """A convolution with two batch norms, of which one learns nothing."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.plain = nn.BatchNorm2d(4, affine=False)
            self.linear = nn.Linear(64, 6)

    def features(self, x: Tensor) -> Tensor:
        return self.linear(self.plain(self.norm(self.conv(x)).relu()).flatten(1)).relu()


learn = partial(testing.learn, model=Small())


@pytest.mark.parametrize(
    "mover",
    [
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "decay": "all", "keep_optimizer": True},
        {"optimizer": "adam", "weight_decay": 0.1, "decay": "all", "keep_optimizer": True},
        {"optimizer": "adam", "logits": "all"},
    ],
)
@pytest.mark.parametrize("setting", ["class", "task"])
def test_in_the_phase_the_new_head_alone_moves(tiny, setting: str, mover: dict[str, Any]):
    """Weights, old heads, and the running statistics of all batch norms stay; afterwards everything is trained."""
    recorder = Recorder()
    learn(tiny(setting=setting), WarmUp(), recorder, **mover)
    for i in (1, 2):
        assert recorder.changed_in_phase(i, "warm-up") == {f"head.{i}.weight", f"head.{i}.bias"}
        moved = {"backbone.conv.weight", "backbone.norm.running_var", "backbone.plain.running_mean", f"head.{i}.weight"}
        assert moved < recorder.changed_in_phase(i, "train")


@pytest.mark.parametrize(
    ("length", "train", "steps"),
    [
        (1.0, {}, 6),  # 24 images in batches of 8, twice
        (0.5, {}, 3),
        (2.0, {}, 12),
        (0.01, {}, 3),  # an epoch at least
        (1.0, {"iterations": 7}, 7),
        (0.3, {"iterations": 7}, 2),
        (0.01, {"iterations": 7}, 1),
        (0.5, {"first": {"epochs": 10}}, 3),
        (0.5, {"first": {"iterations": 10}}, 3),
    ],
)
def test_its_length_is_relative_to_the_experiences_own_training(tiny, length: float, train: Any, steps: int):
    """In epochs where these count, else in steps; there is none in the first experience."""
    recorder = Recorder()
    learn(tiny(), WarmUp(length=length), recorder, **train)
    own = train.get("iterations", 6)
    first = {"epochs": 30, "iterations": 10}[next(iter(train["first"]))] if "first" in train else own
    assert recorder.phase_steps() == [
        (0, "train", first),
        (1, "warm-up", steps),
        (1, "train", own),
        (2, "warm-up", steps),
        (2, "train", own),
    ]


@pytest.mark.parametrize("plugin", [LwF(warm_up=0.5), LFL(warm_up=0.5), FinetuneFC(warm_up=0.5)])
def test_methods_of_the_paper_bring_the_same_phase(tiny, plugin: Plugin):
    own, alone = Recorder(), Recorder()
    learn(tiny(setting="task"), plugin, own, model="mlp-100")
    learn(tiny(setting="task"), WarmUp(length=0.5), alone, model="mlp-100")
    assert own.phase_steps() == alone.phase_steps()
    for i in (1, 2):
        assert (
            own.changed_in_phase(i, "warm-up")
            == alone.changed_in_phase(i, "warm-up")
            == {f"head.{i}.weight", f"head.{i}.bias"}
        )


def test_the_phase_of_another_plugin_is_not_brought_unless_asked_for(tiny):
    recorder = Recorder()
    learn(tiny(setting="task"), LwF(), LFL(), FinetuneFC(), recorder, model="mlp-100")
    assert [name for _, name, _ in recorder.phase_steps()] == ["train"] * 3


@pytest.mark.parametrize(
    ("plugins", "names"),
    [
        (lambda: (WarmUp(), LwF(warm_up=1.0)), "`warm-up` and `lwf`"),
        (lambda: (LFL(warm_up=1.0), LwF(warm_up=1.0)), "`lfl` and `lwf`"),
    ],
)
def test_two_that_ask_for_it_are_refused_by_name(tiny, plugins: Any, names: str):
    with testing.refused(names, " `warm-up`;"):
        learn(tiny(setting="task"), *plugins())


def test_in_domains_there_is_no_new_head(tiny):
    with testing.refused("`warm-up`", "`domain` of `tiny`", "`class` and `task`", "`--setting`"):
        learn(tiny(setting="domain"), WarmUp())
    for plugin in (LwF(warm_up=1.0), LFL(warm_up=1.0)):
        with testing.refused(f"`{plugin.name}.warm_up`", "domain", "`--setting`"):
            learn(tiny(setting="domain"), plugin)


@pytest.mark.parametrize("length", [0, -1.0, float("inf")])
def test_a_length_that_is_none_is_refused(length: float):
    with pytest.raises(UsageError, match=r"`warm-up.length` is "):
        WarmUp(length=length)
