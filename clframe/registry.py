"""Names to plugins, scenarios and backbones by entry points, and all refusals on the way.

Built-ins and third parties come by the same path. Only what is named is imported; listing imports nothing."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from clframe.contract import _problems_of
from clframe.errors import ClframeError, RunError, UsageError, did_you_mean
from clframe.renamed import MODULES, now_called

if TYPE_CHECKING:
    from torch import nn

    from clframe.data.scenario import Scenario
    from clframe.plugin import Plugin
    from clframe.settings import Component, RunSettings


Kind = Literal["plugin", "scenario", "model"]
GROUPS: dict[Kind, str] = {
    "plugin": "clframe.plugins",
    "scenario": "clframe.scenarios",
    "model": "clframe.backbones",
}
RESERVED = ("train", "scenario", "model", "run")  # what `--set` uses itself
SUPPLIED = ("data_root", "input_shape", "variant")  # a builder's parameters that are not options


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
        """Return the first paragraph of the docstring, read from the source; else the package's summary.

        For an object that a call builds, such as ``name = factory(..., description="...")``, that text stands in for
        the docstring.
        """
        try:
            tree = ast.parse(_source(self.entry.module))
        except (OSError, SyntaxError, ValueError, RecursionError):
            return self.summary
        kinds = (ast.ClassDef, ast.FunctionDef)
        for node in tree.body:
            if isinstance(node, kinds) and node.name == self.entry.attr:
                doc = ast.get_docstring(node)
            else:
                doc = _described_call(node, self.entry.attr)
            if doc:
                return " ".join(doc.split("\n\n")[0].split())
        return self.summary

    def load(self) -> Any:
        """Import and return the object itself. Raises `UsageError` if it cannot be imported."""
        try:
            return self.entry.load()
        except (Exception, SystemExit) as error:  # a broken package may raise anything
            missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
            moved = f"; {now_called(missing, MODULES[missing]).rstrip('.')}" if missing in MODULES else ""
            raise UsageError(
                f"The {self.kind} `{self.name}` of package `{self.package}` cannot be imported "
                f"({type(error).__name__}: {error}{moved}); repair or uninstall `{self.package}`."
            ) from error


def offers(kind: Kind) -> tuple[Offer, ...]:
    """Return everything that installed packages offer of this kind, sorted by name."""
    return _offers(kind, tuple(sys.path))


@lru_cache(maxsize=8)
def _offers(kind: Kind, path: tuple[str, ...]) -> tuple[Offer, ...]:
    """Return the offers on this path; cached, as reading all metadata takes milliseconds and a run asks often."""
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
    """Return the names of this kind."""
    return list(dict.fromkeys(offer.name for offer in offers(kind)))


def find(kind: Kind, name: str) -> tuple[Offer, str | None]:
    """Return the offer under `name`, which may be of the form ``name:variant``, and the variant.

    Raises:
        UsageError: if nothing is offered under that name, or two packages offer it, or the name is reserved.
    """
    base, _, variant = name.partition(":")
    known = offers(kind)
    found = [offer for offer in known if offer.name == base]
    if kind == "plugin" and base in RESERVED:
        raise UsageError(
            f"A plugin cannot be called `{base}`, as `--set {base}.x=...` means something else: give it another name."
        )
    if not found:
        raise UsageError(_not_found(kind, base, [offer.name for offer in known]))
    if len({offer.package for offer in found}) < len(found):
        values = " and ".join(f"`{offer.entry.value}`" for offer in found)
        raise UsageError(f"The package `{found[0].package}` offers the {kind} `{base}` twice, as {values}; repair it.")
    if len(found) > 1:
        packages = " and ".join(f"`{offer.package}`" for offer in found)
        raise UsageError(f"The {kind} `{base}` is offered by the packages {packages}; uninstall one of them.")
    return found[0], variant or None


def plugin_class(name: str) -> type[Plugin]:
    """Return the class of the plugin `name`, checked; that of the variant, if there is one. Raises `UsageError`."""
    from clframe.plugin import Plugin

    offer, variant = find("plugin", name)
    found = offer.load()
    of = f"The plugin `{offer.name}` of package `{offer.package}`"
    if not (inspect.isclass(found) and issubclass(found, Plugin)):
        raise UsageError(
            f"{of} is {found!r}, which is not a class that derives from `clframe.Plugin`: correct its entry point."
        )
    own = vars(found).get("name")
    if own and own != offer.name:
        raise UsageError(f"{of} calls itself `{own}` in its class; the two names must be the same.")
    found.name = offer.name
    if problems := _problems_of(found):
        raise UsageError(*problems)
    return found.of_variant(variant) if found.variants and variant else found


def build_plugin(name: str, options: Mapping[str, object]) -> Plugin:
    """Build a plugin with these options. Raises `UsageError`."""
    from clframe.options import validated

    offer, variant = find("plugin", name)
    found = plugin_class(name)
    if found.variants:
        raise UsageError(
            f"The plugin `{name}` needs a variant: write `{name}:VARIANT`, one of {', '.join(found.variants)}."
        )
    # by parameter name: what is `lambda` outside is `lambda_` in the constructor
    given = validated(found, options, found.name, skip=("variant",), owner=f"the plugin `{name}`")
    with _blamed_on(offer):
        chosen = {} if variant and found.name == name else _with_variant(offer, found, variant)
        built: Plugin = found.from_validated({**chosen, **given})
        return built


def builder(kind: Literal["scenario", "model"], name: str) -> Callable[..., Any]:
    """Return the function that builds the scenario, or the backbone, `name`. Raises `UsageError`."""
    offer, variant = find(kind, name)
    found = offer.load()
    if not callable(found):
        raise UsageError(
            f"The {kind} `{offer.name}` of package `{offer.package}` is {found!r}, which cannot be called: "
            "correct its entry point."
        )
    _with_variant(offer, found, variant)
    return cast(Callable[..., Any], found)


def suited(build: Callable[..., Any] | None, name: str) -> tuple[Any, dict[str, Any]]:
    """Return the backbone and the training settings that suit the scenario `name`, which `build` builds."""
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


def arguments_of(kind: Literal["scenario", "model"], component: Component) -> dict[str, Any]:
    """Return all options of the scenario or model, validated, by the parameter names of its `builder`.

    Raises:
        UsageError: with one sentence for each mistake.
    """
    from clframe.options import validated

    build = builder(kind, component.name)
    return validated(build, component.options, kind, skip=SUPPLIED, owner=f"the {kind} `{component.name}`")


def build_scenario(component: Component, run: RunSettings) -> Scenario:
    """Build the scenario that `component` names, with its options.

    Its parameters `data_root`, and `seed` where that is None, are filled with the run's.

    Raises:
        UsageError: if a name or an option is wrong.
        DataError: if its data is missing or damaged, or differ from what the split's file that it comes from says.
    """
    from clframe.data import split_file
    from clframe.data.scenario import Scenario
    from clframe.settings import data_root

    offer, variant = find("scenario", component.name)
    build = builder("scenario", component.name)
    options = arguments_of("scenario", component)
    if "data_root" in inspect.signature(build).parameters:
        options["data_root"] = data_root(run.data_root)
    if "seed" in options and options["seed"] is None:
        options["seed"] = run.seed
    with _blamed_on(offer):
        built = build(**_with_variant(offer, build, variant), **options)
    if not isinstance(built, Scenario):
        raise UsageError(
            f"The scenario `{offer.name}` of package `{offer.package}` built {built!r}, not a `Scenario`: let its "
            "function return one."
        )
    if component.pinned is not None:
        split_file.check(built, component.pinned)
    return built


def build_backbone(component: Component, input_shape: Sequence[int]) -> nn.Module:
    """Build the backbone that `component` names, with its options, for images of `input_shape`. Raises `UsageError`."""
    offer, variant = find("model", component.name)
    build = builder("model", component.name)
    options = arguments_of("model", component)
    with _blamed_on(offer):
        built: nn.Module = build(tuple(input_shape), **_with_variant(offer, build, variant), **options)
    return built


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
    """Return the source text of a module, which need not be importable. Raises `OSError`."""
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


def _described_call(node: ast.stmt, name: str) -> str | None:
    """Return the text TEXT of a statement ``name = factory(..., description=TEXT)``; None of any other."""
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
        return None
    if not any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
        return None
    texts = [keyword.value for keyword in node.value.keywords if keyword.arg == "description"]
    return next((str(t.value) for t in texts if isinstance(t, ast.Constant)), None)


def _with_variant(offer: Offer, factory: Callable[..., Any], variant: str | None) -> dict[str, str]:
    """Return the argument that passes the variant on; refuse a variant too many, or a missing one."""
    signature = inspect.signature(factory.__init__ if inspect.isclass(factory) else factory)
    parameter = signature.parameters.get("variant")
    if variant is None:
        if parameter is not None and parameter.default is parameter.empty:
            raise UsageError(f"The {offer.kind} `{offer.name}` needs a variant: write `{offer.name}:VARIANT`.")
        return {}
    if parameter is None:
        raise UsageError(f"The {offer.kind} `{offer.name}` has no variants: leave out `:{variant}`.")
    return {"variant": variant}


@contextmanager
def _blamed_on(offer: Offer) -> Iterator[None]:
    """Turn an exception in the code of a third party into a failure of that package."""
    try:
        yield
    except (ClframeError, OSError, MemoryError):
        raise
    except Exception as error:
        if offer.package == "clframe":
            raise
        what = f"The {offer.kind} `{offer.name}` of package `{offer.package}`"
        raise RunError(f"{what} failed: {type(error).__name__}: {error}") from error
