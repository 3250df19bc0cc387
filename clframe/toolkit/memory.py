"""Exemplar memory: which images of the past are kept, and how they are drawn again.

A memory is an `ImageData` as the data set has it (uint8 images, labels, tasks, positions), small enough to be the state
of a plugin; None is an empty one. A *group* is what a budget is shared among: the images of one class of one task, so
that a class that comes back in another domain is another group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clframe.data.batch import ImageData

Memory = ImageData | None
Order = Callable[[ImageData, int], Tensor]


def quota(total: int, groups: int, *, ceil: bool = False) -> int:
    """Images of each group, where `total` are shared evenly: floor(total / groups), or the ceiling.

    With the ceiling, as iCaRL's code has it, the memory may hold up to one image more for each group.
    """
    return -(-total // groups) if ceil else total // groups


def too_small(size: int, groups: int, option: str) -> list[str]:
    """The sentence that refuses a memory of `size` images, which `option` asks for, for so many groups."""
    if size >= groups:
        return []
    return [f"`{option}` is {size}, and there are {groups} classes to remember: give each of them one image at least."]


def groups_of(rows: ImageData) -> list[Tensor]:
    """The positions of each group in `rows`, in their order; groups by task and label."""
    _, which = torch.unique(torch.stack([rows.task, rows.y]), dim=1, return_inverse=True)
    return [(which == k).nonzero().flatten() for k in range(int(which.max()) + 1)] if len(rows) else []


def balanced(memory: Memory, new: ImageData, count: int, order: Order) -> ImageData:
    """The first `count` images of each group in `memory`, which stay in their order, and `count` of each in `new`.

    Args:
        memory: the images of earlier groups.
        new: all images of the groups to add.
        count: images of each group.
        order: of the images of one group, and `count`, the positions of those to keep, the most important first.
    """
    kept = [] if memory is None else [memory.rows(where[:count]) for where in groups_of(memory)]
    chosen = [(group := new.rows(where)).rows(order(group, count)) for where in groups_of(new)]
    return ImageData.concat([*kept, *chosen]).loaded()


def at_random(generator: torch.Generator) -> Order:
    """An order for `balanced`: at random."""

    def order(rows: ImageData, count: int) -> Tensor:
        return torch.randperm(len(rows), generator=generator)[:count].to(rows.y.device)

    return order


def herding(features: Tensor, count: int) -> Tensor:
    """The images whose mean follows the mean of all best, at every length (Welling, 2009; iCaRL, algorithm 4).

    p_k = argmin || mu - (phi(x) + sum_{j<k} phi(p_j)) / k || over the images x that are not taken yet, where mu is the
    mean of `features`. The first m of a longer selection are the selection of m.

    Args:
        features: phi [N, D], each of length 1 in iCaRL.
        count: how many to select, at most N.

    Returns:
        [count] positions, in the order of selection.
    """
    mean, squares = features.mean(0, dtype=torch.float64), features.square().sum(1)
    rest = torch.zeros_like(mean)  # k mu - sum_{j<k} phi(p_j): what the next one should be like
    taken = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    selected = []
    for _ in range(min(count, len(features))):
        rest += mean
        distances = squares - 2 * (features @ rest.to(features.dtype))  # k^2 times the norm's square, less ||rest||^2
        selected.append(distances.masked_fill_(taken, torch.inf).argmin())
        taken[selected[-1]] = True
        rest -= features[selected[-1]]
    return torch.stack(selected) if selected else torch.empty(0, dtype=torch.int64, device=features.device)


def reservoir(memory: Memory, rows: ImageData, seen: int, size: int, generator: torch.Generator) -> ImageData:
    """A uniform sample of `size` of all images that ever came by (Vitter, 1985, algorithm R), brought up to date.

    Args:
        memory: the sample of the first `seen` images; it is written to.
        rows: the images that come by now, in this order.
    """
    free = max(0, size - seen)
    if memory is None or free:
        memory = copy_rows(_joined(memory, rows.rows(slice(free))))
        rows, seen = rows.rows(slice(free, None)), max(seen, size)
    passed = torch.arange(seen + 1, seen + 1 + len(rows), dtype=torch.float64)
    slots = (torch.rand(len(rows), generator=generator, dtype=torch.float64) * passed).long().tolist()
    last = {slot: i for i, slot in enumerate(slots) if slot < size}  # of two images in one slot the later one stays
    if last:
        where, which = (torch.tensor([*part], device=rows.y.device) for part in (last.keys(), last.values()))
        for name in ("x", "y", "index", "task"):
            getattr(memory, name)[where] = getattr(rows, name)[which]
        for name, target in memory.targets.items():
            target[where] = rows.targets[name][which]
    return memory


def ring(memory: Memory, rows: ImageData, count: int) -> ImageData:
    """The latest `count` images of each group, `rows` being the latest of all, in this order."""
    joined = _joined(memory, rows)
    return joined.rows(torch.cat([where[-count:] for where in groups_of(joined)]))


def _joined(memory: Memory, rows: ImageData) -> ImageData:
    return rows if memory is None else ImageData.concat([memory, rows])


def copy_rows(rows: ImageData) -> ImageData:
    """A copy of `rows` that can be written to, all of weight 1 and of the experience itself."""
    index, task = (column.clone(memory_format=torch.contiguous_format) for column in (rows.index, rows.task))
    targets = {name: target.clone() for name, target in rows.targets.items()}
    return ImageData(rows.x.clone(), rows.y.clone(), index=index, task=task, targets=targets)


def draw(memory: ImageData, count: int, generator: torch.Generator) -> ImageData:
    """`count` different images of `memory` at random; all of them where it has fewer."""
    where = torch.randperm(len(memory), generator=generator)[:count]
    return memory.rows(where.to(memory.y.device))
