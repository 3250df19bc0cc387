"""Training time and memory of methods from 5 to 50 experiences: permuted-mnist, 500 images each.

    python benchmarks/growth.py --data-root FOLDER-OF-MNIST.NPZ

Seconds are those of the processor, on one thread so that other load on the machine disturbs little, from the growth
of the head to the end of what the method does after an experience, evaluation apart. MiB is the highest resident memory
within that time (on Linux, where it can be reset; elsewhere the process's highest so far). Each method has a process of
its own, as memory that another one freed would hide growth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clframe.system.memory import read_peak_memory, reset_peak_memory

EXPERIENCES = 50
PER_CLASS = 50  # 500 images of ten classes
TESTED = 50
REPETITIONS = 3
EPOCHS = 3
METHODS: dict[str, list[dict[str, dict[str, Any]]]] = {
    "fine-tuning": [],
    "ewc": [{"ewc": {"lambda": 100.0}}],
    "si": [{"si": {}}],
    "mas": [{"mas": {}}],
    "lwf": [{"lwf": {"form": "all"}}],
    "lfl": [{"lfl": {}}],
    "a-ltm": [{"a-ltm": {}}],
    "er": [{"er": {"size": 500}}],
    "der": [{"der": {"size": 500}}],
    "generative-replay": [{"generative-replay": {"iterations": 12}}],
}
# median of eight experiences; the first has no penalty yet, and torch starts up in it
EARLY, LATE = slice(2, 10), slice(EXPERIENCES - 8, EXPERIENCES)
FLAT = 1.1  # the most that the last experiences may take, in times of the first ones


def one(method: str, data_root: Path) -> dict[str, list[float]]:
    """Seconds and MiB of each experience."""
    import clframe
    from clframe import Plugin, hookimpl
    from clframe.scenarios import sources, streams

    seconds: list[float] = []
    memory: list[float] = []

    class Clock(Plugin):
        """Named last, so that its hook after an experience comes after the method's."""

        name = "clock"
        observer = True
        start = 0.0

        @hookimpl
        def grow(self) -> None:
            reset_peak_memory()
            self.start = time.process_time()

        @hookimpl
        def after_experience(self) -> None:
            seconds.append(time.process_time() - self.start)
            memory.append(read_peak_memory() / 2**20)

    digits = sources.load("mnist", data_root).limited(PER_CLASS)
    # 2,550 evaluations, which are not measured, of few images each
    digits = replace(digits, x_test=digits.x_test[:TESTED], y_test=digits.y_test[:TESTED])
    clframe.run(
        streams.permute_pixels("permuted-mnist", digits, streams.Permuted(experiences=EXPERIENCES, seed=0)),
        {"name": "mlp"},
        [*METHODS[method], Clock()],
        train={"optimizer": "adam", "lr": 1e-3, "epochs": EPOCHS, "batch_size": 128, "threads": 1},
        run={"predictions": False, "device": "cpu"},
    )
    return {"seconds": seconds, "MiB": memory}


def measure(data_root: Path, methods: Sequence[str] = tuple(METHODS)) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a line for each method, and notes on what was reached."""
    runs: dict[str, list[dict[str, list[float]]]] = {method: [] for method in methods}
    for repetition in range(REPETITIONS):  # in turns, so that what slows the machine for a while meets all of them
        for method in methods:
            command = [sys.executable, __file__, "--method", method, "--data-root", str(data_root)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[method].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"repetition {repetition + 1} of {REPETITIONS}", file=sys.stderr, flush=True)
    return compare({method: least(found) for method, found in runs.items()})


def least(runs: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Of several runs of the same work, for each experience the least: what slows a machine for a while only adds."""
    return {name: [min(values) for values in zip(*(run[name] for run in runs), strict=True)] for name in runs[0]}


def compare(found: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines and notes from the seconds and MiB of each experience, by method."""
    lines = []
    growing = []
    for method, series in found.items():
        early, late = (statistics.median(series["seconds"][part]) for part in (EARLY, LATE))
        memory, last = series["MiB"][4], series["MiB"][-1]
        lines.append(
            {
                "method": method,
                "seconds early": f"{early:.3f}",
                "seconds late": f"{late:.3f}",
                "ratio": f"{late / early:.2f}",
                "MiB after 5": f"{memory:.0f}",
                "MiB after 50": f"{last:.0f}",
                "MiB ratio": f"{last / memory:.3f}",
            }
        )
        if max(late / early, last / memory) > FLAT:
            growing.append(method)
    return lines, [
        f"Time and memory stay flat (late at most {FLAT} times early): "
        + (f"NOT reached by {', '.join(growing)}." if growing else "reached by all of them."),
        "Seconds are the median of an experience early in the run (3 to 10) and late in it (43 to 50); MiB is the "
        f"highest within experience 5 and 50; of {REPETITIONS} runs in turns the least, experience by experience.",
        f"{PER_CLASS * 10} images and {EPOCHS} epochs per experience, batches of 128, 1 thread; MLP 400-400, one head "
        "for all experiences; every method with its defaults, but a memory of 500 images where there is one.",
    ]


def main() -> None:
    """Run the command line; workers are this file again."""
    from clframe.settings import data_root

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root")
    parser.add_argument("--method", choices=list(METHODS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    root = data_root(given.data_root)
    if given.method:
        print(json.dumps(one(given.method, root)))
        return
    from report import table

    lines, notes = measure(root)
    print(table(lines))
    for note in notes:
        print(f"- {note}")


if __name__ == "__main__":
    main()
