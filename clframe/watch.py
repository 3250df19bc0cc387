"""What the engine watches while a run goes on, and tells: losses, seconds, images per second, hints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clframe.events import Progress, StepTaken

if TYPE_CHECKING:
    from clframe.context import Run

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


class Timings:
    """The seconds and images of each experience, without the seconds of its evaluations."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._running = False  # whether the time that passes belongs to the latest row
        self._since = time.monotonic()

    def begin(self) -> None:
        """Begin an experience."""
        self.rows.append({"seconds": 0.0, "images": 0})
        self.go_on()

    def go_on(self) -> None:
        """Count from now on, in the latest row."""
        self._running = True
        self._since = time.monotonic()

    def count(self) -> None:
        """Add the seconds since the latest count, if an experience is under way."""
        now = time.monotonic()
        if self._running:
            self.rows[-1]["seconds"] += now - self._since
        self._since = now

    def end(self) -> None:
        """End the experience: what follows is not counted."""
        self.count()
        self._running = False

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the time that is spent inside."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def state(self) -> dict[str, Any]:
        """Return the rows so far."""
        return {"timings": self.rows}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with the rows of `state`."""
        self.rows = state["timings"]


class StepReporter:
    """The records of a run's steps: their losses every ``run.log_every`` steps, and their speed while a phase goes on.

    The speed leaves out the first step of a phase, in which torch prepares itself.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._began: float | None = None  # the end of the first step
        self._images = 0
        self._reported = time.monotonic()

    def begin_phase(self) -> None:
        """Begin to measure the speed of another phase."""
        self._began = None
        self._images = 0

    def report(self, images: int, *, log: bool) -> None:
        """Emit what is due after a step on so many images: its losses if `log`, and the progress."""
        run = self.run
        if log:
            run._emit(StepTaken(**self._fields()))
        if rate := self._rate(images):
            left = (run.steps_in_phase - run.step - 1) * images / rate
            run._emit(Progress(**self._fields(), images_per_second=rate, seconds_left=left))

    def _rate(self, images: int) -> float | None:
        """Count the images of a step. Return the images per second if a record of progress is due, else None."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
        else:
            self._images += images
        if not self._images or now - self._reported < PULSE:
            return None
        self._reported = now
        return self._images / (now - self._began)

    def _fields(self) -> dict[str, Any]:
        """Return the fields of an event about the step that was taken."""
        run = self.run
        return {
            "experience": run.experience.index,
            "phase": run.phase.name,
            "epoch": run.epoch,
            "step": run.step + 1,
            "steps": run.steps_in_phase,
            "total_step": run.total_steps,
            "losses": {name: loss.item() for name, loss in run.losses.items()},
            "lr": run.optimizer.param_groups[0]["lr"] if run.optimizer else 0.0,
        }


class Advice:
    """What a run tells its user about its settings, each thing once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._told: set[str] = set()  # the plugins whose hints were told
        self._silent: set[str] = set()  # the loss terms of which it was told that they are 0

    def hints(self) -> list[str]:
        """Return the plugins' warnings about settings that may prevent learning."""
        return [hint for plugin in self.run.plugins for hint in plugin.hints(self.run)]

    def tell_hints(self) -> None:
        """Emit the plugins' hints, those of each plugin once in a run."""
        for plugin in self.run.plugins:
            if plugin.name not in self._told and (hints := list(plugin.hints(self.run))):
                self._told.add(plugin.name)
                for hint in hints:
                    self.run.tell(hint)

    def tell_silent_terms(self, effective: Mapping[str, bool]) -> None:
        """Emit which loss terms were never nonzero in the experience under way, each once in a run."""
        run = self.run
        why = ""
        if len(run.previous_classes or run.experience.classes) == 1:
            why = " Only one class was known, and a softmax over one class is always 1: begin with two classes."
        for term, was_nonzero in effective.items():
            if not was_nonzero and term not in self._silent:
                self._silent.add(term)
                run.tell(f"The loss term `{term}` was 0 at every step of {run.progress_label}.{why}")
