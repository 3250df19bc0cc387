"""A table of paths and labels as a scenario."""

from __future__ import annotations

import builtins
import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clframe
from clframe.errors import DataError, UsageError
from clframe.scenarios.table import split_table


@pytest.fixture
def images(tmp_path) -> Path:
    """Images 0.png to 23.png, 4x4, each of the grey 10 times its number."""
    (tmp_path / "images").mkdir()
    for i in range(24):
        Image.fromarray(np.full((4, 4), 10 * i, dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def table(folder: Path, columns: dict[str, list], name: str = "t.csv", delimiter: str = ",") -> Path:
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def columns(**more) -> dict[str, list]:
    """24 rows: labels a, b, c, d in turn; the last 8 are test images."""
    return {
        "path": [f"images/{i}.png" for i in range(24)],
        "label": ["abcd"[i % 4] for i in range(24)],
        "split": ["train"] * 16 + ["test"] * 8,
        **more,
    }


def numbers(data) -> list[int]:
    """Which images these are: images/<i>.png."""
    return (data.x[:, 0, 0, 0] // 10).tolist()


SMALL = {"size": 4, "mode": "gray"}


def test_without_tasks_the_classes_are_split(images):
    scenario = split_table(path=table(images, columns()), experiences=2, order=[1, 0, 3, 2], **SMALL)
    assert scenario.class_names == ("b", "a", "d", "c")
    assert scenario.classes == ((0, 1), (2, 3))
    assert numbers(scenario[0].train) == [i for i in range(16) if i % 4 < 2]
    assert numbers(scenario[1].test) == [i for i in range(16, 24) if i % 4 >= 2]
    assert scenario[0].train.y.tolist() == [1 - i % 4 for i in range(16) if i % 4 < 2]


def test_each_task_is_an_experience_with_its_own_classes(images):
    tasks = ["10" if i % 4 in (0, 3) else "9" for i in range(24)]
    for memory in (0, 10**9):
        scenario = split_table(path=table(images, columns(task=tasks)), setting="task", memory=memory, **SMALL)
        assert scenario.class_names == ("b", "c", "a", "d")  # task 9 before 10
        assert scenario.classes == ((0, 1), (2, 3))
        assert numbers(scenario[0].train) == [i for i in range(16) if i % 4 in (1, 2)]
        assert numbers(scenario[1].test) == [16, 19, 20, 23]
        assert scenario[1].test.y.tolist() == [2, 3, 2, 3]
        assert scenario[1].train.task.unique().tolist() == [1]
    turned = split_table(path=table(images, columns(task=tasks)), order=[1, 0], **SMALL)
    assert turned.class_names == ("a", "d", "b", "c")


def test_domains_share_their_classes(images):
    places = ["day" if i % 8 < 4 else "night" for i in range(24)]
    path = table(images, columns(where=places))
    scenario = split_table(path=path, setting="domain", domain_column="where", **SMALL)
    assert scenario.setting == "domain"
    assert scenario.class_names == tuple("abcd")
    assert scenario.classes == ((0, 1, 2, 3),) * 2
    assert numbers(scenario[0].train) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert numbers(scenario[1].train) == [4, 5, 6, 7, 12, 13, 14, 15]
    assert numbers(scenario[1].test) == [20, 21, 22, 23]
    assert scenario[1].test.y.tolist() == [0, 1, 2, 3]
    results = clframe.run(scenario, train={"epochs": 1})
    assert list(results.accuracy) == ["domain"]


def test_without_a_column_of_parts_test_images_are_drawn_of_each_class_and_domain(images):
    places = ["day" if i % 8 < 4 else "night" for i in range(24)]
    given = columns(domain=places)
    del given["split"]
    path = table(images, given)
    scenario = split_table(path=path, setting="domain", test=0.34, seed=1, **SMALL)
    for e in scenario:
        assert sorted(e.test.y.tolist()) == [0, 1, 2, 3]
        assert len(e.train) == 8
        assert not set(numbers(e.train)) & set(numbers(e.test))
    again = split_table(path=path, setting="domain", test=0.34, seed=1, **SMALL)
    assert [numbers(e.test) for e in again] == [numbers(e.test) for e in scenario]


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ";"), ("t.tsv", "\t")])
def test_other_delimiters_and_names_of_columns_are_read(images, name, delimiter):
    given = columns()
    given["file"], given["species"] = given.pop("path"), given.pop("label")
    path = table(images, given, name, delimiter)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some programs begin a file
    scenario = split_table(path=path, path_column="file", label_column="species", **SMALL)
    assert scenario.class_names == tuple("abcd")


def test_parquet_is_read_as_csv_is(images):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    given = columns(task=[int(i % 4 > 1) for i in range(24)])
    parquet.write_table(pyarrow.table(given), images / "t.parquet")
    first = split_table(path=images / "t.parquet", **SMALL)
    second = split_table(path=table(images, given), **SMALL)
    assert first.checksum == second.checksum
    for a, b in zip(first, second, strict=True):
        assert a.classes == b.classes
        assert torch.equal(a.train.x, b.train.x)
        assert torch.equal(a.train.y, b.train.y)


def test_parquet_without_pyarrow_is_refused_in_one_sentence(images, monkeypatch):
    (images / "t.parquet").write_bytes(b"PAR1")
    plain = builtins.__import__

    def missing(name, *arguments, **more):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return plain(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match=r"pyarrow is missing: `pip install 'clframe\[parquet\]'`, or save it as CSV"):
        split_table(path=images / "t.parquet")


def test_a_damaged_parquet_file_is_said_to_be(images):
    pytest.importorskip("pyarrow")
    (images / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"The table .*t\.parquet cannot be read \(.*\); repair it"):
        split_table(path=images / "t.parquet")


def test_what_is_lacking_is_said_with_what_is_there(images):
    given = columns()
    given["file"], given["species"] = given.pop("path"), given.pop("label")
    path = table(images, given)
    for options, told in (
        ({}, r"lacks the columns `path` and `label`; it has `split`, `file`, `species`: name the right ones with "),
        ({"path_column": "file", "label_column": "spices"}, r"lacks the column `spices`; it has `split`, `file`"),
        (
            {"path_column": "file", "label_column": "species", "setting": "domain"},
            r"lacks the column `domain`; .* name the right one with `--set scenario.domain_column=NAME`",
        ),
        ({"path_column": "file", "label_column": "species", "task_column": "t"}, r"lacks the column `t`"),
    ):
        with pytest.raises(DataError, match=told):
            split_table(path=path, **options)


def test_parts_are_named_as_folders_of_parts_are(images):
    usual, other = columns(), columns()
    words = {"train": "Training", "test": "TESTING"}
    other["split"] = [words[part] for part in usual["split"]]
    expected = split_table(path=table(images, usual), size=8)
    found = split_table(path=table(images, other), size=8)
    assert [(len(e.train), len(e.test)) for e in found] == [(len(e.train), len(e.test)) for e in expected]
    assert all(torch.equal(a.test.x, b.test.x) for a, b in zip(found, expected, strict=True))


def test_rows_that_say_nothing_or_something_else_are_named(images):
    empty, other = columns(), columns()
    empty["label"][6] = ""
    other["split"][2] = "val"
    for given, told in (
        (empty, r"Row 7 of .* has no `label`; fill it in"),
        (other, r"Row 3 of .* `val` in the column `split`; .* `train` or `test`"),
        ({name: [] for name in columns()}, r"no rows"),
    ):
        with pytest.raises(DataError, match=told):
            split_table(path=table(images, given))
    path = images / "wide.csv"
    path.write_text("path,label\na.png,x,y\n")
    with pytest.raises(DataError, match=r"line 2 .* header"):
        split_table(path=path)
    path.write_bytes(b"path,label\n\xff\xfe,x\n")
    with pytest.raises(DataError, match=r"wide\.csv .* UTF-8"):
        split_table(path=path)
    with pytest.raises(DataError, match=r"none\.csv .* CSV or Parquet"):
        split_table(path=images / "none.csv")
    with pytest.raises(DataError, match=r"folder; .* CSV or Parquet"):
        split_table(path=images)


def test_classes_and_groups_must_be_learnt_and_tested(images):
    new, half, shared, one = columns(), columns(), columns(), columns()
    new["label"][20] = "zebra"
    half["task"] = ["1" if i % 4 < 2 else "2" if i < 16 else "3" for i in range(24)]
    shared["task"] = ["1" if i % 8 < 4 else "2" for i in range(24)]
    one["label"] = ["a"] * 24
    for given, told in (
        (new, r"The class `zebra` in the test images .* training images"),
        (half, r"The task `2` in .* has no test images"),
        (shared, r"The class `a` .* tasks `1` and `2`, .*`--setting domain`"),
        (one, r"1 class, `a`; "),
    ):
        with pytest.raises(DataError, match=told):
            split_table(path=table(images, given), **SMALL)


def test_a_number_of_experiences_has_no_meaning_where_tasks_are_given(images):
    path = table(images, columns(task=[str(i % 4 // 2) for i in range(24)]))
    with pytest.raises(UsageError, match=r"`scenario\.experiences` .* column `task` "):
        split_table(path=path, experiences=2)
    with pytest.raises(UsageError, match=r"`scenario\.order` is \[0\]; .* 0 to 1 "):
        split_table(path=path, order=[0], **SMALL)


def test_files_that_are_missing_are_listed_by_their_paths(images):
    for i in (3, 17):
        (images / "images" / f"{i}.png").unlink()
    path = table(images, columns())
    with pytest.raises(DataError) as told:
        split_table(path=path, **SMALL)
    assert str(told.value).splitlines()[1:] == [
        f"  {images / 'images' / name} (No such file or directory)" for name in ("3.png", "17.png")
    ]
    scenario = split_table(path=path, skip_broken=True, **SMALL)
    assert sum(len(e.train) + len(e.test) for e in scenario) == 22


def test_a_file_that_is_learnt_and_tested_is_found_by_its_bytes(images):
    """Named for both parts, spelt in two ways, or copied: it is one image."""
    for spelt in ("images/0.png", "./images/0.png", "images/../images/0.png", "copy.png"):
        (images / "copy.png").write_bytes((images / "images" / "0.png").read_bytes())
        files = [f"images/{i}.png" for i in range(23)] + [spelt]
        rows = columns(path=files, label=[*"abcd" * 5, *"abca"])
        with pytest.raises(DataError, match=r"^1 of the 8 test images of .*t\.csv .* imag"):
            split_table(path=table(images, rows), **SMALL)
        dropped = split_table(path=table(images, rows), duplicates="drop", experiences=2, **SMALL)
        assert numbers(dropped[0].train) == [i for i in range(1, 16) if i % 4 < 2]
        kept = split_table(path=table(images, rows), duplicates="keep", experiences=2, **SMALL)
        assert numbers(kept[0].train) == [i for i in range(16) if i % 4 < 2]
        assert numbers(kept[0].test) == numbers(dropped[0].test) == [16, 17, 20, 21, 0]


def test_a_class_that_is_left_without_training_images_is_named(images):
    rows = columns(
        path=[f"images/{i}.png" for i in range(16)] + [f"images/{i}.png" for i in (0, 4, 8, 12, 17, 18, 19, 20)]
    )
    rows["label"] = ["abcd"[i % 4] for i in range(16)] + [*"aaaabcda"]
    with pytest.raises(DataError, match=r"`a` in the test images .* broken images "):
        split_table(path=table(images, rows), duplicates="drop", **SMALL)


def test_labels_are_compared_in_one_unicode_form(images):
    labels = ["abcd"[i % 4] for i in range(24)]
    labels = [("caf\u00e9" if i < 16 else "cafe\u0301") if label == "a" else label for i, label in enumerate(labels)]
    assert split_table(path=table(images, columns(label=labels)), **SMALL).class_names == ("b", "c", "caf\u00e9", "d")
