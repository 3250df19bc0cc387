import errno
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import clframe
from clframe import registry
from clframe.backbones import mlp_100
from clframe.cli import main as cli
from clframe.cli.live import Live
from clframe.cli.main import main
from clframe.cli.parameters import read_whole
from clframe.engine import Engine
from clframe.errors import DataError, Interrupted, RunError, UsageError

SHORT = ["--limit", "6", "--iterations", "3", "--no-tensorboard", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLFRAME_DATA", str(tmp_path / "data"))


def command(*arguments, check=True, **more):
    """The command line in a process of its own."""
    call = [sys.executable, "-c", "import sys; from clframe.cli.main import main; sys.exit(main())", *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=check, timeout=120, **more)


def unstyled(text):
    """`text` without the control sequences of a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def records(live, n=2):
    """The records of a small run."""
    live({"kind": "start", "scenario": "split-digits", "n_experiences": n, "accuracy": {}})
    for i in range(n):
        classes = [2 * i, 2 * i + 1]
        live({"kind": "experience", "index": i, "task": i, "classes": classes, "class_names": [*map(str, classes)]})
        live({"kind": "phase", "name": "train", "steps": 30, "experience": i})
        live(
            {
                "kind": "progress",
                "experience": i,
                "phase": "train",
                "epoch": 1,
                "step": 20,
                "steps": 30,
                "total_step": 20,
                "losses": {"base": 0.25, "ewc": 0.5},
                "lr": 0.001,
                "images_per_second": 12345.6,
                "seconds_left": 3.0,
            }
        )
        live({"kind": "tick", "name": "fisher", "i": 3, "n": 7})
        live({"kind": "within", "experience": i, "epoch": 1, "reading": "class", "row": [0.5] * (i + 1)})
        row = [0.25] * i + [1.0] + [None] * (n - i - 1)
        live({"kind": "eval", "experience": i, "total_step": 30, "rows": {"class": row, "task": row}})
    live({"kind": "message", "text": "The older checkpoint [is] used."})
    live({"kind": "end", "folder": None})


# runs


def test_run_writes_a_folder_and_prints_results_to_stdout_and_progress_to_stderr(capsys):
    assert main(["run", *SHORT, "--output", "out"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "Accuracy in percent, class-incremental:"
    assert lines[1].split() == ["on", "1", "on", "2", "on", "3", "on", "4", "on", "5"]
    assert [line.split()[:2] for line in lines[2:7]] == [["after", str(i)] for i in range(1, 6)]
    found = json.loads(Path("out/results.json").read_text())
    assert lines[6].split()[2:] == [f"{100 * share:.1f}" for share in found["accuracy"]["class"][4]]
    measure = found["measures"]["class"]["average_accuracy"]["value"]
    assert re.search(rf"^average accuracy +{100 * measure:.1f} ", out, re.M)
    assert lines[-1] == "Run folder: out"
    assert err.splitlines()[0] == "experience 1 of 5: classes 0 and 1"
    assert re.match(r"experience 1 of 5 learned in \d+\.\d s: class-incremental accuracy ", err.splitlines()[1])
    assert len(err.splitlines()) == 10


def test_run_with_json_prints_one_document_and_quiet_shows_nothing_else(capsys):
    assert main(["run", *SHORT, "--output", "out", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    assert document["folder"] == "out"
    assert document["tensorboard"] is None
    found = json.loads(Path("out/results.json").read_text())
    assert {key: document[key] for key in found} == found
    assert document["timings"] == json.loads(Path("out/timings.json").read_text())


def test_a_run_folder_that_exists_is_refused_and_kept(capsys):
    Path("out").mkdir()
    Path("out/precious").write_text("x")
    assert main(["run", *SHORT, "--output", "out"]) == 2
    assert "The folder out is not empty, and is not a run folder" in capsys.readouterr().err
    Path("out/config.yaml").write_text("")
    assert main(["run", *SHORT, "--output", "out"]) == 2
    assert "clframe resume out" in capsys.readouterr().err
    assert sorted(path.name for path in Path("out").iterdir()) == ["config.yaml", "precious"]


def test_runs_get_folders_of_their_own(capsys):
    for _ in range(2):
        assert main(["run", *SHORT, "--seed", "4", "--quiet"]) == 0
    names = sorted(path.name for path in Path("runs").iterdir())
    assert len(names) == 2
    assert all(re.fullmatch(r"split-digits-finetuning-4-\d{8}-\d{6}(-2)?", name) for name in names)


def test_the_configuration_of_a_run_runs_again_to_the_same_figures(capsys):
    assert main(["run", *SHORT, "--seed", "3", "--output", "one", "--quiet"]) == 0
    assert main(["run", "--config", "one/config.yaml", "--output", "two", "--quiet"]) == 0
    assert Path("one/results.json").read_bytes() == Path("two/results.json").read_bytes()


def test_a_configuration_that_names_python_objects_is_refused_and_all_of_them_told(capsys, tiny):
    class Watcher(clframe.Plugin):
        name = "watcher"

    clframe.run(tiny(), mlp_100((1, 4, 4)), [Watcher()], run={"output": "one"})
    assert main(["run", "--config", "one/config.yaml", "--output", "two"]) == 2
    end = "of this configuration is an object of a Python program: give it again to `clframe.run` from Python."
    assert capsys.readouterr().err.splitlines() == [
        f"clframe: The scenario `tiny` {end}",
        f"clframe: The model `FeatureNet` {end}",
        f"clframe: The plugin `watcher` {end}",
    ]
    assert not Path("two").exists()


def test_whoever_may_read_the_folder_of_a_run_may_read_its_files(capsys):
    before = os.umask(0o027)
    try:
        assert main(["run", *SHORT, "--output", "out", "--quiet"]) == 0
    finally:
        os.umask(before)
    files = [path for path in Path("out").rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.name for path in files} > {"model.safetensors", "results.json", "manifest.json"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


def test_the_run_folder_names_the_processor_and_what_torch_makes_of_it(capsys):
    assert main(["run", *SHORT, "--output", "out", "--quiet"]) == 0
    found = json.loads(Path("out/environment.json").read_text())
    assert found["device"] == f"cpu: {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    cpus = Path("/proc/cpuinfo")
    assert found["processor"] in (cpus.read_text() if cpus.exists() else platform.processor() or platform.machine())


def test_a_joint_run_shows_the_one_row_that_it_has(capsys):
    assert main(["run", *SHORT, "--plugin", "joint", "--output", "out", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["after", "5"], []]
    matrix = json.loads(Path("out/results.json").read_text())["accuracy"]["class"]
    assert matrix[:4] == [[None] * 5] * 4


def test_the_command_for_the_curves_works_where_none_is_on_the_path(capsys, monkeypatch):
    arguments = [argument for argument in SHORT if argument != "--no-tensorboard"]
    monkeypatch.setenv("PATH", str(Path.cwd()))
    assert main(["run", *arguments, "--output", "my curves", "--quiet"]) == 0
    beside = Path(sys.executable).with_name("tensorboard")
    start = str(beside) if beside.exists() else f"{sys.executable} -m tensorboard.main"
    assert capsys.readouterr().out.splitlines()[-1] == f"Curves: {start} --logdir 'my curves'"
    Path("tensorboard").write_text("")
    Path("tensorboard").chmod(0o755)
    assert main(["run", *arguments, "--output", "curves", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Curves: tensorboard --logdir curves"


def test_every_flag_reaches_the_configuration(capsys):
    Path("given.yaml").write_text("train: {clip: 2}\nscenario: {first: 4}")
    arguments = "run --scenario split-digits --plugin joint --config given.yaml --set train.clip=3 --setting task"
    arguments += " --model mlp --epochs 2 --batch-size 8 --lr 0.5 --seed 9 --limit 7 --device cpu --data-root there"
    arguments += " --output folder --eval-every epoch --no-tensorboard --dry-run"
    assert main(arguments.split()) == 0
    out, err = capsys.readouterr()
    found = yaml.safe_load(out)
    assert err == ""
    assert found["scenario"] == {
        "name": "split-digits",
        "setting": "task",
        "experiences": 5,
        "first": 4,
        "order": "natural",
        "seed": None,
        "limit": 7,
    }
    assert found["model"] == {"name": "mlp", "hidden": [400, 400]}
    assert found["plugins"] == {"joint": {"form": "once", "restart": False}}
    train = {"epochs": 2, "iterations": None, "batch_size": 8, "lr": 0.5, "clip": 3.0}
    assert {key: found["train"][key] for key in train} == train
    run = {"seed": 9, "device": "cpu", "data_root": "there", "eval_every": "epoch", "tensorboard": False}
    assert {key: found["run"][key] for key in run} == run
    assert not Path("folder").exists()
    assert main([*arguments.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["output"] == "folder"
    assert main(["run", "--iterations", "6", "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["iterations"] == 6


# errors


def test_all_mistakes_of_a_command_are_told_with_exit_code_2(capsys):
    assert (
        main(["run", "--scenario", "split-digit", "--plugin", "jointt", "--set", "train.lrr=1", "--epochs", "0"]) == 2
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "clframe: There is no scenario `split-digit`. Did you mean `split-digits`?",
        "clframe: There is no plugin `jointt`. Did you mean `joint`?",
        "clframe: `train.lrr` is not an option of `train`. Did you mean `lr`?",
        "clframe: `train.epochs` is 0: it should be greater than or equal to 1.",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("rnu", ["No such command 'rnu'", "Did you mean 'run'?"]),
        ("run --scenari x", ["No such option", "--scenari", "--scenario", "See `clframe run --help`"]),
        ("run --epochs many", ["'--epochs'", "'many' is not a valid integer"]),
        ("run --epochs 2.5", ["'--epochs'", "'2.5' is not a valid integer"]),
        ("run --epochs 1e300", ["'--epochs'", "'1e300' is not a valid integer"]),
        ("run --epochs", ["--epochs"]),
        ("run extra", ["extra"]),
        ("resume", ["RUN"]),
        ("plugins shwo ewc", ["No such command 'shwo'", "Did you mean 'show'?"]),
        ("plugins list --jsno", ["--jsno", "--json"]),
    ],
)
def test_wrong_flags_and_commands_have_exit_code_2_and_one_sentence(capsys, arguments, words):
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words)


@pytest.mark.parametrize(("text", "number"), [("2e1", 20), ("5.0", 5), ("-1", -1), ("9007199254740993", 2**53 + 1)])
def test_a_whole_number_after_a_flag_is_taken_as_set_takes_it(text: str, number: int):
    assert read_whole(text) == number


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("One.", "Two."), 2, ["clframe: One.\nclframe: Two."]),
        (DataError("No data."), 3, ["clframe: No data."]),
        (RunError("The loss term `ewc` is not finite."), 1, ["`ewc`"]),
        (Interrupted("Stopped by SIGINT.", 2), 130, ["Stopped by SIGINT."]),
        (Interrupted("Stopped by SIGTERM.", 15), 143, ["Stopped by SIGTERM."]),
        (KeyboardInterrupt(), 130, ["Interrupted."]),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, ["The disk is full (runs/x)"]),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 1, ["Permission denied (runs/x)"]),
        (MemoryError(), 1, ["Out of memory"]),
        (
            ZeroDivisionError("division\nby zero"),
            70,
            ["bug of clframe", "ZeroDivisionError: division by zero", "--debug"],
        ),
    ],
)
def test_every_error_ends_as_a_sentence_and_an_exit_code(capsys, monkeypatch, error, code, words):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(cli, "_make_folder", fails)
    assert main(["run"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert all(word in err for word in words)
    assert "Traceback" not in err
    assert main(["run", "--debug"]) == code
    if not isinstance(error, KeyboardInterrupt):
        assert "Traceback" in capsys.readouterr().err


def test_a_missing_data_set_is_exit_code_3_and_a_missing_run_too(capsys):
    assert main(["resume", "nowhere"]) == 3
    assert "nowhere" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error():
    call = f"{sys.executable} -c 'import sys; from clframe.cli.main import main; sys.exit(main())' plugins list"
    bash = ["bash", "-c", f"set -o pipefail; {call} --json | head -1"]
    done = subprocess.run(bash, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")
    read, write = os.pipe()
    os.close(read)
    call = [sys.executable, "-c", "import sys; from clframe.cli.main import main; sys.exit(main())"]
    done = subprocess.run([*call, "scenarios", "list"], stdout=write, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


# looking


@pytest.mark.parametrize(("kind", "group"), [("plugin", "plugins"), ("scenario", "scenarios")])
def test_lists(capsys, kind, group):
    assert main([group, "list"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == registry.names(kind)
    assert all(len(line) == 3 and line[1] for line in lines)
    assert main([group, "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [[offer["name"], offer["package"], offer["description"]] for offer in found] == lines
    assert main(["--debug", group, "list"]) == 0


def test_plugins_show(capsys):
    assert main(["plugins", "show", "joint"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("joint: Joint training")
    assert any(line.startswith("When to use: As the upper bound") for line in lines)
    assert "Keeps: All training images." in lines
    assert "Family: baseline" in lines
    assert any(line.startswith("form\tonce | cumulative\tonce\t`once` trains once") for line in lines)
    assert "Hooks: before_experience, extra_data, phases" in lines
    assert "Settings: class, task, domain" in lines
    assert "State: initial" in lines
    assert main(["plugins", "show", "joint", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hooks"] == ["before_experience", "extra_data", "phases"]
    assert (found["family"], found["keeps"]) == ("baseline", "All training images.")
    assert found["options"][0] | {"doc": ""} == {
        "name": "form",
        "type": "once | cumulative",
        "default": "once",
        "doc": "",
    }
    assert found["keeps_training_images"] is True
    assert main(["plugins", "show", "jiont"]) == 2
    assert "Did you mean `joint`?" in capsys.readouterr().err


def test_scenarios_show(capsys):
    assert main(["scenarios", "show", "split-digits"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("experiences\tint >= 1\t5\t") for line in lines)
    assert "Model that suits it: mlp-100" in lines
    assert lines[-6:] == ["Experiences: 5", "  1: 0, 1", "  2: 2, 3", "  3: 4, 5", "  4: 6, 7", "  5: 8, 9"]
    assert main(["scenarios", "show", "split-digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["train"]["iterations"], found["setting"]) == ("mlp-100", 300, "class")
    assert found["experiences"][1] == ["2", "3"]
    assert found["missing"] is None


def test_scenarios_show_without_data_says_what_is_missing_and_downloads_nothing(capsys, tmp_path):
    assert main(["scenarios", "show", "split-mnist"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Experiences: not known here. ")
    assert str(tmp_path / "data" / "mnist.npz") in last
    assert not (tmp_path / "data").exists()


def test_doctor(capsys, tmp_path, monkeypatch):
    version = importlib.metadata.version

    def without(package):
        if package == "datasets":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar10.npz").write_bytes(b"")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["clframe"] == clframe.__version__
    assert found["versions"]["torch"]
    assert found["versions"]["datasets"] is None
    assert found["free_bytes"]["data"] > 0
    assert found["data"]["cifar10"] == str(tmp_path / "data" / "cifar10.npz")
    assert found["data"]["mnist"] is None
    assert {"kind": "plugin", "name": "joint", "package": "clframe", "problem": None} in found["offers"]
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "\ndatasets\tnot here; pip install 'clframe[huggingface]' brings it\n" in out
    assert "mnist\tnot here; downloaded when a run needs it" in out
    assert re.search(r"^torch\t\d", out, re.M)


def test_tables_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["scenarios", "list"]) == 0
    lines = unstyled(capsys.readouterr().out).splitlines()
    assert lines[1].split() == ["name", "package", "description"]
    assert any(line.startswith(" split-digits ") or line.startswith("split-digits ") for line in lines)


def test_help_version_and_no_arguments(capsys):
    assert main(["plugins"]) == 0
    assert capsys.readouterr().out.startswith("Usage: clframe plugins [OPTIONS] COMMAND")
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert out.startswith("Usage: clframe [OPTIONS] COMMAND")
        assert all(f"\n  {name} " in out for name in ("run", "resume", "doctor", "plugins", "scenarios"))
    assert main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(
        f"--{name} " in out for name in ("scenario", "plugin", "config", "set", "setting", "eval-every", "limit")
    )
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"clframe {clframe.__version__}\n"


def test_completion_of_commands_and_names():
    def completed(line, word):
        environment = {
            **os.environ,
            "_CLFRAME_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - (1 if word else 0)),
        }
        return command(env=environment, check=False).stdout.split()

    assert {"run", "resume"} <= set(completed("clframe ", ""))
    assert completed("clframe run --scenario split-d", "split-d") == ["split-digits"]
    assert completed("clframe run --plugin jo", "jo") == ["joint"]
    assert set(completed("clframe run --model mlp", "mlp")) == {"mlp", "mlp-100"}


# what is imported (benchmarks/start_cost.py has the time)


@pytest.mark.parametrize("arguments", [["--help"], ["plugins", "list"], ["scenarios", "list"], ["--version"]])
def test_looking_around_imports_no_torch(arguments):
    code = (
        "import sys; from clframe.cli.main import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'torchvision', 'avalanche', 'pydantic'} & set(sys.modules)), file=sys.stderr)"
    )
    call = [sys.executable, "-c", code, *arguments]
    assert subprocess.run(call, capture_output=True, text=True, check=True, timeout=60).stderr == "[]\n"


# the live display


@pytest.mark.parametrize(
    ("classes", "names", "told"),
    [
        ([4], ["cat"], "class cat"),
        ([0, 1], ["cat", "dog"], "classes cat and dog"),
        ([2, 3, 4], ["2", "3", "4"], "classes 2 to 4"),
        ([7, 2, 4], ["7", "2", "4"], "classes 7, 2 and 4"),
        ([0, 1, 2], ["1", "2", "3"], "classes 1, 2 and 3"),
        ([*range(9)], [*"abcdefghi"], "9 classes: a, b, c, d, e, f, ..."),
    ],
)
def test_an_experience_is_told_by_the_names_of_its_classes(classes, names, told, capsys):
    with Live() as live:
        live({"kind": "start", "scenario": "photos", "n_experiences": 2, "accuracy": {}})
        live({"kind": "experience", "index": 0, "task": 0, "classes": classes, "class_names": names})
    assert capsys.readouterr().err == f"experience 1 of 2: {told}\n"


def test_in_a_pipe_each_experience_and_evaluation_is_a_line(capsys):
    with Live() as live:
        records(live)
    out, err = capsys.readouterr()
    assert out == ""
    lines = [re.sub(r"in \d+\.\d s", "in T", line) for line in err.splitlines()]
    assert lines == [
        "experience 1 of 2: classes 0 and 1",
        "experience 1 of 2, epoch 2: class-incremental accuracy 50.0 % (50.0)",
        "experience 1 of 2 learned in T: class-incremental accuracy 100.0 % (100.0); "
        "task-incremental accuracy 100.0 % (100.0)",
        "experience 2 of 2: classes 2 and 3",
        "experience 2 of 2, epoch 2: class-incremental accuracy 50.0 % (50.0 50.0)",
        "experience 2 of 2 learned in T: class-incremental accuracy 62.5 % (25.0 100.0); "
        "task-incremental accuracy 62.5 % (25.0 100.0)",
        "The older checkpoint [is] used.",
    ]


def test_quiet_shows_messages_only(capsys):
    with Live(quiet=True) as live:
        records(live)
    assert capsys.readouterr().err == "The older checkpoint [is] used.\n"


def test_on_a_terminal_a_table_shows_the_course(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("clframe.cli.live.REDRAW", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    with Live() as live:
        records(live)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Starting: torch and the data are being loaded" in err
    assert "split-digits: experience 1 of 2  epoch 2  step 20 of 30  12,346 images/s  " in err
    assert "loss: base 0.25, ewc 0.5; learning rate 0.001" in err
    assert "fisher: 3 of 7" in err
    assert "\x1b[3" not in err  # no colours
    assert re.search(r"class-incremental, % +on 1 +on 2 +mean", unstyled(err))
    assert re.search(r"after 2 +25\.0 +100\.0 +62\.5", unstyled(err))


def test_a_refused_run_leaves_nothing_of_the_table_on_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["run", "--plugin", "ewcc"]) == 2
    err = capsys.readouterr().err
    assert err.index("Starting") < err.rindex("\x1b[2K") < err.index("clframe: There is no plugin `ewcc`.")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(capsys, monkeypatch, number, code):
    original = Engine.count_step

    def count_step(engine, batch):
        if engine.run.total_steps == 1:
            signal.raise_signal(number)
        original(engine, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "count_step", count_step)
        assert main(["run", *SHORT, "--output", "out"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert f"Stopped by {number.name} in experience 1 of 5; `clframe resume out` goes on from here." in err
    assert main(["run", *SHORT, "--output", "whole"]) == 0
    assert main(["resume", "out"]) == 0
    assert Path("out/results.json").read_bytes() == Path("whole/results.json").read_bytes()
    assert main(["resume", "out"]) == 3
    assert "is finished" in capsys.readouterr().err


def test_several_plugins_in_one_option_are_told_to_repeat_it(capsys):
    assert main(["run", "--plugin", "ewc", "er"]) == 2
    assert "for several methods repeat `--plugin`." in capsys.readouterr().err
    assert main(["run", "--plugin", "ewc,er"]) == 2
    assert "--plugin ewc --plugin er." in capsys.readouterr().err


def test_the_table_shows_epochs_and_marks_what_it_leaves_out(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with Live() as live:
        live({"kind": "start", "scenario": "s", "n_experiences": 5, "accuracy": {"class": [[0.5] * 5]}})
        live({"kind": "experience", "index": 1, "task": 1, "classes": [2, 3], "class_names": ["2", "3"]})
        live({"kind": "within", "experience": 1, "epoch": 2, "reading": "class", "row": [0.25, 0.75, None, None, None]})
        narrow = live._draw_accuracy("class")
        assert [column.header for column in narrow.columns][1:] == ["...", "on 3", "on 4", "on 5", "mean"]
        assert list(narrow.columns[0].cells)[-1] == "2, epoch 3"
        assert list(narrow.columns[-1].cells)[-1] == "50.0"
        monkeypatch.setenv("COLUMNS", "120")
        live.console._width = 120
        wide = live._draw_accuracy("class")
        assert [column.header for column in wide.columns][1:] == ["on 1", "on 2", "on 3", "on 4", "on 5", "mean"]
        live({"kind": "eval", "experience": 1, "total_step": 9, "rows": {"class": [0.25, 0.75, None, None, None]}})
        assert list(live._draw_accuracy("class").columns[0].cells) == ["after 1", "after 2"]


@pytest.mark.parametrize(("progress", "shown"), [(None, False), (False, False), (True, True)])
def test_a_run_from_python_shows_its_course_if_asked_or_seen(progress, shown, capsys, tiny):
    results = clframe.run(tiny(), "mlp-100", train={"epochs": 1}, progress=progress)
    assert ("experience 2 of 3" in capsys.readouterr().err) is shown
    printed = str(results)
    assert printed.startswith("tiny with no method, seed 0")
    assert "Accuracy in percent, class-incremental:" in printed
    assert f"after 3  {100 * results.accuracy['class'][2][0]:.1f}".split() == printed.splitlines()[6].split()[:3]
    assert len(printed) < 2000
    assert repr(results) == "<Results of tiny with no method, seed 0>"


def test_a_run_from_python_shows_its_course_on_a_terminal_by_itself(monkeypatch, capsys, tiny):
    monkeypatch.setattr("clframe.api._in_notebook", lambda: True)
    clframe.run(tiny(), "mlp-100", train={"epochs": 1})
    assert "experience 2 of 3" in capsys.readouterr().err
