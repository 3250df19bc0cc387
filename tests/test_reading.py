"""Files of others: only regular ones are read, up to a limit; every failure is one sentence that names the file."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clframe import DataError
from clframe.system import reading

READERS: dict[str, Callable[[Path], Any]] = {
    "open": lambda path: reading.open_regular(path, 100).close(),
    "bytes": lambda path: reading.read_bytes(path, 100),
    "text": lambda path: reading.read_text(path, 100),
    "json": lambda path: reading.read_json(path, 100),
}


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket has 107 characters at most
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


MAKERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "it is a pipe"),
    "folder": (Path.mkdir, "it is a folder"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
    "socket": (listening, "it is a socket"),
    "missing": (lambda path: None, "No such file or directory"),
    "large": (lambda path: path.write_bytes(b"1" * 101), "it is larger than 100 bytes"),
    "loop": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("what", MAKERS)
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_up_to_a_limit_are_read(tmp_path: Path, reader: str, what: str):
    make, said = MAKERS[what]
    make(tmp_path / "x")
    with pytest.raises(DataError) as raised:
        READERS[reader](tmp_path / "x")
    assert str(raised.value) == f"{tmp_path / 'x'} cannot be read: {said}."


def test_a_file_of_no_stated_size_is_read_up_to_the_limit():
    """The system's own files have the size 0 and more content."""
    assert reading.read_bytes("/proc/version", 10_000).startswith(b"Linux")
    with pytest.raises(DataError, match="larger than 5 bytes"):
        reading.read_bytes("/proc/version", 5)


def test_what_is_read(tmp_path: Path):
    file = tmp_path / "x"
    file.write_text('{"a": ["é"]}', encoding="utf-8")
    assert reading.read_json(file) == {"a": ["é"]}
    assert reading.read_bytes(file, 13) == file.read_bytes()
    with reading.open_regular(file) as stream:
        assert stream.read(1) == b"{"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"[1,", "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_what_is_no_json(tmp_path: Path, content: bytes, said: str):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=said) as raised:
        reading.read_json(tmp_path / "x")
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 300, "y" * 100_000])
def test_names_that_are_none(path: str):
    with pytest.raises(DataError) as raised:
        reading.read_bytes(path, 10)
    str(raised.value).encode()
    assert len(str(raised.value)) < 500
