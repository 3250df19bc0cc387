"""Dark experience replay (Buzzega et al., NeurIPS 2020): a memory keeps images with the logits that they once got."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from clframe import Batch, ImageData, Outputs, Plugin, hookimpl
from clframe.context import Run
from clframe.data.batch import join
from clframe.model import masked
from clframe.options import Count, NonNegative, Search
from clframe.toolkit.memory import draw, reservoir, too_small


class DER(Plugin):
    """Dark experience replay: images of a reservoir keep the logits that they once got; DER++ also uses their labels.

    L = loss + alpha mean ||z - h(x')||^2 / C + beta mean CE(y'', h(x'')), with images x' and x'' drawn apart (eq. 6).
    The squared distance (`alpha`, DER) is averaged over the C logits that there were when z was kept, as in the
    authors' code; the cross-entropy on another draw (`beta`) makes it DER++. New and drawn images share one forward
    pass, where the authors' code has one for each draw, so that batch norms normalize all together. The reservoir
    samples presentations, not images: an image that is shown in two epochs counts twice and may be kept twice, with
    other logits.

    When to use:
        Where the memory is small and several epochs are trained.

    Keeps:
        `der.size` images with their logits.

    Hooks:
        `before_experience`, `extra_batch`, `penalty`, `after_step`

    Options:
        size: images in the memory.
        alpha: weight of the old logits.
        beta: weight of the old labels: 0 is DER, more is DER++.
        batch_size: images drawn for each of the two terms; null: as many as the batch has.
    """

    name = "der"
    family = "rehearsal"
    state = ("kept", "seen")
    replays = True
    keeps_images = True
    memory_options = ("size",)
    citation = "Buzzega, Boschini, Porrello, Abati, Calderara, Dark experience for general continual learning, 2020"

    def __init__(
        self,
        *,
        size: Count = 200,
        alpha: Annotated[NonNegative, Search(0.01, 10, log=True)] = 0.5,
        beta: Annotated[NonNegative, Search(0.01, 10, log=True)] = 0.5,
        batch_size: Count | None = None,
    ) -> None:
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.batch_size = batch_size
        self.form = "der++" if beta else "der"
        self.kept: ImageData | None = None
        self.seen = 0
        self.answers: Tensor | None = None  # the logits of the step under way

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if the memory has no room for an image of each class."""
        return too_small(self.size, max(map(max, run.scenario.classes)) + 1, "der.size")

    @hookimpl
    def before_experience(self, run: Run) -> None:
        """Extend kept logits by NaN for classes that an extended run has added since the memory was filled."""
        if self.kept is not None:
            self.kept.targets = {name: pad_answers(target, run) for name, target in self.kept.targets.items()}

    @hookimpl
    def extra_batch(self, run: Run, batch: Batch) -> Batch | None:
        """Return images of the memory for both terms, with weight 0 in the base loss; None without a memory."""
        if self.kept is None:
            return None
        rng = run.rng(self.name)
        count = self.batch_size or len(batch)
        draws = []
        for term in (1, 2) if self.beta else (1,):
            rows = run.batch(draw(self.kept, count, rng), rng)
            rows.weight.zero_()
            rows.targets["der/term"] = torch.full_like(rows.y, term)
            draws.append(rows)
        return join(draws)

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return the terms of eq. 6, on old logits and on old labels; None without a memory."""
        logits = outputs.logits
        self.answers = logits.detach()
        if "der/term" not in batch.targets:
            return None
        first = batch.targets["der/term"] == 1
        second = batch.targets["der/term"] == 2
        then = batch.targets["der/logits"][:, : logits.shape[1]]
        known = ~then.isnan()  # the C classes that there were when the logits were kept
        # alpha mean ||z - h(x')||^2 / C + beta mean CE(y'', h(x'')) (eq. 6)
        distances = torch.where(known, logits - then, 0.0).square().sum(1) / known.sum(1).clamp(min=1)
        terms = {f"{self.name}/logits": self.alpha * (distances * first).sum() / first.sum()}
        if self.beta:
            losses = functional.cross_entropy(masked(logits, run.mask(batch.task)), batch.y, reduction="none")
            terms[f"{self.name}/labels"] = self.beta * (losses * second).sum() / second.sum()
        return terms

    @hookimpl
    def after_step(self, run: Run, batch: Batch) -> None:
        """Offer the new images to the memory, with their logits before the step and NaN for classes to come."""
        if run.phase.name != "train" or self.answers is None:
            return
        rows = batch.fresh(**{"der/logits": pad_answers(self.answers, run)})
        self.kept = reservoir(self.kept, rows, self.seen, self.size, run.rng(self.name))
        self.seen += len(rows)


def pad_answers(answers: Tensor, run: Run) -> Tensor:
    """Return `answers` [B, C] with columns of NaN for the classes to come."""
    return functional.pad(answers, (0, len(run.scenario.class_names) - answers.shape[1]), value=torch.nan)
