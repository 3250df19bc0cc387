"""The signals that ask a process to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noting(note: Callable[[int], None]) -> Iterator[None]:
    """Inside, call `note` with the number of a signal that asks the process to end, in place of its handler.

    Only the main thread receives signals: in others, nothing changes.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        note(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending_signals() -> list[signal.Signals]:
    """Return the signals that ask a process to end; without SIGHUP where it is ignored, as under `nohup`."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    hang_up: signal.Signals | None = getattr(signal, "SIGHUP", None)  # which Windows lacks
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        numbers.append(hang_up)
    return numbers
