"""`~` in every path that a user gives is the home folder, by one rule: `clframe.system.reading.expand_home`."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import clframe
from clframe import testing
from clframe.cli.main import main
from clframe.config import resolve
from clframe.system import reading

ROOT = Path(__file__).parent.parent
QUICK = {"iterations": 1}
NO_CURVES = {"tensorboard": False}


def test_only_one_function_expands_a_path():
    calls = {}
    for folder in ("clframe", "cli", "plugins", "scenarios"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            names = [n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)]
            calls[file.relative_to(ROOT).as_posix()] = names.count("expanduser")
    assert {name: count for name, count in calls.items() if count} == {"clframe/system/reading.py": 1}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a finished run, a configuration, a split, images and an array."""
    home = tmp_path_factory.mktemp("home")
    arrays = testing.tiny_arrays(shape=(1, 8, 8))
    scenario = clframe.split_classes("tiny", arrays, experiences=3)
    clframe.run(scenario, "mlp-100", train=QUICK, run={"output": home / "run", **NO_CURVES})
    (home / "c.yaml").write_text("train: {epochs: 3}\n")
    np.save(home / "x.npy", arrays.x_train.numpy())
    for k, name in enumerate(["class 0", "class 1"]):
        (home / "photos" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(arrays.x_train[6 * k + i, 0].numpy()).save(home / "photos" / name / f"{i}.png")
    clframe.save_split(home / "split.json", "split-folder", sets=[f"scenario.path={home / 'photos'}"])
    return home


def new() -> clframe.Scenario:
    return clframe.split_classes("tiny", testing.tiny_arrays(shape=(1, 8, 8)), experiences=3)


def show(options: str) -> None:
    assert main(f"scenarios show split-folder --set scenario.path=~/photos {options}".split()) == 0


def written(name: str) -> None:
    assert Path(f"~/{name}").expanduser().exists()


USES: dict[str, Callable[[], Any]] = {
    "Results.read": lambda: clframe.Results.read("~/run"),
    "load": lambda: clframe.load("~/run"),
    "predict": lambda: clframe.load("~/run").predict("~/photos"),
    "export": lambda: (clframe.load("~/run").export("~/m.safetensors", "safetensors"), written("m.safetensors")),
    "extend": lambda: clframe.extend("~/run", new(), train=QUICK),
    "run.old_images": lambda: clframe.extend(
        "~/run", new(), plugins="mas", train=QUICK, run={"old_images": "~/photos"}
    ),
    "run.output": lambda: (
        clframe.run(new(), "mlp-100", train=QUICK, run={"output": "~/o", **NO_CURVES}),
        written("o"),
    ),
    "run.joint": lambda: clframe.run(new(), "mlp-100", train=QUICK, run={"joint": "~/run"}),
    "mas.images": lambda: clframe.run(new(), "mlp-100", {"mas": {"images": "~/x.npy"}}, train=QUICK),
    "a configuration": lambda: resolve(yaml_file="~/c.yaml"),
    "a split": lambda: resolve(scenario="~/split.json"),
    "a folder of images": lambda: show(""),
    "--save": lambda: (show("--save ~/s.json"), written("s.json")),
    "--sheet": lambda: (show("--sheet ~/s.png"), written("s.png")),
    "plugins new": lambda: (
        main(["plugins", "new", "my-method", "--output", "~/mine"]),
        written("mine/pyproject.toml"),
    ),
}


@pytest.mark.parametrize("use", USES)
def test_a_path_may_begin_at_home(use: str, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(shutil.copytree(filled, tmp_path / "home")))
    monkeypatch.chdir(tmp_path)
    USES[use]()
    assert not (tmp_path / "~").exists()


def test_who_is_not_known_has_no_home():
    with pytest.raises(clframe.DataError, match="names no user of this machine: write the folder out"):
        reading.expand_home("~no-such-user/x")
