"""Names to plugins, scenarios and backbones by entry points, and all refusals on the way.

Built-ins and third parties come by the same path. Only what is named is imported; listing imports nothing.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import pluggy

from clframe.errors import ClframeError, RunFailed, WrongUse, did_you_mean
from clframe.hooks import HOOK_API, HOOKS, Hooks

if TYPE_CHECKING:
    from torch import nn

    from clframe.config import RunSettings
    from clframe.data import Scenario
    from clframe.plugin import Plugin

Kind = Literal["plugin", "scenario", "model"]
GROUPS: dict[Kind, str] = {
    "plugin": "clframe.plugins",
    "scenario": "clframe.scenarios",
    "model": "clframe.backbones",
}
RESERVED = ("train", "scenario", "model", "run")  # what `--set` uses itself
OWNED = ("base_loss", "predictor")  # hooks that a run has one owner of at most
ACTING = (  # hooks by which a plugin changes what is learnt
    "grow",
    "before_experience",
    "extra_data",
    "extra_batch",
    "base_loss",
    "penalty",
    "after_backward",
    "after_step",
    "predictor",
)
SUPPLIED = ("data_root", "input_shape", "variant")  # a builder's parameters that are no options


@dataclass(frozen=True)
class Offer:
    """A name that an installed package offers; nothing of the package is imported yet."""

    kind: Kind
    name: str
    package: str
    version: str
    summary: str
    entry: EntryPoint

    @property
    def description(self) -> str:
        """The first paragraph of the docstring, read from the source; else the package's summary."""
        try:
            tree = ast.parse(_source(self.entry.module))
        except (OSError, SyntaxError, ValueError, RecursionError):
            return self.summary
        kinds = (ast.ClassDef, ast.FunctionDef)
        for node in tree.body:
            if isinstance(node, kinds) and node.name == self.entry.attr and (doc := ast.get_docstring(node)):
                return " ".join(doc.split("\n\n")[0].split())
        return self.summary

    def load(self) -> Any:
        """The object itself. Raises `WrongUse` if it cannot be imported."""
        try:
            return self.entry.load()
        except (Exception, SystemExit) as error:  # a broken package may raise anything
            raise WrongUse(
                f"The {self.kind} `{self.name}` of package `{self.package}` cannot be imported "
                f"({type(error).__name__}: {error}); repair or uninstall `{self.package}`."
            ) from error


def offers(kind: Kind) -> tuple[Offer, ...]:
    """All that installed packages offer of this kind, by name."""
    return _offers(kind, tuple(sys.path))


@lru_cache(maxsize=8)
def _offers(kind: Kind, path: tuple[str, ...]) -> tuple[Offer, ...]:
    """What is offered on this path: reading all metadata takes milliseconds, and a run asks many times."""
    group = GROUPS[kind]
    found: dict[tuple[str, str], list[Offer]] = {}
    for distribution in distributions(path=list(path)):
        try:
            entries = [entry for entry in distribution.entry_points if entry.group == group]
            offered = [_offer(kind, entry, distribution) for entry in entries]
        except Exception:  # metadata that cannot be read must not hide the other packages
            continue
        # the first on the path is the one that Python imports; a second copy of it is out of sight
        seen = set(found)
        for offer in offered:
            key = (offer.package.lower().replace("_", "-"), offer.name)
            if key not in seen:
                found.setdefault(key, []).append(offer)
    return tuple(sorted((o for same in found.values() for o in same), key=lambda offer: (offer.name, offer.package)))


def names(kind: Kind) -> list[str]:
    """The names of this kind."""
    return list(dict.fromkeys(offer.name for offer in offers(kind)))


def find(kind: Kind, name: str) -> tuple[Offer, str | None]:
    """What is offered under `name`, which may be of the form ``name:variant``, and the variant.

    Raises:
        WrongUse: if nothing is offered under that name, or two packages offer it, or the name is reserved.
    """
    base, _, variant = name.partition(":")
    known = offers(kind)
    found = [offer for offer in known if offer.name == base]
    if kind == "plugin" and base in RESERVED:
        raise WrongUse(f"A plugin cannot be called `{base}`: `--set {base}.x=...` means something else.")
    if not found:
        raise WrongUse(_not_found(kind, base, [offer.name for offer in known]))
    if len({offer.package for offer in found}) < len(found):
        values = " and ".join(f"`{offer.entry.value}`" for offer in found)
        raise WrongUse(f"The package `{found[0].package}` offers the {kind} `{base}` twice, as {values}; repair it.")
    if len(found) > 1:
        packages = " and ".join(f"`{offer.package}`" for offer in found)
        raise WrongUse(f"The {kind} `{base}` is offered by the packages {packages}; uninstall one of them.")
    return found[0], variant or None


def plugin_class(name: str) -> type[Plugin]:
    """The class of the plugin `name`, checked; that of the variant, where `name` has one. Raises `WrongUse`."""
    from clframe.plugin import Plugin

    offer, variant = find("plugin", name)
    found = offer.load()
    of = f"The plugin `{offer.name}` of package `{offer.package}`"
    if not (inspect.isclass(found) and issubclass(found, Plugin)):
        raise WrongUse(f"{of} is {found!r}, which is not a class that derives from `clframe.Plugin`.")
    own = vars(found).get("name")
    if own and own != offer.name:
        raise WrongUse(f"{of} calls itself `{own}` in its class; the two names must be the same.")
    found.name = offer.name
    if problems := _problems_of(found):
        raise WrongUse(*problems)
    return found.of_variant(variant) if found.variants and variant else found


def build_plugin(name: str, options: Mapping[str, object]) -> Plugin:
    """A new plugin with these options. Raises `WrongUse`."""
    from clframe.options import validated

    offer, variant = find("plugin", name)
    found = plugin_class(name)
    if found.variants:
        raise WrongUse(
            f"The plugin `{name}` needs a variant: write `{name}:VARIANT`, one of {', '.join(found.variants)}."
        )
    # by parameter name: what is `lambda` outside is `lambda_` in the constructor
    given = validated(found, options, found.name, skip=("variant",), owner=f"the plugin `{name}`")
    with _blamed_on(offer):
        return found(**({} if variant and found.name == name else _with_variant(offer, found, variant)), **given)


def builder(kind: Literal["scenario", "model"], name: str) -> Callable[..., Any]:
    """The function that builds the scenario, or the backbone, `name`. Raises `WrongUse`."""
    offer, variant = find(kind, name)
    found = offer.load()
    if not callable(found):
        raise WrongUse(f"The {kind} `{offer.name}` of package `{offer.package}` is {found!r}, which cannot be called.")
    _with_variant(offer, found, variant)
    return cast(Callable[..., Any], found)


def suited(build: Callable[..., Any] | None, name: str) -> tuple[Any, dict[str, Any]]:
    """The backbone and the training settings that suit the scenario `name`, which `build` builds."""
    of_variant = getattr(build, "variants", {}).get(name.partition(":")[2])
    if of_variant:
        return of_variant["backbone"], dict(of_variant["train"])
    return getattr(build, "backbone", None), dict(getattr(build, "train", {}))


def suited_train(plugins: Iterable[str | Plugin]) -> dict[str, Any]:
    """Return the training settings that suit `plugins`, by name or built; where they differ, the first named decides.

    Names of plugins that cannot be found, which are reported elsewhere, have none.
    """
    settings: dict[str, Any] = {}
    for plugin in reversed(list(plugins)):
        with suppress(ClframeError):
            cls = plugin_class(plugin.partition(":")[0]) if isinstance(plugin, str) else type(plugin)
            settings |= cls.suited_train
    return settings


def build_scenario(spec: Mapping[str, Any], run: RunSettings) -> Scenario:
    """The scenario `spec` (its ``name`` and options).

    Its parameters `data_root`, and `seed` where that is None, are filled with the run's.

    Raises:
        WrongUse: if a name or an option is wrong.
        DataError: if its data is missing or damaged, or differ from what the split's file that it comes from says.
    """
    from clframe import splits
    from clframe.config import data_root
    from clframe.data import Scenario

    spec = dict(spec)
    pinned = spec.pop(splits.PINNED, None)
    offer, variant = find("scenario", spec["name"])
    build = builder("scenario", spec["name"])
    options = _options(build, spec, "scenario", f"the scenario `{spec['name']}`")
    if "data_root" in inspect.signature(build).parameters:
        options["data_root"] = data_root(run.data_root)
    if "seed" in options and options["seed"] is None:
        options["seed"] = run.seed
    with _blamed_on(offer):
        built = build(**_with_variant(offer, build, variant), **options)
    if not isinstance(built, Scenario):
        raise WrongUse(f"The scenario `{offer.name}` of package `{offer.package}` built {built!r}, not a `Scenario`.")
    if pinned is not None:
        splits.check(built, pinned)
    return built


def build_backbone(spec: Mapping[str, Any], input_shape: Sequence[int]) -> nn.Module:
    """A new backbone `spec` (its ``name`` and options) for images of `input_shape`. Raises `WrongUse`."""
    offer, variant = find("model", spec["name"])
    build = builder("model", spec["name"])
    options = _options(build, spec, "model", f"the model `{spec['name']}`")
    with _blamed_on(offer):
        built: nn.Module = build(tuple(input_shape), **_with_variant(offer, build, variant), **options)
    return built


def manager(plugins: Sequence[Plugin]) -> pluggy.PluginManager:
    """A manager of these plugins alone, which are called in the order of naming.

    Raises:
        WrongUse: with one sentence for each reason why they cannot run, or cannot run together.
    """
    from clframe.plugin import Plugin

    problems = []
    built: dict[str, Plugin] = {}
    for plugin in plugins:
        if inspect.isclass(plugin):
            problems.append(f"`{plugin.__name__}` is a class; give a plugin built from it: `{plugin.__name__}()`.")
            continue
        if not isinstance(plugin, Plugin):
            problems.append(f"{plugin!r} is not a plugin: its class does not derive from `clframe.Plugin`.")
            continue
        cls = type(plugin)
        cls.name = cls.name or cls.__name__
        if cls.name in built:
            problems.append(f"The plugin `{cls.name}` is in the run twice; name it once.")
            continue
        if cls.name in RESERVED:
            problems.append(f"A plugin cannot be called `{cls.name}`: `--set {cls.name}.x=...` means something else.")
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
        raise WrongUse(*problems)
    made = _Manager("clframe")
    made.add_hookspecs(Hooks)
    try:
        for name, plugin in reversed(built.items()):  # pluggy calls the last one first
            made.register(plugin, name)
        made.check_pending()
    except pluggy.PluginValidationError as error:
        raise WrongUse(f"A plugin does not fit the hooks: {error}") from error
    return made


class _Manager(pluggy.PluginManager):
    """A manager that looks for hooks only among what a plugin's class adds to `Plugin`: a third of the time."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        from clframe.plugin import Plugin

        return None if hasattr(Plugin, name) else super().parse_hookimpl_opts(plugin, name)


def isolation_problems(plugin: Plugin, plugins: Iterable[Plugin]) -> list[str]:
    """The sentences that refuse others of `plugins` beside `plugin`, if it is one that ``isolates``."""
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
                f"`{other.name}` has nothing to do beside `{plugin.name}`, where nothing that was learnt can change; "
                "leave out one of them."
            )
    return problems


def owner_problems(plugins: Iterable[Plugin], hook: str, also: Plugin | None = None) -> list[str]:
    """The sentence that refuses several of `plugins` that answer `hook`, of which a run has one owner at most.

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
    """The hooks of `made`, to call by their names; one that no plugin answers costs nothing, as in most steps."""
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


def hooks_of(cls: type) -> list[str]:
    """The hooks that a plugin's class implements, in the order in which the engine calls them."""
    implemented = {hook for _, hook, mark in _methods(cls) if mark is not None}
    return [hook for hook in HOOKS if hook in implemented]


def _offer(kind: Kind, entry: EntryPoint, distribution: Distribution) -> Offer:
    about = distribution.metadata
    summary = (about.get_all("Summary") or [""])[0]
    return Offer(kind, entry.name, about["Name"], distribution.version, summary, entry)


def _not_found(kind: Kind, name: str, known: list[str]) -> str:
    sentence = f"There is no {kind} `{name}`."
    if kind == "plugin" and (file := _plugin_file(name)):
        return f"{sentence} {file} exists but is not registered: reinstall with `pip install -e .`"
    return sentence + did_you_mean(name, known)


def _plugin_file(name: str) -> Path | None:
    stem = name.replace("-", "_")
    folders = [Path(folder) for folder in importlib.import_module("clframe.plugins").__path__]
    files = [folder / f"{stem}.py" for folder in folders if stem.isidentifier()]
    return next((file for file in files if file.is_file()), None)


def _source(module: str) -> str:
    """The source text of a module that need not be imported, nor be importable. Raises `OSError`."""
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        # importlib.util.find_spec would import the parents, which may be slow or broken
        spec = None
        for finder in sys.meta_path:
            search = getattr(finder, "find_spec", None)
            if search and (spec := search(".".join(parts[:depth]), path)):
                break
        if spec is None:
            raise FileNotFoundError(module)
        path = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else []
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise FileNotFoundError(module)
    return Path(spec.origin).read_text(encoding="utf-8")


def _with_variant(offer: Offer, factory: Callable[..., Any], variant: str | None) -> dict[str, str]:
    """The argument that passes the variant on; refused if there is one too many, or one is missing."""
    signature = inspect.signature(factory.__init__ if inspect.isclass(factory) else factory)
    parameter = signature.parameters.get("variant")
    if variant is None:
        if parameter is not None and parameter.default is parameter.empty:
            raise WrongUse(f"The {offer.kind} `{offer.name}` needs a variant: write `{offer.name}:VARIANT`.")
        return {}
    if parameter is None:
        raise WrongUse(f"The {offer.kind} `{offer.name}` has no variants: leave out `:{variant}`.")
    return {"variant": variant}


def _options(factory: Callable[..., Any], spec: Mapping[str, Any], where: str, owner: str) -> dict[str, Any]:
    from clframe.options import validated

    given = {name: value for name, value in spec.items() if name != "name"}
    return validated(factory, given, where, skip=SUPPLIED, owner=owner)


@contextmanager
def _blamed_on(offer: Offer) -> Iterator[None]:
    """An exception in a third party's code is that package's failure, not a bug of clframe."""
    try:
        yield
    except (ClframeError, OSError, MemoryError):
        raise
    except Exception as error:
        if offer.package == "clframe":
            raise
        what = f"The {offer.kind} `{offer.name}` of package `{offer.package}`"
        raise RunFailed(f"{what} failed: {type(error).__name__}: {error}") from error


def _methods(cls: type) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """For each callable that a plugin's class adds: its name, the hook it stands for, its mark or None."""
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
    """Return the names of what `hook` gives to a plugin."""
    return list(inspect.signature(getattr(Hooks, hook)).parameters)[1:]


def _problems_of(cls: type[Plugin]) -> list[str]:
    """One sentence for each thing in a plugin's class that would not do what its author means."""
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
                problems.append(f"{method} gives its argument `{parameter.name}` a default; hooks have none.")
    for attribute in ("state", "predictor_state", "settings", "conflicts"):
        if isinstance(getattr(cls, attribute), str):
            problems.append(f"`{attribute}` of plugin `{cls.name}` is a text; it must be a tuple of names.")
    return problems


def _and(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1]
