"""Dask clusters on which the cells of a study run: one inside this process, and one that was started by hand."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Future, KilledWorker, Scheduler, Security, SpecCluster, Worker
from distributed.core import rpc

from clframe.errors import DataError
from clframe.experiments.child import Answer
from clframe.experiments.children import (
    Errand,
    Share,
    code_here,
    end_children,
    kill_children,
    share_cores,
    stop_children,
)
from clframe.system.texts import cut

PATIENCE = 6.0  # seconds for a scheduler to answer
RENEWAL = 2.0  # seconds after which the workers of a cluster are counted again


class Cluster:
    """Client of a Dask scheduler, for one study.

    Args:
        client: of the scheduler.
        errand: what the children of the study have in common.
        address: of the scheduler; None of one in this process.

    Attributes:
        places: folders of cells, each with a phrase on how far the cell is, as children report it.
    """

    def __init__(self, client: Client, errand: Errand, address: str | None) -> None:
        self.client = client
        self.errand = errand
        self._address = address
        self._shares: dict[str, Share] = {}
        self._counted = -RENEWAL
        self.places: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        client.subscribe_topic(errand.token, lambda event: self.places.put(tuple(event[1])))

    def shares(self) -> dict[str, Share]:
        """Return what each worker has of its machine, by address. Raises `DataError` if the scheduler is gone."""
        if not self._shares or (self._address and time.monotonic() - self._counted > RENEWAL):
            try:
                threads = self.client.nthreads()
            except Exception as error:
                raise self.lost() from error
            self._shares = share_out(threads)
            self._counted = time.monotonic()
        return self._shares

    def lost(self) -> DataError:
        """Return the error of a scheduler that is gone."""
        return DataError(
            f"The Dask scheduler at {self._address} is gone; start it and its workers again, and give the same "
            "command, which goes on with the study."
        )

    def answer_of(self, future: Future) -> Answer:
        """Return how an attempt at a cell ended. Raises `DataError` if the scheduler is gone."""
        if future.status in ("cancelled", "lost"):
            raise self.lost()
        try:
            answer: Answer = future.result()
        except KilledWorker as error:
            return Answer(
                "died", f"with {error.allowed_failures + 1} Dask workers in turn, the last {error.last_worker}"
            )
        return answer

    def stop(self) -> None:
        """Ask all children to save and to stop."""
        self._everywhere(stop_children)

    def kill(self) -> None:
        """Kill the children in this process; elsewhere, ask them to save and to stop, as this one does not wait."""
        self._everywhere(stop_children if self._address else kill_children, 1.0)

    def end(self) -> None:
        """Let all children end."""
        self._everywhere(end_children, 5.0)

    def _everywhere(self, function: Callable[[str], None], wait: float = 0.0) -> None:
        """Call `function` with the token in each process that has children; wait some seconds for other processes.

        Such a process may be lost, so that it never answers.
        """
        if self._address is None:
            function(self.errand.token)
            return

        def call() -> None:
            with suppress(Exception):  # of a scheduler or worker that is gone
                self.client.run(function, self.errand.token, on_error="ignore")

        thread = threading.Thread(target=call, name=function.__name__, daemon=True)
        thread.start()
        thread.join(wait)


def share_out(threads: dict[str, int]) -> dict[str, Share]:
    """Return the share of each worker in its machine, by address, given the number of its threads."""
    machines: dict[str, list[str]] = {}
    for address in threads:
        machines.setdefault(address.rpartition(":")[0], []).append(address)
    found = {}
    for addresses in machines.values():
        first = 0
        for address in addresses:
            found[address] = Share(first, threads[address], sum(threads[other] for other in addresses))
            first += threads[address]
    return found


class _QuietScheduler(Scheduler):  # type: ignore[misc]
    """Scheduler that listens nowhere: without this, its HTTP server listens on all networks, dashboard or not."""

    def start_http_server(self, *args: Any, **kwargs: Any) -> None:
        """Start nothing."""


class _QuietWorker(Worker):  # type: ignore[misc]
    """Worker that listens nowhere."""

    def start_http_server(self, *args: Any, **kwargs: Any) -> None:
        """Start nothing."""


@contextmanager
def local(workers: int) -> Iterator[Cluster]:
    """Yield a cluster inside this process, whose worker has `workers` threads; it listens nowhere."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = share_cores(workers)
    if given.isdecimal() and int(given):
        threads = min(threads, int(given))
    inside = {"protocol": "inproc://", "dashboard": False}
    worker = {**inside, "nthreads": workers, "memory_limit": 0}
    # a process that is stopped for minutes, as by Ctrl-Z, hears no heartbeat of its own worker meanwhile
    with quiet(), dask.config.set({"distributed.scheduler.worker-ttl": None}):
        cluster = SpecCluster(
            scheduler={"cls": _QuietScheduler, "options": inside},
            workers={0: {"cls": _QuietWorker, "options": worker}},
            silence_logs=False,
        )
        with cluster, Client(cluster, set_as_default=False) as client:
            found = Cluster(client, Errand(uuid.uuid4().hex, str(Path.cwd()), threads), None)
            try:
                yield found
            finally:
                found.end()


@contextmanager
def remote(address: str) -> Iterator[Cluster]:
    """Yield the cluster whose scheduler is at `address`; its security is that of Dask's configuration.

    Raises:
        DataError: if no Dask scheduler answers there, or workers have other code.
    """
    with quiet():
        identify(address)
        try:
            client = Client(address, timeout=PATIENCE, set_as_default=False)
        except Exception as error:
            raise DataError(f"No Dask scheduler answers at {address}{_reason(error)}: start one there.") from error
        try:
            found = Cluster(client, Errand(uuid.uuid4().hex, str(Path.cwd())), address)
            check_code(found, address)
            try:
                yield found
            finally:
                found.end()
        finally:
            client.close(timeout=2)


def identify(address: str) -> None:
    """Raise `DataError` unless a Dask scheduler answers at `address` soon."""
    arguments = Security().get_connection_args("client")
    if address.startswith("tls:") and arguments.get("ssl_context") is None:
        raise DataError(
            f"{address} needs certificates, and Dask's configuration names none: set `ca-file`, `client.cert` and "
            "`client.key` of `distributed.comm.tls` there, or DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ...__CLIENT__CERT "
            "and ...__CLIENT__KEY in the environment."
        )

    async def ask() -> Any:
        async with asyncio.timeout(PATIENCE):
            server = rpc(address, connection_args=arguments, timeout=PATIENCE)
            try:
                return await server.identity()
            finally:
                await server.close_rpc()

    answers: list[Any] = []

    def call() -> None:
        try:
            answers.append(asyncio.run(ask()))
        except BaseException as error:  # what is not Dask may answer anything
            answers.append(error)

    thread = threading.Thread(target=call, name="identify", daemon=True)  # may hang in a lookup of the name
    thread.start()
    thread.join(PATIENCE + 2)
    answer = answers[0] if answers else TimeoutError()
    kind = answer.get("type") if isinstance(answer, dict) else None
    if kind == "Scheduler":
        return
    if kind:
        raise DataError(f"At {address} there is a Dask {kind}, not a scheduler; give the scheduler's address.")
    reason = _reason(answer) if isinstance(answer, BaseException) else ""
    raise DataError(f"No Dask scheduler answers at {address}{reason}: start one there, or give its address.")


def _reason(error: BaseException) -> str:
    """Return the text of an error in brackets, after a space; empty if that says only that time ran out."""
    text = " ".join(str(error).split()).rstrip(".")
    return f" ({cut(text)})" if text and not isinstance(error, TimeoutError) else ""


def check_code(cluster: Cluster, address: str) -> None:
    """Raise `DataError` if a worker lacks clframe, or has other files of clframe than this process."""
    here = code_here()
    found: dict[str, Any] = cluster.client.run(code_here, on_error="return")
    for worker, there in found.items():
        if isinstance(there, BaseException):
            problem = f"cannot load clframe ({cut(' '.join(str(there).split()))})"
        elif changed := [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]:
            problem = f"has other code of clframe (`{changed[0]}`" + (
                f" and {len(changed) - 1} more)" if len(changed) > 1 else ")"
            )
        else:
            continue
        raise DataError(
            f"The worker {worker} of the Dask cluster at {address} {problem}: install the clframe of this machine "
            "there, and start the worker again."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Dask's log and its warnings on versions off the terminal while the block lasts."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in ("distributed", "tornado")]
    before = {name: logging.getLogger(name).level for name in {*names, "distributed", "tornado"}}
    try:
        for name in before:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="distributed")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
