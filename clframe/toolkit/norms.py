"""Batch norms for parameter isolation: a norm for each task, and norms whose statistics are frozen."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.modules import normalization
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from clframe.model import PerTask

NORMS = (_NormBase, *(getattr(normalization, name) for name in normalization.__all__))


class TaskNorm(PerTask):
    """A batch norm for each task, each with its own statistics.

    Args:
        norm: the batch norm that stood at this place; the tasks before `first` use it.
        first: the first task that gets another norm.
    """

    def __init__(self, norm: _BatchNorm, first: int = 1) -> None:
        super().__init__()
        self.first = first
        self.norms = nn.ModuleList([norm])

    def add(self) -> None:
        """Add a new norm for another task."""
        made = copy.deepcopy(self.norms[0]).requires_grad_(True)
        assert isinstance(made, _BatchNorm)
        made.reset_parameters()
        self.norms.append(made)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` by the norm of the current task, or the latest norm if the task has none yet."""
        k = max(0, self.task - self.first + 1)
        normalized: Tensor = self.norms[min(k, len(self.norms) - 1)](x)
        return normalized


def add_task_norms(net: nn.Module, first: int = 1) -> None:
    """Replace each batch norm of `net` that is not part of a `TaskNorm` by one; `first` as there."""
    done = {id(norm) for module in net.modules() if isinstance(module, TaskNorm) for norm in module.norms}
    for name, module in list(net.named_modules()):
        if isinstance(module, _BatchNorm) and id(module) not in done:
            net.set_submodule(name, TaskNorm(module, first))


class FrozenNorm(nn.Module):
    """A batch norm that keeps its running statistics, and normalizes by them in train mode, too."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def train(self, mode: bool = True) -> FrozenNorm:
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` by the running statistics."""
        normalized: Tensor = self.norm(x)
        return normalized


def freeze_norm_stats(net: nn.Module) -> None:
    """Freeze the running statistics of the batch norms of `net` that have no parameters.

    Batch norms with parameters keep their statistics once their parameters are frozen.
    """
    for name, module in list(net.named_modules()):
        if isinstance(module, _BatchNorm) and module.track_running_stats and not list(module.parameters()):
            net.set_submodule(name, FrozenNorm(module).train())
