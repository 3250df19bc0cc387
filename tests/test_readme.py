"""README: it is short, its commands and links lead somewhere, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clframe import Plugin, compose, registry
from clframe.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_first_two_commands_are_the_demo_and_the_tests():
    first, second = code("sh")[0].splitlines()
    assert first.startswith("make demo ")
    assert second.startswith("make test ")


def test_it_is_short():
    assert len(README.splitlines()) <= 180
    assert len(README.encode()) <= 10_000


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_the_methods_by_family_are_all_there_are():
    rows = re.findall(r"^\| ([^|]+) \| (`.*?`) .*\|$", README.partition("## Methods")[2], re.MULTILINE)
    named = {name for _, cell in rows for name in re.findall(r"`([\w-]+)(?::\w+)?`", cell)}
    observers = {name for name in registry.names("plugin") if registry.plugin_class(name).observer}
    assert named == set(registry.names("plugin")) - observers


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    use, plugin = code("python")
    assert "run={" in use
    exec(use.replace("run={", 'train={"iterations": 30}, run={'), {})  # a tenth of its steps
    assert 0.3 < float(capsys.readouterr().out) <= 1
    scope: dict[str, type[Plugin]] = {}
    exec(plugin, scope)
    compose.manager([scope["GradientNoise"]()])


def test_commands_exist(capsys: pytest.CaptureFixture[str]):
    lines = [line.partition("#")[0].split() for block in code("sh") for line in block.splitlines()]
    commands = {words[1] for words in lines if words and words[0] == "clframe"}
    assert commands == {"run", "resume", "predict", "extend", "export", "plugins"}
    for command in sorted(commands):
        assert main([command, "--help"]) == 0
    capsys.readouterr()
