"""A-GEM (Chaudhry et al., ICLR 2019): no step may raise, on average, the loss on what is remembered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from clframe import Experience, ImageData, Plugin, hookimpl
from clframe.context import Run
from clframe.options import Count
from clframe.toolkit.memory import draw, reservoir, too_small


def project(gradient: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Tensor]:
    """`gradient` as it is where it agrees with `reference`, else without its part along it.

    g~ = g - (g' g_ref / g_ref' g_ref) g_ref where g' g_ref < 0 (equation 11), over all tensors as one vector. Nothing
    is read back from the device.
    """
    dot = sum(((g * r).sum() for g, r in zip(gradient, reference, strict=True)), torch.tensor(0.0))
    square = sum((r.square().sum() for r in reference), torch.tensor(0.0))
    part = (dot / square.clamp(min=torch.finfo(square.dtype).tiny)).clamp(max=0)
    return [g - part * r for g, r in zip(gradient, reference, strict=True)]


class AGEM(Plugin):
    """Projects the gradient so that the loss on a batch of the memory does not grow.

    The memory is a uniform sample of all images of earlier experiences; the paper keeps the same number of each class.
    What is projected is the gradient of the whole loss: a penalty of another method must not raise the loss on the
    memory either.

    Options:
        size: images in the memory, of all classes together.
        batch_size: images of the memory that give the reference gradient of a step.
    """

    name = "a-gem"
    hook_api = 1
    state = ("kept", "seen")
    keeps_images = True
    citation = "Chaudhry, Ranzato, Rohrbach, Elhoseiny, Efficient lifelong learning with A-GEM, ICLR 2019"

    def __init__(self, *, size: Count = 200, batch_size: Count = 64) -> None:
        self.size, self.batch_size = size, batch_size
        self.kept: ImageData | None = None
        self.seen = 0

    def problems(self, run: Run) -> Iterable[str]:
        """There must be room for each class."""
        return too_small(self.size, max(map(max, run.scenario.classes)) + 1, "a-gem.size")

    @hookimpl
    def after_backward(self, run: Run) -> None:
        """Project, once there is a memory."""
        if self.kept is None:
            return
        rng = run.rng(self.name)
        batch = run.batch(draw(self.kept, self.batch_size, rng), rng)
        weights = [p for p in run.model.parameters() if p.requires_grad]
        loss = run.loss(batch, run.model(batch.x, batch.task))
        reference = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        for weight, projected in zip(weights, project(gradient, reference), strict=True):
            weight.grad = projected

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Images of this experience may enter the memory."""
        rows = experience.train.to(run.device)
        self.kept = reservoir(self.kept, rows, self.seen, self.size, run.rng(self.name))
        self.seen += len(rows)
