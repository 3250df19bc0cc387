"""Writing of files: never through a link, whole or not at all, and tensors as the same bytes each time."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from clframe.errors import DataError

NO_LINK = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # nor a wait for a pipe's reader
DTYPES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def create(path: Path) -> BinaryIO:
    """Open `path` as a new file for writing; a file or link that is there is removed, and never written to."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666), "wb")


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; the file there is synced and renamed to `path` when the block ends.

    A process that is killed leaves no part under the final name. If the block, the sync or the renaming fails, the
    file beside is removed, and what was at `path` stays.
    """
    beside = path.with_name(f".{path.name}")
    try:
        yield beside
        sync(beside)
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. Raises `OSError` if the file cannot be written."""
    with write_beside(path) as beside, create(beside) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all. Raises `OSError` if the file cannot be written."""
    write_bytes(path, text.encode("utf-8"))


def append(path: Path, text: str) -> None:
    """Add `text` to the file `path`. Raises `OSError` if that is a link."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINK, 0o666), "ab") as file:
        file.write(text.encode("utf-8"))


def truncate(path: Path, size: int) -> None:
    """Shorten the file `path` to `size` bytes, if it is longer. Raises `OSError` if that is a link."""
    with os.fdopen(os.open(path, os.O_WRONLY | NO_LINK), "ab") as file:
        file.truncate(min(size, os.fstat(file.fileno()).st_size))


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise `DataError` if one of `names` in `folder`, or an entry below it, is a link: a write would go through it."""
    for name in names:
        path = folder / name
        below = (
            Path(place) / entry for place, folders, files in os.walk(path) for entry in (*folders, *files)
        )  # `walk` follows no links
        for found in (path, *below):
            if found.is_symlink():
                raise DataError(
                    f"{found} is a link, and clframe writes to files of the run folder alone: put what it leads to in "
                    "its place, or remove it."
                )


def to_json(data: Mapping[str, Any]) -> str:
    """Return `data` as the text of a JSON file: stable order, exact floats, matrices one row to a line."""

    def text(value: Any, indent: str) -> str:
        deeper = indent + "  "
        if isinstance(value, Mapping) and value:
            items = ",\n".join(f"{deeper}{json.dumps(str(k))}: {text(v, deeper)}" for k, v in value.items())
            return "{\n" + items + "\n" + indent + "}"
        if (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and any(isinstance(v, list | dict) for v in value)
        ):
            return "[\n" + ",\n".join(deeper + text(v, deeper) for v in value) + "\n" + indent + "]"
        return json.dumps(value, allow_nan=False)

    return text(data, "") + "\n"


def save_file(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write contiguous `tensors` of the CPU as the safetensors file `path`, with the texts `about` in its header.

    The entries of the header are sorted, so that equal tensors give equal bytes; `safetensors` sorts none.
    Raises `OSError` if the file cannot be written.
    """
    # the largest elements first, so that each tensor begins at a multiple of their size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(about.items()))} if about else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise OSError(
                errno.EINVAL, f"`{name}` has the type {tensor.dtype}, which no safetensors file holds", str(path)
            )
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with create(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            if tensors[name].numel():
                file.write(tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data)
