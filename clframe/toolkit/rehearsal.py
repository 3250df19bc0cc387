"""Generative rehearsal: a generative model is trained on new images and on samples of its own earlier copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from clframe.data.batch import ImageData
from clframe.errors import RunError
from clframe.model import initialized_by
from clframe.toolkit.generators import DEFAULT_WIDTHS, VAE, WGAN, GenerativeModel, Mixture, Net, conv_problems, mix

if TYPE_CHECKING:
    from clframe.context import Run


class Rehearsal(nn.Module):
    """A generative model that learns one set of images after another, and rehearses the earlier sets.

    Besides the new images, the model learns samples of its own copy from before the set. A checkpoint stores it like
    any module, in the middle of a set, too.

    Args:
        build: builds a new model.
        scale: the raw value of images that becomes 1.
        lr: learning rate of the model's Adam; None: the rate of the source.

    Attributes:
        model: the generative model.
        previous: the copy of the model from before the latest set, frozen.
        losses: the losses of the latest iteration.
        left: positions of the images that are not drawn yet in this pass through the set.
        met: labels of the images learned so far, as a class without images must not be drawn; None: not known, after a
            checkpoint of an earlier clframe, so that all classes are drawn.
    """

    met: list[int] | None

    def __init__(self, build: Callable[[], GenerativeModel], scale: float, lr: float | None = None) -> None:
        super().__init__()
        self.model = build()
        self.previous = copy.deepcopy(self.model).requires_grad_(False)
        self.build = build
        self.scale = scale
        self.lr = lr
        self.optimizer = self.model.optimizer(lr)
        self.losses: dict[str, Tensor] = {}
        self.met = []
        self.left = torch.empty(0, dtype=torch.int64)

    def recall(self, n: int, among: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Sample `n` raw images, and return them with their classes, drawn among the first `among`.

        Args:
            n: number of images.
            among: number of classes to draw from.
            generator: on the CPU.

        Returns:
            images [n, *shape], and labels [n] int64, or None if the model has no classes.
        """
        y = self._draw_classes(n, among, generator)
        return self.model.sample(n, generator, y) * self.scale, y

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Extend a conditional model to `classes` classes; if there are new ones, the optimizer starts again."""
        before = self.model.classes
        for model in (self.model, self.previous):
            model.grow(classes, generator)
        if self.model.classes != before:
            self.optimizer = self.model.optimizer(self.lr)

    def begin(self, fresh: bool = False, keep_optimizer: bool = False) -> None:
        """Begin a new set of images: the model as it is now becomes the previous one.

        Args:
            fresh: train from new weights, not from the present ones.
            keep_optimizer: keep the state of the optimizer, if the weights are kept.
        """
        self.previous.load_state_dict(self.model.state_dict())
        if fresh:
            self.model.load_state_dict(self.build().state_dict())
        if fresh or not keep_optimizer:
            self.optimizer = self.model.optimizer(self.lr)

    def learn(self, data: ImageData, share: float, batch_size: int, old: int, generator: torch.Generator) -> None:
        """Train for one iteration on images of `data`, in random order, and as many samples of the previous copy.

        Args:
            data: the set, with raw images, on the model's device.
            share: share of the new images in the loss; the samples have the rest. 1: there are no samples.
            batch_size: number of images of each kind.
            old: number of classes that the previous copy learned, among which the samples' classes are drawn.
            generator: on the CPU, for all random numbers.
        """
        n = min(batch_size, len(data))

        def draw() -> Mixture:
            if len(self.left) < n:
                self.left = torch.randperm(len(data), generator=generator)
            where = self.left[:n]
            self.left = self.left[n:]
            rows = data.rows(where.to(data.device))
            new = rows.x.float() / self.scale, rows.y if self.model.classes else None, share
            if share == 1:
                return mix(new)
            y = self._draw_classes(n, old, generator)
            return mix(new, (self.previous.sample(n, generator, y), y, 1 - share))

        self.losses = self.model.step(self.optimizer, draw, generator)

    def rehearse(
        self, run: Run, owner: str, data: ImageData, share: float, iterations: int, *, fresh: bool = False
    ) -> dict[str, float]:
        """Train on a whole set, and return the latest losses; the run can be saved between two iterations.

        Args:
            run: the run.
            owner: name of the plugin, for its random numbers and its progress.
            data: the set, with raw images, on the model's device.
            share: see `learn`.
            iterations: number of iterations, each of which is a tick of the plugin.
            fresh: see `begin`.

        Raises:
            RunError: if the losses are not finite; the sentence names `owner`.
        """
        ticks = run.ticks(owner, iterations, resumable=True)
        if ticks.start == 0:
            self.begin(fresh, run.settings.keep_optimizer)
        for _ in ticks:
            self.learn(data, share, run.settings.batch_size, len(run.previous_classes), run.rng(owner))
        if self.met is not None:
            self.met = sorted({*self.met, *data.y.tolist()})
        return self.end(owner)

    def end(self, owner: str) -> dict[str, float]:
        """End the set, and return the latest losses.

        Raises:
            RunError: if they are not finite; the sentence names the plugin `owner`.
        """
        self.left = self.left[:0]
        losses = {name: value.item() for name, value in self.losses.items()}
        if not all(map(math.isfinite, losses.values())):
            raise RunError(
                f"The generator of `{owner}` diverged, its losses are {losses}: a smaller learning rate, "
                "or another net, may keep them finite."
            )
        return losses

    def _draw_classes(self, n: int, among: int, generator: torch.Generator) -> Tensor | None:
        """Draw `n` labels among the first `among` classes of which there were images; None if it has no classes."""
        met = [label for label in self.met or range(among) if label < among]
        y = self.model.draw_classes(n, len(met), generator)
        return None if y is None else torch.tensor(met, device=y.device)[y]

    def get_extra_state(self) -> dict[str, Any]:
        """Return the content of a state dict besides both models."""
        return {"optimizer": self.optimizer.state_dict(), "losses": self.losses, "left": self.left, "met": self.met}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = dict(state["losses"])
        self.left = state["left"]
        self.met = state.get("met")


@dataclass(frozen=True)
class GeneratorOptions:
    """The options of a plugin that describe its generative model.

    Attributes:
        generator: ``vae`` for a `VAE`, ``wgan`` for a `WGAN`.
        net, hidden, z, critic_steps: see `VAE` and `WGAN`.
        prior: ``class`` for an autoencoder with a Gaussian for each class.
    """

    generator: Literal["vae", "wgan"] = "vae"
    net: Net = "mlp"
    hidden: Sequence[int] | None = None
    z: int = 100
    prior: Literal["standard", "class"] = "standard"
    critic_steps: int = 5

    def build(self, shape: Sequence[int], classes: int, generator: torch.Generator) -> GenerativeModel:
        """Build the model for images of `shape` and `classes` classes on the CPU, with weights drawn by `generator`."""
        with initialized_by(generator):
            if self.generator == "wgan":
                return WGAN(shape, self.net, self.hidden, self.z, self.critic_steps)
            return VAE(shape, self.net, self.hidden, self.z, classes if self.prior == "class" else None)

    def problems(self, shape: Sequence[int], owner: str) -> Iterator[str]:
        """Yield a sentence for each reason why the plugin `owner`, which has options of these names, cannot have it."""
        if self.hidden is not None and not self.hidden:
            yield f"`{owner}.hidden` is empty: the generator needs the width of one layer at least."
        elif self.net == "conv":
            yield from conv_problems(shape, len(self.hidden or DEFAULT_WIDTHS[self.net]), f"`{owner}.net=conv`")
        if self.generator == "wgan" and self.prior == "class":
            yield f"`{owner}.prior=class` is an option of the autoencoder: set `{owner}.generator=vae`."
