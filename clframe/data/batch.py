"""Images in memory and the batches that a step trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from clframe.data.files import LazyImages, RawImages, concat_images
from clframe.errors import DataError

Column = TypeVar("Column", Tensor, LazyImages, RawImages)
COLUMNS = ("x", "y", "index", "task", "weight", "origin")  # per-row tensors of `Batch` and `ImageData`


@dataclass(slots=True)
class Batch:
    """Rows of one step, ready for the model.

    Attributes:
        x: [B, ...] float, normalized and augmented.
        y: [B] int64 labels; a label is the column of its class in the head.
        index: [B] int64 positions among the data set's training images, or its test images for a test batch (-1:
            from neither).
        task: [B] int64 index of each row's task.
        weight: [B] float32 weight of each row in the base loss.
        origin: [B] int64; 0: the row is from the experience itself, k: it was added by the k-th plugin of the run.
        targets: named per-row tensors, such as stored logits; rows without one hold zeros.
        raw: [n, ...] the first n rows as the data set has them, neither augmented nor normalized: the rows that were
            drawn for the step, before plugins added others.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    task: Tensor
    weight: Tensor
    origin: Tensor
    targets: dict[str, Tensor] = field(default_factory=dict)
    raw: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def fresh(self, **targets: Tensor) -> ImageData:
        """Return the rows of the experience itself as the data set has them: what a memory may store of this step.

        `targets` are named per-row tensors [B, ...] that are stored with the rows.
        """
        x = self.x[:0] if self.raw is None else self.raw
        n = len(x)
        going = {name: target[:n] for name, target in targets.items()}
        drawn = ImageData(x, self.y[:n], index=self.index[:n], task=self.task[:n], targets=going)
        return drawn.rows((self.origin[:n] == 0).nonzero().flatten())

    def mean(self, values: Tensor, only: Tensor | None = None) -> Tensor:
        """Return the weighted mean of one value per row [B]: sum(w * v) / sum(w).

        `only` [B] bool chooses the rows that count; the mean of none is 0.
        """
        if only is None:
            return torch.dot(values, self.weight.to(values.dtype)) / self.weight.sum()
        weight = self.weight.to(values.dtype) * only
        values = torch.where(only, values, 0)  # an infinite value times a weight of 0 is not a number
        return torch.dot(values, weight) / weight.sum().clamp(min=torch.finfo(values.dtype).tiny)


def join(parts: Sequence[Batch]) -> Batch:
    """Return one batch of the rows of all `parts`, in their order."""
    if len(parts) == 1:
        return parts[0]
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS}
    return Batch(**columns, targets=_join_targets(parts), raw=parts[0].raw)


class ImageData:
    """Images with labels, as the data set has them (uint8, or float as a user gave them), in memory or in files.

    Attributes are those of `Batch`, except that `x` is raw: neither normalized nor augmented. `task`, `weight` and
    `origin` may be given as one number for all rows; `index` defaults to -1.

    Images in files are `LazyImages`: `rows` picks some of them without reading any file; reading the attribute ``x``
    reads all files, and keeps the images from then on. As a data set may be large, take batches with `rows` or `parts`,
    and read the ``x`` of those.

    Attributes:
        images: `x`, or the `LazyImages` that will read it.
    """

    def __init__(
        self,
        x: RawImages,
        y: Tensor,
        *,
        index: Tensor | None = None,
        task: Tensor | int = 0,
        weight: Tensor | float = 1.0,
        origin: Tensor | int = 0,
        targets: Mapping[str, Tensor] | None = None,
    ) -> None:
        if len(x) != len(y):
            raise DataError(f"{len(x)} images came with {len(y)} labels; there must be one label for each image.")

        def column(value: Tensor | float, dtype: torch.dtype) -> Tensor:
            if isinstance(value, Tensor):
                return value.to(x.device, dtype)
            # one number for all rows takes no memory, and no time where rows are picked
            return torch.full((1,), value, dtype=dtype, device=x.device).expand(len(y))

        self.images = x
        self.y = column(y, torch.int64)
        self.index = column(-1 if index is None else index, torch.int64)
        self.task = column(task, torch.int64)
        self.weight = column(weight, torch.float32)
        self.origin = column(origin, torch.int64)
        self.targets = dict(targets or {})

    def __len__(self) -> int:
        return len(self.y)

    @property
    def x(self) -> Tensor:
        """Return the images [N, ...]; those in files are read now, and kept."""
        if isinstance(self.images, LazyImages):
            self.images = self.images.read()
        return self.images

    @property
    def device(self) -> torch.device:
        """Return the device of the rows."""
        return self.images.device

    def rows(self, where: Tensor | slice) -> ImageData:
        """Return the rows at the positions, under the boolean mask, or in the slice `where`."""
        picked = object.__new__(ImageData)  # the columns are valid already: no checks, because this runs every step
        picked.images, picked.y = _pick(self.images, where), _pick(self.y, where)
        for name in COLUMNS[2:]:
            column = getattr(self, name)
            one_number = column.stride(0) == 0
            setattr(picked, name, column[:1].expand(len(picked.y)) if one_number else _pick(column, where))
        picked.targets = {name: _pick(target, where) for name, target in self.targets.items()}
        return picked

    def loaded(self) -> ImageData:
        """Return this data after reading its images, if they are in files: a memory holds its images."""
        self.images = self.x
        return self

    def parts(self, size: int) -> Iterator[ImageData]:
        """Yield all rows in their order, `size` at a time; while one part is used, the next ones are read."""
        for start in range(0, len(self), size):
            self.expect(slice(start, start + 3 * size))
            yield self.rows(slice(start, start + size))

    def expect(self, where: Tensor | slice) -> None:
        """Begin to read the rows at `where`, which will be used soon, in the background; rows in memory need none."""
        if isinstance(self.images, LazyImages):
            self.images.expect(where)

    def marked(self, origin: int) -> ImageData:
        """Return the same rows with the given `origin`."""
        rest = {n: getattr(self, n) for n in ("index", "task", "weight")}
        return ImageData(self.images, self.y, **rest, origin=origin, targets=self.targets)

    def of_task(self, task: int) -> ImageData:
        """Return the same rows, all of the given `task`."""
        rest = {n: getattr(self, n) for n in ("index", "weight", "origin")}
        return ImageData(self.images, self.y, **rest, task=task, targets=self.targets)

    def to(self, device: torch.device | str) -> ImageData:
        """Return this data on `device`; the object itself if it is there already."""
        if self.device == torch.device(device):
            return self
        targets = {name: target.to(device) for name, target in self.targets.items()}
        rest = {n: getattr(self, n) for n in ("index", "task", "weight", "origin")}
        return ImageData(self.images.to(device), self.y, **rest, targets=targets)

    @staticmethod
    def concat(parts: Sequence[ImageData]) -> ImageData:
        """Return the rows of all `parts`, in their order."""
        if len(parts) == 1:
            return parts[0]
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS[1:]}
        return ImageData(concat_images([part.images for part in parts]), **columns, targets=_join_targets(parts))


def _pick(column: Column, where: Tensor | slice) -> Column:
    """Return ``column[where]``; `index_select` copies whole rows several times faster than indexing does."""
    if isinstance(where, Tensor) and where.dtype == torch.int64 and where.dim() == 1:
        return column.index_select(0, where)
    return column[where]


def _join_targets(parts: Sequence[Batch] | Sequence[ImageData]) -> dict[str, Tensor]:
    concat_images = {}
    for name in dict.fromkeys(name for part in parts for name in part.targets):
        like = next(part.targets[name] for part in parts if name in part.targets)
        rows = [part.targets.get(name, like.new_zeros(len(part), *like.shape[1:])) for part in parts]
        concat_images[name] = torch.cat(rows)
    return concat_images
