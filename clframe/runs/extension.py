"""The extension of a finished run: its scenario followed by a new one, with the network and the state continued."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clframe import registry
from clframe.data.batch import ImageData
from clframe.data.files import image_files, image_format_of, read_image
from clframe.data.listing import LeftOut, class_folders
from clframe.data.scenario import Experience, Part, Scenario
from clframe.errors import DataError, UsageError, did_you_mean
from clframe.options import options_of
from clframe.plugin import Plugin
from clframe.runs import checkpoint
from clframe.runs.folder import read_model
from clframe.runs.record import check_description, restore_scenario
from clframe.runs.results import read_results
from clframe.runs.state import read_position
from clframe.settings import Config, TrainSettings
from clframe.system.reading import blame_file, expand_home, quote_path, reason

if TYPE_CHECKING:
    from clframe.engine import Engine

NOT_CARRIED = ("experiences", "first", "order", "limit")  # options of a scenario that do not hold for the next one
OPTIMIZER_SETTINGS = (  # a kept optimizer is continued only if these are the same
    *("optimizer", "lr", "head_lr", "momentum", "nesterov", "betas", "eps"),
    *("weight_decay", "decay", "keep_optimizer"),
)

if TYPE_CHECKING:
    from clframe.engine import Engine


@dataclass(frozen=True)
class Base:
    """The finished run that another one extends.

    Attributes:
        path: folder of the run.
        config: configuration of the run.
        described: scenario of the run, as `model.json` describes it.
        methods: plugins that the run learned with.
        temperature: temperature of the confidence for each evaluation mode; empty if none was fitted.
    """

    path: Path
    config: Config
    described: Mapping[str, Any]
    methods: Sequence[str]
    temperature: Mapping[str, float]

    @property
    def known(self) -> dict[str, Any]:
        """Return the description of this run for an extension, as `base.json` holds it."""
        return {**self.described, "temperature": dict(self.temperature)}

    @property
    def scenario(self) -> Scenario:
        """Return the scenario that the run learned, without images."""
        return restore_scenario(self.described)

    def last_checkpoint(self) -> tuple[Any, dict[str, Tensor]]:
        """Load the state in which the run ended. Raises `DataError` if its checkpoint is gone or damaged."""
        problems: list[str] = []
        try:
            loaded = checkpoint.load(self.path / "checkpoints", problems.append)
        except DataError as error:
            raise DataError(f"The run in {self.path} cannot be extended: {error}") from error
        with blame_file(self.path / "checkpoints"):
            position = read_position(loaded[0])
        if position["experience"] != len(self.scenario):
            gone = f"The run in {self.path} cannot be extended, as its last checkpoint is gone."
            raise DataError(" ".join([gone, *problems]))
        return loaded

    def keeps_optimizer(self, train: TrainSettings) -> bool:
        """Return whether an optimizer that was kept suits the settings `train`."""
        return all(getattr(train, name) == getattr(self.config.train, name) for name in OPTIMIZER_SETTINGS)

    def check(self, config: Config, plugins: Sequence[Plugin]) -> None:
        """Raise `UsageError` if a run with `config` and `plugins` cannot continue the network and state of this one."""
        problems = []
        methods = [plugin for plugin in plugins if not plugin.observer]
        if missing := [name for name in self.methods if name not in [plugin.name for plugin in methods]]:
            problems.append(
                f"The run in {self.path} learned with {_phrase(self.methods)}, and what extends it leaves "
                f"{_phrase(missing)} out: their state is taken over, so name the same."
            )
        joining = self.find_joining(methods)
        if strangers := [plugin.name for plugin in joining if not plugin.joins]:
            problems.append(
                f"The run in {self.path} learned with {_phrase(self.methods)}, and {_phrase(strangers)} cannot "
                "join it, as it needs what it would have kept from the start: leave it out, or run all experiences "
                "again."
            )
        needy = [plugin.name for plugin in joining if plugin.joins == "images"]
        if needy and config.run.old_images is None:
            problems.append(
                f"{_phrase(needy)} can join the run in {self.path} with images of the classes that it learned: name "
                "a folder that has a folder of them for each class, with `run.old_images` (`clframe extend --images`)."
            )
        if config.run.old_images is not None and not needy:
            problems.append(
                "`run.old_images` is for methods that join the run and need images of old classes, and there is none: "
                "leave it out."
            )
        if config.model != self.config.model:
            problems.append(
                f"The network of the run in {self.path} is `{self.config.model.name}` with the options that it has "
                "there; it learns on as it is: set no others."
            )
        problems += [
            f"`{name}` trains on the images of earlier experiences, which a finished run does not keep: run "
            "all experiences again, in one run."
            for name in [plugin.name for plugin in methods if plugin.keeps_experiences]
        ]
        if config.run.device != "auto" and self.config.run.device == "cpu" and config.run.device != "cpu":
            problems.append(
                f"The run in {self.path} was on the CPU, and what its methods keep is there: extend it with "
                "`--device cpu`."
            )
        if problems:
            raise UsageError(*problems)

    def find_joining(self, plugins: Sequence[Plugin]) -> list[Plugin]:
        """Return the methods among `plugins` that this run learned without."""
        return [plugin for plugin in plugins if not plugin.observer and plugin.name not in self.methods]


def read_old_images(
    folder: Path, scenario: Scenario, experience: Experience, left: LeftOut | None = None
) -> Experience:
    """Return `experience` with the images in `folder` as its training images, of any class learned so far.

    Args:
        folder: holds one folder of image files for each class, named like the class.
        scenario: the scenario, as far as it was learned.
        experience: the last experience of the scenario.
        left: collects what the folder holds besides images.

    Raises:
        DataError: if there is no such folder, or an image cannot be read.
        UsageError: if a folder is not named like a class that was learned, or there is no image.
    """
    if not folder.is_dir():
        raise DataError(
            f"`run.old_images` is {folder}, which is not a folder; name one that has a folder for each class."
        )
    learned = {_normalize(scenario.class_names[c]): c for classes in scenario.classes for c in classes}
    try:
        found = class_folders(folder, left)
    except OSError as error:
        raise DataError(
            f"`run.old_images` is {quote_path(folder)}, which cannot be read: {reason(error)}; make it readable."
        ) from error
    if strangers := [path.name for path in found if _normalize(path.name) not in learned]:
        raise UsageError(
            f"{folder} has a folder {strangers[0]}, and no class of that name was learned: name each folder like the "
            "class that its images are of." + did_you_mean(strangers[0], learned)
        )
    look = scenario.transform.look or image_format_of(scenario.input_shape)
    read = []
    labels = []
    for path in found:
        files = image_files([path], left)
        read += [read_image(file, look, scenario.transform.scale) for file in files]
        labels += [learned[_normalize(path.name)]] * len(files)
    if not read:
        raise UsageError(f"{folder} has no folder of images; it needs one for each class, named like it.")
    y = torch.tensor(labels)
    first = {c: task for task, classes in reversed(list(enumerate(scenario.classes))) for c in classes}
    task = torch.tensor([first[label] for label in labels])
    data = ImageData(torch.stack(read), y, task=task)
    return Experience(experience.index, experience.task, experience.classes, lambda part: data)


def join(engine: Engine, plugins: Sequence[Plugin]) -> None:
    """Let `plugins` join the network of a run that learned without them, before its first new experience.

    Calls their ``after_experience`` as if the last old experience had just ended, with the images in
    ``run.old_images``, or none.
    """
    run = engine.run
    experience = run.experience
    if run.config.run.old_images is not None:
        folder, left = expand_home(run.config.run.old_images), LeftOut()
        experience = read_old_images(folder, run.scenario, experience, left)
        for note in left.sentences(quote_path(folder)):
            run.tell(note)
    for plugin in plugins:
        for name, call in engine.calls["after_experience"]:
            if name == plugin.name:
                call(run=run, experience=experience)


def load_base(path: Path, config: Config) -> Base:
    """Return the run in `path`, which has the configuration `config`, as a base to extend.

    Raises `DataError` if the run is not finished.
    """
    description, _, _ = read_model(path)
    check_description(path, description)
    temperature = description.get("temperature") or {}
    return Base(path, config, description["scenario"], read_results(path).data["plugins"], temperature)


def derive_options(base: Base, scenario: str) -> dict[str, Any]:
    """Return the options that `base` decides for the new `scenario`: its setting, and one experience by default.

    A scenario of the same name has the other options of the old one, too, but for those that order its classes.
    """
    known = {option.name for option in options_of(registry.builder("scenario", scenario), skip=registry.SUPPLIED)}
    old = base.config.scenario
    same = old.name == scenario and old.origin == "name"
    carried = {name: value for name, value in old.options.items() if same and name in known and name not in NOT_CARRIED}
    own = {"setting": base.described["setting"], "experiences": 1}
    return carried | {name: value for name, value in own.items() if name in known}


def extend_scenario(old: Scenario, coming: Scenario) -> Scenario:
    """Return the scenario of the experiences learned, without images, followed by those of `coming`.

    A class with the name of an old class is that class; others get new columns. Images are normalized and augmented
    as those that the network was trained on.

    Raises:
        UsageError: if the two differ in setting, or in the shape or range of their images.
    """
    problems = []
    if coming.setting != old.setting:
        problems.append(
            f"`{coming.name}` is of the setting `{coming.setting}`, and the run learned in "
            f"`{old.setting}`: choose a scenario of that setting."
        )
    if coming.input_shape != old.input_shape:
        problems.append(
            f"The images of `{coming.name}` are {list(coming.input_shape)}, and the run learned with "
            f"{list(old.input_shape)}; bring them to that size."
        )
    if coming.transform.scale != old.transform.scale:
        problems.append(
            f"The values of the images of `{coming.name}` go up to {coming.transform.scale:g}, and the run learned "
            f"with {old.transform.scale:g}; bring them to that range."
        )
    if twice := sorted({n for n in coming.class_names if coming.class_names.count(n) > 1}):
        problems.append(f"`{coming.name}` has two classes `{twice[0]}`; give each a name of its own.")
    if problems:
        raise UsageError(*problems)
    names = list(old.class_names[: _count_classes(old.classes)])
    known = [_normalize(name) for name in names]
    table = torch.zeros(len(coming.class_names), dtype=torch.int64)
    for label, name in enumerate(coming.class_names[: _count_classes(coming.classes)]):
        if _normalize(name) not in known:
            names.append(name)
            known.append(_normalize(name))
        table[label] = known.index(_normalize(name))
    n, shape = len(old), old.input_shape

    def load(index: int, part: Part) -> ImageData:
        if index < n:
            return ImageData(torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), task=index)
        data: ImageData = getattr(coming[index - n], part)
        kept = {name: getattr(data, name) for name in ("index", "weight", "targets")}
        return ImageData(data.x, table.to(data.y.device)[data.y], task=data.task + n, **kept)

    new = [[int(table[label]) for label in classes] for classes in coming.classes]
    joined = Scenario(
        f"{old.name}+{coming.name}",
        old.setting,
        [*old.classes, *new],
        names,
        shape,
        load,
        transform=old.transform,
        checksum=coming.checksum,
        move=coming.to,
        notes=coming.notes,
    )
    joined.known = (*old.known, len(joined))
    return joined


def _normalize(name: str) -> str:
    """Return the name of a class in one Unicode form (NFC), to compare it: systems write one name in several."""
    return unicodedata.normalize("NFC", name)


def _count_classes(classes: Sequence[Sequence[int]]) -> int:
    """Return the number of classes: one more than the largest label."""
    return max(map(max, classes)) + 1


def _phrase(methods: Sequence[str]) -> str:
    """Return the names of methods as a phrase."""
    return " and ".join(f"`{name}`" for name in methods) or "no method"
