"""The system calls of this process on the files below a folder: counted, and one of them made to fail or be the last.

What Python code calls is replaced while a `Calls` is open: opening, reading, writing, syncing, closing and cutting of
files, also through the buffers of `open`; making, listing, renaming and removing. Below Python stay the reads of
safetensors and torch, which map files into memory: `Calls` refuses them by a limit of descriptors.
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EACCES", "EINTR", "EMFILE")}
FULL = "full"  # from this call on there is no space
PART = "part of the write, then ENOSPC"
SHORT = "short write"  # the rest of which a second call would write
KILL = "kill"
KILL_WITHIN = "kill in the write"
OF_WRITES = (PART, SHORT, KILL_WITHIN)
NEED_SPACE = ("create", "write", "mkdir", "rename")
LIBRARY = "map"  # a file that safetensors or torch opens by itself


@dataclass(frozen=True)
class Fault:
    """What happens at the call of number `at`, counted from 1: an error by name, or one of the kinds above."""

    at: int
    kind: str


@dataclass(frozen=True)
class Call:
    """A system call and the path that it is given, relative to the folder."""

    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


class Calls:
    """The calls on the files below `folder` while it is open; each counts in all threads.

    Args:
        folder: below which calls count.
        fault: what happens at one of them; None: they are only counted.
    """

    def __init__(self, folder: Path, fault: Fault | None = None) -> None:
        self.folder = os.path.realpath(folder)
        self.fault = fault
        self.made: list[Call] = []
        self._paths: dict[int, str] = {}  # of open descriptors
        self._folders: dict[str, str] = {}  # of paths, without links
        self._lock = threading.Lock()
        self._stack = ExitStack()

    @property
    def struck(self) -> bool:
        """Whether the call that the fault waits for was made."""
        return self.fault is not None and len(self.made) >= self.fault.at

    def __enter__(self) -> Calls:
        calls = self

        class Raw(io.FileIO):
            """A file whose calls count."""

            calls_path = ""

            def write(self, data: Any) -> int | None:
                view = memoryview(data).cast("B")
                how = calls.meet("write", self.calls_path)
                if how is None:
                    return super().write(view)
                written = super().write(view[: max(1, len(view) // 2)])
                if how == KILL_WITHIN:
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == PART:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return written

            def readinto(self, buffer: Any) -> int | None:
                calls.meet("read", self.calls_path)
                return super().readinto(buffer)

            def readall(self) -> bytes:
                calls.meet("read", self.calls_path)
                return super().readall()

            def truncate(self, size: int | None = None) -> int:
                calls.meet("cut", self.calls_path)
                return super().truncate(size)

            def close(self) -> None:
                if self.closed:
                    return
                calls._paths.pop(self.fileno(), None)
                super().close()
                calls.meet("close", self.calls_path)

        original_open = io.open

        def opened(file: Any, mode: str = "r", buffering: int = -1, *given: Any, **named: Any) -> Any:
            path = calls._of_descriptor(file) if isinstance(file, int) else calls.below(file)
            if path is None:
                return original_open(file, mode, buffering, *given, **named)
            plain = mode.replace("b", "").replace("t", "")
            if not isinstance(file, int):
                calls.meet("create" if set("wax") & set(mode) else "open", path)
            named.pop("closefd", None)
            raw = Raw(file, plain)
            raw.calls_path = path
            buffered: Any = io.BufferedReader(raw) if plain == "r" else io.BufferedWriter(raw)
            if "+" in plain:
                buffered = io.BufferedRandom(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *given, **named)

        for module in (io, builtins):
            self._stack.enter_context(mock.patch.object(module, "open", opened))
        for function, name in {
            "mkdir": "mkdir",
            "rmdir": "rmdir",
            "unlink": "unlink",
            "remove": "unlink",
            "rename": "rename",
            "replace": "rename",
            "chmod": "chmod",
            "scandir": "list",
            "listdir": "list",
        }.items():
            self._replace(function, self._of_path(name, getattr(os, function)))
        self._replace("open", self._opened(os.open))
        for function, name in {"write": "write", "read": "read", "fsync": "sync", "ftruncate": "cut"}.items():
            self._replace(function, self._of_open(name, getattr(os, function)))
        self._replace("close", self._closed(os.close))
        self._map_files()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # ------------------------------------------------------------------------------------------ the calls

    def meet(self, name: str, path: str) -> str | None:
        """Count a call; raise its error, end the process, or return how a write is to be cut short."""
        with self._lock:
            self.made.append(Call(name, path))
            number = len(self.made)
        fault = self.fault
        if fault is None or number < fault.at:
            return None
        if fault.kind == FULL and name in NEED_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if number != fault.at:
            return None
        if fault.kind == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind in ERRORS:
            raise OSError(ERRORS[fault.kind], os.strerror(ERRORS[fault.kind]), path)
        return fault.kind if fault.kind in OF_WRITES else None

    def below(self, path: Any, descriptor: int | None = None) -> str | None:
        """Return `path`, as seen from the folder `descriptor`, relative to the folder; None if it is not below it."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        text = os.fsdecode(path)
        if descriptor is not None:
            known = self._paths.get(descriptor)
            return None if known is None else os.path.normpath(os.path.join(known, text))
        folder, name = os.path.split(text)
        if folder not in self._folders:  # to follow links takes a system call for each part of the path
            self._folders[folder] = os.path.realpath(folder or ".")
        full = os.path.join(self._folders[folder], name)
        if full != self.folder and not full.startswith(self.folder + os.sep):
            return None
        return os.path.relpath(full, self.folder)

    def _of_descriptor(self, descriptor: Any) -> str | None:
        return self._paths.get(descriptor) if isinstance(descriptor, int) else None

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        self._stack.enter_context(mock.patch.object(os, name, function))

    def _of_path(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def called(path: Any = ".", *given: Any, **named: Any) -> Any:
            found = self._of_descriptor(path)
            if found is None:
                found = self.below(path, named.get("dir_fd", named.get("src_dir_fd")))
            if found is not None:
                self.meet(name, found)
            return original(path, *given, **named)

        return called

    def _opened(self, original: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(original)
        def called(path: Any, flags: int, *given: Any, **named: Any) -> int:
            found = self.below(path, named.get("dir_fd"))
            if found is None:
                return original(path, flags, *given, **named)
            self.meet("create" if flags & os.O_CREAT else "open", found)
            descriptor = original(path, flags, *given, **named)
            self._paths[descriptor] = found
            return descriptor

        return called

    def _of_open(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def called(descriptor: Any, *given: Any) -> Any:
            if (found := self._of_descriptor(descriptor)) is not None:
                self.meet(name, found)
            return original(descriptor, *given)

        return called

    def _closed(self, original: Callable[[int], None]) -> Callable[[int], None]:
        @functools.wraps(original)
        def called(descriptor: int) -> None:
            found = self._paths.pop(descriptor, None)
            original(descriptor)
            if found is not None:
                self.meet("close", found)

        return called

    def _map_files(self) -> None:
        """Let the reads of safetensors count; an error there is made by a limit of descriptors."""
        from clframe.runs import checkpoint

        original = checkpoint.load_file

        def loaded(path: Any, *given: Any, **named: Any) -> Any:
            found = self.below(path)
            if found is None:
                return original(path, *given, **named)
            try:
                self.meet(LIBRARY, found)
            except OSError as error:
                # the file is opened twice: by safetensors, and by torch, whose words are others
                with few_descriptors(int(error.errno != errno.EMFILE)):
                    return original(path, *given, **named)
            return original(path, *given, **named)

        self._stack.enter_context(mock.patch.object(checkpoint, "load_file", loaded))


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    """Inside, this process can open so many `more` files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
