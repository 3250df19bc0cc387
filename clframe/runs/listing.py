"""Many run folders: which there are, in what state, with what figures, and which was learned on from which.

Folders are only read, and without torch. They may come from an untrusted source: nothing in them is executed or written
to, pipes and devices are not opened, and links below the folder that is searched are not followed.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from clframe.config import list_settings
from clframe.errors import DataError
from clframe.runs import sums
from clframe.runs.files import CHECKPOINTS, CONFIG, ENVIRONMENT, LOCK, MODEL, SPLIT, TREE, list_checkpoints, read_config
from clframe.runs.results import RESULTS_FILE, Results, read_results
from clframe.settings import Config
from clframe.system.reading import blame_file, check_regular, expand_home, quote_path, read_json, reason
from clframe.system.texts import by_name

DEPTH = 8  # levels of folders below the one that is searched
OF_THE_MACHINE = ("run.device", "train.threads")  # settings that environment.json has, as they were found at the start
State = Literal["finished", "running", "stopped", "damaged"]


@dataclass(frozen=True)
class RunSummary:
    """What the files of a run folder say of its run; what they do not say, or is damaged, is None.

    Attributes:
        path: the folder.
        state: ``running`` while a process holds the lock of the folder; ``stopped`` if neither that nor finished.
        problem: a sentence on what is damaged.
        begun: time of the beginning.
        config: the configuration.
        experience: index of the experience in which the newest checkpoint was taken, if the run is not finished.
        experiences: number of experiences.
        results: figures of a finished run.
        seconds: of learning, in a finished run.
    """

    path: Path
    state: State
    problem: str | None = None
    begun: datetime | None = None
    config: Config | None = None
    experience: int | None = None
    experiences: int | None = None
    results: Results | None = None
    seconds: float | None = None

    @property
    def status(self) -> str:
        """Return the state in words, such as ``stopped at experience 2 of 5``."""
        if self.state in ("finished", "damaged") or self.experience is None or self.experiences is None:
            return self.state
        place = f"experience {self.experience + 1} of {self.experiences}"
        return f"running, {place}" if self.state == "running" else f"stopped at {place}"

    @property
    def scenario(self) -> str | None:
        """Return the name of the scenario."""
        return self.config.scenario.name if self.config else None

    @property
    def setting(self) -> str | None:
        """Return the evaluation setting: ``class``, ``task`` or ``domain``."""
        found = self.results.data.get("setting") if self.results else None
        found = found or (self.config.scenario.options.get("setting") if self.config else None)
        return found if isinstance(found, str) else None

    @property
    def methods(self) -> list[str] | None:
        """Return the names of the plugins in the order of calling."""
        return list(self.config.plugins) if self.config else None

    @property
    def model(self) -> str | None:
        """Return the name of the backbone."""
        return self.config.model.name if self.config else None

    @property
    def seed(self) -> int | None:
        """Return the seed."""
        return self.config.run.seed if self.config else None

    @property
    def parent(self) -> tuple[Literal["extends", "starts from"], Path] | None:
        """Return the run from whose model this one learned on, and how; None if it began with a new network."""
        if self.config is None:
            return None
        if self.config.run.extends is not None:
            return "extends", Path(self.config.run.extends)
        start = self.config.model.start
        return ("starts from", Path(start)) if start else None

    @property
    def has_objects(self) -> bool:
        """Return whether a Python program gave a scenario, network or plugin as an object, and must give it again."""
        config = self.config
        parts = [config.scenario, config.model, *config.plugins.values()] if config else []
        return any(part.origin == "object" for part in parts)

    def measure(self, name: str) -> float | None:
        """Return a measure, as a share of 1, in the evaluation mode of the run's setting; None if it has none."""
        found = self.results.measures.get(self.setting or "", {}).get(name) if self.results else None
        return None if found is None else float(found)


# ------------------------------------------------------------------------------------------ finding


def find_runs(folder: Path, notes: list[str] | None = None, depth: int = DEPTH) -> list[Path]:
    """Return the run folders in `folder`, which may be one itself, sorted by name.

    A run folder has a ``config.yaml`` and beside it ``environment.json`` or ``sums.json``. Links, hidden folders and
    what is inside a run folder are not searched. `notes` receives a sentence for each folder that cannot be opened, and
    one on folders more than `depth` levels below.

    Raises:
        DataError: if `folder` does not exist, is not a folder, or cannot be opened.
    """
    found: list[Path] = []
    ahead = [(folder, 0)]
    deeper = 0
    while ahead:
        path, level = ahead.pop()
        try:
            if _is_run_folder(path):
                found.append(path)
                continue
            with os.scandir(path) as entries:
                inside = [
                    path / entry.name
                    for entry in entries
                    if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
                ]
        except (OSError, ValueError) as error:  # ValueError: no folder can have this name
            if path == folder:
                raise _cannot_search(folder, error) from error
            if notes is not None:
                notes.append(f"{quote_path(path)} cannot be opened: {reason(error)}.")
            continue
        if level < depth:
            ahead += [(below, level + 1) for below in inside]
        else:
            deeper += len(inside)
    if deeper and notes is not None:
        notes.append(f"Below {quote_path(folder)}, folders at more than {depth} levels ({deeper:,}) are not searched.")
    return sorted(found, key=lambda path: [by_name(part) for part in path.parts])


def _is_run_folder(path: Path) -> bool:
    return (path / CONFIG).is_file() and any((path / name).is_file() for name in (ENVIRONMENT, sums.SUMS_FILE))


def _cannot_search(folder: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"There is no folder {quote_path(folder)}: name one that holds run folders.")
    if isinstance(error, NotADirectoryError):
        return DataError(f"{quote_path(folder)} is not a folder: name one that holds run folders.")
    return DataError(f"The folder {quote_path(folder)} cannot be opened: {reason(error)}.")


# ------------------------------------------------------------------------------------------ one run


def summarize(path: Path) -> RunSummary:
    """Return what the run folder `path` says of its run; damage is part of the answer and raises nothing.

    The small files are compared with their sums. Whether weights and predictions are whole is not looked at.
    """
    known: dict[str, Any] = {}
    state: State = "stopped"
    problem = None
    try:
        known["begun"] = datetime.fromtimestamp((path / CONFIG).stat().st_mtime).astimezone()
        finished = (path / RESULTS_FILE).is_file()
        state = "finished" if finished else "running" if is_locked(path) else "stopped"
        sums.check(path, CONFIG)
        config = read_config(path)
        with blame_file(path / CONFIG):
            list_settings(config)
        known["config"] = config
        if finished:
            results = read_results(path)
            check_regular(path / MODEL)
            with blame_file(path / RESULTS_FILE):
                _check_figures(results)
            with blame_file(path / "timings.json"):
                known["seconds"] = list_costs(results)["seconds"]
            known |= {"results": results, "experiences": len(results.data["classes"])}
        else:
            known |= _read_progress(path)
    except (DataError, OSError, OverflowError, ValueError) as error:  # the last two: of a time
        problem = str(error) if isinstance(error, DataError) else f"{quote_path(path)} cannot be read: {reason(error)}."
        if state != "running":  # files change under the reader
            state = "damaged"
    return RunSummary(path, state, problem, **known)


def _check_figures(results: Results) -> None:
    """Raise an error if a figure is not a number that tables can show, which no run writes."""
    for name, value in {**list_entries(results), **list_figures(results), **list_sizes(results)}.items():
        if value is not None and not math.isfinite(float(value)):
            raise ValueError(f"{name} is {value}")
    for note in results.notes():
        if not isinstance(note, str):
            raise TypeError("a note is not a text")


def open_run(path: Path) -> RunSummary:
    """Return what the run folder `path` says of its run, as `summarize`. Raises `DataError` if `path` is not one."""
    try:
        os.scandir(path).close()
        is_run = _is_run_folder(path)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"There is no folder {quote_path(path)}; name the folder of a run.") from error
        raise DataError(f"{quote_path(path)} cannot be opened: {reason(error)}; name the folder of a run.") from error
    if not is_run:
        raise DataError(
            f"{quote_path(path)} is not a run folder: it has no config.yaml with environment.json beside it "
            f"(`clframe runs list` finds run folders)."
        )
    return summarize(path)


def list_figures(results: Results) -> dict[str, float | None]:
    """Return measures and calibration by evaluation mode and name."""
    measures = {f"{mode}.{name}": value for mode, of in results.measures.items() for name, value in of.items()}
    calibration = {
        f"{mode}.{name}": measure["value"]
        for mode, of in results.data.get("calibration", {}).items()
        for name, measure in of.items()
    }
    return measures | calibration


def list_entries(results: Results) -> dict[str, float | None]:
    """Return the entries of all accuracy matrices by name; experiences count from 1."""
    untrained = results.data.get("baseline", {})
    matrices = {
        **results.accuracy,
        **{f"{mode}, held out": matrix for mode, matrix in results.validation.items()},
        **{f"{mode}, untrained": [row] for mode, row in untrained.items()},
    }
    return {
        f"{mode}[{after}][{on}]": value
        for mode, matrix in matrices.items()
        for after, row in enumerate(matrix, start=1)
        for on, value in enumerate(row, start=1)
    }


def list_costs(results: Results) -> dict[str, float]:
    """Return the seconds of learning, and the peaks of memory in bytes, by name."""
    peaks = {key: value for key, value in results.timings.items() if key.endswith("_bytes") and value is not None}
    return {
        "seconds": float(sum(one["seconds"] for one in results.timings["experiences"])),
        **{key: int(value) for key, value in peaks.items()},
    }


def list_sizes(results: Results) -> dict[str, int]:
    """Return the bytes of the model, and of what each method keeps between experiences, by name."""
    sizes = {name: results.data[name] for name in ("model",) if name in results.data} | results.data.get("storage", {})
    return {f"{owner}_bytes": int(size["bytes"]) for owner, size in sizes.items()}


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of the run folder `path`; nothing is written to find it out."""
    try:
        lock = os.open(path / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # no process has worked on the folder, or may be asked about it
        return False
    try:
        # a shared lock, for as long as this takes: `RunFolder` waits longer than that for its own
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(lock)
    return False


def _read_progress(path: Path) -> dict[str, int]:
    """Return where the newest checkpoint was taken that can be read: index of the experience, and their number."""
    with blame_file(path / SPLIT):
        number = len(read_json(path / SPLIT)["experiences"])
    problems: list[DataError] = []
    for saved in reversed(list_checkpoints(path / CHECKPOINTS)):
        try:
            with blame_file(saved / TREE):
                entries = dict(read_json(saved / TREE)["tree"]["dict"])
                index = int(dict(entries["position"]["dict"])["experience"])
        except DataError as error:  # it is damaged, or was just removed: the one before counts
            problems.append(error)
            continue
        return {"experience": max(0, min(index, number - 1)), "experiences": number}
    if problems:
        raise problems[0]
    return {"experience": 0, "experiences": number}


def find_damage(path: Path) -> list[str]:
    """Return a sentence for each file of the run folder `path` that is not what was written; large ones are read, too.

    A folder without sums gives none.
    """
    problems = []
    try:
        names = sorted(name for name in sums.read(path) or {} if not Path(name).is_absolute() and ".." not in name)
    except DataError as error:
        return [str(error)]
    for name in names:
        try:
            sums.check(path, name)
        except DataError as error:
            problems.append(str(error))
    return problems


# ------------------------------------------------------------------------------------------ ancestry


@dataclass(frozen=True)
class Branch:
    """A run in the tree of `arrange`.

    Attributes:
        path: folder of the run.
        level: number of runs above this one.
        parent: the run above, and how this one came from it; None at level 0.
        summary: of the run; None if it was not given to `arrange`, and is there as the origin of others.
    """

    path: Path
    level: int
    parent: tuple[str, Path] | None
    summary: RunSummary | None


def arrange(runs: Sequence[RunSummary]) -> list[Branch]:
    """Return `runs` as the lines of a tree: each run is followed by those that extend it, or start from its network.

    A run that came from one that is not among `runs` is below that one's path. Of runs that came from each other in a
    circle, which only damaged files say, the first is at level 0.
    """
    by_place = {_locate(run.path): run for run in runs}
    below: dict[Path, list[Path]] = {}
    roots: list[Path] = []
    for place, run in by_place.items():
        origin = _locate(run.parent[1]) if run.parent else None
        if origin is None:
            roots.append(place)
            continue
        if origin not in by_place and origin not in below:
            roots.append(origin)
        below.setdefault(origin, []).append(place)
    branches: list[Branch] = []
    drawn: set[Path] = set()
    for root in (*roots, *by_place):  # the latter for circles, which have no root
        ahead: list[tuple[Path, int, tuple[str, Path] | None]] = [(root, 0, None)]
        while ahead:
            place, level, parent = ahead.pop()
            if place in drawn:
                continue
            drawn.add(place)
            summary = by_place.get(place)
            path = summary.path if summary else place
            branches.append(Branch(path, level, parent, summary))
            for child in reversed(below.get(place, [])):
                how = by_place[child].parent
                ahead.append((child, level + 1, (how[0], path) if how else None))
    return branches


def trace(run: RunSummary) -> list[tuple[str, Path, RunSummary | None]]:
    """Return the runs from which `run` came, the nearest first: how, where, and their summary if they are still there.

    Of runs that came from each other in a circle, which only damaged files say, each is named once.
    """
    chain: list[tuple[str, Path, RunSummary | None]] = []
    seen = {_locate(run.path)}
    current: RunSummary | None = run
    while current is not None and current.parent is not None:
        how, path = current.parent
        place = _locate(path)
        if place in seen:
            break
        seen.add(place)
        try:
            current = open_run(place)
        except DataError:
            current = None
        chain.append((how, path, current))
    return chain


def _locate(path: Path) -> Path:
    """Return the absolute path of a folder, without links; `path` itself if no folder can have this name."""
    try:
        return expand_home(path).resolve()
    except (DataError, OSError, ValueError, RuntimeError):
        return path
