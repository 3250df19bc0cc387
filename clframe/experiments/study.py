"""Studies: what is to be compared, in a file or in flags, and the configuration of each run that it asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe import registry
from clframe.errors import DataError, UsageError, did_you_mean
from clframe.experiments import values
from clframe.experiments.budget import read_budget
from clframe.experiments.methods import Method, read_methods
from clframe.experiments.outcome import FINE_TUNING, JOINT
from clframe.experiments.values import Options
from clframe.strict_yaml import dump_yaml
from clframe.system.reading import expand_home, quote_path
from clframe.system.texts import cut, quote

if TYPE_CHECKING:
    from clframe.settings import Config

STUDY = "study.yaml"  # the file of a study in its folder
BASELINES = (FINE_TUNING, JOINT)
DEFAULT_SEEDS = 5
MOST_CELLS = 100_000
NOT_OF_A_STUDY = {  # settings that a study has a place of its own for
    "run.seed": "`seeds` (`--seeds`) has the seeds",
    "run.output": "each cell has a folder in that of the study",
}


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
        return cls.from_data(values.read_file(expand_home(path), "study"), f"{path}: ")

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
        problems = values.find_unknown(data, KEYS, "a study")
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
            "seeds": values.write_seeds(self.seeds),
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
            options = ",".join(f"{key}={values.show_value(scenario[key])}" for key in differing if key in scenario)
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


def takes_orders(name: str) -> bool:
    """Return whether the scenario `name` has class orders to draw: options `order` and `seed`. Raises `UsageError`."""
    from clframe.options import options_of

    options = {option.name for option in options_of(registry.builder("scenario", name), skip=registry.SUPPLIED)}
    return {"order", "seed"} <= options


def _add_methods(old: Sequence[Method], new: Iterable[Method]) -> tuple[tuple[Method, ...], list[str]]:
    """Return the methods `old` and `new`, and one sentence for each of `new` whose name stands for another method."""
    methods = {method.name: method for method in old}
    clashes = []
    for method in new:
        if old and methods.get(method.name, method) != method:
            clashes.append(f"the study has another method `{method.name}`: give this one another `name`.")
    added = [method for method in new if method.name not in methods]
    return (*old, *added), clashes


KEYS = {  # of a study file, each with what reads it
    "scenarios": values.read_scenarios,
    "methods": read_methods,
    "model": values.read_model,
    "seeds": values.read_seeds,
    "orders": values.read_orders,
    "order_sampling": values.read_sampling,
    "baselines": values.read_switch,
    "train": values.read_mapping,
    "run": values.read_mapping,
    "set": values.read_set,
    "search": values.read_set,
    "tuning": values.read_tuning,
    "budget": read_budget,
}
assert set(KEYS) == {part.name for part in fields(Study)}
