"""Scenarios built from labeled arrays: classes in groups, or the same classes in changing domains."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from clframe.data.batch import ImageData
from clframe.data.duplicates import Duplicates, hash_rows, resolve_duplicates
from clframe.data.files import LazyImages, RawImages
from clframe.data.scenario import Part, Scenario, Setting, names_of
from clframe.data.transform import Transform, check_transform
from clframe.data.values import check_images
from clframe.errors import DataError, UsageError
from clframe.options import validated
from clframe.system.reading import expand_home
from clframe.system.texts import quote

PIECE = 1 << 23  # bytes of which a thread computes one sum
ARRAYS = {  # the fields of `Arrays` that hold values, in words
    "x_train": "training images",
    "y_train": "training labels",
    "x_test": "test images",
    "y_test": "test labels",
}

Builder = TypeVar("Builder", bound=Callable[..., Scenario])


def suits(
    *,
    backbone: str | Mapping[str, Any],
    train: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Builder], Builder]:
    """Return a decorator that names the backbone and the training settings that suit a scenario's function.

    A run uses them where the user sets nothing else; they are known without loading any data. `backbone` is a name, or
    a name with options: ``{"name": "mlp", "hidden": [256, 256]}``. `variants` holds a ``backbone`` and ``train`` for
    each variant that others suit.
    """

    def mark(builder: Builder) -> Builder:
        builder.backbone, builder.train = backbone, dict(train)  # type: ignore[attr-defined]
        builder.variants = dict(variants or {})  # type: ignore[attr-defined]
        return builder

    return mark


@dataclass
class Arrays:
    """A labeled image data set in memory or in files, from which scenarios are built.

    Attributes:
        x_train: training images, [N, C, H, W] uint8, or any float values [N, ...]: a tensor, a NumPy array or a list of
            either, stored as a tensor; or `LazyImages`.
        y_train: training labels [N], 0 .. len(class_names) - 1, of any integer type, in the same forms; stored as
            int64.
        x_test: test images, in the same forms.
        y_test: test labels, in the same forms.
        class_names: a name for each label.
        transform: from these raw values to the model's input.
        sha256: SHA-256 of the data, where it is known; else `checksum` computes one.
        notes: sentences on the data, such as on images that were left out.

    Raises:
        DataError: if images and labels do not fit each other or the class names, or the images are not as `transform`
            and a network take them (`clframe.data.values`).
        UsageError: if the transform is not a `Transform`.
    """

    name: str
    x_train: RawImages
    y_train: Tensor
    x_test: RawImages
    y_test: Tensor
    class_names: tuple[str, ...]
    transform: Transform = field(default_factory=Transform)
    sha256: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_transform(self.transform, self.name)
        self.class_names = names_of(self.class_names, self.name)
        same = self.x_train is self.x_test
        for name, what in ARRAYS.items():
            setattr(self, name, _to_tensor(getattr(self, name), f"{what} of `{self.name}`"))
        if same:
            self.x_test = self.x_train
        self.y_train = self._check_labels("training", self.x_train, self.y_train)
        self.y_test = self._check_labels("test", self.x_test, self.y_test)
        for part, x in (("training", self.x_train), ("test", self.x_test))[: 1 if same else 2]:
            if isinstance(x, Tensor):
                check_images(x, self.transform.scale, f"{part} images of `{self.name}`")
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise DataError(
                f"The training images of `{self.name}` are {list(self.x_train.shape[1:])}, the test images "
                f"{list(self.x_test.shape[1:])}; they must have one shape."
            )

    def _check_labels(self, part: str, x: RawImages, y: Tensor) -> Tensor:
        if y.dim() != 1 or y.is_floating_point() or y.dtype == torch.bool:
            raise DataError(
                f"The {part} labels of `{self.name}` are {y.dtype} {list(y.shape)}, but must be integers [N]."
            )
        if len(x) != len(y):
            raise DataError(
                f"`{self.name}` has {len(x)} {part} images and {len(y)} labels; there must be one label for each image."
            )
        if not len(y):
            raise DataError(f"`{self.name}` has no {part} images; there must be at least one.")
        y = y.to(torch.int64)
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= len(self.class_names):
            raise DataError(
                f"The {part} labels of `{self.name}` go from {low} to {high}; "
                f"for {len(self.class_names)} classes they must lie in 0 to {len(self.class_names) - 1}."
            )
        return y

    def checksum(self) -> str:
        """Return `sha256`, or the SHA-256 of the sums of all data in pieces of 8 MB, which several threads compute."""
        if self.sha256:
            return self.sha256
        tensors = [t.read() if isinstance(t, LazyImages) else t for t in self._tensors()]
        buffers = [t.contiguous().cpu().view(-1).view(torch.uint8).numpy().data for t in tensors]
        pieces = [buffer[start : start + PIECE] for buffer in buffers for start in range(0, len(buffer), PIECE)]
        with ThreadPoolExecutor() as pool:
            sums = pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces)
            return hashlib.sha256(b"".join(sums)).hexdigest()

    def _tensors(self) -> tuple[RawImages, ...]:
        return self.x_train, self.y_train, self.x_test, self.y_test

    def to_scenario(
        self,
        name: str,
        setting: Setting,
        classes: Sequence[Sequence[int]],
        class_names: Sequence[str],
        class_order: Sequence[int],
        load: Callable[[int, Part], ImageData],
    ) -> Scenario:
        """Return a scenario of these images, whose experiences `load` gives; arguments as in `Scenario`."""
        return Scenario(
            name,
            setting,
            classes,
            class_names,
            self.x_train.shape[1:],
            load,
            transform=self.transform,
            class_order=class_order,
            checksum=self.checksum(),
            move=self.move,
            notes=self.notes,
        )

    def limited(self, per_class: int | None) -> Arrays:
        """Return the first `per_class` images of each class, of training and of test data; all if None."""
        if per_class is None:
            return self

        def first(y: Tensor) -> Tensor:
            return torch.cat([(y == c).nonzero().flatten()[:per_class] for c in sorted(set(y.tolist()))]).sort().values

        train, test = first(self.y_train), first(self.y_test)
        x_train = self.x_train[train]
        one = self.x_test is self.x_train and torch.equal(train, test)
        return replace(
            self,
            x_train=x_train,
            y_train=self.y_train[train],
            x_test=x_train if one else self.x_test[test],
            y_test=self.y_test[test],
            sha256="",
        )

    def without_duplicates(self, duplicates: Duplicates) -> Arrays:
        """Return these arrays with a note on images in memory that training and test share; ``drop`` leaves them out.

        Two images are the same if their bytes are equal. One tensor given for training and for test is on purpose: it
        is kept without a note; test images that are a part of the training tensor are kept where they would be refused.
        Images in files are compared where the files are listed.

        Raises:
            DataError: with ``refuse``, if there are such images; with ``drop``, if a class would have no others.
        """
        x, tests = self.x_train, self.x_test
        if x is tests or isinstance(x, LazyImages) or isinstance(tests, LazyImages):
            return self
        if duplicates == "refuse" and _shares_memory(tests, x):
            duplicates = "keep"
        of_tests = hash_rows(tests)
        position = {digest: i for i, digest in reversed(list(enumerate(of_tests)))}
        shared = [(i, digest) for i, digest in enumerate(hash_rows(x)) if digest in position]
        if not shared:
            return self
        learned = {digest for _, digest in shared}
        first, digest = shared[0]
        note = resolve_duplicates(
            duplicates,
            sum(digest in learned for digest in of_tests),
            len(tests),
            len(shared),
            f"`{self.name}`",
            f"training image {first} and test image {position[digest]}, counted from 0",
            option="duplicates=",
        )
        if duplicates == "keep":
            return self._with_note(note)
        stays = torch.ones(len(x), dtype=torch.bool)
        stays[[i for i, _ in shared]] = False
        y = self.y_train[stays]
        if gone := sorted(set(self.y_train.tolist()) - set(y.tolist())):
            raise DataError(
                f"All training images of the class `{self.class_names[gone[0]]}` of `{self.name}` are test images, "
                "too, so that `duplicates=drop` leaves none: give it others."
            )
        return replace(self, x_train=x[stays], y_train=y, sha256="", notes=(*self.notes, note))

    def _with_note(self, note: str) -> Arrays:
        noted = copy(self)
        noted.notes = (*self.notes, note)
        return noted

    def move(self, device: torch.device) -> None:
        """Move all tensors to `device`."""
        for name in ("x_train", "y_train", "x_test", "y_test"):
            setattr(self, name, getattr(self, name).to(device))

    def part(self, part: Part) -> tuple[RawImages, Tensor]:
        """Return the images and labels of ``train`` or ``test``."""
        return (self.x_train, self.y_train) if part == "train" else (self.x_test, self.y_test)


def _shares_memory(part: Tensor, whole: Tensor) -> bool:
    """Return whether `part` lies in the memory of `whole`, as a slice does."""
    if not (part.is_contiguous() and whole.is_contiguous()) or part.device != whole.device:
        return False
    (start, end), (first, last) = ((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (part, whole))
    return first <= start and end <= last


def _to_tensor(values: Any, what: str) -> RawImages:
    """Return `values`, a NumPy array or a list of numbers or arrays, as a tensor; `DataError` if there is no such."""
    if isinstance(values, Tensor | LazyImages):
        return values
    try:
        if isinstance(values, list | tuple) and values and all(isinstance(value, Tensor) for value in values):
            return torch.stack(list(values))
        array = np.asarray(values)
        if array.dtype.kind not in "buif":
            raise TypeError(f"they are {array.dtype}")
        # torch takes no arrays of the other byte order, that are read-only, or with negative strides
        return torch.from_numpy(np.require(array.astype(array.dtype.newbyteorder("="), copy=False), None, ["C", "W"]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The {what} cannot become a tensor ({error}): give a tensor, a NumPy array or a list of numbers, "
            "all images of one shape, and each label the position of its class in `class_names`."
        ) from error


def read_images(path: Path) -> Tensor:
    """Return the raw images [N, ...] of the .npy file `path`. Raises `DataError` if it has none, or holds a pickle."""
    try:
        images = torch.from_numpy(np.load(expand_home(path), allow_pickle=False))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise DataError(f"The images in {path} cannot be read ({error}): it must be an .npy array [N, ...].") from error
    if not images.numel():
        raise DataError(f"There are no images in {path}: it must be an .npy array [N, ...], with N of 1 at least.")
    return images


def split_classes(
    name: str,
    arrays: Arrays,
    *,
    experiences: int,
    setting: Setting = "class",
    first: int | None = None,
    order: Sequence[int] | None = None,
    duplicates: Duplicates | None = "refuse",
) -> Scenario:
    """Build a scenario whose experiences bring disjoint groups of classes.

    Args:
        name: name of the scenario.
        arrays: data set whose classes are grouped.
        experiences: number of groups.
        setting: in ``domain`` a label is the position of the class within its group.
        first: number of classes in the first group; by default all groups have the same size.
        order: permutation of the class numbers; by default as the data set numbers them.
        duplicates: what is done about images that training and test share: ``refuse``, ``drop`` them from training, or
            ``keep`` them (`Arrays.without_duplicates`); None: no search for such images, as in published data sets.

    Raises:
        UsageError: if the classes cannot be divided into such groups, or `order` is not a permutation.
        DataError: if training and test share images, and `duplicates` is ``refuse``.
    """
    _check_arrays(name, arrays)
    asked = {
        "experiences": experiences,
        "setting": setting,
        "first": first,
        "order": order,
        "duplicates": duplicates,
    }
    taken = validated(split_classes, asked, "scenario", skip=("name", "arrays"))
    experiences, first, order = taken["experiences"], taken["first"], taken["order"]
    arrays = arrays.without_duplicates(duplicates) if duplicates is not None else arrays
    total = len(arrays.class_names)
    order = list(order) if order is not None else list(range(total))
    if sorted(order) != list(range(total)):
        raise UsageError(f"`scenario.order` is {order}; it must hold each of the class numbers 0 to {total - 1} once.")
    rest = experiences - (first is not None)
    left = total - (first or 0)
    if experiences < 1 or left < rest or (rest and left % rest) or (not rest and left):
        raise UsageError(
            f"`scenario.experiences` is {experiences}"
            + (f" with `scenario.first` {first}" if first is not None else "")
            + f": {total} classes of {arrays.name} cannot be divided evenly in this way; choose other numbers."
        )
    sizes = ([first] if first is not None else []) + [left // max(rest, 1)] * rest
    if setting == "domain" and sizes[0] < max(sizes):
        raise UsageError(
            f"`scenario.first` is {first}; in the domain setting it must be at least {max(sizes)}, "
            "the number of classes of the other groups."
        )
    groups = list(torch.split(torch.tensor(order), sizes))
    tests: dict[int, ImageData] = {}  # kept, because they are loaded after every experience

    def load(i: int, part: Part) -> ImageData:
        if part == "test" and i in tests:
            return tests[i]
        x, y = arrays.part(part)
        start = 0 if setting == "domain" else sum(sizes[:i])
        label = torch.full((total,), -1, dtype=torch.int64)
        label[groups[i]] = torch.arange(sizes[i]) + start
        y = label.to(y.device)[y]
        where = (y >= 0).nonzero().flatten()
        data = ImageData(x.index_select(0, where), y[where], index=where, task=i)
        if part == "test":
            tests[i] = data
        return data

    names = [arrays.class_names[c] for c in order]
    if setting == "domain":
        classes: Iterable[Sequence[int]] = [range(size) for size in sizes]
        names = [f"place {place}" for place in range(max(sizes))]
    else:
        classes = [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(experiences)]
    return arrays.to_scenario(name, setting, list(classes), names, order, load)


def _check_arrays(name: str, arrays: object) -> None:
    """Raise `UsageError` unless `arrays`, from which the scenario `name` is to be built, are `Arrays`."""
    if not isinstance(arrays, Arrays):
        kind = type(arrays).__name__
        raise UsageError(f"The images of `{name}` are given as a `{kind}`: put them into `clframe.Arrays`.")


def _check_change(name: str, change: object) -> None:
    """Raise `UsageError` unless `change` can be called as ``change(i, x)``; torchvision's transforms take `x` alone."""
    if not callable(change):
        raise UsageError(f"`change` of `{name}` is {quote(change)}: give a function `change(i, x)`.")
    try:
        inspect.signature(change.forward if isinstance(change, nn.Module) else change).bind(0, None)
    except TypeError:
        raise UsageError(
            f"`change` of `{name}`, a `{type(change).__name__}`, cannot be called as `change(i, x)`, with the number "
            "of the experience and its raw images: give a function of both, such as `lambda i, x: change(x)`."
        ) from None
    except ValueError:  # functions written in C have no signature
        return


def change_domains(
    name: str,
    arrays: Arrays,
    change: Callable[[int, Tensor], Tensor],
    *,
    experiences: int,
    setting: Setting = "domain",
    duplicates: Duplicates | None = "refuse",
) -> Scenario:
    """Build a scenario whose experiences show all classes, each time changed in another way.

    Args:
        name: name of the scenario.
        arrays: data set whose images are changed.
        change: function: ``change(i, x)`` returns the raw images `x` as experience i shows them.
        experiences: number of experiences.
        setting: in ``domain`` all experiences share their labels; else each has its own labels.
        duplicates: as in `split_classes`, for the images before they are changed.

    Raises:
        DataError: if training and test share images, and `duplicates` is ``refuse``.
        UsageError: if `change` is not a function of two arguments, or returns another number or shape of images.
    """
    _check_arrays(name, arrays)
    asked = {"experiences": experiences, "setting": setting, "duplicates": duplicates}
    experiences = validated(change_domains, asked, "scenario", skip=("name", "arrays", "change"))["experiences"]
    _check_change(name, change)
    arrays = arrays.without_duplicates(duplicates) if duplicates is not None else arrays
    total = len(arrays.class_names)
    apart = setting != "domain"

    def load(i: int, part: Part) -> ImageData:
        x, y = arrays.part(part)
        raw = x.read() if isinstance(x, LazyImages) else x
        changed = change(i, raw)
        if isinstance(changed, np.ndarray):
            changed = _to_tensor(changed, f"images that `change` of `{name}` gives")
        if not isinstance(changed, Tensor) or changed.shape != raw.shape:
            got = f"{list(changed.shape)}" if isinstance(changed, Tensor) else f"a `{type(changed).__name__}`"
            raise UsageError(
                f"`change` of `{name}` gives {got} for images {list(raw.shape)}: it must give as many of that shape."
            )
        return ImageData(changed, y + total * i * apart, index=torch.arange(len(y)), task=i)

    classes = [range(total * i * apart, total * (i * apart + 1)) for i in range(experiences)]
    names = [f"{c} ({i})" if apart else c for i in range(experiences if apart else 1) for c in arrays.class_names]
    return arrays.to_scenario(name, setting, classes, names, range(total), load)
