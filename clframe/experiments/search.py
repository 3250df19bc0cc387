"""What a tuning may look at, and what it searches: protocols, and ranges of options."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clframe import registry
from clframe.errors import UsageError, did_you_mean
from clframe.experiments.methods import Method
from clframe.experiments.study import Study
from clframe.experiments.values import Options
from clframe.options import Option, Search, fields_of, options_of
from clframe.settings import TrainSettings
from clframe.system.texts import cut, quote

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from clframe.settings import Config

PROTOCOLS = ("first-K", "per-experience", "other-scenario:NAME", "end-of-stream")
Values = Mapping[str, Any]  # by full name, such as `ewc.lambda`


# ------------------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class Protocol:
    """What a choice of options may look at.

    Attributes:
        kind: `first`, `per-experience`, `other-scenario` or `end-of-stream`.
        k: number of experiences of `first`.
        scenario: name of the other scenario.
    """

    kind: str
    k: int = 0
    scenario: str = ""

    def __str__(self) -> str:
        if self.kind == "first":
            return f"first-{self.k}"
        return f"other-scenario:{self.scenario}" if self.scenario else self.kind

    @property
    def label(self) -> str:
        """Return the protocol as tables name it: one that looks at later experiences is an oracle."""
        return f"{self} (oracle)" if self.kind == "end-of-stream" else str(self)


def parse_protocol(text: str) -> Protocol:
    """Return the protocol that `text` names. Raises `UsageError` if there is none of that name."""
    if found := re.fullmatch(r"first-([1-9]\d{0,3})", text):
        if int(found[1]) < 2:
            raise UsageError(
                f"The protocol `{text}` tunes on 1 experience, in which nothing can be forgotten: choose `first-2`."
            )
        return Protocol("first", k=int(found[1]))
    kind, _, name = text.partition(":")
    if kind == "other-scenario" and name:
        registry.find("scenario", name)
        return Protocol(kind, scenario=name)
    if text in ("per-experience", "end-of-stream"):
        return Protocol(text)
    if text == "other-scenario":
        raise UsageError("The protocol `other-scenario` needs a scenario to tune on: write `other-scenario:NAME`.")
    choices = ", ".join(f"`{name}`" for name in PROTOCOLS)
    raise UsageError(f"There is no protocol `{cut(text)}`; choices: {choices}, with a number of experiences for K.")


# ------------------------------------------------------------------------------ what is searched


@dataclass(frozen=True)
class Range:
    """A searched option.

    Attributes:
        name: in full, such as `ewc.lambda`.
        search: its range.
        whole: whether only whole numbers are tried.
        start: the value that the method has without a tuning.
        changes: whether it may change within a run: the option declares a range, and is searched in one.
    """

    name: str
    search: Search
    whole: bool
    start: Any
    changes: bool

    def holds(self, value: Any) -> bool:
        """Return whether `value` is in the range."""
        search = self.search
        if search.choices or search.low is None or search.high is None:
            return value in search.choices
        return isinstance(value, int | float) and search.low <= value <= search.high

    def rounded(self, value: Any) -> Any:
        """Return a value of the range to four digits, as people write it."""
        if self.whole or not isinstance(value, float) or self.search.low is None or self.search.high is None:
            return value
        return min(max(float(f"{value:.4g}"), float(self.search.low)), float(self.search.high))

    def distribution(self) -> BaseDistribution:
        """Return the range as Optuna has it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        search = self.search
        if search.choices or search.low is None or search.high is None:
            return CategoricalDistribution(search.choices)
        if self.whole:
            return IntDistribution(int(search.low), int(search.high), log=search.log)
        return FloatDistribution(search.low, search.high, log=search.log)

    def grid(self, count: int) -> list[Any]:
        """Return `count` values from the largest down to the least, evenly spaced on the scale of the search."""
        search = self.search
        if search.choices or search.low is None or search.high is None:
            return list(search.choices)
        low, high = (math.log(end) if search.log else end for end in (search.low, search.high))
        steps = [high + (low - high) * i / max(1, count - 1) for i in range(count)]
        values = [float(f"{math.exp(step) if search.log else step:.4g}") for step in steps]
        ends: list[Any] = [float(search.high), *values[1:-1], float(search.low)] if count > 1 else [float(search.high)]
        return list(dict.fromkeys(round(value) for value in ends)) if self.whole else ends


def parse_range(name: str, given: Any) -> Search | None:
    """Return the range that a study file gives the option `name`: ``[LOW, HIGH]``, ``[LOW, HIGH, log]`` or choices.

    None stands for the range that the option declares, and is returned for ``null`` and ``true``.

    Raises:
        UsageError: if it is another value.
    """
    if given is None or given is True:
        return None
    try:
        if isinstance(given, Mapping) and set(given) == {"choices"} and isinstance(given["choices"], Sequence):
            return Search(choices=tuple(given["choices"]))
        if isinstance(given, Sequence) and not isinstance(given, str) and len(given) in (2, 3):
            low, high, *log = given
            numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
            if numbers and log in ([], ["log"]):
                return Search(low, high, log=bool(log))
    except ValueError as error:
        raise UsageError(f"`search` has {quote(given)} for `{cut(name)}`: {error}.") from error
    raise UsageError(
        f"`search` has {quote(given)} for `{cut(name)}`; it must be [LOW, HIGH], [LOW, HIGH, log], {{choices: [...]}}, "
        "null for the range that the option declares, or false to leave the option out."
    )


def ranges_of(study: Study, scenario: Options, method: Method) -> list[Range]:
    """Return the options of `method` that are searched: all that declare a range, as `study.search` changes them.

    Raises:
        UsageError: if an option without a range is asked for, does not exist, or nothing is left to search.
    """
    config = study.configure(scenario, method, {}, study.seeds[0])
    known: dict[str, tuple[Option, Any]] = {
        f"train.{option.name}": (option, getattr(config.train, option.name)) for option in fields_of(TrainSettings)
    }
    for plugin, component in config.plugins.items():
        for option in options_of(registry.plugin_class(plugin), skip=("variant",)):
            known[f"{plugin}.{option.name}"] = option, component.options.get(option.name)
    problems = []
    asked = {name: None for name, (option, _) in known.items() if option.search} | {
        name: given for name, given in study.search.items() if _concerns(name, config)
    }
    found = []
    for name, given in asked.items():
        if given is False:
            continue
        if name not in known:
            problems.append(f"`search` names `{cut(name)}`, which does not exist.{did_you_mean(name, known)}")
            continue
        option, start = known[name]
        try:
            search = parse_range(name, given) or option.search
        except UsageError as error:
            problems += error.problems
            continue
        if search is None:
            problems.append(
                f"`{name}` declares no range to search: give it one in the study file, by `search: {{{name}: [1, 100, "
                f"log]}}`, or by `--search {name}=[1,100,log]`."
            )
            continue
        changes = option.search is not None and not search.choices
        found.append(Range(name, search, option.type.startswith("int"), start, changes))
    if not problems and not found:
        problems.append(
            f"The method `{method.name}` has nothing to tune, as `search` leaves out all of its options with a range: "
            "leave out the method."
        )
    if problems:
        raise UsageError(*problems)
    return found


def _concerns(name: str, config: Config) -> bool:
    """Return whether a key of `search` is about the method that `config` runs: its plugins, or the training."""
    return name.rpartition(".")[0] in (*config.plugins, "train")


def apply(method: Method, values: Values) -> Method:
    """Return `method` with the given values of its options, by full name."""
    plugins = {name: dict(options) for name, options in method.plugins.items()}
    train = dict(method.train)
    for name, value in values.items():
        section, _, option = name.rpartition(".")
        (train if section == "train" else plugins[section])[option] = value
    return replace(method, plugins=plugins, train=train)
