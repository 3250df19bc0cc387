"""The document of a study's report: every figure, statement and definition, from which each format is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from clframe import metrics
from clframe.errors import DataError, UsageError
from clframe.experiments import evaluations, rendering, statistics
from clframe.experiments.outcome import JOINT, FinishedCell, MethodRow, StudyOutcome
from clframe.experiments.rendering import MODES, count, format_numbers
from clframe.experiments.statistics import Estimate, Unit
from clframe.runs.files import ENVIRONMENT
from clframe.system.reading import read_json
from clframe.system.texts import cut

MEASURE = "average_accuracy"  # by which methods are ranked and compared
BESIDE = ("forgetting", "learning_accuracy", "ece", "bytes_kept")
COSTS = ("seconds", "peak_memory")
COST_NAMES = ("time", "peak memory")
MOST_NAMES = 30  # classes of an experience that are named
VERSIONS = ("clframe", "torch", "torchvision", "numpy", "python")
HOST = ("platform", "processor", "device", "threads")
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
    notes = (note for cell in outcome.finished for note in cell.results.notes(while_learning=False))
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
        "notes": list(dict.fromkeys([*outcome.notes, *notes])),
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
        **_describe_evaluations(outcome, scenario, modes[0], [row.method for row in rows], unit),
    }


def _describe_evaluations(
    outcome: StudyOutcome, scenario: str, mode: str, methods: Sequence[str], unit: Unit
) -> dict[str, Any]:
    """Return `while_learning`, the measures and curves of evaluations while learning; {} if no run has any."""
    asked, ways = evaluations.find_interval(outcome.cells(scenario))
    if not ways:
        return {}
    if asked is None:
        sentence = (
            f"The runs were evaluated while learning in different ways ({'; '.join(ways)}), which do not compare."
        )
        return {"while_learning": {"statement": sentence, "measures": [], "rows": [], "curves": {}, "ends": []}}
    sentence = f"Evaluated while learning {ways[0]}; how low an accuracy falls depends on how often one looks."
    curves: dict[str, list[dict[str, Any]]] = {}
    ends: set[tuple[int, ...]] = set()
    unread = 0
    for method in methods:
        found = {}
        for cell in outcome.cells(scenario, method):
            try:
                of = evaluations.read_evaluations(cell, mode)
            except DataError:
                unread += 1
                continue
            if of:
                found[cell.key] = of
                ends |= {tuple(of.ends)} if method != JOINT else set()
        points = evaluations.average_seen(found, unit)
        curves[method] = [{"step": step, **estimate(one)} for step, one in points]
    if unread:
        sentence += f" Curves leave out {count(unread, 'run')} whose {evaluations.METRICS} is missing or damaged."
    figures = {
        (method, name): estimate(outcome.mean(scenario, method, name, mode, unit))
        for method in methods
        for name in evaluations.MEASURES
    }
    return {
        "while_learning": {
            "statement": sentence,
            "measures": list(evaluations.MEASURES),
            "rows": [
                {"method": method, **{name: figures[method, name] for name in evaluations.MEASURES}}
                for method in methods
            ],
            "curves": curves,
            "ends": list(ends.pop()) if len(ends) == 1 else [],
        }
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
        "budget": next((cell.budget for cell in cells if cell.budget), None),
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
        "budget": cell.budget,
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
        words = {"batch_size": "batch size", "lr": "learning rate"}.get(name, name)
        parts.append(f"{words} as each run has it" if value is None else text.format(value))
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
