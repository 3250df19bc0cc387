"""Conditional channel gates (Abati et al., CVPR 2020): which channels of a convolution compute, image by image."""

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

GATE_WIDTH = 16
TEMPERATURE = 2 / 3


class _BinaryConcrete(torch.autograd.Function):
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
    """1 where logits (and `noise`, if given) are above 0, else 0; the gradient is that of sigmoid((l + noise) / tau).

    With logistic noise, l being the logit of a Bernoulli variable, this is its straight-through binary concrete
    estimator (Maddison et al., ICLR 2017; Abati et al., eq. 3): at a logit of 0 half of the gates fire.
    """
    gates: Tensor = _BinaryConcrete.apply(logits if noise is None else logits + noise, temperature)
    return gates


def logistic_noise(like: Tensor) -> Tensor:
    """Standard logistic noise of the shape of `like`."""
    return torch.rand_like(like).logit(eps=torch.finfo(like.dtype).eps)


class Gate(nn.Module):
    """What decides of a convolution's channels, by the average pixel of its input: two linear layers with a norm.

    Args:
        channels: of the input.
        units: channels of the convolution.
        bias: of the logits at the beginning: above 0 most gates are open.
    """

    def __init__(self, channels: int, units: int, bias: float) -> None:
        super().__init__()
        self.inner = nn.Linear(channels, GATE_WIDTH)
        self.norm = nn.BatchNorm1d(GATE_WIDTH)
        self.outer = nn.Linear(GATE_WIDTH, units)
        nn.init.constant_(self.outer.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, units] of the input [B, C, ...]."""
        hidden = self.inner(x.flatten(2).mean(2))
        norm = self.norm
        if not norm.training or len(x) > 1:
            hidden = norm(hidden)
        else:  # one image has no statistics
            hidden = functional.batch_norm(
                hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        logits: Tensor = self.outer(hidden.relu())
        return logits


class ConditionalConv(Gated):
    """A convolution, the norm of the task and its gates.

    Args:
        layer, norm: see `Gated`.
        tasks: that are known of.

    Attributes:
        gates: of each task.
        fired: [tasks, C] bool, the channels that a learnt task may use: those that fired for any of its images. True
            for tasks that are not learnt yet.
        latest: [B, C] gates of the latest forward pass; copies of the module have none.
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
        """A task comes, with new gates."""
        with initialized_by(generator):
            gate = Gate(self.layer.in_channels, self.units, bias)
        self.gates.append(gate.to(self.layer.weight))
        if len(self.gates) > len(self.fired):  # a run that is extended has more tasks than it began with
            self.fired = torch.cat([self.fired, torch.ones_like(self.fired[:1])])

    def gate(self, x: Tensor) -> Tensor:
        """[B, C]: 0 or 1."""
        task = min(self.task, len(self.gates) - 1)
        logits = self.gates[task](x)
        self.latest = binarize_gates(logits, logistic_noise(logits) if self.training else None) * self.fired[task]
        return self.latest

    def used_channels(self, learnt: int) -> Tensor:
        """[C] bool: the channels that any of the first `learnt` tasks may use."""
        return self.fired[:learnt].any(0)

    def entries(self, channels: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the kernels and biases of `channels` [C] bool, as `PinnedEntries` takes them."""
        return [(p, channels.view(-1, *[1] * (p.dim() - 1))) for p in self.layer.parameters()]

    def reset_kernels(self, free: Tensor, generator: torch.Generator) -> None:
        """New kernels, and biases, for the `free` [C] channels."""
        with initialized_by(generator, self.layer.weight.device):
            new = copy.deepcopy(self.layer)
            new.reset_parameters()
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                parameter[free] = new.get_parameter(name)[free]


class OpenReLU(nn.Module):
    """ReLU, or ReLU6, with a gradient at 0, too: where a gate is shut, this is how it learns that it should be open."""

    def __init__(self, most: float | None = None) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        """max(x, 0), and at most `most`."""
        x = x.masked_fill(x < 0, 0.0)  # what clamp's gradient is at its bounds depends on torch's version
        return x if self.most is None else x.masked_fill(x > self.most, self.most)


def replace_relus(net: nn.Module) -> None:
    """Put an `OpenReLU` in the place of each ReLU of `net`."""
    for name, module in list(net.named_modules(remove_duplicate=False)):  # one may stand in several places
        if type(module) in (nn.ReLU, nn.ReLU6):
            net.set_submodule(name, OpenReLU(6.0 if type(module) is nn.ReLU6 else None))


def convolutions_of(net: nn.Module) -> dict[str, nn.Module]:
    """The convolutions of `net`, by name; transposed ones are none, as their kernels are not of one channel each."""
    return {name: m for name, m in net.named_modules() if isinstance(m, _ConvNd) and not m.transposed}


def add_channel_gates(net: nn.Module, input_shape: Sequence[int], tasks: int) -> None:
    """Make a `ConditionalConv` of each convolution of `net`, and all its norms those of tasks, of which none has come.

    Shut gates get their gradient through `OpenReLU`.
    """
    gate_layers(net, convolutions_of(net), input_shape, lambda layer, norm: ConditionalConv(layer, norm, tasks))
    add_task_norms(net)
    replace_relus(net)


def frozen_names(model: IncrementalNet, task: int) -> list[str]:
    """The parameters of the backbone, by name, that do not train in `task`, the latest.

    Those are the gates and the norms of tasks before it and, in all but the first, what is neither a task's own nor a
    convolution's: of those, single kernels train.
    """
    if not task:
        return []
    convs, norms = find_modules(model, ConditionalConv).values(), find_modules(model, TaskNorm).values()
    trained = [*(conv.layer for conv in convs), *(conv.gates[task] for conv in convs), *(n.norms[task] for n in norms)]
    ids = {id(p) for module in trained for p in module.parameters()}
    return [f"backbone.{name}" for name, p in model.backbone.named_parameters() if id(p) not in ids]


def unreachable_gates(net: nn.Module, input_shape: Sequence[int]) -> list[str]:
    """The convolutions of `net`, a backbone as built, whose gates would never learn to open once they are shut.

    Half of the gates are shut, at random, in a copy of `net` in eval mode, but for batch norms, which have learnt
    nothing yet; a convolution is deaf if none of its shut gates has a gradient from the features of 4 images of noise.
    With half of the gates open, no layer hides those before it.
    """
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(0)
    add_channel_gates(net, input_shape, tasks=1)
    like = next(net.parameters())
    gates: list[Tensor] = []
    names: list[str] = []

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    def halved(name: str, units: int) -> Callable[[Tensor], Tensor]:
        def gate(x: Tensor) -> Tensor:
            names.append(name)
            gates.append((noise(len(x), units) > 0).to(like).requires_grad_())
            return gates[-1]

        return gate

    for name, conv in find_modules(net, ConditionalConv).items():
        conv.gate = halved(name, conv.units)  # type: ignore[method-assign, assignment]
    for module in net.eval().modules():
        module.training = isinstance(module, _BatchNorm)
    features = net.features(noise(4, *input_shape))  # type: ignore[operator]
    score = (features * noise(*features.shape)).sum()
    gradients = torch.autograd.grad(score, gates, allow_unused=True, materialize_grads=True)
    heard = {name for name, gate, grad in zip(names, gates, gradients, strict=True) if grad[gate == 0].any()}
    return [name for name in dict.fromkeys(names) if name not in heard]


def firing_rates(run: Run, rows: ImageData) -> dict[str, Tensor]:
    """How often each channel fires for the images `rows`, [C] from 0 to 1, by convolution; in eval mode."""
    convs = find_modules(run.model.backbone, ConditionalConv)
    sums = {name: conv.fired.new_zeros(conv.units, dtype=torch.float64) for name, conv in convs.items()}
    size = run.config.run.eval_batch_size
    for conv in convs.values():
        conv.latest = None  # one that the network does not use never fires
    with evaluating(run.model), torch.no_grad():
        for start in range(0, len(rows), size):
            run.model.features(run.batch(rows.rows(slice(start, start + size))).x)
            for name, conv in convs.items():
                if conv.latest is not None:
                    sums[name] += conv.latest.sum(0)
    return {name: total / max(1, len(rows)) for name, total in sums.items()}


def finish_task(run: Run, rows: ImageData, generator: torch.Generator, relevant: float = 0.0) -> dict[str, float]:
    """The experience is learnt: kernels that fire for more than a share of `rows` are its path; the others begin anew.

    Returns:
        ``open/LAYER``, how many gates were open for an image, and ``free/LAYER``, how many kernels are left, in shares.
    """
    curves: dict[str, float] = {}
    for name, often in firing_rates(run, rows).items():
        conv = find_modules(run.model.backbone, ConditionalConv)[name]
        conv.fired[run.experience.index] = often > relevant
        free = ~conv.used_channels(run.experience.index + 1)
        conv.reset_kernels(free, generator)
        restart(run.optimizer, conv.entries(free))
        curves |= {f"open/{name}": often.mean().item(), f"free/{name}": free.float().mean().item()}
    return curves
