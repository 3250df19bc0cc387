"""The report of a study: its tables, plots and statements, as HTML, Markdown, CSV, LaTeX or JSON.

`describe_study` collects every figure in one document, which is the JSON format; the other formats show it. HTML adds
plots. Nothing here imports torch, and matplotlib and jinja2 are imported where a format needs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from clframe import metrics
from clframe.errors import DataError, UsageError, did_you_mean
from clframe.experiments import plots, rendering, statistics
from clframe.experiments.folder import read_study
from clframe.experiments.outcome import FinishedCell, MethodRow, StudyOutcome, read_runs, rerun
from clframe.experiments.rendering import FORMATS, LIMIT, MODES, Format, count, format_numbers, thin_out
from clframe.experiments.statistics import Estimate, Interval, Unit
from clframe.experiments.study import STUDY
from clframe.runs.files import ENVIRONMENT
from clframe.system.reading import read_json
from clframe.system.texts import cut

MEASURE = "average_accuracy"  # by which methods are ranked and compared
BESIDE = ("forgetting", "learning_accuracy", "ece", "bytes_kept")
COSTS = ("seconds", "peak_memory")
COST_NAMES = ("time", "peak memory")
WIDEST = 12  # experiences of a matrix that are shown
MOST_NAMES = 30  # classes of an experience that are named
VERSIONS = ("clframe", "torch", "torchvision", "numpy", "python")
HOST = ("platform", "processor", "device", "threads")
# What is left out of a page that would be too large, in this order.
PARTS = ("matrices", "commands", "plots of costs and calibration", "other plots")
PLOTS = 4  # of a scenario, without those of costs and calibration
DEFINITIONS = {
    "mean ± half": (
        "mean of n units ± t s / √n, a 95 % interval; s² = Σ (x - mean)² / (n - 1), t the 0.975 quantile of Student's "
        "distribution with n - 1 degrees of freedom",
        "Student 1908",
    ),
    "difference": (
        "mean over units of the method's figure minus that of the baseline with the same seed and class order, in "
        "percentage points, with Student's interval",
        "Student 1908",
    ),
    "BCa interval": (
        f"bias-corrected and accelerated bootstrap interval of the mean difference, {statistics.RESAMPLES:,} resamples "
        f"with a fixed seed; from {statistics.BCA_PAIRS} pairs on",
        "Efron 1987",
    ),
    "p": (
        "share of the sign vectors e with abs(Σ e d) >= abs(Σ d), d the paired differences: all 2^n up to n = "
        f"{statistics.EXACT_PAIRS}, beyond that {statistics.DRAWN:,} drawn with a fixed seed; after Holm's adjustment, "
        "max over j <= i of min(1, (m - j + 1) p_j) over the m comparisons",
        "Fisher 1935; Holm 1979",
    ),
    "10th percentile": ("10th percentile over all cells, by linear interpolation", "numpy"),
    "bytes kept": (
        "bytes of all tensors that the plugins of a method keep between experiences, beside the network",
        "this project",
    ),
    "time": ("seconds of learning, summed over experiences; evaluation is not counted", "this project"),
    "peak memory": (
        "most memory of torch on the device, or most resident memory of the process on a CPU; a process that ran other "
        "cells before has their peak, too",
        "this project",
    ),
    "interquartile mean": (
        "mean of the values of all scenarios without the lowest and the highest quarter; the interval is the "
        "stratified bootstrap's",
        "Agarwal et al. 2021",
    ),
    "probability of improvement": (
        "probability that a run of the method is better than one of the baseline, ties half, averaged over scenarios; "
        "the interval is the stratified bootstrap's",
        "Agarwal et al. 2021",
    ),
    "average rank": ("mean over scenarios of the rank by average accuracy, 1 for the best, ties shared", "Demšar 2006"),
}


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


# The document.


def describe_study(outcome: StudyOutcome, *, baseline: str | None, unit: Unit, costs: bool) -> dict[str, Any]:
    """Return every figure of a study as one document. Raises `UsageError` if there is no such baseline or unit."""
    orders = {cell.order for cell in outcome.finished}
    if unit == "order" and len(orders) < 2:
        raise UsageError("`--unit order` needs runs in several class orders, and here is one: leave it out.")
    reference = outcome.choose_baseline(baseline) if baseline or len(outcome.methods) > 1 else None
    scenarios = [name for name in outcome.scenarios if outcome.cells(name)]
    described = [_describe_scenario(outcome, name, reference, unit, costs) for name in scenarios]
    unused = set() if len(scenarios) > 1 else {"interquartile mean", "probability of improvement", "average rank"}
    unused |= set() if len(orders) > 1 else {"10th percentile"}
    unused |= set() if max(one["pairs"] for one in described) >= statistics.BCA_PAIRS else {"BCa interval"}
    definitions = {name: of for name, of in DEFINITIONS.items() if name not in unused}
    return {
        "kind": "study",
        "title": f"{count(len(outcome.methods), 'method')} on {_join(scenarios)}",
        "unit": unit,
        "baseline": reference,
        "costs": costs,
        "methods": outcome.methods,
        "scenarios": described,
        "across": _describe_across(outcome, scenarios, reference, unit) if len(scenarios) > 1 else None,
        "cells": [_describe_cell(outcome, cell, costs) for cell in outcome.finished],
        "unfinished": [
            {**vars(cell), "seed": None if cell.state == "refused" else cell.seed} for cell in outcome.unfinished
        ],
        "left_out": list(outcome.left_out),
        "notes": list(dict.fromkeys([*outcome.notes, *(n for cell in outcome.finished for n in cell.results.notes())])),
        "measures": list_measures([cell.results.data for cell in outcome.finished], definitions, costs),
        "environments": list_environments([cell.folder for cell in outcome.finished], costs),
        **({"date": date.today().isoformat()} if costs else {}),
    }


def _describe_scenario(
    outcome: StudyOutcome, scenario: str, baseline: str | None, unit: Unit, costs: bool
) -> dict[str, Any]:
    cells = outcome.cells(scenario)
    modes = outcome.modes(scenario)
    rows = outcome.table(scenario, MEASURE, baseline, unit)
    compared = [row for row in rows if row.claim]
    orders = {cell.order for cell in cells}
    pairs = max((row.paired.pairs for row in compared if row.paired), default=0)
    return {
        "scenario": scenario,
        "mode": modes[0],
        "reading": cells[0].results.data.get("readings", {}).get(modes[0], MODES.get(modes[0], modes[0])),
        "experiences": len(cells[0].results.data["classes"]),
        "protocol": describe_protocol(cells),
        "seeds": format_numbers(cell.seed for cell in cells),
        "orders": len(orders),
        "units": max(row.mean.count for row in rows),
        "pairs": pairs,
        "comparisons": len(compared),
        "smallest_p": statistics.smallest_p(pairs, len(compared)) if pairs else None,
        "statement": _state(pairs, len(compared), baseline, unit),
        "rows": [_describe_row(outcome, scenario, modes[0], row, unit, costs) for row in rows],
        "others": [
            {
                "mode": mode,
                "rows": [
                    {
                        "method": row.method,
                        MEASURE: estimate(row.mean),
                        **{name: estimate(outcome.mean(scenario, row.method, name, mode, unit)) for name in BESIDE[:3]},
                    }
                    for row in outcome.table(scenario, MEASURE, baseline, unit, mode)
                ],
            }
            for mode in modes[1:]
        ],
        "curves": {
            method: {
                name: [estimate(one) for one in _average_curve(outcome.cells(scenario, method), modes[0], of, unit)]
                for name, of in (("accuracy", metrics.average_accuracy), ("forgetting", metrics.forgetting))
            }
            for method in outcome.methods_of(scenario)
        },
        "matrices": {
            row.method: _average_matrix(outcome.cells(scenario, row.method), modes[0])
            for row in rows
            if outcome.cells(scenario, row.method)
        },
        "class_orders": _list_orders(cells),
    }


def _describe_row(
    outcome: StudyOutcome, scenario: str, mode: str, row: MethodRow, unit: Unit, costs: bool
) -> dict[str, Any]:
    cells = outcome.cells(scenario, row.method)
    paired = row.paired
    claimed = bool(row.claim and row.claim.made)
    shown = (*BESIDE, *COSTS) if costs else BESIDE
    return {
        "method": row.method,
        "cells": row.cells,
        MEASURE: estimate(row.mean),
        "tenth_percentile": row.tenth_percentile,
        "difference": paired
        and {
            **estimate(Estimate(paired.mean, paired.interval, paired.pairs)),
            "bca_low": paired.bca.low if paired.bca else None,
            "bca_high": paired.bca.high if paired.bca else None,
            "left_out": paired.left_out,
            "p": paired.p,
            "p_holm": row.p,
            "claimed": claimed,
            "reason": row.claim.reason if row.claim else None,
        },
        "finding": ("better" if (paired.mean or 0) > 0 else "worse") if claimed and paired else None,
        **{name: estimate(outcome.mean(scenario, row.method, name, mode, unit)) for name in shown},
        "tuned": next((cell.tuned for cell in cells if cell.tuned), None),
        "stale": any(cell.stale for cell in cells),
    }


def _describe_across(outcome: StudyOutcome, scenarios: Sequence[str], baseline: str | None, unit: Unit) -> Any:
    """Return aggregates over scenarios: interquartile means, probabilities of improvement, and average ranks."""
    values: dict[str, list[list[float]]] = {}
    for method in outcome.methods:
        values[method] = []
        for scenario in scenarios:
            figures = outcome.values(scenario, method, MEASURE, outcome.modes(scenario)[0])
            known = {key: value for key, value in figures.items() if value is not None}
            values[method].append(list(statistics.average_by_unit(known, unit).values()))
    ranked = [method for method in outcome.methods if all(values[method])]
    scores = [
        [math.fsum(values[method][i]) / len(values[method][i]) for method in ranked] for i in range(len(scenarios))
    ]
    ranks = statistics.average_ranks(scores) if ranked else None
    of = dict(zip(ranked, ranks.average, strict=True)) if ranks else {}
    rows = [
        {
            "method": method,
            "scenarios": sum(map(bool, values[method])),
            "interquartile_mean": estimate(statistics.interquartile_mean(values[method])),
            "probability_of_improvement": estimate(
                statistics.probability_of_improvement(values[method], values[str(baseline)])
            )
            if baseline not in (None, method)
            else None,
            "average_rank": of.get(method),
        }
        for method in outcome.methods
        if any(values[method])
    ]
    return {
        "rows": sorted(rows, key=lambda row: -row["interquartile_mean"]["value"]),
        "critical_difference": statistics.critical_difference(len(ranked), len(scenarios)),
        "fewest_scenarios": statistics.RANKED_SCENARIOS,
        "ranked": len(ranked),
    }


def _describe_cell(outcome: StudyOutcome, cell: FinishedCell, costs: bool) -> dict[str, Any]:
    folder = cell.folder.relative_to(outcome.folder) if outcome.folder else cell.folder
    return {
        **{name: getattr(cell, name) for name in ("method", "scenario", "seed", "order")},
        "folder": str(folder),
        "command": cell.command,
        "stale": cell.stale,
        "tuned": cell.tuned,
        "measures": cell.results.measures,
        "calibration": {
            mode: {name: measure["value"] for name, measure in measures.items()}
            for mode, measures in cell.results.data.get("calibration", {}).items()
        },
        **{name: cell.measure(name, "") for name in (("bytes_kept", *COSTS) if costs else ("bytes_kept",))},
    }


def describe_protocol(cells: Sequence[FinishedCell]) -> str:
    """Return in one phrase how the networks of these cells are trained; what differs between them is not listed."""
    configs = [cell.config for cell in cells]

    def common(values: list[Any]) -> Any:
        return values[0] if all(value == values[0] for value in values) else None

    parts = [common([config.model.name for config in configs]) or "several models"]
    epochs, iterations = (common([getattr(c.train, name) for c in configs]) for name in ("epochs", "iterations"))
    if epochs:
        parts.append(f"{count(epochs, 'epoch')} an experience")
    elif iterations:
        parts.append(f"{count(iterations, 'step')} an experience")
    else:
        parts.append("lengths of training as each run has them")
    for text, name in (("batches of {}", "batch_size"), ("{}", "optimizer"), ("learning rate {:g}", "lr")):
        value = common([getattr(config.train, name) for config in configs])
        parts.append(f"{name.replace('_', ' ')} as each run has it" if value is None else text.format(value))
    stamps = list(dict.fromkeys(cell.tuned for cell in cells if cell.tuned))
    parts.append("hyper-parameters as given" if not stamps else f"hyper-parameters: {'; '.join(stamps)}")
    return ", ".join(parts)


def _state(pairs: int, comparisons: int, baseline: str | None, unit: Unit) -> str:
    """Return what the tests of a scenario can show at all."""
    if not comparisons:
        return "No method stands beside the baseline, so nothing is tested."
    if not pairs:
        return f"Not one pair of runs of a method and of {baseline} is complete, so nothing is claimed."
    least = statistics.smallest_p(pairs, comparisons)
    text = (
        f"{count(pairs, f'pair of {unit}s' if pairs == 1 else unit + ' pair')} and {count(comparisons, 'comparison')} "
        f"with {baseline} can give no p below {rendering.format_p(least)} after Holm's adjustment"
    )
    if least <= statistics.ALPHA:
        return f"{text}; a difference is claimed where p is at most {statistics.ALPHA}."
    fewest = statistics.fewest_pairs(comparisons)
    return (
        f"{text}, which is above {statistics.ALPHA}: no difference is claimed here. It takes {fewest} pairs at least."
    )


def _average_curve(
    cells: Sequence[FinishedCell], mode: str, of: Callable[[metrics.Matrix], float | None], unit: Unit
) -> list[Estimate]:
    """Return the mean of a measure of the accuracy matrix after each experience, over the units of one method."""
    matrices = {cell.key: cell.results.accuracy.get(mode, []) for cell in cells}
    curve = []
    for after in range(1, max(map(len, matrices.values()), default=0) + 1):
        found = {key: of(matrix[:after]) for key, matrix in matrices.items() if len(matrix) >= after}
        known = {key: value for key, value in found.items() if value is not None}
        curve.append(statistics.mean_interval(list(statistics.average_by_unit(known, unit).values())))
    return curve


def _average_matrix(cells: Sequence[FinishedCell], mode: str) -> list[list[float | None]]:
    """Return the mean of each entry of the accuracy matrices of one method, over the cells that have it."""
    matrices = [cell.results.accuracy.get(mode, []) for cell in cells]
    mean: list[list[float | None]] = []
    for i in range(max(map(len, matrices))):
        rows = [matrix[i] for matrix in matrices if len(matrix) > i]
        columns = ([row[j] for row in rows if len(row) > j] for j in range(max(map(len, rows))))
        entries = ([entry for entry in column if entry is not None] for column in columns)
        mean.append([math.fsum(known) / len(known) if known else None for known in entries])
    return mean


def _list_orders(cells: Sequence[FinishedCell]) -> list[dict[str, Any]]:
    """Return the classes of each experience in each class order, with the seeds that were run in it."""
    found: dict[tuple[int | None, tuple[str, ...]], list[int]] = {}
    for cell in cells:
        data = cell.results.data
        groups = tuple(
            ", ".join(str(data["class_names"][c]) for c in group[:MOST_NAMES])
            + (f", ... ({len(group)})" if len(group) > MOST_NAMES else "")
            for group in data["classes"]
        )
        found.setdefault((cell.order, groups), []).append(cell.seed)
    return [
        {"order": order, "seeds": format_numbers(seeds), "experiences": list(groups)}
        for (order, groups), seeds in found.items()
    ]


def list_measures(results: Sequence[Any], definitions: dict[str, tuple[str, str]], costs: bool) -> list[dict[str, str]]:
    """Return name, formula and source of each measure in `results`, then those of `definitions`."""
    found: dict[str, dict[str, str]] = {}
    for data in results:
        for part in (data["measures"], data.get("calibration", {})):
            for name, measure in (item for measures in part.values() for item in measures.items()):
                of = {key: str(measure.get(key, "")) for key in ("formula", "source")}
                found.setdefault(name, {"name": rendering.format_words(name), **of})
    own = {name: of for name, of in definitions.items() if costs or name not in COST_NAMES}
    return [*found.values(), *({"name": name, "formula": f, "source": s} for name, (f, s) in own.items())]


def list_environments(folders: Sequence[Path], costs: bool) -> list[dict[str, Any]]:
    """Return the environments in which the runs in `folders` began, each once, with the number of runs."""
    found: dict[tuple[tuple[str, str], ...], int] = {}
    for folder in folders:
        environment = read_json(folder / ENVIRONMENT) if (folder / ENVIRONMENT).is_file() else {}
        if not isinstance(environment, dict):
            raise DataError(f"{folder / ENVIRONMENT} holds no mapping: put the file back as it was.")
        names = (*VERSIONS, *HOST) if costs else VERSIONS
        key = tuple((name, cut(str(environment[name]))) for name in names if environment.get(name) is not None)
        found[key] = found.get(key, 0) + 1
    return [{"runs": runs, "values": dict(key)} for key, runs in found.items() if key]


def estimate(found: Estimate) -> dict[str, Any]:
    """Return an estimate as the document holds it."""
    low, high = found.interval or (None, None)
    return {"value": found.value, "low": low, "high": high, "count": found.count}


def _join(names: Sequence[str]) -> str:
    if len(names) > 3:
        return f"{len(names)} scenarios"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


# Formats.


def _to_csv(document: dict[str, Any]) -> str:
    """Return a table with a row for each scenario and method; figures are shares of 1, bytes and seconds."""
    ends = ("value", "low", "high")
    shown = (*BESIDE, *COSTS) if document["costs"] else BESIDE
    headers = ["scenario", "mode", "method", "cells", "units", MEASURE, f"{MEASURE}_low", f"{MEASURE}_high"]
    headers += ["tenth_percentile", "baseline", "pairs", "difference", "difference_low", "difference_high"]
    headers += ["bca_low", "bca_high", "p", "p_holm", "claimed"]
    headers += [name + end for name in shown for end in ("", "_low", "_high")] + ["tuned", "stale"]
    rows = []
    for scenario in document["scenarios"]:
        for row in scenario["rows"]:
            difference = row["difference"] or {}
            names = ("count", *ends, "bca_low", "bca_high", "p", "p_holm", "claimed")
            rows.append(
                [scenario["scenario"], scenario["mode"], row["method"], row["cells"], row[MEASURE]["count"]]
                + [row[MEASURE][end] for end in ends]
                + [row["tenth_percentile"], document["baseline"] if difference else None]
                + [difference.get(name) for name in names]
                + [row[name][end] for name in shown for end in ends]
                + [row["tuned"], row["stale"]]
            )
    return rendering.to_csv(headers, rows)


def _to_html(outcome: StudyOutcome, document: dict[str, Any]) -> str:
    """Return the page; parts that would make it too large are left out, and the page says so."""
    drawn = [_draw_scenario(document, one) for one in document["scenarios"]]
    ranks = _draw_across(document)
    page = ""
    for number in range(len(PARTS) + 1):
        left_out = PARTS[:number]
        kept = drawn if PARTS[2] not in left_out else [of[:PLOTS] for of in drawn]
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

    def add(svg: str, caption: str) -> None:
        drawn.append({"svg": Markup(svg), "caption": caption, "keys": [], "marked": True})

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
