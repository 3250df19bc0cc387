"""The errors that a user can cause or meet, each with the exit code of the command line."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clframe.renamed import PUBLIC, now_called
from clframe.system.texts import SENTENCE, cut, shorten_lines

# what torch, oneDNN, Python's threads and C++ say when memory, or room for a thread, ends: all are RuntimeErrors
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|not enough memory|failed to allocate|"
    r"could not create a (primitive|memory)|can't start new thread|bad_alloc|bad allocation",
    re.IGNORECASE,
)
# what torch and safetensors say of a file that the system does not let them open, read or write
OF_A_FILE = re.compile(
    r"unable to (open|mmap|map)|open file failed|I/O error|os error \d+|file write failed|PytorchStreamW"
)

# what the disk refuses, whatever is written: never the mistake of a plugin, or of a name
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


class ClframeError(Exception):
    """Base of all errors that clframe explains in one sentence. `code` is the command line's exit code.

    A sentence that holds what a user or a file gave is no longer than `clframe.system.texts.SENTENCE`.
    """

    code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(shorten_lines(message))


class RunError(ClframeError):
    """The run failed: a loss that is not finite, memory or disk that is full, a plugin that raised."""

    code = 1


class UsageError(ClframeError):
    """A name, option or combination that clframe refuses. `problems` holds one sentence per mistake."""

    code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(cut(problem, SENTENCE) for problem in problems)
        super().__init__("\n".join(self.problems))


class DataError(ClframeError):
    """Data, a run folder or a checkpoint is missing, damaged, in use, or refused as untrusted."""

    code = 3


class Interrupted(ClframeError):
    """A signal stopped the run; `signal` is its number. The run can be resumed."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
        self.code = 128 + signal


def out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory, or room for a thread, ended; on the CPU that is not a MemoryError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def of_the_system(error: BaseException) -> str | None:
    """Return what the system refused, in its words and with the file's name; None if `error` is of another kind.

    Libraries raise RuntimeErrors and errors of their own where a file cannot be opened or written.
    """
    if isinstance(error, OSError):
        said = error.strerror or str(error) or type(error).__name__
        return f"{said} ({error.filename})" if error.filename is not None else said
    if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
        said = " ".join(str(error).split())[:300].rstrip(".")
        return said if OF_A_FILE.search(said) else None
    return None


def cannot_write(what: str, path: Path, error: OSError) -> ClframeError:
    """Return the refusal of a file that a user named: of the disk, as where a run fails, or of the name."""
    if error.errno in OF_THE_DISK:
        return RunError(f"{what} could not be written to {path} ({error.strerror}); make room, or name another file.")
    return UsageError(f"{what} cannot be written to {path} ({error.strerror}); name another file.")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`` Did you mean `x`?`` for the choice nearest to `name`, else the list of choices; '' if there are none."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean `{near[0]}`?"
    return f" Choices: {', '.join(known)}." if known else ""


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        raise ImportError(now_called(f"clframe.errors.{name}", f"clframe.errors.{PUBLIC[name]}"))
    raise AttributeError(f"module 'clframe.errors' has no attribute {name!r}")
