"""The errors that a user can cause or meet, each with the exit code of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClframeError(Exception):
    """Base of all errors that clframe explains in one sentence. `code` is the command line's exit code."""

    code = 1


class RunFailed(ClframeError):
    """The run failed: a loss that is not finite, memory or disk that is full, a plugin that raised."""

    code = 1


class WrongUse(ClframeError):
    """A name, option or combination that clframe refuses. `problems` holds one sentence per mistake."""

    code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(ClframeError):
    """Data, a run folder or a checkpoint is missing, damaged, in use, or refused as untrusted."""

    code = 3


class Interrupted(ClframeError):
    """A signal stopped the run; `signal` is its number. The run can be resumed."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
        self.code = 128 + signal


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`` Did you mean `x`?`` for the choice nearest to `name`, else the list of choices; '' if there are none."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean `{near[0]}`?"
    return f" Choices: {', '.join(known)}." if known else ""
