"""Data sets in the Hugging Face Hub's layout as a scenario. Nothing is asked of the Hub."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clframe
from clframe.cli.main import main
from clframe.data.files import LazyImages
from clframe.errors import DataError, UsageError
from clframe.scenarios.folder import split_folder
from clframe.scenarios.huggingface import huggingface

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NAMES = ("cat", "ant", "dog", "bee")  # not sorted: the numbers of a ClassLabel have an order of their own
SMALL = {"size": 8, "augment": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")


def png(value: int, size: tuple[int, int] = (6, 9)) -> bytes:
    """An image that no other value gives."""
    pixels = np.random.default_rng(value).integers(256, size=(*size, 3), dtype=np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def rows(per_class: int = 6, classes: int = 4, start: int = 0) -> list[tuple[bytes, int]]:
    return [(png(start + 100 * k + i), k) for k in range(classes) for i in range(per_class)]


def write(path: Path, given, names=NAMES, **more) -> Path:
    """A Parquet file as the Hub has them, of images and labels; `names` None: the labels as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "img": [{"bytes": content, "path": f"{i}.png"} for i, (content, _) in enumerate(given)],
        "label": [label for _, label in given],
    }
    plain = datasets.Value("string" if isinstance(columns["label"][0], str) else "int64")
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(names)) if names else plain}
    features |= {name: feature for name, (feature, _) in more.items()}
    columns |= {name: values for name, (_, values) in more.items()}
    schema = datasets.Features(features).arrow_schema
    parquet.write_table(pyarrow.table(columns, schema=schema), path)
    return path


def folder_of(root: Path, parts: dict[str, list[tuple[bytes, int]]]) -> Path:
    for part, given in parts.items():
        write(root / "data" / f"{part}-00000-of-00001.parquet", given)
    return root


@pytest.fixture
def both(tmp_path) -> Path:
    """24 training and 12 test images of four classes, in the Hub's layout."""
    return folder_of(tmp_path / "both", {"train": rows(6), "test": rows(3, start=50)})


def whole(scenario) -> list[torch.Tensor]:
    return [column for e in scenario for part in (e.train, e.test) for column in (part.x, part.y, part.index)]


# ---------------------------------------------------------------------------------- the same as files


@pytest.mark.parametrize("memory", [10**9, 0])
@pytest.mark.parametrize("mode", ["color", "gray"])
def test_the_images_are_those_that_split_folder_reads(both, tmp_path, mode, memory):
    for part, given in (("train", rows(6)), ("test", rows(3, start=50))):
        for i, (content, label) in enumerate(given):
            path = tmp_path / "files" / part / f"{label} {NAMES[label]}" / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    more = {**SMALL, "mode": mode, "memory": memory, "crop": "pad"}
    files = split_folder(path=tmp_path / "files", **more)
    found = huggingface(str(both), **more)
    assert found.class_names == NAMES
    assert [name.split()[1] for name in files.class_names] == list(NAMES)
    assert found.classes == files.classes
    assert found.input_shape == files.input_shape == (1 if mode == "gray" else 3, 8, 8)
    assert found.transform == files.transform
    assert isinstance(found[0].train.images, LazyImages) == (memory == 0)
    for a, b in zip(whole(found), whole(files), strict=True):
        assert torch.equal(a, b)


def test_classes_are_numbered_by_a_classlabel_and_else_sorted(tmp_path):
    numbered = huggingface(str(write(tmp_path / "a.parquet", rows())), **SMALL)
    assert numbered.class_names == NAMES
    turned = huggingface(str(tmp_path / "a.parquet"), order=[3, 1, 0, 2], experiences=2, **SMALL)
    assert turned.class_names == ("bee", "ant", "cat", "dog")
    assert turned.classes == ((0, 1), (2, 3))
    texts = [(content, NAMES[k]) for content, k in rows()]
    named = huggingface(str(write(tmp_path / "b.parquet", texts, names=None)), **SMALL)
    assert named.class_names == ("ant", "bee", "cat", "dog")
    numbers = [(content, 9 + k) for content, k in rows()]
    plain = huggingface(str(write(tmp_path / "c.parquet", numbers, names=None)), **SMALL)
    assert plain.class_names == ("9", "10", "11", "12")


def test_the_checksum_is_that_of_the_bytes_and_labels_wherever_they_are(both, tmp_path):
    def checksum(train):
        root = folder_of(tmp_path / f"copy{len(list(tmp_path.iterdir()))}", {"train": train, "test": rows(3, start=50)})
        return huggingface(str(root), **SMALL).checksum

    known = huggingface(str(both), **SMALL).checksum
    assert checksum(rows(6)) == known
    changed = rows(6)
    changed[7] = (changed[7][0] + b"\0", changed[7][1])  # which no pixel shows
    assert checksum(changed) != known
    swapped = rows(6)
    swapped[0], swapped[6] = (swapped[0][0], 1), (swapped[6][0], 0)
    assert checksum(swapped) != known


def test_a_limit_takes_the_first_images_of_each_class_and_part(both):
    scenario = huggingface(str(both), limit=2, experiences=2, **SMALL)
    assert [e.train.index.tolist() for e in scenario] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    every = huggingface(str(both), experiences=2, **SMALL)
    assert torch.equal(scenario[1].train.x[:2], every[1].train.x[:2])
    assert [len(e.test) for e in scenario] == [4, 4]


# ---------------------------------------------------------------------------------- splits


def test_the_test_split_is_test_or_validation_or_what_is_named(tmp_path):
    parts = {"train": rows(6), "test": rows(2, start=50), "validation": rows(3, start=70)}
    three = folder_of(tmp_path / "three", parts)
    two = folder_of(tmp_path / "two", {part: parts[part] for part in ("train", "validation")})

    def sizes(root, **more):
        scenario = huggingface(str(root), experiences=1, **more, **SMALL)
        return len(scenario[0].train), len(scenario[0].test)

    assert sizes(three) == (24, 8)
    assert sizes(three, test_split="validation") == (24, 12)
    assert sizes(three, train_split="validation") == (12, 8)
    assert sizes(two) == (24, 12)
    assert sizes(two, test_split="train") == (20, 4)
    assert sizes(three, test_split="train", test=0.5) == (12, 12)


def test_of_a_single_split_a_share_of_each_class_is_drawn_from_the_seed(tmp_path):
    path = str(write(tmp_path / "one.parquet", rows(10)))
    drawn = [huggingface(path, experiences=1, seed=seed, test=0.3, **SMALL)[0] for seed in (0, 0, 1)]
    assert drawn[0].test.y.bincount().tolist() == [3] * 4
    assert drawn[0].train.y.bincount().tolist() == [7] * 4
    assert torch.equal(drawn[0].test.x, drawn[1].test.x)
    assert not torch.equal(drawn[0].test.x, drawn[2].test.x)
    both = torch.cat([drawn[0].train.x, drawn[0].test.x]).flatten(1)
    assert len(both.unique(dim=0)) == 40


def test_splits_that_are_not_there_are_told_with_those_that_are(both, tmp_path):
    odd = tmp_path / "odd"
    for name in ("train", "extra"):
        write(odd / f"{name}.parquet", rows(2))
    (odd / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: train.parquet}\n  - {split: extra, path: extra.parquet}\n---\n"
    )
    for root, options, told in (
        (both, {"train_split": "learn"}, r"no split `learn`; .* `train`, `test`: "),
        (both, {"test_split": "val"}, r"no split `val`; .* `train`, `test`: "),
        (
            odd,
            {},
            r"no split `test` or `validation`; .* `train`, `extra`: .*`--set scenario\.test_split=NAME` \(`train`: ",
        ),
    ):
        with pytest.raises(DataError, match=told):
            huggingface(str(root), **options)
    with pytest.raises(DataError, match=r"8 of the 8 test images .* train/0 and ex"):
        huggingface(str(odd), test_split="extra", **SMALL)
    assert len(huggingface(str(odd), test_split="extra", experiences=1, duplicates="keep", **SMALL)[0].test) == 8


# ---------------------------------------------------------------------------------- columns and labels


def test_columns_are_found_by_their_types_and_named_where_several_suit(tmp_path):
    coarse = (datasets.ClassLabel(names=["pet", "insect"]), [k % 2 for _, k in rows()])
    number = (datasets.Value("int64"), list(range(24)))
    path = str(write(tmp_path / "cifar100.parquet", rows(), coarse=coarse, number=number))
    with pytest.raises(DataError, match=r"`label` and `coarse`; .*`--set scenario\.label_column=NAME`"):
        huggingface(path)
    assert huggingface(path, label_column="coarse", **SMALL).class_names == ("pet", "insect")
    assert huggingface(path, label_column="label", **SMALL).class_names == NAMES
    listed = r"`img` \(Image\), `label` \(ClassLabel\), `coarse` \(ClassLabel\), `number` \(int64\)"
    for options, told in (
        ({"label_column": "fine"}, rf"no column `fine`; .*{listed}"),
        ({"label_column": "img"}, rf"The column `img` .* Image .* labels; .*{listed}"),
        ({"label_column": "label", "image_column": "number"}, r"The column `number` .* int64 .* images"),
    ):
        with pytest.raises(DataError, match=told):
            huggingface(path, **options)


def test_images_are_found_without_the_libraries_note_of_types(tmp_path):
    given = rows()
    labels = [NAMES[k] for _, k in given]
    image = [{"bytes": content, "path": None} for content, _ in given]
    parquet.write_table(pyarrow.table({"image": image, "y": labels}), tmp_path / "struct.parquet")
    parquet.write_table(pyarrow.table({"image": [c for c, _ in given], "y": labels}), tmp_path / "raw.parquet")
    struct, raw = (huggingface(str(tmp_path / f"{name}.parquet"), **SMALL) for name in ("struct", "raw"))
    assert struct.class_names == tuple(sorted(NAMES))
    assert struct.checksum == raw.checksum
    for a, b in zip(whole(struct), whole(raw), strict=True):
        assert torch.equal(a, b)
    parquet.write_table(pyarrow.table({"y": labels}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"column of images; .*`y` \(string\)"):
        huggingface(str(tmp_path / "none.parquet"))


def test_rows_without_a_label_and_classes_that_do_not_fit_are_refused(tmp_path):
    texts = [(content, NAMES[k]) for content, k in rows(2)]
    unlabelled = folder_of(tmp_path / "a", {"train": rows(2), "test": [(content, -1) for content, _ in rows(1)]})
    new = tmp_path / "b"
    write(new / "train.parquet", texts, names=None)
    write(new / "test.parquet", [*texts, (png(9), "zebra")], names=None)
    for path, told in (
        (unlabelled, r"4 of the 4 rows of the split `test` .* `label`, .* row 0;"),
        (
            write(tmp_path / "c.parquet", [*texts, (png(9), "")], names=None),
            r"1 of the 9 rows of the split `train` .* `label`, .* row 8",
        ),
        (new, r"The class `zebra` in the test images of `huggingface:.*` .* training images"),
        (write(tmp_path / "d.parquet", rows(4, classes=1)), r"`huggingface:.*` has 1 class, `cat`"),
    ):
        with pytest.raises(DataError, match=told):
            huggingface(str(path))


def test_files_that_number_their_classes_apart_are_refused(tmp_path):
    """`datasets` takes the names of the first file for all, and so would mistake the classes of the second."""
    root = tmp_path / "apart"
    write(root / "train.parquet", rows(2))
    write(root / "test.parquet", rows(1), names=sorted(NAMES))
    assert datasets.load_dataset(str(root))["test"].features["label"].names == list(NAMES)  # silently
    with pytest.raises(DataError, match=r"The column `label` of .*test\.parquet "):
        huggingface(str(root))


def test_broken_images_are_listed_by_their_rows(tmp_path):
    train = rows(4)
    train[3], train[8] = (train[3][0][:40], 0), (b"", 2)
    root = folder_of(tmp_path / "broken", {"train": train, "test": rows(2, start=50)})
    with pytest.raises(DataError) as told:
        huggingface(str(root), **SMALL)
    first, *listed = str(told.value).splitlines()
    assert first.startswith(f"2 of the 24 images of `huggingface:{root}` ")
    assert [line.partition(" (")[0] for line in listed] == ["  row 3 of `train`", "  row 8 of `train`"]
    scenario = huggingface(str(root), skip_broken=True, experiences=1, **SMALL)
    assert len(scenario[0].train) == 14
    assert len(scenario[0].test) == 8


def test_an_image_may_be_a_file_that_its_row_names_or_be_missing(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    image = [{"bytes": content, "path": None} for content, _ in rows(2)]
    image[0] = {"bytes": None, "path": str(tmp_path / "0.png")}
    labels = [NAMES[k] for _, k in rows(2)]
    parquet.write_table(pyarrow.table({"image": image, "y": labels}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"image": [c for c, _ in rows(2)], "y": labels}), tmp_path / "b.parquet")
    a, b = (huggingface(str(tmp_path / f"{name}.parquet"), **SMALL) for name in "ab")
    assert a.checksum == b.checksum
    image[0], image[5] = {"bytes": None, "path": "0.png"}, None
    parquet.write_table(pyarrow.table({"image": image, "y": labels}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"\n  row 0 of `train` \(it holds no image\)\n  row 5 of `train` \(it holds"):
        huggingface(str(tmp_path / "c.parquet"))


# ---------------------------------------------------------------------------------- what is not there


def test_what_is_named_wrongly_is_refused_in_one_sentence(both, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    for name, options, error, told in (
        (tmp_path / "none", {}, DataError, r"file or folder .*none; .* Parquet"),
        ("none.parquet", {}, DataError, r"file or folder /.*none\.parquet"),
        (tmp_path / "empty", {}, DataError, r"empty .* Parquet files; .* split-folder "),
        (tmp_path / "bad.parquet", {}, DataError, r"`.*bad\.parquet` .*\(Parquet"),
        (both, {"revision": "main"}, UsageError, r"`scenario\.revision` .* Hub"),
        (tmp_path / "bad.parquet", {"config": "x"}, UsageError, r"`scenario\.config` .*bad\.parquet"),
        (both, {"config": "x"}, UsageError, r"`scenario\.config` .*both.*\['default'\]"),
    ):
        with pytest.raises(error, match=told) as raised:
            huggingface(str(name), **options)
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'cifar1000' doesn't exist on the Hub."),
        huggingface_hub.utils.HFValidationError("Dataset names have no spaces."),
    ],
)
def test_a_name_that_the_hub_does_not_know_is_said(monkeypatch, error):
    def fails(*arguments, **more):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fails)
    with pytest.raises(DataError, match=r"no data set `cifar1000` that is open to you \(Dataset .*\w\); correct its"):
        huggingface("cifar1000")


def test_without_the_library_one_sentence_says_how_to_get_it(both, monkeypatch):
    plain = builtins.__import__

    def missing(name, *arguments, **more):
        if name == "datasets":
            raise ImportError(name)
        return plain(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match=r"which is missing: `pip install 'clframe\[huggingface\]'`\."):
        huggingface(str(both))


def test_a_folder_may_be_called_as_a_reader_of_the_library(both, tmp_path, monkeypatch):
    shutil.copytree(both, tmp_path / "parquet")
    monkeypatch.chdir(tmp_path)
    known = huggingface(str(both), **SMALL).checksum
    assert [huggingface(name, **SMALL).checksum for name in ("./parquet", "parquet")] == [known] * 2


def test_a_configuration_of_a_folder_is_chosen_by_its_name(tmp_path):
    root = tmp_path / "two"
    write(root / "a.parquet", rows(4))
    write(root / "b.parquet", rows(5), names=sorted(NAMES))
    (root / "README.md").write_text(
        "---\nconfigs:\n- {config_name: a, data_files: a.parquet}\n- {config_name: b, data_files: b.parquet}\n---\n"
    )
    with pytest.raises(
        UsageError, match=r"`scenario.config` does not fit .*'a', 'b'.*: name one of its configurations"
    ):
        huggingface(str(root))
    assert huggingface(str(root), config="a", **SMALL).class_names == NAMES
    assert huggingface(str(root), config="b", **SMALL).class_names == tuple(sorted(NAMES))


def test_of_the_hub_what_was_kept_last_is_read_without_a_network(tmp_path, monkeypatch, capsys):
    root = folder_of(tmp_path / "tiny", {"train": rows(6), "test": rows(3, start=50)})
    here = huggingface(str(root), **SMALL)
    (prepared,) = (tmp_path / "hf" / "datasets").glob("*/*/0.0.0/*/dataset_info.json")
    commit = "c" * 40
    kept = tmp_path / "hf" / "datasets" / "me___tiny" / "default" / "0.0.0" / commit
    shutil.copytree(prepared.parent, kept)
    info = json.loads((kept / "dataset_info.json").read_text())
    (kept / "dataset_info.json").write_text(json.dumps({**info, "config_name": "default"}))
    for revision in (None, commit):
        found = huggingface("me/tiny", revision=revision, **SMALL)
        assert found.checksum == here.checksum
        assert all(torch.equal(a, b) for a, b in zip(whole(found), whole(here), strict=True))
    with pytest.raises(DataError, match=rf"`v2` of `me/tiny`, .* {commit} "):
        huggingface("me/tiny", revision="v2")
    with pytest.raises(DataError, match=r"`me/other` .* HF_HUB_OFFLINE"):
        huggingface("me/other")
    # to look is to ask nothing of the Hub
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert main(["scenarios", "show", "huggingface:me/tiny"]) == 0
    assert "Experiences: 2\n  1: cat, ant\n" in capsys.readouterr().out
    assert main(["scenarios", "show", "huggingface:me/other", "--set", "scenario.size=8"]) == 3
    assert capsys.readouterr().err == (
        f"clframe: The data set `me/other` is not in {tmp_path / 'hf' / 'datasets'}; a run downloads it.\n"
    )
    assert datasets.config.HF_HUB_OFFLINE is False


# ---------------------------------------------------------------------------------- as a person meets it


def test_a_run_from_the_command_line_is_that_of_its_split_and_predicts(both, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    size = ["--set", "scenario.size=8"]
    assert main(["scenarios", "show", f"huggingface:{both}", *size, "--save", "split.json"]) == 0
    call = ["run", "-q", "--no-tensorboard", "--epochs", "1", "--plugin", "er"]
    assert main([*call, "--scenario", "huggingface:./both", *size, "--output", "first"]) == 0
    assert main([*call, "--scenario", "split.json", "--output", "second"]) == 0
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "second"))
    assert first["accuracy"] == second["accuracy"]
    assert first["class_names"] == list(NAMES)
    assert main([*call, "--scenario", "huggingface:./both", *size, "--json"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("huggingface-.-both-er-0-")
    (tmp_path / "new.png").write_bytes(png(1234))
    trained = clframe.load("first")
    (answer,) = trained.predict("new.png")
    scores = trained(huggingface(str(both), **SMALL)[0].train.x[:1]).shape
    assert scores == (1, 4)
    capsys.readouterr()
    assert main(["predict", "first", "new.png"]) == 0
    assert answer.name in capsys.readouterr().out


def test_a_run_that_reads_images_late_is_bit_equal(both, tmp_path):
    def run(memory):
        scenario = {"name": f"huggingface:{both}", "size": 8, "memory": memory}
        folder = tmp_path / str(memory)
        results = clframe.run(scenario, plugins=["er"], train={"epochs": 1}, run={"output": str(folder)})
        return results.accuracy, (folder / "model.safetensors").read_bytes()

    assert run(0) == run(10**9)


def test_without_standard_error_images_are_read_all_the_same(both, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert len(huggingface(str(both), memory=0, **SMALL)[0].train.x) == 12
