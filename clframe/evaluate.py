"""Accuracy rows, one per reading that the run has, through the predictor and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe.data.scenario import Scenario, Setting
from clframe.model import IncrementalNet, class_mask, evaluating, masked

Reading = Literal["class", "task", "domain"]
EvalPart = Literal["test", "val"]  # which images are evaluated: test images, or training images that are held out


class Predictor(nn.Module):
    """Base of the modules that the hook ``predictor`` returns; any module with these attributes will do.

    ``forward(x, task)`` maps normalised images [B, ...], and their tasks [B] or None, to scores [B, C] of all classes
    of the head. Classes that a reading rules out are masked by the caller.

    Attributes:
        scores: ``logits``, or ``distances`` (negated), of which no NLL and no calibration error is computed.
        uses_task: the scores depend on the task that is given.
        needs_task: there are no scores without a task, so the run has no class-incremental reading, nor of a task that
            is not learnt yet.
        n_classes: how many of the head's classes, from the first, it can answer with; None: all.
    """

    scores: ClassVar[Literal["logits", "distances"]] = "logits"
    uses_task: ClassVar[bool] = True
    needs_task: ClassVar[bool] = False
    n_classes: int | None = None


class ModelPredictor(Predictor):
    """The model's own logits: the predictor of a run whose plugins bring none."""

    uses_task = False

    def __init__(self, model: IncrementalNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.model(x, task).logits
        return logits


class TaskPredictor(ModelPredictor):
    """The logits of a network that computes something else for each task, which has to be told.

    Args:
        model: the network.
        n_classes: classes of the tasks learnt so far; for later ones there is nothing to compute with.
    """

    uses_task = True
    needs_task = True

    def __init__(self, model: IncrementalNet, n_classes: int) -> None:
        super().__init__(model)
        self.n_classes = n_classes


class NearestMean(Predictor):
    """Negated distances of an image's normalised feature to class means; -inf for classes that have none.

    Args:
        model: gives the features.
        means: [C, D] of length 1, of the first C classes of the head; NaN for a class without images.
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
        """Scores [B, C] of all classes of the head."""
        feature = functional.normalize(self.model.features(x), dim=1)
        if torch.compiler.is_compiling():  # an export; ONNX has no `cdist`
            distances = (feature[:, None] - self.means).square().sum(2).sqrt()
        else:  # not by products, which lose half of the digits where two points are near each other
            distances = torch.cdist(feature, self.means, compute_mode="donot_use_mm_for_euclid_dist")
        distances = distances.masked_fill(self.means.isnan().any(1), torch.inf)
        return functional.pad(-distances, (0, self.model.n_classes - len(self.means)), value=-torch.inf)


def n_answerable(predictor: nn.Module, n_classes: int) -> int:
    """How many of the `n_classes` of the head `predictor` can answer with."""
    limit: int | None = getattr(predictor, "n_classes", None)
    return n_classes if limit is None else limit


@dataclass(frozen=True)
class Readings:
    """Which classes count as possible answers in each reading of a run.

    Attributes:
        setting: of the scenario.
        classes: of each experience of the scenario.
    """

    setting: Setting
    classes: Sequence[Sequence[int]]

    def names(self, predictor: nn.Module) -> list[Reading]:
        """The readings of a run with this predictor."""
        if self.setting == "class":
            return ["task"] if getattr(predictor, "needs_task", False) else ["class", "task"]
        return [self.setting]

    @property
    def common(self) -> Reading:
        """The reading that every run of this setting has."""
        return "task" if self.setting == "class" else self.setting

    def choices(self, reading: Reading, after: int, on: int) -> Sequence[int]:
        """The classes to choose from after experience `after` for images of experience `on`."""
        if reading == "task":
            return self.classes[on]
        return sorted({c for group in self.classes[: after + 1] for c in group})

    def covers(self, reading: Reading, after: int, on: int, n_classes: int) -> bool:
        """Whether a head of `n_classes` can answer for experience `on`: an earlier one, or one it has classes for."""
        return on <= after or (
            max(self.classes[on]) < n_classes and set(self.classes[on]) <= set(self.choices(reading, after, on))
        )


@dataclass(frozen=True)
class Row:
    """One evaluation.

    Attributes:
        accuracy: for each reading, from 0 to 1 on each experience; None where the head does not cover it, and where
            there is one class to choose from, so that every answer is right.
        scores: for each reading [N, C] float32, on the CPU, of each experience; None where there are none.
        labels: [N] int64, on the CPU, of each experience.
        kind: ``logits`` or ``distances``, as the predictor declares its scores.
    """

    accuracy: dict[Reading, list[float | None]]
    scores: dict[Reading, list[Tensor | None]]
    labels: list[Tensor]
    kind: str

    def blank_copy(self) -> Row:
        """A row of the same shape that says nothing."""
        accuracy: dict[Reading, list[float | None]] = {r: [None] * len(row) for r, row in self.accuracy.items()}
        return Row(accuracy, {r: [None] * len(row) for r, row in self.scores.items()}, self.labels, self.kind)


def evaluate(
    predictor: nn.Module,
    scenario: Scenario,
    readings: Readings,
    after: int,
    n_classes: int,
    device: torch.device,
    batch_size: int,
    keep_scores: bool,
    part: EvalPart = "test",
) -> Row:
    """Evaluate on the test images of all experiences of `scenario` that the head covers after experience `after`.

    Or, as `part` says, on the training images that are held out for validation.
    """
    row = Row({}, {}, [], getattr(predictor, "scores", "logits"))
    names = readings.names(predictor)
    for name in names:
        row.accuracy[name], row.scores[name] = [], []
    uses_task = getattr(predictor, "uses_task", True)
    # a later task may have classes that are known, and still nothing to compute with
    last = after if getattr(predictor, "needs_task", False) else len(scenario) - 1
    n_classes = n_answerable(predictor, n_classes)
    with evaluating(predictor), torch.no_grad():
        for on, experience in enumerate(scenario):
            covered = [name for name in names if on <= last and readings.covers(name, after, on, n_classes)]
            data = getattr(experience, part).to(device) if covered else None
            if data is not None and not len(data):
                data = None  # there is no accuracy on no images
            row.labels.append(torch.empty(0, dtype=torch.int64) if data is None else data.y.cpu())
            scores: Tensor | None = None  # where they do not depend on the task, they serve every reading
            for name in names:
                if data is None or name not in covered:
                    row.accuracy[name].append(None)
                    row.scores[name].append(None)
                    continue
                tell = uses_task and name == "task"
                if scores is None or tell:
                    scores = torch.cat(
                        [
                            predictor(scenario.transform.normalize(p.x), p.task if tell else None)
                            for p in data.parts(batch_size)
                        ]
                    ).float()
                    kept = scores.cpu() if keep_scores else None
                row.scores[name].append(kept)
                choices = readings.choices(name, after, on)
                if len(choices) == 1:
                    row.accuracy[name].append(None)
                    continue
                correct = masked(scores, class_mask(choices, scores.shape[1], device)).argmax(1) == data.y
                row.accuracy[name].append(correct.sum().item() / len(data))
    return row
