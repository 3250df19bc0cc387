"""The commands `plugins check` and `scenarios check`: each part of the contract, and why it fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clframe.cli import show
from clframe.config import resolve
from clframe.errors import UsageError

if TYPE_CHECKING:
    from clframe.testing import Subject


def check_plugin(name: str, sets: Sequence[str], model: str | None, json: bool) -> int:
    """Print the checks of a plugin and return the exit code: 1 if any failed."""
    from clframe import testing

    _refuse_others(sets, name, "model")
    config = resolve(model=model or testing.MODEL, plugins=[name], sets=sets)
    return _print_outcomes(testing.plugin(name, config.plugins[name].options, config.model_dump()["model"]), json)


def check_backbone(name: str, sets: Sequence[str], model: str | None, json: bool) -> int:
    """Print the checks of a backbone and return the exit code: 1 if any failed."""
    from clframe import testing

    if model is not None:
        raise UsageError(f"`--model` is of plugins; `{name}` is the backbone to check: leave it out.")
    _refuse_others(sets, "model")
    return _print_outcomes(testing.backbone(name, resolve(model=name, sets=sets).model.options), json)


def check_scenario(name: str, sets: Sequence[str], json: bool) -> int:
    """Print the checks of a scenario and return the exit code: 1 if any failed."""
    from clframe import testing

    _refuse_others(sets, "scenario")
    return _print_outcomes(testing.scenario(name, resolve(scenario=name, sets=sets).scenario.options), json)


def _refuse_others(sets: Sequence[str], *sections: str) -> None:
    """Raise `UsageError` for settings in `sets` of other `sections`, which no check would use."""
    places = [*sections, *(section.partition(":")[0] for section in sections)]
    strange = [given for given in sets if given.partition(".")[0] not in places]
    if strange:
        known = " and ".join(f"`{section}`" for section in sections)
        raise UsageError(
            *(f"`--set {given}` changes nothing here: a check takes options of {known}." for given in strange)
        )


def _print_outcomes(subject: Subject, json: bool) -> int:
    """Print the outcome of each check as soon as it is known, and return the exit code."""
    from clframe.testing import outcomes

    found = []
    for outcome in outcomes(subject):
        found.append(outcome)
        if not json:
            reason = f": {outcome.why}" if outcome.why else ""
            show.line(f"{outcome.result:<8} {outcome.check}{reason}")
    failed = sum(outcome.result == "failed" for outcome in found)
    passed = sum(outcome.result == "passed" for outcome in found)
    if json:
        listed = [{"check": o.check.name, "asks": o.check.why, "result": o.result, "why": o.why} for o in found]
        show.document({"passed": not failed, "checks": listed})
    else:
        show.line(f"{passed} passed, {failed} failed, {len(found) - passed - failed} not run")
    return 1 if failed else 0
