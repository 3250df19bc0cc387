"""Torch's global switches and generators, which belong to one run at a time, and to the user otherwise."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from clframe.errors import UsageError

WRITERS = "tensorboard.summary.writer.event_file_writer"  # module of the threads that write event files


class _Turn:
    """Locks of torch's global generator: one for the thread of a run, one for loading a model."""

    def __init__(self) -> None:
        self.run = threading.Lock()
        self.load = threading.RLock()
        self.owner: threading.Thread | None = None


_turn = _Turn()
if hasattr(os, "register_at_fork"):  # a child process inherits the locks in their states, and none of the threads
    os.register_at_fork(after_in_child=_turn.__init__)  # type: ignore[misc]


@contextmanager
def alone() -> Iterator[None]:
    """Reserve the process for one run.

    Raises:
        UsageError: if another run is under way, in any thread: the two would draw from one generator.
    """
    with _turn.load:  # wait for a model that is being loaded, which takes a moment
        free = _turn.run.acquire(blocking=False)
    if not free:
        raise UsageError(
            f"Another run of this process is under way ({_where()}), and torch's global random generator serves one "
            "at a time: begin this one when that has ended, or in a process of its own "
            "(`concurrent.futures.ProcessPoolExecutor`)."
        )
    _turn.owner = threading.current_thread()
    try:
        yield
    finally:
        _turn.owner = None
        _turn.run.release()


@contextmanager
def beside_no_run() -> Iterator[None]:
    """Let no other thread begin a run; the thread of a run may enter, such as in a listener.

    Raises:
        UsageError: if another thread's run is under way.
    """
    with _turn.load:
        if _turn.owner not in (None, threading.current_thread()):
            raise UsageError(
                f"A run of this process is under way ({_where()}), and torch's global random generator serves one at "
                "a time: load the model before or after it, or in a process of its own."
            )
        yield


def _where() -> str:
    owner = _turn.owner
    if owner is threading.current_thread():
        return "this is called from within it"
    return f"in the thread `{owner.name}`" if owner else "in another thread"


@contextmanager
def quiet_writers() -> Iterator[None]:
    """Let failing threads of TensorBoard's writer print no traceback: the next write raises the error."""
    before = threading.excepthook

    def report(failed: threading.ExceptHookArgs) -> None:
        if type(failed.thread).__module__ != WRITERS:
            before(failed)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Let torch compute as by default, with gradients and in float32, regardless of the user's switches."""
    dtype, place = torch.get_default_dtype(), torch.get_default_device()
    with ExitStack() as switched:
        switched.enter_context(torch.inference_mode(False))
        switched.enter_context(torch.enable_grad())
        switched.enter_context(torch.autocast(device.type, enabled=False))
        if place.type != "cpu":
            switched.enter_context(torch.device("cpu"))
        switched.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
