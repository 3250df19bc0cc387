"""The command `report`: the figures of a study, of several runs or of one, as a page, a table or a document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clframe.cli import show
from clframe.errors import UsageError, cannot_write
from clframe.system.reading import expand_home

if TYPE_CHECKING:
    from clframe.experiments.rendering import Format
    from clframe.experiments.statistics import Unit

DOWNLOADS = ("avalanche",)  # scenarios that may download data whenever they are built


def report(
    folders: Annotated[
        list[str], typer.Argument(metavar="RUN-OR-STUDY...", help="Folders of finished runs, and of studies.")
    ],
    format_: Annotated[
        Literal["html", "md", "csv", "latex", "json"],
        typer.Option("--format", metavar="html|md|csv|latex|json", help="Format [default: html].", show_default=False),
    ] = "html",
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="File to write [default: standard output].")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Method that others are compared with [default: fine-tuning, else the first]."
        ),
    ] = None,
    unit: Annotated[
        Literal["seed", "order"] | None,
        typer.Option(metavar="seed|order", help="What the tests count [default: seed]."),
    ] = None,
    without_costs: Annotated[
        bool, typer.Option("--without-costs", help="Leave out times, memory, host and date.")
    ] = False,
) -> None:
    """Report a study, several runs side by side, or one run.

    The page needs no network and no scripts. Several runs are a study: methods are named by what differs between them.
    """
    paths = [expand_home(folder) for folder in folders]
    text = _write_report(paths, format_, baseline, unit, not without_costs)
    if output is None:
        print(text, end="")
        return
    from clframe.system.writing import write_text

    path = expand_home(output)
    try:
        write_text(path, text)
    except OSError as error:
        raise cannot_write("The report", path, error) from error
    show.line(f"Report: {path}")


def _write_report(paths: list[Path], format: Format, baseline: str | None, unit: Unit | None, costs: bool) -> str:
    from clframe.experiments.report import is_study, read_outcome, report_study

    if len(paths) > 1 or is_study(paths[0]):
        return report_study(read_outcome(paths), format, baseline=baseline, unit=unit or "seed", costs=costs)
    for flag, given in (("--baseline", baseline), ("--unit", unit)):
        if given is not None:
            raise UsageError(
                f"`{flag}` is `{given}`, and one run is compared with nothing: leave it out, or name more runs."
            )
    from clframe.experiments.run_report import report_run
    from clframe.runs.files import read_config
    from clframe.runs.results import check_finished
    from clframe.scenarios import sources

    check_finished(paths[0])
    name = read_config(paths[0]).scenario.name.partition(":")[0]
    with sources.no_downloads():
        return report_run(paths[0], format, costs=costs, images=name not in DOWNLOADS)
