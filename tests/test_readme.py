"""README: it is short, its commands and links lead somewhere, and its Python runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import clframe
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


def test_the_picture_shows_the_figures_of_the_table():
    picture = ROOT / "docs" / "images" / "demo.svg"
    assert picture.stat().st_size < 40_000
    shown = ElementTree.parse(picture).getroot().itertext()
    labels = {text for text in shown if re.fullmatch(r"\d+\.\d", text)}
    rows = [line.split() for line in code("text")[0].splitlines() if line.startswith(("finetuning", "ewc"))]
    assert labels == {row[i] for row in rows for i in (1, -1)}  # on the first experience, and on average


def test_the_picture_is_drawn_from_two_runs(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("draw_demo", ROOT / "docs" / "draw_demo.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    scenario = {"name": "permuted-digits", "experiences": 2, "limit": 20}
    for name in ("none", "ewc"):
        plugins = [] if name == "none" else [name]
        run = {"output": str(tmp_path / name), "tensorboard": False}
        found = clframe.run(scenario, plugins=plugins, train={"iterations": 5}, run=run)
    draw.main(str(tmp_path / "none"), str(tmp_path / "ewc"), str(tmp_path / "demo.svg"))
    text = "".join(ElementTree.parse(tmp_path / "demo.svg").getroot().itertext())
    first = found.accuracy["domain"][-1][0]
    assert first is not None
    assert f"{100 * first:.1f} EWC" in text
    assert "fine-tuning" in text


def test_the_methods_by_family_are_all_there_are():
    rows = re.findall(r"^\| ([^|]+) \| (`.*?`) .*\|$", README.partition("## Methods")[2], re.MULTILINE)
    named = {name for _, cell in rows for name in re.findall(r"`([\w-]+)(?::\w+)?`", cell)}
    observers = {name for name in registry.names("plugin") if registry.plugin_class(name).observer}
    assert named == set(registry.names("plugin")) - observers
    assert f"- **{len(named - {'avalanche'})} methods that combine.**" in README


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
    assert commands == {"run", "compare", "tune", "resume", "predict", "extend", "export", "plugins", "runs"}
    for command in sorted(commands):
        assert main([command, "--help"]) == 0
    capsys.readouterr()
