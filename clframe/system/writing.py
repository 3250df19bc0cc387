"""Writing of files: never through a link, and tensors as the same bytes each time."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from clframe.errors import DataError

NO_LINK = (
    os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
)  # and no waiting for a pipe's reader
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
    """Open `path` as a new file for writing; what is there, a link too, is removed and not written to."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666), "wb")


def append(path: Path, text: str) -> None:
    """Add `text` to the file `path`. Raises `OSError` if that is a link."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINK, 0o666), "ab") as file:
        file.write(text.encode("utf-8"))


def cut(path: Path, size: int) -> None:
    """Shorten the file `path` to `size` bytes, if it is longer. Raises `OSError` if that is a link."""
    with os.fdopen(os.open(path, os.O_WRONLY | NO_LINK), "ab") as file:
        file.truncate(min(size, os.fstat(file.fileno()).st_size))


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise `DataError` if one of `names` in `folder`, or something in it, is a link: a write would go through it."""
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


def save_file(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write contiguous `tensors` of the CPU as the safetensors file `path`, with what it is `about` in its header.

    The entries of the header are in order, so that equal tensors are equal bytes; those of `safetensors` are in any.
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
