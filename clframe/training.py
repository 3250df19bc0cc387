"""What a phase of training is made of: its length, its order of images, its optimizer and learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from clframe.data.batch import ImageData
from clframe.errors import DataError
from clframe.settings import TrainSettings

if TYPE_CHECKING:
    from clframe.context import Run
    from clframe.plugin import Plugin


@dataclass(frozen=True)
class Phase:
    """A stretch of training with an optimizer of its own.

    Attributes:
        name: unique within the experience; ``train`` stands in for the experience's own phase.
        place: before or after the one named ``train``.
        epochs: its length in epochs; None, and no `iterations` either: as the run's settings say.
        iterations: its length in steps, in place of epochs.
        lr: learning rate of all that it trains; None: as the run's settings say.
        only: patterns (as in shells) of the names of the parameters that it trains; empty: all that require gradients.
        data: images to train on in place of the experience's.
    """

    name: str
    place: Literal["before", "after"] = "before"
    epochs: int | None = None
    iterations: int | None = None
    lr: float | None = None
    only: tuple[str, ...] = ()
    data: ImageData | None = None

    def length(self, settings: TrainSettings) -> dict[str, int | None]:
        """Return ``epochs`` and ``iterations`` of this phase in a run with these settings; one of them is None."""
        if self.epochs is None and self.iterations is None:
            one = 1 if settings.iterations is None else None
            return {"epochs": settings.epochs or one, "iterations": settings.iterations}
        return {"epochs": self.epochs, "iterations": self.iterations}


class Sampler:
    """The order in which a phase meets its images; its state is part of a checkpoint.

    By epochs, every image is met once an epoch and the last batch may be smaller; where one image alone would be left
    for the last batch, that image joins the batch before, as batch normalization cannot learn from one value for each
    channel. A batch of one comes only where `batch_size` or `n` is 1. By iterations, batches are complete
    and the rest of an epoch is left out, as is usual where steps are counted, unless images are fewer than a batch.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device,
        *,
        epochs: int | None,
        iterations: int | None,
    ) -> None:
        whole = iterations is not None
        self.batches_per_epoch = max(1, n // batch_size) if whole else math.ceil(n / batch_size)
        if not whole and batch_size > 1 and n > batch_size and n % batch_size == 1:
            self.batches_per_epoch -= 1  # the last image joins the batch before
        self.steps = iterations if iterations is not None else (epochs or 0) * self.batches_per_epoch
        self.step = 0
        self._n, self._batch_size = n, batch_size
        self._used = min(n, self.batches_per_epoch * batch_size) if whole else n  # images of an epoch
        self._generator, self._device = generator, device
        self._order = torch.empty(0, dtype=torch.int64)

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, from 0."""
        return self.step // self.batches_per_epoch

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the positions [B] of each remaining step, on the device."""
        while self.step < self.steps:
            place = self.step % self.batches_per_epoch
            if place == 0:
                self._order = torch.randperm(self._n, generator=self._generator).to(self._device)
            self.step += 1
            yield self._order[place * self._batch_size : self._end(place + 1)]

    def coming(self, images: int) -> Tensor:
        """Return the positions of up to so many images after the step under way, within its epoch."""
        place = self.step % self.batches_per_epoch
        left = min(self.batches_per_epoch - place, self.steps - self.step) if place else 0
        start = place * self._batch_size
        return self._order[start : min(start + images, self._end(place + left))]

    def _end(self, batches: int) -> int:
        """Return the number of images in the first so many batches of an epoch."""
        return self._used if batches == self.batches_per_epoch else batches * self._batch_size

    def state(self) -> dict[str, Any]:
        """Return what `load` needs to continue at the same image."""
        return {"step": self.step, "order": self._order.cpu()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises `DataError` if that was among other images."""
        length = len(state["order"])
        if not 0 <= state["step"] <= self.steps or length not in (0, self._n):
            raise DataError("The checkpoint's place among the images is none of this phase: its data or state changed.")
        if length and not torch.equal(state["order"].cpu().sort().values, torch.arange(length)):
            raise DataError("The checkpoint's order of the images is none: it does not name each of them once.")
        self.step, self._order = state["step"], state["order"].to(self._device)


def trained_by(phase: Phase, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that `phase` trains, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (not phase.only or any(fnmatchcase(name, p) for p in phase.only))
    }


@contextmanager
def training_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Put the model in train mode with all but `parameters` frozen; restore ``requires_grad`` afterwards.

    A module none of whose parameters is trained is put into eval mode, and all in it: a frozen batch norm must not move
    its running statistics either. One without parameters goes with its surroundings, such as dropout; one that still
    keeps statistics, a batch norm that learns nothing, goes with the module before it.
    """
    trained = {id(p) for p in parameters}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
    try:
        model.train()
        for parameter in frozen:
            parameter.requires_grad_(False)
        _rest(model, trained)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.train()  # a run that is resumed here finds it so, too


def _rest(module: nn.Module, trained: set[int]) -> None:
    """Put modules that hold parameters, none of which is trained, into evaluation mode."""
    inside = list(module.parameters())
    if inside and not any(id(p) in trained for p in inside):
        module.eval()
        return
    resting = False  # the latest module with parameters
    for child in module.children():
        own = list(child.parameters())
        if own:
            resting = not any(id(p) in trained for p in own)
        elif resting and any(True for _ in child.buffers()):
            child.eval()
        _rest(child, trained)


def warm_up(run: Run, share: float) -> list[Phase] | None:
    """Return a phase before ``train`` that trains the new head alone (Li and Hoiem, LwF, 2017, section 3.1).

    None in the first experience, whose head is new but has no trained network below it, and for a share of 0.

    Args:
        run: the run, when the head has grown.
        share: length of the phase, relative to the experience's own training.
    """
    blocks = run.new_blocks
    if not share or not run.experience.index or not blocks:
        return None
    epochs, iterations = (n and max(1, round(share * n)) for n in Phase("train").length(run.settings).values())
    return [Phase("warm-up", "before", epochs, iterations, only=tuple(f"head.{k}.*" for k in blocks))]


def warm_up_problems(run: Run, plugin: Plugin) -> Iterator[str]:
    """Yield reasons why `plugin`, whose attribute ``warm_up`` asks for the phase, cannot have it."""
    asking = [p.name for p in run.plugins if getattr(p, "warm_up", 0)]
    if plugin.name in asking and "domain" in plugin.serves:  # else that is refused already
        yield from no_new_heads(run, f"`{plugin.name}.warm_up`")
    if plugin.name in asking[:-1]:
        yield f"Both `{plugin.name}` and `{asking[-1]}` bring a phase `warm-up`; leave one out."


def no_new_heads(run: Run, asked_by: str) -> list[str]:
    """Return the sentence that refuses `asked_by`, which needs new heads, in the domain setting."""
    if run.scenario.setting != "domain":
        return []
    return [
        f"{asked_by} trains the head of new classes, and in the domain setting no experience brings any: leave it out, "
        "or choose another `--setting`."
    ]


def make_optimizer(
    parameters: dict[str, nn.Parameter], settings: TrainSettings, lr: float | None = None
) -> torch.optim.Optimizer:
    """Return an optimizer over `parameters`; `lr`, if given, replaces the rates of the settings."""
    return optimizer_of(group_parameters(parameters, settings, lr), settings)


def optimizer_of(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name, over these parameter groups."""
    common: dict[str, Any] = {"lr": settings.lr}
    if all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"]):
        common["fused"] = True  # one kernel for all tensors: several times faster than a loop over them
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, **common)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, betas=(settings.betas[0], settings.betas[1]), eps=settings.eps, **common)


def group_parameters(
    parameters: dict[str, nn.Parameter], settings: TrainSettings, lr: float | None
) -> list[dict[str, Any]]:
    """Return parameter groups, each with its ``base_lr``, its ``weight_decay`` and the ``names`` of its members.

    A parameter whose attribute ``decays`` is false has no decay, whatever the settings say.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        rate = settings.lr_of(name) if lr is None else lr
        decays = getattr(parameter, "decays", settings.decay == "all" or parameter.dim() > 1)
        decay = settings.weight_decay if decays else 0.0
        new: dict[str, Any] = {"params": [], "names": [], "lr": rate, "base_lr": rate, "weight_decay": decay}
        group = groups.setdefault((rate, decay), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def extend_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], settings: TrainSettings
) -> None:
    """Let a kept optimizer train exactly `parameters`: new ones join, others leave with their state."""
    for group in optimizer.param_groups:
        stay = [name in parameters for name in group["names"]]
        for parameter, kept in zip(group["params"], stay, strict=True):
            if not kept:
                optimizer.state.pop(parameter, None)
        for key in ("params", "names"):
            group[key] = [item for item, kept in zip(group[key], stay, strict=True) if kept]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    known = {name for group in optimizer.param_groups for name in group["names"]}
    new = {name: parameter for name, parameter in parameters.items() if name not in known}
    for group in group_parameters(new, settings, None):
        optimizer.add_param_group(group)


def restart(optimizer: torch.optim.Optimizer | None, entries: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Clear the state that a kept optimizer has of entries whose weights were reset.

    Momentum and Adam's moments belong to weights that are gone. Adam's count of steps is one number for each parameter
    and stays.

    Args:
        optimizer: None: there is nothing to set back.
        entries: pairs of a parameter, and a mask [bool] of those entries, which can be broadcast to its shape.
    """
    for parameter, mask in entries:
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                value.masked_fill_(mask.expand_as(value), 0.0)


def rate_factor(settings: TrainSettings, step: int, sampler: Sampler) -> float:
    """Return the factor of the base learning rate at `step` (cosine: Loshchilov & Hutter, ICLR 2017)."""
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / sampler.steps))
    if settings.schedule == "steps":
        done = step if settings.iterations is not None else step / sampler.batches_per_epoch
        return settings.factor ** sum(done >= milestone for milestone in settings.milestones)
    return 1.0
