"""iCaRL beside experience replay and plain fine-tuning on CIFAR-10, at a size that two cores end.

    python benchmarks/icarl_cifar.py --data-root FOLDER-OF-CIFAR10.NPZ

ResNet-32, five experiences of two classes in a random order, 250 images of each class, 10 epochs each, and 200 images
remembered by the two methods that remember. All learn alike: batches of 16 (in larger ones iCaRL, whose loss is a mean
over outputs, takes too few steps), images as they are. Experience replay joins as many remembered images to a batch as
it has; iCaRL's join the training images. With `--augment` images are cropped and mirrored at random, by which replay
overfits less. What is printed goes into the page of results, too, unless an option changes the work.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

METHODS: dict[str, list[dict[str, dict[str, Any]]]] = {
    "fine-tuning": [],
    "er": [{"er": {"size": 200}}],
    "icarl": [{"icarl": {"size": 200}}],
}


def one(method: str, seed: int, options: argparse.Namespace) -> float:
    """Average accuracy after the last experience, class-incremental, in percent."""
    import clframe

    results = clframe.run(
        {"name": "split-cifar", "order": "random", "limit": options.limit, "augment": options.augment},
        {"name": "resnet32", "last_relu": method != "icarl"},
        METHODS[method],
        train={
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "optimizer": "sgd",
            "lr": options.lr,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "threads": options.threads,
        },
        run={"data_root": options.data_root, "seed": seed, "device": options.device, "predictions": False},
    )
    value = results.measures["class"]["average_accuracy"]
    assert value is not None
    return 100 * value


def compare(found: Mapping[str, Sequence[float]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines and notes from the accuracies of each method, seed by seed."""
    lines = [
        {
            "method": method,
            "average accuracy, %": f"{statistics.mean(values):.1f}",
            "standard error": f"{_error(values):.1f}",
            "least": f"{min(values):.1f}",
            "most": f"{max(values):.1f}",
        }
        for method, values in found.items()
    ]
    notes = []
    for other in [method for method in found if method != "icarl" and "icarl" in found]:
        gaps = [a - b for a, b in zip(found["icarl"], found[other], strict=True)]
        gap, error = statistics.mean(gaps), _error(gaps)
        reached = "reached" if gap > 3 * error else "NOT reached"
        notes.append(
            f"iCaRL is {gap:.1f} above {other}, with a standard error of {error:.1f} over the same class orders "
            f"(target: more than 3 of these): {reached}."
        )
    seeds = len(next(iter(found.values())))
    about = "ResNet-32, 250 images per class, 10 epochs, 200 images remembered, no augmentation"
    return lines, [*notes, f"{about}; {seeds} orders."]


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, and print what was measured."""
    import report
    from run import write_page

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder of cifar10.npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--only", nargs="+", choices=list(METHODS), help="methods")
    parser.add_argument("--limit", type=int, default=250, help="images per class to learn from")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--augment", action="store_true", help="crop and mirror at random")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    found: dict[str, list[float]] = {method: [] for method in options.only or METHODS}
    for seed in options.seeds:
        for method, values in found.items():
            values.append(one(method, seed, options))
            print(f"{method}, seed {seed}: {values[-1]:.1f}", file=sys.stderr, flush=True)
    lines, notes = compare(found)
    print(report.table(lines))
    for note in notes:
        print(f"- {note}")
    where = {"data_root", "threads", "device"}  # else it is not what the page says
    if all(value == parser.get_default(name) for name, value in vars(options).items() if name not in where):
        report.save_part("icarl_cifar", lines, "python benchmarks/icarl_cifar.py", notes)
        write_page()


if __name__ == "__main__":
    main()
