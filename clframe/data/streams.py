"""What a stream asks of a run: classes that come back, tasks that share classes, experiences of one class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from clframe import compose

if TYPE_CHECKING:
    from clframe.context import Run


_FEWER = "give each experience two classes at least, such as by fewer `scenario.experiences`"
_following = ContextVar("following", default=False)


@contextmanager
def following(learned: bool) -> Iterator[None]:
    """Inside, a scenario is built that follows what a finished run has `learned`: one class is enough, then."""
    token = _following.set(learned)
    try:
        yield
    finally:
        _following.reset(token)


def least_classes() -> int:
    """Return how many classes a scenario must have: two to tell apart, or one that follows others."""
    return 1 if _following.get() else 2


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
    """One sentence for each reason why the classes of this stream cannot be learned as the run would learn them.

    Called before training, and before an extension, of the whole stream. A class has one column in the head: two tasks
    that both have it would both train that column, so a plugin that isolates tasks cannot keep the first one's answers.
    A loss among the classes of one experience is always 0 where that experience has one class.
    """
    return [*_shared_class_problems(run), *_replay_problems(run), *_default_loss_problems(run)]


def _shared_class_problems(run: Run) -> list[str]:
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


def _replay_problems(run: Run) -> list[str]:
    """The sentence that refuses replayed classes whose logits take no part in the loss, which would be infinite."""
    classes = run.scenario.classes
    coming = range(max(1, learned(run)), len(classes))
    left_out = any(set().union(*classes[:i]).difference(classes[i]) for i in coming)
    if run.logits != "current" or not left_out:
        return []
    methods = [plugin for plugin in run.plugins if not plugin.observer]  # what keeps experiences refuses company itself
    return [
        f"`{plugin.name}` brings old classes back, which `train.logits=current` leaves out of the loss: choose `seen` "
        "or `all`."
        for plugin in run.plugins
        if (plugin.replays or (plugin.keeps_experiences and methods == [plugin]))
        and plugin.wanted_logits(run) in (None, "current")
    ]


def _default_loss_problems(run: Run) -> list[str]:
    """The sentence of `single_class_problems`, unless a plugin's own loss, made for no logits, takes the place."""
    owners = compose.owners(run.plugins, "base_loss")
    if any(plugin.wanted_logits(run) is None for plugin in owners):
        return []
    return single_class_problems(run)


def single_class_problems(run: Run) -> list[str]:
    """The sentence that refuses experiences to come of one class, where the loss is among an experience's own classes.

    One class among one choice has the probability 1: its cross-entropy is 0, with a gradient of 0, at every step.
    """
    scenario = run.scenario
    to_come = range(learned(run), len(scenario.classes))
    single = [i for i in to_come if len(scenario.classes[i]) == 1]
    if run.logits not in ("own", "current") or not single:
        return []
    if any(plugin.keeps_experiences for plugin in run.plugins) and len(single) < len(to_come):
        return []  # their images are learned with those of the others
    wanting = [plugin for plugin in run.plugins if plugin.wanted_logits(run) == run.logits]
    serving = [plugin.one_class for plugin in wanting] or ["train.logits=seen"]
    others = f", or choose `{serving[0]}`" if serving[0] else ""
    name = scenario.class_names[scenario.classes[single[0]][0]]
    more = f" (and {len(single) - 1} more)" if len(single) > 1 else ""
    alone = len({label for i in to_come for label in scenario.classes[i]}) == 1
    advice = "add two classes at least" if alone else _FEWER
    return [
        f"Experience {single[0] + 1} of `{scenario.name}`{more} has one class, `{name}`, and with "
        f"`train.logits={run.logits}` the loss among the classes of one experience is then always 0: {advice}{others}."
    ]


def learned(run: Run) -> int:
    """Return how many experiences of the whole stream the run that this one extends has learned; 0: it extends none."""
    known = run.scenario.known
    return known[-2] if len(known) > 1 else 0
