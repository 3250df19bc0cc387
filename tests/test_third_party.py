import json
import os
import subprocess
import sys

import pytest

PACKAGE = """
import torch
from clframe import Arrays, Plugin, hookimpl, split_classes


class SGDNoise(Plugin):
    '''Gaussian noise on every gradient.

    Options:
        scale: standard deviation of the noise.
    '''

    def __init__(self, scale: float = 0.01) -> None:
        self.scale = scale

    @hookimpl
    def after_backward(self, run):
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                noise = torch.randn(parameter.shape, generator=run.rng("sgd-noise"))
                parameter.grad += self.scale * noise


def squares(*, experiences: int = 2):
    '''Four kinds of squares.'''
    y = torch.arange(4).repeat(8)
    x = torch.zeros(32, 1, 4, 4, dtype=torch.uint8)
    x.view(32, 16)[torch.arange(32), y] = 255
    return split_classes("squares", Arrays("squares", x, y, x, y, tuple("abcd")), experiences=experiences)
"""
ENTRIES = """[clframe.plugins]
sgd-noise = my_pkg:SGDNoise

[clframe.scenarios]
squares = my_pkg:squares
"""
CALL = """
import sys
from clframe.cli.main import main
code = main()
heavy = {"torchvision", "avalanche", "sklearn"}
print("imported:", sorted(heavy & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def install(folder, package, source, entries):
    """What `pip install --target folder` leaves of a package with one module."""
    module = package.replace("-", "_")
    info = folder / f"{module}-0.1.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\nSummary: A package\n")
    (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def clframe(tmp_path):
    """The command line in a process of its own, with what is installed in `packages`."""
    install(tmp_path / "packages", "my-pkg", PACKAGE, ENTRIES)

    def call(*arguments, extra=()):
        paths = [str(tmp_path / folder) for folder in ("packages", *extra)]
        return subprocess.run(
            [sys.executable, "-c", CALL, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )

    return call


def test_an_installed_package_runs_from_the_command_line(clframe, tmp_path):
    # the same process tells that a run on small data imports nothing heavy
    arguments = "run --scenario squares --plugin sgd-noise --set sgd-noise.scale=0.5 --iterations 2 --json --quiet"
    done = clframe(*arguments.split(), "--no-tensorboard", "--output", "out")
    assert (done.returncode, done.stderr) == (0, "imported: []\n")
    found = json.loads(done.stdout)
    assert (found["scenario"], found["plugins"]) == ("squares", ["sgd-noise"])
    assert [len(row) for row in found["accuracy"]["class"]] == [2, 2]
    assert "sgd-noise:\n    scale: 0.5\n" in (tmp_path / "out" / "config.yaml").read_text()


def test_it_is_listed_beside_the_built_ins_and_a_broken_package_breaks_nobody(clframe, tmp_path):
    install(tmp_path / "broken", "bad-pkg", "import nothing_of_the_kind", "[clframe.plugins]\nbad = bad_pkg:Bad\n")
    install(tmp_path / "worse", "worse-pkg", "", "not even an entry point file")
    done = clframe("plugins", "list", "--json", extra=("broken", "worse"))
    assert (done.returncode, done.stderr) == (0, "imported: []\n")
    found = {offer["name"]: offer for offer in json.loads(done.stdout)}
    assert {"ewc", "joint", "sgd-noise", "bad"} <= set(found)
    assert found["sgd-noise"]["description"] == "Gaussian noise on every gradient."
    assert (found["bad"]["package"], found["bad"]["description"]) == ("bad-pkg", "A package")
    done = clframe("run", "--plugin", "bad", extra=("broken", "worse"))
    assert done.returncode == 2
    assert done.stderr.startswith(
        "clframe: The plugin `bad` of package `bad-pkg` cannot be imported (ModuleNotFoundError: "
    )


def test_two_packages_that_offer_one_name_are_both_named(clframe, tmp_path):
    install(tmp_path / "other", "other-pkg", PACKAGE, "[clframe.plugins]\nsgd-noise = other_pkg:SGDNoise\n")
    done = clframe("plugins", "show", "sgd-noise", extra=("other",))
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "clframe: The plugin `sgd-noise` is offered by the packages `my-pkg` and `other-pkg`; uninstall one of them."
    )
