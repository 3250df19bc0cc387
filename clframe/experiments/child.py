"""Child process of an engine: it carries out one cell after another in its main thread, so that signals save them.

    python -P -m clframe.experiments.child PARENT

PARENT is the process number of its parent. Requests come on standard input and answers go to standard output, one JSON
document a line: `Work` in one direction; in the other each `Place` that the run reaches, and then an `Answer`. Whatever
else the process prints goes to standard error. A process whose parent is gone saves the run under way, and ends.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clframe.errors import ClframeError, DataError, Interrupted, out_of_memory
from clframe.system.memory import reset_peak_memory

if TYPE_CHECKING:
    from clframe.events import Event, Listener

IDLE = 60.0  # seconds without a request, after which the process ends
LOOK = 0.3  # seconds between two looks at the parent
PATIENCE = 15.0  # seconds to wait for a process of a killed study that still saves the same run


@dataclass(frozen=True)
class Work:
    """Cell as a child process gets it.

    Attributes:
        folder: the run folder.
        config: the cell's configuration as YAML.
        code: SHA-256 of each module that the cell should use, by name.
    """

    folder: str
    config: str
    code: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """End of an attempt at a cell.

    Attributes:
        state: `finished`; `failed`, for good; `stopped`, saved on request; `died`, as its process ended.
        text: a sentence, or how a process died; empty of a cell that is finished.
        full: the disk is full or cannot be written, which other cells would meet, too.
    """

    state: Literal["finished", "failed", "stopped", "died"]
    text: str = ""
    full: bool = False


@dataclass(frozen=True)
class Place:
    """How far a cell is: `place` is a phrase, such as ``experience 2 of 5``."""

    place: str


def attempt(work: Work, report: Callable[[Place], None] = lambda place: None) -> Answer:
    """Carry out a cell in this process, from its checkpoint if it has one; errors of the run are in the answer.

    Args:
        work: the cell.
        report: called when an experience begins.
    """
    from clframe.experiments.cells import carry_out, of_full_disk  # here, when the parent is watched already

    folder = Path(work.folder)
    try:
        if not folder.parent.is_dir():
            raise DataError(
                f"There is no folder {folder.parent.absolute()} on {os.uname().nodename}: a cluster needs a file "
                "system that all of its machines share."
            )
        _wait_for(folder)
        _check_code(work)
        carry_out(folder, work.config, [_report_experiences(report)])
    except Interrupted as error:
        return Answer("stopped", str(error))
    except ClframeError as error:
        return Answer("failed", " ".join(str(error).split("\n")), of_full_disk(error))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        cause = "Out of memory before the run began" if out_of_memory(error) else "A bug of clframe, please report it"
        return Answer("failed", f"{cause}: {text}", of_full_disk(error))
    return Answer("finished")


def _report_experiences(report: Callable[[Place], None]) -> Listener:
    """Return a listener of a run that reports each experience that begins."""
    count = 0

    def listen(event: Event) -> None:
        nonlocal count
        if event["kind"] == "start":
            count = event["n_experiences"]
        elif event["kind"] == "experience":
            report(Place(f"experience {event['index'] + 1} of {count}"))

    return listen


def _wait_for(folder: Path) -> None:
    """Wait a while until no other process works on the run folder; a run that is then still locked is refused later."""
    import filelock

    from clframe.runs.files import LOCK

    lock = folder / LOCK
    if lock.exists():
        with suppress(filelock.Timeout, OSError), filelock.FileLock(lock, timeout=PATIENCE):
            pass


def _check_code(work: Work) -> None:
    """Raise `DataError` if the files of the modules that a cell uses are not those for which it was planned."""
    from clframe.experiments.cells import code_of
    from clframe.settings import Config
    from clframe.strict_yaml import parse_yaml

    here = code_of(Config.model_validate(parse_yaml(work.config, f"the configuration of {work.folder}")))
    names = sorted({*work.code, *here})
    if changed := [f"`{name}`" for name in names if work.code.get(name) != here.get(name)]:
        raise DataError(
            f"The code on {os.uname().nodename} is not the code with which the study began: {', '.join(changed[:5])} "
            "changed; give the same command again."
        )


class Parent:
    """Process at the other end of the pipes, watched by a thread.

    Args:
        number: of the process.
        requests: descriptor from which requests are read.
        answers: descriptor to which answers are written.
    """

    def __init__(self, number: int, requests: int, answers: int) -> None:
        self._number = number
        self._from = requests
        self._to = answers
        self._waiting: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._busy = False
        self._gone = False
        threading.Thread(target=self._watch, name="parent", daemon=True).start()

    def next_request(self) -> Work | None:
        """Return the next request when it comes; None if the parent is gone, or asks for nothing for a long time."""
        with self._lock:
            self._busy = False
        with suppress(queue.Empty):
            work = self._waiting.get(timeout=IDLE)
            with self._lock:
                self._busy = True
                return None if self._gone else work
        return None

    def send(self, message: Answer | Place) -> None:
        """Send the answer to the last request, or how far its cell is, unless the parent is gone."""
        rest = (json.dumps(asdict(message)) + "\n").encode()
        with suppress(OSError):
            while rest:
                rest = rest[os.write(self._to, rest) :]

    def _watch(self) -> None:
        """Read requests until the parent is gone: its end of the pipe is closed, or this process has another parent.

        A parent that is stopped, as by Ctrl-Z, is not gone.
        """
        unread = b""
        while os.getppid() == self._number:
            if not select.select([self._from], [], [], LOOK)[0]:
                continue
            read = os.read(self._from, 65536)
            if not read:
                break
            *lines, unread = (unread + read).split(b"\n")
            for line in lines:
                self._waiting.put(Work(**json.loads(line)))
        with self._lock:
            self._gone = True
            if self._busy:  # outside of a run, where no handler is set, the process ends at once
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        self._waiting.put(None)


def take_pipes() -> tuple[int, int]:
    """Return descriptors of standard input and output that no other process inherits.

    Standard input is empty afterwards, and standard output goes to standard error: what the run prints, and processes
    that it starts, cannot come between requests and answers.
    """
    sys.stdout.flush()
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def forget_print() -> None:
    """Empty the file to which this process prints, which otherwise grows over all of its cells."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    with suppress(OSError):  # not a file
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)


def main() -> None:
    """Carry out the requests of the parent until there are no more."""
    parent = Parent(int(sys.argv[1]), *take_pipes())
    while work := parent.next_request():
        forget_print()
        reset_peak_memory()
        parent.send(attempt(work, parent.send))
    os._exit(0)  # what a run writes is written; the interpreter would take seconds to free what torch holds


if __name__ == "__main__":
    main()
