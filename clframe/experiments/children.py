"""Child processes that carry out cells, as a Dask worker has them: started, given cells, asked to save, ended.

A child (`clframe.experiments.child`) has its threads and its GPU set before torch is imported, and runs one cell after
another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from clframe.experiments.cells import own_code
from clframe.experiments.child import Answer, Place, Work
from clframe.system.texts import cut, escape_unprintable

CHILD = [sys.executable, "-P", "-m", "clframe.experiments.child"]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GPUS = "CUDA_VISIBLE_DEVICES"
LOOK = 0.1  # seconds between two looks at what may have happened
PATIENCE = 10.0  # seconds for a child without work to end


@dataclass(frozen=True)
class Errand:
    """What the children of a study on one Dask worker have in common.

    Attributes:
        token: of the study's process.
        folder: working directory of that process, against which paths are resolved.
        threads: of each child; None: a share of the machine's cores.
    """

    token: str
    folder: str
    threads: int | None = None


@dataclass(frozen=True)
class Share:
    """Part of a machine that a Dask worker has.

    Attributes:
        first: number of its first child there, of those of all workers.
        own: number of its children.
        total: number of children there.
    """

    first: int
    own: int
    total: int


class Child:
    """Child process that carries out one cell after another. Raises `OSError` if it cannot be started."""

    def __init__(self, environment: Mapping[str, str], folder: str | None) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the child
        self.process = subprocess.Popen(
            [*CHILD, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
            cwd=folder,
            env=environment,
            start_new_session=True,  # Ctrl-C at a terminal reaches the parent alone
        )

    def carry_out(
        self, work: Work, asked: Callable[[], bool], report: Callable[[Place], None] = lambda place: None
    ) -> Answer:
        """Give the child a cell and return how that ended.

        Args:
            work: the cell.
            asked: called again and again; once it returns True, the child is asked to save and to stop.
            report: called with how far the cell is.
        """
        pipes = self.process.stdin, self.process.stdout
        assert pipes[0] is not None
        assert pipes[1] is not None
        with contextlib.suppress(OSError):  # its death is noticed below
            rest = (json.dumps(asdict(work)) + "\n").encode()
            while rest:
                rest = rest[pipes[0].write(rest) or 0 :]
        poll = select.poll()
        poll.register(pipes[1], select.POLLIN | select.POLLHUP)
        told, said = False, b""
        while True:
            *lines, said = said.split(b"\n")
            for line in lines:
                document = json.loads(line)
                if "state" in document:
                    return Answer(**document)
                report(Place(**document))
            if not told and asked():
                self.process.send_signal(signal.SIGTERM)
                told = True
            ended = self.process.poll() is not None  # asked first: what was written before is still read
            if poll.poll(LOOK * 1000):
                read = os.read(pipes[1].fileno(), 65536)
                said += read
                if read:
                    continue
                self.process.wait()
                break
            if ended:  # a process that the child left behind holds the pipe
                break
        return Answer("died", self._explain_end())

    def _explain_end(self) -> str:
        """Return how the process ended, and its last words."""
        code = self.process.returncode
        if code < 0:
            number = -code
            how = f"by {signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'}"
            how += ", as the kernel ends processes where memory is short" if number == signal.SIGKILL else ""
        else:
            how = f"with exit code {code}"
        lines = os.pread(self._said.fileno(), 100_000, max(0, os.fstat(self._said.fileno()).st_size - 100_000))
        last = lines.decode(errors="replace").strip().rpartition("\n")[2]
        return f"{how}; its last words: {cut(escape_unprintable(last))}" if last else how

    def leave(self) -> None:
        """Let the process, which has nothing to do, end: outside of a run it has no handler of this signal."""
        self.process.terminate()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def close(self) -> None:
        """Let the process, which has nothing to do, end, and wait for that."""
        self.leave()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.process.kill()
        self.process.wait()
        self._said.close()


class Children:
    """Child processes of one study in one Dask worker, each in a slot of its own: slots decide on threads and GPUs."""

    def __init__(self, errand: Errand) -> None:
        self._errand = errand
        self._lock = threading.Lock()
        self._taken: set[int] = set()
        self._there: dict[int, Child] = {}
        self._closed = False

    def carry_out(self, work: Work, share: Share, asked: Callable[[], bool], report: Callable[[Place], None]) -> Answer:
        """Carry out a cell in a child process, a new one if need be; arguments as of `Child.carry_out`."""
        with self._lock:
            slot = next(number for number in range(len(self._taken) + 1) if number not in self._taken)
            self._taken.add(slot)
            child = self._there.pop(slot, None)
        try:
            if child and child.process.poll() is not None:  # without work for long, or killed
                child.close()
                child = None
            if child is None:
                folder = self._errand.folder if Path(self._errand.folder).is_dir() else None
                child = Child(environment_of_child(share, slot, self._errand.threads), folder)
            with self._lock:
                self._there[slot] = child
            return child.carry_out(work, asked, report)
        except OSError as error:
            return Answer("died", f"before it began: {error.strerror or error}")
        finally:
            with self._lock:
                self._taken.discard(slot)
                unused = self._there.pop(slot, None) if self._closed else None
            if unused:
                unused.close()

    def kill(self) -> None:
        """Kill the processes of all children."""
        with self._lock:
            for child in self._there.values():
                child.process.kill()

    def close(self) -> None:
        """Let all children end: those that have nothing to do now, others when they have saved."""
        with self._lock:
            self._closed = True
            unused = [self._there.pop(slot) for slot in [*self._there] if slot not in self._taken]
        for child in unused:
            child.leave()
        for child in unused:
            child.close()


_children: dict[str, Children] = {}  # by token of the errand
_stopping: set[str] = set()  # tokens of studies whose children should save and stop, also those yet to start
_of_children = threading.Lock()


def serve(work: Work, key: str, errand: Errand, shares: Mapping[str, Share]) -> Answer:
    """Carry out a cell in a child process of the Dask worker in which this is called, and return how that ended.

    Args:
        work: the cell.
        key: of the task. A task that is canceled, as where the study's process is gone, stops its cell.
        errand: what the children of the study have in common.
        shares: by the worker's address.
    """
    from distributed import get_worker

    worker = get_worker()
    with _of_children:
        children = _children.setdefault(errand.token, Children(errand))
    share = shares.get(worker.address) or Share(0, worker.state.nthreads, worker.state.nthreads)

    def asked() -> bool:
        task = worker.state.tasks.get(key)
        return errand.token in _stopping or task is None or task.state == "cancelled"

    def report(place: Place) -> None:
        worker.log_event(errand.token, [work.folder, place.place])

    if asked():
        return Answer("stopped")
    return children.carry_out(work, share, asked, report)


def stop_children(token: str) -> None:
    """Ask the children of a study in this process to save and to stop."""
    _stopping.add(token)


def kill_children(token: str) -> None:
    """Kill the children of a study in this process."""
    _stopping.add(token)
    with _of_children:
        children = _children.get(token)
    if children:
        children.kill()


def end_children(token: str) -> None:
    """Let the children of a study in this process end: those that have nothing to do now, others when they saved."""
    _stopping.add(token)
    with _of_children:
        children = _children.pop(token, None)
    if children:
        children.close()


def environment_of_child(share: Share, slot: int, threads: int | None) -> dict[str, str]:
    """Return the environment of a child: its threads, and one GPU of those that this process may use, if any.

    Args:
        share: what the Dask worker has of the machine.
        slot: number of the child in the worker, from 0.
        threads: of each child; None: a share of the machine's cores.
    """
    count = threads or share_cores(share.total)
    found = {**os.environ, **dict.fromkeys(THREADS, str(count))}
    if gpus := find_gpus():
        found[GPUS] = gpus[(share.first + slot) % len(gpus)]
    return found


def share_cores(children: int) -> int:
    """Return the number of threads of each of so many children on this machine."""
    from loky import cpu_count  # reads the limits of containers, too; here, as the import takes a while

    return max(1, int(cpu_count()) // children)


def find_gpus() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them, without importing torch.

    Where the variable is not set, these are the GPUs that `nvidia-smi` lists; of a GPU that is divided, its parts.
    """
    if GPUS in os.environ:
        given = [name.strip() for name in os.environ[GPUS].split(",")]
        # CUDA reads up to the first entry that names no GPU
        bad = next((k for k, name in enumerate(given) if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", name)), len(given))
        return given[:bad]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found: list[list[str]] = []
    for kind, name in re.findall(r"UUID: ((?:GPU|MIG)-)([^)\s]+)\)", listed):
        if kind == "GPU-":
            found.append([])
        if found:
            found[-1].append(kind + name)
    return [name for gpu in found for name in (gpu[1:] or gpu)]


def code_here() -> dict[str, str]:
    """Return the SHA-256 of the modules of clframe that take part in a study, by name."""
    own = {
        f"clframe.experiments.{file.stem}": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(Path(__file__).parent.glob("*.py"))
    }
    return {**own_code(), **own}
