"""DeepInversion (Yin et al., CVPR 2020): images of old classes are made from the network itself, and distilled on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from clframe import Batch, Experience, ImageData, IncrementalNet, Outputs, Plugin, hookimpl, snapshot
from clframe.context import Run
from clframe.options import Count, CountOrZero, NonNegative, Positive, Search
from clframe.toolkit.distill import kl_divergence
from clframe.toolkit.inversion import Dreaming, DreamOptions, InversionTerms, dreaming_problems, select_preview


class DeepInversion(Plugin):
    """Data-free replay of images of old classes that are optimized from noise through the old network, the teacher.

    No image is kept. Before an experience the teacher (the network after the last one, in evaluation mode) turns noise
    into images x, the dreams, of the old classes y:

        min_x CE(z(x), y) + tv TV(x) + l2 ||x||_2 + feature R_feature(x) + compete (1 - JS(z(x), r(x)))

    R_feature is the distance of the input statistics of each batch norm from its running mean and variance. With
    `compete` this is Adaptive DeepInversion: dreams are made in rounds, and after each round a rival r, a network like
    the teacher with new initial weights, is distilled from the teacher on the dreams so far; the next dreams should be
    images on which the two disagree (JS: the Jensen-Shannon divergence, at temperature 3). The rival stands for the
    paper's student, as the network of the run still equals the teacher when dreams are made.

    Then L = loss(x_new) + dreams KL(p_old(x^) || p(x^)) + distill KL(p_old(x_new) || p(x_new)), where x^ are dreams
    that join each batch and count in no other loss. The first KL gives new classes no share in p_old, the second is
    over old classes alone. In task-incremental learning the first is over the head of the dream's class, and the second
    is the sum over the old heads. Dreams are augmented as images are. `jitter`, `flip` and `clip` keep them close to
    natural images.

    The paper's settings are, for CIFAR-10 and ResNet-34: iterations 2000, lr 0.1, tv 2.5e-5, feature 100; for ImageNet
    and ResNet-50: iterations 20000, lr 0.05, tv 1e-4, l2 0 or 0.01, feature 0.01, compete 0.2, jitter 30, flip true.

    When to use:
        Where a trained network with batch norms exists, and its training images do not.

    Keeps:
        1 number per weight: the teacher; and the dreams, while an experience lasts.

    Hooks:
        `before_experience`, `extra_batch`, `penalty`, `after_experience`

    Options:
        per_class: dreams of each old class.
        iterations: steps of Adam on each dream, and of the rival after each round.
        lr: learning rate of the dreams, in the space of normalized images.
        anneal: whether the learning rate falls to 0 along half a cosine.
        feature: weight of R_feature.
        tv: weight of the total variation.
        l2: weight of the images' norm.
        compete: weight of the competition with a rival; 0: there is none.
        rounds: number of rounds in which dreams are made where there is a rival, the first of them without it.
        jitter: most pixels by which dreams are rolled at random in each step; null: a sixteenth of the side.
        flip: whether dreams are mirrored at random in each step; null: as the scenario's augmentation does.
        clip: whether dreams are clipped to the range of values that an image can have, after each step.
        batch_size: most dreams made at a time, which bounds the memory.
        dreams: weight of the distillation on dreams.
        distill: weight of the distillation on new images.
        temperature: temperature of both distillations.
        replay: dreams that join each batch; null: as many as the batch has images.
    """

    name = "deep-inversion"
    family = "generative and data-free replay"
    state = ("teacher", "dreaming", "images")
    replays = True
    citation = "Yin et al., Dreaming to distill: data-free knowledge transfer via DeepInversion, CVPR 2020"

    def __init__(
        self,
        *,
        per_class: Count = 40,
        iterations: Count = 200,
        lr: Positive = 0.05,
        anneal: bool = False,
        feature: NonNegative = 10.0,
        tv: NonNegative = 1e-3,
        l2: NonNegative = 0.0,
        compete: NonNegative = 0.0,
        rounds: Annotated[int, Field(ge=2)] = 4,
        jitter: CountOrZero | None = None,
        flip: bool | None = None,
        clip: bool = True,
        batch_size: Count = 256,
        dreams: Annotated[NonNegative, Search(0.01, 100, log=True)] = 1.0,
        distill: Annotated[NonNegative, Search(0.01, 100, log=True)] = 1.0,
        temperature: Positive = 1.0,
        replay: Count | None = None,
    ) -> None:
        self.dream_options = DreamOptions(
            InversionTerms(feature, tv, l2, compete),
            per_class,
            iterations,
            lr,
            rounds if compete else 1,
            jitter,
            flip,
            clip,
            batch_size,
            temperature,
            anneal,
        )
        self.dreams = dreams
        self.distill = distill
        self.temperature = temperature
        self.replay = replay
        self.teacher: IncrementalNet | None = None
        self.dreaming = Dreaming()
        self.images: ImageData | None = None  # the dreams, raw

    def wanted_logits(self, run: Run) -> str | None:
        """Return `seen` in class-incremental learning, as dreams are of old classes, and `own` in task-incremental."""
        return {"class": "seen", "task": "own"}.get(run.scenario.setting)

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence for a backbone without batch norms, or inputs that are not images."""
        yield from dreaming_problems(run, self)

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Make dreams of the old classes, and log a sample of them; do nothing before the first experience."""
        if self.teacher is not None:
            self.images = self.dreaming.dream(run, self.name, self.teacher, self.dream_options)
            run.log_images(self.name, select_preview(self.images))

    @hookimpl
    def extra_batch(self, run: Run, batch: Batch) -> Batch | None:
        """Return dreams, drawn at random; None in the first experience."""
        if self.images is None:
            return None
        generator = run.rng(self.name)
        where = torch.randint(len(self.images), (self.replay or len(batch),), generator=generator)
        rows = self.images.rows(where.to(run.device))
        return run.batch(rows, generator)

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return the distillation on dreams and the one on new images; None in the first experience."""
        if self.teacher is None:
            return None
        with torch.no_grad():
            q = self.teacher(batch.x, batch.task).logits
        z = outputs.logits
        t = self.temperature
        if run.scenario.setting == "task":
            groups = [list(group) for group in run.old_heads]
            heads = torch.stack([kl_divergence(q[:, g], z[:, g], t) for g in groups], 1)
            known = heads.sum(1)
            dreamt = heads.gather(1, self._heads_of(run, batch.task)[:, None])[:, 0]
        else:
            padded = functional.pad(q, (0, z.shape[1] - q.shape[1]), value=-torch.inf)  # new classes have the share 0
            known = kl_divergence(q, z[:, : q.shape[1]], t)
            dreamt = kl_divergence(padded, z, t)
        mine = run.rows_from(self, batch)
        return {
            f"{self.name}/dreams": self.dreams * torch.dot(dreamt, mine.to(dreamt.dtype)) / mine.sum(),
            f"{self.name}/distill": self.distill * batch.mean(known),
        }

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Keep a frozen copy of the network as the next teacher."""
        self.teacher = snapshot(run.model)

    @staticmethod
    def _heads_of(run: Run, task: Tensor) -> Tensor:
        """Return the index in `Run.old_heads` of the head of each row's earlier task, [B]; of other rows any index."""
        heads = [set(head) for head in run.old_heads]
        places = [heads.index(set(group)) for group in run.scenario.classes[: run.experience.index]]
        return torch.tensor(places, device=task.device)[task.clamp(max=len(places) - 1)]
