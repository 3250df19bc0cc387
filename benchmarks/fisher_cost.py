"""What importance costs, the Fisher information and that of MAS, with the mean gradient's as the measure.

Peers square the gradient of the mean over a batch, which is one backward pass and something else than the Fisher
information: it is smaller by about the size of the batch. Here stand beside it, interleaved in one process, the sums of
each image's own squared gradient that `clframe.toolkit.importance` computes, by label rule. Each is one pass over the
same images, accumulated into the same tensors.

MAS is the mean of the absolute gradient of each image's own ||z||^2. Peers take the absolute gradient of the mean over
a batch, in which images cancel out; that is what it is measured by.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe import backbones
from clframe.model import IncrementalNet, evaluating
from clframe.toolkit.importance import Labels, label_cotangents, norm_cotangents
from clframe.toolkit.per_sample import GradientSums, zeros_for

CLASSES = 10
MODELS: dict[str, tuple[Callable[[tuple[int, ...]], nn.Module], tuple[int, ...], int]] = {
    "mlp": (backbones.mlp, (1, 28, 28), 128),
    "cnn-small": (backbones.cnn_small, (1, 28, 28), 128),
    "resnet32": (backbones.resnet32, (3, 32, 32), 128),
}
RULES: tuple[Labels, ...] = ("empirical", "sampled", "exact")
BATCH_MEAN = "batch mean"
MAS_BATCH_MEAN, MAS = "mas, batch mean", "mas"
# each way, and what its time is divided by
WAYS = {BATCH_MEAN: BATCH_MEAN, **dict.fromkeys(RULES, BATCH_MEAN), MAS_BATCH_MEAN: MAS_BATCH_MEAN, MAS: MAS_BATCH_MEAN}
TARGETS = {"mlp": 1.2, "cnn-small": 4.0, "resnet32": 4.0}  # the most that one backward pass per image may cost
ONE_PASS = ("empirical", MAS)


def mas_batch_mean(model: IncrementalNet, sums: dict[str, Tensor], x: Tensor) -> None:
    """Add the absolute gradient of the mean of ||z||^2 over the batch."""
    with evaluating(model):
        gradients = torch.autograd.grad(model(x).logits.square().sum(1).mean(), list(model.parameters()))
    for total, gradient in zip(sums.values(), gradients, strict=True):
        total.add_(gradient.abs())


def batch_mean(model: IncrementalNet, sums: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
    """Add the square of the mean gradient over the batch."""
    with evaluating(model):
        loss = functional.cross_entropy(model(x).logits, y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    for total, gradient in zip(sums.values(), gradients, strict=True):
        total.addcmul_(gradient, gradient)


def one_pass(way: str, model: IncrementalNet, images: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
    """All `images`, in batches, in the way named."""
    sums = zeros_for(dict(model.named_parameters()))
    gradients = GradientSums(model, sums, "abs" if way == MAS else "square")
    generator = torch.Generator().manual_seed(0)
    for x, y in zip(images, labels, strict=True):
        if way == BATCH_MEAN:
            batch_mean(model, sums, x, y)
        elif way == MAS_BATCH_MEAN:
            mas_batch_mean(model, sums, x)
        elif way == MAS:
            gradients.add(x, None, norm_cotangents)
        else:
            gradients.add(x, None, partial(label_cotangents, labels=way, y=y, generator=generator))
    if images[0].is_cuda:
        torch.cuda.synchronize()


def measure(
    repetitions: int = 5, images: int = 128, device: str = "cpu", models: Sequence[str] = tuple(MODELS)
) -> tuple[list[dict[str, object]], list[str]]:
    """One row for each model and way, median seconds for `images` images and the ratio to the batch mean's; notes.

    The ratio is the median of the ratios within each repetition, in which all ways run one after the other.
    """
    rows: list[dict[str, object]] = []
    ratios: dict[tuple[str, str], float] = {}
    for name in models:
        build, shape, batch_size = MODELS[name]
        torch.manual_seed(0)
        model = IncrementalNet(build(shape), [CLASSES]).to(device)
        x = torch.randn(images, *shape, device=device)
        y = torch.randint(CLASSES, (images,), device=device)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for repetition in range(repetitions + 1):
            for way in WAYS:
                began = time.perf_counter()
                one_pass(way, model, x.split(batch_size), y.split(batch_size))
                if repetition:  # the first one warms up
                    seconds[way].append(time.perf_counter() - began)
        for way, by in WAYS.items():
            pairs = zip(seconds[way], seconds[by], strict=True)
            ratio = ratios[name, way] = statistics.median(a / b for a, b in pairs)
            median = statistics.median(seconds[way])
            rows.append({"model": name, "way": way, "images": images, "seconds": median, "ratio": ratio})
    return rows, targets(ratios)


def targets(ratios: Mapping[tuple[str, str], float]) -> list[str]:
    """Return a note for each model: what it reached, given the ratio of each model and way."""
    notes = []
    for name in dict.fromkeys(name for name, _ in ratios):
        found = {way: ratios[name, way] for way in ONE_PASS}
        reached = "reached" if max(found.values()) <= TARGETS[name] else "NOT reached"
        figures = ", ".join(f"{way} {ratio:.2f}" for way, ratio in found.items())
        notes.append(f"{name}: {figures} times the batch mean's time (target: at most {TARGETS[name]:g}): {reached}.")
    return notes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--images", type=int, default=128, help="images of a pass")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; by default as torch chooses")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {given.device}, medians of {given.repetitions}"
    )
    print(f"{'model':<12}{'way':<18}{'ms':>10}{'ratio':>8}")
    rows, notes = measure(given.repetitions, given.images, given.device)
    for row in rows:
        print(f"{row['model']:<12}{row['way']:<18}{1000 * float(str(row['seconds'])):>10.1f}{row['ratio']:>8.2f}")
    for note in notes:
        print(f"- {note}")


if __name__ == "__main__":
    main()
