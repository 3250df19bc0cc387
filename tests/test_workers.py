"""Engines of a study: child processes that die, print, save and end, and a Dask cluster that was started by hand."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import filelock
import psutil
import pytest
from rich.console import Console

import clframe
from clframe.cli.main import main
from clframe.cli.study_live import StudyLive
from clframe.config import resolve, to_yaml
from clframe.errors import DataError, Interrupted, UsageError
from clframe.experiments import children
from clframe.experiments.cells import Cell, CellEvent, code_of, read_record, record_path, settings_of, state_of
from clframe.experiments.child import Place, Work, attempt
from clframe.experiments.children import Share, environment_of_child, find_gpus
from clframe.experiments.workers import check_device, read_engine, run_cells
from clframe.system import writing

TRAIN = {"iterations": 3, "threads": 1}
RUN = {"tensorboard": False, "device": "cpu"}

# A child with the real pipes and the real watch of its parent, and a stand-in for the run: what a cell does is in the
# name of its folder. The stand-in imports no torch, so that a test can start many.
CHILD = """
import json, os, signal, subprocess, sys, time, warnings
from pathlib import Path
from clframe.experiments import child

def attempt(work, report):
    folder = Path(work.folder)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    deed = folder.name.partition("-")[0]
    environment = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    with (folder.parent / "log").open("a") as log:
        log.write(json.dumps([deed, os.getpid(), os.getsid(0), "torch" in sys.modules, environment]) + "\\n")
    before = len(list((folder / "checkpoints").iterdir()))
    if deed == "chats":
        os.write(1, b'{"state": "failed", "text": "printed"}\\n' * 5000)
        print("printed")
        subprocess.run(["sh", "-c", "cat; echo printed; echo printed >&2"], timeout=20)
    elif deed == "fails":
        return child.Answer("failed", "Its sentence.")
    elif deed == "full":
        return child.Answer("failed", "No space left on device.", True)
    elif deed == "dies":
        warnings.simplefilter("ignore")  # Python 3.12 says that a process with threads forks
        print("its last words", file=sys.stderr, flush=True)
        if os.fork() == 0:  # a process that holds the pipe longer than the child
            time.sleep(5)
            os._exit(0)
        os.abort()
    elif deed == "advances" and before < 3:
        (folder / "checkpoints" / f"{before + 1:06}").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "reports":
        report(child.Place("experience 1 of 2"))
        while not (folder / "seen").exists():
            time.sleep(0.01)
    elif deed == "saves" and not (folder / "saved").exists():
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        (folder / "running").write_text(str(os.getpid()))
        while not asked:
            time.sleep(0.01)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        (folder / "saved").touch()
        return child.Answer("stopped", "Stopped.")
    elif deed == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / "running").write_text(str(os.getpid()))
        time.sleep(60)
    (folder / "results.json").touch()
    return child.Answer("finished")

child.attempt = attempt
child.main()
"""


def cell(folder: Path, *, seed: int = 0, plugins: tuple[str, ...] = (), **train: object) -> Cell:
    config = resolve(
        scenario={"name": "split-digits", "limit": 10},
        plugins=plugins,
        train=TRAIN | train,
        run=RUN | {"seed": seed, "output": str(folder)},
    )
    return Cell(folder.name, "split-digits", seed, None, config, settings_of(config), code_of(config), "", folder)


@pytest.fixture
def deeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Cell]]:
    """`deeds("fails", "dies")`: one cell for each, to be carried out by children that do so."""
    monkeypatch.setattr(children, "CHILD", [sys.executable, "-P", "-c", CHILD])
    config = resolve(scenario="split-digits", run={"output": str(tmp_path)})

    def build(*names: str) -> list[Cell]:
        folders = [tmp_path / "cells" / f"{name}-{i}" for i, name in enumerate(names)]
        return [Cell(f.name, "split-digits", 0, None, config, "", {}, "", f) for f in folders]

    return build


def log_of(cells: list[Cell]) -> list[list]:
    return [json.loads(line) for line in (cells[0].folder.parent / "log").read_text().splitlines()]


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_deaths_are_counted_and_the_study_goes_on(deeds: Callable[..., list[Cell]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    cells = deeds("chats", "fails", "dies", "advances", "fine", "chats")
    told: list[CellEvent] = []
    listening: list[object] = []

    def tell(event: CellEvent) -> None:
        told.append(event)
        assert threading.current_thread() is threading.main_thread()
        listening.extend(c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN)

    before = set(listening)
    run_cells(cells, "local", 1, tell)
    assert not before
    assert not listening  # the cluster in this process has no port
    log = log_of(cells)
    assert [deed for deed, *_ in log] == ["chats", "fails", *["dies"] * 3, *["advances"] * 4, "fine", "chats"]
    pids = [pid for _, pid, *_ in log]
    assert pids[0] == pids[1] == pids[2]  # one child, until it died
    assert pids[8] == pids[9] == pids[10]
    assert len(set(pids)) == 7
    assert all(session == pid for _, pid, session, *_ in log)  # no Ctrl-C of the terminal reaches a child
    assert all(rest == [False, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "3"}] for _, _, _, *rest in log)
    ends = {c: [e.text for e in told if e.cell is c and e.kind == "failed"] for c in cells}
    assert [len(ends[c]) for c in cells] == [0, 1, 1, 0, 0, 0]
    assert ends[cells[1]] == ["Its sentence."]
    assert ends[cells[2]] == [
        "Its process ended 3 times in a row without a new checkpoint, the last time by SIGABRT; its last words: its "
        "last words."
    ]
    assert [e.kind for e in told if e.cell is cells[3]] == ["began", "message", "message", "message", "finished"]
    assert "by SIGKILL, as the kernel ends processes where memory is short; the cell goes on." in next(
        e.text for e in told if e.cell is cells[3] and e.text
    )
    records = [read_record(record_path(c.folder)) for c in cells]
    assert [r.deaths for r in records] == [0, 0, 3, 1, 0, 0]
    assert [bool(r.failure) for r in records] == [False, True, True, False, False, False]
    assert [state_of(c.folder) for c in cells] == ["finished", "failed", "failed", "finished", "finished", "finished"]
    assert not [p for p in psutil.Process().children(recursive=True) if p.pid in pids]


def interrupt(when: Callable[[], object], *times: float) -> threading.Thread:
    """Send SIGINT to this process once something holds, and again after each number of seconds."""

    def call() -> None:
        wait_until(when)
        os.kill(os.getpid(), signal.SIGINT)
        for seconds in times:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_a_record_that_finds_no_room_ends_the_study_when_the_cells_under_way_have_ended(
    deeds: Callable[..., list[Cell]], monkeypatch: pytest.MonkeyPatch
):
    chats, late = deeds("chats", "late")
    write = writing.write_text

    def refuse(path: Path, text: str) -> None:
        if path == record_path(late.folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, text)

    monkeypatch.setattr(writing, "write_text", refuse)
    with pytest.raises(DataError, match=f"No further cell is begun.*{record_path(late.folder).name}.*make room"):
        run_cells([chats, late], "local", 2, lambda event: None)
    assert [state_of(one.folder) for one in (chats, late)] == ["finished", "waiting"]


def test_a_signal_saves_a_second_one_kills_and_a_full_disk_ends_the_study(deeds: Callable[..., list[Cell]]):
    cells = deeds("saves", "saves", "fine")
    told: list[CellEvent] = []
    thread = interrupt(lambda: all((c.folder / "running").exists() for c in cells[:2]))
    with pytest.raises(Interrupted, match="Stopped by SIGINT; the cells under way are saved") as error:
        run_cells(cells, "local", 2, told.append)
    thread.join()
    assert error.value.code == 130
    assert [(e.kind, e.text) for e in told if e.cell in cells[:2]] == [("began", "")] * 2 + [("stopped", "")] * 2
    assert [(c.folder / "saved").exists() for c in cells] == [True, True, False]
    assert not record_path(cells[2].folder).exists()  # not begun
    assert {read_record(record_path(c.folder)).deaths for c in cells[:2]} == {0}

    (hanging,) = deeds("hangs")
    running = hanging.folder / "running"
    thread = interrupt(running.exists, 0.3)
    with pytest.raises(KeyboardInterrupt):
        run_cells([hanging], "local", 1, told.append)
    thread.join()
    assert not psutil.pid_exists(int(running.read_text()))

    full, fine, stopped = deeds("full", "fine", "saves")
    (stopped.folder / "checkpoints").mkdir(parents=True)
    thread = threading.Thread(
        target=lambda: (
            wait_until((stopped.folder / "running").exists),
            os.kill(int((stopped.folder / "running").read_text()), signal.SIGTERM),
        )
    )
    thread.start()
    told.clear()
    with pytest.raises(DataError, match="No further cell is begun, as the disk refused a file: No space left"):
        run_cells([stopped, full, fine], "local", 1, told.append)
    thread.join()
    assert [e.kind for e in told] == ["began", "message", "finished", "began", "failed"]
    assert told[1].text == f"The process of {stopped.identity} ended on a signal; the cell goes on."
    assert state_of(fine.folder) == "waiting"


def test_a_child_saves_and_ends_when_its_parent_is_gone_but_not_when_it_is_stopped(deeds: Callable[..., list[Cell]]):
    (saving,) = deeds("saves")
    parent = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import os, sys\n"
            "from clframe.experiments import child, children\n"
            "children.CHILD = [sys.executable, '-P', '-c', sys.argv[1]]\n"
            "work = child.Work(sys.argv[2], '', {})\n"
            "children.Child(os.environ, None).carry_out(work, lambda: False)\n",
            *(CHILD, str(saving.folder)),
        ]
    )
    running = saving.folder / "running"
    wait_until(lambda: running.exists() and running.read_text())
    child = psutil.Process(int(running.read_text()))
    parent.send_signal(signal.SIGSTOP)
    time.sleep(1)
    assert not (saving.folder / "saved").exists()
    parent.kill()
    killed = time.monotonic()
    parent.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert time.monotonic() - killed < 2
    assert (saving.folder / "saved").exists()


def test_a_canceled_task_stops_its_cell(deeds: Callable[..., list[Cell]]):
    """As where the process of a study is killed: the scheduler cancels the tasks of a client that is gone."""
    from clframe.experiments import cluster

    (saving,) = deeds("saves")
    with cluster.local(1) as found:
        work = Work(str(saving.folder), "", {})
        future = found.client.submit(children.serve, work, "a-key", found.errand, found.shares(), key="a-key")
        wait_until((saving.folder / "running").exists)
        future.release()
        wait_until((saving.folder / "saved").exists)
        found.stop()
        late = found.client.submit(children.serve, work, "late", found.errand, found.shares(), key="late")
        assert late.result(timeout=30).state == "stopped"  # asked before it began
    assert len(log_of([saving])) == 1


def test_an_attempt_waits_for_a_locked_folder_and_refuses_other_code(tmp_path: Path):
    one = cell(tmp_path / "cells" / "one")
    work = Work(str(one.folder), to_yaml(one.config), dict(one.code))
    assert "a cluster needs a file system that all of its machines share" in attempt(work).text
    one.folder.mkdir(parents=True)
    lock = filelock.FileLock(one.folder / ".lock", thread_local=False)
    lock.acquire()
    began = time.monotonic()
    threading.Timer(0.5, lock.release).start()
    places: list[Place] = []
    assert attempt(work, places.append).state == "finished"
    assert [place.place for place in places] == [f"experience {i} of 5" for i in range(1, 6)]
    assert time.monotonic() - began > 0.5
    other = Work(work.folder, work.config, {**work.code, "clframe.engine": "0" * 64})
    answer = attempt(other)
    assert answer.state == "failed"
    assert "is not the code with which the study began: `clframe.engine` changed; give" in answer.text


def test_threads_and_gpus_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import loky

    from clframe.experiments.cluster import share_out

    monkeypatch.setattr(loky, "cpu_count", lambda: 9)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus() == []
    for given, found in [("0,1", ["0", "1"]), ("2, GPU-ab,-1,3", ["2", "GPU-ab"]), ("-1", []), ("NoDevFiles", [])]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert find_gpus() == found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listing = tmp_path / "nvidia-smi"
    listing.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-aa)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-bb)'\n"
        "echo '  MIG 1g.18gb     Device  0: (UUID: MIG-cc)'\necho '  MIG 1g.18gb     Device  1: (UUID: MIG-dd)'\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "GPU-aa" not in find_gpus()  # not executable
    listing.chmod(0o755)
    assert find_gpus() == ["GPU-aa", "MIG-cc", "MIG-dd"]
    shares = share_out({"tcp://10.0.0.1:4000": 2, "tcp://10.0.0.2:4000": 1, "tcp://10.0.0.1:4001": 2})
    assert shares == {
        "tcp://10.0.0.1:4000": Share(0, 2, 4),
        "tcp://10.0.0.1:4001": Share(2, 2, 4),
        "tcp://10.0.0.2:4000": Share(0, 1, 1),
    }
    got = [environment_of_child(shares["tcp://10.0.0.1:4001"], slot, None) for slot in (0, 1)]
    assert [(g["OMP_NUM_THREADS"], g["MKL_NUM_THREADS"], g["CUDA_VISIBLE_DEVICES"]) for g in got] == [
        ("2", "2", "MIG-dd"),
        ("2", "2", "GPU-aa"),
    ]
    assert environment_of_child(shares["tcp://10.0.0.2:4000"], 0, None)["OMP_NUM_THREADS"] == "9"


def test_cells_tell_their_experience_while_they_run(deeds: Callable[..., list[Cell]]):
    cells = deeds("reports", "reports", "reports")
    told: list[tuple[Cell | None, str]] = []

    def tell(event: CellEvent) -> None:
        assert threading.current_thread() is threading.main_thread()
        if event.kind == "progress" and event.cell:
            told.append((event.cell, event.text))
            (event.cell.folder / "seen").touch()

    run_cells(cells, "local", 2, tell)
    assert sorted(cells.index(cell) for cell, _ in told if cell) == [0, 1, 2]
    assert {text for _, text in told} == {"experience 1 of 2"}
    (waiting,) = deeds("waits")
    live = StudyLive([waiting])
    live(CellEvent("began", waiting))
    live(CellEvent("progress", waiting, "experience 1 of 2"))
    console = Console(width=80, record=True, file=StringIO())
    console.print(live._draw())
    assert f"{waiting.identity}: experience 1 of 2" in console.export_text()


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_a_gpu_that_children_lack_is_refused_before_anything_runs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    asked = [command, "-s", "split-digits", "--method", "er", "--output", str(tmp_path / "new")]
    assert main([*asked, "--set", "run.device=cuda:1"]) == 2
    assert capsys.readouterr().err == (
        "clframe: `run.device` is `cuda:1`, and each worker of a study has one GPU of its own, which is `cuda` there: "
        "set `run.device=cuda`, and `CUDA_VISIBLE_DEVICES=1` before the command if it should be that GPU.\n"
    )
    assert not (tmp_path / "new").exists()
    for device, engine in (("cuda:1", "inline"), ("cuda:0", "local"), ("cuda", "local"), (None, "local")):
        check_device(device, engine)
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=12"):
        check_device("cuda:12", "dask:example:8786")


def test_engines_that_there_are_not(monkeypatch: pytest.MonkeyPatch):
    from clframe.experiments import cluster

    assert [read_engine(name) for name in ("inline", "local")] == [None, None]
    assert read_engine("dask:example:8786") == "tcp://example:8786"
    assert read_engine("dask:tls://example:8786") == "tls://example:8786"
    for name, told in [
        ("lokal", "There is no engine 'lokal'. Did you mean `local`?"),
        ("dask", "There is no engine 'dask'. Choices: dask:ADDRESS, inline, local."),
        ("dask:ucx://example:1", "'ucx://example:1' is not the address of a Dask scheduler"),
        ("dask:example", "'example' is not the address of a Dask scheduler; such an address is `tcp://HOST:PORT`"),
    ]:
        with pytest.raises(UsageError) as error:
            read_engine(name)
        assert told in str(error.value)
    assert cluster.PATIENCE + 2 < 10  # seconds until the last of the sentences below
    monkeypatch.setattr(cluster, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        given = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DataError, match=f"No Dask scheduler answers at {given}.*: start one there, or give its"):
            cluster.identify(given)
        with pytest.raises(DataError, match=f"tls://{address} needs certificates, .* set `ca-file`, `client.cert` and"):
            cluster.identify(f"tls://{address}")
    with pytest.raises(DataError, match=f"No Dask scheduler answers at tcp://{address}"):  # nothing listens any more
        cluster.identify(f"tcp://{address}")


@pytest.fixture
def by_hand(tmp_path: Path) -> Iterator[str]:
    """A scheduler and two workers, as `dask scheduler` and `dask worker` start them; the scheduler's address."""
    file = tmp_path / "scheduler.json"
    common = ["--no-dashboard", "--host", "127.0.0.1"]
    calls = [
        ["distributed.cli.dask_scheduler", *common, "--port", "0", "--scheduler-file", str(file)],
        *[["distributed.cli.dask_worker", *common, "--scheduler-file", str(file), "--no-nanny", "--nthreads", "1"]] * 2,
    ]
    environment = {**os.environ, "DASK_TEMPORARY_DIRECTORY": str(tmp_path)}
    started = []
    try:
        for call in calls:
            started.append(subprocess.Popen([sys.executable, "-m", *call], env=environment, stderr=subprocess.DEVNULL))
            wait_until(lambda: file.exists() and file.read_text().endswith("}"))
        yield json.loads(file.read_text())["address"]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_cluster_started_by_hand_serves(by_hand: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from distributed import Client

    monkeypatch.chdir(tmp_path)
    cells = [cell(Path("study/cells") / f"cell-{seed}", seed=seed, plugins=("ewc",)) for seed in range(2)]
    cells.append(cell(Path("study/cells/fails"), plugins=("ewc",), lr=1e30, clip=0))
    Path("study/cells").mkdir(parents=True)
    with Client(by_hand, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        addresses = sorted(client.nthreads())
    with pytest.raises(DataError, match=f"At {addresses[0]} there is a Dask Worker, not a scheduler; give the sch"):
        run_cells(cells, f"dask:{addresses[0]}", 1, lambda event: None)
    with monkeypatch.context() as patched:
        patched.setattr(children, "own_code", lambda: {"clframe.engine": "other"})
        with pytest.raises(DataError, match=rf"cluster at {by_hand} has other code of clframe \(`clframe.__init__`"):
            run_cells(cells, f"dask:{by_hand}", 1, lambda event: None)
    told: list[CellEvent] = []
    run_cells(cells, f"dask:{by_hand}", 1, told.append)
    assert [e.kind for e in told[:2]] == ["began", "began"]  # both workers
    assert "experience 5 of 5" in {e.text for e in told if e.kind == "progress"}
    told = [e for e in told if e.kind != "progress"]
    assert sorted(e.kind for e in told) == ["began"] * 3 + ["failed"] + ["finished"] * 2
    (failed,) = [e.text for e in told if e.kind == "failed"]
    assert "became infinite or not a number in experience 1 of 5" in failed
    settings = RUN | {"seed": 1, "output": str(tmp_path / "alone")}
    clframe.run({"name": "split-digits", "limit": 10}, plugins=["ewc"], train=TRAIN, run=settings)
    assert (cells[1].folder / "results.json").read_bytes() == (tmp_path / "alone" / "results.json").read_bytes()


STUDY = {  # 40 cells, each of which writes a checkpoint after each experience
    "scenarios": [{"name": "split-digits", "limit": 10}],
    "methods": ["ewc", "er"],
    "baselines": False,
    "seeds": 20,
    "train": {"iterations": 60, "threads": 1},
    "run": {"tensorboard": False, "device": "cpu"},
}


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_study_killed_at_random_has_every_cell_once_and_the_same_report(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(json.dumps(STUDY))
    clframe_ = [sys.executable, "-m", "clframe"]

    def call(name: str, *words: str) -> list[str]:
        begun = (tmp_path / name / "study.yaml").exists()
        given = [str(tmp_path / name)] if begun else ["--config", str(tmp_path / "study.yaml")]
        return [*clframe_, "compare", *given, "--quiet", *words, *([] if begun else ["--output", str(tmp_path / name)])]

    subprocess.run(call("whole", "--engine", "inline"), check=True)
    killed = tmp_path / "killed"
    dice = random.Random(0)
    ended: dict[Path, tuple[int, int]] = {}

    def look() -> None:
        """Check that no results are written a second time."""
        for results in killed.glob("cells/*/results.json"):
            found = (results.stat().st_ino, results.stat().st_mtime_ns)
            assert ended.setdefault(results, found) == found

    def progress() -> int:
        return sum(1 for _ in killed.glob("cells/*/checkpoints/*")) + len(ended)

    kills = {"child": 0, "parent": 0}
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.Popen(call("killed", "--workers", "2"), stdout=log, stderr=log)
        while sum(kills.values()) < 20:
            before = progress()
            if dice.random() < 0.8:  # else the kill may meet the start of a process
                wait_until(lambda before=before, parent=parent: progress() != before or parent.poll() is not None, 300)
            with contextlib.suppress(subprocess.TimeoutExpired):
                parent.wait(dice.uniform(0, 2))
            look()
            if parent.poll() is not None:
                assert parent.returncode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()[-2000:]
                assert len(ended) < 40, f"the study ended after {kills}: make its cells longer"
                parent = subprocess.Popen(call("killed", "--workers", "2"), stdout=log, stderr=log)
                continue
            running = psutil.Process(parent.pid).children()
            if running and dice.random() < 0.6:
                dice.choice(running).kill()
                kills["child"] += 1
            elif running:  # else it has not begun
                parent.kill()
                parent.wait()
                kills["parent"] += 1
        parent.wait()
        subprocess.run(call("killed"), stdout=log, stderr=log, check=True)
        look()
    assert min(kills.values()) >= 4, kills
    assert len(ended) == 40
    for results in ended:
        assert (tmp_path / "whole" / results.relative_to(killed)).read_bytes() == results.read_bytes()
    for form in ("html", "json", "latex"):
        words = [*clframe_, "report", "--without-costs", "--format", form]
        whole, other = (
            subprocess.run([*words, str(tmp_path / name)], check=True, capture_output=True).stdout
            for name in ("whole", "killed")
        )
        assert len(whole) > 1000
        assert whole == other
