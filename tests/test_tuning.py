"""Choosing hyper-parameters: what is searched, what a tuning run is given, and that nothing but the study decides."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clframe import RunError, Scenario, registry, split_classes, testing
from clframe.cli import compare
from clframe.cli.main import main
from clframe.data.scenario import Part
from clframe.experiments.cells import Cell, run_inline
from clframe.experiments.journal import ROUND, Journal
from clframe.experiments.outcome import describe_stamp
from clframe.experiments.search import Range
from clframe.experiments.study import Study
from clframe.experiments.trials import Bench, Chosen, Trial
from clframe.experiments.tuning import _adapt, choose, estimate_effort, tunings_of, with_tuned
from clframe.experiments.workers import open_engine
from clframe.options import Search, fields_of, options_of, searched, validated
from clframe.runs.files import read_config
from clframe.settings import Config, TrainSettings

NAMES = [name for name in registry.names("plugin") if not registry.plugin_class(name).variants]
# options that make a plugin cheap on the tiny scenario
SMALL: dict[str, dict[str, Any]] = {
    "always-be-dreaming": {"iterations": 2, "batch_size": 8, "noise": 10, "width": 8},
    "channel-gating": {"classifier_iterations": 2, "size": 12, "sparsity_after": 0.0},
    "deep-inversion": {"per_class": 2, "iterations": 2},
    "der": {"size": 10},
    "er": {"size": 10},
    "generative-replay": {"hidden": [8], "z": 4, "iterations": 2},
    "icarl": {"size": 24},
}
MODELS = {"finetune-fc": "mlp-100"}  # of those that `cnn-small` does not suit
# weights of terms that train a generator or dreams, not the network that learns the scenario
OF_GENERATORS = {
    "always-be-dreaming": {"confidence", "balance", "statistics", "smooth"},
    "deep-inversion": {"feature", "tv", "l2", "compete"},
}
learn = partial(testing.learn, iterations=3, lr=0.1, optimizer="sgd")


def setting_of(name: str) -> Any:
    """Return a setting that the plugin serves."""
    return registry.plugin_class(name).serves[0]


# ------------------------------------------------------------------------------------ search ranges


def test_every_strength_declares_a_range_that_holds_its_default() -> None:
    for name in NAMES:
        cls = registry.plugin_class(name)
        for option in options_of(cls):
            strength = re.search(r"\bweight of|strength", option.doc) and option.type.startswith("float")
            assert bool(option.search) == bool(strength and option.name not in OF_GENERATORS.get(name, ())), option
            if option.search:
                low, high, default = option.search.low, option.search.high, option.default
                assert low is not None
                assert high is not None
                assert isinstance(default, float)
                assert low <= default <= high
                for end in (low, high):
                    assert validated(cls, {option.name: end}, name)
    (lr,) = (option for option in fields_of(TrainSettings) if option.search)
    assert (lr.name, str(lr.search)) == ("lr", "0.0001 to 1, log")


@pytest.mark.parametrize(
    ("low", "high", "log", "choices"),
    [(None, None, False, ()), (1, None, False, ()), (2, 1, False, ()), (0, 1, True, ()), (0, 1, False, (1,))],
)
def test_a_range_that_is_none_is_refused(low: Any, high: Any, log: bool, choices: Any) -> None:
    with pytest.raises(ValueError, match="search"):
        Search(low, high, log, choices)


# ------------------------------------------------------------------- settings of single experiences


@pytest.mark.parametrize("name", [name for name in NAMES if searched(registry.plugin_class(name))])
def test_a_strength_that_each_experience_has_of_its_own_is_that_strength(name: str) -> None:
    """Given to each experience, a value is the option itself, to the bit; another one for the second is not."""
    options = searched(registry.plugin_class(name))
    of_option = {option.name: option for option in options_of(registry.plugin_class(name))}
    values = {option: of_option[option].search.low for option in options}
    scenario = testing.tiny(setting_of(name))

    def end(per_experience: Any, given: dict[str, Any]) -> dict[str, Any]:
        plugin = {name: {**SMALL.get(name, {}), **given}}
        results = learn(scenario, plugin, model=MODELS.get(name, testing.MODEL), per_experience=per_experience)
        return dict(results.trained.predictor.state_dict())

    named = {f"{name}.{option}": value for option, value in values.items()}
    whole = end(None, values)
    apart = end([named, named], {})
    assert whole.keys() == apart.keys()
    assert all(torch.equal(whole[key], apart[key]) for key in whole)
    other = end([named], {})
    assert any(not torch.equal(whole[key], other[key]) for key in whole)


@pytest.mark.parametrize("keep", [False, True])
def test_a_learning_rate_that_each_experience_has_of_its_own_is_that_rate(keep: bool) -> None:
    def end(per_experience: Any, lr: float) -> dict[str, Any]:
        results = learn(
            testing.tiny(), per_experience=per_experience, lr=lr, keep_optimizer=keep, optimizer="adam", head_lr=0.02
        )
        return dict(results.trained.predictor.state_dict())

    whole, apart = end(None, 0.01), end([{"train.lr": 0.01}, {"train.lr": 0.01}], 0.02)
    assert all(torch.equal(whole[key], apart[key]) for key in whole)
    first = end([{"train.lr": 0.02}], 0.01)
    assert any(not torch.equal(whole[key], first[key]) for key in whole)


def test_other_settings_do_not_change_within_a_run() -> None:
    with testing.refused("`er.size`", "experience 2", "`train.lr`"):
        learn(testing.tiny(), {"er": {"size": 10}}, per_experience=[{}, {"er.size": 5}])
    with testing.refused("`ewc.lambda` is -1", "experience 1"):
        learn(testing.tiny(), "ewc", per_experience=[{"ewc.lambda": -1}])
    with testing.refused("`train.lr` is 'fast'", "experience 1"):
        learn(testing.tiny(), "ewc", per_experience=[{"train.lr": "fast"}])
    with testing.refused("`lwf.lambda`", "`train.lr`"):
        learn(testing.tiny(), "ewc", per_experience=[{"lwf.lambda": 1}])


# -------------------------------------------------------------------------- what a run is not given


def watched(scenario: Scenario, reads: Counter[tuple[int, Part]]) -> Scenario:
    """Return `scenario` with a loader that counts what is read of it."""
    load = scenario._load

    def count(index: int, part: Part) -> Any:
        reads[index, part] += 1
        return load(index, part)

    scenario._load = count
    return scenario


@pytest.mark.parametrize("name", ["fine-tuning", *NAMES])
def test_a_run_that_is_given_less_reads_no_test_image_and_no_later_experience(name: str) -> None:
    """An instrumented scenario counts each image that is read from it, with every plugin."""
    reads: Counter[tuple[int, Part]] = Counter()
    setting = "class" if name == "fine-tuning" else setting_of(name)
    arrays = testing.tiny_arrays(shape=testing.SHAPE, classes=9, per_class=8)
    scenario = watched(three_experiences(arrays, setting), reads)
    plugins = [] if name == "fine-tuning" else [{name: SMALL.get(name, {})}]
    results = learn(
        scenario,
        *plugins,
        model=MODELS.get(name, testing.MODEL),
        iterations=1,
        val=0.25,
        experiences=2,
        test=False,
    )
    assert set(reads) == {(0, "train"), (1, "train")}
    for matrix in results.accuracy.values():
        assert matrix == [[None, None]] * 2
    for matrix in results.validation.values():
        assert None not in matrix[1]
    assert results.data["test_images"] == [0, 0]
    assert len(results.data["classes"]) == 2


def three_experiences(arrays: Any, setting: Any) -> Scenario:
    """Return three experiences of three classes."""
    return split_classes("tiny", arrays, experiences=3, setting=setting)


def test_what_a_run_is_given_is_what_the_whole_scenario_has() -> None:
    """A run of the first experiences holds out and learns what a run of all of them does."""
    whole, part = three_experiences(testing.tiny_arrays(9), "class"), three_experiences(testing.tiny_arrays(9), "class")
    part = part.cut(2, test=False)
    for scenario in (whole, part):
        scenario.hold_out(0.25, 3)
    for i in range(2):
        for name in ("train", "val"):
            assert torch.equal(getattr(whole[i], name).x, getattr(part[i], name).x)
        assert len(part[i].test) == 0
    assert (len(part), part.class_names, part.class_order) == (2, whole.class_names[:6], tuple(range(6)))
    assert part.checksum == whole.checksum
    with pytest.raises(IndexError, match="2 experiences"):
        part[2]
    with pytest.raises(IndexError, match="none with number 2"):
        part._load(2, "train")


def test_a_run_of_which_nothing_would_be_measured_is_refused() -> None:
    with testing.refused("`run.test`", "`train.val`"):
        learn(testing.tiny(), test=False)
    with testing.refused("`run.experiences` is 3", "`tiny` has 2"):
        learn(testing.tiny(), experiences=3)


# -------------------------------------------------------------------------- trials and what they choose

FAST = {"train.iterations": 5, "train.batch_size": 8, "scenario.limit": 10}
RANGES = {"ewc.lambda": [1, 100, "log"], "train.lr": [0.001, 0.1, "log"]}


def study_of(*protocols: str, methods: Any = ("ewc",), trials: int = 5, **parts: Any) -> Study:
    """Return a study of split-digits whose methods are to be tuned."""
    asked = {
        "scenarios": ["split-digits"],
        "methods": list(methods),
        "baselines": False,
        "set": FAST,
        "tuning": {"protocols": list(protocols), "trials": trials},
    }
    return Study.from_data(asked | parts)


def inline(cells: Sequence[Cell]) -> None:
    """Carry out cells one after another."""
    run_inline(cells, lambda event: None)


def tuned(study: Study, folder: Path, carry_out: Callable[[Sequence[Cell]], None] = inline) -> list[Chosen]:
    """Carry out the tunings of a study in `folder`."""
    folder.mkdir(exist_ok=True)
    return choose(tunings_of(study), folder, carry_out)


def configs_of(folder: Path) -> list[Config]:
    """Return the configurations of all cells of a tuning."""
    return [read_config(path.parent) for path in folder.glob("cells/*/results.json")]


def asked_of(folder: Path) -> set[tuple[float, float]]:
    """Return learning rate and strength of each trial on the disk."""
    return {(c.train.lr, c.plugins["ewc"].options["lambda"]) for c in configs_of(folder)}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tuning by `first-2`."""
    folder = tmp_path_factory.mktemp("first") / "tuning"
    tuned(study_of("first-2", search=RANGES), folder)
    return folder


def test_the_choice_is_the_trial_with_the_best_average_accuracy_on_held_out_images(first: Path) -> None:
    (one,) = tuned(study_of("first-2", search=RANGES), first)
    figures = {}
    for path in first.glob("cells/*/results.json"):
        config = read_config(path.parent)
        validation = json.loads(path.read_text())["validation"]["class"]
        figures[config.train.lr, config.plugins["ewc"].options["lambda"]] = sum(validation[1][:2]) / 2
        assert (config.run.experiences, config.run.test, config.train.val) == (2, False, 0.1)
    best = max(figures.values())
    assert len(figures) == 5
    assert len(set(figures.values())) > 1
    assert one.accuracy == best
    assert figures[one.stamp["chosen"]["train.lr"], one.stamp["chosen"]["ewc.lambda"]] == best
    assert (1e-3, 100.0) in figures  # what the method has without a tuning is tried, too
    assert all(1e-3 <= lr <= 0.1 and 1 <= strength <= 100 for lr, strength in figures)


def test_a_tuning_that_was_stopped_anywhere_comes_to_the_same_trials_and_choice(first: Path, tmp_path: Path) -> None:
    """It is stopped before each cell, while the journal is written, and with half a line of it and a lock left."""
    folder = tmp_path / "tuning"

    class Stop(BaseException):
        pass

    def one_cell(cells: Sequence[Cell]) -> None:
        inline(cells[:1])
        raise Stop

    study = study_of("first-2", search=RANGES)
    for _ in range(4):
        with pytest.raises(Stop):
            tuned(study, folder, one_cell)
    journal = folder / "trials.log"
    with pytest.raises(Stop):
        tuned(study, folder, one_cell)  # the first four are told, and the fifth is carried out
    lines = journal.read_bytes().splitlines(keepends=True)
    assert sum(b"train.lr" in line for line in lines[-4:]) == 4
    journal.write_bytes(b"".join(lines[:-2]) + lines[-2][:20])
    os.symlink(journal, folder / "trials.log.lock")
    (again,) = tuned(study, folder)
    assert asked_of(folder) == asked_of(first)
    assert (folder / again.file.name).read_bytes() == (first / again.file.name).read_bytes()
    assert len(configs_of(folder)) == 5


def test_two_workers_come_to_the_same_trials_and_choice_as_one(first: Path, tmp_path: Path) -> None:
    with open_engine("local", 2, lambda event: None) as carry_out:
        (one,) = tuned(study_of("first-2", search=RANGES), tmp_path / "tuning", carry_out)
    assert asked_of(tmp_path / "tuning") == asked_of(first)
    assert one.file.read_bytes() == (first / one.file.name).read_bytes()


def test_more_trials_go_on_with_those_that_are_there(first: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(first, tmp_path / "tuning")
    begun: list[Cell] = []
    tuned(study_of("first-2", search=RANGES, trials=7), folder, lambda cells: [begun.extend(cells), inline(cells)][1])
    assert len(begun) == 2
    assert asked_of(folder) > asked_of(first)


def test_per_experience_chooses_by_the_images_of_each_experience_when_it_comes(tmp_path: Path) -> None:
    """The choice is recomputed from the results of the cells, by the rule of De Lange et al."""
    study = study_of("per-experience", search=RANGES, trials=3, set={**FAST, "scenario.experiences": 2})
    (one,) = tuned(study, tmp_path)
    accuracy = {}
    for path in tmp_path.glob("cells/*/results.json"):
        config = read_config(path.parent)
        last = config.run.experiences or 0
        entries = config.run.per_experience or []
        assert (len(entries), config.run.test) == (last, False)
        key = tuple(tuple(sorted(entry.items())) for entry in entries)
        accuracy[key] = json.loads(path.read_text())["validation"]["class"][last - 1][last - 1]

    def value(*entries: dict[str, float]) -> float:
        return float(accuracy[tuple(tuple(sorted(entry.items())) for entry in entries)])

    rates = [0.1, 0.01, 0.001]
    first_rate = max(rates, key=lambda lr: (value({"train.lr": lr}), lr))
    before = {"train.lr": first_rate}
    plain = {lr: value(before, {"train.lr": lr, "ewc.lambda": 0.0}) for lr in rates}
    rate = max(rates, key=lambda lr: (plain[lr], lr))
    for strength in (100.0, 10.0, 1.0):
        entry = {"train.lr": rate, "ewc.lambda": strength}
        if value(before, entry) >= 0.8 * plain[rate]:
            break
    assert one.per_experience == (before, entry)
    assert one.accuracy == pytest.approx((value(before) + value(before, entry)) / 2)


@pytest.mark.parametrize(
    ("protocol", "allowed"),
    [
        ("first-2", {("split-digits", 0), ("split-digits", 1)}),
        ("per-experience", {("split-digits", i) for i in range(3)}),
        ("other-scenario:rotated-digits", {("rotated-digits", i) for i in range(5)}),
        ("end-of-stream", {("split-digits", i) for i in range(5)}),
    ],
)
def test_no_trial_reads_a_test_image_or_what_the_protocol_keeps_from_it(
    protocol: str, allowed: set[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: set[tuple[str, int, str]] = set()
    build = registry.build_scenario

    def build_watched(*arguments: Any) -> Scenario:
        scenario = build(*arguments)
        load = scenario._load

        def watch(index: int, part: Part) -> Any:
            reads.add((scenario.name, index, part))
            return load(index, part)

        scenario._load = watch
        return scenario

    monkeypatch.setattr(registry, "build_scenario", build_watched)

    def three_only(cells: Sequence[Cell]) -> None:
        if any((cell.config.run.experiences or 0) > 3 for cell in cells):
            raise KeyboardInterrupt  # three experiences show what a fourth would
        for cell in cells:
            before = set(reads)
            inline([cell])
            given = cell.config.run.experiences or 5
            assert {index for _, index, _ in reads - before} <= set(range(given))

    with suppress(KeyboardInterrupt):
        tuned(study_of(protocol, methods=["er"], trials=1), tmp_path, three_only)
    assert reads == {(name, index, "train") for name, index in allowed}


def test_an_oracle_is_called_one_everywhere(tmp_path: Path) -> None:
    study = study_of("end-of-stream", methods=["er"], trials=1)
    chosen = tuned(study, tmp_path)
    assert [method.name for method in with_tuned(study, chosen).methods] == ["er[end-of-stream (oracle)]"]
    stamp = yaml.safe_load(chosen[0].file.read_text())["run"]["tuned"]
    assert stamp["protocol"] == "end-of-stream (oracle)"
    assert "oracle" in str(describe_stamp(stamp))
    assert describe_stamp(None) is None


def test_what_is_asked_depends_on_the_trials_of_earlier_rounds_alone(tmp_path: Path) -> None:
    """From the eleventh trial on the sampler looks at earlier ones: part of a round must not change what is asked."""
    ranges = [Range("ewc.lambda", Search(1, 1000, log=True), False, 100.0, True)]

    def journal(name: str) -> Journal:
        return Journal(tmp_path / "trials.log", name, ranges, "seed")

    def score(values: Any) -> float:
        return -abs(math.log(values["ewc.lambda"] / 20))

    whole = journal("whole")
    rounds = []
    while len(whole.trials) < 16:
        start, asked = whole.ask(16)
        rounds.append((start, asked))
        whole.tell(start, asked, [score(values) for values in asked])
    part = journal("part")
    for start, asked in rounds[:3]:
        part.tell(start, asked, [score(values) for values in asked])
    start, asked = rounds[3]
    part.tell(start, asked[:2], [score(values) for values in asked[:2]])
    assert len(part.trials) == 14
    assert journal("part").ask(16) == (start, asked) == (12, asked)
    part.tell(start, asked, [score(values) for values in asked])
    assert [trial.params for trial in part.trials] == [trial.params for trial in whole.trials]
    other = journal("other")
    for start, asked in rounds[:3]:
        other.tell(start, asked, [-score(values) for values in asked])
    assert other.ask(16) != rounds[3]  # of other figures it asks for other values


def test_strengths_fall_until_at_most_a_fifth_of_the_accuracy_is_lost(tmp_path: Path) -> None:
    """The course of `per-experience` is played through with made-up accuracies."""
    (tuning,) = tunings_of(study_of("per-experience", trials=3))
    rate = Range("train.lr", Search(0.01, 1, log=True), False, 0.1, True)
    strength = Range("ewc.lambda", Search(1, 100, log=True), False, 10.0, True)
    course = _adapt(tuning, [rate, strength], 2, Bench(tmp_path, inline), lambda text: None)

    def answer(trials: list[Trial], *figures: float | None) -> list[Any]:
        assert len(trials) == len(figures)
        i = len(trials[0].per_experience) - 1
        return [None if f is None else [[[0.0] * 2] * i + [[0.0] * i + [f]]] for f in figures]

    first = course.send(None)
    assert [trial.per_experience for trial in first] == [({"train.lr": lr},) for lr in (1.0, 0.1, 0.01)]
    second = course.send(answer(first, None, 0.9, 0.8))
    before = {"train.lr": 0.1}
    assert [trial.per_experience for trial in second] == [
        (before, {"train.lr": lr, "ewc.lambda": 0.0}) for lr in (1.0, 0.1, 0.01)
    ]
    assert all(trial.experiences == 2 for trial in second)
    strongest = course.send(answer(second, 0.5, 0.6, 0.6))  # the larger rate of two that are as good
    assert strongest[0].per_experience[1] == {"train.lr": 0.1, "ewc.lambda": 100.0}
    weaker = course.send(answer(strongest, 0.47))  # 0.48 would hold
    assert weaker[0].per_experience[1] == {"train.lr": 0.1, "ewc.lambda": 10.0}
    with pytest.raises(StopIteration) as end:
        course.send(answer(weaker, 0.48))
    values, entries, accuracy = end.value.value
    assert (values, entries) == ({}, (before, {"train.lr": 0.1, "ewc.lambda": 10.0}))
    assert accuracy == pytest.approx((0.9 + 0.48) / 2)


def test_several_protocols_stand_side_by_side_and_the_baselines_once() -> None:
    study = study_of("first-2", "end-of-stream", methods=["er"], baselines=True)
    asked = [(tuning.method.name, str(tuning.protocol)) for tuning in tunings_of(study)]
    baselines = [("fine-tuning", "first-2"), ("joint", "first-2")]
    assert asked == [*baselines, ("er", "first-2"), ("er", "end-of-stream")]
    chosen = [Chosen(tuning, tuning.method, (), 0.5, {"seeds": [0]}, Path()) for tuning in tunings_of(study)]
    names = [method.name for method in with_tuned(study, chosen).all_methods]
    apart = study.extended({"search": {"train.lr": False, "er.size": [10, 20]}})
    assert [str(tuning) for tuning in tunings_of(apart)] == [
        "er on split-digits, first-2",
        "er on split-digits, end-of-stream (oracle)",
    ]
    assert [method.name for method in with_tuned(apart, chosen[2:]).all_methods][:2] == ["fine-tuning", "joint"]
    assert names == ["fine-tuning", "joint", "er[first-2]", "er[end-of-stream (oracle)]"]
    assert with_tuned(study, chosen).problems() == []


# ---------------------------------------------------------------------------------------- the commands


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run `clframe` with `arguments`, check the exit code, and return what it printed."""
    found = main([*arguments])
    printed = capsys.readouterr()
    assert found == code, printed
    return printed.out, printed.err


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HTML is drawn, which takes longer than the cells of these studies."""
    monkeypatch.setattr(compare, "_write_report", lambda outcome, path: None)


SETS = [part for name, value in FAST.items() for part in ("--set", f"{name}={value}")]


@pytest.mark.usefixtures("no_report")
def test_what_was_chosen_is_run_and_compared_with_its_stamp(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(first / "ewc-split-digits-first-2.yaml")
    chosen = yaml.safe_load(Path(file).read_text())["run"]["tuned"]["chosen"]
    told(capsys, "run", "--config", file, "--quiet", "--output", str(tmp_path / "run"))
    config = read_config(tmp_path / "run")
    assert config.run.tuned is not None
    assert config.run.tuned["protocol"] == "first-2"
    assert (config.train.lr, config.plugins["ewc"].options["lambda"]) == (chosen["train.lr"], chosen["ewc.lambda"])
    assert config.run.test
    out, _ = told(
        capsys,
        *("compare", "-s", "split-digits", "--method", file, "--seeds", "1", "--no-baselines", "--engine", "inline"),
        *("--quiet", "--output", str(tmp_path / "study"), "--set", "scenario.limit=10"),
    )
    (row,) = (line for line in out.splitlines() if line.startswith("ewc"))
    assert row.split()[-1] == "first-2"
    assert "Tuned by first-2; 5 trials; seeds 0; split-digits" in out
    ours = json.loads((tmp_path / "run" / "results.json").read_text())["accuracy"]
    (cell,) = (tmp_path / "study" / "cells").glob("*/results.json")
    assert json.loads(cell.read_text())["accuracy"] == ours
    _, err = told(capsys, "run", "--config", file, "--set", "train.lr=0.5", "--dry-run", code=2)
    assert "`train.lr` is 0.5" in err
    assert "run.tuned" in err


@pytest.mark.usefixtures("no_report")
def test_compare_tunes_first_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    asked = ["compare", "-s", "split-digits", "-s", "rotated-digits", "--method", "ewc", "--tuned", "first-2"]
    asked += ["--trials", "2", "--seeds", "1", *SETS, "--engine", "inline", "--output", str(folder), "--no-baselines"]
    out, err = told(capsys, *asked)
    assert "trial 2 of 2" in err
    rows = [line for line in out.splitlines() if line.startswith("ewc")]
    assert [row.split()[-1] for row in rows] == ["first-2", "first-2"]
    stamps = [line for line in out.splitlines() if line.startswith("Tuned by first-2; 2 trials; seeds 0; ")]
    assert [line.split()[-1] for line in stamps] == ["ewc.", "ewc."]
    for scenario in ("split-digits", "rotated-digits"):
        chosen = yaml.safe_load((folder / "tuning" / f"ewc-{scenario}-first-2.yaml").read_text())["run"]["tuned"]
        (cell,) = (path for path in (folder / "cells").glob(f"ewc-{scenario}-*") if path.is_dir())
        config = read_config(cell)
        assert chosen["chosen"] == {"train.lr": config.train.lr, "ewc.lambda": config.plugins["ewc"].options["lambda"]}
        assert config.run.tuned == chosen
    before = {path: path.stat().st_mtime_ns for path in folder.glob("**/results.json")}
    assert told(capsys, "compare", str(folder), "--engine", "inline") == (out, "")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("**/results.json")} == before


@pytest.mark.usefixtures("no_report")
def test_protocols_that_choose_the_same_have_rows_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["compare", "-s", "split-digits", "--method", "er", "--tuned", "first-2", "--tuned", "end-of-stream"]
    asked += ["--trials", "1", "--seeds", "1", *SETS, "--engine", "inline", "--output", str(tmp_path / "study"), "-q"]
    out, _ = told(capsys, *asked, "--no-baselines")
    rows = [line for line in out.splitlines() if line.startswith("er")]
    assert sorted(line.split("  ")[0] for line in rows) == ["er[end-of-stream (oracle)]", "er[first-2]"]
    assert all(line.split("  ")[0].removeprefix("er[").rstrip("]") in line[30:] for line in rows)


def test_tune_prints_what_was_chosen_and_refuses_another_tuning(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tuning"
    asked = ["tune", "-s", "split-digits", "--method", "er", "--trials", "1", *SETS, "--engine", "inline"]
    out, _ = told(capsys, *asked, "--output", str(folder), "--json")
    (one,) = json.loads(out)["chosen"]
    assert (one["method"], one["protocol"], one["values"]) == ("er", "first-2", {"train.lr": 0.001})
    assert Path(one["file"]).is_file()
    assert told(capsys, "tune", str(folder), "--json", "--engine", "inline") == (out, "")
    _, err = told(capsys, *asked, "--method", "ewc", "--output", str(folder), code=2)
    assert "another tuning" in err
    assert "`methods`" in err
    assert err.count("\n") == 1
    _, err = told(capsys, *asked, "--output", str(first / "cells"), code=2)
    assert "not that of a tuning" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol", "first-1"], ["`first-1`", "`first-2`"]),
        (["--protocol", "first-6"], ["`first-6`", "5"]),
        (["--protocol", "first-5"], ["`first-5`", "`end-of-stream`"]),
        (["--protocol", "test-set"], ["`test-set`", "`first-K`", "`per-experience`"]),
        (["--protocol", "other-scenario"], ["`other-scenario:NAME`"]),
        (["--protocol", "other-scenario:split-digits"], ["`other-scenario:split-digits`"]),
        (["--protocol", "other-scenario:digits"], ["`digits`"]),
        (["--search", "er.size"], ["`er.size`", "--search er.size=[1,100,log]"]),
        (["--search", "er.size=[10,5]"], ["`er.size`", "[10, 5]"]),
        (["--search", "er.size=5"], ["`er.size`", "[LOW, HIGH]"]),
        (["--search", "er.sise=[1,5]"], ["`er.sise`", "`er.size`"]),
        (["--search", "ewc.lambda=[1,5]"], ["`ewc.lambda`", "`ewc`"]),
        (["--search", "er.size=[-1,5]"], ["`er.size` is -1"]),
        (["--search", "train.lr=false"], ["`er`", "nothing to tune"]),
        (["--search", "er.size=[1,5]", "--protocol", "per-experience"], ["`er.size`", "`per-experience`"]),
        (["--trials", "0"], ["`tuning.trials`", "0"]),
        (["--seeds", "few"], ["`tuning.seeds`", "'few'"]),
        (["--workers", "0"], ["`--workers`", "0"]),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_sentence(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["tune", "-s", "split-digits", "--method", "er", *SETS, "--output", str(tmp_path / "tuning"), *arguments]
    _, err = told(capsys, *asked, "--engine", "inline", code=2)
    assert err.count("\n") == 1, err
    assert [word for word in words if word not in err] == [], err
    assert not (tmp_path / "tuning" / "cells").exists()


def test_a_tuning_without_optuna_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with testing.refused("pip install 'clframe[tune]'"):
        tuned(study_of("first-2"), tmp_path)


def test_a_method_whose_trials_all_fail_is_told_with_the_first_reason(tmp_path: Path) -> None:
    study = study_of("first-2", methods=["er"], trials=2, search={"train.lr": [1e30, 1e35, "log"]})
    study = study.extended({"set": {"train.optimizer": "sgd", "train.clip": 0, "train.lr": 1e30}})
    with pytest.raises(RunError, match=r"No trial of er on split-digits, first-2 .* infinite or not a number"):
        tuned(study, tmp_path)


def test_ranges_are_what_is_tried() -> None:
    whole = Range("er.size", Search(10, 1000, log=True), True, 200, False)
    assert whole.grid(3) == [1000, 100, 10]
    assert Range("x", Search(0, 1), False, 0.5, False).grid(3) == [1.0, 0.5, 0.0]
    assert Range("x", Search(choices=("a", "b")), False, "a", False).grid(5) == ["a", "b"]
    assert [whole.holds(value) for value in (9, 10, 1000, 1001, "10")] == [False, True, True, False, False]
    number = Range("x", Search(0.001, 1.00004), False, 1.0, False)
    assert [number.rounded(value) for value in (0.123456, 1.000041)] == [0.1235, 1.0]


def test_a_dry_run_lists_the_trials_of_each_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["compare", "-s", "split-digits", "--method", "er+ewc", "--seeds", "1", "--no-baselines", "--dry-run"]
    asked += ["--tuned", "first-2", "--tuned", "per-experience", "--tuned", "other-scenario:permuted-digits"]
    asked += ["--trials", "7", "--output", str(tmp_path / "new")]
    out, _ = told(capsys, *asked)
    rows = [line.split() for line in out.splitlines()]
    expected = {
        "first-2": [7, math.ceil(7 / ROUND), 7],
        # 7 learning rates in each of 5 experiences, and 7 strengths one after another in each but the first
        "per-experience": [5 * 7 + 4 * 7, 5 + 4 * 7, 63],
        "other-scenario:permuted-digits": [7, math.ceil(7 / ROUND), 7],
    }
    assert {row[2]: [int(number) for number in row[3:6]] for row in rows[1:4]} == expected
    assert {row[-1] for row in rows[1:4]} == {"waiting"}
    assert "77 runs at most to tune" in out
    assert not (tmp_path / "new").exists()
    document = json.loads(told(capsys, *asked, "--json")[0])
    assert {one["protocol"]: [one["trials"], one["rounds"], one["runs"]] for one in document["tunings"]} == expected


def test_the_effort_of_a_tuning_is_that_of_its_experiences() -> None:
    study = Study.from_data({"scenarios": ["split-digits"], "methods": ["ewc"], "baselines": False, "tuning": TUNINGS})
    first, each, other = (effort.whole_runs for effort in estimate_effort(tunings_of(study), Path("nowhere")))
    assert first == 2 * 3 * 2 / 5  # two seeds of three trials, each of two of five experiences
    assert each == 2 * (3 * 1 + 6 * 2 + 6 * 3 + 6 * 4 + 6 * 5) / 5
    assert other is None


TUNINGS = {
    "protocols": ["first-2", "per-experience", "other-scenario:permuted-digits"],
    "trials": 3,
    "seeds": 2,
}
