"""Runs that are killed with SIGKILL at random moments and resumed, compared with a run that was left alone.

    python benchmarks/kill_resume.py 50

A trial starts `clframe run` on split-digits, kills it at a random moment once its first checkpoint stands, which is
when training begins, goes on with `clframe resume`, kills that too, and so on; after its share of kills the run may
finish. Its `results.json` must be that of an uninterrupted run to the last byte. Checkpoints are written ten times a
second, so that many kills meet one half-written.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "import sys; from clframe.cli.main import main; sys.exit(main())"]
METHODS: dict[str, list[str]] = {"fine-tuning": [], "ewc": ["--plugin", "ewc"]}
LONGEST = 300.0  # seconds, after which a process counts as hung


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: its `results.json`, and its seconds from the first checkpoint to the end."""

    results: bytes
    seconds: float


@dataclass(frozen=True)
class Trial:
    """What became of one run: how often it was killed, and whether it came to the same results; `said` if not."""

    kills: int
    equal: bool
    said: str = ""


def arguments(method: str, *, iterations: int = 400, seed: int = 0) -> list[str]:
    """Return the options of `clframe run` for a trial, without ``--output``."""
    settings = [f"train.iterations={iterations}", "run.checkpoint_every=0.1", "train.threads=1"]
    sets = [part for setting in settings for part in ("--set", setting)]
    return ["--scenario", "split-digits", *METHODS[method], "--seed", str(seed), *sets, "--no-tensorboard", "--quiet"]


def reference(given: Sequence[str], folder: Path) -> Reference:
    """Run to the end in the new folder `folder`. Raises RuntimeError if that fails."""
    process = _start(["run", *given, "--output", str(folder)], folder)
    began = _wait_for_life(process, folder, None)
    if process.wait(LONGEST) or began is None:
        raise RuntimeError(f"the uninterrupted run failed:\n{_said(folder)}")
    return Reference((folder / "results.json").read_bytes(), time.monotonic() - began)


def trial(given: Sequence[str], folder: Path, expected: Reference, kills: int, dice: random.Random) -> Trial:
    """Run in the new folder `folder`, killed up to `kills` times, and compare.

    A process that ends before its kill comes due is not counted as killed. If a killed process leaves no
    checkpoint that a resume accepts, that is a failure, as every kill comes after the first checkpoint.
    """
    done = 0
    command = ["run", *given, "--output", str(folder)]
    while True:
        before = _newest(folder)
        process = _start(command, folder)
        if done < kills:
            alive = _wait_for_life(process, folder, before)
            if alive is not None:
                try:
                    process.wait(dice.uniform(0, 2 * expected.seconds / (kills + 1)))
                except subprocess.TimeoutExpired:
                    process.kill()
                    done += 1
        if (code := process.wait(LONGEST)) == 0:
            same = (folder / "results.json").read_bytes() == expected.results
            return Trial(done, same, "" if same else "results.json differs")
        if code != -9:
            return Trial(done, False, _said(folder))
        if (folder / "results.json").exists():  # killed after the last file was written
            same = (folder / "results.json").read_bytes() == expected.results
            return Trial(done, same, "" if same else "results.json differs")
        command = ["resume", str(folder), "--quiet"]


def _start(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen([*COMMAND, *command], stdout=log, stderr=log, env=os.environ | {"NO_COLOR": "1"})


def _said(folder: Path) -> str:
    return folder.with_suffix(".log").read_text(errors="replace")[-2000:]


def _newest(folder: Path) -> str | None:
    """Name of the newest checkpoint."""
    found = sorted(path.name for path in (folder / "checkpoints").glob("*") if path.name.isdigit())
    return found[-1] if found else None


def _wait_for_life(process: subprocess.Popen[bytes], folder: Path, before: str | None) -> float | None:
    """When a checkpoint newer than `before` was there; None if the process ended without one."""
    limit = time.monotonic() + LONGEST
    while process.poll() is None and time.monotonic() < limit:
        if _newest(folder) != before:
            return time.monotonic()
        time.sleep(0.005)
    return None


def measure(kills: int = 50, per_trial: int = 5, seed: int = 0) -> tuple[list[dict[str, Any]], list[str]]:
    """At least `kills` kills, half of them on fine-tuning and half on EWC; a line for each, and what went wrong."""
    dice = random.Random(seed)
    lines, notes = [], []
    with tempfile.TemporaryDirectory() as name:
        for method in METHODS:
            given = arguments(method)
            expected = reference(given, Path(name) / f"{method}-reference")
            done = equal = count = 0
            while done < kills / len(METHODS) and count < kills:
                folder = Path(name) / f"{method}-{count}"
                one = trial(given, folder, expected, per_trial, dice)
                done, equal, count = done + one.kills, equal + one.equal, count + 1
                if not one.equal:
                    notes.append(f"{method}, trial {count}, after {one.kills} kills: {one.said.strip()}")
                shutil.rmtree(folder)
                print(f"{method}: {done} kills, {equal} of {count} runs equal", file=sys.stderr, flush=True)
            lines.append({"method": method, "kills": done, "runs": count, "equal to the last byte": equal})
    return lines, notes


if __name__ == "__main__":
    from report import table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kills", type=int, nargs="?", default=50)
    lines, notes = measure(parser.parse_args().kills)
    print(table(lines))
    for note in notes:
        print(f"- {note}")
    sys.exit(bool(notes))
