"""The report of a study: its tables, plots and statements, as HTML, Markdown, CSV, LaTeX or JSON.

Each format shows the document of `clframe.experiments.document`, which is the JSON format; HTML adds plots. Nothing
here imports torch, and matplotlib and jinja2 are imported where a format needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clframe.errors import DataError, UsageError, did_you_mean
from clframe.experiments import plots, rendering
from clframe.experiments.document import BESIDE, COSTS, MEASURE, describe_study
from clframe.experiments.folder import read_study
from clframe.experiments.outcome import FinishedCell, StudyOutcome, read_runs, rerun
from clframe.experiments.rendering import FORMATS, LIMIT, Format, thin_out
from clframe.experiments.statistics import Estimate, Interval, Unit
from clframe.experiments.study import STUDY

WIDEST = 12  # experiences of a matrix that are shown
# What is left out of a page that would be too large, in this order.
PARTS = ("matrices", "commands", "plots of costs and calibration", "other plots")


def report_study(
    outcome: StudyOutcome,
    format: Format = "html",
    *,
    baseline: str | None = None,
    unit: Unit = "seed",
    costs: bool = True,
) -> str:
    """Return the report of a study as a text.

    Args:
        outcome: what the study has found.
        format: of the text. The tables of `md`, `latex` and `csv` show the evaluation mode of the setting; `json` has
            every figure.
        baseline: label of the method that others are compared with; None: as `StudyOutcome.choose_baseline`.
        unit: what the tests count, "seed" or "order".
        costs: include times, memory, host and date, which differ between repetitions of one study.

    Raises:
        UsageError: there is no such format, baseline or unit.
        DataError: no cell of the study is finished.
    """
    check_format(format)
    if not outcome.finished:
        where = f" in {outcome.folder}" if outcome.folder else ""
        raise DataError(f"No run of the study{where} is finished, so there is nothing to report: let it run first.")
    document = describe_study(outcome, baseline=baseline, unit=unit, costs=costs)
    if format == "json":
        from clframe.system.writing import to_json

        return to_json(document)
    if format == "csv":
        return _to_csv(document)
    if format == "md":
        return rendering.render("study.md", **document)
    if format == "latex":
        return rendering.render("study.tex", **document)
    return _to_html(outcome, document)


def check_format(format: str) -> None:
    """Raise `UsageError` if a report has no such format."""
    if format not in FORMATS:
        raise UsageError(f"`--format` is `{format}`, which a report does not have.{did_you_mean(format, FORMATS)}")


# What is reported.


def is_study(folder: Path) -> bool:
    """Return whether `folder` is that of a study."""
    return (folder / STUDY).is_file()


def read_outcome(folders: Sequence[Path]) -> StudyOutcome:
    """Return the cells of the studies and the runs in `folders` as one study.

    Raises:
        DataError: a folder holds neither a study nor a finished run, or a file in it is damaged.
        UsageError: two of them have a cell of the same method, scenario, seed and class order.
    """
    studies = [read_study(folder) for folder in folders if is_study(folder)]
    runs = [folder for folder in folders if not is_study(folder)]
    if len(folders) == 1 and studies:
        return studies[0]
    found = [*studies, *([read_runs(runs)] if runs else [])]
    if len(found) == 1:
        return found[0]
    # commands of a study begin in its folder
    cells = [replace(cell, command=rerun(cell.folder)) for outcome in found for cell in outcome.finished]
    first: dict[tuple[str, str, int, int | None], FinishedCell] = {}
    for cell in cells:
        same = first.setdefault((cell.scenario, cell.method, *cell.key), cell)
        if same is not cell:
            raise UsageError(
                f"{same.folder} and {cell.folder} are runs of `{cell.method}` on `{cell.scenario}` with the seed "
                f"{cell.seed}: report them one after the other."
            )
    unfinished = tuple(cell for outcome in found for cell in outcome.unfinished)
    notes = tuple(note for outcome in found for note in outcome.notes)
    return StudyOutcome(tuple(cells), unfinished, notes=notes)


# Formats.


def _to_csv(document: dict[str, Any]) -> str:
    """Return a table with a row for each scenario and method; figures are shares of 1, bytes and seconds."""
    ends = ("value", "low", "high")
    shown = (*BESIDE, *COSTS) if document["costs"] else BESIDE
    headers = ["scenario", "mode", "method", "cells", "units", MEASURE, f"{MEASURE}_low", f"{MEASURE}_high"]
    headers += ["tenth_percentile", "baseline", "pairs", "difference", "difference_low", "difference_high"]
    headers += ["bca_low", "bca_high", "p", "p_holm", "claimed"]
    headers += [name + end for name in shown for end in ("", "_low", "_high")] + ["tuned", "budget", "stale"]
    learning = [scenario.get("while_learning") for scenario in document["scenarios"]]
    measures = list(dict.fromkeys(name for within in learning if within for name in within["measures"]))
    headers += [name + end for name in measures for end in ("", "_low", "_high")]
    rows = []
    for scenario, within in zip(document["scenarios"], learning, strict=True):
        of_method = {row["method"]: row for row in within["rows"]} if within else {}
        for row in scenario["rows"]:
            difference = row["difference"] or {}
            names = ("count", *ends, "bca_low", "bca_high", "p", "p_holm", "claimed")
            rows.append(
                [scenario["scenario"], scenario["mode"], row["method"], row["cells"], row[MEASURE]["count"]]
                + [row[MEASURE][end] for end in ends]
                + [row["tenth_percentile"], document["baseline"] if difference else None]
                + [difference.get(name) for name in names]
                + [row[name][end] for name in shown for end in ends]
                + [row["tuned"], row["budget"], row["stale"]]
                + [of_method.get(row["method"], {}).get(name, {}).get(end) for name in measures for end in ends]
            )
    return rendering.to_csv(headers, rows)


def _to_html(outcome: StudyOutcome, document: dict[str, Any]) -> str:
    """Return the page; parts that would make it too large are left out, and the page says so."""
    drawn = [_draw_scenario(document, one) for one in document["scenarios"]]
    ranks = _draw_across(document)
    page = ""
    for number in range(len(PARTS) + 1):
        left_out = PARTS[:number]
        kept = drawn if PARTS[2] not in left_out else [[one for one in of if not one["extra"]] for of in drawn]
        kept = kept if PARTS[3] not in left_out else []
        page = rendering.render_page(
            "study.html",
            **document,
            plots=kept,
            ranks=ranks if kept else None,
            parts_left_out=left_out,
            modes_of={one["scenario"]: one["mode"] for one in document["scenarios"]},
            thin=thin_matrix,
            widest=WIDEST,
        )
        if len(page.encode("utf-8")) < LIMIT:
            break
    return page


def thin_matrix(matrix: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Return the rows and columns of a matrix that are shown, and their numbers from 1."""
    columns = thin_out(max(map(len, matrix), default=0), WIDEST)
    after = [i for i in thin_out(len(matrix), WIDEST) if any(entry is not None for entry in matrix[i])]
    rows = [(i + 1, [matrix[i][j] if j < len(matrix[i]) else None for j in columns]) for i in after]
    return {"columns": [j + 1 for j in columns], "rows": rows}


def _draw_scenario(document: dict[str, Any], scenario: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the plots of a scenario, each with a caption; a method has one color in all of them."""
    from markupsafe import Markup

    series = {method: place for place, method in enumerate(document["methods"])}
    rows, name = scenario["rows"], scenario["scenario"]
    accuracy = f"average accuracy on {name}"
    drawn = []

    def add(svg: str, caption: str, *, extra: bool = False) -> None:
        drawn.append({"svg": Markup(svg), "caption": caption, "keys": [], "marked": True, "extra": extra})

    def to_estimate(found: dict[str, Any]) -> Estimate:
        interval = None if found["low"] is None else Interval(found["low"], found["high"])
        return Estimate(found["value"], interval, found["count"])

    bars = [plots.Bar(row["method"], to_estimate(row[MEASURE]), series[row["method"]]) for row in rows]
    add(plots.draw_bars(bars, "average accuracy, %", accuracy), "Average accuracy at the end, mean and 95 % interval.")
    differences = [
        plots.Bar(
            row["method"], to_estimate(row["difference"]), series[row["method"]], not row["difference"]["claimed"]
        )
        for row in rows
        if row["difference"] and row["difference"]["value"] is not None
    ]
    if differences:
        add(
            plots.draw_bars(
                differences, "difference, percentage points", f"differences to {document['baseline']}", zero=True
            ),
            f"Paired difference to {document['baseline']}, mean and 95 % interval. Filled marks: claimed.",
        )
    for kind, label, caption in (
        ("accuracy", "accuracy so far, %", "Average accuracy on the experiences learned so far."),
        ("forgetting", "forgetting so far, %", "Forgetting of the experiences learned so far."),
    ):
        lines = []
        for method in document["methods"]:
            curve = scenario["curves"].get(method, {}).get(kind, [])
            known = [(i, one) for i, one in enumerate(curve, start=1) if one["value"] is not None]
            points = [(float(i), float(one["value"])) for i, one in known]
            lines.append(plots.Line(method, points, [to_estimate(one).interval for _, one in known]))
        if any(len(line.points) > 1 for line in lines):
            add(
                plots.draw_lines(lines, "experiences learned", label, f"{kind} on {name} while learning"),
                f"{caption} Bands: 95 % intervals.",
            )
    if within := scenario.get("while_learning"):
        lines = []
        for method in document["methods"]:
            curve = within["curves"].get(method, [])
            points = [(float(one["step"]), float(one["value"])) for one in curve]
            lines.append(plots.Line(method, points, [to_estimate(one).interval for one in curve]))
        if any(len(line.points) > 1 for line in lines):
            svg = plots.draw_lines(
                lines,
                "steps",
                "accuracy so far, %",
                f"accuracy on {name} at each evaluation",
                marked=False,
                ends=within["ends"],
            )
            caption = "Accuracy on all test images of the experiences seen by that step. Bands: 95 % intervals."
            add(svg, f"{caption} Vertical lines: ends of experiences." if within["ends"] else caption)
    for what, label, write, caption in (
        (
            "bytes_kept",
            "bytes kept",
            rendering.format_size,
            "Average accuracy over the bytes that a method keeps beside the network.",
        ),
        ("seconds", "time of learning", rendering.format_time, "Average accuracy over the time of learning."),
    ):
        of = {row["method"]: row for row in rows}
        if what not in rows[0]:
            continue
        points_of: dict[str, tuple[float, float] | None] = {}
        for method in document["methods"]:
            row = of.get(method)
            given = row and (row[what]["value"], row[MEASURE]["value"])
            points_of[method] = (given[0], given[1]) if given and None not in given else None
        if any(points_of.values()):
            add(
                plots.draw_scatter(points_of, label, "average accuracy, %", f"accuracy over {label} on {name}", write),
                caption,
                extra=True,
            )
    errors = [
        plots.Bar(row["method"], to_estimate(row["ece"]), series[row["method"]])
        for row in sorted(rows, key=lambda row: row["ece"]["value"] or 0.0)
        if row["ece"]["value"] is not None
    ]
    if errors:
        add(
            plots.draw_bars(errors, "expected calibration error, %", f"calibration on {name}"),
            "Expected calibration error (ECE) at the end, the lowest first.",
            extra=True,
        )
    return drawn


def _draw_across(document: dict[str, Any]) -> dict[str, Any] | None:
    """Return the critical-difference diagram; None below eight scenarios."""
    from markupsafe import Markup

    across = document["across"]
    if not across or across["critical_difference"] is None:
        return None
    ranks = {row["method"]: row["average_rank"] for row in across["rows"] if row["average_rank"] is not None}
    svg = plots.draw_ranks(ranks, across["critical_difference"], "critical-difference diagram of average ranks")
    return {
        "svg": Markup(svg),
        "keys": [],
        "marked": True,
        "caption": "Average ranks over scenarios; Nemenyi's test does not tell apart what a bar joins.",
    }
