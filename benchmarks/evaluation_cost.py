"""What evaluations while learning cost: split-MNIST with an evaluation every 10 steps, beside the same without any.

    python benchmarks/evaluation_cost.py

The evaluations are of 50 test images of each class seen so far. Timed are the steps and the evaluations between them,
not those at the ends of experiences, which all runs have; each kind of run comes without a run folder, and with one in
which every evaluation is a line and a point of TensorBoard's curves. Times are of the processor, all threads together.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EVERY = 10
PER_CLASS = 50
TARGET = 0.15
BATCH = 128
KINDS = [  # keeps a folder, evaluates while learning
    (False, False),
    (False, True),
    (True, False),
    (True, True),
]


def load_mnist(data_root: Path) -> Any:
    """Return MNIST as arrays for scenarios."""
    import numpy as np
    import torch

    from clframe import Arrays

    parts = []
    with np.load(data_root / "mnist.npz") as file:
        for part in ("train", "test"):
            parts += [torch.from_numpy(file[f"x_{part}"])[:, None], torch.from_numpy(file[f"y_{part}"]).long()]
    return Arrays("mnist", *parts, tuple("0123456789"))


def run_once(mnist: Any, *, keeps: bool, evaluates: bool) -> float:
    """Return the seconds of the processor between the first and the last step of all experiences of one run."""
    import clframe
    from clframe import Plugin, hookimpl, split_classes

    class Clock(Plugin):
        """An observer that adds up the time of the experiences."""

        name = "clock"
        observer = True
        seconds = 0.0
        began: float | None = None

        @hookimpl
        def before_step(self, run: Any) -> None:
            if self.began is None:
                self.began = time.process_time()

        @hookimpl
        def after_experience(self, run: Any) -> None:
            self.seconds += time.process_time() - (self.began or 0.0)
            self.began = None

    clock = Clock()
    extra = {"eval_every": EVERY, "eval_images": PER_CLASS} if evaluates else {}
    with tempfile.TemporaryDirectory() as folder:
        clframe.run(
            split_classes("split-mnist", mnist, experiences=5),
            "mlp",
            [clock],
            train={"optimizer": "adam", "lr": 1e-3, "batch_size": BATCH, "epochs": 1, "threads": 1},
            run={"device": "cpu", "predictions": False, "tensorboard": keeps}
            | ({"output": f"{folder}/run"} if keeps else {})
            | extra,
            progress=False,
        )
    return clock.seconds


def measure(data_root: Path, repetitions: int = 9) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines of the table, and notes that compare them with the target."""
    mnist = load_mnist(data_root)
    run_once(mnist, keeps=True, evaluates=True)  # torch's first optimizer step takes seconds
    seconds: list[list[float]] = [[] for _ in KINDS]
    for repetition in range(repetitions):
        for found, (keeps, evaluates) in zip(seconds, KINDS, strict=True):
            found.append(run_once(mnist, keeps=keeps, evaluates=evaluates))
        print(f"repetition {repetition + 1} of {repetitions}", file=sys.stderr, flush=True)
    return compare(seconds)


def compare(seconds: list[list[float]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines and notes from the seconds of all runs, a list for each of `KINDS`."""
    lines = []
    shares = []
    for index, (keeps, evaluates) in enumerate(KINDS):
        found = seconds[index]
        line = {
            "run folder and curves": "yes" if keeps else "no",
            "evaluations": f"every {EVERY} steps" if evaluates else "none",
            "s": f"{statistics.median(found):.3f}",
            "least": f"{min(found):.3f}",
            "cost": None,
            "of the least": None,
        }
        if evaluates:
            without = seconds[index - 1]
            share = statistics.median(one / other for one, other in zip(found, without, strict=True)) - 1
            shares.append(share)
            line["cost"] = f"{100 * share:.1f} %"
            line["of the least"] = f"{100 * (min(found) / min(without) - 1):.1f} %"
        lines.append(line)
    reached = "reached" if max(shares) <= TARGET else "NOT reached"
    return lines, [
        f"An evaluation every {EVERY} steps on {PER_CLASS} test images of each class seen costs at most "
        f"{100 * TARGET:.0f} %: {reached}.",
        f"MLP 400-400, batches of {BATCH}, 1 epoch, 1 thread; processor time of steps and of evaluations between them, "
        f"of {len(seconds[0])} repetitions in turns; the cost is the median over them.",
    ]


if __name__ == "__main__":
    from report import table

    from clframe.settings import data_root

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", help="folder of mnist.npz (default: CLFRAME_DATA, else the user's cache)")
    parser.add_argument("--repetitions", type=int, default=9)
    given = parser.parse_args()
    root = data_root(given.data_root)
    if not (root / "mnist.npz").exists():
        raise SystemExit(f"no mnist.npz in {root}: put it there, or name its folder with --data-root")
    lines, notes = measure(root, given.repetitions)
    print(table(lines))
    for note in notes:
        print(f"- {note}")
