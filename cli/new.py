"""The commands `plugins new` and `scenarios new`: a package that installs, runs and passes the contract as it is."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from clframe import __version__, registry
from clframe.cli import show
from clframe.errors import UsageError
from clframe.hooks import HOOK_API, HOOKS
from clframe.system.reading import expand_home

GROUP_OF = {"plugin": "plugins", "scenario": "scenarios", "model": "plugins"}  # of the command line
KIND_OF = {"plugin": "plugin", "scenario": "scenario", "model": "backbone"}
TRY = {  # arguments of `clframe run` that use it
    "plugin": "--scenario split-digits --plugin $name",
    "scenario": "--scenario $name",
    "model": "--scenario split-digits --model $name",
}

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$package"
version = "0.1.0"
description = "The $kind $name for clframe"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["clframe>=$version"]

[project.optional-dependencies]
dev = ["pytest>=8.3"]

[project.entry-points."$group"]
$name = "$module:$factory"

[tool.setuptools]
py-modules = ["$module"]
"""

README = """\
# $name

A $kind for clframe. In this folder:

```sh
pip install -e .             # again only when pyproject.toml changes
clframe $commands check $name$flag   # the contract: what fails, and why
clframe run $how
pytest                       # the contract, and what the $kind must compute
```
"""

PLUGIN = '''\
"""$title: a quadratic penalty that pulls weights to their values after the latest experience."""

from __future__ import annotations

import clframe
from clframe import hookimpl, options
from torch import Tensor


class $factory(clframe.Plugin):
    """A penalty on changes of weights, all weights alike: L = loss + strength sum (theta - theta*)^2.

    Options:
        strength: of the penalty.
    """

    name = "$name"
    hook_api = $hook_api  # the version of the hooks that the plugin is written for
    state = ("anchor",)  # what a checkpoint must hold
    citation = ""  # the paper

    def __init__(self, *, strength: options.NonNegative = 0.1) -> None:
        self.strength = strength
        self.anchor: dict[str, Tensor] = {}  # theta*

    @hookimpl
    def penalty(self, run: clframe.Run) -> dict[str, Tensor] | None:
        """Return the penalty; None in the first experience, where there is nothing to protect."""
        weights = dict(run.model.named_parameters())
        pulls = [(weights[name] - anchor).square().sum() for name, anchor in self.anchor.items()]
        return {self.name: self.strength * sum(pulls)} if pulls else None

    @hookimpl
    def after_experience(self, run: clframe.Run) -> None:
        """Keep the weights of this experience as the anchor of the next ones."""
        self.anchor = {name: p.detach().clone() for name, p in run.model.named_parameters()}
'''

PLUGIN_TEST = '''\
"""The contract of all plugins, and what this one computes."""

from types import SimpleNamespace

import pytest
import torch
from clframe import testing
from $module import $factory

SUBJECT = testing.plugin($factory)


@pytest.mark.parametrize("check", SUBJECT.checks, ids=str)
def test_contract(check):
    check(SUBJECT)


def test_the_penalty_is_the_squared_distance_times_the_strength():
    plugin = $factory(strength=0.5)
    run = SimpleNamespace(model=torch.nn.Linear(2, 1))
    assert plugin.penalty(run) is None
    plugin.after_experience(run)
    assert plugin.penalty(run)["$name"] == 0
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter += 2  # three of them
    assert plugin.penalty(run)["$name"].item() == pytest.approx(0.5 * 3 * 2**2)
'''

SCENARIO = '''\
"""$title: bars in eight directions, two directions in each experience."""

from __future__ import annotations

import clframe
import torch
from clframe import options
from torch import Tensor

ANGLES = 8
SIZE = 8


def $factory(
    *, experiences: options.Count = 4, per_class: options.Count = 50, setting: clframe.data.Setting = "class"
) -> clframe.Scenario:
    """Build gray images of 8 by 8 with a bar in one of eight directions, on noise.

    Options:
        experiences: how many groups the eight directions are divided into.
        per_class: training images of each direction.
        setting: class-, task- or domain-incremental.
    """
    names = tuple(f"{180 * k // ANGLES} degrees" for k in range(ANGLES))
    arrays = clframe.Arrays("bars", *draw(per_class, seed=0), *draw(20, seed=1), names, clframe.Transform())
    return clframe.split_classes("$name", arrays, experiences=experiences, setting=setting)


def draw(per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `per_class` bars of each direction: images [N, 1, 8, 8] uint8, labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(ANGLES).repeat(per_class)
    angle = torch.pi * y / ANGLES
    place = torch.arange(SIZE) - (SIZE - 1) / 2
    distance = (angle.sin()[:, None, None] * place - angle.cos()[:, None, None] * place[:, None]).abs()
    noise = torch.randint(0, 100, (len(y), 1, SIZE, SIZE), generator=generator)
    return (noise + 155 * (distance < 1)[:, None]).to(torch.uint8), y


# the defaults of `clframe run` for this scenario
$factory.backbone = {"name": "mlp", "hidden": [64]}
$factory.train = {"epochs": 5, "lr": 1e-3}
'''

SCENARIO_TEST = '''\
"""The contract of all scenarios, and what this one shows."""

import pytest
from clframe import testing
from $module import $factory

SUBJECT = testing.scenario($factory)


@pytest.mark.parametrize("check", SUBJECT.checks, ids=str)
def test_contract(check):
    check(SUBJECT)


def test_each_experience_has_two_directions():
    scenario = $factory(per_class=3)
    assert [len(experience.train) for experience in scenario] == [6, 6, 6, 6]
    assert [scenario.class_names[c] for c in scenario.classes[1]] == ["45 degrees", "67 degrees"]
'''

BACKBONE = '''\
"""$title: convolutions, then the mean over all places."""

from __future__ import annotations

from collections.abc import Sequence

from clframe import options
from torch import Tensor, nn


class $cls(nn.Module):
    """Convolutions of 3 by 3, then the mean over all places.

    Attributes:
        width: how many features an image has.
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers)

    def features(self, x: Tensor) -> Tensor:
        """Compute the features [B, width] of images [B, C, H, W], which are the input of the head."""
        return self.layers(x).mean((2, 3))


def $factory(input_shape: Sequence[int], *, width: options.Count = 32, depth: options.Count = 3) -> $cls:
    """Build a few convolutions, for small images.

    Options:
        width: channels of each layer.
        depth: layers.
    """
    return $cls(input_shape[0], width, depth)
'''

BACKBONE_TEST = '''\
"""The contract of all backbones, and what this one is."""

import pytest
from clframe import testing
from $module import $factory

SUBJECT = testing.backbone($factory, {"width": 8})


@pytest.mark.parametrize("check", SUBJECT.checks, ids=str)
def test_contract(check):
    check(SUBJECT)


def test_each_layer_has_the_weights_of_its_kernels_and_norm():
    built = $factory((1, 8, 8), width=4, depth=2)
    assert sum(p.numel() for p in built.parameters()) == (9 * 4 + 4 + 8) + (9 * 16 + 4 + 8)
'''

SOURCES = {"plugin": (PLUGIN, PLUGIN_TEST), "scenario": (SCENARIO, SCENARIO_TEST), "model": (BACKBONE, BACKBONE_TEST)}


def write(kind: registry.Kind, name: str, output: Path | None) -> None:
    """Write the package of a `kind` called `name` to the folder `output`, and print how to go on.

    Raises `UsageError` if the name or the folder cannot be used; nothing is written then.
    """
    folder = expand_home(output or name)
    if problems := find_problems(kind, name):
        raise UsageError(*problems)
    if folder.exists():
        raise UsageError(f"{folder} exists already: name another folder with `--output`.")
    for file, text in fill_templates(kind, name).items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    flag = _flag(kind)
    show.line(f"{folder} holds the {KIND_OF[kind]} `{name}`, which works as it is. Install it, and check it:")
    show.line(f"  pip install --no-build-isolation -e {folder}")
    show.line(f"  clframe {GROUP_OF[kind]} check {name}{flag}")
    show.line(f"Then run it: clframe run {Template(TRY[kind]).substitute(name=name)}")


def find_problems(kind: registry.Kind, name: str) -> list[str]:
    """Return one sentence for each reason why a new package cannot be called `name`."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        return [
            f"`{name}` cannot be the name of a {KIND_OF[kind]}: use small letters, digits and single hyphens between "
            "them."
        ]
    module = name.replace("-", "_")
    if name in registry.RESERVED:
        return [
            f"A {KIND_OF[kind]} cannot be called `{name}`, as `--set {name}.x=...` means something else: choose "
            "another name."
        ]
    if module in HOOKS:
        return [f"`{module}` is the name of a hook: choose another for the {KIND_OF[kind]}."]
    if keyword.iskeyword(module) or keyword.iskeyword(_class(name)):
        return [f"`{name}` is a word of Python: choose another for the {KIND_OF[kind]}."]
    if found := [offer for offer in registry.offers(kind) if offer.name == name]:
        return [f"The package `{found[0].package}` offers a {KIND_OF[kind]} `{name}` already: choose another name."]
    if installed := _find_installed(_package(name)):
        return [f"A package `{installed}` is installed already: choose another name for the {KIND_OF[kind]}."]
    return []


def fill_templates(kind: registry.Kind, name: str) -> dict[str, str]:
    """Return the text of each file of the package, by the name of the file."""
    module = _package(name).replace("-", "_")
    values = {
        "name": name,
        "title": name.replace("-", " ").capitalize(),
        "package": _package(name),
        "module": module,
        "cls": _class(name),
        "factory": _class(name) if kind == "plugin" else f"build_{name.replace('-', '_')}",
        "kind": KIND_OF[kind],
        "group": registry.GROUPS[kind],
        "commands": GROUP_OF[kind],
        "flag": _flag(kind),
        "hook_api": str(HOOK_API),
        "version": __version__,
    }
    values["how"] = Template(TRY[kind]).substitute(values)
    source, test = SOURCES[kind]
    texts = {"pyproject.toml": PYPROJECT, "README.md": README, f"{module}.py": source, f"test_{module}.py": test}
    return {file: Template(text).substitute(values) for file, text in texts.items()}


def _flag(kind: registry.Kind) -> str:
    return " --kind backbone" if kind == "model" else ""


def _package(name: str) -> str:
    """Return the name of the distribution; the prefix keeps it apart from other packages called `name` on the index."""
    return f"clframe-{name}"


def _class(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("-"))


def _find_installed(package: str) -> str | None:
    """Return the name of an installed distribution, or module, that is called like `package`; None if none is."""
    from importlib import metadata, util

    try:
        return metadata.distribution(package).name
    except metadata.PackageNotFoundError:
        module = package.replace("-", "_")
        return module if util.find_spec(module) else None
