"""Memory aware synapses (Aljundi et al., ECCV 2018): a quadratic penalty holds weights that the outputs depend on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from clframe import Batch, Experience, ImageData, Plugin, hookimpl
from clframe.context import Run
from clframe.data.build import read_images
from clframe.options import Count, NonNegative, Search
from clframe.toolkit.importance import ImportanceMean, Quadratic, norm_cotangents, weighted_penalty
from clframe.toolkit.per_sample import GradientSums


class MAS(Plugin):
    """Memory aware synapses: a penalty on changes of weights, scaled by how much the outputs depend on them.

    After an experience Omega += mean over its images of |d ||z||_2^2 / d theta|, with z the logits that take part in
    the loss, of each image by itself, in evaluation mode; L = loss + lambda sum Omega (theta - theta*)^2, with theta*
    the weights after the latest experience. No labels are needed. There is no factor 1/2, and importance is added up,
    not averaged. Under SGD, entries that a step would overshoot count as less
    (`clframe.toolkit.importance.weighted_penalty`).

    `train.clip` is 1 by default, which the papers do not have. The penalty's gradient is clipped with the rest, so that
    published learning rates and strengths do not carry over as they are: `train.clip=0` turns clipping off.

    In class-incremental learning it is level with fine-tuning, as nothing holds old classes against new ones: 19.5 % on
    `split-digits` over seeds 0 to 4 (`benchmarks/defaults.py`), as without it.

    When to use:
        Where importance should come from images without labels, such as those of `mas.images`.

    Keeps:
        2 numbers per weight.

    Hooks:
        `penalty`, `after_experience`

    Options:
        lambda: strength of the penalty. The paper has 1, for the small sensitivities of a large pretrained network; on
            the digits 1 keeps new tasks from being learned (permuted-digits, seed 0: 39 %, at 0.01 56 %).
        form: `global`: the sensitivity of the network's output (section 4.1); `local`: of each layer's own output,
            Omega_ij = mean of F_i F_j, the activities of the units that a weight connects (section 4.3, Hebbian), F_j
            being the ReLU of the layer's output. It covers weights and biases of linear and convolutional layers only.
        samples: images of the experience that the mean is over, drawn at random; null: all of them.
        images: file of images to compute the importance on in place of the experience's own: an .npy array [N, ...] of
            raw images as the data set has them. They need no labels.
        heads: whether the penalty holds the head, too.
    """

    name = "mas"
    family = "regularization"
    state = ("penalties", "mean")
    former_state: ClassVar[dict[str, str]] = {"springs": "penalties"}
    joins = "images"
    citation = "Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars, Memory aware synapses, ECCV 2018"

    def __init__(
        self,
        *,
        lambda_: Annotated[NonNegative, Search(1e-4, 100, log=True)] = 0.01,
        form: Literal["global", "local"] = "global",
        samples: Count | None = None,
        images: Path | None = None,
        heads: bool = False,
    ) -> None:
        self.lambda_ = lambda_
        self.form = form
        self.samples = samples
        self.images = images
        self.heads = heads
        self.penalties = Quadratic()
        self.mean = ImportanceMean()

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if the images of `images` do not have the shape of the scenario's."""
        if self.images is not None:
            shape = tuple(read_images(self.images).shape[1:])
            if shape != run.scenario.input_shape:
                yield (
                    f"The images in `mas.images`, {self.images}, are {shape}, not {run.scenario.input_shape}: bring "
                    "them to that shape."
                )

    @hookimpl
    def penalty(self, run: Run) -> dict[str, Tensor] | None:
        """Return the quadratic penalty; None in the first experience, where there is nothing to protect."""
        if not self.penalties.anchor:
            return None
        # lambda sum Omega (theta - theta*)^2; `Quadratic` has the factor 1/2, which the paper does not have
        return {self.name: weighted_penalty(run, 2 * self.lambda_, self.penalties)}

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Add the importance of this experience, and move the anchor to the current weights."""
        weights = dict(run.model.named_parameters())
        counted = {n: p for n, p in weights.items() if p.requires_grad and (self.heads or not n.startswith("head."))}
        data = experience.train
        if self.images is not None:
            images = read_images(self.images)
            data = ImageData(images, torch.zeros(len(images)), task=experience.task)

        def add(sums: GradientSums, batch: Batch) -> None:
            if self.form == "local":
                sums.add_local(batch.x, batch.task, torch.relu)
            else:
                mask = run.mask(batch.task)
                sums.add(batch.x, batch.task, lambda z: norm_cotangents(z, mask))

        new = self.mean.over(run, self.name, data, self.samples, counted, add, "abs")
        old = self.penalties.precision
        self.penalties.replace(old | {n: old[n] + omega if n in old else omega for n, omega in new.items()}, weights)
