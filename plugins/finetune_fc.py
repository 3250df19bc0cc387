"""Fine-tuning of the fully connected layers, a baseline of Li and Hoiem (LwF, 2017)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from clframe import Experience, Phase, Plugin, hookimpl
from clframe.context import Run
from clframe.options import Count, NonNegative
from clframe.toolkit.warm_up import warm_up, warm_up_problems


class FinetuneFC(Plugin):
    """Fine-tuning of shared fully connected layers and the new head; convolutions and old heads are frozen.

    It is `feature-extraction` with the last `finetune-fc.last` fully connected layers free. Frozen layers keep the
    running statistics of their batch norms, too. The whole network learns in the first experience, unless it came with
    weights.

    In class- and domain-incremental learning it ends below fine-tuning: nothing protects the answers to old classes,
    and frozen layers are those of the first experience alone. Over seeds 0 to 4 (`benchmarks/defaults.py`): 19.1 %
    against 19.5 % on class-incremental `split-digits`, 40.2 % against 48.4 % on `permuted-digits`; task-incremental
    98.8 % against 96.1 %.

    When to use:
        As a baseline in task-incremental learning.

    Keeps:
        Nothing.

    Hooks:
        `before_experience`, `phases`

    Options:
        last: number of the backbone's last fully connected layers that are trained; null: all of them, behind
            convolutions, and the last one of a network without any.
        pretrained: whether layers are frozen from the first experience on, as the backbone came with weights.
        warm_up: length of a phase in which the new head is trained alone first, relative to the experience's own
            training.
    """

    name = "finetune-fc"
    family = "baseline"
    citation = "Li and Hoiem, Learning without forgetting, TPAMI 2017"

    def __init__(self, *, last: Count | None = None, pretrained: bool = False, warm_up: NonNegative = 0.0) -> None:
        self.last = last
        self.pretrained = pretrained
        self.warm_up = warm_up

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if the backbone lacks the fully connected layers that are to be trained."""
        yield from warm_up_problems(run, self)
        layers = self._linear(run)
        if not layers:
            yield (
                "`finetune-fc` finds no fully connected layer in the backbone, so it would train the head alone: use "
                "`feature-extraction`, or a model that has some, such as mlp or torchvision:vgg16."
            )
        elif (self.last or 0) > len(layers):
            known = ", ".join(f"`{name}`" for name in layers)
            yield f"`finetune-fc.last` is {self.last}, but the backbone's fully connected layers are {known}."

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Freeze old heads, and the backbone but for its last fully connected layers."""
        run.freeze(f"head.{k}.*" for k in run.old_blocks)
        if experience.index or self.pretrained:
            linear = self._linear(run)
            convolutional = any(isinstance(m, nn.Conv2d) for m in run.model.backbone.modules())
            last = self.last or (len(linear) if convolutional else 1)
            kept = tuple(f"backbone.{name}." for name in linear[-last:])
            names = [name for name, _ in run.model.named_parameters() if name.startswith("backbone.")]
            run.freeze(name for name in names if not name.startswith(kept))

    @hookimpl
    def phases(self, run: Run) -> list[Phase] | None:
        """Return the warm-up phase, if `warm_up` asks for one."""
        return warm_up(run, self.warm_up)

    @staticmethod
    def _linear(run: Run) -> list[str]:
        """Return the names of the backbone's fully connected layers, in order."""
        return [name for name, module in run.model.backbone.named_modules() if isinstance(module, nn.Linear)]
