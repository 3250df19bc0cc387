"""Experiences of one class, whose loss among their own classes is always 0, and classes without training images."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clframe
from clframe import Outputs, Plugin, Scenario, hookimpl, testing
from clframe.evaluate import NearestMean
from clframe.model import IncrementalNet

learn = partial(testing.learn, model="mlp-100", epochs=1, optimizer="sgd", lr=0.05)


@pytest.mark.parametrize(
    ("setting", "plugin", "train", "advice"),
    [
        ("task", None, {}, "`scenario.experiences`, or choose `train.logits=seen`."),
        ("class", None, {"logits": "current"}, "`scenario.experiences`, or choose `train.logits=seen`."),
        ("class", "lwf", {}, "`scenario.experiences`, or choose `lwf.form=seen`."),
        ("task", "lwf", {}, "`scenario.experiences`, or choose `lwf.form=seen`."),
        ("class", {"lwf": {"balance": True}}, {}, "`scenario.experiences`, or choose `lwf.form=seen`."),
        ("task", "ewc", {}, "`scenario.experiences`, or choose `train.logits=seen`."),
        ("task", "joint", {}, "`scenario.experiences`, or choose `train.logits=seen`."),
        ("class", "lwm", {}, "`scenario.experiences`."),
        ("class", "channel-gating", {}, "`scenario.experiences`."),
        ("task", {"generative-replay": {"labels": "soft"}}, {}, "or choose `train.logits=seen`."),
    ],
)
def test_one_class_among_its_own_is_refused_with_what_serves(
    tiny, setting: str, plugin: Any, train: dict[str, Any], advice: str
) -> None:
    scenario = tiny(experiences=6, setting=setting, shape=(1, 8, 8))
    with testing.refused("Experience 1 of `tiny` (and 5 more)", "one class, `", advice):
        learn(scenario, *([plugin] if plugin else []), model="cnn-small", **train)


def test_always_be_dreaming_needs_two_new_classes_after_the_first_experience(tiny) -> None:
    with testing.refused("experience 2 of `tiny`", "one class"):
        learn(tiny(experiences=2, first=5, shape=(1, 8, 8)), "always-be-dreaming", model="cnn-small")


@pytest.mark.parametrize("plugin", ["icarl", {"lwf": {"form": "seen"}}, {"lwf": {"form": "mc"}}, "er"])
def test_a_loss_among_all_classes_learns_one_at_a_time(tiny, plugin: Any) -> None:
    """The task is known by its one class, so that reading has no figure; nor has the first class alone."""
    results = learn(tiny(experiences=6), plugin)
    assert results.accuracy["task"] == [[None] * 6] * 6
    assert all(value is None for value in results.measures["task"].values())
    rows = results.accuracy["class"]
    assert rows[0][0] is None
    assert all(None not in row[: i + 1] for i, row in enumerate(rows) if i)
    assert results.measures["class"]["average_accuracy"] == pytest.approx(sum(rows[-1]) / 6)
    assert results.data["test_images"] == [results.data["test_images"][0]] * 6
    assert results.data["test_images"][0] > 0
    assert results.data["calibration"].get("task", {}) == {}


class OwnLoss(Plugin):
    """Learns by a loss that is not among classes."""

    name = "own-loss"

    @hookimpl
    def base_loss(self, outputs: Outputs) -> Tensor:
        return outputs.features.square().mean()


def test_a_loss_that_is_not_among_classes_may_learn_one(tiny) -> None:
    assert learn(tiny(experiences=6, setting="task"), OwnLoss()).accuracy["task"] == [[None] * 6] * 6


def test_joint_training_learns_one_class_beside_others(tiny) -> None:
    (last,) = learn(tiny(experiences=2, first=5, setting="task"), "joint").accuracy["task"][1:]
    assert last[0] is not None
    assert last[1] is None


@pytest.mark.parametrize(("first", "rest"), [(5, 1), (4, 2)])
def test_an_extension_has_the_same_rule(tiny, tmp_path, first: int, rest: int) -> None:
    """Of the experiences to come alone."""
    arrays = testing.tiny_arrays()
    learned = clframe.split_classes("old", arrays, experiences=1)
    learn(learned, logits="current", output=str(tmp_path / "run"))
    names = [f"new {k}" for k in range(6)]
    arrays.class_names = tuple(names)
    coming = clframe.split_classes("new", arrays, experiences=2, first=first)
    if rest > 1:
        assert clframe.extend(tmp_path / "run", coming).accuracy["task"][-1][-1] is not None
        return
    with testing.refused("Experience 3 of `old+new`", "`new 5`"):
        clframe.extend(tmp_path / "run", coming)


def test_a_class_without_a_mean_is_no_answer() -> None:
    """NaN would be the largest score of all."""

    class Same(nn.Module):
        width = 2

        def features(self, x: Tensor) -> Tensor:
            return x

    model = IncrementalNet(Same())
    model.grow(3)
    means = torch.tensor([[1.0, 0.0], [torch.nan, torch.nan], [0.0, 1.0]])
    scores = NearestMean(model, means)(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    assert scores[:, 1].tolist() == [-torch.inf] * 2
    assert scores.argmax(1).tolist() == [0, 2]


def without_images_of(scenario: Scenario, label: int) -> Scenario:
    """`scenario`, whose class `label` is declared and tested, and has no training image."""
    load = scenario._load

    def kept(index: int, part: Any) -> Any:
        data = load(index, part)
        return data if part == "test" else data.rows((data.y != label).nonzero().flatten())

    scenario._load = kept
    return scenario


@pytest.mark.parametrize("plugin", [None, "er", "der", "lwf", "icarl", {"icarl": {"read_out": "ncm"}}, "joint"])
@pytest.mark.parametrize("label", [1, 4])
def test_a_class_without_training_images_leaves_the_others_right(tiny, plugin: Any, label: int) -> None:
    scenario = without_images_of(tiny(), label)
    results = learn(scenario, *([plugin] if plugin else []), epochs=10)
    assert None not in results.accuracy["class"][-1]
    assert results.accuracy["task"][-1][2] > 0  # classes 4 and 5, of which one has images at least
    if plugin == "icarl":
        assert results.accuracy["class"][-1][0] > 0
        assert results.accuracy["class"][-1][2] > 0
