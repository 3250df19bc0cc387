"""What `clframe compare` prints: the cells of a plan, and the table that ranks the methods of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.cli import show

if TYPE_CHECKING:
    from clframe.experiments.outcome import MethodRow, StudyOutcome
    from clframe.experiments.plan import Plan
    from clframe.experiments.statistics import Interval
    from clframe.experiments.tuning import Effort

FAILED = 4  # exit code of a study with failed cells
LISTED = 10  # names at most that a message has
OF_BUDGET = ("kind", "limit", "settings", "uses", "reason")
# Columns that a narrow terminal does without, the first of them first.
SPARE = ("cells", "seconds", "learning accuracy", "forgetting", "tuned by", "95 % interval")
MEASURES = {"forgetting": "forgetting", "learning_accuracy": "learning accuracy"}  # columns beside the accuracy


def list_names(names: Sequence[str]) -> str:
    """Return `names` as a message has them, `LISTED` of them at most."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def print_cells(plan: Plan, path: Path, json: bool, tunings: Sequence[tuple[Effort, bool]]) -> None:
    """Print the tunings of a study and the cells of its plan, and how long what is left may take."""
    from clframe.cli.live import format_duration
    from clframe.experiments.cells import state_of

    states = [state_of(cell.folder) for cell in plan.cells]
    seconds = _estimate(plan, states, [effort for effort, ended in tunings if not ended])
    if json:
        show.document(
            {
                "folder": str(path),
                "cells": [
                    {
                        "method": cell.method,
                        "scenario": cell.scenario,
                        "seed": cell.seed,
                        "order": cell.order,
                        "state": state,
                        "stale": list(cell.stale),
                        "folder": str(cell.folder),
                    }
                    for cell, state in zip(plan.cells, states, strict=True)
                ],
                "refused": [{"method": r.method, "scenario": r.scenario, "reasons": r.reasons} for r in plan.refused],
                "budget": [
                    {"method": method, "scenario": label, **{name: vars(one)[name] for name in OF_BUDGET}}
                    for (method, label), held in plan.held.items()
                    for one in held
                ],
                **({"tunings": [_describe_tuning(*one) for one in tunings]} if tunings else {}),
                "seconds_left": seconds,
            }
        )
        return
    if tunings:
        _print_tunings(tunings)
    show.table(
        ["method", "scenario", "seed", "order", "state"],
        [
            [cell.method, cell.scenario, str(cell.seed), "-" if cell.order is None else str(cell.order), state]
            for cell, state in zip(plan.cells, states, strict=True)
        ],
        numbers=True,
    )
    for (method, label), held in plan.held.items():
        for one in held:
            reason = f": {one.reason}" if one.reason else ""
            show.line(f"Budget: {method} on {label}: {one.describe()}{reason}.")
    for refused in plan.refused:
        show.line(f"Refused: {refused}")
    waiting = sum(state != "finished" for state in states)
    show.line(f"{len(plan.cells)} cells, {waiting} to carry out.")
    if waiting:
        show.line(
            "No cell is finished yet, from which the time could be estimated."
            if seconds is None
            else f"About {format_duration(seconds)} of computing, as the finished cells took."
        )
        if seconds is not None and any(effort.whole_runs is None for effort, ended in tunings if not ended):
            show.line("Tunings on other scenarios are not counted in that.")


def _print_tunings(tunings: Sequence[tuple[Effort, bool]]) -> None:
    """Print the trials of each tuning, which come before the cells of the study."""
    documents = [_describe_tuning(*one) for one in tunings]
    columns = ["method", "scenario", "protocol", "trials", "rounds", "runs", "state"]
    show.table(columns, [[str(document[name]) for name in columns] for document in documents], numbers=True)
    left = sum(effort.runs for effort, ended in tunings if not ended)
    show.line(f"{left:,} runs at most to tune, before the cells below; what is chosen changes the options of these.")
    show.line()


def _describe_tuning(effort: Effort, ended: bool) -> dict[str, Any]:
    return {
        "method": effort.tuning.method.name,
        "scenario": effort.tuning.label,
        "protocol": effort.tuning.protocol.label,
        "trials": effort.trials,
        "rounds": effort.rounds,
        "runs": effort.runs,
        "state": "finished" if ended else "waiting",
    }


def _estimate(plan: Plan, states: Sequence[str], tunings: Sequence[Effort] = ()) -> float | None:
    """Return the seconds that the cells that are left take, one after another; None if no cell is finished.

    A cell takes the mean of its method on its scenario, else of its scenario, else of all. A tuning takes this for as
    many experiences as its runs learn; one on another scenario is not counted.
    """
    from clframe.runs.results import read_results

    took: dict[tuple[str, ...], list[float]] = {}
    for cell, state in zip(plan.cells, states, strict=True):
        if state == "finished":
            rows = read_results(cell.folder).timings.get("experiences", [])
            for key in ((cell.scenario, cell.method), (cell.scenario,), ()):
                took.setdefault(key, []).append(sum(row["seconds"] for row in rows))
    if not took:
        return None
    total = 0.0
    for cell, state in zip(plan.cells, states, strict=True):
        if state != "finished":
            keys = ((cell.scenario, cell.method), (cell.scenario,), ())
            known = next(took[key] for key in keys if key in took)
            total += sum(known) / len(known)
    for effort in tunings:
        keys = ((effort.tuning.label, effort.tuning.method.name), (effort.tuning.label,), ())
        known = next(took[key] for key in keys if key in took)
        total += (effort.whole_runs or 0.0) * sum(known) / len(known)
    return total


def print_outcome(outcome: StudyOutcome, path: Path, report: Path | None, json: bool) -> int:
    """Print the ranked table of each scenario, and where the report is; return the exit code."""
    if json:
        show.document(_describe(outcome, path))
    else:
        for scenario in outcome.scenarios:
            _print_table(outcome, scenario)
        for cell in outcome.unfinished:
            if cell.state == "failed":
                show.line(f"Failed: {cell.method} on {cell.scenario}, seed {cell.seed}: {cell.sentence}")
        show.line(f"Report: {report}" if report else f"Study folder: {path}")
    return FAILED if any(cell.state == "failed" for cell in outcome.unfinished) else 0


def _print_table(outcome: StudyOutcome, scenario: str) -> None:
    """Print the table of one scenario, the best method first, and what its differences show."""
    mode = next(iter(outcome.modes(scenario)), "")
    rows = outcome.table(scenario)
    baseline = outcome.choose_baseline()
    title = f"Average accuracy in percent on {scenario}"
    show.line(f"{title}, {show.MODES[mode]}:" if mode in show.MODES else f"{title}:")
    compared = any(row.paired for row in rows)
    against = [f"to {baseline}", "95 % interval", "p"] if compared else []
    tuned = {cell.method: cell.tuned for cell in outcome.cells(scenario) if cell.tuned}
    headers = ["method", "mean", "95 % interval", *against, *MEASURES.values(), "seconds", "cells"]
    shown = [_row(outcome, scenario, mode, row, compared) for row in rows]
    if tuned:
        headers.append("tuned by")
        short = {method: stamp.partition(";")[0] for method, stamp in tuned.items()}  # the protocol
        shown = [[*texts, short.get(row.method, "as given")] for texts, row in zip(shown, rows, strict=True)]
    show.table(headers, shown, numbers=True, spare=SPARE)
    for stamp in dict.fromkeys(tuned.values()):
        methods = [row.method for row in rows if tuned.get(row.method) == stamp]
        show.line(f"Tuned by {stamp}: {list_names(methods)}.")
    for row in rows:
        if held := next((cell.budget for cell in outcome.cells(scenario, row.method) if cell.budget), None):
            show.line(f"Budget of {row.method}: {held}.")
    if any(cell.stale for cell in outcome.cells(scenario)):
        stale = sorted({cell.method for cell in outcome.cells(scenario) if cell.stale})
        show.line(f"Some cells are of other code or data: {list_names(stale)}.")
    claims = [row for row in rows if row.claim is not None]
    if made := [row.method for row in claims if row.claim and row.claim.made]:
        show.line(f"Differences to {baseline} that the cells show (p after Holm at most 0.05): {list_names(made)}.")
    elif claims and claims[0].claim:
        show.line(f"{claims[0].claim.reason[0].upper()}{claims[0].claim.reason[1:]}.")
    show.line()


def _row(outcome: StudyOutcome, scenario: str, mode: str, row: MethodRow, compared: bool) -> list[str]:
    paired = row.paired
    against = []
    if compared:
        against = [
            "" if paired is None or paired.mean is None else f"{100 * paired.mean:+.1f}",
            "" if paired is None else _format_interval(paired.interval, sign=True),
            "" if row.p is None else f"{row.p:.2g}",
        ]
    measures = [outcome.mean(scenario, row.method, name, mode).value for name in MEASURES]
    seconds = outcome.mean(scenario, row.method, "seconds", mode).value
    return [
        row.method,
        show.format_percent(row.mean.value),
        _format_interval(row.mean.interval),
        *against,
        *map(show.format_percent, measures),
        "-" if seconds is None else f"{seconds:.1f}",
        str(row.cells),
    ]


def _format_interval(interval: Interval | None, sign: bool = False) -> str:
    if interval is None:
        return "-"
    low, high = (f"{100 * end:+.1f}" if sign else f"{100 * end:.1f}" for end in interval)
    return f"{low} to {high}"


def _describe(outcome: StudyOutcome, path: Path) -> Mapping[str, Any]:
    """Return the document of `--json`: figures from 0 to 1."""
    baseline = outcome.choose_baseline()
    scenarios = {}
    for scenario in outcome.scenarios:
        mode = next(iter(outcome.modes(scenario)), "")
        scenarios[scenario] = {
            "mode": mode,
            "baseline": baseline,
            "methods": [
                {
                    "method": row.method,
                    "tuned": next((cell.tuned for cell in outcome.cells(scenario, row.method) if cell.tuned), None),
                    "budget": next((cell.budget for cell in outcome.cells(scenario, row.method) if cell.budget), None),
                    "cells": row.cells,
                    "mean": row.mean.value,
                    "interval": row.mean.interval,
                    "difference": row.paired and row.paired.mean,
                    "difference_interval": row.paired and row.paired.interval,
                    "p": row.p,
                    "claim": row.claim and {"made": row.claim.made, "reason": row.claim.reason},
                    **{name: outcome.mean(scenario, row.method, name, mode).value for name in (*MEASURES, "seconds")},
                }
                for row in outcome.table(scenario)
            ],
        }
    return {
        "folder": str(path),
        "scenarios": scenarios,
        "unfinished": [vars(cell) for cell in outcome.unfinished],
        "left_out": list(outcome.left_out),
    }
