"""One plugin manager for a run: which plugins can run together, and how the engine calls them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pluggy

from clframe.contract import _owns, _problems_of, hooks_of
from clframe.errors import UsageError
from clframe.hooks import HOOKS, Hooks
from clframe.registry import RESERVED

if TYPE_CHECKING:
    from clframe.plugin import Plugin


OWNED = ("base_loss", "predictor")  # hooks that a run has one owner of at most
ACTING = (  # hooks by which a plugin changes what is learned
    "grow",
    "before_experience",
    "extra_data",
    "extra_batch",
    "before_step",
    "base_loss",
    "penalty",
    "after_backward",
    "after_step",
    "predictor",
)


def manager(plugins: Sequence[Plugin]) -> pluggy.PluginManager:
    """Return a plugin manager of these plugins, which calls them in the order of naming.

    Raises:
        UsageError: with one sentence for each reason why they cannot run, or cannot run together.
    """
    from clframe.plugin import Plugin

    problems = []
    built: dict[str, Plugin] = {}
    for plugin in plugins:
        if inspect.isclass(plugin):
            problems.append(f"`{plugin.__name__}` is a class; give a plugin built from it: `{plugin.__name__}()`.")
            continue
        if not isinstance(plugin, Plugin):
            problems.append(f"{plugin!r} is not a plugin: derive its class from `clframe.Plugin`.")
            continue
        cls = type(plugin)
        cls.name = cls.name or cls.__name__
        if cls.name in built:
            problems.append(f"The plugin `{cls.name}` is in the run twice; name it once.")
            continue
        if cls.name in RESERVED:
            problems.append(
                f"A plugin cannot be called `{cls.name}`, as `--set {cls.name}.x=...` means something else: give its "
                "class another `name`."
            )
        built[cls.name] = plugin
        problems += _problems_of(cls)
    alone = [problem for plugin in built.values() for problem in isolation_problems(plugin, built.values())]
    problems += alone
    for hook in () if alone else OWNED:
        problems += owner_problems(built.values(), hook)
    for name, plugin in built.items():
        for other in plugin.conflicts:
            if other in built:
                problems.append(f"The plugin `{name}` cannot run beside `{other}`; leave out one of them.")
    if problems:
        raise UsageError(*problems)
    made = _Manager("clframe")
    made.add_hookspecs(Hooks)
    try:
        for name, plugin in reversed(built.items()):  # pluggy calls the last one first
            made.register(plugin, name)
        made.check_pending()
    except pluggy.PluginValidationError as error:
        raise UsageError(f"A plugin does not fit the hooks: {error}") from error
    return made


class _Manager(pluggy.PluginManager):
    """A manager that looks for hooks only among what a plugin's class adds to `Plugin`: a third of the time."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        from clframe.plugin import Plugin

        return None if hasattr(Plugin, name) else super().parse_hookimpl_opts(plugin, name)


def isolation_problems(plugin: Plugin, plugins: Iterable[Plugin]) -> list[str]:
    """Return the sentences that refuse other plugins beside `plugin`, if it declares ``isolates``."""
    if not plugin.isolates:
        return []
    problems = []
    others = [p for p in plugins if p is not plugin]
    for other in others:
        if other.isolates:
            if plugin.name < other.name:  # one sentence for both
                problems.append(
                    f"`{plugin.name}` and `{other.name}` each decide what of the network a task may use; leave out one "
                    "of them."
                )
        elif not other.observer and set(ACTING) & set(hooks_of(type(other))):
            problems.append(
                f"`{other.name}` has nothing to do beside `{plugin.name}`, where nothing that was learned can change; "
                "leave out one of them."
            )
    return problems


def owner_problems(plugins: Iterable[Plugin], hook: str, also: Plugin | None = None) -> list[str]:
    """Return the sentence that refuses several owners of `hook`; an empty list for one owner or none.

    `also` is one of them that answers it in this run, whatever its ``owns`` says without knowing the run.
    """
    found = [f"`{p.name}`" for p in owners(plugins, hook, also)]
    if len(found) < 2:
        return []
    return [f"`{hook}` is answered by {_and(found)}; a run can have only one of them."]


def owners(plugins: Iterable[Plugin], hook: str, also: Plugin | None = None) -> list[Plugin]:
    """Return those of `plugins` that answer `hook`; `also` as `owner_problems` has it."""
    return [p for p in plugins if p is also or (_owns(type(p), hook) and p.owns(hook))]


def callers(made: pluggy.PluginManager) -> Hooks:
    """Return the hooks of `made`, to be called by name; a hook without implementations costs nothing."""
    calls: dict[str, Callable[..., Any]] = {}
    for hook in HOOKS:
        calls[hook] = relay = getattr(made.hook, hook)
        if not relay.get_hookimpls():
            calls[hook] = partial(_unanswered, None if relay.spec.opts["firstresult"] else ())
    return cast(Hooks, SimpleNamespace(**calls))


def callers_one_by_one(
    made: pluggy.PluginManager, plugins: Sequence[Plugin], hook: str
) -> list[tuple[str, pluggy.HookCaller]]:
    """Return, for each of `plugins` that answers `hook`, its name and what calls its hook alone."""
    found = []
    for plugin in plugins:
        others = [other for other in plugins if other is not plugin]
        alone = made.subset_hook_caller(hook, others)
        if alone.get_hookimpls():
            found.append((plugin.name, alone))
    return found


def _unanswered(answer: object, **arguments: object) -> object:
    return answer


def _and(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1]
