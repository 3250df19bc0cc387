"""What a method adds to a training step: clframe beside Avalanche, on the same work.

    python benchmarks/method_cost.py --data-root FOLDER-OF-MNIST.NPZ

A step is timed in the third experience of split-MNIST, 5 x 2, so that penalties hold weights of two experiences and
teachers exist: from one batch to the next, without evaluation, importance passes and the first steps of the optimizer.
Both frameworks have the MLP 400-400 with biases, all ten logits in the loss, batches of 128 of the same 2,000 images
per experience, fused Adam at 1e-3 (clframe's own choice; Avalanche is handed it), clipping to norm 1, and no loggers.
Avalanche is fed with normalized float tensors, picked by index; clframe picks and normalizes its uint8 images as
always. The experiences before are short, as a step's cost does not depend on what was learned.

What differs: Avalanche's network has one head of 10, and clframe's is built for all classes as five blocks of 2
(`train.logits=all`). EWC `separate` of Avalanche adds up a penalty for each earlier experience, offline EWC of clframe
keeps their sum as one. Avalanche's SI takes the gradient with the penalty's own in it, where clframe goes backward
twice. Avalanche's LwF distils the old logits, `lwf.form=all` all of them. LFL freezes the last layer in both; in
clframe it needs a setting for that, the domain-incremental one, with a head of 2.

Methods that Avalanche lacks stand beside fine-tuning of clframe in the same setting and network. `over fine-tuning`
and `clframe / Avalanche` are medians of the ratios within each repetition, in which all methods run in turns. Each
framework has a process of its own; only one of them works at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

THREADS = 2
BATCH = 128
PER_CLASS = 1000
MEAN, STD = 0.1307, 0.3081
EXPERIENCES = [(2 * i, 2 * i + 1) for i in range(5)]
MEASURED = 2  # the third experience
# steps of each experience before, steps of the measured one before the clock starts, and steps that are timed
LENGTHS = {"mlp": (10, 10, 100), "cnn-small": (4, 2, 10)}

Options = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A method of clframe as it is measured, and what Avalanche calls the same; None: it has no such method."""

    name: str
    plugins: dict[str, Options] = field(default_factory=dict)
    setting: Literal["class", "task", "domain"] = "class"
    logits: str | None = "all"
    model: str = "mlp"
    rival: str | None = None

    @property
    def base(self) -> tuple[str, str]:
        """What it shares with the fine-tuning that it is compared with."""
        return self.setting, self.model


JOBS = (
    Job("fine-tuning", rival="fine-tuning"),
    Job("ewc, offline", {"ewc": {}}, rival="ewc, separate"),
    Job("ewc, online", {"ewc": {"form": "online"}}, rival="ewc, online"),
    Job("si", {"si": {}}, rival="si"),
    Job("mas", {"mas": {"heads": True, "samples": 500}}, rival="mas"),
    Job("lwf, all", {"lwf": {"form": "all"}}, rival="lwf"),
    Job("lwf, seen", {"lwf": {"form": "seen"}}, logits=None),
    Job("lwf, local", {"lwf": {"form": "local"}}, logits=None),
    Job("lwf, mc", {"lwf": {"form": "mc"}}, logits=None),
    Job("a-ltm", {"a-ltm": {}}),
    Job("fine-tuning", setting="domain", logits=None),
    Job("lfl", {"lfl": {"lambda": 1.0}}, setting="domain", logits=None, rival="lfl"),
    Job("fine-tuning", setting="task", logits=None),
    Job("lwf, heads", {"lwf": {"form": "heads"}}, setting="task", logits=None),
    Job("a-ltm", {"a-ltm": {}}, setting="task", logits=None),
    Job("feature-extraction", {"feature-extraction": {}}, setting="task", logits=None),
    Job("finetune-fc", {"finetune-fc": {}}, setting="task", logits=None),
    Job("fine-tuning", model="cnn-small", logits="current"),
    Job("lwm", {"lwm": {}}, model="cnn-small", logits=None),
)
RIVALS = ("fine-tuning", "ewc, separate", "ewc, online", "si", "mas", "lwf", "lfl")
USUAL_LOADER = "fine-tuning, its own data loader"


# The two frameworks: each gives milliseconds of a step.


@lru_cache
def _arrays(data_root: Path) -> Any:
    """Return the first training images of each digit, and few test images, as evaluation is not measured."""
    import numpy as np
    import torch

    parts = []
    with np.load(data_root / "mnist.npz") as file:
        for part, count in (("train", PER_CLASS), ("test", 10)):
            x, y = torch.from_numpy(file[f"x_{part}"])[:, None], torch.from_numpy(file[f"y_{part}"]).long()
            rows = torch.cat([(y == label).nonzero().flatten()[:count] for label in range(10)])
            parts += [x[rows], y[rows]]
    return parts


def in_clframe(job: Job, data_root: Path) -> float:
    """Run up to the measured experience."""
    import clframe
    from clframe import Arrays, Phase, Plugin, Transform, hookimpl, split_classes

    before, warm, timed = LENGTHS[job.model]
    marks: list[float] = []

    class Clock(Plugin):
        """Named last, so that its hooks come after the method's."""

        name = "clock"
        observer = True

        @hookimpl
        def phases(self, run: Any) -> list[Phase]:
            index = run.experience.index
            steps = before if index < MEASURED else warm + timed if index == MEASURED else 0
            return [Phase("train", iterations=steps)]

        @hookimpl
        def after_step(self, run: Any) -> None:
            if run.experience.index == MEASURED and run.step in (warm - 1, warm + timed - 1):
                marks.append(time.perf_counter())

    digits = Arrays("mnist", *_arrays(data_root), tuple("0123456789"), Transform(mean=(MEAN,), std=(STD,)))
    clframe.run(
        split_classes("split-mnist", digits, experiences=len(EXPERIENCES), setting=job.setting),
        {"name": job.model},
        [*({name: options} for name, options in job.plugins.items()), Clock()],
        train={"optimizer": "adam", "lr": 1e-3, "batch_size": BATCH, "threads": THREADS}
        | ({"logits": job.logits} if job.logits else {}),
        run={"predictions": False, "device": "cpu"},
    )
    start, end = marks
    return 1000 * (end - start) / timed


def in_avalanche(method: str, data_root: Path) -> float:
    """Training up to the measured experience by one of its strategies."""
    import torch
    from avalanche.benchmarks import tensors_benchmark
    from avalanche.models import SimpleMLP
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin

    before, warm, timed = LENGTHS["mlp"]
    marks: list[float] = []

    class Step(SupervisedPlugin):  # type: ignore[misc]
        """Clips the gradient, and notes the time."""

        steps = 0

        def before_update(self, strategy: Any, **kwargs: Any) -> None:
            torch.nn.utils.clip_grad_norm_(strategy.model.parameters(), 1.0)

        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            self.steps += 1
            if strategy.clock.train_exp_counter == MEASURED and self.steps in (warm, warm + timed):
                marks.append(time.perf_counter())

    class Fed:
        """In place of a data loader: batches of tensors, as many as are asked for."""

        def make_train_dataloader(self, **kwargs: Any) -> None:
            index = self.experience.current_experience  # type: ignore[attr-defined]
            self.dataloader = _batches(*pairs[index], before if index < MEASURED else warm + timed)

    x, y, test_x, test_y = _arrays(data_root)
    normalized = (x.float() / 255 - MEAN) / STD
    where = [torch.isin(y, torch.tensor(classes)) for classes in EXPERIENCES]
    pairs = [(normalized[rows], y[rows]) for rows in where]
    few = [(test_x.float(), test_y)] * len(EXPERIENCES)
    benchmark = tensors_benchmark(pairs, few, task_labels=[0] * len(EXPERIENCES))

    kinds: dict[str, tuple[str, Options]] = {
        "fine-tuning": ("Naive", {}),
        USUAL_LOADER: ("Naive", {}),
        "ewc, separate": ("EWC", {"ewc_lambda": 100.0, "mode": "separate"}),
        "ewc, online": ("EWC", {"ewc_lambda": 100.0, "mode": "online", "decay_factor": 1.0}),
        "si": ("SynapticIntelligence", {"si_lambda": 1.0}),
        "mas": ("MAS", {}),
        "lwf": ("LwF", {"alpha": 1.0, "temperature": 2.0}),
        "lfl": ("LFL", {"lambda_e": 1.0}),
    }
    kind, options = kinds[method]
    strategy_class = getattr(supervised, kind)
    if method != USUAL_LOADER:
        strategy_class = type(f"Fed{kind}", (Fed, strategy_class), {})
    torch.manual_seed(0)
    model = SimpleMLP(num_classes=10, hidden_size=400, hidden_layers=2, drop_rate=0.0)
    step = Step()
    strategy = strategy_class(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3, fused=True),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
        train_epochs=1,
        plugins=[step],
        evaluator=EvaluationPlugin(loggers=[]),
        **options,
    )
    for index, experience in enumerate(benchmark.train_stream[: MEASURED + 1]):
        step.steps = 0
        if method == USUAL_LOADER:
            steps = before if index < MEASURED else warm + timed
            strategy.train_epochs = math.ceil(steps * BATCH / len(pairs[index][1]))
        strategy.train(experience)
    start, end = marks
    return 1000 * (end - start) / timed


def _batches(x: Any, y: Any, steps: int) -> Iterator[list[Any]]:
    """Whole batches in random order, as Avalanche has them: images, labels, tasks."""
    import torch

    per_epoch = len(y) // BATCH
    tasks = torch.zeros(BATCH, dtype=torch.int64)
    order = torch.empty(0, dtype=torch.int64)
    for i in range(steps):
        if i % per_epoch == 0:
            order = torch.randperm(len(y))
        rows = order[i % per_epoch * BATCH :][:BATCH]
        yield [x.index_select(0, rows), y.index_select(0, rows), tasks]


# The processes.


def work(framework: str, data_root: Path) -> None:
    """Serve as a worker: read what to measure, a line each, and answer with milliseconds of a step."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not mix with the answers
    import torch

    torch.set_num_threads(THREADS)
    for line in sys.stdin:
        gc.collect()
        asked = json.loads(line)
        found = in_clframe(JOBS[asked], data_root) if framework == "clframe" else in_avalanche(asked, data_root)
        print(json.dumps(found), file=answers, flush=True)


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, framework: str, data_root: Path, log: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", framework, "--data-root", str(data_root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "GOMP_SPINCOUNT": "10000"},  # as `clframe` sets it; steadier for both
        )

    def run(self, asked: int | str) -> float:
        """Milliseconds of a step of what is asked for."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended without an answer")
        answer: float = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def measure(data_root: Path, repetitions: int = 9) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of the table, one per method, and notes on what was reached."""
    ours: list[list[float]] = [[] for _ in JOBS]
    theirs: dict[str, list[float]] = {rival: [] for rival in (*RIVALS, USUAL_LOADER)}
    with tempfile.TemporaryFile("w+") as log:
        workers: list[Worker] = []
        try:
            for framework in ("clframe", "avalanche"):
                workers.append(Worker(framework, data_root, log))
            clframe, avalanche = workers
            clframe.run(0)  # torch's first optimizer step takes seconds
            avalanche.run("fine-tuning")
            for repetition in range(repetitions):
                for index, job in enumerate(JOBS):
                    ours[index].append(clframe.run(index))
                    if job.rival:
                        theirs[job.rival].append(avalanche.run(job.rival))
                theirs[USUAL_LOADER].append(avalanche.run(USUAL_LOADER))
                print(f"repetition {repetition + 1} of {repetitions}", file=sys.stderr, flush=True)
        except BaseException:
            log.seek(0)
            print(log.read()[-4000:], file=sys.stderr)
            raise
        finally:
            for worker in workers:
                worker.close()
    lines, notes = compare(JOBS, ours, theirs)
    notes.append(
        f"Batches of {BATCH}, {THREADS} threads; medians over {repetitions} repetitions in turns, of "
        f"{LENGTHS['mlp'][2]} steps each ({LENGTHS['cnn-small'][2]} with cnn-small)."
    )
    return lines, notes


def compare(
    jobs: Sequence[Job], ours: Sequence[Sequence[float]], theirs: Mapping[str, Sequence[float]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines and notes from milliseconds of a step by repetition: `ours` by job, `theirs` by Avalanche's name."""
    plain = {job.base: i for i, job in enumerate(jobs) if not job.plugins}
    lines: list[dict[str, Any]] = []
    against: dict[str, float] = {}
    for job, found in zip(jobs, ours, strict=True):
        line: dict[str, Any] = {
            "method": job.name,
            "setting": job.setting,
            "model": job.model,
            "clframe, ms": f"{statistics.median(found):.2f}",
            "over fine-tuning": f"{_ratio(found, ours[plain[job.base]]):.2f}",
            "Avalanche, ms": None,
            "over its fine-tuning": None,
            "clframe / Avalanche": None,
        }
        if job.rival:
            rival = theirs[job.rival]
            against[job.name] = _ratio(found, rival)
            line["Avalanche, ms"] = f"{statistics.median(rival):.2f}"
            line["over its fine-tuning"] = f"{_ratio(rival, theirs['fine-tuning']):.2f}"
            line["clframe / Avalanche"] = f"{against[job.name]:.2f}"
        lines.append(line)
    slower = {name: ratio for name, ratio in against.items() if ratio > 1}
    worst = max(against, key=lambda name: against[name])
    reached = (
        f"NOT reached: {', '.join(f'{name} takes {ratio:.2f} times as long' for name, ratio in slower.items())}"
        if slower
        else f"reached; the nearest is {worst}, with {against[worst]:.2f} of Avalanche's time"
    )
    fed, loaded = (statistics.median(theirs[name]) for name in ("fine-tuning", USUAL_LOADER))
    return lines, [
        f"A step of clframe is never slower than Avalanche's of the same method: {reached}.",
        f"With its own data loader, on tensors normalized in advance, a step of Avalanche's fine-tuning takes "
        f"{loaded:.2f} ms in place of {fed:.2f}.",
    ]


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def main() -> None:
    """Run the command line; workers are this file again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data-root", type=Path, help="folder of mnist.npz (default: CLFRAME_DATA, else the user's cache)"
    )
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--worker", choices=["clframe", "avalanche"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.data_root)
        return
    from report import table

    from clframe.settings import data_root

    root = data_root(given.data_root and str(given.data_root))
    if not (root / "mnist.npz").exists():
        raise SystemExit(f"no mnist.npz in {root}: put it there, or name its folder with --data-root")
    lines, notes = measure(root, given.repetitions)
    print(table(lines))
    for note in notes:
        print(f"- {note}")


if __name__ == "__main__":
    main()
