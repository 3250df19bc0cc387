"""Compaction of a gated network for one task, without the channels that never open: the same answers at less cost."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from clframe.model import IncrementalNet, snapshot
from clframe.toolkit.channel_gates import ConditionalConv, Gate
from clframe.toolkit.norms import TaskNorm
from clframe.toolkit.probing import propagate_importance
from clframe.toolkit.weight_masks import find_modules


def compact(model: IncrementalNet, task: int, input_shape: Sequence[int]) -> IncrementalNet:
    """Return a copy of a network with channel gates for `task` alone, with the channels that may open for it.

    Args:
        model: a network with a gate for the channels of each convolution, as after training with channel gates.
        task: index of a learned task.
        input_shape: shape of one image.

    Returns:
        a network in evaluation mode whose logits are those of `model` for the task, up to rounding.
    """
    made = snapshot(model)
    made.select(task)
    net = made.backbone
    convs = find_modules(net, ConditionalConv)
    live = {name: conv.fired[task] for name, conv in convs.items()}
    entering = propagate_importance(net, {name: channels.float() for name, channels in live.items()}, input_shape)
    chain = _is_chain(net)
    for i, (name, conv) in enumerate(convs.items()):
        if conv.layer.groups > 1:
            small = CompactConv(conv, task, None, None)
        else:
            small = CompactConv(conv, task, live[name], entering[name] > 0)
        small.gathers = not chain or i == 0
        small.scatters = not chain or i == len(convs) - 1
        net.set_submodule(name, small)
    for name, norm in find_modules(net, TaskNorm).items():
        net.set_submodule(name, norm.norms[task])
    return made


def _is_chain(net: nn.Module) -> bool:
    """Return whether each convolution works on the maps of the one before, and on no others."""
    line = getattr(net, "net", None)
    return isinstance(line, nn.Sequential) and all(
        layer in list(line) and layer.layer.groups == 1 for layer in net.modules() if isinstance(layer, ConditionalConv)
    )


class CompactConv(nn.Module):
    """A convolution with its norm and gates that computes some of the channels.

    Args:
        conv: the convolution with all channels.
        task: index of the task whose norm and gates are used.
        out: [C] bool, the channels to compute; None: all.
        into: [C_in] bool, the input channels that can differ from 0; None: all.

    Attributes:
        gathers: whether the input has all channels, not those of `into` alone.
        scatters: whether the output gets all channels, with zeros in those that are not computed.
    """

    def __init__(self, conv: ConditionalConv, task: int, out: Tensor | None, into: Tensor | None) -> None:
        super().__init__()
        layer = copy.deepcopy(conv.layer)
        gate = copy.deepcopy(cast(Gate, conv.gates[task]))
        norm = copy.deepcopy(conv.norm.norms[task]) if isinstance(conv.norm, TaskNorm) else nn.Identity()
        self.units = conv.units
        self.gathers = True
        self.scatters = True
        self.out = None if out is None or out.all() else out.nonzero().flatten()
        self.into = None if into is None or into.all() else into.nonzero().flatten()
        if self.into is not None:
            _select_entries(layer, 1, self.into, "weight")
            layer.in_channels = len(self.into)
            _select_entries(gate.inner, 1, self.into, "weight")
        if self.out is not None:
            _select_entries(layer, 0, self.out, "weight", "bias")
            layer.out_channels = len(self.out)
            _select_entries(gate.outer, 0, self.out, "weight", "bias")
            _select_entries(norm, 0, self.out, "weight", "bias", "running_mean", "running_var")
        self.layer: _ConvNd = layer
        self.norm: _BatchNorm | nn.Identity = cast(_BatchNorm | nn.Identity, norm)
        self.gate = gate
        self.active = conv.active

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C_in, ...], or the channels of `into` alone, to [B, C, ...], or the channels of `out` alone."""
        if self.gathers and self.into is not None:
            x = x[:, self.into]
        z: Tensor = self.norm(self.layer(x))
        if self.active is not None:
            z = self.active(z)
        gates = (self.gate(x) > 0).to(z.dtype)
        z = z * gates.view(*gates.shape, *[1] * (z.dim() - 2))
        if self.scatters and self.out is not None:
            return z.new_zeros(len(z), self.units, *z.shape[2:]).index_copy_(1, self.out, z)
        return z


def _select_entries(module: nn.Module, dim: int, where: Tensor, *names: str) -> None:
    """Reduce the tensors of these names in `module` to the entries `where` along `dim`."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, nn.Parameter):
            setattr(module, name, nn.Parameter(value.detach().index_select(dim, where), requires_grad=False))
        elif isinstance(value, Tensor):
            setattr(module, name, value.index_select(dim, where))
