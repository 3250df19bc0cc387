"""Image files as tensors of one shape: read at once, or row by row when a batch needs them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clframe.errors import DataError, WrongUse

if TYPE_CHECKING:
    from PIL import Image

Crop = Literal["center", "stretch", "pad"]
Mode = Literal["colour", "grey"]
Pixels = NDArray[np.uint8]
READ_AHEAD = 64  # images at least that are read while a step is taken


@dataclass(frozen=True)
class Look:
    """How an image of any size and kind becomes one of a fixed shape.

    It is turned as its EXIF data says; transparent parts become white; of an animation the first frame counts.

    Attributes:
        size: height in pixels, and width where that is not given.
        crop: ``center``: what is left of the longer side is cut off; ``stretch``: both sides are resized apart;
            ``pad``: the whole image, on black.
        resize: the shorter side in pixels before ``center`` cuts; None: `size`.
        mode: ``colour`` (3 channels) or ``grey`` (1).
        width: in pixels; None: as the height.

    Raises:
        WrongUse: if `resize` is less than `size`, or has no meaning.
    """

    size: int = 64
    crop: Crop = "center"
    resize: int | None = None
    mode: Mode = "colour"
    width: int | None = None

    def __post_init__(self) -> None:
        if self.resize is not None and self.crop != "center":
            raise WrongUse(f"`scenario.resize` needs `scenario.crop=center`: with `{self.crop}` nothing is cut off.")
        if self.resize is not None and self.resize < self.size:
            raise WrongUse(
                f"`scenario.resize` is {self.resize}, and {self.size} pixels (`scenario.size`) cannot be cut out of "
                f"it: give {self.size} at least."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return (1 if self.mode == "grey" else 3, self.size, self.width or self.size)

    def read(self, file: Path | str | IO[bytes]) -> Pixels:
        """The image as [C, H, W].

        Raises:
            DataError: with the reason if it cannot be read to its last pixel.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(file) as image:
                # a JPEG that is much too large is decoded smaller, in a fraction of the time
                image.draft(None, (2 * max(self.resize or 0, *self.shape[1:]),) * 2)
                ImageOps.exif_transpose(image, in_place=True)
                plain = self._resized(_in_mode(image, "L" if self.mode == "grey" else "RGB"))
            pixels = np.asarray(plain)
        except (UnidentifiedImageError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise DataError(error.strerror or "it is no image of a known kind") from error
        except Exception as error:  # Pillow's readers raise whatever the damage leads to
            raise DataError(" ".join(str(error).split()) or type(error).__name__) from error
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _resized(self, image: Image.Image) -> Image.Image:
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


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """`image` in 8-bit grey ("L") or colour ("RGB"), whatever it was in."""
    from PIL import Image

    if image.mode == "F":
        raise DataError("its pixels are floating-point numbers")
    if image.mode.startswith("I"):  # of 16 bits, which Pillow would cut off at 255, or of 8 bits in 32
        values = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((values // (257 if values.max(initial=0) > 255 else 1)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files named, and those in the folders named and below that are called as images are, in order of name.

    Raises:
        DataError: if a file or folder is missing, or a folder holds no image.
    """
    from PIL import Image

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


def look_of(shape: Sequence[int]) -> Look:
    """The look of image files for a network of arrays of `shape`: the middle of an image, in its channels.

    Raises:
        WrongUse: if these are not images of one or three channels.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise WrongUse(
            f"This model takes arrays of shape {list(shape)}, which no image file has: give it arrays from Python."
        )
    return Look(shape[1], mode="grey" if shape[0] == 1 else "colour", width=shape[2])


def read_image(path: str | Path, look: Look, scale: float = 255) -> Tensor:
    """The image in a file as raw values [C, H, W]: uint8, or float32 where `scale`, what 255 becomes, is another.

    Raises:
        DataError: if it cannot be read as an image.
    """
    try:
        values = torch.from_numpy(np.array(look.read(path)))
    except DataError as error:
        raise DataError(f"The image {path} cannot be read: {error}.") from error
    return values if scale == 255 else values.to(torch.float32) * (scale / 255)


class Files:
    """Image files that threads read, in the background where they are asked for in time.

    Threads suffice, as Pillow decodes and resizes outside Python's lock.

    Args:
        paths: of the files.
        look: of the images.
        workers: threads; None: one for each core that this process may use.
    """

    def __init__(self, paths: Sequence[str | Path], look: Look, workers: int | None = None) -> None:
        self.paths = [os.fspath(path) for path in paths]
        self.look = look
        self.workers = workers or cores()
        self._coming: dict[int, Future[Pixels]] = {}

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.workers, "images")

    def __deepcopy__(self, memo: dict[int, Any]) -> Files:
        return self  # a copy of a data set has the same files

    def expect(self, where: Iterable[int]) -> None:
        """Begin to read the files at these positions; `read` will ask for them."""
        for i in where:
            if i not in self._coming:
                self._coming[i] = self._pool.submit(self._read, i)

    def read(self, where: Sequence[int]) -> Tensor:
        """The images at these positions, [N, C, H, W] uint8. Raises `DataError` if one cannot be read any more."""
        self.expect(where)
        out = np.empty((len(where), *self.look.shape), dtype=np.uint8)
        last: dict[int, int] = {}  # a position may occur twice
        for row, i in enumerate(where):
            out[row] = out[last[i]] if i in last else self._coming.pop(i).result()
            last[i] = row
        return torch.from_numpy(out)

    def _read(self, i: int) -> Pixels:
        try:
            return self.look.read(self.paths[i])
        except DataError as error:
            raise DataError(f"The image {self.paths[i]} could be read before, and cannot any more: {error}.") from error


class LazyImages:
    """Images [N, ...] that are read when they are asked for: of files, or of tensors that join them.

    It is to a tensor what a list of paths is to its images: rows of it are picked, joined and moved as those of a
    tensor are, and cost no memory until `read`.

    Attributes:
        device: where `read` puts them.
    """

    def __init__(
        self, sources: Sequence[Files | Tensor], rows: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self._sources = tuple(sources)
        if rows is None:
            counts = [len(s.paths) if isinstance(s, Files) else len(s) for s in self._sources]
            rows = torch.cat([torch.stack([torch.full((n,), k), torch.arange(n)], 1) for k, n in enumerate(counts)])
        self._rows = rows  # [N, 2] source and position, on the CPU
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> torch.Size:
        """As of a tensor."""
        first = self._sources[0]
        return torch.Size((len(self), *(first.look.shape if isinstance(first, Files) else first.shape[1:])))

    @property
    def dtype(self) -> torch.dtype:
        """What joining all sources gives; of files alone uint8."""
        kind = torch.uint8
        for source in self._sources:
            kind = torch.promote_types(kind, torch.uint8 if isinstance(source, Files) else source.dtype)
        return kind

    def __getitem__(self, where: Tensor | slice) -> LazyImages:
        rows = self._rows[where.cpu() if isinstance(where, Tensor) else where]
        return LazyImages(self._sources, rows, self.device)

    def index_select(self, dim: Literal[0], where: Tensor) -> LazyImages:
        """As of a tensor."""
        return LazyImages(self._sources, self._rows.index_select(dim, where.cpu()), self.device)

    def to(self, device: torch.device | str) -> LazyImages:
        """The same images, which will be read to `device`."""
        return LazyImages(self._sources, self._rows, device)

    def aminmax(self) -> tuple[Tensor, Tensor]:
        """Bounds of all values, without reading a file: those that 8-bit images can have."""
        ends = [s.aminmax() for s in self._sources if not isinstance(s, Files) and s.numel()]
        low = min([0.0, *(float(end.min) for end in ends)])
        return torch.tensor(low), torch.tensor(max([255.0, *(float(end.max) for end in ends)]))

    def expect(self, where: Tensor | slice) -> None:
        """Begin to read the rows at the positions, or in the slice `where`, in the background."""
        rows = self._rows[where.cpu() if isinstance(where, Tensor) else where].tolist()
        for k, source in enumerate(self._sources):
            if isinstance(source, Files):
                source.expect([i for of, i in rows if of == k])

    def read(self) -> Tensor:
        """All rows, as a tensor."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for k, source in enumerate(self._sources):
            mine = (self._rows[:, 0] == k).nonzero().flatten()
            where = self._rows[mine, 1]
            if not len(mine):
                continue
            found = source.read(where.tolist()) if isinstance(source, Files) else source[where.to(source.device)]
            if len(mine) == len(self):
                return found.to(self.device, self.dtype)
            out[mine.to(self.device)] = found.to(self.device, self.dtype)
        return out


Images = Tensor | LazyImages


def joined(parts: Sequence[Images]) -> Images:
    """The rows of all `parts`, in their order; read later if one of them is."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    sources: list[Files | Tensor] = []
    rows = []
    for part in parts:
        lazy = LazyImages([part], device=part.device) if isinstance(part, Tensor) else part
        places = [next((k for k, s in enumerate(sources) if s is source), None) for source in lazy._sources]
        for j, source in enumerate(lazy._sources):
            if places[j] is None:
                places[j] = len(sources)
                sources.append(source)
        rows.append(torch.stack([torch.tensor(places)[lazy._rows[:, 0]], lazy._rows[:, 1]], 1))
    return LazyImages(sources, torch.cat(rows), parts[0].device)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bytes_of(count: int, look: Look) -> int:
    """Bytes that so many images take in memory."""
    return count * math.prod(look.shape)
