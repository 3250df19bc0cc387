"""Training time and memory of EWC from 5 to 50 experiences: permuted-mnist, 500 images each.

    python benchmarks/growth.py --data-root FOLDER-OF-MNIST.NPZ

Seconds are those of the processor, on one thread so that other load on the machine disturbs little, from the growth
of the head to the end of the Fisher, evaluation apart. MiB is the highest resident memory within that time (on Linux,
where it can be reset; elsewhere the process's highest so far).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

EXPERIENCES = 50
PER_CLASS = 50  # 500 images of ten classes
EPOCHS = 5


def peak_mib() -> float:
    """Highest resident memory since `reset_peak`, where the system can reset it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def reset_peak() -> None:
    """Let `peak_mib` begin anew."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def measure(data_root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """A line for every fifth experience, and notes with the ratio of the last to the first ones."""
    import clframe
    from clframe import Plugin, hookimpl

    seconds: list[float] = []
    memory: list[float] = []

    class Clock(Plugin):
        """Named last, so that its hook after an experience comes after EWC's."""

        name = "clock"
        observer = True
        start = 0.0

        @hookimpl
        def before_experience(self) -> None:
            reset_peak()
            self.start = time.process_time()

        @hookimpl
        def after_experience(self) -> None:
            seconds.append(time.process_time() - self.start)
            memory.append(peak_mib())

    clframe.run(
        {"name": "permuted-mnist", "experiences": EXPERIENCES, "limit": PER_CLASS},
        {"name": "mlp"},
        [{"ewc": {"lambda": 100.0}}, Clock()],
        train={"epochs": EPOCHS, "batch_size": 128, "threads": 1},
        run={"data_root": str(data_root), "predictions": False},
    )
    lines = [
        {
            "experiences": f"{first + 1} to {first + 5}",
            "seconds each": f"{statistics.median(seconds[first : first + 5]):.3f}",
            "MiB": f"{max(memory[first : first + 5]):.0f}",
        }
        for first in range(0, EXPERIENCES, 5)
    ]
    # the first experience has no penalty yet, and torch starts up in it
    early, late = statistics.median(seconds[2:10]), statistics.median(seconds[-8:])
    notes = [
        f"An experience late in the run (43 to 50) takes {late / early:.2f} times as long as one early in it "
        "(3 to 10), "
        f"and memory grows from {memory[4]:.0f} to {memory[-1]:.0f} MiB from experience 5 to 50 "
        f"({memory[-1] / memory[4]:.3f} times).",
        f"EWC with its default Fisher, {PER_CLASS * 10} images and {EPOCHS} epochs per experience, batches of 128.",
    ]
    return lines, notes


if __name__ == "__main__":
    from report import table

    from clframe.config import data_root

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root")
    lines, notes = measure(data_root(parser.parse_args().data_root))
    print(table(lines))
    for note in notes:
        print(f"- {note}")
