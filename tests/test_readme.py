"""README against the code: hooks, methods, scenarios, flags and settings are those that exist, and its Python runs."""

from __future__ import annotations

import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from clframe import Plugin, registry
from clframe.config import resolve
from clframe.hooks import HOOKS, Hooks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def python(containing: str) -> str:
    """The only block of Python that holds this text."""
    (found,) = (block for block in code("python") if containing in block)
    return found


def test_the_hook_table_has_every_hook_with_its_exact_signature_in_calling_order():
    rows = re.findall(r"^\| `(\w+)\(([\w, ]+)\)` \|", README, re.MULTILINE)
    expected = []
    for name in HOOKS:
        arguments = [p for p in inspect.signature(getattr(Hooks, name)).parameters if p != "self"]
        expected.append((name, ", ".join(arguments)))
    assert rows == expected


def test_every_method_is_named():
    for name in registry.names("plugin"):
        assert f"`{name}`" in README


def test_every_scenario_and_backbone_is_named():
    for name in [*registry.names("scenario"), *registry.names("model")]:
        assert f"`{name}`" in README or f"`{name}:NAME`" in README


def test_the_table_of_flags_is_that_of_the_command_line():
    import typer

    from clframe.cli.main import app

    run = vars(typer.main.get_command(app))["commands"]["run"]
    flags = {flag for p in run.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("--")} - {"--help"}
    table = README.partition("| `clframe run` | |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(--[\w-]+)", table)) == flags
    for p in run.params:
        if p.help and "--help" not in p.opts:
            assert p.help.rstrip(".") in table


def test_commands_exist():
    from typer.main import get_command

    from clframe.cli.main import app

    commands = vars(get_command(app))["commands"]
    for line in code("sh")[1].splitlines():
        words = line.split("#")[0].split()
        if words and words[0] == "clframe":
            assert words[1] in commands
            if words[1] == "run":
                sets = [b for a, b in pairwise(words) if a == "--set"]
                plugins = [b for a, b in pairwise(words) if a == "--plugin"]
                names = [b for a, b in pairwise(words) if a == "--scenario"]
                if "--config" not in words:
                    resolve(scenario=(names or [None])[0], plugins=plugins, sets=sets)


def test_the_yaml_resolves(tmp_path: Path):
    text = code("yaml")[0]
    (tmp_path / "readme.yaml").write_text(text)
    config = resolve(yaml_file=tmp_path / "readme.yaml")
    assert config.plugins["ewc"]["lambda"] == 1e5
    assert config.train.iterations == 2000
    assert yaml.safe_load(text)["scenario"]["name"] == config.scenario["name"]


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    first, in_use, plugin = (python(word) for word in ("EWC(", ".export(", "GradientNoise"))
    exec(first, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] in set("abcdef")
    exec(in_use, {})
    for line in capsys.readouterr().out.splitlines():
        assert re.fullmatch(r"(cat|dog|fox|owl) \d+% \['(\w+)', '(\w+)'\]", line)
    assert (tmp_path / "pets.pt2").is_file()
    scope: dict[str, type[Plugin]] = {}
    exec(plugin, scope)
    registry.manager([scope["GradientNoise"]()])


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
