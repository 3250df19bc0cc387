"""What others wrote may be anything: it runs no code, names no other files, and ends in a sentence."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clframe import DataError, UsageError
from clframe.cli import show
from clframe.cli.live import Live
from clframe.cli.main import main
from clframe.config import resolve
from clframe.data.decode import FORMATS, ImageFormat
from clframe.runs.folder import _find_commit
from clframe.scenarios import sources, table
from clframe.scenarios.folder import split_folder
from clframe.scenarios.table import split_table
from clframe.system.texts import escape_unprintable

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def git(folder: Path, *arguments: str) -> str:
    identity = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(["git", *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


# ------------------------------------------------------------------------------------ code in received content


def test_the_commit_is_recorded_and_nothing_that_a_repository_configures_is_run(tmp_path, monkeypatch):
    repository, marker = tmp_path / "repository", tmp_path / "marker"
    repository.mkdir()
    git(repository, "init", "--quiet")
    monkeypatch.chdir(repository)
    assert _find_commit() is None  # there is none yet
    (repository / "file").write_text("one")
    (repository / ".gitattributes").write_text("* filter=own")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "one")
    git(repository, "config", "core.fsmonitor", f"touch {marker};:")
    git(repository, "config", "filter.own.clean", f"touch {marker}; cat")
    (repository / "file").write_text("two")
    git(repository, "status")
    assert marker.exists()  # the trap works
    marker.unlink()
    assert _find_commit() == git(repository, "rev-parse", "HEAD")
    assert not marker.exists()
    monkeypatch.chdir(tmp_path)
    assert _find_commit() is None


def test_readers_import_nothing_of_the_current_folder(tmp_path):
    marker = tmp_path / "marker"
    for name in ("loky", "pickle", "numpy", "multiprocessing", "clframe"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    Image.new("L", (4, 4), 7).save(tmp_path / "image.png")
    code = (
        "import os, sys\nsys.path.remove('')\nfrom clframe.data.files import ImageFiles, ImageFormat\n"
        "files = ImageFiles(['image.png'], ImageFormat(4, mode='gray'), 1)\nfiles.expect([0])\n"
        "print(files._coming[0][0].result().max(), os.environ.get('PYTHONSAFEPATH'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    # `-c` puts the current folder on the path before the code can take it off: only what starts there would import
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("7 None\n", "")
    assert not marker.exists()


def test_only_the_kinds_of_images_that_are_named_are_opened(tmp_path, monkeypatch):
    (tmp_path / "photo.png").write_bytes(EPS)
    with Image.open(tmp_path / "photo.png") as image:
        assert image.format == "EPS"  # the trap works
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)
    with pytest.raises(DataError, match=r"^it is not an image of a known kind$"):
        ImageFormat(4).read(tmp_path / "photo.png")
    kinds = {"a.jpg", "a.png", "a.gif", "a.bmp", "a.webp", "a.tif", "a.ppm", "a.pgm", "a.pbm"}
    for name in kinds:
        Image.new("1" if name == "a.pbm" else "L", (4, 4)).save(tmp_path / name)
        assert ImageFormat(4).read(tmp_path / name).shape == (3, 4, 4)
    assert len(FORMATS) == 7


# ------------------------------------------------------------------------------------------------ sizes


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    head = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "large.png").write_bytes(png_of(13_000, 13_000))
    with pytest.raises(DataError, match=r"^it has 169,000,000 pixels, and 50,000,000 can be read$"):
        ImageFormat(4).read(tmp_path / "large.png")
    (tmp_path / "right.png").write_bytes(png_of(5_000, 10_000))
    with pytest.raises(DataError, match=r"truncated|broken"):  # only its pixels are missing
        ImageFormat(4).read(tmp_path / "right.png")


def test_a_jpeg_counts_as_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("clframe.data.decode.LARGEST", 1_000)
    Image.new("L", (64, 64)).save(tmp_path / "a.jpg")  # decoded as 8 x 8
    assert ImageFormat(4).read(tmp_path / "a.jpg").shape == (3, 4, 4)
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="4,096 pixels"):
        ImageFormat(4).read(tmp_path / "a.png")


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_pipes_and_devices_among_images_are_named_and_not_read(tmp_path, what):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    odd = tmp_path / "a" / "odd.png"
    if what == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"1 of the 7 images .*\n  {odd} \\(it is a {what}\\)"):
        split_folder(path=tmp_path, size=4)
    with pytest.raises(DataError, match=f"^it is a {what}$"):
        ImageFormat(4).read(odd)


def write_npz(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            file.writestr(f"{key}.npy", content)


def test_what_is_too_large_unpacked_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST", 2_000_000)
    write_npz(tmp_path / "mnist.npz", bytes(600_000))
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(DataError, match=r"mnist\.npz cannot be read \(it holds more than 2 MB, unpacked\)"):
        sources.load("mnist", tmp_path)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in sources.IDX_FILES:
        (folder / f"{name}.gz").write_bytes(gzip.compress(b"\x00\x00\x08\x01" + bytes(3_000_000)))
    (tmp_path / "mnist.npz").unlink()
    with pytest.raises(DataError, match=r"ubyte\.gz cannot be read \(it holds more than 2 MB, unpacked\)"):
        sources.load("mnist", tmp_path)


@pytest.mark.parametrize("header", [b"(" * 5_000 + b"\n", b"{'descr': '|u1', 'shape': (" + b"9" * 5_000 + b",)}\n"])
def test_a_header_that_numpy_cannot_parse_is_damage(tmp_path, header):
    write_npz(tmp_path / "mnist.npz", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(DataError, match=r"mnist\.npz cannot be read \(.*\); it is damaged"):
        sources.load("mnist", tmp_path)


def test_a_table_names_users_that_are_there(tmp_path):
    (tmp_path / "table.csv").write_text("path,label\n~nosuchuser/a.png,b\n")
    with pytest.raises(DataError, match=r"^~nosuchuser/a.png begins with `~` and names no user of this machine"):
        split_table(path=tmp_path / "table.csv")


def test_the_size_of_a_table_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "LARGEST", 100)
    (tmp_path / "table.csv").write_text("path,label\n" + "a.png,b\n" * 100)
    with pytest.raises(DataError, match="larger than 100 bytes"):
        split_table(path=tmp_path / "table.csv")


# ---------------------------------------------------------------------------------- sentences and terminals


def test_sentences_are_short_whatever_was_given():
    with pytest.raises(UsageError) as found:
        resolve(sets=[f"train.lr={'x' * 200_000}", f"scenario={'y' * 9_000}"])
    assert len(str(found.value)) < 1_000
    with pytest.raises(UsageError) as found:
        resolve(train={f"option{i}": 1 for i in range(70_000)})
    assert len(found.value.problems) == 21
    assert found.value.problems[-1] == "Nor are 69,980 more names in `train` options of `train`."
    error = DataError("\n".join("z" * 10_000 for _ in range(1_000)))
    assert len(str(error)) < 250_000
    assert str(error).endswith("\n... and 900 more.")


def test_what_a_terminal_would_act_on_is_escaped(capsys):
    name = "\x1b]0;owned\x07x\ny\u202ez\udcff\x9b"
    shown = r"\x1b]0;owned\x07x\ny\u202ez\udcff\x9b"
    assert escape_unprintable(name) == shown
    assert escape_unprintable("Größe 猫 👩‍🔬") == "Größe 猫 👩‍🔬"  # letters and emoji stay
    show.line(name)
    show.note(name)
    show.table(["image", "class"], [["a", name]])
    Live()({"kind": "message", "text": name})
    told = capsys.readouterr()
    assert told.out == f"{shown}\na\t{shown}\n"
    assert told.err == f"{shown}\n{shown}\n"
    show.document({"name": name + "\x7f"})
    document = capsys.readouterr().out
    assert json.loads(document) == {"name": name + "\x7f"}
    assert document.isascii()
    assert document.count("\n") == 3


def test_a_folder_that_is_gone_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["run", "--dry-run"]) == 3
    assert capsys.readouterr().err == (
        "clframe: The current folder cannot be used (No such file or directory): change to one that is there.\n"
    )
