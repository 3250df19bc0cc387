"""Scenarios of CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clframe.data.build import Arrays, suits
from clframe.data.scenario import Scenario, Setting
from clframe.data.transform import Transform
from clframe.options import Count, CountOrZero
from clframe.scenarios import sources
from clframe.scenarios.streams import Order, documented, split

# FACIL's settings for ResNet-32, except that the learning rate is annealed over 30 epochs, where FACIL lowers
# it on plateaus within 200: enough for the few classes of one experience to be learnt well.
DEFAULTS: dict[str, Any] = {
    "backbone": "resnet32",
    "train": {
        "optimizer": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 2e-4,
        "schedule": "cosine",
        "batch_size": 128,
        "epochs": 30,
    },
}
# mean and standard deviation of each channel of the training images
NORMS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
ICARL_SEED = 1993


def _load(name: str, data_root: Path, normalize: bool, augment: bool) -> Arrays:
    mean, std = NORMS[name] if normalize else ((), ())
    transform = Transform(mean=mean, std=std, pad=4 if augment else 0, flip=augment)
    return replace(sources.load(name, data_root), transform=transform)


@suits(**DEFAULTS)
@documented
def split_cifar10(
    *,
    data_root: Path,
    setting: Setting = "class",
    experiences: Count = 5,
    first: Count | None = None,
    order: Order = "natural",
    seed: CountOrZero | None = None,
    limit: Count | None = None,
    normalize: bool = True,
    augment: bool = True,
) -> Scenario:
    """The ten classes of CIFAR-10, 32x32 in colour, a few at a time."""
    arrays = _load("cifar10", data_root, normalize, augment)
    return split("split-cifar10", arrays, setting, experiences, first, order, seed, limit)


@suits(**DEFAULTS)
@documented
def split_cifar100(
    *,
    data_root: Path,
    setting: Setting = "class",
    experiences: Count = 10,
    first: Count | None = None,
    order: Order | Literal["icarl"] = "natural",
    seed: CountOrZero | None = None,
    limit: Count | None = None,
    normalize: bool = True,
    augment: bool = True,
) -> Scenario:
    """The hundred classes of CIFAR-100, 32x32 in colour, a few at a time.

    Order `icarl` is what the field calls iCaRL's: ``numpy.random.RandomState(1993).permutation(100)``.
    """
    if order == "icarl":
        order = np.random.RandomState(ICARL_SEED).permutation(100).tolist()
    arrays = _load("cifar100", data_root, normalize, augment)
    return split("split-cifar100", arrays, setting, experiences, first, order, seed, limit)
