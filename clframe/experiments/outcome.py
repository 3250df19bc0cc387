"""Figures of many runs: finished cells, the methods of a scenario side by side, and what their differences show.

A *cell* is one run of a study: a method on a scenario, with a seed and a class order. Finished cells come from the
folder of a study, or from run folders that were made one by one (`read_runs`). Nothing here imports torch.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clframe.errors import DataError, UsageError, did_you_mean
from clframe.experiments import statistics
from clframe.experiments.statistics import Claim, Estimate, Paired, Unit
from clframe.runs.files import CONFIG, read_config
from clframe.runs.results import RESULTS_FILE, Results, check_finished, read_results
from clframe.settings import Config

FINE_TUNING = "fine-tuning"  # label of a run without a method: the baseline unless another is named
JOINT = "joint"  # label of the upper bound, which the tests leave out, as it is not a method to choose
COSTS = ("seconds", "peak_memory")  # differ from run to run; all other figures are reproduced to the bit
Key = tuple[int, int | None]  # seed and class order of a cell

# Settings that change no figure, or are the identity of a cell: they are not part of a method's label.
UNLABELED = {
    *("run.seed", "run.output", "run.device", "run.data_root", "run.tensorboard", "run.checkpoint_every"),
    *(
        "run.log_every",
        "run.predictions",
        "run.eval_batch_size",
        "run.eval_every",
        "run.eval_images",
        "run.joint",
        "run.tuned",
        "train.threads",
    ),
}
ORDER = ("order", "seed", "pinned")  # options of a scenario that choose a class order, or only check the data


@dataclass(frozen=True)
class FinishedCell:
    """A finished run as a cell of a study.

    Attributes:
        method: label of the method, such as ``er+lwf`` or ``ewc[lambda=100]``.
        scenario: label of the scenario.
        seed: seed of the run.
        order: number of the class order; None where the scenario has one order.
        folder: folder of the run.
        results: figures of the run.
        config: configuration of the run.
        command: command line that repeats the run.
        stale: whether the code has changed since the run.
        tuned: how the hyper-parameters were chosen; None if they were given.
        budget: what it has used of the study's budgets, and by which settings; None: it has no budget.
    """

    method: str
    scenario: str
    seed: int
    order: int | None
    folder: Path
    results: Results
    config: Config
    command: str
    stale: bool = False
    tuned: str | None = None
    budget: str | None = None

    @property
    def key(self) -> Key:
        """Return seed and class order, by which cells of two methods are paired."""
        return self.seed, self.order

    def measure(self, name: str, mode: str) -> float | None:
        """Return a figure of the cell by name; None where it is not defined.

        Args:
            name: a measure of results.json, such as ``average_accuracy``; a measure of its calibration, such as
                ``ece``; ``bytes_kept``, what the methods keep between experiences, in bytes; ``seconds`` of learning;
                or ``peak_memory`` in bytes, of the device where there is one, else of the process.
            mode: evaluation mode of the first two.
        """
        data, timings = self.results.data, self.results.timings
        if name == "bytes_kept":
            return float(sum(kept["bytes"] for kept in data.get("storage", {}).values()))
        if name == "seconds":
            return math.fsum(row["seconds"] for row in timings.get("experiences", []))
        if name == "peak_memory":
            return timings.get("peak_device_memory_bytes") or timings.get("peak_memory_bytes")
        for of in (data["measures"], data.get("calibration", {})):
            if name in of.get(mode, {}):
                value: float | None = of[mode][name]["value"]
                return value
        return None


@dataclass(frozen=True)
class UnfinishedCell:
    """A cell of a study without results: `state` is waiting, stopped, failed or stale; `sentence` says why."""

    method: str
    scenario: str
    seed: int
    order: int | None
    state: str
    sentence: str = ""


@dataclass(frozen=True)
class MethodRow:
    """A method on a scenario, in a table that compares methods by one measure.

    Attributes:
        method: label of the method.
        cells: number of finished cells with this figure.
        mean: the mean over units (seeds, or class orders) with Student's interval.
        tenth_percentile: the 10th percentile over cells (linear interpolation); None without cells.
        paired: the differences to the baseline; None for the baseline itself, and without one.
        p: p of these differences after Holm; None as `paired`, without pairs, and for joint training, the upper bound.
        claim: whether the difference may be called one; None as `paired`, and for joint training.
    """

    method: str
    cells: int
    mean: Estimate
    tenth_percentile: float | None
    paired: Paired | None
    p: float | None
    claim: Claim | None


@dataclass(frozen=True)
class StudyOutcome:
    """What a study, whole or in part, has found.

    Attributes:
        finished: cells with results.
        unfinished: cells that are asked for and have none.
        left_out: names of cells on the disk that are no longer asked for.
        folder: folder of the study; None for runs that were made one by one.
        notes: sentences on the cells as a whole.
    """

    finished: tuple[FinishedCell, ...]
    unfinished: tuple[UnfinishedCell, ...] = ()
    left_out: tuple[str, ...] = ()
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def scenarios(self) -> list[str]:
        """Return the labels of all scenarios in their order."""
        return list(dict.fromkeys(scenario for scenario, _ in self._asked))

    @property
    def methods(self) -> list[str]:
        """Return the labels of all methods in their order."""
        return list(dict.fromkeys(method for _, method in self._asked))

    @property
    def _asked(self) -> list[tuple[str, str]]:
        """Return scenario and method of all cells, finished or not."""
        finished = [(cell.scenario, cell.method) for cell in self.finished]
        return finished + [(cell.scenario, cell.method) for cell in self.unfinished]

    def methods_of(self, scenario: str) -> list[str]:
        """Return the labels of the methods with a cell on `scenario`, finished or not."""
        asked = {method for other, method in self._asked if other == scenario}
        return [method for method in self.methods if method in asked]

    def cells(self, scenario: str, method: str | None = None) -> list[FinishedCell]:
        """Return the finished cells of `scenario`, of one method if given."""
        return [cell for cell in self.finished if cell.scenario == scenario and method in (None, cell.method)]

    def modes(self, scenario: str) -> list[str]:
        """Return the evaluation modes of `scenario`, the one of its setting first."""
        cells = self.cells(scenario)
        found = list(dict.fromkeys(mode for cell in cells for mode in cell.results.accuracy))
        settings = {cell.results.data.get("setting") for cell in cells}
        return sorted(found, key=lambda mode: mode not in settings)

    def choose_baseline(self, given: str | None = None) -> str | None:
        """Return the method that others are compared with: as given, else fine-tuning, else the first; None of none.

        Raises:
            UsageError: there is no method of this label.
        """
        methods = self.methods
        if given is not None and given not in methods:
            raise UsageError(
                f"`--baseline` is `{given}`, which is not a method of this study.{did_you_mean(given, methods)}"
            )
        if given is not None:
            return given
        return FINE_TUNING if FINE_TUNING in methods else next(iter(methods), None)

    def values(self, scenario: str, method: str, measure: str, mode: str) -> dict[Key, float | None]:
        """Return a figure of each finished cell of a method on a scenario, as `FinishedCell.measure` has it."""
        return {cell.key: cell.measure(measure, mode) for cell in self.cells(scenario, method)}

    def mean(self, scenario: str, method: str, measure: str, mode: str, unit: Unit = "seed") -> Estimate:
        """Return the mean of a figure over units, with Student's interval.

        With several class orders, a unit is the mean of a seed over its orders, or with `unit="order"` the reverse.
        """
        return _average(self.values(scenario, method, measure, mode), unit)

    def table(
        self,
        scenario: str,
        measure: str = "average_accuracy",
        baseline: str | None = None,
        unit: Unit = "seed",
        mode: str | None = None,
    ) -> list[MethodRow]:
        """Return a row for each method of `scenario`, the highest mean first, those without figures last.

        Args:
            scenario: label of the scenario.
            measure: name of the figure that is compared (`FinishedCell.measure`).
            baseline: label of the method that others are compared with, as `choose_baseline` takes it.
            unit: what the tests count, "seed" or "order".
            mode: evaluation mode; None: the first one of `modes`.

        Raises:
            UsageError: the baseline or the unit does not exist.
        """
        reference = self.choose_baseline(baseline)
        mode = mode or next(iter(self.modes(scenario)), "")
        methods = self.methods_of(scenario)
        figures = {method: self.values(scenario, method, measure, mode) for method in methods}
        compared = [method for method in methods if method != reference and reference in methods]
        pairs = {method: statistics.compare(figures[method], figures[str(reference)], unit) for method in compared}
        judged = [method for method in compared if method != JOINT]
        adjusted = dict(zip(judged, statistics.holm([pairs[method].p for method in judged]), strict=True))
        rows = []
        for method in methods:
            known = [value for value in figures[method].values() if value is not None]
            pair = pairs.get(method)
            rows.append(
                MethodRow(
                    method,
                    len(known),
                    _average(figures[method], unit),
                    _tenth_percentile(known),
                    pair,
                    adjusted.get(method),
                    statistics.claim(pair.pairs, len(judged), adjusted[method]) if pair and method in judged else None,
                )
            )
        return sorted(rows, key=lambda row: -math.inf if row.mean.value is None else row.mean.value, reverse=True)


def _average(figures: Mapping[Key, float | None], unit: Unit) -> Estimate:
    known = {key: value for key, value in figures.items() if value is not None}
    return statistics.mean_interval(list(statistics.average_by_unit(known, unit).values()))


def _tenth_percentile(values: Sequence[float]) -> float | None:
    import numpy as np

    return float(np.percentile(np.sort(values), 10)) if values else None


# Runs that were made one by one.


def read_runs(folders: Iterable[Path]) -> StudyOutcome:
    """Return the finished runs in `folders` as the cells of a study.

    A method is labeled by its plugins and by those of their options, and of the settings of training and model, that
    differ between runs of the same plugins; a scenario by its name and the options that differ between runs of it.
    The class order of ``order=random`` is the scenario's seed, where one is set.

    Raises:
        DataError: a folder holds no finished run.
        UsageError: two runs have equal settings, so that they would count twice.
    """
    found = [(folder, *_read_run(folder)) for folder in dict.fromkeys(folders)]
    scenarios = _label_scenarios([config for _, config, _ in found])
    methods = _label_methods([config for _, config, _ in found], scenarios)
    cells = [
        FinishedCell(
            method,
            scenario,
            config.run.seed,
            _order_of(config),
            folder,
            results,
            config,
            rerun(folder),
            tuned=describe_stamp(config.run.tuned),
        )
        for (folder, config, results), scenario, method in zip(found, scenarios, methods, strict=True)
    ]
    first: dict[tuple[str, str, Key], Path] = {}
    for cell in cells:
        same = first.setdefault((cell.scenario, cell.method, cell.key), cell.folder)
        if same is not cell.folder:
            raise UsageError(
                f"{same} and {cell.folder} are runs of `{cell.method}` on `{cell.scenario}` with equal settings and "
                f"the seed {cell.seed}: name one of them."
            )
    return StudyOutcome(tuple(cells), notes=tuple(_find_other_data(cells)))


def rerun(folder: Path) -> str:
    """Return the command line that repeats the run in `folder`."""
    return f"clframe run --config {shlex.quote(str(folder / CONFIG))}"


def describe_stamp(stamp: Mapping[str, Any] | None) -> str | None:
    """Return in a phrase how options were chosen, as ``run.tuned`` has it; None: by no search."""
    if not stamp:
        return None
    seeds = ", ".join(map(str, stamp.get("seeds", ())))
    on = f"{stamp.get('scenario')} {str(stamp.get('data', ''))[:12]}".strip()
    return f"{stamp.get('protocol')}; {stamp.get('trials')} trials; seeds {seeds}; {on}"


def check_figures(results: Results, folder: Path) -> None:
    """Raise `DataError` if a measure of `results`, which `folder` holds, is not a finite number."""
    for part in ("measures", "calibration"):
        for mode, measures in results.data.get(part, {}).items():
            for name, measure in measures.items():
                if measure["value"] is not None and not math.isfinite(measure["value"]):
                    raise DataError(
                        f"{folder / RESULTS_FILE} has {measure['value']} as `{name}` in the evaluation mode `{mode}`, "
                        "and tables need finite numbers: put the file back as it was, or leave this run out."
                    )


def _read_run(folder: Path) -> tuple[Config, Results]:
    check_finished(folder)
    results = read_results(folder)
    check_figures(results, folder)
    return read_config(folder), results


def _order_of(config: Config) -> int | None:
    """Return the number of the class order of a run; None where the scenario's own order is used."""
    options = config.scenario.options
    seed = options.get("seed")
    return seed if options.get("order") == "random" and isinstance(seed, int) else None


def _label_scenarios(configs: Sequence[Config]) -> list[str]:
    """Return a label for the scenario of each run: its name, and the options that differ between runs of that name."""
    written = [config.model_dump()["scenario"] for config in configs]
    options = [{name: value for name, value in scenario.items() if name not in ORDER} for scenario in written]
    for config, own in zip(configs, options, strict=True):
        order = config.scenario.options.get("order")
        own |= {} if order in (None, "natural", "random") else {"order": order}
    groups = [config.scenario.name for config in configs]
    return _label(groups, options)


def _label_methods(configs: Sequence[Config], scenarios: Sequence[str]) -> list[str]:
    """Return a label for the method of each run: its plugins, and the settings that differ between runs of them."""
    names = ["+".join(config.plugins) or FINE_TUNING for config in configs]
    options: list[dict[str, Any]] = []
    for config in configs:
        own = {
            (option if len(config.plugins) == 1 else f"{plugin}.{option}"): value
            for plugin, component in config.plugins.items()
            for option, value in component.options.items()
        }
        options.append(own)
    labels = _find_varying(names, options)
    # settings of training and model depend on the scenario, too: what differs is looked for on each one
    settings = [_list_settings(config) for config in configs]
    within = _find_varying(list(zip(names, scenarios, strict=True)), settings)
    varying = {
        name: labels[name] | {key for (n, _), keys in within.items() if n == name for key in keys} for name in names
    }
    return [
        _write_label(name, own | of_run, varying[name])
        for name, own, of_run in zip(names, options, settings, strict=True)
    ]


def _list_settings(config: Config) -> dict[str, Any]:
    """Return the settings of a run that are not options of its scenario or plugins, by full name."""
    parts = config.model_dump(include={"model", "train", "run"})
    found = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    found["model"] = found.pop("model.name")
    return {name: value for name, value in found.items() if name not in UNLABELED}


def _label(groups: Sequence[str], options: Sequence[Mapping[str, Any]]) -> list[str]:
    varying = _find_varying(groups, options)
    return [_write_label(group, own, varying[group]) for group, own in zip(groups, options, strict=True)]


def _find_varying(groups: Sequence[Any], options: Sequence[Mapping[str, Any]]) -> dict[Any, set[str]]:
    """Return, for each group, the names of the options whose values differ between its members."""
    varying: dict[Any, set[str]] = {}
    for group in dict.fromkeys(groups):
        members = [own for other, own in zip(groups, options, strict=True) if other == group]
        names = {name for own in members for name in own}
        varying[group] = {name for name in names if len({repr(own.get(name)) for own in members}) > 1}
    return varying


def _write_label(name: str, values: Mapping[str, Any], varying: set[str]) -> str:
    shown = [f"{option}={_write_value(value)}" for option, value in values.items() if option in varying]
    return f"{name}[{','.join(shown)}]" if shown else name


def _write_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _find_other_data(cells: Sequence[FinishedCell]) -> list[str]:
    """Return a sentence for each scenario whose cells were not measured on the same number of test images."""
    sentences = []
    for scenario in dict.fromkeys(cell.scenario for cell in cells):
        counts = {sum(cell.results.data["test_images"]) for cell in cells if cell.scenario == scenario}
        if len(counts) > 1:
            sentences.append(
                f"The runs of {scenario} were measured on different numbers of test images "
                f"({', '.join(map(str, sorted(counts)))}), so that their figures cannot be compared."
            )
    return sentences
