"""Scenarios of MNIST and FashionMNIST."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from clframe.data.build import Arrays, suits
from clframe.data.scenario import Scenario
from clframe.options import flatten_groups
from clframe.scenarios import sources
from clframe.scenarios.streams import Normalization, Permuted, Rotated, permute_pixels, rotate_images, split_of

# van de Ven's network and optimizer; one epoch is enough to learn two digits, and shows all effects soon.
DEFAULTS: dict[str, Any] = {
    "backbone": "mlp",
    "train": {"optimizer": "adam", "lr": 1e-3, "batch_size": 128, "epochs": 1},
}
# mean and standard deviation of all pixels of the training images
NORMS = {"mnist": ((0.1307,), (0.3081,)), "fmnist": ((0.2860,), (0.3530,))}
TEN_PERMUTATIONS = Permuted(experiences=10)

split_mnist = split_of(
    "mnist",
    description="Split the ten digits of MNIST, 28x28, into experiences of a few classes.",
    norms=NORMS["mnist"],
    suited=DEFAULTS,
)
split_fmnist = split_of(
    "fmnist",
    description="Split the ten kinds of clothing of FashionMNIST, 28x28, into experiences of a few classes.",
    norms=NORMS["fmnist"],
    suited=DEFAULTS,
)


def _load(data_root: Path, preprocessing: Normalization) -> Arrays:
    return replace(sources.load("mnist", data_root), transform=preprocessing.transform(NORMS["mnist"]))


@suits(**DEFAULTS)
@flatten_groups
def permuted_mnist(*, data_root: Path, stream: Permuted = TEN_PERMUTATIONS, preprocessing: Normalization) -> Scenario:
    """Show all ten digits of MNIST, in each experience with their pixels in another random order."""
    return permute_pixels("permuted-mnist", _load(data_root, preprocessing), stream)


@suits(**DEFAULTS)
@flatten_groups
def rotated_mnist(*, data_root: Path, stream: Rotated, preprocessing: Normalization) -> Scenario:
    """Show all ten digits of MNIST, in each experience turned further."""
    return rotate_images("rotated-mnist", _load(data_root, preprocessing), stream)
