"""What the second of two finished runs saved over the first.

python examples/compare.py runs/demo/finetuning runs/demo/ewc
"""

from __future__ import annotations

import sys
from pathlib import Path

from clframe import Results


def main(first: str, second: str) -> None:
    """Print the final accuracy on each experience of both runs, and the difference, in percentage points."""
    rows = {}
    for folder in (first, second):
        results = Results.read(Path(folder))
        reading = next(iter(results.accuracy))
        rows[Path(folder).name] = [100 * (value or 0.0) for value in results.accuracy[reading][-1]]
    (name_a, a), (name_b, b) = rows.items()
    width = max(len(name_a), len(name_b)) + 1
    print(f"\nAccuracy in percent after the last experience, {reading}-incremental:")
    print(" " * width + "".join(f"{f'on {j}':>7}" for j in range(1, len(a) + 1)) + "  average")
    difference = [y - x for x, y in zip(a, b, strict=True)]
    for name, row, form in ((name_a, a, ".1f"), (name_b, b, ".1f"), ("saved", difference, "+.1f")):
        print(
            f"{name:<{width}}"
            + "".join(f"{format(v, form):>7}" for v in row)
            + f"{format(sum(row) / len(row), form):>9}"
        )
    print(f"{name_b} saved {sum(difference) / len(difference):.1f} points of average accuracy over {name_a}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
