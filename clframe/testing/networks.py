"""Small backbones with the parts that people use: shared, normalized, recurrent, adapted and pruned layers.

All take images of the shape `SHAPE`. A method that reads or changes parameters is tested on each of them:

    @pytest.mark.parametrize("build", testing.NETWORKS.values(), ids=testing.NETWORKS)
    def test_weights_stay(build):
        testing.learn(testing.tiny(), MyMethod(), model=testing.seeded(build))
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from clframe.backbones import cnn_small
from clframe.testing.fixtures import SHAPE

PIXELS = prod(SHAPE)
Built = TypeVar("Built", bound=nn.Module)


def seeded(build: Callable[[], Built], seed: int = 3) -> Built:
    """Return what `build` returns, with the weights that this seed draws; the global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


class Chain(nn.Module):
    """Modules one after the other."""

    def __init__(self, *modules: nn.Module, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*modules)
        self.width = width

    def features(self, x: Tensor) -> Tensor:
        """Return the output [B, width] of the last module."""
        features: Tensor = self.body(x)
        return features


class Small(nn.Module):
    """A convolution and a linear layer, both with biases; a batch norm, and one without parameters.

    The weights are the same each time.
    """

    width = 5

    def __init__(self, channels: int = 4, last_relu: bool = False) -> None:
        super().__init__()
        self.last_relu = last_relu
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.conv = nn.Conv2d(1, channels, 3, stride=2, padding=1)
            self.plain = nn.BatchNorm2d(channels, affine=False)
            self.norm = nn.BatchNorm2d(channels)
            self.linear = nn.Linear(16 * channels, 5)

    def features(self, x: Tensor) -> Tensor:
        """Return the output [B, 5] of the linear layer."""
        out: Tensor = self.linear(self.norm(self.plain(self.conv(x))).relu().flatten(1))
        return out.relu() if self.last_relu else out


class Adapter(nn.Module):
    """A linear layer with a correction of low rank and a scale: three parameters with unusual names."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs) / 4)
        self.up = nn.Parameter(torch.randn(outputs, 2) / 4)
        self.scale = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled output of the layer plus the correction."""
        out: Tensor = self.layer(x) * self.scale + x @ self.down.T @ self.up.T
        return out


class Scale(nn.Module):
    """A factor for each of 8 channels: a parameter that no layer holds.

    The factors are small; what passes them must not look unused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.full((8, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled channels."""
        return self.by * x


class SharedBlock(nn.Module):
    """A block that stands at two places of a list."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(PIXELS, 8)
        block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())
        self.blocks = nn.ModuleList([block, block])

    def features(self, x: Tensor) -> Tensor:
        """Return the output [B, 8] of the block at its second place."""
        h: Tensor = self.first(x.flatten(1))
        for block in self.blocks:
            h = h + block(h)
        return h


class CalledTwice(nn.Module):
    """A layer that one pass calls twice."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(PIXELS, 8)
        self.again = nn.Linear(8, 8)

    def features(self, x: Tensor) -> Tensor:
        """Return the output [B, 8] of the second call."""
        h = self.first(x.flatten(1)).relu()
        out: Tensor = self.again(self.again(h).relu()).relu()
        return out


class Tied(nn.Module):
    """Two layers that share one weight."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(PIXELS, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight

    def features(self, x: Tensor) -> Tensor:
        """Return the output [B, 8] of the last layer."""
        out: Tensor = self.third(self.second(self.first(x.flatten(1)).relu()).relu()).relu()
        return out


class Embedded(nn.Module):
    """An embedding of the pixels, rounded to four values."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 6)
        self.out = nn.Linear(6, 6)

    def features(self, x: Tensor) -> Tensor:
        """Return features [B, 6] of the mean embedding."""
        words = (x.flatten(1) * 3).round().clamp(0, 3).long()
        out: Tensor = self.out(self.table(words).mean(1)).tanh()
        return out


class Recurrent(nn.Module):
    """A recurrent layer that takes the rows of the image one by one."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(SHAPE[2], 6, batch_first=True)

    def features(self, x: Tensor) -> Tensor:
        """Return the state [B, 6] after the last row."""
        last: Tensor = self.cell(x[:, 0])[0][:, -1]
        return last


class Attention(nn.Module):
    """An encoder layer on patches of the image."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, stride=2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)

    def features(self, x: Tensor) -> Tensor:
        """Return the mean [B, 8] over the patches."""
        mean: Tensor = self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1)
        return mean


def linear(change: Callable[[nn.Linear], object] = lambda layer: None) -> nn.Module:
    """Return two linear layers, of which `change` changes the second."""
    layer = nn.Linear(8, 6)
    net = Chain(nn.Flatten(), nn.Linear(PIXELS, 8), nn.ReLU(), layer, nn.ReLU(), width=6)
    change(layer)
    return net


def low_rank(layer: nn.Linear) -> None:
    """Add parameters with unusual names to a plain layer, and a hook that computes with them."""
    layer.down = nn.Parameter(torch.randn(2, layer.in_features) / 4)
    layer.up = nn.Parameter(torch.randn(layer.out_features, 2) / 4)
    layer.register_forward_hook(lambda m, args, out: out + args[0] @ m.down.T @ m.up.T)


def convolutions(
    inplace: bool = False, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, groups: int = 1
) -> nn.Module:
    """Return two convolutions, each with its norm and ReLU, and the mean over the pixels."""
    return Chain(
        nn.Conv2d(1, 4, 3, padding=1),
        norm(4),
        nn.ReLU(inplace),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups),
        norm(8),
        nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        width=8,
    )


def usual() -> nn.Module:
    """Return `cnn-small` with two convolutions; the weights are the same each time."""
    return seeded(lambda: cnn_small(SHAPE, widths=[6, 8]))


def unusual() -> nn.Module:
    """Return norms that do not follow a layer, a group norm, and a parameter that no layer holds.

    The weights are the same each time.
    """

    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.GroupNorm(2, 6)]
        layers += [nn.Conv2d(6, 8, 3), Scale(), nn.Flatten(), nn.Linear(128, 9), nn.Tanh()]
        return Chain(*layers, width=9)

    return seeded(build)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "convolutions": convolutions,
    "in-place activations": lambda: convolutions(inplace=True),
    "convolutions in groups": lambda: convolutions(groups=4),
    "group norm": lambda: convolutions(norm=lambda n: nn.GroupNorm(2, n)),
    "layer norm": lambda: Chain(nn.Flatten(), nn.Linear(PIXELS, 8), nn.LayerNorm(8), nn.GELU(), width=8),
    "one block at two places": SharedBlock,
    "a layer called twice": CalledTwice,
    "tied weights": Tied,
    "an adapter": lambda: Chain(nn.Flatten(), nn.Linear(PIXELS, 8), nn.ReLU(), Adapter(8, 6), nn.ReLU(), width=6),
    "a hook with parameters": lambda: linear(low_rank),
    "pruned": lambda: linear(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "weight norm by a hook": lambda: linear(weight_norm),
    "weight norm": lambda: linear(parametrizations.weight_norm),
    "orthogonal": lambda: linear(parametrizations.orthogonal),
    "an embedding": Embedded,
    "recurrent": Recurrent,
    "attention": Attention,
}
