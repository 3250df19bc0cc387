"""A scenario of images on the Hugging Face Hub, or in Parquet files of its layout."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clframe.data.build import suits
from clframe.data.decode import LARGEST_FILE
from clframe.data.listing import LeftOut, walk
from clframe.data.scenario import Part, Scenario
from clframe.errors import ClframeError, DataError, UsageError
from clframe.options import flatten_groups
from clframe.scenarios import sources
from clframe.scenarios.files import (
    DEFAULTS,
    Entry,
    FileStream,
    ImageOptions,
    LoadingOptions,
    check_classes,
    divide_entries,
    limit_entries,
    name_reduced,
    normalize_name,
    read_all,
)
from clframe.scenarios.streams import split
from clframe.system.reading import expand_home, read_bytes
from clframe.system.texts import by_name

PARQUET = ".parquet"
TESTS = ("test", "validation")  # splits to test with, where the user names none
BYTES_AND_PATH = {"bytes", "path"}  # the fields of an image in the Hub's layout
LABELS = ("string", "large_string", "bool", "int", "uint")  # beginnings of the types whose values can name classes


@suits(**DEFAULTS)
@flatten_groups
def huggingface(
    variant: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    stream: FileStream,
    images: ImageOptions,
    loading: LoadingOptions,
) -> Scenario:
    """Build a scenario of labeled images: a data set of the Hugging Face Hub, or local Parquet files in its layout.

    `huggingface:cifar100`, `huggingface:./FOLDER` or `huggingface:FILE.parquet`: a folder or file of that name is
    read, and without one the data set of that name on the Hub. It needs `pip install 'clframe[huggingface]'`. Classes
    have the names and the order of a column of type ClassLabel, else they are sorted by their values. Data sets are
    stored where the library `datasets` stores them (`HF_HOME`); where the Hub cannot be reached, the copy that was
    stored last is used.

    Options:
        config: which of the data set's configurations (also called subsets); null: the only one, or its default.
        revision: branch, tag or commit of the data set's repository on the Hub; null: the newest.
        image_column: the column with the images; null: the only one that holds images.
        label_column: the column with the names of their classes; null: the only one of type ClassLabel, else the only
            one of texts or whole numbers.
        train_split: the split to learn from.
        test_split: the split to test with; null: `test`, else `validation`. If it is the one to learn from, or that is
            the only one, test images are drawn from it (`test`).
    """
    images.format()  # refuses options that do not belong together before anything is read
    found = _open_data_set(variant, config, revision)
    name = f"huggingface:{variant}"
    what = f"`{name}`"
    parts = _choose_splits(found.splits, train_split, test_split, what)
    features = found.splits[train_split].features
    image = _find_column(features, image_column, _IMAGES, what)
    label = _find_column(features, label_column, _LABELS, what)
    _check_names(found.files, label, getattr(features[label], "names", None))
    entries = [e for s, part in parts.items() for e in _list_entries(found.splits[s], s, part, image, label, what)]
    if len(parts) == 1:
        entries = divide_entries(entries, stream.test, stream.seed, what)
    fix = "choose other splits with `--set scenario.train_split` and `scenario.test_split`, or leave out its rows"
    check_classes(entries, what, fix)
    arrays, kept = read_all(
        variant,
        limit_entries(entries, stream.limit),
        images,
        loading,
        what=what,
        rank=_class_rank(features[label]),
    )
    check_classes(kept, name_reduced(what, images.duplicates), "repair them")
    return split(name, arrays, stream)


class Row:
    """An image in a row of a split, which stays on the disk until it is read.

    Args:
        column: column of the split's images, in the Hub's layout.
        number: number of the row, from 0.
        split: name of the split.
    """

    __slots__ = ("column", "number", "split")

    def __init__(self, column: Any, number: int, split: str) -> None:
        self.column = column
        self.number = number
        self.split = split

    def __str__(self) -> str:
        return f"row {self.number} of `{self.split}`"

    def read_bytes(self) -> bytes:
        """Return the bytes of the image's file.

        Raises:
            DataError: if the row has no image.
            OSError: if the file that the row names is gone.
        """
        image = self.column[self.number].as_py() or {}
        if image.get("bytes") is not None:
            content: bytes = image["bytes"]
            return content
        if Path(image.get("path") or "").is_absolute():
            return read_bytes(image["path"], LARGEST_FILE)
        raise DataError("it holds no image")


# ------------------------------------------------------------------------------------ finding the data


@dataclass(frozen=True)
class _DataSet:
    """A data set: its splits by their names, and the files of a folder."""

    splits: Mapping[str, Any]
    files: Sequence[str]


def _open_data_set(variant: str, config: str | None, revision: str | None) -> _DataSet:
    """Return the data set that `variant` names: a file or folder of that name, else a data set of the Hub.

    Raises:
        DataError: if the library is missing, or the data set does not exist, cannot be reached or cannot be read.
        UsageError: if the data set has no such `config` or `revision`.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"`huggingface:{variant}` is read by the library `datasets`, which is missing: "
            "`pip install 'clframe[huggingface]'`."
        ) from error
    path = expand_home(variant)
    local = path.exists() or variant.startswith((".", "/", "~")) or path.suffix.lower() == PARQUET
    if local and revision is not None:
        raise UsageError(f"`scenario.revision` is for data sets on the Hub, and {path} is here: leave it out.")
    if path.is_file() and config is not None:
        raise UsageError(f"`scenario.config` is for data sets and folders, and {path} is a file: leave it out.")
    if not local:
        with _silence(datasets), _explain(datasets, variant):
            return _open_from_hub(datasets, variant, config, revision)
    if not path.exists():
        raise DataError(
            f"There is no file or folder {path.absolute()}; name a Parquet file, a folder of them, or a data set of "
            "the Hub."
        )
    if path.is_dir() and not walk(path, LeftOut())[1][PARQUET]:
        raise DataError(
            f"The folder {path} holds no Parquet files; for a folder of class folders there is "
            f"`--scenario split-folder --set scenario.path={path}`."
        )
    with _silence(datasets), _explain(datasets, str(path)):
        if path.is_file():  # `load_dataset` would send its name to the Hub
            return _DataSet(datasets.DatasetDict.from_parquet({"train": str(path)}), [])
        builder = datasets.load_dataset_builder(
            str(path.absolute()), config
        )  # absolute: `parquet` alone names a reader
        builder.download_and_prepare()
        return _DataSet(builder.as_dataset(), [file for files in builder.config.data_files.values() for file in files])


def _open_from_hub(datasets: Any, name: str, config: str | None, revision: str | None) -> _DataSet:
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not sources.may_download()
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        cached = type(builder).__name__ == "Cache"  # the Hub could not be reached, so no revision was looked up there
        if cached and revision not in (None, builder.hash):
            raise DataError(
                f"The Hub cannot be reached to look up the revision `{revision}` of `{name}`, of which the commit "
                f"{builder.hash} is kept here: try again where there is a network, or leave out `scenario.revision`."
            )
        builder.download_and_prepare()
        return _DataSet(builder.as_dataset(), [])
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


@contextmanager
def _silence(datasets: Any) -> Iterator[None]:
    """Let the libraries log nothing, because clframe reports errors, and show progress on a terminal only."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    enabled = not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    if enabled and not (sys.stderr and sys.stderr.isatty()):
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if enabled:
            datasets.enable_progress_bars()


@contextmanager
def _explain(datasets: Any, name: str) -> Iterator[None]:
    """Turn errors of the library into one sentence that names the data set and a remedy."""
    from huggingface_hub.utils import HFValidationError

    try:
        yield
    except (ClframeError, MemoryError):
        raise
    except Exception as error:  # readers of many formats, and of the network, raise errors of any kind
        of_data = isinstance(error, datasets.exceptions.DatasetGenerationError)  # its cause has the reason
        text = str((of_data and error.__cause__) or error).partition("Example of usage")[0]
        reason = " ".join(text.split()).rstrip(". ")
        if isinstance(error, datasets.exceptions.DatasetNotFoundError | HFValidationError):
            raise DataError(
                f"The Hugging Face Hub has no data set `{name}` that is open to you ({reason}); correct its name, log "
                "in with `hf auth login`, or name a folder of Parquet files as `huggingface:./FOLDER`."
            ) from error
        if isinstance(error, ConnectionError):
            kept = f"The data set `{name}` is not in {datasets.config.HF_DATASETS_CACHE}"
            offline = datasets.config.HF_HUB_OFFLINE
            if not offline and not sources.may_download():
                raise DataError(f"{kept}; a run downloads it.") from error
            why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
            raise DataError(
                f"{kept}, and {why}: run once with a network, or name a folder of its Parquet files as "
                "`huggingface:./FOLDER`."
            ) from error
        if isinstance(error, ValueError) and "onfig" in reason:
            raise UsageError(
                f"`scenario.config` does not fit the data set `{name}` ({reason}): name one of its configurations with "
                "`--set scenario.config=NAME`."
            ) from error
        raise DataError(
            f"The data set `{name}` cannot be read ({reason or type(error).__name__}): repair it, or name another."
        ) from error


# ------------------------------------------------------------------------------------ splits and columns


def _choose_splits(splits: Mapping[str, Any], train: str, test: str | None, what: str) -> dict[str, Part | None]:
    """Return the splits to read, each with the part that it serves; None: it serves both, and is divided later."""
    there = ", ".join(f"`{name}`" for name in splits)
    if train not in splits:
        raise DataError(
            f"{what} has no split `{train}`; it has {there}: name the one to learn from by "
            "`--set scenario.train_split=NAME`."
        )
    if test is not None and test not in splits:
        raise DataError(
            f"{what} has no split `{test}`; it has {there}: name the one to test with by "
            "`--set scenario.test_split=NAME`."
        )
    others = [name for name in splits if name != train]
    test = test or next((name for name in TESTS if name in others), None)
    if test is None and others:
        raise DataError(
            f"{what} has no split `test` or `validation`; it has {there}: name the one to test with by "
            f"`--set scenario.test_split=NAME` (`{train}`: a share is drawn)."
        )
    return {train: None} if test in (None, train) else {train: "train", str(test): "test"}


@dataclass(frozen=True)
class _Wanted:
    """A column to find: the option that names it, what it holds, and the types that suit, the best first."""

    option: str
    holds: str
    kinds: Sequence[Callable[[Any], bool]]


def _type_name(feature: Any) -> str:
    """Return the name of a column's type in `datasets`."""
    return getattr(feature, "dtype", "") if type(feature).__name__ == "Value" else type(feature).__name__


_IMAGES = _Wanted(
    "image_column",
    "images",
    (
        lambda f: _type_name(f) == "Image" or (isinstance(f, Mapping) and set(f) == BYTES_AND_PATH),
        lambda f: _type_name(f) in ("binary", "large_binary"),
    ),
)
_LABELS = _Wanted(
    "label_column", "labels", (lambda f: _type_name(f) == "ClassLabel", lambda f: _type_name(f).startswith(LABELS))
)


def _find_column(features: Mapping[str, Any], named: str | None, wanted: _Wanted, what: str) -> str:
    """Return the name of the column of `features` that is `wanted`. Raises `DataError` if none or several suit."""
    suits = [[name for name, feature in features.items() if kind(feature)] for kind in wanted.kinds]
    listed = ", ".join(f"`{name}` ({_type_name(feature)})" for name, feature in features.items())
    option = f"`--set scenario.{wanted.option}=NAME`"
    if named is None:
        best = next(filter(None, suits), [])
        if len(best) == 1:
            return best[0]
        several = " and ".join(f"`{name}`" for name in best)
        raise DataError(
            f"{what} has {wanted.holds} in the columns {several}; choose one with {option}."
            if best
            else f"{what} has no column of {wanted.holds}; it has {listed}."
        )
    if named not in features:
        raise DataError(f"{what} has no column `{named}`; it has {listed}: name the right one with {option}.")
    if not any(named in names for names in suits):
        raise DataError(
            f"The column `{named}` of {what} is {_type_name(features[named])} and holds no {wanted.holds}; "
            f"it has {listed}: name the right one with {option}."
        )
    return named


def _list_entries(dataset: Any, split: str, part: Part | None, image: str, label: str, what: str) -> list[Entry]:
    """Return an entry for each row of a split. Raises `DataError` if rows have no label."""
    import datasets

    names = getattr(dataset.features[label], "names", None)
    values = dataset.data.column(label).to_pylist()
    labels = ["" if v is None or (names and v < 0) else names[v] if names else str(v) for v in values]
    if lacking := [i for i, text in enumerate(labels) if not text]:
        raise DataError(
            f"{len(lacking)} of the {len(labels)} rows of the split `{split}` of {what} have no label in `{label}`, "
            f"the first is row {lacking[0]}; choose another split, or give them labels."
        )
    labels = [normalize_name(text, what) for text in labels]
    column = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False)).data.column(image)
    return [Entry(Row(column, i, split), f"{split}/{i}", text, part) for i, text in enumerate(labels)]


def _class_rank(feature: Any) -> Callable[[str], Any]:
    """Return the key by which classes are sorted: their numbers in a ClassLabel, else their names."""
    names = getattr(feature, "names", None)
    return {normalize_name(name, "the column"): i for i, name in enumerate(names)}.__getitem__ if names else by_name


def _check_names(files: Sequence[str], label: str, names: Sequence[str] | None) -> None:
    """Raise `DataError` if local files number classes differently: `datasets` takes the first one's names for all."""
    if names is None:
        return
    from datasets import Features
    from pyarrow import parquet

    for file in (f for f in files if f.endswith(PARQUET)):
        own = getattr(Features.from_arrow_schema(parquet.read_schema(file)).get(label), "names", names)
        if own != names:
            raise DataError(
                f"The column `{label}` of {file} numbers its classes differently than the other files do; write them "
                "with one ClassLabel, or with names in place of numbers."
            )
