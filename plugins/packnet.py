"""PackNet (Mallya and Lazebnik, CVPR 2018): each task takes some weights of one network, and leaves the rest free."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field
from torch import nn

from clframe import Batch, Experience, Phase, Plugin, hookimpl
from clframe.context import Run
from clframe.evaluate import TaskPredictor
from clframe.options import NonNegative
from clframe.toolkit.norms import freeze_norm_stats
from clframe.toolkit.weight_masks import (
    PinnedEntries,
    WeightOwner,
    find_modules,
    layers_of,
    mask_weights,
    weight_problems,
)
from clframe.training import restart

MOST_TASKS = 255


class PackNet(Plugin):
    """Iterative pruning: each task trains free weights, prunes most of them, retrains those that stay, and fixes them.

    A task trains the weights that are free, from 0 on but for the first task, and computes with the weights of earlier
    tasks as well. When it is trained, the smallest `prune` of its weights in each convolution and linear layer, in
    magnitude, become 0 and free again; a phase `retrain` trains the others on, which are fixed after it. Biases and
    batch norms are those of the first experience, or of the weights that the network came with (`packnet.pretrained`),
    and are fixed after it. Nothing is forgotten.

    Curves: `packnet/free/LAYER`: the share of the layer's weights that no task owns.

    When to use:
        For a few tasks, in task-incremental learning: the share of free weights shrinks by a factor with each.

    Keeps:
        1 byte per weight in all, and a head per task.

    Hooks:
        `grow`, `before_experience`, `phases`, `after_backward`, `after_step`, `after_experience`, `predictor`

    Options:
        prune: share of the task's weights that are given back; the paper has 0.5 and 0.75.
        retrain: length of the phase after pruning, relative to the experience's own training.
        pretrained: whether the network came with weights: biases and batch norms are fixed from the first experience
            on.
    """

    name = "packnet"
    family = "parameter isolation"
    serves = ("task",)
    isolates = True
    citation = "Mallya and Lazebnik, PackNet: adding multiple tasks to a single network by iterative pruning, CVPR 2018"

    def __init__(
        self,
        *,
        prune: Annotated[float, Field(gt=0, lt=1)] = 0.75,
        retrain: NonNegative = 0.5,
        pretrained: bool = False,
    ) -> None:
        self.prune = prune
        self.retrain = retrain
        self.pretrained = pretrained
        self.held: PinnedEntries | None = None

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence for shared or computed weights, and for more than 255 tasks: owners are stored as uint8."""
        net = run.model.backbone
        yield from weight_problems(self.name, net, layers_of(net), run.config.model.name)
        if len(run.scenario) > MOST_TASKS:
            yield (
                f"`packnet` can distinguish {MOST_TASKS} tasks, and the scenario has {len(run.scenario)} experiences: "
                "choose a scenario with fewer."
            )

    def hints(self, run: Run) -> Iterable[str]:
        """Yield a sentence if a layer has no free weight left, so that a new task trains only its head there."""
        trained = [weight.requires_grad for weight, _ in self.parts(run)]
        full = [name for (name, free), on in zip(self.free(run).items(), trained, strict=True) if on and not free]
        if full:
            yield f"`packnet` has no free weight left in {', '.join(full)}: a larger `packnet.prune` leaves more."

    @hookimpl
    def grow(self, run: Run, experience: Experience) -> None:
        """Install the owners of weights before the first task, and count another task."""
        if not experience.index:
            mask_weights(run.model.backbone, WeightOwner)
        if experience.index == (0 if self.pretrained else 1):
            freeze_norm_stats(run.model.backbone)
        for part in find_modules(run.model.backbone, WeightOwner).values():
            part.latest = experience.index
        run.model.select(experience.task)

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Freeze everything but the masked weights and the new head; owned entries are held in each step."""
        self.held = None
        if experience.index or self.pretrained:
            names = [
                n for n, _ in run.model.backbone.named_parameters(prefix="backbone") if "parametrizations" not in n
            ]
            run.freeze([*names, *(f"head.{k}.*" for k in run.old_blocks)])

    @hookimpl
    def phases(self, run: Run) -> list[Phase] | None:
        """Return the phase that retrains the weights that stay, if `retrain` is not 0."""
        if not self.retrain:
            return None
        lengths = Phase("train").length(run.settings).values()
        epochs, iterations = (max(1, round(self.retrain * n)) if n else n for n in lengths)
        return [Phase("retrain", "after", epochs, iterations)]

    @hookimpl
    def after_backward(self, run: Run) -> None:
        """Clear the gradients of entries that this phase does not train."""
        if self.held is None:
            # in `retrain`, and in phases of other plugins
            pruned = run.phase.name != "train" and run.phase.place == "after"
            mine = run.experience.index + 1 if pruned else 0
            self.held = PinnedEntries((weight, part.owner != mine) for weight, part in self.parts(run))
        self.held.clear_gradients()

    @hookimpl
    def after_step(self, run: Run, batch: Batch) -> None:
        """Restore entries that the optimizer moved all the same, and prune after the last step of the training."""
        assert self.held is not None
        self.held.put_back()
        if run.phase.name == "train" and run.step + 1 == run.steps_in_phase:
            for weight, part in self.parts(run):
                # weights that the user froze are not pruned
                part.take(weight, 1 - self.prune if weight.requires_grad else 1.0)
            restart(run.optimizer, ((weight, part.owner == 0) for weight, part in self.parts(run)))
            self.held = None

    @hookimpl
    def after_experience(self, run: Run) -> None:
        """Log the share of free weights of each layer."""
        run.log({f"packnet/free/{name}": free for name, free in self.free(run).items()})

    def parts(self, run: Run) -> list[tuple[nn.Parameter, WeightOwner]]:
        """Return each masked layer's weight and its owners."""
        backbone = run.model.backbone
        found = find_modules(backbone, WeightOwner).items()
        return [(backbone.get_submodule(name).parametrizations.weight.original, part) for name, part in found]  # type: ignore[union-attr, misc]

    def free(self, run: Run) -> dict[str, float]:
        """Return the share of each layer's weights that no task owns."""
        parts = find_modules(run.model.backbone, WeightOwner).items()
        return {name: (part.owner == 0).float().mean().item() for name, part in parts}

    @hookimpl
    def predictor(self, run: Run) -> nn.Module:
        """Return a predictor with the weights of the tasks up to the given one, and its head."""
        return TaskPredictor(run.model, run.n_seen_classes)
