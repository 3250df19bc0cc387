"""A run from Python: `run`, `resume`, `extend` and `load`, which the command line uses too."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from clframe import registry
from clframe.checks import check_run
from clframe.config import resolve, to_yaml
from clframe.data import split_file
from clframe.data.build import Arrays
from clframe.data.scenario import Scenario
from clframe.deploy.trained import Trained
from clframe.errors import (
    DataError,
    UsageError,
)
from clframe.events import Listener
from clframe.launch import (
    base_of,
    begin_from,
    begin_run,
    build,
    carry_out,
    check_named,
    check_resumes,
    environment_of,
    plugin_name,
    tell,
)
from clframe.networks import unwrap_compiled
from clframe.plugin import Plugin
from clframe.runs import checkpoint, state, sums
from clframe.runs.extension import derive_options, load_base
from clframe.runs.files import ENVIRONMENT, read_config
from clframe.runs.folder import (
    RunFolder,
    compare_environments,
    describe_environment,
    read_model,
)
from clframe.runs.record import check_description, list_experiences
from clframe.runs.results import Results, check_finished
from clframe.settings import OBSERVERS, Component, Config
from clframe.system.reading import blame_file, expand_home
from clframe.system.switches import beside_no_run, plain_torch
from clframe.system.texts import quote


def run(
    scenario: str | Mapping[str, Any] | Scenario = "split-digits",
    model: str | Mapping[str, Any] | nn.Module | None = None,
    plugins: Sequence[str | Mapping[str, Mapping[str, Any]] | Plugin] | Mapping[str, Mapping[str, Any]] | str = (),
    *,
    train: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    listeners: Sequence[Listener] = (),
    progress: bool | None = None,
) -> Results:
    """Learn a scenario and return the results.

    Args:
        scenario: a name, a mapping with ``name`` and options, or a custom scenario (`clframe.split_classes`,
            `clframe.change_domains`, `clframe.Scenario`).
        model: likewise; or a custom backbone, a module with ``features(x) -> [B, D]`` and ``width`` = D. A copy
            of it is trained, which `Results.trained` answers with; the given one stays as it is.
        plugins: names, ``{name: {option: value}}``, or plugins, in the order of calling; or one name, or one
            mapping of them all.
        train: training settings (`clframe.settings.TrainSettings`).
        run: settings of the run (`clframe.settings.RunSettings`). Without ``output`` nothing is written to the disk.
        listeners: called with each record of the run's progress.
        progress: show the course of the run on stderr, as the command line does; None: on a terminal and in a notebook.

    Raises:
        UsageError: with one sentence for each mistake, before any training; also if another run of this process is
            under way, as torch's global random generator serves one.
        DataError: if data or the run folder are missing, damaged or in use.
        RunError: if a loss is not finite, memory or disk is full, or a plugin raised.
        Interrupted: after SIGINT or SIGTERM; the run is saved.
    """
    plugins = _each_plugin(plugins)
    if classes := [plugin.__name__ for plugin in plugins if isinstance(plugin, type)]:
        raise UsageError(*(f"`{name}` is a class; give a plugin built from it: `{name}()`." for name in classes))
    if isinstance(model, type):
        raise UsageError(
            f"The model `{model.__name__}` is a class; give a network built from it: `{model.__name__}()`."
        )
    names = [plugin_name(plugin) for plugin in plugins if isinstance(plugin, str | Mapping | Plugin)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(*(f"The plugin `{name}` is named twice; name it once." for name in twice))
    run = _of_run(run)
    config, objects = _config_of(scenario, model, plugins, train, run)
    with _shown(progress, listeners) as everyone:
        return run_config(config, listeners=everyone, **objects)


def run_config(
    config: Config,
    *,
    scenario: Scenario | None = None,
    model: nn.Module | None = None,
    plugins: Sequence[Plugin] = (),
    listeners: Sequence[Listener] = (),
) -> Results:
    """Carry out the run that `config` defines; objects that it only names are given here. Raises as `run`."""
    if used := [plugin for plugin in plugins if plugin.state and plugin.has_run]:
        raise UsageError(
            *(
                f"The plugin `{plugin_name(plugin)}` has been in a run and holds what it learned there; build a new "
                f"one: `{plugin!r}`."
                for plugin in used
            )
        )
    base = base_of(config)
    with environment_of(config) as device:
        folder = RunFolder(expand_home(config.run.output), new=True) if config.run.output else None
        try:
            described = base.known if base else None
            engine = build(
                config, device, folder, scenario, model, plugins, listeners, described, restored=base is not None
            )
            begin_from(engine, base)
            check_run(engine.run, engine.stream)
            for note in engine.stream.notes:
                engine.run.tell(note)
            ended = base.last_checkpoint() if base else None
            if folder:
                config.run.device = str(device)
                config.train.threads = torch.get_num_threads()
                found = describe_environment(device, config.run.seed, engine.stream.checksum)
                folder.begin(to_yaml(config), found, list_experiences(engine.stream), described)
            return carry_out(engine, lambda: begin_run(engine, base, ended))
        finally:
            if folder:
                folder.close()


def resume(
    folder: str | Path,
    *,
    scenario: Scenario | None = None,
    model: nn.Module | None = None,
    plugins: Sequence[Plugin] = (),
    allow_env_change: bool = False,
    listeners: Sequence[Listener] = (),
    progress: bool | None = None,
) -> Results:
    """Continue the run in `folder` after a crash, a kill or a signal, to the same results, bit for bit.

    What the run was given as Python objects is given again. In another environment (torch, device, threads) the last
    bits may differ, so that is refused unless `allow_env_change`.

    Raises:
        DataError: if there is nothing to resume, or the folder is damaged, edited or in use.
        RunError: as `run`.
        Interrupted: as `run`.
    """
    with _shown(progress, listeners) as everyone:
        return _resumed(expand_home(folder), scenario, model, plugins, allow_env_change, everyone)


def _resumed(
    path: Path,
    scenario: Scenario | None,
    model: nn.Module | None,
    plugins: Sequence[Plugin],
    allow_env_change: bool,
    listeners: Sequence[Listener],
) -> Results:
    """Resume the run in `path`, as `resume` does, with these listeners."""
    opened = RunFolder(path, new=False)
    try:
        if opened.finished:
            raise DataError(f"The run in {path} is finished: its figures are in {path / 'results.json'}.")
        opened.check_config()
        config = read_config(path)
        check_resumes(config, plugins, path)
        if config.run.device.startswith("cuda") and not torch.cuda.is_available():
            config.run.device = "auto"  # a change of the environment, which is refused below or allowed
        with environment_of(config) as device:
            before = opened.read_environment()
            now = describe_environment(device, config.run.seed, before.get("data_sha256", ""))
            changes = compare_environments(before, now)
            if changes and not allow_env_change:
                raise DataError(
                    f"This environment is not the one of the run in {path} ({'; '.join(changes)}; {ENVIRONMENT}), so "
                    "its last bits may differ: resume it there, or with `--allow-env-change`."
                )
            # a process that was killed before its first checkpoint has learned nothing: the run begins again
            loaded = (
                None if opened.untouched else checkpoint.load(opened.checkpoints, lambda text: tell(listeners, text))
            )
            position = {"experience": 0, "done": []}
            if loaded:
                with blame_file(opened.checkpoints):
                    position = state.read_position(loaded[0])
            opened.check_sums(position, [ENVIRONMENT] if allow_env_change else [], lambda text: tell(listeners, text))
            config.run.output = str(path)
            base = None if loaded else base_of(config)
            engine = build(
                config,
                device,
                opened,
                scenario,
                model,
                plugins,
                listeners,
                opened.read_base(),
                restored=loaded is not None,
            )
            if not loaded:
                begin_from(engine, base)
            check_run(engine.run, engine.stream)
            if engine.stream.checksum != before.get("data_sha256"):
                raise DataError(
                    f"The data of `{engine.stream.name}` is not what the run in {path} began with; put it back."
                )
            ended = base.last_checkpoint() if base else None

            def begin() -> None:
                if loaded:
                    with blame_file(opened.checkpoints):
                        state.restore(engine, *loaded)
                else:
                    opened.cut_metrics(0)
                    begin_run(engine, base, ended)

            return carry_out(engine, begin)
    finally:
        opened.close()


def extend(
    folder: str | Path,
    scenario: str | Mapping[str, Any] | Scenario,
    *,
    model: nn.Module | None = None,
    plugins: Sequence[str | Mapping[str, Mapping[str, Any]] | Plugin] | Mapping[str, Mapping[str, Any]] | str = (),
    train: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    listeners: Sequence[Listener] = (),
    progress: bool | None = None,
) -> Results:
    """Continue training the finished run in `folder` on a new `scenario`, with all of its state.

    A class of an old name is the old class, others are new. Of earlier experiences there are no images, so that their
    accuracy stays empty. The result is a run of its own, to predict with, to export, and to extend again.

    Args:
        folder: of the finished run, which stays as it is.
        scenario: as `run` takes it. One by name comes as one experience, unless its options say otherwise, and in the
            run's setting; one of the run's own name has the run's other options.
        model: the run's backbone, where it was given as an object; with any weights.
        plugins: the run's, where they were given as objects; ``{name: {option: value}}`` for options that change; and
            those that join the run (`clframe.Plugin.joins`), as `run` takes them.
        train: training settings that change; others are the run's.
        run: settings of the run that change, likewise.
        listeners: called with each record of the run's progress.
        progress: as `run`.

    Raises:
        DataError: if the run is not finished, or its last checkpoint is gone.
        UsageError: as `run`.
        RunError: as `run`.
        Interrupted: as `run`.
    """
    own = scenario if isinstance(scenario, Scenario) else None
    if isinstance(scenario, str):
        scenario = {"name": scenario}
    plugins = _each_plugin(plugins)
    given = {plugin_name(plugin): plugin for plugin in plugins if isinstance(plugin, Plugin)}
    plugins = [{plugin: {}} if isinstance(plugin, str) else plugin for plugin in plugins]
    options = {name: values for plugin in plugins if isinstance(plugin, Mapping) for name, values in plugin.items()}
    run = _of_run(run)
    config = extension_config(
        expand_home(folder),
        _component(scenario) if isinstance(scenario, Scenario) else scenario,
        objects=(*given, "model") if model is not None else tuple(given),
        plugins=options,
        train=train,
        run=run,
    )
    config.plugins |= {name: _component(plugin) for name, plugin in given.items()}
    with _shown(progress, listeners) as everyone:
        return run_config(config, scenario=own, model=model, plugins=list(given.values()), listeners=everyone)


def extension_config(
    path: Path,
    scenario: Mapping[str, Any] | Component,
    *,
    objects: Sequence[str] = (),
    plugins: Mapping[str, Mapping[str, Any]] | None = None,
    sets: Sequence[str] = (),
    train: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration of a run that extends the finished one in `path`, changed by the arguments.

    `objects` names the plugins, and ``model``, that a program gives as objects; a scenario that is an object is a
    `Component`. Raises as `extend`.
    """
    check_finished(path)
    base = load_base(path, read_config(path))
    check_resumes(base.config, (), path, "extended")
    named = [plugin for name, plugin in base.config.plugins.items() if name not in objects]
    for plugin in named:
        check_named(plugin, "plugin")
    if "model" not in objects:
        check_named(base.config.model, "model")
    old = base.config.model_dump()
    joining = {name: values for name, values in (plugins or {}).items() if name not in old["plugins"]}
    changed = {plugin.name: {**plugin.options, **(plugins or {}).get(plugin.name, {})} for plugin in named} | joining
    carried = {}
    if not isinstance(scenario, Component):
        carried = {"name": scenario["name"], **derive_options(base, scenario["name"])}
    device = old["run"]["device"]
    kept: dict[str, Any] = {"output": None, "joint": None, "old_images": None, "extends": str(path.resolve())}
    kept |= {"experiences": None, "test": True, "per_experience": None, "tuned": None}
    if device.startswith("cuda") and not torch.cuda.is_available():
        kept["device"] = "auto"
    config = resolve(
        scenario=scenario,
        model=base.config.model if "model" in objects else None,
        base={
            "scenario": carried,
            "model": old["model"],
            "plugins": changed,
            "train": old["train"],
            "run": old["run"] | kept,
        },
        sets=sets,
        train=train,
        run=run,
    )
    config.plugins = base.config.plugins | config.plugins
    return config


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    plugins: Sequence[Plugin] = (),
    listeners: Sequence[Listener] = (),
) -> Trained:
    """Return the trained model of a finished run, ready to predict.

    What the run was given as Python objects (the backbone, plugins) is given again, with any weights. The files are
    compared with their sums; a run of an earlier clframe has none, which `listeners`, or else a warning, say.

    Raises:
        DataError: if the run is not finished or its model is damaged.
    """
    path = expand_home(folder)
    description, packed, tensors = read_model(path)
    if told := sums.explain_missing(path):
        if listeners:
            tell(listeners, told)
        else:
            warnings.warn(told, stacklevel=2)
    config = read_config(path)
    scenario = check_description(path, description)
    config.run.tensorboard = False
    cpu = torch.device("cpu")
    with beside_no_run(), plain_torch(cpu), torch.random.fork_rng(devices=[]):
        engine = build(config, cpu, None, scenario, model, plugins, (), restored=True)
        engine.run.is_loaded = True
        engine.hook.before_run(run=engine.run)
        with blame_file(path / "model.json"):
            structures = state.regrow(engine, len(scenario), packed)
            entries = dict(packed["dict"])
            state.load_model(engine.run.model, checkpoint.unpack(entries["model"], tensors, device=engine.run.device))
            saved = dict(entries["plugins"]["dict"])
            for plugin in engine.run.plugins:
                if plugin.name in saved:
                    state.load_plugin_state(plugin, saved[plugin.name], tensors, structures, engine.run.device)
            temperature, fitted = description.get("temperature"), description.get("fitted")
            predictor = engine.evaluator.answering(engine.hook.predictor)
            trained = Trained(predictor, scenario, engine.evaluator.readings, temperature, fitted)
            # what does not fit the network or the plugins shows here, and not in the first answer
            zeros = torch.zeros(1, *scenario.input_shape, dtype=torch.uint8 if scenario.transform.scale > 1 else None)
            trained(zeros, 0 if trained.needs_task else None)
    return trained


def save_split(
    path: str | Path,
    scenario: str | Mapping[str, Any],
    *,
    sets: Sequence[str] = (),
    run: Mapping[str, Any] | None = None,
) -> Scenario:
    """Write a scenario to a file that `run` takes as a scenario, here and elsewhere.

    Args:
        path: of the file, which must end in ``.json``.
        scenario: a name, or a mapping with ``name`` and options.
        sets: further options, each ``scenario.option=value``.
        run: settings of the run that it depends on: ``seed`` and ``data_root``.

    Returns:
        the scenario.

    Raises:
        UsageError: if a name or option is wrong, or the file cannot be written.
        RunError: if the disk is full, or fails.
        DataError: if its data is missing or damaged.
    """
    config = resolve(scenario=scenario, sets=sets, run=run)
    built = registry.build_scenario(config.scenario, config.run)
    split_file.write_split(expand_home(path), config.scenario, built, config.run.seed)
    return built


def _config_of(
    scenario: str | Mapping[str, Any] | Scenario,
    model: str | Mapping[str, Any] | nn.Module | None,
    plugins: Sequence[str | Mapping[str, Mapping[str, Any]] | Plugin],
    train: Mapping[str, Any] | None,
    run: Mapping[str, Any],
) -> tuple[Config, dict[str, Any]]:
    """Return the configuration of a run that a Python program asks for, and the objects that it only names."""
    built = [plugin for plugin in plugins if isinstance(plugin, Plugin)]
    if isinstance(scenario, Arrays):
        raise UsageError(
            f"`{scenario.name}` is `Arrays`, and no scenario yet: cut experiences from it with "
            "`clframe.split_classes`, or let them change with `clframe.change_domains`."
        )
    own_scenario = scenario if isinstance(scenario, Scenario) else None
    own_model = model if isinstance(model, nn.Module) else None
    config = resolve(
        scenario=_component(scenario) if isinstance(scenario, Scenario) else scenario,
        model=_component(model) if isinstance(model, nn.Module) else model,
        plugins=[plugin for plugin in plugins if not isinstance(plugin, Plugin)],
        train=_mapping(train, "train"),
        run=run,
        plugin_train=registry.suited_train(
            plugin if isinstance(plugin, Plugin) else plugin_name(plugin)
            for plugin in plugins
            if isinstance(plugin, str | Mapping | Plugin)
        ),
    )
    parts = config.plugins | {plugin_name(plugin): _component(plugin) for plugin in built}
    config.plugins = {name: parts[name] for name in map(plugin_name, plugins)}
    return config, {"scenario": own_scenario, "model": own_model, "plugins": built}


def _component(given: Scenario | nn.Module | Plugin) -> Component:
    """Return what a configuration holds of a scenario, model or plugin that a Python program gives as an object."""
    if isinstance(given, Plugin):
        return Component(plugin_name(given), given.public_options(), origin="object")
    name = given.name if isinstance(given, Scenario) else type(unwrap_compiled(given)).__name__
    return Component(name, origin="object")


@contextmanager
def _shown(progress: bool | None, listeners: Sequence[Listener] | Listener) -> Iterator[Sequence[Listener]]:
    """Yield the listeners, and one that shows the course of the run if `progress`; None: if a person sees stderr.

    By default, runs in other threads than the main one show nothing: two would write over each other.
    """
    if progress is None:
        main = threading.current_thread() is threading.main_thread()
        progress = main and (bool(sys.stderr and sys.stderr.isatty()) or _in_notebook())
    if callable(listeners):
        listeners = [listeners]
    if not progress:
        yield listeners
        return
    from clframe.cli.live import Live

    with Live() as live:
        yield [*listeners, live]


def _in_notebook() -> bool:
    """Return whether this is the kernel of a notebook, whose stderr people see."""
    kernel = sys.modules.get("ipykernel.zmqshell")
    return kernel is not None and bool(kernel.ZMQInteractiveShell.initialized())


def _mapping(given: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """Return the settings `given` as the argument `name`. Raises `UsageError` if they are not a mapping."""
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(f"`{name}` is {quote(given)}; it must be a mapping of settings to values.")
    return dict(given or {})


def _of_run(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return settings of the run `given` in Python: observers that write files are on only if a folder is named."""
    run = _mapping(given, "run")
    return {**dict.fromkeys(OBSERVERS, run.get("output") is not None), **run}


def _each_plugin(
    plugins: Iterable[str | Mapping[str, Mapping[str, Any]] | Plugin]
    | Mapping[str, Mapping[str, Any]]
    | str
    | Plugin
    | None,
) -> Sequence[str | Mapping[str, Mapping[str, Any]] | Plugin]:
    """Return the plugins as a list; a text is one name, and a mapping has names and options, as in YAML."""
    if plugins is None:
        return []
    if isinstance(plugins, str | Plugin | Mapping | type) or not isinstance(plugins, Iterable):
        plugins = [cast(Any, plugins)]
    each: list[str | Mapping[str, Mapping[str, Any]] | Plugin] = []
    for plugin in plugins:
        each += [{name: options} for name, options in plugin.items()] if isinstance(plugin, Mapping) else [plugin]
    return each
