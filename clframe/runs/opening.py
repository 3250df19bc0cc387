"""The door from a run folder to its trained model, which the package sets: `load` stands above this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clframe.deploy.trained import Trained

_openers: list[Callable[[Path], Trained]] = []


def open_with(opener: Callable[[Path], Trained]) -> None:
    """Set what opens the trained model of a run folder."""
    _openers[:] = [opener]


def open_model(folder: Path) -> Trained:
    """Return the trained model of the finished run in `folder`. Raises `DataError` as `clframe.load`."""
    return _openers[0](folder)
