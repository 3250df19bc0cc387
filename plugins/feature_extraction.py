"""Feature extraction, a baseline of Li and Hoiem (LwF, 2017): only new heads are trained, on fixed features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from clframe import Experience, Phase, Plugin, hookimpl
from clframe.context import Run
from clframe.model import seed_torch
from clframe.options import Count, NonNegative
from clframe.toolkit.warm_up import no_new_heads, warm_up, warm_up_problems


class FeatureExtraction(Plugin):
    """Feature extraction: the backbone and the heads of old classes are frozen; only the head of new classes learns.

    The backbone learns in the first experience, or came with weights (`feature-extraction.pretrained=true`), and is
    then frozen. Nothing old changes, the running statistics of batch norms included: in task-incremental learning, if
    no class comes back, nothing is forgotten, and old answers stay equal to the bit.

    It ends below fine-tuning where the first experience says little about the next ones, as its features are all there
    is. Over seeds 0 to 4 (`benchmarks/defaults.py`): 87.3 % against 96.1 % on task-incremental `split-digits`, 14.6 %
    against 19.5 % class-incremental, and 26.0 % against 48.4 % on `permuted-digits`, whose domains train one head.

    When to use:
        As the floor of what a fixed network can do.

    Keeps:
        Nothing.

    Hooks:
        `grow`, `before_experience`, `phases`

    Options:
        pretrained: whether the backbone is frozen from the first experience on, as it came with weights.
        hidden: units of a hidden layer, with ReLU, in each head that is trained on frozen features; null: no such
            layer. The paper's has 4096.
        warm_up: length of a phase in which the new head is trained alone first, relative to the experience's own
            training; here the phase only makes the same training longer.
    """

    name = "feature-extraction"
    family = "baseline"
    citation = "Li and Hoiem, Learning without forgetting, TPAMI 2017"

    def __init__(self, *, pretrained: bool = False, hidden: Count | None = None, warm_up: NonNegative = 0.0) -> None:
        self.pretrained = pretrained
        self.hidden = hidden
        self.warm_up = warm_up

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if an option needs new heads, and the scenario's experiences bring none."""
        yield from warm_up_problems(run, self)
        if self.hidden:
            yield from no_new_heads(run, "`feature-extraction.hidden`")

    @hookimpl
    def grow(self, run: Run, experience: Experience) -> None:
        """Give new heads their hidden layer, if `hidden` asks for one."""
        if self.hidden and (experience.index or self.pretrained):
            for k in run.new_blocks:
                run.model.head[k] = TwoLayers(run.model.head[k], self.hidden, run.rng(self.name))

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Freeze old heads, and the backbone from the second experience on (or the first, if it came with weights)."""
        backbone = ["backbone.*"] if experience.index or self.pretrained else []
        run.freeze([*backbone, *(f"head.{k}.*" for k in run.old_blocks)])

    @hookimpl
    def phases(self, run: Run) -> list[Phase] | None:
        """Return the warm-up phase, if `warm_up` asks for one."""
        return warm_up(run, self.warm_up)


class TwoLayers(nn.Module):
    """A block of the head with a hidden layer, in place of `block`; weights are drawn from `generator`."""

    def __init__(self, block: nn.Module, units: int, generator: torch.Generator) -> None:
        super().__init__()
        assert isinstance(block, nn.Linear)
        self.out_features = block.out_features
        with torch.random.fork_rng(devices=[]):
            seed_torch(int(torch.randint(2**31, (1,), generator=generator)), None)
            self.hidden = nn.Linear(block.in_features, units).to(block.weight)
            self.out = nn.Linear(units, block.out_features).to(block.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Return scores [B, classes] of features [B, D]."""
        scores: Tensor = self.out(self.hidden(features).relu())
        return scores
