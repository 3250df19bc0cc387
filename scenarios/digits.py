"""Scenarios of the 1,797 real 8x8 digits that scikit-learn brings along, so that nothing is downloaded."""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clframe.data.build import Arrays, suits
from clframe.data.scenario import Scenario
from clframe.data.transform import Transform
from clframe.errors import DataError
from clframe.options import flatten_groups
from clframe.scenarios.streams import Permuted, Rotated, Split, permute_pixels, rotate_images, split

IMAGES = 1797
TRAIN_IMAGES = 1297  # the other 500 are the test images

# A new Adam for each experience, and long enough for a network without help to forget.
DOMAINS: dict[str, Any] = {
    "backbone": {"name": "mlp", "hidden": [256, 256]},
    "train": {"optimizer": "adam", "lr": 1e-3, "batch_size": 32, "epochs": 10, "threads": 1},
}


def digits() -> Arrays:
    """Return the digits, uint8 [N, 1, 8, 8] with values from 0 to 16: 1,297 training and 500 test images.

    The division is fixed: the first 1,297 of ``numpy.random.RandomState(0).permutation(1797)`` are training images.

    Raises:
        DataError: if scikit-learn's file is missing or damaged.
    """
    spec = importlib.util.find_spec("sklearn")  # finds the folder without importing it, which takes seconds
    if spec is None or spec.origin is None:
        raise DataError("The digits come with scikit-learn, which is not installed; install it.")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path) as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        if table.shape != (IMAGES, 65):
            raise ValueError(f"it is a table of {table.shape}")
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"The digits cannot be read from {path} ({error}); install scikit-learn again.") from error
    x, y = torch.from_numpy(table[:, :64].reshape(-1, 1, 8, 8)), torch.from_numpy(table[:, 64])
    order = torch.from_numpy(np.random.RandomState(0).permutation(IMAGES))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    return Arrays("digits", x[train], y[train], x[test], y[test], tuple("0123456789"), Transform(scale=16))


# One Adam for all experiences, as most published split-digit protocols have it; 300 steps learn two classes.
@suits(
    backbone="mlp-100",
    train={"optimizer": "adam", "lr": 1e-3, "batch_size": 32, "iterations": 300, "keep_optimizer": True, "threads": 1},
)
@flatten_groups
def split_digits(*, stream: Split) -> Scenario:
    """Split the ten digits, 8x8, into experiences of a few classes."""
    return split("split-digits", digits().limited(stream.limit), stream)


@suits(**DOMAINS)
@flatten_groups
def permuted_digits(*, stream: Permuted) -> Scenario:
    """Show all ten digits, 8x8, in each experience with their pixels in another random order."""
    return permute_pixels("permuted-digits", digits(), stream)


@suits(**DOMAINS)
@flatten_groups
def rotated_digits(*, stream: Rotated) -> Scenario:
    """Show all ten digits, 8x8, in each experience turned further."""
    return rotate_images("rotated-digits", digits(), stream)
