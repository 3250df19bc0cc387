"""Conditional channel gates (Abati et al., CVPR 2020), which select the channels of a convolution for each image.

A channel *fires* for an image if its gate is open, that is 1. The channels that fire for the images of a task are the
task's path through the network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from clframe.model import IncrementalNet, evaluating, initialized_by
from clframe.toolkit.norms import TaskNorm, add_task_norms
from clframe.toolkit.unit_gates import Gated, gate_layers
from clframe.toolkit.weight_masks import find_modules
from clframe.training import restart

if TYPE_CHECKING:
    from clframe.context import Run
    from clframe.data.batch import ImageData

GATE_WIDTH = 16  # units of the hidden layer of a gate
TEMPERATURE = 2 / 3  # tau of the gates' gradient


class _BinaryConcrete(torch.autograd.Function):
    """The step function, with the gradient of a sigmoid as its backward pass; see `binarize_gates`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.temperature = temperature
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        soft = (z / ctx.temperature).sigmoid()
        return grad * soft * (1 - soft) / ctx.temperature, None


def binarize_gates(logits: Tensor, noise: Tensor | None = None, temperature: float = TEMPERATURE) -> Tensor:
    """Return 1 where l + noise is above 0, else 0, with the gradient of sigmoid((l + noise) / tau).

    With logistic noise this is the straight-through binary concrete estimator of a Bernoulli variable with the logit l
    (Maddison et al., ICLR 2017; Abati et al., eq. 3): at a logit of 0, half of the gates are open.

    Args:
        logits: l, of any shape.
        noise: of the same shape; None: there is no noise.
        temperature: tau > 0.
    """
    if noise is not None:
        logits = logits + noise
    gates: Tensor = _BinaryConcrete.apply(logits, temperature)  # eq. 3
    return gates


def logistic_noise(like: Tensor) -> Tensor:
    """Draw standard logistic noise in the shape of `like`, from torch's own generator."""
    return torch.rand_like(like).logit(eps=torch.finfo(like.dtype).eps)


class Gate(nn.Module):
    """A network that selects the channels of a convolution by the average pixel of its input.

    It consists of two linear layers with a batch norm and a ReLU between them.

    Args:
        channels: number of channels of the input.
        units: number of channels of the convolution.
        bias: initial bias of the logits; above 0 most gates are open at first.
    """

    def __init__(self, channels: int, units: int, bias: float) -> None:
        super().__init__()
        self.inner = nn.Linear(channels, GATE_WIDTH)
        self.norm = nn.BatchNorm1d(GATE_WIDTH)
        self.outer = nn.Linear(GATE_WIDTH, units)
        nn.init.constant_(self.outer.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, units] of the gates for the input [B, C, ...]."""
        hidden = self.inner(x.flatten(2).mean(2))
        norm = self.norm
        if not norm.training or len(x) > 1:
            hidden = norm(hidden)
        else:  # a batch of one image has no statistics
            hidden = functional.batch_norm(
                hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        logits: Tensor = self.outer(hidden.relu())
        return logits


class ConditionalConv(Gated):
    """A convolution with a batch norm and gates for each task.

    Args:
        layer, norm: see `Gated`.
        tasks: number of tasks that are known at the start.

    Attributes:
        gates: the gates of each task, see `Gate`.
        fired: [tasks, C] bool, the channels that a learned task may use: those that fired for any of its images. True
            for tasks that are not learned yet.
        latest: [B, C] gates of the latest forward pass; None in copies of the module.
    """

    fired: Tensor
    layer: _ConvNd

    def __init__(self, layer: nn.Module, norm: _BatchNorm | None, tasks: int) -> None:
        super().__init__(layer, norm)
        self.gates = nn.ModuleList()
        self.latest: Tensor | None = None
        device = self.layer.weight.device
        self.register_buffer("fired", torch.ones(tasks, self.units, dtype=torch.bool, device=device))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "latest": None}  # within a step it has a graph, which cannot be copied

    def add(self, bias: float, generator: torch.Generator) -> None:
        """Add the gates of another task.

        Args:
            bias: see `Gate`.
            generator: on the CPU, for the initial weights.
        """
        with initialized_by(generator):
            gate = Gate(self.layer.in_channels, self.units, bias)
        self.gates.append(gate.to(self.layer.weight))
        if len(self.gates) > len(self.fired):  # a run that is extended has more tasks than it began with
            self.fired = torch.cat([self.fired, torch.ones_like(self.fired[:1])])

    def gate(self, x: Tensor) -> Tensor:
        """Return the gates [B, C], 0 or 1, of the current task for the input `x`; keep them in `latest`."""
        task = min(self.task, len(self.gates) - 1)
        logits = self.gates[task](x)
        noise = logistic_noise(logits) if self.training else None
        self.latest = binarize_gates(logits, noise) * self.fired[task]
        return self.latest

    def used_channels(self, n_tasks: int) -> Tensor:
        """Return a mask [C] bool of the channels that any of the first `n_tasks` tasks may use."""
        return self.fired[:n_tasks].any(0)

    def entries(self, channels: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the kernels and biases of `channels` [C] bool, as `PinnedEntries` takes them."""
        return [(p, channels.view(-1, *[1] * (p.dim() - 1))) for p in self.layer.parameters()]

    def reset_kernels(self, free: Tensor, generator: torch.Generator) -> None:
        """Initialize the kernels and biases of the channels `free` [C] bool again, by `generator`."""
        with initialized_by(generator, self.layer.weight.device):
            new = copy.deepcopy(self.layer)
            new.reset_parameters()
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                parameter[free] = new.get_parameter(name)[free]


class OpenReLU(nn.Module):
    """A ReLU, or ReLU6, with a gradient at 0, too: through it, a closed gate learns that it should be open.

    Args:
        most: the largest output, 6 for a ReLU6; None: there is no limit.
    """

    def __init__(self, most: float | None = None) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        """Return max(x, 0), limited to `most`."""
        x = x.masked_fill(x < 0, 0.0)  # the gradient of clamp at its bounds depends on torch's version
        return x if self.most is None else x.masked_fill(x > self.most, self.most)


def replace_relus(net: nn.Module) -> None:
    """Replace each ReLU of `net` by an `OpenReLU`."""
    for name, module in list(net.named_modules(remove_duplicate=False)):  # a module may stand in several places
        if type(module) in (nn.ReLU, nn.ReLU6):
            net.set_submodule(name, OpenReLU(6.0 if type(module) is nn.ReLU6 else None))


def convolutions_of(net: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions of `net`, by name, without transposed ones, whose kernels belong to several channels."""
    return {name: m for name, m in net.named_modules() if isinstance(m, _ConvNd) and not m.transposed}


def add_channel_gates(net: nn.Module, input_shape: Sequence[int], tasks: int) -> None:
    """Replace each convolution of `net` by a `ConditionalConv` without gates yet, and each batch norm by a `TaskNorm`.

    Each ReLU becomes an `OpenReLU`, through which closed gates get a gradient.

    Args:
        net: the backbone.
        input_shape: shape of one image.
        tasks: number of tasks that are known at the start.
    """
    gate_layers(net, convolutions_of(net), input_shape, lambda layer, norm: ConditionalConv(layer, norm, tasks))
    add_task_norms(net)
    replace_relus(net)


def frozen_names(model: IncrementalNet, task: int) -> list[str]:
    """Return the names of the backbone's parameters that are frozen in `task`, the latest.

    Frozen are the gates and the norms of earlier tasks and, after the first task, all parameters that belong neither to
    a task nor to a convolution. In convolutions, single kernels train.

    Args:
        model: a network with channel gates.
        task: index of the latest task.
    """
    if not task:
        return []
    convs = find_modules(model, ConditionalConv).values()
    norms = find_modules(model, TaskNorm).values()
    trained: list[nn.Module] = [conv.layer for conv in convs]
    trained += [conv.gates[task] for conv in convs]
    trained += [norm.norms[task] for norm in norms]
    ids = {id(p) for module in trained for p in module.parameters()}
    return [f"backbone.{name}" for name, p in model.backbone.named_parameters() if id(p) not in ids]


def unreachable_gates(net: nn.Module, input_shape: Sequence[int]) -> list[str]:
    """Return the names of the convolutions of `net` whose gates would never learn to open once they are closed.

    In a copy of `net`, half of the gates are closed at random. A convolution is returned if none of its closed gates
    has a gradient from the features of 4 images of noise. With half of the gates open, no layer blocks the gradients of
    those before it. The copy is in evaluation mode, but for batch norms, which have no running statistics yet.

    Args:
        net: the backbone before training.
        input_shape: shape of one image.
    """
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    add_channel_gates(net, input_shape, tasks=1)
    like = next(net.parameters())
    gates: list[Tensor] = []
    names: list[str] = []

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    def half_open(name: str, units: int) -> Callable[[Tensor], Tensor]:
        def gate(x: Tensor) -> Tensor:
            names.append(name)
            gates.append((noise(len(x), units) > 0).to(like).requires_grad_())
            return gates[-1]

        return gate

    for name, conv in find_modules(net, ConditionalConv).items():
        conv.gate = half_open(name, conv.units)  # type: ignore[method-assign, assignment]
    for module in net.eval().modules():
        module.training = isinstance(module, _BatchNorm)
    features = net.features(noise(4, *input_shape))  # type: ignore[operator]
    score = (features * noise(*features.shape)).sum()
    gradients = torch.autograd.grad(score, gates, allow_unused=True, materialize_grads=True)
    reached = {name for name, gate, grad in zip(names, gates, gradients, strict=True) if grad[gate == 0].any()}
    return [name for name in dict.fromkeys(names) if name not in reached]


def firing_rates(run: Run, rows: ImageData) -> dict[str, Tensor]:
    """Return the share of the images `rows` for which each channel fires, [C] from 0 to 1, by convolution.

    The network is in evaluation mode meanwhile.
    """
    convs = find_modules(run.model.backbone, ConditionalConv)
    sums = {name: conv.fired.new_zeros(conv.units, dtype=torch.float64) for name, conv in convs.items()}
    size = run.config.run.eval_batch_size
    for conv in convs.values():
        conv.latest = None  # stays None, and so never fires, if the network does not use the convolution
    with evaluating(run.model), torch.no_grad():
        for start in range(0, len(rows), size):
            run.model.features(run.batch(rows.rows(slice(start, start + size))).x)
            for name, conv in convs.items():
                if conv.latest is not None:
                    sums[name] += conv.latest.sum(0)
    return {name: total / max(1, len(rows)) for name, total in sums.items()}


def finish_task(run: Run, rows: ImageData, generator: torch.Generator, relevant: float = 0.0) -> dict[str, float]:
    """End the task: give it the kernels that fire for more than a share of `rows`, and initialize the free ones again.

    Args:
        run: the run, after the last step of the task.
        rows: images of the task.
        generator: for the initial weights of the free kernels.
        relevant: the share of the images above which a channel belongs to the task, from 0 to 1.

    Returns:
        ``open/LAYER``, the mean share of open gates, and ``free/LAYER``, the share of kernels that no task uses.
    """
    curves: dict[str, float] = {}
    for name, rates in firing_rates(run, rows).items():
        conv = find_modules(run.model.backbone, ConditionalConv)[name]
        conv.fired[run.experience.index] = rates > relevant
        free = ~conv.used_channels(run.experience.index + 1)
        conv.reset_kernels(free, generator)
        restart(run.optimizer, conv.entries(free))
        curves[f"open/{name}"] = rates.mean().item()
        curves[f"free/{name}"] = free.float().mean().item()
    return curves
