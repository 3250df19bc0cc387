"""Cells: the runs of a study, each in a run folder of its own that is found by what decides its figures.

The address of a cell is the SHA-256 of its settings, less those that change no figure, of its code and of its data.
Beside each run folder ``cells/NAME`` stands ``cells/NAME.json``, the record of the cell: what the address was made
from, and how its processes ended. It stands outside of the run folder, so that `clframe resume` takes the folder as
any other.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import clframe
from clframe import registry
from clframe.errors import OF_THE_DISK, ClframeError, DataError, Interrupted, UsageError
from clframe.runs.files import CHECKPOINTS, CONFIG, list_checkpoints, read_config
from clframe.runs.results import RESULTS_FILE
from clframe.system.reading import read_json

if TYPE_CHECKING:
    from clframe.events import Event, Listener
    from clframe.settings import Config

CELLS = "cells"  # the folder of a study that holds its cells
RECORD_FORMAT = 1
WITHOUT_FIGURES = ("output", "data_root", "tensorboard", "checkpoint_every", "log_every")  # settings `run.*`
OUTSIDE = ("cli", "experiments", "plugins", "scenarios", "testing")  # parts of clframe that are not code of every cell
BY_USE = ("clframe.plugins", "clframe.scenarios")  # packages of which a cell's code is what it uses
MOST_DEATHS = 3  # of a cell's processes in a row, without a new checkpoint between them

State = Literal["waiting", "stopped", "finished", "failed"]


@dataclass(frozen=True, eq=False)
class Cell:
    """A run of a study.

    Attributes:
        method: label of the method.
        scenario: label of the scenario.
        seed: of the run.
        order: seed of the class order; None if the scenario has its own.
        config: the resolved configuration; `run.output` is `folder`.
        settings: SHA-256 of the configuration, less what changes no figure.
        code: SHA-256 of each module that the cell uses, by name.
        data: SHA-256 of the scenario's data.
        folder: the run folder.
        stale: why a finished cell of other code or data stands in for this one; empty if none does.
    """

    method: str
    scenario: str
    seed: int
    order: int | None
    config: Config
    settings: str
    code: Mapping[str, str]
    data: str
    folder: Path
    stale: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """Return the SHA-256 of settings, code and data."""
        return address_of(self.settings, self.code, self.data)

    @property
    def identity(self) -> str:
        """Return method, scenario, seed and order as a phrase."""
        order = "" if self.order is None else f", order {self.order}"
        return f"{self.method} on {self.scenario}, seed {self.seed}{order}"


Kind = Literal["began", "went on", "progress", "finished", "failed", "stopped", "message"]


@dataclass(frozen=True)
class CellEvent:
    """Something that happened to a cell while a study is carried out.

    Attributes:
        kind: `began` or `went on`, from a checkpoint; `progress`, with the run's event or, from another process, how
            far the cell is in `text`; `finished`; `failed`, with the sentence in `text`; `stopped`, saved on request;
            or a `message` to show, in `text`.
        cell: None of a message on the study.
        text: a sentence, or a phrase.
        event: of a run in this process.
    """

    kind: Kind
    cell: Cell | None = None
    text: str = ""
    event: Event | None = None


@dataclass(frozen=True)
class Record:
    """What is known of a cell on the disk: the content of ``cells/NAME.json``.

    Attributes:
        method: label of the method when the cell was made.
        scenario: label of the scenario.
        seed: of the run.
        order: seed of the class order, or None.
        settings: as of `Cell`.
        code: as of `Cell`.
        data: as of `Cell`.
        deaths: processes of the cell that died in a row, without a new checkpoint between them.
        checkpoint: name of the newest checkpoint at the last death; empty if there was none.
        failure: the sentence with which the cell failed; empty if it did not.
        path: of the record.
    """

    method: str
    scenario: str
    seed: int
    order: int | None
    settings: str
    code: Mapping[str, str]
    data: str
    deaths: int = 0
    checkpoint: str = ""
    failure: str = ""
    path: Path = field(default=Path(), compare=False)

    @property
    def address(self) -> str:
        """Return the SHA-256 of settings, code and data."""
        return address_of(self.settings, self.code, self.data)

    @property
    def folder(self) -> Path:
        """Return the run folder of the cell."""
        return self.path.parent / self.path.name.removesuffix(".json")


# ------------------------------------------------------------------------------------- addresses


def address_of(settings: str, code: Mapping[str, str], data: str) -> str:
    """Return the address of a cell: the SHA-256 of its settings, code and data."""
    return _sha256(json.dumps([settings, dict(sorted(code.items())), data]))


def settings_of(config: Config) -> str:
    """Return the SHA-256 of the settings of `config` that can change a figure; plugins count in calling order."""
    written = config.model_dump()
    run = {name: value for name, value in written["run"].items() if name not in WITHOUT_FIGURES}
    parts = [written["scenario"], written["model"], list(written["plugins"].items()), written["train"], run]
    return _sha256(json.dumps(parts, sort_keys=True, default=str))


def code_of(config: Config) -> dict[str, str]:
    """Return the SHA-256 of each module that a run of `config` uses, by name.

    These are clframe's own modules without the command line and this package, and for each plugin, scenario and
    backbone its module with those of the same package that are imported from there. Other packages do not count.
    """
    written = config.model_dump()
    named: list[tuple[registry.Kind, str]] = [
        ("scenario", written["scenario"]["name"]),
        ("model", written["model"]["name"]),
        *(("plugin", name) for name in written["plugins"]),
    ]
    code = dict(own_code())
    for kind, name in named:
        code |= _code_from(registry.find(kind, name)[0].entry.module)
    return code


@lru_cache(maxsize=1)
def own_code() -> Mapping[str, str]:
    """Return the SHA-256 of each of clframe's modules that every run may use, by name."""
    root = Path(clframe.__file__).parent
    files = {file.relative_to(root): file for file in sorted(root.rglob("*.py"))}
    return {
        ".".join(("clframe", *path.with_suffix("").parts)): _sha256(file.read_bytes())
        for path, file in files.items()
        if path.parts[0] not in OUTSIDE
    }


def forget_code() -> None:
    """Let the next `code_of` read the files again."""
    own_code.cache_clear()
    _code_from.cache_clear()


@lru_cache(maxsize=256)
def _code_from(module: str) -> Mapping[str, str]:
    """Return the SHA-256 of `module` and of the modules of its package that are imported from there, by name."""
    top = module.partition(".")[0]
    found: dict[str, str] = {}
    ahead = [module]
    while ahead:
        name = ahead.pop()
        if name in found or name.partition(".")[0] != top:
            continue
        if top == "clframe" and not name.startswith(BY_USE):
            continue
        spec = None
        with suppress(ImportError, ValueError, AttributeError):  # the import may be of a name in a module
            spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            continue
        source = Path(spec.origin).read_bytes()
        found[name] = _sha256(source)
        ahead += [name.rpartition(".")[0], *_imported(source, name, is_package=spec.origin.endswith("__init__.py"))]
    return found


def _imported(source: bytes, module: str, is_package: bool) -> Iterator[str]:
    """Yield the names, in full, that the source of `module` imports: modules, and what may be names in them."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # a compiled module
        return
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                with suppress(ImportError):
                    base = importlib.util.resolve_name("." * node.level + base, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode("utf-8") if isinstance(content, str) else content).hexdigest()


def name_of(method: str, scenario: str, seed: int, order: int | None, address: str) -> str:
    """Return the name of a cell's folder; characters that a file name should not have become hyphens."""
    parts = [method, scenario, f"seed{seed}", *([] if order is None else [f"order{order}"]), address[:12]]
    return "-".join(re.sub(r"[^\w.,=+-]+", "-", part, flags=re.ASCII).strip("-.")[:60] for part in parts)


# ----------------------------------------------------------------------------------- on the disk


def read_records(study: Path) -> list[Record]:
    """Return the records of all cells in the folder of a study, in the order of their names.

    Raises:
        DataError: if a record cannot be read.
    """
    return [read_record(path) for path in sorted((study / CELLS).glob("*.json"))]


def read_record(path: Path) -> Record:
    """Return the record of a cell in the file `path`. Raises `DataError` if it cannot be read."""
    found = read_json(path)
    if not isinstance(found, dict) or found.pop("format", None) != RECORD_FORMAT:
        raise DataError(f"{path} is not the record of a cell that this clframe reads: put it back.")
    try:
        return Record(**found, path=path)
    except TypeError as error:
        raise DataError(f"{path} is damaged, as it has other fields than the record of a cell: put it back.") from error


def explain_change(record: Record, cell: Cell) -> tuple[str, ...]:
    """Return one phrase for each difference in code or data between a cell on the disk and the one that is asked for.

    The settings of both are the same.
    """
    names = sorted({*record.code, *cell.code})
    changed = tuple(f"`{name}` changed" for name in names if record.code.get(name) != cell.code.get(name))
    return (*changed, *(["the data changed"] if record.data != cell.data else []))


def state_of(folder: Path) -> State:
    """Return how far the run of a cell is, by its folder and its record.

    It is `finished` if it has its results, `failed` if it ended with an error, `stopped` if it began, else `waiting`.
    """
    if (folder / RESULTS_FILE).is_file():
        return "finished"
    record = record_path(folder)
    if record.is_file() and read_record(record).failure:
        return "failed"
    return "stopped" if (folder / CONFIG).is_file() else "waiting"


def record_path(folder: Path) -> Path:
    """Return the path of the record of the cell in `folder`."""
    return folder.parent / f"{folder.name}.json"


def begin(cell: Cell) -> None:
    """Write the record of a cell whose run begins or goes on. A failure that it ended with before is forgotten."""
    path = record_path(cell.folder)
    before = read_record(path) if path.is_file() else None
    _write(
        Record(
            cell.method,
            cell.scenario,
            cell.seed,
            cell.order,
            cell.settings,
            cell.code,
            cell.data,
            deaths=before.deaths if before and not before.failure else 0,
            checkpoint=before.checkpoint if before else "",
            path=path,
        )
    )


def fail(cell: Cell, sentence: str) -> None:
    """Write into the record of a cell that it failed, and why."""
    _change(cell, failure=sentence)


def count_death(cell: Cell) -> int:
    """Write into the record of a cell that its process died; return how many did so without a new checkpoint.

    From `MOST_DEATHS` on the cell should `fail`.
    """
    record = read_record(record_path(cell.folder))
    checkpoints = list_checkpoints(cell.folder / CHECKPOINTS)
    newest = checkpoints[-1].name if checkpoints else ""
    deaths = record.deaths + 1 if newest == record.checkpoint else 1
    _change(cell, deaths=deaths, checkpoint=newest)
    return deaths


def _change(cell: Cell, **values: Any) -> None:
    from dataclasses import replace

    _write(replace(read_record(record_path(cell.folder)), **values))


def _write(record: Record) -> None:
    from clframe.system.writing import to_json, write_text  # here, as that imports torch

    fields = {name: value for name, value in vars(record).items() if name != "path"}
    try:
        record.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(record.path, to_json({"format": RECORD_FORMAT, **fields}))
    except OSError as error:
        raise DataError(
            f"{record.path} could not be written ({error.strerror}): make room, and repeat `clframe compare`."
        ) from error


# ------------------------------------------------------------------------------------ carrying out


def carry_out(folder: Path, config: str, listeners: Sequence[Listener] = ()) -> None:
    """Carry out the run of a cell in this process: begin it, or go on with it where it was stopped.

    Args:
        folder: the run folder; of a run that is finished, nothing is done.
        config: the cell's configuration as YAML, as `clframe.config.to_yaml` gives it.
        listeners: called with each event of the run.

    Raises:
        ClframeError: as `clframe.run` and `clframe.resume`.
    """
    from clframe.api import resume, run_config
    from clframe.settings import Config
    from clframe.strict_yaml import parse_yaml

    if (folder / RESULTS_FILE).is_file():
        return
    if (folder / CONFIG).is_file():
        if _resumes(folder):
            resume(folder, listeners=listeners, progress=False)
            return
        _set_aside(folder)
    settings = Config.model_validate(parse_yaml(config, f"the configuration of {folder}"))
    settings.run.output = str(folder)
    run_config(settings, listeners=listeners)


def _resumes(folder: Path) -> bool:
    """Return whether the stopped run in `folder` can go on: checkpoints hold the state of all of its plugins."""
    return all(registry.plugin_class(name.partition(":")[0]).resumes for name in read_config(folder).plugins)


def _set_aside(folder: Path) -> None:
    """Rename the folder of a stopped run that cannot go on, so that it begins again; nothing is deleted."""
    count = 1
    while (aside := folder.with_name(f"{folder.name}-stopped-{count}")).exists():
        count += 1
    folder.rename(aside)


def run_inline(cells: Iterable[Cell], tell: Callable[[CellEvent], None]) -> None:
    """Carry out `cells` in this process, one after another; their records and folders hold what became of them.

    Args:
        cells: those that are not finished.
        tell: called with each event.

    Raises:
        Interrupted: after a signal; the cell under way is saved.
        DataError: if the disk is full, or cannot be written: no other cell could be carried out.
    """
    from clframe.config import to_yaml

    for cell in cells:
        went_on = (cell.folder / CONFIG).is_file()
        begin(cell)
        tell(CellEvent("went on" if went_on else "began", cell))
        try:
            carry_out(cell.folder, to_yaml(cell.config), [_teller(cell, tell)])
        except Interrupted:
            tell(CellEvent("stopped", cell))
            raise
        except ClframeError as error:
            sentence = " ".join(str(error).split("\n"))
            full = of_full_disk(error)
            with suppress(*([DataError] if full else [])):  # the record may find no room either
                fail(cell, sentence)
            tell(CellEvent("failed", cell, sentence))
            if full:
                raise DataError(f"No further cell is begun, as the disk refused a file: {sentence}") from error
        else:
            tell(CellEvent("finished", cell))


def of_full_disk(error: BaseException) -> bool:
    """Return whether `error` comes of a disk that is full or cannot be written: the next cell would meet it, too."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in OF_THE_DISK:
            return True
        cause = cause.__cause__
    return False


def _teller(cell: Cell, tell: Callable[[CellEvent], None]) -> Listener:
    return lambda event: tell(CellEvent("progress", cell, event=event))


# -------------------------------------------------------------------------- checks before anything runs


def find_data(config: Config) -> str:
    """Return the SHA-256 of the scenario's data, whatever the seed. Raises as `clframe.registry.build_scenario`."""
    settings = config.run.model_copy(update={"seed": 0})
    return registry.build_scenario(config.scenario, settings).checksum


def problems_of(config: Config) -> tuple[str, ...]:
    """Return the sentences with which `clframe run` would refuse `config` before training; none if it would not.

    Raises:
        DataError: if data are missing or damaged.
    """
    from clframe.launch import check_config

    try:
        check_config(config)
    except UsageError as error:
        return error.problems
    return ()
