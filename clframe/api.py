"""A run from Python: `run`, `resume`, `extend` and `load`, which the command line uses too."""

from __future__ import annotations

import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import nn

from clframe import contract, registry
from clframe.config import resolve, to_yaml
from clframe.context import Listener, Run
from clframe.data.build import Arrays
from clframe.data.scenario import Scenario
from clframe.data.single_image import single_image_problems
from clframe.data.streams import following, stream_problems
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
from clframe.model import IncrementalNet, seed_torch
from clframe.networks import check_backbone, prepare, unwrap_compiled
from clframe.options import explain
from clframe.plugin import Plugin
from clframe.renamed import update_config
from clframe.runs import checkpoint, state, sums
from clframe.runs.extension import Base, defaults, extend_scenario, join, load_base
from clframe.runs.folder import (
    BASE,
    CONFIG_LIMIT,
    ENVIRONMENT,
    RunFolder,
    check_finished,
    environment,
    environment_changes,
    read_model,
)
from clframe.runs.record import described_in, results_of, scenario_of, split_of, temperatures
from clframe.runs.results import Results
from clframe.settings import DEFAULT_MODEL, DEFAULT_SCENARIO, OBJECT, OBSERVERS, START, Config, TrainSettings
from clframe.strict_yaml import parse_yaml
from clframe.system.reading import expanded, held_by, read_text
from clframe.system.switches import alone, beside_no_run, plain_torch, quiet_writers
from clframe.system.texts import cut, told

WEIGHTS = "weights"  # the option of a model that starts from published weights


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
    """Learn a scenario and give the results.

    Args:
        scenario: a name, a mapping with ``name`` and options, or a scenario of one's own (`clframe.split_classes`,
            `clframe.change_domains`, `clframe.Scenario`).
        model: likewise; or a backbone of one's own, a module with ``features(x) -> [B, D]`` and ``width`` = D. A copy
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
    names = [_name(plugin) for plugin in plugins if isinstance(plugin, str | Mapping | Plugin)]
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
    """The run that `config` defines; what it names as Python objects is given here. Errors are those of `run`."""
    if used := [plugin for plugin in plugins if plugin.state and plugin.has_run]:
        raise UsageError(
            *(
                f"The plugin `{_name(plugin)}` has been in a run and holds what it learnt there; build a new one: "
                f"`{plugin!r}`."
                for plugin in used
            )
        )
    base = _base_of(config)
    with _environment(config) as device:
        folder = RunFolder(expanded(config.run.output), new=True) if config.run.output else None
        try:
            described = base.known if base else None
            engine = _build(
                config, device, folder, scenario, model, plugins, listeners, described, restored=base is not None
            )
            _begin_from(engine, base)
            _check(engine)
            for note in engine.stream.notes:
                engine.run.emit("message", text=note)
            ended = base.last_checkpoint() if base else None
            if folder:
                config.run.device = str(device)
                config.train.threads = torch.get_num_threads()
                found = environment(device, config.run.seed, engine.stream.checksum)
                folder.begin(to_yaml(config), found, split_of(engine.stream), described)
            return _go(engine, lambda: _first(engine, base, ended))
        finally:
            if folder:
                folder.close()


def _begin_from(engine: Engine, base: Base | None) -> None:
    """Check that the run `engine` can extend `base`; or give its network the weights that `model.start` names."""
    config = engine.run.config
    if base:
        base.check(config, engine.run.plugins)
    elif start := config.model.get(START):
        _start_from(engine.run.model.backbone, expanded(start), config.model["name"])


def _first(engine: Engine, base: Base | None, ended: tuple[Any, Any] | None) -> None:
    """Bring a run to its beginning, or to where the run that it extends `ended`; and save."""
    if base and ended:
        with held_by(base.path / "checkpoints"):
            state.take_over(engine, *ended, keep_optimizer=base.keeps_optimizer(engine.run.config.train))
        join(engine, base.joining(engine.run.plugins))
    engine.save()
    if engine.folder:  # a run that recorded something before its first checkpoint is whole could not be resumed
        engine.folder.settle()


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
    """Go on with the run in `folder` after a crash, a kill or a signal, to the same results, bit for bit.

    What the run was given as Python objects is given again. In another environment (torch, device, threads) the last
    bits may differ, so that is refused unless `allow_env_change`.

    Raises:
        DataError: if there is nothing to resume, or the folder is damaged, edited or in use.
        RunError: as `run`.
        Interrupted: as `run`.
    """
    with _shown(progress, listeners) as everyone:
        return _resumed(expanded(folder), scenario, model, plugins, allow_env_change, everyone)


def _resumed(
    path: Path,
    scenario: Scenario | None,
    model: nn.Module | None,
    plugins: Sequence[Plugin],
    allow_env_change: bool,
    listeners: Sequence[Listener],
) -> Results:
    """Do what `resume` does, telling `listeners`."""
    opened = RunFolder(path, new=False)
    try:
        if opened.finished:
            raise DataError(f"The run in {path} is finished: its figures are in {path / 'results.json'}.")
        opened.check_config()
        config = _read_config(path)
        _check_resumes(config, plugins, path)
        if config.run.device.startswith("cuda") and not torch.cuda.is_available():
            config.run.device = "auto"  # a change of the environment, which is refused below or allowed
        with _environment(config) as device:
            before = opened.environment()
            now = environment(device, config.run.seed, before.get("data_sha256", ""))
            changes = environment_changes(before, now)
            if changes and not allow_env_change:
                raise DataError(
                    f"This environment is not the one of the run in {path} ({'; '.join(changes)}; {ENVIRONMENT}), so "
                    "its last bits may differ: resume it there, or with `--allow-env-change`."
                )
            # a process that was killed before its first checkpoint has learnt nothing: the run begins again
            loaded = (
                None if opened.untouched else checkpoint.load(opened.checkpoints, lambda text: _tell(listeners, text))
            )
            position = {"experience": 0, "done": []}
            if loaded:
                with held_by(opened.checkpoints):
                    position = state.position_of(loaded[0])
            opened.check_sums(position, [ENVIRONMENT] if allow_env_change else [], lambda text: _tell(listeners, text))
            config.run.output = str(path)
            base = None if loaded else _base_of(config)
            engine = _build(
                config, device, opened, scenario, model, plugins, listeners, opened.base(), restored=loaded is not None
            )
            if not loaded:
                _begin_from(engine, base)
            _check(engine)
            if engine.stream.checksum != before.get("data_sha256"):
                raise DataError(
                    f"The data of `{engine.stream.name}` is not what the run in {path} began with; put it back."
                )
            ended = base.last_checkpoint() if base else None

            def begin() -> None:
                if loaded:
                    with held_by(opened.checkpoints):
                        state.put_back(engine, *loaded)
                else:
                    opened.cut_metrics(0)
                    _first(engine, base, ended)

            return _go(engine, begin)
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
    """Let the finished run in `folder` learn on: `scenario` comes after what it learnt, with all state continued.

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
    plugins = _each_plugin(plugins)
    given = {_name(plugin): plugin for plugin in plugins if isinstance(plugin, Plugin)}
    plugins = [{plugin: {}} if isinstance(plugin, str) else plugin for plugin in plugins]
    options = {name: values for plugin in plugins if isinstance(plugin, Mapping) for name, values in plugin.items()}
    run = _of_run(run)
    config = extension_config(
        expanded(folder),
        {"name": own.name, OBJECT: True} if own else {"name": scenario} if isinstance(scenario, str) else scenario,
        objects=(*given, "model") if model is not None else tuple(given),
        plugins=options,
        train=train,
        run=run,
    )
    for name, plugin in given.items():
        config.plugins[name] = {**plugin.public_options(), OBJECT: True}
    with _shown(progress, listeners) as everyone:
        return run_config(config, scenario=own, model=model, plugins=list(given.values()), listeners=everyone)


def extension_config(
    path: Path,
    scenario: Any,
    *,
    objects: Sequence[str] = (),
    plugins: Mapping[str, Mapping[str, Any]] | None = None,
    sets: Sequence[str] = (),
    train: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration of a run that extends the finished one in `path`: that one's, but for what is given here.

    `objects` names the plugins, and ``model``, that a program gives as objects. Raises as `extend`.
    """
    check_finished(path)
    base = load_base(path, _read_config(path))
    _check_resumes(base.config, (), path, "extended")
    old = base.config.model_dump()
    named = {name: values for name, values in old["plugins"].items() if name not in objects}
    for name, values in named.items():
        _by_name(values, "plugin", name)
    if "model" not in objects:
        _by_name(old["model"], "model")
    joining = {name: values for name, values in (plugins or {}).items() if name not in old["plugins"]}
    changed = {name: values | dict((plugins or {}).get(name, {})) for name, values in named.items()} | joining
    own = OBJECT in scenario
    carried = {"name": DEFAULT_SCENARIO} if own else {"name": scenario["name"], **defaults(base, scenario["name"])}
    device = old["run"]["device"]
    kept = {"output": None, "joint": None, "old_images": None, "extends": str(path.resolve())}
    if device.startswith("cuda") and not torch.cuda.is_available():
        kept["device"] = "auto"
    config = resolve(
        scenario=None if own else scenario,
        base={
            "scenario": carried,
            "model": {"name": DEFAULT_MODEL} if "model" in objects else old["model"],
            "plugins": changed,
            "train": old["train"],
            "run": old["run"] | kept,
        },
        sets=sets,
        train=train,
        run=run,
    )
    if own:
        config.scenario = dict(scenario)
    if "model" in objects:
        config.model = old["model"]
    config.plugins = {name: config.plugins.get(name, {}) for name in (*old["plugins"], *joining)}
    return config


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    plugins: Sequence[Plugin] = (),
    listeners: Sequence[Listener] = (),
) -> Trained:
    """The trained model of a finished run, ready to predict.

    What the run was given as Python objects (the backbone, plugins) is given again, with any weights. The files are
    compared with their sums; a run of an earlier clframe has none, which `listeners`, or else a warning, say.

    Raises:
        DataError: if the run is not finished or its model is damaged.
    """
    path = expanded(folder)
    description, packed, tensors = read_model(path)
    if told := sums.missing(path):
        if listeners:
            _tell(listeners, told)
        else:
            warnings.warn(told, stacklevel=2)
    config = _read_config(path)
    scenario = described_in(path, description)
    config.run.tensorboard = False
    cpu = torch.device("cpu")
    with beside_no_run(), plain_torch(cpu), torch.random.fork_rng(devices=[]):
        engine = _build(config, cpu, None, scenario, model, plugins, (), restored=True)
        engine.hook.before_run(run=engine.run)
        with held_by(path / "model.json"):
            structures = state.regrow(engine, len(scenario), packed)
            entries = dict(packed["dict"])
            state.load_model(engine.run.model, checkpoint.unpack(entries["model"], tensors, device=engine.run.device))
            saved = dict(entries["plugins"]["dict"])
            for plugin in engine.run.plugins:
                if plugin.name in saved:
                    state.into_plugin(plugin, saved[plugin.name], tensors, structures, engine.run.device)
            temperature, fitted = description.get("temperature"), description.get("fitted")
            trained = Trained(engine.predictor(), scenario, engine.readings, temperature, fitted)
            # what does not fit the network or the plugins shows here, and not in the first answer
            zeros = torch.zeros(1, *scenario.input_shape, dtype=torch.uint8 if scenario.transform.scale > 1 else None)
            trained(zeros, 0 if trained.needs_task else None)
    return trained


# ------------------------------------------------------------------------------ from config to run


def _config_of(
    scenario: str | Mapping[str, Any] | Scenario,
    model: str | Mapping[str, Any] | nn.Module | None,
    plugins: Sequence[str | Mapping[str, Mapping[str, Any]] | Plugin],
    train: Mapping[str, Any] | None,
    run: Mapping[str, Any],
) -> tuple[Config, dict[str, Any]]:
    """The configuration of a run from Python, and the objects that it can only name."""
    built = [plugin for plugin in plugins if isinstance(plugin, Plugin)]
    if isinstance(scenario, Arrays):
        raise UsageError(
            f"`{scenario.name}` is `Arrays`, and no scenario yet: cut experiences from it with "
            "`clframe.split_classes`, or let them change with `clframe.change_domains`."
        )
    own_scenario = scenario if isinstance(scenario, Scenario) else None
    own_model = model if isinstance(model, nn.Module) else None
    defaults = TrainSettings.model_validate({}).model_dump() if own_scenario else {}  # not what suits split-digits
    config = resolve(
        scenario=None if isinstance(scenario, Scenario) else scenario,
        model=None if isinstance(model, nn.Module) else model or ("mlp" if own_scenario else None),
        plugins=[plugin for plugin in plugins if not isinstance(plugin, Plugin)],
        train={**defaults, **_mapping(train, "train")},
        run=run,
        plugin_train=registry.suited_train(built),
    )
    if own_scenario:
        config.scenario = {"name": own_scenario.name, OBJECT: True}
        suited = registry.suited_train(plugin if isinstance(plugin, Plugin) else _name(plugin) for plugin in plugins)
        config.train = TrainSettings(**suited | dict(train or {}))  # without its length, too
    if own_model is not None:  # a compiled one has no truth value
        config.model = {"name": type(unwrap_compiled(own_model)).__name__, OBJECT: True}
    named = config.plugins | {_name(plugin): {**plugin.public_options(), OBJECT: True} for plugin in built}
    config.plugins = {name: named[name] for name in map(_name, plugins)}
    return config, {"scenario": own_scenario, "model": own_model, "plugins": built}


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
    """Return the settings `given` as the argument `name`. Raises `UsageError` if they are no mapping."""
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(f"`{name}` is {told(given)}; it must be a mapping of settings to values.")
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
    """The plugins one by one: a text is one name, and not its letters; a mapping is as YAML has them."""
    if isinstance(plugins, str | Plugin):
        return [plugins]
    if isinstance(plugins, Mapping):
        return [{name: options} for name, options in plugins.items()]
    if plugins is None:
        return []
    if isinstance(plugins, type) or not isinstance(plugins, Iterable):
        return [cast(Any, plugins)]
    return list(plugins)


def _name(plugin: str | Mapping[str, Mapping[str, Any]] | Plugin) -> str:
    if isinstance(plugin, Plugin):
        return plugin.name or type(plugin).__name__
    return plugin if isinstance(plugin, str) else next(iter(plugin))


def _check_resumes(config: Config, plugins: Sequence[Plugin], path: Path, what: str = "resumed") -> None:
    """Refuse to go on with a run with a plugin whose state is in no checkpoint. Raises `DataError`."""
    given = {_name(plugin): type(plugin) for plugin in plugins}
    for name, options in config.plugins.items():
        if OBJECT in options and name not in given:
            continue  # told when the run is built
        # a plugin's own class says so for all of its variants, which may take long to import
        if not (given[name] if name in given else registry.plugin_class(name.partition(":")[0])).resumes:
            raise DataError(
                f"The run in {path} cannot be {what}: what `{name}` keeps is in no checkpoint. Start it again with "
                f"`clframe run --config {path / 'config.yaml'}`."
            )


def _read_config(path: Path) -> Config:
    """The resolved configuration in the run folder `path`. Raises `DataError` if it cannot be read."""
    file = path / "config.yaml"
    try:
        return Config.model_validate(update_config(parse_yaml(read_text(file, CONFIG_LIMIT), str(file))))
    except (DataError, UsageError, ValidationError) as error:
        problems = explain(error, "") if isinstance(error, ValidationError) else [str(error)]
        raise DataError(f"{file} cannot be read, so the run cannot go on: {cut(' '.join(problems), 2000)}") from error


@contextmanager
def _environment(config: Config) -> Iterator[torch.device]:
    """The device of the run, its threads and its seed in place, for it alone; afterwards all of it as it was."""
    device = _device(config.run.device)
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


def _device(name: str) -> torch.device:
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


def _base_of(config: Config) -> Base | None:
    """The run that this one extends, if any."""
    if config.run.extends is None:
        return None
    path = expanded(config.run.extends)
    check_finished(path)
    return load_base(path, _read_config(path))


def _build(
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
    """Scenario, network, plugins and the engine of the run, all of which may still refuse it.

    `base` describes what was learnt before, where the run extends another one. The weights of a network that is
    `restored` are all given later: none are downloaded.
    """
    if scenario is None:
        with following(learned=base is not None):
            scenario = registry.build_scenario(_by_name(config.scenario, "scenario"), config.run)
    if base is not None:
        with held_by((folder.path if folder else Path(config.run.extends or "")) / BASE):
            before = scenario_of(base)
        scenario = extend_scenario(before, scenario)
    given = {_name(plugin): plugin for plugin in plugins}
    members = [
        given[name] if name in given else registry.build_plugin(name, _by_name(options, "plugin", name))
        for name, options in config.plugins.items()
    ]
    observers = config.run.observers() if folder else []
    members += [registry.build_plugin(name, {}) for name in observers if name not in config.plugins]
    if model is None:
        left_out = (START, WEIGHTS) if restored else (START,)
        spec = {name: value for name, value in _by_name(config.model, "model").items() if name not in left_out}
        model = registry.build_backbone(spec, scenario.input_shape).to(device)
        check_backbone(model, scenario.input_shape, device)
    else:
        model = prepare(model, scenario.input_shape, device, lambda text: _tell(listeners, text))
    scenario.hold_out(config.train.val, config.run.seed)
    scenario.to(device)
    run = Run(config, scenario, IncrementalNet(model), members, device, listeners, folder.path if folder else None)
    engine = Engine(run, scenario, folder)
    engine.carried = None if base is None else dict(base.get("temperature") or {})
    return engine


def _start_from(backbone: nn.Module, path: Path, name: str) -> None:
    """Give `backbone`, the model `name`, the weights that the run in `path` ended with. Raises `DataError`."""
    _, packed, tensors = read_model(path)
    with held_by(path / "model.json"):
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


def _check(engine: Engine) -> None:
    """Refuse a run that its plugins cannot serve, with one sentence for each reason."""
    run, scenario = engine.run, engine.stream
    run.describe(scenario, len(scenario) - 1)  # all of it
    problems = [
        f"The plugin `{plugin.name}` cannot serve the setting `{scenario.setting}` of `{scenario.name}`; it serves "
        + " and ".join(f"`{setting}`" for setting in plugin.serves)
        + ": choose with `--setting`."
        for plugin in run.plugins
        if scenario.setting not in plugin.serves
    ]
    if run.config.train.logits == "own" and scenario.setting == "domain":
        problems.append("`train.logits=own` needs tasks with classes of their own; the domain setting has none.")
    problems += _logits_problems(run)
    problems += stream_problems(run)
    problems += single_image_problems(run, scenario)
    problems += [problem for plugin in run.plugins for problem in plugin.problems(run)]
    if problems:
        raise UsageError(*problems)
    run.describe(scenario, 0)


def _logits_problems(run: Run) -> list[str]:
    """One sentence for each plugin whose loss is made for other logits than those of the run."""
    chosen = run.config.train.logits
    wanted = {p: logits for p in run.plugins if (logits := p.wanted_logits(run)) and logits != run.logits}
    other = next((p.name for p in run.plugins if p.wanted_logits(run) == run.logits), "")
    if chosen:
        asked = f"`train.logits` is {chosen}: leave that out, or choose another form."
    else:
        asked = f"`{other}` for `{run.logits}`: choose other forms, or run them apart."
    return [
        f"`{plugin.name}`{f' (form `{plugin.form}`)' if plugin.form else ''} is made for `train.logits={logits}`, but "
        f"{asked}"
        for plugin, logits in wanted.items()
    ]


def _by_name(spec: Mapping[str, Any], kind: str, name: str = "") -> Mapping[str, Any]:
    if OBJECT in spec:
        name = name or spec["name"]
        raise DataError(
            f"The {kind} `{name}` of this run is an object of a Python program: give it again, with "
            "`clframe.resume`, `clframe.load` or `clframe.extend` from Python."
        )
    return spec


# ------------------------------------------------------------------------------- from start to end


def _go(engine: Engine, begin: Callable[[], None]) -> Results:
    """Run the engine to the results, from where `begin` brings it when ``before_run`` was called."""
    run = engine.run
    if engine.folder:
        run.listeners.append(_writer(engine.folder))
    try:
        with engine.stoppable():
            try:
                for plugin in run.plugins:
                    plugin.has_run = True
                engine.hook.before_run(run=run)
                begin()
                learn(engine)
                results = results_of(engine)
            finally:
                engine.close()
    except ClframeError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise RunError(
                f"Out of memory on {run.device} in {run.progress_label}: a run with a smaller `train.batch_size` or "
                f"`run.eval_batch_size` needs less.{engine.how_to_go_on()}"
            ) from error
        refused = of_the_system(error)
        if refused and getattr(error, "errno", None) in OF_THE_DISK:
            raise RunError(
                f"{run.folder or 'A file'} could not be written: {refused}.{engine.how_to_go_on()}"
            ) from error
        if blamed := _blame(engine, error):
            raise RunError(f"{blamed}: {type(error).__name__}: {error}.{engine.how_to_go_on()}") from error
        if refused:
            raise RunError(
                f"A file or the system failed in {run.progress_label}: {refused}.{engine.how_to_go_on()}"
            ) from error
        raise
    run.emit("end", folder=str(run.folder) if run.folder else None)
    run.optimizer = engine.kept_optimizer = None  # what the trained model does without
    engine.collected.clear()
    return replace(results, answering=lambda: _trained(engine))


def _trained(engine: Engine) -> Trained:
    """The trained model of a run that has ended, on the CPU, as `load` gives it."""
    with plain_torch(engine.run.device), torch.no_grad():
        temperature, fitted = temperatures(engine)
        scenario = engine.stream.described()
        return Trained(engine.predictor(), scenario, engine.readings, temperature, fitted).to("cpu")


def _blame(engine: Engine, error: Exception) -> str | None:
    """Which plugin, or whose module, raised `error`: the first frame whose `self` is one; noted on the error too."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner, place = frame.f_locals.get("self"), frame.f_code.co_name
        if isinstance(owner, Plugin):
            kind = "hook" if place in contract.hooks_of(type(owner)) else "method"
            error.add_note(f"in plugin '{owner.name}', {kind} '{place}'")
            return f"The plugin `{owner.name}` raised in its {kind} `{place}`"
        if isinstance(owner, nn.Module) and not type(owner).__module__.startswith(("torch.", "clframe.")):
            return f"The module `{type(owner).__name__}` raised in its method `{place}`"
    return None


def _writer(folder: RunFolder) -> Listener:
    def write(record: dict[str, Any]) -> None:
        if record["kind"] in ("step", "within", "eval", "log"):
            folder.append_metrics(record)
        elif record["kind"] == "images":
            folder.keep_picture(record["name"], record["experience"], record["picture"])

    return write


def _tell(listeners: Sequence[Listener] | Listener, text: str) -> None:
    for listener in [listeners] if callable(listeners) else listeners:
        listener({"kind": "message", "text": text})
