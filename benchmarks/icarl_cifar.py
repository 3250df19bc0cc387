"""iCaRL beside experience replay and plain fine-tuning on CIFAR-10, at a size that two cores end.

    python benchmarks/icarl_cifar.py --data-root FOLDER-OF-CIFAR10.NPZ [--seeds N] [--augment] [--output FOLDER]

ResNet-32, five experiences of two classes in a random order, 250 images of each class, 10 epochs each, and 200 images
remembered by the two methods that remember. All learn alike: batches of 16 (in larger ones iCaRL, whose loss is a mean
over outputs, takes too few steps), images as they are. Experience replay joins as many remembered images to a batch as
it has; iCaRL's join the training images. With `--augment` images are cropped and mirrored at random, by which replay
overfits less. The runs are a study in a folder, so the script goes on where it was stopped. What is printed goes into
the page of results, too, unless an option changes the work.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import report
import run

from clframe.experiments.folder import read_study
from clframe.experiments.study import Study
from clframe.settings import data_root

SEEDS = 5
SCENARIO = {"name": "split-cifar", "order": "random", "limit": 250}
STUDY: dict[str, Any] = {
    "model": "resnet32",
    "methods": [
        "fine-tuning",
        {"plugins": {"er": {"size": 200}}},
        {"plugins": {"icarl": {"size": 200}}, "model": {"last_relu": False}},
    ],
    "baselines": False,
    "train": {
        "epochs": 10,
        "batch_size": 16,
        "optimizer": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "cosine",
    },
    "run": {"predictions": False},
}


def carry_out(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the final class-incremental average accuracies of each method, in percent, seed by seed.

    Raises `SystemExit` where `clframe compare` ends with an error or is interrupted.
    """
    scenario = {**SCENARIO, "augment": options.augment}
    study = Study.from_data({**STUDY, "scenarios": [scenario], "seeds": options.seeds})
    if code := run.carry_out(study, options.output, data_root(options.data_root), options.workers):
        raise SystemExit(code)
    outcome = read_study(options.output)
    found = {}
    for method in outcome.methods:
        values = outcome.values(outcome.scenarios[0], method, "average_accuracy", "class")
        found[method] = [100 * value for value in values.values() if value is not None]
    return found


def compare(found: Mapping[str, Sequence[float]], augment: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Return lines and notes from the accuracies of each method, seed by seed."""
    lines = [
        {
            "method": method,
            "average accuracy, %": f"{statistics.mean(values):.1f}",
            "standard error": f"{report.summary(values)['sem']:.1f}",
            "least": f"{min(values):.1f}",
            "most": f"{max(values):.1f}",
        }
        for method, values in found.items()
    ]
    notes = []
    for other in [method for method in found if method != "icarl" and "icarl" in found]:
        gaps = [a - b for a, b in zip(found["icarl"], found[other], strict=True)]
        gap, error = statistics.mean(gaps), report.summary(gaps)["sem"]
        reached = "reached" if gap > 3 * error else "NOT reached"
        notes.append(
            f"iCaRL is {gap:.1f} above {other}, with a standard error of {error:.1f} over the same class orders "
            f"(target: more than 3 of these): {reached}."
        )
    seeds = len(next(iter(found.values())))
    about = f"ResNet-32, 250 images per class, 10 epochs, 200 images remembered, {'' if augment else 'no '}augmentation"
    return lines, [*notes, f"{about}; {seeds} orders."]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder of cifar10.npz")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds [%(default)s]")
    parser.add_argument("--augment", action="store_true", help="crop and mirror at random")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one for each CPU core)")
    parser.add_argument("--output", type=Path, default=Path("runs/icarl-cifar"), help="folder of the study")
    options = parser.parse_args(arguments)
    lines, notes = compare(carry_out(options), options.augment)
    print(report.table(lines))
    for note in notes:
        print(f"- {note}")
    if options.seeds == SEEDS and not options.augment:  # else it is not what the page says
        report.save_part("icarl_cifar", lines, "python benchmarks/icarl_cifar.py", notes)
        run.write_page()


if __name__ == "__main__":
    main()
