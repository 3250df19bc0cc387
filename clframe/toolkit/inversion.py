"""Dreaming: images made from a trained network alone, from what its batch norms remember of the real ones.

The terms of DeepInversion (Yin et al., CVPR 2020) as pure functions, and `Dreaming`, which moves images
by them. All work in the model's input space, in which images are normalised; `to_raw` leads back to the data set's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from clframe.data.batch import ImageData
from clframe.data.files import RawImages
from clframe.data.transform import Transform
from clframe.errors import RunError
from clframe.model import IncrementalNet, class_mask, initialized_by, masked, snapshot
from clframe.toolkit.distill import kl_divergence
from clframe.training import make_optimizer

if TYPE_CHECKING:
    from clframe.context import Run
    from clframe.plugin import Plugin

NO_SHARE = -1e4  # a logit whose softmax is 0, where -inf would make a gradient that is not a number
SHOWN = 64


class Statistics(NamedTuple):
    """What entered a batch norm in one forward pass.

    Attributes:
        norm: the batch norm, whose running statistics are those of the real images.
        mean: [C], over the batch and, of maps, over space; with a graph to the images.
        var: [C], so; biased, that is, the mean of squares.
    """

    norm: _BatchNorm
    mean: Tensor
    var: Tensor

    @property
    def running(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] of the real images, as the norm kept them."""
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None and var is not None, "`norms_of` has no norm without them"  # noqa: PT018
        return mean, var


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of `model` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def observe_norms(model: nn.Module) -> Iterator[list[Statistics]]:
    """The statistics of what enters each of `norms_of(model)`, in the order of the forward passes inside.

    The hooks are removed at the end, also after an error. The network should be in eval mode: in training, its running
    statistics would move.
    """
    seen: list[Statistics] = []

    def note(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        var, mean = torch.var_mean(args[0], [0, *range(2, args[0].dim())], correction=0)
        seen.append(Statistics(norm, mean, var))

    hooks = [norm.register_forward_pre_hook(note) for norm in norms_of(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def feature_distance(seen: Sequence[Statistics]) -> Tensor:
    """R_feature, how far batch statistics are from the real images'; a scalar.

    sum_l ||mean_l - running_mean_l||_2 + ||var_l - running_var_l||_2. What torch keeps running is the unbiased
    variance: n / (n - 1) times what `seen` would say of the very same images.
    """
    distances = []
    for found in seen:
        mean, var = found.running
        distances.append(torch.linalg.vector_norm(found.mean - mean) + torch.linalg.vector_norm(found.var - var))
    return torch.stack(distances).sum()


def total_variation(x: Tensor) -> Tensor:
    """The L2 norms of the differences of neighbours, horizontal, vertical and along both diagonals; a scalar.

    Each norm is that of the whole batch [B, C, H, W] as one vector, as the authors' code has it, for which their
    weights are made.
    """
    differences = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return torch.stack([torch.linalg.vector_norm(difference) for difference in differences]).sum()


def jensen_shannon(one: Tensor, other: Tensor, temperature: float = 3.0) -> Tensor:
    """JS(p, q) = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats, from 0 to ln 2; [B, C] to [B].

    p and q are the softmaxes of the logits divided by the temperature, 3 in the authors' code. No share is clamped, as
    that would stop gradients. A logit of -inf takes no part; it must do so in both.
    """
    p, q = ((z.masked_fill(z == -torch.inf, NO_SHARE * temperature) / temperature).log_softmax(1) for z in (one, other))
    m = torch.logaddexp(p, q) - math.log(2)
    return (p.exp() * (p - m) + q.exp() * (q - m)).sum(1) / 2


@dataclass(frozen=True)
class InversionTerms:
    """What the terms of `inversion_loss` are multiplied by.

    Attributes:
        feature: of R_feature.
        tv: of the total variation.
        l2: of ||x||_2, the mean over the images of each one's norm.
        compete: of R_compete = 1 - JS, which is low where teacher and rival disagree.
    """

    feature: float = 10.0
    tv: float = 1e-3
    l2: float = 0.0
    compete: float = 0.0


def inversion_loss(
    teacher: IncrementalNet,
    x: Tensor,
    y: Tensor,
    terms: InversionTerms,
    mask: Tensor | None = None,
    rival: IncrementalNet | None = None,
) -> Tensor:
    """CE(z(x), y) + tv TV(x) + l2 ||x||_2 + feature R_feature(x) + compete (1 - JS(z(x), r(x))), a scalar.

    R_DI of Yin et al., and with a rival, their student, R_ADI.

    Args:
        teacher: the network whose images are dreamt, in eval mode and frozen.
        x: normalised images [B, C, H, W].
        y: [B] what they are to be images of.
        weights: of the terms.
        mask: [B, C] the logits that take part of each image; None: all.
        rival: a network with the same head, in eval mode and frozen, that the teacher is to disagree with.
    """
    with observe_norms(teacher) as seen:
        logits = masked(teacher(x).logits, mask)
    loss = functional.cross_entropy(logits, y) + terms.feature * feature_distance(seen)
    if terms.tv:
        loss = loss + terms.tv * total_variation(x)
    if terms.l2:
        loss = loss + terms.l2 * torch.linalg.vector_norm(x.flatten(1), dim=1).mean()
    if rival is not None and terms.compete:
        agreement = 1 - jensen_shannon(logits, masked(rival(x).logits, mask)).mean()
        loss = loss + terms.compete * agreement
    return loss


@torch.no_grad()
def assess_images(teacher: IncrementalNet, x: Tensor, y: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
    """R_feature of the normalised images `x`, and the share of them in which the teacher sees what `y` says."""
    with observe_norms(teacher) as seen:
        logits = masked(teacher(x).logits, mask)
    return feature_distance(seen).item(), (logits.argmax(1) == y).float().mean().item()


def jitter_images(x: Tensor, jitter: int, flip: bool, generator: torch.Generator) -> Tensor:
    """All images [B, C, H, W] rolled by as many pixels, -`jitter` to `jitter` each way, and mirrored every second time.

    The generator is on the CPU.
    """
    down, right = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
    x = x.roll((down, right), (2, 3)) if down or right else x
    return x.flip(3) if flip and torch.rand((), generator=generator) < 0.5 else x


@dataclass(frozen=True)
class DreamOptions:
    """How images are dreamt.

    Attributes:
        weights: of the terms of `inversion_loss`.
        per_class: images of each class.
        iterations: steps of Adam on each image, and of the rival's optimizer after each round.
        lr: learning rate of the images.
        rounds: 1 without a rival. With a rival, the first round has none; in each later round, images are found on
            which the teacher disagrees with the rival, which has learned the images of the rounds before.
        jitter: see `jitter_images`; None: a sixteenth of the smaller side.
        flip: see `jitter_images`; None: as the scenario's augmentation does.
        clip: keep the images within `valid_range`.
        batch_size: images at a time, at most.
        temperature: of the rival's distillation.
        anneal: let the learning rate fall to 0 along half a cosine.
    """

    terms: InversionTerms = field(default_factory=InversionTerms)
    per_class: int = 40
    iterations: int = 200
    lr: float = 0.05
    rounds: int = 1
    jitter: int | None = None
    flip: bool | None = None
    clip: bool = True
    batch_size: int = 256
    temperature: float = 1.0
    anneal: bool = False


class Dreaming(nn.Module):
    """The making of images from a network.

    A checkpoint holds it as any module, so that a plugin that declares it among its state can be stopped between two
    steps. It is empty before and after `of`.

    Attributes:
        x: the images under way, normalised.
        adam: what moves them.
        images: those that are done, raw; None: none are.
        rival, rival_optimizer: the rival's weights and its optimizer, as state dicts; None: there is none.
    """

    x: Tensor | None
    adam: torch.optim.Optimizer | None
    images: ImageData | None
    rival: dict[str, Any] | None
    rival_optimizer: dict[str, Any] | None

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def dream(self, run: Run, name: str, teacher: IncrementalNet, options: DreamOptions) -> ImageData:
        """Dreams of all old classes of `run`, raw, each with the task of its class, and of weight 0.

        R_feature, and the share of dreams that the teacher takes for what they are to be, are logged of noise and of
        dreams.

        Args:
            run: the run, in a hook that is called once an experience.
            name: of the plugin: for its randomness, for progress and for what is logged.
            teacher: the network that has learnt those classes, from `clframe.model.snapshot`.
            options: how.

        Raises:
            RunError: if memory ends; the sentence names the plugin's option ``batch_size``.
        """
        rounds = split_targets(run.previous_classes, options.per_class, options.rounds, options.batch_size)
        with explain_out_of_memory(run, f"{name}.batch_size"):
            for k, parts in enumerate(rounds):
                if k:
                    self._teach_rival(run, name, k, teacher, options)
                self._round(run, name, k, teacher, options, parts)
        images = self.images
        assert images is not None
        self._clear()
        return images

    def begin(self, x: Tensor, lr: float) -> None:
        """Dream from `x` on, of which a copy is made, at this learning rate."""
        self.x = x.detach().clone().requires_grad_()
        self.adam = torch.optim.Adam([self.x], lr=lr)

    def slow_down(self, lr: float, done: float) -> None:
        """Go on at the learning rate that belongs to the share `done` of a half cosine from `lr` to 0."""
        assert self.adam is not None
        for group in self.adam.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * done)) / 2

    def step(self, loss: Callable[[Tensor], Tensor], bounds: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The images after one step down `loss`, a scalar function of them, and back into `bounds`, low and high."""
        assert self.x is not None
        assert self.adam is not None
        self.adam.zero_grad()
        loss(self.x).backward()
        self.adam.step()
        x = self.x.detach()
        return x if bounds is None else x.clamp_(*bounds)

    def _round(
        self, run: Run, name: str, k: int, teacher: IncrementalNet, options: DreamOptions, parts: Sequence[Tensor]
    ) -> None:
        """Dreams of the labels `parts`, one part after the other."""
        generator, transform, shape = run.rng(name), run.scenario.transform, run.scenario.input_shape
        low, high = (bound.to(run.device) for bound in valid_range(transform, run.experience.train.images))
        jitter = min(shape[1:]) // 16 if options.jitter is None else options.jitter
        flip = transform.flip if options.flip is None else options.flip
        rival = self._rival(teacher) if k else None
        n = teacher.n_classes
        tasks = run.task_of(torch.arange(n, device=run.device))
        heads = torch.stack([class_mask(group, n, run.device) for group in run.scenario.classes])
        for i in run.ticks(f"{name}: dreams {k + 1}", len(parts) * options.iterations, resumable=True):
            y = parts[i // options.iterations].to(run.device)
            # where tasks are told, each class is among those of its task, which may be classes of other tasks, too
            mask = heads[tasks[y]] if run.scenario.setting == "task" else None
            if i % options.iterations == 0:
                noise = torch.randn(len(y), *shape, generator=generator).to(run.device)
                self.begin(noise, options.lr)
                self._log(run, name, "noise", assess_images(teacher, noise, y, mask))

            def loss(x: Tensor, y: Tensor = y, mask: Tensor | None = mask) -> Tensor:
                return inversion_loss(teacher, jitter_images(x, jitter, flip, generator), y, options.terms, mask, rival)

            if options.anneal:
                self.slow_down(options.lr, i % options.iterations / options.iterations)
            x = self.step(loss, (low, high) if options.clip else None)
            if (i + 1) % options.iterations == 0:
                self._log(run, name, "dreams", assess_images(teacher, x, y, mask))
                done = ImageData(to_raw(x, transform), y, task=tasks[y], weight=0.0)
                self.images = ImageData.concat([done] if self.images is None else [self.images, done])

    def _teach_rival(self, run: Run, name: str, k: int, teacher: IncrementalNet, options: DreamOptions) -> None:
        """Distil the teacher, on the dreams so far, into the rival, as the run trains its own network."""
        assert self.images is not None
        generator = run.rng(name)
        ticks = run.ticks(f"{name}: rival {k}", options.iterations, resumable=True)
        rival = reinitialized_copy(teacher, generator) if self.rival is None else self._rival(teacher)
        rival.train().requires_grad_(True)
        optimizer = make_optimizer(dict(rival.named_parameters()), run.settings)
        if ticks.start and self.rival_optimizer is not None:
            optimizer.load_state_dict(self.rival_optimizer)
        size = min(len(self.images), run.settings.batch_size)
        for _ in ticks:
            where = torch.randint(len(self.images), (size,), generator=generator).to(run.device)
            x = run.batch(self.images.rows(where)).x
            with torch.no_grad():
                q = teacher(x).logits
            optimizer.zero_grad()
            kl_divergence(q, rival(x).logits, options.temperature).mean().backward()
            optimizer.step()
            self.rival, self.rival_optimizer = rival.state_dict(), optimizer.state_dict()

    def _rival(self, teacher: IncrementalNet) -> IncrementalNet:
        rival = snapshot(teacher)
        assert self.rival is not None
        rival.load_state_dict(self.rival)
        return rival

    @staticmethod
    def _log(run: Run, name: str, of: str, found: tuple[float, float]) -> None:
        run.log({f"{name}/feature/{of}": found[0], f"{name}/accuracy/{of}": found[1]})

    def _clear(self) -> None:
        self.x = self.adam = self.images = self.rival = self.rival_optimizer = None

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict holds."""
        about = {name: getattr(self, name) for name in ("images", "rival", "rival_optimizer")}
        x, adam = self.x, self.adam
        return {"x": x if x is None else x.detach(), "adam": adam if adam is None else adam.state_dict(), **about}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_extra_state` gave."""
        self._clear()
        if state["x"] is not None:
            self.begin(state["x"], 0.0)
            assert self.adam is not None
            self.adam.load_state_dict(state["adam"])
        for name in ("images", "rival", "rival_optimizer"):
            setattr(self, name, state[name])


def to_raw(x: Tensor, transform: Transform) -> Tensor:
    """Normalised images [B, C, ...] as float32 ones in the units of the data set: undoes ``transform.normalize``."""
    if transform.mean:
        mean, std = torch.tensor((transform.mean, transform.std), device=x.device).view(2, -1, *[1] * (x.dim() - 2))
        x = x * std + mean
    return x * transform.scale


def valid_range(transform: Transform, images: RawImages) -> tuple[Tensor, Tensor]:
    """The lowest and the highest normalised value of each channel, [C, 1, 1] twice.

    Raw, they are 0 and the transform's scale, or what occurs in the raw `images` [N, C, H, W] where that is more.
    """
    least, most = images.aminmax()
    lowest, highest = min(0.0, least.item()), max(transform.scale, most.item())
    low, high = transform.normalize(
        torch.tensor([[lowest], [highest]], device=images.device).expand(2, images.shape[1])[:, :, None, None]
    )
    return low, high


def split_targets(classes: Sequence[int], per_class: int, rounds: int, batch_size: int) -> list[list[Tensor]]:
    """The labels of `per_class` dreams of each class: for each round, parts [<= batch_size] of nearly equal size.

    Classes take turns, so that every part is balanced, as its statistics are to be those of all images.
    """
    labels = torch.tensor(classes).repeat(per_class)
    return [
        list(some.tensor_split(math.ceil(len(some) / batch_size))) for some in labels.tensor_split(rounds) if len(some)
    ]


def reinitialize(model: nn.Module, generator: torch.Generator) -> None:
    """Give the layers of `model` the weights that they begin with, from a seed that `generator`, on the CPU, draws."""
    with initialized_by(generator, next(model.parameters()).device):
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()


def reinitialized_copy(model: IncrementalNet, generator: torch.Generator) -> IncrementalNet:
    """A copy of `model` that has learnt nothing; see `reinitialize`."""
    copied = snapshot(model)
    reinitialize(copied, generator)
    return copied


def select_preview(images: ImageData, most: int = SHOWN) -> Tensor:
    """As many of the images as `most`, of each class as many as of any other, class by class: what people are shown."""
    classes = images.y.unique().tolist()
    each = max(1, most // len(classes))
    where = [(images.y == c).nonzero().flatten()[:each] for c in classes[:most]]
    return images.x[torch.cat(where)]


def dreaming_problems(run: Run, plugin: Plugin) -> Iterator[str]:
    """Reasons why `plugin` cannot dream in this run."""
    shape = run.scenario.input_shape
    if len(shape) != 3:
        yield (
            f"`{plugin.name}` dreams images [channels, height, width], and those of the scenario are {list(shape)}: "
            "choose a scenario of images."
        )
    elif not norms_of(run.model.backbone):
        yield (
            f"`{plugin.name}` dreams from the running statistics of batch norms, and the backbone has none: choose a "
            "model that has, such as cnn-small, resnet32 or resnet18."
        )


@contextmanager
def explain_out_of_memory(run: Run, option: str) -> Iterator[None]:
    """Raises `RunError`, which says that a smaller `option` needs less, where memory ends inside."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not full and not re.search("out of memory|allocate memory|enough memory", str(error)):  # as the CPU says it
            raise
        raise RunError(
            f"Out of memory on {run.device} while dreaming for {run.progress_label}: a smaller `{option}` needs less."
        ) from error
