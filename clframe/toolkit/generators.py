"""Generative models of images scaled to [0, 1]: a variational autoencoder, and a Wasserstein GAN.

Both have the interface `GenerativeModel`: from noise to images, `sample`, an optimizer, and a training step on a
`Mixture` of images, in which new and replayed images have their shares of the loss. With a class prior, the autoencoder
samples images of a given class. `clframe.toolkit.rehearsal.Rehearsal` trains either on one set of images after another.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe.data.batch import ImageData
from clframe.errors import UsageError
from clframe.model import evaluating

Net = Literal["mlp", "conv"]
DEFAULT_WIDTHS: dict[Net, tuple[int, ...]] = {"mlp": (400, 400), "conv": (64, 128)}  # of hidden layers


@dataclass(slots=True)
class Mixture:
    """The images of one training step.

    Attributes:
        x: [B, ...] images from 0 to 1.
        y: [B] int64 labels; None: the model needs none.
        weight: [B] weights of the images in the loss; they sum to 1.
    """

    x: Tensor
    y: Tensor | None
    weight: Tensor


def mix(*parts: tuple[Tensor, Tensor | None, float]) -> Mixture:
    """Mix the images of a step from parts: images [n, ...], labels [n] or None, and the part's share of the loss."""
    weights = [x.new_full((len(x),), share / len(x)) for x, _, share in parts]
    labels = [y for _, y, _ in parts if y is not None]
    return Mixture(torch.cat([x for x, _, _ in parts]), torch.cat(labels) if labels else None, torch.cat(weights))


class GenerativeModel(nn.Module):
    """The interface of a model that generates images from noise.

    A call maps noise [n, z], and labels [n] or None, to images [n, *shape] in [0, 1].

    Args:
        shape: shape of one image.
        z: number of latent variables.
        classes: number of classes of a conditional model; None: the model has no classes.

    Attributes:
        shape, z, classes: as above.
        lr: learning rate of Adam in the source.
        betas: betas of Adam in the source.
    """

    lr: ClassVar[float]
    betas: ClassVar[tuple[float, float]]

    def __init__(self, shape: Sequence[int], z: int, classes: int | None = None) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.z = z
        self.classes = classes

    @abstractmethod
    def step(
        self, optimizer: torch.optim.Optimizer, draw: Callable[[], Mixture], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Train the model for one iteration, in train mode, and return its losses, detached.

        Args:
            optimizer: an optimizer that the method `optimizer` returned.
            draw: draws the images of a step; called once or several times in the iteration.
            generator: on the CPU, for all noise.
        """

    def optimizer(self, lr: float | None = None) -> torch.optim.Optimizer:
        """Create an Adam optimizer of all parameters, with the learning rate `lr`; None: the rate of the source."""
        return torch.optim.Adam(self.parameters(), self.lr if lr is None else lr, self.betas, fused=True)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw standard normal noise [n, z] on the CPU, the same for all devices, and move it to the model's device."""
        return torch.randn(n, self.z, generator=generator).to(next(self.parameters()))

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Extend a conditional model to `classes` classes, by `generator`; other models stay as they are."""

    def draw_classes(self, n: int, among: int, generator: torch.Generator) -> Tensor | None:
        """Draw `n` labels, uniformly among the first `among` classes; None if the model has no classes."""
        if self.classes is None:
            return None
        return torch.randint(among, (n,), generator=generator).to(next(self.parameters()).device)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator, y: Tensor | None = None) -> Tensor:
        """Sample `n` images [n, *shape] in [0, 1] in evaluation mode; of the classes `y` [n] if it is conditional."""
        with evaluating(self):
            images: Tensor = self(self.noise(n, generator), y)
        return images


class VAE(GenerativeModel):
    """A variational autoencoder (Kingma and Welling, ICLR 2014).

    The loss of an image x of D pixels (van de Ven and Tolias, 2019) is the binary cross-entropy of x and its
    reconstruction, averaged over pixels, plus KL(q(z | x) || p(z)) / D: the negative ELBO divided by D. The
    reconstruction is decoded from mean + exp(logvar / 2) * noise.

    The prior p(z) is the standard normal distribution, or one trainable Gaussian for each class (as in van de Ven,
    Siegelmann and Tolias, Nature Communications 2020), so that a class can be sampled.

    Args:
        shape: shape of one image, [D] or [C, H, W].
        net: fully connected or convolutional layers.
        hidden: widths of the encoder's layers, or channels of convolutional ones; the decoder mirrors them. None: 400
            and 400, or 64 and 128.
        z: number of latent variables.
        classes: number of classes of the prior; None: the standard normal.

    Raises:
        UsageError: if the shape does not fit a convolutional net, see `conv_problems`.
    """

    lr = 1e-3
    betas = (0.9, 0.999)

    def __init__(
        self,
        shape: Sequence[int],
        net: Net = "mlp",
        hidden: Sequence[int] | None = None,
        z: int = 100,
        classes: int | None = None,
    ) -> None:
        super().__init__(shape, z, classes)
        hidden = hidden or DEFAULT_WIDTHS[net]
        self.encoder, width = _encoder(shape, net, hidden, nn.ReLU())
        self.posterior = nn.Linear(width, 2 * z)
        self.decoder = _decoder(shape, net, hidden, z, norm=False)
        # different from the start, as the Gaussians of classes that coincide would have to be driven apart first
        self.prior_mean = nn.Parameter(torch.randn(classes, z)) if classes else None
        self.prior_logvar = nn.Parameter(torch.zeros(classes, z)) if classes else None

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Add Gaussians for new classes, initialized as those of the first classes were."""
        if self.prior_mean is None or self.prior_logvar is None or not self.classes or classes <= self.classes:
            return
        mean = self.prior_mean
        logvar = self.prior_logvar
        new = torch.randn(classes - self.classes, self.z, generator=generator).to(mean)
        self.prior_mean = nn.Parameter(torch.cat([mean.detach(), new]), mean.requires_grad)
        self.prior_logvar = nn.Parameter(torch.cat([logvar.detach(), torch.zeros_like(new)]), logvar.requires_grad)
        self.classes = classes

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log variance [B, z] of q(z | x)."""
        mean, logvar = self.posterior(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar

    def prior(self, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean and the log variance of p(z): [B, z] for a class prior, otherwise [1], which broadcast.

        Raises:
            ValueError: if the prior depends on the class and `y` is None.
        """
        if self.prior_mean is None or self.prior_logvar is None:
            zero = next(self.parameters()).new_zeros(1)
            return zero, zero
        if y is None:
            raise ValueError("a model with a class prior needs the labels `y`")
        return self.prior_mean[y], self.prior_logvar[y]

    def forward(self, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Decode standard normal noise [B, z] into images [B, *shape] in [0, 1]."""
        images: Tensor = self.decoder(reparametrize(*self.prior(y), noise)).sigmoid()
        return images

    def losses(self, x: Tensor, y: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction loss [B] of each image, and its divergence divided by the number of pixels [B].

        Args:
            x: [B, *shape] images from 0 to 1.
            y: [B] labels, for a class prior; None otherwise.
            noise: [B, z] standard normal.
        """
        mean, logvar = self.encode(x)
        logits = self.decoder(reparametrize(mean, logvar, noise))
        reconstruction = functional.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).mean(1)
        return reconstruction, divergence(mean, logvar, *self.prior(y)) / math.prod(self.shape)

    def step(
        self, optimizer: torch.optim.Optimizer, draw: Callable[[], Mixture], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Take a gradient step on the loss, and return the ``reconstruction`` and ``divergence`` of its images."""
        self.train()
        batch = draw()
        per_image = self.losses(batch.x, batch.y, self.noise(len(batch.x), generator))
        reconstruction, divergent = (torch.dot(batch.weight, losses) for losses in per_image)
        descend(optimizer, reconstruction + divergent, self.parameters())
        return {"reconstruction": reconstruction.detach(), "divergence": divergent.detach()}


class WGAN(GenerativeModel):
    """A Wasserstein GAN with gradient penalty (Gulrajani et al., NIPS 2017, algorithm 1): Adam at 1e-4, betas 0, 0.9.

    The critic D minimizes D(fake) - D(x) + lambda (||grad D(x^)||_2 - 1)^2, with x^ at random between x and fake; then
    the generator minimizes -D(fake). The critic has no batch norm, because the penalty is defined for each image by
    itself; the convolutional generator has batch norms, as in the paper.

    Args:
        shape: shape of one image, see `VAE`.
        net: kind of layers, see `VAE`; the critic is built like its encoder, the generator like its decoder.
        hidden: widths of the layers, see `VAE`.
        z: number of latent variables.
        critic_steps: steps of the critic for each step of the generator.
        penalty: lambda.

    Raises:
        UsageError: if the shape does not fit a convolutional net, see `conv_problems`.
    """

    lr = 1e-4
    betas = (0.0, 0.9)

    def __init__(
        self,
        shape: Sequence[int],
        net: Net = "mlp",
        hidden: Sequence[int] | None = None,
        z: int = 100,
        critic_steps: int = 5,
        penalty: float = 10.0,
    ) -> None:
        super().__init__(shape, z)
        hidden = hidden or DEFAULT_WIDTHS[net]
        self.critic_steps = critic_steps
        self.penalty = penalty
        layers, width = _encoder(shape, net, hidden, nn.LeakyReLU(0.2))
        self.critic = nn.Sequential(layers, nn.Linear(width, 1), nn.Flatten(0))
        self.decoder = _decoder(shape, net, hidden, z, norm=True)

    def forward(self, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Decode standard normal noise [B, z] into images [B, *shape] in [0, 1]; labels are ignored."""
        images: Tensor = self.decoder(noise).sigmoid()
        return images

    def step(
        self, optimizer: torch.optim.Optimizer, draw: Callable[[], Mixture], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Take the steps of the critic and one of the generator.

        Returns:
            the latest ``distance``, the critic's estimate of the Wasserstein distance between images and fakes, and the
            latest ``penalty``.
        """
        self.train()
        for _ in range(self.critic_steps):
            batch = draw()
            n = len(batch.x)
            with torch.no_grad():
                fake = self(self.noise(n, generator))
            place = torch.rand(n, generator=generator).to(fake)
            distance = torch.dot(batch.weight, self.critic(batch.x) - self.critic(fake))
            penalty = torch.dot(batch.weight, gradient_penalty(self.critic, batch.x, fake, place))
            descend(optimizer, self.penalty * penalty - distance, self.critic.parameters())
        descend(optimizer, -self.critic(self(self.noise(n, generator))).mean(), self.decoder.parameters())
        return {"distance": distance.detach(), "penalty": penalty.detach()}


def reparametrize(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Turn standard normal noise into a draw from a Gaussian, whose standard deviation is exp(logvar / 2)."""
    return mean + (logvar / 2).exp() * noise


def divergence(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    """Compute KL(q || p) of diagonal Gaussians, summed over dimensions; [B, z] each, or broadcast for p, to [B].

    Args:
        mean, logvar: mean and log variance of q.
        prior_mean, prior_logvar: mean and log variance of p.
    """
    distance = (mean - prior_mean).square() / prior_logvar.exp()
    return (prior_logvar - logvar + (logvar - prior_logvar).exp() + distance - 1).sum(1) / 2


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, place: Tensor) -> Tensor:
    """Compute (||grad D(x^)||_2 - 1)^2 at x^ = place * real + (1 - place) * fake, for each image by itself; [B].

    Args:
        critic: D, from images [B, ...] to scores [B].
        real, fake: [B, ...] images.
        place: [B] from 0 to 1.
    """
    place = place.view(-1, *[1] * (real.dim() - 1))
    between = (place * real + (1 - place) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    length: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return (length - 1).square()


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Take a step of `optimizer` on `loss` for `parameters` alone; its other parameters get no gradient.

    Args:
        optimizer: holds the parameters; its gradients are cleared afterwards.
        loss: a scalar that depends on all of `parameters`.
        parameters: the parameters to move.
    """
    moved = list(parameters)
    for parameter, gradient in zip(moved, torch.autograd.grad(loss, moved), strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def check_range(data: ImageData, scale: float, owner: str) -> None:
    """Raise `UsageError`, naming the plugin `owner`, if images divided by `scale` are not in the range from 0 to 1.

    Generated images are in this range.
    """
    if not len(data):
        return
    low, high = (float(end) / scale for end in data.images.aminmax())
    if low < 0 or high > 1:
        raise UsageError(
            f"`{owner}` generates images from 0 to 1, and those given are from {low:g} to {high:g}, divided by the "
            f"{scale:g} of the scenario's transform: give another scale, or other images."
        )


def conv_problems(shape: Sequence[int], stages: int, asked_by: str) -> list[str]:
    """Return the sentence that refuses a convolutional net for images of `shape`, if there is one.

    Args:
        shape: shape of one image.
        stages: number of layers, each of which halves the image.
        asked_by: subject of the sentence.
    """
    if len(shape) != 3:
        return [f"{asked_by} needs images [channels, height, width], and these have the shape {list(shape)}."]
    if any(side % 2**stages for side in shape[1:]):
        sides = "x".join(map(str, shape[1:]))
        return [
            f"{asked_by} halves images {stages} times and needs sides that are divisible by {2**stages}, and these "
            f"have {sides} pixels."
        ]
    return []


def _encoder(shape: Sequence[int], net: Net, hidden: Sequence[int], active: nn.Module) -> tuple[nn.Module, int]:
    """Return a network from images [B, *shape] to features [B, width], and the width.

    Raises:
        UsageError: if the shape does not fit a convolutional net.
    """
    layers: list[nn.Module] = []
    if net == "mlp":
        for fan_in, fan_out in pairwise([math.prod(shape), *hidden]):
            layers += [nn.Linear(fan_in, fan_out), active]
        return nn.Sequential(nn.Flatten(), *layers), hidden[-1]
    if unsuitable := conv_problems(shape, len(hidden), "A convolutional generative model"):
        raise UsageError(*unsuitable)
    for fan_in, fan_out in pairwise([shape[0], *hidden]):
        layers += [nn.Conv2d(fan_in, fan_out, 4, stride=2, padding=1), active]
    return nn.Sequential(*layers, nn.Flatten()), math.prod(_smallest(shape, hidden))


def _decoder(shape: Sequence[int], net: Net, hidden: Sequence[int], z: int, norm: bool) -> nn.Module:
    """Return the mirrored encoder: a network from z [B, z] to images [B, *shape] before the sigmoid."""
    layers: list[nn.Module] = []
    if net == "mlp":
        for fan_in, fan_out in pairwise([z, *reversed(hidden)]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden[0], math.prod(shape)), nn.Unflatten(1, tuple(shape)))
    smallest = _smallest(shape, hidden)
    layers += [nn.Linear(z, math.prod(smallest)), nn.Unflatten(1, smallest)]
    for fan_in, fan_out in pairwise([*reversed(hidden), shape[0]]):
        if norm:
            layers.append(nn.BatchNorm2d(fan_in))
        layers += [nn.ReLU(), nn.ConvTranspose2d(fan_in, fan_out, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)


def _smallest(shape: Sequence[int], hidden: Sequence[int]) -> tuple[int, int, int]:
    """Return the shape [C, H, W] of the smallest maps of a convolutional net."""
    return hidden[-1], shape[1] // 2 ** len(hidden), shape[2] // 2 ** len(hidden)
