"""A finished run learns more classes later: as if it had learnt them all in one run, to the bit where that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import clframe
from clframe import ImageData, Scenario, registry

TRAIN = {"epochs": 2, "batch_size": 8, "optimizer": "adam", "lr": 0.01}
METHODS: dict[str, dict[str, Any]] = {
    "a-ltm": {},
    "always-be-dreaming": {"iterations": 10, "batch_size": 8, "noise": 10, "width": 8},
    "channel-gating": {"classifier_iterations": 10, "per_class": 2},
    "deep-inversion": {"per_class": 4, "iterations": 10},
    "der": {"size": 6},
    "duplicate": {},
    "er": {"size": 6},
    "ewc": {},
    "feature-extraction": {},
    "finetune-fc": {},
    "generative-replay": {"hidden": [16], "z": 4},
    "hat": {},
    "icarl": {"size": 24, "outputs": "seen"},
    "lfl": {},
    "lwf": {},
    "lwm": {},
    "mas": {},
    "packnet": {},
    "piggyback": {},
    "si": {},
    "warm-up": {},
}


def part(whole: Scenario, start: int, stop: int) -> Scenario:
    """Experiences `start` to `stop` of a scenario as one of its own, whose labels begin at 0."""
    groups = whole.classes[start:stop]
    shift = 0 if whole.setting == "domain" else groups[0][0]

    def load(i: int, of: Any) -> ImageData:
        data = getattr(whole[start + i], of)
        return ImageData(data.x, data.y - shift, index=data.index, task=i)

    classes = [[c - shift for c in group] for group in groups]
    names = whole.class_names[shift : shift + max(map(max, classes)) + 1]
    return Scenario("part", whole.setting, classes, names, whole.input_shape, load, transform=whole.transform)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    return all(torch.equal(value, right[name]) for name, value in left.items())


def learnt_twice(whole: Scenario, folder: Path, plugins: list[Any], model: str = "cnn-small", **train: Any) -> Any:
    """An uninterrupted run of three experiences, and one of two that is extended by the third: folders and results."""
    settings = {"train": TRAIN | train}
    everything = clframe.run(
        whole, model, plugins, **settings, run={"output": str(folder / "whole"), "tensorboard": False}
    )
    clframe.run(
        part(whole, 0, 2), model, plugins, **settings, run={"output": str(folder / "first"), "tensorboard": False}
    )
    run = {"output": str(folder / "extended"), "tensorboard": False}
    return everything, clframe.extend(folder / "first", part(whole, 2, 3), run=run)


@pytest.mark.parametrize("name", ["", *METHODS])
@pytest.mark.parametrize("keep", [True, False])
def test_a_run_that_is_extended_equals_the_uninterrupted_one_to_the_bit(
    name: str, keep: bool, tiny: Any, tmp_path: Path
):
    setting = registry.plugin_class(name).settings[0] if name else "class"
    model = "mlp-100" if name == "finetune-fc" else "cnn-small"
    plugins = [{name: METHODS[name]}] if name else []
    whole = tiny(shape=(1, 8, 8), setting=setting)
    uninterrupted, extended = learnt_twice(whole, tmp_path, plugins, model, keep_optimizer=keep)
    assert same(tmp_path / "whole", tmp_path / "extended")
    for reading, matrix in extended.accuracy.items():
        assert matrix[0][:2] == uninterrupted.accuracy[reading][0][:2]
        assert matrix[2][:2] == [None, None]
        assert matrix[2][2] == uninterrupted.accuracy[reading][2][2]
