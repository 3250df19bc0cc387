"""Synaptic intelligence (Zenke, Poole, Ganguli, ICML 2017): a quadratic penalty holds weights that reduced the loss."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from clframe import Experience, Plugin, hookimpl
from clframe.context import Run
from clframe.options import NonNegative, Positive, Search
from clframe.toolkit.importance import Quadratic, add_path_step, path_importance, weighted_penalty


class SI(Plugin):
    """Synaptic intelligence: a penalty on changes of weights, scaled by how much each one reduced earlier losses.

    Importance is found while training: omega += -g (theta_after - theta_before) at each step, with g the gradient of
    the experience's own loss, without any penalty and before clipping, and the step as the optimizer made it. After an
    experience Omega := max(0, Omega + omega / ((theta - theta_start)^2 + xi)), and L = loss + c sum Omega (theta -
    theta*)^2, with theta* the weights after the latest experience. There is no factor 1/2. Under SGD, entries that a
    step would overshoot count as less (`clframe.toolkit.importance.weighted_penalty`).

    `train.clip` is 1 by default, which the papers do not have. The penalty's gradient is clipped with the rest, so that
    published learning rates and strengths do not carry over as they are: `train.clip=0` turns clipping off. Beside a
    method that replays images, the experience's own loss includes the replayed rows, and so does importance.

    When to use:
        As EWC, where a pass over the data after training is too expensive.

    Keeps:
        2 numbers per weight, 4 while training.

    Hooks:
        `before_experience`, `penalty`, `after_backward`, `after_step`, `after_experience`

    Options:
        c: strength of the penalty.
        xi: damping, which bounds the importance of weights that hardly moved.
        heads: whether the penalty holds the head, too.
    """

    name = "si"
    family = "regularization"
    state = ("penalties", "omega", "start")
    former_state: ClassVar[dict[str, str]] = {"springs": "penalties"}
    needs_task_gradient = True
    citation = "Zenke, Poole, Ganguli, Continual learning through synaptic intelligence, ICML 2017"

    def __init__(
        self, *, c: Annotated[NonNegative, Search(0.001, 100, log=True)] = 1.0, xi: Positive = 0.1, heads: bool = True
    ) -> None:
        self.c = c
        self.xi = xi
        self.heads = heads
        self.penalties = Quadratic()
        self.omega: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        self.before: list[Tensor] = []

    @hookimpl
    def before_experience(self, run: Run) -> None:
        """Begin the path integral at the current weights."""
        self.start = {
            name: p.detach().clone()
            for name, p in run.model.named_parameters()
            if p.requires_grad and (self.heads or not name.startswith("head."))
        }
        self.omega = {name: torch.zeros_like(p) for name, p in self.start.items()}

    @hookimpl
    def penalty(self, run: Run) -> dict[str, Tensor] | None:
        """Return the quadratic penalty; None in the first experience, where there is nothing to protect."""
        if not self.penalties.anchor:
            return None
        # c sum Omega (theta - theta*)^2; `Quadratic` has the factor 1/2, which the paper does not have
        return {self.name: weighted_penalty(run, 2 * self.c, self.penalties)}

    @hookimpl
    def after_backward(self, run: Run) -> None:
        """Keep the weights as they are before the step."""
        self.before = [p.detach().clone() for _, p, _ in self._find_moving(run)]

    @hookimpl
    def after_step(self, run: Run) -> None:
        """Add what the step took off the loss to the path integral omega."""
        moving = self._find_moving(run)
        if moving:
            names, weights, gradients = map(list, zip(*moving, strict=True))
            # omega += -g (theta_after - theta_before)
            add_path_step([self.omega[name] for name in names], gradients, self.before, weights)

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Turn the path integrals into importance, and move the anchor to the current weights."""
        weights = {name: p.detach() for name, p in run.model.named_parameters()}
        importance = dict(self.penalties.precision)
        for name, omega in self.omega.items():
            # Omega := max(0, Omega + omega / ((theta - theta_start)^2 + xi))
            new = path_importance(omega, self.start[name], weights[name], self.xi)
            importance[name] = (importance[name] + new if name in importance else new).clamp(min=0)
        self.penalties.replace(importance, weights)
        self.omega = {}
        self.start = {}

    def _find_moving(self, run: Run) -> list[tuple[str, Tensor, Tensor]]:
        """Return name, weight and gradient of the task's loss of each parameter of the path that this step moves."""
        weights = dict(run.model.named_parameters())
        return [(name, weights[name], g) for name, g in run.task_gradients.items() if name in self.omega]
