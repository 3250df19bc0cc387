"""Parts of a network that belong to tasks: binary masks of weights, gates of units, norms for each task.

What differs by task is a `clframe.model.PerTask` module, installed in the hook ``grow``, in a backbone of any kind: as
a parametrisation of a layer's weight (`WeightMask`, `WeightOwner`), or around the layer (`Gated`). `Held` keeps single
entries of parameters as they are, whatever the optimizer.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import normalization
from torch.nn.modules.activation import __all__ as ACTIVATIONS
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from clframe.model import PerTask, evaluating
from clframe.per_sample import graph_of

M = TypeVar("M", bound=nn.Module)
G = TypeVar("G", bound="Gated")
NORMS = (_NormBase, *(getattr(normalization, name) for name in normalization.__all__))

# ------------------------------------------------------------------------------------ masks of weights


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


def packed(bits: Tensor) -> Tensor:
    """The values [n] bool as bits of [ceil(n / 8)] uint8."""
    padded = torch.zeros(-(-len(bits) // 8) * 8, dtype=torch.uint8, device=bits.device)
    padded[: len(bits)] = bits
    return (padded.view(-1, 8) << _places(bits)).sum(1).to(torch.uint8)


def unpacked(data: Tensor, n: int) -> Tensor:
    """The first `n` bits of what `packed` gave, [n] bool."""
    return ((data[:, None] >> _places(data)) & 1).flatten()[:n].bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def undecayed(values: Tensor) -> nn.Parameter:
    """A parameter of these values that no weight decay pulls at: 0 is no natural place for it."""
    parameter = nn.Parameter(values)
    parameter.decays = False  # type: ignore[attr-defined]  # read where the optimizer is built
    return parameter


def layers_of(net: nn.Module) -> dict[str, nn.Linear | _ConvNd]:
    """The linear layers and convolutions of `net`, by name."""
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear | _ConvNd)}


def masked_weights(net: nn.Module, build: Callable[[Tensor], M]) -> dict[str, M]:
    """Put what `build` makes of each layer's weight between the weight and the layer; what was put there, by layer."""
    made = {}
    for name, layer in layers_of(net).items():
        made[name] = build(layer.weight)
        parametrize.register_parametrization(layer, "weight", made[name], unsafe=True)
    return made


def installed(net: nn.Module, kind: type[M]) -> dict[str, M]:
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
        self.register_buffer("bits", packed(weight.new_zeros(weight.numel(), dtype=torch.bool)).expand(0, 2, -1))

    def begin(self, weight: Tensor) -> None:
        """A task comes; also replayed before its mask is loaded."""
        self.real = undecayed(torch.full_like(weight, self.init))
        row = self.bits.new_zeros(1, 2 if self.ternary else 1, -(-weight.numel() // 8))
        self.bits = torch.cat([self.bits[:, : row.shape[1]], row])

    def finish(self) -> float:
        """The task is learnt: keep the bits alone; the share of weights that it uses."""
        with torch.no_grad():
            mask = self.mask()
        signs = (mask > 0, mask < 0) if self.ternary else (mask > 0,)
        self.bits[-1] = torch.stack([packed(sign.flatten()) for sign in signs])
        self.real = None
        return (mask != 0).float().mean().item()

    def mask(self) -> Tensor:
        """Of the task whose turn it is, in the shape of the weight, which has one."""
        k = self.task - self.first
        if self.real is not None and k >= len(self.bits) - 1:
            return threshold(self.real, self.at, self.ternary)
        signs = [unpacked(row, self.shape.numel()).view(self.shape).float() for row in self.bits[k]]
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


class Held:
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
            f"`{plugin}` divides the weight of each layer among tasks, and that of {_named(computed)} is computed from "
            "other parameters (weight normalization, pruning or another parametrization): remove that from the network."
        )
    owners: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    tied = [name for name, layer in layers.items() if len(owners.get(id(layer._parameters.get("weight")), ())) > 1]
    if tied:
        yield (
            f"`{plugin}` divides the weight of each layer among tasks, and that of {_named(tied)} is the weight of "
            "another module, too: give each a weight of its own, or choose another method."
        )


def gate_problems(
    plugin: str, net: nn.Module, layers: Mapping[str, nn.Module], input_shape: Sequence[int]
) -> list[str]:
    """A sentence if a weight of the `layers` of `net` is used otherwise than by one call of its layer.

    The gates of a layer tell what its weights do for a task by that one call.
    """
    calls: Counter[str] = Counter()
    hooks = [
        m.register_forward_hook(lambda m, args, out, name=name: calls.update([name])) for name, m in layers.items()
    ]
    frozen = [p for layer in layers.values() for p in layer.parameters() if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        features = _try(net, input_shape, hooks, gradients=True)
        uses = graph_of(features)[1] if features.requires_grad else Counter[int]()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    more = [
        name for name, m in layers.items() if calls[name] > 1 or uses[id(m._parameters.get("weight"))] > calls[name]
    ]
    if not more:
        return []
    return [
        f"`{plugin}` gates a layer where it is called, once for an image, and the weight of {_named(more)} is used "
        "elsewhere, too (a layer that is called twice or stands at two places, or whose weight is read without calling "
        "it): give each use a layer of its own, or choose another method."
    ]


def _named(names: Sequence[str], most: int = 3) -> str:
    """The first of the `names`, for a sentence."""
    told = ", ".join(f"`{name}`" for name in names[:most])
    return f"{told} and {len(names) - most} more" if len(names) > most else told


# --------------------------------------------------------------------------- norms and gates of units


class TaskNorm(PerTask):
    """A batch norm for each task, with statistics of its own.

    Args:
        norm: the one that stood there.
        first: the first task that has another one.
    """

    def __init__(self, norm: _BatchNorm, first: int = 1) -> None:
        super().__init__()
        self.first = first
        self.norms = nn.ModuleList([norm])

    def add(self) -> None:
        """One for another task, as new."""
        made = copy.deepcopy(self.norms[0]).requires_grad_(True)
        assert isinstance(made, _BatchNorm)
        made.reset_parameters()
        self.norms.append(made)

    def forward(self, x: Tensor) -> Tensor:
        """`x`, normalised for the task."""
        k = max(0, self.task - self.first + 1)
        normalised: Tensor = self.norms[min(k, len(self.norms) - 1)](x)
        return normalised


def norms_by_task(net: nn.Module, first: int = 1) -> None:
    """Put a `TaskNorm` in the place of each batch norm of `net` that is not in one yet."""
    there = {id(norm) for module in net.modules() if isinstance(module, TaskNorm) for norm in module.norms}
    for name, module in list(net.named_modules()):
        if isinstance(module, _BatchNorm) and id(module) not in there:
            net.set_submodule(name, TaskNorm(module, first))


class Resting(nn.Module):
    """A norm that keeps its statistics, and normalises by them in train mode, too."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def train(self, mode: bool = True) -> Resting:
        """Nothing to train."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """`x`, normalised."""
        normalised: Tensor = self.norm(x)
        return normalised


def rest_norms(net: nn.Module) -> None:
    """Keep the statistics of the batch norms of `net` that learn nothing; those that do rest when they are frozen."""
    for name, module in list(net.named_modules()):
        if isinstance(module, _BatchNorm) and module.track_running_stats and not list(module.parameters()):
            net.set_submodule(name, Resting(module).train())


def followed_by(
    net: nn.Module, layers: Mapping[str, nn.Module], kinds: tuple[type[nn.Module], ...], input_shape: Sequence[int]
) -> dict[str, str]:
    """Which module of these `kinds`, by name, takes the output of which of the `layers`, as seen in a forward pass.

    It is the only one that takes it: in `bn(x) + x` it is not.
    """
    given: list[tuple[Tensor, str]] = []  # holds the outputs, so that no other tensor takes the place of one
    found: dict[str, str] = {}

    def out(name: str) -> Callable[..., None]:
        return lambda module, args, output: given.append((output, name))

    def into(taker: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for output, name in given:
                if args and output is args[0]:
                    found.setdefault(name, taker)  # the first: one that works in place gives the same tensor

        return hook

    takers = {name: m for name, m in net.named_modules() if not list(m.children())}
    hooks = [layer.register_forward_hook(out(name)) for name, layer in layers.items()]
    hooks += [m.register_forward_pre_hook(into(name)) for name, m in takers.items() if type(m) is not nn.Identity]
    _try(net, input_shape, hooks)
    found = {name: taker for name, taker in found.items() if isinstance(takers[taker], kinds)}
    if _cut(net, layers, found, input_shape):
        return found
    return {name: taker for name, taker in found.items() if _cut(net, layers, {name: taker}, input_shape)}


def _cut(net: nn.Module, layers: Mapping[str, nn.Module], found: Mapping[str, str], input_shape: Sequence[int]) -> bool:
    """Whether the features do without the outputs of `layers`, when the modules that are `found` after them do."""
    hooks = []
    for name, taker in found.items():
        hooks.append(layers[name].register_forward_hook(lambda module, args, out: torch.full_like(out, torch.nan)))
        hooks.append(net.get_submodule(taker).register_forward_hook(lambda module, args, out: torch.zeros_like(out)))
    return not _try(net, input_shape, hooks).isnan().any()


class Gated(PerTask, ABC):
    """A layer, the norm after it, and a gate of the task for each of its units, which multiplies what comes out.

    Gates come after the activation, as their gradient depends on it: where one follows directly, it is done here, and
    doing it again where it stands changes nothing.

    Args:
        layer: a linear layer, or a convolution.
        norm: the norm that took its output; None: there was none.

    Attributes:
        active: the ReLU that follows directly; None: none does.
    """

    def __init__(self, layer: nn.Module, norm: _BatchNorm | None) -> None:
        super().__init__()
        self.layer = layer
        self.norm: nn.Module = nn.Identity() if norm is None else TaskNorm(norm)
        assert isinstance(layer.weight, Tensor)
        self.units = len(layer.weight)
        self.active: nn.Module | None = None

    @abstractmethod
    def gate(self, x: Tensor) -> Tensor:
        """Gates [B, C] of the units for the input `x`, or [1, C] for every one."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] to [B, C, ...]; linear layers give [B, ..., C]."""
        z: Tensor = self.norm(self.layer(x))
        if self.active is not None:
            z = self.active(z)
        return z * _at_units(self.gate(x), z, self)


class AttentionGate(Gated):
    """Hard attention to the task (Serra et al., ICML 2018, section 2): gates sigmoid(s e), the same for each input.

    Args:
        layer, norm: see `Gated`.
        s_max: the s of answers, and of tasks that are learnt.

    Attributes:
        s: of training.
        used: [C] for each unit the most that any learnt task attends to it.
    """

    used: Tensor

    def __init__(self, layer: nn.Module, norm: _BatchNorm | None, s_max: float) -> None:
        super().__init__(layer, norm)
        self.s = self.s_max = s_max
        self.embeddings = nn.ParameterList()
        self.register_buffer("used", next(layer.parameters()).new_zeros(self.units))

    def add(self, generator: torch.Generator) -> None:
        """A task comes; its embedding is standard normal."""
        self.embeddings.append(undecayed(torch.randn(self.units, generator=generator).to(self.used)))

    def attention(self) -> Tensor:
        """Of the task whose turn it is, [C]."""
        s = self.s if self.training else self.s_max
        attention: Tensor = (s * self.embeddings[min(self.task, len(self.embeddings) - 1)]).sigmoid()
        return attention

    def gate(self, x: Tensor) -> Tensor:
        """[1, C]."""
        return self.attention()[None]

    def compensate(self) -> None:
        """Free the embedding's gradient of the factor that s brings (equation 5)."""
        e = self.embeddings[-1]
        if e.grad is not None:
            with torch.no_grad():
                steep = (self.s * e).clamp(-50, 50).cosh() + 1
                e.grad *= self.s_max / self.s * steep / (e.cosh() + 1)

    def kept(self, entering: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """How much each weight, and each bias, keeps of what it was: min(a_i, a_j) and a_i (equation 2).

        Args:
            entering: [C_in] how much of what enters comes from units that learnt tasks attend to.
        """
        weight, bias = self.layer.weight, self.layer.bias
        assert isinstance(weight, nn.Parameter)
        out = self.used.view(-1, *[1] * (weight.dim() - 1))
        groups = entering.view(-1, weight.shape[1])  # of a convolution in groups
        into = groups.repeat_interleave(len(weight) // len(groups), 0).view(
            *weight.shape[:2], *[1] * (weight.dim() - 2)
        )
        pairs = [(weight, torch.minimum(out, into).expand_as(weight))]
        return [*pairs, (bias, self.used)] if isinstance(bias, nn.Parameter) else pairs

    def close(self) -> float:
        """The task is learnt; the share of units that it attends to."""
        attention: Tensor = (self.s_max * self.embeddings[-1].detach()).sigmoid()
        self.used.copy_(torch.maximum(self.used, attention))
        return (attention > 0.5).float().mean().item()


def gate_layers(
    net: nn.Module,
    layers: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    build: Callable[[nn.Module, _BatchNorm | None], G],
) -> dict[str, G]:
    """Put what `build` makes of each of the `layers` and the norm after it in the place of both; by the layer."""
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # it would write into what a gate gives
    after = followed_by(net, layers, (_BatchNorm,), input_shape)
    ends = {name: net.get_submodule(after.get(name, name)) for name in layers}
    relus = followed_by(net, ends, (nn.ReLU, nn.ReLU6), input_shape)
    made = {}
    for name, layer in layers.items():
        norm = net.get_submodule(after[name]) if name in after else None
        assert norm is None or isinstance(norm, _BatchNorm)
        made[name] = build(layer, norm)
        if name in relus:
            made[name].active = type(net.get_submodule(relus[name]))()
        net.set_submodule(name, made[name])
        if norm is not None:
            net.set_submodule(after[name], nn.Identity())
    return made


def reached(net: nn.Module, units: Mapping[str, Tensor], input_shape: Sequence[int]) -> dict[str, Tensor]:
    """How much of what enters each gated layer comes from units that count, by the layer's name.

    `units` gives for each layer how much its units count, [C] from 0 to 1. They are sent through the backbone as if
    they were what the layers give: activations, pooling and sums do with them what they do with features, so that this
    holds for any order of layers. Norms that stand before their layers give 1, and so do the image's pixels;
    parameters that are in no layer count as 1.

    Returns:
        [C_in] of each layer, the most of any pixel.
    """
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].clamp(0, 1)
            x = x.flatten(0, -2) if _units_last(module) else x.transpose(0, 1).flatten(1).T
            found[name] = x.amax(0)

        return hook

    def instead(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # a copy, as what follows may work in place
            return _at_units(units[name][None], output, module).expand_as(output).clone()

        return hook

    layers = {id(p) for name in units for p in net.get_submodule(name).parameters()}
    others = [(p, p.data) for p in net.parameters() if id(p) not in layers]
    hooks = []
    for name, module in net.named_modules():
        if name in units:
            hooks += [module.register_forward_pre_hook(note(name)), module.register_forward_hook(instead(name))]
        elif isinstance(module, NORMS):
            hooks.append(module.register_forward_hook(lambda module, args, output: torch.ones_like(output)))
        elif type(module).__name__ in ACTIVATIONS and not list(module.parameters()):
            hooks.append(module.register_forward_hook(lambda module, args, output: args[0]))
    try:
        for parameter, _ in others:
            parameter.data = torch.ones_like(parameter)
        _try(net, input_shape, hooks)
    finally:
        for parameter, value in others:
            parameter.data = value
    return found


def _units_last(module: nn.Module) -> bool:
    """Whether units are the last dimension of what a gated layer takes and gives, and not the second."""
    return isinstance(module, Gated) and isinstance(module.layer, nn.Linear)


def _at_units(values: Tensor, output: Tensor, module: nn.Module) -> Tensor:
    """`values` [B, C] of the units of a gated layer, to be multiplied with its output."""
    ones = [1] * (output.dim() - 2)
    return values.view(len(values), *ones, -1) if _units_last(module) else values.view(*values.shape, *ones)


def _try(net: nn.Module, input_shape: Sequence[int], hooks: Iterable[Any], gradients: bool = False) -> Tensor:
    """Features of an image of ones; the pass changes nothing but what the hooks note, and they are removed."""
    like = next(net.parameters())
    try:
        with evaluating(net), torch.set_grad_enabled(gradients):
            features: Tensor = net.features(torch.ones(1, *input_shape).to(like))  # type: ignore[operator]
            return features
    finally:
        for hook in hooks:
            hook.remove()
