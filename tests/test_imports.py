"""What a process imports, as a start costs seconds, and which module may import which: the layers of the package."""

from __future__ import annotations

import ast
import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import clframe
from clframe import registry
from clframe.scenarios import sources

ROOT = Path(__file__).parent.parent
HEAVY = {"avalanche", "torchvision", "sklearn", "matplotlib", "datasets", "pyarrow", "pandas", "scipy"}
SECOND = {"plugins", "scenarios", "cli"}  # `import plugins.ewc` from the checkout would be a second module
WITHOUT_TORCH = ["the front door", "scenarios list", "plugins list"]
STEPS = {
    "the front door": "import clframe",
    "scenarios list": "assert main(['scenarios', 'list']) == 0",
    "plugins list": "assert main(['plugins', 'list']) == 0",
    "a plugin's module": "import clframe.plugins.joint",
    "what reads benchmarks of Avalanche": "clframe.from_avalanche",
    "what reads the Hugging Face Hub": "import clframe.scenarios.huggingface",
    "plugins show avalanche": "assert main(['plugins', 'show', 'avalanche']) == 0",
    "doctor": "assert main(['doctor']) == 0",
    "an npz file": "from clframe.scenarios import sources; sources.load('mnist', root)",
    "IDX files": "sources.load('fmnist', root)",
    "a scenario of digits": "from clframe.scenarios.digits import split_digits; len(split_digits()[0].train.x)",
    "a scenario of Avalanche": (
        "from clframe.scenarios.avalanche import benchmark; benchmark('PermutedMNIST', data_root=root)[1].train"
    ),
    "a run on digits": "assert main(['run', '--iterations', '2', '--quiet', '--output', str(root / 'run')]) == 0",
}
PROGRAM = """
import json, sys
from pathlib import Path
root, steps, watched = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
from clframe.cli.main import main
for name, code in steps.items():
    exec(code)
    print(json.dumps([name, sorted({*watched} & {*sys.modules})]), file=sys.stderr)
"""


def test_nothing_heavy_is_imported_that_is_not_needed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = {f"x_{part}": rng.integers(256, size=(20, 28, 28), dtype=np.uint8) for part in ("train", "test")}
    parts |= {f"y_{part}": (np.arange(20) % 10).astype(np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "mnist.npz", **parts)
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, key in zip(sources.IDX_FILES, sources.PARTS, strict=True):
        sizes = np.array(parts[key].shape, ">u4").tobytes()
        (folder / f"{name}.gz").write_bytes(
            gzip.compress(b"\0\0\x08" + bytes([parts[key].ndim]) + sizes + parts[key].tobytes())
        )
    watched = sorted(HEAVY | SECOND | {"torch"})
    call = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path), json.dumps(STEPS), json.dumps(watched)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stderr.splitlines())
    assert found == {name: [] if name in WITHOUT_TORCH else ["torch"] for name in STEPS}
    assert not SECOND & set(sys.modules)


# The layers: a map of the package, to be adapted when a module is added, moved or renamed. A module may import from its
# own layer and from each layer that arrows lead to, directly or over others. Imports inside functions count; imports
# for type checkers alone do not. Names are relative to `clframe`; `data.*` stands for all modules of a folder.

LAYERS = {
    "words": "errors events metrics curve options renamed watch system.*",
    "data": "data.*",
    "model": "backbones model networks",
    "contract": "compose config contract hooks plugin registry settings strict_yaml",
    "context": "checks context evaluate training",
    "runs": "runs.*",
    "engine": "engine",
    "deploy": "deploy.*",
    "front": "__init__ api launch testing.*",
    "experiments": "experiments.*",
    "avalanche": "avalanche.*",
    "toolkit": "toolkit.*",
    "plugins": "plugins.*",
    "scenarios": "scenarios.*",
    "cli": "__main__ cli.*",
}
ARROWS = {
    "data": "words",
    "model": "words",
    "contract": "data model",
    "context": "contract",
    "runs": "context",
    "engine": "runs",
    "deploy": "context runs",
    "front": "engine deploy avalanche",
    "experiments": "front",
    "avalanche": "context",
    "toolkit": "context",
    "plugins": "toolkit avalanche",
    "scenarios": "contract",
    "cli": "front scenarios experiments",
}
# Imports that lead up, each with its reason.
UPWARD = {
    ("api", "cli.live"),  # the progress that Python users see is that of the command line
    ("runs.results", "__init__"),  # results open their trained model through the front door
}
IMPORTS_AVALANCHE = {"avalanche.adapter"}  # in the core; the plugin and the scenarios of that name import it, too
# Texts in the core that equal the name of a plugin, but stand for something else.
HOMONYMS = {
    "api": {"joint"},  # the setting `run.joint`
    "avalanche.benchmark": {"avalanche"},  # the name of a scenario
    "experiments.budget": {"joint", "tensorboard"},  # the settings `run.joint` and `run.tensorboard`
    "experiments.cells": {"tensorboard"},  # the setting `run.tensorboard`
    "experiments.outcome": {"joint"},  # a baseline, by default
    "experiments.study": {"tensorboard"},  # the setting `run.tensorboard`
    "runs.folder": {"tensorboard"},  # a folder of a run
    "testing.fixtures": {"tensorboard"},  # the setting `run.tensorboard`
    "testing.plugin_checks": {"tensorboard"},
    "testing.scenario_checks": {"tensorboard"},
    "toolkit.warm_up": {"warm-up"},  # a phase
}

FOLDERS = {"clframe": "", "plugins": "plugins.", "scenarios": "scenarios.", "cli": "cli."}
FILES = {
    prefix + ".".join(file.relative_to(ROOT / folder).with_suffix("").parts): file
    for folder, prefix in FOLDERS.items()
    for file in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}
CORE = [name for name in FILES if not name.startswith(("plugins.", "scenarios.", "cli."))]


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield what runs as an import below `tree`, in full: `clframe.errors`, `clframe.errors.DataError`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imports(node)


def module_of(target: str) -> str | None:
    """Return the module of the package that an import names; None for other packages.

    A public name of `clframe` counts as a name of the module that defines it.
    """
    package, *parts = target.split(".")
    if package != "clframe":
        return None
    if not parts:
        return "__init__"
    if len(parts) == 1 and parts[0] in clframe._HOME_OF:
        parts = clframe._HOME_OF[parts[0]].split(".")[1:]
    candidates = (".".join(parts[:end]) + init for end in (len(parts), len(parts) - 1) for init in ("", ".__init__"))
    return next((name for name in candidates if name in FILES), None)


IMPORTED = {
    name: {module for target in imports(tree) if (module := module_of(target)) and module != name}
    for name, tree in TREES.items()
}


def layer_of(name: str) -> str:
    """Return the layer of a module, which stands in the table by its name or by its folder; "none" if it is missing."""
    homes = {key: layer for layer, keys in LAYERS.items() for key in keys.split()}
    return homes.get(name) or homes.get(name.partition(".")[0] + ".*") or "none"


def reach(layer: str) -> set[str]:
    """Return the layers that a module of `layer` may import from."""
    return {layer}.union(*(reach(below) for below in ARROWS.get(layer, "").split()))


def test_every_module_has_a_layer_and_every_name_in_the_table_a_module():
    assert [name for name in FILES if layer_of(name) == "none"] == []
    keys = " ".join(LAYERS.values()).split()
    assert len(keys) == len(set(keys))
    folders = {name.partition(".")[0] + ".*" for name in FILES}
    assert set(keys) <= {*FILES, *folders}


def test_imports_lead_down():
    found = {
        (name, target)
        for name, targets in IMPORTED.items()
        for target in targets
        if layer_of(target) not in reach(layer_of(name))
    }
    assert found == UPWARD


def test_no_modules_import_each_other_in_a_circle():
    def reached(name: str) -> set[str]:
        found: set[str] = set()
        ahead = set(IMPORTED[name])
        while ahead:
            found |= ahead
            ahead = {target for module in ahead for target in IMPORTED[module]} - found
        return found

    above = {name: reached(name) for name in FILES}
    assert sorted(name for name in FILES if name in above[name]) == []


def test_the_engine_and_what_it_stands_on_know_neither_toolkit_nor_plugins():
    assert reach("engine").isdisjoint({"toolkit", "plugins", "avalanche", "deploy", "front"})


def test_no_plugin_imports_another_plugin():
    found = {(name, target) for name, targets in IMPORTED.items() for target in targets if name.startswith("plugins.")}
    assert {pair for pair in found if pair[1].startswith("plugins.")} == set()


def test_the_core_imports_avalanche_in_one_place():
    found = {name for name in CORE if any(target.split(".")[0] == "avalanche" for target in imports(TREES[name]))}
    assert found == IMPORTS_AVALANCHE


def test_the_core_imports_and_names_no_plugin():
    """Neither as a text of its own nor between backticks, as names stand in sentences and docstrings."""
    assert [name for name in CORE if any(target.startswith("plugins.") for target in IMPORTED[name])] == []
    names = set(registry.names("plugin"))
    found = {}
    for module in CORE:
        texts = [node.value for node in ast.walk(TREES[module]) if isinstance(node, ast.Constant)]
        quoted = {word for text in texts if isinstance(text, str) for word in (text, *re.findall(r"`([\w-]+)`", text))}
        found[module] = quoted & names
    assert {module: words for module, words in found.items() if words} == HOMONYMS
