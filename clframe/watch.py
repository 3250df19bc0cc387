"""What the engine watches while a run goes on: losses, seconds, and images per second."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

FULL = 256  # steps at most whose losses are kept before they are looked at
PULSE = 0.25  # seconds between two records of progress


class LossWatch:
    """The loss terms and gradient norms of the latest steps, on the device, until they are looked at together."""

    def __init__(self) -> None:
        self.steps: list[tuple[tuple[str, ...], Tensor]] = []

    @property
    def full(self) -> bool:
        """Whether so many steps are kept that they should be looked at."""
        return len(self.steps) >= FULL

    def keep(self, losses: Mapping[str, Tensor], norm: Tensor) -> None:
        """Keep the scalars `losses` and the norm of the gradient of one step."""
        # one new tensor: a term may be a view of something large, or of what its plugin will write into
        values = torch.stack([value.to(norm.device, torch.float32) for value in (*losses.values(), norm)])
        self.steps.append((tuple(losses), values))

    def look(self, effective: dict[str, bool]) -> tuple[int, str] | None:
        """Look at the steps kept, and forget them.

        Args:
            effective: by loss term, whether it was ever nonzero; updated in place.

        Returns:
            None if all values are finite; else how many steps ago the first one that is not was computed (0: in the
            latest step), and what it is: the name of a loss term, or the gradient.
        """
        steps = self.steps
        self.steps = []
        if not steps:
            return None
        every = torch.cat([values for _, values in steps]).cpu()
        if every.isfinite().all():
            nonzero = iter(every.ne(0).tolist())
            for terms, _ in steps:
                for term in terms:
                    effective[term] = next(nonzero) or effective.get(term, False)
                next(nonzero)  # of the gradient
            return None
        first = next(i for i, (_, values) in enumerate(steps) if not values.isfinite().all())
        terms, values = steps[first]
        names = [*(f"loss term `{term}`" for term in terms), "gradient"]
        return len(steps) - 1 - first, names[values.isfinite().tolist().index(False)]


class Stopwatch:
    """The seconds that an experience takes, without those of evaluations."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def lap(self) -> float:
        """Return the seconds since the latest lap, and begin another."""
        now = time.monotonic()
        seconds = now - self.started
        self.started = now
        return seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the time that is spent inside."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began


class Rate:
    """The images per second of a phase, without its first step, in which torch prepares itself."""

    def __init__(self) -> None:
        self.began: float | None = None  # the end of the first step
        self.images = 0
        self.told = time.monotonic()

    def begin(self) -> None:
        """Begin a phase."""
        self.began = None
        self.images = 0

    def count(self, images: int) -> float | None:
        """Count the images of a step. Return the rate if a record of progress is due, else None."""
        now = time.monotonic()
        if self.began is None:
            self.began = now
        else:
            self.images += images
        if not self.images or now - self.told < PULSE:
            return None
        self.told = now
        return self.images / (now - self.began)
