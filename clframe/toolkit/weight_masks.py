"""Masks on the weights of a network for each task, and pinned entries, which no optimizer can move.

`WeightMask` and `WeightOwner` are `clframe.model.PerTask` modules. The hook ``grow`` installs them as parametrizations
of the weights of layers, in a backbone of any kind. `PinnedEntries` keeps single entries of parameters at their values
under any optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from clframe.model import PerTask

M = TypeVar("M", bound=nn.Module)


class _Threshold(torch.autograd.Function):
    """The threshold of `threshold`, with the identity as its backward pass."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, threshold: float, ternary: bool) -> Tensor:
        mask = (real > threshold).to(real.dtype)
        return mask - (real < 0).to(real.dtype) if ternary else mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def threshold(real: Tensor, at: float, ternary: bool = False) -> Tensor:
    """Return 1 where `real` > `at`, else 0; if `ternary`, -1 where `real` is below 0.

    The backward pass is the identity: the straight-through estimator of Mallya, Davis and Lazebnik (Piggyback, ECCV
    2018), section 3.
    """
    mask: Tensor = _Threshold.apply(real, at, ternary)
    return mask


def pack_bits(bits: Tensor) -> Tensor:
    """Pack the values [n] bool into the bits of [ceil(n / 8)] uint8."""
    padded = torch.zeros(-(-len(bits) // 8) * 8, dtype=torch.uint8, device=bits.device)
    padded[: len(bits)] = bits
    return (padded.view(-1, 8) << _places(bits)).sum(1).to(torch.uint8)


def unpack_bits(data: Tensor, n: int) -> Tensor:
    """Unpack the first `n` bits of what `pack_bits` returned, as [n] bool."""
    return ((data[:, None] >> _places(data)) & 1).flatten()[:n].bool()


def _places(like: Tensor) -> Tensor:
    """Return the places of the bits in a byte, on the device of `like`."""
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def undecayed_parameter(values: Tensor) -> nn.Parameter:
    """Create a parameter of these values, exempt from weight decay, for which 0 is not a sensible prior."""
    parameter = nn.Parameter(values)
    parameter.decays = False  # type: ignore[attr-defined]  # read where the optimizer is built
    return parameter


def layers_of(net: nn.Module) -> dict[str, nn.Linear | _ConvNd]:
    """Return the linear layers and convolutions of `net`, by name."""
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear | _ConvNd)}


def mask_weights(net: nn.Module, build: Callable[[Tensor], M]) -> dict[str, M]:
    """Install a parametrization on the weight of each layer of `net`.

    Args:
        net: the backbone.
        build: from the weight of a layer to the module that the layer's weight passes through.

    Returns:
        the installed modules, by the name of the layer.
    """
    made = {}
    for name, layer in layers_of(net).items():
        made[name] = build(layer.weight)
        parametrize.register_parametrization(layer, "weight", made[name], unsafe=True)
    return made


def find_modules(net: nn.Module, kind: type[M]) -> dict[str, M]:
    """Return all modules of a kind in `net`, by the name of the layer that they parametrize or contain."""
    found = {name: m for name, m in net.named_modules() if isinstance(m, kind)}
    return {name.removesuffix(".parametrizations.weight.0"): m for name, m in found.items()}


class WeightMask(PerTask):
    """A parametrization that multiplies a weight with a binary (or ternary) mask of the task.

    The mask of the task in training is the threshold of a parameter, the real mask. Of learned masks the bits alone
    remain: one for each weight, two if `ternary`. Tasks before `first` use the weight itself.

    Args:
        weight: the weight to mask.
        first: the first task that has a mask.
        init: initial value of the real mask.
        at: the threshold of the real mask.
        ternary: see `threshold`.

    Attributes:
        bits: [tasks, 1, bytes] uint8, or [tasks, 2, bytes] if `ternary`: the masks of the tasks.
        real: the real mask, in the shape of the weight; None between tasks.
    """

    bits: Tensor
    real: nn.Parameter | None

    def __init__(self, weight: Tensor, first: int, init: float, at: float, ternary: bool = False) -> None:
        super().__init__()
        self.first = first
        self.init = init
        self.at = at
        self.ternary = ternary
        self.shape = weight.shape
        self.register_parameter("real", None)
        self.register_buffer("bits", pack_bits(weight.new_zeros(weight.numel(), dtype=torch.bool)).expand(0, 2, -1))

    def begin(self, weight: Tensor) -> None:
        """Begin the mask of another task; also called to rebuild the structure before a mask is loaded.

        Args:
            weight: the weight to mask, for shape, precision and device.
        """
        self.real = undecayed_parameter(torch.full_like(weight, self.init))
        row = self.bits.new_zeros(1, 2 if self.ternary else 1, -(-weight.numel() // 8))
        self.bits = torch.cat([self.bits[:, : row.shape[1]], row])

    def finish(self) -> float:
        """End the mask of the latest task: keep its bits alone, and return the share of weights that it uses."""
        with torch.no_grad():
            mask = self.mask()
        signs = (mask > 0, mask < 0) if self.ternary else (mask > 0,)
        self.bits[-1] = torch.stack([pack_bits(sign.flatten()) for sign in signs])
        self.real = None
        return (mask != 0).float().mean().item()

    def mask(self) -> Tensor:
        """Return the mask of the current task, which has one, in the shape of the weight."""
        k = self.task - self.first
        if self.real is not None and k >= len(self.bits) - 1:
            return threshold(self.real, self.at, self.ternary)
        signs = [unpack_bits(row, self.shape.numel()).view(self.shape).float() for row in self.bits[k]]
        return signs[0] - signs[1] if self.ternary else signs[0]

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the current task computes with."""
        if self.task < self.first or not len(self.bits):
            return weight
        return weight * self.mask()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}real" not in state:  # it was saved after the task was learned
            self.real = None
        super()._load_from_state_dict(state, prefix, *args)


class WeightOwner(PerTask):
    """A parametrization that shows a task the weights owned by tasks up to it; all other entries are 0.

    The latest task computes with the whole weight: it trains the entries without an owner, and those that it does not
    take are 0 after it.

    Attributes:
        owner: [as the weight] uint8, for each entry the number of its task, from 1; 0: the entry is free.
        latest: index of the latest task.
    """

    owner: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.latest = 0
        self.register_buffer("owner", torch.zeros_like(weight, dtype=torch.uint8))

    def take(self, weight: Tensor, share: float) -> None:
        """Give the largest `share` of the free entries, by magnitude, to the latest task; set the others to 0.

        Args:
            weight: the weight, modified in place.
            share: from 0 to 1.
        """
        free = (self.owner == 0).nonzero(as_tuple=True)
        values = weight.detach()[free].abs()
        count = round(share * len(values))
        mine = values.argsort(descending=True, stable=True)[:count]
        self.owner[tuple(axis[mine] for axis in free)] = self.latest + 1
        with torch.no_grad():
            weight.masked_fill_(self.owner == 0, 0.0)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the current task computes with."""
        if self.task >= self.latest:
            return weight
        return weight * ((self.owner > 0) & (self.owner <= self.task + 1))


class PinnedEntries:
    """Entries of parameters that stay exactly at their values of now, despite momentum and weight decay.

    Args:
        entries: pairs of a parameter and a mask [bool] of the entries to pin, which can be broadcast to its shape.
    """

    def __init__(self, entries: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        self.entries = [(p, mask.expand_as(p), p.detach().clone()) for p, mask in entries]

    def clear_gradients(self) -> None:
        """Clear the gradients of the pinned entries: before gradients are clipped, and before the optimizer's step."""
        for parameter, mask, _ in self.entries:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(mask, 0.0)

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the values of the pinned entries after the optimizer's step."""
        for parameter, mask, value in self.entries:
            parameter.copy_(torch.where(mask, value, parameter))


# ------------------------------------------------------------------- networks that cannot be divided


def weight_problems(plugin: str, net: nn.Module, layers: Mapping[str, nn.Module], model: str) -> Iterator[str]:
    """Yield a sentence for each reason why `plugin` cannot divide the weights of the `layers` of `net` among tasks.

    Args:
        plugin: name of the plugin.
        net: the backbone.
        layers: the layers whose weights are divided, by name.
        model: name of the backbone.
    """
    if not layers:
        yield f"`{plugin}` works on linear layers and convolutions, and `{model}` has none: choose another `--model`."
    computed = [name for name, layer in layers.items() if layer._parameters.get("weight") is None]
    if computed:
        yield (
            f"`{plugin}` divides the weight of each layer among tasks, and that of {list_names(computed)} is computed "
            "from other parameters (weight normalization, pruning or another parametrization): remove that from the "
            "network."
        )
    owners: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    tied = [name for name, layer in layers.items() if len(owners.get(id(layer._parameters.get("weight")), ())) > 1]
    if tied:
        yield (
            f"`{plugin}` divides the weight of each layer among tasks, and that of {list_names(tied)} is the weight of "
            "another module, too: give each a weight of its own, or choose another method."
        )


def list_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first `most` of the `names` as part of a sentence, with the number of the others."""
    listed = ", ".join(f"`{name}`" for name in names[:most])
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed
