"""What the built-in scenarios share: groups of options, orders of classes, permutations and rotations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clframe.data.build import Arrays, change_domains, split_classes, suits
from clframe.data.scenario import Scenario, Setting
from clframe.data.transform import Transform
from clframe.options import Count, CountOrZero, OptionGroup, Positive, flatten_groups
from clframe.scenarios import sources

Order = Literal["natural", "random"] | list[int]
Norms = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, or of all


@dataclass(frozen=True)
class Stream(OptionGroup):
    """A stream of experiences that bring classes: how many, which, and in which order.

    Options:
        setting: `class` (which class of all seen), `task` (the task is given) or `domain` (shared labels).
        experiences: number of experiences; null: the most, up to 5, that leave two classes for each, the first larger
            where they do not divide evenly.
        first: number of classes in the first experience; null: as many as in each other one.
        order: order of the classes: `natural` (as the data set numbers them), `random` (drawn from the seed) or a
            list of all class numbers.
        seed: seed of everything random in the scenario; null: the run's seed.
        limit: number of images per class, of training and of test data; null: all.
    """

    setting: Setting = "class"
    experiences: Count | None = None
    first: Count | None = None
    order: Order = "natural"
    seed: CountOrZero | None = None
    limit: Count | None = None

    def class_order(self, n_classes: int) -> list[int]:
        """Return the class numbers in the order of learning; a list given as `order` is returned unchecked."""
        if not isinstance(self.order, str):
            return self.order
        natural = list(range(n_classes))
        return list(random_state(self.seed).permutation(n_classes).tolist()) if self.order == "random" else natural


@dataclass(frozen=True)
class Split(Stream):
    """A stream of five experiences, for data sets of which the number of classes is known.

    Options:
        experiences: number of experiences.
    """

    experiences: Count = 5


@dataclass(frozen=True)
class Permuted(OptionGroup):
    """A stream of experiences that show all classes, each with its pixels in another order.

    Options:
        setting: `class` (which class of all seen), `task` (the task is given) or `domain` (shared labels).
        experiences: number of experiences.
        seed: seed of everything random in the scenario; null: the run's seed.
        limit: number of images per class, of training and of test data; null: all.
    """

    setting: Setting = "domain"
    experiences: Count = 5
    seed: CountOrZero | None = None
    limit: Count | None = None


@dataclass(frozen=True)
class Rotated(OptionGroup):
    """A stream of experiences that show all classes, each turned further.

    Options:
        setting: `class` (which class of all seen), `task` (the task is given) or `domain` (shared labels).
        experiences: number of experiences.
        max_angle: angle in degrees, of which experience i of n, counted from 0, is turned by i/n.
        limit: number of images per class, of training and of test data; null: all.
    """

    setting: Setting = "domain"
    experiences: Count = 5
    max_angle: Positive = 180.0
    limit: Count | None = None


@dataclass(frozen=True)
class Normalization(OptionGroup):
    """Whether the images of a data set are normalized.

    Options:
        normalize: subtract the data set's mean and divide by its standard deviation, per channel.
    """

    normalize: bool = False

    def transform(self, norms: Norms) -> Transform:
        """Return the transform of images of 8 bits whose mean and standard deviation are `norms`."""
        mean, std = norms if self.normalize else ((), ())
        return Transform(mean=mean, std=std)


@dataclass(frozen=True)
class Augmentation(Normalization):
    """Whether the images of a data set of photographs are normalized, and those to learn from augmented.

    Options:
        augment: crop training images at random after padding by an eighth of their size (4 zeros of 32), and mirror
            every other one.
    """

    normalize: bool = True
    augment: bool = True

    def transform(self, norms: Norms) -> Transform:
        """Return the transform of images of 8 bits, 32x32, whose mean and standard deviation are `norms`."""
        return replace(super().transform(norms), pad=4 if self.augment else 0, flip=self.augment)


SPLIT = Split()
PLAIN = Normalization()


def split_of(
    data: str,
    *,
    description: str,
    norms: Norms,
    suited: Mapping[str, Any],
    stream: Split = SPLIT,
    preprocessing: Normalization = PLAIN,
) -> Callable[..., Scenario]:
    """Return the function that builds the scenario ``split-DATA``: the classes of a named data set, a few at a time.

    Args:
        data: the name of the data set (`clframe.scenarios.sources`).
        description: of the scenario, as the docstring of the function; `clframe scenarios list` shows its beginning.
        norms: of the training images.
        suited: the backbone and the training settings that suit the scenario (`clframe.data.build.suits`).
        stream: the options of the stream, with their defaults.
        preprocessing: the options of the images, with their defaults.
    """

    def build(*, data_root: Path, stream: Split = stream, preprocessing: Normalization = preprocessing) -> Scenario:
        arrays = replace(sources.load(data, data_root), transform=preprocessing.transform(norms))
        return split(f"split-{data}", arrays.limited(stream.limit), stream)

    build.__name__ = build.__qualname__ = f"split_{data}"
    build.__doc__ = description
    return suits(**suited)(flatten_groups(build))


def split(name: str, arrays: Arrays, stream: Stream) -> Scenario:
    """Return a scenario whose experiences bring disjoint groups of classes (`clframe.data.build.split_classes`).

    `arrays` hold the images that are to be used: `Stream.limit` is not applied.
    """
    n_classes = len(arrays.class_names)
    experiences, first = choose_groups(n_classes, stream.experiences, stream.first)
    return split_classes(
        name,
        arrays,
        experiences=experiences,
        setting=stream.setting,
        first=first,
        order=stream.class_order(n_classes),
        duplicates=None,
    )


def choose_groups(count: int, experiences: int | None, first: int | None) -> tuple[int, int | None]:
    """Return into how many experiences `count` classes are divided, and the number of classes of the first.

    Given numbers are returned as they are. Without `experiences`, there are as many as leave two classes for each, up
    to five; the first has what is left over. 2 or 3 classes are one experience: a class alone has nothing that it must
    be told apart from. With `first`, the others divide the rest evenly.
    """
    if experiences is not None:
        return experiences, first
    if first is not None:
        rest = max(0, count - first)
        return 1 + max((n for n in range(1, 5) if rest % n == 0 and rest // n >= 2), default=int(rest > 0)), first
    n = max(1, min(5, count // 2))
    return (n, None) if count % n == 0 else (n, count - (n - 1) * (count // n))


def permute_pixels(name: str, arrays: Arrays, stream: Permuted) -> Scenario:
    """Return a scenario whose experience i shows all classes, their pixels in an order drawn from the seed and i.

    The first experience is permuted, too; the channels of a pixel move together.
    """

    def permute(i: int, x: Tensor) -> Tensor:
        pixels = x.flatten(2)
        order = torch.from_numpy(random_state(stream.seed, i).permutation(pixels.shape[2])).to(x.device)
        return pixels.gather(2, order.expand_as(pixels)).view_as(x)  # ten times as fast as index_select

    return change_domains(
        name,
        arrays.limited(stream.limit),
        permute,
        experiences=stream.experiences,
        setting=stream.setting,
        duplicates=None,
    )


def rotate_images(name: str, arrays: Arrays, stream: Rotated) -> Scenario:
    """Return a scenario whose experience i of n shows all classes turned by ``max_angle * i / n`` degrees.

    The first experience, i = 0, is upright.
    """

    def turn(i: int, x: Tensor) -> Tensor:
        return rotate(x, stream.max_angle * i / stream.experiences)

    return change_domains(
        name,
        arrays.limited(stream.limit),
        turn,
        experiences=stream.experiences,
        setting=stream.setting,
        duplicates=None,
    )


def rotate(x: Tensor, degrees: float, *, chunk: int = 1024) -> Tensor:
    """Return square 8-bit images [N, C, H, H], turned counterclockwise about their center by `degrees`.

    Pixels are interpolated bilinearly and rounded; those from outside of an image are 0. `chunk` images are turned at
    a time, so that the float copies stay small.
    """
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]], device=x.device)
    grid = functional.affine_grid(matrix, [1, 1, *x.shape[2:]], align_corners=False)
    out = torch.empty_like(x)
    for source, target in zip(torch.split(x, chunk), torch.split(out, chunk), strict=True):
        # all images as the channels of one, because they share the grid
        channels = source.flatten(0, 1)[None].to(torch.float32)
        turned = functional.grid_sample(channels, grid, mode="bilinear", align_corners=False)
        target.copy_(turned.round_().view_as(source))
    return out


def random_state(seed: int | None, *key: int) -> np.random.RandomState:
    """Return a generator for `seed` (None: 0) and `key`, whose numbers NumPy promises never to change (NEP 19)."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed or 0, *key])))
