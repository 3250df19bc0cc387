"""Experience replay (Chaudhry et al., 2019): a few old images are kept, and join each batch of new ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from clframe import Batch, Experience, ImageData, Plugin, hookimpl
from clframe.context import Run
from clframe.errors import UsageError
from clframe.options import Count
from clframe.toolkit.memory import at_random, balanced, draw, quota, reservoir, ring, too_small


class ER(Plugin):
    """Experience replay: images of a memory join each batch.

    L = sum(w l) / sum(w), the cross-entropy l over the rows of both. New and drawn images share one forward pass, so
    that batch norms normalize both together. A reservoir samples presentations, not images: an image that is shown in
    two epochs counts twice and may be kept twice.

    When to use:
        First wherever a few images may be kept: nothing as simple is as good.

    Keeps:
        `er.size` images, or `er.per_class` of each class.

    Hooks:
        `extra_batch`, `after_step`, `after_experience`

    Options:
        size: images in the memory, of all classes together.
        per_class: images of each class (in domains, of each class of each experience), in place of `size`.
        memory: `reservoir`: a uniform sample of all images shown so far, updated at each step; `balanced`: the same
            number of each class, drawn at random as an experience ends, when older ones are cut; `ring`: the latest
            ones of each class, updated at each step.
        batch_size: images drawn for a step; null: as many as the batch has.
        weigh: `images`: each image counts the same, new or old; `experiences`: in experience t (from 1) the new ones
            together count 1/t and the old ones 1 - 1/t; images of experience t that the memory already holds are new
            ones.
    """

    name = "er"
    family = "rehearsal"
    state = ("kept", "seen")
    replays = True
    keeps_images = True
    memory_options = ("size", "per_class")
    citation = "Chaudhry et al., On tiny episodic memories in continual learning, 2019"

    def __init__(
        self,
        *,
        size: Count = 200,
        per_class: Count | None = None,
        memory: Literal["reservoir", "balanced", "ring"] = "reservoir",
        batch_size: Count | None = None,
        weigh: Literal["images", "experiences"] = "images",
    ) -> None:
        if per_class is not None and memory == "reservoir":
            raise UsageError("`er.per_class` needs a memory by class: set `er.memory` to `balanced` or `ring`.")
        self.size = size
        self.per_class = per_class
        self.memory = memory
        self.batch_size = batch_size
        self.weigh = weigh
        self.kept: ImageData | None = None
        self.seen = 0

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if the memory has no room for an image of each class."""
        if self.per_class is None:
            by_class = self.memory != "reservoir"
            groups = self.count_groups(run) if by_class else max(map(max, run.scenario.classes)) + 1
            yield from too_small(self.size, groups, "er.size")

    def count_groups(self, run: Run, experiences: int | None = None) -> int:
        """Count the classes of the first `experiences` experiences (or all); a class that comes twice counts twice."""
        return sum(map(len, run.scenario.classes[:experiences]))

    @hookimpl
    def extra_batch(self, run: Run, batch: Batch) -> Batch | None:
        """Return images of the memory; None while it is empty."""
        index = run.experience.index
        rng = run.rng(self.name)
        if self.kept is None or (self.weigh == "experiences" and not index):
            return None
        rows = draw(self.kept, self.batch_size or len(batch), rng)
        drawn = run.batch(rows, rng)
        if self.weigh == "experiences":
            new = self.belongs_to_experience(run, drawn)
            n_new = len(batch) + new.sum()
            n_old = (~new).sum()
            drawn.weight[~new] = index * n_new / n_old.clamp(min=1)  # old rows together: t - 1 times all new ones
        return drawn

    def belongs_to_experience(self, run: Run, rows: Batch) -> Tensor:
        """Return which rows of the memory, [B] bool, belong to the experience under way, as some of a reservoir do.

        A class that only this experience has decides by itself; for a class that comes back, the row's task decides.
        """
        own = torch.tensor(run.experience.classes, device=rows.y.device)
        old = torch.tensor(run.previous_classes, device=rows.y.device)
        return torch.isin(rows.y, own) & (~torch.isin(rows.y, old) | (rows.task == run.experience.task))

    @hookimpl
    def after_step(self, run: Run, batch: Batch) -> None:
        """Offer the new images to the memory, in the forms `reservoir` and `ring`."""
        if run.phase.name != "train" or self.memory == "balanced":
            return
        rows = batch.fresh()
        if self.memory == "ring":
            self.kept = ring(self.kept, rows, self.per_class or quota(self.size, self.count_groups(run)))
        else:
            self.kept = reservoir(self.kept, rows, self.seen, self.size, run.rng(self.name))
            self.seen += len(rows)

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Draw the images of this experience that stay, in the form `balanced`."""
        if self.memory == "balanced":
            count = self.per_class or quota(self.size, self.count_groups(run, experience.index + 1))
            self.kept = balanced(self.kept, experience.train.to(run.device), count, at_random(run.rng(self.name)))
