"""What a ResNet-32 dreams of CIFAR-10: how near dreams come to its statistics, and a picture of them.

    python benchmarks/dream_cifar.py --data-root FOLDER-OF-CIFAR10.NPZ --picture dreams.png

The network learns the first classes of CIFAR-10 from scratch; then the plugin `deep-inversion` dreams images of these
from it. What is printed is R_feature, summed over its 31 batch norms, and the share of images that the network takes
for what they are to be, of the noise that dreams begin as and of the dreams. With the defaults this takes some minutes
on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clframe
from clframe.data.pictures import encode_png
from clframe.plugins.deep_inversion import DeepInversion


def dream(options: argparse.Namespace) -> tuple[dict[str, float], Any]:
    """Return what was measured, by name, and the picture [H, W, 3] uint8 of the dreams."""
    figures: dict[str, float] = {}
    pictures: list[Any] = []
    began = time.perf_counter()

    def listen(record: dict[str, Any]) -> None:
        if record["kind"] == "eval" and record["experience"] == 0:
            figures["accuracy on test images"] = record["rows"]["task"][0]
            figures["seconds of learning"] = time.perf_counter() - began
        elif record["kind"] == "log":
            figures.update(record["values"])
        elif record["kind"] == "images":
            figures["seconds of learning and dreaming"] = time.perf_counter() - began
            pictures.append(record["picture"])

    plugin = DeepInversion(
        per_class=options.images // options.classes,
        iterations=options.iterations,
        lr=options.lr,
        anneal=options.anneal,
        feature=options.feature,
        tv=options.tv,
        batch_size=options.images,
    )
    clframe.run(
        {"name": "split-cifar", "experiences": 2, "first": options.classes, "limit": options.limit},
        "resnet32",
        [plugin],
        train={
            "iterations": 1,  # of the second experience, before which dreams are made
            "first": {"epochs": options.epochs},
            "batch_size": 64,
            "threads": options.threads,
        },
        run={"data_root": options.data_root, "device": options.device, "seed": options.seed},
        listeners=[listen],
    )
    return figures, pictures[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder of cifar10.npz")
    parser.add_argument("--picture", type=Path, help="PNG file to write the dreams to")
    parser.add_argument("--classes", type=int, default=2, help="classes to learn and dream of")
    parser.add_argument("--limit", type=int, default=500, help="images per class to learn from")
    parser.add_argument("--epochs", type=int, default=20, help="of learning them")
    parser.add_argument("--images", type=int, default=64, help="dreams, all at a time")
    parser.add_argument("--iterations", type=int, default=300, help="steps of the dreams")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of the dreams")
    parser.add_argument("--anneal", action=argparse.BooleanOptionalAction, default=True, help="let it fall to 0")
    parser.add_argument("--feature", type=float, default=0.5, help="weight of R_feature")
    parser.add_argument("--tv", type=float, default=1e-3, help="weight of the total variation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    figures, picture = dream(options)
    for name, value in figures.items():
        print(f"{name}: {value:.3g}")
    if options.picture:
        options.picture.write_bytes(encode_png(picture.numpy()))


if __name__ == "__main__":
    main()
