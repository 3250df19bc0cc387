"""Importance weights: the Fisher information, sensitivity and path integrals, and the quadratic penalty they weigh.

`label_cotangents` turns sums of squared per-sample gradients (`clframe.toolkit.per_sample`) into the Fisher
information, `norm_cotangents` turns sums of absolute ones into the sensitivity of MAS, and `add_path_step` adds a step
to the path integral of SI. `Quadratic` is the penalty on moving weights away from their anchor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clframe.data.batch import Batch, ImageData
from clframe.model import masked
from clframe.toolkit.per_sample import GradientSums, Reduce, zeros_for

if TYPE_CHECKING:
    from clframe.context import Run

CHUNK = 1 << 19  # numbers in the images taken at a time: small images come in larger batches than in training

Labels = Literal["exact", "sampled", "empirical", "argmax"]


def label_cotangents(
    logits: Tensor,
    labels: Labels,
    mask: Tensor | None = None,
    y: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Return vectors v_k [B, C] such that sum_k (J^T v_k)^2 is the diagonal of each sample's Fisher information.

    With p the softmax over the logits that `mask` includes, and g_c = d log p_c / d logits = e_c - p:

    - ``exact``: the expectation over the model's own labels, sum_c p_c g_c g_c^T = diag(p) - p p^T. The columns g_c
      would cost a backward pass for each label. Any factor of this matrix gives the same sum of squares. The Cholesky
      factor, known in closed form (Tanabe and Sagae, J. R. Stat. Soc. B 54, 1992), has one column less, and no column
      is computed by subtraction, so that a label of probability 1 - 1e-9 loses no digits.
    - ``sampled``: g of a label drawn from p by `generator`.
    - ``empirical``: g of the label in `y`.
    - ``argmax``: g of the likeliest label.

    Args:
        logits: [B, C], detached.
        labels: the rule.
        mask: [C] or [B, C] bool, true for logits that take part; None: all do.
        y: [B] labels, for ``empirical``.
        generator: on the CPU, for ``sampled``.

    Raises:
        ValueError: if the rule is ``empirical`` and `y` is None.
    """
    p = masked(logits, mask).softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if labels == "exact":
        return _cholesky_columns(p)
    if labels == "sampled":
        y = torch.multinomial(p.cpu(), 1, generator=generator)[:, 0].to(p.device)
    elif labels == "argmax":
        y = p.argmax(1)
    elif y is None:
        raise ValueError("the empirical rule needs the labels `y`")
    others = p.scatter(1, y[:, None], 0.0)
    return [others.neg().scatter(1, y[:, None], others.sum(1, keepdim=True))]


def norm_cotangents(logits: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Return the gradient [B, C] of ||z||_2^2 with respect to the logits z that `mask` includes: 2 z.

    The mean over samples of |J^T 2z| is the importance of MAS (Aljundi et al., ECCV 2018, section 4.1).

    Args:
        logits: z [B, C], detached.
        mask: [C] or [B, C] bool, true for logits that take part; None: all do.

    Returns:
        a list of this one cotangent, in the form of `label_cotangents`.
    """
    active = logits if mask is None else logits.masked_fill(~mask, 0.0)
    return [2 * active]


@torch.no_grad()
def add_path_step(omega: list[Tensor], gradients: list[Tensor], before: list[Tensor], after: list[Tensor]) -> None:
    """Add ``-g (after - before)``, the decrease of the loss in a step, to `omega` in place (Zenke et al., 2017, eq. 3).

    Args:
        omega: the path integral so far of each tensor.
        gradients: g, the gradients of the task's loss alone, before the step.
        before: the weights before the step; they are overwritten.
        after: the weights after the step.
    """
    torch._foreach_sub_(before, after)  # before - after
    torch._foreach_addcmul_(omega, gradients, before)  # eq. 3


def path_importance(omega: Tensor, start: Tensor, end: Tensor, xi: float) -> Tensor:
    """Return ``omega / ((end - start)^2 + xi)``: the decrease of the loss over the squared distance moved.

    Zenke et al., Continual learning through synaptic intelligence (2017), equation 5.

    Args:
        omega: the path integral over a task.
        start, end: the weights before and after the task.
        xi: damping, above 0.
    """
    return omega / ((end - start).square() + xi)


def _cholesky_columns(p: Tensor) -> list[Tensor]:
    """Return the Cholesky columns of diag(p) - p p^T for probabilities p [B, C].

    Column k is s_k = sqrt(p_k q_k / (p_k + q_k)) (e_k - p_{>k} / q_k), where q_k is the sum of p_{>k}.
    """
    active = (p != 0).any(0).nonzero().flatten().tolist()
    columns = []
    for k in active[:-1]:
        later = p.clone()
        later[:, : k + 1] = 0
        q = later.sum(1)
        scale = torch.where(q == 0, 0, (p[:, k] * q / (p[:, k] + q)).sqrt())
        column = later * torch.where(q == 0, 0, -scale / q)[:, None]
        column[:, k] = scale
        columns.append(column)
    return columns


class Quadratic(nn.Module):
    """A penalty ``1/2 sum_i A_i (theta_i - m_i)^2 + constant`` on named parameters, in float32 (float64 for float64).

    The memory that the penalty takes does not depend on how many penalties were added to it: a sum of quadratics is one
    quadratic. The penalty is empty at first; a parameter that comes later (a block of the head) is part of it once
    `add` or `replace` names it. A checkpoint stores the penalty like any module.

    Attributes:
        anchor: m, by name of the parameter.
        precision: A >= 0, by name of the parameter.
        constant: the value at the anchor, by which the added penalties contradict each other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.anchor: dict[str, Tensor] = {}
        self.precision: dict[str, Tensor] = {}
        self.constant = 0.0
        self._largest: dict[str, float] | None = None

    @torch.no_grad()
    def add(self, precision: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
        """Add ``1/2 sum_i F_i (theta_i - t_i)^2`` to the penalty.

        The new anchor is the mean of the old ones, weighted by their precisions: A' = A + F, m' = m + F/A' (t - m), and
        the constant grows by 1/2 sum A F/A' (t - m)^2. No term is subtracted again, so that no digits cancel.

        Args:
            precision: F >= 0, by name of the parameter.
            anchor: t, by name of the parameter; names without a precision are ignored.
        """
        self._largest = None
        for name, added in precision.items():
            self._move_to(added.device)
            if name not in self.precision:
                self.precision[name] = added.clone()
                self.anchor[name] = anchor[name].detach().to(added.dtype, copy=True)
                continue
            old = self.precision[name]
            away = anchor[name] - self.anchor[name]
            self.precision[name] = old + added
            share = torch.where(added > 0, added / self.precision[name], 0)
            self.anchor[name] = self.anchor[name] + share * away
            self.constant += 0.5 * (old * share * away.square()).sum(dtype=torch.float64).item()

    @torch.no_grad()
    def replace(self, precision: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
        """Replace the penalty by ``1/2 sum_i F_i (theta_i - t_i)^2``, with the arguments of `add`."""
        self.anchor = {}
        self.precision = {}
        self.constant = 0.0
        self.add(precision, anchor)

    def forward(self, parameters: Mapping[str, Tensor], limits: Mapping[str, float] | None = None) -> Tensor:
        """Return the value at `parameters`, a scalar with a gradient.

        Args:
            parameters: by name; those that are not part of the penalty are ignored.
            limits: the largest precision that counts, by name of the parameter; larger ones count as this number.
        """
        if not self.anchor:
            return torch.zeros(())
        theta = [parameters[name] for name in self.anchor]
        self._move_to(theta[0].device)
        precision = self.precision
        if limits:
            precision = {n: a.clamp(max=limits[n]) if n in limits else a for n, a in precision.items()}
        value: Tensor = _HalfSquares.apply(len(theta), *theta, *self.anchor.values(), *precision.values())
        return value + self.constant

    def largest(self) -> dict[str, float]:
        """Return the largest A of each parameter; computed once, until the penalty changes."""
        if self._largest is None:
            self._largest = {name: float(a.max()) for name, a in self.precision.items() if a.numel()}
        return self._largest

    def get_extra_state(self) -> dict[str, Any]:
        """Return the content of a state dict."""
        return {"anchor": self.anchor, "precision": self.precision, "constant": self.constant}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self.anchor = dict(state["anchor"])
        self.precision = dict(state["precision"])
        self.constant = state["constant"]
        self._largest = None

    def _move_to(self, device: torch.device) -> None:
        """Move the tensors to `device`: those that a checkpoint restores are on the CPU."""
        for values in (self.anchor, self.precision):
            if values and next(iter(values.values())).device != device:
                values.update({name: value.to(device) for name, value in values.items()})


class ImportanceMean(nn.Module):
    """The mean over images of per-sample statistics, computed chunk by chunk.

    A plugin that declares this module among its state can be stopped between two chunks. The module is empty before and
    after a computation.

    Attributes:
        rows: positions of the images whose mean is being computed.
        partial: sums over the images done so far, by name of the parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forget the computation under way."""
        self.rows = torch.empty(0, dtype=torch.int64)
        self.partial: dict[str, Tensor] = {}

    def over(
        self,
        run: Run,
        name: str,
        data: ImageData,
        samples: int | None,
        parameters: Mapping[str, Tensor],
        add: Callable[[GradientSums, Batch], None],
        reduce: Reduce = "square",
    ) -> dict[str, Tensor]:
        """Compute the mean over images, or go on with a computation that was stopped.

        Args:
            run: the run.
            name: name of the plugin, for its random numbers and its progress.
            data: the images; they are not augmented.
            samples: number of images that ``run.rng(name)`` draws; None: all are used.
            parameters: the parameters to compute statistics of, by name.
            add: adds a batch of images to the sums.
            reduce: see `clframe.toolkit.per_sample.GradientSums`.

        Returns:
            the means, by name of the parameter.
        """
        if not self.partial:
            self.rows = torch.randperm(len(data), generator=run.rng(name))[:samples]
            self.partial = zeros_for(parameters)
        sums = GradientSums(run.model, self.partial, reduce)
        parts = self.rows.to(data.device).split(max(run.settings.batch_size, CHUNK // data.images.shape[1:].numel()))
        for i in run.ticks(name, len(parts), resumable=True):
            add(sums, run.batch(data.rows(parts[i])))
        mean = {name: total / len(self.rows) for name, total in self.partial.items()}
        self.clear()
        return mean

    def get_extra_state(self) -> dict[str, Any]:
        """Return the content of a state dict."""
        return {"rows": self.rows, "partial": self.partial}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self.rows = state["rows"]
        self.partial = dict(state["partial"])


def weighted_penalty(run: Run, strength: float, penalty: Quadratic) -> Tensor:
    """Return ``strength * penalty`` at the weights of `run`, with curvatures limited to what SGD can follow.

    Gradient descent on a quadratic of curvature c diverges unless lr * c < 2, with momentum m unless
    lr * c < 2 (1 + m), with Nesterov's unless lr * c < 2 (1 + m) / (1 + 2 m). At half of that bound the slowest mode
    shrinks fastest, so under SGD each ``strength * A_i`` counts as at most half of the bound over the learning rate of
    its parameter. Adam rescales gradients and has no such bound: with Adam the penalty is that of the papers.

    Args:
        run: the run, with its weights and its learning rate.
        strength: the factor of the penalty.
        penalty: the quadratic.
    """
    settings = run.settings
    m = settings.momentum
    limits = {}
    if settings.optimizer == "sgd" and strength > 0:
        bound = 2 * (1 + m) / (1 + 2 * m * settings.nesterov)
        for name, largest in penalty.largest().items():
            lr = settings.lr_of(name) if run.phase.lr is None else run.phase.lr
            most = bound / 2 / lr / strength
            if most < largest < math.inf:  # a precision that is not finite is reported as the loss term
                limits[name] = most
    value: Tensor = penalty(dict(run.model.named_parameters()), limits)
    return strength * value


class _HalfSquares(torch.autograd.Function):
    """The value 1/2 sum A (theta - m)^2 and its gradient A (theta - m), in fewer passes over memory than autograd's."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> Tensor:
        values = []
        gradients = []
        with torch.autocast(tensors[0].device.type, enabled=False):
            for theta, anchor, precision in zip(tensors[:n], tensors[n : 2 * n], tensors[2 * n :], strict=True):
                away = theta - anchor
                gradients.append(away * precision)
                values.append(torch.dot(away.flatten(), gradients[-1].flatten()))
        ctx.save_for_backward(*gradients)
        return torch.stack(values).sum() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient * grad for gradient in ctx.saved_tensors]
        return None, *gradients, *[None] * (2 * len(gradients))
