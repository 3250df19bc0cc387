"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017): weights that mattered are held by springs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from clframe.errors import WrongUse
from clframe.hooks import hookimpl
from clframe.importance import Labels, Quadratic, label_cotangents
from clframe.options import Count, NonNegative, Share
from clframe.per_sample import GradientSums, zeros_for
from clframe.plugin import Plugin

if TYPE_CHECKING:
    from clframe.context import Run
    from clframe.data import Experience

CHUNK = 1 << 19  # numbers of the images taken at a time: small ones in larger batches than they are trained in


class EWC(Plugin):
    """Penalises changes of weights by their Fisher information for what was learnt.

    F_k is the diagonal of the Fisher information of experience k: the mean over its images of the squared gradient of
    log p(y | image), each image by itself, in eval mode, over the logits that take part in the loss.

    - offline (Kirkpatrick et al., eq. 3, a penalty per experience): L = loss + lambda/2 sum_k F_k (theta - theta*_k)^2.
      The sum of these quadratics is kept as one, so that memory and time do not grow.
    - online (Huszar, PNAS 2018, with one anchor, the latest; Schwarz et al., ICML 2018, eq. 9, with gamma):
      F~_t = gamma F~_{t-1} + F_t, L = loss + lambda/2 gamma F~_{t-1} (theta - theta*_{t-1})^2.

    The papers mean the expectation over the model's own labels. With SGD, lr * lambda * max F must stay below 2.

    Options:
        lambda: strength of the penalty.
        form: `offline` keeps a penalty for each experience, `online` one for all, centred at the latest weights.
        gamma: how much of the past the online form keeps, 0 to 1; null: 1.
        labels: y of the Fisher information: `exact`, the expectation over all labels under the model; `sampled`, drawn
            from the model; `empirical`, the true one; `argmax`, the likeliest one.
        samples: images of the experience that the mean is over, drawn at random; null: all of them.
        heads: whether the penalty holds the head, too.
    """

    name = "ewc"
    state = ("penalties", "partial", "rows")
    citation = "Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017"

    def __init__(
        self,
        *,
        lambda_: NonNegative = 100.0,
        form: Literal["offline", "online"] = "offline",
        gamma: Share | None = None,
        labels: Labels = "exact",
        samples: Count | None = 500,
        heads: bool = True,
    ) -> None:
        if gamma is not None and form == "offline":
            raise WrongUse(
                f"`ewc.gamma` is {gamma} but `ewc.form` is offline: online and offline EWC asked at once; "
                "set `ewc.form=online`, or leave `ewc.gamma` out."
            )
        self.lambda_, self.form, self.gamma = lambda_, form, 1.0 if gamma is None else gamma
        self.labels: Labels = labels
        self.samples, self.heads = samples, heads
        self.penalties = Quadratic()
        self.rows = torch.empty(0, dtype=torch.int64)  # images of the mean under way
        self.partial: dict[str, Tensor] = {}  # sums of squared gradients over those of them that are done

    @hookimpl
    def penalty(self, run: Run) -> dict[str, Tensor] | None:
        """The springs; none in the first experience."""
        if not self.penalties.anchor:
            return None
        strength = self.lambda_ * (self.gamma if self.form == "online" else 1.0)
        return {self.name: strength * self.penalties(dict(run.model.named_parameters()))}

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Add the springs of this experience."""
        parameters = {
            name: p
            for name, p in run.model.named_parameters()
            if p.requires_grad and (self.heads or not name.startswith("head."))
        }
        fisher = self._fisher(run, experience, parameters)
        if self.form == "online":
            kept = {name: self.gamma * past for name, past in self.penalties.precision.items()}
            fisher = kept | {name: f + kept[name] if name in kept else f for name, f in fisher.items()}
            self.penalties.replace(fisher, dict(run.model.named_parameters()))
        else:
            self.penalties.add(fisher, parameters)

    def _fisher(self, run: Run, experience: Experience, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """F_k by name of the parameter."""
        data, generator = experience.train, run.rng(self.name)
        size = max(run.settings.batch_size, CHUNK // data.x[0].numel())
        if not self.partial:
            self.rows = torch.randperm(len(data), generator=generator)[: self.samples]
            self.partial = zeros_for(parameters)
        sums = GradientSums(run.model, self.partial)
        parts = self.rows.to(data.x.device).split(size)
        for i in run.ticks(self.name, len(parts), resumable=True):
            batch = run.batch(data.rows(parts[i]))
            mask = run.mask(batch.task)
            sums.add(batch.x, batch.task, lambda z: label_cotangents(z, self.labels, mask, batch.y, generator))  # noqa: B023
        fisher = {name: total / len(self.rows) for name, total in self.partial.items()}
        self.rows, self.partial = torch.empty(0, dtype=torch.int64), {}
        return fisher
