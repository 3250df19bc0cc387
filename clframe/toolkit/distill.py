"""Distillation: losses between the outputs of a network, the student, and those of an earlier one, its teacher.

All are pure functions of logits, features and maps, with one value per image; `clframe.Batch.mean` averages the values
of a batch. Gradients flow into the student's outputs only. A teacher is a copy that `clframe.model.snapshot` makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def soft_cross_entropy(teacher: Tensor, student: Tensor, temperature: float = 2.0) -> Tensor:
    """Compute KD(q, z; T) = -sum_c s_T(q)_c log s_T(z)_c with s_T(z) = softmax(z / T); [..., C] to [...].

    The gradient with respect to the student's logits z is (s_T(z) - s_T(q)) / T. The loss is not multiplied by T^2:
    Hinton et al. (2015) propose the factor, Li and Hoiem (LwF, 2017, eq. 2 and 3) do not use it.

    Args:
        teacher: logits q [..., C]; no gradient flows into them.
        student: logits z [..., C].
        temperature: T > 0.
    """
    p = (teacher.detach() / temperature).softmax(-1)
    return -(p * (student / temperature).log_softmax(-1)).sum(-1)


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute KL(s_T(q) || s_T(z)), which is `soft_cross_entropy` less the teacher's entropy; [..., C] to [...].

    The gradient is that of `soft_cross_entropy`; the loss is 0 where both networks agree. A logit of the teacher may be
    -inf, so that its probability is 0: a teacher with fewer classes is padded with such logits.

    Args:
        teacher: logits q [..., C]; no gradient flows into them.
        student: logits z [..., C].
        temperature: T > 0.
    """
    p = (teacher.detach() / temperature).softmax(-1)
    return functional.kl_div((student / temperature).log_softmax(-1), p, reduction="none").sum(-1)


def hard_cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute the cross-entropy of the student with the teacher's likeliest label; logits [..., C] each to [...]."""
    return -student.log_softmax(-1).gather(-1, teacher.argmax(-1, keepdim=True)).squeeze(-1)


def soft_cross_entropy_per_group(
    teacher: Tensor, student: Tensor, groups: Sequence[Sequence[int]], temperature: float | None = 2.0
) -> Tensor:
    """Sum `soft_cross_entropy` within each group of columns over the groups, as LwF does over old heads; [B].

    Args:
        teacher, student: logits [B, C] each.
        groups: the columns of each head; at least one head.
        temperature: T > 0; None: `hard_cross_entropy` is summed.
    """

    def within(q: Tensor, z: Tensor) -> Tensor:
        return hard_cross_entropy(q, z) if temperature is None else soft_cross_entropy(q, z, temperature)

    if len({len(group) for group in groups}) > 1:
        losses = [within(teacher[:, list(group)], student[:, list(group)]) for group in groups]
        return torch.stack(losses).sum(0)
    columns = [column for group in groups for column in group]
    if columns == list(range(len(columns))):
        q = teacher[:, : len(columns)]
        z = student[:, : len(columns)]
    else:
        q = teacher[:, columns]
        z = student[:, columns]
    shape = (len(groups), -1)  # heads of equal size: one softmax for all of them
    return within(q.unflatten(1, shape), z.unflatten(1, shape)).sum(1)


def sigmoid_cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute the binary cross-entropy of sigma(z) against sigma(q), averaged over the columns; [B, C] to [B].

    Args:
        teacher: logits q; no gradient flows into them.
        student: logits z.
    """
    targets = teacher.detach().sigmoid()
    return functional.binary_cross_entropy_with_logits(student, targets, reduction="none").mean(1)


def incremental_bce(
    logits: Tensor, y: Tensor, teacher: Tensor | None, temperature: float = 1.0, hard: Tensor | None = None
) -> Tensor:
    """Compute iCaRL's loss (Rebuffi et al., CVPR 2017, algorithm 3), averaged over all C outputs; [B].

    The target of a new class is 1 for the label and 0 otherwise. The target of an old class is sigma(q / T), even if
    the label is that class, unless `hard` marks the column.

    Args:
        logits: [B, C] for all outputs, including those of classes to come (their target is 0).
        y: [B] labels.
        teacher: logits q [B, C_old] of the old classes, which are the first columns; None: there are none yet.
        temperature: T > 0, 1 in the paper; the student's logits are not divided by it.
        hard: [B, C_old] bool: old columns whose target is 1 for the label and 0 otherwise, like those of a new class;
            None: none. See `clframe.context.Run.labeled_columns`.
    """
    targets = functional.one_hot(y, logits.shape[1]).to(logits.dtype)
    if teacher is not None:
        soft = (teacher.detach() / temperature).sigmoid()
        old = targets[:, : teacher.shape[1]]
        targets[:, : teacher.shape[1]] = soft if hard is None else torch.where(hard, old, soft)
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


def half_squared_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute 1/2 ||q - z||^2, summed over the columns, not averaged; [B, D] to [B]. The gradient is z - q."""
    return (student - teacher.detach()).square().sum(1) / 2


def grad_cam(scores: Tensor, maps: Tensor, *, create_graph: bool = False) -> Tensor:
    """Compute attention maps by Grad-CAM (Selvaraju et al., ICCV 2017, eq. 1 and 2), each of length 1; [B, HW].

    alpha_k is the mean over space of d score / d A_k, and the map is ReLU(sum_k alpha_k A_k), divided by its L2 norm (a
    map of zeros stays one).

    Args:
        scores: [B] one class score of each image, which must not depend on the other images: a batch norm that
            normalizes by the batch would mix their alphas.
        maps: A [B, K, H, W], on the way to `scores` in the graph.
        create_graph: keep the graph, so that a loss on the map trains all that the map depends on, through alpha, too.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), maps, create_graph=create_graph, retain_graph=True)
    alpha = gradient.mean((2, 3), keepdim=True)  # eq. 1
    attention = (alpha * maps).sum(1).relu().flatten(1)  # eq. 2
    return functional.normalize(attention, dim=1)


def attention_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute the L1 distance of two normalized maps (Dhar et al., CVPR 2019, eq. 4); [B, HW] to [B].

    The distance is at most 2 sqrt(HW). No gradient flows into the map of the teacher.
    """
    return (student - teacher.detach()).abs().sum(1)


@contextmanager
def observe(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of `module` in the forward passes inside the block, as parts of their graphs.

    If nothing before an output requires gradients, as in a frozen network, the graph begins at the output. The modules
    after `module` compute with a copy, as they may work in place.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        outputs.append(output if output.requires_grad else output.detach().requires_grad_())
        return outputs[-1].clone()

    hook = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        hook.remove()
