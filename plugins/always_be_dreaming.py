"""Always be dreaming (Smith et al., ICCV 2021): a generator makes images of old classes for distillation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor

from clframe import Batch, Experience, ImageData, IncrementalNet, Outputs, Plugin, hookimpl, snapshot
from clframe.context import Run
from clframe.options import Count, NonNegative, Positive, Search
from clframe.toolkit.dreamer import (
    Dreamer,
    GeneratorTerms,
    balanced_cross_entropy,
    generator_problems,
    head_logits,
    local_cross_entropy,
)
from clframe.toolkit.inversion import SHOWN, select_preview, to_raw


class AlwaysBeDreaming(Plugin):
    """Data-free replay of a generator's images: local learning of new classes, feature distillation by the old head.

    No image is kept. Before an experience a new generator G learns to turn noise z into images that the teacher, the
    network after the last experience, classifies with confidence, and whose statistics match those that the teacher's
    batch norms keep:

        min_G confidence CE(q/T, argmax q) + balance (1 + sum_c p_c log p_c / log K)
            + statistics mean_l KL(N(running_l) || N(batch_l)) + smooth ||x - smoothed x||^2 / pixels

    with x = G(z), q the teacher's logits of the K old classes, and p their mean softmax. In training, images of G
    (dreams) join each batch, with the class that the teacher assigns to them. Then L = local + head + mu distill:

    - local: cross-entropy of the new images over the new classes alone.
    - head: cross-entropy over all classes on features that pass no gradient on: n_old / n_seen times the mean over the
      images of old classes, plus n_new / n_seen times that of new ones. (The authors halve it, and also weight `local`
      by n_new / n_seen.)
    - distill: ||W_old f(x) - W_old f_old(x)||^2 / n_old, the mean over all images, new ones and dreams, with features f
      and the teacher's head W_old.

    The authors train G for 10,000 iterations (CIFAR-100, ResNet-32). They keep G and its Adam from one experience to
    the next; here both are new before each experience. Two inner batch norms of their G have an epsilon of 0.8, where
    those here have torch's 1e-5.

    When to use:
        For class-incremental learning without stored images, with networks and images larger than digits.

    Keeps:
        The generator, and 1 number per weight: the teacher. No image.

    Hooks:
        `before_run`, `before_experience`, `extra_batch`, `base_loss`, `penalty`, `after_experience`

    Options:
        iterations: steps of the generator before each experience; the authors' number is 10000.
        lr: learning rate of the generator's Adam.
        batch_size: images that the generator makes in each of its steps, which bounds the memory.
        noise: length of the noise.
        width: channels of the generator's first maps.
        confidence: weight of the cross-entropy against the class with the highest score.
        temperature: temperature T of that cross-entropy.
        balance: weight of the balance of classes.
        statistics: weight of the statistics of batch norms.
        smooth: weight of the smoothness of images.
        mu: weight of the feature distillation.
        replay: dreams that join each batch; null: as many as the batch has images.
    """

    name = "always-be-dreaming"
    family = "generative and data-free replay"
    state = ("teacher", "dreamer")
    serves = ("class",)
    replays = True
    citation = "Smith et al., Always be dreaming: a new approach for data-free class-incremental learning, ICCV 2021"

    def __init__(
        self,
        *,
        iterations: Count = 1000,
        lr: Positive = 1e-3,
        batch_size: Count = 128,
        noise: Count = 1000,
        width: Count = 128,
        confidence: NonNegative = 1.0,
        temperature: Positive = 1e3,
        balance: NonNegative = 1.0,
        statistics: NonNegative = 50.0,
        smooth: NonNegative = 1e-3,
        mu: Annotated[NonNegative, Search(0.001, 10, log=True)] = 0.1,
        replay: Count | None = None,
    ) -> None:
        self.iterations = iterations
        self.lr = lr
        self.batch_size = batch_size
        self.noise = noise
        self.width = width
        self.terms = GeneratorTerms(confidence, temperature, balance, statistics, smooth)
        self.mu = mu
        self.replay = replay
        self.teacher: IncrementalNet | None = None
        self.dreamer: Dreamer  # built in `before_run`

    def wanted_logits(self, run: Run) -> str:
        """Return `seen`, the logits of all classes seen, as dreams are of old classes."""
        return "seen"

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence for each reason why no generator can be trained, or no loss among new classes computed."""
        yield from generator_problems(run, self, "deep-inversion")

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Build the generator of dreams."""
        self.dreamer = Dreamer(run.scenario.input_shape, self.noise, self.width, self.lr).to(run.device)

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Train a new generator on the teacher, and log some of its dreams; do nothing before the first experience."""
        if self.teacher is not None:
            self.dreamer.learn(run, self.name, self.teacher, self.terms, self.iterations, self.batch_size)
            dreams = self.dreamer.draw_batch(SHOWN, self.teacher, tasks_of(self.teacher, run), run.rng(self.name))
            run.log_images(self.name, select_preview(ImageData(to_raw(dreams.x, run.scenario.transform), dreams.y)))

    @hookimpl
    def extra_batch(self, run: Run, batch: Batch) -> Batch | None:
        """Return new dreams of the generator for this step; None in the first experience."""
        if self.teacher is None:
            return None
        n = self.replay or len(batch)
        return self.dreamer.draw_batch(n, self.teacher, tasks_of(self.teacher, run), run.rng(self.name))

    @hookimpl
    def base_loss(self, run: Run, batch: Batch, outputs: Outputs) -> Tensor | None:
        """Return the cross-entropy of new images over the new classes alone; None in the first experience."""
        if self.teacher is None:
            return None
        n = self.teacher.n_classes
        return batch.mean(local_cross_entropy(outputs.logits, batch.y, n), batch.y >= n)

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return the loss of the head and the feature distillation; None in the first experience."""
        if self.teacher is None:
            return None
        z = head_logits(run.model, outputs.features.detach())
        with torch.no_grad():
            q = self.teacher(batch.x, batch.task).logits
        distilled = (head_logits(self.teacher, outputs.features) - q).square().mean()
        return {
            f"{self.name}/head": balanced_cross_entropy(z, batch.y, self.teacher.n_classes),
            f"{self.name}/distill": self.mu * distilled,
        }

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Keep a frozen copy of the network as the next teacher."""
        self.teacher = snapshot(run.model)


def tasks_of(teacher: IncrementalNet, run: Run) -> Tensor:
    """Return the task of each class of `teacher`, [C] int64."""
    return run.task_of(torch.arange(teacher.n_classes, device=run.device))
