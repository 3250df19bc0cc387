"""Image files as a trained model takes them: found, read, and brought to its shape and its scale of values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from clframe.errors import DataError, WrongUse

MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
BITS_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow reads grey images of 16 bits as one of these


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files named, and those in the folders named and below that are called as images are, in order of name.

    Raises:
        DataError: if a file or folder is missing, or a folder holds no image.
    """
    Image.init()
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in Image.EXTENSION and p.is_file())
            if not inside:
                raise DataError(f"There is no image in the folder {path}, nor below it.")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"There is no file or folder {path}.")
    return found


def check_shape(shape: Sequence[int]) -> None:
    """Raise `WrongUse` if arrays of this shape are not images of one or three channels."""
    if len(shape) != 3 or shape[0] not in MODES:
        raise WrongUse(
            f"This model takes arrays of shape {list(shape)}, which no image file has: give it arrays from Python."
        )


def read_image(path: str | Path, shape: Sequence[int], scale: float) -> Tensor:
    """The image in a file, as raw values of `shape` [C, H, W]: uint8, or float32 where `scale` is not 255.

    It is turned as its camera says, made grey or coloured as C is 1 or 3, resized (bilinear, with antialiasing) so
    that it just covers H x W, and cut to that around its centre. Values of 0 to 255 become 0 to `scale`.

    Raises:
        DataError: if it cannot be read as an image.
    """
    try:
        with Image.open(path) as opened:
            image = fitted(opened, shape)
    # Pillow raises these, and its own kinds of them, for files that are damaged, of another kind, or too large
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"The image {path} cannot be read: {reason}.") from error
    values = torch.from_numpy(np.array(image)).view(*shape[1:], shape[0]).permute(2, 0, 1).contiguous()
    return values if scale == 255 else values.to(torch.float32) * (scale / 255)


def fitted(image: Image.Image, shape: Sequence[int]) -> Image.Image:
    """`image` turned, converted, resized and cut to `shape` [C, H, W]; see `read_image`."""
    channels, height, width = shape
    image = ImageOps.exif_transpose(image)
    if image.mode in BITS_16:
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(
            (values / (257 if values.max(initial=0) > 255 else 1)).round().clip(0, 255).astype("u1")
        )
    image = image.convert(MODES[channels])
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
