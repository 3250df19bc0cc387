"""Less-forgetting learning (Jung et al., 2016): features stay near those of the old network; old heads are frozen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from torch import Tensor

from clframe import Batch, Experience, IncrementalNet, Outputs, Phase, Plugin, hookimpl, snapshot
from clframe.context import Run
from clframe.options import NonNegative, Search
from clframe.toolkit.distill import half_squared_distance
from clframe.toolkit.warm_up import warm_up, warm_up_problems


class LFL(Plugin):
    """Less-forgetting learning: features of new images are held near those of the old network, the teacher.

    L = loss + lambda/2 ||f_old(x) - f(x)||^2, summed over the features and averaged over the batch (Jung et al., eq. 1
    with lambda_c = 1). The blocks of the head without a class of the experience are frozen, in the form `paper` all
    those without new classes; features of old images, and with them old answers, then stay as near as new images can
    tell. After each experience the teacher is replaced by a copy of the network.

    When to use:
        In domains that share their classes.

    Keeps:
        1 number per weight: the teacher.

    Hooks:
        `before_run`, `before_experience`, `phases`, `penalty`, `after_experience`

    Options:
        lambda: strength of the penalty on features (the paper's lambda_e).
        form: `paper`: all experiences have the same classes, and the whole head is frozen; `multi-head`: each task
            trains a head of its own, and old heads are frozen (as in the LwF paper); null: as the scenario's setting
            says.
        warm_up: length of a phase in which the new head is trained alone first, relative to the experience's own
            training.
    """

    name = "lfl"
    family = "distillation"
    state = ("teacher",)
    joins = "network"
    citation = "Jung, Ju, Jung, Kim, Less-forgetting learning in deep neural networks, 2016"

    def __init__(
        self,
        *,
        lambda_: Annotated[NonNegative, Search(1e-4, 10, log=True)] = 0.01,
        form: Literal["paper", "multi-head"] | None = None,
        warm_up: NonNegative = 0.0,
    ) -> None:
        self.lambda_ = lambda_
        self.form = form
        self.warm_up = warm_up
        self.teacher: IncrementalNet | None = None

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if the form does not fit the scenario's setting."""
        setting = run.scenario.setting
        if self.form == "multi-head" and setting != "task":
            yield (
                f"`lfl.form=multi-head` needs the task-incremental setting, and the setting is `{setting}`: leave the "
                "form out, or choose `--setting task`."
            )
        if self.form == "paper" and setting != "domain":
            yield (
                f"`lfl.form=paper` needs the same classes in all experiences, and the setting is `{setting}`: leave "
                "the form out, or choose `--setting domain`."
            )
        yield from warm_up_problems(run, self)

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Choose the form that fits the setting, where none was given."""
        self.form = self.form or ("paper" if run.scenario.setting == "domain" else "multi-head")

    @hookimpl
    def before_experience(self, run: Run) -> None:
        """Freeze old blocks of the head: those without new classes (`paper`), or without a class of the experience."""
        if self.form != "paper":
            old = set(run.old_blocks)
        else:
            old = set(run.model.blocks_of(run.previous_classes)) - set(run.new_blocks)
        run.freeze(f"head.{k}.*" for k in old)

    @hookimpl
    def phases(self, run: Run) -> list[Phase] | None:
        """Return the warm-up phase, if `warm_up` asks for one."""
        return warm_up(run, self.warm_up)

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return the penalty on features (eq. 1); None in the first experience and for frozen features."""
        if self.teacher is None or not outputs.features.requires_grad:
            return None
        with torch.no_grad():
            old = self.teacher.features(batch.x)
        # lambda/2 ||f_old(x) - f(x)||^2 (eq. 1)
        return {self.name: self.lambda_ * batch.mean(half_squared_distance(old, outputs.features))}

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Keep a frozen copy of the network as the next teacher."""
        self.teacher = snapshot(run.model)
