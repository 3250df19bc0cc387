"""How often the intervals of a mean difference hold the true mean: Student's and the BCa bootstrap's, by simulation.

    python benchmarks/interval_coverage.py [--studies N]

A study is 8 or 20 independent differences, normal or skewed (log-normal, e^z with z standard normal). `coverage` is the
share of simulated studies whose 95 % interval holds the true mean, `missed above` and `missed below` the shares of
those whose interval ends above or below it, `width` the mean width over that of Student's. All are percentages but the
last.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clframe.experiments.statistics import Interval, bca_interval, mean_interval

STUDIES = 10_000
PAIRS = (8, 20)
SEED = 0
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
# How differences are drawn, and their true mean.
DIFFERENCES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "log-normal": (lambda rng, shape: rng.lognormal(size=shape), math.exp(0.5)),
}
METHODS: dict[str, Callable[[Sequence[float]], Interval | None]] = {
    "Student": lambda values: mean_interval(values).interval,
    "BCa": bca_interval,
}


def measure(studies: int = STUDIES) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines of the table, and a note on its error."""
    lines = []
    for name, (draw, true) in DIFFERENCES.items():
        for pairs in PAIRS:
            samples = draw(np.random.default_rng(SEED), (studies, pairs))
            student = math.nan
            for method, interval in METHODS.items():
                found = [ends for values in samples if (ends := interval(values)) is not None]
                width = statistics.fmean(high - low for low, high in found)
                student = width if method == "Student" else student
                above = sum(low > true for low, _ in found) / len(found)
                below = sum(high < true for _, high in found) / len(found)
                lines.append(
                    {
                        "differences": name,
                        "pairs": pairs,
                        "interval": method,
                        "coverage": f"{100 * (1 - above - below):.1f}",
                        "missed above": f"{100 * above:.1f}",
                        "missed below": f"{100 * below:.1f}",
                        "width": f"{width / student:.2f}",
                    }
                )
    error = 100 * math.sqrt(0.95 * 0.05 / studies)
    return lines, [f"{studies:,} studies a line; the standard error of a coverage of 95 % is {error:.1f} points."]


def main() -> None:
    """Print the table; with the full number of studies, put it into the page of results, too."""
    import report
    import run

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--studies", type=int, default=STUDIES)
    studies = parser.parse_args().studies
    lines, notes = measure(studies)
    print(report.table(lines))
    for note in notes:
        print(f"- {note}")
    if studies == STUDIES:
        report.save_part("interval_coverage", lines, "python benchmarks/interval_coverage.py", notes)
        run.write_page()


if __name__ == "__main__":
    main()
