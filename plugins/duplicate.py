"""Duplicate and fine-tune, a baseline of Li and Hoiem (LwF, 2017): each task has a whole network of its own."""

from __future__ import annotations

import copy
from typing import Literal

from torch import Tensor, nn

from clframe import Experience, Plugin, hookimpl
from clframe.context import Run
from clframe.evaluate import TaskPredictor
from clframe.model import PerTask, thaw


class Duplicate(Plugin):
    """Fine-tuned copies of the original network, one for each task.

    Each task fine-tunes a copy of its own: of the network as it was built or given, or (`duplicate.start=first`) as the
    first experience left it. Nothing is forgotten, nothing that one task learns helps another, and each task costs a
    whole network.

    When to use:
        As the bound that other methods of parameter isolation should reach with less.

    Keeps:
        A network and a head per task, and 1 number per weight: the original network.

    Hooks:
        `grow`, `before_experience`, `after_experience`, `predictor`

    Options:
        start: weights that each copy begins with: those of the `original` network, initial or given; or those after the
            `first` experience.
    """

    name = "duplicate"
    family = "parameter isolation"
    state = ("original",)
    serves = ("task",)
    isolates = True
    citation = "Li and Hoiem, Learning without forgetting, TPAMI 2017"

    def __init__(self, *, start: Literal["original", "first"] = "original") -> None:
        self.start = start
        self.original: dict[str, Tensor] = {}

    @hookimpl
    def grow(self, run: Run, experience: Experience) -> None:
        """Add a backbone for the task; its weights are set before the experience."""
        if experience.index == 1:
            run.model.set_submodule("backbone", Copies(run.model.backbone))
        if experience.index:
            run.model.backbone.add()  # type: ignore[operator]
        run.model.select(experience.task)

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Keep the original weights, or begin the task's copy with them, and freeze the other copies."""
        if not experience.index:
            self.keep(run.model.backbone)
            return
        run.model.backbone.copies[-1].load_state_dict(self.original)  # type: ignore[index, union-attr]
        copies = [f"backbone.copies.{task}.*" for task in range(experience.index)]
        run.freeze([*copies, *(f"head.{k}.*" for k in run.old_blocks)])

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Keep the weights after the first experience, if `start` is `first`."""
        if not experience.index and self.start == "first":
            self.keep(run.model.backbone)

    def keep(self, backbone: nn.Module) -> None:
        """Keep the weights of `backbone` for the copies of later tasks."""
        self.original = {name: value.clone() for name, value in backbone.state_dict().items()}

    @hookimpl
    def predictor(self, run: Run) -> nn.Module:
        """Return a predictor with the network and head of each task."""
        return TaskPredictor(run.model, run.n_seen_classes)


class Copies(PerTask):
    """A backbone for each task.

    Args:
        backbone: the backbone of the first task.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.copies = nn.ModuleList([backbone])
        self.width = backbone.width
        self.trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}

    def add(self) -> None:
        """Add a copy for another task, with the parameters trainable that were trainable at first."""
        made = copy.deepcopy(self.copies[0])
        thaw(made, self.trainable)
        self.copies.append(made)

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B, D] of the selected task's backbone."""
        features: Tensor = self.copies[min(self.task, len(self.copies) - 1)].features(x)  # type: ignore[operator]
        return features
