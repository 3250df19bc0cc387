"""Evaluations while learning: their measures beside a brute force, what is evaluated, and what a resume keeps of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import clframe
from clframe import Plugin, Results, Scenario, curve, hookimpl, split_classes, testing
from clframe.cli.live import Live
from clframe.cli.main import main
from clframe.curve import Curve, Evaluations
from clframe.errors import DataError, Interrupted
from clframe.evaluate import ModelPredictor
from clframe.plugins.tensorboard import TensorBoard
from clframe.runs import checkpoint

Entry = tuple[int, int, list[float | None]]  # an evaluation: the experience under way, the step, the row

learn = partial(testing.learn, model="mlp-100", lr=0.01, epochs=3)


# ------------------------------------------------------------------------------------------- the brute force


def average(values: Sequence[float | None]) -> float | None:
    """The mean, added up from the first; None without values, or if one is missing."""
    if not values or None in values:
        return None
    total = 0.0
    for value in values:
        total += value or 0.0
    return total / len(values)


def smallest(values: Sequence[float | None]) -> float | None:
    return None if not values or None in values else min(value for value in values if value is not None)


def best_difference(values: list[float | None], window: int, sign: int) -> float | None:
    """The largest of sign (values[b] - values[a]) over all pairs a < b of which a window holds both, one by one."""
    while values and values[0] is None:
        values = values[1:]
    if not values or None in values:
        return None
    known = [value for value in values if value is not None]
    pairs = ((a, b) for b in range(len(known)) for a in range(max(0, b - window + 1), b))
    return max([0.0, *(sign * (known[b] - known[a]) for a, b in pairs)])


def brute_force(entries: list[Entry], counts: Sequence[int]) -> dict[str, float | None]:
    """All measures of a run in which each experience was evaluated, by their definitions."""
    learned = entries[-1][0] + 1
    end = {j: max(n for n, entry in enumerate(entries) if entry[0] == j) for j in range(learned)}
    a = [entry[2] for entry in entries]
    last = learned - 1
    lowest = average([smallest([a[n][j] for n in range(end[j] + 1, end[last] + 1)]) for j in range(last)])
    final = a[-1][last]
    worst = final if learned == 1 else None
    if learned > 1 and final is not None and lowest is not None:
        worst = final / learned + (1 - 1 / learned) * lowest
    found = {"average_minimum_accuracy": lowest, "worst_case_accuracy": worst}
    for name, sign in (("forgetting", -1), ("plasticity", 1)):
        for window in (10, 100):
            since = [[row[j] for during, _, row in entries if during >= j] for j in range(learned)]
            found[f"windowed_{name}_{window}"] = average([best_difference(v, window, sign) for v in since])
    gaps: list[float | None] = []
    for t in range(last):
        for j in range(t + 1):
            before = a[end[t]][j]
            least = smallest([row[j] for during, _, row in entries if during == t + 1])
            gaps.append(None if before is None or least is None else before - least)
    found["mean_stability_gap"] = average(gaps)
    found["largest_stability_gap"] = None if not gaps or None in gaps else max(gap for gap in gaps if gap is not None)
    begun = [[row[j] for during, _, row in entries if during == j][:10] for j in range(learned)]
    found["learning_curve_area"] = average([average(values) for values in begun])
    anytime: list[float | None] = []
    for during, _, row in entries:
        if None in row[: during + 1]:
            anytime.append(None)
            continue
        right = 0.0
        for j in range(during + 1):
            right += (row[j] or 0.0) * counts[j]
        anytime.append(right / sum(counts[: during + 1]))
    found["anytime_accuracy"] = average(anytime)
    return found


def entries_of(records: Sequence[Any], reading: str, *, few: bool) -> list[Entry]:
    """The evaluations of a run as its events have them; of several after one step the last, which is at an end."""
    found: dict[int, Entry] = {}
    for record in records:
        if record["kind"] == "within" and record["part"] == "test" and record["reading"] == reading:
            row = record["row"]
        elif record["kind"] == "eval" and record["part"] == "test" and not few:
            row = record["rows"][reading]
        else:
            continue
        step = record["total_step"]
        found.pop(step, None)
        found[step] = (record["experience"], step, list(row))
    return list(found.values())


def as_curve(entries: list[Entry], counts: Sequence[int]) -> Curve:
    ends = {experience: n for n, (experience, _, _) in enumerate(entries)}
    return Curve([e for e, _, _ in entries], ends, [row for _, _, row in entries], counts)


def values(entries: list[Entry], counts: Sequence[int]) -> dict[str, float | None]:
    return {name: found.value for name, found in curve.measures(as_curve(entries, counts), 1, None).items()}


def random_entries(generator: random.Random, *, one_class: bool = False) -> tuple[list[Entry], list[int]]:
    """Accuracies of up to five experiences, as shares of few images, so that many are equal."""
    learned = generator.randint(1, 5)
    counts = [generator.randint(3, 40) for _ in range(learned)]
    entries: list[Entry] = []
    for experience in range(learned):
        for _ in range(generator.choice((1, 2, 7, 30, 130))):
            row: list[float | None] = [generator.randint(0, n) / n for n in counts]
            if one_class and experience == 0:
                row[0] = None
            row[experience + 1 :] = [None] * (learned - experience - 1)
            entries.append((experience, len(entries) + 1, row))
    return entries, counts


# ------------------------------------------------------------------------------------------------ measures


@pytest.mark.parametrize("one_class", [False, True])
def test_measures_equal_brute_force_on_random_curves_to_the_bit(one_class: bool):
    generator = random.Random(0)
    for _ in range(15):
        entries, counts = random_entries(generator, one_class=one_class)
        assert values(entries, counts) == brute_force(entries, counts)


def test_identities_of_the_windowed_measures_and_of_the_worst_case():
    generator = random.Random(1)
    for _ in range(30):
        entries, counts = random_entries(generator)
        found = as_curve(entries, counts)
        for measure in (curve.windowed_forgetting, curve.windowed_plasticity):
            series = [measure(found, window) or 0.0 for window in (1, 2, 5, 10, 100, 1000)]
            assert series == sorted(series)
            assert series[0] == 0.0
        lowest = [smallest([row[j] for row in found.rows[found.ends[j] + 1 :]]) for j in range(found.learned - 1)]
        final = [accuracy or 0.0 for accuracy in found.rows[-1]]
        if all(low is not None and low <= end for low, end in zip(lowest, final, strict=False)):
            assert (curve.worst_case_accuracy(found) or 0.0) <= (average(final) or 0.0) + 1e-12


def test_a_curve_worked_out_by_hand():
    rows: list[Entry] = [
        (0, 1, [0.5, None]),
        (0, 2, [0.9, None]),
        (1, 3, [0.1, 0.6]),
        (1, 4, [0.8, 0.7]),
    ]
    assert values(rows, [10, 30]) == {
        "average_minimum_accuracy": 0.1,
        "worst_case_accuracy": pytest.approx(0.7 / 2 + 0.1 / 2),
        "windowed_forgetting_10": pytest.approx((0.8 + 0.0) / 2),
        "windowed_forgetting_100": pytest.approx((0.8 + 0.0) / 2),
        "windowed_plasticity_10": pytest.approx((0.7 + 0.1) / 2),
        "windowed_plasticity_100": pytest.approx((0.7 + 0.1) / 2),
        "mean_stability_gap": pytest.approx(0.8),
        "largest_stability_gap": pytest.approx(0.8),
        "learning_curve_area": pytest.approx((0.7 + 0.65) / 2),
        # after the third and fourth: (1 + 18) / 40 and (8 + 21) / 40
        "anytime_accuracy": pytest.approx((0.5 + 0.9 + 0.475 + 0.725) / 4),
    }


def test_plasticity_finds_a_rise_from_a_low_start():
    """A search for falls that skips starts below the largest value so far gives -0.1 here, turned around."""
    one = as_curve([(0, n, [accuracy]) for n, accuracy in enumerate((0.9, 0.1, 0.8), start=1)], [10])
    assert curve.windowed_plasticity(one, 10) == pytest.approx(0.7)
    assert curve.windowed_forgetting(one, 10) == pytest.approx(0.8)
    assert curve.windowed_plasticity(one, 2) == pytest.approx(0.7)
    apart = as_curve([(0, n, [accuracy]) for n, accuracy in enumerate((0.1, 0.5, 0.8), start=1)], [10])
    assert curve.windowed_plasticity(apart, 2) == pytest.approx(0.4)  # a window of two evaluations holds neighbors
    assert curve.windowed_plasticity(apart, 3) == pytest.approx(0.7)


def test_after_one_experience_the_worst_case_is_its_accuracy_and_there_is_no_minimum(tiny: Callable[..., Scenario]):
    results = learn(tiny(experiences=1), eval_every=2)
    for mode, found in results.measures.items():
        assert found["worst_case_accuracy"] == results.accuracy[mode][-1][0] == found["average_accuracy"]
        assert found["average_minimum_accuracy"] is None
        assert found["mean_stability_gap"] is None


def test_evaluations_that_are_missing_leave_measures_empty():
    found = Evaluations(10, None)
    found.add_end(0, 4, {"class": [0.5, None]}, [4, 4])
    found.whole = False
    assert {measure.value for measure in found.measures()["class"].values()} == {None}
    assert set(values([(0, 1, [None])], [4]).values()) == {None}


# -------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("setting", "settings"),
    [
        ("class", {"eval_every": 2}),
        ("class", {"eval_every": 4, "eval_images": 2}),
        ("class", {"eval_every": 1, "eval_images": 3, "val": 0.25}),
        ("class", {"eval_every": "epoch"}),
        ("task", {"eval_every": "epoch", "eval_images": 1}),
        ("domain", {"eval_every": 4}),
    ],
)
def test_measures_of_a_run_equal_brute_force_from_its_events_to_the_bit(
    tiny: Callable[..., Scenario], setting: str, settings: dict[str, Any]
):
    records: list[Any] = []
    plugins = [] if setting == "task" else [{"er": {"size": 12}}]
    results = learn(tiny(setting=setting), *plugins, listeners=[records.append], **settings)
    few = settings.get("eval_images")
    counts = [2 * (few or 4)] * 3
    said = results.data["while_learning"]
    assert (said["every"], said["images_per_class"], said["test_images"]) == (settings["eval_every"], few, counts)
    assert set(results.accuracy) == ({"class", "task"} if setting == "class" else {setting})
    for mode in results.accuracy:
        entries = entries_of(records, mode, few=few is not None)
        assert len(entries) == said["evaluations"]
        expected = brute_force(entries, counts)
        found = results.data["measures"][mode]
        assert {name: found[name]["value"] for name in expected} == expected
        assert {(found[name]["every"], found[name]["images"]) for name in expected} == {(settings["eval_every"], few)}
        assert None not in expected.values()
    assert "every" not in found["average_accuracy"]
    within = [record for record in records if record["kind"] == "within"]
    assert {(record["every"], record["images"]) for record in within} == {(settings["eval_every"], few)}


def test_evaluations_come_every_n_steps_of_an_experience_and_at_its_end(tiny: Callable[..., Scenario]):
    records: list[Any] = []
    learn(tiny(), eval_every=4, listeners=[records.append])  # 9 steps an experience
    steps = [r["total_step"] for r in records if r["kind"] == "within" and r["reading"] == "class"]
    assert steps == [4, 8, 13, 17, 22, 26]
    assert [step for _, step, _ in entries_of(records, "class", few=False)] == [4, 8, 9, 13, 17, 18, 22, 26, 27]


def test_rarer_evaluations_are_some_of_the_frequent_ones_and_never_find_a_lower_minimum(tiny: Callable[..., Scenario]):
    found = {}
    for every in (1, 4):
        records: list[Any] = []
        results = learn(tiny(), {"er": {"size": 12}}, eval_every=every, listeners=[records.append])
        found[every] = entries_of(records, "class", few=False), results.measures["class"]
    assert [entry for entry in found[1][0] if entry in found[4][0]] == found[4][0]
    for name in ("average_minimum_accuracy", "worst_case_accuracy"):
        assert (found[4][1][name] or 0.0) >= (found[1][1][name] or 0.0)
    for name in ("windowed_forgetting_100", "mean_stability_gap", "largest_stability_gap"):
        assert (found[4][1][name] or 0.0) <= (found[1][1][name] or 0.0)


def test_rows_while_learning_leave_out_later_experiences(tiny: Callable[..., Scenario]):
    for settings in ({"eval_every": 4}, {"eval_every": 4, "eval_images": 4}):
        records: list[Any] = []
        learn(tiny(setting="domain"), listeners=[records.append], **settings)
        for record in records:
            if record["kind"] == "within":
                assert [accuracy is None for accuracy in record["row"]] == [j > record["experience"] for j in range(3)]


class OtherWithTask(Plugin):
    """Answers with the opposite scores where a task is given."""

    name = "other-with-task"

    @hookimpl
    def predictor(self, run: Any) -> Any:
        class Turning(ModelPredictor):
            uses_task = True

            def forward(self, x: torch.Tensor, task: torch.Tensor | None = None) -> torch.Tensor:
                scores = super().forward(x)
                return scores if task is None else -scores

        return Turning(run.model)


def test_as_many_images_as_there_are_give_the_accuracies_of_all(tiny: Callable[..., Scenario]):
    """The two ways to evaluate agree, of methods whose answer depends on the task, too."""
    kinds: list[tuple[str, int, list[Any]]] = [
        ("class", 3, ["icarl"]),
        ("class", 6, [OtherWithTask()]),  # of one class each
        ("class", 2, [OtherWithTask()]),
        ("task", 3, ["hat"]),
        ("domain", 2, []),
    ]
    for setting, experiences, plugins in kinds:
        rows = []
        for settings in ({}, {"eval_images": 4}, {"eval_images": 1000, "eval_batch_size": 5}):
            records: list[Any] = []
            stream = tiny(experiences, setting=setting)
            learn(stream, *plugins, eval_every=2, iterations=4, listeners=[records.append], **settings)
            modes = {r["reading"] for r in records if r["kind"] == "within"}
            entries = {mode: entries_of(records, mode, few=bool(settings)) for mode in modes}
            rows.append({mode: [(i, step, row[: i + 1]) for i, step, row in found] for mode, found in entries.items()})
        assert rows[0] == rows[1] == rows[2]


class Watch(Plugin):
    """Keeps the images of each pass of the network in evaluation mode."""

    name = "watch"
    observer = True

    def __init__(self) -> None:
        self.passes: list[tuple[int, torch.Tensor]] = []

    @hookimpl
    def before_run(self, run: Any) -> None:
        def keep(module: Any, given: Any) -> None:
            if not module.training:
                self.passes.append((run.experience.index, given[0].clone()))

        self.handle = run.model.register_forward_pre_hook(keep)

    @hookimpl
    def after_run(self, run: Any) -> None:
        self.handle.remove()


def passes_of(scenario: Scenario, seed: int) -> list[torch.Tensor]:
    """The images of the evaluations while each experience is learned: one pass each, of the same images."""
    watch = Watch()
    learn(scenario, watch, eval_every=3, eval_images=3, seed=seed)
    # those at the ends are of all images of one experience, of which there are 8
    few = [[x for index, x in watch.passes if index == k and len(x) == 6 * (k + 1)] for k in range(3)]
    assert [len(found) for found in few] == [4, 4, 4]  # every 3 of 9 steps, and at the end
    for found in few:
        assert all(torch.equal(found[0], x) for x in found)
    return [found[0] for found in few]


def test_the_images_are_drawn_once_from_the_seed_and_evaluated_in_one_pass(tiny: Callable[..., Scenario]):
    one, two, three = passes_of(tiny(), seed=3)
    assert torch.equal(two[:6], one)
    assert torch.equal(three[:12], two)
    arrays = testing.tiny_arrays()
    for k in range(3):
        own = arrays.y_test // 2 == k
        images, labels = arrays.x_test[own].float() / 255, arrays.y_test[own]
        where = [int((images == x).flatten(1).all(1).nonzero()) for x in three[6 * k : 6 * k + 6]]
        assert len(set(where)) == 6
        assert labels[where].bincount(minlength=6)[2 * k : 2 * k + 2].tolist() == [3, 3]
    assert torch.equal(passes_of(tiny(), seed=3)[2], three)
    assert not torch.equal(passes_of(tiny(), seed=4)[2], three)


def test_evaluations_while_learning_change_no_other_figure(tiny: Callable[..., Scenario], tmp_path: Path):
    plain = learn(tiny(), {"er": {"size": 12}}, output=str(tmp_path / "plain"))
    assert "while_learning" not in plain.data
    assert set(plain.measures["class"]) == set(clframe.metrics.measures([[1.0]], [1]))
    for number, settings in enumerate(({"eval_every": 2}, {"eval_every": 2, "eval_images": 2})):
        found = learn(tiny(), {"er": {"size": 12}}, output=str(tmp_path / str(number)), **settings)
        shared = {
            mode: {name: measures[name] for name in plain.measures[mode]} for mode, measures in found.measures.items()
        }
        assert (found.accuracy, shared) == (plain.accuracy, plain.measures)
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", str(number))]
        assert weights[0] == weights[1]


def test_a_class_at_a_time_has_measures_where_there_is_a_choice(tiny: Callable[..., Scenario]):
    found = learn(tiny(experiences=6), {"er": {"size": 12}}, eval_every=2).measures
    assert set(found["task"].values()) == {None}
    assert found["class"]["average_minimum_accuracy"] is not None
    assert found["class"]["windowed_forgetting_10"] is not None
    assert found["class"]["mean_stability_gap"] is None  # of the first class alone there was no accuracy


def test_joint_training_has_no_accuracy_after_an_experience_to_fall_from(tiny: Callable[..., Scenario]):
    found = learn(tiny(), "joint", eval_every=2).measures["class"]
    empty = {"average_minimum_accuracy", "worst_case_accuracy", "mean_stability_gap", "learning_curve_area"}
    assert {name for name in empty if found[name] is not None} == set()
    assert found["windowed_plasticity_100"] is not None
    assert found["anytime_accuracy"] is not None


# --------------------------------------------------------------------------------------- stops and resumes


@pytest.mark.parametrize("settings", [{"eval_every": 2}, {"eval_every": 4, "eval_images": 1}])
def test_a_stopped_run_goes_on_to_the_same_measures(
    tiny: Callable[..., Scenario], tmp_path: Path, settings: dict[str, Any]
):
    def begin(folder: Path) -> Results:
        return learn(tiny(), {"er": {"size": 12}}, output=str(folder), **settings)

    files = (*testing.FILES, "metrics.jsonl")
    go_on = partial(clframe.resume, scenario=tiny(), progress=False)
    assert len(testing.stop_and_resume(tmp_path, begin, go_on, 4, files)) >= 4
    assert Results.read(tmp_path / "whole").measures["class"]["average_minimum_accuracy"] is not None


def without_evaluations(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Let checkpoints be read with another entry of the evaluations; None: without it, as an earlier clframe wrote."""
    load = checkpoint.load

    def other(*arguments: Any) -> Any:
        tree, tensors = load(*arguments)
        entries = [(name, change(value) if name == "evaluations" else value) for name, value in tree["dict"]]
        return {"dict": [entry for entry in entries if entry[1] is not None or entry[0] != "evaluations"]}, tensors

    monkeypatch.setattr(checkpoint, "load", other)


def stopped(scenario: Scenario, folder: Path) -> None:
    with pytest.raises(Interrupted), testing.stop_at(lambda engine: engine.position.experience == 1):
        learn(scenario, eval_every="epoch", output=str(folder))


def test_a_checkpoint_of_an_earlier_version_leaves_the_measures_empty(
    tiny: Callable[..., Scenario], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = learn(tiny(), eval_every="epoch")
    stopped(tiny(), tmp_path / "r")
    without_evaluations(monkeypatch, lambda entry: None)
    resumed = clframe.resume(tmp_path / "r", scenario=tiny(), progress=False)
    assert resumed.accuracy == whole.accuracy
    assert resumed.data["while_learning"]["evaluations"] is None
    for mode, found in resumed.measures.items():
        assert {found[name] for name in brute_force([(0, 1, [0.5])], [1])} == {None}
        assert found["average_accuracy"] == whole.measures[mode]["average_accuracy"]


def test_evaluations_that_do_not_fit_each_other_are_refused(
    tiny: Callable[..., Scenario], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped(tiny(), tmp_path / "r")
    without_evaluations(
        monkeypatch,
        lambda entry: {"dict": [[name, {"tensor": "/torch_rng"} if name == "end" else v] for name, v in entry["dict"]]},
    )
    with pytest.raises(DataError, match="the evaluations while learning do not fit each other"):
        clframe.resume(tmp_path / "r", scenario=tiny(), progress=False)


def test_an_extension_begins_with_no_evaluations(tiny: Callable[..., Scenario], tmp_path: Path):
    first = learn(tiny(), eval_every=2, eval_images=2, output=str(tmp_path / "first"))
    run = {"output": str(tmp_path / "more"), "tensorboard": False}
    more = clframe.extend(tmp_path / "first", tiny(), run=run, progress=False)
    assert more.data["while_learning"]["every"] == 2
    assert more.data["while_learning"]["evaluations"] < 2 * first.data["while_learning"]["evaluations"]
    assert more.measures["class"]["average_minimum_accuracy"] is None  # no images of the earlier experiences


# ------------------------------------------------------------------------------------- where they are shown


def test_tensorboard_has_the_measures_after_each_experience(tiny: Callable[..., Scenario], tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = learn(
        tiny(), TensorBoard(), {"er": {"size": 12}}, eval_every=2, eval_images=2, output=str(tmp_path / "r")
    )
    read = EventAccumulator(str(tmp_path / "r" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for mode, found in results.measures.items():
        for name in brute_force([(0, 1, [0.5])], [1]):
            events = read.Scalars(f"while_learning/{name}/{mode}")
            assert events[-1].step == 3
            assert events[-1].value == pytest.approx(found[name])
        assert [e.step for e in read.Scalars(f"while_learning/worst_case_accuracy/{mode}")] == [1, 2, 3]
        assert [e.step for e in read.Scalars(f"within_{mode}/experience_1")][:5] == [2, 4, 6, 8, 9]
    layout = read.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"^while_learning/" in layout
    assert b"^within_class/" in layout


def test_the_command_line_takes_steps_and_says_what_was_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    arguments = "run --limit 20 --iterations 6 --set train.threads=1 --output r --no-tensorboard --eval-every 3"
    assert main([*arguments.split(), "--set", "run.eval_images=5"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(Path("r/results.json").read_text())
    share = 100 * found["measures"]["class"]["worst_case_accuracy"]["value"]
    line = next(line.split() for line in out.splitlines() if line.startswith("worst case accuracy"))
    assert line[3] == f"{share:.1f}"
    assert "Evaluated while learning every 3 steps, on 5 test images of each class" in out
    assert "Evaluated while learning every 3 steps" in str(Results.read("r"))
    assert "experience 1 of 5, step 3 of the run: class-incremental accuracy" in err
    assert main(["run", "--eval-every", "often"]) == 2
    assert "`run.eval_every` is 'often'" in capsys.readouterr().err


def test_lines_on_evaluations_between_steps_come_at_most_once_a_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Live() as live:
        live({"kind": "start", "scenario": "s", "n_experiences": 2, "accuracy": {}})
        live({"kind": "experience", "index": 0, "task": 0, "classes": [0, 1], "class_names": ["0", "1"]})
        for step in range(10, 60, 10):
            now += 0.4
            for reading in ("class", "task"):
                place = {"experience": 0, "epoch": 0, "phase": "train", "total_step": step}
                live({"kind": "within", **place, "every": 10, "part": "test", "reading": reading, "row": [0.5, None]})
        assert live.within["task"] == ("step 50 of the run", [0.5, None])
    said = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if " step " in line]
    assert said == [f"experience 1 of 2, step {step} of the run" for step in (10, 10, 40, 40)]


def test_of_domains_there_are_images_of_each_class_and_domain():
    arrays = testing.tiny_arrays(classes=4)
    records: list[Any] = []
    stream = split_classes("tiny", arrays, experiences=2, setting="domain")
    results = learn(stream, eval_every=3, eval_images=3, listeners=[records.append])
    assert results.data["while_learning"]["test_images"] == [6, 6]
