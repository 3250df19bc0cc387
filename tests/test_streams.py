"""Standard streams that break, signals, and errors of the system: what a command keeps, says and ends with."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from clframe import DataError, Plugin, RunError, errors, hookimpl, testing
from clframe.api import run as learn
from clframe.cli import installed, show
from clframe.cli import main as cli
from clframe.cli.main import main
from clframe.engine import Engine

CALL = [sys.executable, "-c", "import sys; from clframe.cli.main import main; sys.exit(main())"]
SHORT = ["run", "--iterations", "2", "--limit", "4", "--no-tensorboard"]


@pytest.fixture(autouse=True)
def hang_ups_count() -> Iterator[None]:
    """Receive SIGHUP as a terminal's child does; `nohup pytest` hands down that it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class Broken(io.StringIO):
    """A stream that fails as one whose reader has gone, or whose disk is full."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        self.write("")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_broken_standard_error_does_not_end_a_run(tmp_path: Path, monkeypatch, number: int):
    monkeypatch.setattr(sys, "stderr", Broken(number))
    assert main([*SHORT, "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_a_closed_stream_does_not_end_a_run(tmp_path: Path, monkeypatch, closed: str):
    for name in ("stdout", "stderr"):
        if closed in (name, "both"):
            monkeypatch.setattr(sys, name, None)
    assert main([*SHORT, "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_a_reader_of_standard_output_that_has_gone_is_success_only_once_the_run_is_kept(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE))
    assert main([*SHORT, "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_a_broken_pipe_within_a_run_is_a_failure(tmp_path: Path, monkeypatch, capsys):
    def step(*arguments: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("clframe.engine.step", step)
    assert main([*SHORT, "--output", str(tmp_path / "run")]) == 1
    assert "in experience 1 of 5: Broken pipe." in capsys.readouterr().err


def test_a_full_disk_under_standard_output_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    assert main(["plugins", "list"]) == 1
    assert "The disk is full" in capsys.readouterr().err


def test_a_pipe_that_is_closed_and_closed_descriptors(tmp_path: Path):
    """In real processes, whose interpreter flushes both streams once more at its end."""
    call = " ".join(f"'{part}'" for part in CALL)
    for arguments, end in (("plugins list", "2>&1 >/dev/full | cat"), ("plugins list", ">&- 2>&- <&-")):
        bash = ["bash", "-c", f"set -o pipefail; {call} {arguments} {end}"]
        done = subprocess.run(bash, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == (1 if "full" in end else 0), done
        assert "Traceback" not in done.stderr + done.stdout
    bash = ["bash", "-c", f"{call} plugins lst 2>/dev/full"]
    assert subprocess.run(bash, check=False, timeout=60).returncode == 2


def test_characters_that_the_stream_lacks_are_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    monkeypatch.setattr(installed, "list_all", lambda kind, json: show.line("naïve"))
    assert main(["plugins", "list"]) == 0
    assert raw.getvalue() == b"na\\xefve\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_command_that_is_stopped_says_so(monkeypatch, capsys, name: str):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    monkeypatch.setattr("clframe.cli.doctor.examine", lambda root: signal.raise_signal(number))
    assert main(["doctor"]) == 128 + number
    assert capsys.readouterr().err == f"Stopped by {name}.\n"
    assert signal.getsignal(number) is before


def test_an_ignored_hang_up_stays_ignored(monkeypatch, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(installed, "list_all", lambda kind, json: signal.raise_signal(signal.SIGHUP))
        assert main(["plugins", "list"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_hang_up_saves_a_run(tmp_path: Path, monkeypatch, capsys):
    original = Engine.count_step

    def count_step(engine, batch):
        signal.raise_signal(signal.SIGHUP)
        original(engine, batch)

    monkeypatch.setattr(Engine, "count_step", count_step)
    assert main([*SHORT, "--output", str(tmp_path / "run")]) == 129
    assert "Stopped by SIGHUP in experience 1 of 5; `clframe resume" in capsys.readouterr().err


# what torch 2.15 said of a process with `ulimit -v`, `ulimit -u`; and of CUDA
MEMORY = [
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "400000000000 bytes. Error code 12 (Cannot allocate memory)",
    "could not create a primitive",
    "can't start new thread",
    "std::bad_alloc",
    "CUDA out of memory. Tried to allocate 2 GiB",
]


@pytest.mark.parametrize("said", MEMORY)
def test_out_of_memory_has_many_words_and_is_no_bug(tiny, monkeypatch, capsys, said: str):
    def fails(*arguments):
        raise RuntimeError(said)

    monkeypatch.setattr(installed, "list_all", fails)
    assert main(["plugins", "list"]) == 1
    assert capsys.readouterr().err.startswith("clframe: Out of memory: ")
    monkeypatch.setattr("clframe.engine.step", fails)
    with testing.refused("Out of memory on cpu", "experience 1 of 3", "`train.batch_size`", error=RunError):
        learn(tiny(), "mlp-100", train={"iterations": 1})


def test_what_torch_says_of_memory_here():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert errors.out_of_memory(raised.value)
    assert not errors.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_no_error_of_the_system_is_a_bug(tiny, monkeypatch, capsys, number: int):
    def fails(*arguments):
        raise OSError(number, os.strerror(number), "a/file")

    with monkeypatch.context() as patch:
        patch.setattr(installed, "list_all", fails)
        assert main(["plugins", "list"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "a/file" in said or number == errno.ENOMEM


def test_what_libraries_say_of_files_is_no_bug(monkeypatch, capsys):
    for said in ("unable to open file </x/model.safetensors> in read-only mode: Too many open files (24)", "no error"):
        monkeypatch.setattr(installed, "list_all", lambda kind, json, said=said: raises(RuntimeError(said)))
        assert main(["plugins", "list"]) == (70 if said == "no error" else 1)
    assert "model.safetensors" in capsys.readouterr().err


def raises(error: Exception) -> None:
    raise error


class Careless(Plugin):
    """Opens a file that is not there."""

    name = "careless"

    @hookimpl
    def after_step(self, run):
        Path("/nowhere/at/all").read_text()


def test_a_plugin_that_misses_a_file_is_named(tiny):
    with pytest.raises(RunError, match=r"plugin `careless` raised in its hook `after_step`: FileNotFoundError"):
        learn(tiny(), "mlp-100", [Careless()], train={"iterations": 1})


def test_an_error_of_the_system_in_the_loop_says_where(tiny, tmp_path: Path, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a/file")

    monkeypatch.setattr("clframe.engine.step", fails)
    with pytest.raises(RunError, match=r"in experience 1 of 3: Too many open files \(a/file\)\. The last good check"):
        learn(tiny(), "mlp-100", train={"iterations": 1}, run={"output": str(tmp_path / "run"), "tensorboard": False})


def test_a_name_that_is_too_long_or_empty_is_refused(tiny, capsys):
    assert main([*SHORT, "--output", "x" * 300]) in (2, 3)
    assert "File name too long" in capsys.readouterr().err
    assert main([*SHORT, "--output", ""]) == 2
    assert "`run.output` is ''" in capsys.readouterr().err
    with pytest.raises(DataError, match="File name too long"):
        learn(tiny(), run={"output": "x" * 300})


def test_two_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from clframe.config import resolve

    folders = [cli._make_folder(resolve()) for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() for folder in folders)


def test_a_refused_run_leaves_no_folder(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--plugin", "joint", "--plugin", "ewc"]) == 2
    assert list((tmp_path / "runs").iterdir()) == []
