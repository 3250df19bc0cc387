"""Training of generative models on one set of images after another, beside samples of their own copies."""

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
    """A generative model that learns one set of images after another, and rehearses those that it learnt before.

    Beside the new images it learns those of its own copy from before the set. A checkpoint holds it as any module, in
    the middle of a set, too.

    Args:
        build: gives a new model.
        scale: the raw value of images that becomes 1.
        lr: of the model's Adam; None: the source's.

    Attributes:
        model: the generative model.
        previous: its copy from before the latest set, frozen.
        losses: of the latest iteration.
        met: labels of the images that it rehearsed: a class without images is never drawn; None: that is not known, as
            of a checkpoint of an earlier clframe, and any class is.
    """

    met: list[int] | None

    def __init__(self, build: Callable[[], GenerativeModel], scale: float, lr: float | None = None) -> None:
        super().__init__()
        self.model = build()
        self.previous = copy.deepcopy(self.model).requires_grad_(False)
        self.build, self.scale, self.lr = build, scale, lr
        self.optimizer = self.model.optimizer(lr)
        self.losses: dict[str, Tensor] = {}
        self.met = []
        self.left = torch.empty(0, dtype=torch.int64)  # positions of images that are yet to be met

    def recall(self, n: int, among: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """`n` raw images, and the classes that they were drawn of, any of the first `among`; None: it knows none."""
        y = self._draw_classes(n, among, generator)
        return self.model.sample(n, generator, y) * self.scale, y

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Know of so many classes, if it knows any; where there are new ones, the optimizer begins anew."""
        before = self.model.classes
        for model in (self.model, self.previous):
            model.grow(classes, generator)
        if self.model.classes != before:
            self.optimizer = self.model.optimizer(self.lr)

    def begin(self, fresh: bool = False, keep_optimizer: bool = False) -> None:
        """A new set of images comes: the model as it is now is the previous one.

        It goes on from its weights, or from `fresh` ones; its optimizer's state is kept with them if `keep_optimizer`.
        """
        self.previous.load_state_dict(self.model.state_dict())
        if fresh:
            self.model.load_state_dict(self.build().state_dict())
        if fresh or not keep_optimizer:
            self.optimizer = self.model.optimizer(self.lr)

    def learn(self, data: ImageData, share: float, batch_size: int, old: int, generator: torch.Generator) -> None:
        """One iteration on `batch_size` images of `data`, which come in random order, and as many of the previous copy.

        Args:
            data: the set, raw, where the model is.
            share: of the new images in the loss; the rest is the others'. 1: there are no others.
            batch_size: of each kind.
            old: number of classes that the previous copy learnt; it is asked for any of them.
            generator: on the CPU, of all randomness.
        """
        n = min(batch_size, len(data))

        def draw() -> Mixture:
            if len(self.left) < n:
                self.left = torch.randperm(len(data), generator=generator)
            where, self.left = self.left[:n], self.left[n:]
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
        """A whole set, in so many ticks of the plugin `owner`, between which the run can be saved; the latest losses.

        Raises `RunError`, naming `owner`, if these are not finite.
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
        """The set is learnt: the latest losses. Raises `RunError`, naming `owner`, if they are not finite."""
        self.left = self.left[:0]
        losses = {name: value.item() for name, value in self.losses.items()}
        if not all(map(math.isfinite, losses.values())):
            raise RunError(
                f"The generator of `{owner}` diverged, its losses are {losses}: a smaller learning rate, "
                "or another net, may keep them finite."
            )
        return losses

    def _draw_classes(self, n: int, among: int, generator: torch.Generator) -> Tensor | None:
        """`n` labels, any of the first `among` classes of which there were images; None: the model knows no classes."""
        met = [label for label in self.met or range(among) if label < among]
        y = self.model.draw_classes(n, len(met), generator)
        return None if y is None else torch.tensor(met, device=y.device)[y]

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict holds beside both models."""
        return {"optimizer": self.optimizer.state_dict(), "losses": self.losses, "left": self.left, "met": self.met}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_extra_state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.left, self.met = dict(state["losses"]), state["left"], state.get("met")


@dataclass(frozen=True)
class GeneratorOptions:
    """A generative model as options of a plugin describe it.

    Attributes:
        generator: `VAE` or `WGAN`.
        net, hidden, z, critic_steps: as these have them.
        prior: whether the autoencoder has a Gaussian for each class.
    """

    generator: Literal["vae", "wgan"] = "vae"
    net: Net = "mlp"
    hidden: Sequence[int] | None = None
    z: int = 100
    prior: Literal["standard", "class"] = "standard"
    critic_steps: int = 5

    def build(self, shape: Sequence[int], classes: int, generator: torch.Generator) -> GenerativeModel:
        """A model for images of `shape` and so many classes, on the CPU, with weights that `generator` decides."""
        with initialized_by(generator):
            if self.generator == "wgan":
                return WGAN(shape, self.net, self.hidden, self.z, self.critic_steps)
            return VAE(shape, self.net, self.hidden, self.z, classes if self.prior == "class" else None)

    def problems(self, shape: Sequence[int], owner: str) -> Iterator[str]:
        """A sentence for each reason why `owner`, which has options of these names, cannot have it."""
        if self.hidden is not None and not self.hidden:
            yield f"`{owner}.hidden` is empty: the generator needs the width of one layer at least."
        elif self.net == "conv":
            yield from conv_problems(shape, len(self.hidden or DEFAULT_WIDTHS[self.net]), f"`{owner}.net=conv`")
        if self.generator == "wgan" and self.prior == "class":
            yield f"`{owner}.prior=class` is one of the autoencoder's: set `{owner}.generator=vae`."
