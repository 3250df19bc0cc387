"""What the hooks cost in a step: the engine's loop with no plugin and with three that do nothing, and the bare step.

    python benchmarks/hook_cost.py

The network and the batch are small, so that a step is short beside what is measured. The bare step is written
out here and does what the engine's does: pick the rows, normalize, forward, cross-entropy, backward, clip, step.
The three plugins implement the hooks of a step. Times are of the processor, medians over runs in turns, of steps
after the first thousand.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

WARM, TIMED = 1000, 2000
BATCH = 32
WIDTHS = (64, 32, 10)


def _arrays() -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(17, (1000, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return x, torch.arange(1000) % 10


def _backbone() -> Any:
    from torch import nn

    class Small(nn.Module):
        width = WIDTHS[1]

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTHS[0], WIDTHS[1])

        def features(self, x: Any) -> Any:
            return self.layer(x.flatten(1)).relu()

    return Small()


def idle_plugins(count: int) -> list[Any]:
    """Plugins that implement the hooks of a step and do nothing; one of them also `base_loss`, which has one owner."""
    from clframe import Plugin, hookimpl

    class Idle(Plugin):
        observer = True

        @hookimpl
        def extra_batch(self, run: Any, batch: Any) -> None:
            return None

        @hookimpl
        def penalty(self, run: Any, batch: Any, outputs: Any) -> None:
            return None

        @hookimpl
        def after_backward(self, run: Any, batch: Any) -> None:
            return None

        @hookimpl
        def after_step(self, run: Any, batch: Any) -> None:
            return None

    class Owner(Idle):
        @hookimpl
        def base_loss(self, run: Any, batch: Any, outputs: Any) -> None:
            return None

    return [type(f"Idle{i}", (Idle if i else Owner,), {"name": f"idle-{i}"})() for i in range(count)]


def bare() -> float:
    """Microseconds of a step by hand."""
    import torch
    from torch import nn
    from torch.nn import functional

    x, y = _arrays()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*WIDTHS[:2]), nn.ReLU(), nn.Linear(*WIDTHS[1:]))
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    done = 0
    start = 0.0
    while True:
        for rows in torch.randperm(len(y)).split(BATCH):
            if len(rows) < BATCH:
                continue
            if done == WARM:
                start = time.process_time()
            loss = functional.cross_entropy(model(x[rows].to(torch.float32).div_(16).flatten(1)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            done += 1
            if done == WARM + TIMED:
                return (time.process_time() - start) / TIMED * 1e6


def in_engine(n_plugins: int) -> float:
    """Microseconds of a step in a run with `n_plugins` plugins that do nothing."""
    import clframe
    from clframe import Arrays, Transform, split_classes

    marks: list[float] = []

    def listen(record: dict[str, Any]) -> None:
        if record["kind"] == "step":
            marks.append(time.process_time())

    x, y = _arrays()
    arrays = Arrays("noise", x, y, x[:100], y[:100], tuple("0123456789"), Transform(scale=16))
    clframe.run(
        split_classes("noise", arrays, experiences=1),
        _backbone(),
        idle_plugins(n_plugins),
        train={"iterations": WARM + TIMED, "batch_size": BATCH, "threads": 1},
        run={"log_every": WARM},
        listeners=[listen],
    )
    return (marks[-1] - marks[0]) / TIMED * 1e6


def dispatch(n_plugins: int) -> float:
    """Microseconds of the calls of a step's five hooks alone."""
    from clframe import compose

    made = compose.manager(idle_plugins(n_plugins))
    hook = made.hook
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for _ in range(TIMED):
            hook.extra_batch(run=None, batch=None)
            hook.base_loss(run=None, batch=None, outputs=None)
            hook.penalty(run=None, batch=None, outputs=None)
            hook.after_backward(run=None, batch=None)
            hook.after_step(run=None, batch=None)
        best = min(best, time.process_time() - start)
    return best / TIMED * 1e6


def measure(repetitions: int = 9) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of the table, and notes that compare them with the target."""
    import torch

    torch.set_num_threads(1)
    bare()  # torch's first optimizer step takes seconds
    runs: dict[str, list[float]] = {"bare step": [], "engine, no plugin": [], "engine, 3 idle plugins": []}
    for _ in range(repetitions):
        runs["bare step"].append(bare())
        runs["engine, no plugin"].append(in_engine(0))
        runs["engine, 3 idle plugins"].append(in_engine(3))
    medians = {name: statistics.median(values) for name, values in runs.items()}
    lines = [
        {
            "loop": name,
            "us per step": f"{medians[name]:.0f}",
            "least": f"{min(values):.0f}",
            "most": f"{max(values):.0f}",
        }
        for name, values in runs.items()
    ]
    none, three = dispatch(0), dispatch(3)
    step, empty, full = medians.values()
    notes = [
        f"Three idle plugins add {full - empty:.0f} us to a step of the engine; the calls of a step's five hooks alone "
        f"take {none:.1f} us without a plugin and {three:.1f} us with three (target for the hooks: at most 20 us).",
        "The engine as a whole, with hooks, records and the watch for values that are not finite, adds "
        f"{empty - step:.0f} us to the bare step.",
        f"MLP {'-'.join(map(str, WIDTHS))}, batches of {BATCH}, fused Adam, 1 thread; medians of processor time over "
        f"{repetitions} repetitions in turns.",
    ]
    return lines, notes


if __name__ == "__main__":
    from report import table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=9)
    lines, notes = measure(parser.parse_args().repetitions)
    print(table(lines))
    for note in notes:
        print(f"- {note}")
