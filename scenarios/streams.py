"""What the built-in scenarios share: options and their documentation, orders, permutations, rotations."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clframe.data.build import Arrays, change_domains, split_classes
from clframe.data.scenario import Scenario, Setting

Order = Literal["natural", "random"] | list[int]
Builder = TypeVar("Builder", bound=Callable[..., Scenario])

OPTIONS = {
    "setting": "`class` (which class of all seen), `task` (the task is told) or `domain` (shared labels).",
    "experiences": "number of experiences.",
    "first": "classes in the first experience; null: as many as in each other one.",
    "order": "of the classes: `natural` (as the data set numbers them), `random` (drawn from the seed) or a "
    "list of all class numbers.",
    "seed": "of everything random in the scenario; null: the run's seed.",
    "limit": "images per class, of training and of test data; null: all.",
    "normalize": "subtract the data set's mean and divide by its standard deviation, per channel (of one's own images: "
    "ImageNet's).",
    "augment": "crop training images at random after padding by an eighth of their size (4 zeros of 32), and mirror "
    "every other one.",
    "path": "of the folder, or of the table.",
    "path_column": "the column with the paths of the images.",
    "label_column": "the column with the names of their classes.",
    "task_column": "the column with the tasks; null: `task`, if there is one.",
    "domain_column": "the column with the domains; null: `domain`, if there is one.",
    "split_column": "the column that says `train` or `test`; null: `split`, if there is one.",
    "image_column": "the column with the images; null: the only one that holds images.",
    "config": "which of the data set's configurations (also called subsets); null: the only one, or its default.",
    "revision": "branch, tag or commit of the data set's repository on the Hub; null: the newest.",
    "train_split": "the split to learn from.",
    "test_split": "the split to test with; null: `test`, else `validation`. If it is the one to learn from, or that is "
    "the only one, test images are drawn from it (`test`).",
    "test": "share of each class that is drawn, from the seed, as test images where the data does not say which are.",
    "size": "height and width of the images in pixels; images of any size are brought to it.",
    "crop": "`center` cuts off what is left of the longer side, `stretch` resizes both sides apart, `pad` keeps the "
    "whole image on black.",
    "resize": "the shorter side in pixels before `center` cuts; null: `size`.",
    "mode": "`color` (3 channels) or `gray` (1); images of other modes are converted.",
    "skip_broken": "leave out images that cannot be read, instead of listing them and stopping.",
    "duplicates": "files that are training and test images: `refuse`, `drop` them from training, or `keep` them.",
    "skip_empty": "leave out classes without images, instead of naming them and stopping.",
    "memory": "most bytes of images to keep in memory; of more images, each is read from its file when it is needed.",
    "workers": "processes that read images when they are needed, or threads that read all at first; null: as cores.",
    "max_angle": "in degrees; experience i of n, counted from 0, is turned by i/n of it.",
}


OF_NONE = {  # of options that may be left to the data
    "experiences": "number of experiences; null: the most, up to 5, that leave two classes for each, the first "
    "larger where they do not divide evenly.",
    "label_column": "the column with the names of their classes; null: the only one of type ClassLabel, else the only "
    "one of texts or whole numbers.",
}


def documented(builder: Builder) -> Builder:
    """Add to the docstring of `builder` what each of its options means, in the same words for all."""
    parameters = inspect.signature(builder).parameters
    texts = OPTIONS | {n: text for n, text in OF_NONE.items() if n in parameters and parameters[n].default is None}
    lines = "".join(f"    {name}: {texts[name]}\n" for name in parameters if name in texts)
    builder.__doc__ = f"{inspect.getdoc(builder)}\n\nOptions:\n{lines}"
    return builder


def split(
    name: str,
    arrays: Arrays,
    setting: Setting,
    experiences: int,
    first: int | None,
    order: str | list[int],
    seed: int | None,
    limit: int | None,
) -> Scenario:
    """`clframe.data.build.split_classes` of at most `limit` images of each class, in an order that may be named."""
    if isinstance(order, str):
        count = len(arrays.class_names)
        order = random_of(seed).permutation(count).tolist() if order == "random" else list(range(count))
    arrays = arrays.limited(limit)
    return split_classes(
        name, arrays, experiences=experiences, setting=setting, first=first, order=order, duplicates=None
    )


def permuted(
    name: str, arrays: Arrays, setting: Setting, experiences: int, seed: int | None, limit: int | None
) -> Scenario:
    """Experience i shows all classes with their pixels in an order that only the seed and i determine.

    All experiences are permuted, the first one too, and the channels of a pixel move together.
    """

    def permute(i: int, x: Tensor) -> Tensor:
        pixels = x.flatten(2)
        order = torch.from_numpy(random_of(seed, i).permutation(pixels.shape[2])).to(x.device)
        return pixels.gather(2, order.expand_as(pixels)).view_as(x)  # ten times as fast as index_select

    return change_domains(
        name, arrays.limited(limit), permute, experiences=experiences, setting=setting, duplicates=None
    )


def rotated(
    name: str, arrays: Arrays, setting: Setting, experiences: int, max_angle: float, limit: int | None
) -> Scenario:
    """Experience i of n shows all classes turned by ``max_angle * i / n`` degrees; the first is upright."""

    def turn(i: int, x: Tensor) -> Tensor:
        return rotate(x, max_angle * i / experiences)

    arrays = arrays.limited(limit)
    return change_domains(name, arrays, turn, experiences=experiences, setting=setting, duplicates=None)


def rotate(x: Tensor, degrees: float, *, chunk: int = 1024) -> Tensor:
    """Square 8-bit images [N, C, H, H], turned counter-clockwise about their centre.

    Pixels are interpolated bilinearly and rounded; what comes from outside is 0. `chunk` images are turned
    at a time, so that the float copies stay small.
    """
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]], device=x.device)
    grid = functional.affine_grid(matrix, [1, 1, *x.shape[2:]], align_corners=False)
    out = torch.empty_like(x)
    for source, target in zip(torch.split(x, chunk), torch.split(out, chunk), strict=True):
        # all images as the channels of one, for they share the grid
        channels = source.flatten(0, 1)[None].to(torch.float32)
        turned = functional.grid_sample(channels, grid, mode="bilinear", align_corners=False)
        target.copy_(turned.round_().view_as(source))
    return out


def random_of(seed: int | None, *key: int) -> np.random.RandomState:
    """A generator for `seed` and `key`, whose numbers numpy promises never to change (NEP 19)."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed or 0, *key])))
