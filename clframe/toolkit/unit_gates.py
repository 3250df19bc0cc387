"""Gates on the units of a network, a set for each task: a gate multiplies the output of its unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clframe.model import PerTask, graph_of
from clframe.toolkit.norms import TaskNorm
from clframe.toolkit.probing import at_units, find_followers, probe_features
from clframe.toolkit.weight_masks import list_names, undecayed_parameter

G = TypeVar("G", bound="Gated")


def gate_problems(
    plugin: str, net: nn.Module, layers: Mapping[str, nn.Module], input_shape: Sequence[int]
) -> list[str]:
    """Return a sentence if a weight of the `layers` of `net` has other uses than one call of its layer, else nothing.

    The gates of a layer say what its weights do for a task by that one call.

    Args:
        plugin: name of the plugin, for the sentence.
        net: the backbone.
        layers: the layers to gate, by name.
        input_shape: shape of one image.
    """
    calls: Counter[str] = Counter()
    hooks = [
        m.register_forward_hook(lambda m, args, out, name=name: calls.update([name])) for name, m in layers.items()
    ]
    frozen = [p for layer in layers.values() for p in layer.parameters() if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        features = probe_features(net, input_shape, hooks, gradients=True)
        uses = graph_of(features).uses if features.requires_grad else Counter[int]()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    more = [
        name for name, m in layers.items() if calls[name] > 1 or uses[id(m._parameters.get("weight"))] > calls[name]
    ]
    if not more:
        return []
    return [
        f"`{plugin}` gates a layer where it is called, once for an image, and the weight of {list_names(more)} is used "
        "elsewhere, too (a layer that is called twice or stands at two places, or whose weight is read without calling "
        "it): give each use a layer of its own, or choose another method."
    ]


class Gated(PerTask, ABC):
    """A layer, the norm after it, and a gate of the task for each of its units, which multiplies the output.

    Gates come after the activation, as their gradient depends on it. An activation that follows directly is therefore
    computed here; computing it again at its own place changes nothing.

    Args:
        layer: a linear layer, or a convolution.
        norm: the norm that took the output of the layer; None: there was none.

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

    @property
    def units_last(self) -> bool:
        """Return whether units are the last dimension of the input and the output, not the second."""
        return isinstance(self.layer, nn.Linear)

    @abstractmethod
    def gate(self, x: Tensor) -> Tensor:
        """Return the gates of the units for the input `x`: [B, C], or [1, C] if they do not depend on the image."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C_in, ...] to [B, C, ...]; of a linear layer [B, ..., C_in] to [B, ..., C]."""
        z: Tensor = self.norm(self.layer(x))
        if self.active is not None:
            z = self.active(z)
        return z * at_units(self.gate(x), z, self.units_last)


class AttentionGate(Gated):
    """Hard attention to the task (Serra et al., ICML 2018, section 2): gates sigmoid(s e), the same for each input.

    Args:
        layer, norm: see `Gated`.
        s_max: the temperature s in evaluation mode, and for learned tasks.

    Attributes:
        s: the temperature in training.
        used: [C] the highest attention that any learned task pays to each unit.
    """

    used: Tensor

    def __init__(self, layer: nn.Module, norm: _BatchNorm | None, s_max: float) -> None:
        super().__init__(layer, norm)
        self.s = s_max
        self.s_max = s_max
        self.embeddings = nn.ParameterList()
        self.register_buffer("used", next(layer.parameters()).new_zeros(self.units))

    def add(self, generator: torch.Generator) -> None:
        """Add the embedding of another task, [C] standard normal, drawn by `generator` on the CPU."""
        self.embeddings.append(undecayed_parameter(torch.randn(self.units, generator=generator).to(self.used)))

    def attention(self) -> Tensor:
        """Return the attention [C] of the current task, or of the latest one if that has no embedding yet."""
        s = self.s if self.training else self.s_max
        attention: Tensor = (s * self.embeddings[min(self.task, len(self.embeddings) - 1)]).sigmoid()  # eq. 1
        return attention

    def gate(self, x: Tensor) -> Tensor:
        """Return the attention as gates, [1, C]."""
        return self.attention()[None]

    def compensate_gradient(self) -> None:
        """Replace the factor that the temperature brings into the embedding's gradient (equation 5), in place."""
        e = self.embeddings[-1]
        if e.grad is not None:
            with torch.no_grad():
                steep = (self.s * e).clamp(-50, 50).cosh() + 1
                e.grad *= self.s_max / self.s * steep / (e.cosh() + 1)  # eq. 5

    def kept_shares(self, entering: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Return which share of each weight and bias belongs to learned tasks: min(a_i, a_j) and a_i (equation 2).

        Args:
            entering: [C_in] how much of each input comes from units that learned tasks attend to.

        Returns:
            pairs of a parameter and its shares, from 0 to 1, in the parameter's shape.
        """
        weight = self.layer.weight
        bias = self.layer.bias
        assert isinstance(weight, nn.Parameter)
        out = self.used.view(-1, *[1] * (weight.dim() - 1))
        groups = entering.view(-1, weight.shape[1])  # of a convolution in groups
        into = groups.repeat_interleave(len(weight) // len(groups), 0)
        into = into.view(*weight.shape[:2], *[1] * (weight.dim() - 2))
        pairs = [(weight, torch.minimum(out, into).expand_as(weight))]
        if isinstance(bias, nn.Parameter):
            pairs.append((bias, self.used))
        return pairs

    def finish(self) -> float:
        """End the latest task: add its attention to `used`, and return the share of units that it attends to."""
        attention: Tensor = (self.s_max * self.embeddings[-1].detach()).sigmoid()
        self.used.copy_(torch.maximum(self.used, attention))
        return (attention > 0.5).float().mean().item()


def gate_layers(
    net: nn.Module,
    layers: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    build: Callable[[nn.Module, _BatchNorm | None], G],
) -> dict[str, G]:
    """Replace each of the `layers` of `net`, and the batch norm after it, by what `build` makes of both.

    Args:
        net: the backbone; its modules no longer work in place afterwards.
        layers: the layers to gate, by name.
        input_shape: shape of one image.
        build: from a layer, and the norm after it or None, to its gated module.

    Returns:
        the gated modules, by the name of the layer.
    """
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # it would overwrite the output of a gate
    norms = find_followers(net, layers, (_BatchNorm,), input_shape)
    ends = {name: net.get_submodule(norms.get(name, name)) for name in layers}
    relus = find_followers(net, ends, (nn.ReLU, nn.ReLU6), input_shape)
    made = {}
    for name, layer in layers.items():
        norm = net.get_submodule(norms[name]) if name in norms else None
        assert norm is None or isinstance(norm, _BatchNorm)
        made[name] = build(layer, norm)
        if name in relus:
            made[name].active = type(net.get_submodule(relus[name]))()
        net.set_submodule(name, made[name])
        if norm is not None:
            net.set_submodule(norms[name], nn.Identity())
    return made
