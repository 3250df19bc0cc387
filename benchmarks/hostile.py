"""Generated inputs that nobody means well with, each given to a command in a process of its own.

    python benchmarks/hostile.py 10000

Settings, YAML, files of scenarios, tables, images, data sets, command lines, short runs with extreme numbers, and run
folders of which a file was changed with its checksums right. Each input follows from its number, so that one that
failed can be repeated (``--first N 1``). A fault is: exit code 70, a traceback, an end by a signal, 10 s of CPU time or
45 s in all, 1 GB of memory more than before, a file changed elsewhere, payload code that was run, an escape code on the
terminal, or more than 300 kB of text.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CPU = 10  # seconds
WALL = 45.0  # seconds
MEMORY = 2**30  # bytes more than a process that does nothing
ADDRESSES = 6 * 2**30  # bytes of address space more
TEXT = 300_000  # bytes
PRECIOUS = "what must stay as it is"
LOST = 99  # the exit code of a process in which an exception left `main`

SHARES = {  # of the inputs
    "settings": 0.26,
    "yaml": 0.22,
    "scenario files": 0.08,
    "tables": 0.09,
    "images": 0.08,
    "data sets": 0.06,
    "command lines": 0.11,
    "extreme numbers": 0.02,
    "run folders": 0.08,
}


@dataclass(frozen=True)
class Fault:
    """What went wrong with the input of this number."""

    number: int
    family: str
    what: str
    said: str


# ------------------------------------------------------------------------------------------ what is given

Dice = random.Random


def hostile(dice: Dice, here: Path) -> Any:
    """Return a value that a reader may not expect."""
    marker = here / "marker"
    simple: list[Any] = [
        *(0, -1, 1, 3, 2**31, 2**63, 2**64, -(2**70), 10**299, True, False, None),
        *(0.0, -0.0, 1e-320, 0.5, 1e300, -1e308, float("nan"), float("inf"), -float("inf")),
        *("", " ", "x", "0", "null", "nan", "ewc", "split-digits", "cuda:99", "../../outside/precious", "/dev/zero"),
        *("~nosuchuser/x", "~", "/", ".", "..", "a/b", "\u202eabc", "\x1b]0;owned\x07x", "a\nb", "猫", "é", "👩‍🔬"),
        *("\ud800", "\udcff", "\x00", "x" * 300, "y" * 100_000, "%s%n", "{0}", "$(touch marker)", f"`touch {marker}`"),
        *(f"!!python/object/apply:os.system ['touch {marker}']", f"__import__('os').system('touch {marker}')"),
        *([], {}, [[]], [1, "a"], {"name": 3}, {"a": {"b": []}}, list(range(50)), ["z"] * 3_000),
    ]
    kind = dice.randrange(12)
    if kind == 0:
        return nested(dice.choice((3, 60, 5_000)))
    if kind == 1:
        return {dice.choice(("name", "a", "\x1b[31m", "x" * 500)): hostile(dice, here)}
    if kind == 2:
        return "".join(chr(dice.choice((dice.randrange(32, 127), dice.randrange(0x250)))) for _ in range(8))
    if kind == 3:
        return dice.choice((dice.uniform(-10, 10), dice.randrange(-5, 100), 10.0 ** dice.randrange(-300, 300)))
    return dice.choice(simple)


def nested(depth: int) -> Any:
    """Return lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def written(value: Any) -> str:
    """Return `value` as JSON, which is YAML; also what nests too deeply for Python's own writer."""
    try:
        return json.dumps(value)
    except (RecursionError, ValueError):
        return "[" * 5_000 + "]" * 5_000


def raw(dice: Dice, here: Path) -> str:
    """Return what a person may have typed for a value."""
    odd = [
        "1" * 5_000,
        "-" + "9" * 400,
        "[" * 5_000,
        "{" * 300,
        "&a [*a]",
        "!!binary x",
        "1e999",
        "0x1f",
        "1__0",
        ": :",
    ]
    odd += [
        "'",
        '"',
        "{a: 1, a: 2}",
        "? a",
        "- - -",
        "|",
        "%YAML 9",
        "a: b: c",
        "\t",
        "@",
        "2e1",
        "1:30",
        "[1,",
        "x" * 200_000,
    ]
    return dice.choice(odd) if dice.random() < 0.4 else written(hostile(dice, here))


def damaged(dice: Dice, content: bytes) -> bytes:
    """Return `content` with bits flipped, a part cut off, left out, repeated or replaced."""
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        if not data:
            break
        at, length = dice.randrange(len(data)), dice.choice((1, 4, 64))
        match dice.randrange(6):
            case 0:
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length] * dice.choice((1, 50))
            case 4:
                data[at : at + length] = dice.randbytes(length)
            case 5:
                data[at : at + 4] = dice.choice((b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"))
    return bytes(data)


def changed(dice: Dice, value: Any, here: Path) -> Any:
    """Return `value` with one of its parts replaced, removed or added."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        value = dict(value)
        match dice.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[written(hostile(dice, here))[:200]] = value[key]
            case _:
                value[key] = changed(dice, value[key], here)
        return value
    if isinstance(value, list) and value and dice.random() < 0.8:
        at = dice.randrange(len(value))
        return [*value[:at], changed(dice, value[at], here), *value[at + 1 :]]
    return hostile(dice, here)


class Samples:
    """What inputs are made of, made once: names of options, images, finished and stopped runs.

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        from PIL import Image

        import clframe
        from clframe import registry
        from clframe.config import RunSettings, TrainSettings
        from clframe.options import options_of
        from clframe.scenarios import files, sources, table  # noqa: F401 - imported before the forks

        self.train, self.run = list(TrainSettings.model_fields), list(RunSettings.model_fields)
        self.plugins = [name for name in registry.names("plugin") if name not in ("avalanche", "tensorboard")]
        self.plugins = [name for name in self.plugins if not registry.plugin_class(name).variants]
        self.options = {name: [o.name for o in options_of(registry.plugin_class(name))] for name in self.plugins}
        scenarios = ("split-digits", "permuted-digits", "split-folder", "split-table")
        self.scenarios = {n: [o.name for o in options_of(registry.builder("scenario", n))] for n in scenarios}
        self.models = registry.names("model")
        self.finished, self.split = folder / "finished", folder / "split.json"
        short = {"iterations": 3, "threads": 1, "val": 0.2}
        run = {"output": str(self.finished), "device": "cpu", "tensorboard": False}
        clframe.run({"name": "split-digits", "experiences": 2, "limit": 8}, "mlp", ["er"], train=short, run=run)
        rng = np.random.default_rng(0)
        self.images: dict[str, bytes] = {}
        for mode, kinds in {
            "L": ".png .gif .pgm .tif",
            "RGB": ".png .jpg .bmp .webp .ppm .tif",
            "RGBA": ".png .webp",
        }.items():
            for kind in kinds.split():
                shape = (9, 11) if mode == "L" else (9, 11, len(mode))
                held = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(
                    held, Image.registered_extensions()[kind]
                )
                self.images[f"{mode}{kind}"] = held.getvalue()
        self.images["bomb.png"] = png_of(13_000, 13_000)
        self.images["eps.png"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
        self.images["text.png"] = b"text"


def png_of(width: int, height: int) -> bytes:
    """Return a black PNG of this size, which is small in the file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    head = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------- families


def option(dice: Dice, samples: Samples, plugins: Sequence[str]) -> str:
    """Return the full name of an option, mostly one that is there."""
    section = dice.choice(["train", "train", "run", "scenario", "model", *plugins, "x"])
    names = {
        "train": samples.train,
        "run": samples.run,
        "scenario": samples.scenarios["split-digits"],
        "model": ["hidden"],
    }
    names |= samples.options
    return f"{section}.{dice.choice([*names.get(section, []), 'name', 'x'])}"


def settings(dice: Dice, samples: Samples, here: Path) -> list[str]:
    """Return a command with values of settings."""
    plugins = dice.sample(samples.plugins, dice.choice((0, 1, 1, 2)))
    sets = [f"{option(dice, samples, plugins)}={raw(dice, here)}" for _ in range(dice.choice((1, 1, 2, 4)))]
    if dice.random() < 0.05:
        sets.append(raw(dice, here))
    named = [part for plugin in plugins for part in ("--plugin", plugin)]
    return ["run", "--dry-run", *named, *(part for one in sets for part in ("--set", one))]


def a_config(dice: Dice, samples: Samples) -> dict[str, Any]:
    """Return a configuration that is right."""
    plugins = dice.sample(samples.plugins, 2)
    return {
        "scenario": {"name": "split-digits", "experiences": 5, "setting": "class", "limit": 9},
        "model": {"name": dice.choice(samples.models), "hidden": [20]},
        "plugins": dice.choice(({name: {} for name in plugins}, plugins, [{plugins[0]: {}}])),
        "train": {"lr": 0.1, "epochs": 2, "betas": [0.9, 0.99], "first": {"epochs": 3}},
        "run": {"seed": 3, "output": None, "device": "cpu"},
    }


def yaml(dice: Dice, samples: Samples, here: Path) -> list[str]:
    """Return a command with a YAML file."""
    config = a_config(dice, samples)
    for _ in range(dice.choice((1, 2, 4))):
        config = changed(dice, config, here)
    text = written(config).encode()
    match dice.randrange(8):
        case 0 | 1:
            text = damaged(dice, text)
        case 2:
            text = raw(dice, here).encode("utf-8", "surrogatepass")
        case 3:
            text = "".join(f"k{i}: {{a: [{i}]}}\n" for i in range(dice.choice((10, 9_000)))).encode()
        case 4:
            import yaml as writer

            with contextlib.suppress(Exception):
                text = writer.dump(config, allow_unicode=True).encode("utf-8", "surrogatepass")
    (here / "config.yaml").write_bytes(text)
    return ["run", "--dry-run", "--config", "config.yaml"]


def scenario_files(dice: Dice, samples: Samples, here: Path) -> list[str]:
    """Return a command with a scenario's file."""
    data = json.loads(samples.split.read_text())
    for _ in range(dice.choice((1, 2, 4))):
        data = changed(dice, data, here)
    text = written(data).encode()
    if dice.random() < 0.3:
        text = damaged(dice, text)
    (here / "split.json").write_bytes(text)
    if dice.random() < 0.5:
        return ["run", "--dry-run", "--scenario", "split.json"]
    return ["scenarios", "show", "split.json", *(["--json"] if dice.random() < 0.3 else [])]


def tables(dice: Dice, samples: Samples, here: Path) -> list[str]:
    """Return a command with a table of images."""
    for i in range(4):
        (here / f"{i}.png").write_bytes(samples.images["RGB.png"])
    columns = [
        "path",
        "label",
        *dice.sample(["task", "domain", "split", "x", "", "path", "\x1b[31m"], dice.randrange(3)),
    ]
    rows = [
        [f"{i % 4}.png", "ab"[i % 2], *(dice.choice(("1", "train", "test")) for _ in columns[2:])] for i in range(12)
    ]
    for _ in range(dice.choice((0, 1, 3))):
        row = dice.choice(rows)
        value = hostile(dice, here)
        row[dice.randrange(len(row))] = value if isinstance(value, str) else written(value)[:5_000]
    kind = dice.choice(("csv", "csv", "tsv", "parquet"))
    path = here / f"table.{kind}"
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        types: list[Callable[[str], Any]] = [
            str,
            lambda v: v.encode("utf-8", "replace"),
            len,
            lambda v: [v],
            lambda v: {"a": v},
        ]
        held: dict[str, Any] = {}
        for at, name in enumerate(columns):
            turn = dice.choice(types) if dice.random() < 0.3 else str
            held[name] = [turn(row[at]) for row in rows]
        try:
            parquet.write_table(pyarrow.table(held), path)
        except Exception:  # the library refuses surrogates, and columns of one name
            path.write_bytes(b"PAR1")
    else:
        lines = "\n".join((",", "\t")[kind == "tsv"].join(row) for row in [columns, *rows])
        path.write_bytes(lines.encode(dice.choice(("utf-8", "utf-8", "utf-16", "latin-1")), "replace"))
    if dice.random() < 0.4:
        path.write_bytes(damaged(dice, path.read_bytes()))
    sets = [
        f"scenario.path={path.name}",
        "scenario.size=4",
        f"scenario.setting={dice.choice(('class', 'task', 'domain'))}",
    ]
    return ["scenarios", "show", "split-table", *(part for one in sets for part in ("--set", one))]


def images(dice: Dice, samples: Samples, here: Path) -> list[str]:
    """Return a command with folders of images."""
    names = [
        "a.png",
        "b.jpg",
        "ä.png",
        "\x1b]0;x\x07.png",
        "new\nline.png",
        "z" * 200 + ".png",
        ".hidden.png",
        "c.PNG",
        "d.svg",
    ]
    for label in ("a", "b"):
        (here / "images" / label).mkdir(parents=True)
        for i in range(3):
            (here / "images" / label / f"{i}.png").write_bytes(samples.images["RGB.png"])
    for _ in range(dice.choice((1, 2))):
        file = here / "images" / dice.choice("ab") / dice.choice(names)
        file.unlink(missing_ok=True)
        match dice.randrange(12):
            case 0:
                os.mkfifo(file)
            case 1:
                file.symlink_to(dice.choice(("/", "/dev/zero", "..", ".", file.name, "missing", "/proc/self/mem")))
            case 2:
                file.mkdir()
            case 3:
                os.close(os.open(os.fsencode(file.parent) + b"/\xff\xfe.png", os.O_CREAT | os.O_WRONLY))
            case 4:
                (file.parent.parent / dice.choice(("\x1b[31mred", "c\nd", "e" * 200, "train", " "))).mkdir(
                    exist_ok=True
                )
            case _:
                content = samples.images[dice.choice(list(samples.images))]
                file.write_bytes(damaged(dice, content) if len(content) < 10_000 and dice.random() < 0.9 else content)
    if dice.random() < 0.5:
        skip = ["--skip-unreadable"] if dice.random() < 0.5 else []
        return ["predict", str(samples.finished), "images", *skip, *(["--json"] if dice.random() < 0.2 else [])]
    sets = ["scenario.path=images", "scenario.size=4", f"scenario.skip_broken={dice.choice(('true', 'false'))}"]
    return ["scenarios", "show", "split-folder", *(part for one in sets for part in ("--set", one))]


class Payload:
    """A pickle that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def data_sets(dice: Dice, samples: Samples, here: Path) -> list[str]:
    """Return a command with a data set in one of its layouts."""
    rng = np.random.default_rng(dice.randrange(2**32))
    sizes = {"train": 40, "test": 20}
    arrays: dict[str, Any] = {
        f"x_{part}": rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in sizes.items()
    }
    arrays |= {f"y_{part}": (np.arange(n) % 10).astype(np.uint8) for part, n in sizes.items()}
    key = dice.choice(list(arrays))
    if dice.random() < 0.5:
        file = here / "data" / "mnist.npz"
        file.parent.mkdir()
        match dice.randrange(8):
            case 0:
                arrays[key] = np.array([Payload(here / "marker")], dtype=object)
            case 1:
                arrays[key] = dice.choice(
                    (arrays[key].astype("f8"), arrays[key][..., None], arrays[key][:0], np.array("x"))
                )
            case 2:
                del arrays[key]
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as packed:
            for name, array in arrays.items():
                one = io.BytesIO()
                np.save(one, array)
                content = one.getvalue()
                if name == key and dice.random() < 0.4:
                    head = dice.choice(
                        (b"(" * 5_000, b"{'descr': 'O', 'fortran_order': False, 'shape': (1,)}", b"9" * 5_000)
                    )
                    head = head if dice.random() < 0.5 else damaged(dice, content[10:128])
                    content = content[:8] + len(head).to_bytes(2, "little") + head + content[128:]
                if name == key and dice.random() < 0.03:
                    content = bytes(1_500_000_000)
                packed.writestr(dice.choice((f"{name}.npy", f"{name}.npy", f"../{name}.npy")), content)
        content = held.getvalue()
        file.write_bytes(damaged(dice, content) if dice.random() < 0.4 else content)
    else:
        folder = here / "data" / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for name, array in zip(
            ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"),
            (arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"]),
            strict=True,
        ):
            content = b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            if dice.random() < 0.3:
                content = damaged(dice, content)
            if dice.random() < 0.01:
                content = b"\x00\x00\x08\x01" + bytes(600_000_000)
            if packed := dice.random() < 0.5:
                content = gzip.compress(content, 1)
                content = damaged(dice, content) if dice.random() < 0.3 else content
            (folder / f"{name}-ubyte{'.gz' if packed else ''}").write_bytes(content)
    if dice.random() < 0.1:
        (here / "data" / "fmnist.npz").write_bytes(pickle.dumps(Payload(here / "marker")))
    return ["scenarios", "show", "split-mnist", "--data-root", "data", "--set", "scenario.limit=2"]


def command_lines(dice: Dice, samples: Samples, here: Path) -> list[str]:
    """Return a command of odd words."""
    starts = [["run", "--dry-run"], ["predict", str(samples.finished)], ["predict"], ["resume"], ["plugins", "show"]]
    starts += [
        ["scenarios", "show"],
        ["plugins", "new"],
        ["scenarios", "new"],
        ["export", str(samples.finished)],
        ["doctor"],
    ]
    starts += [["export", str(samples.finished), "--format", "safetensors", "--output"], ["plugins", "list"], []]
    options = [
        "--scenario",
        "--plugin",
        "--model",
        "--config",
        "--set",
        "--lr",
        "--seed",
        "--device",
        "--data-root",
        "--json",
    ]
    options += [
        "--task",
        "--top",
        "--format",
        "--output",
        "--epochs",
        "--limit",
        "--eval-every",
        "--quiet",
        "--x",
        "-p",
        "-s",
    ]

    def word() -> str:
        value = hostile(dice, here)
        text = value if isinstance(value, str) else written(value)
        known = dice.choice(
            [*samples.plugins, *samples.scenarios, *samples.models, "huggingface:" + text, "er:" + text]
        )
        # a name outside, of a file to write, is what the user asked for
        return (known if dice.random() < 0.3 else text).replace("outside", "inside").replace("\x00", "")[:120_000]

    said = [dice.choice(options) if dice.random() < 0.4 else word() for _ in range(dice.randrange(1, 5))]
    return [*dice.choice(starts), *(one for one in said if one not in ("/", "..", "~"))]


def extreme_numbers(dice: Dice, samples: Samples, here: Path) -> list[str]:
    """Return a short run with numbers that checks of single values let through."""
    numbers = ["1e300", "1e-300", "0", "1", "1e38", "0.999999", "1000000", "4294967295"]
    plugins = dice.sample(samples.plugins, dice.choice((0, 1)))
    sets = [f"{option(dice, samples, plugins)}={dice.choice(numbers)}" for _ in range(2)]
    # a network or a length that is far too large is refused by the system, or takes as long as was asked for
    sets = [
        one for one in sets if not one.startswith(("model.", "train.iter", "train.epoch", "run.output", "train.first"))
    ]
    sets = [one for one in sets if not any(word in one for word in ("iterations", "steps", "epochs", "hidden", "size"))]
    named = [part for plugin in plugins for part in ("--plugin", plugin)]
    short = [
        "--iterations",
        "2",
        "--limit",
        "6",
        "--model",
        "mlp-100",
        "--output",
        "run",
        "--no-tensorboard",
        "--quiet",
    ]
    return ["run", *short, *named, *(part for one in ["train.threads=1", *sets] for part in ("--set", one))]


def run_folders(dice: Dice, samples: Samples, here: Path) -> list[str]:
    """Return a command with a received run folder."""
    run = here / "received"
    shutil.copytree(samples.finished, run)
    resumed = dice.random() < 0.3
    if resumed:
        (run / "results.json").unlink()
    found = [
        p for p in sorted(run.rglob("*")) if p.is_file() and p.suffix in (".json", ".yaml", ".safetensors", ".jsonl")
    ]
    file = dice.choice(found)
    content = file.read_bytes()
    match dice.randrange(10):
        case 0:
            file.unlink()
            os.mkfifo(file)
        case 1:
            file.unlink()
            file.symlink_to(dice.choice((here.parent / "outside" / "precious", "/dev/zero", file.name)))
        case 2:
            file.unlink()
        case 3:
            file.write_bytes(b"[" * 100_000)
        case 4 | 5:
            file.write_bytes(damaged(dice, content))
        case _:
            file.write_bytes(_changed_file(dice, file, content, here))
    _set_sums_right(dice, run)
    picture = here / "a.png"
    picture.write_bytes(samples.images["RGB.png"])
    if resumed:
        return ["resume", "received", "--quiet"]
    return dice.choice(
        (
            ["predict", "received", "a.png"],
            ["predict", "received", "a.png", "--json"],
            ["export", "received", "--format", "safetensors", "--output", "model.st"],
            [
                "extend",
                "received",
                "--scenario",
                "split-digits",
                "--limit",
                "2",
                "--iterations",
                "1",
                "--output",
                "new",
            ],
        )
    )


def _changed_file(dice: Dice, file: Path, content: bytes, here: Path) -> bytes:
    """Return the content of a file of a run with one of its values replaced by one of another kind."""
    if file.suffix == ".json":
        data = json.loads(content)
        if isinstance(data.get("state"), str) and dice.random() < 0.6:
            return written({**data, "state": written(changed(dice, json.loads(data["state"]), here))}).encode()
        return written(changed(dice, data, here)).encode()
    if file.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = dice.choice(
            (
                lambda: written(changed(dice, json.loads(content[8 : 8 + length]), here)).encode(),
                lambda: b" " * 20_000_000,
                lambda: (
                    "{"
                    + ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(50_000))
                    + "}"
                ).encode(),
            )
        )()
        size = dice.choice((len(header), len(header), 2**63, 2**40))
        return size.to_bytes(8, "little") + header + content[8 + length :]
    if file.suffix == ".yaml":
        import yaml as writer

        with contextlib.suppress(Exception):
            return writer.dump(changed(dice, writer.safe_load(content), here)).encode("utf-8", "surrogatepass")
    return damaged(dice, content)


def _set_sums_right(dice: Dice, run: Path) -> None:
    """Write the checksums of a changed run folder anew, as its sender could."""
    with contextlib.suppress(Exception):  # the file of sums may be what was changed
        from clframe import sums

        if not (run / "sums.json").is_file() or (run / "sums.json").is_symlink():
            return
        known = json.loads((run / "sums.json").read_text())["files"]
        regular = [name for name in known if (run / name).is_file() and not (run / name).is_symlink()]
        right = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in regular}
        (run / "sums.json").write_text(sums.to_text(known | right))
    for manifest in run.glob("checkpoints/*/manifest.json"):
        with contextlib.suppress(Exception):
            if not manifest.is_file() or manifest.is_symlink():
                continue
            data = json.loads(manifest.read_text())
            regular = [n for n in data if (manifest.parent / n).is_file() and not (manifest.parent / n).is_symlink()]
            for name in regular:
                data[name] = hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest()
            manifest.write_text(json.dumps(data))


FAMILIES: dict[str, Callable[[Dice, Samples, Path], list[str]]] = {
    "settings": settings,
    "yaml": yaml,
    "scenario files": scenario_files,
    "tables": tables,
    "images": images,
    "data sets": data_sets,
    "command lines": command_lines,
    "extreme numbers": extreme_numbers,
    "run folders": run_folders,
}


def family_of(number: int) -> str:
    """Return the family of an input: each has its share, evenly spread."""
    place, total = random.Random(f"family {number}").random(), 0.0
    for name, share in SHARES.items():
        total += share
        if place < total:
            return name
    return "settings"


# ---------------------------------------------------------------------------------------------- one input


def tried(number: int, samples: Samples, folder: Path, idle: int) -> tuple[int, list[str], str]:
    """Give the input of this number to its command; return the exit code, the faults, and what was said.

    Args:
        number: of the input.
        samples: what it is made of.
        folder: an empty one.
        idle: kB of memory of a process that does nothing.
    """
    from clframe.cli.main import main

    here, outside = folder / "work", folder / "outside"
    here.mkdir()
    outside.mkdir()
    (outside / "precious").write_text(PRECIOUS)
    family = family_of(number)
    arguments = FAMILIES[family](Dice(f"input {number}"), samples, here)

    def command() -> int:
        return main(arguments)

    code, seconds, memory = in_child(command, here, folder / "said")
    said = (folder / "said").read_bytes()
    faults = []
    if code == 70:
        faults.append("exit 70")
    if code == LOST or b"Traceback (most recent call last)" in said:
        faults.append("traceback")
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        faults.append("hang")
    elif code < 0:
        faults.append(f"signal {-code}")
    if memory - idle > MEMORY // 1024:
        faults.append("memory")
    if (here / "marker").exists():
        faults.append("code run")
    if [p.name for p in outside.iterdir()] != ["precious"] or (outside / "precious").read_text() != PRECIOUS:
        faults.append("file elsewhere")
    if b"\x1b" in said or b"\x07" in said:
        faults.append("escape code")
    if len(said) > TEXT:
        faults.append("long text")
    shown = " ".join(arguments)
    return code, faults, f"{shown[:200]} | {seconds:.1f} s | {said[-600:].decode(errors='replace')}"


def in_child(command: Callable[[], int], here: Path, said: Path) -> tuple[int, float, int]:
    """Return the exit code of `command` in a process of its own (negative: a signal), its seconds and kB of memory."""
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        code = LOST
        try:
            os.setpgid(0, 0)
            os.chdir(here)
            null, out = os.open(os.devnull, os.O_RDONLY), os.open(said, os.O_CREAT | os.O_WRONLY, 0o600)
            for source, target in ((null, 0), (out, 1), (out, 2)):
                os.dup2(source, target)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the process ends soon
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESSES, now + ADDRESSES))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU, CPU + 1))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            code = command()
            sys.stdout.flush()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else LOST
        except BaseException:
            with contextlib.suppress(BaseException):
                traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stderr.flush()
            os._exit(code)
    status = None
    while status is None:
        done, found, usage = os.wait4(process, os.WNOHANG)
        if done:
            status = found
            break
        if time.monotonic() - began > WALL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        time.sleep(0.004)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)  # readers that it started
    return os.waitstatus_to_exitcode(status), time.monotonic() - began, usage.ru_maxrss


# ----------------------------------------------------------------------------------------------- campaign


@contextlib.contextmanager
def surroundings() -> Iterator[Path]:
    """Inside there is a folder for everything, and an environment without a network or a home."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        before = dict(os.environ)
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "HOME": name,
            "OMP_NUM_THREADS": "1",
            "no_proxy": "",
            "https_proxy": "http://127.0.0.1:9",
        }
        os.environ |= {"http_proxy": "http://127.0.0.1:9", "XDG_CACHE_HOME": f"{name}/cache"}
        try:
            yield Path(name)
        finally:
            os.environ.clear()
            os.environ.update(before)


def campaign(
    numbers: Sequence[int], say: Callable[[str], None] = lambda text: None
) -> tuple[Counter[tuple[str, int]], list[Fault]]:
    """Try the inputs of these `numbers`; return how often each family ended with each exit code, and all faults."""
    ends: Counter[tuple[str, int]] = Counter()
    faults: list[Fault] = []
    spent: Counter[str] = Counter()
    with surroundings() as folder:
        samples = made(folder)
        gc.collect()
        gc.freeze()  # else a collection in a child would copy all pages
        _, _, idle = in_child(lambda: 0, folder, folder / "idle")
        for count, number in enumerate(numbers, start=1):
            inner, began = folder / "one", time.monotonic()
            inner.mkdir()
            code, found, said = tried(number, samples, inner, idle)
            family = family_of(number)
            spent[family] += time.monotonic() - began
            ends[family, code] += 1
            faults += [Fault(number, family, what, said) for what in found]
            for what in found:
                say(f"input {number} ({family}): {what}: {said}")
            shutil.rmtree(inner, ignore_errors=True)
            if count % 25 == 0:
                times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items())
                say(f"{count} of {len(numbers)} inputs, {len(faults)} faults; {times}")
    return ends, faults


def made(folder: Path) -> Samples:
    """Make the samples in `folder`."""
    import torch

    from clframe.cli.main import main

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        main(["scenarios", "show", "split-digits", "--save", str(folder / "split.json")])
    return Samples(folder)


KINDS = ("exit 70", "traceback", "hang", "memory", "file elsewhere", "code run", "escape code", "long text")


def lines_of(ends: Counter[tuple[str, int]], faults: Sequence[Fault]) -> list[dict[str, Any]]:
    """Return a line of figures for each family, and one of all."""
    lines = []
    for name in [*FAMILIES, "together"]:
        count = sum(n for (family, _), n in ends.items() if name in (family, "together"))
        ok = sum(n for (family, code), n in ends.items() if name in (family, "together") and code == 0)
        own = Counter(fault.what for fault in faults if name in (fault.family, "together"))
        signals = sum(n for what, n in own.items() if what.startswith("signal"))
        lines.append(
            {"inputs": name, "tried": count, "taken": ok, **{what: own[what] for what in KINDS}, "signal": signals}
        )
    return lines


def measure(count: int = 10_000, first: int = 0, workers: int = 2) -> tuple[list[dict[str, Any]], list[str]]:
    """Try `count` inputs in `workers` processes: a line for each family, and what went wrong."""
    ends: Counter[tuple[str, int]] = Counter()
    faults: list[Fault] = []
    pipes = []
    for worker in range(workers):
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(reading)
            try:
                numbers = range(first + worker, first + count, workers)
                found = campaign(numbers, lambda text: print(text, file=sys.stderr, flush=True))
                with os.fdopen(writing, "wb") as stream:
                    pickle.dump(found, stream)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(writing)
        pipes.append(reading)
    for reading in pipes:
        with os.fdopen(reading, "rb") as stream:
            own_ends, own_faults = pickle.load(stream)
        ends += own_ends
        faults += own_faults
    notes = [f"input {fault.number} ({fault.family}): {fault.what}" for fault in faults[:50]]
    return lines_of(ends, faults), notes


if __name__ == "__main__":
    from report import table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    lines, notes = measure(given.count, given.first, given.workers)
    print(table(lines))
    for note in notes:
        print(f"- {note}")
    sys.exit(bool(notes))
