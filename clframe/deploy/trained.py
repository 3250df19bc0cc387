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
NAMED = 6  # most classes that a sentence names
Files = str | Path | Sequence[str | Path]
Images = Tensor | NDArray[Any] | Sequence[Tensor] | Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Answer:
    """A class that an image may belong to.

    Attributes:
        name: name of the class.
        label: column of the class in the scores.
        score: logit, or negated distance.
        confidence: share of the class, from 0 to 1; None if scores are distances.
    """

    name: str
    label: int
    score: float
    confidence: float | None


@dataclass(frozen=True)
class Prediction:
    """The answers of the model to one image.

    Attributes:
        path: file of the image; None if it came as an array.
        answers: the likeliest first, as many as were asked for.
    """

    path: Path | None
    answers: tuple[Answer, ...]

    @property
    def name(self) -> str:
        """Return the name of the likeliest class."""
        return self.answers[0].name

    @property
    def confidence(self) -> float | None:
        """Return the confidence of the likeliest class."""
        return self.answers[0].confidence


class Trained(nn.Module):
    """The predictor of a finished run.

    Attributes:
        class_names: name of the class of each column of the scores.
        predictor: the wrapped module, which takes normalized images.
        scenario: the scenario learned, without images: classes of each task, shape of the images, normalization.
        scores: ``logits`` or ``distances``, which give no confidence.
        temperature: for each evaluation mode the divisor of its logits for the confidence; empty if the run held out
            no images to fit it (``train.val``).
        fitted: for each evaluation mode what the temperature was fitted to: ``images``, their number; ``classes``,
            their labels; ``floor``, the lower bound of the temperature where they are of some of the classes only.
            Empty for a run of an earlier clframe.
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
        # the possible answers within each task; in domains all classes
        n_classes, domain = len(self.class_names), "domain" in self._names
        self.allowed: Tensor
        allowed = torch.full((len(scenario), n_classes), domain)
        for row, classes in zip(allowed, scenario.classes, strict=True):
            row[list(classes)] = True
        self.register_buffer("allowed", allowed, persistent=False)

    @property
    def backbone(self) -> nn.Module:
        """Return the trained network below the head, which a method may have rebuilt."""
        return next(module for module in self.modules() if isinstance(module, IncrementalNet)).backbone

    @property
    def needs_task(self) -> bool:
        """Return whether the model answers within a task only."""
        return self._names == ["task"]

    def reading(self, task: Tensor | int | None) -> Reading:
        """Return the evaluation mode that answers with this task.

        Raises `UsageError` if the model needs a task and there is none, or has not learned that task.
        """
        if task is None and self.needs_task:
            raise UsageError("This model answers within a task only: give `task`, one number or one for each image.")
        n = len(self.scenario)
        given = torch.as_tensor([] if task is None else task).flatten()
        if outside := [int(t) for t in given.tolist() if not 0 <= t < n]:
            raise UsageError(f"There is no task {outside[0]}: this model has learned the tasks 0 to {n - 1}.")
        return self._names[-1 if task is not None else 0]

    def forward(self, images: Tensor, task: Tensor | int | None = None) -> Tensor:
        """Compute scores [B, C] of raw `images` [B, ...] as in the data set; -inf for classes that `task` rules out.

        Raises `UsageError` if the run has no evaluation mode without a task and none is given, or has not learned that
        task; if the images have another shape, or their values are not raw ones.
        """
        task = _read_task(task)
        self.reading(task)
        images = torch.as_tensor(images)
        self._check(images)
        return self._score(images, task)

    def _score(self, images: Tensor, task: Tensor | int | None) -> Tensor:
        if isinstance(task, int):
            task = torch.full((len(images),), task, device=images.device)
        with evaluating(self), torch.no_grad():
            scores: Tensor = self.predictor(self.scenario.transform.normalize(images), task)
        return scores if task is None else masked(scores, self.allowed[task, : scores.shape[1]])

    def confidences(self, scores: Tensor, task: Tensor | int | None = None) -> Tensor | None:
        """Return the shares [B, C] of the classes, softmax(scores / T), within `task`; None if scores are distances."""
        if self.scores == "distances":
            return None
        return (scores.double() / self.temperature.get(self.reading(task), 1.0)).softmax(1)

    def about_confidence(self, task: Tensor | int | None = None) -> str:
        """Return a sentence on what the confidences rest on, for images with this task."""
        reading = self.reading(task)
        temperature, fitted = self.temperature.get(reading), self.fitted.get(reading)
        if self.scores == "distances":
            return "This model answers by distances, which give no confidence."
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
        """Return the likeliest classes of each image.

        Args:
            images: files and folders, or images that Pillow holds, which are brought to the model's size and colors
                (`clframe.data.files.read_image`); or raw images as the data set has them: an array [B, ...] or a list.
            top: number of classes for each image, at most.
            task: one number, or one for each image.
            skipped: collects a sentence on each file that cannot be read, which is left out; None: such files are
                refused.
            left_out: collects sentences on files in folders that are hidden, or no images by their names.

        Raises:
            DataError: if a file is missing or no image, or a folder has no images.
            UsageError: if a task is missing or unknown, or the images do not suit the model.
        """
        task = _read_task(task)
        self.reading(task)
        top = suited(int, top)
        if type(top) is not int or top < 1:
            raise UsageError(f"`top` is {quote(top)}; it must be a whole number, 1 at least.")
        paths: Sequence[Path | None]
        raw = self._stack(images)
        if raw is None:
            self._find_format()
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
                continue  # all files that cannot be read are named at once
            if read:
                of_read = task[list(read)] if isinstance(task, Tensor) and task.dim() else task
                found += self._answer([paths[i] for i in read], torch.stack(list(read.values())), of_read, top)
        if problems and skipped is None:
            raise DataError("\n".join(problems))
        if skipped is not None:
            skipped += problems
        return found

    def _find_format(self) -> ImageFormat:
        """Return how image files become raw images: like those of the training."""
        return self.scenario.transform.look or files.image_format_of(self.scenario.input_shape)

    def export(self, path: str | Path, format: Format, *, task: int | None = None) -> Exported:
        """Write the model to a file that takes raw images [B, ...] and gives scores [B, C], normalization included.

        The model read from the file is compared with this one on a few images. Images are uint8, but for models of
        images given as floats; a model that needs a task also takes one for each image, [B] int64.

        Args:
            path: path of the file, which must not exist yet.
            format: ``safetensors``: the weights by name, and in the header class names, shape and normalization;
                ``torch-export``: a program for `torch.export.load`; ``onnx``: which needs ``clframe[onnx]``.
            task: the only task that the file answers. Networks that compute something else for each task need one,
                but for ``safetensors``.

        Raises:
            UsageError: if there is no such format, the file exists, packages are missing, or no graph can hold what
                the model computes.
            RunError: if the file gives other scores than the model.
        """
        from clframe.deploy.export import export  # few programs need it

        return export(self, expand_home(path), format, cast("int | None", _read_task(task)))

    def _stack(self, images: Files | Images | Image.Image | Sequence[Image.Image]) -> Tensor | None:
        """Return arrays and pictures as one [B, ...]; None for files.

        Raises `UsageError` if they do not suit the model.
        """
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
                look, scale = self._find_format(), self.scenario.transform.scale
                return torch.stack([files.convert_image(image, look, scale) for image in given])
            shapes = sorted({tuple(image.shape) for image in given})
            if len(shapes) > 1:
                raise UsageError(
                    f"The images are of several shapes, such as {list(shapes[0])} and {list(shapes[1])}: bring them "
                    "to one."
                )
            images = torch.stack([torch.as_tensor(image) for image in given])
        try:
            raw = torch.as_tensor(images)
        except TypeError as error:
            raise UsageError(f"The images cannot become a tensor ({error}): give an array of numbers.") from error
        self._check(raw)
        return raw

    def _check(self, images: Tensor) -> None:
        """Raise `UsageError` if raw `images` do not suit the model."""
        shape, scale = self.scenario.input_shape, self.scenario.transform.scale
        if images.shape[1:] != shape:
            last = images.dim() == 4 and (images.shape[3], *images.shape[1:3]) == tuple(shape)
            raise UsageError(
                f"The images are {list(images.shape[1:])}, and this model takes {list(shape)}"
                + (": channels come first, as `x.permute(0, 3, 1, 2)` of a tensor gives them." if last else ".")
            )
        if images.dtype == torch.uint8:  # no range to check: one image may be almost black
            return
        try:
            check_values(images, scale, "images", f"give raw values as those that were learned, from 0 to {scale:g}")
        except DataError as error:
            raise UsageError(str(error)) from error

    def _read(self, paths: Sequence[Path | None], part: range, problems: list[str]) -> dict[int, Tensor]:
        """Return the images of `part` by position; `problems` collects a sentence on each file that cannot be read."""
        read: dict[int, Tensor] = {}
        for i in part:
            try:
                read[i] = files.read_image(str(paths[i]), self._find_format(), self.scenario.transform.scale)
            except DataError as error:
                problems.append(str(error))
        return read

    def _answer(
        self, paths: Sequence[Path | None], images: Tensor, task: Tensor | int | None, top: int
    ) -> list[Prediction]:
        scores = self._score(images, task)
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


def _read_task(task: Any) -> Tensor | int | None:
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
    """Return the kind of an element given to `Trained.predict`: a file, an array or a picture; None: none of them."""
    if isinstance(image, str | Path):
        return "file"
    if isinstance(image, Tensor | np.ndarray):
        return "array"
    return "picture" if hasattr(image, "getbands") else None  # of Pillow, which not every process imports
