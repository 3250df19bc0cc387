"""A scenario in a file: the same split elsewhere, and a sheet of its images."""

from __future__ import annotations

import errno
import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clframe
from clframe import registry
from clframe.cli.main import main
from clframe.config import resolve
from clframe.data import split_file
from clframe.data.pictures import CAPTION, GAP, draw_sheet, encode_png
from clframe.errors import DataError, UsageError
from clframe.settings import Component, RunSettings


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """split.json, of split-digits in the random order of seed 5, in the working folder."""
    monkeypatch.chdir(tmp_path)
    clframe.save_split("split.json", {"name": "split-digits", "order": "random", "limit": 20}, run={"seed": 5})
    return tmp_path / "split.json"


def edited(path, **changes):
    data = json.loads(path.read_text())
    data["scenario"] |= changes.pop("scenario", {})
    path.write_text(json.dumps(data | changes))


def test_a_file_says_who_learns_what_when_with_checksums(saved):
    data = json.loads(saved.read_text())
    scenario = registry.build_scenario(
        Component("split-digits", {"order": "random", "limit": 20, "seed": 5}), RunSettings()
    )
    assert data["scenario"]["seed"] == 5
    assert data["class_order"] == list(scenario.class_order)
    assert data["data_sha256"] == scenario.checksum
    assert data["split_sha256"] == split_file.checksum(scenario)
    assert [e["classes"] for e in data["experiences"]] == [
        [scenario.class_names[label] for label in classes] for classes in scenario.classes
    ]
    assert [(e["train"]["images"], e["test"]["images"]) for e in data["experiences"]] == [(40, 40)] * 5


def test_a_run_from_the_file_has_that_split_whatever_its_own_seed(saved, tmp_path):
    spec = {"name": "split-digits", "order": "random", "limit": 20, "seed": 5}
    train = {"iterations": 3}
    a = clframe.run(spec, train=train, run={"seed": 1, "output": str(tmp_path / "a")})
    b = clframe.run("split.json", train=train, run={"seed": 1, "output": str(tmp_path / "b")})
    assert a.data == b.data
    c = clframe.run({"name": "split.json", "setting": "task"}, train=train)
    assert c.data["class_names"] == a.data["class_names"]
    assert list(c.accuracy) == ["task"]
    saved.unlink()  # the run's configuration holds all that it needs
    config = resolve(yaml_file=tmp_path / "b" / "config.yaml")
    assert config.scenario.pinned.keys() == {"data", "split"}
    again = clframe.api.run_config(config)
    assert again.accuracy == b.accuracy


def test_the_sum_of_a_split_changes_with_each_of_its_parts():
    def total(**options):
        return split_file.checksum(registry.build_scenario(Component("split-digits", options), RunSettings()))

    plain = total()
    assert plain == total(setting="task")
    for options in ({"experiences": 2}, {"first": 2}, {"order": [1, 0, *range(2, 10)]}, {"limit": 9}):
        assert (total(**options) == plain) == (options == {"first": 2})


def test_other_data_and_other_splits_are_refused_in_one_sentence(saved):
    edited(saved, data_sha256="0" * 64)
    with pytest.raises(DataError, match=r"data of `split-digits` differ .*000\.\.\.; "):
        clframe.run("split.json")
    clframe.save_split("split.json", "split-digits")
    edited(saved, scenario={"experiences": 2})
    with pytest.raises(DataError, match=r"split of `split-digits` differs .*same data"):
        clframe.run("split.json")


@pytest.mark.parametrize(("option", "value"), [("seed", 6), ("order", "natural"), ("limit", 3), ("experiences", 2)])
def test_what_the_file_settles_cannot_be_given_anew(saved, option, value):
    told = rf"`scenario.{option}` is \"?{value}\"?, and split.json settles it as \"?(5|random|20)\"?: leave it out"
    for where in ({"scenario": {"name": "split.json", option: value}}, {"sets": [f"scenario.{option}={value}"]}):
        with pytest.raises(UsageError, match=told):
            resolve(**{"scenario": "split.json", **where})


def test_what_the_file_does_not_settle_can_be(saved):
    config = resolve(scenario="split.json", sets=["scenario.setting=task", "scenario.limit=20"])
    assert config.scenario.options["setting"] == "task"
    assert config.scenario.name == "split-digits"


def test_a_file_that_holds_no_scenario_is_refused(saved, tmp_path):
    for name, text, told in (
        ("missing.json", None, r"cannot be read: No such file"),
        ("text.json", "hello", r"it is not JSON"),
        ("pipe.json", "", r"cannot be read: it is a pipe"),
        ("digits.json", '{"kind": ' + "1" * 5_000 + "}", r"it is not JSON"),
        ("name.json", '{"kind": "clframe scenario", "format": 1, "scenario": {"name": 3}}', r"holds no scenario"),
        ("list.json", "[1]", r"`clframe scenarios show NAME --save FILE\.json`"),
        ("other.json", '{"kind": "x"}', r"holds no scenario"),
        (
            "later.json",
            saved.read_text().replace('"format": 1', '"format": 2'),
            r"has format 2, and this clframe reads",
        ),
    ):
        if name == "pipe.json":
            os.mkfifo(name)
        elif text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=told) as caught:
            resolve(scenario=name)
        assert len(caught.value.problems) == 1
    for pinned in (3, {"data": "x"}, {"data": "x", "split": 1}):
        with pytest.raises(UsageError, match=r"`scenario.pinned` is .* it must hold the checksums `data` and `split`"):
            resolve(scenario={"name": "split-digits", "pinned": pinned})


def test_the_command_line_writes_runs_and_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call = ["scenarios", "show", "split-digits", "--set", "scenario.experiences=2", "--set", "run.seed=4"]
    assert main([*call, "--save", "s.json", "--sheet", "s.png"]) == 0
    assert capsys.readouterr().out.endswith("  2: 5, 6, 7, 8, 9\nSplit: s.json\nSheet: s.png\n")
    assert json.loads((tmp_path / "s.json").read_text())["scenario"]["seed"] == 4
    assert Image.open("s.png").height == 2 * (CAPTION + 32 + 2 * GAP)
    run = ["run", "-q", "--scenario", "s.json", "--iterations", "2", "--no-tensorboard", "--output", "r"]
    assert main(run) == 0
    assert json.loads((tmp_path / "r" / "results.json").read_text())["classes"] == [[*range(5)], [*range(5, 10)]]
    capsys.readouterr()
    assert main(["scenarios", "show", "s.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experiences"] == [list("01234"), list("56789")]
    for more, code, told in (
        (["--save", "s.yaml"], 2, "`.json`"),
        (["--save", "no/s.json"], 2, "no/s.json (No such file or directory)"),
        (["--sheet", "no/s.png"], 2, "no/s.png (No such file or directory)"),
        (["--set", "scenario.x=1"], 2, "`scenario.x` is not an option of the scenario `split-digits`"),
    ):
        assert main([*call, *more]) == code
        assert told in capsys.readouterr().err
    assert main(["scenarios", "show", "split-mnist", "--save", "m.json"]) == 3
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize(("flag", "what"), [("--save", "The split"), ("--sheet", "The sheet")])
@pytest.mark.parametrize(("number", "code", "told"), [(errno.ENOSPC, 1, "could not"), (errno.EACCES, 2, "cannot")])
def test_a_full_disk_is_no_wrong_use(
    flag: str, what: str, number: int, code: int, told: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("clframe.system.writing.create", refuse)
    path = tmp_path / "s.json"
    assert main(["scenarios", "show", "split-digits", "--set", "scenario.limit=4", flag, str(path)]) == code
    assert f"{what} {told} be written to {path} ({os.strerror(number)})" in capsys.readouterr().err
    assert not path.exists()


def test_a_sheet_has_a_row_for_each_experience_with_its_classes_in_turn(tiny):
    scenario = tiny(shape=(3, 32, 32))
    picture = draw_sheet(scenario, columns=5)
    height, width = CAPTION + 32 + 2 * GAP, 5 * (32 + GAP) + GAP
    assert picture.shape == (3 * height, width, 3)
    for i, experience in enumerate(scenario):
        data = experience.train
        of_class = [data.x[data.y == label] for label in experience.classes]
        expected = torch.cat([of_class[0][:2], of_class[1][:3]])
        top = i * height + CAPTION + GAP
        for k, image in enumerate(expected):
            left = GAP + k * (32 + GAP)
            assert (picture[top : top + 32, left : left + 32] == image.permute(1, 2, 0).numpy()).all()
        assert (picture[i * height : i * height + CAPTION] < 128).any()  # a caption
    assert Image.open(BytesIO(encode_png(picture))).size == (width, 3 * height)


def test_there_is_no_sheet_of_data_that_are_not_images(tiny):
    with pytest.raises(UsageError, match=r"The data of `tiny` are \[16\], not images"):
        draw_sheet(tiny(shape=(16,)))


def test_sums_are_those_of_the_numbers_written_out():
    import hashlib

    scenario = registry.build_scenario(Component("split-digits", {"limit": 2}), RunSettings())
    data = scenario[0].train
    numbers = np.array([*data.index.tolist(), *data.y.tolist()], dtype="<i8")
    assert split_file.describe_split(Component("split-digits"), scenario, 0)["experiences"][0]["train"] == {
        "images": 4,
        "sha256": hashlib.sha256(numbers.tobytes()).hexdigest(),
    }
