"""clframe: continual learning with methods you can install, compose and trust.

The public names are loaded when first used (PEP 562): importing clframe does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clframe.renamed import MODULES, PUBLIC, now_called

if TYPE_CHECKING:
    from clframe.api import extend, load, resume, run, save_split
    from clframe.avalanche.adapter import as_avalanche
    from clframe.avalanche.benchmark import from_avalanche
    from clframe.context import Run
    from clframe.data.batch import Batch, ImageData
    from clframe.data.build import Arrays, change_domains, split_classes, suits
    from clframe.data.scenario import Experience, Scenario
    from clframe.data.transform import Transform
    from clframe.deploy.trained import Answer, Prediction, Trained
    from clframe.errors import ClframeError, DataError, Interrupted, RunError, UsageError
    from clframe.evaluate import Predictor
    from clframe.hooks import hookimpl
    from clframe.model import IncrementalNet, Outputs, snapshot
    from clframe.plugin import Plugin
    from clframe.runs.results import Results
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
    "RunError",
    "Scenario",
    "Trained",
    "Transform",
    "UsageError",
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
    "api": "extend load resume run save_split",
    "avalanche.adapter": "as_avalanche",
    "avalanche.benchmark": "from_avalanche",
    "context": "Run",
    "data.batch": "Batch ImageData",
    "data.build": "Arrays change_domains split_classes suits",
    "data.scenario": "Experience Scenario",
    "data.transform": "Transform",
    "deploy.trained": "Answer Prediction Trained",
    "errors": "ClframeError DataError Interrupted RunError UsageError",
    "evaluate": "Predictor",
    "hooks": "hookimpl",
    "model": "IncrementalNet Outputs snapshot",
    "plugin": "Plugin",
    "runs.results": "Results",
    "training": "Phase",
}
_HOME_OF = {name: f"clframe.{home}" for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in PUBLIC:  # an AttributeError would lose its text in `from clframe import ...`
        raise ImportError(now_called(f"clframe.{name}", f"clframe.{PUBLIC[name]}"))
    if moved := MODULES.get(f"clframe.{name}"):
        raise ImportError(now_called(f"clframe.{name}", moved))
    if name not in _HOME_OF:
        raise AttributeError(f"module 'clframe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
