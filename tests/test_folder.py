"""A folder of one's own images as a scenario: with what such folders hold, without code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clframe
from clframe import Plugin, hookimpl
from clframe.cli.main import main
from clframe.data.files import ImageFiles, LazyImages
from clframe.engine import Engine
from clframe.errors import DataError, Interrupted, UsageError
from clframe.scenarios.digits import digits
from clframe.scenarios.folder import split_folder
from clframe.scenarios.streams import choose_groups

KINDS = ("png", "jpg", "gif", "bmp")
NAMES = ("dahlia", "dahlia blue", "temple", "temple blue", "0", "1", "2", "10")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """200 images of 8 classes as people have them: cuts of photographs, digits, all sizes, kinds and modes.

    One file is broken and one class is empty.
    """
    root = tmp_path_factory.mktemp("own") / "photographs"
    spec = importlib.util.find_spec("sklearn")
    folder = Path(spec.origin).parent / "datasets" / "images"
    flower, china = (Image.open(folder / f"{name}.jpg").convert("RGB") for name in ("flower", "china"))
    photos = dict(zip(NAMES[:4], (flower, mirrored(flower), china, mirrored(china)), strict=True))
    arrays = digits()
    rng = np.random.default_rng(0)
    for k, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        of_class = (arrays.y_train == k).nonzero().flatten().tolist()
        for i in range(25):
            width, height = map(int, rng.integers(20, 120, 2))
            if name in photos:
                left, top = int(rng.integers(0, 500)), int(rng.integers(0, 300))
                image = photos[name].crop((left, top, left + width, top + height))
            else:
                image = Image.fromarray(arrays.x_train[of_class[i], 0].numpy() * 15).resize((width, width))
            kind, exif = KINDS[i % 4], Image.Exif()
            if i % 5 == 0:
                image = image.convert("L")
            elif i % 5 == 1 and kind != "jpg":
                image = image.convert("RGBA")
                image.putalpha(200)
            elif i % 5 == 2 and kind != "jpg":
                image = image.convert("P")
            if kind == "jpg" and i % 3 == 0:
                exif[0x0112] = 6
            image.save(root / name / f"image {i}.{kind}", **({"exif": exif} if kind == "jpg" else {}))
    broken = root / "temple" / "image 1.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    (root / "none yet").mkdir()
    (root / "notes.txt").write_text("these are mine")
    return root


def mirrored(image: Image.Image) -> Image.Image:
    """With red and blue exchanged."""
    return Image.merge("RGB", image.split()[::-1])


@pytest.fixture
def small(tmp_path) -> Path:
    """Four classes of 10 images, 6x6 and of one colour each, in one folder."""
    root = tmp_path / "small"
    rng = np.random.default_rng(1)
    for k, name in enumerate("abcd"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(60, size=(6, 6, 3), dtype=np.uint8) + np.uint8(40 * k)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def halved(root: Path, train: int = 6) -> Path:
    """The images of `root` in its folders `train` and `test`."""
    for folder in list(root.iterdir()):
        for part in ("train", "test"):
            (root / part / folder.name).mkdir(parents=True)
        for file in folder.iterdir():
            part = "train" if int(file.stem) < train else "test"
            file.rename(root / part / folder.name / file.name)
        folder.rmdir()
    return root


def options(root: Path, **more) -> dict:
    return {"name": "split-folder", "path": str(root), "size": 8, "augment": False, **more}


def names_of(root: Path, data) -> set[str]:
    return {"/".join(Path(path).parts[-2:]) for path in paths(data)}


def paths(data) -> list[str]:
    source = data.images._sources[0]
    return [source.paths[i] for i in data.images._rows[:, 1].tolist()]


# ---------------------------------------------------------------------------------- as a person meets it


def test_a_folder_of_photographs_runs_without_code(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(photographs.parent)
    call = ["run", "-q", "--no-tensorboard", "--scenario", "split-folder", "--set", "scenario.path=photographs"]
    call += ["--epochs", "1", "--set", "scenario.size=16", "--output", str(tmp_path / "run")]
    assert main(call) == 3
    told = capsys.readouterr().err
    assert re.fullmatch(r"clframe: .*`none yet` in photographs .*`--set scenario\.skip_empty=true`.*\n", told)
    call += ["--set", "scenario.skip_empty=true"]
    assert main(call) == 3
    told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"clframe: 1 of the 200 images of photographs .*`--set scenario\.skip_broken=true`:", told[0])
    assert told[1].startswith("clframe:   photographs/temple/image 1.jpg (")
    assert len(told) == 2
    call += ["--set", "scenario.skip_broken=true"]
    assert main(call) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["class_names"] == ["0", "1", "2", "10", "dahlia", "dahlia blue", "temple", "temple blue"]
    assert results["classes"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert sum(results["test_images"]) in (39, 40)  # a fifth, and the broken one is among these or the others


def test_all_broken_files_are_listed(photographs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(photographs, root)
    (root / "none yet").rmdir()
    broken = ["0/image 3.bmp", "2/image 2.gif", "temple/image 1.jpg"]
    for name in broken:
        (root / name).write_bytes(b"GIF89a")
    with pytest.raises(DataError) as told:
        split_folder(path=root, size=8)
    lines = str(told.value).splitlines()
    assert lines[0].startswith(f"3 of the 200 images of {root} cannot be read; ")
    assert sorted(line.split(" (")[0] for line in lines[1:]) == sorted(f"  {root / name}" for name in broken)


# ------------------------------------------------------------------------------------------- the split


def test_a_fifth_of_each_class_is_drawn_for_testing_from_the_seed(small):
    def drawn(**more):
        scenario = split_folder(path=small, size=8, memory=0, experiences=4, **more)
        return [(names_of(small, e.train), names_of(small, e.test)) for e in scenario]

    first = drawn(seed=3)
    assert first == drawn(seed=3)
    assert first != drawn(seed=4)
    for (train, test), letter in zip(first, "abcd", strict=True):
        assert (len(train), len(test)) == (8, 2)
        assert train | test == {f"{letter}/{i}.png" for i in range(10)}
    assert [len(test) for _, test in drawn(test=0.5)] == [5] * 4
    assert [len(test) for _, test in drawn(test=0.99)] == [9] * 4


def test_folders_train_and_test_are_taken_as_they_are(small):
    halved(small)
    (small / "test" / "a" / "deeper").mkdir()
    (small / "test" / "a" / "9.png").rename(small / "test" / "a" / "deeper" / "9.PNG")
    scenario = split_folder(path=small, size=8, memory=0, experiences=2, order=[3, 0, 1, 2], setting="task")
    assert scenario.class_names == ("d", "a", "b", "c")
    assert [names_of(small, e.train) for e in scenario] == [
        {f"{c}/{i}.png" for c in two for i in range(6)} for two in ("da", "bc")
    ]
    assert sorted(Path(p).name for p in paths(scenario[0].test) if "/a/" in p) == ["6.png", "7.png", "8.png", "9.PNG"]


def test_an_image_is_what_its_file_shows_and_keeps_its_label_and_place(small):
    scenario = split_folder(path=small, size=6, experiences=2, seed=1)
    lazy = split_folder(path=small, size=6, experiences=2, seed=1, memory=0)
    assert scenario.checksum == lazy.checksum
    for i in range(2):
        for part in ("train", "test"):
            data, late = getattr(scenario[i], part), getattr(lazy[i], part)
            assert isinstance(data.images, torch.Tensor)
            assert isinstance(late.images, LazyImages)
            for column in ("y", "index", "task", "weight", "origin"):
                assert torch.equal(getattr(data, column), getattr(late, column))
            for path, x, y in zip(paths(late), data.x, data.y, strict=True):
                assert (x.numpy() == np.asarray(Image.open(path)).transpose(2, 0, 1)).all()
                assert scenario.class_names[y] == Path(path).parent.name
            assert torch.equal(late.x, data.x)


def test_small_faults_of_files_are_not_told(small, recwarn):
    image = Image.open(small / "a" / "0.png")
    image.save(small / "a" / "0.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0")  # nine entries, none of which follow
    (small / "a" / "0.png").unlink()
    assert len(split_folder(path=small, size=8).class_names) == 4
    assert not recwarn.list


def test_a_limit_takes_the_first_images_of_each_class_and_part(small):
    halved(small)
    scenario = split_folder(path=small, size=8, memory=0, limit=2, experiences=4)
    assert names_of(small, scenario[1].train) == {"b/0.png", "b/1.png"}
    assert names_of(small, scenario[1].test) == {"b/6.png", "b/7.png"}


def test_the_checksum_is_that_of_the_files_wherever_they_are(small, tmp_path):
    before = split_folder(path=small, size=8).checksum
    small.rename(tmp_path / "elsewhere")
    small = tmp_path / "elsewhere"
    assert split_folder(path=small, size=16, mode="gray").checksum == before
    (small / "a" / "0.png").write_bytes((small / "a" / "1.png").read_bytes())
    assert split_folder(path=small, size=8, duplicates="keep").checksum != before


@pytest.mark.parametrize(
    ("count", "asked", "found"),
    [
        (8, (None, None), (4, None)),
        (10, (None, None), (5, None)),
        (2, (None, None), (1, None)),
        (3, (None, None), (1, None)),
        (4, (None, None), (2, None)),
        (5, (None, None), (2, 3)),
        (6, (None, None), (3, None)),
        (7, (None, None), (3, 3)),
        (9, (None, None), (4, 3)),
        (12, (None, None), (5, 4)),
        (23, (None, None), (5, 7)),
        (7, (None, 2), (2, 2)),
        (3, (None, 2), (2, 2)),
        (8, (2, None), (2, None)),
        (8, (None, 2), (4, 2)),
        (8, (None, 8), (1, 8)),
    ],
)
def test_classes_are_divided_by_a_rule_where_nobody_said_how(count, asked, found):
    assert choose_groups(count, *asked) == found


def test_the_input_has_the_shape_and_norms_that_the_options_say(small):
    grey = split_folder(path=small, size=16, mode="gray")
    assert grey.input_shape == (1, 16, 16)
    assert (grey.transform.mean, grey.transform.std, grey.transform.pad) == ((0.449,), (0.226,), 2)
    plain = split_folder(path=small, size=16, normalize=False, augment=False)
    assert (plain.transform.mean, plain.transform.augments) == ((), False)


# ----------------------------------------------------------------------------------------- wrong input


def test_what_is_no_folder_of_classes_is_refused_in_one_sentence(small, tmp_path):
    one = tmp_path / "one"
    shutil.copytree(small / "a", one / "a")
    file = tmp_path / "file"
    file.write_text("")
    flat = small / "a"
    single = tmp_path / "single"
    shutil.copytree(small, single)
    for path in list((single / "b").iterdir())[1:]:
        path.unlink()
    half = tmp_path / "half"
    shutil.copytree(small, half / "train")
    above = tmp_path / "above"
    shutil.copytree(small, above / "inner")
    heic = tmp_path / "heic"
    shutil.copytree(small, heic)
    (heic / "phone").mkdir()
    (heic / "phone" / "IMG_1.HEIC").write_text("")
    for path, told in (
        (tmp_path / "nowhere", r"nowhere .* class folders"),
        (file, "is not a folder"),
        (one, "one class, `a`; .* two classes"),
        (flat, r"no class folders .* 10 images "),
        (above, r"inner .*`--set scenario\.path=FOLDER`"),
        (single, "The class `b` .* one image"),
        (half, "has a folder `train` and none `test`"),
        (heic, r"The class `phone` .* no images .*\.heic"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            split_folder(path=path, size=8)
        assert "\n" not in str(caught.value)


def test_classes_must_be_both_learnt_and_tested(small):
    halved(small)
    shutil.copytree(small / "test" / "a", small / "test" / "e")
    with pytest.raises(DataError, match=r"The class `e` in the test images .* training images"):
        split_folder(path=small, size=8)
    shutil.rmtree(small / "test" / "e")
    shutil.rmtree(small / "test" / "b")
    with pytest.raises(DataError, match=r"The class `b` in .* has no test images"):
        split_folder(path=small, size=8)


def test_a_class_all_of_whose_images_are_broken_is_named(small):
    halved(small)
    for file in (small / "train" / "c").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"The class `c` in the test images .* broken images"):
        split_folder(path=small, size=8, skip_broken=True)


def test_groups_that_do_not_divide_the_classes_are_refused(small):
    with pytest.raises(UsageError, match="4 classes of small"):
        split_folder(path=small, size=8, experiences=3)


# ------------------------------------------------------------------------------------------- streaming

TRAIN = {"epochs": 2, "batch_size": 7, "threads": 1}


def same(a: Path, b: Path) -> None:
    """Both runs have the same results and the same model, to the last bit."""
    assert (a / "results.json").read_bytes() == (b / "results.json").read_bytes()
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    first, second = (load_file(f / "predictions.safetensors") for f in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


METHODS = [
    [],
    [{"er": {"size": 8}}],
    [{"er": {"size": 8, "memory": "balanced"}}],
    [{"icarl": {"size": 8}}],
    [{"icarl": {"size": 8, "batch_size": 4}}],
    [{"ewc": {}}],
    ["joint"],
]


@pytest.mark.parametrize("plugins", METHODS, ids=str)
def test_a_run_that_reads_images_late_is_bit_equal(small, tmp_path, plugins):
    for name, memory in (("memory", 10**9), ("files", 0)):
        spec = options(small, memory=memory, augment=True, experiences=2)
        run = {"output": str(tmp_path / name), "tensorboard": False, "device": "cpu", "eval_batch_size": 3}
        clframe.run(spec, "cnn-small", plugins, train={**TRAIN, "val": 0.2}, run=run)
    same(tmp_path / "memory", tmp_path / "files")


@pytest.mark.parametrize("plugins", [[{"er": {"size": 8}}], [{"icarl": {"size": 8}}]], ids=str)
def test_a_stopped_run_that_reads_late_goes_on_to_the_same_bits(small, tmp_path, monkeypatch, plugins):
    spec = options(small, memory=0, augment=True, experiences=2)
    run = {"tensorboard": False, "device": "cpu"}
    clframe.run(spec, "cnn-small", plugins, train=TRAIN, run={**run, "output": str(tmp_path / "whole")})
    finish, steps = Engine.count_step, 0

    def stop(engine, batch):
        nonlocal steps
        steps += 1
        if steps in (2, 8):
            engine.signal = 15
        finish(engine, batch)

    monkeypatch.setattr(Engine, "count_step", stop)
    with pytest.raises(Interrupted):
        clframe.run(spec, "cnn-small", plugins, train=TRAIN, run={**run, "output": str(tmp_path / "stopped")})
    with pytest.raises(Interrupted):
        clframe.resume(tmp_path / "stopped")
    clframe.resume(tmp_path / "stopped")
    same(tmp_path / "whole", tmp_path / "stopped")


def test_training_and_evaluation_keep_no_images_that_they_read(small):
    class Watch(Plugin):
        name = "watch"

        def __init__(self) -> None:
            self.lazy: list[bool] = []
            self.waiting: list[int] = []

        @hookimpl
        def after_step(self, run, batch):
            files = run.experience.train.images._sources[0]
            self.waiting.append(len(files._coming))

        @hookimpl
        def after_eval(self, run, experience):
            self.lazy.append(isinstance(run.experience.train.images, LazyImages))

    watch = Watch()
    scenario = split_folder(path=small, size=8, memory=0, experiences=2)
    clframe.run(scenario, "cnn-small", [watch], train={"epochs": 1, "batch_size": 4}, run={"device": "cpu"})
    assert watch.lazy == [True, True]
    assert watch.waiting == [12, 8, 4, 0] * 2  # 16 images each: those of the epoch that are left, then none
    assert all(isinstance(e.test.images, LazyImages) for e in scenario)


def test_no_more_images_are_read_ahead_than_said(small, monkeypatch):
    monkeypatch.setattr("clframe.training.READ_AHEAD", 5)
    most = []
    expect = ImageFiles.expect

    def counted(self, where):
        expect(self, where)
        most.append(len(self._coming))

    monkeypatch.setattr(ImageFiles, "expect", counted)
    scenario = split_folder(path=small, size=8, memory=0, experiences=1)
    clframe.run(
        scenario, "cnn-small", train={"epochs": 1, "batch_size": 2}, run={"device": "cpu", "eval_batch_size": 2}
    )
    assert max(most) == 2 + 5


def test_a_file_that_vanishes_while_a_run_goes_on_stops_it(small, tmp_path, capsys):
    halved(small)

    class Thief(Plugin):
        name = "thief"

        @hookimpl
        def before_experience(self, run, experience):
            if experience.index == 1:
                (small / "train" / "d" / "0.png").unlink()

    with pytest.raises(DataError, match=r"The image .*d/0\.png .* before"):
        clframe.run(options(small, memory=0, experiences=2), "cnn-small", [Thief()], train=TRAIN)


# ---------------------------------------------------------------------------------- layouts, and what is left out


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("train", "val"), ("train", "valid"), ("train", "validation"), ("Train", "Test"), ("TRAIN", "TEST")),
        *(("training", "testing"), ("Training", "Validation"), ("training_set", "test_set"), ("train-data", "val")),
    ],
)
def test_folders_of_parts_are_parts_by_any_of_their_names(small, train, test):
    halved(small)
    expected = split_folder(path=small, size=8, memory=0, experiences=4)
    (small / "train").rename(small / "x1").rename(small / train)
    (small / "test").rename(small / "x2").rename(small / test)
    found = split_folder(path=small, size=8, memory=0, experiences=4)
    assert found.class_names == expected.class_names == ("a", "b", "c", "d")
    assert names_of(small, found[2].train) == {f"c/{i}.png" for i in range(6)}
    assert names_of(small, found[2].test) == {f"c/{i}.png" for i in range(6, 10)}


def test_of_test_and_validation_the_images_with_classes_are_tested_with(small):
    halved(small)
    shutil.copytree(small / "test", small / "val")
    found = split_folder(path=small, size=8)
    assert found.notes == ("The folder `val` is left out of small: `train` is learned and `test` is tested with.",)
    for folder in list((small / "test").iterdir()):  # test images without labels, as in competitions
        for file in folder.iterdir():
            file.rename(small / "test" / f"{folder.name}{file.name}")
        folder.rmdir()
    found = split_folder(path=small, size=8)
    assert found.class_names == ("a", "b", "c", "d")
    assert all(word in found.notes[0] for word in ("`test`", " small", "`train`", "`val`"))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (["train/a", "train/b", "training/a", "test/a"], "`train` and `training`"),
        (["train/a", "val/a", "valid/a"], "`val` and `valid`"),
        (["train/a", "test/a", "more"], "`more` .* `train` and `test`"),
        (["val/a", "val/b"], "`val` and none `train`; .*val "),
        (["Train/a", "Train/b"], "`Train` and none `test`; .*Train "),
        (["a/train", "a/test", "b/train", "b/test"], "training and .* test images"),
    ],
)
def test_a_layout_that_may_mean_several_things_is_refused(small, tmp_path, made, told):
    for k, place in enumerate(made):
        shutil.copytree(small / "abcd"[k % 4], tmp_path / "made" / place)
    with pytest.raises(DataError, match=told):
        split_folder(path=tmp_path / "made", size=8)


def test_classes_called_as_parts_stay_classes(small):
    """Trains beside buses: a part needs its counterpart."""
    (small / "a").rename(small / "train")
    assert split_folder(path=small, size=8).class_names == ("b", "c", "d", "train")


def test_what_a_folder_holds_beside_is_counted_and_kept_in_the_results(small, tmp_path, capsys):
    (small / "a" / ".ipynb_checkpoints").mkdir()
    shutil.copy(small / "a" / "0.png", small / "a" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (small / "b" / "._1.png").write_bytes(b"\0\5\x16\7")
    (small / "b" / "notes.pdf").write_bytes(b"%PDF-1.4")
    (small / "c" / "link").symlink_to(small / "a")
    shutil.copy(small / "a" / "0.png", small / "cover.png")
    (small / ".DS_Store").write_bytes(b"")
    (told,) = split_folder(path=small, size=8).notes
    parts = re.findall(r"([a-z]+) [^()]*\((.*?)\)", told.removeprefix("Left out of small: "))
    assert parts == [
        ("files", "1: .pdf"),
        ("hidden", "2: .ipynb_checkpoints, ._1.png"),
        ("images", "1: cover.png"),
        ("links", "1: link"),
    ]
    assert main(["scenarios", "show", "split-folder", "--set", f"scenario.path={small}"]) == 0
    assert told in capsys.readouterr().out.splitlines()
    heard = []
    results = clframe.run(options(small), "mlp", train={"epochs": 1}, listeners=[heard.append])
    assert results.data["notes"] == [told]
    assert [r["text"] for r in heard if r["kind"] == "message"] == [told]


def test_a_folder_that_cannot_be_opened_is_told(small, monkeypatch):
    (small / "a" / "locked").mkdir()
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    (note,) = split_folder(path=small, size=8).notes
    assert re.fullmatch(r"Left out of small: folders .*\(1: locked\)\.", note)


def test_images_and_classes_that_are_skipped_are_told(small):
    (small / "b" / "3.png").write_bytes(b"no image")
    (small / "e").mkdir()
    empty, broken = split_folder(path=small, size=8, skip_broken=True, skip_empty=True).notes
    assert re.fullmatch(r"The class `e` .*\(`scenario\.skip_empty`\)\.", empty)
    assert re.fullmatch(r"1 of the 40 images of small .*\(`scenario\.skip_broken`\), such as b/3\.png \(.*\)\.", broken)


def test_class_names_are_compared_in_one_unicode_form(small):
    halved(small)
    (small / "train" / "a").rename(small / "train" / "caf\u00e9")
    (small / "test" / "a").rename(small / "test" / "cafe\u0301")  # as macOS writes it
    assert split_folder(path=small, size=8).class_names == ("b", "c", "caf\u00e9", "d")
    (small / "train" / "b").rename(small / "train" / "cafe\u0301")
    with pytest.raises(DataError, match=r"Two folders .* `caf\u00e9`.* Unicode"):
        split_folder(path=small, size=8)


def test_odd_names_are_told(small):
    (small / "b").rename(small / "A")
    found = split_folder(path=small, size=8)
    (note,) = found.notes
    assert "`A`, `a`" in note
    os.rename(os.fsencode(small / "c" / "1.png"), os.fsencode(small / "c") + b"/\xff.png")
    assert split_folder(path=small, size=8).checksum != found.checksum  # read all the same
    os.rename(os.fsencode(small / "c"), os.fsencode(small) + b"/\xff")
    with pytest.raises(DataError, match=r"'.udcff'.* UTF-8"):
        split_folder(path=small, size=8)
    with pytest.raises(DataError, match="File name too long"):
        split_folder(path=small / ("x" * 300), size=8)


# ---------------------------------------------------------------------------------- the same image on both sides


def test_the_same_image_in_training_and_test_is_refused_dropped_or_kept(small):
    halved(small)
    for name in ("a/0.png", "b/1.png"):
        shutil.copy(small / "train" / name, small / "test" / f"{name[0]}/copy.png")
    shutil.copy(small / "train" / "a" / "0.png", small / "train" / "a" / "twin.png")
    told = r"2 of the 18 test images of (/.*/)?small .* train/a/0\.png and test/a/copy\.png"
    with pytest.raises(DataError, match=f"{told}.*`--set scenario.duplicates=drop`"):
        split_folder(path=small, size=8)
    kept = split_folder(path=small, size=8, memory=0, experiences=4, duplicates="keep")
    assert re.match(told, kept.notes[0])
    assert kept.notes[0].endswith("(`scenario.duplicates=keep`).")
    assert "1 of the images of" in kept.notes[1]
    assert "train/a/0.png and train/a/twin" in kept.notes[1]
    assert names_of(small, kept[0].train) == {f"a/{i}.png" for i in (*range(6), "twin")}
    for memory in (0, 10**9):
        dropped = split_folder(path=small, size=8, memory=memory, experiences=4, duplicates="drop")
        assert re.search(r": 3 training images .*\(`scenario\.duplicates=drop`\)\.$", dropped.notes[0])
        assert [len(e.train) for e in dropped] == [5, 5, 6, 6]
        assert [len(e.test) for e in dropped] == [5, 5, 4, 4]
        assert torch.equal(dropped[0].train.x, kept[0].train.x[1:6])
    assert names_of(small, split_folder(path=small, size=8, memory=0, experiences=4, duplicates="drop")[0].train) == {
        f"a/{i}.png" for i in range(1, 6)
    }


def test_an_image_that_is_tested_as_another_class_is_told_and_not_refused(small):
    """It helps no figure; of the class that it was learned as it would."""
    halved(small)
    shutil.copy(small / "train" / "a" / "0.png", small / "test" / "b" / "copy.png")
    (told,) = split_folder(path=small, size=8).notes
    assert re.search(r"train/a/0\.png and test/b/copy\.png, .*other classes\.$", told)
    assert told.startswith("1 of the 17 test images of ")
    assert ": 1 training images " in split_folder(path=small, size=8, duplicates="drop").notes[0]
    shutil.copy(small / "train" / "a" / "0.png", small / "test" / "a" / "copy.png")
    with pytest.raises(DataError, match="2 of the 18 test images"):
        split_folder(path=small, size=8)


def test_one_file_under_two_classes_is_told(small):
    shutil.copy(small / "a" / "0.png", small / "b" / "copy.png")
    told = split_folder(path=small, size=8, duplicates="keep", test=0.1).notes[-1]
    assert re.search(r"1 of them .* several classes, .*a/0\.png and b/copy\.png", told)
