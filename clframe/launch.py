"""From a configuration to a run: its parts are built, it is carried out, and its errors are explained."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from clframe import contract, registry
from clframe.checks import check_run
from clframe.context import Run
from clframe.data.scenario import Scenario
from clframe.data.streams import following
from clframe.deploy.trained import Trained
from clframe.engine import Engine, learn
from clframe.errors import (
    OF_THE_DISK,
    ClframeError,
    DataError,
    RunError,
    UsageError,
    of_the_system,
    out_of_memory,
)
from clframe.events import Ended, Event, Listener, Message
from clframe.model import IncrementalNet, seed_torch
from clframe.networks import check_backbone, prepare
from clframe.options import explain, fields_of, searched, validated
from clframe.plugin import Plugin
from clframe.runs import checkpoint, state
from clframe.runs.extension import Base, extend_scenario, join, load_base
from clframe.runs.files import BASE, read_config
from clframe.runs.folder import (
    RunFolder,
    how_to_go_on,
    read_model,
)
from clframe.runs.record import fit_temperatures, restore_scenario
from clframe.runs.results import Results, check_finished
from clframe.settings import Component, Config, TrainSettings
from clframe.system.reading import blame_file, expand_home
from clframe.system.switches import alone, plain_torch, quiet_writers
from clframe.system.texts import cut

WEIGHTS = "weights"  # the option of a model that starts from published weights


def begin_from(engine: Engine, base: Base | None) -> None:
    """Check that the run of `engine` can extend `base`; without a base, load the weights that `model.start` names."""
    config = engine.run.config
    if base:
        base.check(config, engine.run.plugins)
    elif start := config.model.start:
        start_from(engine.run.model.backbone, expand_home(start), config.model.name)


def begin_run(engine: Engine, base: Base | None, ended: tuple[Any, Any] | None) -> None:
    """Bring a run to its beginning, or to the end of the run that it extends, and save it."""
    if base and ended:
        with blame_file(base.path / "checkpoints"):
            state.take_over(engine, *ended, keep_optimizer=base.keeps_optimizer(engine.run.config.train))
        join(engine, base.find_joining(engine.run.plugins))
    engine.save()
    if engine.folder:  # a run that recorded something before its first checkpoint is whole could not be resumed
        engine.folder.settle()


def plugin_name(plugin: str | Mapping[str, Mapping[str, Any]] | Plugin) -> str:
    """Return the name of a plugin that is given by name, with options, or as an object."""
    if isinstance(plugin, Plugin):
        return plugin.name or type(plugin).__name__
    return plugin if isinstance(plugin, str) else next(iter(plugin))


def check_resumes(config: Config, plugins: Sequence[Plugin], path: Path, what: str = "resumed") -> None:
    """Refuse to continue a run with a plugin whose state is in no checkpoint. Raises `DataError`."""
    given = {plugin_name(plugin): type(plugin) for plugin in plugins}
    for name, plugin in config.plugins.items():
        if plugin.origin == "object" and name not in given:
            continue  # told when the run is built
        # a plugin's own class says so for all of its variants, which may take long to import
        if not (given[name] if name in given else registry.plugin_class(name.partition(":")[0])).resumes:
            raise DataError(
                f"The run in {path} cannot be {what}: what `{name}` keeps is in no checkpoint. Start it again with "
                f"`clframe run --config {path / 'config.yaml'}`."
            )


@contextmanager
def environment_of(config: Config) -> Iterator[torch.device]:
    """Yield the run's device, with its threads, seed and deterministic kernels; restore torch's settings afterwards."""
    device = device_of(config.run.device)
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    with (
        alone(),
        quiet_writers(),
        plain_torch(device),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        try:
            if config.train.threads is not None:
                torch.set_num_threads(config.train.threads)
            cudnn.deterministic, cudnn.benchmark = True, False
            seed_torch(config.run.seed, device)
            yield device
        finally:
            torch.set_num_threads(threads)
            cudnn.deterministic, cudnn.benchmark = deterministic, benchmark


def device_of(name: str) -> torch.device:
    """Return the device that `run.device` names. Raises `UsageError` if this machine lacks it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"`run.device` is {name!r}; choices: auto, cpu, cuda, cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(
            f"`run.device` is {name!r}, but torch finds {count or 'no'} CUDA device(s) here; use `cpu` or `auto`."
        )
    return device


def base_of(config: Config) -> Base | None:
    """Return the run that this one extends, if any."""
    if config.run.extends is None:
        return None
    path = expand_home(config.run.extends)
    check_finished(path)
    return load_base(path, read_config(path))


def build(
    config: Config,
    device: torch.device,
    folder: RunFolder | None,
    scenario: Scenario | None,
    model: nn.Module | None,
    plugins: Sequence[Plugin],
    listeners: Sequence[Listener],
    base: Mapping[str, Any] | None = None,
    restored: bool = False,
) -> Engine:
    """Build the scenario, the network, the plugins and the engine of the run; each of them may refuse it.

    `base` describes what was learned before, where the run extends another one. The weights of a network that is
    `restored` are all given later: none are downloaded.
    """
    if scenario is None:
        with following(learned=base is not None):
            scenario = registry.build_scenario(check_named(config.scenario, "scenario"), config.run)
    scenario = cut_scenario(scenario, config)
    if base is not None:
        with blame_file((folder.path if folder else Path(config.run.extends or "")) / BASE):
            before = restore_scenario(base)
        scenario = extend_scenario(before, scenario)
    given = {plugin_name(plugin): plugin for plugin in plugins}
    members = [
        given[name] if name in given else registry.build_plugin(name, check_named(plugin, "plugin").options)
        for name, plugin in config.plugins.items()
    ]
    check_changes(config, members)
    observers = config.run.observers() if folder else []
    members += [registry.build_plugin(name, {}) for name in observers if name not in config.plugins]
    if model is None:
        named = check_named(config.model, "model")
        if restored:
            named = replace(named, options={n: value for n, value in named.options.items() if n != WEIGHTS})
        model = registry.build_backbone(named, scenario.input_shape).to(device)
        check_backbone(model, scenario.input_shape, device)
    else:
        model = prepare(model, scenario.input_shape, device, lambda text: tell(listeners, text))
    scenario.hold_out(config.train.val, config.run.seed)
    scenario.to(device)
    run = Run(config, scenario, IncrementalNet(model), members, device, listeners, folder.path if folder else None)
    engine = Engine(run, scenario, folder)
    engine.carried = None if base is None else dict(base.get("temperature") or {})
    return engine


def cut_scenario(scenario: Scenario, config: Config) -> Scenario:
    """Return `scenario` without what `run.experiences` and `run.test` keep from the run.

    Raises:
        UsageError: if it has fewer experiences, or nothing would be left to measure.
    """
    run = config.run
    if not run.test and not config.train.val:
        raise UsageError(
            "`run.test` is false and `train.val` is 0, so nothing would be measured: hold out images with `train.val`."
        )
    return scenario if run.test and run.experiences is None else scenario.cut(run.experiences, test=run.test)


def check_changes(config: Config, plugins: Sequence[Plugin]) -> None:
    """Refuse settings in `run.per_experience` that cannot change within a run, or have values that are not valid.

    Raises:
        UsageError: with one sentence for each mistake.
    """
    problems: list[str] = []
    allowed = {f"train.{option.name}" for option in fields_of(TrainSettings) if option.search}
    owners = {f"{plugin.name}.{name}": plugin for plugin in plugins for name in searched(type(plugin))}
    for i, entry in enumerate(config.run.per_experience or []):
        where = f"experience {i + 1} of `run.per_experience`"
        for name, value in entry.items():
            option = name.partition(".")[2]
            if name not in allowed and name not in owners:
                choices = ", ".join(f"`{known}`" for known in sorted([*allowed, *owners]))
                problems.append(f"`{cut(name)}` in {where} cannot change within a run: choose from {choices}.")
                continue
            try:
                if name in owners:
                    plugin = owners[name]
                    cls = type(plugin)
                    cls.from_validated(validated(cls, {**plugin.public_options(), option: value}, plugin.name))
                else:
                    config.train_of(i)
            except UsageError as error:
                problems += [f"{sentence.rstrip('.')} in {where}." for sentence in error.problems]
            except ValidationError as error:
                problems += [f"{sentence.rstrip('.')} in {where}." for sentence in explain(error, "train")]
    if problems:
        raise UsageError(*dict.fromkeys(problems))


def check_config(config: Config) -> None:
    """Raise what a run of `config` raises before it trains; nothing is written, trained, or kept on a device.

    Raises:
        UsageError: with one sentence for each reason why it could not be learned as it is asked to.
        DataError: if data or the run that it extends are missing or damaged.
    """
    config = config.model_copy(deep=True)
    config.run.device = "cpu"
    base = base_of(config)
    with environment_of(config) as device:
        engine = build(config, device, None, None, None, (), (), base.known if base else None, restored=True)
        begin_from(engine, base)
        check_run(engine.run, engine.stream)


def start_from(backbone: nn.Module, path: Path, name: str) -> None:
    """Load the weights with which the run in `path` ended into `backbone`, the model `name`. Raises `DataError`."""
    _, packed, tensors = read_model(path)
    with blame_file(path / "model.json"):
        saved = dict(checkpoint.unpack(dict(packed["dict"])["model"], tensors))
    weights = {key.removeprefix("backbone."): value for key, value in saved.items() if key.startswith("backbone.")}
    wanted = backbone.state_dict()
    for key in sorted(wanted.keys() | weights.keys()):
        there, here = (f"of shape {list(of[key].shape)}" if key in of else "missing" for of in (weights, wanted))
        if there != here:
            raise DataError(
                f"The network of `model.start`, the run in {path}, is not a `{name}` for these images: its `{key}` is "
                f"{there}, and here it is {here}: start from a run of the same model, without methods that change it."
            )
    backbone.load_state_dict(weights)


def check_named(component: Component, kind: registry.Kind) -> Component:
    """Return `component`. Raises `DataError` if it stands for an object that only a Python program can give."""
    if component.origin == "object":
        raise DataError(
            f"The {kind} `{component.name}` of this run is an object of a Python program: give it again, with "
            "`clframe.resume`, `clframe.load` or `clframe.extend` from Python."
        )
    return component


def carry_out(engine: Engine, begin: Callable[[], None]) -> Results:
    """Run the engine to the results, and explain its errors."""
    run = engine.run
    if engine.folder:
        run.listeners.append(folder_writer(engine.folder))
    for plugin in run.plugins:
        plugin.has_run = True
    try:
        with engine.stoppable():
            results = learn(engine, begin)
    except ClframeError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise RunError(
                f"Out of memory on {run.device} in {run.progress_label}: a run with a smaller `train.batch_size` or "
                f"`run.eval_batch_size` needs less.{how_to_go_on(engine.folder)}"
            ) from error
        refused = of_the_system(error)
        if refused and getattr(error, "errno", None) in OF_THE_DISK:
            raise RunError(
                f"{run.folder or 'A file'} could not be written: {refused}.{how_to_go_on(engine.folder)}"
            ) from error
        if blamed := blame(error):
            raise RunError(f"{blamed}: {type(error).__name__}: {error}.{how_to_go_on(engine.folder)}") from error
        if refused:
            raise RunError(
                f"A file or the system failed in {run.progress_label}: {refused}.{how_to_go_on(engine.folder)}"
            ) from error
        raise
    run._emit(Ended(str(run.folder) if run.folder else None))
    engine.trainer.drop_optimizers()
    engine.collected.clear()
    return replace(results, answering=lambda: trained_model(engine))


def trained_model(engine: Engine) -> Trained:
    """Return the trained model of a run that has ended, on the CPU, as `load` gives it."""
    with plain_torch(engine.run.device), torch.no_grad():
        temperature, fitted = fit_temperatures(engine)
        scenario = engine.stream.described()
        predictor = engine.evaluator.answering(engine.hook.predictor)
        return Trained(predictor, scenario, engine.evaluator.readings, temperature, fitted).to("cpu")


def blame(error: Exception) -> str | None:
    """Return a sentence naming the plugin or module that raised `error`; None if neither is on the call stack."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner, place = frame.f_locals.get("self"), frame.f_code.co_name
        if isinstance(owner, Plugin):
            kind = "hook" if place in contract.hooks_of(type(owner)) else "method"
            error.add_note(f"in plugin '{owner.name}', {kind} '{place}'")
            return f"The plugin `{owner.name}` raised in its {kind} `{place}`"
        if isinstance(owner, nn.Module) and not type(owner).__module__.startswith(("torch.", "clframe.")):
            return f"The module `{type(owner).__name__}` raised in its method `{place}`"
    return None


def folder_writer(folder: RunFolder) -> Listener:
    """Return the listener that keeps the records of a run in its folder."""

    def write(event: Event) -> None:
        if event["kind"] in ("step", "within", "eval", "log"):
            folder.append_metrics(dict(event))
        elif event["kind"] == "images":
            folder.keep_picture(event["name"], event["experience"], event["picture"])

    return write


def tell(listeners: Sequence[Listener] | Listener, text: str) -> None:
    """Send a message to `listeners` before there is a run that could."""
    for listener in [listeners] if callable(listeners) else listeners:
        listener(Message(text))
