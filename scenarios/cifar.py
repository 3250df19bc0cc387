"""Scenarios of CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clframe.options import Count
from clframe.scenarios.streams import Augmentation, Order, Split, split_of

# FACIL's settings for ResNet-32, except that the learning rate is annealed over 30 epochs, where FACIL lowers
# it on plateaus within 200: enough for the few classes of one experience to be learned well.
DEFAULTS: dict[str, Any] = {
    "backbone": "resnet32",
    "train": {
        "optimizer": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 2e-4,
        "schedule": "cosine",
        "batch_size": 128,
        "epochs": 30,
    },
}
# mean and standard deviation of each channel of the training images
NORMS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
ICARL_SEED = 1993


@dataclass(frozen=True)
class TenGroups(Split):
    """A stream of ten experiences of CIFAR-100, whose order of classes may be iCaRL's."""

    experiences: Count = 10
    order: Order | Literal["icarl"] = "natural"  # type: ignore[assignment]  # one choice more

    def class_order(self, n_classes: int) -> list[int]:
        """Return the class numbers in the order of learning; ``icarl`` is drawn from NumPy's generator of 1993."""
        if self.order == "icarl":
            return list(np.random.RandomState(ICARL_SEED).permutation(n_classes).tolist())
        return super().class_order(n_classes)


split_cifar10 = split_of(
    "cifar10",
    description="Split the ten classes of CIFAR-10, 32x32 in color, into experiences of a few classes.",
    norms=NORMS["cifar10"],
    suited=DEFAULTS,
    preprocessing=Augmentation(),
)
split_cifar100 = split_of(
    "cifar100",
    description="Split the hundred classes of CIFAR-100, 32x32 in color, into experiences of a few classes.\n\n"
    "The order `icarl`, which the field calls iCaRL's, is ``numpy.random.RandomState(1993).permutation(100)``.",
    norms=NORMS["cifar100"],
    suited=DEFAULTS,
    stream=TenGroups(),
    preprocessing=Augmentation(),
)
