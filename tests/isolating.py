"""What the tests of methods that isolate tasks share: a small network, and a witness of what each task answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clframe import IncrementalNet, Plugin, hookimpl
from clframe.backbones import FeatureNet, cnn_small
from clframe.model import evaluating

SHAPE = (1, 8, 8)


class Small(nn.Module):
    """A convolution and a linear layer, both with biases; a batch norm, and one that learns nothing."""

    width = 5

    def __init__(self, channels: int = 4, last_relu: bool = False) -> None:
        super().__init__()
        self.last_relu = last_relu
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.conv = nn.Conv2d(1, channels, 3, stride=2, padding=1)
            self.plain = nn.BatchNorm2d(channels, affine=False)
            self.norm = nn.BatchNorm2d(channels)
            self.linear = nn.Linear(16 * channels, 5)

    def features(self, x: Tensor) -> Tensor:
        out = self.linear(self.norm(self.plain(self.conv(x))).relu().flatten(1))
        return out.relu() if self.last_relu else out


def usual() -> nn.Module:
    """Convolutions, each with its norm and ReLU."""
    return seeded(cnn_small, SHAPE, widths=[6, 8])


def unusual() -> nn.Module:
    """Norms that do not follow a layer, one that is none of batches, and a parameter that is in no layer.

    The parameter is small, and must not make what passes it look unused.
    """

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.full((8, 1, 1), 0.1))

        def forward(self, x: Tensor) -> Tensor:
            return self.by * x

    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.GroupNorm(2, 6)]
        layers += [nn.Conv2d(6, 8, 3), Scale(), nn.Flatten(), nn.Linear(128, 9), nn.Tanh()]
        return FeatureNet(nn.Sequential(*layers), 9)

    return seeded(build)


def seeded(build: Any, *args: Any, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net: nn.Module = build(*args, **options)
    return net


class Answers(Plugin):
    """Keeps, after each experience, what the network answers to every task so far, on fixed images."""

    name = "answers"
    observer = True

    def __init__(self) -> None:
        self.answers: list[list[Tensor]] = []

    @hookimpl
    def before_experience(self, run, experience):
        self.model: IncrementalNet = run.model

    @hookimpl
    def after_eval(self, run, experience):
        x = torch.rand(6, *run.scenario.input_shape, generator=torch.Generator().manual_seed(0))
        with evaluating(run.model), torch.no_grad():
            asked = (run.model(x, torch.full((6,), t)) for t in range(experience.index + 1))
            self.answers.append([outputs.head(t).clone() for t, outputs in enumerate(asked)])

    def changes(self, of: Callable[[Tensor, Tensor], Any]) -> list[Any]:
        """`of` the later and the first answer to a task, for each task and each experience after it."""
        n = len(self.answers)
        return [of(self.answers[i][j], self.answers[j][j]) for i in range(n) for j in range(i)]

    def same(self) -> bool:
        """Whether every answer to a task is what it was when the task had just been learnt, to the bit."""
        return all(self.changes(torch.equal))

    def drift(self) -> float:
        """The largest change of an answer to a task since it had just been learnt."""
        return max(self.changes(lambda later, first: (later - first).abs().max().item()))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
