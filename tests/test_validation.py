"""`train.val`: the accuracy on the training images that are held out, in results, records, curves and on the screen."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import clframe
from clframe import Plugin, Results, hookimpl, testing
from clframe.cli.live import Live
from clframe.cli.main import main
from clframe.engine import Engine
from clframe.errors import Interrupted
from clframe.plugins.tensorboard import TensorBoard
from clframe.runs import checkpoint

TRAIN = {"epochs": 2, "batch_size": 8, "lr": 0.003, "val": 0.25}
CLASSES = [(0, 1), (2, 3), (4, 5)]  # of the experiences of the tiny scenario, whose classes come in their order


class Keeping(Plugin):
    """Keeps the network as it was at each evaluation."""

    name = "keeping"
    observer = True

    def __init__(self) -> None:
        self.networks: list[Any] = []
        self.seen: list[Any] = []

    @hookimpl
    def after_eval(self, run: Any) -> None:
        self.networks.append(copy.deepcopy(run.model).eval())
        self.seen.append({reading: rows[-1] for reading, rows in run.validation.items()})


def right(network: Any, rows: list[int], choices: tuple[int, ...]) -> float:
    """The share of the training images at `rows` whose largest logit among `choices` is that of their label."""
    arrays = testing.tiny_arrays()
    with torch.no_grad():
        logits = network(arrays.x_train[rows].float() / 255).logits[:, list(choices)]
    answers = [choices[k] for k in logits.argmax(1).tolist()]
    return sum(a == y for a, y in zip(answers, arrays.y_train[rows].tolist(), strict=True)) / len(rows)


def test_each_row_is_the_accuracy_on_the_images_held_out(tiny: Any, tmp_path: Path):
    """The witness evaluates the rows that split.json names by itself, with the network of each evaluation."""
    keeping, records = Keeping(), []
    run = {"output": str(tmp_path / "r"), "tensorboard": False}
    results = clframe.run(tiny(), "mlp-100", [keeping], train=TRAIN, run=run, listeners=[records.append])
    held = [e["val"] for e in json.loads((tmp_path / "r" / "split.json").read_text())["experiences"]]
    assert [len(rows) for rows in held] == [6, 6, 6]
    expected: dict[str, list[list[float | None]]] = {"class": [], "task": []}
    for after, network in enumerate(keeping.networks):
        seen = tuple(c for classes in CLASSES[: after + 1] for c in classes)
        later: list[float | None] = [None] * (2 - after)
        expected["class"].append([right(network, held[on], seen) for on in range(after + 1)] + later)
        expected["task"].append([right(network, held[on], CLASSES[on]) for on in range(after + 1)] + later)
    assert results.validation == expected
    assert Results.read(tmp_path / "r").validation == expected
    assert json.loads((tmp_path / "r" / "results.json").read_text())["validation"] == expected
    assert keeping.seen == [{reading: rows[i] for reading, rows in expected.items()} for i in range(3)]
    assert results.validation != results.accuracy

    of_parts = [(r["part"], r["experience"], r["rows"]) for r in records if r["kind"] == "eval"]
    assert of_parts == [
        (part, i, {reading: rows[i] for reading, rows in matrices.items()})
        for i in range(3)
        for part, matrices in (("test", results.accuracy), ("val", expected))
    ]
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["part"], r["experience"], r["rows"]) for r in lines if r["kind"] == "eval"] == of_parts


def test_without_a_share_there_is_no_matrix_and_the_figures_are_the_same(tiny: Any):
    """That images held out are evaluated, too, changes nothing of the training and of the other figures."""
    results = clframe.run(tiny(), "mlp-100", train={**TRAIN, "val": 0})
    assert results.validation == {}
    assert "validation" not in results.data
    held_out = tiny()
    held_out.hold_out(0.25, 0)
    x, y = (torch.cat([getattr(e.train, name) for e in held_out]) for name in ("x", "y"))
    arrays = testing.tiny_arrays()
    rest = clframe.Arrays("tiny", x, y, arrays.x_test, arrays.y_test, arrays.class_names, arrays.transform)
    without = clframe.run(
        clframe.split_classes("tiny", rest, experiences=3), "mlp-100", train={**TRAIN, "val": 0}, run={"device": "cpu"}
    )
    assert clframe.run(tiny(), "mlp-100", train=TRAIN, run={"device": "cpu"}).accuracy == without.accuracy


def test_records_between_epochs_name_the_part(tiny: Any):
    records: list[dict[str, Any]] = []
    results = clframe.run(
        tiny(), "mlp-100", train=TRAIN, run={"eval_every": "epoch"}, listeners=[records.append], progress=False
    )
    for part, matrices in (("test", results.accuracy), ("val", results.validation)):
        of_part = [r for r in records if r["kind"] == "within" and r["part"] == part and r["epoch"] == 1]
        assert {(r["reading"], r["experience"]): r["row"] for r in of_part} == {
            (reading, i): row for reading, rows in matrices.items() for i, row in enumerate(rows)
        }


@pytest.mark.parametrize("setting", ["task", "domain"])
def test_the_other_settings_have_their_own_reading(tiny: Any, setting: str):
    results = clframe.run(tiny(setting=setting), "mlp-100", train=TRAIN)
    assert list(results.validation) == list(results.accuracy) == [setting]
    shape = [[cell is None for cell in row] for row in results.accuracy[setting]]
    assert [[cell is None for cell in row] for row in results.validation[setting]] == shape


def test_a_run_that_was_stopped_goes_on_to_the_same_matrices(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = clframe.run(tiny(), "mlp-100", train=TRAIN, run={"output": str(tmp_path / "whole"), "tensorboard": False})
    stopped(tiny, tmp_path / "stopped", monkeypatch)
    resumed = clframe.resume(tmp_path / "stopped", scenario=tiny())
    assert resumed.validation == whole.validation
    files = [(tmp_path / name / "results.json").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]


def stopped(tiny: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run stop just after its second evaluation."""
    evaluate = Engine.evaluate

    def and_stop(engine: Engine, predictor: Any) -> None:
        evaluate(engine, predictor)
        if engine.position.experience == 1:
            engine.signal = signal.SIGTERM

    monkeypatch.setattr(Engine, "evaluate", and_stop)
    with pytest.raises(Interrupted):
        clframe.run(tiny(), "mlp-100", train=TRAIN, run={"output": str(folder), "tensorboard": False})
    monkeypatch.setattr(Engine, "evaluate", evaluate)


def test_a_checkpoint_of_an_earlier_version_has_no_figures_of_the_experiences_before(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = clframe.run(tiny(), "mlp-100", train=TRAIN)
    stopped(tiny, tmp_path / "r", monkeypatch)
    load = checkpoint.load

    def older(*arguments: Any) -> Any:
        tree, tensors = load(*arguments)
        return {"dict": [(name, value) for name, value in tree["dict"] if name != "validation"]}, tensors

    monkeypatch.setattr(checkpoint, "load", older)
    resumed = clframe.resume(tmp_path / "r", scenario=tiny())
    for reading, rows in whole.validation.items():
        assert resumed.validation[reading] == [[None] * 3, [None] * 3, rows[2]]
    assert resumed.accuracy == whole.accuracy


def test_an_extension_keeps_the_rows_and_measures_the_new_experience(tiny: Any, tmp_path: Path):
    first = clframe.run(tiny(), "mlp-100", train=TRAIN, run={"output": str(tmp_path / "first"), "tensorboard": False})
    more = clframe.extend(tmp_path / "first", tiny(), run={"output": str(tmp_path / "more"), "tensorboard": False})
    for reading, rows in first.validation.items():
        found = more.validation[reading]
        assert [row[:3] for row in found[:3]] == rows
        assert [row[3:] for row in found[:3]] == [[None] * 3] * 3
        assert [[cell is None for cell in row] for row in found[3:]] == [
            [cell is None for cell in row] for row in more.accuracy[reading][3:]
        ]
    assert clframe.extend(tmp_path / "first", tiny(), train={"val": 0}).validation == {}


def test_an_extension_of_a_run_without_a_share_has_empty_rows_of_it(tiny: Any, tmp_path: Path):
    clframe.run(
        tiny(), "mlp-100", train={**TRAIN, "val": 0}, run={"output": str(tmp_path / "first"), "tensorboard": False}
    )
    more = clframe.extend(tmp_path / "first", tiny(), train={"val": 0.25})
    for rows in more.validation.values():
        assert rows[:3] == [[None] * 6] * 3
        assert None not in rows[5][3:]


def test_an_experience_that_joint_training_skips_has_an_empty_row(tiny: Any):
    results = clframe.run(tiny(), "mlp-100", "joint", train=TRAIN)
    for rows in results.validation.values():
        assert rows[:2] == [[None] * 3] * 2
        assert None not in rows[2]


def test_a_share_too_small_for_an_image_gives_empty_rows(tiny: Any):
    results = clframe.run(tiny(), "mlp-100", train={**TRAIN, "val": 0.01})
    assert results.validation == {"class": [[None] * 3] * 3, "task": [[None] * 3] * 3}


def test_tensorboard_has_a_group_and_a_chart_of_images_held_out(tiny: Any, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    run = {"output": str(tmp_path / "r"), "eval_every": "epoch"}
    results = clframe.run(tiny(), "mlp-100", [TensorBoard()], train=TRAIN, run=run)
    read = EventAccumulator(str(tmp_path / "r" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for group, matrices in (("accuracy", results.accuracy), ("validation", results.validation)):
        for reading, rows in matrices.items():
            for on in range(3):
                found = read.Scalars(f"{group}_{reading}/experience_{on + 1}")
                assert [(e.step, pytest.approx(e.value)) for e in found] == [
                    (i + 1, row[on]) for i, row in enumerate(rows) if row[on] is not None
                ]
    assert len(read.Scalars("validation_within_class/experience_1")) == 6
    assert len(read.Scalars("within_class/experience_1")) == 6
    tensor = read.Tensors("custom_scalars__config__")[0].tensor_proto
    charts = [
        (page.title.split(" (")[0], chart.title, list(chart.multiline.tag))
        for page in layout_pb2.Layout.FromString(tensor.string_val[0]).category
        for chart in page.chart
    ]
    title = "accuracy on each experience, class-incremental, images held out"
    assert ("After each experience", title, ["^validation_class/"]) in charts
    assert ("Within experiences", title, ["^validation_within_class/"]) in charts


def test_the_command_line_tells_which_figures_are_of_images_held_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    arguments = "run --set train.val=0.2 --limit 20 --iterations 5 --set train.threads=1 --output r --no-tensorboard"
    assert main([*arguments.split(), "--eval-every", "epoch"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(Path("r/results.json").read_text())
    tables = out.split("Accuracy in percent, ")[1:]
    titles = [table.partition(":")[0] for table in tables]
    assert titles == [
        "class-incremental",
        "task-incremental",
        "class-incremental, images held out",
        "task-incremental, images held out",
    ]
    for table, matrix in zip(tables, [*found["accuracy"].values(), *found["validation"].values()], strict=True):
        last = next(line.split() for line in table.splitlines() if line.startswith("after 5"))
        assert last[2:] == [f"{100 * share:.1f}" for share in matrix[4]]
    held = [line for line in err.splitlines() if line.startswith("experience 1 of 5, images held out: ")]
    share = f"{100 * found['validation']['class'][0][0]:.1f}"
    assert [line.split(": ")[1].partition(";")[0] for line in held] == [
        f"class-incremental accuracy {share} % ({share})"
    ]


def test_the_live_table_has_test_images_and_a_line_for_images_held_out():
    with Live() as live:
        so_far = {"accuracy": {}, "validation": {"class": [[0.125, None]]}}
        live({"kind": "start", "scenario": "s", "n_experiences": 2, **so_far})
        live({"kind": "experience", "index": 0, "task": 0, "classes": [0, 1], "class_names": ["0", "1"]})
        assert live._draw().renderables[-1].plain == "Images held out: class-incremental accuracy 12.5 % (12.5)"
        record = {"experience": 0, "epoch": 0, "phase": "train", "reading": "class"}
        live({"kind": "within", **record, "part": "test", "row": [0.5, None]})
        live({"kind": "within", **record, "part": "val", "row": [0.25, None]})
        assert live.within == {"class": ("epoch 1", [0.5, None])}
        assert live._draw().renderables[-1].plain == "Images held out: class-incremental accuracy 25.0 % (25.0)"
        live({"kind": "eval", "experience": 0, "total_step": 9, "part": "test", "rows": {"class": [1.0, None]}})
        live({"kind": "eval", "experience": 0, "total_step": 9, "part": "val", "rows": {"class": [0.75, None]}})
        assert live.rows == {"class": {0: [1.0, None]}}
        assert live._draw().renderables[-1].plain == "Images held out: class-incremental accuracy 75.0 % (75.0)"
