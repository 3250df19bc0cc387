"""Preparation of a user's network: a copy, so that the given one stays as it was, completed and tried on two images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from clframe.errors import UsageError, of_the_system, out_of_memory
from clframe.model import Backbone, evaluating, graph_of, memo_for
from clframe.system.texts import cut

M = TypeVar("M", bound=nn.Module)
COMPILED = "The network is compiled (`torch.compile`): the run trains it uncompiled, with the same results."


def unwrap_compiled(network: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped; return any other module as it is."""
    while type(network).__name__ == "OptimizedModule":  # by name, as importing its class takes seconds
        network = network._orig_mod  # type: ignore[assignment]
    return network


def prepare(network: Any, input_shape: Sequence[int], device: torch.device, tell: Callable[[str], None]) -> nn.Module:
    """Return a copy of the backbone `network` on `device`, with all its parameters; the given one stays as it is.

    Args:
        network: as the user gives it: possibly compiled, or lazy (with parameters whose size an image decides).
        input_shape: shape of one image.
        device: the device of the run.
        tell: called with a sentence about anything that is done differently from what the user may expect.

    Raises:
        UsageError: if it is not a backbone, cannot be copied, or `check_backbone` refuses it.
    """
    plain = unwrap_compiled(network)
    if not isinstance(plain, nn.Module) or not isinstance(plain, Backbone):
        raise UsageError(
            f"`{type(plain).__name__}` cannot be a backbone: it needs to be a `torch.nn.Module` with a method "
            "`features(x)` that returns [B, D] and an attribute `width` that is D."
        )
    if plain is not network or any(unwrap_compiled(m) is not m or _compiled_in_place(m) for m in plain.modules()):
        tell(COMPILED)
    try:
        made = _copy(plain).to(device)
    except Exception as error:
        if out_of_memory(error) or of_the_system(error):
            raise
        raise UsageError(
            f"`{type(plain).__name__}` cannot be copied ({_message_of(error)}), and a run trains a copy of the network "
            "that it is given: keep modules, tensors and plain values in it, and nothing else."
        ) from error
    check_backbone(made, input_shape, device)
    return made


def check_backbone(network: nn.Module, input_shape: Sequence[int], device: torch.device) -> None:
    """Send two images of zeros through the backbone `network`, which gives lazy layers their parameters.

    The network is in evaluation mode meanwhile, and the state of torch's random generators is restored.

    Args:
        network: the backbone.
        input_shape: shape of one image.
        device: the device of the images.

    Raises:
        UsageError: if it cannot take the images, returns something else than ``width`` features of each, has
            parameters of half precision, or computes with tensors that no optimizer would train.
    """
    name = type(network).__name__
    problem = None
    for parameter in network.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UsageError(f"The parameters of `{name}` are {kind}, too coarse to train: call its method `float()`.")
    images = torch.zeros(2, *input_shape, device=device)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(network):
            features = network.features(cast_to_network(network, images))  # type: ignore[operator]
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UsageError(
            f"`{name}` cannot take images of {list(input_shape)} ({_message_of(error)}): choose another model, or "
            "bring the images to a shape that it takes."
        ) from error
    if not isinstance(features, Tensor):
        problem = f"returns a `{type(features).__name__}`, and must return a tensor [B, D]"
    elif features.dim() != 2 or len(features) != 2:
        problem = f"returns {list(features.shape)} for 2 images, and must return [2, D]"
    elif features.shape[1] != network.width:
        problem = f"returns {features.shape[1]} features of an image, and its `width` is {network.width}"
    elif not features.is_floating_point():
        problem = f"returns {features.dtype}, and must return floating-point numbers"
    elif lazy := [key for key, module in network.named_modules() if _is_unfinished(module)]:
        problem = f"does not use the lazy layer `{lazy[0]}`, so that its size is never known"
    elif features.requires_grad:
        own = {id(parameter) for parameter in network.parameters()}
        leaves = graph_of(features).leaves
        if strangers := [leaf for key, leaf in leaves.items() if key not in own]:
            problem = (
                f"computes with a tensor {list(strangers[0].shape)} that requires gradients and is not one of the "
                "network's parameters, so that nothing would train it: make it an `nn.Parameter`, and `features` a "
                "method, not a function that holds another network"
            )
    if problem:
        raise UsageError(f"`{name}.features` {problem}.")


def cast_to_network(network: nn.Module, x: Tensor) -> Tensor:
    """Return `x`, if it holds real numbers, in the precision of the parameters of `network`, which may be float64."""
    like = next((p for p in network.parameters() if p.is_floating_point()), x)
    return x.to(like.dtype) if x.is_floating_point() else x


def _copy(network: M) -> M:
    """Return an uncompiled deep copy of `network`, with its hooks."""
    memo = memo_for(network)
    for module in list(network.modules()):
        if unwrap_compiled(module) is not module:
            memo[id(module)] = copy.deepcopy(unwrap_compiled(module), memo)
    return copy.deepcopy(network, memo)


def _is_unfinished(module: nn.Module) -> bool:
    """Return whether `module` is lazy and has parameters without a size."""
    return isinstance(module, LazyModuleMixin) and bool(module.has_uninitialized_params())


def _compiled_in_place(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called, which wraps nothing."""
    return getattr(module, "_compiled_call_impl", None) is not None


def _message_of(error: Exception) -> str:
    """Return the message of `error` in one line, or its class if it has no message or cannot be written."""
    text = ""
    with suppress(Exception):
        text = " ".join(str(error).split())
    return cut(text.rstrip(".") or type(error).__name__)
