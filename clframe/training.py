"""What a phase of training is made of: its length, its order of images, its optimizer, its gradients and updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from clframe.data.batch import Batch, ImageData
from clframe.data.files import READ_AHEAD
from clframe.errors import DataError, UsageError
from clframe.events import PhaseBegan
from clframe.settings import TrainSettings
from clframe.watch import LossWatch

if TYPE_CHECKING:
    from clframe.context import Run


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


def in_order(answers: Mapping[str, list[Phase]]) -> list[Phase]:
    """Return the phases of an experience, by the plugins that bring them, in order: ``train`` between the others.

    Raises `UsageError` if two plugins bring a phase of one name.
    """
    owners: dict[str, str] = {}
    for plugin, phases in answers.items():
        for phase in phases:
            if phase.name in owners:
                raise UsageError(
                    f"Both `{owners[phase.name]}` and `{plugin}` bring a phase `{phase.name}`; leave one out."
                )
            owners[phase.name] = plugin
    given = [phase for phases in answers.values() for phase in phases]
    before = [p for p in given if p.place == "before" and p.name != "train"]
    after = [p for p in given if p.place == "after" and p.name != "train"]
    train = [p for p in given if p.name == "train"] or [Phase("train")]
    return [*before, *train, *after]


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
            raise DataError(
                "The checkpoint's place among the images is not one of this phase, as its data or state changed: "
                "resume with the data of the run, or start a new run."
            )
        if length and not torch.equal(state["order"].cpu().sort().values, torch.arange(length)):
            raise DataError(
                "The checkpoint's order of the images does not name each of them once: start a new run, or remove the "
                "newest folder in `checkpoints` to resume from the one before it."
            )
        self.step, self._order = state["step"], state["order"].to(self._device)


def trained_by(phase: Phase, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that `phase` trains, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (not phase.only or any(fnmatchcase(name, p) for p in phase.only))
    }


def trainable_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that require gradients."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


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


class Trainer:
    """The training of a run in one phase after another: what is trained, by which optimizer, and how.

    Args:
        run: the context of the run, whose `Run.optimizer` is that of the phase under way.

    Attributes:
        trained: the parameters that the phase under way trains, by name.
        watch: the losses and gradient norms of the latest steps.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.trained: dict[str, nn.Parameter] = {}
        self.watch = LossWatch()
        self._two_backwards = any(plugin.needs_task_gradient for plugin in run.plugins)
        self._kept: torch.optim.Optimizer | None = None  # aside while another phase than `train` has its own
        self._trainable: list[str] | None = None  # as it was before a phase froze what it does not train
        self._resumed: dict[str, Any] | None = None  # the order of images that waits for the phase of a resume
        # The first optimizer of a process imports much of torch: here, as those seconds are not seconds of learning.
        torch.optim.SGD([torch.zeros(1)], lr=0.1)

    @contextmanager
    def training(self, phase: Phase, data: ImageData) -> Iterator[Iterator[Batch]]:
        """Yield the batches that are left of `phase`, with its optimizer in place and everything else frozen."""
        run = self.run
        run.phase = phase
        self.trained = trained_by(phase, run.model)
        self._trainable = trainable_names(run.model)
        length = phase.length(run.settings)
        if not self.trained and any(length.values()):
            wanted = f" named like {', '.join(f'`{p}`' for p in phase.only)}" if phase.only else ""
            raise UsageError(
                f"The phase `{phase.name}` of {run.progress_label} trains nothing: no parameter{wanted} requires "
                "gradients."
            )
        run._sampler = Sampler(len(data), run.settings.batch_size, run.rng("loader"), run.device, **length)
        run._emit(PhaseBegan(phase.name, run._sampler.steps, run.experience.index))
        with training_only(run.model, self.trained.values()):
            if self._resumed is not None:  # the optimizers were restored with it
                run._sampler.load(self._resumed)
                self._resumed = None
            elif phase.name == "train" and run.optimizer is not None:
                extend_optimizer(run.optimizer, self.trained, run.settings)
                if run.config.run.per_experience is not None:
                    set_rates(run.optimizer, run.settings)
            else:
                self._kept = run.optimizer
                run.optimizer = make_optimizer(self.trained, run.settings, phase.lr) if run._sampler.steps else None
            yield self.batches(data)
        self._trainable = run._sampler = None
        if not (phase.name == "train" and run.settings.keep_optimizer):
            run.optimizer, self._kept = self._kept, None

    def batches(self, data: ImageData) -> Iterator[Batch]:
        """Yield the batches of the phase under way, at the learning rate of each step."""
        run, sampler = self.run, self.run._sampler
        if sampler is None or not sampler.steps:
            return
        augment = run.rng("loader") if run.scenario.transform.augments else None
        optimizer = cast(torch.optim.Optimizer, run.optimizer)
        for where in sampler:
            if run.settings.schedule != "constant":
                factor = rate_factor(run.settings, run.step, sampler)
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * factor
            data.expect(where)
            data.expect(sampler.coming(max(READ_AHEAD, 2 * len(where))))
            yield run.scenario.transform.batch(data.rows(where), augment)

    def backward(self, terms: dict[str, Tensor]) -> None:
        """Compute the gradients of the sum of all terms; in two passes where a plugin needs those of the base loss."""
        run = self.run
        for parameter in self.trained.values():  # what the optimizer's own `zero_grad` does, in a tenth of its time
            parameter.grad = None
        if self._two_backwards:
            terms["base"].backward(retain_graph=len(terms) > 1)
            run.task_gradients = {n: p.grad.clone() for n, p in self.trained.items() if p.grad is not None}
            rest = [term for name, term in terms.items() if name != "base" and term.requires_grad]
            if rest:
                torch.stack(rest).sum().backward()
        else:
            total = terms["base"]
            for name, term in terms.items():
                total = total if name == "base" else total + term
            total.backward()
        run.losses = {name: term.detach() for name, term in terms.items()}

    def update(self) -> None:
        """Clip the gradient and take the optimizer's step."""
        run = self.run
        clip = run.settings.clip
        norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        self.watch.keep(run.losses, norm)
        # on the CPU it costs nothing to ask whether the factor, min(1, clip / (norm + 1e-6)), is 1
        if clip and not (norm.device.type == "cpu" and norm + 1e-6 <= clip):
            nn.utils.clip_grads_with_norm_(self.trained.values(), clip, norm)
        if run.optimizer is not None:
            run.optimizer.step()

    def drop_optimizers(self) -> None:
        """Forget all optimizers: a model that is trained needs none."""
        self.run.optimizer = self._kept = None

    def state(self) -> dict[str, Any]:
        """Return what decides how the training continues."""
        run = self.run
        return {
            "trainable": trainable_names(run.model) if self._trainable is None else self._trainable,
            "optimizer": run.optimizer,
            "kept_optimizer": self._kept,
            "sampler": run._sampler.state() if run._sampler else self._resumed,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, with the optimizers as their ``state_dict``; the model has its weights."""
        trainable = set(state["trainable"])
        for name, parameter in self.run.model.named_parameters():
            parameter.requires_grad_(name in trainable)
        self.run.optimizer = restore_optimizer(self.run, state["optimizer"])
        self._kept = restore_optimizer(self.run, state["kept_optimizer"])
        self._resumed = state["sampler"]


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


def set_rates(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> None:
    """Give the parameters of a kept optimizer the learning rates of `settings`; its state stays."""
    own = ("params", "names", "lr", "base_lr", "weight_decay")
    others = {key: value for key, value in optimizer.param_groups[0].items() if key not in own}
    held = {
        name: p for group in optimizer.param_groups for name, p in zip(group["names"], group["params"], strict=True)
    }
    optimizer.param_groups[:] = [{**others, **group} for group in group_parameters(held, settings, None)]


def restore_optimizer(run: Run, saved: dict[str, Any] | None) -> torch.optim.Optimizer | None:
    """Return the optimizer whose ``state_dict`` was `saved`; None if there was none.

    Raises `ValueError` if its state does not fit the parameters.
    """
    if saved is None:
        return None
    parameters = dict(run.model.named_parameters())
    # a kept optimizer may hold parameters that `grow` has renamed or replaced since: its next phase leaves them out
    for group in saved["param_groups"]:
        held = [
            (name, index) for name, index in zip(group["names"], group["params"], strict=True) if name in parameters
        ]
        for index in set(group["params"]) - {index for _, index in held}:
            saved["state"].pop(index, None)
        group["names"], group["params"] = [name for name, _ in held], [index for _, index in held]
    groups = [{**group, "params": [parameters[n] for n in group["names"]]} for group in saved["param_groups"]]
    optimizer = optimizer_of(groups, run.settings)
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        if wrong := [k for k, v in state.items() if isinstance(v, Tensor) and v.dim() and v.shape != parameter.shape]:
            raise ValueError(f"the optimizer's `{wrong[0]}` is not of its parameter's shape")
    return optimizer


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
