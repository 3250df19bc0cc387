"""What a stream asks of plugins: classes that come back, and tasks that share classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clframe.context import Run


def first_return(classes: Sequence[Sequence[int]]) -> tuple[int, int, int] | None:
    """The earlier experience, the first one with a class of it, from 0, and the class; None: no class comes back."""
    owner: dict[int, int] = {}
    for index, group in enumerate(classes):
        for label in group:
            if label in owner:
                return owner[label], index, label
        owner |= dict.fromkeys(group, index)
    return None


def stream_problems(run: Run) -> list[str]:
    """One sentence for each plugin that cannot serve the classes of this stream.

    Called before training, and before an extension, of the whole stream. A class has one column in the head: two tasks
    that both have it would both train that column, so a plugin that isolates tasks cannot keep the first one's answers.
    """
    shared = first_return(run.scenario.classes)
    if shared is None or run.scenario.setting == "domain":  # in which plugins that isolate are refused already
        return []
    earlier, later, label = shared
    return [
        f"`{plugin.name}` keeps the answers of each task as they are, and experiences {earlier + 1} and {later + 1} of "
        f"`{run.scenario.name}` share the class `{run.scenario.class_names[label]}`, so both would train its output: "
        "give each experience classes of its own, or choose another method."
        for plugin in run.plugins
        if plugin.isolates
    ]
