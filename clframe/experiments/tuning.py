"""Tuning: options of methods are chosen on validation images, by a protocol that says what the choice may look at.

A trial is a cell: a run in a folder of its own, with values of the searched options, that is given no test image
(``run.test``) and, but for `end-of-stream`, no experience that the protocol keeps from it (``run.experiences``). What
cells measured on the images that ``train.val`` holds out decides. Cells are found by their address, and trials have
seeds of their own, so a tuning that was killed and is repeated, or has more workers, comes to the same choice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clframe.errors import RunError, UsageError
from clframe.experiments.cells import Cell, problems_of
from clframe.experiments.journal import ROUND, Journal, import_optuna
from clframe.experiments.search import Range, Values, apply, parse_protocol, ranges_of
from clframe.experiments.study import BASELINES, Study
from clframe.experiments.trials import Bench, CarryOut, Chosen, Trial, Tuning, configure
from clframe.metrics import Matrix, average_accuracy
from clframe.system.texts import cut

JOURNAL = "trials.log"  # Optuna's journal in the folder of a tuning
TRIALS = {"first": 20, "other-scenario": 20, "end-of-stream": 20, "per-experience": 8}
DROP = 0.2  # share of the accuracy of plain training that a method may cost on a new experience (De Lange et al.)

# What is chosen: values for all experiences, values of single ones, and the accuracy on validation images. A course
# yields trials, and is sent the accuracy matrices of the seeds of each, or None where a run failed.
Choice = tuple[Values, tuple[Values, ...], float]
Course = Generator[list[Trial], list[list[Matrix] | None], Choice]


def choose(
    tunings: Sequence[Tuning], folder: Path, carry_out: CarryOut, tell: Callable[[str], None] = lambda text: None
) -> list[Chosen]:
    """Carry out the trials of `tunings` that are left, and return what they choose, in the order of `tunings`.

    The trials that several tunings are ready for are carried out together. What was chosen is written to
    ``NAME.yaml`` in the folder.

    Args:
        tunings: the searches.
        folder: of the tuning, with the cells and the journal of earlier trials.
        carry_out: carries out cells, as `clframe.experiments.workers.run_cells` does.
        tell: called with a sentence on each trial.

    Raises:
        UsageError: before any trial, with one sentence for each mistake; also if optuna is not installed.
        RunError: if all trials of a method failed.
        DataError: if data are missing or damaged, or the disk is full.
        Interrupted: as `carry_out`.
    """
    bench = Bench(folder, carry_out)
    ranges = check(tunings, bench)
    courses = {i: _begin(tuning, ranges[i], bench, tell) for i, tuning in enumerate(tunings)}
    answers: dict[int, Any] = dict.fromkeys(courses)
    done: dict[int, Chosen] = {}
    while courses:
        cells: dict[int, list[list[Cell]]] = {}
        for i, course in list(courses.items()):
            try:
                cells[i] = [bench.cells_of(tunings[i], trial) for trial in course.send(answers[i])]
            except StopIteration as end:
                done[i] = _finish(tunings[i], ranges[i], end.value, bench)
                del courses[i]
        bench.carry_out([cell for trials in cells.values() for of_trial in trials for cell in of_trial])
        answers = {i: [bench.accuracies(of_trial) for of_trial in trials] for i, trials in cells.items()}
    return [done[i] for i in range(len(tunings))]


@dataclass(frozen=True)
class Effort:
    """Work of a tuning that has not begun; `per-experience` may end with less.

    Attributes:
        tuning: the search.
        trials: number of values that are tried.
        rounds: number of times that trials are asked for, each when the ones before have ended.
        runs: number of runs, one for each trial and seed.
        whole_runs: the experiences of all runs over those of the scenario; None if another scenario is learned.
    """

    tuning: Tuning
    trials: int
    rounds: int
    runs: int
    whole_runs: float | None


def estimate_effort(tunings: Sequence[Tuning], folder: Path) -> list[Effort]:
    """Return the work of each tuning in `folder`, of which nothing is read or written. Raises as `check`."""
    bench = Bench(folder, lambda cells: None)
    found = []
    for tuning, ranges in zip(tunings, check(tunings, bench), strict=True):
        length = bench.describe(configure(tuning, Trial({}), tuning.study.seeds[0]))[0]
        seeds = len(tuning.study.seeds)
        if tuning.protocol.kind == "per-experience":
            rates, levels = _grids(tuning, ranges)
            of_experience = [len(rates) + (len(levels) if i else 0) for i in range(length)]
            trials = sum(of_experience)
            rounds = length + (length - 1) * len(levels)
            experiences = sum(count * (i + 1) for i, count in enumerate(of_experience))
        else:
            trials = tuning.trials
            rounds = math.ceil(trials / ROUND)
            experiences = trials * (tuning.protocol.k or length)
        whole = None if tuning.protocol.scenario else seeds * experiences / length
        found.append(Effort(tuning, trials, rounds, seeds * trials, whole))
    return found


def check(tunings: Sequence[Tuning], bench: Bench) -> list[list[Range]]:
    """Return the ranges that each tuning searches, when nothing keeps them from being carried out.

    Raises:
        UsageError: with one sentence for each mistake.
        DataError: if data are missing or damaged.
    """
    if any(tuning.protocol.kind != "per-experience" for tuning in tunings):
        import_optuna()
    problems: list[str] = []
    found: list[list[Range]] = []
    for tuning in tunings:
        found.append([])
        try:
            found[-1] = ranges_of(tuning.study, tuning.source, tuning.method)
            first = configure(tuning, Trial({}), tuning.study.seeds[0])
            problems += _protocol_problems(tuning, found[-1], bench.describe(first)[0])
            for values in _ends(found[-1]):
                configure(tuning, Trial(values), tuning.study.seeds[0])
            problems += problems_of(first)
        except UsageError as error:
            problems += error.problems
    if problems:
        raise UsageError(*dict.fromkeys(problems))
    return found


def _ends(ranges: Sequence[Range]) -> list[Values]:
    """Return values that show whether both ends of each range, and all choices, are valid."""
    tried = [range_.search.choices or (range_.search.low, range_.search.high) for range_ in ranges]
    longest = max(map(len, tried))
    return [
        {r.name: ends[min(i, len(ends) - 1)] for r, ends in zip(ranges, tried, strict=True)} for i in range(longest)
    ]


def _protocol_problems(tuning: Tuning, ranges: Sequence[Range], length: int) -> list[str]:
    """Return one sentence for each reason why the protocol does not suit the scenario, or the ranges."""
    protocol = tuning.protocol
    problems = []
    if protocol.kind == "first" and protocol.k > length:
        problems.append(
            f"`{protocol}` needs {protocol.k} experiences, and `{tuning.label}` has {length}: choose fewer."
        )
    elif protocol.kind == "first" and protocol.k == length:
        problems.append(
            f"`{protocol}` would look at all {length} experiences of `{tuning.label}`, as the oracle `end-of-stream` "
            "does: choose fewer, or that protocol."
        )
    if protocol.scenario and protocol.scenario == tuning.scenario["name"]:
        problems.append(f"`{protocol}` names the scenario that is learned: name another one, or use `end-of-stream`.")
    if protocol.kind == "per-experience":
        problems += [
            f"`{range_.name}` cannot be tuned by `per-experience`, which chooses `train.lr` and strengths of plugins: "
            f"leave it out with `search: {{{range_.name}: false}}`."
            for range_ in ranges
            if not range_.changes
        ]
    return problems


def _begin(tuning: Tuning, ranges: Sequence[Range], bench: Bench, tell: Callable[[str], None]) -> Course:
    """Return the course of a tuning by its protocol."""
    if tuning.protocol.kind != "per-experience":
        return _search(tuning, ranges, tuning.protocol.k or None, bench, tell)
    length = bench.describe(configure(tuning, Trial({}), tuning.study.seeds[0]))[0]
    return _adapt(tuning, ranges, length, bench, tell)


def _finish(tuning: Tuning, ranges: Sequence[Range], choice: Choice, bench: Bench) -> Chosen:
    """Return what was chosen, with its stamp, and write it to the folder."""
    from clframe.system.writing import write_text  # here, as that imports torch

    values, entries, accuracy = choice
    config = configure(tuning, Trial({}), tuning.study.seeds[0])
    stamp = {
        "method": tuning.method.name,
        "protocol": tuning.protocol.label,
        "trials": tuning.trials,
        "seeds": list(tuning.study.seeds),
        "scenario": tuning.source["name"] if tuning.protocol.scenario else tuning.label,
        "data": bench.describe(config)[1],
        "held_out": config.train.val,
        "searched": {range_.name: str(range_.search) for range_ in ranges},
        "chosen": dict(values),
        "accuracy": accuracy,
    }
    file = bench.folder / f"{tuning.name}.yaml"
    chosen = Chosen(tuning, apply(tuning.method, values), entries, accuracy, stamp, file)
    write_text(file, chosen.to_yaml())
    return chosen


def _all_failed(tuning: Tuning, trials: Sequence[Trial], bench: Bench) -> RunError:
    cells = [cell for trial in trials for cell in bench.cells_of(tuning, trial)]
    failure = bench.failure(cells) or "the accuracy on the images held out is not defined."
    return RunError(f"No trial of {tuning} has an accuracy to choose by: {failure}")


# ------------------------------------------------------------------------- by trials of whole runs


def _search(
    tuning: Tuning, ranges: Sequence[Range], experiences: int | None, bench: Bench, tell: Callable[[str], None]
) -> Course:
    """Search by trials of whole runs, and choose the values with the best average accuracy on validation images."""
    searched = [[range_.name, str(range_.search)] for range_ in ranges]
    seed = json.dumps([tuning.method.written(), tuning.source, str(tuning.protocol), searched])
    addresses = [cell.address for cell in bench.cells_of(tuning, Trial({}, experiences))]
    digest = hashlib.sha256(f"{seed}{addresses}".encode()).hexdigest()[:12]  # other code or data begins again
    journal = Journal(bench.folder / JOURNAL, f"{tuning.name}-{digest}", ranges, seed)
    while len(journal.trials) < tuning.trials:
        start, asked = journal.ask(tuning.trials)
        answers = yield [Trial(values, experiences) for values in asked]
        figures = [_average([average_accuracy(matrix) for matrix in matrices or ()]) for matrices in answers]
        journal.tell(start, asked, figures)
        for number, (values, figure) in enumerate(zip(asked, figures, strict=True), start + 1):
            tell(f"{tuning}: trial {number} of {tuning.trials}: {_show(figure)} ({_list_values(values)})")
    ended = journal.trials[: tuning.trials]
    best = _find_best([trial.value if trial.state.name == "COMPLETE" else None for trial in ended])
    if best is None:
        raise _all_failed(tuning, [Trial(trial.params, experiences) for trial in ended], bench)
    return dict(ended[best].params), (), float(ended[best].value or 0.0)


# ----------------------------------------------------------------------- experience by experience


def _adapt(tuning: Tuning, ranges: Sequence[Range], length: int, bench: Bench, tell: Callable[[str], None]) -> Course:
    """Choose for each experience when it comes, on its own validation images (De Lange et al., TPAMI 2021).

    First the learning rate with which the experience is learned best where the method has no strength; then the
    strengths, from the top of their ranges down, until the accuracy on the experience is at most a share `DROP` below.
    The first experience has nothing to protect: there the method has the strengths that it was given. A trial repeats
    the experiences before with what was chosen for them.
    """
    rates, levels = _grids(tuning, ranges)
    strengths = [range_ for range_ in ranges if range_.name != "train.lr"]
    chosen: list[Values] = []
    reached: list[float] = []
    for i in range(length):
        off: Values = {range_.name: 0.0 for range_ in strengths} if i else {}
        trials = [Trial({}, i + 1, (*chosen, {**own, **off})) for own in rates]
        answers = yield trials
        figures = [_average([matrix[i][i] for matrix in matrices or ()]) for matrices in answers]
        best = _find_best(figures)
        if best is None:
            raise _all_failed(tuning, trials, bench)
        entry = rates[best]
        figure = figures[best]
        least = (1 - DROP) * (figure or 0.0)
        tell(f"{tuning}: experience {i + 1} of {length}: {_show(figure)} ({_list_values(entry) or 'as given'})")
        for level in levels if i else []:
            entry = {**rates[best], **level}
            (matrices,) = yield [Trial({}, i + 1, (*chosen, entry))]
            figure = _average([matrix[i][i] for matrix in matrices or ()])
            tell(f"{tuning}: experience {i + 1} of {length}: {_show(figure)} ({_list_values(entry)})")
            if figure is not None and figure >= least:
                break
        chosen.append(entry)
        reached.append(figure or 0.0)
    return {}, tuple(chosen), sum(reached) / length


def _grids(tuning: Tuning, ranges: Sequence[Range]) -> tuple[list[Values], list[Values]]:
    """Return the learning rates, and the strengths from the top of their ranges down, that `per-experience` tries."""
    rate = next((range_ for range_ in ranges if range_.name == "train.lr"), None)
    strengths = [range_ for range_ in ranges if range_ is not rate]
    rates: list[Values] = [{rate.name: value} for value in rate.grid(tuning.trials)] if rate else [{}]
    steps = list(zip(*(range_.grid(tuning.trials) for range_ in strengths), strict=True)) if strengths else []
    levels: list[Values] = [{r.name: v for r, v in zip(strengths, step, strict=True)} for step in steps]
    return rates, levels


def _find_best(figures: Sequence[float | None]) -> int | None:
    """Return the position of the largest figure, the first of equal ones; None if there is none."""
    known = [i for i, figure in enumerate(figures) if figure is not None]
    return max(known, key=lambda i: (figures[i], -i), default=None)


def _average(figures: Sequence[float | None]) -> float | None:
    """Return the mean; None if there is no figure, or one is not known."""
    known = [figure for figure in figures if figure is not None]
    return sum(known) / len(known) if known and len(known) == len(figures) else None


def _show(figure: float | None) -> str:
    return "failed" if figure is None else f"{100 * figure:.1f} %"


def _list_values(values: Values) -> str:
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


# ------------------------------------------------------------------------------ tunings of a study


def tunings_of(study: Study) -> list[Tuning]:
    """Return the tunings that a study asks for: of each method, scenario and protocol; tuned methods are left out.

    The baselines are tuned by the first protocol, so that there is one of each, and not at all where no setting of the
    training is searched.

    Raises:
        UsageError: with one sentence for each mistake.
    """
    problems = study.problems()
    protocols = []
    for name in study.tuning.get("protocols", ()):
        try:
            protocols.append(parse_protocol(name))
        except UsageError as error:
            problems += error.problems
    sections = {"train", *(name for method in study.all_methods for name in method.plugins)}
    problems += [
        f"`search` names `{cut(name)}`, and no method of the study has the plugin `{cut(name.rpartition('.')[0])}`."
        for name in study.search
        if name.rpartition(".")[0] not in sections
    ]
    if problems:
        raise UsageError(*problems)
    of_training = any(
        given is not False for name, given in {"train.lr": None, **study.search}.items() if name.startswith("train.")
    )
    shared = replace(study, seeds=tuple(study.tuning.get("seeds", (0,))), methods=(), tuning={}, orders=None)
    return [
        Tuning(shared, scenario, label, method, protocol, study.tuning.get("trials", TRIALS[protocol.kind]))
        for scenario, label in zip(study.scenarios, study.scenario_labels, strict=True)
        for method in study.all_methods
        if method.tuned is None and (method.name not in BASELINES or of_training)
        for protocol in (protocols[:1] if method.name in BASELINES else protocols)
    ]


def with_tuned(study: Study, chosen: Sequence[Chosen]) -> Study:
    """Return `study` with what was chosen for its methods in place of them; others stay as they are.

    A method is called by its protocol, too, if that is an oracle or there are several; a baseline is not.
    """
    several = len(study.tuning.get("protocols", ())) > 1
    there = {(one.tuning.method.name, one.tuning.label) for one in chosen}
    methods = []
    for method in study.all_methods:
        if left := tuple(label for label in study.scenario_labels if (method.name, label) not in there):
            methods.append(replace(method, scenarios=left))
    for one in chosen:
        protocol = one.tuning.protocol
        name = one.tuning.method.name
        named = (several or protocol.label != str(protocol)) and name not in BASELINES
        methods.append(one.tuned_method(f"{name}[{protocol.label}]" if named else name))
    return replace(study, methods=tuple(methods), baselines=False)
