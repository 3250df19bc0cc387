import errno
import io
import subprocess
import sys
import threading

import numpy as np
import pytest

from clframe.data.pictures import DARK, EMPTY, RAMP, draw_matrix, shades
from clframe.plugins.ewc import EWC
from clframe.plugins.tensorboard import TensorBoard
from clframe.settings import Component, Config, RunSettings, TrainSettings
from clframe.system import switches
from clframe.toolkit.curves import TITLES, hyperparameters

ROWS = [[0.9, 0.25, None], [0.5, 0.8, None], [0.3, 0.6, 0.7]]
LEFT, TOP = 100, 56  # where the cells of a drawing begin


class Stub:
    """What of a run the plugin looks at; `tell` emits a record as the engine does."""

    def __init__(self, folder, setting="class", total_steps=0, accuracy=None, eval_every="experience"):
        self.folder = folder
        self.total_steps = total_steps
        self.accuracy = accuracy or {}
        self.listeners = []
        self.plugins = (EWC(), TensorBoard())
        self.scenario = type("Scenario", (), {"setting": setting, "__len__": lambda self: 3})()
        self.config = Config(
            scenario=Component("split-digits", {"experiences": 3, "order": [2, 0, 1]}),
            model=Component("mlp"),
            plugins={
                "ewc": Component("ewc", {"lambda": 50.0, "online": False}),
                "tensorboard": Component("tensorboard"),
            },
            train=TrainSettings(epochs=2),
            run=RunSettings(seed=7, eval_every=eval_every),
        )

    def tell(self, kind, **fields):
        for listener in self.listeners:
            listener({"kind": kind, **fields})

    def train(self, first, last):
        for step in range(first, last + 1):
            self.total_steps = step
            losses = {"base": 1 / step, "ewc": step / 4}
            self.tell("step", losses=losses, lr=0.5, total_step=step, experience=0, phase="train", epoch=0)

    def evaluate(self, i, *readings):
        rows = dict.fromkeys(readings, ROWS[i])
        for reading in readings:
            self.accuracy.setdefault(reading, []).append(ROWS[i])
        self.tell("eval", experience=i, total_step=self.total_steps, rows=rows)


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0, "images": 0}
    ).Reload()


def curves(folder):
    """Points (step, value) of each tag, values as the float32 that the file holds, rounded."""
    read = events(folder)
    return {tag: [(e.step, round(e.value, 6)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@pytest.fixture
def written(tmp_path):
    """The folder of a run of three experiences of two steps each."""
    run, plugin = Stub(tmp_path), TensorBoard()
    plugin.before_run(run)
    run.tell("start", scenario="split-digits", n_experiences=3)
    for i in range(3):
        run.train(2 * i + 1, 2 * i + 2)
        run.evaluate(i, "class", "task")
    run.tell("log", values={"kept": 12.0}, total_step=6, experience=2)
    plugin.after_run(run)
    assert run.listeners == []
    return tmp_path


def test_every_curve_has_its_points_at_its_steps(written):
    found = curves(written)
    expected = {
        "loss/base": [(step, round(1 / step, 6)) for step in range(1, 7)],
        "loss/ewc": [(step, step / 4) for step in range(1, 7)],
        "learning_rate": [(step, 0.5) for step in range(1, 7)],
        "log/kept": [(6, 12.0)],
    }
    for reading in ("class", "task"):
        expected |= {
            f"accuracy_{reading}/experience_1": [(1, 0.9), (2, 0.5), (3, 0.3)],
            f"accuracy_{reading}/experience_2": [(1, 0.25), (2, 0.8), (3, 0.6)],
            f"accuracy_{reading}/experience_3": [(3, 0.7)],
            f"average_accuracy/{reading}": [(1, 0.9), (2, 0.65), (3, 0.533333)],
            f"forgetting/{reading}": [(2, 0.4), (3, 0.4)],
        }
    assert found == expected


def test_one_custom_chart_for_each_reading_holds_all_experiences(written):
    from tensorboard.plugins.custom_scalar import layout_pb2

    tensor = events(written).Tensors("custom_scalars__config__")[0].tensor_proto
    pages = layout_pb2.Layout.FromString(tensor.string_val[0]).category
    found = {page.title: {chart.title: list(chart.multiline.tag) for chart in page.chart} for page in pages}
    assert found == {
        "After each experience (x: experiences learned)": {
            "accuracy on each experience, class-incremental": ["^accuracy_class/"],
            "accuracy on each experience, task-incremental": ["^accuracy_task/"],
            "average accuracy": ["^average_accuracy/"],
            "forgetting": ["^forgetting/"],
        },
        "Training (x: steps)": {"loss terms": ["^loss/"]},
    }


def test_evaluations_between_epochs_have_curves_and_a_chart_of_their_own(tmp_path):
    run, plugin = Stub(tmp_path, setting="task", eval_every="epoch"), TensorBoard()
    plugin.before_run(run)
    run.tell("start", scenario="split-digits", n_experiences=3)
    for epoch, total_step in enumerate((4, 8)):
        row = [0.5 + epoch / 4, None, None]
        run.tell("within", experience=0, phase="train", epoch=epoch, total_step=total_step, reading="task", row=row)
    plugin.after_run(run)
    assert curves(tmp_path) == {"within_task/experience_1": [(4, 0.5), (8, 0.75)]}
    layout = events(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"Within experiences" in layout
    assert b"^within_task/" in layout
    assert b"class" not in layout


def test_hyperparameters_and_configuration_belong_to_the_one_run(written):
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    assert [entry.is_dir() for entry in (written / "tensorboard").iterdir()] == [False]
    read = events(written)
    parts = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(content)
        for tag, content in read.PluginTagToContent("hparams").items()
    }
    start = parts[metadata.SESSION_START_INFO_TAG].session_start_info.hparams
    values = {name: value.number_value or value.string_value for name, value in start.items()}
    assert values["ewc.lambda"] == 50.0
    assert values["ewc.online"] == "False"
    assert values["scenario.order"] == "[2, 0, 1]"
    assert (values["plugins"], values["seed"], values["train.epochs"]) == ("ewc", 7, 2)
    assert parts[metadata.SESSION_END_INFO_TAG].session_end_info.status == api_pb2.STATUS_SUCCESS
    metrics = [m.name.tag for m in parts[metadata.EXPERIMENT_TAG].experiment.metric_infos]
    assert metrics == ["average_accuracy/class", "average_accuracy/task", "forgetting/class", "forgetting/task"]
    text = read.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("```yaml\nscenario:\n  name: split-digits\n")


def test_hyperparameters_leave_out_what_is_not_set_and_where_things_are():
    run = Stub(None)
    run.config.run.data_root = "/somewhere"
    found = hyperparameters(run)
    assert not {"train.threads", "train.iterations", "run.data_root"} & set(found)
    assert "/somewhere" not in found.values()
    assert found["train.betas"] == "[0.9, 0.999]"


def test_the_matrix_is_drawn_when_the_run_ends(written):
    from PIL import Image

    read = events(written)
    assert read.Tags()["images"] == ["accuracy_matrix/class", "accuracy_matrix/task"]
    (image,) = read.Images("accuracy_matrix/class")
    assert image.step == 3
    decoded = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert np.array_equal(decoded, draw_matrix(ROWS, TITLES["class"]))


def cell_of(image, i, j, size):
    """The pixels of a cell, without the lines that part it from the next."""
    return image[TOP + i * size : TOP + (i + 1) * size, LEFT + j * size : LEFT + (j + 1) * size][2:-2, 2:-2]


def test_the_colour_of_a_cell_is_its_accuracy_and_grey_is_not_measured():
    image = draw_matrix([[0.0, 1.0, None, 0.5, 0.125], [0.25, 0.75, None, None, None]], "class-incremental")
    assert (image.dtype, image.shape) == (np.uint8, (TOP + 360 + 80, LEFT + 360 + 28, 3))
    expected = [RAMP[0], RAMP[4], EMPTY, RAMP[2], (198, 228, 196)]
    assert [tuple(cell_of(image, 0, j, 72)[0, 0]) for j in range(5)] == expected
    expected = [RAMP[1], RAMP[3], EMPTY, EMPTY, EMPTY]
    assert [tuple(cell_of(image, 1, j, 72)[0, 0]) for j in range(5)] == expected
    empty = [(0, 2), (1, 2), (1, 3), (1, 4)] + [(i, j) for i in range(2, 5) for j in range(5)]
    plain = [(i, j) for i in range(5) for j in range(5) if (cell_of(image, i, j, 72) == EMPTY).all()]
    assert plain == empty


def test_colours_darken_evenly_and_text_stands_out_on_each():
    values = np.linspace(0, 1, 1001)
    colours = shades(values) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance[::10]) < 0).all()
    contrast = np.where(values < DARK, (luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05))
    assert contrast.min() >= 4.5


def test_text_is_black_on_light_and_white_on_dark_cells():
    image = draw_matrix([[0.64, 0.65]], "class-incremental")
    black, white = cell_of(image, 0, 0, 180), cell_of(image, 0, 1, 180)
    assert black.sum(axis=2).min() == 0
    assert black.sum(axis=2).max() == black[0, 0].sum()
    assert white.sum(axis=2).max() == 3 * 255
    assert white.sum(axis=2).min() == white[0, 0].sum()


@pytest.mark.parametrize(("n", "side"), [(1, 360), (2, 360), (5, 360), (6, 432), (25, 1800)])
def test_cells_have_room_for_their_numbers(n, side):
    assert draw_matrix([[0.5] * n], "class-incremental").shape == (TOP + side + 80, LEFT + side + 28, 3)


def test_the_title_stands_above_the_cells():
    differs = (draw_matrix(ROWS, "class-incremental") != draw_matrix(ROWS, "task-incremental")).any(axis=(1, 2))
    assert differs[:TOP].any()
    assert not differs[TOP:].any()


@pytest.mark.parametrize(("n", "size"), [(26, 30), (50, 16), (900, 1)])
def test_a_large_matrix_has_a_scale_in_place_of_numbers(n, size):
    image = draw_matrix([[0.5] * n] * (n - 1), "class-incremental")
    side = n * size
    assert image.shape == (TOP + side + 80, LEFT + side + 116, 3)
    cells = image[TOP : TOP + side, LEFT : LEFT + side]
    assert (cells[:-size] == RAMP[2]).all()
    assert (cells[-size:] == EMPTY).all()
    scale = image[TOP : TOP + side, LEFT + side + 28 : LEFT + side + 28 + 24]
    assert (scale[0] == RAMP[4]).all()
    assert (scale[-1] == RAMP[0]).all()


def test_libraries_are_imported_when_they_are_needed():
    code = (
        "import sys\nfrom clframe.data.pictures import draw_matrix\nimport clframe.plugins.tensorboard\n"
        "assert not {'PIL', 'numpy', 'tensorboard', 'torch'} & set(sys.modules), 'imported too early'\n"
        "draw_matrix([[0.5]], 'domain-incremental')\nassert 'torch' not in sys.modules, 'not needed'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_that_stops_early_is_drawn_and_not_called_a_success(tmp_path):
    from tensorboard.plugins.hparams import metadata

    run, plugin = Stub(tmp_path), TensorBoard()
    plugin.before_run(run)
    run.tell("start", scenario="split-digits", n_experiences=3)
    run.train(1, 2)
    run.evaluate(0, "class")
    plugin.after_run(run)
    read = events(tmp_path)
    assert [image.step for image in read.Images("accuracy_matrix/class")] == [1]
    assert metadata.SESSION_END_INFO_TAG not in read.PluginTagToContent("hparams")


def test_a_resumed_run_has_each_point_once_and_forgetting_over_all_rows(tmp_path):
    run, plugin = Stub(tmp_path), TensorBoard()
    plugin.before_run(run)
    run.tell("start", scenario="split-digits", n_experiences=3)
    run.train(1, 10)
    run.evaluate(0, "class")
    run.train(11, 20)  # the checkpoint was taken at step 14
    plugin.writer.close()  # a killed process runs no `after_run`

    again, plugin = Stub(tmp_path), TensorBoard()
    plugin.before_run(again)
    again.total_steps, again.accuracy = 14, {"class": [ROWS[0]]}  # state is loaded
    again.tell("start", scenario="split-digits", n_experiences=3)
    again.train(15, 20)
    again.evaluate(1, "class")
    plugin.after_run(again)

    found = curves(tmp_path)
    assert [step for step, _ in found["loss/base"]] == list(range(1, 21))
    assert found["accuracy_class/experience_1"] == [(1, 0.9), (2, 0.5)]
    assert found["forgetting/class"] == [(2, 0.4)]
    read = events(tmp_path)
    assert len(read.Tensors("config/text_summary")) == len(read.Tensors("custom_scalars__config__")) == 1


def test_points_are_in_the_file_as_soon_as_they_are_told(tmp_path):
    run, plugin = Stub(tmp_path), TensorBoard()
    plugin.before_run(run)
    run.tell("start", scenario="split-digits", n_experiences=3)
    run.train(1, 3)
    assert [step for step, _ in curves(tmp_path)["loss/base"]] == [1, 2, 3]
    plugin.after_run(run)


def test_experiences_sort_as_text(tmp_path):
    run, plugin = Stub(tmp_path, setting="domain"), TensorBoard()
    plugin.before_run(run)
    run.tell("start", scenario="permuted-digits", n_experiences=12)
    row = [i / 16 for i in range(12)]
    run.accuracy["domain"] = [row]
    run.tell("eval", experience=0, total_step=0, rows={"domain": row})
    plugin.after_run(run)
    tags = [tag for tag in sorted(curves(tmp_path)) if tag.startswith("accuracy_domain/")]
    assert tags == [f"accuracy_domain/experience_{j:02}" for j in range(1, 13)]


def test_a_reading_without_numbers_leaves_no_curve_and_no_figure(tmp_path):
    run, plugin = Stub(tmp_path), TensorBoard()
    plugin.before_run(run)
    run.tell("start", scenario="split-digits", n_experiences=3)
    run.accuracy["class"] = [[None, None, None]]
    run.tell("eval", experience=0, total_step=0, rows={"class": [None, None, None]})
    plugin.after_run(run)
    tags = events(tmp_path).Tags()
    assert (tags["scalars"], tags["images"]) == ([], [])


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, plugin = Stub(None), TensorBoard()
    plugin.before_run(run)
    assert run.listeners == []
    plugin.after_run(run)
    assert list(tmp_path.iterdir()) == []


def test_a_real_run_has_its_results_in_its_curves_and_is_the_same_without_them(tmp_path):
    import torch

    import clframe

    def scenario():
        x = torch.randn(80, 5, generator=torch.Generator().manual_seed(1))
        y = torch.arange(80) % 4
        transform = clframe.Transform(scale=1.0)
        arrays = clframe.Arrays("rows", x, y, x[:40], y[:40], ("a", "b", "c", "d"), transform)
        return clframe.split_classes("split-rows", arrays, experiences=2)

    def run(name, **more):
        settings = {"output": str(tmp_path / name), "eval_every": "epoch", "log_every": 1, "device": "cpu", **more}
        train = {"epochs": 2, "batch_size": 10}
        return clframe.run(scenario(), "mlp-100", train=train, run=settings)

    with_curves, without = run("with"), run("without", tensorboard=False)
    assert with_curves.accuracy == without.accuracy
    assert not (tmp_path / "without" / "tensorboard").exists()
    found = curves(tmp_path / "with")
    matrix = with_curves.accuracy["class"]
    assert found["accuracy_class/experience_1"] == [(1, round(matrix[0][0], 6)), (2, round(matrix[1][0], 6))]
    assert found["accuracy_class/experience_2"] == [(2, round(matrix[1][1], 6))]
    assert found["average_accuracy/class"][-1] == (2, round(with_curves.measures["class"]["average_accuracy"], 6))
    assert found["forgetting/class"] == [(2, round(with_curves.measures["class"]["forgetting"], 6))]
    assert [step for step, _ in found["loss/base"]] == list(range(1, 17))
    assert [step for step, _ in found["within_class/experience_1"]] == [4, 8, 12, 16]
    assert [step for step, _ in found["within_class/experience_2"]] == [12, 16]


def test_a_writer_that_fails_ends_the_run_in_a_sentence_and_prints_nothing(tmp_path, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    import clframe

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    reported = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    mine = threading.excepthook
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(clframe.errors.RunError, match="No space left"):
        clframe.run("split-digits", "mlp", train={"iterations": 2}, run={"output": str(tmp_path / "run")})
    assert reported == []
    assert threading.excepthook is mine
    other = threading.Thread(target=lambda: full(None, b""))
    with switches.quiet_writers():  # threads of others are reported as before
        other.start()
        other.join()
    assert [failed.thread for failed in reported] == [other]
