"""What is checked, the checks and their outcomes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from clframe import registry
from clframe.data.scenario import Scenario, Setting
from clframe.errors import ClframeError, Interrupted
from clframe.options import options_of
from clframe.plugin import Plugin
from clframe.settings import Component, RunSettings
from clframe.testing.fixtures import MODEL, Broken, one_thread

BACKBONE_SHAPE = (3, 32, 32)  # of the images with which backbones are checked


class NotRun(Exception):
    """The reason why a check has nothing to look at."""


@dataclass(frozen=True)
class Subject:
    """What is checked: an installed plugin, scenario or backbone by its name, or its class or building function.

    Attributes:
        kind: plugin, scenario or model.
        what: the name, class or function.
        options: those with which it is built, by their public names.
        model: the name, or name and options, of the backbone with which a plugin is checked.
    """

    kind: registry.Kind
    what: str | Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | Mapping[str, Any] = MODEL

    @property
    def checks(self) -> tuple[Check, ...]:
        """Return the contract of the subject's kind."""
        return CHECKS[self.kind]

    @property
    def factory(self) -> Any:
        """Return the class or function. Raises `UsageError` if nothing of that name is installed."""
        if not isinstance(self.what, str):
            return self.what
        return registry.plugin_class(self.what) if self.kind == "plugin" else registry.builder(self.kind, self.what)

    def plugin(self) -> Plugin:
        """Build a new plugin."""
        if isinstance(self.what, str):
            return registry.build_plugin(self.what, self.options)
        return cast(Plugin, self.what(**self.options))

    def scenario(self) -> Scenario:
        """Build a new scenario."""
        if isinstance(self.what, str):
            return registry.build_scenario(Component(self.what, self.options), RunSettings.model_validate({}))
        return cast(Scenario, self.what(**self.options))

    def backbone(self) -> nn.Module:
        """Build a new backbone, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if isinstance(self.what, str):
                return registry.build_backbone(Component(self.what, self.options), BACKBONE_SHAPE)
            return cast(nn.Module, self.what(BACKBONE_SHAPE, **self.options))


def plugin(
    what: str | type[Plugin], options: Mapping[str, Any] | None = None, model: str | Mapping[str, Any] = MODEL
) -> Subject:
    """Return a plugin to be checked, by its name or class, in networks with the backbone `model`."""
    return Subject("plugin", what, options or {}, model)


def scenario(what: str | Callable[..., Scenario], options: Mapping[str, Any] | None = None) -> Subject:
    """Return a scenario to be checked, by its name or the function that builds it."""
    return Subject("scenario", what, options or {})


def backbone(what: str | Callable[..., nn.Module], options: Mapping[str, Any] | None = None) -> Subject:
    """Return a backbone to be checked, by its name or the function that builds it, on images of `BACKBONE_SHAPE`."""
    return Subject("model", what, options or {})


@dataclass(frozen=True)
class Check:
    """One part of the contract: calling it with a subject raises `Broken` where it does not hold.

    Attributes:
        name: what holds, in a few words.
        why: what the check asks, and what for.
        needs_run: the check trains, so that it says nothing about a subject with which nothing can be trained.
        look: the function that checks a subject, with a temporary folder.
        first: where this check fails, no check that trains says anything.
    """

    name: str
    why: str
    needs_run: bool
    look: Callable[[Subject, Path], None]
    first: bool = False

    def __str__(self) -> str:
        return self.name

    def __call__(self, subject: Subject) -> None:
        """Check the subject. Raises `Broken`, or whatever a run with the subject raises."""
        with tempfile.TemporaryDirectory(prefix="clframe-check-") as folder, one_thread(), suppress(NotRun):
            self.look(subject, Path(folder))

    def outcome(self, subject: Subject) -> Outcome:
        """Check the subject and return what was found; only an interruption by the user is raised."""
        with tempfile.TemporaryDirectory(prefix="clframe-check-") as folder, one_thread():
            try:
                self.look(subject, Path(folder))
            except NotRun as reason:
                return Outcome(self, "not run", str(reason))
            except Interrupted:
                raise
            except (Broken, ClframeError) as error:
                return Outcome(self, "failed", " ".join(str(error).split()))
            except Exception as error:  # raised by code that is checked: any exception is possible
                return Outcome(self, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
        return Outcome(self, "passed")


@dataclass(frozen=True)
class Outcome:
    """The result of a check, and the reason where it did not pass."""

    check: Check
    result: Literal["passed", "failed", "not run"]
    why: str = ""


CHECKS: dict[registry.Kind, tuple[Check, ...]] = {}  # the contract of each kind, in the order in which it is checked


def check(
    kind: registry.Kind, needs_run: bool = True, first: bool = False
) -> Callable[[Callable[[Subject, Path], None]], Callable[[Subject, Path], None]]:
    """Return a decorator that adds a function to the contract of a kind, by its name and docstring.

    Args:
        kind: plugin, scenario or model.
        needs_run: whether the function trains.
        first: whether no check that trains says anything where this one fails.
    """

    def add(look: Callable[[Subject, Path], None]) -> Callable[[Subject, Path], None]:
        why = " ".join((look.__doc__ or "").split())
        CHECKS[kind] = (*CHECKS.get(kind, ()), Check(look.__name__.replace("_", " "), why, needs_run, look, first))
        return look

    return add


def outcomes(subject: Subject) -> Iterator[Outcome]:
    """Yield the outcome of each check of `subject`; checks that train are left out once the first run has failed."""
    failed = ""
    for part in subject.checks:
        if failed and part.needs_run:
            yield Outcome(part, "not run", f"`{failed}` must pass first.")
            continue
        outcome = part.outcome(subject)
        if outcome.result == "failed" and part.first:
            failed = part.name
        yield outcome


def serves(subject: Subject) -> Setting:
    """Return the setting in which a plugin is checked: the first that it serves."""
    return cast(Setting, subject.factory.serves[0])


def check_docstrings(subject: Subject, skip: tuple[str, ...]) -> None:
    """Raise `Broken` unless the subject has a docstring that says what each option means."""
    factory = subject.factory
    if not factory.__doc__:
        raise Broken(f"`{factory.__name__}` has no docstring, so `clframe` cannot say what it is.")
    for option in options_of(factory, skip):
        if not option.doc:
            raise Broken(f"The option `{option.name}` is not documented: add it under `Options:` in the docstring.")
