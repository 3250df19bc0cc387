"""The events of a run, which its listeners receive: a line in `metrics.jsonl`, a curve, a line on the screen.

``event["kind"]`` names the class of an event. ``dict(event)`` is what `metrics.jsonl` holds of the kinds `step`,
`within`, `eval` and `log`.
Experiences, epochs and classes count from 0, steps from 1; accuracies go from 0 to 1 and are None where there is none.
Rows are lists of accuracies, one for each experience; an evaluation mode is `class`, `task` or `domain`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch import Tensor

Accuracies = list[float | None]  # on each experience
EvalPart = Literal["test", "val"]  # test images, or training images that are held out


@dataclass(frozen=True, eq=False)
class Event:
    """Something that happened in a run; its fields, after ``kind``, are also the keys of a mapping."""

    kind: ClassVar[str]

    def keys(self) -> list[str]:
        """Return ``kind`` and the names of the fields: ``dict(event)`` reads these."""
        return ["kind", *(field.name for field in fields(self))]

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the field `key`, or `default` if this class of events has no such field."""
        return self[key] if key in self.keys() else default


Listener = Callable[[Event], None]


@dataclass(frozen=True, eq=False)
class Started(Event):
    """Training begins, or continues after a resume.

    Attributes:
        scenario: its name.
        n_experiences: number of experiences.
        total_step: steps taken before.
        accuracy: rows so far on test images, by evaluation mode.
        validation: likewise on the training images that ``train.val`` holds out.
    """

    kind = "start"
    scenario: str
    n_experiences: int
    total_step: int
    accuracy: dict[str, list[Accuracies]]
    validation: dict[str, list[Accuracies]]


@dataclass(frozen=True, eq=False)
class Message(Event):
    """A sentence that a person should read.

    Attributes:
        text: the sentence.
    """

    kind = "message"
    text: str


@dataclass(frozen=True, eq=False)
class ExperienceBegan(Event):
    """An experience begins.

    Attributes:
        index: of the experience.
        task: of its images.
        classes: labels.
        class_names: names of these classes.
    """

    kind = "experience"
    index: int
    task: int
    classes: list[int]
    class_names: list[str]


@dataclass(frozen=True, eq=False)
class PhaseBegan(Event):
    """A phase of training begins.

    Attributes:
        name: of the phase.
        steps: number of its steps.
        experience: index of the experience.
    """

    kind = "phase"
    name: str
    steps: int
    experience: int


@dataclass(frozen=True, eq=False)
class StepTaken(Event):
    """A step was taken; every ``run.log_every`` steps.

    Attributes:
        experience: index of the experience.
        phase: name of the phase.
        epoch: of the phase.
        step: of the phase.
        steps: number of steps of the phase.
        total_step: of the run.
        losses: by loss term; ``base`` and those of plugins.
        lr: learning rate.
    """

    kind = "step"
    experience: int
    phase: str
    epoch: int
    step: int
    steps: int
    total_step: int
    losses: dict[str, float]
    lr: float


@dataclass(frozen=True, eq=False)
class Progress(StepTaken):
    """A step was taken; up to 4 times a second.

    Attributes:
        images_per_second: of the phase, without its first step.
        seconds_left: of the phase.
    """

    kind = "progress"
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True, eq=False)
class Tick(Event):
    """An iteration of a long piece of work in a hook is done.

    Attributes:
        name: of the work.
        i: number of iterations that are done.
        n: number of all iterations.
    """

    kind = "tick"
    name: str
    i: int
    n: int


@dataclass(frozen=True, eq=False)
class EvaluatedWithin(Event):
    """The run was evaluated while learning, as ``run.eval_every`` asks; one event for each evaluation mode and part.

    With ``run.eval_images``, there is also one at the end of each experience, on the same test images.

    Attributes:
        experience: index of the experience.
        phase: name of the phase.
        epoch: of the phase.
        total_step: of the run.
        part: test images, or the training images that ``train.val`` holds out.
        reading: the evaluation mode.
        row: accuracy on each experience.
        every: steps between two evaluations, or ``epoch``.
        images: how many images of each class were evaluated; None: all.
    """

    kind = "within"
    experience: int
    phase: str
    epoch: int
    total_step: int
    part: EvalPart
    reading: str
    row: Accuracies
    every: int | Literal["epoch"]
    images: int | None


@dataclass(frozen=True, eq=False)
class Evaluated(Event):
    """An experience was evaluated, after its training; one event for each part.

    Attributes:
        experience: index of the experience.
        total_step: of the run.
        part: test images, or the training images that ``train.val`` holds out.
        rows: accuracy on each experience, by evaluation mode.
    """

    kind = "eval"
    experience: int
    total_step: int
    part: EvalPart
    rows: Mapping[str, Accuracies]


@dataclass(frozen=True, eq=False)
class Logged(Event):
    """A plugin called `clframe.Run.log`.

    Attributes:
        experience: index of the experience.
        total_step: of the run.
        values: by name.
    """

    kind = "log"
    experience: int
    total_step: int
    values: dict[str, float]


@dataclass(frozen=True, eq=False)
class ImagesLogged(Event):
    """A plugin called `clframe.Run.log_images`.

    Attributes:
        name: of the picture.
        experience: index of the experience.
        picture: [H, W, 3] uint8.
    """

    kind = "images"
    name: str
    experience: int
    picture: Tensor


@dataclass(frozen=True, eq=False)
class Ended(Event):
    """The run is finished.

    Attributes:
        folder: its run folder; None if it kept none.
    """

    kind = "end"
    folder: str | None


EVENTS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        *(Started, Message, ExperienceBegan, PhaseBegan, StepTaken, Progress),
        *(Tick, EvaluatedWithin, Evaluated, Logged, ImagesLogged, Ended),
    )
}
