"""clframe: continual learning with methods you can install, compose and trust.

The public names are loaded when first used (PEP 562): importing clframe does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clframe.adapter import as_avalanche
    from clframe.api import extend, load, resume, run
    from clframe.arrays import Arrays, change_domains, split_classes, suits
    from clframe.benchmark import from_avalanche
    from clframe.context import Run
    from clframe.data import Batch, Experience, ImageData, Scenario, Transform
    from clframe.errors import ClframeError, DataError, Interrupted, RunFailed, WrongUse
    from clframe.evaluate import Predictor
    from clframe.hooks import hookimpl
    from clframe.model import IncrementalNet, Outputs, snapshot
    from clframe.plugin import Plugin
    from clframe.results import Results
    from clframe.splits import save_split
    from clframe.trained import Answer, Prediction, Trained
    from clframe.training import Phase

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Arrays",
    "Batch",
    "ClframeError",
    "DataError",
    "Experience",
    "ImageData",
    "IncrementalNet",
    "Interrupted",
    "Outputs",
    "Phase",
    "Plugin",
    "Prediction",
    "Predictor",
    "Results",
    "Run",
    "RunFailed",
    "Scenario",
    "Trained",
    "Transform",
    "WrongUse",
    "as_avalanche",
    "change_domains",
    "extend",
    "from_avalanche",
    "hookimpl",
    "load",
    "resume",
    "run",
    "save_split",
    "snapshot",
    "split_classes",
    "suits",
]

_HOMES = {
    "adapter": "as_avalanche",
    "api": "extend load resume run",
    "context": "Run",
    "arrays": "Arrays change_domains split_classes suits",
    "benchmark": "from_avalanche",
    "data": "Batch Experience ImageData Scenario Transform",
    "errors": "ClframeError DataError Interrupted RunFailed WrongUse",
    "evaluate": "Predictor",
    "hooks": "hookimpl",
    "model": "IncrementalNet Outputs snapshot",
    "plugin": "Plugin",
    "results": "Results",
    "trained": "Answer Prediction Trained",
    "splits": "save_split",
    "training": "Phase",
}
_HOME_OF = {name: f"clframe.{home}" for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'clframe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
