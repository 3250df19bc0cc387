"""The command `clframe predict`: what the model of a finished run says of images."""

from __future__ import annotations

from collections.abc import Sequence

from clframe.cli import show
from clframe.errors import UsageError


def print_predictions(folder: str, images: Sequence[str], top: int, task: int | None, skip: bool, json: bool) -> None:
    """Print the likeliest classes of each image, and a sentence on how far to trust their confidence.

    Args:
        folder: of the finished run.
        images: image files, and folders of them.
        top: how many classes of each image, at most.
        task: task of all images, counted from 1; None: none is given.
        skip: leave out files that cannot be read, and name them.
        json: print a JSON document.
    """
    from clframe.api import load

    if top < 1:
        raise UsageError(f"`--top` is {top}; it must be 1 at least.")
    trained = load(folder, listeners=[lambda record: show.note(record["text"])])
    index = check_task(task, len(trained.scenario), trained.needs_task)
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
        [str(one.path), *(cell for a in one.answers for cell in (a.name, show.format_confidence(a.confidence)))]
        for one in found
    ]
    show.table(headers, [row + [""] * (len(headers) - len(row)) for row in rows])
    for sentence in [*(skipped or []), *left_out]:
        show.note(sentence)
    show.note(about)


def check_task(task: int | None, tasks: int, needed: bool) -> int | None:
    """Return the index of the task that `--task` names, which counts from 1; None if it names none.

    Raises `UsageError` if a task is `needed` and missing, or not one of the `tasks` learned.
    """
    if task is None and needed:
        raise UsageError(f"This model answers within a task only: name it with `--task`, 1 to {tasks}.")
    if task is not None and not 1 <= task <= tasks:
        raise UsageError(f"`--task` is {task}, and this model has learned the tasks 1 to {tasks}.")
    return None if task is None else task - 1
