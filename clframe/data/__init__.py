"""Data: images, batches, scenarios, and how files become images.

The names that other packages use are loaded at first use, so that listing scenarios does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clframe.data.batch import Batch, ImageData
    from clframe.data.scenario import Experience, Part, Scenario, Setting
    from clframe.data.transform import Transform

__all__ = ["Batch", "Experience", "ImageData", "Part", "Scenario", "Setting", "Transform"]

_HOME_OF = {
    "Batch": "batch",
    "ImageData": "batch",
    "Experience": "scenario",
    "Part": "scenario",
    "Scenario": "scenario",
    "Setting": "scenario",
    "Transform": "transform",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'clframe.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clframe.data.{_HOME_OF[name]}"), name)
