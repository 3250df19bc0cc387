"""Scenarios: streams of experiences from which a run learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from clframe.data.batch import ImageData
from clframe.data.transform import Transform, check_transform
from clframe.data.values import check_images
from clframe.errors import UsageError
from clframe.system.texts import quote

Setting = Literal["class", "task", "domain"]
Part = Literal["train", "test"]


def names_of(class_names: Iterable[object], name: str) -> tuple[str, ...]:
    """Return the class names of the scenario `name` as texts. Raises `UsageError` if `class_names` is not a list."""
    if not isinstance(class_names, Iterable):
        raise UsageError(f"The class names of `{name}` are {quote(class_names)}: give a list with one for each label.")
    return tuple(map(str, class_names))


class Experience:
    """A step of a scenario, with training, validation and test images that are loaded at first use.

    Attributes:
        index: position in the stream, from 0.
        task: index of the task (the same as `index` in all built-in scenarios).
        classes: labels of the experience.
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
        """Return the images to learn from."""
        return self._load("train")

    @cached_property
    def val(self) -> ImageData:
        """Return the training images that are held out for model selection (`train.val`); by default none."""
        return self._load("val")

    @cached_property
    def test(self) -> ImageData:
        """Return the test images; an experience that a plugin receives has none."""
        return self._load("test")

    def for_training(self) -> Experience:
        """Return this experience as plugins receive it: reading its test images raises `UsageError`."""

        def load(part: str) -> ImageData:
            if part == "test":
                raise UsageError("A plugin asked for test images; a run hands it training and validation data only.")
            loaded: ImageData = getattr(self, part)
            return loaded

        return Experience(self.index, self.task, self.classes, load)


class Scenario:
    """A stream of experiences, described without loading its images.

    Labels are columns of the head: the classes of the first experience are 0, 1, ..., and the new classes of later
    experiences follow in order.

    Args:
        name: name on the command line, or any name for a custom scenario.
        setting: ``class`` (which class, of all seen), ``task`` (the task is given), ``domain`` (same classes,
            new appearance).
        classes: labels of each experience.
        class_names: name of each label.
        input_shape: shape of one image, such as (3, 32, 32).
        load: function that returns the "train" or "test" images of experience i; their `task` is set to i.
        transform: from raw images to the model's input.
        class_order: the data set's class numbers in the order of learning, where that has a meaning.
        checksum: SHA-256 of the data, by which two runs can be compared.
        move: function that moves the underlying arrays to a device, once.
        notes: sentences on the data, such as on what was left out, which a run prints and stores in its results.

    Attributes:
        known: numbers of experiences that were known at a time: one number, all of them, or, after extensions of a run,
            the number known to the run and to each extension. The experiences of one of these stretches are learned
            without knowledge of the later ones.
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
        self._seen: set[tuple[int, Part]] = set()  # parts whose images were checked
        seen = 0
        for i, group in enumerate(self.classes):
            new = [label for label in group if label >= seen]
            if new != list(range(seen, seen + len(new))):
                raise UsageError(
                    f"Experience {i} of scenario `{name}` brings the labels {new}; "
                    f"new labels must continue from {seen}."
                )
            seen += len(new)
        if not self.classes or seen > len(self.class_names):
            raise UsageError(
                f"Scenario `{name}` has {seen} labels, but {len(self.class_names)} class names; give each label one."
            )

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[Experience]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Experience:
        """Return a new experience, whose images are loaded at first use and freed with it."""
        if not 0 <= index < len(self):
            raise IndexError(f"Scenario `{self.name}` has {len(self)} experiences, none with number {index}.")

        def load(part: str) -> ImageData:
            data = self._load_checked(index, "test") if part == "test" else self._train_or_val(index, part)
            return data.of_task(index)

        return Experience(index, index, self.classes[index], load)

    def __repr__(self) -> str:
        return f"Scenario({self.name!r}, {self.setting!r}, {len(self)} experiences of {self.classes})"

    def hold_out(self, share: float, seed: int) -> None:
        """Set aside `share` of each class's training images for validation, drawn from `seed`.

        At least one image of every class is left for training.
        """
        self.val_share = share
        self._val_seed = seed

    def cut(self, experiences: int | None = None, *, test: bool = True) -> Scenario:
        """Return this scenario with its first `experiences` (None: all) only, and without test images if not `test`.

        Through what is returned, no image of a later experience, and no test image, can be read.

        Raises:
            UsageError: if it has fewer experiences.
        """
        count = len(self) if experiences is None else experiences
        if count > len(self):
            raise UsageError(
                f"`run.experiences` is {count}, and `{self.name}` has {len(self)}: choose a smaller number."
            )
        whole = self._load
        empty = ImageData(torch.empty(0, *self.input_shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))

        def load(index: int, part: Part) -> ImageData:
            if index >= count:
                raise IndexError(f"The run was given {count} experiences of `{self.name}`, none with number {index}.")
            return empty if part == "test" and not test else whole(index, part)

        n_classes = len(self.class_names) if count == len(self) else max(map(max, self.classes[:count])) + 1
        of_labels = len(self.class_order) == len(self.class_names)
        notes = [] if count == len(self) else [f"The run was given {count} of the {len(self)} experiences."]
        notes += [] if test else ["The run was given no test images."]
        return Scenario(
            self.name,
            self.setting,
            self.classes[:count],
            self.class_names[:n_classes],
            self.input_shape,
            load,
            transform=self.transform,
            class_order=self.class_order[:n_classes] if of_labels else self.class_order,
            checksum=self.checksum,
            move=self._move,
            notes=(*self.notes, *notes),
        )

    def described(self, index: int | None = None) -> Scenario:
        """Return this scenario as plugins and a loaded model receive it: reading any images raises `UsageError`.

        With an `index`, only the experiences that were known when experience `index` was learned are described.
        """
        known = len(self) if index is None else next(k for k in self.known if k > index)
        n_classes = len(self.class_names) if known == len(self) else max(map(max, self.classes[:known])) + 1

        def load(index: int, part: Part) -> ImageData:
            raise UsageError(
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
        """Move the images to `device`, if the scenario has a `move` function."""
        if self._move:
            self._move(device)

    def _load_checked(self, index: int, part: Part) -> ImageData:
        """Return the images of `load`. Raises `DataError` if `transform` and a network cannot take them as they are."""
        data = self._load(index, part)
        if (index, part) not in self._seen:
            if isinstance(data.images, Tensor):
                words = f"{'training' if part == 'train' else 'test'} images of experience {index + 1} of `{self.name}`"
                check_images(data.images, self.transform.scale, words, part=True)
            self._seen.add((index, part))
        return data

    def _train_or_val(self, index: int, part: str) -> ImageData:
        data = self._load_checked(index, "train")
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
