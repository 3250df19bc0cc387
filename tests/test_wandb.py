"""The plugin `wandb`, offline: what it logs is what TensorBoard gets, and a run is the same with and without it."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_tensorboard import curves, events

import clframe
from clframe import Interrupted, Plugin, RunError, UsageError, hookimpl, testing
from clframe.plugins.ewc import EWC

TRAIN = {"epochs": 2, "batch_size": 8, "val": 0.25, "lr": 0.1}
RUN = {"log_every": 1, "eval_every": "epoch", "device": "cpu", "seed": 3}
SENTENCE = "A sentence from a method."


class Showing(Plugin):
    """Logs a value, a sentence and a picture in each experience."""

    name = "showing"
    observer = True

    @hookimpl
    def after_experience(self, run, experience):
        run.log({"shown": 4.0 + experience.index})
        run.tell(SENTENCE)
        run.log_images("showing/first", experience.train.x[:4])


def learn(tiny: Any, *plugins: Any, **run: Any) -> clframe.Results:
    scenario = tiny(2, shape=(1, 8, 8))
    return clframe.run(scenario, "mlp-100", ["ewc", *plugins, Showing()], train=TRAIN, run={**RUN, **run})


def children() -> set[int]:
    """The processes that this one has started and that still run."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,stat=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    return {int(pid) for pid, state, *command in rows if "Z" not in state and command != ["ps"]}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """wandb with its files below `tmp_path`; its service process ends with the test."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(sys, "exit", sys.exit)  # wandb replaces both
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for kind in ("", "CACHE_", "CONFIG_", "DATA_"):
        monkeypatch.setenv(f"WANDB_{kind}DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_ERROR_REPORTING", "WANDB_CONSOLE"):
        monkeypatch.setenv(name, "off" if name == "WANDB_CONSOLE" else "false")
    for name in ("DISABLE_STATS", "DISABLE_META", "DISABLE_MACHINE_INFO"):
        monkeypatch.setenv(f"WANDB_X_{name}", "true")
    monkeypatch.setenv("WANDB_X_SAVE_REQUIREMENTS", "false")  # reads the metadata of every package
    before = children()
    wandb.teardown()  # settings are read again
    yield wandb
    wandb.teardown()
    assert children() <= before


def records(file: Path) -> list[Any]:
    """The records of an offline file, which is a log of LevelDB: blocks of 32 KiB with fragments."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last
            found.append(Record.FromString(whole))
            whole = b""
    return found


def rows_of(read: list[Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for record in read:
        if record.WhichOneof("record_type") == "history":
            rows.append({})
            for item in record.history.item:
                *outer, name = item.nested_key or [item.key]
                within = rows[-1].setdefault(outer[0], {}) if outer else rows[-1]
                within[name] = json.loads(item.value_json)
    return rows


def points(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Points of each curve, values as the float32 that TensorBoard keeps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        place = row["experiences"] if "experiences" in row else row["total_step"]
        for name, value in row.items():
            if isinstance(value, int | float) and name[0] != "_" and name not in ("experiences", "total_step"):
                found.setdefault(name, []).append((place, round(float(np.float32(value)), 6)))
    return found


def test_an_offline_run_logs_what_tensorboard_gets_and_changes_nothing(tiny, tmp_path, offline):
    from PIL import Image

    plain = learn(tiny)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    drawn = random.random(), np.random.rand(), torch.rand(3)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    options = {"project": "tests", "group": "all", "tags": ["tiny"], "mode": "offline"}
    logged = learn(tiny, {"wandb": options}, output=str(tmp_path / "run"), tensorboard=True)
    assert (random.random(), np.random.rand()) == drawn[:2]
    assert torch.equal(torch.rand(3), drawn[2])
    assert logged.data == plain.data

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    read = records(file)
    rows = rows_of(read)
    assert points(rows) == curves(tmp_path / "run")
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert [SENTENCE in row.get("message", "") for row in rows].count(True) == 2
    started = next(record.run for record in read if record.WhichOneof("record_type") == "run")
    assert (started.project, started.run_group, started.display_name) == ("tests", "all", "run")
    assert list(started.tags) == ["tiny"]
    assert file.stem == f"run-{started.run_id}"
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert (config["train"]["lr"], config["seed"], config["plugins"]) == (0.1, 3, "ewc")
    assert config["ewc"]["lambda"] == EWC().options["lambda_"]
    assert "tests" not in json.dumps(config)
    metrics = {m.glob_name or m.name: m.step_metric for r in read for m in [r.metric] if m.step_metric}
    assert metrics["accuracy_class/*"] == metrics["showing/*"] == metrics["accuracy_matrix/*"] == "experiences"
    assert metrics["loss/*"] == metrics["learning_rate"] == metrics["validation_within_task/*"] == "total_step"

    shown = events(tmp_path / "run")
    for name in shown.Tags()["images"]:
        expected = [np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) for image in shown.Images(name)]
        paths = [file.parent / "files" / row[name]["path"] for row in rows if name in row]
        assert len(paths) == len(expected) > 0
        for path, picture in zip(paths, expected, strict=True):
            assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert [r.exit.exit_code for r in read if r.WhichOneof("record_type") == "exit"] == [0]


class Store:
    """A package with the calls of wandb and of trackio; keeps rows by the name or id of the run."""

    def __init__(self, lose_at: int | None = None, refuse: str = "") -> None:
        self.run = None
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.calls: list[dict[str, Any]] = []
        self.ended: list[int] = []
        self.lose_at, self.refuse = lose_at, refuse
        self.Settings = self.Image = lambda *values, **named: None

    def login(self, **options: Any) -> bool:
        if self.refuse == "login":
            return False
        raise ConnectionError("No route\nto the host.")

    def init(self, **options: Any) -> Any:
        if self.refuse == "init":
            raise OSError("timed out.\nConsider this.")
        self.calls.append(options)
        kept = self.rows.setdefault(options.get("id") or options["name"], {})
        last = max(kept, default=-1) + 1

        def log(row: dict[str, Any], step: int, commit: bool = True) -> None:
            if step == self.lose_at:
                raise ConnectionError("connection reset.")
            print("noise")
            assert step not in kept
            kept[step] = row

        def finish(exit_code: int = 0) -> None:
            self.ended.append(exit_code)
            if self.refuse == "finish":
                raise TimeoutError

        return SimpleNamespace(
            step=last, _next_step=last, log=log, finish=finish, define_metric=lambda *a, **k: None,
            dir="/where/files", offline=True, url="",
        )  # fmt: skip


@pytest.fixture(params=["wandb", "trackio"])
def package(request):
    return request.param


def put(monkeypatch: pytest.MonkeyPatch, package: str, store: Any) -> dict[str, Any]:
    """Put `store` in place of the package, and return the options of the plugin."""
    monkeypatch.setitem(sys.modules, package, store)
    monkeypatch.delenv("WANDB_MODE")
    return {"package": package, "mode": "offline"}


@pytest.mark.parametrize("beyond", [0, 4])
def test_a_resumed_run_goes_on_in_the_run_of_the_tracker(tiny, tmp_path, monkeypatch, package, beyond):
    whole, store = Store(), Store()
    options = put(monkeypatch, package, whole)
    learn(tiny, {"wandb": options}, output=str(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, package, store)
    folder = tmp_path / "again" / "run"
    folder.parent.mkdir()
    with testing.stop_at(14), pytest.raises(Interrupted):
        learn(tiny, {"wandb": options}, output=str(folder))
    ((name, rows),) = store.rows.items()
    (expected,) = whole.rows.values()
    reached = len(rows)
    assert 0 < reached < len(expected) - 5
    for step in range(reached, reached + beyond):  # rows that a killed run logged after its last checkpoint
        rows[step] = expected[step]
    clframe.resume(folder, scenario=tiny(2, shape=(1, 8, 8)), plugins=[Showing()])
    assert list(store.rows) == [name]
    assert list(rows) == list(expected)
    told = [
        [{**row, "message": row.get("message", "").count(SENTENCE)} for row in of.values()] for of in (rows, expected)
    ]
    assert told[0] == told[1]
    assert store.ended == [1, 0] if package == "wandb" else [0, 0]


def test_a_run_that_extends_another_is_a_new_run_and_a_loaded_one_is_none(tiny, tmp_path, monkeypatch):
    store = Store()
    options = put(monkeypatch, "wandb", store)
    clframe.run(tiny(2), "mlp-100", [{"wandb": options}], train={"epochs": 1}, run={"output": str(tmp_path / "first")})
    arrays = testing.tiny_arrays(classes=2)
    more = clframe.split_classes("more", arrays, experiences=1)
    clframe.extend(tmp_path / "first", more, run={"output": str(tmp_path / "second")})
    clframe.load(tmp_path / "second")
    assert len({call["id"] for call in store.calls}) == len(store.calls) == 2
    assert [call["name"] for call in store.calls] == ["first", "second"]


def test_a_connection_that_is_lost_is_told_once_and_changes_nothing(tiny, monkeypatch, package, capsys):
    plain, told = learn(tiny), []
    store = Store(lose_at=3)
    options = put(monkeypatch, package, store)
    listen = testing.message_listener(told)
    scenario = tiny(2, shape=(1, 8, 8))
    plugins = ["ewc", {"wandb": options}, Showing()]
    lost = clframe.run(scenario, "mlp-100", plugins, train=TRAIN, run=RUN, listeners=[listen])
    assert lost.data == plain.data
    stopped = [text for text in told if text.startswith("`wandb` stopped")]
    assert stopped == ["`wandb` stopped logging, and the run goes on without it: connection reset."]
    assert [len(rows) for rows in store.rows.values()] == [3]
    assert store.ended == []
    assert "noise" not in capsys.readouterr().out


def test_a_connection_that_is_lost_until_the_end_is_told_with_what_uploads_the_rest(tiny, monkeypatch):
    told: list[str] = []
    options = put(monkeypatch, "wandb", Store(refuse="finish"))
    listen = testing.message_listener(told)
    results = clframe.run(tiny(), "mlp-100", [{"wandb": options}], train={"epochs": 1}, listeners=[listen])
    assert len(results.accuracy["class"]) == 3
    expected = "not all was uploaded within 30 seconds; `wandb sync /where` uploads it."
    assert told[-1] == f"`wandb` stopped logging, and the run goes on without it: {expected}"


def refusal(tiny: Any, options: dict[str, Any], error: type[Exception] = UsageError) -> str:
    steps: list[Any] = []
    with pytest.raises(error) as refused:
        clframe.run(tiny(), "mlp-100", [{"wandb": options}], run={"log_every": 1}, listeners=[steps.append])
    assert not [step for step in steps if step["kind"] == "step"]
    assert len(getattr(refused.value, "problems", (0,))) == 1
    return str(refused.value)


def test_what_cannot_log_is_refused_before_training(tiny, monkeypatch, package):
    options = put(monkeypatch, package, None)
    expected = f"`wandb.package={package}` is not installed: `pip install 'clframe[{package}]'`."
    assert refusal(tiny, options) == expected
    monkeypatch.setitem(sys.modules, package, Store(refuse="init"))
    expected = "`wandb` could not begin to log: timed out; set `wandb.mode=offline`"
    assert refusal(tiny, options, RunError).startswith(expected)
    other = {"wandb": {"space": "a/b"}, "trackio": {"entity": "us"}}[package]
    assert "leave it out, or choose that package" in refusal(tiny, {**options, **other})


def test_wandb_online_needs_a_login_and_a_connection(tiny, monkeypatch):
    options = put(monkeypatch, "wandb", Store(refuse="login")) | {"mode": "online"}
    end = "; set `wandb.mode=offline` to log to this machine, and upload later with `wandb sync`."
    login = "no login was found (`wandb login` stores one)"
    assert refusal(tiny, options) == f"`wandb` cannot log to Weights & Biases: {login}{end}"
    monkeypatch.setitem(sys.modules, "wandb", Store())
    assert refusal(tiny, {}) == f"`wandb` cannot log to Weights & Biases: No route{end}"


def test_wandb_itself_finds_no_login_and_asks_for_none(tiny, offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    offline.teardown()
    assert "no login was found (`wandb login` stores one); set `wandb.mode=offline`" in refusal(tiny, {})


def test_trackio_sends_only_where_a_place_is_named(tiny, monkeypatch):
    options = put(monkeypatch, "trackio", Store())
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    monkeypatch.delenv("TRACKIO_SERVER_URL", raising=False)
    assert "needs `wandb.space`" in refusal(tiny, {**options, "mode": "online"})
    assert "`wandb.space` names where to send to" in refusal(tiny, {**options, "space": "us/here"})
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9/?write_token=secret")
    assert "`TRACKIO_SERVER_URL` names where to send to" in refusal(tiny, options)
    told = refusal(tiny, {"package": "trackio"})
    assert told.startswith("`wandb` cannot log to the place of `TRACKIO_SERVER_URL`: ")
    assert "secret" not in told
    monkeypatch.delenv("TRACKIO_SERVER_URL")
    hub = SimpleNamespace(whoami=lambda: (_ for _ in ()).throw(OSError("offline mode is enabled.")))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert "`wandb.space`: offline mode is enabled; set" in refusal(tiny, {"package": "trackio", "space": "us/here"})


def test_a_disabled_plugin_imports_nothing(tiny, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # an import of it would raise
    monkeypatch.delenv("WANDB_MODE")
    learn(tiny, {"wandb": {"package": package, "mode": "disabled"}})
    if package == "wandb":
        monkeypatch.setenv("WANDB_MODE", "disabled")
        learn(tiny, "wandb")


def test_the_package_is_imported_when_a_run_names_the_plugin():
    code = (
        "import sys\nfrom clframe.plugins.wandb import WandB\nWandB(mode='offline')\n"
        "assert not {'wandb', 'trackio', 'torch', 'numpy'} & set(sys.modules), 'imported too early'\n"
        "from importlib.util import find_spec\n"
        "assert 'plugins' not in find_spec('wandb').origin, 'the plugin stands in for the package'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_trackio_keeps_the_same_rows_in_its_local_store(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    pytest.importorskip("trackio", reason="trackio is not installed: it needs an older pillow")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.delenv("WANDB_MODE")
    plain = learn(tiny)
    random.seed(5), np.random.seed(5)
    drawn = random.random(), np.random.rand()
    random.seed(5), np.random.seed(5)
    options = {"package": "trackio", "project": "tests"}
    folder = tmp_path / "run"
    with testing.stop_at(14), pytest.raises(Interrupted):
        learn(tiny, {"wandb": options}, output=str(folder), tensorboard=True)
    again = clframe.resume(folder, scenario=tiny(2, shape=(1, 8, 8)), plugins=[Showing()])
    assert (random.random(), np.random.rand()) == drawn
    assert again.data == plain.data
    (name,) = SQLiteStorage.get_runs("tests")
    name = name if isinstance(name, str) else name["name"]
    assert name.startswith("run-")
    rows = SQLiteStorage.get_logs("tests", name)
    assert len({row["step"] for row in rows}) == len(rows)
    found = points([{k: v for k, v in row.items() if k != "step"} for row in rows])
    expected = curves(folder)
    assert {tag: sorted(set(found[tag])) for tag in found} == {tag: sorted(set(expected[tag])) for tag in expected}
    assert SQLiteStorage.get_run_config("tests", name)["train"]["lr"] == 0.1
    pictures = [row["showing/first"]["file_path"] for row in rows if "showing/first" in row]
    assert len(pictures) == 2
    assert all((tmp_path / "store" / "media" / path).is_file() for path in pictures)
