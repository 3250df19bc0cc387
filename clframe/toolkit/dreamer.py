"""Data-free generation: a generator of images that is trained by a trained network alone, for data-free replay.

This module holds the terms of Always Be Dreaming (Smith et al., ICCV 2021) as pure functions, the generator's network
and its training. Images are normalized. In DeepInversion (`clframe.toolkit.inversion`), each image is optimized by
itself instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe.checks import n_learned
from clframe.data.batch import Batch
from clframe.model import IncrementalNet
from clframe.toolkit.inversion import Statistics, dreaming_problems, explain_out_of_memory, observe_norms, reinitialize

if TYPE_CHECKING:
    from clframe.context import Run
    from clframe.plugin import Plugin

EPS = 1e-8
SMOOTHING = math.sqrt(2)  # standard deviation of the smoothing kernel in pixels, as in the authors' code


class Generator(nn.Module):
    """A network from noise [B, `noise`] to images [B, C, H, W]: a linear layer, then three convolutions and upsampling.

    It is the authors' generator for CIFAR, except that its last batch norm learns the mean and the scale of the pixels;
    those of the authors stay 0 and 1, which fits images that are normalized to them.

    Args:
        shape: shape of an image, whose sides are divisible by 4.
        noise: length of the noise.
        width: number of channels of the first maps; the last maps have half of them.
    """

    def __init__(self, shape: Sequence[int], noise: int = 1000, width: int = 128) -> None:
        super().__init__()
        channels, high, wide = shape
        self.noise = noise
        self.maps = width, high // 4, wide // 4
        half = max(1, width // 2)
        self.first = nn.Linear(noise, math.prod(self.maps))
        self.net = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, half, 3, padding=1),
            nn.BatchNorm2d(half),
            nn.LeakyReLU(0.2),
            nn.Conv2d(half, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Map standard normal noise [B, `noise`] to images [B, C, H, W]."""
        images: Tensor = self.net(self.first(noise).unflatten(1, self.maps))
        return images

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return `n` images for noise that `generator`, on the CPU, draws."""
        noise = torch.randn(n, self.noise, generator=generator)
        images: Tensor = self(noise.to(self.first.weight.device))
        return images


def confidence(logits: Tensor, temperature: float) -> Tensor:
    """Compute the mean cross-entropy of logits [B, K], over the temperature, with their own top class; a scalar."""
    return functional.cross_entropy(logits / temperature, logits.argmax(1))


def imbalance(logits: Tensor) -> Tensor:
    """Compute 1 + sum_c p_c log p_c / log K, with p the mean softmax of the logits [B, K]; a scalar.

    It is 0 if all classes have the same share, 1 if one class has all, and 0 if there is one class.
    """
    k = logits.shape[1]
    if k == 1:
        return logits.sum() * 0  # with a graph
    log_p = logits.log_softmax(1).logsumexp(0) - math.log(len(logits))  # finite for shares that round to 0
    return 1 + (log_p.exp() * log_p).sum() / math.log(k)


def gaussian_divergence(seen: Sequence[Statistics]) -> Tensor:
    """Compute KL(N(running) || N(batch)) of each input channel of batch norms, averaged over channels, then layers.

    The divergence of a channel is log(s' / s) - (1 - (s^2 + (m - m')^2) / s'^2) / 2, with the running mean m and
    variance s^2, and the batch's m' and s'^2. The order of both distributions is that of the authors' code.

    Args:
        seen: statistics of at least one batch norm, from `observe_norms`.

    Returns:
        a scalar.
    """
    layers = []
    for found in seen:
        mean, running_var = found.running
        running_var = running_var + EPS
        var = found.var + EPS
        away = (mean - found.mean).square()
        layers.append(((var / running_var).log() - 1 + (running_var + away) / var).mean() / 2)
    return torch.stack(layers).mean()


def roughness(x: Tensor) -> Tensor:
    """Compute the mean squared difference of images [B, C, H, W] and their smoothed copies; a scalar.

    The images are smoothed by a Gaussian kernel of 5 x 5 pixels.
    """
    line = torch.exp(-torch.arange(-2.0, 3.0, device=x.device, dtype=x.dtype).square() / (2 * SMOOTHING**2))
    kernel = line[:, None] * line / line.sum().square()
    padded = functional.pad(x, (2, 2, 2, 2), mode="reflect")
    channels = x.shape[1]
    smooth = functional.conv2d(padded, kernel.expand(channels, 1, 5, 5), groups=channels)
    return (x - smooth).square().mean()


@dataclass(frozen=True)
class GeneratorTerms:
    """The factors of the terms of `generator_loss`, and a temperature.

    Attributes:
        confidence: factor of `confidence`.
        temperature: temperature of `confidence`.
        balance: factor of `imbalance`.
        statistics: factor of `gaussian_divergence`.
        smooth: factor of `roughness`.
    """

    confidence: float = 1.0
    temperature: float = 1e3
    balance: float = 1.0
    statistics: float = 50.0
    smooth: float = 1e-3


def generator_loss(teacher: IncrementalNet, x: Tensor, terms: GeneratorTerms) -> Tensor:
    """Compute the weighted sum of `confidence`, `imbalance`, `gaussian_divergence` and `roughness`; a scalar.

    This is the loss of the generator of Smith et al.

    Args:
        teacher: the network whose images are generated, in evaluation mode and frozen.
        x: normalized images [B, C, H, W], with a graph to the generator.
        terms: the factors.
    """
    with observe_norms(teacher) as seen:
        logits = teacher(x).logits
    return (
        terms.confidence * confidence(logits, terms.temperature)
        + terms.balance * imbalance(logits)
        + terms.statistics * gaussian_divergence(seen)
        + terms.smooth * roughness(x)
    )


class Dreamer(nn.Module):
    """A generator of images of a trained network, and the Adam that trains it.

    A checkpoint stores it like any module, so that a plugin that builds it before the run and declares it among its
    state can be stopped between two steps of `learn`.

    Args:
        shape: shape of an image.
        noise, width: see `Generator`.
        lr: learning rate of Adam.
    """

    def __init__(self, shape: Sequence[int], noise: int, width: int, lr: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the weights of training are drawn in `learn`
            self.generator = Generator(shape, noise, width).eval()
        self.lr = lr
        self._begin()

    def learn(
        self, run: Run, name: str, teacher: IncrementalNet, terms: GeneratorTerms, iterations: int, batch_size: int
    ) -> None:
        """Train the generator, from new weights, to generate images of the classes of `teacher`.

        Args:
            run: the run, in a hook that is called once an experience.
            name: name of the plugin, for its random numbers, its progress and its curves, see `describe_dreams`.
            teacher: the frozen network.
            terms: the factors of the loss.
            iterations: number of steps.
            batch_size: number of images in each step.

        Raises:
            RunError: if there is not enough memory; the sentence names the plugin's option ``batch_size``.
        """
        rng = run.rng(name)
        self.generator.train()
        with explain_out_of_memory(run, f"{name}.batch_size"):
            for i in run.ticks(name, iterations, resumable=True):
                if i == 0:
                    reinitialize(self.generator, rng)
                    self._begin()
                x = self.generator.draw(batch_size, rng)
                self.adam.zero_grad()
                generator_loss(teacher, x, terms).backward()
                self.adam.step()
        self.generator.eval()
        with torch.no_grad():
            curves = describe_dreams(teacher, self.generator.draw(batch_size, rng))
        run.log({f"{name}/{curve}": value for curve, value in curves.items()})

    @torch.no_grad()
    def draw_batch(self, n: int, teacher: IncrementalNet, tasks: Tensor, rng: torch.Generator) -> Batch:
        """Generate a batch of `n` images of weight 0, each with the class that `teacher` assigns to it.

        Args:
            n: number of images.
            teacher: the network that labels the images.
            tasks: [C] the task of each class.
            rng: on the CPU, for the noise.
        """
        x = self.generator.draw(n, rng)
        y = teacher(x).logits.argmax(1)
        return Batch(x, y, torch.full_like(y, -1), tasks[y], x.new_zeros(n), torch.zeros_like(y))

    def _begin(self) -> None:
        """Start with a new optimizer."""
        self.adam = torch.optim.Adam(self.generator.parameters(), lr=self.lr)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the content of a state dict besides the generator."""
        return self.adam.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self.adam.load_state_dict(state)


@torch.no_grad()
def describe_dreams(teacher: IncrementalNet, x: Tensor) -> dict[str, float]:
    """Return the curves of generated images: ``confidence``, ``imbalance`` and ``divergence``.

    ``confidence`` is the mean of the teacher's highest probability, ``imbalance`` and ``divergence`` are those of
    `imbalance` and `gaussian_divergence`.

    Args:
        teacher: the network whose images are generated, in evaluation mode.
        x: normalized images [B, C, H, W].
    """
    with observe_norms(teacher) as seen:
        logits = teacher(x).logits
    return {
        "confidence": logits.softmax(1).amax(1).mean().item(),
        "imbalance": imbalance(logits).item(),
        "divergence": gaussian_divergence(seen).item(),
    }


def head_logits(net: IncrementalNet, features: Tensor) -> Tensor:
    """Return the logits [B, C] of the head of `net` for features [B, D]."""
    return torch.cat([block(features) for block in net.head], 1)


def local_cross_entropy(logits: Tensor, y: Tensor, n_old: int) -> Tensor:
    """Compute the cross-entropy over the new classes, the columns from `n_old` on; [B], meaningless for old labels."""
    return functional.cross_entropy(logits[:, n_old:], (y - n_old).clamp(min=0), reduction="none")


def balanced_cross_entropy(logits: Tensor, y: Tensor, n_old: int) -> Tensor:
    """Compute the mean cross-entropy in which old classes have the share n_old / C of the weight; a scalar.

    The mean over the images of old classes counts n_old / C, that over the images of new classes 1 - n_old / C.

    Args:
        logits: [B, C].
        y: [B] labels; those below `n_old` are old.
        n_old: number of old classes.
    """
    share = n_old / logits.shape[1]
    old = (y < n_old).to(logits.dtype)
    weight = share * old / old.sum().clamp(min=1) + (1 - share) * (1 - old) / (1 - old).sum().clamp(min=1)
    return torch.dot(weight, functional.cross_entropy(logits, y, reduction="none"))


def generator_problems(run: Run, plugin: Plugin, alternative: str) -> Iterator[str]:
    """Yield a sentence for each reason why `plugin` cannot have a generator, and a loss among new classes, in this run.

    Args:
        run: the run, with its scenario.
        plugin: the plugin that generates images.
        alternative: name of a method that takes images of any size, for the error sentence.
    """
    yield from dreaming_problems(run, plugin)
    shape = run.scenario.input_shape
    seen: set[int] = set()
    if len(shape) == 3 and (shape[1] % 4 or shape[2] % 4):
        yield (
            f"`{plugin.name}` generates images whose sides are divisible by 4, and those of the scenario are "
            f"{shape[1]} x {shape[2]}: choose another scenario, or `{alternative}`."
        )
    for i, classes in enumerate(run.scenario.classes):
        if seen.intersection(classes):
            yield (
                f"`{plugin.name}` learns new classes among themselves, and experience {i + 1} of "
                f"`{run.scenario.name}` brings old ones back: choose a scenario whose experiences share no class."
            )
            return
        if len(classes) == 1 and i >= max(1, n_learned(run)):
            name = run.scenario.class_names[classes[0]]
            yield (
                f"`{plugin.name}` learns new classes among themselves, and experience {i + 1} of "
                f"`{run.scenario.name}` has one class, `{name}`, for which that loss is always 0: give each experience "
                "at least two classes, for example by fewer `scenario.experiences`, or choose another method."
            )
            return
        seen.update(classes)
