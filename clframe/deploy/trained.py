"""The trained model of a finished run in use: scores, and answers with class names and confidences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clframe.data import files
from clframe.data.decode import ImageFormat
from clframe.data.listing import LeftOut
from clframe.data.scenario import Scenario
from clframe.data.values import check_values
from clframe.errors import DataError, UsageError
from clframe.evaluate import Reading, Readings
from clframe.model import IncrementalNet, evaluating, masked
from clframe.options import suited
from clframe.system.reading import expand_home
from clframe.system.texts import quote

if TYPE_CHECKING:
    from PIL import Image

    from clframe.deploy.export import Exported, Format

BATCH = 256  # images at a time
NAMED = 6  # classes at most that a sentence names
Files = str | Path | Sequence[str | Path]
Images = Tensor | NDArray[Any] | Sequence[Tensor] | Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Answer:
    """A class that an image may be of.

    Attributes:
        name: of the class.
        label: its column in the scores.
        score: logit, or negated distance.
        confidence: the share that the model gives it, from 0 to 1; None where scores are distances.
    """

    name: str
    label: int
    score: float
    confidence: float | None


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        path: of its file; None if it came as an array.
        answers: the likeliest first, as many as were asked for.
    """

    path: Path | None
    answers: tuple[Answer, ...]

    @property
    def name(self) -> str:
        """The likeliest class."""
        return self.answers[0].name

    @property
    def confidence(self) -> float | None:
        """That of the likeliest class."""
        return self.answers[0].confidence


class Trained(nn.Module):
    """The predictor of a finished run.

    Attributes:
        class_names: for each column of the scores the name of its class.
        predictor: the module behind it, which takes normalised images.
        scenario: what was learnt, without images: classes of each task, shape of the images, normalisation.
        scores: ``logits`` or ``distances``, of which there is no confidence.
        temperature: for each reading what its logits are divided by for the confidence; empty where the run held no
            images out to fit it (``train.val``).
        fitted: for each reading what the temperature was fitted to: ``images``, their number; ``classes``, the labels
            that they have; ``floor``, below which it was not put, as they are of some of the classes only. Empty for a
            run of an earlier clframe.
    """

    def __init__(
        self,
        predictor: nn.Module,
        scenario: Scenario,
        readings: Readings,
        temperature: Mapping[str, float] | None = None,
        fitted: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.predictor = predictor.eval()
        self.class_names = scenario.class_names
        self.scenario = scenario
        self.scores: str = getattr(predictor, "scores", "logits")
        self.temperature = dict(temperature or {})
        self.fitted = dict(fitted or {})
        self._names = readings.names(predictor)
        # what may be answered within each task; in domains everything
        n_classes, domain = len(self.class_names), "domain" in self._names
        self.allowed: Tensor
        allowed = torch.full((len(scenario), n_classes), domain)
        for row, classes in zip(allowed, scenario.classes, strict=True):
            row[list(classes)] = True
        self.register_buffer("allowed", allowed, persistent=False)

    @property
    def backbone(self) -> nn.Module:
        """The trained network below the head, which a method may have rebuilt."""
        return next(module for module in self.modules() if isinstance(module, IncrementalNet)).backbone

    @property
    def needs_task(self) -> bool:
        """Whether it answers within a task only."""
        return self._names == ["task"]

    def reading(self, task: Tensor | int | None) -> Reading:
        """How a question with this task is answered. Raises `UsageError` if it needs one, or there is no such task."""
        if task is None and self.needs_task:
            raise UsageError("This model answers within a task only: give `task`, one number or one for each image.")
        n = len(self.scenario)
        given = torch.as_tensor([] if task is None else task).flatten()
        if outside := [int(t) for t in given.tolist() if not 0 <= t < n]:
            raise UsageError(f"There is no task {outside[0]}: this model has learnt the tasks 0 to {n - 1}.")
        return self._names[-1 if task is not None else 0]

    def forward(self, images: Tensor, task: Tensor | int | None = None) -> Tensor:
        """Scores [B, C] of raw `images` [B, ...] as the data set has them; -inf for classes that `task` rules out.

        Raises `UsageError` if the run has no reading without a task and none is given, or has not learnt that task; if
        the images are of another shape, or their values are not raw ones.
        """
        task = _asked(task)
        self.reading(task)
        images = torch.as_tensor(images)
        self._check(images)
        return self._scored(images, task)

    def _scored(self, images: Tensor, task: Tensor | int | None) -> Tensor:
        if isinstance(task, int):
            task = torch.full((len(images),), task, device=images.device)
        with evaluating(self), torch.no_grad():
            scores: Tensor = self.predictor(self.scenario.transform.normalize(images), task)
        return scores if task is None else masked(scores, self.allowed[task, : scores.shape[1]])

    def confidences(self, scores: Tensor, task: Tensor | int | None = None) -> Tensor | None:
        """The shares [B, C] of the classes, softmax(scores / T), of `scores` with `task`; None of distances."""
        if self.scores == "distances":
            return None
        return (scores.double() / self.temperature.get(self.reading(task), 1.0)).softmax(1)

    def about_confidence(self, task: Tensor | int | None = None) -> str:
        """A sentence on what the confidences rest on, for questions with this task."""
        reading = self.reading(task)
        temperature, fitted = self.temperature.get(reading), self.fitted.get(reading)
        if self.scores == "distances":
            return "This model answers by distances, of which there is no confidence."
        if temperature is None:
            return "The confidence is the network's own: a run with `train.val` above 0 fits it to images held out."
        if fitted is None:
            return f"The confidence was fitted to images held out (temperature {temperature:.3g})."
        of = f"The confidence (temperature {temperature:.3g})"
        if not fitted["images"]:
            return f"{of} is that of the run before the extension; no image of the classes learned since was held out."
        count = f"{fitted['images']} image{'s'[: fitted['images'] != 1]}"
        if fitted["floor"] is None:
            return f"{of} was fitted to {count} held out."
        names = [self.class_names[c] for c in fitted["classes"]]
        listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        return (
            f"{of} rests on {count} held out of new classes only ({listed}), and none of those that were learned "
            f"before: the temperature was kept at {fitted['floor']:.3g} or more, and the confidence may still be too "
            "high for old classes."
        )

    def predict(
        self,
        images: Files | Images | Image.Image | Sequence[Image.Image],
        *,
        top: int = 1,
        task: Tensor | int | None = None,
        skipped: list[str] | None = None,
        left_out: list[str] | None = None,
    ) -> list[Prediction]:
        """The likeliest classes of each image.

        Args:
            images: files and folders, or images that Pillow holds, which are brought to the model's size and colours
                (`clframe.data.files.read_image`); or raw images as the data set has them: an array [B, ...] or a list.
            top: how many classes of each, at most.
            task: one number, or one for each image.
            skipped: files that cannot be read are left out, and a sentence on each is added here; None: they are
                refused.
            left_out: a sentence is added here on what folders hold and is no image by its name, or is hidden.

        Raises:
            DataError: if a file is missing or no image, or a folder has none.
            UsageError: if a task is missing or is not known, or the images do not suit the model.
        """
        task = _asked(task)
        self.reading(task)
        top = suited(int, top)
        if type(top) is not int or top < 1:
            raise UsageError(f"`top` is {quote(top)}; it must be a whole number, 1 at least.")
        paths: Sequence[Path | None]
        raw = self._stacked(images)
        if raw is None:
            self._look()
            named = [images] if isinstance(images, str | Path) else images
            left = LeftOut()
            paths = files.image_files(cast(Sequence[str | Path], named), left)
            if left_out is not None:
                left_out += left.sentences("the folders")
        else:
            paths = [None] * len(raw)
        if isinstance(task, Tensor) and task.dim() and len(task) != len(paths):
            raise UsageError(f"There are {len(paths)} images and {len(task)} tasks; give one for each image.")
        problems: list[str] = []
        found: list[Prediction] = []
        for start in range(0, len(paths), BATCH):
            part = range(start, min(start + BATCH, len(paths)))
            read = self._read(paths, part, problems) if raw is None else {i: raw[i] for i in part}
            if problems and skipped is None:
                continue  # all files that cannot be read are told at once
            if read:
                of_read = task[list(read)] if isinstance(task, Tensor) and task.dim() else task
                found += self._answers([paths[i] for i in read], torch.stack(list(read.values())), of_read, top)
        if problems and skipped is None:
            raise DataError("\n".join(problems))
        if skipped is not None:
            skipped += problems
        return found

    def _look(self) -> ImageFormat:
        """How image files become raw images: as those that were learnt."""
        return self.scenario.transform.look or files.image_format_of(self.scenario.input_shape)

    def export(self, path: str | Path, format: Format, *, task: int | None = None) -> Exported:
        """Write the model to a file that takes raw images [B, ...] and gives scores [B, C]; normalisation is inside.

        What is read from the file is compared with this model on a few images. Images are uint8, but for models of
        images given as floats; a model that needs a task takes one for each image, too, [B] int64.

        Args:
            path: of the file, which must not be there yet.
            format: ``safetensors``: the weights by name, and in the header class names, shape and normalisation;
                ``torch-export``: a program for `torch.export.load`; ``onnx``: which needs ``clframe[onnx]``.
            task: answer within this task only. Networks that compute something else for each task need one, but for
                ``safetensors``.

        Raises:
            UsageError: if there is no such format, the file is there, packages are missing, or no graph can hold what
                the model computes.
            RunError: if the file does not answer as the model does.
        """
        from clframe.deploy.export import export  # it is needed by few

        return export(self, expand_home(path), format, cast("int | None", _asked(task)))

    def _stacked(self, images: Files | Images | Image.Image | Sequence[Image.Image]) -> Tensor | None:
        """Arrays as one [B, ...]; None of files. Raises `UsageError` if they are not as the model takes them."""
        if isinstance(images, str | Path):
            return None
        if not isinstance(images, Tensor | np.ndarray):
            given: list[Any] = list(images) if isinstance(images, Iterable) else [images]
            kinds = {_kind(image) for image in given}
            if kinds == {"file"}:
                return None
            if None in kinds or len(kinds) > 1:
                stranger = next((type(image).__name__ for image in given if _kind(image) is None), None)
                raise UsageError(
                    f"`predict` was given {f'a `{stranger}`' if stranger else ' and '.join(sorted(map(str, kinds)))}: "
                    "give files and folders, or arrays, or images of Pillow, and all of one kind."
                )
            if not given:
                return torch.empty(0, *self.scenario.input_shape)
            if kinds == {"picture"}:
                look, scale = self._look(), self.scenario.transform.scale
                return torch.stack([files.convert_image(image, look, scale) for image in given])
            shapes = sorted({tuple(image.shape) for image in given})
            if len(shapes) > 1:
                raise UsageError(f"The images are of several shapes, such as {list(shapes[0])} and {list(shapes[1])}.")
            images = torch.stack([torch.as_tensor(image) for image in given])
        try:
            raw = torch.as_tensor(images)
        except TypeError as error:
            raise UsageError(f"The images cannot become a tensor ({error}): give an array of numbers.") from error
        self._check(raw)
        return raw

    def _check(self, images: Tensor) -> None:
        """Raise `UsageError` if raw `images` are not as the model takes them."""
        shape, scale = self.scenario.input_shape, self.scenario.transform.scale
        if images.shape[1:] != shape:
            last = images.dim() == 4 and (images.shape[3], *images.shape[1:3]) == tuple(shape)
            raise UsageError(
                f"The images are {list(images.shape[1:])}, and this model takes {list(shape)}"
                + (": channels come first, as `x.permute(0, 3, 1, 2)` of a tensor gives them." if last else ".")
            )
        if images.dtype == torch.uint8:  # one image may be as good as black
            return
        try:
            check_values(images, scale, "images", f"give raw values as those that were learned, from 0 to {scale:g}")
        except DataError as error:
            raise UsageError(str(error)) from error

    def _read(self, paths: Sequence[Path | None], part: range, problems: list[str]) -> dict[int, Tensor]:
        """The images of `part` by position; a sentence in `problems` on each that cannot be read."""
        read: dict[int, Tensor] = {}
        for i in part:
            try:
                read[i] = files.read_image(str(paths[i]), self._look(), self.scenario.transform.scale)
            except DataError as error:
                problems.append(str(error))
        return read

    def _answers(
        self, paths: Sequence[Path | None], images: Tensor, task: Tensor | int | None, top: int
    ) -> list[Prediction]:
        scores = self._scored(images, task)
        shares = self.confidences(scores, task)
        labels = scores.argsort(dim=1, descending=True, stable=True)[:, :top].tolist()
        found = []
        for i, path in enumerate(paths):
            answers = [
                Answer(self.class_names[c], c, scores[i, c].item(), None if shares is None else shares[i, c].item())
                for c in labels[i]
                if scores[i, c] > -torch.inf
            ]
            found.append(Prediction(path, tuple(answers)))
        return found


def _asked(task: Any) -> Tensor | int | None:
    """Return `task`, one or one for each image, as a number or a tensor of whole numbers. Raises `UsageError`."""
    if task is None or isinstance(task, Tensor):
        whole = task
    elif type(whole := suited(int, task)) is not int:
        try:
            whole = torch.as_tensor(task)
        except (TypeError, ValueError, RuntimeError):
            whole = torch.empty(0)
    if isinstance(whole, Tensor) and (whole.is_floating_point() or whole.is_complex() or whole.dtype == torch.bool):
        raise UsageError(f"`task` is {quote(task)}; it must be one whole number, or one for each image.")
    return cast("Tensor | int | None", whole)


def _kind(image: object) -> str | None:
    """Return what an element of a list is that `Trained.predict` is given: a file, an array or a picture."""
    if isinstance(image, str | Path):
        return "file"
    if isinstance(image, Tensor | np.ndarray):
        return "array"
    return "picture" if hasattr(image, "getbands") else None  # Pillow's, which not every process imports
