"""Reading of untrusted files: regular files up to a limit, with one sentence for each failure."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from clframe.errors import ClframeError, DataError, UsageError, of_the_system, out_of_memory
from clframe.system.texts import cut, escape_unprintable, quote

JSON_LIMIT = 32 * 2**20  # bytes; the worst JSON of this size takes 0.7 GB after parsing
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Unreadable(DataError):
    """An error about a file that cannot be read; `reason` is the cause, without the path and without a period."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{quote_path(path)} cannot be read: {reason}.")
        self.reason = reason


def expand_home(path: str | Path) -> Path:
    """Return `path` with ``~`` replaced by the user's home folder.

    Raises:
        DataError: if there is no such user.
        UsageError: if `path` is not a path.
    """
    try:
        return Path(path).expanduser()
    except TypeError as error:
        raise UsageError(f"{quote(path)} is a `{type(path).__name__}`: give the path of a file or folder.") from error
    except RuntimeError as error:
        raise DataError(
            f"{quote_path(path)} begins with `~` and names no user of this machine: write the folder out."
        ) from error


def open_regular(path: str | Path, limit: int | None = None) -> BinaryIO:
    """Open the regular file `path`, of `limit` bytes at most, for reading; pipes and devices are never read.

    Raises:
        DataError: if the file is missing, may not be read, is not a regular file, or has more than `limit` bytes.
    """
    try:
        check_regular(path, limit)
        # the target of a path may change after the check; without O_NONBLOCK a pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise Unreadable(path, reason(error)) from error
    try:
        _check(path, os.fstat(descriptor), limit)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | Path, limit: int | None = None) -> None:
    """Raise `DataError` unless `path` is a regular file of `limit` bytes at most, as for `open_regular`."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise Unreadable(path, reason(error)) from error
    _check(path, found, limit)


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Return the content of the regular file `path`, of `limit` bytes at most. Raises `DataError` as `open_regular`."""
    with open_regular(path, limit) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise Unreadable(path, reason(error)) from error
    if len(content) > limit:  # the file grew, or the system reports no size
        raise Unreadable(path, _too_large(limit))
    return content


def read_text(path: str | Path, limit: int) -> str:
    """Return the UTF-8 text of the regular file `path`. Raises `DataError` as `open_regular`, and for other bytes."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(path, f"it is not UTF-8 text ({error})") from error


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    """Return the content of the JSON file `path`. Raises `DataError` as `read_text`, and for text that is not JSON."""
    return parse_json(read_text(path, limit), path)


def parse_json(text: str | bytes, path: str | Path) -> Any:
    """Return the content of the JSON `text` from the file `path`.

    Raises `DataError` if the text is not JSON, is nested too deeply, or has whole numbers of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise Unreadable(path, "it is nested too deeply") from error
    except ValueError as error:  # from JSON, UTF-8, or `int`, which takes 4,300 digits at most
        raise Unreadable(path, f"it is not JSON ({cut(str(error))})") from error


@contextmanager
def blame_file(file: str | Path) -> Iterator[None]:
    """Turn any error inside, where values from `file` are used, into a `DataError` that blames `file`."""
    try:
        yield
    except ClframeError:
        raise
    except Exception as error:
        if out_of_memory(error) or of_the_system(error):
            raise
        said = f"{type(error).__name__}: {error}"
        if type(error).__name__ == "ValidationError":  # an error of pydantic, which not every command imports
            first = cast(Any, error).errors(include_url=False)[0]
            said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        said = cut(" ".join(said.split()))
        raise DataError(
            f"{quote_path(file)} holds something else than clframe writes ({said}): put the file back as it was."
        ) from error


def quote_path(path: object) -> str:
    """Return a path for a sentence: cut to 200 characters, with escapes for characters that a terminal cannot show."""
    return cut(escape_unprintable(str(path)))


def reason(error: BaseException) -> str:
    """Return the cause of an error in the system's words, without the path and without a period."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return cut(" ".join(said.split())).rstrip(".")


def _check(path: str | Path, found: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable(path, f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}")
    if limit is not None and found.st_size > limit:
        raise Unreadable(path, _too_large(limit))


def _too_large(limit: int) -> str:
    size = f"{limit / 2**20:.3g} MB" if limit >= 2**20 else f"{limit} bytes"
    return f"it is larger than {size}"
