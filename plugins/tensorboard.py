"""Curves for TensorBoard: on by default, written into the folder ``tensorboard`` of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.hooks import hookimpl
from clframe.metrics import Matrix, average_accuracy, forgetting
from clframe.plugin import Plugin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clframe.context import Record, Run

TITLES = {"class": "class-incremental", "task": "task-incremental", "domain": "domain-incremental"}
MOST_ANNOTATED = 25  # experiences; figures in the cells of a larger matrix could not be read


class TensorBoard(Plugin):
    """Writes curves, the accuracy matrix as a figure, hyper-parameters and the configuration for TensorBoard.

    Two axes are in use. Accuracies and measures taken after an experience stand at the number of experiences learnt
    (1, 2, ...), so that the curves of methods that take unequal numbers of steps can be laid over each other:
    ``accuracy_<reading>/experience_<j>`` (all in one chart under Custom Scalars), ``average_accuracy/<reading>``,
    ``forgetting/<reading>``, and the figure ``accuracy_matrix/<reading>``, drawn when the run ends or stops.
    Everything else stands at the step of the run: ``loss/<term>``, ``learning_rate``, ``log/<name>``, and
    ``within_<reading>/experience_<j>``, the accuracies between the epochs of an experience.

    After a resume, what was written beyond the checkpoint's step is purged; an accuracy may be written twice, with the
    same value at the same place. Nothing is written if the run keeps no folder.
    """

    name = "tensorboard"
    observer = True

    def __init__(self) -> None:
        self.writer: Any = None
        self.listener: Any = None

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Listen to the run's records."""
        if run.folder is not None:
            self.listener = partial(self.write, run)
            run.listeners.append(self.listener)

    @hookimpl
    def after_run(self, run: Run) -> None:
        """Draw the accuracy matrices, and close the file."""
        if self.listener is not None:
            run.listeners.remove(self.listener)
        if self.writer is not None:
            learnt = 0
            for reading, matrix in run.accuracy.items():
                learnt = len(matrix)
                if any(a is not None for row in matrix for a in row):
                    image = pixels(draw(matrix, TITLES[reading]))
                    self.writer.add_image(f"accuracy_matrix/{reading}", image, learnt, dataformats="HWC")
            if learnt == len(run.scenario):
                self.writer.file_writer.add_summary(self.hyperparameters(run)[2])  # the session has ended well
            self.writer.close()
        self.writer = self.listener = None

    def write(self, run: Run, record: Record) -> None:
        """Write what a record of the run holds, and hand it to the system, so that no checkpoint is ahead of it."""
        kind = record["kind"]
        if kind == "start":
            self.open(run)
        elif kind == "step":
            self.scalars("loss", record["losses"], record["total_step"])
            self.writer.add_scalar("learning_rate", record["lr"], record["total_step"])
        elif kind == "within":
            self.scalars(f"within_{record['reading']}", by_experience(record["row"]), record["total_step"])
        elif kind == "log":
            self.scalars("log", record["values"], record["total_step"])
        elif kind == "eval":
            for reading, row in record["rows"].items():
                matrix = run.accuracy[reading]
                self.scalars(f"accuracy_{reading}", by_experience(row), len(matrix))
                self.scalars("average_accuracy", {reading: average_accuracy(matrix)}, len(matrix))
                self.scalars("forgetting", {reading: forgetting(matrix)}, len(matrix))
        else:
            return
        self.writer.flush()

    def scalars(self, group: str, values: Mapping[str, float | None], step: int) -> None:
        """One point of each curve of a group; None: no point."""
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def open(self, run: Run) -> None:
        """Begin an event file: a new run's with what is known from the start, a resumed run's with a purge."""
        from torch.utils.tensorboard import SummaryWriter

        from clframe.config import to_yaml

        folder = run.folder / "tensorboard"  # type: ignore[operator]  # only runs with a folder are listened to
        if any(folder.glob("events.*")):
            self.writer = SummaryWriter(folder, purge_step=run.total_steps + 1)
            return
        self.writer = SummaryWriter(folder)
        self.writer.add_custom_scalars(layout(run.scenario.setting, run.config.run.eval_every == "epoch"))
        self.writer.add_text("config", f"```yaml\n{to_yaml(run.config)}```", 0)
        experiment, session, _ = self.hyperparameters(run)
        # not `add_hparams`, which writes into a folder of its own and so adds a second run to every chart
        self.writer.file_writer.add_summary(experiment)
        self.writer.file_writer.add_summary(session)

    def hyperparameters(self, run: Run) -> tuple[Any, Any, Any]:
        """Summaries of the experiment, of the session's start and of its end, for the HParams page."""
        from torch.utils.tensorboard.summary import hparams

        metrics = [f"{m}/{r}" for m in ("average_accuracy", "forgetting") for r in readings(run.scenario.setting)]
        summaries: tuple[Any, Any, Any] = hparams(settings(run.config.model_dump()), dict.fromkeys(metrics))
        return summaries


def readings(setting: str) -> list[str]:
    """The readings that a run of this setting can have."""
    return ["class", "task"] if setting == "class" else [setting]


def layout(setting: str, within: bool) -> dict[str, dict[str, list[Any]]]:
    """The page Custom Scalars: charts by category, each with the pattern of its curves."""
    after, between = {}, {}
    for reading in readings(setting):
        title = TITLES[reading]
        after[f"accuracy on each experience, {title}"] = curves(f"accuracy_{reading}/")
        between[f"accuracy on each experience, {title}"] = curves(f"within_{reading}/")
    after["average accuracy"] = curves("average_accuracy/")
    after["forgetting"] = curves("forgetting/")
    pages = {"After each experience (x: experiences learnt)": after}
    if within:
        pages["Within experiences (x: steps)"] = between
    return {**pages, "Training (x: steps)": {"loss terms": curves("loss/")}}


def curves(group: str) -> list[Any]:
    """All curves of a group in one chart."""
    return ["Multiline", [f"^{group}"]]


def by_experience(row: Sequence[float | None]) -> dict[str, float | None]:
    """A row of accuracies by the name of the experience, counted from 1, in an order that sorts."""
    digits = len(str(len(row)))
    return {f"experience_{j:0{digits}}": accuracy for j, accuracy in enumerate(row, start=1)}


def settings(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """What of a configuration can change the results, flat, by the names that ``--set`` uses."""
    sections = {**{n: config[n] for n in ("scenario", "model", "train")}, **config["plugins"]}
    flat = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    flat["plugins"] = ", ".join(name for name in config["plugins"] if name != TensorBoard.name) or "none"
    flat["seed"] = config["run"]["seed"]
    kept = {name: value for name, value in flat.items() if value is not None}
    return {name: v if type(v) in (int, float, str) else str(v) for name, v in kept.items()}


def draw(matrix: Matrix, title: str) -> Figure:
    """The accuracy matrix as a figure: a row for each experience, values in %, empty where nothing was measured."""
    from matplotlib.figure import Figure

    n = len(matrix[0])
    percent = [[float("nan") if a is None else 100 * a for a in row] for row in matrix]
    percent += [[float("nan")] * n for _ in range(n - len(matrix))]
    annotated = n <= MOST_ANNOTATED
    side = max(n, 5) * (0.5 if annotated else 0.2)
    width, height = (
        side + (0.9 if annotated else 1.7),
        side + 1.0,
    )  # inches; a scale stands beside cells without numbers
    figure = Figure(figsize=(width, height), dpi=120)
    axes = figure.add_axes((0.75 / width, 0.6 / height, side / width, side / height))
    axes.set_facecolor("0.92")
    image = axes.imshow(percent, vmin=0, vmax=100, cmap="viridis")
    for i, row in enumerate(percent if annotated else []):
        for j, value in enumerate(row):
            if value == value:  # a number
                colour = "black" if value > 60 else "white"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    numbers = range(1, n + 1) if annotated else range(5, n + 1, 5)
    axes.set_xticks([j - 1 for j in numbers], [str(j) for j in numbers])
    axes.set_yticks([i - 1 for i in numbers], [str(i) for i in numbers])
    axes.set_xlabel("tested on experience")
    axes.set_ylabel("after learning experience")
    axes.set_title(f"Accuracy in %, {title}", fontsize=10)
    if not annotated:
        figure.colorbar(image, cax=figure.add_axes(((side + 0.95) / width, 0.6 / height, 0.2 / width, side / height)))
    return figure


def pixels(figure: Figure) -> Any:
    """The figure [H, W, 3] as an array of uint8, without pyplot, which would choose a backend for the whole process."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3]
