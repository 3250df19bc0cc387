"""The image files of a folder, by one rule for training and prediction, and a count of what is left out."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from clframe.system.texts import by_name

SUFFIXES = (  # suffixes of the formats that `clframe.data.decode` reads
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
SILENT = ("Thumbs.db", "desktop.ini", "__MACOSX")  # files and folders that operating systems create
SHOWN = 5  # kinds of files that a sentence lists at most

HIDDEN_FILES = "hidden files or folders"
FOLDER_LINKS = "links to folders"
UNREADABLE_FOLDERS = "folders that cannot be read"
OTHER_FILES = "files of other kinds"
IMAGES_BESIDE = "images beside the class folders"


class LeftOut:
    """Content of a folder that is not read, counted by reason.

    Attributes:
        counts: number of files or folders by reason.
        examples: first names by reason.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, example: str) -> None:
        """Count one more file or folder for `reason`, and keep the first names as examples."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if example not in examples and len(examples) < SHOWN:
            examples.append(example)

    def sentences(self, what: str) -> list[str]:
        """Return a list with a sentence on what is left out of the folder `what`; empty if nothing is."""
        reasons = [f"{reason} ({n}: {', '.join(self.examples[reason])})" for reason, n in sorted(self.counts.items())]
        return [f"Left out of {what}: {', '.join(reasons)}."] if reasons else []


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or created by an operating system."""
    return name.startswith(".") or name in SILENT


def class_folders(base: Path, left: LeftOut | None = None) -> list[Path]:
    """Return the folders in `base` that are not hidden, sorted; add hidden ones and images beside them to `left`."""
    found = []
    for path in base.iterdir():
        hidden = is_hidden(path.name)
        if path.is_dir():
            if not hidden:
                found.append(path)
            elif left and path.name not in SILENT:
                left.add(HIDDEN_FILES, path.name)
        elif left and path.suffix.lower() in SUFFIXES:
            left.add(HIDDEN_FILES if hidden else IMAGES_BESIDE, path.name)
    return sorted(found, key=lambda path: by_name(path.name))


def walk(folder: Path, left: LeftOut) -> tuple[list[str], Counter[str]]:
    """Return the paths of the image files in and below `folder`, sorted, and the suffixes of other files, counted.

    An image has one of the `SUFFIXES`, and neither the image nor a folder on its path is hidden; hidden files are not
    among the others. Links to files are followed, links to folders are not: a link may lead back. What is left out is
    added to `left`.
    """
    images, others = list[str](), Counter[str]()
    waiting = [str(folder)]
    while waiting:  # without recursion, whose limit a deep folder would exceed, as in `os.walk`
        at = waiting.pop()
        try:
            with os.scandir(at) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError:
            left.add(UNREADABLE_FOLDERS, os.path.relpath(at, folder))
            continue
        for entry in entries:
            suffix = Path(entry.name).suffix.lower()
            if _is_folder(entry):
                if is_hidden(entry.name):
                    if entry.name not in SILENT:
                        left.add(HIDDEN_FILES, entry.name)
                elif entry.is_symlink():
                    left.add(FOLDER_LINKS, entry.name)
                else:
                    waiting.append(entry.path)
            elif is_hidden(entry.name):
                if suffix in SUFFIXES:
                    left.add(HIDDEN_FILES, entry.name)
            elif suffix in SUFFIXES:
                images.append(entry.path)
            else:
                others[suffix or entry.name] += 1
                left.add(OTHER_FILES, suffix or entry.name)
    return sorted(images), others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether `entry` is a folder or a link to one; False for a link that leads nowhere."""
    try:
        return entry.is_dir()
    except OSError:
        return False
