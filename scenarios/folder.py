"""A scenario of custom images: a folder for each class."""

from __future__ import annotations

import os
import re
from pathlib import Path

from clframe.data.build import suits
from clframe.data.listing import SUFFIXES, LeftOut, class_folders, is_hidden, walk
from clframe.data.scenario import Part, Scenario
from clframe.data.streams import least_classes
from clframe.errors import DataError
from clframe.options import flatten_groups
from clframe.scenarios.files import (
    DEFAULTS,
    Entry,
    FileStream,
    ImageOptions,
    LoadingOptions,
    check_classes,
    divide_entries,
    is_or_are,
    limit_entries,
    list_classes,
    name_reduced,
    normalize_name,
    read_all,
)
from clframe.scenarios.streams import split
from clframe.system.reading import expand_home, quote_path, reason

# names of folders that hold a part of the images, not a class
PART = re.compile(
    "(?:(?P<train>train|training)|(?P<test>test|testing)|(?P<val>val|valid|validation))(?:[ _-]?(?:set|data|images))?",
    re.IGNORECASE,
)


@suits(**DEFAULTS)
@flatten_groups
def split_folder(
    *,
    path: Path,
    stream: FileStream,
    images: ImageOptions,
    skip_empty: bool = False,
    loading: LoadingOptions,
) -> Scenario:
    """Split your own images into experiences of a few classes: class folders in one folder, or in `train` and `test`.

    A class has the name of its folder, and the images in and below the folder; classes are numbered by their sorted
    names. The folders `train` and `test` may be called `training` and `testing`, in upper or lower case; without
    `test`, the images in `val`, `valid` or `validation` are the test images.

    Options:
        path: path of the folder.
        skip_empty: leave out classes without images, instead of naming them and stopping.
    """
    images.format()  # refuses options that do not belong together before anything is read
    root = expand_home(path)
    entries, empty, notes = _list_images(root)
    if empty and not skip_empty:
        raise DataError(
            f"{list_classes([name for name, _ in empty])} in {root} {_has(empty)} no images{_name_other_kinds(empty)}; "
            f"add some, remove the folder{'s' * (len(empty) > 1)}, or leave {'them' if len(empty) > 1 else 'it'} out "
            "with `--set scenario.skip_empty=true`."
        )
    if empty:
        notes.append(
            f"{list_classes([name for name, _ in empty])} {_has(empty)} no images and {is_or_are(len(empty))} left out "
            "(`scenario.skip_empty`)."
        )
    what = str(root)
    labels = {e.label for e in entries}
    if len(labels) < least_classes():
        only = f"one class, `{quote_path(next(iter(labels)))}`" if labels else "no class folders with images"
        raise DataError(
            f"{what} has {only}; it must hold a folder for each class, and two classes at least."
            f"{_suggest_folder(root, entries)}"
        )
    if entries[0].part is None:
        entries = divide_entries(entries, stream.test, stream.seed, what)
    check_classes(entries, what, "add some to learn from, or remove its folder among the test images")
    arrays, kept = read_all(
        root.resolve().name,
        limit_entries(entries, stream.limit),
        images,
        loading,
        what=what,
        notes=notes,
    )
    check_classes(kept, name_reduced(what, images.duplicates), "repair them")
    return split("split-folder", arrays, stream)


def _has(names: list[tuple[str, str]]) -> str:
    return "has" if len(names) == 1 else "have"


def _suggest_folder(root: Path, entries: list[Entry]) -> str:
    """Return a sentence on where the classes of a folder with one class or none may be; empty if nowhere."""
    if not entries:
        beside = sum(path.suffix.lower() in SUFFIXES and not is_hidden(path.name) for path in root.iterdir())
        return f" There {is_or_are(beside)} {beside} image{'s'[: beside != 1]} beside." if beside else ""
    inside = {Path(entry.name).parts[1] for entry in entries if len(Path(entry.name).parts) > 2}
    if len(inside) < 2 or any(len(Path(entry.name).parts) == 2 for entry in entries):
        return ""
    deeper = root / Path(entries[0].name).parts[0]
    return f" If the folders in {quote_path(deeper)} are the classes, name that one with `--set scenario.path=FOLDER`."


def _list_images(root: Path) -> tuple[list[Entry], list[tuple[str, str]], list[str]]:
    """Return the images below `root`, the class folders without any, and sentences on what is left out.

    Each class folder without images comes with the suffixes of the files that it holds instead.
    """
    try:
        if not root.is_dir():
            there = "is not a folder" if root.exists() else "does not exist"
            raise DataError(
                f"The folder {quote_path(root.absolute())} {there}; name that of your class folders with "
                "`--set scenario.path=FOLDER`."
            )
        return _find_images(root)
    except OSError as error:
        raise DataError(
            f"The folder {quote_path(root.absolute())} cannot be read: {reason(error)}; make it readable."
        ) from error


def _find_images(root: Path) -> tuple[list[Entry], list[tuple[str, str]], list[str]]:
    left = LeftOut()
    parts, notes = _find_parts(root, left)
    entries: list[Entry] = []
    empty = []
    for base, part in parts:
        names: dict[str, str] = {}
        for folder in class_folders(base, left):
            label = normalize_name(folder.name, str(base))
            if label in names:
                raise DataError(
                    f"Two folders in {base} are called `{label}`, in two Unicode spellings ({names[label]!a} and "
                    f"{folder.name!a}); put their images into one."
                )
            names[label] = folder.name
            inside = {role for role, _ in map(_read_role, class_folders(folder)) if role}
            if part is None and {"train", "test"} <= inside:
                raise DataError(
                    f"The class folder {folder} holds folders of training and of test images; exchange the levels: "
                    f"`train/{label}` and `test/{label}`."
                )
            images, others = walk(folder, left)
            if not images:
                empty.append((label if part is None else f"{base.name}/{label}", ", ".join(sorted(others))))
            entries += [Entry(file, os.path.relpath(file, root), label, part) for file in images]
    return entries, empty, [*notes, *left.sentences(root.resolve().name)]


def _read_role(folder: Path) -> tuple[Part | None, bool]:
    """Return the part that a folder of this name holds, None for a class; and whether the part is validation."""
    match = PART.fullmatch(folder.name)
    if not match:
        return None, False
    return ("train" if match["train"] else "test"), bool(match["val"])


def _find_parts(root: Path, left: LeftOut) -> tuple[list[tuple[Path, Part | None]], list[str]]:
    """Return the folders that hold class folders with their parts, and sentences on what is left out.

    Raises:
        DataError: if it is not clear which folder holds which part.
    """
    train, test, val, others = list[Path](), list[Path](), list[Path](), list[Path]()
    for folder in class_folders(root):
        part, validates = _read_role(folder)
        (others if part is None else train if part == "train" else val if validates else test).append(folder)
    if not train or not test + val:
        halves = train + test + val
        if halves and not others:
            missing = "test" if train else "train"
            raise DataError(
                f"{root} has a folder `{halves[0].name}` and none `{missing}`; add that, or name {halves[0]} as the "
                "path to have test images drawn."
            )
        return [(root, None)], []
    for same in (train, test, val):
        if len(same) > 1:
            listed = " and ".join(f"`{folder.name}`" for folder in same)
            raise DataError(f"{root} has the folders {listed}, which mean the same; put their images into one of them.")
    notes = []
    tested = test or val
    if test and val:
        if not class_folders(test[0]):  # as in competitions, where test images have no labels
            tested, spare = val, test[0]
        else:
            spare = val[0]
        notes.append(
            f"The folder `{spare.name}` is left out of {root.resolve().name}: `{train[0].name}` is learned and "
            f"`{tested[0].name}` is tested with."
        )
    class_folders(root, left)
    for folder in others:
        if walk(folder, LeftOut())[0]:
            raise DataError(
                f"{root} has the folder `{folder.name}` with images beside `{train[0].name}` and `{tested[0].name}`; "
                "move its images into these, or the folder elsewhere."
            )
        left.add("folders without images", folder.name)
    return [(train[0], "train"), (tested[0], "test")], notes


def _name_other_kinds(empty: list[tuple[str, str]]) -> str:
    """Return words on the files that lie in place of images, of kinds that are not read; empty without any."""
    endings = sorted({others for _, others in empty if others})
    return f" (but files of the kinds {', '.join(endings)}, which are not read)" if endings else ""
