import json
import sys
from types import SimpleNamespace

import pytest

from clframe.cli.main import main

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


def install(folder, package, source, entries):
    """What `pip install --target folder` leaves of a package with one module."""
    module = package.replace("-", "_")
    info = folder / f"{module}-0.1.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\nSummary: A package\n")
    (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def clframe(tmp_path, monkeypatch, capsys):
    """The command line, with what is installed in `packages`: exit code, stdout and stderr."""
    install(tmp_path / "packages", "my-pkg", PACKAGE, ENTRIES)
    monkeypatch.chdir(tmp_path)

    def call(*arguments, extra=()):
        capsys.readouterr()
        with monkeypatch.context() as patched:
            for folder in ("packages", *extra):
                patched.syspath_prepend(tmp_path / folder)
            code = main([*arguments])
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    yield call
    for module in ("my_pkg", "other_pkg", "bad_pkg"):
        sys.modules.pop(module, None)


def test_an_installed_package_runs_from_the_command_line(clframe, tmp_path):
    arguments = "run --scenario squares --plugin sgd-noise --set sgd-noise.scale=0.5 --iterations 2 --json --quiet"
    done = clframe(*arguments.split(), "--no-tensorboard", "--output", "out")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert (found["scenario"], found["plugins"]) == ("squares", ["sgd-noise"])
    assert [len(row) for row in found["accuracy"]["class"]] == [2, 2]
    assert "sgd-noise:\n    scale: 0.5\n" in (tmp_path / "out" / "config.yaml").read_text()


def test_it_is_listed_beside_the_built_ins_and_a_broken_package_breaks_nobody(clframe, tmp_path):
    install(tmp_path / "broken", "bad-pkg", "import nothing_of_the_kind", "[clframe.plugins]\nbad = bad_pkg:Bad\n")
    install(tmp_path / "worse", "worse-pkg", "", "not even an entry point file")
    done = clframe("plugins", "list", "--json", extra=("broken", "worse"))
    assert (done.code, done.err) == (0, "")
    found = {offer["name"]: offer for offer in json.loads(done.out)}
    assert {"ewc", "joint", "sgd-noise", "bad"} <= set(found)
    assert found["sgd-noise"]["description"] == "Gaussian noise on every gradient."
    assert (found["bad"]["package"], found["bad"]["description"]) == ("bad-pkg", "A package")
    done = clframe("run", "--plugin", "bad", extra=("broken", "worse"))
    assert done.code == 2
    assert done.err.startswith(
        "clframe: The plugin `bad` of package `bad-pkg` cannot be imported (ModuleNotFoundError: "
    )


def test_two_packages_that_offer_one_name_are_both_named(clframe, tmp_path):
    install(tmp_path / "other", "other-pkg", PACKAGE, "[clframe.plugins]\nsgd-noise = other_pkg:SGDNoise\n")
    done = clframe("plugins", "show", "sgd-noise", extra=("other",))
    assert done.code == 2
    assert done.err.splitlines()[0] == (
        "clframe: The plugin `sgd-noise` is offered by the packages `my-pkg` and `other-pkg`; uninstall one of them."
    )
