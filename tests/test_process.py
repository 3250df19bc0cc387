"""Real processes: Ctrl-C, a second process on one folder, and the peak of memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clframe.cli.main import main

COMMAND = [sys.executable, "-c", "import sys; from clframe.cli.main import main; sys.exit(main())"]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )


def test_ctrl_c_saves_and_says_how_to_go_on_and_a_second_process_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run = start("run", "--output", str(folder), "--iterations", "100000", "--no-tensorboard")
    limit = time.monotonic() + 120
    while not (folder / "checkpoints" / "000001").exists():
        assert run.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert main(["resume", str(folder)]) == 3
    assert f"Another process is working on the run folder {folder}" in capsys.readouterr().err
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 130
    assert f"Stopped by SIGINT in experience 1 of 5; `clframe resume {folder}` goes on from here." in said
    assert "Traceback" not in said
    assert len(list((folder / "checkpoints").iterdir())) == 2
    assert not (folder / "results.json").exists()


def test_a_peak_of_memory_is_the_process_s_own_and_begins_again():
    """A process that another one with much memory started, and a second cell in a process after a large one."""
    code = (
        "from clframe.system.memory import read_peak_memory, reset_peak_memory; first = read_peak_memory();"
        "many = bytearray(300_000_000); most = read_peak_memory(); del many; reset_peak_memory();"
        "print(first, most, read_peak_memory())"
    )
    large = bytearray(500_000_000)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, most, after = map(int, done.stdout.split())
    assert len(large) == 500_000_000
    assert first < 200_000_000
    assert 300_000_000 <= most - first + 1_000_000 < 320_000_000
    assert after < 200_000_000
