"""The incremental network: a backbone, a head that grows by blocks, and frozen copies of both."""

from __future__ import annotations

import copy
import itertools
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from clframe.errors import UsageError


@runtime_checkable
class Backbone(Protocol):
    """The protocol of a backbone: features [B, width] of images [B, ...]; any `nn.Module` that offers both fits."""

    width: int

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B, width] of the images `x`."""
        ...


class Outputs:
    """The outputs of the network for a batch.

    Attributes:
        features: [B, D] penultimate features.
        logits: [B, C] for all classes of the head; the column is the label.
    """

    __slots__ = ("_ends", "features", "logits")

    def __init__(self, features: Tensor, logits: Tensor, ends: Sequence[int]) -> None:
        self.features = features
        self.logits = logits
        self._ends = ends

    def head(self, k: int) -> Tensor:
        """Return the logits [B, c] of the k-th block of the head, counted from 0."""
        start = self._ends[k - 1] if k else 0
        return self.logits[:, start : self._ends[k]]


class PerTask(nn.Module):
    """A module that computes something different for each task.

    `IncrementalNet.forward` sets `task` to the task of the images, `IncrementalNet.select` to the task to compute for
    where the task of the images is not given.
    """

    task = 0


class IncrementalNet(nn.Module):
    """A backbone and a head, a list of linear blocks of which each growth adds one; the column is the label.

    Anchors, freezing and optimizer state belong to whole tensors: those of one block.

    Args:
        backbone: a module with ``features(x) -> [B, D]`` and ``width`` (= D).
        blocks: number of classes of each block that the head has from the start.

    Raises:
        UsageError: if the backbone lacks ``features`` or ``width``.

    Attributes:
        grown: number of experiences that the network has grown for; growing as often rebuilds its structure.
        selected: the task that its `PerTask` modules compute for where none is given; None: it has no such modules.
    """

    def __init__(self, backbone: nn.Module, blocks: Sequence[int] = ()) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise UsageError(
                f"`{type(backbone).__name__}` cannot be a backbone: it needs a method `features(x)` that "
                "returns [B, D] and an attribute `width` that is D."
            )
        self.backbone = backbone
        self.head = nn.ModuleList()
        self.grown = 0
        self.selected: int | None = None
        self.given_hooks = frozenset(hooks_of(backbone))  # they belong to the backbone, and are copied with it
        for size in blocks:
            self.grow(size)

    @property
    def n_classes(self) -> int:
        """Return the number of classes of the head."""
        return sum(self.blocks)

    @property
    def blocks(self) -> list[int]:
        """Return the number of classes of each block."""
        return [block.out_features for block in self.head]  # type: ignore[misc]

    def blocks_of(self, classes: Collection[int]) -> list[int]:
        """Return the numbers, from 0, of the head's blocks that have any of these classes."""
        ends = list(itertools.accumulate(self.blocks))
        return [k for k, end in enumerate(ends) if any(end - self.blocks[k] <= c < end for c in classes)]

    def grow(self, size: int) -> nn.Linear:
        """Add a block for `size` new classes, initialized as `nn.Linear` is, on the model's device, and return it."""
        like = next(self.backbone.parameters(), torch.empty(0))
        # drawn in float32, so that the numbers are the same in every precision
        block = nn.Linear(self.backbone.width, size, device=like.device, dtype=torch.float32).to(like.dtype)
        self.head.append(block)
        return block

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B, D] of the images `x`, in the precision of the backbone's parameters."""
        like = next(self.backbone.parameters(), x)
        if like.dtype != x.dtype and like.is_floating_point() and x.is_floating_point():
            x = x.to(like.dtype)
        return self.backbone.features(x)

    def select(self, task: int) -> None:
        """Make the `PerTask` modules compute for `task` from now on, wherever no task is given."""
        self.selected = task
        self._set_task(task)

    def forward(self, x: Tensor, task: Tensor | None = None) -> Outputs:
        """Return the outputs for images.

        Args:
            x: [B, ...] normalized images.
            task: [B] the task that `PerTask` modules compute for, image by image; None: the selected one.
        """
        if task is None or self.selected is None:
            return self._outputs(x)
        tasks = task.unique().tolist()  # the only copy from the device in a step of such a network
        try:
            places = [(task == t).nonzero().flatten() for t in tasks] if len(tasks) > 1 else [slice(None)]
            parts = []
            for t, where in zip(tasks, places, strict=True):
                self._set_task(t)
                parts.append(self._outputs(x[where]))
        finally:
            self._set_task(self.selected)
        if len(parts) == 1:
            return parts[0]
        back = torch.cat(places).argsort()  # type: ignore[arg-type]
        features = torch.cat([part.features for part in parts])[back]
        logits = torch.cat([part.logits for part in parts])[back]
        return Outputs(features, logits, list(itertools.accumulate(self.blocks)))

    def _set_task(self, task: int) -> None:
        for module in self.modules():
            if isinstance(module, PerTask):
                module.task = task

    def _outputs(self, x: Tensor) -> Outputs:
        features = self.features(x)
        ends = list(itertools.accumulate(self.blocks))
        # one product for all blocks, but not with tasks: an answer's last bits must not depend on later blocks
        if len(ends) > 1 and self.selected is None and all(map(_is_plain, self.head)):
            weight = torch.cat([block.weight for block in self.head])  # type: ignore[misc]
            bias = torch.cat([block.bias for block in self.head])  # type: ignore[misc]
            return Outputs(features, functional.linear(features, weight, bias), ends)
        scores = [block(features) for block in self.head]
        return Outputs(features, torch.cat(scores, dim=1) if len(scores) > 1 else scores[0], ends)


def _is_plain(block: nn.Module) -> bool:
    """Return whether a block of the head computes what its weight and bias say: no hook, no method of its own."""
    hooked = block._forward_hooks or block._forward_pre_hooks or block._backward_hooks or block._backward_pre_hooks
    return type(block) is nn.Linear and not hooked and "forward" not in vars(block)


def class_mask(classes: Sequence[int], n_classes: int, device: torch.device | None = None) -> Tensor:
    """Return a mask [n_classes] bool, true at `classes`; classes that the head does not have are left out."""
    mask = torch.zeros(n_classes, dtype=torch.bool, device=device)
    mask[[c for c in classes if c < n_classes]] = True
    return mask


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return `logits` [B, C], with -inf where `mask` ([C] or [B, C] bool) is false; without a mask, unchanged."""
    return logits if mask is None else logits.masked_fill(~mask, -torch.inf)


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Freeze the parameters whose name fits one of `patterns` (as in shells); return the names of those it froze.

    Parameters that were frozen before are not returned. Frozen parameters are in no optimizer, so weight decay and
    momentum do not move them either.
    """
    wanted = tuple(patterns)
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(fnmatchcase(name, pattern) for pattern in wanted)
    }
    for parameter in found.values():
        parameter.requires_grad_(False)
    return list(found)


def thaw(model: nn.Module, names: Collection[str]) -> None:
    """Make the parameters of these names trainable again; names that `model` does not have are ignored."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(True)


class Graph(NamedTuple):
    """The autograd graph behind a tensor.

    Attributes:
        nodes: all nodes but those that accumulate gradients in leaves.
        uses: how often each leaf is used in the graph, by the id of the leaf.
        leaves: the leaves, by their id.
    """

    nodes: set[Node]
    uses: Counter[int]
    leaves: dict[int, Tensor]


def graph_of(output: Tensor) -> Graph:
    """Return the autograd graph behind `output`, which requires gradients: its nodes, its leaves and their uses."""
    root = get_gradient_edge(output).node
    graph = Graph({root}, Counter(), {})
    open_nodes = [root]
    while open_nodes:
        for node, _ in open_nodes.pop().next_functions:
            if node is None:
                continue
            if node.name().endswith("::AccumulateGrad"):
                leaf: Tensor = node.variable  # type: ignore[attr-defined]
                graph.leaves[id(leaf)] = leaf
                graph.uses[id(leaf)] += 1
            elif node not in graph.nodes:
                graph.nodes.add(node)
                open_nodes.append(node)
    return graph


HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")  # endings of attribute names


def hooks_of(model: nn.Module) -> dict[int, Any]:
    """Return the hooks of all modules of `model`, by the number that torch gives each."""
    kinds = [hooks for module in model.modules() for name, hooks in vars(module).items() if name.endswith(HOOKS)]
    return {key: hook for hooks in kinds for key, hook in (hooks or {}).items()}


def memo_for(model: nn.Module) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy` of `model`: what cannot, or must not, be copied as it is.

    Tensors with a graph cannot be copied: weights that torch's older weight normalization and pruning compute before
    each forward pass. The object that a hook is a method of must not be copied, as it would be copied whole, unless it
    is a module of the network.
    """
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in held if not value.is_leaf}
    inside = {id(module) for module in model.modules()}
    for hook in hooks_of(model).values():
        owner = getattr(hook, "__self__", None)
        if isinstance(hook, partial):
            memo[id(hook)] = hook
        elif owner is not None and id(owner) not in inside:
            memo[id(owner)] = owner
    return memo


def snapshot(model: IncrementalNet) -> IncrementalNet:
    """Return a frozen copy in evaluation mode, with the hooks that the backbone had when it was given, and no others.

    A plugin's teacher is such a copy.
    """
    memo = memo_for(model)
    own: frozenset[int] = getattr(model, "given_hooks", frozenset())
    # a hook may be a method of a plugin, which would be copied with all that it holds: copy no hook at first
    places = [
        (hooks, memo.setdefault(id(hooks), OrderedDict()))
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith(HOOKS) and hooks is not None
    ]
    copied = copy.deepcopy(model, memo)
    for hooks, empty in places:
        empty.update((key, copy.deepcopy(hook, memo)) for key, hook in hooks.items() if key in own)
    return copied.eval().requires_grad_(False)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode inside the block; afterwards each sub-module is in its former mode."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def normalizing_by_batch(model: nn.Module, like: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode inside the block, but for the batch norms that are in train mode in `like`.

    Those normalize by the statistics of the batch, as in training, and their running statistics stay as they are.

    Args:
        model: the network to compute with.
        like: a network of the same modules, whose modes decide.
    """
    norms = [
        norm
        for name, norm in model.named_modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats and like.get_submodule(name).training
    ]
    with evaluating(model):
        try:
            for norm in norms:
                norm.training = True
                norm.track_running_stats = False
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True


@contextmanager
def initialized_by(generator: torch.Generator, device: torch.device | None = None) -> Iterator[None]:
    """Draw the weights of modules that are built inside the block, on the CPU or on `device`, from `generator`.

    The state of torch's own generators is restored afterwards.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=cuda):
        seed_torch(seed, device)
        yield


def seed_torch(seed: int, device: torch.device | None) -> None:
    """Seed torch's global generators of the CPU and of `device` alone; `torch.manual_seed` would seed all devices."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
