"""Gates on the units of a network, a set for each task, and which units a gate reaches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.activation import __all__ as ACTIVATIONS
from torch.nn.modules.batchnorm import _BatchNorm

from clframe.model import PerTask, evaluating
from clframe.toolkit.norms import NORMS, TaskNorm
from clframe.toolkit.per_sample import graph_of
from clframe.toolkit.weight_masks import _named, undecayed

G = TypeVar("G", bound="Gated")


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


def propagate_importance(net: nn.Module, units: Mapping[str, Tensor], input_shape: Sequence[int]) -> dict[str, Tensor]:
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
