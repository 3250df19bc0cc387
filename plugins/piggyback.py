"""Piggyback (Mallya, Davis, Lazebnik, ECCV 2018): each task learns a binary mask over the weights of one network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from clframe import Experience, Plugin, hookimpl
from clframe.context import Run
from clframe.evaluate import TaskPredictor
from clframe.options import Positive
from clframe.toolkit.norms import TaskNorm, add_task_norms, freeze_norm_stats
from clframe.toolkit.weight_masks import WeightMask, find_modules, layers_of, mask_weights, weight_problems


class Piggyback(Plugin):
    """A binary mask over the weights of one fixed network, and a head, learned for each task.

    The weight W of each convolution and linear layer becomes W * m with m = 1 where a real mask exceeds a threshold,
    else 0 (eq. 1 and 2); the gradient of m is given to the real mask (eq. 3 and 4). Biases are not masked. A finished
    mask is kept as bits, one for each weight. The optimizer holds real masks and the new head alone, without weight
    decay of masks. Nothing is forgotten, and the order of tasks is without effect.

    Curves: `piggyback/used/LAYER`: the share of the layer's weights that the task uses.

    When to use:
        In task-incremental learning, on a network with good weights (`--set model.weights=true` of torchvision's, or
        `--set model.start=RUN`).

    Keeps:
        1 bit per weight (2 if ternary) and a head, per task.

    Hooks:
        `grow`, `before_experience`, `after_experience`, `predictor`

    Options:
        pretrained: whether the network came with weights, and the first experience has a mask, too; else the network is
            what the first experience makes of it.
        init: value of real masks before training; as it exceeds the threshold, the whole network is used then.
        threshold: value above which a real mask becomes 1.
        ternary: whether masks have the values -1, 0 and 1, with -1, a weight used with its sign turned, where the real
            mask is below 0; two bits for each weight.
        norm: batch norms: `frozen`, with the statistics of the network that is masked; `task`: each task trains its
            own, which begin as the network's.
    """

    name = "piggyback"
    family = "parameter isolation"
    serves = ("task",)
    isolates = True
    citation = "Mallya, Davis, Lazebnik, Piggyback: adapting a single network to multiple tasks, ECCV 2018"

    def __init__(
        self,
        *,
        pretrained: bool = False,
        init: Positive = 1e-2,
        threshold: Positive = 5e-3,
        ternary: bool = False,
        norm: Literal["frozen", "task"] = "frozen",
    ) -> None:
        self.first = 0 if pretrained else 1
        self.init = init
        self.threshold = threshold
        self.ternary = ternary
        self.norm = norm

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence for shared or computed weights, and for a threshold that leaves new masks empty."""
        net = run.model.backbone
        yield from weight_problems(self.name, net, layers_of(net), run.config.model.name)
        if self.threshold >= self.init:
            yield (
                f"`piggyback.threshold` is {self.threshold:g}, which no mask exceeds, as all masks begin at "
                f"`piggyback.init`, {self.init:g}: choose a lower threshold."
            )

    @hookimpl
    def grow(self, run: Run, experience: Experience) -> None:
        """Add a real mask for each weight, and the task's batch norms."""
        if experience.index < self.first:
            return
        backbone = run.model.backbone
        if experience.index == self.first:
            mask_weights(backbone, lambda w: WeightMask(w, self.first, self.init, self.threshold, self.ternary))
            if self.norm == "task":
                add_task_norms(backbone, self.first)
            else:
                freeze_norm_stats(backbone)
        for name, mask in find_modules(backbone, WeightMask).items():
            mask.begin(backbone.get_submodule(name).parametrizations.weight.original)  # type: ignore[union-attr, arg-type]
        for norm in find_modules(backbone, TaskNorm).values():
            norm.add()
        run.model.select(experience.task)

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Freeze everything but the task's masks, batch norms and head."""
        if experience.index < self.first:
            return
        own = [mask.real for mask in find_modules(run.model, WeightMask).values()]
        own += [p for block in run.new_blocks for p in run.model.head[block].parameters()]
        for norm in find_modules(run.model, TaskNorm).values():
            norm.norms[-1].load_state_dict(norm.norms[0].state_dict())
            own += norm.norms[-1].parameters()
        run.freeze_others(own)

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Reduce the task's real masks to bits, and log the share of weights in use."""
        masks = find_modules(run.model.backbone, WeightMask)
        run.log({f"piggyback/used/{name}": mask.finish() for name, mask in masks.items()})
        if masks:
            run.optimizer = None  # the real masks that it holds are gone

    @hookimpl
    def predictor(self, run: Run) -> nn.Module:
        """Return a predictor with the mask and head of each task."""
        return TaskPredictor(run.model, run.n_seen_classes)
