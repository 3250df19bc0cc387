"""YAML and flags to one resolved, validated configuration, with all errors told at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from clframe import registry, splits
from clframe.errors import WrongUse, did_you_mean
from clframe.options import (
    STRANGERS,
    Count,
    NonNegative,
    Positive,
    explain,
    public_name,
    suited,
    unknown,
    validated,
)
from clframe.reading import Unreadable, expanded, read_bytes, shown
from clframe.texts import cut, told

OF_ALL = ("keep_optimizer", "logits", "val", "threads", "first")  # settings that no single experience has of its own
LENGTH = {"epochs": "iterations", "iterations": "epochs"}  # each excludes the other
SETTINGS = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, validate_assignment=True)


class Settings(BaseModel):
    """Settings whose values may come in other types that hold the same (`clframe.options.suited`)."""

    model_config = SETTINGS

    @field_validator("*", mode="before")
    @classmethod
    def _suited(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        return suited(field.annotation, value)


class TrainSettings(Settings):
    """How each experience is trained (``train.*``)."""

    epochs: Count | None = Field(default=None, description="passes over the data of each experience")
    iterations: Count | None = Field(
        default=None, description="steps per experience, of complete batches, instead of epochs"
    )
    batch_size: Count = Field(default=32, description="images of a step, replay not counted")
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="adam", description="torch's optimizer of that name")
    lr: Positive = Field(default=1e-3, description="learning rate")
    head_lr: Positive | None = Field(default=None, description="learning rate of the head; null: as the rest")
    schedule: Literal["constant", "steps", "cosine"] = Field(
        default="constant", description="of the learning rate, per phase"
    )
    milestones: list[Positive] = Field(
        default=[],
        description="where schedule `steps` multiplies, in epochs (in steps where `iterations` is set)",
    )
    factor: Positive = Field(default=0.1, description="what schedule `steps` multiplies by")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="of sgd")
    nesterov: bool = Field(default=False, description="Nesterov momentum of sgd")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], description="of adam and adamw")
    eps: Positive = Field(default=1e-8, description="of adam and adamw")
    weight_decay: NonNegative = Field(default=0.0, description="as the optimizer defines it")
    decay: Literal["weights", "all"] = Field(
        default="weights", description="which parameters decay: weights only, or biases and norms too"
    )
    keep_optimizer: bool = Field(
        default=False, description="keep the optimizer's state from one experience to the next"
    )
    clip: NonNegative = Field(default=1.0, description="largest norm of the gradient; 0: no clipping")
    logits: Literal["all", "seen", "current", "own"] | None = Field(
        default=None,
        description="which take part in the loss: of all classes from the start, of those seen, of the "
        "experience's, of the row's task; null: `own` in the task setting, else `seen`",
    )
    val: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="share of the training images held out: their accuracy is measured, and the confidence of "
        "predictions is fitted to them",
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="CPU threads; null: as torch chooses"
    )
    first: dict[str, Any] | None = Field(
        default=None, description="what differs in the first experience, such as {epochs: 10, lr: 0.01}"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.epochs is not None and self.iterations is not None:
            raise ValueError("`train.epochs` and `train.iterations` exclude each other; set one of them")
        if self.nesterov and not self.momentum:
            raise ValueError("`train.nesterov` needs a `train.momentum` above 0")
        if len(self.betas) != 2:
            raise ValueError("`train.betas` must be two numbers")
        if self.milestones and self.schedule != "steps":
            raise ValueError("`train.milestones` needs `train.schedule=steps`")
        if self.first:
            self._check_first(self.first)
        return self

    def _check_first(self, first: dict[str, Any]) -> None:
        if self.keep_optimizer:
            raise ValueError("`train.first` and `train.keep_optimizer` exclude each other; set one of them")
        changeable = [name for name in type(self).model_fields if name not in OF_ALL]
        if strangers := unknown(first, changeable, "train.first", "`train.first`"):
            raise ValueError(" ".join(strangers).rstrip("."))
        try:
            self.of(0)
        except ValidationError as error:
            told = " ".join(explain(error, "train.first")).rstrip(".")
            raise ValueError(re.sub(r"`train\.(?!first\b)", "`train.first.", told)) from None

    def of(self, experience: int) -> TrainSettings:
        """The settings of the experience with this index: `first` holds for index 0."""
        if experience or not self.first:
            return self
        length = {other: None for name, other in LENGTH.items() if self.first.get(name) is not None}
        return TrainSettings(**{**self.model_dump(), **length, **self.first, "first": None})

    def lr_of(self, parameter: str) -> float:
        """The learning rate of the parameter of this name."""
        return self.head_lr if self.head_lr is not None and parameter.startswith("head.") else self.lr


FolderName = Annotated[str, Field(min_length=1)]  # a path; a variable of the shell that is not set gives an empty one


class RunSettings(Settings):
    """How the run itself goes (``run.*``)."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="of everything random")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    data_root: FolderName | None = Field(
        default=None, description="folder of the data sets; null: CLFRAME_DATA, else the user's cache"
    )
    output: FolderName | None = Field(default=None, description="folder of this run; null: a new one under runs/")
    eval_every: Literal["experience", "epoch"] = Field(default="experience", description="how often to evaluate")
    eval_batch_size: Count = Field(default=512, description="images at a time in evaluation")
    checkpoint_every: NonNegative = Field(default=60.0, description="seconds between checkpoints within an experience")
    log_every: Count = Field(default=50, description="steps between two records of the losses")
    tensorboard: bool = Field(
        default=True, description="write curves for TensorBoard", json_schema_extra={"observer": True}
    )
    extends: FolderName | None = Field(default=None, description="folder of a finished run whose model learns on")
    old_images: FolderName | None = Field(
        default=None, description="folder of images of classes that the extended run learned, for methods that join it"
    )
    joint: FolderName | None = Field(default=None, description="folder of a finished joint run, for intransigence")
    predictions: bool = Field(default=True, description="keep the scores of every test image")

    def observers(self) -> list[str]:
        """Return the names of the plugins that these settings switch on, in the order of the fields."""
        return [name for name in OBSERVERS if getattr(self, name)]


# Switches in `run.*` that are marked as an observer's: each adds the plugin of its name to a run that keeps a folder.
OBSERVERS = tuple(name for name, field in RunSettings.model_fields.items() if field.json_schema_extra)


def _check_name(spec: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(spec.get("name"), str):
        raise ValueError("it should have a `name`, which is a text")
    return spec


Component = Annotated[dict[str, Any], AfterValidator(_check_name)]  # a scenario or model, resolved


class Config(BaseModel):
    """Everything that defines a run; what `config.yaml` of its folder holds.

    `scenario` and `model` hold their `name` and options, `plugins` maps names to options, in calling order.
    """

    model_config = SETTINGS

    scenario: Component
    model: Component
    plugins: dict[str, dict[str, Any]]
    train: TrainSettings
    run: RunSettings


DATA_ROOT = "CLFRAME_DATA"


def data_root(given: str | None) -> Path:
    """The folder of the data sets: as given, else the environment's, else the user's cache folder."""
    import os

    import platformdirs

    return expanded(given or os.environ.get(DATA_ROOT) or platformdirs.user_cache_dir("clframe"))


DEFAULT_SCENARIO = "split-digits"
DEFAULT_MODEL = "mlp"  # of a scenario that names none that suits it
LARGEST_FILE = 100_000  # bytes of a configuration: PyYAML takes half a second of CPU for them
MOST_PLUGINS = 100  # that a configuration names
START = "start"  # of any model: the finished run whose backbone it begins as
SECTIONS = ("scenario", "model", "plugins", "train", "run")
OBJECT = "python object"  # the option under which a configuration names what only Python can give
OF_OPTIMIZER = ("lr", "head_lr", "momentum", "nesterov", "betas", "eps")  # they suit one optimizer, not another
Given = Mapping[str, Any]
Named = str | Given | None  # a name, or a mapping with ``name`` and options, or options alone
Kind = TypeVar("Kind", TrainSettings, RunSettings)


def resolve(
    *,
    scenario: Named = None,
    model: Named = None,
    plugins: Given | Sequence[str | Given] = (),
    yaml_file: str | Path | None = None,
    sets: Sequence[str] = (),
    train: Given | None = None,
    run: Given | None = None,
    base: Given | None = None,
    plugin_train: Given | None = None,
) -> Config:
    """The whole configuration, every option with its value.

    From weak to strong: defaults, what suits the scenario, what suits the plugins (`plugin_train` is of those that are
    given as objects), the YAML file, `sets` (each ``a.b=value``), and the other arguments. A model or scenario of
    another name takes no options from a weaker place; plugins that are given here replace the file's, of which those
    named again keep their options. `base` stands in for what a file holds.

    Raises:
        WrongUse: with one sentence for each mistake.
    """
    problems: list[str] = []
    file = _read_file(expanded(yaml_file), problems) if yaml_file is not None else dict(base or {})
    changes = _parse_sets(sets, problems)
    by_file = _plugin_options(file.get("plugins"), problems)
    by_call = _plugin_options(plugins, problems)
    chosen = by_call or by_file
    problems += _strangers(changes, chosen)

    def layers(section: str, given: Named) -> list[dict[str, Any]]:
        return [_named(layer, section, problems) for layer in (file.get(section), changes.get(section), given)]

    def section(section: str, given: Given | None) -> list[dict[str, Any]]:
        of_file = _mapping(file.get(section), section, problems)
        return [of_file, changes.get(section, {}), _mapping(given, section, problems)]

    resolved_scenario, build = _resolve_scenario(layers("scenario", scenario), problems)
    backbone, training = registry.suited(build, resolved_scenario.get("name", ""))
    suiting = _named(backbone, "model", problems)
    resolved_model = _resolve_model(layers("model", model), suiting, problems)
    resolved_plugins = {
        name: _resolve_plugin(
            name, {**by_file.get(name, {}), **changes.get(name, {}), **by_call.get(name, {})}, problems
        )
        for name in chosen
    }
    of_plugins = registry.suited_train(resolved_plugins) | dict(plugin_train or {})
    train_layers = [training, of_plugins, *section("train", train)]
    resolved_train = _settings(TrainSettings, _merge_train(train_layers), "train", problems)
    run_layers = section("run", run)
    resolved_run = _settings(RunSettings, {k: v for layer in run_layers for k, v in layer.items()}, "run", problems)
    if problems or resolved_train is None or resolved_run is None:
        raise WrongUse(*dict.fromkeys(problems))
    return Config(
        scenario=resolved_scenario,
        model=resolved_model,
        plugins=resolved_plugins,
        train=resolved_train,
        run=resolved_run,
    )


def to_yaml(config: Config) -> str:
    """`config` as a file that `resolve` reads back as it is, without ``run.output``: a repeat has its own."""
    data = config.model_dump()
    data["run"]["output"] = None
    return yaml.dump(_plain(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse_yaml(text: str, where: str) -> Any:
    """The value that strict YAML `text` holds: no repeated key, anchor, alias or tag; ``1e-3`` is a number.

    Raises `WrongUse` that names `where`, and the line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise WrongUse(f"{where}{place}: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise WrongUse(f"{where}: not YAML: {' '.join(str(error).split())}.") from error
    except RecursionError:
        raise WrongUse(f"{where}: nested too deeply.") from None


# ------------------------------------------------------------------------------------ the sections


def _resolve_scenario(layers: list[dict[str, Any]], problems: list[str]) -> tuple[dict[str, Any], Any]:
    """The scenario with all its options, and the function that builds it (None if it is not known)."""
    try:
        layers = _with_split(layers)
    except WrongUse as error:
        problems += error.problems
        return {}, None
    name, options = _merge(layers, DEFAULT_SCENARIO)
    pinned = {splits.PINNED: options.pop(splits.PINNED)} if splits.PINNED in options else {}
    problems += [problem for value in pinned.values() for problem in splits.pinned_problems(value)]
    if OBJECT in options:
        problems.append(_only_in_python("scenario", name))
        return {}, None
    try:
        build = registry.builder("scenario", name)
    except WrongUse as error:
        problems += error.problems
        return {}, None
    return {"name": name, **_checked(build, options, "scenario", name, problems), **pinned}, build


def _with_split(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`layers`; if the strongest name is a file with a split, what that holds comes first, as the weakest of all.

    Raises:
        WrongUse: if the file cannot be read, or a layer changes what it has settled.
    """
    path = next((layer["name"] for layer in reversed(layers) if "name" in layer), "")
    if not path.endswith(splits.SUFFIX):
        return layers
    file = splits.read_split(Path(path))
    layers = [{**layer, "name": file["name"]} if layer.get("name") == path else layer for layer in layers]
    if problems := splits.settled(file, _merge(layers, file["name"])[1], path):
        raise WrongUse(*problems)
    return [file, *layers]


def _resolve_model(layers: list[dict[str, Any]], suiting: Given, problems: list[str]) -> dict[str, Any]:
    """The model with all its options: the one that suits the scenario, if no other is named."""
    name, options = _merge(layers, "")
    if not name:
        name, options = _merge([dict(suiting), options], DEFAULT_MODEL)
    if OBJECT in options:
        problems.append(_only_in_python("model", name))
        return {}
    try:
        build = registry.builder("model", name)
    except WrongUse as error:
        problems += error.problems
        return {}
    start = suited(str | None, options.get(START))
    if START in options and not isinstance(start, str):
        problems.append(f"`model.{START}` is {told(start)}; it must be the folder of a finished run.")
    options = {option: value for option, value in options.items() if option != START}
    return {"name": name, **_checked(build, options, "model", name, problems), **({START: start} if start else {})}


def _resolve_plugin(name: str, options: Given, problems: list[str]) -> dict[str, Any]:
    """All options of the plugin; it is built on the way, as its constructor may refuse a combination."""
    if OBJECT in options:
        problems.append(_only_in_python("plugin", name))
        return {}
    parts = [part.strip() for part in name.split(",")]
    if len(parts) > 1 and set(parts) <= set(registry.names("plugin")):
        repeated = " ".join(f"--plugin {part}" for part in parts)
        problems.append(f"There is no plugin `{name}`. For several methods repeat `--plugin`: {repeated}.")
        return {}
    try:
        resolved = registry.build_plugin(name, options).public_options()
    except WrongUse as error:
        problems += error.problems
        return {}
    if ":" in name:
        resolved.pop("variant", None)  # where it is an argument
    return resolved


def _only_in_python(section: str, name: str) -> str:
    return (
        f"The {section} `{name}` of this configuration is an object of a Python program: give it again to "
        "`clframe.run` from Python."
    )


def _checked(build: Any, options: Given, section: str, name: str, problems: list[str]) -> dict[str, Any]:
    try:
        values = validated(build, options, section, skip=registry.SUPPLIED, owner=f"the {section} `{name}`")
    except WrongUse as error:
        problems += error.problems
        return {}
    return {public_name(option): value for option, value in values.items()}


def _settings(kind: type[Kind], given: Given, where: str, problems: list[str]) -> Kind | None:
    strangers = unknown(given, kind.model_fields, where, f"`{where}`")
    problems += strangers
    try:
        return kind(**{name: value for name, value in given.items() if name in kind.model_fields})
    except ValidationError as error:
        problems += explain(error, where)
        return None


def _merge_train(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The layers merged; by default one epoch.

    A stronger choice of epochs or iterations ends the weaker one, another optimizer the weaker one's own settings, and
    settings of the first experience a weaker wish to keep the optimizer.
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
    if not LENGTH.keys() & merged.keys():
        merged["epochs"] = 1
    return merged


def _merge(layers: list[dict[str, Any]], default: str) -> tuple[str, dict[str, Any]]:
    """The strongest name, and the options of all layers that name it, or name nothing."""
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
        raise WrongUse(f"The configuration {shown(path)} cannot be read: {error.reason}.") from error
    except UnicodeDecodeError as error:
        raise WrongUse(f"The configuration {path} is not UTF-8 text (byte {error.start}).") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise WrongUse(f"{path} must hold a mapping with some of: {', '.join(SECTIONS)}.")
    strangers = [name for name in data if name not in SECTIONS]
    problems += [
        f"{path}: there is no section `{cut(name)}`." + did_you_mean(name, SECTIONS) for name in strangers[:STRANGERS]
    ]
    if more := strangers[STRANGERS:]:
        problems.append(f"{path}: nor are {len(more):,} more of its names sections.")
    return data


def _parse_sets(sets: Sequence[str], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Values by section and option."""
    changes: dict[str, dict[str, Any]] = {}
    for text in sets:
        target, equals, value = text.partition("=")
        section, dot, option = (part.strip() for part in target.partition("."))
        if not (equals and dot and section and option):
            problems.append(f"`--set {cut(text)}` is not of the form `section.option=value`, such as `train.lr=0.1`.")
            continue
        if public_name(option) in changes.get(section, {}):
            problems.append(f"`--set {section}.{public_name(option)}` is given twice.")
        try:
            changes.setdefault(section, {})[public_name(option)] = parse_yaml(value, f"`--set {cut(text)}`")
        except WrongUse as error:
            problems += error.problems
    return changes


def _strangers(changes: Given, chosen: Given) -> list[str]:
    """One sentence for each section of ``--set`` that is neither a section nor a plugin of the run."""
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
    """Options by plugin, in the order of naming, of a mapping or of a list of names and mappings."""
    options: dict[str, dict[str, Any]] = {}
    several = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    for item in () if given is None else given if several else [given]:
        if not isinstance(item, Mapping) and not (several and isinstance(item, str)):
            problems.append(
                f"`plugins` is {told(given)}; it must be a mapping of names to options, or a list of names."
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
    """`given` as a mapping with or without a ``name``."""
    given = suited(str, given)
    if isinstance(given, str):
        return {"name": given}
    spec = _mapping(given, section, problems)
    if "name" in spec:
        spec["name"] = suited(str, spec["name"])
    if not isinstance(spec.get("name", ""), str):
        problems.append(f"`{section}.name` is {told(spec.pop('name'))}; it must be a text.")
    return spec


def _mapping(given: Any, where: str, problems: list[str]) -> dict[str, Any]:
    if given is None or isinstance(given, Mapping):
        strange = [name for name in given or {} if not isinstance(name, str)]
        problems += [f"`{where}` has the name {told(name)}, and names are texts." for name in strange]
        return {name: value for name, value in (given or {}).items() if isinstance(name, str)}
    problems.append(f"`{where}` is {told(given)}; it must be a mapping of options to values.")
    return {}


# -------------------------------------------------------------------------------------------- YAML

RESOLVERS = (  # those of YAML 1.2: words such as `no` are texts, 1e-3 is a number
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


LONGEST_NUMBER = 300  # characters of a whole number


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, strict."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - filled below

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse anchors, aliases and tags."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read here", event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"the tag {event.tag} is not read here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        """Refuse numbers that no setting can take: Python reads 4,300 digits, and a float has 309."""
        if len(node.value) > LONGEST_NUMBER:
            problem = f"a whole number of {len(node.value):,} digits is too large"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(super().construct_yaml_int(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse keys that are repeated, or are no text."""
        places: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key.start_mark)
            if key.value in places:
                problem = f"the key `{cut(key.value)}` stands in line {places[key.value]} already"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            places[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader`, or a YAML 1.1 reader, would take for something else."""


for _tag, _pattern, _first in RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def _plain(value: Any) -> Any:
    """`value` in the types that YAML has."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
