"""Rules on the classes of a stream: the least number of a scenario, and classes that return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_following = ContextVar("following", default=False)


@contextmanager
def following(learned: bool) -> Iterator[None]:
    """Build a scenario inside that follows a finished run if `learned`: one class is then enough."""
    token = _following.set(learned)
    try:
        yield
    finally:
        _following.reset(token)


def least_classes() -> int:
    """Return the least number of classes of a scenario: two to tell apart, or one that follows learned classes."""
    return 1 if _following.get() else 2


def find_returning_class(classes: Sequence[Sequence[int]]) -> tuple[int, int, int] | None:
    """Return the earlier experience, the first later one that shares a class, both from 0, and the class; else None."""
    owner: dict[int, int] = {}
    for index, group in enumerate(classes):
        for label in group:
            if label in owner:
                return owner[label], index, label
        owner |= dict.fromkeys(group, index)
    return None
