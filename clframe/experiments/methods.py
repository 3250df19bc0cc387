"""Methods of a study: in a study file, in flags, in a file of `clframe tune`, and the variants of a grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clframe.errors import UsageError
from clframe.experiments.outcome import FINE_TUNING
from clframe.experiments.values import Options, find_unknown, read_file, read_list, show_value
from clframe.system.reading import expand_home, quote_path
from clframe.system.texts import cut, quote

KEYS = ("plugins", "name", "model", "train", "run", "grid", "tuned")


@dataclass(frozen=True)
class Method:
    """A method of a study.

    Attributes:
        name: its label.
        plugins: names to options, in calling order.
        train: settings of the training that are this method's own.
        tuned: how its options were chosen: protocol, trials, seeds and data; None if they were not tuned.
        run: settings of the run that are this method's own, such as what single experiences have of their own.
        scenarios: labels of the scenarios that it learns; None: all of the study.
        model: options of the backbone that are this method's own, or with a ``name`` its own backbone.
    """

    name: str
    plugins: Mapping[str, Options] = field(default_factory=dict)
    train: Options = field(default_factory=dict)
    tuned: Options | None = None
    run: Options = field(default_factory=dict)
    scenarios: tuple[str, ...] | None = None
    model: Options = field(default_factory=dict)

    def written(self) -> Any:
        """Return the method as a study file holds it."""
        plain = FINE_TUNING if not self.plugins else "+".join(self.plugins)
        parts: dict[str, Any] = {"model": self.model, "train": self.train, "run": self.run, "tuned": self.tuned}
        if self.name == plain and not any(self.plugins.values()) and not any(parts.values()):
            return self.name
        parts = {"name": self.name, "plugins": self.plugins, **parts}
        return {key: value for key, value in parts.items() if value or key == "plugins"}


def read_methods(given: Any, key: str) -> tuple[Method, ...]:
    """Return the methods in the list `given`, each variant of a grid as one. Raises `UsageError`."""
    return tuple(method for item in read_list(given, key) for method in _read_method(item))


def _read_tuned_method(path: Path) -> Method:
    """Return the method in a file that `clframe tune` wrote. Raises `UsageError` if it is not such a file."""
    data = read_file(path, "method")
    stamp = (
        data.get("run", {}).get("tuned") if isinstance(data, Mapping) and isinstance(data.get("run"), Mapping) else 0
    )
    if not isinstance(data, Mapping) or not isinstance(stamp, Mapping) or not isinstance(data.get("plugins"), Mapping):
        raise UsageError(f"The method {quote_path(path)} is not a file that `clframe tune` wrote: name a plugin.")
    run = {key: value for key, value in data["run"].items() if key != "tuned"}
    name = str(stamp.get("method", path.stem))
    return Method(name, dict(data["plugins"]), dict(data.get("train") or {}), dict(stamp), run)


def _read_method(given: Any) -> list[Method]:
    """Return the method that an entry of a study file names, or its variants, one for each point of its grid.

    A name with the end of a YAML file is one that `clframe tune` wrote.
    """
    if isinstance(given, str) and given.strip().endswith((".yaml", ".yml")):
        return [_read_tuned_method(expand_home(given.strip()))]
    if isinstance(given, str):
        return [Method(given.strip(), {name: {} for name in split_method(given)})]
    if not isinstance(given, Mapping):
        raise UsageError(f"`methods` has {quote(given)}; it must hold names such as `er+lwf`, or mappings.")
    problems = find_unknown(given, KEYS, "a method of a study")
    plugins: dict[str, Options] = {}
    named = given.get("plugins") or ()
    for item in [named] if isinstance(named, str | Mapping) else named:
        for name, options in item.items() if isinstance(item, Mapping) else [(item, {})]:
            if not isinstance(name, str) or not isinstance(options or {}, Mapping):
                problems.append(f"`plugins` of a method has {quote(item)}; it must hold names, or names with options.")
            else:
                plugins |= {part: dict(options or {}) for part in split_method(name)}
    name = given.get("name", "+".join(plugins) or FINE_TUNING)
    if not isinstance(name, str) or not name.strip():
        problems.append(f"`name` of a method is {quote(name)}; it must be a text.")
    train, grid, tuned = given.get("train") or {}, given.get("grid") or {}, given.get("tuned")
    run, model = given.get("run") or {}, given.get("model") or {}
    model = {"name": model} if isinstance(model, str) else model
    for key, value in (("model", model), ("train", train), ("run", run), ("grid", grid), ("tuned", tuned or {})):
        if not isinstance(value, Mapping):
            kinds = "a name or a mapping" if key == "model" else "a mapping"
            problems.append(f"`{key}` of the method `{name}` is {quote(value)}; it must be {kinds}.")
    if not problems and grid:
        problems += _grid_problems(grid, name, plugins)
    if problems:
        raise UsageError(*problems)
    method = Method(name, plugins, dict(train), tuned, dict(run), model=dict(model))
    return list(_variants(method, grid)) if grid else [method]


def split_method(text: str) -> list[str]:
    """Return the plugins of a method in flags: ``er+lwf`` has two, ``fine-tuning`` has none. Raises `UsageError`."""
    names = [part.strip() for part in text.split("+")]
    if names == [FINE_TUNING]:
        return []
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(*(f"The method `{text}` has the plugin `{name}` twice; name it once." for name in twice))
    if not all(names):
        raise UsageError(f"The method `{cut(text)}` is not of the form `A+B`, such as `er+lwf`.")
    return names


def _grid_problems(grid: Options, name: str, plugins: Mapping[str, Options]) -> list[str]:
    problems = []
    for target, values in grid.items():
        section, dot, option = target.partition(".")
        if not (dot and section in (*plugins, "train") and option):
            choices = ", ".join(f"`{plugin}.OPTION`" for plugin in (*plugins, "train"))
            problems.append(f"The grid of the method `{name}` is over `{cut(target)}`; it can be over {choices}.")
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            problems.append(f"The grid of the method `{name}` has {quote(values)} for `{target}`; it must be a list.")
        elif len({repr(value) for value in values}) < len(values):
            problems.append(f"The grid of the method `{name}` has a value of `{target}` twice; name it once.")
    return problems


def _variants(method: Method, grid: Options) -> Iterator[Method]:
    """Yield the variants of `method`, one for each combination of the values of `grid`, named by these values."""
    shorts = [target.partition(".")[2] for target in grid]
    labels = [short if shorts.count(short) == 1 else target for short, target in zip(shorts, grid, strict=True)]
    for values in itertools.product(*grid.values()):
        plugins = {name: dict(options) for name, options in method.plugins.items()}
        train = dict(method.train)
        for target, value in zip(grid, values, strict=True):
            section, _, option = target.partition(".")
            (train if section == "train" else plugins[section])[option] = value
        named = ",".join(f"{label}={show_value(value)}" for label, value in zip(labels, values, strict=True))
        yield replace(method, name=f"{method.name}[{named}]", plugins=plugins, train=train)
