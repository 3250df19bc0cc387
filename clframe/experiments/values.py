"""Values in a study file: what each may be, and one sentence where it is something else.

Readers take a value and the key that sentences name, and raise `UsageError` for a value that they do not take.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from clframe.errors import UsageError, did_you_mean
from clframe.strict_yaml import dump_yaml, parse_yaml
from clframe.system.reading import Unreadable, quote_path, read_bytes
from clframe.system.texts import cut, quote

LARGEST_FILE = 1_000_000  # bytes of a study file
MOST_SEEDS = 10_000
SAMPLINGS = ("random", "extreme")
TUNING_KEYS = ("protocols", "trials", "seeds")
Options = Mapping[str, Any]


def read_file(path: Path, what: str) -> Any:
    """Return the content of a YAML file, which sentences call `what`. Raises `UsageError` if it cannot be read."""
    try:
        text = read_bytes(path, LARGEST_FILE).decode("utf-8-sig")
    except Unreadable as error:
        raise UsageError(f"The {what} {quote_path(path)} cannot be read: {error.reason}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The {what} {path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    return parse_yaml(text, str(path))


def read_scenarios(given: Any, key: str) -> tuple[Options, ...]:
    """Return the scenarios in a list of names, and of mappings with `name` and options."""
    return tuple(_read_scenario(item) for item in read_list(given, key))


def _read_scenario(given: Any) -> Options:
    if isinstance(given, str):
        return {"name": given}
    if isinstance(given, Mapping) and isinstance(given.get("name"), str):
        return dict(given)
    raise UsageError(f"`scenarios` has {quote(given)}; it must hold names, or mappings with `name` and options.")


def read_seeds(given: Any, key: str) -> tuple[int, ...]:
    """Return the seeds that a number (5: 0 to 4), a range (``3-7``) or a list names."""
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


def write_seeds(seeds: tuple[int, ...]) -> Any:
    """Return `seeds` in the shortest form that `read_seeds` takes."""
    if seeds == tuple(range(len(seeds))):
        return len(seeds)
    return f"{seeds[0]}-{seeds[-1]}" if seeds == tuple(range(seeds[0], seeds[-1] + 1)) else list(seeds)


def read_orders(given: Any, key: str) -> int:
    """Return a number of class orders."""
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= MOST_SEEDS:
        raise UsageError(f"`{key}` is {quote(given)}; it must be a number of class orders, 1 or more.")
    return given


def read_sampling(given: Any, key: str) -> str:
    """Return how class orders are drawn: one of `SAMPLINGS`."""
    if given not in SAMPLINGS:
        raise UsageError(f"`{key}` is {quote(given)}; choices: {', '.join(SAMPLINGS)}.")
    return str(given)


def read_switch(given: Any, key: str) -> bool:
    """Return true or false."""
    if not isinstance(given, bool):
        raise UsageError(f"`{key}` is {quote(given)}; it must be true or false.")
    return given


def read_model(given: Any, key: str) -> Any:
    """Return the name of a backbone, or a mapping with `name` and options."""
    if isinstance(given, str) or (isinstance(given, Mapping) and isinstance(given.get("name"), str)):
        return given
    raise UsageError(f"`{key}` is {quote(given)}; it must be a name, or a mapping with `name` and options.")


def read_mapping(given: Any, key: str) -> Options:
    """Return a mapping of settings to values."""
    if not isinstance(given, Mapping):
        raise UsageError(f"`{key}` is {quote(given)}; it must be a mapping of settings to values.")
    return dict(given)


def read_set(given: Any, key: str) -> Options:
    """Return a mapping of settings to values whose keys are full names, such as ``er.size``."""
    found = read_mapping(given, key)
    for name in found:
        section, dot, option = name.partition(".")
        if not (section and dot and option):
            raise UsageError(f"`{key}` has `{cut(name)}`; it must be of the form `section.option`, such as `er.size`.")
    return found


def read_tuning(given: Any, key: str) -> Options:
    """Return how methods are tuned: a mapping with some of `TUNING_KEYS`."""
    found = dict(read_mapping(given, key))
    problems = find_unknown(found, TUNING_KEYS, f"`{key}`")
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
        found["seeds"] = list(read_seeds(found["seeds"], f"{key}.seeds"))
    return found


def find_unknown(given: Options, known: Collection[str], what: str) -> list[str]:
    """Return one sentence for each key of `given` that `what` does not have."""
    return [f"there is no key `{cut(key)}` in {what}.{did_you_mean(key, known)}" for key in given if key not in known]


def read_list(given: Any, key: str) -> Sequence[Any]:
    """Return a list."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        return given
    raise UsageError(f"`{key}` is {quote(given)}; it must be a list.")


def show_value(value: Any) -> str:
    """Return an option's value as a label has it, in one line."""
    return json.dumps(value) if isinstance(value, list | dict) else dump_yaml(value).removesuffix("...\n").strip()
