"""A scenario of custom images: a table of their paths and labels, with tasks or domains if it has such columns."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch

from clframe.data.batch import ImageData
from clframe.data.build import Arrays, suits
from clframe.data.scenario import Part, Scenario, Setting
from clframe.errors import ClframeError, DataError, UsageError, did_you_mean
from clframe.options import flatten_groups
from clframe.scenarios.files import (
    DEFAULTS,
    Entry,
    FileStream,
    ImageOptions,
    LoadingOptions,
    check_classes,
    divide_entries,
    group_entries,
    limit_entries,
    name_reduced,
    normalize_name,
    read_all,
)
from clframe.scenarios.folder import PART
from clframe.scenarios.streams import split
from clframe.system.reading import expand_home, open_regular, quote_path, reason
from clframe.system.texts import by_name

LARGEST = 2**28  # bytes of a table
LONGEST_HEADER = 2**16  # characters that are searched for the delimiter
BATCH = 256  # rows of a Parquet file that are decompressed at a time
COLUMNS = ("path", "label", "task", "domain", "split")
REQUIRED = COLUMNS[:2]


@suits(**DEFAULTS)
@flatten_groups
def split_table(
    *,
    path: Path,
    path_column: str = "path",
    label_column: str = "label",
    task_column: str | None = None,
    domain_column: str | None = None,
    split_column: str | None = None,
    stream: FileStream,
    images: ImageOptions,
    loading: LoadingOptions,
) -> Scenario:
    """Build a scenario of your own images, which a table (CSV, TSV or Parquet) lists with labels, tasks or domains.

    Relative paths are relative to the table. With a column of tasks, each task is an experience and brings its own
    classes; in the setting `domain` each domain is an experience, and all share their classes. Without such a column,
    the classes are split into experiences.

    Options:
        path: path of the table.
        path_column: the column with the paths of the images.
        label_column: the column with the names of their classes.
        task_column: the column with the tasks; null: `task`, if there is one.
        domain_column: the column with the domains; null: `domain`, if there is one.
        split_column: the column that says `train` or `test`; null: `split`, if there is one.
    """
    table = expand_home(path)
    images.format()  # refuses options that do not belong together before anything is read
    names = {
        "path": path_column,
        "label": label_column,
        "task": task_column,
        "domain": domain_column,
        "split": split_column,
    }
    rows = _Rows(table, read_table(table), names)
    kind = "domain" if stream.setting == "domain" else "task"
    if stream.setting == "domain" and not rows.has("domain"):
        raise rows.lacking(["domain"])
    by_group = rows.has(kind)
    if by_group and (stream.experiences is not None or stream.first is not None):
        given = "experiences" if stream.experiences is not None else "first"
        raise UsageError(
            f"`scenario.{given}` has no meaning for {table}, whose column `{rows.column(kind)}` decides it: "
            "leave it out."
        )
    what = str(table)
    entries = rows.entries(kind)
    if not rows.has("split"):
        entries = divide_entries(entries, stream.test, stream.seed, what)
    fix = "give it rows to learn from, or leave it out"
    check_classes(entries, what, fix)
    if by_group:
        _check_groups(entries, what, kind, rows.column(kind))
    arrays, entries = read_all(
        table.stem,
        limit_entries(entries, stream.limit),
        images,
        loading,
        what=what,
    )
    check_classes(entries, name_reduced(what, images.duplicates), "repair them")
    if not by_group:
        return split("split-table", arrays, stream)
    _check_groups(entries, name_reduced(what, images.duplicates), kind, rows.column(kind))
    groups = sorted({e.group for e in entries}, key=by_name)
    return build_from_groups("split-table", arrays, entries, _order_groups(groups, stream, kind), stream.setting)


def build_from_groups(
    name: str, arrays: Arrays, entries: Sequence[Entry], groups: Sequence[str], setting: Setting
) -> Scenario:
    """Return a scenario whose experiences are the groups of `entries`, in the order of `groups`.

    Args:
        name: name of the scenario.
        arrays: images and labels.
        entries: image files of the training rows, then of the test rows, of `arrays`.
        groups: tasks, each with its own classes; in the setting ``domain`` domains, which share their classes.
        setting: setting of the scenario.
    """
    number = {label: i for i, label in enumerate(arrays.class_names)}
    found = group_entries(entries, lambda e: e.group)
    order: list[int] = []  # class numbers in the order of their first experience
    classes: list[list[int]] = []
    for group in groups:
        own = sorted({number[e.label] for e in found[group]})
        order += [c for c in own if c not in order]
        classes.append([order.index(c) for c in own])
    if setting == "domain":
        order = list(range(len(number)))
        classes = [order] * len(groups)
    column = torch.tensor([order.index(c) for c in range(len(order))])
    where: dict[tuple[str, Part], list[int]] = {}
    cut = len(arrays.y_train)
    for i, entry in enumerate(entries):
        part: Part = "train" if i < cut else "test"
        where.setdefault((entry.group, part), []).append(i if i < cut else i - cut)
    tests: dict[int, ImageData] = {}  # kept, because they are loaded after every experience

    def load(i: int, part: Part) -> ImageData:
        if part == "test" and i in tests:
            return tests[i]
        x, y = arrays.part(part)
        rows = torch.tensor(where[groups[i], part], device=y.device)
        data = ImageData(x.index_select(0, rows), column.to(y.device)[y[rows]], index=rows, task=i)
        if part == "test":
            tests[i] = data
        return data

    return arrays.to_scenario(name, setting, classes, [arrays.class_names[c] for c in order], order, load)


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV (or TSV) or Parquet file, all values as text.

    Raises:
        DataError: if the file cannot be read, or is empty; if pyarrow, which reads Parquet, is missing.
    """
    if not path.is_file():
        there = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"The table {path.absolute()} {there}; name a CSV or Parquet file with `--set scenario.path=FILE`."
        )
    try:
        rows = _read_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else _read_csv(path)
    except ClframeError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"The table {quote_path(path)} cannot be read, as it is not UTF-8 text; save it so.") from error
    except Exception as error:  # pyarrow raises whatever the damage leads to
        raise DataError(f"The table {quote_path(path)} cannot be read ({reason(error)}); repair it.") from error
    if not rows:
        raise DataError(f"The table {path} has no rows below its header; list an image in each.")
    return rows


def _read_csv(path: Path) -> list[dict[str, str]]:
    with TextIOWrapper(open_regular(path, LARGEST), encoding="utf-8-sig", newline="") as file:
        header = file.readline(LONGEST_HEADER)
        file.seek(0)
        delimiter = max(",;\t", key=header.count)
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more values than the header")
            rows.append({name.strip(): (value or "").strip() for name, value in row.items()})
        return rows


def _read_parquet(path: Path) -> list[dict[str, str]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} is a Parquet file, for which pyarrow is missing: `pip install 'clframe[parquet]'`, or save it "
            "as CSV."
        ) from error
    rows: list[dict[str, str]] = []
    size = 0
    with open_regular(path, LARGEST) as file:
        for batch in parquet.ParquetFile(file).iter_batches(
            BATCH
        ):  # a batch may be far larger than its part of the file
            size += batch.nbytes
            if size > LARGEST:
                raise ValueError(f"it holds more than {LARGEST // 2**20} MB, unpacked")
            found: list[Mapping[str, Any]] = batch.to_pylist()
            rows += [{name: "" if value is None else str(value) for name, value in row.items()} for row in found]
    return rows


class _Rows:
    """The rows of a table, and the meanings of its columns.

    Args:
        path: path of the table.
        rows: values by the names of their columns.
        names: for each meaning (`COLUMNS`) the column that the user named; None: the column of that name, if any.

    Raises:
        DataError: if a column that is named or required is missing.
    """

    def __init__(self, path: Path, rows: Sequence[Mapping[str, str]], names: Mapping[str, str | None]) -> None:
        self.path = path
        self.rows = rows
        self.names = names
        self.columns = list(rows[0])
        if lacking := [m for m in COLUMNS if not self.has(m) and (m in REQUIRED or names[m] is not None)]:
            raise self.lacking(lacking)

    def column(self, meaning: str) -> str:
        return self.names[meaning] or meaning

    def has(self, meaning: str) -> bool:
        return self.column(meaning) in self.columns

    def lacking(self, meanings: Iterable[str]) -> DataError:
        missing = [self.column(m) for m in meanings]
        listed = " and ".join(f"`{name}`" for name in missing)
        options = " and ".join(f"`--set scenario.{m}_column=NAME`" for m in meanings)
        has = ", ".join(f"`{name}`" for name in self.columns)
        return DataError(
            f"The table {self.path} lacks the column{'s' if len(missing) > 1 else ''} {listed}; it has {has}: name the "
            f"right one{'s' if len(missing) > 1 else ''} with {options}."
        )

    def entries(self, kind: str) -> list[Entry]:
        """Return an entry for each row, whose group is its value in the column of `kind` (``task`` or ``domain``)."""
        return [self._entry(i, row, kind) for i, row in enumerate(self.rows, start=1)]

    def _entry(self, i: int, row: Mapping[str, str], kind: str) -> Entry:
        needed = [*REQUIRED, *([kind] if self.has(kind) else []), *(["split"] if self.has("split") else [])]
        if empty := [self.column(m) for m in needed if not row[self.column(m)]]:
            raise DataError(f"Row {i} of {self.path} has no {' and no '.join(f'`{c}`' for c in empty)}; fill it in.")
        name = row[self.column("path")]
        group = unicodedata.normalize("NFC", row[self.column(kind)]) if self.has(kind) else ""
        label = normalize_name(row[self.column("label")], str(self.path))
        entry = Entry(str(self.path.parent / expand_home(name)), name, label, None, group)
        if not self.has("split"):
            return entry
        part = row[self.column("split")]
        role = PART.fullmatch(part)
        if not role or role["val"]:
            guess = did_you_mean(part, ("train", "test"))
            raise DataError(
                f"Row {i} of {self.path} has `{part}` in the column `{self.column('split')}`; it must be `train` or "
                f"`test` (images to choose settings by are drawn by `train.val`).{guess if 'Did' in guess else ''}"
            )
        return replace(entry, part="train" if role["train"] else "test")


def _check_groups(entries: Sequence[Entry], what: str, kind: str, column: str) -> None:
    """Raise `DataError` for tasks that share classes, and for tasks or domains that are not both learned and tested."""
    for group, members in group_entries(entries, lambda e: e.group).items():
        if len({e.part for e in members}) < 2:
            lacking = "test" if members[0].part == "train" else "training"
            raise DataError(f"The {kind} `{group}` in {what} has no {lacking} images; add some, or leave it out.")
    if kind == "domain":
        return
    for label, members in group_entries(entries, lambda e: e.label).items():
        tasks = sorted({e.group for e in members}, key=by_name)
        if len(tasks) > 1:
            raise DataError(
                f"The class `{label}` in {what} is in the tasks {' and '.join(f'`{t}`' for t in tasks)}, and a class "
                f"belongs to one: with `--setting domain` and `--set scenario.domain_column={column}` experiences "
                "share their classes."
            )


def _order_groups(groups: Sequence[str], stream: FileStream, kind: str) -> list[str]:
    """Return the groups in the order in which they are learned. Raises `UsageError` if `order` is not a permutation."""
    order = stream.class_order(len(groups))
    if sorted(order) != list(range(len(groups))):
        raise UsageError(
            f"`scenario.order` is {order}; it must hold each of the numbers 0 to {len(groups) - 1} of the {kind}s once."
        )
    return [groups[i] for i in order]
