"""Curves for TensorBoard: on by default, written into the folder ``tensorboard`` of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.data.pictures import encode_png
from clframe.hooks import hookimpl
from clframe.metrics import Matrix, average_accuracy, forgetting
from clframe.plugin import Plugin

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clframe.context import Run
    from clframe.events import Event
    from clframe.settings import Config

VALIDATION = "validation_"  # prefix of the groups of accuracies on held-out images
WHILE_LEARNING = "while_learning/"  # prefix of the groups of measures of evaluations within experiences
TITLES = {"class": "class-incremental", "task": "task-incremental", "domain": "domain-incremental"}
MOST_ANNOTATED = 25  # experiences; the cells of a larger matrix are too small for readable figures
# red, green, blue at 0, 25, 50, 75 and 100 %, in even steps of lightness (0.97 to 0.33 in OKLab)
RAMP = ((253, 246, 212), (143, 210, 180), (31, 161, 173), (29, 100, 158), (39, 44, 108))
EMPTY = (235, 235, 235)  # not measured
DARK = 0.645  # text is black on a lighter cell, white from here on: its contrast is 4.5 or more (WCAG 2)


class TensorBoard(Plugin):
    """An observer that writes curves, the accuracy matrix, hyper-parameters and the configuration for TensorBoard.

    Two axes are in use. Accuracies and measures taken after an experience stand at the number of experiences learned
    (1, 2, ...), so that the curves of methods that take unequal numbers of steps can be laid over each other:
    ``accuracy_<reading>/experience_<j>`` (all in one chart under Custom Scalars), ``average_accuracy/<reading>``,
    ``forgetting/<reading>``, with ``run.eval_every`` the measures while learning
    (``while_learning/<measure>/<reading>``), the image ``accuracy_matrix/<reading>``, drawn when the run ends or stops,
    and the images that a method shows (`Run.log_images`), under its name. With ``train.val``, the accuracies on the
    held-out images are likewise ``validation_<reading>/experience_<j>``. Everything else stands at the step of the run:
    ``loss/<term>``, ``learning_rate``, ``log/<name>``, and ``within_<reading>/experience_<j>``, the accuracies between
    the epochs or steps of an experience (``validation_within_...`` on held-out images).

    After a resume, everything written beyond the checkpoint's step is purged; an accuracy may be written twice, with
    the same value at the same place. Nothing is written if the run keeps no folder.

    When to use:
        Always: it is on by default in a run that keeps a folder; `--no-tensorboard` turns it off.

    Keeps:
        Nothing; results do not depend on it.

    Hooks:
        `before_run`
    """

    name = "tensorboard"
    family = "observer"
    observer = True

    def __init__(self) -> None:
        self.writer: Any = None
        self.listener: Any = None

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Start to listen to the records of a run that keeps a folder."""
        if run.folder is not None:
            self.listener = partial(self.write, run)
            run.listeners.append(self.listener)

    @hookimpl
    def after_run(self, run: Run) -> None:
        """Draw the accuracy matrices, and close the event file."""
        if self.listener is not None:
            run.listeners.remove(self.listener)
        if self.writer is not None:
            learned = 0
            for reading, matrix in run.accuracy.items():
                learned = len(matrix)
                if any(a is not None for row in matrix for a in row):
                    image = draw(matrix, TITLES[reading])
                    self.writer.file_writer.add_summary(encode_image(f"accuracy_matrix/{reading}", image), learned)
            if learned == len(run.scenario):
                self.writer.file_writer.add_summary(self.hyperparameters(run)[2])  # the session has ended as planned
            self.writer.close()
        self.writer = self.listener = None

    def write(self, run: Run, record: Event) -> None:
        """Write the contents of a record, and flush them to the system: no checkpoint is ahead of the curves."""
        kind = record["kind"]
        if kind == "start":
            self.open(run)
        elif kind == "step":
            self.scalars("loss", record["losses"], record["total_step"])
            self.writer.add_scalar("learning_rate", record["lr"], record["total_step"])
        elif kind == "within":
            held_out = VALIDATION if record.get("part") == "val" else ""
            group = f"{held_out}within_{record['reading']}"
            self.scalars(group, by_experience(record["row"]), record["total_step"])
        elif kind == "log":
            self.scalars("log", record["values"], record["total_step"])
        elif kind == "images":
            shown = encode_image(record["name"], record["picture"].numpy())
            self.writer.file_writer.add_summary(shown, record["experience"] + 1)
        elif kind == "eval" and record.get("part") == "val":
            for reading, row in record["rows"].items():
                self.scalars(f"{VALIDATION}{reading}", by_experience(row), len(run.validation[reading]))
        elif kind == "eval":
            for reading, row in record["rows"].items():
                matrix = run.accuracy[reading]
                self.scalars(f"accuracy_{reading}", by_experience(row), len(matrix))
                self.scalars("average_accuracy", {reading: average_accuracy(matrix)}, len(matrix))
                self.scalars("forgetting", {reading: forgetting(matrix)}, len(matrix))
            if run.config.run.eval_every != "experience":
                self.measures_while_learning(run)
        else:
            return
        self.writer.flush()

    def measures_while_learning(self, run: Run) -> None:
        """Add the measures while learning, so far, at the number of experiences learned."""
        for reading, measures in run.evaluations.measures().items() if run.evaluations is not None else ():
            learned = len(run.accuracy[reading])
            for name, measure in measures.items():
                self.scalars(f"{WHILE_LEARNING}{name}", {reading: measure.value}, learned)

    def scalars(self, group: str, values: Mapping[str, float | None], step: int) -> None:
        """Add one point to each curve of a group; None adds no point."""
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def open(self, run: Run) -> None:
        """Open an event file: a new run's with its configuration, a resumed run's with a purge."""
        from torch.utils.tensorboard import SummaryWriter

        from clframe.config import to_yaml

        folder = run.folder / "tensorboard"  # type: ignore[operator]  # only runs with a folder have a listener
        if any(folder.glob("events.*")):
            self.writer = SummaryWriter(folder, purge_step=run.total_steps + 1)
            return
        self.writer = SummaryWriter(folder)
        self.writer.add_custom_scalars(layout(run.scenario.setting, run.config))
        self.writer.add_text("config", f"```yaml\n{to_yaml(run.config)}```", 0)
        experiment, session, _ = self.hyperparameters(run)
        # not `add_hparams`, which writes into a folder of its own and so adds a second run to every chart
        self.writer.file_writer.add_summary(experiment)
        self.writer.file_writer.add_summary(session)

    def hyperparameters(self, run: Run) -> tuple[Any, Any, Any]:
        """Return summaries of the experiment, of the session's start and of its end, for the HParams page."""
        from torch.utils.tensorboard.summary import hparams

        metrics = [f"{m}/{r}" for m in ("average_accuracy", "forgetting") for r in readings(run.scenario.setting)]
        summaries: tuple[Any, Any, Any] = hparams(settings(run.config.model_dump()), dict.fromkeys(metrics))
        return summaries


def readings(setting: str) -> list[str]:
    """Return the evaluation modes that a run of this setting can have."""
    return ["class", "task"] if setting == "class" else [setting]


def layout(setting: str, config: Config) -> dict[str, dict[str, list[Any]]]:
    """Return the page Custom Scalars: charts by category, each with the pattern of its curves."""
    after = {}
    between = {}
    for reading in readings(setting):
        title = f"accuracy on each experience, {TITLES[reading]}"
        after[title] = curves(f"accuracy_{reading}/")
        between[title] = curves(f"within_{reading}/")
        if config.train.val:
            after[f"{title}, images held out"] = curves(f"{VALIDATION}{reading}/")
            between[f"{title}, images held out"] = curves(f"{VALIDATION}within_{reading}/")
    after["average accuracy"] = curves("average_accuracy/")
    after["forgetting"] = curves("forgetting/")
    pages = {"After each experience (x: experiences learned)": after}
    if config.run.eval_every != "experience":
        after["measures while learning"] = curves(WHILE_LEARNING)
        pages["Within experiences (x: steps)"] = between
    return {**pages, "Training (x: steps)": {"loss terms": curves("loss/")}}


def curves(group: str) -> list[Any]:
    """Return a chart of all curves of a group."""
    return ["Multiline", [f"^{group}"]]


def by_experience(row: Sequence[float | None]) -> dict[str, float | None]:
    """Return a row of accuracies by the name of the experience, counted from 1, in an order that sorts."""
    digits = len(str(len(row)))
    return {f"experience_{j:0{digits}}": accuracy for j, accuracy in enumerate(row, start=1)}


def settings(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Return the part of a configuration that can change the results, flat, by the names that ``--set`` uses."""
    sections = {**{n: config[n] for n in ("scenario", "model", "train")}, **config["plugins"]}
    flat = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    flat["plugins"] = ", ".join(name for name in config["plugins"] if name != TensorBoard.name) or "none"
    flat["seed"] = config["run"]["seed"]
    kept = {name: value for name, value in flat.items() if value is not None}
    return {name: v if type(v) in (int, float, str) else str(v) for name, v in kept.items()}


def encode_image(tag: str, image: NDArray[np.uint8]) -> Any:
    """Return the summary of an image [H, W, 3]; `SummaryWriter.add_image` resamples it first, 5 times slower."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    height, width, colors = image.shape
    shown = Summary.Image(height=height, width=width, colorspace=colors, encoded_image_string=encode_png(image))
    return Summary(value=[Summary.Value(tag=tag, image=shown)])


def draw(matrix: Matrix, title: str) -> NDArray[np.uint8]:
    """Draw the accuracy matrix as an image [H, W, 3]: a row for each experience, values in %, gray if not measured."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    n = len(matrix[0])
    values = np.full((n, n), np.nan)
    values[: len(matrix)] = np.array(matrix, dtype=float)  # None becomes nan
    annotated = n <= MOST_ANNOTATED
    cell = max(72, 360 // n) if annotated else max(1, 800 // n)
    side = n * cell
    left = 100
    top = 56
    image = Image.new("RGB", (left + side + (28 if annotated else 116), top + side + 80), "white")
    canvas = ImageDraw.Draw(image)
    small = ImageFont.load_default(size=20)
    large = ImageFont.load_default(size=22)

    image.paste(Image.fromarray(shades(values).repeat(cell, axis=0).repeat(cell, axis=1)), (left, top))
    if annotated:
        for k in range(1, n):
            canvas.line((left + k * cell, top, left + k * cell, top + side), "white", width=2)
            canvas.line((left, top + k * cell, left + side, top + k * cell), "white", width=2)
        for i, j in np.argwhere(~np.isnan(values)).tolist():
            at = (left + (j + 0.5) * cell, top + (i + 0.5) * cell)
            color = "black" if values[i, j] < DARK else "white"
            canvas.text(at, f"{100 * values[i, j]:.1f}", color, small, anchor="mm")
    else:  # too small for figures: a scale beside the cells
        x = left + side + 28
        scale = shades(np.linspace(1, 0, side)[:, None])
        image.paste(Image.fromarray(scale.repeat(24, axis=1)), (x, top))
        for percent in range(0, 101, 20):
            canvas.text((x + 32, top + side * (1 - percent / 100)), str(percent), "black", small, anchor="lm")

    every = 1 if annotated else 5 * -(-n // 50)
    for k in range(every, n + 1, every):
        middle = (k - 0.5) * cell
        canvas.text((left + middle, top + side + 10), str(k), "black", small, anchor="mt")
        canvas.text((left - 10, top + middle), str(k), "black", small, anchor="rm")
    canvas.text((left, 18), f"Accuracy in %, {title}", "black", large, anchor="lt")
    canvas.text((left + side / 2, top + side + 66), "tested on experience", "black", large, anchor="ms")
    upright = Image.new("RGB", (side, 32), "white")
    ImageDraw.Draw(upright).text((side / 2, 24), "after learning experience", "black", large, anchor="ms")
    image.paste(upright.transpose(Image.Transpose.ROTATE_90), (10, top))
    return np.asarray(image)


def shades(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return colors [..., 3] of accuracies [...] from 0 to 1, the higher the darker; gray for nan."""
    import numpy as np

    at = np.linspace(0, 1, len(RAMP))
    colors = np.stack([np.interp(values, at, channel) for channel in zip(*RAMP, strict=True)], axis=-1)
    return np.where(np.isnan(values)[..., None], EMPTY, colors.round()).astype(np.uint8)
