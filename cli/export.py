"""The command `clframe export`: the model of a finished run as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from clframe.cli import show
from clframe.cli.predict import check_task

if TYPE_CHECKING:
    from clframe.deploy.export import Format


def export_model(folder: str, kind: str, output: str, task: int | None, json: bool) -> None:
    """Write the model of a run to a file, and print what the file takes and how it was checked.

    Args:
        folder: of the finished run.
        kind: format of the file.
        output: path of the file.
        task: the only task that the file answers, counted from 1; None: all.
        json: print a JSON document.
    """
    from clframe.api import load

    trained = load(folder, listeners=[lambda record: show.note(record["text"])])
    index = check_task(task, len(trained.scenario), needed=False)
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
