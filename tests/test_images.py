"""Image files: how they look, and that reading them late changes nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from loky import get_reusable_executor
from PIL import Image

from clframe import ImageData
from clframe.data.decode import ImageFormat, read_files
from clframe.data.files import ImageFiles, LazyImages, concat_images, image_files
from clframe.data.listing import LeftOut
from clframe.errors import DataError, UsageError
from clframe.training import Sampler

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def halves(width: int, height: int) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def looked(image: Image.Image, path: Path, **options) -> np.ndarray:
    image.save(path)
    return ImageFormat(**options).read(path)


def test_an_image_that_is_too_wide_is_cut_off_on_both_sides(tmp_path):
    image = Image.new("RGB", (40, 10), BLACK)
    image.paste(halves(10, 10), (15, 0))
    pixels = looked(image, tmp_path / "a.png", size=10)
    assert (pixels == np.asarray(halves(10, 10)).transpose(2, 0, 1)).all()


def test_stretching_keeps_both_ends_and_padding_keeps_the_shape(tmp_path):
    image = halves(16, 8)
    stretched = looked(image, tmp_path / "a.png", size=8, crop="stretch")
    assert tuple(stretched[:, 0, 0]) == RED
    assert tuple(stretched[:, 7, 7]) == BLUE
    padded = looked(image, tmp_path / "a.png", size=8, crop="pad")
    assert not padded[:, :2].any()
    assert not padded[:, 6:].any()
    assert tuple(padded[:, 2, 0]) == RED
    assert tuple(padded[:, 5, 7]) == BLUE


def test_what_is_cut_out_after_resizing_is_the_middle(tmp_path):
    image = Image.new("RGB", (32, 32), WHITE)
    image.paste(RED, (8, 8, 24, 24))
    assert tuple(looked(image, tmp_path / "a.png", size=8)[:, 0, 0]) == WHITE
    inner = looked(image, tmp_path / "a.png", size=8, resize=20)  # the middle 12.8 pixels of 32
    assert (inner == np.array(RED)[:, None, None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_exif_data_says(tmp_path, orientation):
    rng = np.random.default_rng(0)
    upright = Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that a camera would have made
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert (ImageFormat(16).read(tmp_path / "a.png") == np.asarray(upright).transpose(2, 0, 1)).all()


def test_images_of_all_modes_become_color_or_gray(tmp_path):
    red = Image.new("RGB", (4, 4), RED)
    half = Image.new("RGBA", (4, 4), (*RED, 0))
    sixteen = Image.fromarray(np.full((4, 4), 257 * 77, dtype=np.uint16))
    cases = {
        "palette.gif": (red.quantize(4), RED),
        "one-bit.png": (Image.new("1", (4, 4), 1), WHITE),
        "grey.png": (Image.new("L", (4, 4), 9), (9, 9, 9)),
        "transparent.png": (half, WHITE),
        "grey-transparent.png": (Image.new("LA", (4, 4), (0, 0)), WHITE),
        "cmyk.tif": (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), RED),
        "sixteen.png": (sixteen, (77, 77, 77)),
    }
    for name, (image, colour) in cases.items():
        image.save(tmp_path / name)
        pixels = ImageFormat(4).read(tmp_path / name)
        assert (pixels == np.array(colour)[:, None, None]).all(), name
        grey = ImageFormat(4, mode="gray").read(tmp_path / name)
        assert grey.shape == (1, 4, 4)
        assert abs(int(grey[0, 0, 0]) - np.dot(colour, (0.299, 0.587, 0.114))) < 1, name


def test_grey_values_of_many_bits_become_8_bits_by_one_rule_for_each_kind(tmp_path):
    """Each image has its own range: the rule may not depend on the image's maximum."""
    cases = {
        "dark.png": (np.uint16, [0, 200, 255, 256], [0, 0, 0, 0]),
        "bright.png": (np.uint16, [0, 257, 5140, 65535], [0, 1, 20, 255]),
        "dark.tif": (np.uint16, [0, 200, 255, 600], [0, 0, 0, 2]),
        "whole.tif": (np.int32, [-5, 0, 2**30, 2**31 - 1], [0, 0, 128, 255]),
        "eight.tif": (np.int32, [-1, 0, 200, 255], [0, 0, 200, 255]),
        "real.tif": (np.float32, [0, 0.5, 0.2, 1], [0, 128, 51, 255]),
        "dim.tif": (np.float32, [0, 0.01, 0.02, 0.03], [0, 3, 5, 8]),
    }
    for name, (kind, values, expected) in cases.items():
        Image.fromarray(np.array(values, dtype=kind).reshape(2, 2)).save(tmp_path / name)
        assert ImageFormat(2, mode="gray").read(tmp_path / name).flatten().tolist() == expected, name


def test_a_folder_deeper_than_recursion_goes_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    depth = sys.getrecursionlimit() + 100
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    Path("x.png").write_bytes(b"")
    try:
        [found] = image_files([tmp_path])
    finally:  # pytest cannot remove so deep a folder
        os.remove("x.png")
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")
    assert found.parts[-2:] == ("d", "x.png")
    assert len(found.parts) == len(tmp_path.parts) + depth + 1


def test_a_folder_to_predict_is_read_by_the_rule_of_training(tmp_path):
    """Hidden copies and files that have no image's name are left out, and counted."""
    root = tmp_path / "new"
    for name in ("b.png", "sub/a.JPG", ".ipynb_checkpoints/b-checkpoint.png", "._b.png", "sub/notes.pdf", "clip.mpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "again").symlink_to(root / "sub")
    left = LeftOut()
    assert image_files([root], left) == [root / "b.png", root / "sub" / "a.JPG"]
    (sentence,) = left.sentences("new")
    assert re.findall(r"\((.*?)\)", sentence) == ["2: .mpg, .pdf", "2: ._b.png, .ipynb_checkpoints", "1: again"]
    assert image_files([root / "clip.mpg"]) == [root / "clip.mpg"]  # named: it is asked for
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.pdf").write_bytes(b"")
    with pytest.raises(
        DataError,
        match=r"no image in the folder .*, nor below it, but files of the kinds \.pdf; name a folder with images\.",
    ):
        image_files([other])


def test_why_a_file_is_no_image_is_said_in_a_few_words(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    halves(64, 64).save(tmp_path / "cut.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "cut.bmp").read_bytes()[:500])
    Image.new("F", (4, 4), 1.5).save(tmp_path / "real.tif")
    Image.new("F", (4, 4), float("nan")).save(tmp_path / "nan.tif")
    Image.new("I", (4, 4), 65535).save(tmp_path / "small.tif")
    for name, reason in (
        ("text.png", "not an image of a known kind"),
        ("cut.bmp", "truncated"),
        ("real.tif", "from 0 to 1.5, and 0 to 1 "),
        ("nan.tif", "not finite"),
        ("small.tif", "up to 65,535 of 2,147,483,647, which would be black"),
        ("missing.png", "No such file"),
    ):
        with pytest.raises(DataError, match=reason):
            ImageFormat(4).read(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"size": 32, "resize": 16}, "give 32 at least"), ({"crop": "pad", "resize": 99}, "needs `scenario.crop=center`")],
)
def test_a_look_that_cannot_be_is_refused(options, told):
    with pytest.raises(UsageError, match=told):
        ImageFormat(**options)


@pytest.fixture
def files(tmp_path) -> ImageFiles:
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return ImageFiles([tmp_path / f"{i}.png" for i in range(12)], ImageFormat(8), workers=2)


def test_rows_of_files_are_picked_and_joined_as_those_of_a_tensor(files):
    lazy = LazyImages([files])
    x = lazy.read()
    assert (x.shape, x.dtype) == ((12, 3, 8, 8), torch.uint8)
    assert (lazy.shape, lazy.dtype) == (x.shape, x.dtype)
    where = torch.tensor([3, 3, 11, 0])
    mask = torch.arange(12) % 3 == 1
    for pick in (lambda a: a[2:7], lambda a: a[where], lambda a: a[mask], lambda a: a.index_select(0, where)[1:]):
        assert torch.equal(pick(lazy).read(), pick(x))
    for other in (x[:2] + 1, x[:2].float() / 3):
        parts = [lazy[5:], other, lazy[where], other[:1]]
        together = concat_images(parts)
        assert isinstance(together, LazyImages)
        expected = torch.cat([p.read() if isinstance(p, LazyImages) else p for p in parts])
        assert torch.equal(together.read(), expected)
        assert (together.shape, together.dtype) == (expected.shape, expected.dtype)
        order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))
        assert torch.equal(together[order].read(), expected[order])
        twice = concat_images([together, together[1:3]])
        assert torch.equal(twice.read(), torch.cat([expected, expected[1:3]]))


@pytest.fixture
def read(monkeypatch) -> Iterator[list[str]]:
    """The names of the files that are read: in this process, so that they can be counted."""
    names: list[str] = []
    plain = ImageFormat.read
    monkeypatch.setattr(ImageFormat, "read", lambda self, path: names.append(Path(path).stem) or plain(self, path))
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr("clframe.data.files.get_reusable_executor", lambda *_, **__: pool)
        yield names


def test_image_data_in_files_reads_only_what_it_is_asked_for(files, read):
    data = ImageData(LazyImages([files]), torch.arange(12))
    some = data.rows(torch.tensor([4, 2]))
    mask = data.rows(data.y > 9)
    assert read == []
    assert torch.equal(some.y, torch.tensor([4, 2]))
    first = some.x
    assert sorted(read) == ["2", "4"]
    assert some.x is first  # kept
    assert torch.equal(mask.to("cpu").marked(2).x, LazyImages([files])[10:].read())
    assert isinstance(data.images, LazyImages)


def test_parts_are_read_ahead_and_no_file_is_read_twice(files, read):
    data = ImageData(LazyImages([files]), torch.arange(12))
    rows = list(data.parts(5))
    assert [len(part) for part in rows] == [5, 5, 2]
    x = torch.cat([part.x for part in rows])
    assert sorted(map(int, read)) == list(range(12))
    assert torch.equal(x, LazyImages([files]).read())
    assert not files._coming


def test_a_file_that_vanished_is_an_error_that_names_it_until_it_is_there_again(files):
    expected = LazyImages([files]).read()
    lost = Path(files.paths[3])
    content = lost.read_bytes()
    lost.unlink()
    files.expect(range(12))
    assert torch.equal(LazyImages([files])[:3].read(), expected[:3])
    with pytest.raises(DataError, match=r"3\.png .*before, .*: No such file"):
        LazyImages([files])[2:5].read()
    lost.write_bytes(content)
    assert torch.equal(LazyImages([files]).read(), expected)


def test_what_reads_out_of_a_larger_file_may_fail_and_is_named_when_it_is_asked_for():
    class Gone:
        def __str__(self) -> str:
            return "row 1"

        def read_bytes(self) -> bytes:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    files = ImageFiles([Gone()], ImageFormat(4))
    files.expect([0])
    with pytest.raises(DataError, match=r"^The image row 1 .*: No such file"):
        files.read([0])


def test_relative_paths_are_those_of_the_folder_that_was_the_current_one(tmp_path, monkeypatch):
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        Image.new("L", (4, 4), i).save(folder / "image.png")
        monkeypatch.chdir(folder)
        images = ImageFiles(
            ["image.png"], ImageFormat(4, mode="gray"), workers=1
        )  # whose process began in the first folder
        monkeypatch.chdir(tmp_path)
        assert images.read([0]).unique().tolist() == [i]


@pytest.mark.parametrize("lacking", ["children", "stdout", "stderr"])
def test_a_process_that_can_have_no_readers_reads_by_itself(files, read, lacking, monkeypatch):
    monkeypatch.setattr("clframe.data.files.get_reusable_executor", None)
    if lacking == "children":
        monkeypatch.setitem(vars(multiprocessing.current_process())["_config"], "daemon", True)
    else:
        monkeypatch.setattr(sys, lacking, None)
    files.expect(range(12))
    assert read == []
    assert len(LazyImages([files])[4:6].read()) == 2
    assert read == ["4", "5"]


def test_an_image_out_of_a_larger_file_is_read_by_its_bytes_and_named(tmp_path):
    picture = Image.fromarray(np.full((4, 4), 7, dtype=np.uint8))
    picture.save(tmp_path / "7.png")
    held = ("row 7", (tmp_path / "7.png").read_bytes())
    look = ImageFormat(4, mode="gray")
    assert read_files([held, str(tmp_path / "7.png")], look).tolist() == [[[[7] * 4] * 4]] * 2
    with pytest.raises(DataError, match=r"The image row 7 .*: \w+"):
        read_files([("row 7", held[1][:20])], look)


def test_a_reader_outlives_ctrl_c_and_one_that_is_killed_is_replaced(files):
    expected = LazyImages([files]).read()
    readers = [*get_reusable_executor(reuse=True)._processes.values()]
    assert readers
    assert os.getpid() not in [reader.pid for reader in readers]
    assert get_reusable_executor(reuse=True).submit(os.getenv, "OPENBLAS_NUM_THREADS").result() == "1"
    for reader in readers:
        os.kill(reader.pid, signal.SIGINT)
    assert torch.equal(LazyImages([files]).read(), expected)
    assert [*get_reusable_executor(reuse=True)._processes.values()] == readers
    files.expect(range(12))
    for reader in readers:
        os.kill(reader.pid, signal.SIGKILL)
    for _ in range(2):
        assert torch.equal(LazyImages([files]).read(), expected)


def test_a_reader_is_deaf_to_ctrl_c_from_its_first_moment_and_who_asks_is_not():
    code = (
        "from signal import SIG_BLOCK, SIGINT, pthread_sigmask\nfrom loky import get_reusable_executor\n"
        "from clframe.data.files import ImageFiles, ImageFormat\n"
        "ImageFiles(['none.png'], ImageFormat(4), 1).expect([0])\n"
        "reader = get_reusable_executor(reuse=True).submit(pthread_sigmask, SIG_BLOCK, [])\n"
        "print(SIGINT in reader.result(), SIGINT in pthread_sigmask(SIG_BLOCK, []))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True False\n", "")


def test_readers_end_with_a_process_that_is_killed():
    code = (
        "import os, time\nfrom loky import get_reusable_executor\nfrom clframe.data.decode import begin_reading\n"
        "pool = get_reusable_executor(1, timeout=300, initializer=begin_reading)\n"
        "print(pool.submit(os.getpid).result(), flush=True)\ntime.sleep(300)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert int(process.stdout.readline()) != process.pid
        process.kill()
        assert process.communicate(timeout=60) == (b"", None)  # no one is left who could write to it


def test_what_reads_alone_does_without_torch():
    code = "import sys; import clframe.data.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("length", [{"epochs": 2, "iterations": None}, {"epochs": None, "iterations": 5}])
def test_a_sampler_knows_what_comes_within_the_epoch_and_draws_nothing_for_it(length):
    def orders(look: bool) -> tuple[list[list[int]], list[list[int]]]:
        sampler = Sampler(8, 2, torch.Generator().manual_seed(1), torch.device("cpu"), **length)
        met, coming = [], []
        for where in sampler:
            met.append(where.tolist())
            coming.append(sampler.coming(3).tolist() if look else [])
        return met, coming

    met, coming = orders(look=True)
    assert met == orders(look=False)[0]
    for step, ahead in enumerate(coming):
        end = min((step // 4 + 1) * 4, len(met))
        assert ahead == [i for batch in met[step + 1 : end] for i in batch][:3]
