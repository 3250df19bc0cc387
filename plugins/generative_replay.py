"""Deep generative replay (Shin et al., NIPS 2017): a generator makes old images, and the old solver labels them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from clframe import Batch, Experience, ImageData, IncrementalNet, Outputs, Plugin, compose, hookimpl
from clframe.checks import single_class_problems
from clframe.context import Run
from clframe.model import masked, snapshot
from clframe.options import Count, Positive
from clframe.toolkit.distill import soft_cross_entropy_per_group
from clframe.toolkit.generators import GenerativeModel, Net, check_range
from clframe.toolkit.rehearsal import GeneratorOptions, Rehearsal

SHOWN = 64  # images of the generator that are logged after each experience
CHECKED = 500  # images of known label on which the solver's agreement with the generator is measured
LEAST_ITERATIONS = 1500  # of the generator: on the digits, fewer make replay worse than none


class GenerativeReplay(Plugin):
    """Generative replay of images of a generator that learns along with the network, labeled by the old network.

    The scholar is a generator G and a solver H, the network of the run. In experience t (from 1), with as many images
    x' ~ G_{t-1} as there are new ones in the batch,

        L = 1/t loss(x, y) + (1 - 1/t) loss(x', H_{t-1}(x')),

    and after it G_t learns to generate the same mixture, of new images and G_{t-1}'s, with the same shares. Both old
    copies are frozen and answer in evaluation mode. No training image is kept. G learns images as the data set has
    them, not augmented; replayed ones are augmented as new ones are.

    The old solver chooses among old classes only. Where each task has its own head (`train.logits=own`), the same
    images are labeled and scored by every old head, and the loss is the mean over these heads.

    When to use:
        Where images are simple enough for a generator to learn: digits, not photographs.

    Keeps:
        The generator, with its optimizer (twice the size again), and 1 number per weight: the old solver. No image.

    Hooks:
        `before_run`, `grow`, `before_experience`, `extra_batch`, `base_loss`, `after_experience`

    Options:
        generator: `vae`, a variational autoencoder (as van de Ven and Tolias, 2019), or `wgan`, a Wasserstein GAN with
            gradient penalty (as the paper).
        net: network of the generator, of fully connected (`mlp`) or convolutional (`conv`) layers; each layer of `conv`
            halves the image.
        hidden: widths of the generator's layers, from the image on; null: 400 and 400, or 64 and 128 channels.
        z: number of latent variables.
        prior: prior of the `vae`: the `standard` normal, or one trainable Gaussian for each `class`: then old classes
            are drawn with equal probability, and the class that was drawn is the hard label.
        labels: `hard`, the likeliest old class, or `soft`, distillation of the old solver's answers among all classes
            that take part in the loss, of which the new ones have a share of 0. Van de Ven and Tolias multiply the soft
            loss by T^2, which is left out here.
        temperature: temperature T of soft labels.
        iterations: iterations of the generator, after each experience; null: as many as the solver took steps in it,
            and 1500 at least: a generator that has not learned its images makes replay worse than none.
        lr: learning rate of the generator's Adam; null: 1e-3 for `vae`, 1e-4 for `wgan`. Adam's state is kept between
            experiences if `train.keep_optimizer`.
        critic_steps: steps of the critic of `wgan`, in each iteration.
        fresh: whether a new generator is trained after each experience, as the paper does, rather than on from the last
            one's weights.
    """

    name = "generative-replay"
    family = "generative and data-free replay"
    state = ("generator", "solver", "begun")
    replays = True
    citation = "Shin, Lee, Kim, Kim, Continual learning with deep generative replay, NIPS 2017"

    def __init__(
        self,
        *,
        generator: Literal["vae", "wgan"] = "vae",
        net: Net = "mlp",
        hidden: list[Count] | None = None,
        z: Count = 100,
        prior: Literal["standard", "class"] = "standard",
        labels: Literal["hard", "soft"] = "hard",
        temperature: Positive = 2.0,
        iterations: Count | None = None,
        lr: Positive | None = None,
        critic_steps: Count = 5,
        fresh: bool = False,
    ) -> None:
        self.generator_options = GeneratorOptions(generator, net, hidden, z, prior, critic_steps)
        self.labels = labels
        self.temperature = temperature if labels == "soft" else None
        self.iterations = iterations
        self.lr = lr
        self.fresh = fresh
        self.solver: IncrementalNet | None = None  # H_{t-1}
        self.begun = 0  # steps of the run before the experience

    def owns(self, hook: str) -> bool:
        """Return whether the base loss is replaced: with soft labels (and for several heads, see `problems`)."""
        return hook != "base_loss" or self.labels == "soft"

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence for images that the generator cannot make, or a second plugin that owns the base loss."""
        yield from self.generator_options.problems(run.scenario.input_shape, self.name)
        if self.labels == "soft":
            yield from single_class_problems(run)
        if self.labels == "hard" and self._scores_heads(run):
            yield from compose.owner_problems(run.plugins, "base_loss", also=self)

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Build the generator."""
        shape = run.scenario.input_shape
        rng = run.rng(self.name)

        def build() -> GenerativeModel:
            return self.generator_options.build(shape, len(run.scenario.class_names), rng).to(run.device)

        self.generator = Rehearsal(build, run.scenario.transform.scale, self.lr)

    @hookimpl
    def grow(self, run: Run) -> None:
        """Extend the generator to the run's classes: an extended run has more than it began with."""
        self.generator.grow(len(run.scenario.class_names), run.rng(self.name))

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Check that pixel values are in the range of the generator's sigmoid output."""
        self.begun = run.total_steps
        check_range(experience.train, run.scenario.transform.scale, self.name)

    @hookimpl
    def extra_batch(self, run: Run, batch: Batch) -> Batch | None:
        """Return images of the generator, labeled by the old solver; None in the first experience."""
        if self.solver is None:
            return None
        n = len(batch)
        old = len(run.previous_classes)
        rng = run.rng(self.name)
        images, drawn = self.generator.recall(n, old, rng)
        share = run.experience.index * batch.weight.sum() / n  # all rows together weigh t - 1 times the batch
        rows = run.batch(ImageData(images, torch.zeros_like(batch.y), weight=share.expand(n)), rng)
        with torch.no_grad():
            q = self.solver(rows.x).logits[:, :old]
        rows.y = q.argmax(1) if drawn is None or self.labels == "soft" else drawn
        rows.task = run.task_of(rows.y)
        if self.labels == "soft" or self._scores_heads(run):  # with a score of -inf, a class has the share 0
            rows.targets[self.name] = functional.pad(q, (0, run.model.n_classes - old), value=-torch.inf)
        return rows

    @hookimpl
    def base_loss(self, run: Run, batch: Batch, outputs: Outputs) -> Tensor | None:
        """Return the loss with soft labels, or over several heads; None where the default loss is used."""
        if self.name not in batch.targets:
            return None
        q = batch.targets[self.name]
        z = outputs.logits
        groups = run.old_heads if run.logits == "own" else [range(z.shape[1])]
        # loss(x', H_{t-1}(x')), the mean over the old heads where each task has its own
        replayed = soft_cross_entropy_per_group(q, z, groups, self.temperature) / len(groups)
        others = functional.cross_entropy(masked(z, run.mask(batch.task)), batch.y, reduction="none")
        return batch.mean(torch.where(run.rows_from(self, batch), replayed, others))

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Train the generator, copy the solver, and log how good both are."""
        data = experience.train.to(run.device)
        share = 1 / (experience.index + 1)
        iterations = self.iterations or max(LEAST_ITERATIONS, run.total_steps - self.begun)
        values = self.generator.rehearse(run, self.name, data, share, iterations, fresh=self.fresh)
        self.solver = snapshot(run.model)

        seen = len(set(run.previous_classes).union(experience.classes))
        images, drawn = self.generator.recall(CHECKED, seen, run.rng(self.name))
        if images.dim() == 4:
            run.log_images(self.name, images[:SHOWN])
        if drawn is not None:
            with torch.no_grad():
                answers = self.solver(run.batch(ImageData(images, drawn)).x).logits[:, :seen].argmax(1)
            values["agreement"] = (answers == drawn).float().mean().item()
        run.log({f"{self.name}/{name}": value for name, value in values.items()})

    def _scores_heads(self, run: Run) -> bool:
        """Return whether every old head scores each replayed image."""
        return run.logits == "own" and (self.labels == "soft" or self.generator_options.prior == "standard")
