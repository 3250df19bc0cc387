"""Active long term memory networks (Furlanello et al., 2016): a stable network teaches a flexible one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from torch import Tensor

from clframe import Batch, Experience, IncrementalNet, Outputs, Plugin, hookimpl, snapshot
from clframe.context import Run
from clframe.options import NonNegative, Search
from clframe.toolkit.distill import half_squared_distance, soft_cross_entropy_per_group


class ALTM(Plugin):
    """Active long term memory: distillation of a stable network N into a flexible network H, which learns new images.

    H (the hippocampus) is the network of the run, N (the neocortex) a frozen copy of it. H begins as N, with a new
    head, and minimizes the loss on the new images plus lambda times the distance of its old outputs to N's. After an
    experience what was learned is consolidated: N becomes a copy of H. The method is the forerunner of LwF.

    In domains the defaults end below fine-tuning: the new images' labels and N's answers ask for different values of
    the same outputs, each with weight 1, and the new domain is learned less well. On `permuted-digits` (seed 0),
    `clframe run --scenario permuted-digits --plugin a-ltm` ends at 46 %, fine-tuning at 53 %; with `--set a-ltm.loss=l2
    --set a-ltm.lambda=0.01` it ends at 61 %.

    When to use:
        Beside a rehearsal method, whose images it can distill on as well.

    Keeps:
        1 number per weight: the network N.

    Hooks:
        `penalty`, `after_experience`

    Options:
        lambda: weight of the distillation.
        loss: `cross-entropy` with N's softmax, at temperature 1, for each old head in task-incremental learning (where
            the loss is over a task's own classes), else over all old classes together; `l2`: half the squared distance
            of the old logits.
        on: images that are distilled on: `new` (those of the experience), `replay` (those that another plugin brings
            back: the active form; if all of these rows are kept out of the default loss, they count equally), or `all`.
    """

    name = "a-ltm"
    family = "distillation"
    state = ("stable",)
    joins = "network"
    citation = "Furlanello, Zhao, Saxe, Itti, Tjan, Active long term memory networks, 2016"

    def __init__(
        self,
        *,
        lambda_: Annotated[NonNegative, Search(0.01, 100, log=True)] = 1.0,
        loss: Literal["cross-entropy", "l2"] = "cross-entropy",
        on: Literal["new", "replay", "all"] = "new",
    ) -> None:
        self.lambda_ = lambda_
        self.loss = loss
        self.on = on
        self.stable: IncrementalNet | None = None

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if `on` is `replay` and no plugin of the run brings old images back."""
        if self.on == "replay" and not run.replaying:
            yield (
                "`a-ltm.on=replay` needs a plugin that brings old images back, and the run has none: add one, "
                "or choose `new`."
            )

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return the distillation from the stable network; None in the first experience, before there is one."""
        if self.stable is None:
            return None
        with torch.no_grad():
            q = self.stable(batch.x, batch.task).logits
        if self.loss == "l2":
            old = run.previous_classes
            distances = half_squared_distance(q[:, old], outputs.logits[:, old])
        else:
            apart = run.scenario.setting == "task" and run.logits in ("own", "current")
            groups = run.old_heads if apart else [run.previous_classes]
            distances = soft_cross_entropy_per_group(q, outputs.logits, groups, temperature=1.0)
        if self.on != "replay":
            return {self.name: self.lambda_ * batch.mean(distances, batch.origin == 0 if self.on == "new" else None)}
        # rows whose weights are all 0 are kept out of the default loss only (der, deep-inversion): they count equally
        only = batch.origin > 0
        weight = batch.weight * only
        weight = torch.where(weight.sum() > 0, weight, only.to(weight.dtype))
        total = weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
        return {self.name: self.lambda_ * torch.dot(weight.to(distances.dtype), distances) / total}

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Consolidate: keep a frozen copy of the network as the next stable network."""
        self.stable = snapshot(run.model)
