"""Evaluation: accuracy rows, one for each evaluation mode of the run, computed through the predictor alone.

An evaluation mode, a *reading* in the code and in files, says which classes an image may be assigned to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe.data.batch import ImageData
from clframe.data.files import LazyImages
from clframe.data.scenario import Scenario, Setting
from clframe.data.transform import Transform
from clframe.events import EvalPart, Evaluated, EvaluatedWithin
from clframe.model import IncrementalNet, class_mask, evaluating, masked

if TYPE_CHECKING:
    from clframe.context import Run

Reading = Literal["class", "task", "domain"]
PredictorHook = Callable[..., nn.Module | None]  # the hook `predictor`, which is called with the run
KEPT_BYTES = 2**28  # of images at most that are kept normalized between evaluations while learning


class Predictor(nn.Module):
    """The base of modules that the hook ``predictor`` returns; any module with these attributes fits.

    ``forward(x, task)`` maps normalized images [B, ...], and their tasks [B] or None, to scores [B, C] of all classes
    of the head. The caller masks the classes that an evaluation mode rules out.

    Attributes:
        scores: ``logits``, or ``distances`` (negated), for which no NLL and no calibration error is computed.
        uses_task: whether the scores depend on the given task.
        needs_task: whether there are no scores without a task. Such a run has no class-incremental evaluation, and none
            for tasks that are not learned yet.
        n_classes: how many of the head's classes, from the first, are possible answers; None: all.
    """

    scores: ClassVar[Literal["logits", "distances"]] = "logits"
    uses_task: ClassVar[bool] = True
    needs_task: ClassVar[bool] = False
    n_classes: int | None = None


class ModelPredictor(Predictor):
    """The predictor of a run whose plugins bring none: the model's own logits."""

    uses_task = False

    def __init__(self, model: IncrementalNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Return the logits [B, C]."""
        logits: Tensor = self.model(x, task).logits
        return logits


class TaskPredictor(ModelPredictor):
    """The predictor of a network that computes something different for each task, and needs the task: its logits.

    Args:
        model: the network.
        n_classes: number of classes of the tasks learned so far; for later tasks there is nothing to compute with.
    """

    uses_task = True
    needs_task = True

    def __init__(self, model: IncrementalNet, n_classes: int) -> None:
        super().__init__(model)
        self.n_classes = n_classes


class NearestMean(Predictor):
    """The predictor by the nearest class mean: negated distances of an image's normalized feature to the means.

    Classes without a mean have the score -inf.

    Args:
        model: the network that computes the features.
        means: [C, D] of length 1, for the first C classes of the head; NaN for a class without images.
    """

    scores = "distances"
    uses_task = False

    def __init__(self, model: IncrementalNet, means: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.means: Tensor  # [C, D]
        self.register_buffer("means", next(model.parameters()).new_empty(0, 1) if means is None else means)
        self.n_classes: int = len(self.means)

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Return the scores [B, C] of all classes of the head."""
        feature = functional.normalize(self.model.features(x), dim=1)
        if torch.compiler.is_compiling():  # for an export: ONNX has no `cdist`
            distances = (feature[:, None] - self.means).square().sum(2).sqrt()
        else:  # not by products, which lose half of the digits where two points are near each other
            distances = torch.cdist(feature, self.means, compute_mode="donot_use_mm_for_euclid_dist")
        distances = distances.masked_fill(self.means.isnan().any(1), torch.inf)
        return functional.pad(-distances, (0, self.model.n_classes - len(self.means)), value=-torch.inf)


def n_answerable(predictor: nn.Module, n_classes: int) -> int:
    """Return how many of the `n_classes` of the head are possible answers of `predictor`."""
    limit: int | None = getattr(predictor, "n_classes", None)
    return n_classes if limit is None else limit


@dataclass(frozen=True)
class Readings:
    """The classes that are possible answers in each evaluation mode of a run.

    Attributes:
        setting: the setting of the scenario.
        classes: the classes of each experience of the scenario.
    """

    setting: Setting
    classes: Sequence[Sequence[int]]

    def names(self, predictor: nn.Module) -> list[Reading]:
        """Return the evaluation modes of a run with this predictor."""
        if self.setting == "class":
            return ["task"] if getattr(predictor, "needs_task", False) else ["class", "task"]
        return [self.setting]

    @property
    def common(self) -> Reading:
        """Return the evaluation mode that every run of this setting has."""
        return "task" if self.setting == "class" else self.setting

    def choices(self, reading: Reading, after: int, on: int) -> Sequence[int]:
        """Return the classes to choose from, after experience `after`, for images of experience `on`."""
        if reading == "task":
            return self.classes[on]
        return sorted({c for group in self.classes[: after + 1] for c in group})

    def covers(self, reading: Reading, after: int, on: int, n_classes: int) -> bool:
        """Return whether a head of `n_classes` can answer for experience `on`, after experience `after`.

        It can for the experiences so far, and for later ones of which it has all classes.
        """
        if on <= after:
            return True
        wanted = self.classes[on]
        return max(wanted) < n_classes and set(wanted) <= set(self.choices(reading, after, on))


@dataclass(frozen=True)
class Row:
    """The result of one evaluation, on all experiences of a scenario.

    Attributes:
        accuracy: for each evaluation mode, the accuracy from 0 to 1 on each experience; None where the head does not
            cover the experience, and where there is one class to choose from, so that every answer is right.
        scores: for each evaluation mode, [N, C] float32 on the CPU for each experience; None where there are none.
        labels: [N] int64 on the CPU for each experience.
        kind: ``logits`` or ``distances``, as the predictor declares its scores.
    """

    accuracy: dict[Reading, list[float | None]]
    scores: dict[Reading, list[Tensor | None]]
    labels: list[Tensor]
    kind: str

    def blank_copy(self) -> Row:
        """Return a copy whose accuracies and scores are all None."""
        accuracy: dict[Reading, list[float | None]] = {r: [None] * len(row) for r, row in self.accuracy.items()}
        scores: dict[Reading, list[Tensor | None]] = {r: [None] * len(row) for r, row in self.scores.items()}
        return Row(accuracy, scores, self.labels, self.kind)


class Evaluator:
    """Evaluates a run on its stream, through the module that answers for it, and keeps what it measures.

    Args:
        run: the context of the run.
        scenario: its stream, with images.

    Attributes:
        baseline: the accuracy of the untrained network, by evaluation mode, where it was measured.
        row: the latest row that `add_rows` added, of test images, with scores.
    """

    def __init__(self, run: Run, scenario: Scenario) -> None:
        self.run = run
        self.scenario = scenario
        self.readings = Readings(scenario.setting, scenario.classes)
        self.baseline: dict[str, list[float | None]] = {}
        self.row: Row | None = None
        self._few: dict[EvalPart, FewImages] = {}

    @property
    def parts(self) -> list[EvalPart]:
        """The images that are evaluated: test images, and with ``train.val`` also those held out."""
        return ["test", "val"] if self.scenario.val_share else ["test"]

    def answering(self, hook: PredictorHook) -> nn.Module:
        """Return the module that answers for the run: the result of the hook `predictor`, else the model itself."""
        answer = hook(run=self.run)
        return ModelPredictor(self.run.model) if answer is None else answer

    def measure_untrained(self, hook: PredictorHook) -> None:
        """Measure the accuracy of the untrained network, in the evaluation modes where it covers later experiences."""
        last = len(self.scenario) - 1
        n_classes = self.run.model.n_classes
        if not last or not self.readings.covers(self.readings.common, 0, last, n_classes):
            return
        n_classes = n_answerable(self.answering(hook), n_classes)
        if not self.readings.covers(self.readings.common, 0, last, n_classes):
            return
        accuracy = self.evaluate(hook).accuracy
        self.baseline.update(
            (mode, row) for mode, row in accuracy.items() if self.readings.covers(mode, 0, last, n_classes)
        )

    def add_rows(self, hook: PredictorHook, *, blank: bool) -> Row:
        """Add a row to each accuracy matrix: of all experiences so far, and of later ones that the head covers.

        With ``train.val``, the matrices of the images held out get a row each, too. A `blank` row has no accuracies:
        nothing was trained, so there is nothing to say. Returns the row of the test images, with scores.
        """
        run = self.run
        rows = {part: self.evaluate(hook, keep_scores=part == "test", part=part) for part in self.parts}
        if blank:
            rows = {part: row.blank_copy() for part, row in rows.items()}
        for part, row in rows.items():
            matrices = run.accuracy if part == "test" else run.validation
            for reading, accuracy in row.accuracy.items():
                matrices.setdefault(reading, []).append(accuracy)
        for part, row in rows.items():
            accuracies = {str(mode): values for mode, values in row.accuracy.items()}
            if part == "test" and not blank:
                self._record_end(hook, row)
            run._emit(Evaluated(run.experience.index, run.total_steps, part, accuracies))
        self.row = rows["test"]
        return self.row

    def is_due(self, steps: int) -> bool:
        """Return whether ``run.eval_every`` asks for an evaluation after so many steps of the experience."""
        every = self.run.config.run.eval_every
        if every == "epoch":
            return (self.run.step + 1) % self.run.batches_per_epoch == 0
        return isinstance(every, int) and steps % every == 0

    def record(self, hook: PredictorHook) -> None:
        """Record an evaluation while learning; it enters no matrix."""
        run = self.run
        for part in self.parts:
            if run.config.run.eval_images is not None:
                accuracy = self.evaluate_few(hook, part)
            else:
                seen_only = run.config.run.eval_every != "epoch"  # what costs nothing between epochs does between steps
                accuracy = self.evaluate(hook, part=part, seen_only=seen_only).accuracy
            if part == "test" and run.evaluations is not None:
                run.evaluations.add(run.experience.index, run.total_steps, accuracy)
            self._emit_within(part, accuracy)

    def _record_end(self, hook: PredictorHook, row: Row) -> None:
        """Add the evaluation at an experience's end to those within it.

        It is on the same images: those of ``run.eval_images``, where this is set, else all, of which there is `row`. A
        row on all images among rows on a part of them would differ from both neighbors by the choice of images.
        """
        run = self.run
        if run.evaluations is None:
            return
        place = run.experience.index, run.total_steps
        if run.config.run.eval_images is None:
            run.evaluations.add_end(*place, row.accuracy, [len(labels) for labels in row.labels])
            return
        accuracy = self.evaluate_few(hook, "test")
        run.evaluations.add_end(*place, accuracy, self._few["test"].counts)
        self._emit_within("test", accuracy)

    def _emit_within(self, part: EvalPart, accuracy: Mapping[Reading, list[float | None]]) -> None:
        run = self.run
        evaluations = run.evaluations
        place = (run.experience.index, run.phase.name, run.epoch, run.total_steps)
        for reading, row in accuracy.items():
            if evaluations is not None:
                run._emit(EvaluatedWithin(*place, part, reading, row, evaluations.every, evaluations.images))

    def state(self) -> dict[str, Any]:
        """Return what was measured so far."""
        measured: dict[str, Any] = {"accuracy": self.run.accuracy, "baseline": self.baseline}
        if self.run.evaluations is not None:
            measured["evaluations"] = self.run.evaluations.state()
        return measured | ({"validation": self.run.validation} if self.scenario.val_share else {})

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with what was measured before.

        The rows of validation images, and the evaluations while learning, may not have been kept.
        """
        self.run.accuracy, self.baseline = state["accuracy"], state["baseline"]
        if self.run.evaluations is not None:
            if state.get("evaluations") is not None:
                self.run.evaluations.load(state["evaluations"])
            else:
                self.run.evaluations.whole = False
        if self.scenario.val_share:
            measured = state.get("validation", {})
            empty = {mode: [[None] * len(row) for row in rows] for mode, rows in self.run.accuracy.items()}
            self.run.validation = {mode: measured.get(mode, rows) for mode, rows in empty.items()}

    def evaluate(
        self, hook: PredictorHook, *, keep_scores: bool = False, part: EvalPart = "test", seen_only: bool = False
    ) -> Row:
        """Evaluate on the images of every experience that the head covers after the current one.

        Args:
            hook: the hook `predictor`; its module maps images and tasks to scores, see `Predictor`.
            keep_scores: keep the scores in the result.
            part: the test images, or the training images that are held out for validation.
            seen_only: leave later experiences out.
        """
        run = self.run
        predictor = self.answering(hook)
        after = run.experience.index
        batch_size = run.config.run.eval_batch_size
        row = Row({}, {}, [], getattr(predictor, "scores", "logits"))
        names = self.readings.names(predictor)
        for name in names:
            row.accuracy[name] = []
            row.scores[name] = []
        uses_task = getattr(predictor, "uses_task", True)
        # a later task may have classes of the head, and still nothing to compute with
        last = after if seen_only or getattr(predictor, "needs_task", False) else len(self.scenario) - 1
        n_classes = n_answerable(predictor, run.model.n_classes)
        with evaluating(predictor), torch.no_grad():
            for on, experience in enumerate(self.scenario):
                covered = [name for name in names if on <= last and self.readings.covers(name, after, on, n_classes)]
                data = getattr(experience, part).to(run.device) if covered else None
                if data is not None and not len(data):
                    data = None  # without images there is no accuracy
                row.labels.append(torch.empty(0, dtype=torch.int64) if data is None else data.y.cpu())
                scores: Tensor | None = None  # if they do not depend on the task, every mode uses them
                for name in names:
                    if data is None or name not in covered:
                        row.accuracy[name].append(None)
                        row.scores[name].append(None)
                        continue
                    with_task = uses_task and name == "task"
                    if scores is None or with_task:
                        batches = _normalize_parts(self.scenario.transform, data, batch_size)
                        scores = _scores(predictor, batches, with_task)
                        kept = scores.cpu() if keep_scores else None
                    row.scores[name].append(kept)
                    choices = self.readings.choices(name, after, on)
                    if len(choices) == 1:
                        row.accuracy[name].append(None)
                        continue
                    correct = masked(scores, class_mask(choices, scores.shape[1], run.device)).argmax(1) == data.y
                    row.accuracy[name].append(correct.sum().item() / len(data))
        return row

    def evaluate_few(self, hook: PredictorHook, part: EvalPart) -> dict[Reading, list[float | None]]:
        """Evaluate on ``run.eval_images`` images of each class of the experiences so far.

        All of them go through the predictor together, once, and once more where its scores depend on a given task.

        Returns:
            For each evaluation mode, the accuracy on each experience; None for later ones, and where there is one class
            to choose from.
        """
        run = self.run
        after = run.experience.index
        few = self._few_images(part)
        predictor = self.answering(hook)
        uses_task = getattr(predictor, "uses_task", True)
        found: dict[Reading, list[float | None]] = {}
        scores: Tensor | None = None
        with evaluating(predictor), torch.no_grad():
            for name in self.readings.names(predictor):
                found[name] = [None] * len(self.scenario)
                if not len(few.data):
                    continue
                with_task = uses_task and name == "task"
                if scores is None or with_task:
                    scores = _scores(predictor, few.batches(self.scenario.transform), with_task)
                choices = [self.readings.choices(name, after, on) for on in range(after + 1)]
                masks = [class_mask(classes, scores.shape[1], run.device) for classes in choices]
                mask = torch.stack(masks)[few.on] if name == "task" else masks[0]
                right = masked(scores, mask).argmax(1) == few.data.y
                counts = torch.bincount(few.on[right], minlength=after + 1).tolist()
                for on, count in enumerate(counts):
                    if few.counts[on] and len(choices[on]) > 1:
                        found[name][on] = count / few.counts[on]
        return found

    def _few_images(self, part: EvalPart) -> FewImages:
        """Return the images of `evaluate_few`, which stay the same for as long as an experience lasts."""
        settings = self.run.config.run
        n = self.run.experience.index + 1
        if part not in self._few or len(self._few[part].counts) != n:
            drawn = [
                draw_few(getattr(self.scenario[on], part), settings.eval_images, settings.seed * 10_007 + on)
                for on in range(n)
            ]
            self._few[part] = FewImages(drawn, settings.eval_batch_size, self.run.device)
        return self._few[part]


class FewImages:
    """Some images of each experience so far, for evaluations while learning.

    Args:
        parts: the images of each experience so far.
        size: how many of them are computed together.
        device: where the images are kept, unless they are in files.

    Attributes:
        data: the images of all experiences, one after another.
        on: [N] int64, the index of the experience of each image.
        counts: number of images of each experience.
    """

    def __init__(self, parts: Sequence[ImageData], size: int, device: torch.device) -> None:
        self.counts = [len(part) for part in parts]
        self.data = ImageData.concat([part for part in parts if len(part)] or list(parts[:1])).to(device)
        self.on = torch.arange(len(parts)).repeat_interleave(torch.tensor(self.counts)).to(device)
        self._size = size
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def batches(self, transform: Transform) -> Iterable[tuple[Tensor, Tensor]]:
        """Return the normalized images [B, ...] and their tasks [B]; normalized once, where they are in memory."""
        if self._kept is not None:
            return self._kept
        found = _normalize_parts(transform, self.data, self._size)
        values = len(self.data) * math.prod(self.data.images.shape[1:])
        if isinstance(self.data.images, LazyImages) or 4 * values > KEPT_BYTES:
            return found
        self._kept = list(found)
        return self._kept


def draw_few(data: ImageData, per_class: int | None, seed: int) -> ImageData:
    """Return `per_class` random images of each class of `data`, in their order; all of a class that has fewer.

    They are drawn from `seed` alone, so that a resumed run evaluates the same; None: all images.
    """
    if per_class is None:
        return data
    generator = torch.Generator().manual_seed(seed)
    labels = data.y.cpu()
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        where = (labels == label).nonzero().flatten()
        chosen[where[torch.randperm(len(where), generator=generator)[:per_class]]] = True
    return data.rows(chosen.nonzero().flatten().to(data.device))


def _normalize_parts(transform: Transform, data: ImageData, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the normalized images [B, ...] of `data` and their tasks [B], `batch_size` at a time."""
    for part in data.parts(batch_size):
        yield transform.normalize(part.x), part.task


def _scores(predictor: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], with_task: bool) -> Tensor:
    """Return the scores [N, C] float32 of all images in `batches`, with their tasks if `with_task`."""
    return torch.cat([predictor(x, task if with_task else None) for x, task in batches]).float()
