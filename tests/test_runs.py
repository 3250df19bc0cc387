"""`clframe runs`: folders of runs as a table, one run, the difference of two, and the tree of what came from what."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import clframe
from clframe.cli.main import main
from clframe.config import list_defaults, list_settings, resolve
from clframe.errors import DataError
from clframe.runs.comparison import compare
from clframe.runs.folder import RunFolder
from clframe.runs.listing import arrange, find_runs, is_locked, summarize

FORMATS = Path(__file__).parent / "formats" / "1"  # run folders of an earlier clframe, one finished and one stopped
SHORT = {"iterations": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: `a`, its repeat `b`, `c` with another method and seed, and `deep/d`, which extends `a`."""
    root = tmp_path_factory.mktemp("made") / "runs"
    scenario = {"name": "split-digits", "limit": 4}
    for name, plugin, seed in (("a", "lwf", 0), ("b", "lwf", 0), ("c", "er", 1)):
        run = {"output": str(root / name), "seed": seed, "tensorboard": False, "device": "cpu"}
        clframe.run(scenario, "mlp-100", [plugin], train={**SHORT, "threads": 1}, run=run)
    clframe.extend(root / "a", scenario, run={"output": str(root / "deep" / "d"), "tensorboard": False})
    return root


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these runs in the folder `runs` of the current one; `deep/d` extends the copy of `a`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "runs")
    file = Path("runs/deep/d/config.yaml")
    file.write_text(file.read_text().replace(str(made), str(tmp_path / "runs")))
    Path("runs/deep/d/sums.json").unlink()  # it has the sum of the file before
    return Path("runs")


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run `clframe runs` with `arguments`, check the exit code, and return what it printed."""
    assert main(["runs", *arguments]) == code
    return capsys.readouterr()


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(told(capsys, *arguments, "--json")[0])


def change(folder: Path, name: str, *keys: str, to: Any) -> None:
    """Set the entry under `keys` in the JSON file `name` of `folder`, which loses its sums."""
    (folder / "sums.json").unlink(missing_ok=True)
    data = json.loads((folder / name).read_text())
    place = data
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    (folder / name).write_text(json.dumps(data))


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`on_terminal(width, *arguments)`: what `clframe runs` prints on a terminal of this width, and on stderr."""

    def show(width: int, *arguments: str) -> str:
        shown = Terminal()
        with monkeypatch.context() as patch:
            patch.setenv("COLUMNS", str(width))
            patch.setenv("TERM", "xterm")
            patch.setattr(sys, "stdout", shown)
            assert main(["runs", *arguments]) == 0
        return re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()) + capsys.readouterr().err

    return show


# list


def test_the_table_has_what_the_files_of_the_runs_say(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {line.split("\t")[0]: line.split("\t") for line in told(capsys, "list")[0].splitlines()}
    assert list(rows) == ["runs/a", "runs/b", "runs/c", "runs/deep/d"]
    assert rows["runs/c"][1:7] == ["finished", "split-digits", "class", "er", "mlp-100", "1"]
    results = json.loads(Path("runs/c/results.json").read_text())
    last = results["accuracy"]["class"][-1]
    assert rows["runs/c"][7] == f"{100 * sum(last) / len(last):.1f}"
    assert rows["runs/c"][8] == f"{100 * results['measures']['class']['forgetting']['value']:.1f}"
    seconds = sum(one["seconds"] for one in json.loads(Path("runs/c/timings.json").read_text())["experiences"])
    assert rows["runs/c"][9] == f"{seconds:.1f}"
    begun = time.localtime(Path("runs/c/config.yaml").stat().st_mtime)
    assert rows["runs/c"][10] == time.strftime("%Y-%m-%d %H:%M", begun)
    assert rows["runs/deep/d"][7] == "-"  # an extension does not measure the experiences before


def test_the_document_has_every_run_with_its_origin(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {run["run"]: run for run in document(capsys, "list")}
    assert found["runs/a"]["methods"] == ["lwf"]
    assert found["runs/a"]["experiences"] == 5
    assert found["runs/a"]["extends"] is None
    assert found["runs/deep/d"]["extends"] == str(Path("runs/a").resolve())
    measured = json.loads(Path("runs/a/results.json").read_text())["measures"]["class"]
    assert found["runs/a"]["average_accuracy"] == measured["average_accuracy"]["value"]


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        (["--reverse"], "dcba"),
        (["--sort", "seed"], "abdc"),
        (["--sort", "seed", "--reverse"], "cabd"),
        (["--sort", "methods"], "cabd"),
        (["--sort", "date"], "cabd"),
        (["--sort", "forgetting"], "cabd"),
        (["--sort", "forgetting", "--reverse"], "bacd"),  # what has no value comes last, either way
    ],
)
def test_a_column_orders_the_runs(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], order: str
) -> None:
    for i, name in enumerate(["c", "a", "b", "deep/d"]):
        os.utime(runs / name / "config.yaml", (i, i))
        if name != "deep/d":
            change(runs / name, "results.json", "measures", "class", "forgetting", "value", to=i / 10)
    assert "".join(Path(run["run"]).name for run in document(capsys, "list", *arguments)) == order


def test_a_stopped_run_says_where_and_a_running_one_that_it_runs(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FORMATS / "stopped", runs / "stopped")
    begun = runs / "begun"
    shutil.copytree(runs / "stopped", begun)
    shutil.rmtree(begun / "checkpoints")
    assert summarize(runs / "stopped").status == "stopped at experience 3 of 5"
    assert summarize(begun).status == "stopped at experience 1 of 5"
    folder = RunFolder(runs / "stopped", new=False)
    try:
        before = (runs / "stopped" / ".lock").stat()
        assert summarize(runs / "stopped").status == "running, experience 3 of 5"
        assert document(capsys, "list")[-1]["state"] == "running"
        assert "a process is working on the run" in told(capsys, "show", "runs/stopped")[0]
        after = (runs / "stopped" / ".lock").stat()
        assert (before.st_ino, before.st_size, before.st_mtime_ns) == (after.st_ino, after.st_size, after.st_mtime_ns)
    finally:
        folder.close()
    assert summarize(runs / "stopped").status == "stopped at experience 3 of 5"
    for saved in (runs / "stopped" / "checkpoints").iterdir():
        (saved / "tree.json").write_text("{}")
    assert summarize(runs / "stopped").state == "damaged"


def test_looking_at_a_lock_does_not_refuse_a_run_that_begins(runs: Path) -> None:
    """The one who looks holds a shared lock for a moment; here for longer than ever."""
    lock = os.open(runs / "a" / ".lock", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, [lock]).start()
    RunFolder(runs / "a", new=False).close()
    assert not is_locked(runs / "a")


DAMAGE: dict[str, Any] = {
    "results.json is cut": lambda run: (run / "results.json").write_text("{"),
    "results.json is edited": lambda run: (run / "results.json").write_text(
        (run / "results.json").read_text().replace("0.", "0.1", 1)
    ),
    "config.yaml is edited": lambda run: (run / "config.yaml").write_text((run / "config.yaml").read_text() + "\n"),
    "the model is gone": lambda run: (run / "model.safetensors").unlink(),
    "a figure of 400 digits": lambda run: change(
        run, "results.json", "measures", "class", "average_accuracy", "value", to=10**400
    ),
    "a figure that is none": lambda run: change(
        run, "results.json", "measures", "task", "forgetting", "value", to=float("nan")
    ),
    "notes that are no texts": lambda run: change(run, "results.json", "notes", to=[{}]),
    "seconds that are no number": lambda run: change(run, "timings.json", "experiences", to=[{"seconds": "x"}]),
    "sizes that are none": lambda run: change(run, "results.json", "storage", to=[1]),
    "a tag in the settings": lambda run: (
        (run / "sums.json").unlink(),
        (run / "config.yaml").write_text("a: !!python/object/apply:os.system [touch pwned]"),
    ),
    "another format": lambda run: change(run, "results.json", "format", to=99),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_a_row_that_says_so(runs: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    shutil.rmtree(runs / "c")
    shutil.rmtree(runs / "deep")
    DAMAGE[damage](runs / "a")
    out, err = told(capsys, "list")
    assert [line.split("\t")[1] for line in out.splitlines()] == ["damaged", "finished"]
    assert len(err.splitlines()) == 1
    assert err.startswith("runs/a")
    assert told(capsys, "show", "runs/a", code=3)[1].startswith("clframe: runs/a")
    with pytest.raises(DataError, match=r"^runs/a"):
        compare(runs / "b", runs / "a")
    assert not Path("pwned").exists()


def test_what_no_run_wrote_is_neither_followed_nor_opened_nor_made(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move("runs/b", "elsewhere")
    (runs / "link").symlink_to(Path("elsewhere").resolve())
    (runs / "loop").symlink_to(runs.resolve())
    shutil.copytree("elsewhere", runs / ".hidden")
    (runs / "site").mkdir()
    (runs / "site" / "config.yaml").write_text("title: of another program")
    (runs / "c" / ".lock").unlink()
    (runs / "c" / ".lock").symlink_to(Path("precious").resolve())
    (runs / "c" / "results.json").unlink()
    (runs / "a" / "results.json").unlink()
    os.mkfifo(runs / "a" / "results.json")
    (runs / "a" / "split.json").unlink()
    os.mkfifo(runs / "a" / "split.json")
    before = sorted(str(path) for path in Path().rglob("*"))
    rows = [line.split("\t")[:2] for line in told(capsys, "list")[0].splitlines()]
    assert rows == [
        ["runs/a", "damaged"],
        ["runs/c", "stopped at experience 5 of 5"],
        ["runs/deep/d", "finished"],
    ]
    assert sorted(str(path) for path in Path().rglob("*")) == before


def test_folders_too_deep_are_told_and_not_searched(runs: Path) -> None:
    notes: list[str] = []
    assert find_runs(runs, notes, depth=0) == []
    assert notes == ["Below runs, folders at more than 0 levels (4) are not searched."]
    assert len(find_runs(runs, depth=1)) == 3
    assert find_runs(runs / "a") == [runs / "a"]


def test_a_folder_without_runs_is_told_in_one_sentence(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    for command in ("list", "tree"):
        assert told(capsys, command, "empty") == ("", "There is no run folder in empty: `clframe run` makes one.\n")
        assert document(capsys, command, "empty") == []
        assert told(capsys, command, "nowhere", code=3)[1] == (
            "clframe: There is no folder nowhere: name one that holds run folders.\n"
        )
        assert told(capsys, command, "runs/a/config.yaml", code=3)[1] == (
            "clframe: runs/a/config.yaml is not a folder: name one that holds run folders.\n"
        )
    assert "empty is not a run folder" in told(capsys, "show", "empty", code=3)[1]
    assert "There is no folder nowhere" in told(capsys, "diff", "runs/a", "nowhere", code=3)[1]


def test_a_terminal_shows_names_as_they_are_and_the_columns_that_fit(
    runs: Path, on_terminal: Callable[..., str]
) -> None:
    Path("runs/c").rename("runs/[red]c")
    wide, narrow = on_terminal(200, "list"), on_terminal(60, "list")
    headers = "run state scenario setting methods model seed accuracy forgetting seconds date"
    assert wide.splitlines()[1].split() == headers.split()
    assert "runs/[red]c" in wide
    assert max(map(len, wide.splitlines()[:-1])) > 60
    assert narrow.splitlines()[1].split() == ["run", "state", "scenario", "methods", "accuracy"]
    *table, note = narrow.splitlines()
    assert max(map(len, table)) <= 60
    assert note == (
        "The terminal is too narrow for date, seconds, setting, model, seed, forgetting: `--json` has them."
    )
    assert "runs/[red]c" in on_terminal(100, "diff", "runs/a", "runs/[red]c")
    assert "└── runs/deep/d: extends" in on_terminal(80, "tree")


def test_lists_import_no_torch(runs: Path) -> None:
    code = (
        "import sys; from clframe.cli.main import main; codes = [main(['runs', *a.split()]) for a in sys.argv[1:]]; "
        "print(codes, 'torch' in sys.modules, file=sys.stderr)"
    )
    call = [sys.executable, "-c", code, "list", "tree", "diff runs/a runs/b"]
    done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "[0, 0, 0] False\n"


# show


def test_a_run_is_shown_by_what_differs_from_the_defaults(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "show", "runs/c")[0].splitlines()
    assert lines[:2] == ["runs/c: finished", "split-digits with er on mlp-100, seed 1"]
    start = lines.index("Settings that differ from the defaults:") + 1
    settings = yaml.safe_load(Path("runs/c/config.yaml").read_text())
    plain = resolve(scenario="split-digits", plugins=["er"]).train
    assert lines[start : lines.index("", start) - 1] == [
        "scenario.limit\t4\tnull",
        f"train.iterations\t2\t{plain.iterations}",
        f"train.batch_size\t8\t{plain.batch_size}",
        "run.seed\t1\t0",
        "run.tensorboard\tfalse\ttrue",
    ]
    assert "Accuracy in percent, class-incremental:" in lines
    assert "Next: `clframe predict runs/c IMAGES...` classifies images." in lines
    checkpoints = sorted(str(path) for path in Path("runs/c/checkpoints").iterdir())
    assert f"Checkpoints: {', '.join(checkpoints)}" in lines
    everything = told(capsys, "show", "runs/c", "--all")[0].splitlines()
    assert "er.size\t" + str(settings["plugins"]["er"]["size"]) in everything
    assert "train.lr\t" + str(settings["train"]["lr"]) in everything


def test_the_document_of_a_run_has_its_origin_and_figures(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FORMATS / "stopped", "stopped")
    found = document(capsys, "show", "runs/deep/d")
    assert found["origin"] == [{"how": "extends", "run": str(Path("runs/a").resolve()), "state": "finished"}]
    assert found["results"] == json.loads(Path("runs/deep/d/results.json").read_text())
    assert set(found["changed"]) <= set(found["settings"])
    assert document(capsys, "show", "stopped")["next"] == ["`clframe resume stopped` goes on from here."]


def test_a_file_that_is_not_what_was_written_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (runs / "a" / "predictions.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    out, err = told(capsys, "show", "runs/a", code=3)
    assert err.startswith("clframe: runs/a/predictions.safetensors is damaged: it is not what was written")
    assert "Accuracy in percent, class-incremental:" in out
    assert "Next:" not in out


def test_defaults_are_what_names_alone_give() -> None:
    for scenario, model, plugins in (("split-digits", None, ["er", "lwf"]), ("permuted-digits", "mlp-100", [])):
        config = resolve(scenario=scenario, model=model, plugins=plugins)
        settings, defaults = list_settings(config), list_defaults(config)
        assert {name: value for name, value in settings.items() if defaults.get(name) != value} == {
            "plugins": plugins,
            "scenario.name": scenario,
            **({} if model is None or defaults.get("model.name") == model else {"model.name": model}),
        }


# diff


def test_a_repeat_is_the_same_to_the_bit(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "diff", "runs/a", "runs/b")[0].splitlines()
    assert lines[:3] == ["Settings: the same", "Figures, in percent: the same", "Environment: the same"]
    assert lines[-1] == "The runs are the same to the bit: all figures, and the tensors of the models, are equal."
    found = document(capsys, "diff", "runs/a", "runs/b")
    assert (found["identical"], found["settings"], found["figures"], found["accuracy"]) == (True, [], [], [])


def test_another_model_or_figure_is_not_the_same(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "b" / "sums.json").unlink()
    shutil.copy("runs/c/model.safetensors", "runs/b/model.safetensors")
    assert told(capsys, "diff", "runs/a", "runs/b")[0].splitlines()[-1] == (
        "All figures are equal; the tensors of the models are not."
    )
    shutil.copy("runs/a/model.safetensors", "runs/b/model.safetensors")
    data = json.loads((runs / "b" / "results.json").read_text())
    data["accuracy"]["class"][1][0] += 0.25
    (runs / "b" / "results.json").write_text(json.dumps(data))
    lines = told(capsys, "diff", "runs/a", "runs/b")[0].splitlines()
    assert lines[-1] == "The runs differ in figures; the tensors of the models are equal."
    assert "Accuracy matrix in percent, class-incremental: 1 entry differs, by 25 at most" in lines
    one = document(capsys, "diff", "runs/a", "runs/b")["accuracy"]
    assert [(entry["name"], entry["difference"]) for entry in one] == [("class[2][1]", 0.25)]


def test_settings_and_figures_that_differ_are_listed_with_both_values(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(runs / "c", "environment.json", "torch", to="9.9")
    lines = told(capsys, "diff", "runs/a", "runs/c")[0].splitlines()
    assert {"plugins\tlwf\ter", "run.seed\t0\t1"} <= set(lines)
    assert not any(line.startswith(("train.lr", "run.output")) for line in lines)
    first, second = (json.loads(Path(f"runs/{name}/results.json").read_text())["measures"] for name in "ac")
    before, after = (of["class"]["learning_accuracy"]["value"] for of in (first, second))
    assert before != after
    row = f"learning accuracy, class-incremental\t{100 * before:.2f}\t{100 * after:.2f}\t{100 * (after - before):+.3g}"
    assert row in lines
    assert lines[-1] == "The runs differ."
    found = document(capsys, "diff", "runs/a", "runs/c")
    settings = {one["name"]: one for one in found["settings"]}
    assert settings["run.seed"] == {"name": "run.seed", "a": 0, "b": 1}
    assert "a" not in settings["er.size"]
    assert [one["name"] for one in found["environment"]] == ["torch"]
    figure = next(one for one in found["figures"] if one["name"] == "class.learning_accuracy")
    assert (figure["a"], figure["b"], figure["difference"]) == (before, after, after - before)


def test_figures_of_a_run_that_is_not_finished_are_not_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FORMATS / "stopped", "stopped")
    assert compare(runs / "a", Path("stopped")).identical is None
    assert told(capsys, "diff", "runs/a", "stopped")[0].splitlines()[-1] == (
        "Figures are compared of finished runs only: stopped is stopped at experience 3 of 5."
    )
    with pytest.raises(DataError, match="is not a run folder"):
        compare(runs / "a", runs)


# tree


def test_a_tree_puts_each_run_below_the_one_that_it_came_from(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, origin in (("b", "runs/deep/d"), ("c", "gone")):
        file = runs / name / "config.yaml"
        (runs / name / "sums.json").unlink()
        config = yaml.safe_load(file.read_text())
        config["model"]["start"] = origin
        file.write_text(yaml.safe_dump(config, sort_keys=False))
    lines = told(capsys, "tree")[0].splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "runs/a",
        "  runs/deep/d",
        "    runs/b",
        str(Path("gone").resolve()),
        "  runs/c",
    ]
    assert lines[1].split(": ")[1].startswith("extends, split-digits, lwf, finished")
    assert lines[2].split(": ")[1].startswith("starts from, split-digits, lwf, finished, accuracy ")
    assert lines[3].endswith(": not in runs")
    found = document(capsys, "tree")
    assert [(one["run"], one["how"], one["parent"], one["level"]) for one in found] == [
        ("runs/a", None, None, 0),
        ("runs/deep/d", "extends", "runs/a", 1),
        ("runs/b", "starts from", "runs/deep/d", 2),
        (str(Path("gone").resolve()), None, None, 0),
        ("runs/c", "starts from", str(Path("gone").resolve()), 1),
    ]


def test_runs_that_came_from_each_other_end_somewhere(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, origin in (("a", "runs/b"), ("b", "runs/a"), ("c", "runs/c"), ("deep/d", r'"a\0b"')):
        file = runs / name / "config.yaml"
        (runs / name / "sums.json").unlink(missing_ok=True)
        file.write_text(re.sub("extends: .*", lambda _: f"extends: {origin}", file.read_text()))  # noqa: B023
    branches = arrange([summarize(path) for path in find_runs(runs)])
    assert [(str(branch.path), branch.level) for branch in branches] == [
        ("a\0b", 0),
        ("runs/deep/d", 1),
        ("runs/a", 0),
        ("runs/b", 1),
        ("runs/c", 0),
    ]
    assert "a\\x00b: not in runs" in told(capsys, "tree")[0]
    assert [one["run"] for one in document(capsys, "show", "runs/a")["origin"]] == ["runs/b"]
