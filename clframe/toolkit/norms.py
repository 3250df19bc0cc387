"""Normalization layers of a task: batch norms for each task, and norms at rest."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.modules import normalization
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from clframe.model import PerTask

NORMS = (_NormBase, *(getattr(normalization, name) for name in normalization.__all__))


class TaskNorm(PerTask):
    """A batch norm for each task, with statistics of its own.

    Args:
        norm: the one that stood there.
        first: the first task that has another one.
    """

    def __init__(self, norm: _BatchNorm, first: int = 1) -> None:
        super().__init__()
        self.first = first
        self.norms = nn.ModuleList([norm])

    def add(self) -> None:
        """One for another task, as new."""
        made = copy.deepcopy(self.norms[0]).requires_grad_(True)
        assert isinstance(made, _BatchNorm)
        made.reset_parameters()
        self.norms.append(made)

    def forward(self, x: Tensor) -> Tensor:
        """`x`, normalised for the task."""
        k = max(0, self.task - self.first + 1)
        normalised: Tensor = self.norms[min(k, len(self.norms) - 1)](x)
        return normalised


def add_task_norms(net: nn.Module, first: int = 1) -> None:
    """Put a `TaskNorm` in the place of each batch norm of `net` that is not in one yet."""
    there = {id(norm) for module in net.modules() if isinstance(module, TaskNorm) for norm in module.norms}
    for name, module in list(net.named_modules()):
        if isinstance(module, _BatchNorm) and id(module) not in there:
            net.set_submodule(name, TaskNorm(module, first))


class FrozenNorm(nn.Module):
    """A norm that keeps its statistics, and normalises by them in train mode, too."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def train(self, mode: bool = True) -> FrozenNorm:
        """Nothing to train."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """`x`, normalised."""
        normalised: Tensor = self.norm(x)
        return normalised


def freeze_norm_stats(net: nn.Module) -> None:
    """Keep the statistics of the batch norms of `net` that learn nothing; those that do rest when they are frozen."""
    for name, module in list(net.named_modules()):
        if isinstance(module, _BatchNorm) and module.track_running_stats and not list(module.parameters()):
            net.set_submodule(name, FrozenNorm(module).train())
