"""Curves for Weights & Biases, or for trackio, whose calls are the same; the package is imported by runs that log."""

from __future__ import annotations

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError
from urllib.request import urlopen

from clframe.errors import RunError
from clframe.hooks import hookimpl
from clframe.plugin import Plugin
from clframe.toolkit.curves import Axis, Points, final_points, hyperparameters, is_complete, points_of

if TYPE_CHECKING:
    from clframe.context import Run
    from clframe.events import Event

MOST_SECONDS = 30  # to wait at the end of a run for what is not uploaded yet
PAGES = {"wandb": "Weights & Biases", "trackio": "the Hugging Face Hub"}
OF_ONE = {"entity": "wandb", "tags": "wandb", "space": "trackio"}  # options that only one package has
SPACE, SERVER = "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"  # where trackio sends to, in the environment


class WandB(Plugin):
    """An observer that logs what TensorBoard gets, and the messages of the run, to Weights & Biases or to trackio.

    Curves have TensorBoard's names: ``accuracy_<mode>/experience_<j>``, ``average_accuracy/<mode>``,
    ``forgetting/<mode>``, ``while_learning/<measure>/<mode>``, ``loss/<term>``, ``learning_rate``, ``log/<name>``. The
    package's own step counts rows; each row also has the place of its points as ``experiences`` (learned so far) or
    ``total_step``. In Weights & Biases each curve is drawn along its own axis; in trackio, choose that under *X-axis*.
    Pictures are those that methods show, and at the end the accuracy matrices. Hyper-parameters are the run's settings
    without folders and devices. Messages are the texts ``message``. What a terminal shows is not captured.

    A resumed run continues the tracker's run; rows that were logged before the run was killed are not logged again.
    Offline, Weights & Biases writes a second folder of the same run: upload both with `wandb sync`, in order. A run
    that extends another one is a new run for the tracker. What fails after the start (a lost connection) is told once,
    and the run goes on without the tracker.

    The packages keep their files where they always do (`WANDB_DIR`, `TRACKIO_DIR`). `wandb.package=wandb` needs
    `pip install 'clframe[wandb]'`, and `wandb.package=trackio` needs `pip install 'clframe[trackio]'`.

    When to use:
        To follow runs of several machines on one page, or where a group logs to such a page already.

    Keeps:
        The id of the tracker's run and its number of rows; results do not depend on them.

    Hooks:
        `before_run`, `after_run`

    Options:
        package: `wandb` logs to Weights & Biases, `trackio` to a local store or a Space of the Hugging Face Hub.
        project: the project that the run belongs to.
        name: of the run; null: the name of its folder. With trackio, the id is appended, so that names differ.
        group: joins runs that belong together, such as the seeds of a study; null: none.
        mode: `online` sends while the run lasts, `offline` writes to this machine only, `disabled` does nothing; null:
            as the package decides, which is `WANDB_MODE` or else online for wandb, and offline for trackio unless a
            Space or a server is named.
        entity: user or team of Weights & Biases; null: the user's default. Not for trackio.
        tags: of the run, in Weights & Biases. Not for trackio.
        space: the Space that trackio sends to, such as USER/NAME; null: `TRACKIO_SPACE_ID`, or none. Not for wandb.
    """

    name = "wandb"
    family = "observer"
    observer = True
    state = ("session",)

    def __init__(
        self,
        *,
        package: Literal["wandb", "trackio"] = "wandb",
        project: str = "clframe",
        name: str | None = None,
        group: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        entity: str | None = None,
        tags: list[str] | None = None,
        space: str | None = None,
    ) -> None:
        self.package = package
        self.project = project
        self.run_name = name
        self.group = group
        self.mode = mode
        self.entity = entity
        self.tags = tags
        self.space = space
        self.id = ""
        self.rows = 0  # of the tracker's run; those below `first` of a resumed one are logged already
        self.extends: str | None = None
        self.messages: list[str] = []  # that no row has yet
        self.tracker: _Tracker | None = None
        self.listener: Any = None

    @property
    def session(self) -> dict[str, Any]:
        """The tracker's run, for checkpoints: its id, rows and waiting messages, and the run that this one extends."""
        return {"id": self.id, "rows": self.rows, "messages": self.messages, "extends": self.extends}

    @session.setter
    def session(self, saved: Mapping[str, Any]) -> None:
        """Continue the saved run of the tracker, unless it is that of the run which this one extends."""
        if saved["id"] and saved["extends"] == self.extends:
            self.id = saved["id"]
            self.rows = saved["rows"]
            self.messages = [*saved["messages"], *self.messages]

    def is_disabled(self) -> bool:
        """Return whether nothing is logged, by the option or by the environment of wandb."""
        chosen = self.mode or (os.environ.get("WANDB_MODE") if self.package == "wandb" else None)
        return chosen == "disabled"

    def problems(self, run: Run) -> Iterable[str]:
        """Yield one sentence for each reason why the package could not log: options, installation, login, connection.

        A login is looked for, and its server asked, unless the run is offline.
        """
        if self.is_disabled():
            return
        for option, package in OF_ONE.items():
            if package != self.package and getattr(self, option) is not None:
                yield f"`wandb.{option}` belongs to `wandb.package={package}`: leave it out, or choose that package."
        try:
            module = import_module(self.package)
        except ImportError as error:
            why = "is not installed" if error.name == self.package else f"cannot be imported ({error})"
            yield f"`wandb.package={self.package}` {why}: `pip install 'clframe[{self.package}]'`."
            return
        yield from (_wandb_problems if self.package == "wandb" else _trackio_problems)(self, module)

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Draw an id for the tracker's run, which a resume replaces by the saved one, and listen to the records."""
        self.extends = run.config.run.extends
        if run.is_loaded or self.is_disabled():
            return
        self.id = secrets.token_hex(4)  # of the system: no generator of the run is drawn from
        self.listener = partial(self.write, run)
        run.listeners.append(self.listener)

    @hookimpl
    def after_run(self, run: Run) -> None:
        """Log the accuracy matrices of a complete run, and end the tracker's run: as finished, or else as failed."""
        if self.listener is not None:
            run.listeners.remove(self.listener)
            self.listener = None
        if is_complete(run):  # a row beyond the last checkpoint would take the number of a row of the resumed run
            self.log(run, final_points(run))
        if self.tracker is not None:
            with self.surviving(run):
                self.tracker.finish(is_complete(run))
        self.tracker = None

    def write(self, run: Run, record: Event) -> None:
        """Log the contents of a record; a message waits for the next row."""
        if record["kind"] == "start":
            self.open(run)
        elif record["kind"] == "message":
            self.messages.append(record["text"])
        elif points := points_of(run, record):
            self.log(run, points)

    def open(self, run: Run) -> None:
        """Begin the tracker's run, or continue it. Raises `RunError` where the package cannot."""
        try:
            with _quiet():
                module = import_module(self.package)
                self.tracker = (_WandBRun if self.package == "wandb" else _TrackioRun)(self, module, run)
        except Exception as error:
            raise RunError(f"`wandb` could not begin to log: {_first_line(error)}{_advice(self)}") from error
        run.tell(f"`wandb` logs to {self.tracker.where}.")

    def log(self, run: Run, points: Points) -> None:
        """Log points as the next row, unless a run that was killed has logged that row already."""
        row = self.rows
        self.rows += 1
        if self.tracker is None or row < self.tracker.first:
            return
        text = {"message": "\n".join(self.messages)} if self.messages else {}
        self.messages = []
        with self.surviving(run):
            self.tracker.log(row, points, text)

    @contextmanager
    def surviving(self, run: Run) -> Iterator[None]:
        """Tell an error of the package once, and go on without the tracker."""
        try:
            with _quiet():
                yield
        except Exception as error:
            self.tracker = None
            run.tell(f"`wandb` stopped logging, and the run goes on without it: {_first_line(error)}.")


class _Tracker(ABC):
    """A run of a tracker.

    Attributes:
        first: the first row that it does not have.
        where: what a person needs to look at it.
    """

    first = 0
    where = ""

    def __init__(self, module: Any, run: Any) -> None:
        self.module = module
        self.run = run

    def row(self, points: Points, text: Mapping[str, str]) -> dict[str, Any]:
        """Return what is logged of `points` at once."""
        pictures = {name: self.module.Image(picture) for name, picture in points.pictures.items()}
        return {**points.values, **pictures, **text, points.axis: points.at}

    @abstractmethod
    def log(self, row: int, points: Points, text: Mapping[str, str]) -> None:
        """Log `points`, with messages, as the row of this number."""

    @abstractmethod
    def finish(self, complete: bool) -> None:
        """End the run, and wait for what is not written yet."""


class _WandBRun(_Tracker):
    """A run of Weights & Biases; other runs of the process, such as a user's, stay as they are."""

    def __init__(self, plugin: WandB, module: Any, run: Run) -> None:
        settings = module.Settings(console="off", silent=True, finish_timeout=MOST_SECONDS, finish_timeout_raises=True)
        super().__init__(
            module,
            module.init(
                project=plugin.project,
                entity=plugin.entity,
                name=_name(plugin, run),
                group=plugin.group,
                tags=plugin.tags,
                mode=plugin.mode,
                id=plugin.id,
                resume="allow",
                reinit="create_new",
                config=_by_section(hyperparameters(run)),
                settings=settings,
            ),
        )
        self.first = self.run.step  # of a run that the server has, the step after its last one
        self.groups: set[str] = set()
        folder = Path(self.run.dir).parent
        self.upload = f"`wandb sync {folder}`"
        self.where = f"{folder}; {self.upload} uploads it" if self.run.offline else self.run.url

    def log(self, row: int, points: Points, text: Mapping[str, str]) -> None:
        """Log `points` as a row of their own, on the axis that their curves are drawn along."""
        for name in (*points.values, *points.pictures):
            self.define(name, points.axis)
        self.run.log(self.row(points, text), step=row, commit=True)

    def define(self, name: str, axis: Axis) -> None:
        """Draw the curves of the group of `name` along `axis`."""
        group, slash, _ = name.partition("/")
        if group not in self.groups:
            self.groups.add(group)
            self.run.define_metric(f"{group}/*" if slash else group, step_metric=axis)

    def finish(self, complete: bool) -> None:
        """End the run, as failed if it is not complete. Raises `TimeoutError` if not all could be uploaded."""
        try:
            self.run.finish(exit_code=0 if complete else 1)
        except TimeoutError as error:
            late = f"not all was uploaded within {MOST_SECONDS} seconds; {self.upload} uploads it"
            raise TimeoutError(late) from error


class _TrackioRun(_Tracker):
    """A run of trackio, which is found again by its name."""

    def __init__(self, plugin: WandB, module: Any, run: Run) -> None:
        super().__init__(
            module,
            module.init(
                project=plugin.project,
                name=f"{_name(plugin, run)}-{plugin.id}",
                group=plugin.group,
                space_id=plugin.space,
                config=_by_section(hyperparameters(run)),
                resume="allow",
                embed=False,
            ),
        )
        self.first = self.run._next_step  # trackio has no public name for it
        space = plugin.space or os.environ.get(SPACE) or os.environ.get(SERVER, "").partition("?")[0]
        self.where = f"trackio: `trackio show --project {plugin.project}`" if not space else f"trackio at {space}"

    def log(self, row: int, points: Points, text: Mapping[str, str]) -> None:
        """Log `points` as a row of their own."""
        self.run.log(self.row(points, text), step=row)

    def finish(self, complete: bool) -> None:
        """End the run; trackio does not say how one ended."""
        self.run.finish()


def _wandb_problems(plugin: WandB, module: Any) -> Iterable[str]:
    """Yield the sentence that refuses an online run without a login, or without a connection."""
    chosen = os.environ.get("WANDB_MODE", "online")
    if (plugin.mode or chosen) != "online" or chosen != "online" or module.run is not None:
        return  # offline; or wandb verifies no login where the environment is offline, or a run is under way
    why = "no login was found (`wandb login` stores one)"
    try:
        with _quiet():
            if module.login(prompt=False, verify=True):
                return
    except Exception as error:
        why = _first_line(error)
    yield f"`wandb` cannot log to {PAGES['wandb']}: {why}{_advice(plugin)}"


def _trackio_problems(plugin: WandB, module: Any) -> Iterable[str]:
    """Yield the sentences that refuse a mode without its place, and a Space or server that cannot be reached."""
    place = (
        "`wandb.space`" if plugin.space else next((f"`{name}`" for name in (SPACE, SERVER) if name in os.environ), "")
    )
    if plugin.mode == "offline":
        if place:
            yield f"`wandb.mode=offline` sends nothing, but {place} names where to send to: leave one of them out."
        return
    if not place:
        if plugin.mode == "online":
            yield "`wandb.mode=online` needs `wandb.space`, the Space that trackio sends to; name it, or set offline."
        return
    try:
        if SERVER in place:
            urlopen(os.environ[SERVER], timeout=10).close()
        else:
            import_module("huggingface_hub").whoami()
    except HTTPError as error:
        if SERVER not in place:  # a server that answers can be reached
            yield f"`wandb` cannot log to {PAGES['trackio']}: {_first_line(error)}{_advice(plugin)}"
    except Exception as error:
        yield f"`wandb` cannot log to the place of {place}: {_first_line(error)}{_advice(plugin)}"


def _advice(plugin: WandB) -> str:
    """Return the end of a refusal: how to log without a connection."""
    later = ", and upload later with `wandb sync`" if plugin.package == "wandb" else ""
    return f"; set `wandb.mode=offline` to log to this machine{later}."


def _name(plugin: WandB, run: Run) -> str:
    """Return the name of the tracker's run: as chosen, else of the run folder, else of the scenario."""
    return plugin.run_name or (run.folder.name if run.folder else run.scenario.name)


def _by_section(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyper-parameters as a mapping of sections: a key of Weights & Biases should have no period."""
    sections: dict[str, Any] = {}
    for key, value in flat.items():
        section, period, option = key.rpartition(".")
        if period:
            sections.setdefault(section, {})[option] = value
        else:
            sections[key] = value
    return sections


def _first_line(error: Exception) -> str:
    """Return the first line of what `error` says, without a period."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the packages print from a terminal with a progress display, and from the output of `--json`."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield
