"""Resolution of YAML, ``--set`` and arguments into one validated configuration; mistakes are reported together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    ValidationError,
)

from clframe import registry
from clframe.data import split_file
from clframe.errors import ClframeError, UsageError, did_you_mean
from clframe.options import (
    REQUIRED,
    STRANGERS,
    explain,
    options_of,
    public_name,
    suited,
    unknown,
)
from clframe.renamed import update_config
from clframe.settings import (
    DEFAULT_MODEL,
    DEFAULT_SCENARIO,
    LENGTH,
    SECTIONS,
    Component,
    Config,
    RunSettings,
    TrainSettings,
    read_component,
)
from clframe.strict_yaml import dump_yaml, parse_yaml
from clframe.system.reading import Unreadable, expand_home, quote_path, read_bytes
from clframe.system.texts import cut, quote

ENVIRONMENT = "environment.json"  # beside the configuration of every run
LARGEST_FILE = 100_000  # bytes of a configuration: PyYAML takes half a second of CPU for them
MOST_PLUGINS = 100  # that a configuration names
OF_OPTIMIZER = ("lr", "head_lr", "momentum", "nesterov", "betas", "eps")  # they suit one optimizer, not another
Given = Mapping[str, Any]
Named = str | Given | None  # a name, or a mapping with ``name`` and options, or options alone
Kind = TypeVar("Kind", TrainSettings, RunSettings)
UNRESOLVED = Component("")  # in place of one that a mistake keeps from being resolved


def resolve(
    *,
    scenario: Named | Component = None,
    model: Named | Component = None,
    plugins: Given | Sequence[str | Given] = (),
    yaml_file: str | Path | None = None,
    sets: Sequence[str] = (),
    train: Given | None = None,
    run: Given | None = None,
    base: Given | None = None,
    plugin_train: Given | None = None,
) -> Config:
    """Return the whole configuration, with the value of every option.

    From weak to strong: defaults, what suits the scenario, what suits the plugins (`plugin_train`, where some are
    objects), the YAML file, `sets` (each ``a.b=value``), and the other arguments. A model or scenario of another name
    takes no options from a weaker place; plugins that are given here replace the file's, of which those named again
    keep their options. `base` stands in for what a file holds. A scenario or model that is a `Component`, such as an
    object of a Python program, is taken as it is; no training settings are known to suit that scenario.

    Raises:
        UsageError: with one sentence for each mistake.
    """
    problems: list[str] = []
    file = _read_file(expand_home(yaml_file), problems) if yaml_file is not None else dict(base or {})
    changes = parse_sets(sets, problems)
    by_file = _plugin_options(file.get("plugins"), problems)
    by_call = _plugin_options(plugins, problems)
    chosen = by_call or by_file
    problems += _strangers(changes, chosen)

    def layers(section: str, given: Named) -> list[dict[str, Any]]:
        return [_named(layer, section, problems) for layer in (file.get(section), changes.get(section), given)]

    def settings_layers(section: str, given: Given | None) -> list[dict[str, Any]]:
        of_file = _mapping(file.get(section), section, problems)
        return [of_file, changes.get(section, {}), _mapping(given, section, problems)]

    if isinstance(scenario, Component):
        resolved_scenario, build = scenario, None
    else:
        resolved_scenario, build = _resolve_scenario(layers("scenario", scenario), problems)
    backbone, training = registry.suited(build, resolved_scenario.name)
    suiting = _named(backbone, "model", problems)
    resolved_model = (
        model if isinstance(model, Component) else _resolve_model(layers("model", model), suiting, problems)
    )
    resolved_plugins = {
        name: _resolve_plugin(
            name, {**by_file.get(name, {}), **changes.get(name, {}), **by_call.get(name, {})}, problems
        )
        for name in chosen
    }
    of_plugins = registry.suited_train(resolved_plugins) if plugin_train is None else plugin_train
    # one epoch is the default of custom scenarios, too, but their record leaves the length open
    length = {} if isinstance(scenario, Component) else {"epochs": 1}
    train_layers = [length, training, dict(of_plugins), *settings_layers("train", train)]
    resolved_train = _settings(TrainSettings, _merge_train(train_layers), "train", problems)
    run_layers = settings_layers("run", run)
    resolved_run = _settings(RunSettings, {k: v for layer in run_layers for k, v in layer.items()}, "run", problems)
    if problems or resolved_train is None or resolved_run is None:
        raise UsageError(*dict.fromkeys(problems))
    config = Config(
        scenario=resolved_scenario,
        model=resolved_model,
        plugins=resolved_plugins,
        train=resolved_train,
        run=resolved_run,
    )
    _check_tuned(config)
    return config


def _check_tuned(config: Config) -> None:
    """Refuse a stamp of a tuning that chose other values than those of the run. Raises `UsageError`."""
    chosen = (config.run.tuned or {}).get("chosen")
    if isinstance(chosen, Mapping):
        settings = list_settings(config)
        other = [name for name, value in chosen.items() if settings.get(name) != value]
        if other:
            raise UsageError(
                *(
                    f"`{cut(name)}` is {quote(settings.get(name))}, and the tuning in `run.tuned` chose "
                    f"{quote(chosen[name])}: leave one of them out, such as by `--set run.tuned=null`."
                    for name in other
                )
            )


def to_yaml(config: Config) -> str:
    """Return `config` as YAML that `resolve` reads back; without ``run.output``, as a repeat has its own folder."""
    data = config.model_dump()
    data["run"]["output"] = None
    return dump_yaml(data)


def list_settings(config: Config) -> dict[str, Any]:
    """Return the value of every setting of `config` by its full name, as ``--set`` takes it; ``plugins`` is their list.

    The folder of the run is left out.
    """
    sections = config.model_dump()
    plugins = sections.pop("plugins")
    del sections["run"]["output"]
    parts = {**sections, **plugins}
    return {"plugins": list(plugins)} | {
        f"{part}.{option}": value for part, options in parts.items() for option, value in options.items()
    }


def list_defaults(config: Config) -> dict[str, Any]:
    """Return the defaults of the settings of `config` by full name: what they are where only its parts are named.

    Settings without a default are left out, and so are the options of a part that is not installed here, or that a
    Python program gave as an object.
    """
    found: dict[str, Any] = {}
    training: dict[str, Any] = {}
    suiting: Any = None
    with suppress(ClframeError):
        build = registry.builder("scenario", config.scenario.name)
        suiting, training = registry.suited(build, config.scenario.name)
        found |= _list_option_defaults("scenario", build)
    with suppress(ClframeError):
        found |= _list_option_defaults("model", registry.builder("model", config.model.name))
    model = {"name": suiting} if isinstance(suiting, str) else dict(suiting or {"name": DEFAULT_MODEL})
    if model.get("name") == config.model.name:
        found |= {f"model.{public_name(option)}": value for option, value in model.items()}
    for name in config.plugins:
        with suppress(ClframeError):
            found |= _list_option_defaults(name, registry.plugin_class(name))
    train = TrainSettings(**_merge_train([{"epochs": 1}, training, registry.suited_train(config.plugins)]))
    found |= {f"train.{name}": value for name, value in train.model_dump().items()}
    return found | {f"run.{name}": value for name, value in RunSettings().model_dump().items() if name != "output"}


def _list_option_defaults(part: str, build: Any) -> dict[str, Any]:
    """Return the defaults of the options of `build`, by their full names; options without one are left out."""
    options = options_of(build, skip=registry.SUPPLIED)
    return {f"{part}.{option.name}": _plain(option.default) for option in options if option.default is not REQUIRED}


def _plain(value: Any) -> Any:
    """Return `value` with lists for tuples, as a file of settings gives them back."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------ the sections


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Add the sentences of a `UsageError` inside to `problems`, so that all mistakes are reported together."""
    try:
        yield
    except UsageError as error:
        problems += error.problems


def _resolve_scenario(layers: list[dict[str, Any]], problems: list[str]) -> tuple[Component, Any]:
    """Return the scenario with all of its options, and the function that builds it (None if it is unknown)."""
    with _collected(problems):
        component = _read("scenario", *_merge(_with_split(layers), DEFAULT_SCENARIO))
        build = registry.builder("scenario", component.name)
        return _complete("scenario", component, problems), build
    return UNRESOLVED, None


def _with_split(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `layers`; if the strongest name is a split file, its contents come first.

    Raises:
        UsageError: if the file cannot be read, or a layer changes what it has settled.
    """
    path = next((layer["name"] for layer in reversed(layers) if "name" in layer), "")
    if not path.endswith(split_file.SUFFIX):
        return layers
    file = split_file.read_split(Path(path))
    layers = [{**layer, "name": file["name"]} if layer.get("name") == path else layer for layer in layers]
    if problems := split_file.settled_problems(file, _merge(layers, file["name"])[1], path):
        raise UsageError(*problems)
    return [file, *layers]


def _resolve_model(layers: list[dict[str, Any]], suiting: Given, problems: list[str]) -> Component:
    """Return the model with all of its options: the one that suits the scenario, if no other is named."""
    name, options = _merge(layers, "")
    if not name:
        name, options = _merge([dict(suiting), options], DEFAULT_MODEL)
    with _collected(problems):
        return _complete("model", _read("model", name, options), problems)
    return UNRESOLVED


def _resolve_plugin(name: str, options: Given, problems: list[str]) -> Component:
    """Return the plugin with all of its options; building it lets its constructor refuse combinations."""
    with _collected(problems):
        component = _read("plugin", name, options)
        parts = [part.strip() for part in name.split(",")]
        if len(parts) > 1 and set(parts) <= set(registry.names("plugin")):
            repeated = " ".join(f"--plugin {part}" for part in parts)
            raise UsageError(f"There is no plugin `{name}`. For several methods repeat `--plugin`: {repeated}.")
        resolved = registry.build_plugin(name, component.options).public_options()
        if ":" in name:
            resolved.pop("variant", None)  # the name holds it already
        return replace(component, options=resolved)
    return UNRESOLVED


def _read(kind: registry.Kind, name: str, options: Given) -> Component:
    """Return the component of this name and these merged options. Raises `UsageError` if it is an object."""
    component = read_component(kind, {**options, "name": name} if kind != "plugin" else options, name)
    if component.origin == "object":
        raise UsageError(
            f"The {kind} `{name}` of this configuration is an object of a Python program: give it again to "
            "`clframe.run` from Python."
        )
    return component


def _complete(kind: Literal["scenario", "model"], component: Component, problems: list[str]) -> Component:
    """Return `component` with the values of all of its options, validated; with none if there is a mistake in one."""
    with _collected(problems):
        values = registry.arguments_of(kind, component)
        return replace(component, options={public_name(option): value for option, value in values.items()})
    return UNRESOLVED


def _settings(kind: type[Kind], given: Given, where: str, problems: list[str]) -> Kind | None:
    strangers = unknown(given, kind.model_fields, where, f"`{where}`")
    problems += strangers
    try:
        return kind(**{name: value for name, value in given.items() if name in kind.model_fields})
    except ValidationError as error:
        problems += explain(error, where)
        return None


def _merge_train(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the layers of training settings.

    A stronger choice of epochs or iterations replaces the weaker one, another optimizer the settings of the weaker
    one, and settings of the first experience a weaker wish to keep the optimizer.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        if layer.get("optimizer", merged.get("optimizer")) != merged.get("optimizer"):
            for name in OF_OPTIMIZER:
                merged.pop(name, None)
        for name, other in [*LENGTH.items(), ("first", "keep_optimizer")]:
            if layer.get(name) is not None:
                merged.pop(other, None)
        merged |= {name: value for name, value in layer.items() if not (name in LENGTH and value is None)}
    return merged


def _merge(layers: list[dict[str, Any]], default: str) -> tuple[str, dict[str, Any]]:
    """Return the strongest name, and the merged options of all layers that have this name, or none."""
    name = next((layer["name"] for layer in reversed(layers) if "name" in layer), default)
    options: dict[str, Any] = {}
    for layer in layers:
        if layer.get("name", name) == name:
            options |= {public_name(option): value for option, value in layer.items() if option != "name"}
    return name, options


# ------------------------------------------------------------------------------ what the user gave


def _read_file(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        text = read_bytes(path, LARGEST_FILE).decode("utf-8-sig")
    except Unreadable as error:
        raise UsageError(f"The configuration {quote_path(path)} cannot be read: {error.reason}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The configuration {path} is not UTF-8 text (byte {error.start}): save it as UTF-8."
        ) from error
    data = parse_yaml(text, str(path))
    if (path.parent / ENVIRONMENT).is_file():  # in a run folder, which an earlier version may have written
        data = update_config(data)
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold a mapping with some of: {', '.join(SECTIONS)}.")
    strangers = [name for name in data if name not in SECTIONS]
    problems += [
        f"{path}: there is no section `{cut(name)}`." + did_you_mean(name, SECTIONS) for name in strangers[:STRANGERS]
    ]
    if more := strangers[STRANGERS:]:
        problems.append(f"{path}: nor are {len(more):,} more of its names sections.")
    return data


def parse_sets(sets: Sequence[str], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Return the values of ``--set`` by section and option; sentences on mistakes are added to `problems`."""
    changes: dict[str, dict[str, Any]] = {}
    for text in sets:
        target, equals, value = text.partition("=")
        section, dot, option = (part.strip() for part in target.partition("."))
        if not (equals and dot and section and option):
            problems.append(f"`--set {cut(text)}` is not of the form `section.option=value`, such as `train.lr=0.1`.")
            continue
        if public_name(option) in changes.get(section, {}):
            problems.append(f"`--set {section}.{public_name(option)}` is given twice; give it once.")
        with _collected(problems):
            changes.setdefault(section, {})[public_name(option)] = parse_yaml(value, f"`--set {cut(text)}`")
    return changes


def _strangers(changes: Given, chosen: Given) -> list[str]:
    """Return one sentence for each section of ``--set`` that is neither a section nor a plugin of the run."""
    problems = []
    for name in changes:
        if name in registry.RESERVED or name in chosen:
            continue
        plugins = registry.names("plugin")
        if name.partition(":")[0] in plugins:
            problems.append(f"`--set {name}...`: the plugin `{name}` is not in the run; add `--plugin {name}`.")
        else:
            guess = did_you_mean(name, [*registry.RESERVED, *chosen, *plugins])
            problems.append(f"`--set {name}...`: there is no plugin `{name}`.{guess}")
    return problems


def _plugin_options(given: Any, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Return the options by plugin, in the order of naming, of a mapping or of a list of names and mappings."""
    options: dict[str, dict[str, Any]] = {}
    several = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    for item in () if given is None else given if several else [given]:
        if not isinstance(item, Mapping) and not (several and isinstance(item, str)):
            problems.append(
                f"`plugins` is {quote(given)}; it must be a mapping of names to options, or a list of names."
            )
            break
        for name, values in {item: {}}.items() if isinstance(item, str) else item.items():
            if name in options:
                problems.append(f"The plugin `{name}` is named twice; name it once.")
            options[name] = _mapping(values, f"plugins.{name}", problems)
    if len(options) > MOST_PLUGINS:
        problems.append(f"`plugins` names {len(options):,} plugins; it can name {MOST_PLUGINS}.")
        return {}
    return options


def _named(given: Any, section: str, problems: list[str]) -> dict[str, Any]:
    """Return `given`, a name or a mapping, as a mapping with or without a ``name``."""
    given = suited(str, given)
    if isinstance(given, str):
        return {"name": given}
    spec = _mapping(given, section, problems)
    if "name" in spec:
        spec["name"] = suited(str, spec["name"])
    if not isinstance(spec.get("name", ""), str):
        problems.append(f"`{section}.name` is {quote(spec.pop('name'))}; it must be a text.")
    return spec


def _mapping(given: Any, where: str, problems: list[str]) -> dict[str, Any]:
    if given is None or isinstance(given, Mapping):
        strange = [name for name in given or {} if not isinstance(name, str)]
        problems += [f"`{where}` has the name {quote(name)}, and names are texts." for name in strange]
        return {name: value for name, value in (given or {}).items() if isinstance(name, str)}
    problems.append(f"`{where}` is {quote(given)}; it must be a mapping of options to values.")
    return {}
