"""Images read from their files while others are trained on: images a second beside torchvision's loader, and memory.

    python benchmarks/streaming.py

Both read the same made-up folder of JPEG files (cuts of scikit-learn's two photographs) in random order, resize the
shorter side to 64 pixels, cut out the center and give float batches of 64, with the same number of workers: threads
here, processes in torch's DataLoader over torchvision's ImageFolder. Seconds are those of a whole epoch after a first
one, as both start something in that. MiB is the highest resident memory of a process of its own, torch included,
while the scenario is built and an epoch is read.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clframe.system.memory import read_peak_memory, reset_peak_memory

SIZE, BATCH, WORKERS = 64, 64, 2
PHOTOGRAPHS = {"500x375": (500, 375), "96x96": (96, 96)}
IMAGES = 320
FLAT = 1.05  # the most that four times the images may take, in times of the memory of one


def make_folder(root: Path, count: int, width: int, height: int) -> None:
    """`count` JPEG files in two classes."""
    import numpy as np
    from PIL import Image

    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    rng = np.random.default_rng(0)
    for name in ("china", "flower"):
        photograph = Image.open(Path(spec.origin).parent / "datasets" / "images" / f"{name}.jpg").convert("RGB")
        (root / name).mkdir(parents=True)
        wide, high = 641 - width, 428 - height
        places = rng.choice(wide * high, count // 2, replace=False)  # of the upper left corner: no image comes twice
        for i, place in enumerate(places):
            left, top = int(place) % wide, int(place) // wide
            cut = photograph.crop((left, top, left + width, top + height))
            cut.save(root / name / f"{i:05}.jpg", quality=90)


def ours(root: Path, memory: int = 0) -> Callable[[], int]:
    """Return a function that reads an epoch as a run does, and gives the number of images."""
    import torch

    from clframe.data.files import READ_AHEAD
    from clframe.scenarios.folder import split_folder
    from clframe.training import Sampler

    scenario = split_folder(
        path=root, size=SIZE, test=0.01, experiences=1, normalize=False, augment=False, memory=memory, workers=WORKERS
    )
    data = scenario[0].train
    generator = torch.Generator().manual_seed(0)

    def epoch() -> int:
        sampler = Sampler(len(data), BATCH, generator, torch.device("cpu"), epochs=1, iterations=None)
        seen = 0
        for where in sampler:
            data.expect(where)
            data.expect(sampler.coming(max(READ_AHEAD, 2 * len(where))))
            seen += len(scenario.transform.batch(data.rows(where)).x)
        return seen

    return epoch


def theirs(root: Path) -> Callable[[], int]:
    """Return the same of torch's DataLoader over torchvision's ImageFolder, whose workers stay between epochs."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

    images = ImageFolder(root, Compose([Resize(SIZE), CenterCrop(SIZE), ToTensor()]))
    loader: DataLoader[Any] = DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    return lambda: sum(len(x) for x, _ in loader)


def speeds(root: Path, repetitions: int) -> dict[str, list[float]]:
    """Images a second of each repetition, in turns."""
    import torch

    torch.set_num_threads(1)
    loaders = {"clframe": ours(root), "torchvision": theirs(root)}
    found: dict[str, list[float]] = {name: [] for name in loaders}
    for repetition in range(repetitions + 1):
        for name, epoch in loaders.items():
            start = time.perf_counter()
            images = epoch()
            if repetition:
                found[name].append(images / (time.perf_counter() - start))
    return found


def memory(root: Path, most: int) -> float:
    """Return the most MiB of a process that builds the scenario and reads an epoch, keeping so many bytes of images."""
    command = [sys.executable, __file__, "--memory", str(root), str(most)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def measure(repetitions: int = 3) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a line for each kind of file and each number of images, and notes on what was reached."""
    lines = []
    reached = True
    with tempfile.TemporaryDirectory() as folder:
        for name, (width, height) in PHOTOGRAPHS.items():
            root = Path(folder, name)
            make_folder(root, IMAGES, width, height)
            found = {who: statistics.median(rates) for who, rates in speeds(root, repetitions).items()}
            ratio = found["clframe"] / found["torchvision"]
            reached = reached and ratio >= 1
            rates = {f"{who}, images/s": f"{rate:.0f}" for who, rate in found.items()}
            lines.append({"files": f"{IMAGES} JPEG of {name}", **rates, "ratio": f"{ratio:.2f}"})
            print(f"{name}: measured", file=sys.stderr, flush=True)
        more = Path(folder, "more")
        make_folder(more, 4 * IMAGES, *PHOTOGRAPHS["96x96"])
        once, four = memory(Path(folder, "96x96"), 0), memory(more, 0)
        kept = memory(Path(folder, "96x96"), 10**10), memory(more, 10**10)
    lines.append({"files": f"MiB of {IMAGES} images, and of {4 * IMAGES}", "ratio": f"{four / once:.2f}"})
    lines[-1] |= {"read late": f"{once:.0f}, {four:.0f}", "kept": f"{kept[0]:.0f}, {kept[1]:.0f}"}
    notes = [
        f"At least the images a second of torchvision's loader: {'reached' if reached else 'NOT reached'}.",
        f"Memory flat with the number of images (at most {FLAT} times): "
        f"{'reached' if four <= FLAT * once else 'NOT reached'}.",
        f"{WORKERS} workers each, batches of {BATCH}, images of {SIZE} pixels; median of {repetitions} epochs. Large "
        "JPEG files are decoded at a fraction of their size here, which torchvision's loader does not do.",
    ]
    return lines, notes


def main() -> None:
    """Run the command line; a process that measures memory is this file again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        import torch

        import clframe.scenarios.folder  # noqa: F401 - its own memory is not what is measured

        torch.set_num_threads(1)
        reset_peak_memory()
        ours(Path(given.memory[0]), int(given.memory[1]))()
        print(read_peak_memory() / 2**20)
        return
    import report

    lines, notes = measure(given.repetitions)
    report.save_part("streaming", lines, "python benchmarks/streaming.py", notes)
    print(report.table(lines))
    for note in notes:
        print(f"- {note}")


if __name__ == "__main__":
    main()
