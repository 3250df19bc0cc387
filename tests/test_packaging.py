"""What is shipped: the wheel holds the folders, whole, under their package names; the sdist builds the same."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import clframe

pytestmark = pytest.mark.xdist_group("packaging")  # on one worker: all look at one build

ROOT = Path(__file__).parent.parent
TOP = {"clframe/plugins": "plugins", "clframe/scenarios": "scenarios", "clframe/cli": "cli"}
TEMPLATES = "clframe/experiments/templates"  # data of a package, not one
BELOW = [path.parent.name for path in sorted((ROOT / "clframe").glob("*/__init__.py"))]
FOLDERS = {"clframe": "clframe", **TOP, **{f"clframe/{name}": f"clframe/{name}" for name in BELOW}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist of a copy of the sources, built without isolation and so without network."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = files.stdout.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    for name in names:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    assert done.returncode == 0, done.stderr
    return out


def sources() -> set[str]:
    """The files of all packages, by their names within the distribution."""
    modules = {
        f"{package}/{file.name}"
        for package, folder in FOLDERS.items()
        for file in (ROOT / folder).iterdir()
        if file.suffix == ".py" or file.name == "py.typed"
    }
    return modules | {f"{TEMPLATES}/{file.name}" for file in (ROOT / TEMPLATES).iterdir()}


def test_the_wheel_holds_every_file_of_the_folders_and_no_other(built: Path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(n for n in wheel.namelist() if n.endswith("/entry_points.txt"))
        entry_points = wheel.read(metadata).decode()
    assert names == sources()
    assert {"clframe/py.typed", f"{TEMPLATES}/study.html", f"{TEMPLATES}/style.css"} <= names
    assert "ewc = clframe.plugins.ewc:EWC" in entry_points


def test_the_version_stands_in_one_place(built: Path):
    assert next(built.glob("*.whl")).name.startswith(f"clframe-{clframe.__version__}-")
    assert f'__version__ = "{clframe.__version__}"\n' in (ROOT / "clframe/__init__.py").read_text()
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()


def test_the_sdist_holds_what_the_wheel_is_built_from(built: Path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for package, folder in FOLDERS.items():
        for name in sources():
            if Path(name).parent == Path(package):
                assert f"{folder}/{Path(name).name}" in names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_folders_are_flat():
    """A package below them would be found by an editable install and be missing from the wheel."""
    for folder in FOLDERS.values():
        data = {"__pycache__", Path(TEMPLATES).name if TEMPLATES.startswith(f"{folder}/") else ""}
        below = [path.name for path in (ROOT / folder).iterdir() if path.is_dir() and path.name not in data]
        assert sorted(below) == (BELOW if folder == "clframe" else [])


def test_every_built_in_has_its_entry_point():
    import tomllib

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert {name.replace("-", "_") for name in groups["clframe.plugins"]} == {
        file.stem for file in (ROOT / "plugins").glob("*.py") if file.stem != "__init__"
    }
