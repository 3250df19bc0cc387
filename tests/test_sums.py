"""Files of a run folder that are damaged, tampered with, links, or left over: refused by name, or without effect."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import clframe
from clframe import DataError, Results, UsageError, registry, testing
from clframe.api import extension_config
from clframe.cli.main import main
from clframe.engine import Engine
from clframe.errors import ClframeError, Interrupted
from clframe.runs import checkpoint, sums
from clframe.runs.folder import BEGIN
from clframe.settings import Component
from clframe.system import writing

CALL: dict[str, Any] = {
    "scenario": {"name": "split-digits", "limit": 4},
    "model": {"name": "mlp", "hidden": [4]},
    "plugins": ["er"],
    "train": {"iterations": 3, "batch_size": 4, "val": 0.25},
}
READ = ("config.yaml", "model.json", "model.safetensors", "results.json", "timings.json", "sums.json")


def begin(folder: Path, stop: bool = False, **changes: Any) -> None:
    """Run in `folder`; stopped after the first step of the third experience."""
    settings = {"output": str(folder), "tensorboard": False, "device": "cpu"}
    with testing.stop_at(lambda engine: stop and (engine.position.experience, engine.position.steps) == (2, 1)):
        try:
            clframe.run(**CALL | changes, run=settings)
        except Interrupted:
            assert stop


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    begin(folder)
    return folder


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped in the third experience, with two parts of its predictions."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    begin(folder, stop=True)
    assert len(list((folder / "predictions").iterdir())) == 2
    return folder


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "finished"))


@pytest.fixture
def stopped(stopped_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped_run, tmp_path / "stopped"))


def refusal(call: Callable[[], Any]) -> tuple[Any, str]:
    """What `call` returns, and the sentence with which it refuses, one of which is empty."""
    try:
        return call(), ""
    except ClframeError as error:
        return None, str(error)


def answers(folder: Path) -> Any:
    """All that is read of a finished run, to the last bit."""
    trained = clframe.load(folder)
    images = torch.arange(2 * 64, dtype=torch.uint8).reshape(2, 1, 8, 8) % 16
    scores = trained(images)
    found = Results.read(folder)
    shares = trained.confidences(scores)
    assert shares is not None
    return scores.tolist(), shares.tolist(), found.data, found.timings, found.confusion_matrix(), trained.class_names


def flipped(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.parametrize("name", [*READ, "predictions.safetensors"])
def test_a_flipped_bit_is_refused_by_name_or_changes_nothing(finished: Path, name: str):
    expected, file = answers(finished), finished / name
    content, dice, refused = file.read_bytes(), random.Random(0), 0
    for bit in [dice.randrange(8 * len(content)) for _ in range(12)]:
        flipped(file, bit)
        found, said = refusal(lambda: answers(finished))
        assert name in said or (found, name) == (expected, "sums.json"), bit
        refused += bool(said)
        file.write_bytes(content)
    assert refused == 12 or name == "sums.json"
    assert answers(finished) == expected


def test_a_flipped_bit_of_the_configuration_is_noticed_before_a_resume_believes_it(stopped: Path):
    """Else the sentence would blame the user: that there is no option `er.sise`, or another device."""
    file = stopped / "config.yaml"
    content = file.read_bytes()
    for bit in range(1, 8 * len(content), 61):
        flipped(file, bit)
        assert refusal(lambda: clframe.resume(stopped))[1].startswith(f"{file} was edited, or damaged, since"), bit
        file.write_bytes(content)


def test_a_configuration_without_a_sum_is_refused_in_a_sentence(stopped: Path):
    """As an earlier clframe left the folder; the checkpoint has the sum, but is read later."""
    (stopped / "sums.json").unlink()
    file = stopped / "config.yaml"
    content = file.read_bytes()
    places = [8 * place.start() for place in re.finditer(b"name", content)]
    for bit in [*places, *range(3, 8 * len(content), 701)]:
        flipped(file, bit)
        assert refusal(lambda: clframe.resume(stopped))[1], bit
        file.write_bytes(content)


def test_bits_of_the_sums_is_refused_or_means_the_same(finished: Path):
    file = finished / sums.SUMS_FILE
    content, expected = file.read_bytes(), sums.read(finished)
    for bit in range(0, 8 * len(content), 7):
        flipped(file, bit)
        found, said = refusal(lambda: sums.read(finished))
        assert str(file) in said or found == expected, bit
        file.write_bytes(content)


def test_the_sums_are_those_of_the_files(finished: Path, stopped: Path):
    for folder in (finished, stopped):
        files = json.loads((folder / "sums.json").read_text())["files"]
        for name, found in files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == found
        there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert {n for n in there if not n.startswith("checkpoints")} - set(files) <= {
            "sums.json",
            "metrics.jsonl",
            ".lock",
        }


@pytest.mark.parametrize(
    "name", ["environment.json", "split.json", "config.yaml", "sums.json", "predictions/0001.safetensors"]
)
def test_a_flipped_bit_in_a_stopped_run_is_refused_by_name(stopped: Path, name: str):
    content = (stopped / name).read_bytes()
    for bit in (8 * (len(content) // 2), 8 * len(content) // 3):
        flipped(stopped / name, bit)
        with pytest.raises(DataError, match=name):
            clframe.resume(stopped)
        (stopped / name).write_bytes(content)


def test_a_part_that_is_written_again_may_be_damaged(stopped: Path, finished: Path):
    """A process that is killed between a part and its checkpoint leaves one that the resume replaces."""
    (stopped / "predictions" / "0002.safetensors").write_bytes(b"half")
    clframe.resume(stopped)
    for name in ("results.json", "model.safetensors", "model.json", "predictions.safetensors"):
        assert (stopped / name).read_bytes() == (finished / name).read_bytes()


def test_a_part_that_is_gone_is_told_and_the_others_are_kept(stopped: Path):
    (stopped / "predictions" / "0000.safetensors").unlink()
    told: list[str] = []
    clframe.resume(stopped, listeners=[testing.message_listener(told)])
    assert [text for text in told if "predictions.safetensors will lack" in text and "after experience 1" in text]
    assert {name.split("/")[1] for name in load_file(stopped / "predictions.safetensors")} >= {"1", "2", "3", "4"}


def test_predictions_that_are_removed_while_it_runs_are_told(tmp_path: Path):
    told: list[str] = []

    def listen(record: dict[str, Any]) -> None:
        if record["kind"] == "experience" and record["index"] == 4:
            shutil.rmtree(tmp_path / "run" / "predictions")
        if record["kind"] == "message":
            told.append(record["text"])

    clframe.run(**CALL, run={"output": str(tmp_path / "run"), "tensorboard": False}, listeners=[listen])
    assert len([text for text in told if "is gone" in text]) == 4
    assert Results.read(tmp_path / "run").confusion_matrix()


@pytest.mark.parametrize("name", [".tmpAbC123", ".DS_Store", "0007.safetensors.bak", ".0002.safetensors"])
def test_leftovers_beside_the_predictions_do_no_harm(stopped: Path, finished: Path, name: str):
    (stopped / "predictions" / name).write_bytes(b"")
    (stopped / ".tmpXYZ").write_bytes(b"")
    assert main(["resume", "-q", str(stopped)]) == 0
    assert (stopped / "results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_a_folder_without_sums_is_read_with_one_sentence(finished: Path, stopped: Path, tmp_path: Path, capsys):
    for folder in (finished, stopped):
        (folder / "sums.json").unlink()
    with pytest.warns(UserWarning, match="holds no sums of its files"):
        clframe.load(finished)
    assert main(["export", str(finished), "--format", "safetensors", "--output", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().err.count("holds no sums of its files") == 1
    assert main(["resume", "-q", str(stopped)]) == 0
    assert capsys.readouterr().err.count("holds no sums of its files") == 1
    assert set(sums.read(stopped) or {}) == set(sums.read(stopped) or {}) >= {*READ} - {"sums.json"}
    assert (
        main(["extend", str(stopped), "-s", "split-digits", "--limit", "2", "--iterations", "1", "--output", "/"]) == 2
    )
    assert "holds no sums" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- links


LINKED = ["metrics.jsonl", ".lock", "predictions", "checkpoints", "predictions/0000.safetensors", "results.json"]
BESIDE = [
    ".results.json",
    ".model.json",
    ".timings.json",
    ".sums.json",
    ".model.safetensors",
    ".predictions.safetensors",
]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_in_a_run_folder_is_refused(stopped: Path, tmp_path: Path, name: str):
    target = tmp_path / "precious"
    target.write_text("mine")
    path = stopped / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)
    with pytest.raises(DataError, match=f"{path} is a link"):
        clframe.resume(stopped)
    assert target.read_text() == "mine"


@pytest.mark.parametrize("name", BESIDE)
def test_a_link_beside_a_file_is_not_written_through(stopped: Path, tmp_path: Path, name: str):
    target = tmp_path / "precious"
    target.write_text("mine")
    (stopped / name).symlink_to(target)
    clframe.resume(stopped)
    assert target.read_text() == "mine"
    assert (stopped / "results.json").is_file()


def test_a_link_that_appears_while_it_runs_is_not_written_through(tmp_path: Path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x").symlink_to(tmp_path / "precious")
    for write in (lambda p: writing.append(p, "x"), lambda p: writing.truncate(p, 0)):
        with pytest.raises(OSError, match="Too many levels"):
            write(tmp_path / "x")
    with writing.create(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "x").read_bytes() == b"new"


# ------------------------------------------------------------------------------- what is not such a file


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("what", ["pipe", "device", "folder", "deep", "large", "empty"])
@pytest.mark.parametrize("with_sums", [True, False])
def test_what_is_no_such_file_is_refused(finished: Path, name: str, what: str, with_sums: bool, capsys):
    file = finished / name
    if not with_sums:
        (finished / "sums.json").unlink()
    file.unlink(missing_ok=True)
    makers: dict[str, Callable[[], Any]] = {
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "folder": file.mkdir,
        "deep": lambda: file.write_text("[" * 100_000),
        "large": lambda: os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 2**36),
        "empty": lambda: file.write_bytes(b""),
    }
    makers[what]()
    if what == "large" and with_sums and name == "model.safetensors":
        pytest.skip("its sum takes minutes, in constant memory")
    for read in (clframe.load, Results.read):
        assert len(refusal(lambda read=read: read(finished))[1]) < 2500


def changes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in parsed JSON, for a few of each list."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        found += changes(item, (*path, key))
    return found


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copied = json.loads(json.dumps(value))
    place = copied
    for key in path[:-1]:
        place = place[key]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return copied


NEW = [..., None, "x", -1, 10**6, 1.5, [], {}, [[]], {"tensor": "nowhere"}, True]


def resummed(folder: Path, name: str) -> None:
    files = dict(sums.read(folder) or {})
    files[name] = sums.digest(folder / name)
    (folder / "sums.json").write_text(sums.to_text(files))


@pytest.mark.parametrize("name", ["model.json", "results.json", "state of model.json"])
def test_values_of_another_kind_with_right_sums_are_refused_by_name(finished: Path, name: str):
    """No KeyError, no TypeError, in a fixed draw of the places and kinds."""
    file = finished / name.split()[-1]
    original = json.loads(file.read_text())
    within = json.loads(original["state"]) if name.startswith("state") else original
    dice = random.Random(1)
    places = changes(within)
    for _ in range(60):
        data = changed(within, dice.choice(places), dice.choice(NEW))
        file.write_text(json.dumps(original | {"state": json.dumps(data)} if within is not original else data))
        resummed(finished, file.name)
        for read in (answers, lambda path: extension_config(path, {"name": "split-digits"})):
            said = refusal(lambda read=read: read(finished))[1]
            assert not said or any(words in said for words in ("model.json", "results.json", "do not fit this model"))


def test_values_of_another_kind_in_a_checkpoint_are_refused(stopped: Path):
    newest = sorted((stopped / "checkpoints").iterdir())[-1]
    tree = json.loads((newest / "tree.json").read_text())
    kept = shutil.copytree(stopped, stopped.with_name("kept"))
    dice, places, refused = random.Random(2), changes(tree["tree"]), 0
    for _ in range(60):
        data = changed(tree["tree"], dice.choice(places), dice.choice(NEW))
        (newest / "tree.json").write_text(json.dumps({"format": 1, "tree": data}))
        files = {name: sums.digest(newest / name) for name in checkpoint.CHECKPOINT_FILES}
        (newest / "manifest.json").write_text(json.dumps(files))
        refused += bool(refusal(lambda: clframe.resume(stopped))[1])
        shutil.rmtree(stopped)
        shutil.copytree(kept, stopped)
    assert refused > 20


# ------------------------------------------------------------------------- killed before anything was learnt


@pytest.mark.parametrize("count", range(len(BEGIN)))
def test_a_folder_of_a_process_that_was_killed_while_it_began_is_taken(finished: Path, tmp_path: Path, count: int):
    """The sums are written first, then the files, config.yaml last; a temporary file may be left too."""
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / ".lock").touch()
    if count:
        shutil.copy(finished / "sums.json", folder)
    for name in [n for n in BEGIN if n != "base.json"][: max(0, count - 1)]:
        shutil.copy(finished / name, folder)
    (folder / ".split.json").write_text("{")
    if not count:
        (folder / ".split.json").rename(folder / ".sums.json")
    begin(folder)
    for name in ("results.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    assert not list(folder.glob(".s*.json"))


def test_a_folder_with_a_users_own_files_is_never_taken(tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "split.json").write_text("{}")
    with pytest.raises(UsageError, match="not empty, and is not a run folder"):
        begin(folder)
    assert (folder / "split.json").read_text() == "{}"


def test_a_run_that_was_killed_before_its_first_checkpoint_is_resumed_from_the_beginning(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "killed"

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(folder)
    assert not (folder / "checkpoints").exists()
    clframe.resume(folder)
    for name in ("results.json", "model.safetensors", "model.json", "predictions.safetensors"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_a_run_that_has_learnt_never_starts_afresh(stopped: Path):
    shutil.rmtree(stopped / "checkpoints")
    with pytest.raises(DataError, match="no checkpoint"):
        clframe.resume(stopped)


# ---------------------------------------------------------------------------------- what is written


def test_tensors_are_the_same_bytes_each_time_and_read_by_safetensors(tmp_path: Path):
    kinds = [t for t in writing.DTYPES if t not in (torch.uint16, torch.uint32, torch.uint64)]
    tensors = {f"é/{i}": torch.arange(6 + i % 3).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(1.5), "none": torch.empty(0, 3), "matrix": torch.randn(3, 4)}
    about = {"b": "ü", "a": "1"}
    writing.save_file(tensors, tmp_path / "one", about)
    writing.save_file(dict(reversed(tensors.items())), tmp_path / "two", dict(reversed(about.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = load_file(tmp_path / "one")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    save_file(tensors, tmp_path / "theirs", about)
    theirs = load_file(tmp_path / "theirs")
    assert all(
        theirs[name].reshape(-1).view(torch.uint8).equal(t.reshape(-1).view(torch.uint8)) for name, t in found.items()
    )
    assert (tmp_path / "theirs").stat().st_size == (tmp_path / "one").stat().st_size


def test_published_weights_are_not_asked_for_where_they_are_overwritten(finished: Path, tmp_path: Path, monkeypatch):
    """Of a run with `model.weights=true`, predict, extend and resume need no network."""
    asked: list[bool] = []
    original = registry.build_backbone

    def build(component: Component, shape: Any) -> Any:
        asked.append(bool(component.options.get("weights")))
        return original(component, shape)

    monkeypatch.setattr(registry, "build_backbone", build)
    for folder in (finished,):
        file = folder / "config.yaml"
        file.write_text(file.read_text().replace("model:\n", "model:\n  weights: true\n"))
        assert "weights: true" in file.read_text()
        resummed(folder, "config.yaml")
    clframe.load(finished)
    assert asked == [False]


@pytest.mark.parametrize("kind", ["safetensors", "torch-export"])
def test_an_export_that_cannot_be_written_leaves_nothing_and_says_so(finished: Path, tmp_path: Path, kind: str, capsys):
    (tmp_path / "out").mkdir()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "sync", full)
        call = ["export", str(finished), "--format", kind, "--output", str(tmp_path / "out" / "model")]
        assert main(call) == 1
    assert "could not be written: No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert main(call) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
