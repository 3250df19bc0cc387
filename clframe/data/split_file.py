"""A scenario in a file: the classes and images of each experience, with checksums, to train on the same split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.errors import DataError, UsageError, cannot_write
from clframe.renamed import update_mode
from clframe.system.reading import Unreadable, expand_home, parse_json, quote_path, read_bytes
from clframe.system.texts import cut, quote

if TYPE_CHECKING:
    from clframe.data.batch import ImageData
    from clframe.data.scenario import Scenario
    from clframe.settings import Component

SPLIT_FORMAT = 1
KIND = "clframe scenario"
SUMS = ("data", "split")
# options that a file settles; others, such as the size or the path of images, may be given again
SETTLED = ("experiences", "first", "order", "seed", "limit", "test", "max_angle")
SUFFIX = ".json"
LARGEST = 10_000_000  # bytes


def write_split(path: Path, component: Component, scenario: Scenario, seed: int) -> None:
    """Write `scenario`, built from `component` in a run of the given seed. Raises errors as `save_split` does."""
    from clframe.system.writing import to_json, write_text  # here, as that imports torch

    if path.suffix != SUFFIX:
        raise UsageError(
            f"The split would be written to {path}: give it a name that ends in `{SUFFIX}`, to run from it."
        )
    try:
        write_text(path, to_json(describe_split(component, scenario, seed)))
    except OSError as error:
        raise cannot_write("The split", path, error) from error


def describe_split(component: Component, scenario: Scenario, seed: int) -> dict[str, Any]:
    """Return the content of the file of `scenario`, which was built from `component` in a run of the given seed."""
    options = {name: str(o) if isinstance(o, Path) else o for name, o in component.options.items()}
    if "seed" in options and options["seed"] is None:
        options["seed"] = seed
    return {
        "kind": KIND,
        "format": SPLIT_FORMAT,
        "scenario": {"name": component.name, **options},
        "setting": scenario.setting,
        "class_order": list(scenario.class_order),
        "class_names": list(scenario.class_names),
        "data_sha256": scenario.checksum,
        "split_sha256": checksum(scenario),
        "experiences": [
            {
                "classes": [scenario.class_names[label] for label in experience.classes],
                **{part: _summarize(getattr(experience, part)) for part in ("train", "test")},
            }
            for experience in scenario
        ],
    }


def checksum(scenario: Scenario) -> str:
    """Return the SHA-256 of the classes of all experiences, and of their images' positions and labels, in order."""
    total = hashlib.sha256()
    for experience in scenario:
        total.update(json.dumps(list(experience.classes)).encode())
        for part in (experience.train, experience.test):
            total.update(_hash_rows(part).encode())
    return total.hexdigest()


def read_split(path: Path) -> dict[str, Any]:
    """Return the scenario in a file as a configuration writes it: ``name``, options, and the checksums as ``pinned``.

    Raises:
        UsageError: if there is no such file, or it holds something else.
    """
    try:
        data = parse_json(read_bytes(expand_home(path), LARGEST), path)
    except Unreadable as error:
        raise UsageError(f"The scenario {quote_path(path)} cannot be read: {error.reason}.") from error
    spec = data.get("scenario") if isinstance(data, dict) else None
    if not (
        isinstance(data, dict)
        and data.get("kind") == KIND
        and isinstance(spec, dict)
        and isinstance(spec.get("name"), str)
    ):
        raise UsageError(
            f"{path} holds no scenario: write one with `clframe scenarios show NAME --save FILE.json`; a "
            "configuration is run by `clframe run --config FILE.yaml`."
        )
    if data.get("format") != SPLIT_FORMAT:
        raise UsageError(
            f"The scenario {path} has format {quote(data.get('format'))}, and this clframe reads format "
            f"{SPLIT_FORMAT}: write it again with `clframe scenarios show NAME --save FILE.json`."
        )
    return {**update_mode(spec), "pinned": {name: str(data.get(f"{name}_sha256", "")) for name in SUMS}}


def settled_problems(file: Mapping[str, Any], given: Mapping[str, Any], path: str) -> list[str]:
    """Return a sentence for each option in `given` that differs from what the split of `file`, in `path`, settles."""
    return [
        f"`scenario.{name}` is {cut(json.dumps(given[name]))}, and {path} settles it as {cut(json.dumps(file[name]))}: "
        "leave it out, or name a scenario in place of the file."
        for name in SETTLED
        if name in given and name in file and given[name] != file[name]
    ]


def pinned_problems(pinned: object) -> list[str]:
    """Return a list with a sentence if `pinned` has another form than `read_split` gives it; else an empty one."""
    if isinstance(pinned, Mapping) and {name: type(value) for name, value in pinned.items()} == dict.fromkeys(
        SUMS, str
    ):
        return []
    return [
        f"`scenario.pinned` is {quote(pinned)}; it must hold the checksums `data` and `split` of a scenario's file."
    ]


def check(scenario: Scenario, pinned: Mapping[str, str]) -> None:
    """Raise `DataError` if the data or the split differ from those of the file whose checksums are `pinned`."""
    if scenario.checksum != pinned["data"]:
        raise DataError(
            f"The data of `{scenario.name}` differ from those of the split's file: their SHA-256 is "
            f"{scenario.checksum[:12]}..., there {pinned['data'][:12]}...; use the same images."
        )
    if (found := checksum(scenario)) != pinned["split"]:
        raise DataError(
            f"The split of `{scenario.name}` differs from that of its file, with the same data: its SHA-256 is "
            f"{found[:12]}..., there {pinned['split'][:12]}...; use its options and the version that wrote it."
        )


def _summarize(data: ImageData) -> dict[str, Any]:
    return {"images": len(data), "sha256": _hash_rows(data)}


def _hash_rows(data: ImageData) -> str:
    """Return the SHA-256 of positions and labels, as 64-bit numbers, the lowest byte first."""
    total = hashlib.sha256()
    for column in (data.index, data.y):
        total.update(column.cpu().contiguous().numpy().astype("<i8").tobytes())
    return total.hexdigest()
