"""Curves for TensorBoard: on by default, written into the folder ``tensorboard`` of the run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.data.pictures import encode_png
from clframe.hooks import hookimpl
from clframe.plugin import Plugin
from clframe.toolkit.curves import (
    TITLES,
    VALIDATION,
    WHILE_LEARNING,
    Points,
    final_points,
    hyperparameters,
    is_complete,
    points_of,
    readings,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clframe.context import Run
    from clframe.events import Event
    from clframe.settings import Config


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
            self.add(final_points(run))
            if is_complete(run):
                self.writer.file_writer.add_summary(self.hyperparameters(run)[2])  # the session has ended as planned
            self.writer.close()
        self.writer = self.listener = None

    def write(self, run: Run, record: Event) -> None:
        """Write the contents of a record, and flush them to the system: no checkpoint is ahead of the curves."""
        if record["kind"] == "start":
            self.open(run)
        elif points := points_of(run, record):
            self.add(points)
        else:
            return
        self.writer.flush()

    def add(self, points: Points) -> None:
        """Add points to their curves, and pictures beside them."""
        for curve, value in points.values.items():
            self.writer.add_scalar(curve, value, points.at)
        for name, picture in points.pictures.items():
            self.writer.file_writer.add_summary(encode_image(name, picture), points.at)

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
        summaries: tuple[Any, Any, Any] = hparams(hyperparameters(run), dict.fromkeys(metrics))
        return summaries


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


def encode_image(tag: str, image: NDArray[np.uint8]) -> Any:
    """Return the summary of an image [H, W, 3]; `SummaryWriter.add_image` resamples it first, 5 times slower."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    height, width, colors = image.shape
    shown = Summary.Image(height=height, width=width, colorspace=colors, encoded_image_string=encode_png(image))
    return Summary(value=[Summary.Value(tag=tag, image=shown)])
