"""The commands `clframe runs`: which runs there are, what one is, how two differ, which came from which."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clframe.cli import show
from clframe.cli.parameters import Json
from clframe.errors import DataError
from clframe.system.reading import blame_file, expand_home

if TYPE_CHECKING:
    from clframe.runs.comparison import Comparison, Difference
    from clframe.runs.listing import RunSummary

app = typer.Typer(help="Runs that were made: list them, look at one, compare two.")

Column = Literal[
    "run", "state", "scenario", "setting", "methods", "model", "seed", "accuracy", "forgetting", "seconds", "date"
]
SPARE = ("date", "seconds", "setting", "model", "seed", "forgetting")  # columns that a narrow terminal does without
NAMES = ("plugins", "scenario.name")  # settings that are the name of the run, whatever their defaults are
RunsFolder = Annotated[str, typer.Argument(metavar="FOLDER", help="Folder that holds run folders, at any depth.")]
AnyRun = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.")]


@app.command("list")
def list_runs(
    folder: RunsFolder = "runs",
    sort: Annotated[
        Column, typer.Option(metavar="COLUMN", help="Column to sort by, such as accuracy [default: run].")
    ] = "run",
    reverse: Annotated[bool, typer.Option("--reverse", help="Sort downward: the largest first.")] = False,
    json: Json = False,
) -> None:
    """List the runs in a folder, with their state and their figures.

    Accuracy and forgetting are in percent, in the evaluation mode of the run's setting.
    """
    found = _find(folder)
    order = {run.path: i for i, run in enumerate(found)}
    columns: dict[str, Callable[[RunSummary], Any]] = {
        "run": lambda run: order[run.path],
        "state": lambda run: run.status,
        "scenario": lambda run: run.scenario,
        "setting": lambda run: run.setting,
        "methods": lambda run: None if run.methods is None else _name_methods(run),
        "model": lambda run: run.model,
        "seed": lambda run: run.seed,
        "accuracy": lambda run: run.measure("average_accuracy"),
        "forgetting": lambda run: run.measure("forgetting"),
        "seconds": lambda run: run.seconds,
        "date": lambda run: run.begun,
    }
    value = columns[sort]
    sorted_ = sorted((run for run in found if value(run) is not None), key=value, reverse=reverse)
    runs = [*sorted_, *(run for run in found if value(run) is None)]
    if json:
        show.document([_describe(run) for run in runs])
        return
    if not runs:
        return
    show.table(list(columns), [_row(run) for run in runs], spare=SPARE)
    for run in runs:
        if run.problem:
            show.note(run.problem)


@app.command("show")
def show_run(
    folder: AnyRun,
    all_: Annotated[
        bool, typer.Option("--all", help="Print every setting, not only those that differ from the defaults.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the settings and figures of a run, where its files are, and what can be done with it."""
    from clframe.config import list_defaults, list_settings
    from clframe.runs import listing
    from clframe.runs.files import CHECKPOINTS, list_checkpoints
    from clframe.runs.results import RESULTS_FILE

    path = expand_home(folder)
    run = listing.open_run(path)
    damage = listing.find_damage(path) if run.state == "finished" else []
    problems = list(dict.fromkeys([*([run.problem] if run.problem else []), *damage]))
    settings = list_settings(run.config) if run.config else {}
    defaults = list_defaults(run.config) if run.config else {}
    changed = {
        name: value
        for name, value in settings.items()
        if name not in (*NAMES, *listing.OF_THE_MACHINE) and (name not in defaults or defaults[name] != value)
    }
    chain = listing.trace(run)
    checkpoints = list_checkpoints(path / CHECKPOINTS)
    steps = [] if problems else _advise(run, folder)
    with blame_file(path / RESULTS_FILE):
        if json:
            show.document(
                {
                    **_describe(run),
                    "problems": problems,
                    "changed": changed,
                    "settings": settings,
                    "origin": [
                        {"how": how, "run": str(place), "state": past.status if past else None}
                        for how, place, past in chain
                    ],
                    "checkpoints": [str(checkpoint) for checkpoint in checkpoints],
                    "next": steps,
                    "results": run.results.data if run.results else None,
                    "timings": run.results.timings if run.results else None,
                }
            )
        else:
            show.line(f"{folder}: {run.status}")
            if run.config:
                show.line(f"{run.scenario} with {_name_methods(run)} on {run.model}, seed {run.seed}")
            if run.begun:
                learned = "" if run.seconds is None else f", {run.seconds:.1f} s of learning"
                show.line(f"Begun: {run.begun:%Y-%m-%d %H:%M}{learned}")
            for how, place, past in chain:
                show.line(f"{how.capitalize()}: {place} ({past.status if past else 'not there'})")
            show.line()
            _print_settings("Settings that differ from the defaults", changed, defaults)
            others = {name: value for name, value in settings.items() if name not in changed}
            if all_:
                _print_settings("Other settings", others, None)
            elif others:
                show.line(f"{len(others)} other settings: `--all` prints them.")
            show.line()
            if run.results:
                show.results(run.results, False)
            if checkpoints:
                show.line(f"Checkpoints: {', '.join(map(str, checkpoints))}")
            for step in steps:
                show.line(f"Next: {step}")
    if problems:
        raise DataError("\n".join(problems))


@app.command("diff")
def diff_runs(
    first: Annotated[str, typer.Argument(metavar="A", help="Folder of a run.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Folder of another run.")],
    json: Json = False,
) -> None:
    """Show which settings and figures of two runs differ.

    Runs are the same to the bit if all of their figures and the tensors of their models are equal.
    """
    from clframe.runs import comparison

    found = comparison.compare(expand_home(first), expand_home(second))
    if json:
        show.document(
            {
                "runs": [first, second],
                "identical": found.identical,
                "same_model": found.same_model,
                "settings": [_as_document(one, change=False) for one in found.settings],
                "figures": [_as_document(one) for one in found.figures],
                "accuracy": [_as_document(one) for one in found.entries],
                "environment": [_as_document(one, change=False) for one in found.environment],
                "costs": [_as_document(one) for one in found.costs],
            }
        )
        return
    headers = ["", first, second]
    _print_differences("Settings", headers, [[d.name, _text(d.first), _text(d.second)] for d in found.settings])
    if found.identical is not None:
        _print_differences("Figures, in percent", [*headers, "difference"], [_figure_row(one) for one in found.figures])
        _print_entries(found)
    _print_differences("Environment", headers, [[d.name, _text(d.first), _text(d.second)] for d in found.environment])
    if found.costs:
        costs = [[d.name.replace("_", " "), _count(d.first), _count(d.second)] for d in found.costs]
        _print_differences("Costs", headers, costs)
    show.line(_conclude(found))


@app.command("tree")
def tree_runs(folder: RunsFolder = "runs", json: Json = False) -> None:
    """Show which runs extend others, or start from their network, as a tree."""
    from clframe.runs import listing

    branches = listing.arrange(_find(folder))
    if json:
        show.document(
            [
                {
                    "run": str(branch.path),
                    "how": branch.parent[0] if branch.parent else None,
                    "parent": str(branch.parent[1]) if branch.parent else None,
                    "level": branch.level,
                    "state": branch.summary.status if branch.summary else None,
                }
                for branch in branches
            ]
        )
        return
    rows = []
    for branch in branches:
        run = branch.summary
        if run is None:
            about = f"not in {folder}"
        else:
            accuracy = run.measure("average_accuracy")
            parts = [branch.parent[0] if branch.parent else None, run.scenario, run.config and _name_methods(run)]
            parts += [run.status, None if accuracy is None else f"accuracy {show.format_percent(accuracy)}"]
            about = ", ".join(part for part in parts if part)
        rows.append((branch.level, f"{branch.path}: {about}"))
    show.tree(rows)


def _find(folder: str) -> list[RunSummary]:
    """Return the runs in `folder`; where there are none, and of what was not searched, a sentence is printed."""
    from clframe.runs import listing

    notes: list[str] = []
    found = [listing.summarize(path) for path in listing.find_runs(expand_home(folder), notes)]
    if not found:
        show.note(f"There is no run folder in {folder}: `clframe run` makes one.")
    for text in notes:
        show.note(text)
    return found


def _describe(run: RunSummary) -> dict[str, Any]:
    """Return a run as the JSON documents hold it."""
    how, origin = run.parent or (None, None)
    return {
        "run": str(run.path),
        "state": run.state,
        "problem": run.problem,
        "experience": None if run.experience is None else run.experience + 1,
        "experiences": run.experiences,
        "scenario": run.scenario,
        "setting": run.setting,
        "methods": run.methods,
        "model": run.model,
        "seed": run.seed,
        "average_accuracy": run.measure("average_accuracy"),
        "forgetting": run.measure("forgetting"),
        "seconds": run.seconds,
        "begun": run.begun.isoformat(timespec="seconds") if run.begun else None,
        "extends": str(origin) if how == "extends" else None,
        "starts_from": str(origin) if how == "starts from" else None,
    }


def _row(run: RunSummary) -> list[str]:
    """Return a run as a row of the table."""
    return [
        str(run.path),
        run.status,
        run.scenario or "-",
        run.setting or "-",
        "-" if run.methods is None else _name_methods(run),
        run.model or "-",
        "-" if run.seed is None else str(run.seed),
        show.format_percent(run.measure("average_accuracy")),
        show.format_percent(run.measure("forgetting")),
        "-" if run.seconds is None else f"{run.seconds:.1f}",
        f"{run.begun:%Y-%m-%d %H:%M}" if run.begun else "-",
    ]


def _name_methods(run: RunSummary) -> str:
    return "+".join(run.methods or ()) or "fine-tuning"


def _advise(run: RunSummary, folder: str) -> list[str]:
    """Return the commands that go on with a run, each with what it does."""
    quoted = shlex.quote(folder)
    if run.state == "running":
        return ["a process is working on the run: wait for it, or stop it with Ctrl-C, which saves the run."]
    if run.has_objects:  # which no command line can give
        done = run.state == "finished"
        names = "`clframe.load` and `clframe.extend`" if done else "`clframe.resume`"
        return [f"{names} of Python, as a program gave parts of the run as objects, and gives them again."]
    if run.state == "stopped":
        return [f"`clframe resume {quoted}` goes on from here."]
    return [
        f"`clframe predict {quoted} IMAGES...` classifies images.",
        f"`clframe export {quoted} --format onnx --output FILE` writes the model to a file.",
        f"`clframe extend {quoted} --scenario NAME` learns more.",
    ]


def _print_settings(title: str, settings: dict[str, Any], defaults: dict[str, Any] | None) -> None:
    """Print a table of settings; with `defaults`, each beside its own."""
    if not settings:
        show.line(f"{title}: none")
        return
    show.line(f"{title}:")
    if defaults is None:
        show.table(["setting", "value"], [[name, show.format_value(value)] for name, value in settings.items()])
        return
    rows = [
        [name, show.format_value(value), show.format_value(defaults[name]) if name in defaults else "-"]
        for name, value in settings.items()
    ]
    show.table(["setting", "value", "default"], rows)


def _print_differences(title: str, headers: Sequence[str], rows: show.Rows) -> None:
    """Print a table of differences under its title; "the same" if there are none."""
    if not rows:
        show.line(f"{title}: the same")
        return
    show.line(f"{title}:")
    show.table(headers, rows)


def _print_entries(found: Comparison) -> None:
    """Print a sentence on each accuracy matrix that differs."""
    by_mode: dict[str, list[Difference]] = {}
    for one in found.entries:
        by_mode.setdefault(one.name.partition("[")[0], []).append(one)
    for mode, entries in by_mode.items():
        changes = [abs(one.change) for one in entries if one.change is not None]
        at_most = f", by {100 * max(changes):.3g} at most" if changes else ""
        count = f"{len(entries)} entries differ" if len(entries) > 1 else "1 entry differs"
        show.line(f"Accuracy matrix in percent, {show.MODES.get(mode, mode)}: {count}{at_most}")


def _conclude(found: Comparison) -> str:
    """Return the sentence on whether two runs are the same to the bit."""
    if found.identical is None:
        open_ = [run for run in found.runs if run.results is None]
        listed = " and ".join(f"{run.path} is {run.status}" for run in open_)
        return f"Figures are compared of finished runs only: {listed}."
    if found.identical:
        return "The runs are the same to the bit: all figures, and the tensors of the models, are equal."
    if found.same_model:
        return "The runs differ in figures; the tensors of the models are equal."
    if not found.figures and not found.entries:
        return "All figures are equal; the tensors of the models are not."
    return "The runs differ."


def _as_document(one: Difference, change: bool = True) -> dict[str, Any]:
    """Return a difference as the JSON documents hold it; the value of a run that has none is left out."""
    from clframe.runs.comparison import ABSENT

    values = {key: value for key, value in (("a", one.first), ("b", one.second)) if value is not ABSENT}
    return {"name": one.name, **values, **({"difference": one.change} if change else {})}


def _text(value: Any) -> str:
    """Return one of two values that differ; a dash if the run has none."""
    from clframe.runs.comparison import ABSENT

    if value is ABSENT:
        return "-"
    if isinstance(value, list) and all(isinstance(name, str) for name in value):  # such as `plugins`
        return "+".join(value) or "none"
    return show.format_value(value)


def _count(value: Any) -> str:
    """Return seconds or bytes; a dash if the run has none."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if isinstance(value, float) else "-"


def _figure_row(one: Difference) -> list[str]:
    """Return a figure that differs as a row: name, both values, difference; shares of 1 are in percent."""
    mode, _, measure = one.name.partition(".")
    scale, digits, unit = (1, 4, " (in nats)") if measure == "nll" else (100, 2, "")
    values = [f"{scale * v:.{digits}f}" if isinstance(v, float | int) else "-" for v in (one.first, one.second)]
    change = "-" if one.change is None else f"{scale * one.change:+.3g}"
    return [f"{measure.replace('_', ' ')}{unit}, {show.MODES.get(mode, mode)}", *values, change]
