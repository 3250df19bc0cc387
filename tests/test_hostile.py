"""What others wrote may be anything: it runs no code, names no other files, and ends in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clframe import DataError
from clframe.folder import _commit
from clframe.look import FORMATS, Look
from clframe.scenarios.folder import split_folder

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
    assert _commit() is None  # there is none yet
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
    assert _commit() == git(repository, "rev-parse", "HEAD")
    assert not marker.exists()
    monkeypatch.chdir(tmp_path)
    assert _commit() is None


def test_readers_import_nothing_of_the_current_folder(tmp_path):
    marker = tmp_path / "marker"
    for name in ("loky", "pickle", "numpy", "multiprocessing", "clframe"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    Image.new("L", (4, 4), 7).save(tmp_path / "image.png")
    code = (
        "import os, sys\nsys.path.remove('')\nfrom clframe.images import Files, Look\n"
        "files = Files(['image.png'], Look(4, mode='grey'), 1)\nfiles.expect([0])\n"
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
    with pytest.raises(DataError, match=r"^it is no image of a known kind$"):
        Look(4).read(tmp_path / "photo.png")
    kinds = {"a.jpg", "a.png", "a.gif", "a.bmp", "a.webp", "a.tif", "a.ppm", "a.pgm", "a.pbm"}
    for name in kinds:
        Image.new("1" if name == "a.pbm" else "L", (4, 4)).save(tmp_path / name)
        assert Look(4).read(tmp_path / name).shape == (3, 4, 4)
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
        Look(4).read(tmp_path / "large.png")
    (tmp_path / "right.png").write_bytes(png_of(5_000, 10_000))
    with pytest.raises(DataError, match=r"truncated|broken"):  # only its pixels are missing
        Look(4).read(tmp_path / "right.png")


def test_a_jpeg_counts_as_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("clframe.look.LARGEST", 1_000)
    Image.new("L", (64, 64)).save(tmp_path / "a.jpg")  # decoded as 8 x 8
    assert Look(4).read(tmp_path / "a.jpg").shape == (3, 4, 4)
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="4,096 pixels"):
        Look(4).read(tmp_path / "a.png")


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
        Look(4).read(odd)
