"""What errors advise exists: every option, in the command that says so; every setting, with a value that it takes."""

from __future__ import annotations

import ast
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import clframe
from clframe import UsageError, registry
from clframe.cli import advice
from clframe.cli import main as cli
from clframe.cli.main import app, main
from clframe.context import Run
from clframe.options import options_of, validated
from clframe.settings import BESIDE, RunSettings, TrainSettings
from clframe.strict_yaml import parse_yaml

ROOT = Path(__file__).parent.parent
COMMANDS = advice.list_options(app)
FOREIGN = {"--verify", "--no-build-isolation", "--logdir", "--project"}  # of git, pip, TensorBoard and trackio
SETTING = re.compile(r"`([a-z][a-z-]*)\.([a-z_0-9]+)(?:=([^`{]+))?`")
OWN = {"huggingface": "huggingface:x", "torchvision": "torchvision:resnet18", "avalanche": "avalanche:SplitMNIST"}


def texts() -> Iterator[str]:
    """All texts of the program but docstrings; what is filled in stands in braces."""
    for folder in ("clframe", "cli", "plugins", "scenarios"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
            bodies = [node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body]
            docstrings = {id(first.value) for first in bodies if isinstance(first, ast.Expr)}
            parts = {id(p) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for p in node.values}
            left_out = docstrings | parts
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
                    yield node.value


TEXTS = sorted(set(texts()))


def named(sentence: str) -> list[str]:
    """The options that a sentence names, but for those of whole commands."""
    return re.findall(r"(?<![\w/.-])--[a-z]+(?:-[a-z]+)*", re.sub(r"`clframe [^`]*`", "", sentence))


def test_the_commands_and_their_options_are_found():
    assert len(COMMANDS) >= 20
    assert {"--set", "-s", "--no-tensorboard", "--help"} <= COMMANDS["run",]
    assert COMMANDS["resume",] == {"--allow-env-change", "--json", "--quiet", "-q", *advice.EVERYWHERE}
    assert "--set" in COMMANDS["scenarios", "show"]
    assert advice.find_options(app, ["scenarios", "show", "x"]) == COMMANDS["scenarios", "show"]
    assert advice.find_options(app, ["rn"]) == advice.EVERYWHERE


def test_every_option_that_a_text_names_is_one_of_a_command():
    known = {option for of in COMMANDS.values() for option in of} | FOREIGN
    assert len([text for text in TEXTS if named(text)]) > 50
    assert {option for text in TEXTS for option in named(text)} <= known


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_what_a_command_advises_it_has_or_says_which_command_has_it(words: tuple[str, ...]):
    for text in filter(named, TEXTS):
        said = advice.add_command(app, text, [*words, "x"])
        lacking = [option for option in named(text) if option not in COMMANDS[words] | FOREIGN]
        if not lacking:
            assert said == text
            continue
        assert said.startswith(text)
        added = said.removeprefix(text)
        owner = re.fullmatch(r" \((.*) (?:is an option|are options) of `clframe ([a-z ]+)`\.\)", added)
        assert owner, said
        assert re.findall(r"`(.*?)`", owner[1]) == list(dict.fromkeys(lacking))
        assert set(lacking) <= COMMANDS[tuple(owner[2].split())]


def test_whole_commands_that_are_advised_have_their_options():
    found = [command for text in TEXTS for command in re.findall(r"`clframe ([^`]*)`", text)]
    assert len(found) > 5
    for command in found:
        words = tuple(re.match(r"(?:plugins |scenarios |runs )?[a-z]+|", command)[0].split())
        if words:
            assert set(named(command)) <= COMMANDS[words], command


def known_settings() -> dict[str, dict[str, Any]]:
    """For each section and plugin its options, each with a function that takes a value or raises."""

    def of_settings(kind: Any) -> dict[str, Any]:
        beside = {"nesterov": {"momentum": 0.5}, "milestones": {"schedule": "steps"}}
        return {n: lambda value, n=n: kind(**beside.get(n, {}), **{n: value}) for n in kind.model_fields}

    def of_builder(build: Any) -> dict[str, Any]:
        def taken(value: Any, name: str) -> None:
            required = {o.name: "x" for o in options_of(build, registry.SUPPLIED) if o.name in ("path",)}
            validated(build, required | {name: value}, "x", skip=registry.SUPPLIED)

        return {o.name: lambda value, n=o.name: taken(value, n) for o in options_of(build, registry.SUPPLIED)}

    known = {"train": of_settings(TrainSettings), "run": of_settings(RunSettings)}
    for kind in ("scenario", "model"):
        known[kind] = dict.fromkeys(("name", *BESIDE[kind]), str)
        for name in registry.names(kind):
            known[kind] |= of_builder(registry.builder(kind, OWN.get(name, name)))
    known["model"]["weights"] = bool
    return known | {name: of_builder(registry.plugin_class(name)) for name in registry.names("plugin")}


def of_python(name: str) -> bool:
    """Whether plugins find `name` in what is called `run` in their hooks."""
    return hasattr(Run, name) or f" {name}: " in (Run.__doc__ or "")


def test_every_setting_that_a_text_names_exists_and_takes_the_value():
    known, found = known_settings(), 0
    for text in TEXTS:
        for section, option, value in SETTING.findall(text):
            if section in known and not (section == "run" and of_python(option)):
                found += 1
                assert option in known[section], text
                if value and not value.isupper():
                    known[section][option](parse_yaml(value, "x"))
    assert found > 40


# ------------------------------------------------------------------------- as the commands say it


def test_several_plugins_in_one_name_are_no_advice_where_one_is_shown(capsys: pytest.CaptureFixture[str]):
    assert main(["plugins", "show", "ewc,er"]) == 2
    assert "--plugin" not in capsys.readouterr().err
    assert main(["run", "--plugin", "ewc,er", "--dry-run"]) == 2
    assert capsys.readouterr().err == (
        "clframe: There is no plugin `ewc,er`. For several methods repeat `--plugin`: --plugin ewc --plugin er.\n"
    )


@pytest.mark.parametrize(
    ("error", "command", "said"),
    [
        (MemoryError(), "run", "Out of memory: a smaller `--batch-size`, `--limit` or model may fit."),
        (
            MemoryError(),
            "extend r -s x",
            "Out of memory: a smaller `--limit` may fit, or end other programs that hold ",
        ),
        (MemoryError(), "predict r x.png", "Out of memory: end other programs that hold some of it."),
        (OSError(errno.ENOSPC, ""), "run", "The disk is full: free some space, or write elsewhere with `--output`."),
        (OSError(errno.ENOSPC, ""), "resume r", "The disk is full: free some space."),
        (UsageError("Choose `--setting task`."), "run", "Choose `--setting task`.\n"),
        (
            UsageError("Choose `--setting task`."),
            "extend r -s x",
            "Choose `--setting task`. (`--setting` is an option of `clframe run`.)\n",
        ),
        (
            UsageError("Name `--data-root`, or `--set a.b=X`."),
            "resume r",
            "Name `--data-root`, or `--set a.b=X`. (`--data-root` and `--set` are options of `clframe run`.)\n",
        ),
        (
            UsageError("See runs/--setting, a--set and `clframe run --set a.b=c`."),
            "resume r",
            "`clframe run --set a.b=c`.\n",
        ),
    ],
)
def test_an_error_advises_what_its_command_has(
    error: Exception, command: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fails)
    main(command.split())
    assert said in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_locked_is_no_advice_to_resume_elsewhere(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = {"output": str(tmp_path / "r"), "tensorboard": False}
    clframe.run(tiny(), "mlp-100", train={"iterations": 1}, run=run)

    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", denied)
    with pytest.raises(clframe.DataError, match=r"cannot be written: .*; make it writable\.$"):
        clframe.resume(tmp_path / "r")
    with pytest.raises(clframe.DataError, match=r"cannot be written: .*; name another with `--output`\.$"):
        clframe.run(tiny(), "mlp-100", run={"output": str(tmp_path / "s")})
