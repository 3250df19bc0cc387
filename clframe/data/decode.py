"""How image files become arrays of one shape; without torch, so that processes that only read start at once."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from clframe.errors import DataError, UsageError
from clframe.renamed import OF_VALUES
from clframe.system.reading import Unreadable, open_regular

if TYPE_CHECKING:
    from PIL import Image

# formats that Pillow may open: it goes by content, and reads 30 more formats, one of which starts Ghostscript
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # PPM: all of PNM
LARGEST = 50_000_000  # pixels of a decoded image, each of which takes up to 16 bytes while it is decoded
LARGEST_FILE = 2**28  # bytes of an image file
Crop = Literal["center", "stretch", "pad"]
Mode = Literal["color", "gray"]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageFormat:
    """A fixed shape of images, and how an image file of any size and kind is brought to it.

    An image is turned as its EXIF data says; transparent parts become white; of an animation the first frame is used.
    Gray values of 16 bits are divided by 257, 32-bit whole numbers above 255 by 2^23; floating-point numbers go from 0
    to 1.

    Attributes:
        size: height in pixels, and width unless `width` is given.
        crop: ``center``: the rest of the longer side is cut off; ``stretch``: both sides are resized independently;
            ``pad``: the whole image is kept, on black.
        resize: the shorter side in pixels before ``center`` cuts; None: `size`.
        mode: ``color`` (3 channels) or ``gray`` (1).
        width: width in pixels; None: as the height.

    Raises:
        UsageError: if `resize` is less than `size`, or has no meaning; if `mode` is another word.
    """

    size: int = 64
    crop: Crop = "center"
    resize: int | None = None
    mode: Mode = "color"
    width: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            new = OF_VALUES.get(str(self.mode))
            must = f"which is now called `{new}`" if new else "and must be `color` or `gray`"
            raise UsageError(f"`scenario.mode` is {self.mode!r}, {must}.")
        if self.resize is not None and self.crop != "center":
            raise UsageError(f"`scenario.resize` needs `scenario.crop=center`: with `{self.crop}` nothing is cut off.")
        if self.resize is not None and self.resize < self.size:
            raise UsageError(
                f"`scenario.resize` is {self.resize}, and {self.size} pixels (`scenario.size`) cannot be cut out of "
                f"it: give {self.size} at least."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return channels, height and width."""
        return (1 if self.mode == "gray" else 3, self.size, self.width or self.size)

    def read(self, file: Path | str | IO[bytes]) -> Pixels:
        """Return the image in a file as an array [C, H, W].

        Raises:
            DataError: with the reason if the image cannot be read to its last pixel.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with _open(file) as stream, Image.open(stream, formats=FORMATS) as image:
                # a JPEG that is far too large is decoded at a smaller size, in a fraction of the time
                image.draft(None, (2 * max(self.resize or 0, *self.shape[1:]),) * 2)
                if math.prod(image.size) > LARGEST:
                    raise DataError(f"it has {math.prod(image.size):,} pixels, and {LARGEST:,} can be read")
                ImageOps.exif_transpose(image, in_place=True)
                plain = self._resize(_convert_mode(image, "L" if self.mode == "gray" else "RGB"))
            pixels = np.asarray(plain)
        except UnidentifiedImageError as error:
            raise DataError("it is not an image of a known kind") from error
        except Unreadable as error:
            raise DataError(error.reason) from error
        except DataError:
            raise
        except Exception as error:  # damage makes Pillow's readers raise errors of any kind
            raise DataError(" ".join(str(error).split()) or type(error).__name__) from error
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def convert(self, image: Image.Image) -> Pixels:
        """Return an image of Pillow, which stays unchanged, as an array [C, H, W]. Raises `DataError` as `read`."""
        from PIL import ImageOps

        try:
            turned = _convert_mode(ImageOps.exif_transpose(image), "L" if self.mode == "gray" else "RGB")
            pixels = np.asarray(self._resize(turned))
        except DataError:
            raise
        except Exception as error:
            raise DataError(" ".join(str(error).split()) or type(error).__name__) from error
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _resize(self, image: Image.Image) -> Image.Image:
        from PIL import Image

        width, height = image.size
        _, high, wide = self.shape
        whole = (0.0, 0.0, float(width), float(height))
        if self.crop == "pad":
            factor = min(wide / width, high / height)
            inner = max(1, round(width * factor)), max(1, round(height * factor))
            canvas = Image.new(image.mode, (wide, high))
            small = image.resize(inner, Image.Resampling.BILINEAR, whole, reducing_gap=2)
            canvas.paste(small, ((wide - inner[0]) // 2, (high - inner[1]) // 2))
            return canvas
        if self.crop == "center":
            factor = min(width / wide, height / high) * self.size / (self.resize or self.size)
            left, top = (width - wide * factor) / 2, (height - high * factor) / 2
            whole = (left, top, left + wide * factor, top + high * factor)
        return image.resize((wide, high), Image.Resampling.BILINEAR, whole, reducing_gap=2)


def _open(file: Path | str | IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    """Open an image file, which must be a regular one; return a stream that is open already without closing it."""
    return open_regular(file, LARGEST_FILE) if isinstance(file, str | Path) else nullcontext(file)


def _convert_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return `image`, of any mode, in 8-bit gray ("L") or color ("RGB")."""
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode, image.format))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _to_8_bits(values: NDArray[Any], mode: str, kind: str | None) -> Pixels:
    """Return gray `values` in 8 bits, by one rule for each of Pillow's modes, whatever this image's own maximum is.

    16 bits: 0 to 65,535 become 0 to 255. 32-bit whole numbers: 0 to 2^31 - 1 become 0 to 255; where none is above 255,
    they are 8 bits stored in 32, and are kept, as Pillow does; maxima between these ranges, which would be black in one
    and too bright in the other, are refused. Floating-point numbers: 0 to 1 become 0 to 255. `kind` is the format of
    the file: some formats give 16 bits in 32.

    Raises:
        DataError: if the rule would keep nothing of the image, or its numbers are outside the range of the rule.
    """
    if mode == "F":
        if not np.isfinite(values).all():
            raise DataError("its pixels are floating-point numbers, some of them not finite")
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        if low < 0 or high > 1:
            raise DataError(
                f"its pixels are floating-point numbers from {low:g} to {high:g}, and 0 to 1 can be read: save it in "
                "8 or 16 bits"
            )
        return (values * 255).round().astype(np.uint8)
    if mode != "I" or kind in ("PNG", "PPM"):
        return (values.clip(0, 65535) // 257).astype(np.uint8)
    high = int(values.max(initial=0))
    if high < 2**8:
        return values.clip(0).astype(np.uint8)
    if high < 2**23:
        raise DataError(
            f"its pixels are 32-bit whole numbers up to {high:,} of 2,147,483,647, which would be black in 8 bits: "
            "save it in 8 or 16 bits"
        )
    return (values.clip(0) >> 23).astype(np.uint8)


def begin_reading() -> None:
    """Prepare a process that only reads files: ignore Ctrl-C, silence warnings, and end it with its parent.

    The parent process handles Ctrl-C. If the parent is killed, the reader ends within about a second, not after a long
    idle time.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:  # on Windows it never changes
        time.sleep(1)
    os._exit(1)


def lost_image_error(name: str, reason: str) -> DataError:
    """Return the error about an image that could be read when the run began, and cannot be read now."""
    return DataError(f"The image {name} could be read before, and cannot any more: {reason}.")


def read_files(files: Sequence[str | tuple[str, bytes]], look: ImageFormat) -> Pixels:
    """Return the images of files, [N, C, H, W] uint8; a file is given by its path, or by its name and its bytes.

    Raises:
        DataError: if an image cannot be read any more.
    """
    out = np.empty((len(files), *look.shape), dtype=np.uint8)
    for row, file in enumerate(files):
        name, source = (file, file) if isinstance(file, str) else (file[0], BytesIO(file[1]))
        try:
            out[row] = look.read(source)
        except DataError as error:
            raise lost_image_error(name, str(error)) from error
    return out
