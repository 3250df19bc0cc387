"""Probes of a network by one forward pass: which module follows a layer, and which units reach its input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.activation import __all__ as ACTIVATIONS

from clframe.model import evaluating
from clframe.toolkit.norms import NORMS


def probe_features(net: nn.Module, input_shape: Sequence[int], hooks: Iterable[Any], gradients: bool = False) -> Tensor:
    """Return the features [1, D] of an image of ones, in evaluation mode, and remove the `hooks` afterwards.

    Nothing in `net` changes but for what the hooks do.

    Args:
        net: the backbone.
        input_shape: shape of one image.
        hooks: handles of the hooks that observe the pass; they are removed after an error, too.
        gradients: record the autograd graph.
    """
    like = next(net.parameters())
    try:
        with evaluating(net), torch.set_grad_enabled(gradients):
            features: Tensor = net.features(torch.ones(1, *input_shape).to(like))  # type: ignore[operator]
            return features
    finally:
        for hook in hooks:
            hook.remove()


def find_followers(
    net: nn.Module, layers: Mapping[str, nn.Module], kinds: tuple[type[nn.Module], ...], input_shape: Sequence[int]
) -> dict[str, str]:
    """Return the module of one of these `kinds` that takes the output of a layer: by the layer's name, its name.

    Modules that are not the only user of the output are left out, such as the norm in ``bn(x) + x``.

    Args:
        net: the backbone.
        layers: the layers whose followers are searched, by name.
        kinds: classes of the followers.
        input_shape: shape of one image, for the forward pass by which the followers are found.
    """
    given: list[tuple[Tensor, str]] = []  # holds the outputs, so that no other tensor takes the place of one
    found: dict[str, str] = {}

    def note_output(name: str) -> Callable[..., None]:
        return lambda module, args, output: given.append((output, name))

    def note_input(taker: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for output, name in given:
                if args and output is args[0]:
                    found.setdefault(name, taker)  # the first: one that works in place gives the same tensor

        return hook

    takers = {name: m for name, m in net.named_modules() if not list(m.children())}
    hooks = [layer.register_forward_hook(note_output(name)) for name, layer in layers.items()]
    hooks += [m.register_forward_pre_hook(note_input(name)) for name, m in takers.items() if type(m) is not nn.Identity]
    probe_features(net, input_shape, hooks)
    found = {name: taker for name, taker in found.items() if isinstance(takers[taker], kinds)}
    if _are_only_takers(net, layers, found, input_shape):
        return found
    return {name: taker for name, taker in found.items() if _are_only_takers(net, layers, {name: taker}, input_shape)}


def _are_only_takers(
    net: nn.Module, layers: Mapping[str, nn.Module], found: Mapping[str, str], input_shape: Sequence[int]
) -> bool:
    """Return whether the outputs of `layers` reach the features through the modules `found` after them alone.

    The outputs become NaN, and those of the modules after them 0: a NaN in the features has taken another way.
    """
    hooks = []
    for name, taker in found.items():
        hooks.append(layers[name].register_forward_hook(lambda module, args, out: torch.full_like(out, torch.nan)))
        hooks.append(net.get_submodule(taker).register_forward_hook(lambda module, args, out: torch.zeros_like(out)))
    return not probe_features(net, input_shape, hooks).isnan().any()


def propagate_importance(net: nn.Module, units: Mapping[str, Tensor], input_shape: Sequence[int]) -> dict[str, Tensor]:
    """Return how much of the input of each gated layer comes from important units, by the layer's name.

    The importances are sent through the backbone as if they were the outputs of the layers: activations, pooling and
    sums do with them what they do with features, so that the result holds for any order of layers. Norms that stand
    before their layers give 1, and so do the pixels of the image; parameters outside the layers count as 1.

    Args:
        net: the backbone.
        units: the importance of the units of each layer, [C] from 0 to 1, by the layer's name.
        input_shape: shape of one image.

    Returns:
        [C_in] for each layer, the maximum over all pixels.
    """
    found: dict[str, Tensor] = {}

    def note_input(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].clamp(0, 1)
            x = x.flatten(0, -2) if _has_units_last(module) else x.transpose(0, 1).flatten(1).T
            found[name] = x.amax(0)

        return hook

    def replace_output(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # a copy, as what follows may work in place
            return at_units(units[name][None], output, _has_units_last(module)).expand_as(output).clone()

        return hook

    layers = {id(p) for name in units for p in net.get_submodule(name).parameters()}
    others = [(p, p.data) for p in net.parameters() if id(p) not in layers]
    hooks = []
    for name, module in net.named_modules():
        if name in units:
            hooks.append(module.register_forward_pre_hook(note_input(name)))
            hooks.append(module.register_forward_hook(replace_output(name)))
        elif isinstance(module, NORMS):
            hooks.append(module.register_forward_hook(lambda module, args, output: torch.ones_like(output)))
        elif type(module).__name__ in ACTIVATIONS and not list(module.parameters()):
            hooks.append(module.register_forward_hook(lambda module, args, output: args[0]))
    try:
        for parameter, _ in others:
            parameter.data = torch.ones_like(parameter)
        probe_features(net, input_shape, hooks)
    finally:
        for parameter, value in others:
            parameter.data = value
    return found


def at_units(values: Tensor, output: Tensor, units_last: bool) -> Tensor:
    """Return `values` [B, C] in a shape that can be multiplied with the `output` of a layer of C units.

    Args:
        values: one number for each unit; B may be 1.
        output: [B, C, ...], or [B, ..., C] if `units_last`.
        units_last: whether the units are the last dimension of the output, not the second.
    """
    ones = [1] * (output.dim() - 2)
    return values.view(len(values), *ones, -1) if units_last else values.view(*values.shape, *ones)


def _has_units_last(module: nn.Module) -> bool:
    """Return whether the units of a gated layer are the last dimension of its input and output, not the second."""
    return bool(getattr(module, "units_last", False))  # of `clframe.toolkit.unit_gates.Gated`
