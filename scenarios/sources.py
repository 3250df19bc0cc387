"""Named image data sets under a data root: one ``.npz`` file, torchvision's layout, or a download."""

from __future__ import annotations

import gzip
import socket
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clframe.data.build import Arrays
from clframe.errors import ClframeError, DataError
from clframe.system.reading import open_regular
from clframe.system.texts import cut

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
PARTS = ("x_train", "y_train", "x_test", "y_test")  # the keys of an .npz file, in the order of IDX_FILES
DIGITS = tuple("0123456789")
FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
    can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
    lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
    pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
    seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
    tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
    worm
"""
LARGEST = 400_000_000  # bytes of a data set, or one of its files, decompressed: twice the largest published one
NETWORK_TIMEOUT = 30.0  # seconds without an answer after which a download is abandoned
_may_download = ContextVar("may_download", default=True)


@dataclass(frozen=True)
class Source:
    """A data set that has a name.

    Attributes:
        title: its name in sentences, which is also the name of torchvision's class.
        folder: its folder in torchvision's layout, under the data root.
        files: the files in that folder.
        image: height, width and channels of an image.
        class_names: names of the classes, in the order of their numbers.
    """

    title: str
    folder: str
    files: tuple[str, ...]
    image: tuple[int, int, int]
    class_names: tuple[str, ...]


SOURCES = {
    "mnist": Source("MNIST", "MNIST/raw", IDX_FILES, (28, 28, 1), DIGITS),
    "fmnist": Source("FashionMNIST", "FashionMNIST/raw", IDX_FILES, (28, 28, 1), FASHION),
    "cifar10": Source(
        "CIFAR10",
        "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        (32, 32, 3),
        CIFAR10,
    ),
    "cifar100": Source("CIFAR100", "cifar-100-python", ("train", "test", "meta"), (32, 32, 3), tuple(CIFAR100.split())),
}


def load(name: str, data_root: Path) -> Arrays:
    """Load the data set `name`, with 8-bit images [N, C, H, W].

    The file ``data_root/<name>.npz`` is read if it exists (Keras's layout: `x_train`, `y_train`, `x_test`, `y_test`;
    images [N, H, W] or [N, H, W, C], labels [N] or [N, 1]), else the folder in torchvision's layout, into which the
    data set is downloaded if there is none. Only CIFAR in torchvision's layout is stored in pickles: torchvision reads
    them, after their checksums were found to be those of the published files.

    Raises:
        DataError: if the data set is not there and cannot be downloaded, or a file is damaged or holds something else.
    """
    source = SOURCES[name]
    path = data_root / f"{name}.npz"
    with _explain(path, "give permission to read it, or name another folder with --data-root"):
        in_one_file = path.is_file()
    if in_one_file:
        parts = _read_npz(path)
    else:
        path = data_root / source.folder
        if not path.exists():
            _download(name, data_root)
        if missing := [file for file in source.files if _find_file(path, file) is None]:
            raise DataError(
                f"{path} lacks {', '.join(missing)}; add what is missing, or remove the folder to have "
                f"{source.title} downloaded again."
            )
        parts = _read_idx_files(path) if source.files == IDX_FILES else _read_cifar(source, path)
    images = [_to_images(parts[key], key, source, path) for key in ("x_train", "x_test")]
    labels = [_to_labels(parts[key], key, path) for key in ("y_train", "y_test")]
    try:
        return Arrays(name, images[0], labels[0], images[1], labels[1], source.class_names)
    except DataError as error:
        raise DataError(f"{path} does not hold {source.title}: {error}") from None


@contextmanager
def no_downloads() -> Iterator[None]:
    """Let a data set that is not there raise `DataError` at once: for commands that only look."""
    before = _may_download.set(False)
    try:
        yield
    finally:
        _may_download.reset(before)


def may_download() -> bool:
    """Return whether data that is not there may be downloaded: not inside `no_downloads`."""
    return _may_download.get()


def find_all(data_root: Path) -> list[tuple[str, Path | None]]:
    """Return each data set with the file or complete folder under `data_root` that holds it, or None; read no data."""

    def where(name: str, source: Source) -> Path | None:
        path, folder = data_root / f"{name}.npz", data_root / source.folder
        if path.is_file():
            return path
        return folder if all(_find_file(folder, file) for file in source.files) else None

    return [(name, where(name, source)) for name, source in SOURCES.items()]


def _find_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


@contextmanager
def _explain(path: Path, remedy: str) -> Iterator[None]:
    """Turn errors of reading a damaged file into a `DataError` that names the file and the remedy."""
    try:
        yield
    except ClframeError:
        raise
    except Exception as error:  # damage makes readers raise errors of any kind
        raise DataError(f"{path} cannot be read ({_describe_error(error)}); {remedy}.") from error


def _describe_error(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, URLError):
        return str(error.reason)
    return cut(str(error).partition("\n")[0].rstrip(".: ")) or type(error).__name__


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    remedy = "it is damaged: remove it or put a whole copy in its place"
    with _explain(path, remedy):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is cut off, or no .npz file at all")
        with zipfile.ZipFile(path) as packed:
            _check_size(sum(member.file_size for member in packed.infolist()))
        with np.load(path, allow_pickle=False) as file:
            if missing := [key for key in PARTS if key not in file]:
                raise DataError(
                    f"{path} lacks the arrays {', '.join(missing)} (it has {cut(', '.join(file)) or 'none'}); "
                    f"save {', '.join(PARTS)} in it."
                )
            return {key: file[key] for key in PARTS}


def _check_size(unpacked: int) -> None:
    """Raise `ValueError` for arrays of too many bytes before reading: a file of some MB may hold hundreds of GB."""
    if unpacked > LARGEST:
        raise ValueError(f"it holds more than {LARGEST // 10**6} MB, unpacked")


def _read_idx_files(folder: Path) -> dict[str, NDArray[Any]]:
    return {key: _read_idx(folder, name) for key, name in zip(PARTS, IDX_FILES, strict=True)}


def _read_idx(folder: Path, name: str) -> NDArray[Any]:
    """Read a file in MNIST's own format: two zero bytes, 8 for bytes, number of dimensions, their sizes, data.

    torchvision is not used: its import takes seconds, and it would load a pickle of an older version instead if one
    lay beside the file.
    """
    path = _find_file(folder, name) or folder / name
    with _explain(path, "it is damaged: remove it or put a whole copy in its place"):
        with open_regular(path) as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            content = bytearray(file.read(LARGEST + 1))
        _check_size(len(content))
        if content[:3] != b"\x00\x00\x08":
            raise ValueError("it is not an idx file of bytes")
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _read_cifar(source: Source, folder: Path) -> dict[str, NDArray[Any]]:
    from torchvision import datasets

    remedy = "put the published files in its place, or remove it to have them downloaded again"
    with _explain(folder, remedy):
        try:
            train, test = (getattr(datasets, source.title)(folder.parent, train=train) for train in (True, False))
        except RuntimeError:
            raise DataError(
                f"{folder} does not hold {source.title} as it was published: a checksum differs; {remedy}."
            ) from None
        return dict(zip(PARTS, (train.data, train.targets, test.data, test.targets), strict=True))


def _to_images(array: NDArray[Any], key: str, source: Source, path: Path) -> Tensor:
    height, width, channels = source.image
    images = array[..., None] if array.ndim == 3 else array
    if images.dtype != np.uint8 or images.shape[1:] != source.image:
        raise DataError(
            f"`{key}` of {path} is {array.dtype} {list(array.shape)}; {source.title} is uint8 "
            f"[N, {height}, {width}, {channels}]: put the right data there."
        )
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _to_labels(array: NDArray[Any], key: str, path: Path) -> Tensor:
    array = np.asarray(array)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"`{key}` of {path} is {array.dtype} {list(array.shape)}; labels are integers [N] or [N, 1]: "
            "put the right data there."
        )
    return torch.from_numpy(array.astype(np.int64))


def _download(name: str, data_root: Path) -> None:
    """Let torchvision download into a temporary folder, and move the data set into place once it is complete."""
    source = SOURCES[name]
    npz, folder = data_root / f"{name}.npz", data_root / source.folder
    if not may_download():
        raise DataError(f"{source.title} is not in {data_root}; a run downloads it, or put {npz} or {folder} in place.")
    with (
        _explain_writing(source.title, data_root),
        _temporary_folder(data_root) as temporary,
        redirect_stdout(sys.stderr),
        _limit_patience(NETWORK_TIMEOUT),
    ):
        from torchvision import datasets

        try:
            getattr(datasets, source.title)(temporary, download=True)
        except (
            URLError,
            HTTPException,
            TimeoutError,
            ConnectionError,
            RuntimeError,
            EOFError,
            tarfile.TarError,
        ) as e:
            if "corrupted" in str(e):
                raise DataError(
                    f"{source.title} was downloaded, but a checksum differs from the published one, so "
                    f"nothing was kept; try again, or put {npz} or {folder} in place."
                ) from e
            raise DataError(
                f"{source.title} is not in {data_root} and cannot be downloaded ({_describe_error(e)}): put {npz} "
                f"(arrays {', '.join(PARTS)}) or torchvision's {folder} in place, name another folder with "
                "--data-root, or use split-digits, permuted-digits or rotated-digits, which need no file."
            ) from e
        folder.parent.mkdir(exist_ok=True)
        try:
            (Path(temporary) / source.folder).rename(folder)
        except OSError:
            if not folder.is_dir():  # if there is one, another process was faster
                raise


@contextmanager
def _temporary_folder(data_root: Path) -> Iterator[str]:
    """Provide a folder beside the data for incomplete files; a data root made for it is removed if it stays empty."""
    new = not data_root.exists()
    data_root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=data_root, prefix=".download-") as temporary:
            yield temporary
    finally:
        if new and not any(data_root.iterdir()):
            data_root.rmdir()


@contextmanager
def _explain_writing(title: str, data_root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{title} cannot be downloaded to {data_root} ({_describe_error(error)}): make the folder writable, free "
            "some space, or name another folder with --data-root."
        ) from error


@contextmanager
def _limit_patience(seconds: float) -> Iterator[None]:
    """Let connections end after `seconds` without an answer: torchvision sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
