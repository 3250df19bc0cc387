"""From raw images to the input of a model: scaling, augmentation and normalization of whole batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from clframe.data.batch import Batch, ImageData
from clframe.data.decode import ImageFormat
from clframe.errors import UsageError
from clframe.options import CountOrZero, validated
from clframe.system.texts import quote


@dataclass(frozen=True)
class Transform:
    """A mapping from raw images to the model's input, applied to whole batches on their device.

    Attributes:
        scale: raw value that becomes 1 (255 for 8-bit images, 16 for scikit-learn's digits, 1 for floats).
        mean: value per channel, or one for all, that is subtracted after scaling; empty: none.
        std: value per channel, or one for all, by which the difference is divided; empty: none. `mean` and `std` are
            given together.
        pad: augmentation pads the image with this many zeros on each side, and crops it at random to its size.
        flip: augmentation mirrors each image left to right with probability 1/2.
        look: format to which image files were brought; None: the raw images are not from files.

    Raises:
        UsageError: if `mean` and `std` do not belong together, or a value cannot be divided by.
    """

    scale: float = 255.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    pad: CountOrZero = 0
    flip: bool = False
    look: ImageFormat | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("scale", "pad", "flip")}
        for name, value in validated(Transform, given, "Transform", skip=("mean", "std", "look")).items():
            object.__setattr__(self, name, value)
        for name in ("mean", "std"):
            try:  # double precision keeps all digits of Python's numbers
                values = torch.as_tensor(getattr(self, name), dtype=torch.float64).flatten().tolist()
            except (TypeError, ValueError, RuntimeError) as error:
                raise UsageError(
                    f"`Transform.{name}` is {quote(getattr(self, name))}: give a number for each channel, or one."
                ) from error
            object.__setattr__(self, name, tuple(values))
        if len(self.mean) != len(self.std):
            raise UsageError(
                f"`Transform` has {len(self.mean)} values of `mean` and {len(self.std)} of `std`: give one of each for "
                "each channel, or neither."
            )
        if not (math.isfinite(self.scale) and self.scale > 0 and all(map(math.isfinite, self.mean))):
            raise UsageError(f"`Transform` has `scale` {self.scale} and `mean` {self.mean}: `scale` must be above 0.")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise UsageError(f"`Transform` has `std` {self.std}, by which values are divided: each must be above 0.")

    def check(self, name: str, input_shape: Sequence[int]) -> None:
        """Raise `UsageError` if images of `input_shape`, in the scenario `name`, have another number of channels."""
        if len(self.mean) > 1 and len(self.mean) != input_shape[0]:
            raise UsageError(
                f"The `Transform` of `{name}` is for {len(self.mean)} channels, and the images, {list(input_shape)}, "
                f"have {input_shape[0]}: give `mean` and `std` {input_shape[0]} values each, or one."
            )

    @property
    def augments(self) -> bool:
        """Return whether there is any augmentation."""
        return self.pad > 0 or self.flip

    def normalize(self, x: Tensor) -> Tensor:
        """Convert raw images [B, ...] to float32 inputs [B, ...], scaled and normalized."""
        out = x.to(torch.float32)
        if not self.mean and self.scale == 1:
            return out
        out = out.clone() if out is x else out  # never in place on the caller's images
        if not self.mean:
            return out.div_(self.scale)
        factor, shift = affine(self, x.dim() - 2, x.device)
        return out.mul_(factor).add_(shift)

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Crop and flip each raw image [B, C, H, W] at random.

        `generator` is on the CPU, so that all devices augment alike. Images of another shape are returned unchanged.
        """
        if x.dim() != 4 or not self.augments:
            return x
        count, channels, height, width = x.shape
        crop = torch.randint(2 * self.pad + 1, (2, count, 1), generator=generator)
        flip = torch.randint(1 + self.flip, (1, count, 1), generator=generator)
        top, left, mirrored = torch.cat([crop, flip]).to(x.device, non_blocking=True)
        x = functional.pad(x, (self.pad,) * 4)
        rows = top + torch.arange(height, device=x.device)
        columns = torch.arange(width, device=x.device)
        columns = left + torch.where(mirrored == 1, width - 1 - columns, columns)
        # one gather from the flattened image for all channels is faster than windows, slices or two gathers
        where = (rows[:, :, None] * x.shape[3] + columns[:, None, :]).view(count, 1, height * width)
        return x.flatten(2).gather(2, where.expand(-1, channels, -1)).view(count, channels, height, width)

    def batch(self, rows: ImageData, generator: torch.Generator | None = None) -> Batch:
        """Return `rows` as the input of the model, augmented if a `generator` is given."""
        x = rows.x if generator is None else self.augment(rows.x, generator)
        return Batch(
            self.normalize(x),
            rows.y,
            # materialize columns of one number, because hooks may modify a batch in place
            rows.index.contiguous(),
            rows.task.contiguous(),
            rows.weight.contiguous(),
            rows.origin.contiguous(),
            targets=dict(rows.targets),
            raw=rows.x,
        )


def check_transform(transform: object, name: str) -> None:
    """Raise `UsageError` if `transform`, of the scenario `name`, is neither a `Transform` nor None."""
    if not isinstance(transform, Transform | None):
        raise UsageError(
            f"The transform of `{name}` is a `{type(transform).__name__}`, and only a `clframe.Transform` (scale, "
            "mean, std, pad, flip) can be kept with a run: give that, and call other functions on the images before."
        )


@lru_cache(maxsize=64)
def affine(transform: Transform, dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return factor and shift [C, 1, ...], with `dims` ones, that map raw values to ((value / scale) - mean) / std."""
    with torch.inference_mode(False):  # cached for later calls, which may need gradients
        constants = torch.tensor((transform.mean, transform.std), dtype=torch.float64)
        mean, std = constants.view(2, -1, *[1] * dims)
        factor, shift = 1 / (transform.scale * std), -mean / std
        return factor.to(device, torch.float32), shift.to(device, torch.float32)
