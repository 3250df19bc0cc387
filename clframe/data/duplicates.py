"""Images that are both in training and in test, found by their bytes: refused, dropped from training, or kept."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from torch import Tensor

from clframe.errors import DataError

Duplicates = Literal["refuse", "drop", "keep"]
ROWS = 1024  # rows that a thread reads at a time


def resolve_duplicates(
    duplicates: Duplicates,
    tested: int,
    tests: int,
    learned: int,
    what: str,
    example: str,
    *,
    option: str,
    same_class: bool = True,
) -> str:
    """Return the sentence on images that are learned and tested, for the notes on the data.

    Args:
        duplicates: what is done about them.
        tested: number of test images that are training images, too.
        tests: number of test images.
        learned: number of training images that are test images, too.
        what: name of the data set in sentences.
        example: names of two such images.
        option: how the user gives `duplicates`, up to its value.
        same_class: whether any is tested as the class that it is learned as; other duplicates raise no accuracy.

    Raises:
        DataError: with ``refuse``, if any is of the same class.
    """
    verb = "is" if tested == 1 else "are"
    sentence = f"{tested} of the {tests} test images of {what} {verb} in training, too, such as {example}"
    if duplicates == "refuse" and not same_class:
        return f"{sentence}, of other classes."
    if duplicates == "refuse":
        raise DataError(
            f"{sentence}: leave them out of training with `{option}drop`, or keep them with `{option}keep`."
        )
    if duplicates == "drop":
        sentence += f": {learned} training images are left out"
    return f"{sentence} (`{option.removeprefix('--set ')}{duplicates}`)."


def hash_rows(x: Tensor) -> list[bytes]:
    """Return the SHA-256 of each row of `x` [N, ...], by several threads."""
    rows = x.detach().cpu().contiguous().flatten(1) if x.dim() > 1 else x.detach().cpu().contiguous()[:, None]

    def some(start: int) -> list[bytes]:
        values = rows[start : start + ROWS].numpy()
        return [hashlib.sha256(row.data).digest() for row in values]

    with ThreadPoolExecutor() as pool:
        return [digest for part in pool.map(some, range(0, len(rows), ROWS)) for digest in part]
