"""What a task's network costs without the channels that never open for it.

    python benchmarks/gated_inference.py

Networks with channel gates learn split-digits, task told. For each task the compacted copy
(`clframe.toolkit.compaction.compact`) is timed beside the gated network on the same images, in turns; the share of
multiply-adds of convolutions that it lacks stands beside the share of the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

IMAGES = 64
SHAPE = (1, 28, 28)  # larger than those learned, which are so small that all but convolutions counts as much
REPETITIONS = 15
SPARSITIES = (0.5, 1.0, 2.0)


def trained(sparsity: float, width: int) -> Any:
    """Return the network after the run."""
    import clframe
    from clframe import Plugin, hookimpl

    kept: list[Any] = []

    class Keep(Plugin):
        """Takes the network along."""

        name = "keep"
        observer = True

        @hookimpl
        def after_eval(self, run: clframe.Run) -> None:
            kept[:] = [run.model]

    clframe.run(
        {"name": "split-digits", "setting": "task", "order": "random"},
        {"name": "cnn-small", "widths": [width] * 3},
        [{"channel-gating": {"sparsity": sparsity}}, Keep()],
        train={"iterations": 400, "batch_size": 32, "optimizer": "adam", "lr": 1e-3, "clip": 0, "threads": 1},
        run={"seed": 0, "device": "cpu"},
    )
    return kept[0].eval()


def multiply_adds(model: Any, shape: tuple[int, ...]) -> int:
    """Of all convolutions, for one image."""
    import torch
    from torch import nn

    found: list[int] = []

    def count(conv: nn.Conv2d, args: Any, output: torch.Tensor) -> None:
        found.append(conv.weight[0].numel() * output[0].numel())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return sum(found)


def measure(sparsities: Sequence[float] = SPARSITIES, width: int = 64) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a line for each sparsity and task, and notes."""
    import torch

    from clframe.toolkit.compaction import compact

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.rand(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(0))
    lines, most = [], 0.0
    for sparsity in sparsities:
        model = trained(sparsity, width)
        for task in range(5):
            small = compact(model, task, SHAPE)
            told = torch.full((IMAGES,), task)
            seconds: dict[bool, list[float]] = {True: [], False: []}
            with torch.no_grad():
                most = max(most, (model(x, told).logits - small(x).logits).abs().max().item())
                for _ in range(REPETITIONS):
                    for gated in (True, False):
                        start = time.perf_counter()
                        if gated:
                            model(x, told)
                        else:
                            small(x)
                        seconds[gated].append(time.perf_counter() - start)
            whole, part = statistics.median(seconds[True]), statistics.median(seconds[False])
            model.select(task)
            lines.append(
                {
                    "sparsity": sparsity,
                    "task": task + 1,
                    "multiply-adds removed": f"{1 - multiply_adds(small, SHAPE) / multiply_adds(model, SHAPE):.0%}",
                    "gated, ms": f"{1000 * whole:.2f}",
                    "compacted, ms": f"{1000 * part:.2f}",
                    "time removed": f"{1 - part / whole:.0%}",
                }
            )
    torch.set_num_threads(threads)
    return lines, [
        f"Logits differ by {most:.1e} at most (target: 1e-6): {'reached' if most <= 1e-6 else 'NOT reached'}.",
        f"cnn-small of {width} channels, learned on 8x8 digits; {IMAGES} images of 28x28 at a time, 1 thread; medians "
        f"of {REPETITIONS}, in turns.",
    ]


def main() -> None:
    """Measure, print, and write the page."""
    import report
    from run import write_page

    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    lines, notes = measure()
    report.save_part("gated_inference", lines, "python benchmarks/gated_inference.py", notes)
    write_page()
    print(report.table(lines))
    for note in notes:
        print(f"- {note}")


if __name__ == "__main__":
    main()
