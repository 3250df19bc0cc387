"""Budgets: one limit for all methods of a study, and the setting of each method that is solved for it.

`bytes` limits what a method keeps between experiences, as the results measure it (``storage``); it decides the options
that a plugin declares as `clframe.Plugin.memory_options`. `steps` and `macs`, the multiply-adds of training steps, are
those of an experience, and decide ``train.iterations``. What cannot be computed is measured in short runs on a few
training images, which keep no folder and read no test image.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clframe import registry
from clframe.config import list_settings
from clframe.errors import RunError, UsageError, did_you_mean
from clframe.experiments.cells import code_of, settings_of
from clframe.system.texts import cut, quote

if TYPE_CHECKING:
    from clframe.data.batch import ImageData
    from clframe.data.scenario import Part, Scenario
    from clframe.events import Event
    from clframe.runs.results import Results
    from clframe.settings import Config

DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
UNITS = {  # of each kind of budget, in lower case, with what one of them holds
    "bytes": {"": 1} | {f"{prefix}b": size for prefix, size in (DECIMAL | BINARY).items()},
    "steps": {"": 1},
    "macs": DECIMAL,
}
EXAMPLES = {"bytes": "4MB", "steps": "500", "macs": "20G"}
EACH = 4  # images of each class in a short run: more than the memories of two sizes take that are measured
STEPS = 4  # of each experience in a short run: an exemplar memory is empty in the first one
NOUNS = {"bytes": "", "steps": " steps", "macs": " multiply-adds"}
ORACLE = "it keeps all images"
BATCHES = 8  # of images in each experience of a short run that counts multiply-adds, from which memories are filled


class TooSmall(UsageError):
    """A budget that leaves a method no image, or no step."""


@dataclass(frozen=True)
class Held:
    """What a budget decides for a method on a scenario.

    Attributes:
        kind: `bytes`, `steps` or `macs`.
        limit: the budget, in bytes, in steps of an experience, or in multiply-adds of an experience.
        settings: solved values by full name, such as ``er.size``; empty if no option can be solved for the budget.
        uses: as much of the budget as the method takes with them; None if only its runs will show it.
        reason: why no option can be solved; empty if one is.
        key: SHA-256 of what the solution depends on.
    """

    kind: str
    limit: int
    settings: Mapping[str, int]
    uses: float | None = None
    reason: str = ""
    key: str = ""

    def describe(self, used: float | None = None) -> str:
        """Return in a phrase what is used of the budget, and which setting holds the method to it.

        Args:
            used: what a finished run has used; None: as computed before the runs.
        """
        used = self.uses if used is None else used
        limit = format_amount(self.kind, self.limit)
        if self.reason == ORACLE:
            return f"an oracle, not held to {limit}"
        share = limit if used is None else f"{_format_number(self.kind, used)} of {limit}"
        if not self.settings:
            return f"{share}, not solvable"
        return f"{share} by {', '.join(f'{name}={value}' for name, value in self.settings.items())}"


def format_amount(kind: str, count: float) -> str:
    """Return a number of bytes, steps or multiply-adds with its unit."""
    return _format_number(kind, count) + NOUNS[kind]


def _format_number(kind: str, count: float) -> str:
    if kind == "bytes":
        from clframe.experiments.rendering import format_size

        return format_size(count)
    if kind == "steps":
        return f"{count:,.0f}"
    prefix = max((prefix for prefix in DECIMAL if count >= DECIMAL[prefix]), key=DECIMAL.__getitem__, default="")
    return f"{count / DECIMAL[prefix]:.4g} {prefix if prefix == 'k' else prefix.upper()}".strip()


# --------------------------------------------------------------------------------- what is asked for


def read_budget(given: Any, key: str) -> dict[str, int]:
    """Return the limits that `given`, a mapping of kinds to amounts such as ``4MB``, names. Raises `UsageError`."""
    if not isinstance(given, Mapping) or not given:
        raise UsageError(f"`{key}` is {quote(given)}; it must be a mapping such as {{bytes: 4MB}}.")
    problems = []
    found = {}
    for kind, amount in given.items():
        if kind not in UNITS:
            problems.append(f"`{key}` names `{cut(str(kind))}`.{did_you_mean(str(kind), UNITS)}")
            continue
        value = _read_amount(amount, UNITS[kind])
        if value is None:
            units = f", or with a unit, such as {EXAMPLES[kind]}" if len(UNITS[kind]) > 1 else ""
            problems.append(f"`{key}` has {quote(amount)} as `{kind}`; it must be a whole number from 1{units}.")
        else:
            found[kind] = value
    if problems:
        raise UsageError(*problems)
    return found


def parse_budgets(texts: list[str], problems: list[str]) -> dict[str, str]:
    """Return the amounts in the values of ``--budget``, by kind; sentences on mistakes are added to `problems`."""
    found: dict[str, str] = {}
    for text in texts:
        kind, equals, amount = text.partition("=")
        if not equals:
            problems.append(f"`--budget {cut(text)}` is not of the form `KIND=AMOUNT`, such as `bytes=4MB`.")
        elif kind.strip() in found:
            problems.append(f"`--budget` has `{cut(kind.strip())}` twice; name it once.")
        else:
            found[kind.strip()] = amount.strip()
    return found


def _read_amount(given: Any, units: Mapping[str, int]) -> int | None:
    """Return the whole number that `given` stands for, from 1; None if it does not stand for one."""
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([a-z]*)\s*", str(given).lower())
    if parts is None or parts[2] not in units:
        return None
    value = float(parts[1]) * units[parts[2]]
    return int(value) if 1 <= value < 2**63 and value.is_integer() else None


# ------------------------------------------------------------------------------------- the solution


def hold(
    config: Config,
    budget: Mapping[str, int],
    given: frozenset[str],
    data: str = "",
    known: Mapping[str, Held] | None = None,
) -> tuple[Held, ...]:
    """Return what each limit of `budget` decides for the runs of `config`, whatever their seed.

    Args:
        config: the configuration of a cell of the method.
        budget: limits by kind.
        given: full names of the settings that the study sets itself, which a budget must not change.
        data: SHA-256 of the scenario's data.
        known: what was solved before, by its key.

    Raises:
        TooSmall: for a budget that leaves the method no image, or no step.
        UsageError: with one sentence for each setting that contradicts the budget.
        DataError: if data are missing or damaged.
        Interrupted: after a signal.
    """
    held: list[Held] = []
    for kind in UNITS:
        if kind not in budget:
            continue
        if clash := _clashes(kind, config, given):
            raise UsageError(*clash)
        key = _key(kind, budget[kind], config, data)
        one = (known or {}).get(key) or replace(SOLVERS[kind](config, budget[kind]), key=key)
        settings = list_settings(config)
        if contrary := [name for name in one.settings if name in given and settings[name] != one.settings[name]]:
            raise UsageError(
                *(
                    f"`{name}` is {quote(settings[name])}, and the budget `{kind}` asks for {one.settings[name]}: "
                    "leave out one of them."
                    for name in contrary
                )
            )
        held.append(one)
        config = apply(config, one.settings)
    return tuple(held)


def apply(config: Config, settings: Mapping[str, int]) -> Config:
    """Return a copy of `config` with solved `settings`.

    Where the number of iterations changes, the milestones of the learning rate keep their places in the course.
    """
    changed = config.model_copy(deep=True)
    for name, value in settings.items():
        section, _, option = name.rpartition(".")
        if section == "train":
            old = config.train
            length = old.iterations or old.epochs or 1
            milestones = [milestone * value / length for milestone in old.milestones]
            own = {"iterations": value, "epochs": None, "milestones": milestones}
            changed.train = type(old)(**{**old.model_dump(), **own})
        else:
            plugin = config.plugins[section]
            changed.plugins[section] = replace(plugin, options={**plugin.options, option: value})
    return changed


def _key(kind: str, limit: int, config: Config, data: str) -> str:
    """Return the SHA-256 of what a solution depends on."""
    config = config.model_copy(deep=True)
    config.run.seed = 0
    parts = [kind, limit, settings_of(config), code_of(config), data]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _clashes(kind: str, config: Config, given: frozenset[str]) -> list[str]:
    """Return one sentence for each setting in `given` that leaves nothing to be solved for a budget of this kind."""
    settings = list_settings(config)
    if kind == "bytes":
        names = [name for options in find_memories(config).values() for name in options[1:]]
        decides = "how many images are kept"
    else:
        first = config.train.first or {}
        names = ["train.epochs", *(["train.iterations"] if kind == "macs" else [])]
        names += [f"train.first.{name}" for name in ("epochs", "iterations") if name in first]
        settings |= {f"train.first.{name}": value for name, value in first.items()}
        given |= {name for name in names if name.startswith("train.first.")}
        decides = "how long an experience is trained"
    return [
        f"`{name}` is {quote(settings[name])} and decides {decides}, as the budget `{kind}` does: leave out one of "
        "them."
        for name in names
        if name in given and settings.get(name) is not None
    ]


def find_memories(config: Config) -> dict[str, list[str]]:
    """Return the options, by full name, that decide how many images each plugin of `config` keeps."""
    found = {}
    for name, plugin in config.plugins.items():
        declared = registry.plugin_class(name).memory_options
        if options := [f"{name}.{option}" for option in declared if option in plugin.options]:
            found[name] = options
    return found


# --------------------------------------------------------------------------------------------- bytes


def _solve_bytes(config: Config, limit: int) -> Held:
    """Solve the memory sizes of a method for `limit` bytes: the same number of images for each of its memories.

    Bytes grow evenly with a size, or, where a memory is shared among groups, with each multiple of their number. Three
    short runs show which, and how many bytes an image takes.
    """
    plugins = [registry.build_plugin(name, plugin.options) for name, plugin in config.plugins.items()]
    if any(plugin.keeps_experiences for plugin in plugins):
        return Held("bytes", limit, {}, reason=ORACLE)
    options = [names[0] for names in find_memories(config).values()]
    if not options:
        return Held("bytes", limit, {}, reason="no option sizes a memory")
    scenario = registry.build_scenario(config.scenario, config.run)
    if config.run.experiences is not None:
        scenario = scenario.cut(config.run.experiences)
    groups, room = _count_images(scenario)
    measured: dict[int, int] = {}
    for size in dict.fromkeys((groups, groups + 1, 2 * groups)):
        try:
            results = _run_shortly(apply(config, dict.fromkeys(options, size)), scenario, 0)
        except RunError as error:
            return Held("bytes", limit, {}, reason=f"what it keeps could not be measured: {error}")
        measured[size] = sum(kept["bytes"] for kept in results.data["storage"].values())
    grown = measured[2 * groups] - measured[groups]
    if grown <= 0:
        return Held("bytes", limit, {}, measured[groups], "what it keeps does not depend on the size of its memory")
    image = grown / groups
    size = min(groups + math.floor((limit - measured[groups]) / image), room)
    if measured[groups + 1] - measured[groups] != image:
        size -= size % groups
    uses = measured[groups] + (size - groups) * image
    if size < 1:
        fixed = measured[groups] - groups * image
        raise TooSmall(
            f"The budget `bytes` is {format_amount('bytes', limit)} and has no room for an image, as one takes "
            f"{format_amount('bytes', image)} beside {format_amount('bytes', fixed)} that are kept anyway: ask for "
            "more."
        )
    return Held("bytes", limit, dict.fromkeys(options, size), uses)


def _count_images(scenario: Scenario) -> tuple[int, int]:
    """Return the number of groups, the classes of each experience, and that of the images with which none can grow."""
    import torch

    groups = sum(map(len, scenario.classes))
    largest = max(int(torch.bincount(e.train.y).max()) if len(e.train) else 0 for e in scenario)
    return groups, groups * max(1, largest)


# -------------------------------------------------------------------------------------------- length


def _solve_steps(config: Config, limit: int) -> Held:
    return Held("steps", limit, {"train.iterations": limit}, limit)


def _solve_macs(config: Config, limit: int) -> Held:
    """Solve the iterations of an experience for `limit` multiply-adds: the mean over all experiences keeps to it."""
    try:
        counted = count_macs(config)
    except RunError as error:
        return Held("macs", limit, {}, reason=f"its steps could not be counted: {error}")
    one = sum(share * macs for share, macs in counted) / len(counted)
    if not one:
        return Held("macs", limit, {}, reason="its steps have no multiply-adds that torch counts")
    iterations = math.floor(limit / one)
    if iterations < 1:
        raise TooSmall(
            f"A step takes {format_amount('macs', one)}, and the budget `macs` is {format_amount('macs', limit)}: "
            "ask for more."
        )
    return Held("macs", limit, {"train.iterations": iterations}, iterations * one)


def count_macs(config: Config) -> list[tuple[float, float]]:
    """Measure the multiply-adds of training steps of each experience, forward and backward, in a short run.

    Returns:
        for each experience, how many steps it takes for one of ``train.iterations`` (1, but for methods such as joint
        training, which take all steps at the end), and the most multiply-adds of one step.

    Raises:
        ClframeError: as `clframe.run`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    scenario = registry.build_scenario(config.scenario, config.run)
    counter = FlopCounterMode(display=False)
    steps: dict[int, int] = {}
    most: dict[int, float] = {}
    before = 0

    def note(event: Event) -> None:
        nonlocal before
        if event["kind"] == "experience":
            steps[event["index"]] = 0
        elif event["kind"] == "phase" and event["name"] == "train" and event["steps"]:
            counting.enter_context(counter)  # from here on only, as the work between experiences would be slowed down
            before = 0
        elif event["kind"] == "step" and event["phase"] == "train":
            index, total = event["experience"], counter.get_total_flops()
            steps[index] += 1
            most[index] = max(most.get(index, 0.0), (total - before) / 2)
            before = total
            if event["step"] == event["steps"]:
                counting.close()

    with ExitStack() as counting:
        _run_shortly(apply(config, {"train.iterations": STEPS}), scenario, BATCHES * config.train.batch_size, note)
    return [(count / STEPS, most.get(index, 0.0)) for index, count in steps.items()]


SOLVERS = {"bytes": _solve_bytes, "steps": _solve_steps, "macs": _solve_macs}


# ---------------------------------------------------------------------------------------- short runs


def _run_shortly(config: Config, scenario: Scenario, images: int, *listeners: Any) -> Results:
    """Carry out a run of `config` on a few training images of `scenario`, and keep nothing of it.

    Args:
        config: as of a cell.
        scenario: all of it.
        images: number of images of each experience, if it has so many, but `EACH` of each class. With 0 they are
            learned in one epoch, else as `config` says.
        listeners: called with each event.

    Raises:
        ClframeError: as `clframe.run`.
    """
    from clframe.api import run_config

    config = config.model_copy(deep=True)
    for name in [name for name in config.plugins if registry.plugin_class(name).observer]:
        del config.plugins[name]
    of_run: dict[str, Any] = {
        "output": None,
        "tensorboard": False,
        "predictions": False,
        "log_every": 1,
        "test": True,
        "joint": None,
    }
    of_run |= {"eval_every": "experience", "eval_images": None, "tuned": None, "per_experience": None}
    config.run = config.run.model_copy(update=of_run)
    length: dict[str, Any] = {} if images else {"epochs": 1, "iterations": None, "first": None}
    config.train = config.train.model_copy(update={"val": 0.0, **length})
    return run_config(config, scenario=pick_few(scenario, images), listeners=listeners)


def pick_few(scenario: Scenario, images: int) -> Scenario:
    """Return `scenario` with `EACH` training images of each class, and others up to `images` in each experience.

    A class with fewer images has some of them twice. Training images stand in for the test images.
    """
    import torch

    from clframe.data.scenario import Scenario

    def load(index: int, part: Part) -> ImageData:
        rows = scenario[index].train
        labels = rows.y.cpu()
        places = [(labels == label).nonzero().flatten() for label in labels.unique()]
        chosen = torch.cat([where[torch.arange(EACH) % len(where)] for where in places])
        others = torch.ones(len(labels), dtype=torch.bool)
        others[chosen] = False
        rest = others.nonzero().flatten()[: max(0, images - len(chosen))]
        return rows.rows(torch.cat([chosen, rest]).to(rows.device))

    return Scenario(
        scenario.name,
        scenario.setting,
        scenario.classes,
        scenario.class_names,
        scenario.input_shape,
        load,
        transform=scenario.transform,
        class_order=scenario.class_order,
        checksum=scenario.checksum,
    )
