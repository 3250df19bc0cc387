"""Checks of the values of images in memory, which reveal mistakes: one rule for all arrays that users give."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clframe.errors import DataError

DIVIDING = (
    8  # a `Transform.scale` of this or more belongs to raw values, such as those of 8 bits, not to floats up to 1
)
UNIT = 1.05  # maximum of floats from 0 to 1: resizing may overshoot
NORMALIZED = 64.0  # maximum of normalized values: pixels that are nearly constant have small deviations
CHANNELS = (1, 3, 4)
SIDE = 4  # pixels: a larger size is that of a side of an image, not a number of channels


def check_shape(shape: Sequence[int], what: str) -> None:
    """Raise `DataError` if arrays of `shape` [N, ...], called `what` in sentences, have their channels last."""
    if len(shape) != 4 or shape[3] not in CHANNELS or shape[1] in CHANNELS or min(shape[1:3]) <= SIDE:
        return
    raise DataError(
        f"The {what} are {list(shape[1:])}, which is height, width and channels, and channels come first: give "
        "`x.permute(0, 3, 1, 2)` of a tensor, `x.transpose(0, 3, 1, 2)` of a NumPy array."
    )


def check_images(x: Tensor, scale: float, what: str, *, part: bool = False) -> None:
    """Raise `DataError` if images in memory, for training or test, have values that a network cannot use.

    Args:
        x: images [N, ...] of any type.
        scale: `clframe.Transform.scale` of their data set.
        what: name of the images in sentences.
        part: whether `x` is a part of a data set: whole numbers of some of the images may happen to be small.
    """
    check_shape(x.shape, what)
    if part and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        return
    check_values(x, scale, what, f"give `clframe.Transform(scale=1)`, or values from 0 to {scale:g}")


def check_values(x: Tensor, scale: float, what: str, remedy: str) -> None:
    """Raise `DataError` if the values of raw images do not suit `scale`, by which they are divided.

    Values that are not finite are refused, and, if `scale` is at least 8, values that can only be floats from 0 to 1,
    or normalized.

    Args:
        x: images [N, ...] of any type.
        scale: `clframe.Transform.scale`.
        what: name of the images in sentences.
        remedy: advice for images of another scale.
    """
    if not x.numel():
        return
    if x.is_complex():
        raise DataError(f"The {what} are complex numbers ({x.dtype}): give real ones.")
    low, high = (float(value) for value in (x.to(torch.uint8) if x.dtype == torch.bool else x).aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        bad = ~torch.isfinite(x).flatten(1).all(1) if x.dim() > 1 else ~torch.isfinite(x)
        count, first = int(bad.sum()), int(bad.nonzero()[0])
        raise DataError(
            f"The {what} have values that are not finite (NaN or infinity) in {count} of the {len(x)}, the first in "
            f"image {first}, counted from 0: mend these values or leave such images out."
        )
    if scale < DIVIDING:
        return
    divided = f"and are divided by {scale:g} (`Transform.scale`)"
    if low >= 0 and 0 < high <= UNIT:
        raise DataError(f"The {what} have values from {low:.3g} to {high:.3g} only, {divided}: {remedy}.")
    if low < 0 and max(-low, high) <= min(scale / 4, NORMALIZED):
        raise DataError(
            f"The {what} have values from {low:.3g} to {high:.3g}, as normalized images have, {divided}: {remedy}."
        )
