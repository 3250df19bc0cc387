"""The contract of scenarios: one function for each check, by whose name and docstring the check is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clframe import api, registry
from clframe.data.scenario import Scenario
from clframe.runs.results import Results
from clframe.testing.fixtures import require, same_after_a_stop
from clframe.testing.subjects import Subject, check, check_docstrings


@check("scenario", needs_run=False)
def options_are_documented(subject: Subject, folder: Path) -> None:
    """Check that each option is documented."""
    check_docstrings(subject, registry.SUPPLIED)


@check("scenario", first=True)
def its_images_are_what_it_says(subject: Subject, folder: Path) -> None:
    """Check that each experience has training and test images of the declared shape, classes and task."""
    stream = subject.scenario()
    require(len(stream) > 0, "It has no experience.")
    for place, experience in enumerate(stream):
        where = f"experience {place + 1} of {len(stream)}"
        require(experience.index == place, f"The index of {where} is {experience.index}, not {place}.")
        for part in ("train", "test"):
            data = getattr(experience, part)
            require(len(data), f"There are no {part} images in {where}.")
            shape = tuple(data.x.shape[1:])
            expected = tuple(stream.input_shape)
            require(shape == expected, f"The {part} images of {where} are {shape}, not as `input_shape`.")
            strange = sorted(set(data.y.tolist()) - set(experience.classes))
            require(not strange, f"The label {strange[:1]} in the {part} images of {where} is not one of its classes.")
            tasks = data.task.unique().tolist()
            require(tasks == [experience.task], f"The {part} images of {where} have the tasks {tasks}.")
    last = max(max(classes) for classes in stream.classes)
    require(last < len(stream.class_names), f"Class {last} has no name: there are {len(stream.class_names)}.")


@check("scenario")
def it_is_the_same_each_time(subject: Subject, folder: Path) -> None:
    """Check that equal builds, and two passes over one, give the same images, and a checksum reveals other data."""
    one = subject.scenario()
    other = subject.scenario()
    require(one.checksum, "It has no `checksum`, by which a resume notices other data.")
    require(one.checksum == other.checksum, "Two that are built alike have different checksums.")
    for i, (a, b, c) in enumerate(zip(one, other, one, strict=True), start=1):
        for part in ("train", "test"):
            first, *others = [getattr(experience, part) for experience in (a, b, c)]
            same = all(torch.equal(first.x, d.x) and torch.equal(first.y, d.y) for d in others)
            require(same, f"The {part} images of experience {i} are others the second time: draw from its `seed` only.")


@check("scenario")
def a_stopped_run_on_it_resumes_to_the_same_bits(subject: Subject, folder: Path) -> None:
    """Check that plain fine-tuning on it can be stopped, and goes on to the same figures."""

    def given() -> Scenario | dict[str, Any]:
        return {"name": subject.what, **subject.options} if isinstance(subject.what, str) else subject.scenario()

    def begin(output: str) -> Results:
        train = {"iterations": 3, "batch_size": 8, "threads": 1}
        return api.run(given(), train=train, run={"tensorboard": False, "device": "cpu", "output": output})

    def go_on(path: Path) -> Results:
        return api.resume(path, scenario=None if isinstance(subject.what, str) else subject.scenario())

    same_after_a_stop(folder, begin, go_on, "The images must depend on its options alone.")
