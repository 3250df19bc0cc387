"""Packages of others: the example, and those that `new` writes, installed by pip and used by the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clframe import registry
from clframe.cli.main import main

pytestmark = pytest.mark.xdist_group("own-packages")  # on one worker: all look at one installation

EXAMPLE = Path(__file__).parent.parent / "examples" / "a_gem"
MODULES = ["clframe_a_gem", "clframe_my_method", "clframe_my_bars", "clframe_my_net"]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sources of four packages, and in `site` what pip makes of them, without network."""
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(EXAMPLE, folder / "a-gem", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    assert main(["plugins", "new", "my-method", "--output", str(folder / "my-method")]) == 0
    assert main(["scenarios", "new", "my-bars", "--output", str(folder / "my-bars")]) == 0
    assert main(["plugins", "new", "my-net", "--kind", "backbone", "--output", str(folder / "my-net")]) == 0
    sources = [str(folder / name) for name in ("a-gem", "my-method", "my-bars", "my-net")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--target", str(folder / "site"), *sources], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def installed(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The four packages on the path, in an empty working folder."""
    monkeypatch.syspath_prepend(packages / "site")
    monkeypatch.chdir(tmp_path)
    yield packages
    for module in MODULES:
        sys.modules.pop(module, None)


def test_the_packages_pass_their_own_tests(packages: Path):
    """All of the example; of what `new` writes one check of the contract, as the others are looked at below."""
    pytest_ = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_, "-k", "a_gem or not contract or documented", "a-gem", "my-method", "my-bars", "my-net"],
        cwd=packages,
        env={**os.environ, "PYTHONPATH": str(packages / "site"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{16 + 3 * 2} passed, {11 + 3 + 5} deselected")


@pytest.mark.parametrize(
    ("command", "passed", "not_run"),
    [
        ("plugins check my-method", 11, 1),
        ("scenarios check my-bars --set scenario.per_class=4", 4, 0),
        ("plugins check my-net --kind backbone --set model.width=4", 6, 0),
    ],
)
def test_what_new_writes_passes_the_contract(installed: Path, capsys, command: str, passed: int, not_run: int):
    assert main(command.split()) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{passed} passed, 0 failed, {not_run} not run"


def test_what_new_writes_runs_together(installed: Path, capsys):
    arguments = "--scenario my-bars --set scenario.per_class=4 --model my-net --plugin my-method --iterations 2"
    assert main(["run", *arguments.split(), "--quiet", "--json", "--output", "out"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["scenario"], found["plugins"], len(found["accuracy"]["class"])) == ("my-bars", ["my-method"], 4)


# options and composition, of the example


SHORT = ["--limit", "4", "--iterations", "2", "--quiet", "--no-tensorboard", "--output", "out"]


def test_its_options_are_shown_and_its_package_named(installed: Path, capsys):
    assert main(["plugins", "show", "a-gem", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["package"], found["hooks"]) == ("clframe-a-gem 0.1.0", ["after_backward", "after_experience"])
    assert found["keeps_training_images"] is True
    assert [(o["name"], o["type"], o["default"]) for o in found["options"]] == [
        ("size", "int >= 1", 200),
        ("batch_size", "int >= 1", 64),
    ]
    assert found["options"][0]["doc"] == "images in the memory, of all classes together."


def test_its_options_are_set_by_flag_and_yaml_and_recorded(installed: Path, capsys):
    Path("own.yaml").write_text("plugins:\n  a-gem: {size: 50, batch_size: 3}\n")
    assert main(["run", "--config", "own.yaml", "--set", "a-gem.size=40", *SHORT]) == 0
    record = yaml.safe_load(Path("out/config.yaml").read_text())
    assert record["plugins"]["a-gem"] == {"size": 40, "batch_size": 3}
    results = json.loads(Path("out/results.json").read_text())
    assert results["plugins"] == ["a-gem"]
    assert results["storage"]["a-gem"]["bytes"] > 40 * 64  # uint8 images of 8x8, and their columns
    assert main(["run", "--config", "out/config.yaml", "--quiet", "--no-tensorboard", "--output", "again"]) == 0
    assert Path("again/results.json").read_bytes() == Path("out/results.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--set a-gem.sise=3", "`a-gem.sise` is not an option of the plugin `a-gem`."),
        ("--set a-gem.size=0", "`a-gem.size` is 0: "),
        ("--set a-gem.size=5", "`a-gem.size` is 5, and there are 10 classes"),
        ("--plugin hat --setting task", "`a-gem` has nothing to do beside `hat`"),
        ("--plugin a-gem", "The plugin `a-gem` is named twice"),
    ],
)
def test_its_mistakes_are_told_as_those_of_built_ins(installed: Path, capsys, arguments: str, sentence: str):
    assert main(["run", "--plugin", "a-gem", *arguments.split(), *SHORT]) == 2
    assert sentence in capsys.readouterr().err


def test_it_runs_beside_built_ins(installed: Path, capsys):
    plugins = ["--plugin", "ewc", "--plugin", "a-gem", "--plugin", "lwf"]
    assert main(["run", *plugins, *SHORT]) == 0
    assert json.loads(Path("out/results.json").read_text())["plugins"] == ["ewc", "a-gem", "lwf"]


# what `new` refuses


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("plugins new My_Method", "`My_Method` cannot be the name of a plugin: use small letters, digits"),
        ("plugins new 3d", "`3d` cannot be the name of a plugin"),
        (
            "plugins new run",
            "A plugin cannot be called `run`, as `--set run.x=...` means something else: choose another name.",
        ),
        ("plugins new after-step", "`after_step` is the name of a hook"),
        ("plugins new none", "`none` is a word of Python"),
        ("scenarios new class", "`class` is a word of Python"),
        ("plugins new ewc", "The package `clframe` offers a plugin `ewc` already"),
        ("scenarios new split-digits", "The package `clframe` offers a scenario `split-digits` already"),
        ("plugins new mlp --kind backbone", "The package `clframe` offers a backbone `mlp` already"),
        ("plugins new a-gem", "The package `clframe-a-gem` offers a plugin `a-gem` already"),
        ("scenarios new a-gem", "package `clframe-a-gem` is installed already"),
        ("plugins new fine --output there", "there exists already"),
        ("plugins new fine --kind thing", "'thing' is not one of 'plugin', 'backbone'"),
    ],
)
def test_new_refuses(installed: Path, tmp_path: Path, capsys, command: str, sentence: str):
    (tmp_path / "there").mkdir()
    assert main(command.split()) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("kind", ["plugin", "scenario", "model"])
def test_a_name_that_is_free_can_be_used(kind: registry.Kind):
    from clframe.cli.new import find_problems

    for name in ("gradient-noise", "plugin", "experience", "x2"):
        assert find_problems(kind, name) == []


# what `check` says


def test_check_says_what_fails_and_why_and_ends_with_1(installed: Path, capsys):
    assert main(["plugins", "check", "er", "--set", "er.size=3", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    results = {check["check"]: (check["result"], check["why"]) for check in found["checks"]}
    assert results["options are documented"] == ("passed", "")
    result, why = results["it learns"]
    assert result == "failed"
    assert why.startswith("A run in the setting `class` is refused: `er.size` is 3, and there are 6 classes")
    assert results["nothing is left behind"] == ("not run", "`it learns` must pass first.")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("plugins check nonsense", "There is no plugin `nonsense`."),
        ("scenarios check nonsense", "There is no scenario `nonsense`."),
        ("plugins check nonsense --kind backbone", "There is no model `nonsense`."),
        ("plugins check ewc --set ewc.lamda=1", "`ewc.lamda` is not an option of the plugin `ewc`."),
        ("plugins check ewc --set train.lr=1", "`--set train.lr=1` changes nothing here"),
        ("plugins check ewc --model nonsense", "There is no model `nonsense`."),
        ("plugins check mlp --kind backbone --model mlp", "`--model` is of plugins; `mlp` is the backbone to check"),
    ],
)
def test_check_refuses(capsys, command: str, sentence: str):
    assert main(command.split()) == 2
    assert sentence in capsys.readouterr().err
