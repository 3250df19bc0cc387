"""Formats and versions: what an earlier clframe wrote is read, or refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import clframe
from clframe import DataError, Plugin, Results, compose, hookimpl, hooks, testing
from clframe.config import resolve
from clframe.data.decode import ImageFormat
from clframe.runs import checkpoint, results
from clframe.scenarios.digits import split_digits

KEPT = Path(__file__).parent / "formats"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy of the runs of format 1: `finished`, and `stopped` in its third experience."""
    return Path(shutil.copytree(KEPT / "1", tmp_path / "1"))


def set_format(file: Path, number: object) -> None:
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "format": number}))


def test_the_formats_of_today_are_kept():
    assert [folder.name for folder in KEPT.iterdir()] == ["1"]
    assert (results.RESULTS_FORMAT, checkpoint.CHECKPOINT_FORMAT, hooks.HOOK_API) == (1, 1, 1)


def test_a_finished_run_of_format_1_is_read_and_answers_as_it_did(kept: Path):
    found = Results.read(kept / "finished")
    assert found.accuracy["class"][-1] == [0.0, 0.0, 0.25, 0.0, 0.0]
    trained = clframe.load(kept / "finished")
    for experience, share in zip(split_digits(limit=2), found.accuracy["class"][-1], strict=True):
        right = trained(experience.test.x).argmax(1) == experience.test.y
        assert right.float().mean().item() == share


def test_a_stopped_run_of_format_1_is_resumed_to_the_figures_of_the_finished_one(kept: Path):
    """On the machine that they come from, to the bit; elsewhere rounding may change one of the few answers."""
    found = clframe.resume(kept / "stopped", allow_env_change=True)
    assert found.data["plugins"] == ["ewc", "lwf", "er"]
    assert found.accuracy["class"][:2] == Results.read(kept / "finished").accuracy["class"][:2]
    assert [len(row) for row in found.accuracy["class"]] == [5] * 5


def test_the_tree_of_a_checkpoint_has_the_entries_of_its_format(kept: Path):
    """An entry that a resume needs and old checkpoints lack would need another format; `frozen` has a substitute."""
    clframe.run(
        {"name": "split-digits", "limit": 1},
        train={"iterations": 1},
        run={"output": str(kept / "new"), "device": "cpu"},
    )
    trees = [checkpoint.load(kept / name / "checkpoints", pytest.fail)[0] for name in ("stopped", "new")]
    old, new = ([name for name, _ in tree["dict"]] for tree in trees)
    new.remove("frozen")  # read from the plugins' states where it is missing
    assert sorted(old) == sorted(new)


def test_the_old_words_for_colors_are_read_in_files_of_format_1(kept: Path, monkeypatch: pytest.MonkeyPatch):
    """`grey` in config.yaml, in the image format of model.json and in a split's file is `gray` from then on."""
    monkeypatch.chdir(kept / "gray")
    assert "grey" in Path("run/config.yaml").read_text()
    trained = clframe.load("run")
    assert trained.scenario.transform.look == ImageFormat(4, mode="gray")
    assert len(trained.predict(["images/red/0.png"])) == 1
    assert resolve(yaml_file="run/config.yaml").scenario.options["mode"] == "gray"
    assert resolve(scenario="split-file.json").scenario.options["mode"] == "gray"
    more = {"name": "split-folder", "path": "images"}
    extended = clframe.extend("run", more, train={"iterations": 1}, run={"output": "more", "device": "cpu"})
    assert extended.data["extends"] == 2
    assert "mode: gray" in Path("more/config.yaml").read_text()
    Path("run/results.json").unlink()  # as if it had been stopped at its end
    assert clframe.resume("run", allow_env_change=True).data["classes"] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("number", [0, 2, None])
def test_a_run_of_another_format_is_refused(kept: Path, number: object):
    set_format(kept / "finished" / "results.json", number)
    with pytest.raises(DataError) as caught:
        Results.read(kept / "finished")
    words = (f"{kept / 'finished' / 'results.json'} has format {number}", "format 1", "environment.json", "config.yaml")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("number", [0, 2, None])
def test_a_model_of_another_format_is_refused(kept: Path, number: object):
    set_format(kept / "finished" / "model.json", number)
    with pytest.raises(DataError, match=f"model.json has format {number}, .* format 1"):
        clframe.load(kept / "finished")


def test_a_checkpoint_of_another_format_is_refused_and_not_taken_for_a_damaged_one(kept: Path):
    """An older checkpoint of a format that is read would take the run back."""
    newest = kept / "stopped" / "checkpoints" / "000009"
    shutil.copytree(kept / "stopped" / "checkpoints" / "000004", newest)
    set_format(newest / "tree.json", 2)
    sums = {name: hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in checkpoint.CHECKPOINT_FILES}
    (newest / "manifest.json").write_text(json.dumps(sums))
    with pytest.raises(DataError) as caught:
        clframe.resume(kept / "stopped", allow_env_change=True)
    words = (f"{newest} has format 2", "format 1", "environment.json")
    assert all(word in str(caught.value) for word in words)


class Versioned(Plugin):
    """Written for some version of the hooks."""

    name = "versioned"

    @hookimpl
    def after_step(self, run):
        pass


@pytest.mark.parametrize("version", [None, 1])
def test_a_plugin_of_this_version_of_the_hooks_runs(version, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Versioned, "hook_api", version)
    plugin = Versioned()
    assert compose.manager([plugin]).get_plugins() == {plugin}


@pytest.mark.parametrize(("version", "upgrade"), [(2, "clframe"), (0, "`versioned`"), ("1", "`versioned`")])
def test_a_plugin_of_another_version_of_the_hooks_is_refused_in_one_sentence(
    version, upgrade, monkeypatch: pytest.MonkeyPatch
):
    """Nothing else is said of it, such as of hooks that this version does not have."""

    class Other(Versioned):
        hook_api = version

        @hookimpl
        def before_everything(self, run):
            pass

    with testing.refused("`versioned`", f"version {version} ", "version 1", f"upgrade {upgrade}"):
        compose.manager([Other()])
