"""Model inversion: images optimized from noise through a trained network, for data-free replay.

Such images are called *dreams*, as in the paper's title. The terms of DeepInversion (Yin et al., Dreaming to distill,
CVPR 2020), which use the running statistics of batch norms, are pure functions; `Dreaming` optimizes images by them.
All work in the input space of the model, in which images are normalized; `to_raw` returns to that of the data set.
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

NO_SHARE = -1e4  # a logit whose softmax is 0; -inf would make the gradient NaN
SHOWN = 64  # images at most that are logged


class Statistics(NamedTuple):
    """The statistics of the input of a batch norm in one forward pass.

    Attributes:
        norm: the batch norm, whose running statistics are those of the real images.
        mean: [C], over the batch and, for maps, over space; with a graph to the images.
        var: [C], over the same; biased, that is, the mean of the squared deviations.
    """

    norm: _BatchNorm
    mean: Tensor
    var: Tensor

    @property
    def running(self) -> tuple[Tensor, Tensor]:
        """Return the running mean and variance [C] of the norm: those of the real images."""
        mean = self.norm.running_mean
        var = self.norm.running_var
        assert mean is not None and var is not None, "`norms_of` has no norm without them"  # noqa: PT018
        return mean, var


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of `model` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def observe_norms(model: nn.Module) -> Iterator[list[Statistics]]:
    """Collect the statistics of the inputs of `norms_of(model)`, in the order of the forward passes in the block.

    The hooks are removed at the end, also after an error. The network should be in evaluation mode: in train mode, its
    running statistics would change.
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
    """Compute R_feature, the distance of batch statistics from those of the real images; a scalar.

    It is sum_l ||mean_l - running_mean_l||_2 + ||var_l - running_var_l||_2. The running variance of torch is unbiased:
    n / (n - 1) times the variance in `seen` for the same images.

    Args:
        seen: statistics of at least one batch norm, from `observe_norms`.
    """
    distances = []
    for found in seen:
        mean, var = found.running
        distances.append(torch.linalg.vector_norm(found.mean - mean) + torch.linalg.vector_norm(found.var - var))
    return torch.stack(distances).sum()


def total_variation(x: Tensor) -> Tensor:
    """Sum the L2 norms of the differences of adjacent pixels: horizontal, vertical and along both diagonals; a scalar.

    Each norm is that of the whole batch [B, C, H, W] as one vector, as in the authors' code, for which their weights
    were chosen.
    """
    differences = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return torch.stack([torch.linalg.vector_norm(difference) for difference in differences]).sum()


def jensen_shannon(one: Tensor, other: Tensor, temperature: float = 3.0) -> Tensor:
    """Compute JS(p, q) = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats, from 0 to ln 2; [B, C] to [B].

    p and q are the softmaxes of the logits divided by the temperature, 3 in the authors' code. No probability is
    clamped, as that would stop gradients. A logit of -inf takes no part; it must be -inf in both.

    Args:
        one, other: logits [B, C].
        temperature: above 0.
    """

    def log_softmax(z: Tensor) -> Tensor:
        finite = z.masked_fill(z == -torch.inf, NO_SHARE * temperature)
        return (finite / temperature).log_softmax(1)

    log_p = log_softmax(one)
    log_q = log_softmax(other)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1) / 2


@dataclass(frozen=True)
class InversionTerms:
    """The factors of the terms of `inversion_loss`.

    Attributes:
        feature: factor of R_feature.
        tv: factor of the total variation.
        l2: factor of ||x||_2, the mean norm of the images.
        compete: factor of R_compete = 1 - JS, which is low where teacher and rival disagree.
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
    """Compute CE(z(x), y) + tv TV(x) + l2 ||x||_2 + feature R_feature(x) + compete (1 - JS(z(x), r(x))), a scalar.

    This is R_DI of Yin et al.; with a rival, which is their student, it is R_ADI.

    Args:
        teacher: z, the network to invert, in evaluation mode and frozen.
        x: normalized images [B, C, H, W].
        y: [B] the labels that the images are optimized for.
        terms: the factors.
        mask: [B, C] bool, the logits that take part for each image; None: all.
        rival: r, a network with the same head, in evaluation mode and frozen, with which the teacher is to disagree.
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
    """Return R_feature of the images, and the share of them that the teacher classifies as `y`.

    Args:
        teacher: the network that was inverted, in evaluation mode.
        x: normalized images [B, C, H, W].
        y: [B] labels.
        mask: [B, C] bool, the logits that take part for each image; None: all.
    """
    with observe_norms(teacher) as seen:
        logits = masked(teacher(x).logits, mask)
    return feature_distance(seen).item(), (logits.argmax(1) == y).float().mean().item()


def jitter_images(x: Tensor, jitter: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift all images of a batch by the same random number of pixels, and mirror them half of the time.

    Args:
        x: images [B, C, H, W].
        jitter: the largest shift in each direction; pixels that leave at one side return at the other.
        flip: mirror the images with probability 1/2.
        generator: on the CPU.
    """
    down, right = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
    if down or right:
        x = x.roll((down, right), (2, 3))
    return x.flip(3) if flip and torch.rand((), generator=generator) < 0.5 else x


@dataclass(frozen=True)
class DreamOptions:
    """The options of a plugin that describe how images are optimized.

    Attributes:
        terms: the factors of the terms of `inversion_loss`.
        per_class: number of images of each class.
        iterations: steps of Adam on each image, and of the rival's optimizer after each round.
        lr: learning rate of the images.
        rounds: 1 without a rival. With a rival, the first round has none; in each later round, images are found on
            which the teacher disagrees with the rival, which has learned the images of the rounds before.
        jitter: see `jitter_images`; None: a sixteenth of the smaller side.
        flip: see `jitter_images`; None: as the scenario's augmentation does.
        clip: keep the images within `valid_range`.
        batch_size: images at a time, at most.
        temperature: temperature of the rival's distillation.
        anneal: decrease the learning rate to 0 along half a cosine.
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
    """The optimization of images through a trained network.

    A checkpoint stores it like any module, so that a plugin that declares it among its state can be stopped between two
    steps. It is empty before and after a call of `dream`.

    Attributes:
        x: the images that are being optimized, normalized; None: there are none.
        adam: the optimizer of these images.
        images: the finished images, raw; None: there are none.
        rival, rival_optimizer: state dicts of the rival and its optimizer; None: there is no rival.
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
        """Return raw images of all old classes of `run`, optimized from noise, with their class's task and weight 0.

        R_feature, and the accuracy of the teacher on the labels that the images are optimized for, are logged for the
        noise and for the finished images.

        Args:
            run: the run, in a hook that is called once an experience.
            name: name of the plugin, for its random numbers, its progress and its curves.
            teacher: the network that has learned those classes, from `clframe.model.snapshot`.
            options: the options of the optimization.

        Raises:
            RunError: if there is not enough memory; the sentence names the plugin's option ``batch_size``.
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
        """Begin to optimize a copy of the images `x`, with the learning rate `lr`."""
        self.x = x.detach().clone().requires_grad_()
        self.adam = torch.optim.Adam([self.x], lr=lr)

    def slow_down(self, lr: float, done: float) -> None:
        """Set the learning rate to its value at the share `done`, from 0 to 1, of a half cosine from `lr` to 0."""
        assert self.adam is not None
        for group in self.adam.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * done)) / 2

    def step(self, loss: Callable[[Tensor], Tensor], bounds: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Take a step of Adam on `loss`, clamp the images to `bounds`, and return them.

        Args:
            loss: from the images to a scalar.
            bounds: the lowest and the highest values; None: the images are not clamped.
        """
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
        """Optimize images of the labels in `parts`, one part after the other, in the round `k`, counted from 0."""
        generator = run.rng(name)
        transform = run.scenario.transform
        shape = run.scenario.input_shape
        low, high = (bound.to(run.device) for bound in valid_range(transform, run.experience.train.images))
        jitter = min(shape[1:]) // 16 if options.jitter is None else options.jitter
        flip = transform.flip if options.flip is None else options.flip
        rival = self._rival(teacher) if k else None
        n = teacher.n_classes
        tasks = run.task_of(torch.arange(n, device=run.device))
        heads = torch.stack([class_mask(group, n, run.device) for group in run.scenario.classes])
        for i in run.ticks(f"{name}: dreams {k + 1}", len(parts) * options.iterations, resumable=True):
            y = parts[i // options.iterations].to(run.device)
            # in task-incremental learning, a class competes with those of its task; a class may be in several tasks
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
        """Distill the teacher into the rival on the images so far, with the run's training settings."""
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
            self.rival = rival.state_dict()
            self.rival_optimizer = optimizer.state_dict()

    def _rival(self, teacher: IncrementalNet) -> IncrementalNet:
        """Return the rival as a frozen network, built like the teacher."""
        rival = snapshot(teacher)
        assert self.rival is not None
        rival.load_state_dict(self.rival)
        return rival

    @staticmethod
    def _log(run: Run, name: str, kind: str, found: tuple[float, float]) -> None:
        """Log the two numbers that `assess_images` returned, for images of this kind."""
        run.log({f"{name}/feature/{kind}": found[0], f"{name}/accuracy/{kind}": found[1]})

    def _clear(self) -> None:
        """Forget all images and the rival."""
        self.x = None
        self.adam = None
        self.images = None
        self.rival = None
        self.rival_optimizer = None

    def get_extra_state(self) -> dict[str, Any]:
        """Return the content of a state dict."""
        return {
            "x": None if self.x is None else self.x.detach(),
            "adam": None if self.adam is None else self.adam.state_dict(),
            "images": self.images,
            "rival": self.rival,
            "rival_optimizer": self.rival_optimizer,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self._clear()
        if state["x"] is not None:
            self.begin(state["x"], 0.0)
            assert self.adam is not None
            self.adam.load_state_dict(state["adam"])
        self.images = state["images"]
        self.rival = state["rival"]
        self.rival_optimizer = state["rival_optimizer"]


def to_raw(x: Tensor, transform: Transform) -> Tensor:
    """Undo ``transform.normalize``: return normalized images [B, C, ...] in the units of the data set, float32."""
    if transform.mean:
        per_channel = (-1, *[1] * (x.dim() - 2))
        mean, std = torch.tensor((transform.mean, transform.std), device=x.device).view(2, *per_channel)
        x = x * std + mean
    return x * transform.scale


def valid_range(transform: Transform, images: RawImages) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest normalized value of each channel, [C, 1, 1] each.

    The raw values are 0 and the transform's scale, or the extremes of `images` where those go beyond.

    Args:
        transform: the transform of the scenario.
        images: raw images [N, C, H, W].
    """
    least, most = images.aminmax()
    ends = torch.tensor([[min(0.0, least.item())], [max(transform.scale, most.item())]], device=images.device)
    low, high = transform.normalize(ends.expand(2, images.shape[1])[:, :, None, None])
    return low, high


def split_targets(classes: Sequence[int], per_class: int, rounds: int, batch_size: int) -> list[list[Tensor]]:
    """Split the labels of `per_class` images of each class into rounds, and each round into parts of nearly equal size.

    Classes take turns, so that every part is balanced: its statistics should be those of all real images.

    Args:
        classes: the labels.
        per_class: number of images of each class.
        rounds: number of rounds; those without any label are left out.
        batch_size: number of labels in a part, at most.

    Returns:
        the parts of each round, [<= batch_size] int64 each.
    """
    labels = torch.tensor(classes).repeat(per_class)
    parts = []
    for in_round in labels.tensor_split(rounds):
        if len(in_round):
            parts.append(list(in_round.tensor_split(math.ceil(len(in_round) / batch_size))))
    return parts


def reinitialize(model: nn.Module, generator: torch.Generator) -> None:
    """Initialize the layers of `model` again, from a seed that `generator`, on the CPU, draws."""
    with initialized_by(generator, next(model.parameters()).device):
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()


def reinitialized_copy(model: IncrementalNet, generator: torch.Generator) -> IncrementalNet:
    """Return a copy of `model` with new initial weights; see `reinitialize`."""
    copied = snapshot(model)
    reinitialize(copied, generator)
    return copied


def select_preview(images: ImageData, most: int = SHOWN) -> Tensor:
    """Select at most `most` images to show, the same number of each class, class by class; [N, ...]."""
    classes = images.y.unique().tolist()
    each = max(1, most // len(classes))
    where = [(images.y == c).nonzero().flatten()[:each] for c in classes[:most]]
    return images.x[torch.cat(where)]


def dreaming_problems(run: Run, plugin: Plugin) -> Iterator[str]:
    """Yield a sentence for each reason why `plugin` cannot optimize images in this run."""
    shape = run.scenario.input_shape
    if len(shape) != 3:
        yield (
            f"`{plugin.name}` generates images [channels, height, width], and those of the scenario are {list(shape)}: "
            "choose a scenario of images."
        )
    elif not norms_of(run.model.backbone):
        yield (
            f"`{plugin.name}` generates images from the running statistics of batch norms, and the backbone has none: "
            "choose a model with batch norms, such as cnn-small, resnet32 or resnet18."
        )


@contextmanager
def explain_out_of_memory(run: Run, option: str) -> Iterator[None]:
    """Raise `RunError` if memory runs out in the block, with a sentence that advises a smaller `option`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not full and not re.search("out of memory|allocate memory|enough memory", str(error)):  # of the CPU
            raise
        raise RunError(
            f"Out of memory on {run.device} while generating images for {run.progress_label}: a smaller `{option}` "
            "needs less."
        ) from error
