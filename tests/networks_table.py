"""Small backbones for images [1, 6, 6] as people build them: shared, normalised, recurrent and adapted parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

SHAPE = (1, 6, 6)


class Chain(nn.Module):
    """Modules one after the other, on the image or on its flattened form."""

    def __init__(self, *modules: nn.Module, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*modules)
        self.width = width

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features


def linear(change: Callable[[nn.Linear], object] = lambda layer: None) -> nn.Module:
    net = Chain(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), width=6)
    layer = net.body[3]
    assert isinstance(layer, nn.Linear)
    change(layer)
    return net


class Adapter(nn.Module):
    """A linear layer with a correction of low rank and a scale of its own: three parameters of other names."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs) / 4)
        self.up = nn.Parameter(torch.randn(outputs, 2) / 4)
        self.scale = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) * self.scale + x @ self.down.T @ self.up.T
        return out


def low_rank(layer: nn.Linear) -> None:
    """Parameters of other names in a plain layer, which a hook computes with."""
    layer.down = nn.Parameter(torch.randn(2, layer.in_features) / 4)
    layer.up = nn.Parameter(torch.randn(layer.out_features, 2) / 4)
    layer.register_forward_hook(lambda m, args, out: out + args[0] @ m.down.T @ m.up.T)


class SharedBlock(nn.Module):
    """One block that stands at two places of a list."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(36, 8)
        block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())
        self.blocks = nn.ModuleList([block, block])

    def features(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x.flatten(1))
        for block in self.blocks:
            h = h + block(h)
        return h


class CalledTwice(nn.Module):
    """One layer that a pass calls twice."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(36, 8), nn.Linear(8, 8)

    def features(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1)).relu()
        out: Tensor = self.again(self.again(h).relu()).relu()
        return out


class Tied(nn.Module):
    """Two layers of one weight."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.third.weight = self.second.weight

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(self.second(self.first(x.flatten(1)).relu()).relu()).relu()
        return out


class Embedded(nn.Module):
    """An embedding of what each pixel is rounded to."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(4, 6), nn.Linear(6, 6)

    def features(self, x: Tensor) -> Tensor:
        words = (x.flatten(1) * 3).round().clamp(0, 3).long()
        out: Tensor = self.out(self.table(words).mean(1)).tanh()
        return out


class Recurrent(nn.Module):
    """Rows of the image as a sequence."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(6, 6, batch_first=True)

    def features(self, x: Tensor) -> Tensor:
        last: Tensor = self.cell(x[:, 0])[0][:, -1]
        return last


class Attention(nn.Module):
    """Patches of the image in an encoder layer."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, stride=2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)

    def features(self, x: Tensor) -> Tensor:
        mean: Tensor = self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1)
        return mean


def convolutions(
    inplace: bool = False, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, groups: int = 1
) -> nn.Module:
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


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "convolutions": convolutions,
    "in-place activations": lambda: convolutions(inplace=True),
    "convolutions in groups": lambda: convolutions(groups=4),
    "group norm": lambda: convolutions(norm=lambda n: nn.GroupNorm(2, n)),
    "layer norm": lambda: Chain(nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.GELU(), width=8),
    "one block at two places": SharedBlock,
    "a layer called twice": CalledTwice,
    "tied weights": Tied,
    "an adapter": lambda: Chain(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), Adapter(8, 6), nn.ReLU(), width=6),
    "a hook with parameters": lambda: linear(low_rank),
    "pruned": lambda: linear(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "weight norm of old": lambda: linear(weight_norm),
    "weight norm": lambda: linear(parametrizations.weight_norm),
    "orthogonal": lambda: linear(parametrizations.orthogonal),
    "an embedding": Embedded,
    "recurrent": Recurrent,
    "attention": Attention,
}
