"""The file sums.json of a run folder: SHA-256 of each file that a command reads, and of the list of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import cast

from clframe.errors import DataError
from clframe.system.reading import open_regular, read_json

SUMS_FILE = "sums.json"
SUMS_FORMAT = 1
TEXT_LIMIT = 2**28  # bytes of a text file
NONE = "holds no sums of its files, as an earlier clframe wrote it: a damaged file in it would not be noticed"


def digest(path: Path) -> str:
    """Return the SHA-256 of the file `path`. Raises `DataError` if it cannot be read, or is a text above the limit."""
    with open_regular(path, None if path.suffix == ".safetensors" else TEXT_LIMIT) as file:
        try:
            return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def to_text(sums: Mapping[str, str]) -> str:
    """Return the content of sums.json for `sums`, which maps names of files to their SHA-256."""
    files = dict(sorted(sums.items()))
    return json.dumps({"format": SUMS_FORMAT, "files": files, "sum": _sum_of_list(files)}, indent=1) + "\n"


def read(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 of the files of `folder` by name; None if an earlier clframe wrote the folder, without sums.

    Raises `DataError` if sums.json is damaged.
    """
    file = folder / SUMS_FILE
    if not file.exists() and not file.is_symlink():
        return None
    data = read_json(file)
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict) or data.get("format") != SUMS_FORMAT or data.get("sum") != _sum_of_list(files):
        raise DataError(f"{file} is damaged: it is not what was written; put it back from a copy.")
    return {str(name): str(found) for name, found in files.items()}


def check(folder: Path, *names: str) -> None:
    """Raise `DataError` if one of these files of `folder` is not what was written; without sums none is checked."""
    sums = read(folder)
    if sums is None:
        return
    for name in names:
        if name not in sums:
            raise DataError(f"{folder / name} is not in {SUMS_FILE}: the run did not write it; remove it.")
        if digest(folder / name) != sums[name]:
            raise DataError(f"{folder / name} is damaged: it is not what was written; put it back from a copy.")


def explain_missing(folder: Path) -> str | None:
    """Return a sentence if the run folder `folder` has no sums; None if it has them."""
    return None if (folder / SUMS_FILE).exists() else f"The run folder {folder} {NONE}."


def _sum_of_list(files: Mapping[str, str]) -> str:
    """Return the SHA-256 of the list of files and sums."""
    return hashlib.sha256(json.dumps(dict(sorted(files.items()))).encode()).hexdigest()
