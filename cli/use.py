"""What the commands do that put the model of a finished run to use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from clframe.cli import show
from clframe.errors import UsageError

if TYPE_CHECKING:
    from clframe.deploy.export import Format


def predicted(folder: str, images: Sequence[str], top: int, task: int | None, skip: bool, json: bool) -> None:
    """Print what the images are, and how far to trust that."""
    from clframe.api import load

    if top < 1:
        raise UsageError(f"`--top` is {top}; it must be 1 at least.")
    trained = load(folder, listeners=[lambda record: show.note(record["text"])])
    index = index_of(task, len(trained.scenario), trained.needs_task)
    skipped: list[str] | None = [] if skip else None
    left_out: list[str] = []
    found = trained.predict(images, top=top, task=index, skipped=skipped, left_out=left_out)
    temperature = trained.temperature.get(trained.reading(index))
    about = trained.about_confidence(index)
    if json:
        show.document(
            {
                "run": folder,
                "task": task,
                "scores": trained.scores,
                "temperature": temperature,
                "about": about,
                "predictions": [
                    {"image": str(one.path), "classes": [vars(answer) for answer in one.answers]} for one in found
                ],
                "skipped": skipped or [],
                "left_out": left_out,
            }
        )
        return
    several = range(2, 1 + max((len(one.answers) for one in found), default=1))
    headers = ["image", "class", "confidence", *(f"{what} {k}" for k in several for what in ("class", "confidence"))]
    rows = [
        [str(one.path), *(cell for a in one.answers for cell in (a.name, show.share(a.confidence)))] for one in found
    ]
    show.table(headers, [row + [""] * (len(headers) - len(row)) for row in rows])
    for sentence in [*(skipped or []), *left_out]:
        show.note(sentence)
    show.note(about)


def exported(folder: str, kind: str, output: str, task: int | None, json: bool) -> None:
    """Write the model to a file, and print what that takes and how it was checked."""
    from clframe.api import load

    trained = load(folder, listeners=[lambda record: show.note(record["text"])])
    index = index_of(task, len(trained.scenario), needed=False)
    written = trained.export(output, cast("Format", kind), task=index)
    if json:
        show.document(vars(written) | {"task": task, "class_names": trained.class_names})
        return
    show.line(f"Written: {written.path}")
    for name, what in written.inputs.items():
        show.line(f"Takes {name}: {what}")
    show.line(f"Gives scores [B, {len(trained.class_names)}] of the classes {', '.join(trained.class_names)}")
    if written.checked_with is None:
        show.note("It was not run, as `onnxruntime` is not installed.")
    else:
        show.line(
            f"Checked with {written.checked_with}: scores differ from the run's by {written.difference:.1g} of the "
            "largest at most"
        )


def index_of(task: int | None, tasks: int, needed: bool) -> int | None:
    """The index of the task that people count from 1. Raises `UsageError`."""
    if task is None and needed:
        raise UsageError(f"This model answers within a task only: name it with `--task`, 1 to {tasks}.")
    if task is not None and not 1 <= task <= tasks:
        raise UsageError(f"`--task` is {task}, and this model has learnt the tasks 1 to {tasks}.")
    return None if task is None else task - 1
