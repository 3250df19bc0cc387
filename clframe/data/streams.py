"""What a stream asks of a run: classes that come back, tasks that share classes, experiences of one class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

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


def find_returning_class(classes: Sequence[Sequence[int]]) -> tuple[int, int, int] | None:
    """The earlier experience, the first one with a class of it, from 0, and the class; None: no class comes back."""
    owner: dict[int, int] = {}
    for index, group in enumerate(classes):
        for label in group:
            if label in owner:
                return owner[label], index, label
        owner |= dict.fromkeys(group, index)
    return None
