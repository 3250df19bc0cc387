"""A model is written to a file of any format, and what is read from it answers as the run's model does."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import nn

import clframe
from clframe import Plugin, Transform, hookimpl, testing
from clframe.cli.main import main
from clframe.data.decode import ImageFormat
from clframe.deploy import export
from clframe.errors import RunError, UsageError
from clframe.evaluate import Predictor

pytestmark = pytest.mark.xdist_group("export")  # on one worker: torch's exporters take 8 s to start

TRAIN = {"epochs": 1, "batch_size": 8, "optimizer": "adam", "lr": 0.01}
FORMATS = [
    "safetensors",
    "torch-export",
    pytest.param(
        "onnx", marks=pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="needs onnxscript")
    ),
]


@pytest.fixture
def trained(tiny: Any, tmp_path: Path) -> Any:
    def build(*plugins: Any, model: Any = "cnn-small", objects: Any = (), **options: Any) -> clframe.Trained:
        transform = options.pop("transform", None)
        scenario = tiny(**{"shape": (1, 8, 8), **options})
        scenario.transform = transform or scenario.transform
        clframe.run(scenario, model, plugins, train=TRAIN, run={"output": str(tmp_path / "run"), "tensorboard": False})
        return clframe.load(tmp_path / "run", plugins=objects)

    return build


def images(n: int, shape: Any = (1, 8, 8)) -> torch.Tensor:
    return torch.randint(256, (n, *shape), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def session(path: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in found.get_outputs()] == ["scores"]
    return lambda **given: torch.from_numpy(found.run(None, {k: v.numpy() for k, v in given.items()})[0])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_plain_model_is_written_whole_and_checked(trained: Any, tmp_path: Path, kind: str):
    model = trained(transform=Transform(mean=(0.4,), std=(0.2,)))
    found = model.export(tmp_path / "file", kind)
    assert found.inputs == {"images": "uint8 [B, 1, 8, 8]"}
    assert found.difference is None if found.checked_with is None else found.difference < 1e-5
    x = images(7)
    if kind == "safetensors":
        with safe_open(tmp_path / "file", "pt") as file:
            assert json.loads(file.metadata()["class_names"]) == list(model.class_names)
            assert json.loads(file.metadata()["normalization"]) == {"scale": 255.0, "mean": [0.4], "std": [0.2]}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, value in model.predictor.state_dict().items():
            assert torch.equal(weights[f"predictor.{name}"], value)
    elif kind == "torch-export":
        program = torch.export.load(tmp_path / "file").module()
        assert torch.allclose(program(x), model(x), atol=1e-5)
        assert torch.allclose(program(x[:1]), model(x[:1]), atol=1e-5)
    else:
        run = session(tmp_path / "file")
        assert torch.allclose(run(images=x), model(x), atol=1e-4)
        assert torch.allclose(run(images=x[:1]), model(x[:1]), atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_where_tasks_are_told_the_file_takes_one_for_each_image_or_has_one_fixed(
    trained: Any, tmp_path: Path, kind: str
):
    model = trained(setting="task")
    found = model.export(tmp_path / "file", kind)
    assert found.inputs["task"] == "int64 [B], from 0"
    fixed = model.export(tmp_path / "fixed", kind, task=1)
    assert fixed.inputs == {"images": "uint8 [B, 1, 8, 8]"}
    x, task = images(4), torch.tensor([2, 0, 1, 0])
    if kind == "torch-export":
        assert torch.allclose(torch.export.load(tmp_path / "file").module()(x, task), model(x, task), atol=1e-5)
        assert torch.allclose(torch.export.load(tmp_path / "fixed").module()(x), model(x, 1), atol=1e-5)
    elif kind == "onnx":
        assert torch.allclose(session(tmp_path / "file")(images=x, task=task), model(x, task), atol=1e-4)
        assert torch.allclose(session(tmp_path / "fixed")(images=x), model(x, 1), atol=1e-4)


METHODS = {
    "channel-gating": {"classifier_iterations": 5, "size": 12},
    "hat": {},
    "piggyback": {},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_network_of_a_computation_for_each_task_is_written_for_one(trained: Any, tmp_path: Path, name: str):
    model = trained({name: METHODS[name]}, setting="task")
    with testing.refused("`torch-export`", "`--task`"):
        model.export(tmp_path / "file", "torch-export")
    assert not (tmp_path / "file").exists()
    whole = model.export(tmp_path / "whole", "safetensors")
    assert whole.difference == 0
    for task in (0, 2):
        found = model.export(tmp_path / str(task), "torch-export", task=task)
        assert found.difference < 1e-5
        program = torch.export.load(tmp_path / str(task)).module()
        assert torch.allclose(program(images(5)), model(images(5), task), atol=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_distances_to_means_are_written_too(trained: Any, tmp_path: Path, kind: str):
    model = trained({"icarl": {"size": 12}})
    found = model.export(tmp_path / "file", kind)
    assert found.checked_with is None or found.difference < 1e-4


@pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="needs onnxscript")
def test_masks_kept_as_bits_are_applied_in_the_file(trained: Any, tmp_path: Path):
    model = trained({"piggyback": {}}, setting="task")
    model.export(tmp_path / "file.json", "onnx", task=1)  # the format does not depend on the name
    assert torch.allclose(session(tmp_path / "file.json")(images=images(5)), model(images(5), 1), atol=1e-4)
    assert model.export(tmp_path / "weights", "safetensors", task=1).difference == 0


def test_where_the_task_is_found_the_weights_are_written_and_a_graph_for_a_task(trained: Any, tmp_path: Path):
    model = trained({"channel-gating": METHODS["channel-gating"]})
    assert model.export(tmp_path / "weights", "safetensors").difference == 0
    with pytest.raises(UsageError, match="fix a task"):
        model.export(tmp_path / "graph", "torch-export")
    assert model.export(tmp_path / "graph", "torch-export", task=1).difference < 1e-5


def test_images_given_as_floats_are_taken_as_floats(trained: Any, tmp_path: Path):
    model = trained(transform=Transform(scale=1.0))
    assert model.export(tmp_path / "file", "torch-export").inputs == {"images": "float32 [B, 1, 8, 8]"}


def test_domains_are_written(trained: Any, tmp_path: Path):
    model = trained(model="mlp-100", shape=(3, 8, 8), setting="domain")
    assert model.export(tmp_path / "file", "torch-export").difference < 1e-4


# ------------------------------------------------------------------------------------ wrong input


class Asking(Predictor):
    """Looks at the values to decide what to compute, which no graph can hold."""

    uses_task = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, task: torch.Tensor | None = None) -> torch.Tensor:
        logits: torch.Tensor = self.model(x).logits
        return logits if float(x.mean()) > 100 else 2 * logits


class Odd(Plugin):
    name = "odd"

    @hookimpl
    def predictor(self, run):
        return Asking(run.model)


def test_what_no_graph_can_hold_is_refused_in_a_sentence(trained: Any, tmp_path: Path):
    model = trained(Odd(), objects=[Odd()])
    with testing.refused("torch.export", "`safetensors`"):
        model.export(tmp_path / "file", "torch-export")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
    assert model.export(tmp_path / "file", "safetensors").difference == 0


def test_a_file_that_answers_otherwise_is_not_left_behind(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, original = trained(), export.Deployed.forward

    def wrong(self: Any, images: torch.Tensor, task: torch.Tensor | None = None) -> torch.Tensor:
        return original(self, images, task) * 1.01

    monkeypatch.setattr(export.Deployed, "forward", wrong)
    with pytest.raises(RunError, match=r"scores differ by 0\.0"):
        model.export(tmp_path / "file", "torch-export")
    assert not (tmp_path / "file").exists()


def test_packages_that_are_missing_are_named(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = trained()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"`onnx` needs `onnx` and `onnxscript`: pip install 'clframe\[onnx\]'"):
        model.export(tmp_path / "file", "onnx")


def test_the_command_writes_a_file_and_explains_wrong_input(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    trained(setting="task")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run", "--format", "safetensors", "--output", "a", "--task", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Written: a", "Takes images: uint8 [B, 1, 8, 8]"]
    assert re.match("Checked with clframe: .* by 0 ", lines[3])
    assert main(["export", "run", "--format", "safetensors", "--output", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["difference"], found["inputs"]["task"]) == ("safetensors", 0, "int64 [B], from 0")
    Path("stopped").mkdir()
    Path("stopped/config.yaml").write_text("")
    for arguments, code, sentence in (
        (["run", "--format", "onxx", "--output", "c"], 2, "There is no format `onxx`. Did you mean `onnx`?"),
        (["run", "--format", "safetensors", "--output", "a"], 2, "a exists already"),
        (["run", "--format", "safetensors", "--output", "x/a"], 2, "no folder x "),
        (["run", "--format", "safetensors", "--output", "c", "--task", "4"], 2, "has learned the tasks 1 to 3"),
        (["run", "--format", "safetensors"], 2, "Missing option '--output'"),
        (["stopped", "--format", "safetensors", "--output", "c"], 3, "The run in stopped is not finished"),
    ):
        assert main(["export", *arguments]) == code
        assert sentence in capsys.readouterr().err
    assert not Path("c").exists()


def test_every_format_says_what_its_user_needs_by_the_same_names(tiny, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    clframe.run(tiny(shape=(1, 8, 8)), "mlp-100", train={"epochs": 1, "val": 0.25}, run={"output": str(tmp_path / "r")})
    model = clframe.load(tmp_path / "r")
    for name in ("safetensors", "torch-export", "onnx"):
        model.export(tmp_path / name, name)
    with safe_open(tmp_path / "safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["class_names"]) == list(model.class_names)
    assert json.loads(about["temperature"]) == model.temperature
    assert json.loads(about["look"]) is None
    extra = {"about.json": ""}
    torch.export.load(tmp_path / "torch-export", extra_files=extra)
    assert json.loads(extra["about.json"]) == about
    written = onnx.load(tmp_path / "onnx").metadata_props
    assert {entry.key: entry.value for entry in written if entry.key in about} == about


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("options", [{}, {"mode": "gray"}, {"width": 20}, {"resize": 24}])
def test_the_page_s_recipe_reads_images_as_predict_does(kind, options, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "trained-model.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^def raw\(.*?(?=\n```)", page, re.M | re.S)
    names = {"Image": Image, "ImageOps": ImageOps, "np": np}
    exec(recipe, names)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"image.{kind}")
    look = ImageFormat(size=16, **options)
    assert np.array_equal(names["raw"](tmp_path / f"image.{kind}", asdict(look)), look.read(tmp_path / f"image.{kind}"))
