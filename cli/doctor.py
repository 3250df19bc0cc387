"""The command `clframe doctor`: what an installation has, and what it lacks."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from clframe import registry
from clframe.cli import show
from clframe.errors import UsageError
from clframe.settings import data_root as data_folder

PACKAGES = [
    *("clframe", "torch", "torchvision", "numpy", "pluggy", "pydantic", "safetensors", "tensorboard"),
    *("scikit-learn", "avalanche-lib"),
]
# packages, each with the extra of clframe that brings it
OPTIONAL = {"datasets": "huggingface", "onnx": "onnx", "pyarrow": "parquet", "trackio": "trackio", "wandb": "wandb"}


def examine(data_root: str | None) -> dict[str, Any]:
    """Return all findings, as the JSON document has them."""
    import torch

    from clframe.scenarios import sources

    root = data_folder(data_root)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version()}
        | {name: _find_version(name) for name in [*PACKAGES, *OPTIONAL]},
        "device": {
            "auto": "cuda" if devices else "cpu",
            "cuda": devices,
            "threads": torch.get_num_threads(),
        },
        "free_bytes": {"here": _count_free_bytes(Path.cwd()), "data": _count_free_bytes(root)},
        "data_root": str(root),
        "data": {name: str(path) if path else None for name, path in sources.find_all(root)},
        "known_problems": _list_known_problems(),
        "offers": [_try_offer(offer) for kind in registry.GROUPS for offer in registry.offers(kind)],
    }


def report(found: Mapping[str, Any]) -> None:
    """Print the findings of `examine`."""
    missing = {name: f"not here; pip install 'clframe[{extra}]' brings it" for name, extra in OPTIONAL.items()}
    versions = found["versions"].items()
    show.table(["package", "version"], [[name, version or missing.get(name, "missing")] for name, version in versions])
    device = found["device"]
    show.line(f"Device: {', '.join(device['cuda']) or 'CPU'} ({device['threads']} threads)")
    free = found["free_bytes"]
    show.line(f"Free disk: {free['here'] / 1e9:.1f} GB here, {free['data'] / 1e9:.1f} GB for data")
    show.line(f"Data in {found['data_root']}:")
    rows = [[name, path or "not here; downloaded when a run needs it"] for name, path in found["data"].items()]
    show.table(["data set", "where"], rows)
    broken = [offer for offer in found["offers"] if offer["problem"]]
    show.line(f"Plugins, scenarios and models: {len(found['offers']) - len(broken)} in order, {len(broken)} not")
    for offer in broken:
        show.line(f"  {offer['problem']}")
    if found["known_problems"]:
        show.line("Known to be broken in other packages:")
    for problem in found["known_problems"]:
        show.line(f"  {problem}")


def _list_known_problems() -> list[str]:
    """Return what plugins say about faults of the packages that they need; those packages are not imported."""
    found: list[str] = []
    for name in registry.names("plugin"):
        with suppress(UsageError):  # reported with the offers
            found += registry.plugin_class(name).known_problems
    return found


def _find_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _count_free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of `folder`, or of the nearest folder above it that exists."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(there).free


def _try_offer(offer: registry.Offer) -> dict[str, Any]:
    """Load an offer and return a description of it, with the reason why it cannot be used, if any."""
    problem = None
    try:
        registry.find(offer.kind, offer.name)
        if offer.kind == "plugin":
            registry.plugin_class(offer.name)
        else:
            offer.load()
    except UsageError as error:
        problem = str(error)
    return {"kind": offer.kind, "name": offer.name, "package": offer.package, "problem": problem}
