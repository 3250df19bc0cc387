"""Torch's global switches and generators, which belong to one run at a time and to the user before and after it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from clframe.errors import UsageError

WRITERS = "tensorboard.summary.writer.event_file_writer"  # the module of the threads that write event files


class _Turn:
    """The locks of torch's global generator: one for the thread of a run, one for loading a model."""

    def __init__(self) -> None:
        self.run = threading.Lock()
        self.load = threading.RLock()
        self.owner: threading.Thread | None = None


_turn = _Turn()
if hasattr(os, "register_at_fork"):  # a child process has the locks as they were, and none of the threads
    os.register_at_fork(after_in_child=_turn.__init__)  # type: ignore[misc]


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this is the only run of the process.

    Raises:
        UsageError: if another one is under way, in whichever thread: the two would draw from one generator.
    """
    with _turn.load:  # a model that is being loaded is loaded first: that takes a moment
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
    """Inside, no other thread begins a run; the thread of a run may come here, such as in a listener.

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
    """Inside, a thread of TensorBoard's writer that fails prints no traceback: the next write raises its error."""
    before = threading.excepthook

    def told(failed: threading.ExceptHookArgs) -> None:
        if type(failed.thread).__module__ != WRITERS:
            before(failed)

    threading.excepthook = told
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Inside, torch computes as it does by default, whatever the user has switched: with gradients, in float32."""
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
