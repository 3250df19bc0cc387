"""Every option of every built-in plugin, set to another value than its default: it runs, and has an effect."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import clframe
from clframe import Plugin, hookimpl, registry, testing
from clframe.evaluate import Evaluator
from clframe.options import options_of
from clframe.plugins.er import ER

CLASSES = {name: registry.plugin_class(name) for name in registry.names("plugin")}
NAMES = [name for name, cls in CLASSES.items() if not (cls.variants or cls.observer)]  # observers have no effect
TRAIN = {"iterations": 3, "batch_size": 12, "optimizer": "sgd", "lr": 0.1, "schedule": "constant", "threads": 1}
# options of the run that others are compared with, where the plugin's defaults take long
BASE: dict[str, dict[str, Any]] = {
    "always-be-dreaming": {"iterations": 2, "batch_size": 8, "noise": 6, "width": 4},
    "channel-gating": {"classifier_iterations": 2, "size": 12, "generator_iterations": 1},
    "deep-inversion": {"per_class": 2, "iterations": 4},
    "der": {"size": 12},
    "er": {"size": 12},
    "generative-replay": {"hidden": [8], "z": 3, "iterations": 2},
    "hat": {"s_max": 50.0},
    "icarl": {"size": 12},
}
# where the first setting that the plugin serves shows nothing of the option
SETTINGS = {"channel-gating": "class", "lfl": "task", "duplicate": "task"}
NET = {"name": "cnn-small", "widths": [4, 6]}
MODELS = {"finetune-fc": {"name": "mlp", "hidden": [8, 8]}}
# options that an option needs beside it, in both runs
BESIDE: dict[str, dict[str, Any]] = {
    "a-ltm.on": {},
    "channel-gating.generator_iterations": {"memory": "generative"},
    "channel-gating.generator_net": {"memory": "generative"},
    "deep-inversion.rounds": {"compete": 1.0},
    "er.per_class": {"memory": "ring"},
    "joint.restart": {"form": "cumulative"},
    "ewc.gamma": {"form": "online"},
    "generative-replay.critic_steps": {"generator": "wgan"},
    "generative-replay.temperature": {"labels": "soft"},
    "lwm.temperature": {"distill": "softmax"},
}
# values that the type alone does not give, or that show nothing on so small a stream
VALUES: dict[str, Any] = {
    "er.per_class": 1,  # 2 is what `er.size` gives
    "ewc.samples": 2,  # of 24
    "lfl.form": "multi-head",
    "lwf.form": "all",
    "lwm.layer": "net.5",
    "mas.images": None,  # a file that the test writes
    "piggyback.threshold": 0.0025,
}
# options that change no weight and no score in so short a run, and why: other tests show what they do
WITHOUT_EFFECT: dict[str, str] = {
    "channel-gating.classifier_iterations": "after so few steps the task classifier finds the same tasks",
    "channel-gating.generator_net": "as above",
    "channel-gating.per_class": "as above",
    "channel-gating.relevance": "most gates are open, for more than half of the images",
    "channel-gating.size": "as above, of the task classifier",
    "channel-gating.sparsity_after": "no step of 3 lies between the two shares",
    "deep-inversion.batch_size": "it bounds the memory; the dreams here fit into one batch",
    "ewc.form": "both forms are the same until the third experience",
    "lfl.form": "the setting of the run asks for this form",
    "lwm.base": "both networks rank the same class first",
    "lwm.layer": "the default is this layer",
    "piggyback.init": "no mask crosses the threshold in so few steps",
    "piggyback.threshold": "as above",
}


def other(kind: str, value: Any) -> Any:
    """Return a value of an option of this type, in words as users read it, that is not `value`."""
    first = kind.split(" | ")[0]
    if " | " in kind and first not in ("str", "Path") and not first.startswith(("int", "float", "bool", "list")):
        return next(choice for choice in kind.split(" | ") if choice not in (value, "null"))
    if first == "bool":
        return not value
    if first.startswith("list of int"):
        return [2 * number for number in value]
    if first.startswith("int"):
        return 2 * value if value else 2
    if first.startswith("float"):
        return 0.5 if not value else value / 2 if "< 1" in first or "<= 1" in first else 2 * value
    raise AssertionError(f"say in VALUES what to try in place of {value!r}, which is {kind}")


class Weights(Plugin):
    """Keeps the weights after each experience, and sees that all losses are finite."""

    name = "weights"
    observer = True

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []
        self.steps = 0

    @hookimpl
    def after_step(self, run):
        assert all(math.isfinite(float(loss)) for loss in run.losses.values()), run.losses
        self.steps += 1

    @hookimpl
    def after_experience(self, run):
        self.found += [value.detach().double() + 0 for value in run.model.state_dict().values()]


def outcome(name: str, options: dict[str, Any], setting: clframe.Setting) -> list[torch.Tensor]:
    """Learn with the plugin; return the weights after each experience, the scores of test images and the steps."""
    plugin, weights, rows = registry.build_plugin(name, options), Weights(), list[Any]()
    beside = [ER(size=12)] if name == "a-ltm" else []  # whose images are distilled on
    arrays = testing.tiny_arrays(per_class=8, shape=(1, 8, 8))
    scenario = clframe.split_classes("tiny", arrays, experiences=2, setting=setting)
    evaluate = Evaluator.evaluate

    def kept(evaluator: Evaluator, *arguments: Any, **named: Any) -> Any:
        rows.append(evaluate(evaluator, *arguments, **named))
        return rows[-1]

    with mock.patch.object(Evaluator, "evaluate", kept):
        plugins = [plugin, *beside, weights]
        clframe.run(scenario, MODELS.get(name, NET), plugins, train=TRAIN, run={"tensorboard": False, "device": "cpu"})
    scores = [s for row in rows for part in row.scores.values() for s in part if s is not None]
    assert weights.steps >= 3
    assert scores
    return [*weights.found, *scores, torch.tensor(weights.steps)]


@cache
def usual(name: str, beside: str, setting: clframe.Setting) -> list[torch.Tensor]:
    """The outcome that those with another value of an option are compared with."""
    return outcome(name, BASE.get(name, {}) | BESIDE.get(beside, {}), setting)


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


CASES = [(name, option) for name in NAMES for option in options_of(registry.plugin_class(name), ("variant",))]


@pytest.mark.parametrize(("name", "option"), CASES, ids=[f"{name}.{option.name}" for name, option in CASES])
def test_another_value_runs_and_changes_what_is_learnt_or_answered(name: str, option: Any, tmp_path: Path) -> None:
    known = f"{name}.{option.name}"
    options = BASE.get(name, {}) | BESIDE.get(known, {})
    default = options.get(option.name, option.default)
    value = VALUES[known] if known in VALUES else other(option.type, default)
    if known == "mas.images":
        value = tmp_path / "images.npy"
        np.save(value, np.arange(5 * 64, dtype=np.uint8).reshape(5, 1, 8, 8))
    assert value != default
    setting = SETTINGS.get(known) or SETTINGS.get(name) or registry.plugin_class(name).serves[0]
    found = outcome(name, options | {option.name: value}, setting)
    compared = usual(name, known if known in BESIDE else "", setting)
    assert same(found, compared) == (known in WITHOUT_EFFECT)


def test_the_tables_name_options_that_are_there() -> None:
    known = {f"{name}.{option.name}" for name, option in CASES}
    assert {*BESIDE, *VALUES, *WITHOUT_EFFECT} <= known
    assert {*BASE, *MODELS} <= set(NAMES)
    assert set(SETTINGS) <= known | set(NAMES)
