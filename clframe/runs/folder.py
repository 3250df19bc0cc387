"""The run folder: the files of a run, locked while the run lasts."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from clframe.data.pictures import encode_png
from clframe.errors import DataError, RunError, UsageError
from clframe.evaluate import Row
from clframe.runs import checkpoint, sums
from clframe.runs.files import BASE, CHECKPOINTS, CONFIG, CONFIG_LIMIT, ENVIRONMENT, LOCK, MODEL, SPLIT
from clframe.runs.results import RESULTS_FILE, Results, check_finished, check_format
from clframe.system import writing
from clframe.system.reading import blame_file, parse_json, quote_path, read_bytes, read_json, reason
from clframe.system.writing import to_json, write_text

PACKAGES = ("clframe", "torch", "torchvision", "pluggy", "numpy", "safetensors")
BEGIN = (BASE, ENVIRONMENT, SPLIT, CONFIG)  # files of the beginning, in this order: the last makes a run folder
# files of a process that was killed before the last one; sums.json is written first
BEGUN = {LOCK, *(name for file in (sums.SUMS_FILE, *BEGIN) for name in (file, f".{file}"))}
PART = re.compile(r"predictions/[0-9]+\.safetensors")
WRITTEN = (  # everything that clframe writes into a run folder
    *(LOCK, sums.SUMS_FILE, *BEGIN, "metrics.jsonl", RESULTS_FILE, "timings.json", "model.json"),
    *(MODEL, "predictions.safetensors", "predictions", CHECKPOINTS, "pictures", "tensorboard"),
)
LOCK_WAIT = 0.2  # seconds: `is_locked` holds a lock for microseconds to find out whether a run does
BINDING = ("torch", "device", "threads")  # what the last bit of a figure depends on


class RunFolder:
    """The folder of one run, locked for as long as this object is open.

    Args:
        path: path of the folder.
        new: make the folder, and refuse one that is there already; else open the folder of an earlier run.

    Raises:
        UsageError: if `new` and the folder exists.
        DataError: if the folder cannot be written, is not a run folder, or another process works on it.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        self.path = path
        self._new = new
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._sums: dict[str, str] = {}  # of the files that a command reads
        try:
            self._check(new)
            path.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(path / LOCK)
            self._lock.acquire(timeout=LOCK_WAIT)
        except filelock.Timeout:
            raise DataError(f"Another process is working on the run folder {path}; wait for it or stop it.") from None
        except (OSError, ValueError) as error:  # ValueError: no file can have this name
            remedy = "name another with `--output`" if new else "make it writable"
            raise DataError(
                f"The run folder {quote_path(path)} cannot be written: {reason(error)}; {remedy}."
            ) from error

    def _check(self, new: bool) -> None:
        """Refuse a path that cannot become a new run folder, or is not a run folder."""
        path = self.path
        if new and path.exists() and not path.is_dir():
            raise UsageError(f"The run folder {path} is a file: name another with `--output`.")
        # what a process left that was killed before its run began is not needed
        if new and path.exists() and not _is_untouched(path):
            a_run = (path / CONFIG).is_file()
            raise UsageError(
                f"The run folder {path} exists already: name another with `--output`, or go on with "
                f"`clframe resume {path}`."
                if a_run
                else f"The folder {path} is not empty, and is not a run folder: name another with `--output`."
            )
        if not new:
            if not (path / CONFIG).is_file():
                raise DataError(
                    f"{quote_path(path)} is not a run folder, as it has no config.yaml; name the folder of a run."
                )
            writing.refuse_links(path, WRITTEN)

    def close(self) -> None:
        """Wait for pending writes, release the lock, and remove the folder if the run never started."""
        self._disk.shutdown()
        self._lock.release()
        if self._new and not (self.path / "config.yaml").exists():
            self._clear()
            with contextlib.suppress(OSError):  # other files are in the folder
                self.path.rmdir()

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def save(self, tree: Mapping[str, Any]) -> None:
        """Write a checkpoint of `tree` as it is now, in the background; first wait for the checkpoint before.

        Raises `RunError` if the one before could not be written, or if something in `tree` cannot be packed.
        """
        self.settle()
        self._writing = self._disk.submit(checkpoint.write, self.checkpoints, *checkpoint.detach_copy(tree))

    def settle(self) -> None:
        """Wait for the checkpoint that is being written. Raises `RunError` if it could not be written."""
        pending = self._writing
        self._writing = None
        if pending is not None:
            pending.result()

    @property
    def finished(self) -> bool:
        """Return whether the run has its results."""
        return (self.path / RESULTS_FILE).is_file()

    @property
    def untouched(self) -> bool:
        """Return whether nothing was learned in the folder: it has no checkpoint, no record, no evaluation."""
        return not (any(self.checkpoints.glob("[0-9]*")) or self.metrics_size() or (self.path / "predictions").exists())

    def begin(
        self,
        config: str,
        environment: Mapping[str, Any],
        split: Mapping[str, Any],
        base: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the files of the beginning: the resolved configuration, the environment, the split.

        `base` describes what was learned before, in the run that this one extends.
        """
        texts = {
            **({BASE: to_json(base)} if base is not None else {}),
            ENVIRONMENT: to_json(environment),
            SPLIT: to_json(split),
            CONFIG: config,
        }
        try:
            self._clear(but=LOCK)
            self._sums = {name: hashlib.sha256(text.encode("utf-8")).hexdigest() for name, text in texts.items()}
            self._write_sums()
            for name, text in texts.items():
                write_text(self.path / name, text)
        except OSError as error:
            self._clear(but=LOCK)
            raise RunError(
                f"The run folder {self.path} could not be written ({error}): make room, or name another with "
                "`--output`."
            ) from error

    def _clear(self, but: str = "") -> None:
        """Remove the files of the beginning, also those of a process that was killed there, but for the file `but`."""
        for name in BEGUN - {but}:
            with contextlib.suppress(OSError):
                (self.path / name).unlink(missing_ok=True)

    def check_sums(self, position: Mapping[str, Any], skip: Sequence[str], tell: Callable[[str], None]) -> None:
        """Check the files from which a resume continues, and keep their sums.

        Args:
            position: position of the run in its checkpoint; parts of the predictions that will be written again are not
                checked.
            skip: files that are compared in another way.
            tell: called with a sentence for each file that is missing.

        Raises:
            DataError: if a file is not what was written.
        """
        found = sums.read(self.path)
        if found is None:
            tell(sums.explain_missing(self.path) or "")
            kept = [name for name in BEGIN if (self.path / name).exists()]
            parts = [f"predictions/{p.name}" for p in sorted((self.path / "predictions").glob("*.safetensors"))]
            self._sums = {name: sums.digest(self.path / name) for name in kept + list(filter(PART.fullmatch, parts))}
            return
        done = position["experience"] + (["evaluate", ""] in position["done"])
        for name in sorted(found):
            if not PART.fullmatch(name):
                if name in BEGIN and name not in skip:
                    sums.check(self.path, name)
                continue
            experience = int(Path(name).stem)
            if experience >= done:
                del found[name]
            elif not (self.path / name).exists():
                del found[name]
                tell(_explain_loss(self.path / name))
            elif sums.digest(self.path / name) != found[name]:
                raise DataError(
                    f"{self.path / name} is damaged: it is not what was written. Put it back, or remove it to go on "
                    f"without the scores of the test images after experience {experience + 1}."
                )
        self._sums = found

    def _write_sums(self) -> None:
        write_text(self.path / sums.SUMS_FILE, sums.to_text(self._sums))

    def config_sum(self) -> str:
        """Compute the SHA-256 of `config.yaml`; checkpoints hold it, so that an edit is noticed."""
        return hashlib.sha256(read_bytes(self.path / CONFIG, CONFIG_LIMIT)).hexdigest()

    def check_config(self, written: str | None = None) -> None:
        """Raise `DataError` unless `config.yaml` has the sum `written`, by default the one in sums.json, if any.

        Call this before the file is read, else what a damaged file says would be blamed on the user.
        """
        if written is None:
            written = (sums.read(self.path) or {}).get(CONFIG)
        if written is not None and written != self.config_sum():
            raise DataError(
                f"{self.path / CONFIG} was edited, or damaged, since the run began; put it back, or start a new run."
            )

    def read_environment(self) -> dict[str, Any]:
        """Return the environment in which the run began, as `begin` wrote it."""
        return self._read(ENVIRONMENT)

    def read_base(self) -> dict[str, Any] | None:
        """Return the description of the run that this one extends, as `begin` wrote it; None if it extends none."""
        return self._read(BASE) if (self.path / BASE).exists() or BASE in self._sums else None

    def _read(self, name: str) -> dict[str, Any]:
        """Return the mapping in the JSON file `name` of the folder. Raises `DataError` if there is none."""
        try:
            found = read_json(self.path / name)
        except DataError as error:
            raise DataError(f"{self.path} is not a whole run folder: {error}") from error
        if not isinstance(found, dict):
            raise DataError(f"{self.path} is not a whole run folder: {name} holds no mapping; copy it again.")
        return found

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        writing.append(self.path / "metrics.jsonl", json.dumps(record) + "\n")

    def metrics_size(self) -> int:
        """Return the size of `metrics.jsonl` in bytes."""
        file = self.path / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Cut `metrics.jsonl` to `size` bytes: remove lines written after the checkpoint from which a resume starts."""
        if (self.path / "metrics.jsonl").exists():
            writing.truncate(self.path / "metrics.jsonl", size)

    def keep_scores(self, after: int, row: Row) -> None:
        """Write one evaluation as a part of `predictions.safetensors`: ``reading/after/on`` [N, C], ``labels/on`` [N].

        An evaluation mode that only masks the scores of another one has no scores there.
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
        name = f"predictions/{after:04d}.safetensors"
        checkpoint.write_tensors(self.path / name, tensors)
        self._sums[name] = sums.digest(self.path / name)
        self._write_sums()

    def keep_picture(self, name: str, experience: int, picture: Tensor) -> None:
        """Write a picture [H, W, 3] uint8 as ``pictures/<name>-<experience>.png``; experiences count from 1 there."""
        (self.path / "pictures").mkdir(exist_ok=True)
        file = self.path / "pictures" / f"{name.replace('/', '-')}-{experience + 1}.png"
        with writing.create(file) as stream:
            stream.write(encode_png(picture.numpy()))

    def finish(self, results: Results, model: Any, description: Mapping[str, Any]) -> list[str]:
        """Write the trained model, the predictions, the sums, and last the results, which mark the run as finished.

        Returns a sentence for each part of the predictions that is gone. Raises `DataError` if a part is damaged.
        """
        self.settle()
        lost = []
        scores: dict[str, Tensor] = {}
        parts = sorted(filter(PART.fullmatch, self._sums))
        for name in parts:
            if not (self.path / name).exists():
                lost.append(_explain_loss(self.path / name))
                continue
            sums.check(self.path, name)
            scores |= checkpoint.read_tensors(self.path / name)
        tensors: dict[str, Tensor] = {}
        state = checkpoint.pack(model, tensors)
        written = {name: sum_ for name, sum_ in self._sums.items() if name in BEGIN}
        for name, values in ((MODEL, tensors), ("predictions.safetensors", scores)):
            if values or name == MODEL:
                checkpoint.write_tensors(self.path / name, values)
                written[name] = sums.digest(self.path / name)
        texts = {
            "model.json": to_json({**description, "state": json.dumps(state)}),
            "timings.json": to_json(results.timings),
            RESULTS_FILE: to_json(results.data),
        }
        self._sums = written | {n: hashlib.sha256(text.encode("utf-8")).hexdigest() for n, text in texts.items()}
        results_text = texts.pop(RESULTS_FILE)
        for name, text in texts.items():
            write_text(self.path / name, text)
        self._write_sums()
        write_text(self.path / RESULTS_FILE, results_text)
        with contextlib.suppress(OSError):  # other files in the folder stay, such as those of a file manager
            for name in parts:
                (self.path / name).unlink(missing_ok=True)
            for beside in self.path.glob("predictions/.*"):
                if beside.name.startswith(".tmp") or beside.suffix == ".safetensors":  # left by a write that was killed
                    beside.unlink()
            (self.path / "predictions").rmdir()
        return lost


def _is_untouched(path: Path) -> bool:
    """Return whether `path` is empty, or holds only what `begin` had written when its process was killed."""
    names = {p.name for p in path.iterdir()}
    if CONFIG in names or names - BEGUN:
        return False
    if names <= {LOCK, f".{sums.SUMS_FILE}"}:
        return True
    try:
        return sums.read(path) is not None
    except DataError:
        return False


def _explain_loss(file: Path) -> str:
    """Return a sentence on a part of the predictions that is gone."""
    return (
        f"{file} is gone: predictions.safetensors will lack the scores of the test images after experience "
        f"{int(file.stem) + 1}."
    )


def how_to_go_on(folder: RunFolder | None) -> str:
    """Return a sentence on the checkpoint that an ended run left in `folder`; an empty text if there is none."""
    if folder is None:
        return ""
    with contextlib.suppress(RunError):  # an error is under way already
        folder.settle()
    if folder.finished:
        return f" All results were written before: {folder.path} is the folder of a finished run."
    kept = checkpoint.find_newest(folder.checkpoints)
    return f" The last good checkpoint is kept: `clframe resume {folder.path}` starts from it." if kept else ""


def read_model(path: Path) -> tuple[dict[str, Any], Any, dict[str, Tensor]]:
    """Read description, packed state and tensors of the trained model in run folder `path`. Raises `DataError`."""
    check_finished(path)
    sums.check(path, CONFIG, "model.json", MODEL)
    try:
        description = read_json(path / "model.json")
        check_format(description, path / "model.json")
        with blame_file(path / "model.json"):
            state = parse_json(description.pop("state"), path / "model.json")
        return description, state, checkpoint.read_tensors(path / MODEL)
    except OSError as error:
        raise DataError(
            f"{path} holds no trained model that can be read ({error}); copy the folder again, or repeat the run."
        ) from error


def describe_environment(device: torch.device, seed: int, checksum: str) -> dict[str, Any]:
    """Return versions, device, threads, the commit of the current folder's git repository, and the data's checksum."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"  # decides which of torch's kernels run
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _find_processor(),
        **{package: _find_version(package) for package in PACKAGES},
        "torch": torch.__version__,
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "seed": seed,
        "data_sha256": checksum,
        "git": _find_commit(),
        "command": sys.argv,
    }


def compare_environments(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each difference that can change the last bits of the figures."""
    return [f"{key} was {before.get(key)}, is {now.get(key)}" for key in BINDING if before.get(key) != now.get(key)]


@cache
def _find_version(package: str) -> str:
    """Return the version of an installed package; cached, as reading it takes milliseconds in each run."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@cache
def _find_processor() -> str:
    """Return the model of the CPU, by which speeds are compared."""
    with contextlib.suppress(OSError, StopIteration), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _find_commit() -> str | None:
    """Return the commit of the current folder's git repository; None where there is none.

    Whether files differ from the commit is not looked up: `git status` runs what the configuration of the repository
    names (`core.fsmonitor`, filters, hooks), and the folder may come from an untrusted source. `git rev-parse` runs
    none of it.
    """
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return found or None
