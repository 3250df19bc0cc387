"""Images in memory, batches of them, and scenarios: the streams of experiences that a run learns from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from clframe.errors import DataError, WrongUse
from clframe.images import Images, LazyImages, joined
from clframe.look import Look
from clframe.options import CountOrZero, validated
from clframe.texts import told
from clframe.values import check_images

Setting = Literal["class", "task", "domain"]
Part = Literal["train", "test"]
Column = TypeVar("Column", Tensor, LazyImages, Images)
COLUMNS = ("x", "y", "index", "task", "weight", "origin")  # the per-row tensors of `Batch` and `ImageData`


@dataclass(slots=True)
class Batch:
    """The rows of one step, ready for the model.

    Attributes:
        x: [B, ...] float, normalised and augmented.
        y: [B] int64 labels; a label is the column of its class in the head.
        index: [B] int64 positions in the data set's training images, or test images for a test batch
            (-1: from neither).
        task: [B] int64 index of each row's task.
        weight: [B] float32 weight of each row in the base loss.
        origin: [B] int64; 0 = the experience itself, k = added by the k-th plugin of the run.
        targets: named per-row tensors, such as stored logits; rows that came without one hold zeros.
        raw: [n, ...] the first n rows as the data set has them, neither augmented nor normalised: those that were drawn
            for the step, before any joined them.
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
        """The rows of the experience itself as the data set has them: what a memory may keep of this step.

        `targets` are named per-row tensors [B, ...] to go with them.
        """
        x = self.x[:0] if self.raw is None else self.raw
        n = len(x)
        going = {name: target[:n] for name, target in targets.items()}
        drawn = ImageData(x, self.y[:n], index=self.index[:n], task=self.task[:n], targets=going)
        return drawn.rows((self.origin[:n] == 0).nonzero().flatten())

    def mean(self, values: Tensor, only: Tensor | None = None) -> Tensor:
        """The mean of one value per row [B], weighted: sum(w * v) / sum(w).

        `only` [B] bool chooses the rows that count; the mean of none is 0.
        """
        if only is None:
            return torch.dot(values, self.weight.to(values.dtype)) / self.weight.sum()
        weight = self.weight.to(values.dtype) * only
        values = torch.where(only, values, 0)  # an infinite value times a weight of 0 is not a number
        return torch.dot(values, weight) / weight.sum().clamp(min=torch.finfo(values.dtype).tiny)


def join(parts: Sequence[Batch]) -> Batch:
    """One batch of the rows of all `parts`, in their order."""
    if len(parts) == 1:
        return parts[0]
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS}
    return Batch(**columns, targets=_join_targets(parts), raw=parts[0].raw)


class ImageData:
    """Images with labels, as the data set has them (uint8, or float as a user gave them), in memory or in files.

    Attributes are those of `Batch`, except that `x` is raw: neither normalised nor augmented. `task`,
    `weight` and `origin` may be given as one number for all rows; `index` defaults to -1.

    Images in files are `LazyImages`: `rows` picks some of them without reading any, and who asks for ``x`` has them
    read and kept from then on. So take batches by `rows` or `parts`, and the ``x`` of those: a data set may be large.

    Attributes:
        images: `x`, or what will read it.
    """

    def __init__(
        self,
        x: Images,
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
        """The images [N, ...]; those in files are read now, and kept."""
        if isinstance(self.images, LazyImages):
            self.images = self.images.read()
        return self.images

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.images.device

    def rows(self, where: Tensor | slice) -> ImageData:
        """The rows at the positions, under the boolean mask, or in the slice `where`."""
        picked = object.__new__(ImageData)  # columns that are valid already: no checks, this runs every step
        picked.images, picked.y = _pick(self.images, where), _pick(self.y, where)
        for name in COLUMNS[2:]:
            column = getattr(self, name)
            one_number = column.stride(0) == 0
            setattr(picked, name, column[:1].expand(len(picked.y)) if one_number else _pick(column, where))
        picked.targets = {name: _pick(target, where) for name, target in self.targets.items()}
        return picked

    def loaded(self) -> ImageData:
        """This data, with its images read if they are in files: a memory that is kept is one."""
        self.images = self.x
        return self

    def parts(self, size: int) -> Iterator[ImageData]:
        """All rows in their order, `size` at a time; while one part is used, the next ones are read."""
        for start in range(0, len(self), size):
            self.expect(slice(start, start + 3 * size))
            yield self.rows(slice(start, start + size))

    def expect(self, where: Tensor | slice) -> None:
        """Rows that will be asked for soon: those in files are read in the background."""
        if isinstance(self.images, LazyImages):
            self.images.expect(where)

    def marked(self, origin: int) -> ImageData:
        """The same rows with that origin."""
        rest = {n: getattr(self, n) for n in ("index", "task", "weight")}
        return ImageData(self.images, self.y, **rest, origin=origin, targets=self.targets)

    def of_task(self, task: int) -> ImageData:
        """The same rows, all of that task."""
        rest = {n: getattr(self, n) for n in ("index", "weight", "origin")}
        return ImageData(self.images, self.y, **rest, task=task, targets=self.targets)

    def to(self, device: torch.device | str) -> ImageData:
        """This data on `device`; itself if it is there already."""
        if self.device == torch.device(device):
            return self
        targets = {name: target.to(device) for name, target in self.targets.items()}
        rest = {n: getattr(self, n) for n in ("index", "task", "weight", "origin")}
        return ImageData(self.images.to(device), self.y, **rest, targets=targets)

    @staticmethod
    def concat(parts: Sequence[ImageData]) -> ImageData:
        """The rows of all `parts`, in their order."""
        if len(parts) == 1:
            return parts[0]
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS[1:]}
        return ImageData(joined([part.images for part in parts]), **columns, targets=_join_targets(parts))


def _pick(column: Column, where: Tensor | slice) -> Column:
    """``column[where]``; whole rows by their positions several times faster than indexing copies them."""
    if isinstance(where, Tensor) and where.dtype == torch.int64 and where.dim() == 1:
        return column.index_select(0, where)
    return column[where]


def _join_targets(parts: Sequence[Batch] | Sequence[ImageData]) -> dict[str, Tensor]:
    joined = {}
    for name in dict.fromkeys(name for part in parts for name in part.targets):
        like = next(part.targets[name] for part in parts if name in part.targets)
        rows = [part.targets.get(name, like.new_zeros(len(part), *like.shape[1:])) for part in parts]
        joined[name] = torch.cat(rows)
    return joined


@dataclass(frozen=True)
class Transform:
    """From raw images to the model's input, on whole batches and on their device.

    Attributes:
        scale: the raw value that becomes 1 (255 for 8-bit images, 16 for scikit-learn's digits, 1: floats).
        mean: per channel, or one for all, subtracted after scaling; empty for none.
        std: per channel, or one for all, divided by after that; empty for none. Neither comes without the other.
        pad: augmentation crops the image at random from itself padded with this many zeros on each side.
        flip: augmentation mirrors each image left to right with probability 1/2.
        look: how image files became the raw images; None: they came from none.

    Raises:
        WrongUse: if `mean` and `std` do not belong together, or a value cannot be divided by.
    """

    scale: float = 255.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    pad: CountOrZero = 0
    flip: bool = False
    look: Look | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("scale", "pad", "flip")}
        for name, value in validated(Transform, given, "Transform", skip=("mean", "std", "look")).items():
            object.__setattr__(self, name, value)
        for name in ("mean", "std"):
            try:  # in double precision numbers of Python keep all their digits
                values = torch.as_tensor(getattr(self, name), dtype=torch.float64).flatten().tolist()
            except (TypeError, ValueError, RuntimeError) as error:
                raise WrongUse(
                    f"`Transform.{name}` is {told(getattr(self, name))}: give a number for each channel, or one."
                ) from error
            object.__setattr__(self, name, tuple(values))
        if len(self.mean) != len(self.std):
            raise WrongUse(
                f"`Transform` has {len(self.mean)} values of `mean` and {len(self.std)} of `std`: give one of each for "
                "each channel, or neither."
            )
        if not (math.isfinite(self.scale) and self.scale > 0 and all(map(math.isfinite, self.mean))):
            raise WrongUse(f"`Transform` has `scale` {self.scale} and `mean` {self.mean}: `scale` must be above 0.")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise WrongUse(f"`Transform` has `std` {self.std}, by which values are divided: each must be above 0.")

    def check(self, name: str, input_shape: Sequence[int]) -> None:
        """Raise `WrongUse` if the images of the scenario `name`, of this shape, have other channels."""
        if len(self.mean) > 1 and len(self.mean) != input_shape[0]:
            raise WrongUse(
                f"The `Transform` of `{name}` is for {len(self.mean)} channels, and the images, {list(input_shape)}, "
                f"have {input_shape[0]}: give `mean` and `std` {input_shape[0]} values each, or one."
            )

    @property
    def augments(self) -> bool:
        """Whether there is any augmentation."""
        return self.pad > 0 or self.flip

    def normalize(self, x: Tensor) -> Tensor:
        """Raw images [B, ...] to float32 inputs [B, ...]."""
        out = x.to(torch.float32)
        if not self.mean and self.scale == 1:
            return out
        out = out.clone() if out is x else out  # never in place on the caller's images
        if not self.mean:
            return out.div_(self.scale)
        factor, shift = affine(self, x.dim() - 2, x.device)
        return out.mul_(factor).add_(shift)

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random crop and flip of each raw image [B, C, H, W].

        `generator` is on the CPU, so that all devices augment alike. Images of another form stay as they are.
        """
        if x.dim() != 4 or not self.augments:
            return x
        count, channels, height, width = x.shape
        crop = torch.randint(2 * self.pad + 1, (2, count, 1), generator=generator)
        flip = torch.randint(1 + self.flip, (1, count, 1), generator=generator)
        top, left, mirrored = torch.cat([crop, flip]).to(x.device, non_blocking=True)
        x = functional.pad(x, (self.pad,) * 4)
        rows = top + torch.arange(height, device=x.device)
        columns = torch.arange(width, device=x.device)
        columns = left + torch.where(mirrored == 1, width - 1 - columns, columns)
        # one gather from the flattened image for all channels: faster than windows, slices or two gathers
        where = (rows[:, :, None] * x.shape[3] + columns[:, None, :]).view(count, 1, height * width)
        return x.flatten(2).gather(2, where.expand(-1, channels, -1)).view(count, channels, height, width)

    def batch(self, rows: ImageData, generator: torch.Generator | None = None) -> Batch:
        """`rows` as the model takes them; augmented if a generator is given."""
        x = rows.x if generator is None else self.augment(rows.x, generator)
        return Batch(
            self.normalize(x),
            rows.y,
            # columns of one number become real ones, as who is given a batch may write into it
            rows.index.contiguous(),
            rows.task.contiguous(),
            rows.weight.contiguous(),
            rows.origin.contiguous(),
            targets=dict(rows.targets),
            raw=rows.x,
        )


def check_transform(transform: object, name: str) -> None:
    """Raise `WrongUse` if `transform`, that of the scenario `name`, is neither a `Transform` nor None."""
    if not isinstance(transform, Transform | None):
        raise WrongUse(
            f"The transform of `{name}` is a `{type(transform).__name__}`, and only a `clframe.Transform` (scale, "
            "mean, std, pad, flip) can be kept with a run: give that, and call other functions on the images before."
        )


def names_of(class_names: Iterable[object], name: str) -> tuple[str, ...]:
    """Return the names of the classes of the scenario `name` as texts. Raises `WrongUse` if they are no list."""
    if not isinstance(class_names, Iterable):
        raise WrongUse(f"The class names of `{name}` are {told(class_names)}: give a list with one for each label.")
    return tuple(map(str, class_names))


@lru_cache(maxsize=64)
def affine(transform: Transform, dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and shift [C, 1, ...], with `dims` ones, from raw values to ((value / scale) - mean) / std."""
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        constants = torch.tensor((transform.mean, transform.std), dtype=torch.float64)
        mean, std = constants.view(2, -1, *[1] * dims)
        factor, shift = 1 / (transform.scale * std), -mean / std
        return factor.to(device, torch.float32), shift.to(device, torch.float32)


class Experience:
    """One step of a scenario: its training, validation and test images, loaded when first asked for.

    Attributes:
        index: position in the stream, from 0.
        task: index of the task (the same as `index` in all built-in scenarios).
        classes: labels that occur in it.
    """

    def __init__(self, index: int, task: int, classes: tuple[int, ...], load: Callable[[str], ImageData]) -> None:
        self.index = index
        self.task = task
        self.classes = classes
        self._load = load

    def __repr__(self) -> str:
        return f"Experience(index={self.index}, task={self.task}, classes={self.classes})"

    @cached_property
    def train(self) -> ImageData:
        """The images to learn from."""
        return self._load("train")

    @cached_property
    def val(self) -> ImageData:
        """The share of the training images that is held out for model selection; empty unless asked for."""
        return self._load("val")

    @cached_property
    def test(self) -> ImageData:
        """The test images; an experience that a plugin is given has none."""
        return self._load("test")

    def for_training(self) -> Experience:
        """This experience as plugins get it: asking for its test images raises `WrongUse`."""

        def load(part: str) -> ImageData:
            if part == "test":
                raise WrongUse("A plugin asked for test images; a run hands it training and validation data only.")
            loaded: ImageData = getattr(self, part)
            return loaded

        return Experience(self.index, self.task, self.classes, load)


class Scenario:
    """A stream of experiences, described without loading its images.

    Labels are columns of the head: the classes of the first experience are 0, 1, ..., and classes that a
    later experience brings follow in order.

    Args:
        name: as the command line calls it, or any name for a scenario of one's own.
        setting: ``class`` (which class, of all seen), ``task`` (the task is told), ``domain`` (same classes,
            new look).
        classes: for each experience its labels.
        class_names: for each label its name.
        input_shape: of one image, such as (3, 32, 32).
        load: gives the "train" or "test" images of experience i; whatever they say, i is the task of all of them.
        transform: from raw images to the model's input.
        class_order: the data set's class numbers in the order of learning, where that has a meaning.
        checksum: SHA-256 of the data, so that two runs can be compared.
        move: moves the underlying arrays to a device, once.
        notes: sentences on the data, such as what was left out, which a run tells and keeps in its results.

    Attributes:
        known: how many experiences were known at a time: all, or, of a run that was extended, those of it and of each
            extension. What is learnt in one of these stretches is learnt without knowing of the later ones.
    """

    def __init__(
        self,
        name: str,
        setting: Setting,
        classes: Sequence[Sequence[int]],
        class_names: Sequence[str],
        input_shape: Sequence[int],
        load: Callable[[int, Part], ImageData],
        *,
        transform: Transform | None = None,
        class_order: Sequence[int] = (),
        checksum: str = "",
        move: Callable[[torch.device], None] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.setting: Setting = setting
        self.classes = tuple(tuple(int(label) for label in group) for group in classes)
        self.class_names = names_of(class_names, name)
        self.input_shape = tuple(int(size) for size in input_shape)
        check_transform(transform, name)
        self.transform = transform or Transform()
        self.transform.check(name, self.input_shape)
        self.class_order = tuple(class_order)
        self.checksum = checksum
        self._load = load
        self._move = move
        self.notes = tuple(notes)
        self.known: tuple[int, ...] = (len(self.classes),)
        self.val_share = 0.0
        self._val_seed = 0
        self._seen: set[tuple[int, Part]] = set()  # whose images were checked
        seen = 0
        for i, group in enumerate(self.classes):
            new = [label for label in group if label >= seen]
            if new != list(range(seen, seen + len(new))):
                raise WrongUse(
                    f"Experience {i} of scenario `{name}` brings the labels {new}; "
                    f"new labels must continue from {seen}."
                )
            seen += len(new)
        if not self.classes or seen > len(self.class_names):
            raise WrongUse(f"Scenario `{name}` has {seen} labels, but {len(self.class_names)} class names.")

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[Experience]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Experience:
        """A fresh experience: its images are loaded when asked for and freed with it."""
        if not 0 <= index < len(self):
            raise IndexError(f"Scenario `{self.name}` has {len(self)} experiences, none with number {index}.")

        def load(part: str) -> ImageData:
            data = self._checked(index, "test") if part == "test" else self._train_or_val(index, part)
            return data.of_task(index)

        return Experience(index, index, self.classes[index], load)

    def __repr__(self) -> str:
        return f"Scenario({self.name!r}, {self.setting!r}, {len(self)} experiences of {self.classes})"

    def hold_out(self, share: float, seed: int) -> None:
        """Set aside `share` of each class's training images for validation, as a function of `seed`.

        Of every class at least one image stays for training.
        """
        self.val_share, self._val_seed = share, seed

    def described(self, index: int | None = None) -> Scenario:
        """This scenario as plugins and a loaded model get it: asking for any images raises `WrongUse`.

        With an `index`, as far as it was known when the experience of that index came.
        """
        known = len(self) if index is None else next(k for k in self.known if k > index)
        n_classes = len(self.class_names) if known == len(self) else max(map(max, self.classes[:known])) + 1

        def load(index: int, part: Part) -> ImageData:
            raise WrongUse(
                f"The {part} images of experience {index} were asked for; `run.scenario` only describes them."
            )

        scenario = Scenario(
            self.name,
            self.setting,
            self.classes[:known],
            self.class_names[:n_classes],
            self.input_shape,
            load,
            transform=self.transform,
            class_order=self.class_order,
            checksum=self.checksum,
        )
        scenario.known = tuple(k for k in self.known if k <= known)
        return scenario

    def to(self, device: torch.device) -> None:
        """Hold the images on `device` from now on, where the scenario can."""
        if self._move:
            self._move(device)

    def _checked(self, index: int, part: Part) -> ImageData:
        """Return what `load` gives. Raises `DataError` if its images are not as `transform` and a network take them."""
        data = self._load(index, part)
        if (index, part) not in self._seen:
            if isinstance(data.images, Tensor):
                words = f"{'training' if part == 'train' else 'test'} images of experience {index + 1} of `{self.name}`"
                check_images(data.images, self.transform.scale, words, part=True)
            self._seen.add((index, part))
        return data

    def _train_or_val(self, index: int, part: str) -> ImageData:
        data = self._checked(index, "train")
        held = torch.zeros(len(data), dtype=torch.bool)
        if self.val_share:
            generator = torch.Generator().manual_seed(self._val_seed * 10_007 + index)
            labels = data.y.cpu()
            for label in sorted(set(labels.tolist())):
                where = (labels == label).nonzero().flatten()
                count = min(round(self.val_share * len(where)), len(where) - 1)
                held[where[torch.randperm(len(where), generator=generator)[:count]]] = True
        elif part == "train":
            return data
        return data.rows((held if part == "val" else ~held).nonzero().flatten().to(data.device))
