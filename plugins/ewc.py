"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017): a quadratic penalty holds weights that mattered."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from clframe import Batch, Experience, Plugin, hookimpl
from clframe.context import Run
from clframe.errors import UsageError
from clframe.options import Count, NonNegative, Search, Share
from clframe.toolkit.importance import ImportanceMean, Labels, Quadratic, label_cotangents, weighted_penalty
from clframe.toolkit.per_sample import GradientSums


class EWC(Plugin):
    """Elastic weight consolidation: a quadratic penalty on changes of weights, scaled by their Fisher information.

    F_k is the diagonal of the Fisher information of experience k: the mean over its images of the squared gradient of
    log p(y | image), taken for each image by itself, in evaluation mode, over the logits that take part in the loss.
    The papers mean the expectation over the model's own labels (`labels=exact`). Well-known code bases square the
    gradient of the batch mean instead, whose size depends on the batch.

    - offline (Kirkpatrick et al., eq. 3, a penalty per experience): L = loss + lambda/2 sum_k F_k (theta - theta*_k)^2.
      The sum of these quadratics is kept as one, A (theta - m)^2 plus a constant, with A = sum F_k and m the weighted
      mean of the anchors: the same value and gradient at constant memory and time.
    - online (Huszar, PNAS 2018, with one anchor, the latest; Schwarz et al., ICML 2018, eq. 9, with gamma): F~_t =
      gamma F~_{t-1} + F_t, L = loss + lambda/2 gamma F~_{t-1} (theta - theta*_{t-1})^2.

    Under SGD, entries of lambda F that a step would overshoot count as less
    (`clframe.toolkit.importance.weighted_penalty`); Adam takes all of them as they are.

    `train.clip` is 1 by default, which the papers do not have. The penalty's gradient is clipped with the rest, so that
    published learning rates and strengths do not carry over as they are: `train.clip=0` turns clipping off. On
    `permuted-digits` (300 steps an experience, default settings) 96 % of the steps after the first experience are
    clipped.

    In class-incremental learning it is level with fine-tuning, as nothing holds old classes against new ones: 19.4 %
    and 19.5 % on `split-digits` over seeds 0 to 4 (`benchmarks/defaults.py`).

    When to use:
        In domain-incremental learning, where the label set stays, and in task-incremental learning. In
        class-incremental learning it barely helps, here as everywhere.

    Keeps:
        2 numbers per weight.

    Hooks:
        `penalty`, `after_experience`

    Options:
        lambda: strength of the penalty.
        form: `offline` has a penalty for each experience, `online` one for all, centered at the latest weights.
        gamma: share of the past that the online form keeps, 0 to 1; null: 1.
        labels: labels y of the Fisher information: `exact`, the expectation over all labels under the model; `sampled`,
            drawn from the model; `empirical`, the true label; `argmax`, the likeliest label.
        samples: images of the experience that the mean is over, drawn at random; null: all of them.
        heads: whether the penalty holds the head, too.
    """

    name = "ewc"
    family = "regularization"
    state = ("penalties", "mean")
    joins = "images"
    citation = "Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017"

    def __init__(
        self,
        *,
        lambda_: Annotated[NonNegative, Search(1, 1e6, log=True)] = 100.0,
        form: Literal["offline", "online"] = "offline",
        gamma: Share | None = None,
        labels: Labels = "exact",
        samples: Count | None = 500,
        heads: bool = True,
    ) -> None:
        if gamma is not None and form == "offline":
            raise UsageError(
                f"`ewc.gamma` is {gamma}, an option of the online form, but `ewc.form` is offline: set "
                "`ewc.form=online`, or leave `ewc.gamma` out."
            )
        self.lambda_ = lambda_
        self.form = form
        self.gamma = 1.0 if gamma is None else gamma
        self.labels: Labels = labels
        self.samples = samples
        self.heads = heads
        self.penalties = Quadratic()
        self.mean = ImportanceMean()

    @property
    def strength(self) -> float:
        """The factor of the quadratic penalty: lambda, times gamma in the online form."""
        return self.lambda_ * (self.gamma if self.form == "online" else 1.0)

    @hookimpl
    def penalty(self, run: Run) -> dict[str, Tensor] | None:
        """Return the quadratic penalty; None in the first experience, where there is nothing to protect."""
        if not self.penalties.anchor:
            return None
        # lambda/2 sum_k F_k (theta - theta*_k)^2 (eq. 3); the factor 1/2 is in `Quadratic`
        return {self.name: weighted_penalty(run, self.strength, self.penalties)}

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Compute the Fisher information of the experience, and add it to the penalty."""
        parameters = {
            name: p
            for name, p in run.model.named_parameters()
            if p.requires_grad and (self.heads or not name.startswith("head."))
        }

        def add(sums: GradientSums, batch: Batch) -> None:
            # sum over images of E_y (d log p(y | image) / d theta)^2, y by the rule `labels`
            mask = run.mask(batch.task)
            sums.add(batch.x, batch.task, lambda z: label_cotangents(z, self.labels, mask, batch.y, run.rng(self.name)))

        # F_k, the mean over the images of experience k
        fisher = self.mean.over(run, self.name, experience.train, self.samples, parameters, add)
        if self.form == "online":
            # F~_t = gamma F~_{t-1} + F_t, with the latest weights as the anchor (Schwarz et al., eq. 9)
            kept = {name: self.gamma * past for name, past in self.penalties.precision.items()}
            fisher = kept | {name: f + kept[name] if name in kept else f for name, f in fisher.items()}
            self.penalties.replace(fisher, dict(run.model.named_parameters()))
        else:
            # one more term F_k (theta - theta*_k)^2 of the sum (Kirkpatrick et al., eq. 3)
            self.penalties.add(fisher, parameters)
