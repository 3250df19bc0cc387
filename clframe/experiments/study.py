"""Studies: what is to be compared, in a file or in flags, and the configuration of each run that it asks for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe import registry
from clframe.errors import DataError, UsageError, did_you_mean
from clframe.experiments.budget import read_budget
from clframe.experiments.outcome import FINE_TUNING, JOINT
from clframe.strict_yaml import dump_yaml, parse_yaml
from clframe.system.reading import Unreadable, expand_home, quote_path, read_bytes
from clframe.system.texts import cut, quote

if TYPE_CHECKING:
    from clframe.settings import Config

STUDY = "study.yaml"  # the file of a study in its folder
LARGEST_FILE = 1_000_000  # bytes of it
BASELINES = (FINE_TUNING, JOINT)
DEFAULT_SEEDS = 5
MOST_SEEDS = 10_000
MOST_CELLS = 100_000
SAMPLINGS = ("random", "extreme")
METHOD_KEYS = ("plugins", "name", "model", "train", "run", "grid", "tuned")
TUNING_KEYS = ("protocols", "trials", "seeds")
NOT_OF_A_STUDY = {  # settings that a study has a place of its own for
    "run.seed": "`seeds` (`--seeds`) has the seeds",
    "run.output": "each cell has a folder in that of the study",
}
Options = Mapping[str, Any]


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


@dataclass(frozen=True)
class Study:
    """What is to be compared: scenarios x methods x class orders x seeds.

    Attributes:
        scenarios: each with its ``name`` and options.
        methods: without the baselines.
        model: name, or ``name`` and options, of the backbone; None: the one that suits the scenario.
        seeds: of the runs.
        orders: number of class orders; None: each scenario's own.
        order_sampling: `random`, or `extreme`: a third of the orders each with the most and the least similar
            neighbors, and a third random.
        baselines: whether plain fine-tuning and joint training are among the methods.
        train: settings of the training (``train.*``) of all cells.
        run: settings of the run (``run.*``) of all cells.
        set: further settings by full name, such as ``er.size``, which are those of every method with that plugin.
        search: ranges in which options are searched, by full name, beside those that options declare.
        tuning: how methods are tuned before they are compared: `protocols`, `trials` and `seeds`; empty: they are not.
        budget: limits that every method keeps to, by kind: `bytes`, `steps` or `macs`.
    """

    scenarios: tuple[Options, ...]
    methods: tuple[Method, ...] = ()
    model: Any = None
    seeds: tuple[int, ...] = tuple(range(DEFAULT_SEEDS))
    orders: int | None = None
    order_sampling: str = "random"
    baselines: bool = True
    train: Options = field(default_factory=dict)
    run: Options = field(default_factory=dict)
    set: Options = field(default_factory=dict)
    search: Options = field(default_factory=dict)
    tuning: Options = field(default_factory=dict)
    budget: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Study:
        """Read the study in `folder`. Raises `DataError` if there is none, `UsageError` for mistakes in its file."""
        if not (folder / STUDY).is_file():
            raise DataError(f"{quote_path(folder)} is not the folder of a study, as it has no {STUDY}: name another.")
        return cls.from_yaml(folder / STUDY)

    @classmethod
    def from_yaml(cls, path: Path) -> Study:
        """Read the study in the file `path`.

        Raises:
            UsageError: with one sentence for each mistake.
        """
        return cls.from_data(_read_file(expand_home(path), "study"), f"{path}: ")

    @classmethod
    def from_data(cls, data: Any, where: str = "") -> Study:
        """Return the study that `data`, the content of a study file, asks for; `where` begins each sentence of errors.

        Raises:
            UsageError: with one sentence for each mistake.
        """
        return cls(scenarios=()).extended(data, where)

    def extended(self, data: Any, where: str = "") -> Study:
        """Return this study with what `data`, in the form of a study file, adds to it.

        Scenarios, methods and seeds are added, settings of the same name replaced.

        Raises:
            UsageError: with one sentence for each mistake.
        """
        if not isinstance(data, Mapping):
            raise UsageError(f"{where}a study is a mapping with some of {', '.join(KEYS)}; this is {quote(data)}.")
        problems = _unknown_keys(data, KEYS, "a study")
        found: dict[str, Any] = {}
        for key, read in KEYS.items():
            if data.get(key) is None:
                continue
            try:
                found[key] = read(data[key], key)
            except UsageError as error:
                problems += error.problems
        if not problems:
            if not self.scenarios and not found.get("scenarios"):
                problems.append("a study needs a scenario: name one under `scenarios`, or with `--scenario`.")
            scenarios = [*self.scenarios, *(s for s in found.get("scenarios", ()) if s not in self.scenarios)]
            found["scenarios"] = tuple(scenarios)
            added, clashes = _add_methods(self.methods, found.get("methods", ()))
            problems += clashes
            found["methods"] = added
            if self.scenarios and "seeds" in found:
                found["seeds"] = tuple(dict.fromkeys([*self.seeds, *found["seeds"]]))
            for key in ("train", "run", "set", "search", "tuning", "budget"):
                found[key] = {**getattr(self, key), **found.get(key, {})}
        if problems:
            raise UsageError(*(where + problem for problem in problems))
        return replace(self, **found)

    def written(self) -> dict[str, Any]:
        """Return the study as its file holds it."""
        return {
            "scenarios": [s["name"] if len(s) == 1 else dict(s) for s in self.scenarios],
            "model": self.model,
            "methods": [method.written() for method in self.methods],
            "baselines": self.baselines,
            "seeds": _written_seeds(self.seeds),
            "orders": self.orders,
            "order_sampling": self.order_sampling,
            "train": dict(self.train),
            "run": dict(self.run),
            "set": dict(self.set),
            **({"search": dict(self.search)} if self.search else {}),
            **({"tuning": dict(self.tuning)} if self.tuning else {}),
            **({"budget": dict(self.budget)} if self.budget else {}),
        }

    def write(self, folder: Path) -> None:
        """Write the study to its file in `folder`."""
        from clframe.system.writing import write_text  # here, as that imports torch

        write_text(folder / STUDY, dump_yaml(self.written()))

    def differences(self, other: Study) -> list[str]:
        """Return one phrase for each part in which this study differs from `other`; none if both ask for the same."""
        ours, theirs = self.written(), other.written()
        return [
            f"`{key}` is {cut(quote(ours.get(key)), 100)}, there {cut(quote(theirs.get(key)), 100)}"
            for key in dict.fromkeys([*ours, *theirs])
            if ours.get(key) != theirs.get(key)
        ]

    # ------------------------------------------------------------------------------ what it asks for

    @property
    def all_methods(self) -> tuple[Method, ...]:
        """Return the baselines that are asked for, and the methods; a baseline that is named as a method comes once."""
        given = [
            method.plugins
            for method in self.methods
            if not method.train and not method.model and not any(method.plugins.values())
        ]
        plain = [Method(FINE_TUNING), Method(JOINT, {JOINT: {}})] if self.baselines else []
        return (*(method for method in plain if method.plugins not in given), *self.methods)

    @property
    def scenario_labels(self) -> list[str]:
        """Return a label of each scenario: its name, and the options that tell it from others of that name."""
        labels = []
        for scenario in self.scenarios:
            same = [other for other in self.scenarios if other["name"] == scenario["name"]]
            keys = dict.fromkeys(key for other in same for key in other)
            differing = [key for key in keys if any(other.get(key) != scenario.get(key) for other in same)]
            options = ",".join(f"{key}={_show(scenario[key])}" for key in differing if key in scenario)
            labels.append(f"{scenario['name']}[{options}]" if options else scenario["name"])
        return labels

    @property
    def order_seeds(self) -> list[int | None]:
        """Return the seeds of the class orders; [None] if each scenario has its own order."""
        return [None] if self.orders is None else list(range(self.orders))

    def orders_of(self, scenario: Options) -> list[int | None]:
        """Return the seeds of the class orders of `scenario`; [None] if it has its own order only.

        Raises:
            UsageError: if several orders are asked for, and `scenario` has none to choose from, or names one itself.
        """
        if self.orders is None:
            return [None]
        given = [key for key in ("order", "seed") if key in scenario or f"scenario.{key}" in self.set]
        if given:
            raise UsageError(
                f"`scenario.{given[0]}` of `{scenario['name']}` is what `orders` chooses: leave out one of them."
            )
        if takes_orders(scenario["name"]):
            return list(range(self.orders))
        if self.orders > 1:
            raise UsageError(
                f"The scenario `{scenario['name']}` has no class orders to choose from, and {self.orders} are asked "
                "for: leave out `--orders`, or the scenario."
            )
        return [None]

    def configure(self, scenario: Options, method: Method, order: Options, seed: int) -> Config:
        """Return the resolved configuration of one cell; `order` holds the options of the scenario that set its order.

        Each cell computes on one CPU thread unless the study has `train.threads`, so that figures do not depend on the
        number of workers, and writes no curves for TensorBoard unless it has `run.tensorboard`.

        Raises:
            UsageError: with one sentence for each mistake.
        """
        from clframe.config import resolve

        sets = self.settings_by_section()
        base: dict[str, Any] = {
            "scenario": sets.get("scenario", {}),
            "train": {"threads": 1, **self.train, **sets.get("train", {})},
            "run": {"tensorboard": False, **self.run, **sets.get("run", {})},
        }
        if model := self.model_of(method):
            base["model"] = model
        return resolve(
            scenario={**scenario, **order},
            plugins={name: {**sets.get(name, {}), **options} for name, options in method.plugins.items()},
            base=base,
            train=method.train,
            run={**method.run, "seed": seed, **({"tuned": dict(method.tuned)} if method.tuned else {})},
        )

    def model_of(self, method: Method) -> dict[str, Any]:
        """Return name and options of the backbone that `method` learns with; {} for that of the scenario."""
        if "name" in method.model:
            return dict(method.model)
        model = {"name": self.model} if isinstance(self.model, str) else dict(self.model or {})
        return {**model, **self.settings_by_section().get("model", {}), **method.model}

    def given_to(self, method: Method) -> frozenset[str]:
        """Return the full names of the settings of plugins and training that the study sets itself for `method`."""
        options = [f"{plugin}.{option}" for plugin, given in method.plugins.items() for option in given]
        training = [f"train.{name}" for name in (*self.train, *method.train)]
        return frozenset([*options, *self.set, *training])

    def settings_by_section(self) -> dict[str, dict[str, Any]]:
        """Return what `set` holds by section and option."""
        sections: dict[str, dict[str, Any]] = {}
        for name, value in self.set.items():
            section, _, option = name.partition(".")
            sections.setdefault(section, {})[option] = value
        return sections

    @property
    def device(self) -> Any:
        """Return the device of all cells, as the study names it; None if it does not."""
        return {**self.run, **self.settings_by_section().get("run", {})}.get("device")

    def problems(self) -> list[str]:
        """Return one sentence for each mistake that shows before any configuration is resolved."""
        problems = []
        methods = self.all_methods
        if not methods:
            problems.append("A study needs a method: name one with `--method`, or leave out `--no-baselines`.")
        names = [(method.name, label) for method in methods for label in method.scenarios or self.scenario_labels]
        twice = [name for name, label in dict.fromkeys(names) if names.count((name, label)) > 1]
        problems += [
            f"Two methods of the study are called `{name}`: give one another `name`." for name in dict.fromkeys(twice)
        ]
        plugins = {name for method in methods for name in method.plugins}
        for section in self.settings_by_section():
            if section in registry.RESERVED or section in plugins:
                continue
            if section.partition(":")[0] in registry.names("plugin"):
                problems.append(f"`--set {section}...`: no method of the study has the plugin `{section}`.")
            else:
                guess = did_you_mean(section, [*registry.RESERVED, *plugins])
                problems.append(f"`--set {section}...`: there is no plugin `{section}` in the study.{guess}")
        given = {f"run.{name}" for name in self.run} | set(self.set)
        refused = [name for name in NOT_OF_A_STUDY if name in given]
        problems += [f"`{name}` cannot be set in a study: {NOT_OF_A_STUDY[name]}." for name in refused]
        if {"steps", "macs"} <= set(self.budget):
            problems.append("A budget limits `steps` or `macs`, which both decide `train.iterations`: leave out one.")
        count = len(self.scenarios) * len(methods) * len(self.seeds) * len(self.order_seeds)
        if count > MOST_CELLS:
            problems.append(f"The study asks for {count:,} cells, and {MOST_CELLS:,} are the most that one can have.")
        return problems


def _read_file(path: Path, what: str) -> Any:
    """Return the content of a YAML file, which sentences call `what`. Raises `UsageError` if it cannot be read."""
    try:
        text = read_bytes(path, LARGEST_FILE).decode("utf-8-sig")
    except Unreadable as error:
        raise UsageError(f"The {what} {quote_path(path)} cannot be read: {error.reason}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The {what} {path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    return parse_yaml(text, str(path))


def takes_orders(name: str) -> bool:
    """Return whether the scenario `name` has class orders to draw: options `order` and `seed`. Raises `UsageError`."""
    from clframe.options import options_of

    options = {option.name for option in options_of(registry.builder("scenario", name), skip=registry.SUPPLIED)}
    return {"order", "seed"} <= options


def parse_seeds(text: str) -> list[int]:
    """Return the seeds that `text` names: ``5`` is 0 to 4, ``3-7`` is 3 to 7. Raises `UsageError`."""
    return list(_read_seeds(text, "seeds"))


def _add_methods(old: Sequence[Method], new: Iterable[Method]) -> tuple[tuple[Method, ...], list[str]]:
    """Return the methods `old` and `new`, and one sentence for each of `new` whose name stands for another method."""
    methods = {method.name: method for method in old}
    clashes = []
    for method in new:
        if old and methods.get(method.name, method) != method:
            clashes.append(f"the study has another method `{method.name}`: give this one another `name`.")
    added = [method for method in new if method.name not in methods]
    return (*old, *added), clashes


# ------------------------------------------------------------------------------ what a file says


def _read_scenarios(given: Any, key: str) -> tuple[Options, ...]:
    return tuple(_read_scenario(item) for item in _list(given, key))


def _read_scenario(given: Any) -> Options:
    if isinstance(given, str):
        return {"name": given}
    if isinstance(given, Mapping) and isinstance(given.get("name"), str):
        return dict(given)
    raise UsageError(f"`scenarios` has {quote(given)}; it must hold names, or mappings with `name` and options.")


def _read_methods(given: Any, key: str) -> tuple[Method, ...]:
    return tuple(method for item in _list(given, key) for method in _read_method(item))


def _read_tuned_method(path: Path) -> Method:
    """Return the method in a file that `clframe tune` wrote. Raises `UsageError` if it is not such a file."""
    data = _read_file(path, "method")
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
    problems = _unknown_keys(given, METHOD_KEYS, "a method of a study")
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
        named = ",".join(f"{label}={_show(value)}" for label, value in zip(labels, values, strict=True))
        yield replace(method, name=f"{method.name}[{named}]", plugins=plugins, train=train)


def _read_seeds(given: Any, key: str) -> tuple[int, ...]:
    seeds: list[int] = []
    if isinstance(given, str):
        first, dash, last = given.strip().partition("-")
        if first.isdecimal() and (last.isdecimal() if dash else True):
            low, high = (int(first), int(last)) if dash else (0, int(first) - 1)
            seeds = list(range(low, min(high, low + MOST_SEEDS) + 1))
    elif isinstance(given, int) and not isinstance(given, bool):
        seeds = list(range(min(given, MOST_SEEDS + 1)))
    elif isinstance(given, Sequence) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in given):
        seeds = list(given)
    if not seeds or len(seeds) > MOST_SEEDS or max(seeds) >= 2**32:
        raise UsageError(
            f"`{key}` is {quote(given)}; it must be a number of seeds, such as 5, a range, such as 0-4, or a list."
        )
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"`{key}` is {quote(given)}, which names a seed twice; name it once.")
    return tuple(seeds)


def _written_seeds(seeds: tuple[int, ...]) -> Any:
    if seeds == tuple(range(len(seeds))):
        return len(seeds)
    return f"{seeds[0]}-{seeds[-1]}" if seeds == tuple(range(seeds[0], seeds[-1] + 1)) else list(seeds)


def _read_orders(given: Any, key: str) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= MOST_SEEDS:
        raise UsageError(f"`{key}` is {quote(given)}; it must be a number of class orders, 1 or more.")
    return given


def _read_sampling(given: Any, key: str) -> str:
    if given not in SAMPLINGS:
        raise UsageError(f"`{key}` is {quote(given)}; choices: {', '.join(SAMPLINGS)}.")
    return str(given)


def _read_switch(given: Any, key: str) -> bool:
    if not isinstance(given, bool):
        raise UsageError(f"`{key}` is {quote(given)}; it must be true or false.")
    return given


def _read_model(given: Any, key: str) -> Any:
    if isinstance(given, str) or (isinstance(given, Mapping) and isinstance(given.get("name"), str)):
        return given
    raise UsageError(f"`{key}` is {quote(given)}; it must be a name, or a mapping with `name` and options.")


def _read_mapping(given: Any, key: str) -> Options:
    if not isinstance(given, Mapping):
        raise UsageError(f"`{key}` is {quote(given)}; it must be a mapping of settings to values.")
    return dict(given)


def _read_set(given: Any, key: str) -> Options:
    found = _read_mapping(given, key)
    for name in found:
        section, dot, option = name.partition(".")
        if not (section and dot and option):
            raise UsageError(f"`{key}` has `{cut(name)}`; it must be of the form `section.option`, such as `er.size`.")
    return found


def _read_tuning(given: Any, key: str) -> Options:
    found = dict(_read_mapping(given, key))
    problems = _unknown_keys(found, TUNING_KEYS, f"`{key}`")
    if "protocols" in found:
        names = found["protocols"]
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
            problems.append(f"`{key}.protocols` is {quote(names)}; it must be a list of names, such as [first-2].")
        else:
            found["protocols"] = list(dict.fromkeys(names))
    trials = found.get("trials", 1)
    if isinstance(trials, bool) or not isinstance(trials, int) or not 1 <= trials <= MOST_SEEDS:
        problems.append(f"`{key}.trials` is {quote(trials)}; it must be a number of trials, 1 or more.")
    if problems:
        raise UsageError(*problems)
    if "seeds" in found:
        found["seeds"] = list(_read_seeds(found["seeds"], f"{key}.seeds"))
    return found


def _unknown_keys(given: Options, known: Collection[str], what: str) -> list[str]:
    """Return one sentence for each key of `given` that `what` does not have."""
    return [f"there is no key `{cut(key)}` in {what}.{did_you_mean(key, known)}" for key in given if key not in known]


def _list(given: Any, key: str) -> Sequence[Any]:
    if isinstance(given, Sequence) and not isinstance(given, str):
        return given
    raise UsageError(f"`{key}` is {quote(given)}; it must be a list.")


def _show(value: Any) -> str:
    """Return an option's value as a label has it, in one line."""
    return json.dumps(value) if isinstance(value, list | dict) else dump_yaml(value).removesuffix("...\n").strip()


KEYS = {  # of a study file, each with what reads it
    "scenarios": _read_scenarios,
    "methods": _read_methods,
    "model": _read_model,
    "seeds": _read_seeds,
    "orders": _read_orders,
    "order_sampling": _read_sampling,
    "baselines": _read_switch,
    "train": _read_mapping,
    "run": _read_mapping,
    "set": _read_set,
    "search": _read_set,
    "tuning": _read_tuning,
    "budget": read_budget,
}
assert set(KEYS) == {part.name for part in fields(Study)}
