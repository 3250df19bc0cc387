"""Checkpoints: a tree of plain values and tensors as JSON and safetensors, written whole or not at all.

A checkpoint is a folder of three files: ``tree.json``, ``tensors.safetensors``, and ``manifest.json`` with the SHA-256
of the other two, as neither format notices a flipped bit. The folder is written under another name, synced and renamed
into place; the two newest checkpoints are kept. Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clframe.data.batch import ImageData
from clframe.errors import DataError, RunError, of_the_system, out_of_memory
from clframe.model import IncrementalNet, snapshot
from clframe.runs.files import TREE, list_checkpoints
from clframe.runs.sums import TEXT_LIMIT, digest
from clframe.system import writing
from clframe.system.reading import open_regular, read_json
from clframe.system.writing import save_file

CHECKPOINT_FORMAT = 1  # of the files and of the tree in them; docs/reference/compatibility.md has the rule for changes
CHECKPOINT_FILES = (TREE, "tensors.safetensors")
KEPT = 2  # checkpoints


class OtherFormat(DataError):
    """A checkpoint that is whole, and of another format than the one that this clframe reads."""


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Return `value` as data that JSON can hold; its tensors are moved to `tensors`, under their paths.

    Takes None, numbers, strings, tensors, lists, tuples, dicts with string or number keys, `ImageData`, modules and
    optimizers (by their state dicts). Raises `TypeError` for anything else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        while path in tensors:  # two keys may give one path, if they contain slashes
            path += "'"
        tensors[path] = value
        return {"tensor": path} if value.device.type == "cpu" else {"tensor": path, "device": value.device.type}
    if isinstance(value, list | tuple):
        return {
            "tuple" if isinstance(value, tuple) else "list": [
                pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)
            ]
        }
    if isinstance(value, Mapping):
        if strange := [k for k in value if not isinstance(k, str | int | float)]:
            raise TypeError(f"`{path}` has the key {strange[0]!r}; keys in a checkpoint are strings or numbers")
        return {"dict": [[k, pack(v, tensors, f"{path}/{k}")] for k, v in value.items()]}
    if isinstance(value, ImageData):
        columns = {name: column for name, column in vars(value).items() if name != "images"}
        return {"images": pack({"x": value.x, **columns}, tensors, path)}
    if isinstance(value, IncrementalNet):
        return {"net": pack(dict(value.state_dict()), tensors, path), "grown": value.grown}
    if isinstance(value, nn.Module):
        return {"module": pack(dict(value.state_dict()), tensors, path)}
    if isinstance(value, torch.optim.Optimizer):
        return {"optimizer": pack(value.state_dict(), tensors, path)}
    raise TypeError(
        f"`{path}` is a {type(value).__name__}; a checkpoint holds tensors, plain containers, modules, optimizers"
    )


def unpack(
    data: Any,
    tensors: Mapping[str, Tensor],
    like: Any = None,
    structures: Mapping[int, IncrementalNet] | None = None,
    device: torch.device | None = None,
) -> Any:
    """Return the value that was packed; tensors that were on a device go to `device`, those of the CPU stay there.

    A module or optimizer is loaded into `like`, which is returned. An `IncrementalNet`, such as a teacher, is loaded
    into a copy of the network in `structures` whose key is the number of experiences for which the teacher has grown.
    """
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        # a copy: a view into the file's buffer may have another alignment, for which torch may run another kernel
        tensor = tensors[data["tensor"]].clone()
        return tensor.to(device) if "device" in data else tensor
    if "list" in data or "tuple" in data:
        kind, given = next(iter(data.items()))
        items = [unpack(v, tensors, _find_item(like, i), structures, device) for i, v in enumerate(given)]
        return items if kind == "list" else tuple(items)
    if "dict" in data:
        return {k: unpack(v, tensors, _find_item(like, k), structures, device) for k, v in data["dict"]}
    if "images" in data:
        columns = unpack(data["images"], tensors, device=device)
        return ImageData(columns.pop("x"), columns.pop("y"), **columns)
    if "net" in data:
        teacher = snapshot((structures or {})[data["grown"]])
        teacher.load_state_dict(unpack(data["net"], tensors, device=device))
        return teacher
    if "module" in data:
        like.load_state_dict(unpack(data["module"], tensors, device=device))
        return like
    like.load_state_dict(unpack(data["optimizer"], tensors, device=device))
    return like


def collect_grown(data: Any) -> set[int]:
    """Return the numbers of experiences for which networks in packed `data` have grown: the keys of `structures`."""
    if isinstance(data, list):
        return {grown for item in data for grown in collect_grown(item)}
    if isinstance(data, dict):
        return {data["grown"]} if "grown" in data else collect_grown(list(data.values()))
    return set()


def _find_item(container: Any, key: Any) -> Any:
    """Return the item of a container under `key`; None if there is none, or `container` is not one."""
    if isinstance(container, Mapping):
        return container.get(key)
    if isinstance(container, list | tuple) and isinstance(key, int) and key < len(container):
        return container[key]
    return None


def detach_copy(tree: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Return `tree` packed, with copies of its tensors, which the next steps of the run do not change.

    Raises `RunError` if something in `tree` cannot be packed.
    """
    tensors: dict[str, Tensor] = {}
    try:
        packed = pack(tree, tensors)
    except TypeError as error:
        raise RunError(f"No checkpoint can be written: {error}.") from error
    return packed, {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def write(folder: Path, packed: Any, tensors: dict[str, Tensor]) -> Path:
    """Write what `detach_copy` returned as the newest checkpoint in `folder`, whole or not at all, and return its path.

    The checkpoint before it is kept. Raises `RunError` if the disk is full or cannot be written; older ones stay.
    """
    number = max((int(p.name) for p in list_checkpoints(folder)), default=0) + 1
    target = folder / f"{number:06d}"
    beside = folder / f".{number:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if beside.is_symlink():
            beside.unlink()
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        with writing.create(beside / CHECKPOINT_FILES[0]) as file:
            file.write(json.dumps({"format": CHECKPOINT_FORMAT, "tree": packed}).encode("utf-8"))
        _save(tensors, beside / CHECKPOINT_FILES[1])
        for name in CHECKPOINT_FILES:
            writing.sync(beside / name)
        sums = {name: digest(beside / name) for name in CHECKPOINT_FILES}
        writing.write_text(beside / "manifest.json", json.dumps(sums))
        writing.sync(beside)
        beside.rename(target)
        writing.sync(folder)
    except (OSError, DataError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        kept = find_newest(folder)
        if kept == target:
            raise RunError(
                f"The checkpoint {target} is written, and its folder could not be brought to the disk ({error}): make "
                "room and resume."
            ) from error
        raise RunError(
            f"The checkpoint {target} could not be written ({error}); "
            + (
                f"{kept} is kept: make room and resume."
                if kept
                else "there is none yet: make room and resume, which begins the run again."
            )
        ) from error
    for old in list_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load(folder: Path, tell: Callable[[str], None]) -> tuple[Any, dict[str, Tensor]]:
    """Return the packed tree and the tensors of the newest checkpoint in `folder` that is whole.

    `tell` is called with a sentence for each damaged one that is newer. Raises `DataError` if none is whole.
    """
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            loaded = _read(path)
        except OtherFormat:  # not damaged, and an older checkpoint would take the run back
            raise
        except DataError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            tell(f"{problem} The older checkpoint {path.name} is used.")
        return loaded
    if problems:
        raise DataError(
            " ".join(problems)
            + " No other checkpoint is left, and a resume never starts from the beginning: put one back "
            "from a copy, or start a new run."
        )
    raise DataError(
        f"There is no checkpoint in {folder}, so nothing to resume; start the run again with another folder."
    )


def find_newest(folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder`, unverified; None if there is none."""
    return next(reversed(list_checkpoints(folder)), None)


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the packed tree and the tensors of the checkpoint `path`. Raises `DataError` if it is damaged."""
    try:
        strange = sorted(p.name for p in path.iterdir() if p.name not in (*CHECKPOINT_FILES, "manifest.json"))
        if strange:
            raise DataError(
                f"Checkpoint {path} is refused as untrusted: it holds `{strange[0]}`, which clframe did not write."
            )
        sums = read_json(path / "manifest.json")
        for name in CHECKPOINT_FILES:
            if digest(path / name) != sums[name]:
                raise DataError(f"Checkpoint {path} is damaged: {name} is not what was written.")
        data = read_json(path / CHECKPOINT_FILES[0], TEXT_LIMIT)
        if data["format"] != CHECKPOINT_FORMAT:
            raise OtherFormat(
                f"Checkpoint {path} has format {data['format']}, and this clframe reads format {CHECKPOINT_FORMAT}: "
                "resume the run with the clframe that wrote it (environment.json names it)."
            )
        return data["tree"], load_file(path / CHECKPOINT_FILES[1])
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise DataError(f"Checkpoint {path} is damaged: {of_the_system(error) or error}.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write `tensors` as safetensors to `path`, whole or not at all, with the texts `about` in the header.

    Equal tensors give equal bytes. Raises `OSError` if the file cannot be written.
    """
    try:
        with writing.write_beside(path) as beside:
            _save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, about)
    except SafetensorError as error:  # safetensors raises it for errors of the system, too
        raise OSError(errno.EIO, str(error), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises `DataError` if it is missing or damaged."""
    try:
        with open_regular(path):  # gives the system's words for what it refuses; safetensors has other ones
            return load_file(path)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise DataError(f"{path} is missing or damaged: {of_the_system(error) or error}.") from error


def _save(tensors: dict[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """Write a safetensors file and give it the permissions of its folder."""
    if about:
        save_file(tensors, path, about)
    else:
        save_file(tensors, path)
    path.chmod(path.parent.stat().st_mode & 0o666)
