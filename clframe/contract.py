"""The contract of a plugin's class: which hooks it implements, and whether each one fits its specification."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from clframe.errors import did_you_mean
from clframe.hooks import HOOK_API, HOOKS, Hooks
from clframe.renamed import OF_PLUGINS, now_called

if TYPE_CHECKING:
    from clframe.plugin import Plugin


def hooks_of(cls: type) -> list[str]:
    """Return the hooks that a plugin's class implements, in the order in which the engine calls them."""
    implemented = {hook for _, hook, mark in _methods(cls) if mark is not None}
    return [hook for hook in HOOKS if hook in implemented]


def _methods(cls: type) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """Yield, for each callable that a plugin's class adds, its name, the hook it implements, and its mark or None."""
    from clframe.plugin import Plugin

    for name in dir(cls):
        if hasattr(Plugin, name) or isinstance(inspect.getattr_static(cls, name), property):
            continue
        value = getattr(cls, name)
        if callable(value):
            mark = getattr(value, "clframe_impl", None)
            yield name, (mark and mark["specname"]) or name, mark


def _owns(cls: type, hook: str) -> bool:
    return any(h == hook and mark is not None and not mark["wrapper"] for _, h, mark in _methods(cls))


@cache
def _arguments_of(hook: str) -> list[str]:
    """Return the names of the arguments of `hook`."""
    return list(inspect.signature(getattr(Hooks, hook)).parameters)[1:]


def _problems_of(cls: type[Plugin]) -> list[str]:
    """Return one sentence for each thing in a plugin's class that would not do what its author means."""
    if cls.hook_api not in (None, HOOK_API):
        which = "clframe" if isinstance(cls.hook_api, int) and cls.hook_api > HOOK_API else f"`{cls.name}`"
        return [
            f"The plugin `{cls.name}` was written for version {cls.hook_api} of the hooks, and this clframe has "
            f"version {HOOK_API}: upgrade {which}."
        ]
    problems = []
    for name, hook, mark in _methods(cls):
        method = f"`{name}` of plugin `{cls.name}`"
        if mark is None:
            if name in HOOKS:
                problems.append(f"{method} is named like a hook but lacks the mark: put `@hookimpl` above it.")
            continue
        if hook not in HOOKS:
            problems.append(f"{method} is marked as a hook, but there is no hook `{hook}`." + did_you_mean(hook, HOOKS))
            continue
        if mark["hookwrapper"]:
            problems.append(f"{method} is an old-style wrapper: use `@hookimpl(wrapper=True)`.")
        allowed = _arguments_of(hook)
        bound = not inspect.isfunction(inspect.getattr_static(cls, name))
        for parameter in list(inspect.signature(getattr(cls, name)).parameters.values())[0 if bound else 1 :]:
            if parameter.name not in allowed or parameter.kind in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                problems.append(
                    f"{method} takes `{parameter.name}`, which the hook `{hook}` does not give."
                    + did_you_mean(parameter.name, allowed)
                )
            elif parameter.default is not parameter.empty:
                problems.append(f"{method} gives its argument `{parameter.name}` a default: leave it out.")
    for old, new in OF_PLUGINS.items():
        if any(old in vars(base) for base in cls.__mro__):
            problems.append(now_called(f"{old}` of plugin `{cls.name}", new))
    for attribute in ("state", "predictor_state", "serves", "conflicts"):
        if isinstance(getattr(cls, attribute), str):
            problems.append(f"`{attribute}` of plugin `{cls.name}` is a text; it must be a tuple of names.")
    return problems
