"""Exemplar memory: which images of earlier experiences are kept, and how they are drawn for rehearsal.

A memory is an `ImageData` in the form of the data set (uint8 images, labels, tasks, positions), small enough to be the
state of a plugin; None is an empty memory. A budget is shared among *groups*: a group is the images of one class of one
task, so that a class that returns in another domain is another group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clframe.data.batch import ImageData

Memory = ImageData | None
Order = Callable[[ImageData, int], Tensor]


def quota(total: int, groups: int, *, ceil: bool = False) -> int:
    """Return the number of images of each group if `total` are shared evenly: floor(total / groups), or the ceiling.

    With the ceiling, which iCaRL's code uses, the memory may hold up to one image more for each group.
    """
    return -(-total // groups) if ceil else total // groups


def too_small(size: int, groups: int, option: str) -> list[str]:
    """Return the sentence that refuses a memory of `size` images for `groups` groups, if it has room for fewer.

    Args:
        size: number of images in the memory.
        groups: number of classes to remember.
        option: name of the option that holds the size, such as ``er.size``.
    """
    if size >= groups:
        return []
    return [f"`{option}` is {size}, and there are {groups} classes to remember: give each of them one image at least."]


def groups_of(rows: ImageData) -> list[Tensor]:
    """Return the positions of each group in `rows`, in the order of the rows; groups are sorted by task and label."""
    if not len(rows):
        return []
    _, which = torch.unique(torch.stack([rows.task, rows.y]), dim=1, return_inverse=True)
    return [(which == k).nonzero().flatten() for k in range(int(which.max()) + 1)]


def balanced(memory: Memory, new: ImageData, count: int, order: Order) -> ImageData:
    """Return a memory of `count` images of each group: the first ones in `memory`, in their order, and those of `new`.

    Args:
        memory: the images of earlier groups, the most important of each group first.
        new: all images of the groups to add.
        count: number of images of each group.
        order: from the images of one group, and `count`, to the positions of those to keep, the most important first.
    """
    kept = [] if memory is None else [memory.rows(where[:count]) for where in groups_of(memory)]
    chosen = []
    for where in groups_of(new):
        group = new.rows(where)
        chosen.append(group.rows(order(group, count)))
    return ImageData.concat([*kept, *chosen]).loaded()


def at_random(generator: torch.Generator) -> Order:
    """Return an order for `balanced` that selects images at random.

    Args:
        generator: on the CPU.
    """

    def order(rows: ImageData, count: int) -> Tensor:
        return torch.randperm(len(rows), generator=generator)[:count].to(rows.y.device)

    return order


def herding(features: Tensor, count: int) -> Tensor:
    """Select images so that the mean of the first k is close to the mean of all (Welling, 2009; iCaRL, algorithm 4).

    p_k = argmin || mu - (phi(x) + sum_{j<k} phi(p_j)) / k || over the images x that are not selected yet, where mu is
    the mean of `features`. The first m of a longer selection are the selection of m.

    Args:
        features: phi [N, D], each of length 1 in iCaRL.
        count: number of images to select; at most N are.

    Returns:
        positions [min(count, N)], in the order of selection.
    """
    mean = features.mean(0, dtype=torch.float64)
    squares = features.square().sum(1)
    rest = torch.zeros_like(mean)  # k mu - sum_{j<k} phi(p_j): the ideal next feature
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
    """Update a uniform sample of all images seen so far by new ones (Vitter, 1985, algorithm R), and return it.

    Args:
        memory: the sample of the first `seen` images; it is modified in place once it is full.
        rows: the new images, in the order in which they were seen.
        seen: number of images seen before.
        size: number of images in the sample.
        generator: on the CPU.
    """
    free = max(0, size - seen)
    if memory is None or free:
        memory = copy_rows(_join(memory, rows.rows(slice(free))))
        rows = rows.rows(slice(free, None))
        seen = max(seen, size)
    passed = torch.arange(seen + 1, seen + 1 + len(rows), dtype=torch.float64)
    slots = (torch.rand(len(rows), generator=generator, dtype=torch.float64) * passed).long().tolist()
    last = {slot: i for i, slot in enumerate(slots) if slot < size}  # of two images in one slot, the later one stays
    if last:
        where = torch.tensor([*last.keys()], device=rows.y.device)
        which = torch.tensor([*last.values()], device=rows.y.device)
        for name in ("x", "y", "index", "task"):
            getattr(memory, name)[where] = getattr(rows, name)[which]
        for name, target in memory.targets.items():
            target[where] = rows.targets[name][which]
    return memory


def ring(memory: Memory, rows: ImageData, count: int) -> ImageData:
    """Return a memory of the latest `count` images of each group; `rows` are newer than those of `memory`."""
    joined = _join(memory, rows)
    return joined.rows(torch.cat([where[-count:] for where in groups_of(joined)]))


def _join(memory: Memory, rows: ImageData) -> ImageData:
    """Return the images of `memory`, if there are any, and then `rows`."""
    return rows if memory is None else ImageData.concat([memory, rows])


def copy_rows(rows: ImageData) -> ImageData:
    """Return a copy of `rows` that can be modified in place, with weight 1 and the origin of an experience's images."""
    index = rows.index.clone(memory_format=torch.contiguous_format)
    task = rows.task.clone(memory_format=torch.contiguous_format)
    targets = {name: target.clone() for name, target in rows.targets.items()}
    return ImageData(rows.x.clone(), rows.y.clone(), index=index, task=task, targets=targets)


def draw(memory: ImageData, count: int, generator: torch.Generator) -> ImageData:
    """Draw `count` different images of `memory` at random; all of them if there are fewer.

    Args:
        memory: the images.
        count: number of images to draw.
        generator: on the CPU.
    """
    where = torch.randperm(len(memory), generator=generator)[:count]
    return memory.rows(where.to(memory.y.device))
