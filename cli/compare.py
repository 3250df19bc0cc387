"""The command `compare`: methods over scenarios, seeds and class orders, and the table that ranks them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clframe.cli import show
from clframe.cli.parameters import Engine, Json, Methods, Model, Quiet, StudySets, complete, whole_number
from clframe.errors import Interrupted, UsageError, cannot_write
from clframe.system.reading import expand_home, quote_path

if TYPE_CHECKING:
    from clframe.experiments.outcome import MethodRow, StudyOutcome
    from clframe.experiments.plan import Plan
    from clframe.experiments.statistics import Interval
    from clframe.experiments.study import Study
    from clframe.experiments.tuning import Effort

REPORT = "report.html"  # the report of a study in its folder
FAILED = 4  # exit code of a study with failed cells
OF_BUDGET = ("kind", "limit", "settings", "uses", "reason")
LISTED = 10  # names at most that a message has
# Columns that a narrow terminal does without, the first of them first.
SPARE = ("cells", "seconds", "learning accuracy", "forgetting", "tuned by", "95 % interval")
MEASURES = {"forgetting": "forgetting", "learning_accuracy": "learning accuracy"}  # columns beside the accuracy


def compare(
    folder: Annotated[
        str | None, typer.Argument(metavar="[FOLDER]", help="Folder of a study to go on with, and to add to.")
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            "--scenario",
            "-s",
            metavar="NAME",
            help="Scenario to learn; repeatable.",
            autocompletion=complete("scenario"),
        ),
    ] = None,
    method: Methods = None,
    plugin: Annotated[
        list[str] | None, typer.Option("--plugin", "-p", hidden=True, help="Refused: name a method with --method.")
    ] = None,
    model: Model = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N|FIRST-LAST", help="Number of seeds, or their range [default: 5].")
    ] = None,
    orders: Annotated[
        int | None, whole_number("Class orders, the same for all methods [default: the scenario's own].")
    ] = None,
    order_sampling: Annotated[
        Literal["random", "extreme"] | None,
        typer.Option(
            metavar="random|extreme",
            help="How class orders are drawn; extreme: a third each with the most and the least similar neighbors "
            "[default: random].",
        ),
    ] = None,
    baselines: Annotated[
        bool | None,
        typer.Option(
            "--baselines/--no-baselines",
            help="Compare with plain fine-tuning and joint training, too [default: baselines].",
            show_default=False,
        ),
    ] = None,
    set_: StudySets = None,
    tuned: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROTOCOL", help="Tune the methods first, by this protocol of `clframe tune`; repeatable."
        ),
    ] = None,
    trials: Annotated[int | None, whole_number("Trials of each tuning, as of `clframe tune`.")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="bytes=SIZE|steps=N|macs=N",
            help="Limit that each method keeps to, by its memory size or its iterations, such as bytes=4MB; "
            "repeatable.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="STUDY.yaml", help="File of a study.")
    ] = None,
    workers: Annotated[int | None, whole_number("Cells at a time [default: one for each CPU core].")] = None,
    engine: Engine = "local",
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of the study [default: a new one under runs/].")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and an estimate of the time, and stop.")
    ] = False,
    skip_refused: Annotated[
        bool, typer.Option("--skip-refused", help="Leave out methods that cannot learn a scenario.")
    ] = False,
    keep_stale: Annotated[
        bool, typer.Option("--keep-stale", help="Use finished cells whose code or data changed since.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Compare methods over scenarios, seeds and class orders, and print a table that ranks them.

    Each run is a cell of the study and has a run folder of its own; repeating the command goes on where it was stopped.
    """
    from clframe.experiments.budget import parse_budgets
    from clframe.experiments.folder import check_new, check_same, lock_study
    from clframe.experiments.plan import make_plan
    from clframe.experiments.study import Study
    from clframe.experiments.workers import check_device

    problems = _problems_of_flags(folder, output, plugin, engine, workers)
    asked = _read_flags(scenario, method, model, seeds, orders, order_sampling, baselines, set_, problems)
    if budget:
        asked["budget"] = parse_budgets(budget, problems)
    if problems:
        raise UsageError(*problems)
    if tuned or trials is not None:
        asked["tuning"] = {**({"protocols": tuned} if tuned else {}), **({} if trials is None else {"trials": trials})}
    if folder is not None:
        path = expand_home(folder)
        study = Study.read(path)
        if config is not None:
            check_same(Study.from_yaml(config), path)
        study = study.extended(asked)
    else:
        study = Study.from_yaml(config).extended(asked) if config is not None else Study.from_data(asked)
        path = _new_folder(study) if output is None else expand_home(output)
        check_new(path, study)
    check_device(study.device, engine)
    if dry_run:
        plan = make_plan(study, path, keep_stale=keep_stale)
        _print_cells(plan, path, json, _list_tunings(study, path, plan))
        return 0
    with lock_study(path):
        plan = make_plan(study, path, keep_stale=keep_stale)
        _check_refused(plan, skip_refused)
        study.write(path)
        if study.tuning.get("protocols"):
            from clframe.cli.tune import tune_study

            study = tune_study(study, path, plan.refused, engine, workers, quiet)
            plan = make_plan(study, path, keep_stale=keep_stale)
        plan.write(path)
        _say_what_differs(plan, keep_stale)
        _carry_out(plan, path, engine, workers, quiet)
        report = _write_report(path)
    return _print_outcome(path, report, json)


def _problems_of_flags(
    folder: str | None, output: str | None, plugin: list[str] | None, engine: str, workers: int | None
) -> list[str]:
    from clframe.experiments.workers import read_engine

    problems = []
    if plugin:
        named = "+".join(plugin)
        problems.append(
            f"`--plugin` combines methods in one run; to compare, use `--method {plugin[0]}`"
            + (f" for each, or `--method {named}` for one method of {len(plugin)} plugins." if len(plugin) > 1 else ".")
        )
    if folder is not None and output is not None:
        problems.append(f"The study has two folders, {quote_path(folder)} and `--output {output}`: name one.")
    try:
        read_engine(engine)
    except UsageError as error:
        problems += error.problems
    if workers is not None and workers < 1:
        problems.append(f"`--workers` is {workers}; it must be 1 or more.")
    return problems


def _read_flags(
    scenario: list[str] | None,
    method: list[str] | None,
    model: str | None,
    seeds: str | None,
    orders: int | None,
    order_sampling: str | None,
    baselines: bool | None,
    sets: list[str] | None,
    problems: list[str],
) -> dict[str, Any]:
    """Return what the options ask for in the form of a study file; sentences on mistakes are added to `problems`."""
    from clframe.config import parse_sets

    asked = {
        "scenarios": scenario or None,
        "methods": method or None,
        "model": model,
        "seeds": seeds,
        "orders": orders,
        "order_sampling": order_sampling,
        "baselines": baselines,
        "set": {
            f"{section}.{option}": value
            for section, values in parse_sets(sets or (), problems).items()
            for option, value in values.items()
        }
        or None,
    }
    return {key: value for key, value in asked.items() if value is not None}


def _new_folder(study: Study) -> Path:
    """Return the path of a new folder under runs/."""
    names = "+".join(dict.fromkeys(re.sub(r"[/:]+", "-", s["name"])[-40:] for s in study.scenarios))[:80]
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    path, count = Path("runs", f"study-{names}-{stamp}"), 1
    while path.exists():
        count += 1
        path = Path("runs", f"study-{names}-{stamp}-{count}")
    return path


def _check_refused(plan: Plan, skip: bool) -> None:
    """Raise `UsageError` if a method cannot learn a scenario, unless such cells are skipped and others are left."""
    if not plan.refused:
        return
    if not plan.cells:
        raise UsageError(*map(str, plan.refused))
    if not skip:
        rest = f"the other {len(plan.cells)} cells" if len(plan.cells) > 1 else "the other cell"
        raise UsageError(*map(str, plan.refused), f"`--skip-refused` goes on with {rest}.")
    for refused in plan.refused:
        show.note(f"Skipped: {refused}")


def _say_what_differs(plan: Plan, keep_stale: bool) -> None:
    """Print which finished cells are stale and why, and which cells on the disk are no longer asked for."""
    by_reason: dict[tuple[str, ...], int] = {}
    for stale in plan.stale:
        by_reason[stale.reasons] = by_reason.get(stale.reasons, 0) + 1
    for reasons, count in by_reason.items():
        listed = _list_names(reasons)
        cells, are = ("cell", "is") if count == 1 else ("cells", "are")
        then = "used nevertheless" if keep_stale else "run again; `--keep-stale` would use them"
        show.note(f"{count} finished {cells} {are} stale and {are} {then}: {listed}.")
    gone = [record for record in plan.left_out if record.address not in {stale.record.address for stale in plan.stale}]
    if gone:
        names = _list_names([record.folder.name for record in gone])
        show.note(f"No longer asked for, and left where they are: {names}.")


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _carry_out(plan: Plan, path: Path, engine: str, workers: int | None, quiet: bool) -> None:
    """Carry out the cells that are not finished. Raises `Interrupted` with how to go on."""
    from clframe.cli.study_live import StudyLive
    from clframe.experiments.children import share_cores
    from clframe.experiments.workers import run_cells

    waiting = plan.waiting()
    count = min(workers or share_cores(1), max(1, len(waiting)))
    with StudyLive(plan.cells, quiet) as live:
        try:
            run_cells(waiting, engine, count, live)
        except Interrupted as error:
            done = len(plan.cells) - len(plan.waiting())
            raise Interrupted(
                f"The study was stopped with {done} of {len(plan.cells)} cells finished, and those under way are "
                f"saved: `clframe compare {path}` goes on.",
                error.signal,
            ) from error
        except KeyboardInterrupt:
            show.note(f"`clframe compare {path}` goes on with the study.")
            raise


# -------------------------------------------------------------------------------------- what is printed


def _list_tunings(study: Study, path: Path, plan: Plan) -> list[tuple[Effort, bool]]:
    """Return the work of each tuning with which the study begins, and whether it has ended."""
    if not study.tuning.get("protocols"):
        return []
    from clframe.cli.tune import list_efforts

    return list_efforts(study, path, plan.refused)


def _print_cells(plan: Plan, path: Path, json: bool, tunings: Sequence[tuple[Effort, bool]]) -> None:
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


def _write_report(path: Path) -> Path | None:
    """Write the report of the study in `path` into its folder; return the file, or None if no cell is finished."""
    from clframe.experiments.folder import read_study
    from clframe.experiments.report import report_study
    from clframe.system.writing import write_text

    outcome = read_study(path)
    if not outcome.finished:
        return None
    file = path / REPORT
    try:
        write_text(file, report_study(outcome, "html"))
    except OSError as error:
        raise cannot_write("The report", file, error) from error
    return file


def _print_outcome(path: Path, report: Path | None, json: bool) -> int:
    """Print the ranked table of each scenario, and where the report is; return the exit code."""
    from clframe.experiments.folder import read_study

    outcome = read_study(path)
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
        show.line(f"Tuned by {stamp}: {_list_names(methods)}.")
    for row in rows:
        if held := next((cell.budget for cell in outcome.cells(scenario, row.method) if cell.budget), None):
            show.line(f"Budget of {row.method}: {held}.")
    if any(cell.stale for cell in outcome.cells(scenario)):
        stale = sorted({cell.method for cell in outcome.cells(scenario) if cell.stale})
        show.line(f"Some cells are of other code or data: {_list_names(stale)}.")
    claims = [row for row in rows if row.claim is not None]
    if made := [row.method for row in claims if row.claim and row.claim.made]:
        show.line(f"Differences to {baseline} that the cells show (p after Holm at most 0.05): {_list_names(made)}.")
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
