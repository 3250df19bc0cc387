"""Avalanche's benchmarks in clframe: a scenario read from streams of experiences with data sets.

Avalanche is not imported: any object with these attributes is accepted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clframe.data.batch import ImageData
from clframe.data.scenario import Part, Scenario, Setting
from clframe.data.transform import Transform
from clframe.errors import DataError, UsageError


def from_avalanche(
    benchmark: Any,
    *,
    setting: Setting | None = None,
    name: str = "avalanche",
    class_names: Sequence[str] | None = None,
    transform: Transform | None = None,
) -> Scenario:
    """Return a scenario of the experiences of `benchmark`, whose classes become labels 0, 1, ... as they appear.

    These attributes are read: ``train_stream`` and ``test_stream`` of the benchmark; ``dataset`` of each experience;
    the length of a data set, its ``targets`` (else the second item of each sample) and its samples ``(x, y, ...)``. The
    task of an experience is its ``task_label``, else the third item of its samples, else its position. New classes of
    an experience are ordered by ``benchmark.classes_order``, else by number. A single test experience is cut by
    classes, so that each experience is tested on its own classes.

    Images are read one by one when an experience begins, without the data set's augmentation if it can be switched off
    (``dataset.eval()``), and held while they are used; augmentation is that of `transform`.

    Args:
        benchmark: the benchmark of Avalanche, or a similar object.
        setting: by default ``task`` if the experiences have different tasks; else ``domain`` if none brings a class
            that the first lacks; else ``class``. In ``task``, the same class in two tasks counts as two classes.
        name: name of the scenario.
        class_names: names of the benchmark's classes, by number; by default ``classes`` of the benchmark, or of the
            first data set, else the numbers.
        transform: from the raw images to the model's input; by default 8-bit images are divided by 255, and others
            stay as they are.

    Raises:
        UsageError: if the object is not such a benchmark, or cannot be learned in this setting.
        DataError: if the parts of its data do not match.
    """
    parts = {part: _read_stream(benchmark, part) for part in ("train", "test")}
    data = _Data(parts["train"], parts["test"], name)
    labeled = [_read_task(experience, f"experience {i} of `{name}`") for i, experience in enumerate(parts["train"])]
    tasks = [i if task is None else task for i, task in enumerate(labeled)]
    setting = setting or _infer_setting(data, labeled)
    if setting == "task" and len(set(tasks)) < len(tasks):
        raise UsageError(
            f"The experiences of `{name}` have the tasks {tasks}; in the task setting each must have one of its own: "
            "give `setting='class'` or `setting='domain'`."
        )
    apart = tasks if setting == "task" else [0] * len(tasks)
    place = {c: i for i, c in enumerate(getattr(benchmark, "classes_order", ()))}
    columns: dict[tuple[int, int], int] = {}  # by task, where tasks keep classes apart, and class
    for task, found in zip(apart, data.classes, strict=True):
        for c in sorted(found, key=lambda c: (place.get(c, c), c)):
            columns.setdefault((task, c), len(columns))
    labels = [{c: columns[task, c] for c in found} for task, found in zip(apart, data.classes, strict=True)]
    given = class_names or getattr(benchmark, "classes", None) or getattr(data.train[0], "classes", None)
    first = data.image(0, "train", 0)
    return Scenario(
        name,
        setting,
        [sorted(of_class.values()) for of_class in labels],
        _name_columns(columns, given, name),
        first.shape,
        lambda i, part: data.load(i, part, labels[i]),
        transform=transform or Transform(scale=255.0 if first.dtype == torch.uint8 else 1.0),
        class_order=[c for _, c in columns],
        checksum=data.checksum(),
    )


class _Data:
    """Data sets of a benchmark: labels are read at once, images when they are used.

    Attributes:
        train: the training data set of each experience.
        test: the test data set of each experience, or one for all.
        classes: classes of each experience, by the benchmark's numbers.
    """

    def __init__(self, train: Sequence[Any], test: Sequence[Any], name: str) -> None:
        if len(test) not in (1, len(train)):
            raise UsageError(
                f"`{name}` has {len(train)} experiences to learn and {len(test)} to test; there must be one test "
                "experience for each, or one for all."
            )
        self.name = name
        self.train = [_without_augmentation(experience.dataset) for experience in train]
        self.test = [_without_augmentation(experience.dataset) for experience in test]
        self.targets = {"train": [_read_labels(d) for d in self.train], "test": [_read_labels(d) for d in self.test]}
        self.classes = [set(y.tolist()) for y in self.targets["train"]]
        self.tests: dict[int, ImageData] = {}  # used after every experience, so they are kept
        for i, found in enumerate(self.classes):
            y = self.targets["test"][min(i, len(test) - 1)]
            if not found:
                raise DataError(f"Experience {i} of `{name}` has no training images; there must be at least one.")
            if len(test) == len(train) and (new := sorted(set(y.tolist()) - found)):
                raise DataError(
                    f"The test images of experience {i} of `{name}` have the labels {new}, which its training images "
                    "do not have: leave these out, or train on some."
                )
            if not found & set(y.tolist()):
                raise DataError(
                    f"Experience {i} of `{name}` has no test images of its classes: add some, or leave it out."
                )

    def image(self, i: int, part: Part, row: int) -> Tensor:
        """Return one raw image of experience i."""
        dataset = (self.train if part == "train" else self.test)[i]
        return _to_tensor(dataset[row][0], f"{part} image {row} of experience {i} of `{self.name}`")

    def load(self, i: int, part: Part, labels: dict[int, int]) -> ImageData:
        """Return the images of experience i, with the columns `labels` of its classes."""
        if part == "test" and i in self.tests:
            return self.tests[i]
        k = i if part == "train" else min(i, len(self.test) - 1)
        y = self.targets[part][k]
        rows = [row for row, c in enumerate(y.tolist()) if c in labels]
        images = [self.image(k, part, row) for row in rows]
        if len(shapes := {tuple(image.shape) for image in images}) > 1:
            raise DataError(
                f"The {part} images of experience {i} of `{self.name}` are of several shapes, {shapes}: bring them "
                "to one."
            )
        start = sum(len(targets) for targets in self.targets[part][:k])
        columns = torch.tensor([labels[int(y[row])] for row in rows])
        data = ImageData(torch.stack(images), columns, index=torch.tensor(rows) + start, task=i)
        if part == "test":
            self.tests[i] = data
        return data

    def checksum(self) -> str:
        """Compute the SHA-256 of all labels and of each experience's first image: reading all would take too long."""
        digest = hashlib.sha256()
        parts: tuple[Part, Part] = ("train", "test")
        for part in parts:
            for i, y in enumerate(self.targets[part]):
                digest.update(y.numpy().tobytes())
                digest.update(self.image(i, part, 0).contiguous().numpy().tobytes())
        return digest.hexdigest()


def _read_stream(benchmark: Any, part: str) -> list[Any]:
    """Return the experiences of one stream. Raises `UsageError` if there are none with data sets."""
    stream = getattr(benchmark, f"{part}_stream", None)
    experiences = list(stream) if isinstance(stream, Iterable) else []
    if not experiences or not all(hasattr(experience, "dataset") for experience in experiences):
        raise UsageError(
            f"{type(benchmark).__name__} cannot be read as a benchmark: it needs a `{part}_stream` of experiences, "
            "each with a `dataset`."
        )
    return experiences


def _without_augmentation(dataset: Any) -> Any:
    """Return `dataset` without its augmentation, if that can be switched off."""
    return dataset.eval() if callable(getattr(dataset, "eval", None)) else dataset


def _read_labels(dataset: Any) -> Tensor:
    """Return all labels [N]."""
    given = getattr(dataset, "targets", None)
    y = list(given) if given is not None else [dataset[row][1] for row in range(len(dataset))]
    return torch.tensor([int(label) for label in y], dtype=torch.int64)


def _read_task(experience: Any, where: str) -> int | None:
    """Return the task of an experience; None if it names none."""
    try:
        label = getattr(experience, "task_label", None)
    except ValueError:  # Avalanche's property, where there are several
        raise UsageError(f"There are images of several tasks in {where}; there must be one task for each.") from None
    if label is None and len(sample := experience.dataset[0]) > 2:
        label = sample[2]
    return None if label is None else int(label)


def _infer_setting(data: _Data, tasks: Sequence[int | None]) -> Setting:
    """Return the setting that suits the tasks and classes of the experiences."""
    if None not in tasks and len(set(tasks)) == len(tasks) > 1:
        return "task"
    return "domain" if all(found <= data.classes[0] for found in data.classes) else "class"


def _name_columns(columns: dict[tuple[int, int], int], given: Any, name: str) -> list[str]:
    """Return the name of each column; the name of a class that several tasks have includes the task."""
    repeated = len({c for _, c in columns}) < len(columns)
    try:
        words = [str(c) if given is None else str(given[c]) for _, c in columns]
    except (IndexError, KeyError):
        most = max(c for _, c in columns)
        raise UsageError(
            f"`class_names` of `{name}` has {len(given)} names, but there is a class {most}: give each class a name."
        ) from None
    return [f"{word} ({task})" if repeated else word for word, (task, _) in zip(words, columns, strict=True)]


def _to_tensor(x: Any, where: str) -> Tensor:
    """Return `x` as a tensor; an array or a picture, [H, W] or [H, W, C], becomes [C, H, W]."""
    if isinstance(x, Tensor):
        return x.detach().cpu()
    try:
        pixels = torch.from_numpy(np.array(x))
    except TypeError:
        raise DataError(
            f"The {where} is of type {type(x).__name__}; it must be a tensor, an array or a picture."
        ) from None
    if pixels.dim() == 2:
        return pixels[None]
    return pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels
