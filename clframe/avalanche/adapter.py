"""clframe's plugins in Avalanche: a plugin of Avalanche's strategies that calls the hooks of a clframe plugin."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
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
from clframe.settings import Component, Config, RunSettings, TrainSettings

ADAPTED = ("before_run", "before_experience", "phases", "penalty", "after_backward", "after_step", "after_experience")


def as_avalanche(plugin: Plugin, benchmark: Any, *, setting: Literal["class", "domain"] | None = None) -> Any:
    """Wrap `plugin` as a plugin of Avalanche, for a strategy that trains on `benchmark` with one head for all classes.

    The strategy's model is any module that maps images to the scores of all classes, by their numbers, through a last
    layer that is linear; the strategy's loss is over all of them (`train.logits=all`).

    Args:
        plugin: a plugin that adds to the loss, or acts on gradients and weights, such as `EWC(lambda_=50.0)`.
        benchmark: the benchmark of the training, in the order of its experiences.
        setting: as in `clframe.from_avalanche`.

    Returns:
        An instance of a class that derives from Avalanche's `SupervisedPlugin`.

    Raises:
        UsageError: if the plugin needs hooks that a strategy of Avalanche has no place for.
    """
    with silence_warnings(Warning):
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
    """A network of Avalanche as an `IncrementalNet`: the last linear layer is the head, all of it the backbone.

    Args:
        module: maps images to scores [B, C], in the order of the class numbers.
        order: class numbers in the order of the labels.
    """

    def __init__(self, module: nn.Module, order: Tensor) -> None:
        nn.Module.__init__(self)
        last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1:]
        if not last or last[0].out_features <= int(order.max()):
            raise UsageError(
                f"The model must end in a linear layer of at least {int(order.max()) + 1} scores, one for each class "
                "of the benchmark, from the start."
            )
        self.head = nn.ModuleList(last)  # registered first, so that its parameters have the names of a head
        self.add_module("backbone", module)
        self.grown = 0
        self.selected = None
        self.order = None if torch.equal(order, torch.arange(last[0].out_features)) else order

    @property
    def blocks(self) -> list[int]:
        """Return the size of the only block, which has all classes."""
        last: Any = self.head[0]
        return [last.out_features if self.order is None else len(self.order)]

    def features(self, x: Tensor) -> Tensor:
        """Compute the features [B, D]: the input of the last layer."""
        return self._outputs(x).features

    def columns(self, scores: Tensor) -> Tensor:
        """Return scores [B, C] in the order of the labels."""
        return scores if self.order is None else scores.index_select(1, self.order.to(scores.device))

    def _outputs(self, x: Tensor) -> Outputs:
        seen: list[Tensor] = []
        watching = self.head[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            scores = self.columns(self.backbone(x))
        finally:
            watching.remove()
        return Outputs(seen[-1], scores, [scores.shape[1]])


class _StrategyRun(Run):
    """The context of a plugin in a strategy of Avalanche, which cannot keep parameters from training."""

    def freeze(self, patterns: Iterable[str]) -> None:
        """Refuse the plugin: a strategy would move the statistics of frozen norms, and train frozen weights later."""
        raise UsageError(
            f"`{self.plugins[0].name}` cannot run inside Avalanche, whose strategies have no place for parameters that "
            "rest: run it in clframe."
        )


class _Adapted:
    """Callbacks of the plugin that `as_avalanche` returns: each calls the clframe hooks of the same moment."""

    def __init__(self, plugin: Plugin, scenario: Scenario) -> None:
        super().__init__()
        self.plugin = plugin
        self.scenario = scenario
        self.hook = compose.callers(compose.manager([plugin]))
        self.label = {number: label for label, number in enumerate(scenario.class_order)}
        self.seen: list[Tensor] = []  # input of the last layer in the latest forward pass

    def before_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Begin an experience, and before the first one the run."""
        if not self.plugin.has_run:
            self._begin(strategy)
        run = self.run
        run.experience = self.scenario[strategy.experience.current_experience].for_training()
        run.optimizer = strategy.optimizer
        self.model.grown = run.experience.index + 1
        self.hook.before_experience(run=run, experience=run.experience)
        phases: Any = self.hook.phases(run=run, experience=run.experience)
        if any(phases):
            raise UsageError(self._refuse_phases())

    def _refuse_phases(self) -> str:
        return (
            f"`{self.plugin.name}` with these options trains in phases of its own, for which a strategy of Avalanche "
            "has no place: run it in clframe, or leave the phase out."
        )

    def before_forward(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Add a forward hook that keeps the input of the last layer."""
        self.seen.clear()
        self.watching = self.model.head[0].register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0]))

    def after_forward(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Remove the forward hook added in `before_forward`."""
        self.watching.remove()

    def before_backward(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Add the penalties of the plugin to the loss."""
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
        """Call the plugin with the gradients in place."""
        self.hook.after_backward(run=self.run, batch=self.batch)

    def after_update(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Call the plugin after the optimizer's step."""
        self.hook.after_step(run=self.run, batch=self.batch)
        self.run.total_steps += 1

    def after_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        """End the experience."""
        self.hook.after_experience(run=self.run, experience=self.run.experience)

    def _begin(self, strategy: Any) -> None:
        """Build the context of the run. Raises `UsageError` if the plugin cannot serve it."""
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
            scenario=Component(scenario.name),
            model=Component(type(strategy.model).__name__),
            plugins={},
            train=TrainSettings.model_validate(train),
            run=RunSettings.model_validate({}),
        )
        self.run = _StrategyRun(config, scenario, self.model, [plugin], strategy.device)
        problems = [*stream_problems(self.run), *plugin.problems(self.run)]
        if scenario.setting not in plugin.serves:
            problems.append(f"`{plugin.name}` cannot serve the setting `{scenario.setting}`.")
        if (wanted := plugin.wanted_logits(self.run)) not in (None, "all"):
            problems.append(
                f"`{plugin.name}` with these options is made for `train.logits={wanted}`, and the loss of a strategy "
                "of Avalanche is over all classes: choose another form."
            )
        if getattr(plugin, "warm_up", 0):  # a phase that comes with the second experience only
            problems.append(self._refuse_phases())
        if problems:
            raise UsageError(*problems)
        plugin.has_run = True
        self.hook.before_run(run=self.run)


@contextmanager
def silence_warnings(kind: type[Warning]) -> Iterator[None]:
    """Suppress warnings of this category, which users cannot act on.

    Avalanche's import warns about other packages, its `ReplayPlugin` about a function of Avalanche that it calls. A
    filter alone does not suffice: that function puts its own filter first, and leaves it there for the whole process.
    """
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("ignore", kind)  # else a user who turns warnings into errors gets them
        yield
    for warning in given:
        if not issubclass(warning.category, kind):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
