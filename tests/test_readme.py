"""README: it is short, its commands and links lead somewhere, and its Python runs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from clframe import Plugin, Results, compose, registry
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
    texts = ["".join(element.itertext()) for element in ElementTree.parse(picture).getroot()]
    labels = {text for text in texts if re.fullmatch(r"\d+\.\d [a-z-]+", text)}
    rows = [line.split() for line in code("text")[0].splitlines()[2:6]]
    averages = {f"{mean} {method}" for method, mean, *_ in rows}
    assert {average.partition(" ")[2] for average in averages} == {"fine-tuning", "joint", "ewc", "er"}
    assert averages < labels  # the others are accuracies on experience 1
    assert len(labels) == 2 * len(averages)


def test_the_picture_is_drawn_from_a_study(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("draw_demo", ROOT / "docs" / "draw_demo.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    study = {
        "scenarios": [{"name": "permuted-digits", "experiences": 2, "limit": 20}],
        "methods": ["ewc"],
        "seeds": 2,
        "train": {"iterations": 5},
        "run": {"tensorboard": False},
    }
    (tmp_path / "asked.yaml").write_text(json.dumps(study))
    folder = tmp_path / "study"
    words = ["--config", str(tmp_path / "asked.yaml"), "--engine", "inline", "--output", str(folder)]
    assert main(["compare", *words]) == 0
    draw.main(str(folder), str(tmp_path / "demo.svg"))
    text = "".join(ElementTree.parse(tmp_path / "demo.svg").getroot().itertext())
    for method in ("fine-tuning", "ewc", "joint"):
        cells = [path for path in folder.glob(f"cells/{method}-permuted-digits-seed*") if path.is_dir()]
        last = [Results.read(cell).accuracy["domain"][-1] for cell in cells]
        assert len(last) == 2
        assert f"{50 * sum(row[0] or 0.0 for row in last):.1f} {method}" in text
        assert f"{25 * sum(value or 0.0 for row in last for value in row):.1f} {method}" in text
    assert text.count("joint") == 2


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
