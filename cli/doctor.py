"""What `clframe doctor` looks at: what an installation has, and what it lacks."""

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
# what an extra of that name brings, for those who need it
OPTIONAL = {"datasets": "huggingface", "onnx": "onnx", "pyarrow": "parquet"}


def examine(data_root: str | None) -> dict[str, Any]:
    """All findings, as the JSON document has them."""
    import torch

    from clframe.scenarios import sources

    root = data_folder(data_root)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in [*PACKAGES, *OPTIONAL]},
        "device": {
            "auto": "cuda" if devices else "cpu",
            "cuda": devices,
            "threads": torch.get_num_threads(),
        },
        "free_bytes": {"here": _free(Path.cwd()), "data": _free(root)},
        "data_root": str(root),
        "data": {name: str(path) if path else None for name, path in sources.find_all(root)},
        "known_problems": _known_problems(),
        "offers": [_tried(offer) for kind in registry.GROUPS for offer in registry.offers(kind)],
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


def _known_problems() -> list[str]:
    """What plugins tell of the packages that they stand on, which are not imported for it."""
    told: list[str] = []
    for name in registry.names("plugin"):
        with suppress(UsageError):  # told with the offers
            told += registry.plugin_class(name).known_problems
    return told


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _free(folder: Path) -> int:
    """Bytes free on the disk of `folder`, or of the nearest folder above it that exists."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(there).free


def _tried(offer: registry.Offer) -> dict[str, Any]:
    """One offer, with the reason why it cannot be used, if any."""
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
