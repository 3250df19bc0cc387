"""The schema of a run's configuration: training settings, run settings, scenario, model and plugins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FieldSerializationInfo,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from clframe.data.split_file import pinned_problems
from clframe.errors import UsageError
from clframe.options import (
    Count,
    NonNegative,
    Positive,
    Search,
    explain,
    suited,
    unknown,
)
from clframe.renamed import now_called
from clframe.system.reading import expand_home
from clframe.system.texts import cut, quote

OF_ALL = ("keep_optimizer", "logits", "val", "threads", "first")  # settings that no single experience has of its own
LENGTH = {"epochs": "iterations", "iterations": "epochs"}  # each excludes the other
SETTINGS = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, validate_assignment=True)


class Settings(BaseModel):
    """A settings model; values of other types that hold the same are converted (`clframe.options.suited`)."""

    model_config = SETTINGS

    @field_validator("*", mode="before")
    @classmethod
    def _suited(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        return suited(field.annotation, value)


class TrainSettings(Settings):
    """Settings of the training of each experience (``train.*``)."""

    epochs: Count | None = Field(default=None, description="passes over the data of each experience")
    iterations: Count | None = Field(
        default=None, description="steps per experience, of complete batches, instead of epochs"
    )
    batch_size: Count = Field(default=32, description="images of a step, replay not counted")
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="adam", description="torch's optimizer of that name")
    lr: Annotated[Positive, Search(1e-4, 1, log=True)] = Field(default=1e-3, description="learning rate")
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
        """Return the settings of the experience with this index; `first` changes those of index 0."""
        if experience or not self.first:
            return self
        length = {other: None for name, other in LENGTH.items() if self.first.get(name) is not None}
        return TrainSettings(**{**self.model_dump(), **length, **self.first, "first": None})

    def lr_of(self, parameter: str) -> float:
        """Return the learning rate of the parameter of this name."""
        return self.head_lr if self.head_lr is not None and parameter.startswith("head.") else self.lr


FolderName = Annotated[str, Field(min_length=1)]  # a path; a variable of the shell that is not set gives an empty one


class RunSettings(Settings):
    """Settings of the run itself (``run.*``)."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="of everything random")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    data_root: FolderName | None = Field(
        default=None, description="folder of the data sets; null: CLFRAME_DATA, else the user's cache"
    )
    output: FolderName | None = Field(default=None, description="folder of this run; null: a new one under runs/")
    eval_every: Literal["experience", "epoch"] | Count = Field(
        default="experience", description="how often to evaluate: after each experience, also each epoch, or N steps"
    )
    eval_images: Count | None = Field(
        default=None,
        description="test images of each class in evaluations while learning, drawn once from the seed; null: all",
    )
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
    experiences: Count | None = Field(
        default=None, description="learn so many experiences, the first ones; the run is given no later one; null: all"
    )
    test: bool = Field(
        default=True,
        description="evaluate on test images; false: the run is given none, and images held out by `train.val` only "
        "are evaluated",
    )
    per_experience: list[dict[str, Any]] | None = Field(
        default=None,
        description="settings that single experiences have of their own, by full name, in a list with one mapping for "
        "each: `train.lr`, and options of plugins that declare a search range, such as {ewc.lambda: 10}",
    )
    tuned: dict[str, Any] | None = Field(
        default=None,
        description="how settings were chosen, as `clframe tune` writes it; null: by no search; changes nothing that "
        "is learned",
    )
    predictions: bool = Field(default=True, description="keep the scores of every test image")

    @model_validator(mode="after")
    def _consistent(self) -> RunSettings:
        if self.eval_images is not None and self.eval_every == "experience":
            raise ValueError("`run.eval_images` needs `run.eval_every=epoch`, or a number of steps there, such as 10")
        return self

    def changes_of(self, experience: int) -> Mapping[str, Any]:
        """Return the settings that the experience with this index has of its own, by full name."""
        entries = self.per_experience or []
        return entries[experience] if experience < len(entries) else {}

    def observers(self) -> list[str]:
        """Return the names of the plugins that these settings switch on, in the order of the fields."""
        return [name for name in OBSERVERS if getattr(self, name)]


# Switches in `run.*` that are marked as an observer's: each adds the plugin of its name to a run that keeps a folder.
OBSERVERS = tuple(name for name, field in RunSettings.model_fields.items() if field.json_schema_extra)


Origin = Literal["name", "object"]


@dataclass(frozen=True)
class Component:
    """A scenario, model or plugin of a configuration.

    Attributes:
        name: name under which the part is installed, or the name of an object of a Python program.
        options: values by public option name; once resolved, the value of every option.
        origin: whether an installed part is found by its ``name``, or a Python program gives an ``object``.
        start: of a model, the folder of the finished run whose backbone it begins as.
        pinned: of a scenario from a split's file, the checksums that its data and its split must have.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = "name"
    start: str | None = None
    pinned: Mapping[str, str] | None = None

    def __getitem__(self, key: str) -> Any:
        """Refuse the form of a mapping, which a part of a configuration had before it was a class."""
        raise UsageError(now_called(f"[{key!r}]", "name" if key == "name" else f"options[{key!r}]"))


OBJECT = "python object"  # the key that marks an object of a Python program in a file
BESIDE = {"scenario": ("pinned",), "model": ("start",), "plugin": ()}  # the fields that a file holds among the options


def read_component(kind: str, written: object, name: str = "") -> Component:
    """Return the scenario, model or plugin that a configuration file writes as `written`.

    A plugin stands under its `name`; a scenario or model holds its name among the options.

    Raises:
        UsageError: if `written` is not a mapping, has no name, or has a `start` or `pinned` of another form.
    """
    where = f"plugins.{cut(name)}" if kind == "plugin" else kind
    if not isinstance(written, Mapping):
        raise UsageError(f"`{where}` is {quote(written)}: it should be a valid dictionary.")
    options = dict(written)
    if kind != "plugin":
        name = options.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f"`{where}` is {quote(written)}: it should have a `name`, which is a text.")
    origin: Origin = "object" if OBJECT in options else "name"
    options.pop(OBJECT, None)
    beside = {key: suited(str, options.pop(key)) for key in BESIDE[kind] if key in options}
    problems = pinned_problems(beside["pinned"]) if "pinned" in beside else []
    if not isinstance(beside.get("start", ""), str):
        problems = [f"`model.start` is {quote(beside['start'])}; it must be the folder of a finished run."]
    if problems:
        raise UsageError(*problems)
    return Component(name, options, origin, **beside)


def write_component(kind: str, component: Component) -> dict[str, Any]:
    """Return `component` as a configuration file holds it, which `read_component` reads back."""
    name = {} if kind == "plugin" else {"name": component.name}
    beside = {key: value for key in BESIDE[kind] if (value := getattr(component, key))}
    return {**name, **component.options, **beside, **({OBJECT: True} if component.origin == "object" else {})}


class Config(BaseModel):
    """A configuration: everything that defines a run, as `config.yaml` of its folder holds it.

    `plugins` holds components by name, in calling order. Validation and ``model_dump`` take and give the form of the
    file, of nested mappings.
    """

    model_config = SETTINGS

    scenario: Component
    model: Component
    plugins: dict[str, Component]
    train: TrainSettings
    run: RunSettings

    def train_of(self, experience: int) -> TrainSettings:
        """Return the training settings of the experience with this index."""
        settings = self.train.of(experience)
        changes = {name: value for name, value in self.run.changes_of(experience).items() if name.startswith("train.")}
        own = {name.removeprefix("train."): value for name, value in changes.items()}
        return TrainSettings(**{**settings.model_dump(), **own}) if own else settings

    @field_validator("scenario", "model", mode="before")
    @classmethod
    def _read(cls, given: object, info: ValidationInfo) -> Component:
        return given if isinstance(given, Component) else read_component(str(info.field_name), given)

    @field_validator("plugins", mode="before")
    @classmethod
    def _read_plugins(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given  # which is refused
        parts = given.items()
        return {n: part if isinstance(part, Component) else read_component("plugin", part, n) for n, part in parts}

    @field_serializer("scenario", "model")
    def _write(self, component: Component, info: FieldSerializationInfo) -> dict[str, Any]:
        return write_component(info.field_name, component)

    @field_serializer("plugins")
    def _write_plugins(self, plugins: dict[str, Component]) -> dict[str, Any]:
        return {name: write_component("plugin", plugin) for name, plugin in plugins.items()}


DATA_ROOT = "CLFRAME_DATA"


def data_root(given: str | None) -> Path:
    """Return the folder of the data sets: as given, else of the environment, else the user's cache folder."""
    import os

    import platformdirs

    return expand_home(given or os.environ.get(DATA_ROOT) or platformdirs.user_cache_dir("clframe"))


DEFAULT_SCENARIO = "split-digits"
DEFAULT_MODEL = "mlp"  # of a scenario that names none that suits it
SECTIONS = ("scenario", "model", "plugins", "train", "run")
