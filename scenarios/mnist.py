"""Scenarios of MNIST and FashionMNIST."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from clframe.data.build import Arrays, suits
from clframe.data.scenario import Scenario, Setting
from clframe.data.transform import Transform
from clframe.options import Count, CountOrZero, Positive
from clframe.scenarios import sources
from clframe.scenarios.streams import Order, documented, permuted, rotated, split

# van de Ven's network and optimizer; one epoch is enough to learn two digits, and shows all effects soon.
DEFAULTS: dict[str, Any] = {
    "backbone": "mlp",
    "train": {"optimizer": "adam", "lr": 1e-3, "batch_size": 128, "epochs": 1},
}
# mean and standard deviation of all pixels of the training images
NORMS = {"mnist": ((0.1307,), (0.3081,)), "fmnist": ((0.2860,), (0.3530,))}


def _load(name: str, data_root: Path, normalize: bool) -> Arrays:
    mean, std = NORMS[name] if normalize else ((), ())
    return replace(sources.load(name, data_root), transform=Transform(mean=mean, std=std))


@suits(**DEFAULTS)
@documented
def split_mnist(
    *,
    data_root: Path,
    setting: Setting = "class",
    experiences: Count = 5,
    first: Count | None = None,
    order: Order = "natural",
    seed: CountOrZero | None = None,
    limit: Count | None = None,
    normalize: bool = False,
) -> Scenario:
    """The ten digits of MNIST, 28x28, a few at a time."""
    arrays = _load("mnist", data_root, normalize)
    return split("split-mnist", arrays, setting, experiences, first, order, seed, limit)


@suits(**DEFAULTS)
@documented
def split_fmnist(
    *,
    data_root: Path,
    setting: Setting = "class",
    experiences: Count = 5,
    first: Count | None = None,
    order: Order = "natural",
    seed: CountOrZero | None = None,
    limit: Count | None = None,
    normalize: bool = False,
) -> Scenario:
    """The ten kinds of clothing of FashionMNIST, 28x28, a few at a time."""
    arrays = _load("fmnist", data_root, normalize)
    return split("split-fmnist", arrays, setting, experiences, first, order, seed, limit)


@suits(**DEFAULTS)
@documented
def permuted_mnist(
    *,
    data_root: Path,
    setting: Setting = "domain",
    experiences: Count = 10,
    seed: CountOrZero | None = None,
    limit: Count | None = None,
    normalize: bool = False,
) -> Scenario:
    """All ten digits of MNIST, in each experience with their pixels in another random order."""
    arrays = _load("mnist", data_root, normalize)
    return permuted("permuted-mnist", arrays, setting, experiences, seed, limit)


@suits(**DEFAULTS)
@documented
def rotated_mnist(
    *,
    data_root: Path,
    setting: Setting = "domain",
    experiences: Count = 5,
    max_angle: Positive = 180.0,
    limit: Count | None = None,
    normalize: bool = False,
) -> Scenario:
    """All ten digits of MNIST, in each experience turned further."""
    arrays = _load("mnist", data_root, normalize)
    return rotated("rotated-mnist", arrays, setting, experiences, max_angle, limit)
