"""A generator of dreams: a network that makes images out of noise, and learns from a trained one which it knows.

The terms of Always Be Dreaming (Smith et al., ICCV 2021) as pure functions, the generator's network and its training.
Images are normalised. In DeepInversion (`clframe.toolkit.inversion`) each image is sought by itself instead.
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
SMOOTHING = math.sqrt(2)  # the standard deviation, in pixels, that the kernel of the authors' code has


class Generator(nn.Module):
    """Noise [B, `noise`] to images [B, C, H, W]: a linear layer, and three convolutions between two enlargements.

    The authors' generator for CIFAR, but that its last batch norm learns the mean and the scale of the pixels: theirs
    stay 0 and 1, which fits images that were normalised so.

    Args:
        shape: of an image; its sides are divisible by 4.
        noise: length of the noise.
        width: channels of the first maps, half of which the last ones have.
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
        """Images of noise from N(0, 1)."""
        images: Tensor = self.net(self.first(noise).unflatten(1, self.maps))
        return images

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` images, of noise that `generator`, on the CPU, draws."""
        noise = torch.randn(n, self.noise, generator=generator)
        images: Tensor = self(noise.to(self.first.weight.device))
        return images


def confidence(logits: Tensor, temperature: float) -> Tensor:
    """The cross-entropy of the logits [B, K], divided by the temperature, against the class that leads; a scalar."""
    return functional.cross_entropy(logits / temperature, logits.argmax(1))


def imbalance(logits: Tensor) -> Tensor:
    """1 + sum_c p_c log p_c / log K, with p the mean softmax of the logits [B, K]; a scalar.

    0 where all classes have the same share, 1 where one has all; where there is one class, 0.
    """
    k = logits.shape[1]
    log_p = logits.log_softmax(1).logsumexp(0) - math.log(len(logits))  # finite where a share is too small to be one
    return 1 + (log_p.exp() * log_p).sum() / math.log(k) if k > 1 else logits.sum() * 0


def gaussian_divergence(seen: Sequence[Statistics]) -> Tensor:
    """KL(N(running) || N(batch)) for each channel that enters a batch norm, averaged within and over layers; a scalar.

    log(s' / s) - (1 - (s^2 + (m - m')^2) / s'^2) / 2, with m and s^2 the running mean and variance, m' and s'^2 the
    batch's. The order is that of the authors' code.
    """
    layers = []
    for found in seen:
        mean, stored = found.running
        stored, var = stored + EPS, found.var + EPS
        away = (mean - found.mean).square()
        layers.append(((var / stored).log() - 1 + (stored + away) / var).mean() / 2)
    return torch.stack(layers).mean()


def roughness(x: Tensor) -> Tensor:
    """The mean square of what a Gaussian of 5 x 5 pixels takes off the images [B, C, H, W]; a scalar."""
    line = torch.exp(-torch.arange(-2.0, 3.0, device=x.device, dtype=x.dtype).square() / (2 * SMOOTHING**2))
    kernel = line[:, None] * line / line.sum().square()
    padded = functional.pad(x, (2, 2, 2, 2), mode="reflect")
    channels = x.shape[1]
    smooth = functional.conv2d(padded, kernel.expand(channels, 1, 5, 5), groups=channels)
    return (x - smooth).square().mean()


@dataclass(frozen=True)
class GeneratorTerms:
    """What the terms of `generator_loss` are multiplied by, and the temperature of the first."""

    confidence: float = 1.0
    temperature: float = 1e3
    balance: float = 1.0
    statistics: float = 50.0
    smooth: float = 1e-3


def generator_loss(teacher: IncrementalNet, x: Tensor, terms: GeneratorTerms) -> Tensor:
    """The weighted sum of `confidence`, `imbalance`, `gaussian_divergence` and `roughness` (Smith et al.); a scalar.

    Args:
        teacher: the network whose images are made, in eval mode and frozen.
        x: normalised images [B, C, H, W], on the graph of the generator.
        terms: their weights.
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
    """A generator and the Adam that trains it.

    A checkpoint holds it as any module, so that a plugin that builds it before the run and declares it among its state
    can be stopped between two steps of `learn`.

    Args:
        shape: of an image.
        noise, width: see `Generator`.
        lr: of Adam.
    """

    def __init__(self, shape: Sequence[int], noise: int, width: int, lr: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # its weights come before each experience
            self.generator = Generator(shape, noise, width).eval()
        self.lr = lr
        self._begin()

    def learn(
        self, run: Run, name: str, teacher: IncrementalNet, terms: GeneratorTerms, iterations: int, batch_size: int
    ) -> None:
        """Begin anew and learn to make images that `teacher` knows.

        Args:
            run: the run, in a hook that is called once an experience.
            name: of the plugin: for its randomness, for progress and for what is logged, see `describe_dreams`.
            teacher: the frozen network.
            terms: of the loss.
            iterations: how many steps.
            batch_size: images of each.

        Raises:
            RunError: if memory ends; the sentence names the plugin's option ``batch_size``.
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
            told = describe_dreams(teacher, self.generator.draw(batch_size, rng))
        run.log({f"{name}/{what}": value for what, value in told.items()})

    @torch.no_grad()
    def draw_batch(self, n: int, teacher: IncrementalNet, tasks: Tensor, rng: torch.Generator) -> Batch:
        """`n` new images of weight 0, each of the class that `teacher` sees in it, and that class's task."""
        x = self.generator.draw(n, rng)
        y = teacher(x).logits.argmax(1)
        return Batch(x, y, torch.full_like(y, -1), tasks[y], x.new_zeros(n), torch.zeros_like(y))

    def _begin(self) -> None:
        self.adam = torch.optim.Adam(self.generator.parameters(), lr=self.lr)

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict holds besides the generator."""
        return self.adam.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_extra_state` gave."""
        self.adam.load_state_dict(state)


@torch.no_grad()
def describe_dreams(teacher: IncrementalNet, x: Tensor) -> dict[str, float]:
    """Of the normalised images `x`: the mean of the teacher's highest share, their imbalance and their divergence."""
    with observe_norms(teacher) as seen:
        logits = teacher(x).logits
    return {
        "confidence": logits.softmax(1).amax(1).mean().item(),
        "imbalance": imbalance(logits).item(),
        "divergence": gaussian_divergence(seen).item(),
    }


def head_logits(net: IncrementalNet, features: Tensor) -> Tensor:
    """Logits [B, C] that the head of `net` gives to features [B, D]."""
    return torch.cat([block(features) for block in net.head], 1)


def local_cross_entropy(logits: Tensor, y: Tensor, n_old: int) -> Tensor:
    """Cross-entropy over the new classes, the columns from `n_old` on; [B], without a meaning for old labels."""
    return functional.cross_entropy(logits[:, n_old:], (y - n_old).clamp(min=0), reduction="none")


def balanced_cross_entropy(logits: Tensor, y: Tensor, n_old: int) -> Tensor:
    """n_old / C times the mean cross-entropy of the images of old classes, plus 1 - n_old / C times that of new ones.

    Args:
        logits: [B, C].
        y: [B] labels; those below `n_old` are old.
        n_old: number of old classes.
    """
    share, old = n_old / logits.shape[1], (y < n_old).to(logits.dtype)
    weight = share * old / old.sum().clamp(min=1) + (1 - share) * (1 - old) / (1 - old).sum().clamp(min=1)
    return torch.dot(weight, functional.cross_entropy(logits, y, reduction="none"))


def generator_problems(run: Run, plugin: Plugin, alternative: str) -> Iterator[str]:
    """Return the reasons why `plugin` cannot have a generator, and a loss among new classes, in this run.

    Args:
        run: describes the scenario.
        plugin: the one that dreams.
        alternative: name of a method that takes images of any size, for the error sentence.
    """
    yield from dreaming_problems(run, plugin)
    shape, seen = run.scenario.input_shape, set[int]()
    if len(shape) == 3 and (shape[1] % 4 or shape[2] % 4):
        yield (
            f"`{plugin.name}` makes images whose sides are divisible by 4, and those of the scenario are {shape[1]} x "
            f"{shape[2]}: choose another scenario, or `{alternative}`."
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
                "two classes at least, such as by fewer `scenario.experiences`, or choose another method."
            )
            return
        seen.update(classes)
