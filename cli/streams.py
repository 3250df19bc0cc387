"""Standard streams and signals of a command: a closed pipe, a closed stream, a request to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any


class Watched:
    """A standard stream that remembers in ``broken`` that its reader went away; failures of messages may be ignored.

    Args:
        stream: the stream to write to; after its first failure, the null device.
        forgiven: a failure raises nothing.
    """

    def __init__(self, stream: Any, *, forgiven: bool) -> None:
        self._stream = stream
        self._forgiven = forgiven
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`; return its length."""
        with self._watching():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._watching():
            self._stream.flush()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: it was closed, or cannot hold a character
            self.broken = self.broken or isinstance(error, BrokenPipeError)
            silence(self._stream)
            if not self._forgiven:
                raise


def silence(stream: Any) -> None:
    """Redirect the descriptor of `stream` to the null device, so that buffered text does not fail again at exit."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextmanager
def guard_streams() -> Iterator[Watched]:
    """Keep both standard streams open and writable for every character; a broken standard error raises nothing.

    Yields standard output, whose ``broken`` says that its reader went away, such as `head` at the end of a pipe.
    """
    with suppress(OSError):  # else a file of the run would get the number of a closed standard stream
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
    before = sys.stdout, sys.stderr
    null = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    out = sys.stdout or null
    messages = sys.stderr or null
    if hasattr(out, "reconfigure") and out.errors == "strict":
        out.reconfigure(errors="backslashreplace")
    watched = Watched(out, forgiven=False)
    sys.stdout, sys.stderr = watched, Watched(messages, forgiven=True)
    try:
        yield watched
    finally:
        sys.stdout, sys.stderr = before
        null.close()


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does; the list holds the numbers that came."""
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came  # only the main thread can handle signals
        return
    numbers = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    # an ignored signal, such as SIGHUP under `nohup`, stays ignored
    before = {number: signal.getsignal(number) for number in numbers}
    numbers = [number for number in numbers if before[number] == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number in numbers:
            signal.signal(number, before[number])
