"""The plan of a study: its cells with their addresses, what is refused, and which cells on the disk serve."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.errors import DataError, UsageError
from clframe.experiments.budget import Held, TooSmall, apply, format_amount, hold
from clframe.experiments.cells import (
    CELLS,
    Cell,
    Record,
    address_of,
    code_of,
    explain_change,
    find_data,
    forget_code,
    name_of,
    problems_of,
    read_records,
    settings_of,
    state_of,
)
from clframe.experiments.methods import Method
from clframe.experiments.study import Study
from clframe.experiments.values import Options
from clframe.system.reading import read_json

if TYPE_CHECKING:
    from clframe.settings import Config

PLAN = "cells.json"  # the file of a plan in the folder of a study
PLAN_FORMAT = 1


@dataclass(frozen=True)
class Refused:
    """A method that cannot learn a scenario, with the sentences that say why; its cells are not carried out."""

    method: str
    scenario: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        reasons = " ".join(self.reasons).replace("`--setting`", "`--set scenario.setting=...`")
        return f"`{self.method}` cannot learn `{self.scenario}`: {reasons}"


@dataclass(frozen=True)
class StaleCell:
    """A finished cell on the disk whose code or data changed since, with one phrase for each change."""

    record: Record
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The cells of a study, in the order of scenario, method, class order and seed.

    Attributes:
        cells: those to carry out, and those that are finished.
        refused: methods that cannot learn a scenario.
        stale: finished cells with the settings of one in `cells`, but with other code or data.
        left_out: records of cells on the disk that the study does not ask for.
        held: what budgets decide, by method and scenario.
    """

    cells: Sequence[Cell]
    refused: Sequence[Refused] = ()
    stale: Sequence[StaleCell] = ()
    left_out: Sequence[Record] = ()
    held: Mapping[tuple[str, str], Sequence[Held]] = field(default_factory=dict)

    def waiting(self) -> list[Cell]:
        """Return the cells that are not finished."""
        return [cell for cell in self.cells if state_of(cell.folder) != "finished"]

    def write(self, folder: Path) -> None:
        """Write the plan to its file in the folder of the study."""
        from clframe.system.writing import to_json, write_text  # here, as that imports torch

        cells = [
            {
                "method": cell.method,
                "scenario": cell.scenario,
                "seed": cell.seed,
                "order": cell.order,
                "name": cell.folder.name,
                "stale": list(cell.stale),
            }
            for cell in self.cells
        ]
        refused = [{"method": r.method, "scenario": r.scenario, "reasons": list(r.reasons)} for r in self.refused]
        held = [{"method": m, "scenario": s, **asdict(one)} for (m, s), of in self.held.items() for one in of]
        plan = {"format": PLAN_FORMAT, "cells": cells, "refused": refused, "held": held}
        write_text(folder / PLAN, to_json(plan))


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the content of the file of the plan in the folder of a study. Raises `DataError` if it cannot be read."""
    found = read_json(folder / PLAN)
    if not isinstance(found, dict) or found.get("format") != PLAN_FORMAT:
        raise DataError(f"{folder / PLAN} is not a plan that this clframe reads: repeat `clframe compare {folder}`.")
    return found


def read_held(plan: Mapping[str, Any]) -> dict[tuple[str, str], list[Held]]:
    """Return what budgets decide, by method and scenario, from the content of the file of a plan."""
    found: dict[tuple[str, str], list[Held]] = {}
    for entry in plan.get("held", ()):
        values = dict(entry)
        found.setdefault((values.pop("method"), values.pop("scenario")), []).append(Held(**values))
    return found


@dataclass
class _Row:
    """The cells of one method on one scenario before their addresses are known."""

    method: Method
    scenario: str
    configs: list[tuple[int | None, Config]] = field(default_factory=list)  # for each class order, of the first seed


def make_plan(study: Study, folder: Path, *, keep_stale: bool = False) -> Plan:
    """Return the plan of `study` in `folder`, which may not exist yet. Nothing is written or trained.

    Args:
        study: what is asked for.
        folder: of the study, with the cells of earlier plans.
        keep_stale: let finished cells of other code or data stand in for those that are asked for.

    Raises:
        UsageError: with one sentence for each mistake.
        DataError: if data are missing or damaged, or a record in the folder is.
        RunError: if the scenario of a third party fails.
    """
    forget_code()
    rows = _resolve(study)
    refused: list[Refused] = []
    problems: list[str] = []
    data: dict[str, str] = {}
    for label, scenario_rows in itertools.groupby(rows, key=lambda row: row.scenario):
        try:
            for row in scenario_rows:
                first = row.configs[0][1]
                data[label] = data.get(label) or find_data(first)
                if reasons := problems_of(first):
                    refused.append(Refused(row.method.name, label, reasons))
        except UsageError as error:  # of the scenario, whatever the method
            problems += error.problems
    if problems:
        raise UsageError(*dict.fromkeys(problems))
    held = _hold(study, rows, data, folder, refused)
    without = {(r.method, r.scenario) for r in refused}
    records = read_records(folder)
    cells = [
        cell
        for row in rows
        if (row.method.name, row.scenario) not in without
        for cell in _cells_of(row, study.seeds, data[row.scenario], folder, records)
    ]
    return replace(_with_records(cells, refused, records, keep_stale), held=held)


def _hold(
    study: Study, rows: Sequence[_Row], data: Mapping[str, str], folder: Path, refused: list[Refused]
) -> dict[tuple[str, str], Sequence[Held]]:
    """Solve settings of each row for the budget of `study`, put them into its configurations, and return them.

    A row for which the budget is too small joins `refused`. The first class order of a row decides.

    Raises:
        UsageError: with one sentence for each setting that contradicts the budget.
    """
    if not study.budget:
        return {}
    before = read_held(read_plan(folder)) if (folder / PLAN).is_file() else {}
    known = {one.key: one for of in before.values() for one in of}
    found: dict[tuple[str, str], Sequence[Held]] = {}
    without = {(r.method, r.scenario) for r in refused}
    problems: list[str] = []
    for row in rows:
        place = (row.method.name, row.scenario)
        if place in without:
            continue
        try:
            held = hold(row.configs[0][1], study.budget, study.given_to(row.method), data[row.scenario], known)
        except TooSmall as error:
            refused.append(Refused(*place, error.problems))
            continue
        except UsageError as error:
            problems += error.problems
            continue
        known |= {one.key: one for one in held}
        for one in held:
            row.configs = [(order, apply(config, one.settings)) for order, config in row.configs]
        if reasons := problems_of(row.configs[0][1]):
            limits = " and ".join(f"`{one.kind}` of {format_amount(one.kind, one.limit)}" for one in held)
            refused.append(Refused(*place, tuple(f"Under the budget {limits}, {reason}" for reason in reasons)))
        else:
            found[place] = held
    if problems:
        raise UsageError(*dict.fromkeys(problems))
    return found


def _resolve(study: Study) -> list[_Row]:
    """Return a row for each scenario and method of `study`. Raises `UsageError` with all mistakes."""
    problems = study.problems()
    rows = []
    for scenario, label in zip(study.scenarios, study.scenario_labels, strict=True):
        try:
            orders = [(seed, order_options(study, scenario, seed)) for seed in study.orders_of(scenario)]
        except UsageError as error:
            problems += error.problems
            continue
        for method in study.all_methods:
            if method.scenarios is not None and label not in method.scenarios:
                continue
            row = _Row(method, label)
            for seed, options in orders:
                try:
                    row.configs.append((seed, study.configure(scenario, method, options, study.seeds[0])))
                except UsageError as error:
                    problems += error.problems
                    break
            rows.append(row)
    if not problems:
        problems += _equal_rows(rows)
    if problems:
        raise UsageError(*dict.fromkeys(problems))
    return rows


def _equal_rows(rows: Sequence[_Row]) -> list[str]:
    """Return one sentence for each row whose cells are those of an earlier row."""
    problems = []
    before: dict[str, _Row] = {}
    for row in rows:
        found = before.setdefault(settings_of(row.configs[0][1]), row)
        if found is row:
            continue
        if found.scenario == row.scenario:
            problems.append(
                f"The methods `{found.method.name}` and `{row.method.name}` are the same cells, with all of their "
                "options: leave out one of them."
            )
        else:
            problems.append(
                f"The scenarios `{found.scenario}` and `{row.scenario}` are the same, with all of their options: leave "
                "out one of them."
            )
    return problems


def _cells_of(row: _Row, seeds: Sequence[int], data: str, study: Path, records: Sequence[Record]) -> list[Cell]:
    """Return the cells of one method on one scenario, each in the folder that it has on the disk, or in a new one."""
    there = {record.address: record.folder for record in records}
    cells = []
    for order, resolved in row.configs:
        for seed in seeds:
            config = resolved.model_copy(deep=True)
            config.run.seed = seed
            cell = make_cell(row.method.name, row.scenario, order, config, data, study)
            if cell.address in there:
                folder = there[cell.address]
                cell.config.run.output = str(folder)
                cell = replace(cell, folder=folder)
            cells.append(cell)
    return cells


def make_cell(method: str, scenario: str, order: int | None, config: Config, data: str, study: Path) -> Cell:
    """Return the cell of a run in the folder of a study, or of a tuning, that is named by what it is.

    Args:
        method: label of the method.
        scenario: label of the scenario.
        order: seed of the class order, or None.
        config: of the run; its `run.output` is set.
        data: SHA-256 of the scenario's data.
        study: the folder.
    """
    settings, code = settings_of(config), code_of(config)
    seed = config.run.seed
    folder = study / CELLS / name_of(method, scenario, seed, order, address_of(settings, code, data))
    config.run.output = str(folder)
    return Cell(method, scenario, seed, order, config, settings, code, data, folder)


def _with_records(
    cells: Sequence[Cell], refused: Sequence[Refused], records: Sequence[Record], keep_stale: bool
) -> Plan:
    """Return the plan of `cells`, given what is on the disk."""
    by_settings: dict[str, list[Record]] = {}
    for record in records:
        by_settings.setdefault(record.settings, []).append(record)
    chosen, stale, used = [], [], set()
    for cell in cells:
        if state_of(cell.folder) != "finished":
            others = [r for r in by_settings.get(cell.settings, []) if r.address != cell.address]
            finished = [record for record in others if state_of(record.folder) == "finished"]
            if finished:
                newest = max(finished, key=lambda record: record.path.stat().st_mtime)
                reasons = explain_change(newest, cell)
                stale.append(StaleCell(newest, reasons))
                if keep_stale:
                    cell = replace(cell, folder=newest.folder, stale=reasons)
        used.add(cell.folder)
        chosen.append(cell)
    left_out = [record for record in records if record.folder not in used]
    return Plan(chosen, refused, stale, left_out)


# ---------------------------------------------------------------------------------- class orders


def order_options(study: Study, scenario: Options, seed: int | None) -> dict[str, Any]:
    """Return the options of `scenario` that give it the class order of this seed; {} for its own order.

    Orders of `order_sampling: extreme` take turns: a random one, one with the most and one with the least similar
    neighbors, so that more orders add to those that are there.
    """
    if seed is None:
        return {}
    if study.order_sampling == "random" or seed % 3 == 0:
        return {"order": "random", "seed": seed}
    natural = study.configure(scenario, Method(""), {}, 0)
    if "setting" in natural.model_dump()["scenario"]:  # the classes of the data set, whatever labels the setting has
        natural = study.configure(scenario, Method(""), {"setting": "class"}, 0)
    key = json.dumps(natural.model_dump()["scenario"], sort_keys=True, default=str)
    if key not in _SIMILARITIES:
        _SIMILARITIES[key] = _similarities(natural)
    similar = _SIMILARITIES[key]
    if seed // 3 >= len(similar):
        raise UsageError(
            f"`{scenario['name']}` has {len(similar)} classes, and an extreme order of each kind begins with another "
            f"one: ask for at most {3 * len(similar)} orders."
        )
    return {"order": extreme_order(similar, seed // 3, most=seed % 3 == 1), "seed": seed}


_SIMILARITIES: dict[str, list[list[float]]] = {}  # of the classes of a scenario, as reading its images takes time


def extreme_order(similar: Sequence[Sequence[float]], i: int, *, most: bool) -> list[int]:
    """Return the i-th class order in which each class is followed by the most (or least) similar one that is left.

    Args:
        similar: similarities of all pairs of classes.
        i: which order; each begins with another class, drawn with a fixed seed.
        most: whether neighbors are the most similar ones, else the least.
    """
    starts = sorted(range(len(similar)), key=lambda label: hashlib.sha256(f"{most} {label}".encode()).digest())
    order = [starts[i]]
    left = set(range(len(similar))) - set(order)
    sign = -1 if most else 1
    while left:
        row = similar[order[-1]]
        order.append(min(left, key=lambda label: (sign * row[label], label)))
        left.remove(order[-1])
    return order


def _similarities(config: Config) -> list[list[float]]:
    """Return the cosine of the mean training images of each pair of classes, by the data set's class numbers.

    Rounded to 6 decimals, so that the last bits of a sum do not decide an order. Raises as `build_scenario`.
    """
    import torch

    from clframe import registry

    scenario = registry.build_scenario(config.scenario, config.run)
    sums: dict[int, tuple[Any, int]] = {}
    for experience in scenario:
        data = experience.train
        for label in experience.classes:
            images = data.x[data.y == label].flatten(1).to(torch.float64)
            total, count = sums.get(label, (0.0, 0))
            sums[label] = total + images.sum(0), count + len(images)
    means = torch.stack([sums[label][0] / max(1, sums[label][1]) for label in sorted(sums)])
    means = torch.nn.functional.normalize(means, dim=1)
    found = torch.empty(len(means), len(means), dtype=torch.float64)
    numbers = torch.tensor(list(scenario.class_order))
    found[numbers[:, None], numbers[None, :]] = means @ means.T
    rounded: list[list[float]] = found.round(decimals=6).tolist()
    return rounded
