"""Engines: the cells of a study run in this process, in child processes, or in child processes on a Dask cluster.

Each thread of a Dask worker gives one cell at a time to a child process (`clframe.experiments.children`). The process
of the study counts the deaths of children, and begins no cell after a signal or once the disk is full.
"""

from __future__ import annotations

import contextlib
import queue
import re
import signal
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from clframe.config import to_yaml
from clframe.errors import DataError, Interrupted, UsageError, did_you_mean
from clframe.experiments import cells as on_disk
from clframe.experiments.cells import MOST_DEATHS, Cell, CellEvent, of_full_disk, run_inline, state_of
from clframe.experiments.child import Answer, Work
from clframe.experiments.children import serve
from clframe.runs.files import CONFIG
from clframe.system.signals import noting
from clframe.system.texts import quote

if TYPE_CHECKING:
    from distributed import Client, Future

    from clframe.experiments.cluster import Cluster

ENGINES = ("inline", "local", "dask:ADDRESS")
LOOK = 0.1  # seconds between two looks at what may have happened


def run_cells(cells: Sequence[Cell], engine: str, workers: int, tell: Callable[[CellEvent], None]) -> None:
    """Carry out `cells`; their records and folders hold what became of them.

    Args:
        cells: those that are not finished, in the order in which they begin.
        engine: `inline`, in this process; `local`, in `workers` child processes; `dask:ADDRESS`, on a cluster that
            was started by hand and shares this machine's file system.
        workers: number of child processes of the engine `local`.
        tell: called in this thread with each event.

    Raises:
        UsageError: if there is no such engine.
        DataError: if the disk is full or cannot be written; if no Dask scheduler answers at the address, its workers
            have other code, or it goes away.
        Interrupted: after SIGINT, SIGTERM or SIGHUP; cells under way are saved.
        KeyboardInterrupt: after a second SIGINT; the processes of cells under way are killed.
    """
    with open_engine(engine, workers, tell) as carry_out:
        carry_out(cells)


@contextlib.contextmanager
def open_engine(
    engine: str, workers: int, tell: Callable[[CellEvent], None]
) -> Iterator[Callable[[Sequence[Cell]], None]]:
    """Yield a function that carries out cells, in processes that stay between its calls; arguments as of `run_cells`.

    Processes begin with the first cells.

    Raises:
        UsageError: if there is no such engine; the function raises as `run_cells`.
    """
    address = read_engine(engine)
    with contextlib.ExitStack() as stack:
        found: list[Cluster] = []

        def carry_out(cells: Sequence[Cell]) -> None:
            if engine == "inline":
                run_inline(cells, tell)
                return
            if not cells:
                return
            if not found:
                from clframe.experiments import cluster

                found.append(
                    stack.enter_context(cluster.local(workers) if address is None else cluster.remote(address))
                )
            _Course(found[0], cells, tell).run()

        yield carry_out


def read_engine(engine: str) -> str | None:
    """Return the address of the Dask scheduler that `engine` names; None for `inline` and `local`.

    Raises:
        UsageError: if there is no such engine, or the address has another protocol than ``tcp://`` or ``tls://``.
    """
    if engine in ("inline", "local"):
        return None
    kind, _, address = engine.partition(":")
    if kind != "dask" or not address:
        hint = did_you_mean(engine, ENGINES)
        raise UsageError(f"There is no engine {quote(engine)}.{hint}")
    protocol, found, rest = address.rpartition("://")
    protocol = protocol if found else "tcp"
    if protocol not in ("tcp", "tls") or not re.fullmatch(r"[^\s/@]+:\d{1,5}", rest):
        raise UsageError(
            f"{quote(address)} is not the address of a Dask scheduler; such an address is `tcp://HOST:PORT` or "
            "`tls://HOST:PORT`."
        )
    return f"{protocol}://{rest}"


def check_device(device: object, engine: str) -> None:
    """Raise `UsageError` if child processes of `engine`, each of which has one GPU, lack the GPU that cells name."""
    found = re.fullmatch(r"cuda:0*([1-9]\d*)", str(device))
    if found and engine != "inline":
        raise UsageError(
            f"`run.device` is `{device}`, and each worker of a study has one GPU of its own, which is `cuda` there: "
            f"set `run.device=cuda`, and `CUDA_VISIBLE_DEVICES={found[1]}` before the command if it should be that GPU."
        )


class _Course:
    """Cells that are carried out on a cluster: as many at a time as it has threads, each of them until it ends.

    Args:
        cluster: where the cells run.
        cells: in the order in which they begin.
        tell: called with each event.
    """

    def __init__(self, cluster: Cluster, cells: Sequence[Cell], tell: Callable[[CellEvent], None]) -> None:
        self._cluster = cluster
        self._client: Client = cluster.client
        self._tell = tell
        self._waiting = deque(cells)
        self._running: dict[Future, Cell] = {}
        self._ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._signals: list[int] = []
        self._full = ""  # what the disk refused
        self._told_to_wait = False

    def run(self) -> None:
        """Carry out the cells. Raises as `run_cells`."""
        asked = False
        with noting(self._note):
            try:
                while self._running or (self._waiting and not self._signals and not self._full):
                    if self._signals and not asked:
                        self._cluster.stop()
                        asked = True
                    self._begin_cells()
                    with contextlib.suppress(queue.Empty):
                        self._end_attempt(self._ended.get(timeout=LOOK))
                    self._tell_places()
            except BaseException:
                self._cluster.kill()
                raise
        if self._signals:
            name = signal.Signals(self._signals[0]).name
            raise Interrupted(f"Stopped by {name}; the cells under way are saved.", self._signals[0])
        if self._full:
            raise DataError(f"No further cell is begun, as the disk refused a file: {self._full}")

    def _note(self, number: int) -> None:
        self._signals.append(number)
        if number == signal.SIGINT and len(self._signals) > 1:
            raise KeyboardInterrupt

    def _begin_cells(self) -> None:
        """Begin as many cells as the cluster has threads for."""
        while self._waiting and not self._signals and not self._full:
            slots = sum(share.own for share in self._cluster.shares().values())
            if not slots and not self._told_to_wait:
                self._tell(CellEvent("message", text="The Dask cluster has no workers yet: the study waits for them."))
                self._told_to_wait = True
            if len(self._running) >= slots:
                return
            cell = self._waiting.popleft()
            went_on = (cell.folder / CONFIG).is_file()
            with self._noticing_full_disk():
                on_disk.begin(cell)
                self._tell(CellEvent("went on" if went_on else "began", cell))
                self._submit(cell)

    def _submit(self, cell: Cell) -> None:
        """Give a cell to the cluster."""
        work = Work(str(cell.folder), to_yaml(cell.config), dict(cell.code))
        key = f"clframe-{cell.folder.name}-{uuid.uuid4().hex}"
        future = self._client.submit(serve, work, key, self._cluster.errand, self._cluster.shares(), key=key)
        self._running[future] = cell
        future.add_done_callback(self._ended.put)

    def _tell_places(self) -> None:
        """Tell how far cells are that are still under way."""
        running = {str(cell.folder): cell for cell in self._running.values()}
        with contextlib.suppress(queue.Empty):
            while True:
                folder, place = self._cluster.places.get_nowait()
                if folder in running:
                    self._tell(CellEvent("progress", running[folder], place))

    def _end_attempt(self, future: Future) -> None:
        """Record how an attempt at a cell ended; a cell whose process died is given to the cluster again."""
        cell = self._running.pop(future)
        answer = self._cluster.answer_of(future)
        if answer.state == "stopped" and not self._signals:  # a signal from elsewhere
            answer = Answer("died", "on a signal")
        if answer.state == "died":
            answer = self._count(cell, answer)
        if answer.state == "failed":
            with self._noticing_full_disk():
                on_disk.fail(cell, answer.text)
            if answer.full:
                self._full = answer.text
        if answer.state != "died":
            self._tell(CellEvent(answer.state, cell, answer.text if answer.state == "failed" else ""))

    def _count(self, cell: Cell, answer: Answer) -> Answer:
        """Count the death of a cell's process; return `answer` for a cell that goes on, else how the cell ended."""
        if state_of(cell.folder) == "finished":
            return Answer("finished")
        deaths = 0
        if not self._signals:
            with self._noticing_full_disk():
                deaths = on_disk.count_death(cell)
        if self._signals or self._full:
            return Answer("stopped")
        if deaths >= MOST_DEATHS:
            sentence = (
                f"Its process ended {deaths} times in a row without a new checkpoint, the last time {answer.text}."
            )
            return Answer("failed", sentence)
        self._tell(CellEvent("message", cell, f"The process of {cell.identity} ended {answer.text}; the cell goes on."))
        self._submit(cell)
        return answer

    @contextlib.contextmanager
    def _noticing_full_disk(self) -> Iterator[None]:
        """Note what the disk refuses in the block, so that no further cell is begun."""
        try:
            yield
        except (OSError, DataError) as error:
            if not of_full_disk(error):
                raise
            self._full = self._full or " ".join(str(error).split("\n"))
