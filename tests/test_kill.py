"""`kill -9` of a real process at random moments: the resumed run ends with the same results, byte for byte."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def kill_resume() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "kill_resume.py"
    spec = importlib.util.spec_from_file_location("kill_resume", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_resume"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.long  # most of it starts processes; test_campaigns.py kills forks at every system call
def test_a_killed_run_resumes_to_the_same_bytes(kill_resume: ModuleType, tmp_path: Path):
    given = kill_resume.arguments("ewc", iterations=150)
    expected = kill_resume.reference(given, tmp_path / "whole")
    kills, done, trials = 2, 0, 0
    while done < kills:  # a process that finished before its kill came due does not count
        trials += 1
        assert trials < 10
        folder = tmp_path / f"killed-{trials}"
        trial = kill_resume.trial(given, folder, expected, kills - done, random.Random(trials))
        assert trial.equal, trial.said
        done += trial.kills
