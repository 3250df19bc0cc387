"""The network that grows: a backbone, a head of blocks, and copies of both."""

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
    """What a backbone offers: features [B, width] of images [B, ...]. Any `nn.Module` with both will do."""

    width: int

    def features(self, x: Tensor) -> Tensor:
        """Features [B, width] of the images `x`."""
        ...


class Outputs:
    """What the network says of a batch.

    Attributes:
        features: [B, D] penultimate features.
        logits: [B, C] of all classes of the head; the column is the label.
    """

    __slots__ = ("_ends", "features", "logits")

    def __init__(self, features: Tensor, logits: Tensor, ends: Sequence[int]) -> None:
        self.features = features
        self.logits = logits
        self._ends = ends

    def head(self, k: int) -> Tensor:
        """Logits [B, c] of the k-th block of the head."""
        return self.logits[:, self._ends[k - 1] if k else 0 : self._ends[k]]


class PerTask(nn.Module):
    """A module that computes something else for each task.

    `IncrementalNet.forward` tells it by `task` whose turn it is, and `IncrementalNet.select` while nothing is told.
    """

    task = 0


class IncrementalNet(nn.Module):
    """A backbone and a head that is a list of linear blocks, one per growth; column = label.

    Whole tensors, one block each, carry anchors, freezing and optimizer state.

    Args:
        backbone: a module with ``features(x) -> [B, D]`` and ``width`` (= D).
        blocks: number of classes of each block that the head has from the start.

    Attributes:
        grown: number of experiences that it has grown for; a copy of it can be rebuilt by growing as often.
        selected: the task that its `PerTask` modules compute for where none is told; None: it has no such modules.
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
        self.given_hooks = frozenset(hooks_of(backbone))  # which compute, or note, what their author wants
        for size in blocks:
            self.grow(size)

    @property
    def n_classes(self) -> int:
        """Classes that the head has."""
        return sum(self.blocks)

    @property
    def blocks(self) -> list[int]:
        """Classes of each block."""
        return [block.out_features for block in self.head]  # type: ignore[misc]

    def blocks_of(self, classes: Collection[int]) -> list[int]:
        """Which blocks of the head have any of these classes, by number."""
        ends = list(itertools.accumulate(self.blocks))
        return [k for k, end in enumerate(ends) if any(end - self.blocks[k] <= c < end for c in classes)]

    def grow(self, size: int) -> nn.Linear:
        """Add a block for `size` new classes, initialised as `nn.Linear` is, on the model's device."""
        like = next(self.backbone.parameters(), torch.empty(0))
        # drawn in the same numbers whatever the precision
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
        """Let the `PerTask` modules compute for `task` from now on, wherever none is told."""
        self.selected = task
        self._turn(task)

    def forward(self, x: Tensor, task: Tensor | None = None) -> Outputs:
        """Outputs for normalised images `x` [B, ...]; `task` [B] tells `PerTask` modules what to compute for."""
        if task is None or self.selected is None:
            return self._outputs(x)
        tasks = task.unique().tolist()  # the one thing that a step asks the device for, of such a network
        try:
            places = [(task == t).nonzero().flatten() for t in tasks] if len(tasks) > 1 else [slice(None)]
            parts = []
            for t, where in zip(tasks, places, strict=True):
                self._turn(t)
                parts.append(self._outputs(x[where]))
        finally:
            self._turn(self.selected)
        if len(parts) == 1:
            return parts[0]
        back = torch.cat(places).argsort()  # type: ignore[arg-type]
        features, logits = (torch.cat([getattr(p, name) for p in parts])[back] for name in ("features", "logits"))
        return Outputs(features, logits, list(itertools.accumulate(self.blocks)))

    def _turn(self, task: int) -> None:
        for module in self.modules():
            if isinstance(module, PerTask):
                module.task = task

    def _outputs(self, x: Tensor) -> Outputs:
        features = self.features(x)
        ends = list(itertools.accumulate(self.blocks))
        # one product for all blocks; not by task, where an answer's last bits must not depend on later blocks
        if len(ends) > 1 and self.selected is None and all(map(_is_plain, self.head)):
            weight = torch.cat([block.weight for block in self.head])  # type: ignore[misc]
            bias = torch.cat([block.bias for block in self.head])  # type: ignore[misc]
            return Outputs(features, functional.linear(features, weight, bias), ends)
        scores = [block(features) for block in self.head]
        return Outputs(features, torch.cat(scores, dim=1) if len(scores) > 1 else scores[0], ends)


def _is_plain(block: nn.Module) -> bool:
    """Whether nobody but its weight and bias has a say in what this linear block computes."""
    hooked = block._forward_hooks or block._forward_pre_hooks or block._backward_hooks or block._backward_pre_hooks
    return type(block) is nn.Linear and not hooked and "forward" not in vars(block)


def class_mask(classes: Sequence[int], n_classes: int, device: torch.device | None = None) -> Tensor:
    """[n_classes] bool, true at `classes` (those that the head does not have are left out)."""
    mask = torch.zeros(n_classes, dtype=torch.bool, device=device)
    mask[[c for c in classes if c < n_classes]] = True
    return mask


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """`logits` [B, C], -inf where `mask` ([C] or [B, C], true = takes part) is false; None: all take part."""
    return logits if mask is None else logits.masked_fill(~mask, -torch.inf)


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Let no parameter whose name is like one of `patterns` (as in shells) be trained; names of those that were.

    Frozen parameters are in no optimizer, so weight decay and momentum do not move them either.
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
    """Let the parameters of these names be trained again."""
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


HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")  # how attributes with them end


def hooks_of(model: nn.Module) -> dict[int, Any]:
    """Return the hooks of all modules of `model`, by the number that torch gives each."""
    kinds = [hooks for module in model.modules() for name, hooks in vars(module).items() if name.endswith(HOOKS)]
    return {key: hook for hooks in kinds for key, hook in (hooks or {}).items()}


def memo_for(model: nn.Module) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy` of `model`, of what it holds and cannot, or must not, be copied as it is.

    A tensor with a graph cannot: the weights that torch's older weight normalization and pruning compute before each
    forward pass. What a hook belongs to must not, unless it is a module of the network: it would be copied whole.
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
    """Return a frozen copy in eval mode, without hooks but for those that the backbone had when it was given."""
    memo = memo_for(model)
    own: frozenset[int] = getattr(model, "given_hooks", frozenset())
    # a hook may be a method of a plugin, which would be copied with all that it holds: have none to copy
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
    """Modules in eval mode inside; afterwards every sub-module is in the mode that it had."""
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
    """`model` in eval mode inside, but for the batch norms that train in `like`, a network of the same modules.

    Those normalise by the batch's own statistics, as they do in training, and their running ones stay.
    """
    norms = [
        norm
        for name, norm in model.named_modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats and like.get_submodule(name).training
    ]
    with evaluating(model):
        try:
            for norm in norms:
                norm.training, norm.track_running_stats = True, False
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True


@contextmanager
def initialized_by(generator: torch.Generator, device: torch.device | None = None) -> Iterator[None]:
    """Modules whose weights are drawn inside, on the CPU or `device`, have those that `generator` decides.

    Torch's own generators stay as they are.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=cuda):
        seed_torch(seed, device)
        yield


def seed_torch(seed: int, device: torch.device | None) -> None:
    """Seed torch's global generators of the CPU and of `device`: `torch.manual_seed` would seed all devices'."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
