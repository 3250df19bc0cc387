"""A scenario of one's own images: a folder for each class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from clframe.arrays import suits
from clframe.data import Part, Scenario, Setting
from clframe.errors import DataError
from clframe.look import Crop, Look, Mode
from clframe.options import Count, CountOrZero
from clframe.reading import expanded
from clframe.scenarios.files import (
    DEFAULTS,
    Entry,
    by_name,
    check_classes,
    classes,
    divided,
    groups_for,
    limited,
    read_all,
    walk,
)
from clframe.scenarios.streams import Order, documented, split

TestShare = Annotated[float, Field(gt=0, lt=1)]
PARTS: tuple[Part, Part] = ("train", "test")


@suits(**DEFAULTS)
@documented
def split_folder(
    *,
    path: Path,
    setting: Setting = "class",
    experiences: Count | None = None,
    first: Count | None = None,
    order: Order = "natural",
    seed: CountOrZero | None = None,
    limit: Count | None = None,
    test: TestShare = 0.2,
    size: Count = 64,
    crop: Crop = "center",
    resize: Count | None = None,
    mode: Mode = "colour",
    skip_broken: bool = False,
    skip_empty: bool = False,
    normalize: bool = True,
    augment: bool = True,
    memory: CountOrZero = 2_000_000_000,
    workers: Count | None = None,
) -> Scenario:
    """One's own images, a few classes at a time: a folder of class folders, or one each in `train` and `test`.

    A class is called as its folder, and has the images in and below it; classes are numbered by their sorted names.
    """
    look = Look(size, crop, resize, mode)
    root = expanded(path)
    entries, empty = _listed(root)
    if empty and not skip_empty:
        raise DataError(
            f"{classes([name for name, _ in empty])} in {root} has no images{_instead(empty)}; add some, remove the "
            "folder, or leave it out with `--set scenario.skip_empty=true`."
        )
    what = str(root)
    labels = {e.label for e in entries}
    if len(labels) < 2:
        only = f"one class, `{next(iter(labels))}`" if labels else "no class folders with images"
        raise DataError(f"{what} has {only}; it must hold a folder for each class, and two classes at least.")
    if entries[0].part is None:
        entries = divided(entries, test, seed, what)
    check_classes(entries, what, "add some to learn from, or remove its folder in `test`")
    arrays, kept = read_all(
        root.resolve().name,
        limited(entries, limit),
        look,
        what=what,
        skip_broken=skip_broken,
        memory=memory,
        workers=workers,
        normalize=normalize,
        augment=augment,
    )
    check_classes(kept, f"{what}, without its broken images,", "repair them")
    experiences, first = groups_for(len(arrays.class_names), experiences, first)
    return split("split-folder", arrays, setting, experiences, first, order, seed, None)


def _listed(root: Path) -> tuple[list[Entry], list[tuple[str, str]]]:
    """All images below `root`, and the class folders without any, each with the endings of what they hold instead."""
    if not root.is_dir():
        there = "is no folder" if root.exists() else "does not exist"
        raise DataError(
            f"The folder {root.absolute()} {there}; name that of your class folders with `--set scenario.path=FOLDER`."
        )
    halves = [part for part in PARTS if (root / part).is_dir()]
    if len(halves) == 1 and len(_folders(root)) == 1:
        missing = PARTS[1 - PARTS.index(halves[0])]
        raise DataError(
            f"{root} has a folder `{halves[0]}` and none `{missing}`; add that, or name {root / halves[0]} as the path "
            "to have test images drawn."
        )
    parts: list[tuple[Path, Part | None]] = [(root, None)]
    if len(halves) == 2:
        parts = [(root / part, part) for part in PARTS]
    entries: list[Entry] = []
    empty = []
    for base, part in parts:
        for folder in _folders(base):
            images, others = walk(folder)
            if not images:
                label = folder.name if part is None else f"{part}/{folder.name}"
                empty.append((label, ", ".join(sorted(others))))
            entries += [Entry(file, os.path.relpath(file, root), folder.name, part) for file in images]
    return entries, empty


def _folders(base: Path) -> list[Path]:
    found = [path for path in base.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=lambda path: by_name(path.name))


def _instead(empty: list[tuple[str, str]]) -> str:
    """What is there in place of images, which may be of a kind that is not read."""
    endings = sorted({others for _, others in empty if others})
    return f" (but files of the kinds {', '.join(endings)}, which are not read)" if endings else ""
