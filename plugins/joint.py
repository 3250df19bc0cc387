"""Joint training, the oracle: all data at once, or all data so far after each experience.

The upper bound that methods are compared with. It keeps every experience, so it is not a continual learner.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from clframe import Experience, ImageData, Phase, Plugin, hookimpl
from clframe.context import Run
from clframe.errors import UsageError
from clframe.training import Sampler


class Joint(Plugin):
    """Joint training on all data, the oracle.

    `joint.form=once` trains at the last experience on everything, with the iterations of all experiences; `cumulative`
    trains after each experience on all data so far, from where the weights stand or (`joint.restart=true`) from
    scratch.

    When to use:
        As the upper bound that methods are compared with; as it keeps every experience, it is not a continual learner.

    Keeps:
        All training images.

    Hooks:
        `before_experience`, `extra_data`, `phases`

    Options:
        form: `once` trains once, at the last experience, on everything, with the iterations (or epochs) that all
            experiences have together; rows of earlier experiences stay empty. `cumulative` trains after each experience
            on all data so far, with the iterations of all experiences so far.
        restart: whether each cumulative training begins from the run's initial weights instead of going on.
    """

    name = "joint"
    family = "baseline"
    state = ("initial",)
    keeps_experiences = True
    keeps_images = True
    citation = "the upper bound in e.g. van de Ven, Tuytelaars, Tolias, Three types of incremental learning, 2022"

    def __init__(self, form: Literal["once", "cumulative"] = "once", restart: bool = False) -> None:
        if restart and form == "once":
            raise UsageError("`joint.restart` needs `joint.form=cumulative`: the form `once` trains only once.")
        self.form = form
        self.restart = restart
        self.initial: dict[str, Tensor] = {}

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if another method is in the run: it would only blur the upper bound."""
        others = [p.name for p in run.plugins if p is not self and not p.observer]
        if others:
            yield f"`joint` trains on all data and cannot run beside `{others[0]}`; run them one by one."

    def waits(self, run: Run, experience: Experience) -> bool:
        """Return whether the data of `experience` is only put aside for the last experience."""
        return self.form == "once" and experience.index < len(run.scenario) - 1

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Restore the initial weights, those of new heads included, where each training restarts."""
        if self.restart:
            for name, value in run.model.state_dict().items():
                self.initial.setdefault(name, value.clone())
            run.model.load_state_dict(self.initial)
            run.optimizer = None

    @hookimpl
    def extra_data(self, run: Run, experience: Experience) -> ImageData | None:
        """Return the images of all earlier experiences, each row with its own task."""
        if self.waits(run, experience) or not run.earlier:
            return None
        return ImageData.concat([earlier.train for earlier in run.earlier])

    @hookimpl
    def phases(self, run: Run, experience: Experience) -> list[Phase] | None:
        """Return a phase with the iterations of all experiences so far; None for epochs, which grow with the data.

        Where ``train.first`` has another length, the sum is of each experience's own steps.
        """
        if self.waits(run, experience):
            return [Phase("train", iterations=0)]
        lengths = [Phase("train").length(run.config.train.of(i)) for i in range(experience.index + 1)]
        if run.settings.iterations is None and all(length == lengths[-1] for length in lengths):
            return None
        steps = 0
        for i, (part, length) in enumerate(zip([*run.earlier, experience], lengths, strict=True)):
            batch_size = run.config.train.of(i).batch_size
            generator = torch.Generator()  # unused: only the number of steps is read
            steps += Sampler(len(part.train), batch_size, generator, run.device, **length).steps
        return [Phase("train", iterations=steps)]
