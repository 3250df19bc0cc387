"""clframe's plugins inside Avalanche: a plugin of its strategies that calls the hooks of one of ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clframe import compose, contract
from clframe.avalanche.benchmark import from_avalanche
from clframe.checks import stream_problems
from clframe.context import Run
from clframe.data.batch import Batch
from clframe.data.scenario import Scenario
from clframe.errors import UsageError
from clframe.model import IncrementalNet, Outputs
from clframe.plugin import Plugin
from clframe.settings import Config, RunSettings, TrainSettings

ADAPTED = ("before_run", "before_experience", "phases", "penalty", "after_backward", "after_step", "after_experience")


def as_avalanche(plugin: Plugin, benchmark: Any, *, setting: Literal["class", "domain"] | None = None) -> Any:
    """`plugin` as a plugin of Avalanche, for a strategy that trains on `benchmark` with one head for all its classes.

    The strategy's model is any module that maps images to the scores of all classes, by their numbers, through a last
    layer that is linear; the strategy's loss is over all of them (`train.logits=all`).

    Args:
        plugin: one that adds to the loss, or acts on gradients and weights, such as `EWC(lambda_=50.0)`.
        benchmark: the one that is trained on, in the order of its experiences.
        setting: as in `clframe.from_avalanche`.

    Returns:
        An instance of a class that derives from Avalanche's `SupervisedPlugin`.

    Raises:
        UsageError: if the plugin needs what a strategy of Avalanche has no place for.
    """
    with quiet(Warning):
        from avalanche.training.plugins import SupervisedPlugin

    scenario = from_avalanche(benchmark, setting=setting)
    needed = [
        hook
        for hook in contract.hooks_of(type(plugin))
        if hook not in ADAPTED and not (hook == "base_loss" and not plugin.owns(hook))
    ]
    if needed:
        raise UsageError(
            f"`{plugin.name}` cannot run inside Avalanche, whose strategies have no place for its hook `{needed[0]}`: "
            "run it in clframe."
        )
    if scenario.setting == "task":
        raise UsageError(
            f"`{plugin.name}` cannot run inside Avalanche on a benchmark of several tasks, only with one head for all "
            "classes: give `setting='class'` or `setting='domain'`."
        )
    adapted: Any = type("AsAvalanche", (_Adapted, SupervisedPlugin), {})
    return adapted(plugin, scenario)


class AvalancheModel(IncrementalNet):
    """A network of Avalanche as clframe's plugins see one: its last linear layer is the head, all of it the backbone.

    Args:
        module: maps images to scores [B, C], by the classes' own numbers.
        order: those numbers, in the order of the labels.
    """

    def __init__(self, module: nn.Module, order: Tensor) -> None:
        nn.Module.__init__(self)
        last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1:]
        if not last or last[0].out_features <= int(order.max()):
            raise UsageError(
                f"The model must end in a linear layer of at least {int(order.max()) + 1} scores, one for each class "
                "of the benchmark, from the start."
            )
        self.head = nn.ModuleList(last)  # first, so that its parameters go by the name of a head's
        self.add_module("backbone", module)
        self.grown, self.selected = 0, None
        self.order = None if torch.equal(order, torch.arange(last[0].out_features)) else order

    @property
    def blocks(self) -> list[int]:
        """One block, of all classes."""
        last: Any = self.head[0]
        return [last.out_features if self.order is None else len(self.order)]

    def features(self, x: Tensor) -> Tensor:
        """What goes into the last layer."""
        return self._outputs(x).features

    def columns(self, scores: Tensor) -> Tensor:
        """Scores [B, C] by label."""
        return scores if self.order is None else scores.index_select(1, self.order.to(scores.device))

    def _outputs(self, x: Tensor) -> Outputs:
        seen: list[Tensor] = []
        watching = self.head[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            scores = self.columns(self.backbone(x))
        finally:
            watching.remove()
        return Outputs(seen[-1], scores, [scores.shape[1]])


class _Adapted:
    """The callbacks of what `as_avalanche` gives: each calls the plugin's hooks that have their place there."""

    def __init__(self, plugin: Plugin, scenario: Scenario) -> None:
        super().__init__()
        self.plugin, self.scenario = plugin, scenario
        self.hook = compose.callers(compose.manager([plugin]))
        self.label = {number: label for label, number in enumerate(scenario.class_order)}
        self.seen: list[Tensor] = []  # what went into the last layer in the latest forward pass

    def before_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        """The experience begins, and with the first one the run."""
        if not self.plugin.has_run:
            self._begin(strategy)
        run = self.run
        run.experience = self.scenario[strategy.experience.current_experience].for_training()
        run.optimizer = strategy.optimizer
        self.model.grown = run.experience.index + 1
        self.hook.before_experience(run=run, experience=run.experience)
        phases: Any = self.hook.phases(run=run, experience=run.experience)
        if any(phases):
            raise UsageError(
                f"`{self.plugin.name}` with these options trains in phases of its own, for which a strategy of "
                "Avalanche has no place."
            )

    def before_forward(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Look at what goes into the last layer."""
        self.seen.clear()
        self.watching = self.model.head[0].register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0]))

    def after_forward(self, strategy: Any, *_: Any, **__: Any) -> None:
        """It was seen."""
        self.watching.remove()

    def before_backward(self, strategy: Any, *_: Any, **__: Any) -> None:
        """What the plugin adds to the loss."""
        run = self.run
        y = torch.tensor([self.label[number] for number in strategy.mb_y.tolist()], device=run.device)
        self.batch = Batch(
            strategy.mb_x,
            y,
            index=torch.full_like(y, -1),
            task=torch.full_like(y, run.experience.index),
            weight=torch.ones(len(y), device=run.device),
            origin=torch.zeros_like(y),
        )
        if self.plugin.needs_task_gradient:
            moving = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(strategy.loss, list(moving.values()), retain_graph=True, allow_unused=True)
            run.task_gradients = {name: g for name, g in zip(moving, found, strict=True) if g is not None}
        scores = self.model.columns(strategy.mb_output)
        outputs = Outputs(self.seen[-1], scores, [scores.shape[1]])
        named: Any
        for named in self.hook.penalty(run=run, batch=self.batch, outputs=outputs) or ():
            for term in named.values():
                strategy.loss = strategy.loss + term

    def after_backward(self, strategy: Any, *_: Any, **__: Any) -> None:
        """The gradients are there."""
        self.hook.after_backward(run=self.run, batch=self.batch)

    def after_update(self, strategy: Any, *_: Any, **__: Any) -> None:
        """The optimizer has stepped."""
        self.hook.after_step(run=self.run, batch=self.batch)
        self.run.total_steps += 1

    def after_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        """The experience ends."""
        self.hook.after_experience(run=self.run, experience=self.run.experience)

    def _begin(self, strategy: Any) -> None:
        """Build the context of the run, refusing what the plugin cannot serve."""
        from avalanche.models.dynamic_modules import DynamicModule

        plugin, scenario = self.plugin, self.scenario
        if any(isinstance(module, DynamicModule) for module in strategy.model.modules()):
            raise UsageError(
                f"`{plugin.name}` cannot run inside Avalanche with a model that grows: give it all its classes."
            )
        self.model = AvalancheModel(strategy.model, torch.tensor(scenario.class_order))
        train = {"batch_size": strategy.train_mb_size, "logits": "all", "clip": 0.0}
        if isinstance(strategy.optimizer, torch.optim.SGD):  # its rate limits quadratic penalties
            group = strategy.optimizer.param_groups[0]
            train |= {"optimizer": "sgd"} | {name: group[name] for name in ("lr", "momentum", "nesterov")}
        config = Config(
            scenario={"name": scenario.name},
            model={"name": type(strategy.model).__name__},
            plugins={},
            train=TrainSettings.model_validate(train),
            run=RunSettings.model_validate({}),
        )
        self.run = Run(config, scenario, self.model, [plugin], strategy.device)
        problems = [*stream_problems(self.run), *plugin.problems(self.run)]
        if scenario.setting not in plugin.serves:
            problems.append(f"`{plugin.name}` cannot serve the setting `{scenario.setting}`.")
        if (wanted := plugin.wanted_logits(self.run)) not in (None, "all"):
            problems.append(
                f"`{plugin.name}` with these options is made for `train.logits={wanted}`, and the loss of a strategy "
                "of Avalanche is over all classes: choose another form."
            )
        if problems:
            raise UsageError(*problems)
        plugin.has_run = True
        self.hook.before_run(run=self.run)


@contextmanager
def quiet(kind: type[Warning]) -> Iterator[None]:
    """Without warnings of this kind, which nobody who runs clframe can heed.

    Avalanche's import warns of what other packages do, its `ReplayPlugin` of a function of its own that it calls. A
    filter alone would not do: such a function puts one of its own first, and leaves it there for the whole process.
    """
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("ignore", kind)  # else those who ask for errors in place of warnings get them
        yield
    for warning in given:
        if not issubclass(warning.category, kind):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
