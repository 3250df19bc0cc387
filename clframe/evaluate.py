"""Evaluation: accuracy rows, one for each evaluation mode of the run, computed through the predictor alone.

An evaluation mode, a *reading* in the code and in files, says which classes an image may be assigned to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe.data.batch import ImageData
from clframe.data.scenario import Scenario, Setting
from clframe.data.transform import Transform
from clframe.events import EpochEvaluated, EvalPart, Evaluated
from clframe.model import IncrementalNet, class_mask, evaluating, masked

if TYPE_CHECKING:
    from clframe.context import Run

Reading = Literal["class", "task", "domain"]
PredictorHook = Callable[..., nn.Module | None]  # the hook `predictor`, which is called with the run


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
            run._emit(Evaluated(run.experience.index, run.total_steps, part, accuracies))
        self.row = rows["test"]
        return self.row

    def is_due(self) -> bool:
        """Return whether ``run.eval_every`` asks for an evaluation after the step that was taken."""
        return self.run.config.run.eval_every == "epoch" and (self.run.step + 1) % self.run.batches_per_epoch == 0

    def record(self, hook: PredictorHook) -> None:
        """Record a row while learning; it enters no matrix."""
        run = self.run
        place = (run.experience.index, run.phase.name, run.epoch, run.total_steps)
        for part in self.parts:
            for reading, accuracy in self.evaluate(hook, part=part).accuracy.items():
                run._emit(EpochEvaluated(*place, part, reading, accuracy))

    def state(self) -> dict[str, Any]:
        """Return what was measured so far."""
        measured = {"accuracy": self.run.accuracy, "baseline": self.baseline}
        return measured | ({"validation": self.run.validation} if self.scenario.val_share else {})

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with what was measured before; the rows of validation images may not have been kept."""
        self.run.accuracy, self.baseline = state["accuracy"], state["baseline"]
        if self.scenario.val_share:
            measured = state.get("validation", {})
            empty = {mode: [[None] * len(row) for row in rows] for mode, rows in self.run.accuracy.items()}
            self.run.validation = {mode: measured.get(mode, rows) for mode, rows in empty.items()}

    def evaluate(self, hook: PredictorHook, *, keep_scores: bool = False, part: EvalPart = "test") -> Row:
        """Evaluate on the images of every experience that the head covers after the current one.

        Args:
            hook: the hook `predictor`; its module maps images and tasks to scores, see `Predictor`.
            keep_scores: keep the scores in the result.
            part: the test images, or the training images that are held out for validation.
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
        last = after if getattr(predictor, "needs_task", False) else len(self.scenario) - 1
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
                        scores = _scores(predictor, self.scenario.transform, data, batch_size, with_task)
                        kept = scores.cpu() if keep_scores else None
                    row.scores[name].append(kept)
                    choices = self.readings.choices(name, after, on)
                    if len(choices) == 1:
                        row.accuracy[name].append(None)
                        continue
                    correct = masked(scores, class_mask(choices, scores.shape[1], run.device)).argmax(1) == data.y
                    row.accuracy[name].append(correct.sum().item() / len(data))
        return row


def _scores(predictor: nn.Module, transform: Transform, data: ImageData, batch_size: int, with_task: bool) -> Tensor:
    """Return the scores [N, C] float32 of all images of `data`, with their tasks if `with_task`."""
    return torch.cat(
        [predictor(transform.normalize(p.x), p.task if with_task else None) for p in data.parts(batch_size)]
    ).float()
