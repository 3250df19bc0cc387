"""Avalanche's classic benchmarks of MNIST, FashionMNIST and CIFAR, cut as it cuts them, without importing it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clframe.data.build import Arrays, change_domains, suits
from clframe.data.files import concat_images
from clframe.data.scenario import Scenario, Setting
from clframe.data.transform import Transform
from clframe.errors import UsageError, did_you_mean
from clframe.options import Count, CountOrZero
from clframe.scenarios import cifar, mnist, sources, streams

# The data sets of each benchmark, in the order in which their classes are numbered.
SPLIT = {
    "SplitMNIST": ("mnist",),
    "SplitFMNIST": ("fmnist",),
    "SplitCIFAR10": ("cifar10",),
    "SplitCIFAR100": ("cifar100",),
    "SplitCIFAR110": ("cifar10", "cifar100"),
}
DOMAINS = {"PermutedMNIST": ("mnist",), "RotatedMNIST": ("mnist",)}
BENCHMARKS = SPLIT | DOMAINS
ELSEWHERE = (  # classic benchmarks of other data sets, which Avalanche itself must fetch
    *("CLEAR", "CLStream51", "CORe50", "EndlessCLSim", "ExMLCIFAR10", "ExMLCoRE50", "ExMLMNIST", "OpenLORIS"),
    *("SplitCUB200", "SplitImageNet", "SplitInaturalist", "SplitOmniglot", "SplitTinyImageNet"),
)
SEEDS = 2**32  # NumPy takes smaller seeds only


@suits(
    **mnist.DEFAULTS,
    variants={name: cifar.DEFAULTS for name in SPLIT if "CIFAR" in name},
)
def benchmark(
    variant: str,
    *,
    data_root: Path,
    setting: Setting | None = None,
    experiences: Count = 5,
    first: Count | None = None,
    order: Literal["natural", "random"] | list[int] = "random",
    seed: CountOrZero | None = None,
    rotations: list[int] | None = None,
    limit: Count | None = None,
    normalize: bool | None = None,
    augment: bool | None = None,
) -> Scenario:
    """Build a classic benchmark of Avalanche, with the orders or angles that Avalanche draws from the same seed.

    The variants are SplitMNIST, SplitFMNIST, SplitCIFAR10, SplitCIFAR100, SplitCIFAR110, PermutedMNIST and
    RotatedMNIST of Avalanche 0.6.0. Orders of classes and of pixels, and angles, depend on the seed alone, not on the
    version of Avalanche that is installed; none need be. Images are read as in clframe's own scenario of the same data
    set, and the same networks suit them. Any other benchmark of Avalanche comes from Python: `clframe.from_avalanche`.

    Options:
        setting: `class`, `task` (Avalanche's return_task_id) or `domain` (its class_ids_from_zero_in_each_exp); null:
            `class`, and `domain` for PermutedMNIST and RotatedMNIST.
        experiences: number of experiences (n_experiences).
        first: number of classes in the first experience; null: as many as in each other one. For SplitCIFAR100, 50 is
            first_exp_with_half_classes. In SplitCIFAR110 the first has the ten classes of CIFAR-10.
        order: order of the classes: `random` (as Avalanche draws it from the seed), `natural` (its shuffle=False) or a
            list of all class numbers (its fixed_class_order). In SplitCIFAR110 it orders the classes of CIFAR-100,
            numbered from 10.
        seed: seed of everything random in the benchmark; null: the run's seed.
        rotations: angles in degrees, one for each experience of RotatedMNIST (rotations_list); null: from the seed.
        limit: number of images per class, of training and of test data; null: all.
        normalize: subtract the data set's mean and divide by its standard deviation, per channel, as Avalanche does;
            null: as clframe's own scenario, which does so for CIFAR only.
        augment: crop training images at random after padding by 4 zeros, and mirror every other one; null: for CIFAR.
    """
    _check(variant, first, order, rotations, experiences, seed)
    arrays = _load(variant, data_root, normalize, augment)
    name = f"avalanche:{variant}"
    if variant in DOMAINS:
        change = (
            draw_permutations(seed, experiences)
            if variant == "PermutedMNIST"
            else draw_rotations(seed, experiences, rotations)
        )
        return change_domains(
            name,
            arrays.limited(limit),
            change,
            experiences=experiences,
            setting=setting or "domain",
            duplicates=None,
        )
    if variant == "SplitCIFAR110":
        first = 10
        order = [*range(10), *_order_cifar100(order, seed)]
    elif order == "random":
        order = draw_class_order(len(arrays.class_names), seed)
    stream = streams.Split(setting or "class", experiences, first, order, seed)
    return streams.split(name, arrays.limited(limit), stream)


def draw_class_order(classes: int, seed: int | None) -> list[int]:
    """Return the order of `classes` classes that Avalanche's class-incremental benchmarks draw from `seed`."""
    return torch.randperm(classes, generator=torch.Generator().manual_seed(seed or 0)).tolist()


def draw_permutations(seed: int | None, experiences: int) -> Callable[[int, Tensor], Tensor]:
    """Return a function ``change(i, x)``: the images `x` [N, 1, 28, 28] as experience i of PermutedMNIST shows them."""
    drawn = np.random.RandomState(seed or 0)
    orders = [torch.from_numpy(drawn.permutation(784)) for _ in range(experiences)]

    def permute(i: int, x: Tensor) -> Tensor:
        return x.flatten(1).index_select(1, orders[i].to(x.device)).view_as(x)

    return permute


def draw_rotations(seed: int | None, experiences: int, angles: list[int] | None) -> Callable[[int, Tensor], Tensor]:
    """Return a function ``change(i, x)``: the images `x` [N, 1, 28, 28] as experience i of RotatedMNIST shows them."""
    drawn = np.random.RandomState(seed or 0)
    angles = angles or [int(drawn.randint(-180, 181)) for _ in range(experiences)]

    def turn(i: int, x: Tensor) -> Tensor:
        from torchvision.transforms.functional import rotate  # takes the nearest pixel's value, as Avalanche does

        turned: Tensor = rotate(x, angles[i])
        return turned

    return turn


def _order_cifar100(order: str | list[int], seed: int | None) -> list[int]:
    """Return the classes 10 to 109 of SplitCIFAR110 in the order of learning."""
    if isinstance(order, list):
        return order
    return random.Random(seed or 0).sample(range(10, 110), 100) if order == "random" else list(range(10, 110))


def _load(variant: str, data_root: Path, normalize: bool | None, augment: bool | None) -> Arrays:
    """Return the images of the benchmark; those of several data sets follow each other."""
    parts = [sources.load(name, data_root) for name in BENCHMARKS[variant]]
    norms = mnist.NORMS | cifar.NORMS
    in_color = "CIFAR" in variant
    mean, std = norms[BENCHMARKS[variant][-1]] if (in_color if normalize is None else normalize) else ((), ())
    augments = in_color if augment is None else augment
    transform = Transform(mean=mean, std=std, pad=4 if augments else 0, flip=augments)
    if len(parts) == 1:
        return replace(parts[0], transform=transform)
    shift = len(parts[0].class_names)
    return Arrays(
        "cifar110",
        concat_images([part.x_train for part in parts]),
        torch.cat([parts[0].y_train, parts[1].y_train + shift]),
        concat_images([part.x_test for part in parts]),
        torch.cat([parts[0].y_test, parts[1].y_test + shift]),
        tuple(name for part in parts for name in part.class_names),
        transform,
    )


def _check(
    variant: str,
    first: int | None,
    order: str | list[int],
    rotations: list[int] | None,
    experiences: int,
    seed: int | None,
) -> None:
    """Raise `UsageError` for an unknown benchmark, and for options that this one does not have."""
    name = f"avalanche:{variant}"
    if variant in ELSEWHERE:
        raise UsageError(
            f"The data of `{name}` is not among those that clframe reads; build the benchmark with Avalanche in "
            "Python, and give it to `clframe.from_avalanche`."
        )
    if variant not in BENCHMARKS:
        raise UsageError(f"Avalanche has no classic benchmark `{variant}`.{did_you_mean(variant, BENCHMARKS)}")
    problems = []
    if first is not None and (variant in DOMAINS or variant == "SplitCIFAR110"):
        problems.append(f"`scenario.first` has no meaning in `{name}`: leave it out.")
    if order != "random" and variant in DOMAINS:
        problems.append(
            f"`scenario.order` has no meaning in `{name}`, whose experiences show all classes: leave it out."
        )
    if rotations is not None and variant != "RotatedMNIST":
        problems.append(f"`scenario.rotations` has no meaning in `{name}`: leave it out.")
    elif rotations is not None and len(rotations) != experiences:
        problems.append(
            f"`scenario.rotations` has {len(rotations)} angles for {experiences} experiences: give one each."
        )
    if variant == "SplitCIFAR110" and isinstance(order, list) and sorted(order) != list(range(10, 110)):
        problems.append(f"`scenario.order` of `{name}` must hold each of the class numbers 10 to 109 once.")
    if (seed or 0) >= SEEDS and variant in DOMAINS:
        problems.append(f"`scenario.seed` is {seed}; `{name}` takes seeds below {SEEDS}.")
    if problems:
        raise UsageError(*problems)
