"""Real processes: Ctrl-C, and a second process on one folder."""

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
