"""iCaRL (Rebuffi et al., CVPR 2017): exemplars by herding, sigmoid distillation, the nearest mean of exemplars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe import Batch, Experience, ImageData, IncrementalNet, Outputs, Plugin, hookimpl, snapshot
from clframe.context import Run
from clframe.evaluate import NearestMean
from clframe.options import Count, Positive
from clframe.toolkit.distill import incremental_bce
from clframe.toolkit.memory import balanced, draw, herding, quota, too_small


class ICaRL(Plugin):
    """iCaRL: exemplars chosen by herding, sigmoid distillation, and classification by the nearest mean of exemplars.

    L = binary cross-entropy of sigmoid outputs, averaged over all outputs: the target is the old network's sigmoid for
    old classes, exemplars included, and else 1 for the label and 0 for the others (algorithm 3). The paper has no class
    that comes back: for images of the experience the columns of its own classes have the targets 1 and 0. After it each
    class seen keeps m = ceil(K / classes) images, old ones the first of theirs, new ones chosen by herding on
    normalized features (algorithms 4 and 5). An image gets the class whose mean is nearest to its normalized feature
    (algorithm 1).

    New images and exemplars share one forward pass, so that batch norms normalize both together. `train.clip` is 1 by
    default, which the paper does not have, so that its learning rate of 2 does not carry over: `train.clip=0` turns
    clipping off.

    Three habits of other codes raise the figures on digits and MNIST: `icarl.batch_size` draws exemplars for each batch
    instead of adding them to the training images, `icarl.temperature` softens the targets, and `icarl.outputs=seen`
    leaves out classes to come.

    When to use:
        Where classes come a few at a time.

    Keeps:
        `icarl.size` images, and 1 number per weight: the old network.

    Hooks:
        `extra_data`, `extra_batch`, `base_loss`, `after_experience`, `predictor`

    Options:
        size: K, images in the memory, of all classes together; rounding up may add one for each class.
        per_class: images of each class, in place of `size`.
        batch_size: exemplars drawn beside each batch; null: they join the training images, as in the paper.
        outputs: outputs that have a target from the start: `all`, as in the paper, or only those of the classes `seen`.
        temperature: temperature of the old network's outputs in the targets: sigma(z / T). 1 in the paper; van de Ven
            and Tolias (2019) have 2, and the outputs seen.
        read_out: rule of classification: `nme`: the nearest mean of exemplars; `output`: the network's outputs (hybrid1
            in the paper); `ncm`: the nearest mean of all training images, an oracle that keeps them all.
        flip: whether the means are averaged with those of mirrored images; null: where training mirrors them.
    """

    name = "icarl"
    family = "rehearsal"
    state = ("exemplars", "teacher", "means")
    predictor_state = ("means",)
    serves = ("class",)
    replays = True
    keeps_images = True
    memory_options = ("size", "per_class")
    citation = "Rebuffi, Kolesnikov, Sperl, Lampert, iCaRL: Incremental classifier and representation learning, 2017"

    def __init__(
        self,
        *,
        size: Count = 2000,
        per_class: Count | None = None,
        batch_size: Count | None = None,
        outputs: Literal["all", "seen"] = "all",
        temperature: Positive = 1.0,
        read_out: Literal["nme", "output", "ncm"] = "nme",
        flip: bool | None = None,
    ) -> None:
        self.size = size
        self.per_class = per_class
        self.batch_size = batch_size
        self.outputs = outputs
        self.temperature = temperature
        self.read_out = read_out
        self.flip = flip
        self.keeps_experiences = read_out == "ncm"
        self.form = read_out
        self.exemplars: ImageData | None = None
        self.teacher: IncrementalNet | None = None
        self.means: Tensor | None = None

    def owns(self, hook: str) -> bool:
        """Return False for `predictor` if the network's own outputs classify (`read_out=output`)."""
        return hook != "predictor" or self.read_out != "output"

    def wanted_logits(self, run: Run) -> str:
        """Return `outputs`: in the paper all outputs have a target, also those of classes to come."""
        return self.outputs

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if the memory has no room for an exemplar of each class."""
        if self.per_class is None:
            yield from too_small(self.size, sum(map(len, run.scenario.classes)), "icarl.size")

    @hookimpl
    def extra_data(self) -> ImageData | None:
        """Return the exemplars, which join the training images, unless they are drawn for each batch."""
        return None if self.batch_size else self.exemplars

    @hookimpl
    def extra_batch(self, run: Run) -> Batch | None:
        """Return a batch of exemplars if `batch_size` is set; else None."""
        if self.exemplars is None or not self.batch_size:
            return None
        rng = run.rng(self.name)
        return run.batch(draw(self.exemplars, self.batch_size, rng), rng)

    @hookimpl
    def base_loss(self, run: Run, batch: Batch, outputs: Outputs) -> Tensor:
        """Return the binary cross-entropy against labels and old outputs (algorithm 3)."""
        old = None
        if self.teacher is not None:
            with torch.no_grad():
                old = self.teacher(batch.x, batch.task).logits[:, : len(run.previous_classes)]
        hard = run.labeled_columns(batch)
        return batch.mean(incremental_bce(outputs.logits, batch.y, old, self.temperature, hard))

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Reduce the old exemplar sets (algorithm 5), choose new ones (algorithm 4), and copy the network."""
        groups = sum(map(len, run.scenario.classes[: experience.index + 1]))  # a class that came twice has two groups
        count = self.per_class or quota(self.size, groups, ceil=True)
        new = experience.train.to(run.device)
        self.exemplars = balanced(self.exemplars, new, count, lambda rows, m: herding(unit_features(run, rows), m))
        self.teacher = snapshot(run.model)

    @hookimpl
    def predictor(self, run: Run) -> nn.Module | None:
        """Return the nearest-mean classifier, with means of the current features; None if `read_out` is `output`."""
        if self.read_out == "output":
            return None
        if not run.is_loaded and (self.teacher is not None or run.total_steps):  # a loaded run came with its means
            self.means = self.class_means(run)
        return NearestMean(run.model, self.means)

    def class_means(self, run: Run) -> Tensor:
        """Return the mean of each class seen, of length 1, [C, D]; within an experience, over all its images."""
        if self.read_out == "ncm":
            # after its end, the experience is also among the earlier ones
            earlier = [e for e in run.earlier if e.index != run.experience.index]
            rows = ImageData.concat([e.train.to(run.device) for e in (*earlier, run.experience)])
        else:
            parts = [] if self.exemplars is None else [self.exemplars]
            if self.exemplars is None or run.steps_in_phase:  # before the experience has exemplars
                parts.append(run.experience.train.to(run.device))
            rows = ImageData.concat(parts)
        flips = run.scenario.transform.flip if self.flip is None else self.flip
        views = [unit_features(run, rows, mirrored=mirrored) for mirrored in ([False, True] if flips else [False])]
        classes = range(int(rows.y.max()) + 1)
        means = [torch.stack([view[rows.y == c].mean(0) for c in classes]) for view in views]
        return functional.normalize(torch.stack(means).mean(0), dim=1)


def unit_features(run: Run, rows: ImageData, *, mirrored: bool = False) -> Tensor:
    """Return features of length 1, [N, D], in evaluation mode, of the images as they are or mirrored left to right."""
    return functional.normalize(run.features(rows, mirrored=mirrored), dim=1)
