"""Learning without forgetting (Li and Hoiem, TPAMI 2017): the old network's answers to new images are distilled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional

from clframe import Batch, Experience, IncrementalNet, Outputs, Phase, Plugin, hookimpl, snapshot
from clframe.context import Run
from clframe.errors import UsageError
from clframe.model import masked
from clframe.options import NonNegative, Positive, Search
from clframe.toolkit.distill import incremental_bce, soft_cross_entropy_per_group
from clframe.toolkit.warm_up import warm_up, warm_up_problems

Form = Literal["heads", "local", "seen", "padded", "padded-mean", "all", "mc"]
LOGITS = {  # the setting of `train.logits` that each form is made for
    "heads": "own",
    "local": "current",
    "seen": "seen",
    "padded": "seen",
    "padded-mean": "seen",
    "all": "all",
    "mc": "all",
}


class LwF(Plugin):
    """Learning without forgetting: distillation of the last experience's network, the teacher, on the new images.

    L = loss + lambda KD, KD = -sum_c s_T(old)_c log s_T(new)_c with s_T(z) = softmax(z / T), not multiplied by T^2. The
    teacher answers in evaluation mode, on the very view of the image that is trained on. There are seven forms, all but
    the first for class-incremental learning; codes and papers call each of them LwF, and they differ by tens of points,
    so the results name the form that ran:

    - heads: the paper's. The loss is over the task's own head; KD is summed over the old heads, a softmax each. Old
      heads are trained.
    - local: the loss is over the current classes, KD over the old ones together (as FACIL and PyCIL have it).
    - seen: the loss is over all classes seen, KD over the old ones together (as Mammoth has it).
    - padded: both are over all classes seen; the old network's share of new classes in KD is 0 (as van de Ven and
      Tolias, 2019, write it, with T^2, that is with lambda = 4 for T = 2).
    - padded-mean: as padded, but KD is averaged over the classes seen, not summed: its weight falls as classes come (as
      the first code of van de Ven and Tolias has it, which gave their figures of 2019).
    - all: both are over all classes from the start (as van de Ven et al., 2022, have it).
    - mc: LwF.MC of Rebuffi et al. (iCaRL, 2017): sigmoid outputs, targets 0 and 1 for new classes and the teacher's
      sigmoid for old ones, averaged over all outputs. Old classes that come back have the targets 0 and 1 again.

    A form sets `train.logits`.

    When to use:
        First in task-incremental learning: it is the strongest method here that keeps no image.

    Keeps:
        1 number per weight: the teacher.

    Hooks:
        `before_run`, `phases`, `base_loss`, `penalty`, `after_experience`

    Options:
        lambda: weight of the distillation; with `mc` 1.
        temperature: temperature T; with `mc` it has no meaning.
        form: one of the seven forms; null: `heads` in task-incremental learning, `all` in domains, in class-incremental
            learning `local`, or `seen` beside a plugin that brings old images back, as `local` has no loss for them.
        balance: whether, in experience t (from 1), the new images' loss is weighted by 1/t and the distillation by 1 -
            1/t; the loss of images that another plugin brings back keeps its weight.
        warm_up: length of a phase in which the new head is trained alone first, relative to the experience's own
            training; the paper's is 1.
    """

    name = "lwf"
    family = "distillation"
    state = ("teacher",)
    joins = "network"
    one_class = "lwf.form=seen"
    citation = "Li and Hoiem, Learning without forgetting, TPAMI 2017"

    def __init__(
        self,
        *,
        lambda_: Annotated[NonNegative, Search(0.01, 100, log=True)] = 1.0,
        temperature: Positive = 2.0,
        form: Form | None = None,
        balance: bool = False,
        warm_up: NonNegative = 0.0,
    ) -> None:
        if form == "mc" and (lambda_ != 1 or temperature != 2 or balance):
            raise UsageError("`lwf.form=mc` is one loss: leave `lwf.lambda`, `lwf.temperature` and `lwf.balance` out.")
        self.lambda_ = lambda_
        self.temperature = temperature
        self.form = form
        self.balance = balance
        self.warm_up = warm_up
        self.teacher: IncrementalNet | None = None

    def owns(self, hook: str) -> bool:
        """Return whether the base loss is replaced: in the form `mc`, and in a balanced sum."""
        return hook != "base_loss" or self.form == "mc" or self.balance

    def choose_form(self, run: Run) -> str:
        """Return the form, or the form that null stands for in this run."""
        among_classes = "seen" if run.replaying else "local"
        return self.form or {"task": "heads", "class": among_classes, "domain": "all"}[run.scenario.setting]

    def wanted_logits(self, run: Run) -> str:
        """Return the setting of `train.logits` that the form is made for."""
        return LOGITS[self.choose_form(run)]

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if the form does not fit the scenario's setting."""
        setting = run.scenario.setting
        form = self.choose_form(run)
        if form == "heads" and setting != "task":
            yield (
                f"`lwf.form=heads` needs the task-incremental setting, and the setting is `{setting}`: choose another "
                "form, or `--setting task`."
            )
        if form == "local" and setting == "domain":
            yield "`lwf.form=local` needs different classes in each experience; in the domain setting choose `all`."
        if form == "mc" and setting == "domain":
            yield (
                "`lwf.form=mc` distills classes that an experience does not have, and in the domain setting each has "
                "all classes: choose `all`, or `--setting class`."
            )
        yield from warm_up_problems(run, self)

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Choose the form that fits the setting, where none was given."""
        self.form = self.choose_form(run)

    @hookimpl
    def phases(self, run: Run) -> list[Phase] | None:
        """Return the warm-up phase, if `warm_up` asks for one."""
        return warm_up(run, self.warm_up)

    @hookimpl
    def base_loss(self, run: Run, batch: Batch, outputs: Outputs) -> Tensor | None:
        """Return the loss of LwF.MC, or the cross-entropy with its share of a balanced sum; None in other forms."""
        if self.form == "mc":
            old = None if self.teacher is None else self._old_logits(batch)[:, : len(run.previous_classes)]
            return batch.mean(incremental_bce(outputs.logits, batch.y, old, hard=run.labeled_columns(batch)))
        if self.balance:
            logits = masked(outputs.logits, run.mask(batch.task))
            losses = functional.cross_entropy(logits, batch.y, reduction="none")
            share = 1 / (run.experience.index + 1)
            return batch.mean(torch.where(batch.origin == 0, share * losses, losses))
        return None

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return the distillation of old outputs; None in the first experience, and in the form `mc`."""
        if self.teacher is None or self.form == "mc":
            return None
        q = self._old_logits(batch)
        padded = self.form in ("padded", "padded-mean")
        if padded:  # with a score of -inf, a class has the share 0
            q = functional.pad(q, (0, outputs.logits.shape[1] - q.shape[1]), value=-torch.inf)
        if self.form == "heads":
            groups: Sequence[Sequence[int]] = run.old_heads
        else:
            groups = [range(q.shape[1]) if padded or self.form == "all" else run.previous_classes]
        share = run.experience.index / (run.experience.index + 1) if self.balance else 1.0  # 1 - 1/t
        if self.form == "padded-mean":
            share /= q.shape[1]
        # lambda KD, KD = -sum_c s_T(old)_c log s_T(new)_c, for each group of classes
        distilled = batch.mean(soft_cross_entropy_per_group(q, outputs.logits, groups, self.temperature))
        return {self.name: self.lambda_ * share * distilled}

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Keep a frozen copy of the network as the next teacher."""
        self.teacher = snapshot(run.model)

    @torch.no_grad()
    def _old_logits(self, batch: Batch) -> Tensor:
        assert self.teacher is not None
        logits: Tensor = self.teacher(batch.x, batch.task).logits
        return logits
