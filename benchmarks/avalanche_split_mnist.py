"""Split-MNIST, 5 x 2, one epoch: clframe beside Avalanche and a hand-written loop, on the same work.

    python benchmarks/avalanche_split_mnist.py --data-root FOLDER-OF-MNIST.NPZ

Four variants, each with fine-tuning and with EWC; the first two also with the methods that replay (`REPLAY`):

- `clframe`: a whole `clframe.run` with all its defaults: event file, checkpoints, saved predictions, run folder.
- `avalanche`: SplitMNIST, its data loader, its EvaluationPlugin with accuracy and forgetting, its TensorBoard logger,
  its Naive and EWC strategies. It evaluates one reading where the others evaluate two, and its EWC squares gradients of
  batch means, which is less work than a Fisher per sample.
- `avalanche-tensors`: the same, fed with a TensorDataset that is normalized in advance.
- `minimal`: PyTorch by hand. Images staged as uint8 and normalized per batch, clipping, the fused Adam that clframe
  uses too, both readings, an event file, weights saved after each experience, and for EWC the same per-sample empirical
  Fisher, kept as one quadratic.

All have the MLP 400-400, Adam at 1e-3, batches of 128, classes in natural order, and evaluate all experiences so far
after each one. `seconds` is the whole run after the imports: from reading the data file to the last figure. Each
variant and method has a process of its own, which makes one run to warm up (torch's first optimizer step alone costs
seconds) and then one run per repetition, in turns with the others. `cold` is the wall time of a whole process from its
start to the end of its first run, imports included. `MiB` is the highest resident memory of that.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VARIANTS = ("clframe", "avalanche", "avalanche-tensors", "minimal")
METHODS = ("fine-tuning", "ewc")
REPLAY = ("er", "icarl", "generative-replay")
SELDOM = {"avalanche-tensors": 3}  # no ratio is promised of it, and it takes a quarter of the time
THREADS = 2
BATCH = 128
LAMBDA = 100.0
MEAN, STD = 0.1307, 0.3081
EXPERIENCES = [(2 * i, 2 * i + 1) for i in range(5)]
PLUGINS: dict[str, dict[str, Any]] = {  # with what Avalanche's classes of these names do by default
    "ewc": {"lambda": LAMBDA, "labels": "empirical", "samples": None},
    "er": {"size": 500, "memory": "balanced"},
    "icarl": {"size": 2000},
    "generative-replay": {"hidden": [400], "z": 2, "iterations": 95},  # an epoch, as the solver
}

Figures = dict[str, Any]


# The four variants: each gives steps, and the average accuracy after the last experience of the readings it has.


def with_clframe(data_root: Path, layout: Path, method: str, folder: Path) -> Figures:
    """One call of the Python API, as the command line makes it."""
    import clframe

    marks: dict[str, float] = {}
    steps = 0

    def listen(record: dict[str, Any]) -> None:
        nonlocal steps
        marks.setdefault(record["kind"], time.perf_counter())
        if record["kind"] == "phase":
            steps += record["steps"]

    start = time.perf_counter()
    results = clframe.run(
        {"name": "split-mnist", "normalize": True},
        {"name": "mlp"},
        [{method: PLUGINS[method]}] if method in PLUGINS else [],
        train={"epochs": 1, "batch_size": BATCH, "lr": 1e-3, "threads": THREADS},
        run={"data_root": str(data_root), "output": str(folder / "run")},
        listeners=[listen],
    )
    last = {reading: statistics.fmean(matrix[-1]) for reading, matrix in results.accuracy.items()}
    return {"steps": steps, "load": marks["start"] - start, **last}


def with_avalanche(data_root: Path, layout: Path, method: str, folder: Path) -> Figures:
    """Avalanche as its own examples use it."""
    from avalanche.benchmarks import SplitMNIST

    start = time.perf_counter()
    benchmark = SplitMNIST(n_experiences=5, dataset_root=layout, fixed_class_order=list(range(10)))
    return {"load": time.perf_counter() - start, **_avalanche(benchmark, method, folder)}


def with_avalanche_tensors(data_root: Path, layout: Path, method: str, folder: Path) -> Figures:
    """Avalanche with a benchmark made of tensors."""
    import numpy as np
    import torch
    from avalanche.benchmarks import tensors_benchmark

    start = time.perf_counter()
    pairs = {}
    with np.load(data_root / "mnist.npz") as file:
        for part in ("train", "test"):
            x = (torch.from_numpy(file[f"x_{part}"]).float().div_(255) - MEAN) / STD
            y = torch.from_numpy(file[f"y_{part}"]).long()
            where = [torch.isin(y, torch.tensor(classes)) for classes in EXPERIENCES]
            pairs[part] = [(x[rows].unsqueeze(1), y[rows]) for rows in where]
    benchmark = tensors_benchmark(pairs["train"], pairs["test"], task_labels=[0] * 5)
    return {"load": time.perf_counter() - start, **_avalanche(benchmark, method, folder)}


def _avalanche(benchmark: Any, method: str, folder: Path) -> Figures:
    import torch
    from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
    from avalanche.logging import TensorboardLogger
    from avalanche.models import SimpleMLP
    from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
    from avalanche.training.supervised import EWC, GenerativeReplay, ICaRL, Naive, Replay

    class Clip(SupervisedPlugin):  # type: ignore[misc]
        steps = 0

        def before_update(self, strategy: Any, **kwargs: Any) -> None:
            self.steps += 1
            torch.nn.utils.clip_grad_norm_(strategy.model.parameters(), 1.0)

    torch.manual_seed(0)
    model = SimpleMLP(num_classes=10, hidden_size=400, hidden_layers=2, drop_rate=0.0)
    clip = Clip()
    common = {
        "optimizer": torch.optim.Adam(model.parameters(), lr=1e-3),
        "train_mb_size": BATCH,
        "train_epochs": 1,
        "eval_mb_size": 512,
        "plugins": [clip],
        "evaluator": EvaluationPlugin(
            accuracy_metrics(epoch=True, experience=True, stream=True),
            forgetting_metrics(experience=True, stream=True),
            loggers=[TensorboardLogger(folder / "tensorboard")],
        ),
    }
    if method == "icarl":  # it has its own loss, and builds the model of two parts
        own = {"memory_size": 2000, "buffer_transform": None, "fixed_memory": True}
        features = torch.nn.Sequential(torch.nn.Flatten(), *model.features)
        strategy = ICaRL(feature_extractor=features, classifier=model.classifier, **own, **common)
    else:
        kind, own = {
            "fine-tuning": (Naive, {}),
            "ewc": (EWC, {"ewc_lambda": LAMBDA, "mode": "separate"}),
            "er": (Replay, {"mem_size": 500}),
            "generative-replay": (GenerativeReplay, {}),
        }[method]
        strategy = kind(model=model, criterion=torch.nn.CrossEntropyLoss(), **own, **common)
    for i, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        figures = strategy.eval(benchmark.test_stream[: i + 1])
    single = [value for name, value in figures.items() if name.startswith("Top1_Acc_Exp/")]
    return {"steps": clip.steps, "class": statistics.fmean(single[-5:])}


def by_hand(data_root: Path, layout: Path, method: str, folder: Path) -> Figures:
    """Do the same work as a careful person writes it in PyTorch alone."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from torch.nn import functional
    from torch.utils.tensorboard import SummaryWriter

    start = time.perf_counter()
    parts = {}
    with np.load(data_root / "mnist.npz") as file:
        for part in ("train", "test"):
            x = torch.from_numpy(file[f"x_{part}"]).flatten(1)
            y = torch.from_numpy(file[f"y_{part}"]).long()
            where = [torch.isin(y, torch.tensor(classes)).nonzero().flatten() for classes in EXPERIENCES]
            parts[part] = [(x[rows], y[rows]) for rows in where]
    load = time.perf_counter() - start

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))
    parameters = list(model.parameters())
    writer = SummaryWriter(str(folder / "tensorboard"))
    strength: list[Any] = []  # sum of the Fishers of all experiences, and the mean of their anchors weighted by them
    center: list[Any] = []
    steps = 0

    def normalized(x: Any) -> Any:
        return x.float().sub_(MEAN * 255).div_(STD * 255)

    for i, (x, y) in enumerate(parts["train"]):
        seen = EXPERIENCES[i][-1] + 1
        optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
        model.train()
        for rows in torch.randperm(len(y)).split(BATCH):
            base = loss = functional.cross_entropy(model(normalized(x[rows]))[:, :seen], y[rows])
            if strength:
                terms = [(a * (p - m) ** 2).sum() for a, m, p in zip(strength, center, parameters, strict=True)]
                loss = base + LAMBDA / 2 * torch.stack(terms).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if steps % 50 == 0:
                writer.add_scalar("loss/base", base.item(), steps)
                writer.add_scalar("loss/ewc", (loss - base).item(), steps)
            steps += 1

        model.eval()
        if method == "ewc":
            fisher = [torch.zeros_like(p) for p in parameters]
            for chunk_x, chunk_y in zip(x.split(512), y.split(512), strict=True):
                inputs, deltas = [], []
                a = normalized(chunk_x)
                for layer in model:
                    if isinstance(layer, nn.Linear):
                        inputs.append(a.detach())
                    a = layer(a)
                    if isinstance(layer, nn.Linear):
                        deltas.append(a)
                total = functional.cross_entropy(a[:, :seen], chunk_y, reduction="sum")
                for k, delta in enumerate(torch.autograd.grad(total, deltas)):
                    squared = delta**2
                    fisher[2 * k] += squared.T @ inputs[k] ** 2
                    fisher[2 * k + 1] += squared.sum(0)
            with torch.no_grad():
                fisher = [f / len(y) for f in fisher]
                before = strength or [torch.zeros_like(p) for p in parameters]
                middle = center or [p.clone() for p in parameters]
                strength = [a + f for a, f in zip(before, fisher, strict=True)]
                center = [
                    torch.where(s > 0, (a * m + f * p) / s, p)
                    for s, a, m, f, p in zip(strength, before, middle, fisher, parameters, strict=True)
                ]

        row: dict[str, list[float]] = {"class": [], "task": []}
        with torch.inference_mode():
            for j, (test_x, test_y) in enumerate(parts["test"][: i + 1]):
                right = {"class": 0, "task": 0}
                first, last = EXPERIENCES[j]
                for chunk_x, chunk_y in zip(test_x.split(512), test_y.split(512), strict=True):
                    logits = model(normalized(chunk_x))[:, :seen]
                    right["class"] += int((logits.argmax(1) == chunk_y).sum())
                    right["task"] += int((logits[:, first : last + 1].argmax(1) + first == chunk_y).sum())
                for reading, count in right.items():
                    row[reading].append(count / len(test_y))
                    writer.add_scalar(f"accuracy/{reading}/{j}", row[reading][-1], i)
        save_file(model.state_dict(), folder / f"weights-{i}.safetensors")
    writer.close()
    return {"steps": steps, "load": load, **{reading: statistics.fmean(cells) for reading, cells in row.items()}}


RUNNERS: dict[str, Callable[[Path, Path, str, Path], Figures]] = {
    "clframe": with_clframe,
    "avalanche": with_avalanche,
    "avalanche-tensors": with_avalanche_tensors,
    "minimal": by_hand,
}


# The processes.


def peak_kib() -> int:
    """Peak memory of this process; `ru_maxrss` would begin with that of the process that started it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work(variant: str, method: str, data_root: Path, layout: Path) -> None:
    """Serve as a worker: import, say so, and then make one run for each line that it reads."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not mix with the answers
    import torch

    torch.set_num_threads(THREADS)
    if variant == "clframe":
        modules = ["clframe.api", "clframe.plugins.tensorboard", "clframe.scenarios.mnist"]
        modules += [f"clframe.plugins.{method.replace('-', '_')}"] if method in PLUGINS else []
    elif variant == "minimal":
        modules = ["numpy", "safetensors.torch", "torch.utils.tensorboard"]
    else:
        modules = ["avalanche.benchmarks", "avalanche.training", "avalanche.logging"]
    for module in modules:
        importlib.import_module(module)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for _ in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            gc.collect()
            start = time.perf_counter()
            figures = RUNNERS[variant](data_root, layout, method, Path(folder))
            figures["seconds"] = time.perf_counter() - start
        peak = peak_kib()
        figures["MiB"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
        print(json.dumps(figures), file=answers, flush=True)


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, variant: str, method: str, data_root: Path, layout: Path, log: Any) -> None:
        start = time.perf_counter()
        command = [sys.executable, __file__, "--worker", variant, method, "--data-root", str(data_root)]
        self.process = subprocess.Popen(
            [*command, "--layout", str(layout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "GOMP_SPINCOUNT": "10000"},  # as `clframe` sets it; steadier for all of them
        )
        self._answer()
        self.imports = time.perf_counter() - start
        self.first = self.run()
        self.cold = time.perf_counter() - start

    def run(self) -> Figures:
        """One run, its figures."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Figures:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended without an answer; its messages stand in the log file")
        answer: Figures = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@contextlib.contextmanager
def torchvision_layout(data_root: Path) -> Iterator[Path]:
    """Yield a temporary folder with MNIST's idx files as torchvision looks for them, written from `mnist.npz`."""
    import numpy as np

    names = {
        "x_train": "train-images-idx3-ubyte",
        "y_train": "train-labels-idx1-ubyte",
        "x_test": "t10k-images-idx3-ubyte",
        "y_test": "t10k-labels-idx1-ubyte",
    }
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        with np.load(data_root / "mnist.npz") as file:
            for key, name in names.items():
                array = file[key].astype(np.uint8)
                header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
                (raw / name).write_bytes(header + array.tobytes())
        yield Path(folder)


def measure(
    data_root: Path,
    repetitions: int = 9,
    methods: tuple[str, ...] = METHODS,
    variants: tuple[str, ...] = VARIANTS,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of the table, one per method and variant, and notes on what was reached."""
    runs: dict[tuple[str, str], list[Figures]] = {}
    workers: dict[tuple[str, str], Worker] = {}
    with torchvision_layout(data_root) as layout, tempfile.TemporaryFile("w+") as log:
        try:
            for method in methods:
                for variant in variants:
                    workers[method, variant] = Worker(variant, method, data_root, layout, log)
                    print(f"{method}, {variant}: warm", file=sys.stderr, flush=True)
            for repetition in range(repetitions):
                for (method, variant), worker in workers.items():
                    if repetition % SELDOM.get(variant, 1) == 0:
                        runs.setdefault((method, variant), []).append(worker.run())
                print(f"repetition {repetition + 1} of {repetitions}", file=sys.stderr, flush=True)
        except BaseException:
            log.seek(0)
            print(log.read()[-4000:], file=sys.stderr)
            raise
        finally:
            for worker in workers.values():
                worker.close()

    lines, notes = [], []
    for method in methods:
        medians = {v: statistics.median(run["seconds"] for run in runs[method, v]) for v in variants}
        for variant in variants:
            found, worker = runs[method, variant], workers[method, variant]
            seconds = [run["seconds"] for run in found]
            line = {
                "method": method,
                "variant": variant,
                "seconds": f"{medians[variant]:.2f}",
                "least": f"{min(seconds):.2f}",
                "most": f"{max(seconds):.2f}",
                "of it loading": f"{statistics.median(run['load'] for run in found):.2f}",
                "over minimal": f"{medians[variant] / medians['minimal']:.2f}" if "minimal" in medians else None,
                "imports": f"{worker.imports:.1f}",
                "cold": f"{worker.cold:.1f}",
                "MiB": f"{worker.first['MiB']:.0f}",
                "steps": found[-1]["steps"],
                "class-IL": f"{100 * statistics.fmean(run['class'] for run in found):.1f}",
                "task-IL": f"{100 * statistics.fmean(run['task'] for run in found):.1f}"
                if "task" in found[-1]
                else None,
            }
            lines.append(line)
        if {"clframe", "avalanche"} <= set(variants):
            ratio = medians["avalanche"] / medians["clframe"]
            notes.append(
                f"{method}: clframe is {ratio:.2f} times as fast as Avalanche's usual way (target: at least 3)."
            )
        if {"clframe", "minimal"} <= set(variants):
            ratio = medians["clframe"] / medians["minimal"]
            notes.append(f"{method}: clframe takes {ratio:.3f} times the minimal loop's time (target: at most 1.10).")
    for method in methods:
        counts = {line["steps"] for line in lines if line["method"] == method}
        if len(counts) > 1:
            notes.append(f"{method}: the variants made different numbers of optimizer steps, {sorted(counts)}.")
    if len(counts := {line["steps"] for line in lines}) == 1:
        notes.append(f"All variants made {counts.pop()} optimizer steps.")
    seldom = " `avalanche-tensors` takes part in every third." if "avalanche-tensors" in variants else ""
    notes.append(f"{THREADS} threads, {repetitions} repetitions in turns, medians; ratios are of medians.{seldom}")
    return lines, notes


def herding_time() -> str:
    """Return a note on how long a memory takes to choose its images of one class."""
    import torch

    from clframe.toolkit.memory import herding

    features = torch.nn.functional.normalize(torch.randn(5000, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        herding(features, 500)
        times.append(time.perf_counter() - start)
    return (
        f"Herding of 500 out of 5,000 images of 512 features takes {statistics.median(times):.2f} s (target: below 2)."
    )


def main() -> None:
    """Run the command line; workers are this file again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data-root", type=Path, help="folder of mnist.npz (default: CLFRAME_DATA, else the user's cache)"
    )
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS + REPLAY)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--layout", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(*given.worker, data_root=given.data_root, layout=given.layout)
        return
    from report import table

    from clframe.settings import data_root

    root = data_root(given.data_root and str(given.data_root))
    if not (root / "mnist.npz").exists():
        raise SystemExit(f"no mnist.npz in {root}: put it there, or name its folder with --data-root")
    lines, notes = measure(root, given.repetitions, tuple(given.methods), tuple(given.variants))
    print(table(lines))
    for note in notes:
        print(f"- {note}")


if __name__ == "__main__":
    main()
