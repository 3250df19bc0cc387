"""Binary masks on the weights of a network, a set for each task, and single entries that no optimizer may move.

`WeightMask` and `WeightOwner` are `clframe.model.PerTask` modules, installed in the hook ``grow`` as parametrizations
of a layer's weight, in a backbone of any kind. `PinnedEntries` keeps single entries of parameters as they are, whatever
the optimizer.
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
    @staticmethod
    def forward(ctx: Any, real: Tensor, threshold: float, ternary: bool) -> Tensor:
        mask = (real > threshold).to(real.dtype)
        return mask - (real < 0).to(real.dtype) if ternary else mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def threshold(real: Tensor, at: float, ternary: bool = False) -> Tensor:
    """1 where `real` > `at`, else 0; and -1 where it is below 0, if `ternary`. Backward it is the identity.

    The straight-through estimator of Mallya, Davis and Lazebnik (Piggyback, ECCV 2018), section 3.
    """
    mask: Tensor = _Threshold.apply(real, at, ternary)
    return mask


def pack_bits(bits: Tensor) -> Tensor:
    """The values [n] bool as bits of [ceil(n / 8)] uint8."""
    padded = torch.zeros(-(-len(bits) // 8) * 8, dtype=torch.uint8, device=bits.device)
    padded[: len(bits)] = bits
    return (padded.view(-1, 8) << _places(bits)).sum(1).to(torch.uint8)


def unpack_bits(data: Tensor, n: int) -> Tensor:
    """The first `n` bits of what `pack_bits` gave, [n] bool."""
    return ((data[:, None] >> _places(data)) & 1).flatten()[:n].bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def undecayed_parameter(values: Tensor) -> nn.Parameter:
    """A parameter of these values that no weight decay pulls at: 0 is no natural place for it."""
    parameter = nn.Parameter(values)
    parameter.decays = False  # type: ignore[attr-defined]  # read where the optimizer is built
    return parameter


def layers_of(net: nn.Module) -> dict[str, nn.Linear | _ConvNd]:
    """The linear layers and convolutions of `net`, by name."""
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear | _ConvNd)}


def mask_weights(net: nn.Module, build: Callable[[Tensor], M]) -> dict[str, M]:
    """Put what `build` makes of each layer's weight between the weight and the layer; what was put there, by layer."""
    made = {}
    for name, layer in layers_of(net).items():
        made[name] = build(layer.weight)
        parametrize.register_parametrization(layer, "weight", made[name], unsafe=True)
    return made


def find_modules(net: nn.Module, kind: type[M]) -> dict[str, M]:
    """All modules of a kind in `net`, by the name of the layer that they are in or around."""
    found = {name: m for name, m in net.named_modules() if isinstance(m, kind)}
    return {name.removesuffix(".parametrizations.weight.0"): m for name, m in found.items()}


class WeightMask(PerTask):
    """A parametrisation: the weight times a binary (or ternary) mask of the task.

    The mask that is being learnt is a real one, a parameter; of those that are learnt only the bits remain: one for
    each weight, two if `ternary`. Tasks before `first` have the weight itself.

    Args:
        weight: that is masked.
        first: the first task that has a mask.
        init: of the real mask.
        at: the threshold of the real mask.
        ternary: see `threshold`.
    """

    bits: Tensor
    real: nn.Parameter | None

    def __init__(self, weight: Tensor, first: int, init: float, at: float, ternary: bool = False) -> None:
        super().__init__()
        self.first, self.init, self.at, self.ternary = first, init, at, ternary
        self.shape = weight.shape
        self.register_parameter("real", None)
        self.register_buffer("bits", pack_bits(weight.new_zeros(weight.numel(), dtype=torch.bool)).expand(0, 2, -1))

    def begin(self, weight: Tensor) -> None:
        """A task comes; also replayed before its mask is loaded."""
        self.real = undecayed_parameter(torch.full_like(weight, self.init))
        row = self.bits.new_zeros(1, 2 if self.ternary else 1, -(-weight.numel() // 8))
        self.bits = torch.cat([self.bits[:, : row.shape[1]], row])

    def finish(self) -> float:
        """The task is learnt: keep the bits alone; the share of weights that it uses."""
        with torch.no_grad():
            mask = self.mask()
        signs = (mask > 0, mask < 0) if self.ternary else (mask > 0,)
        self.bits[-1] = torch.stack([pack_bits(sign.flatten()) for sign in signs])
        self.real = None
        return (mask != 0).float().mean().item()

    def mask(self) -> Tensor:
        """Of the task whose turn it is, in the shape of the weight, which has one."""
        k = self.task - self.first
        if self.real is not None and k >= len(self.bits) - 1:
            return threshold(self.real, self.at, self.ternary)
        signs = [unpack_bits(row, self.shape.numel()).view(self.shape).float() for row in self.bits[k]]
        return signs[0] - signs[1] if self.ternary else signs[0]

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the task computes with."""
        return weight * self.mask() if self.task >= self.first and len(self.bits) else weight

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}real" not in state:  # it was saved after the task was learnt
            self.real = None
        super()._load_from_state_dict(state, prefix, *args)


class WeightOwner(PerTask):
    """A parametrisation: what the tasks up to the one whose turn it is own of the weight; the rest is 0.

    The latest task sees all of it: what nobody owns is its to train, and 0 when it is done.

    Attributes:
        owner: [as the weight] uint8, for each entry the number of its task, from 1; 0: it is free.
        latest: the latest task.
    """

    owner: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.latest = 0
        self.register_buffer("owner", torch.zeros_like(weight, dtype=torch.uint8))

    def take(self, weight: Tensor, share: float) -> None:
        """The latest task takes the largest `share` of the free entries, in magnitude; the others become 0."""
        free = (self.owner == 0).nonzero(as_tuple=True)
        values = weight.detach()[free].abs()
        count = round(share * len(values))
        mine = values.argsort(descending=True, stable=True)[:count]
        self.owner[tuple(axis[mine] for axis in free)] = self.latest + 1
        with torch.no_grad():
            weight.masked_fill_(self.owner == 0, 0.0)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the task computes with."""
        if self.task >= self.latest:
            return weight
        return weight * ((self.owner > 0) & (self.owner <= self.task + 1))


class PinnedEntries:
    """Entries of parameters that stay exactly as they are now, whatever the optimizer, its momentum or its decay do.

    Args:
        entries: pairs of a parameter, and a mask of the entries that are held, which can be broadcast to its shape.
    """

    def __init__(self, entries: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        self.entries = [(p, mask.expand_as(p), p.detach().clone()) for p, mask in entries]

    def clear_gradients(self) -> None:
        """To be called before the optimizer's step, and before gradients are clipped."""
        for parameter, mask, _ in self.entries:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(mask, 0.0)

    @torch.no_grad()
    def put_back(self) -> None:
        """To be called after the step."""
        for parameter, mask, value in self.entries:
            parameter.copy_(torch.where(mask, value, parameter))


# ------------------------------------------------------------------- networks that cannot be divided


def weight_problems(plugin: str, net: nn.Module, layers: Mapping[str, nn.Module], model: str) -> Iterator[str]:
    """One sentence for each reason for which `plugin` cannot divide the weights of the `layers` of `net` among tasks.

    Args:
        plugin: the name of the plugin.
        net: the backbone.
        layers: whose weights those are, by name.
        model: the name of the backbone.
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
    """The first of the `names`, for a sentence."""
    told = ", ".join(f"`{name}`" for name in names[:most])
    return f"{told} and {len(names) - most} more" if len(names) > most else told
