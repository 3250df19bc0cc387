"""What a process imports, looked at in one that does one thing after the other: a start costs seconds."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from clframe.scenarios import sources

ROOT = Path(__file__).parent.parent
HEAVY = {"avalanche", "torchvision", "sklearn", "matplotlib", "datasets", "pyarrow", "pandas"}
SECOND = {"plugins", "scenarios", "cli"}  # `import plugins.ewc` from the checkout would be a second module
WITHOUT_TORCH = ["the front door", "scenarios list", "plugins list"]
STEPS = {
    "the front door": "import clframe",
    "scenarios list": "assert main(['scenarios', 'list']) == 0",
    "plugins list": "assert main(['plugins', 'list']) == 0",
    "a plugin's module": "import clframe.plugins.joint",
    "what reads benchmarks of Avalanche": "clframe.from_avalanche",
    "what reads the Hugging Face Hub": "import clframe.scenarios.huggingface",
    "plugins show avalanche": "assert main(['plugins', 'show', 'avalanche']) == 0",
    "doctor": "assert main(['doctor']) == 0",
    "an npz file": "from clframe.scenarios import sources; sources.load('mnist', root)",
    "IDX files": "sources.load('fmnist', root)",
    "a scenario of digits": "from clframe.scenarios.digits import split_digits; len(split_digits()[0].train.x)",
    "a scenario of Avalanche": (
        "from clframe.scenarios.avalanche import benchmark; benchmark('PermutedMNIST', data_root=root)[1].train"
    ),
    "a run on digits": "assert main(['run', '--iterations', '2', '--quiet', '--output', str(root / 'run')]) == 0",
}
PROGRAM = """
import json, sys
from pathlib import Path
root, steps, watched = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
from clframe.cli.main import main
for name, code in steps.items():
    exec(code)
    print(json.dumps([name, sorted({*watched} & {*sys.modules})]), file=sys.stderr)
"""


def test_nothing_heavy_is_imported_that_is_not_needed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = {f"x_{part}": rng.integers(256, size=(20, 28, 28), dtype=np.uint8) for part in ("train", "test")}
    parts |= {f"y_{part}": (np.arange(20) % 10).astype(np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "mnist.npz", **parts)
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, key in zip(sources.IDX_FILES, sources.PARTS, strict=True):
        sizes = np.array(parts[key].shape, ">u4").tobytes()
        (folder / f"{name}.gz").write_bytes(
            gzip.compress(b"\0\0\x08" + bytes([parts[key].ndim]) + sizes + parts[key].tobytes())
        )
    watched = sorted(HEAVY | SECOND | {"torch"})
    call = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path), json.dumps(STEPS), json.dumps(watched)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stderr.splitlines())
    assert found == {name: [] if name in WITHOUT_TORCH else ["torch"] for name in STEPS}
    assert not SECOND & set(sys.modules)
