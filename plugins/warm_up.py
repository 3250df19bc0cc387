"""Warm-up (Li and Hoiem, LwF, 2017, section 3.1): a new head is trained alone before anything else moves."""

from __future__ import annotations

from collections.abc import Iterable

from clframe import Phase, Plugin, hookimpl
from clframe.context import Run
from clframe.options import Positive
from clframe.toolkit.warm_up import warm_up, warm_up_problems


class WarmUp(Plugin):
    """A phase that trains the head of new classes alone, before its gradients move what is shared.

    Before each experience but the first, the new head is trained alone for `warm-up.length` times the experience's own
    training. All else is frozen meanwhile, the running statistics of batch norms included. `lwf`, `lfl`,
    `feature-extraction` and `finetune-fc` bring the same phase with their option `warm_up`.

    When to use:
        Beside a method that has no such option.

    Keeps:
        Nothing.

    Hooks:
        `phases`

    Options:
        length: length of the phase, relative to the experience's own training; the paper's is 1.
    """

    name = "warm-up"
    family = "baseline"
    serves = ("class", "task")
    citation = "Li and Hoiem, Learning without forgetting, TPAMI 2017"

    def __init__(self, *, length: Positive = 1.0) -> None:
        self.warm_up = length

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if another plugin of the run brings a warm-up, too, or if there are no new heads."""
        yield from warm_up_problems(run, self)

    @hookimpl
    def phases(self, run: Run) -> list[Phase] | None:
        """Return the warm-up phase, from the second experience on."""
        return warm_up(run, self.warm_up)
