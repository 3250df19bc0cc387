"""Image files as tensors of one shape: read at once, or row by row when a batch needs them."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager, suppress
from multiprocessing import current_process, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from loky import get_reusable_executor
from torch import Tensor

from clframe.data.decode import ImageFormat, Pixels, begin_reading, lost_image_error, read_files
from clframe.data.listing import SHOWN, LeftOut, walk
from clframe.errors import DataError, UsageError
from clframe.system.reading import expand_home

if TYPE_CHECKING:
    from PIL import Image

READ_AHEAD = 64  # images that are read at least while a step is taken
AT_ONCE = 32  # images at most in one call of a process: a call for each image costs as much as reading the image
IDLE = 300  # seconds after which idle processes end
MOST = 60  # workers at most: Windows cannot wait on more than about 60 handles
# a reader's environment: without it, Python imports modules from the current folder, which may be untrusted
SAFE = {"PYTHONSAFEPATH": "1"}
# without this, NumPy starts a thread for each core in each reader
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", **SAFE}


def image_files(paths: Sequence[str | Path], left: LeftOut | None = None) -> list[Path]:
    """Return the named files and the images in and below the named folders, sorted by name (`clframe.data.listing`).

    Other content of the folders is added to `left`.

    Raises:
        DataError: if a file or folder is missing, or a folder holds no image.
    """
    left = LeftOut() if left is None else left
    found: list[Path] = []
    for path in map(expand_home, paths):
        if path.is_dir():
            inside, others = walk(path, left)
            if not inside:
                instead = f", but files of the kinds {', '.join(sorted(others)[:SHOWN])}" if others else ""
                raise DataError(
                    f"There is no image in the folder {path}, nor below it{instead}; name a folder with images."
                )
            found += sorted(map(Path, inside))
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"There is no file or folder {path}; correct the path.")
    return found


def image_format_of(shape: Sequence[int]) -> ImageFormat:
    """Return the format that brings image files to arrays of `shape`, the input of a network: the center of an image.

    Raises:
        UsageError: if arrays of `shape` are not images of one or three channels.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(
            f"This model takes arrays of shape {list(shape)}, which no image file has: give it arrays from Python."
        )
    return ImageFormat(shape[1], mode="gray" if shape[0] == 1 else "color", width=shape[2])


def read_image(path: str | Path, look: ImageFormat, scale: float = 255) -> Tensor:
    """Return the image in a file as raw values [C, H, W]: uint8, or float32 if `scale`, which 255 becomes, is not 255.

    Raises:
        DataError: if the file cannot be read as an image.
    """
    try:
        values = torch.from_numpy(np.array(look.read(path)))
    except DataError as error:
        raise DataError(f"The image {path} cannot be read: {error}.") from error
    return _scale(values, scale)


def convert_image(image: Image.Image, look: ImageFormat, scale: float = 255) -> Tensor:
    """Return an image of Pillow as `read_image` returns it from its file. Raises `DataError` as `read_image` does."""
    try:
        values = torch.from_numpy(np.array(look.convert(image)))
    except DataError as error:
        raise DataError(f"The image {image!r} cannot be read: {error}.") from error
    return _scale(values, scale)


def _scale(values: Tensor, scale: float) -> Tensor:
    return values if scale == 255 else values.to(torch.float32) * (scale / 255)


class EmbeddedFile(Protocol):
    """An image file within a larger file; its text names its place there."""

    def read_bytes(self) -> bytes:
        """Return the bytes of the image file. Raises `OSError` or `DataError` if there are none."""
        ...


class ImageFiles:
    """Image files that other processes read, in the background if `expect` is called before `read`.

    Threads would compete with each other and with the training for Python's lock, which is held for half of the time
    that reading a small image takes. Images that other processes cannot read are read in this process: where it may
    have no children (as the processes of `multiprocessing.Pool`), where loky starts none (without a standard output),
    and after a reader was killed.

    Args:
        paths: paths of the files; for files within larger ones, the object that reads their bytes, which are then sent
            to the process that decodes them.
        look: format of the images.
        workers: number of processes, which all files of this process share; None: one for each core that it may use.
    """

    def __init__(
        self, paths: Sequence[str | Path | EmbeddedFile], look: ImageFormat, workers: int | None = None
    ) -> None:
        # absolute paths: the processes stay in the folder that was the current one at their start
        self.paths = [os.path.abspath(path) if isinstance(path, str | Path) else path for path in paths]
        self.look = look
        self.workers = min(workers or count_cores(), MOST)
        self._coming: dict[
            int, tuple[Future[Pixels], int]
        ] = {}  # for a position, the call that reads it, and its row in the answer

    def __deepcopy__(self, memo: dict[int, Any]) -> ImageFiles:
        return self  # a copy of a data set shares the files

    def expect(self, where: Iterable[int]) -> None:
        """Begin to read the files at the positions `where`, which `read` will return."""
        new = [i for i in dict.fromkeys(where) if i not in self._coming]
        if not new or current_process().daemon or sys.stdout is None or sys.stderr is None:
            return
        share = min(AT_ONCE, -(-len(new) // self.workers))
        with _set_safe_path(), _block_ctrl_c():
            pool = get_reusable_executor(self.workers, timeout=IDLE, initializer=begin_reading, env=ENVIRONMENT)
            for start in range(0, len(new), share):
                part = new[start : start + share]
                with suppress(BrokenExecutor, DataError):  # `read` will report it
                    future = pool.submit(read_files, [self._sent(i) for i in part], self.look)
                    self._coming.update((i, (future, row)) for row, i in enumerate(part))

    def read(self, where: Sequence[int]) -> Tensor:
        """Return the images at the positions `where`, [N, C, H, W] uint8. Raises `DataError` for unreadable ones."""
        self.expect(where)
        out = np.empty((len(where), *self.look.shape), dtype=np.uint8)
        last: dict[int, int] = {}  # a position may occur twice
        for row, i in enumerate(where):
            out[row] = out[last[i]] if i in last else self._read(i)[0]
            last[i] = row
        return torch.from_numpy(out)

    def _read(self, i: int) -> Pixels:
        """Return the image at position i, [1, C, H, W] uint8."""
        if i in self._coming:
            future, row = self._coming.pop(i)
            with suppress(BrokenExecutor, DataError):  # a reader was killed, or another file of the call is broken
                return future.result()[row : row + 1]
        return read_files([self._sent(i)], self.look)

    def _sent(self, i: int) -> str | tuple[str, bytes]:
        """Return the file at position i as another process can read it. Raises `DataError` if the file is gone."""
        path = self.paths[i]
        if isinstance(path, str):
            return path
        try:
            return str(path), path.read_bytes()
        except (OSError, DataError) as error:
            raise lost_image_error(str(path), getattr(error, "strerror", None) or str(error)) from error


@contextmanager
def _block_ctrl_c() -> Iterator[None]:
    """Block SIGINT while workers start, so that they inherit the mask; this process receives the signal afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # every process needs it, and its own start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _set_safe_path() -> Iterator[None]:
    """Let Python processes that start, such as the resource tracker, import nothing from the current folder."""
    before = {name: os.environ.get(name) for name in SAFE}
    os.environ.update(SAFE)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class LazyImages:
    """Images [N, ...] in files, or in tensors beside such files, that are read by `read` alone.

    `LazyImages` stand for a tensor as paths stand for images: rows are picked, concatenated and moved to a device as
    those of a tensor, and take no memory until `read`.

    Attributes:
        device: device of the tensor that `read` returns.
    """

    def __init__(
        self, sources: Sequence[ImageFiles | Tensor], rows: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self._sources = tuple(sources)
        if rows is None:
            counts = [len(s.paths) if isinstance(s, ImageFiles) else len(s) for s in self._sources]
            rows = torch.cat([torch.stack([torch.full((n,), k), torch.arange(n)], 1) for k, n in enumerate(counts)])
        self._rows = rows  # [N, 2] source and position, on the CPU
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the images, as `torch.Tensor.shape` does."""
        first = self._sources[0]
        return torch.Size((len(self), *(first.look.shape if isinstance(first, ImageFiles) else first.shape[1:])))

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of all sources together; of files alone uint8."""
        kind = torch.uint8
        for source in self._sources:
            kind = torch.promote_types(kind, torch.uint8 if isinstance(source, ImageFiles) else source.dtype)
        return kind

    def __getitem__(self, where: Tensor | slice) -> LazyImages:
        rows = self._rows[where.cpu() if isinstance(where, Tensor) else where]
        return LazyImages(self._sources, rows, self.device)

    def index_select(self, dim: Literal[0], where: Tensor) -> LazyImages:
        """Return the rows at the positions `where`, as `torch.Tensor.index_select` does."""
        return LazyImages(self._sources, self._rows.index_select(dim, where.cpu()), self.device)

    def to(self, device: torch.device | str) -> LazyImages:
        """Return the same images, which will be read to `device`."""
        return LazyImages(self._sources, self._rows, device)

    def aminmax(self) -> tuple[Tensor, Tensor]:
        """Return bounds of all values without reading a file: for files, the bounds of 8-bit images."""
        ends = [s.aminmax() for s in self._sources if not isinstance(s, ImageFiles) and s.numel()]
        low = min([0.0, *(float(end.min) for end in ends)])
        return torch.tensor(low), torch.tensor(max([255.0, *(float(end.max) for end in ends)]))

    def expect(self, where: Tensor | slice) -> None:
        """Begin to read the rows at the positions, or in the slice `where`, in the background."""
        rows = self._rows[where.cpu() if isinstance(where, Tensor) else where].tolist()
        for k, source in enumerate(self._sources):
            if isinstance(source, ImageFiles):
                source.expect([i for of, i in rows if of == k])

    def read(self) -> Tensor:
        """Return all rows as a tensor."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for k, source in enumerate(self._sources):
            mine = (self._rows[:, 0] == k).nonzero().flatten()
            where = self._rows[mine, 1]
            if not len(mine):
                continue
            found = source.read(where.tolist()) if isinstance(source, ImageFiles) else source[where.to(source.device)]
            if len(mine) == len(self):
                return found.to(self.device, self.dtype)
            out[mine.to(self.device)] = found.to(self.device, self.dtype)
        return out


RawImages = Tensor | LazyImages


def concat_images(parts: Sequence[RawImages]) -> RawImages:
    """Return the rows of all `parts`, in their order; as `LazyImages` if one of the parts is."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    sources: list[ImageFiles | Tensor] = []
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


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bytes_of(count: int, look: ImageFormat) -> int:
    """Return the number of bytes that `count` images of the format `look` take in memory."""
    return count * math.prod(look.shape)
