"""The command `compare`: methods over scenarios, seeds and class orders."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clframe.cli import show, study_output
from clframe.cli.parameters import Engine, Json, Methods, Model, Quiet, StudySets, complete, whole_number
from clframe.errors import Interrupted, UsageError, cannot_write
from clframe.system.reading import expand_home, quote_path

if TYPE_CHECKING:
    from clframe.experiments.outcome import StudyOutcome
    from clframe.experiments.plan import Plan
    from clframe.experiments.study import Study
    from clframe.experiments.tuning import Effort

REPORT = "report.html"  # the report of a study in its folder


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
    from clframe.experiments.folder import check_new, check_same, lock_study, read_study
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
        study_output.print_cells(plan, path, json, _list_tunings(study, path, plan))
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
        outcome = read_study(path)
        report = _write_report(outcome, path)
    return study_output.print_outcome(outcome, path, report, json)


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
        listed = study_output.list_names(reasons)
        cells, are = ("cell", "is") if count == 1 else ("cells", "are")
        then = "used nevertheless" if keep_stale else "run again; `--keep-stale` would use them"
        show.note(f"{count} finished {cells} {are} stale and {are} {then}: {listed}.")
    gone = [record for record in plan.left_out if record.address not in {stale.record.address for stale in plan.stale}]
    if gone:
        names = study_output.list_names([record.folder.name for record in gone])
        show.note(f"No longer asked for, and left where they are: {names}.")


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


def _list_tunings(study: Study, path: Path, plan: Plan) -> list[tuple[Effort, bool]]:
    """Return the work of each tuning with which the study begins, and whether it has ended."""
    if not study.tuning.get("protocols"):
        return []
    from clframe.cli.tune import list_efforts

    return list_efforts(study, path, plan.refused)


def _write_report(outcome: StudyOutcome, path: Path) -> Path | None:
    """Write the report of the study in `path` into its folder; return the file, or None if no cell is finished."""
    from clframe.experiments.report import report_study
    from clframe.system.writing import write_text

    if not outcome.finished:
        return None
    file = path / REPORT
    try:
        write_text(file, report_study(outcome, "html"))
    except OSError as error:
        raise cannot_write("The report", file, error) from error
    return file
