"""The run folder: what a run leaves on the disk, and whose it is while the run lasts."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from clframe import checkpoint
from clframe.errors import DataError, RunFailed, WrongUse
from clframe.evaluate import Row
from clframe.pictures import png
from clframe.reading import reason, shown
from clframe.results import FILE as RESULTS
from clframe.results import Results, check_format, to_json

PACKAGES = ("clframe", "torch", "torchvision", "pluggy", "numpy", "safetensors")
BASE = "base.json"  # what a run that extends another one knows of it
BINDING = ("torch", "device", "threads")  # what the last bit of a figure depends on


class RunFolder:
    """One run's folder, locked for as long as this object is open.

    Args:
        path: of the folder.
        new: make it; refuse one that is there already. Else open the folder of an earlier run.

    Raises:
        WrongUse: if `new` and the folder exists.
        DataError: if it cannot be written, is no run folder, or another process works on it.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        self.path = path
        self._new = new
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        try:
            self._check(new)
            path.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(path / ".lock")
            self._lock.acquire(blocking=False)
        except filelock.Timeout:
            raise DataError(f"Another process is working on the run folder {path}; wait for it or stop it.") from None
        except (OSError, ValueError) as error:  # ValueError: no file can be called so
            raise DataError(
                f"The run folder {shown(path)} cannot be written: {reason(error)}; name another with `--output`."
            ) from error

    def _check(self, new: bool) -> None:
        path = self.path
        if new and path.exists() and not path.is_dir():
            raise WrongUse(f"The run folder {path} is a file: name another with `--output`.")
        # a process that was killed before its run began leaves a lock and nothing else
        if new and path.exists() and any(p.name != ".lock" for p in path.iterdir()):
            a_run = (path / "config.yaml").is_file()
            raise WrongUse(
                f"The run folder {path} exists already: name another with `--output`, or go on with "
                f"`clframe resume {path}`."
                if a_run
                else f"The folder {path} is not empty, and no run folder: name another with `--output`."
            )
        if not new and not (path / "config.yaml").is_file():
            raise DataError(f"{shown(path)} is not a run folder: it has no config.yaml.")

    def close(self) -> None:
        """Give the folder back, when nothing is written any more; one in which nothing was begun goes away."""
        self._disk.shutdown()
        self._lock.release()
        if self._new and not (self.path / "config.yaml").exists():
            (self.path / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is in it
                self.path.rmdir()

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def save(self, tree: Mapping[str, Any]) -> None:
        """Write a checkpoint of `tree` as it is now, while the run goes on; first the one before must be written.

        Raises `RunFailed` if that one could not be, or if something in `tree` cannot be kept.
        """
        self.settle()
        self._writing = self._disk.submit(checkpoint.write, self.checkpoints, *checkpoint.copied(tree))

    def settle(self) -> None:
        """Wait for the checkpoint that is being written. Raises `RunFailed` if it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @property
    def finished(self) -> bool:
        """Whether the run has its results."""
        return (self.path / RESULTS).is_file()

    def begin(
        self,
        config: str,
        environment: Mapping[str, Any],
        split: Mapping[str, Any],
        base: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what is known before training: the resolved configuration, the environment, the split.

        `base` describes what was learnt before, in the run that this one extends.
        """
        try:
            if base is not None:
                checkpoint.write_text(self.path / BASE, to_json(base))
            checkpoint.write_text(self.path / "environment.json", to_json(environment))
            checkpoint.write_text(self.path / "split.json", to_json(split))
            checkpoint.write_text(self.path / "config.yaml", config)  # last: what makes it a run folder
        except OSError as error:
            for file in self.path.glob("*.json"):
                file.unlink()
            raise RunFailed(
                f"The run folder {self.path} could not be written ({error}): make room, or name another with "
                "`--output`."
            ) from error

    def config_sum(self) -> str:
        """SHA-256 of `config.yaml`: a checkpoint remembers it, so that an edit is noticed."""
        return hashlib.sha256((self.path / "config.yaml").read_bytes()).hexdigest()

    def environment(self) -> dict[str, Any]:
        """What `begin` wrote of the environment."""
        try:
            found: dict[str, Any] = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path} is not a whole run folder: environment.json cannot be read ({error})."
            ) from error
        return found

    def base(self) -> dict[str, Any] | None:
        """What `begin` wrote of the run that this one extends; None if it extends none."""
        if not (self.path / BASE).exists():
            return None
        try:
            found: dict[str, Any] = json.loads((self.path / BASE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} is not a whole run folder: {BASE} cannot be read ({error}).") from error
        return found

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics_size(self) -> int:
        """Bytes of `metrics.jsonl`."""
        file = self.path / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Forget the lines that were written after the checkpoint that a resume starts from."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            with file.open("r+b") as stream:
                stream.truncate(min(size, file.stat().st_size))

    def keep_scores(self, after: int, row: Row) -> None:
        """Keep one evaluation as a part of `predictions.safetensors`: ``reading/after/on`` [N, C], ``labels/on`` [N].

        A reading that only masks another one's scores has none of its own there.
        """
        tensors: dict[str, Tensor] = {}
        kept: set[int] = set()
        for reading, given in row.scores.items():
            for on, scores in enumerate(given):
                if scores is not None and id(scores) not in kept:
                    kept.add(id(scores))
                    tensors[f"{reading}/{after}/{on}"] = scores
        tensors |= {f"labels/{on}": labels for on, labels in enumerate(row.labels) if len(labels)}
        (self.path / "predictions").mkdir(exist_ok=True)
        checkpoint.write_tensors(self.path / "predictions" / f"{after:04d}.safetensors", tensors)

    def keep_picture(self, name: str, experience: int, picture: Tensor) -> None:
        """Write ``pictures/<name>-<experience>.png`` of a picture [H, W, 3] uint8; experiences count from 1."""
        (self.path / "pictures").mkdir(exist_ok=True)
        file = self.path / "pictures" / f"{name.replace('/', '-')}-{experience + 1}.png"
        file.write_bytes(png(picture.numpy()))

    def finish(self, results: Results, model: Any, description: Mapping[str, Any]) -> None:
        """Write the trained model, the predictions, and last the results: they say that the run is finished."""
        self.settle()
        tensors: dict[str, Tensor] = {}
        state = checkpoint.pack(model, tensors)
        checkpoint.write_tensors(self.path / "model.safetensors", tensors)
        checkpoint.write_text(self.path / "model.json", to_json({**description, "state": json.dumps(state)}))
        parts = sorted((self.path / "predictions").glob("*.safetensors"))
        if parts:
            scores: dict[str, Tensor] = {}
            for part in parts:
                scores |= checkpoint.read_tensors(part)
            checkpoint.write_tensors(self.path / "predictions.safetensors", scores)
        checkpoint.write_text(self.path / "timings.json", to_json(results.timings))
        checkpoint.write_text(self.path / RESULTS, to_json(results.data))
        for part in parts:
            part.unlink()
        if parts:
            (self.path / "predictions").rmdir()


def check_finished(path: Path) -> None:
    """Raise `DataError` if `path` is not the folder of a run that is finished."""
    if not path.is_dir():
        raise DataError(f"There is no folder {path}; name the folder of a finished run.")
    if not (path / "config.yaml").is_file():
        raise DataError(f"{path} is not a run folder: it has no config.yaml.")
    if not (path / RESULTS).is_file():
        raise DataError(f"The run in {path} is not finished: `clframe resume {path}` goes on with it.")


def read_model(path: Path) -> tuple[dict[str, Any], Any, dict[str, Tensor]]:
    """Description, packed state and tensors of the trained model in run folder `path`. Raises `DataError`."""
    check_finished(path)
    try:
        description = json.loads((path / "model.json").read_text(encoding="utf-8"))
        check_format(description, path / "model.json")
        return description, json.loads(description.pop("state")), checkpoint.read_tensors(path / "model.safetensors")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} holds no trained model that can be read ({error}).") from error


def environment(device: torch.device, seed: int, checksum: str) -> dict[str, Any]:
    """Versions, device, threads, state of the working folder's git repository, and the data's checksum."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"  # which of torch's kernels it runs
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        **versions,
        "torch": torch.__version__,
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "seed": seed,
        "data_sha256": checksum,
        "git": _git_state(),
        "command": sys.argv,
    }


def environment_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for each difference that can change the last bits of the figures."""
    return [f"{key} was {before.get(key)}, is {now.get(key)}" for key in BINDING if before.get(key) != now.get(key)]


def _processor() -> str:
    """The CPU's model, by which speeds are compared."""
    with contextlib.suppress(OSError, StopIteration), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state() -> str | None:
    try:
        status = subprocess.run(
            ["git", "status", "--porcelain=v2", "--branch"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    oid, *lines = status.stdout.removeprefix("# branch.oid ").splitlines()
    if oid == "(initial)":  # there is no commit yet
        return None
    return oid + (" with uncommitted changes" if any(not line.startswith("#") for line in lines) else "")
