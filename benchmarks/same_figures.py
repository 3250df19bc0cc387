"""Compare two versions of clframe: 24 short runs must give the same figures and weights, to the bit.

    python benchmarks/same_figures.py OLD_PYTHON NEW_PYTHON [--only NAME ...]

Each argument is the Python interpreter of an environment in which one version is installed. The runs cover every family
of methods, the three settings, an extension, and a run that is killed and resumed. Every number, name and key of
`results.json` and every tensor of `model.safetensors` is compared; texts, such as formulas, may differ. The exit code
is 1 if there is a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

RUNS = {
    "fine-tuning": "--epochs 2",
    "joint": "--plugin joint --iterations 30",
    "finetune-fc": "--plugin finetune-fc --iterations 30",
    "feature-extraction": "--plugin feature-extraction --plugin warm-up --iterations 30",
    "ewc": "--plugin ewc --set ewc.lambda=10 --set train.optimizer=sgd --set train.lr=0.05 --iterations 30",
    "si and mas": "--plugin si --plugin mas --setting task --iterations 30",
    "lwf": "--plugin lwf --setting task --set lwf.warm_up=0.5 --iterations 20",
    "lfl": "--scenario rotated-digits --plugin lfl --iterations 30 --set train.val=0.1",
    "a-ltm": "--plugin a-ltm --iterations 20",
    "lwm": "--model cnn-small --plugin lwm --iterations 10",
    "icarl": "--plugin icarl --iterations 20",
    "er and lwf": "--plugin er --plugin lwf --iterations 20",
    "der": "--plugin der --iterations 20",
    "generative-replay": "--plugin generative-replay --set generative-replay.iterations=30 --iterations 15",
    "always-be-dreaming": "--model cnn-small --plugin always-be-dreaming --set always-be-dreaming.iterations=5 "
    "--iterations 15",
    "deep-inversion": "--model cnn-small --plugin deep-inversion --set deep-inversion.iterations=5 --iterations 15",
    "packnet": "--plugin packnet --setting task --iterations 20",
    "piggyback": "--plugin piggyback --setting task --iterations 20",
    "hat": "--plugin hat --setting task --iterations 20",
    "duplicate": "--plugin duplicate --setting task --iterations 20",
    "channel-gating": "--model cnn-small --plugin channel-gating --set channel-gating.classifier_iterations=5 "
    "--iterations 15",
    "kept optimizer": "--set train.keep_optimizer=true --set train.schedule=cosine --iterations 15",
}
TEXTS = {"formula", "source", "readings", "notes"}  # keys below which sentences may differ


def command(python: str, *words: str) -> list[str]:
    """Return a command of clframe, as this interpreter runs it."""
    return [python, "-P", "-m", "clframe", *words, "--quiet"]  # -P: not the checkout in the current folder


def call(python: str, *words: str) -> None:
    """Run a command of clframe to its end."""
    subprocess.run(command(python, *words), check=True, stdout=subprocess.DEVNULL)


def run_one(name: str, python: str, folder: Path) -> None:
    """Run the case `name` into `folder`."""
    if name == "extension":
        call(python, "run", "--iterations", "10", "--setting", "class", "--output", str(folder.with_name("base")))
        new = "--scenario split-digits --set scenario.experiences=1 --plugin lwf --iterations 10"
        call(python, "extend", str(folder.with_name("base")), *new.split(), "--output", str(folder))
    elif name == "killed and resumed":
        words = "--plugin ewc --plugin er --iterations 200 --set run.checkpoint_every=0.2"
        with subprocess.Popen(command(python, "run", *words.split(), "--output", str(folder))) as process:
            while process.poll() is None and not list(folder.glob("checkpoints/00000[3-9]")):
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        call(python, "resume", str(folder))
    else:
        call(python, "run", *RUNS[name].split(), "--output", str(folder))


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each number, name and empty entry of a tree of JSON with its place; texts are left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{place}/{key}", None
            if key not in TEXTS:
                yield from leaves(inner, f"{place}/{key}")
    elif isinstance(value, list):
        yield f"{place}#", len(value)
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{place}[{index}]")
    else:
        yield place, repr(value)  # every digit of a number


def differences(one: Path, other: Path) -> list[str]:
    """Return where two run folders differ; empty: nowhere."""
    trees = [dict(leaves(json.loads((folder / "results.json").read_text()))) for folder in (one, other)]
    found = [place for place in sorted({*trees[0], *trees[1]}) if trees[0].get(place, ...) != trees[1].get(place, ...)]
    tensors = [load_file(folder / "model.safetensors") for folder in (one, other)]
    for name in sorted({*tensors[0], *tensors[1]}):
        pair = [tensor.get(name) for tensor in tensors]
        if pair[0] is None or pair[1] is None or pair[0].dtype != pair[1].dtype or not torch.equal(*pair):
            found.append(f"model.safetensors: {name}")
    return found


def main() -> int:
    """Run the cases that the command line names, or all, with both interpreters."""
    names = [*RUNS, "extension", "killed and resumed"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", help="Python interpreter of the one version")
    parser.add_argument("new", help="Python interpreter of the other version")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    differing = 0
    for name in given.only:
        with tempfile.TemporaryDirectory() as place:
            folders = [Path(place) / which / "run" for which in ("old", "new")]
            for python, folder in zip((given.old, given.new), folders, strict=True):
                folder.parent.mkdir()
                run_one(name, python, folder)
            found = differences(*folders)
        differing += bool(found)
        print(f"{name}: {'equal' if not found else f'{len(found)} differences, the first ' + ', '.join(found[:3])}")
    print(f"{len(given.only) - differing} of {len(given.only)} runs are equal to the bit.")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
