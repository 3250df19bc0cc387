"""The progress of a run on stderr: a live table on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from clframe.cli.show import HELD_OUT, MODES, format_percent
from clframe.system.texts import escape_unprintable

if TYPE_CHECKING:
    from clframe.events import Event

REDRAW = 0.25  # seconds
NAMED = 6  # names at most that a line has
AT_ONCE = ("experience", "phase", "eval", "end")  # kinds of records that are shown without waiting
LINES = 1.0  # seconds between two plain lines on evaluations every few steps


class Live:
    """A listener that shows the progress of a run, and a context that restores the terminal.

    Args:
        quiet: show nothing but messages.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.quiet = quiet
        self.screen: Screen | None = None
        if self.console.is_terminal and not quiet:
            self.screen = Screen(console=self.console, auto_refresh=False, transient=True)
        self.scenario = ""
        self.n = 0
        self.index = 0
        self.classes = ""
        self.phase = ""
        self.step: Event | None = None
        self.tick: Event | None = None
        self.rows: dict[str, dict[int, list[float | None]]] = {}
        self.held_out: dict[str, list[float | None]] = {}  # for each evaluation mode its latest row
        # the latest row while learning, of the experience under way, and the epoch or step after which it was measured
        self.within: dict[str, tuple[str, list[float | None]]] = {}
        self.within_shown = (0, 0.0)  # the step and the time of the latest plain line on one between epochs
        self.began = self.phase_began = time.monotonic()
        self.took: float | None = None  # seconds of the latest finished experience
        self.drawn = 0.0

    def __enter__(self) -> Self:
        if self.screen:
            self.screen.start()
            self.screen.update(Text("Starting: torch and the data are being loaded"), refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.screen:
            # what was reached stays on the screen if the run did not finish
            self.screen.transient = error is None or not self.scenario
            self.screen.stop()

    def __call__(self, record: Event) -> None:
        """Show one record of the run, at once or when the table is drawn next."""
        kind = record["kind"]
        if handle := getattr(self, f"_{kind}", None):
            handle(record)
        now = time.monotonic()
        at_once = kind in AT_ONCE or (kind == "within" and record.get("every", "epoch") == "epoch")
        if self.screen and (at_once or now - self.drawn >= REDRAW):
            self.drawn = now
            self.screen.update(self._draw(), refresh=True)

    # ----------------------------------------------------------------------------------------- records

    def _start(self, record: Event) -> None:
        self.scenario = record["scenario"]
        self.n = record["n_experiences"]
        self.rows = {reading: dict(enumerate(rows)) for reading, rows in record["accuracy"].items()}
        self.held_out = {reading: rows[-1] for reading, rows in record.get("validation", {}).items() if rows}

    def _experience(self, record: Event) -> None:
        self.index = record["index"]
        self.classes = _list_classes(record["classes"], record["class_names"])
        self.began = time.monotonic()
        self.step = None
        self.tick = None
        self.within = {}
        self._plain(f"{self._place()}: {self.classes}")

    def _phase(self, record: Event) -> None:
        self.phase = record["name"]
        self.phase_began = time.monotonic()
        self.step = None
        self.tick = None

    def _progress(self, record: Event) -> None:
        self.step = record
        self.tick = None

    def _tick(self, record: Event) -> None:
        self.tick = record

    def _within(self, record: Event) -> None:
        reading, row = record["reading"], record["row"]
        by_epoch = record.get("every", "epoch") == "epoch"
        after = f"epoch {record['epoch'] + 1}" if by_epoch else f"step {record['total_step']:,} of the run"
        held_out = record.get("part") == "val"
        if held_out:
            self.held_out[reading] = row
        else:
            self.within[reading] = after, row
        if by_epoch or self._is_due(record["total_step"]):
            place = f"{self._place()}, {after}" + (f", {HELD_OUT}" if held_out else "")
            self._plain(f"{place}: {_format_row(reading, row)}")

    def _is_due(self, step: int) -> bool:
        """Return whether plain lines on the evaluation after `step` are due; all of one evaluation are, or none."""
        latest, when = self.within_shown
        now = time.monotonic()
        if step != latest and now - when < LINES:
            return False
        self.within_shown = (step, now)
        return True

    def _eval(self, record: Event) -> None:
        n_learned = record["experience"] + 1
        rows = "; ".join(_format_row(reading, row[:n_learned]) for reading, row in record["rows"].items())
        if record.get("part") == "val":
            self.held_out = dict(record["rows"])
            self._plain(f"{self._place()}, {HELD_OUT}: {rows}")
            return
        self.took = time.monotonic() - self.began
        self.tick = None
        self.within = {}
        for reading, row in record["rows"].items():
            self.rows.setdefault(reading, {})[record["experience"]] = row
        self._plain(f"{self._place()} learned in {format_duration(self.took)}: {rows}")

    def _message(self, record: Event) -> None:
        self.console.print(escape_unprintable(record["text"]), markup=False, soft_wrap=True)

    def _plain(self, text: str) -> None:
        if not (self.screen or self.quiet):
            print(escape_unprintable(text), file=sys.stderr, flush=True)

    # ----------------------------------------------------------------------------------------- drawing

    def _place(self) -> str:
        return f"experience {self.index + 1} of {self.n}"

    def _draw(self) -> Group:
        """Return the whole display: place, losses, the accuracy so far."""
        step, tick = self.step, self.tick
        now = [self._place()]
        if self.phase not in ("", "train"):
            now.append(self.phase)
        if step:
            now += [f"epoch {step['epoch'] + 1}", f"step {step['step']:,} of {step['steps']:,}"]
            now += [
                f"{step['images_per_second']:,.0f} images/s",
                f"{format_duration(self._left(step['seconds_left']))} left",
            ]
        parts: list[Any] = [Text(f"{escape_unprintable(self.scenario)}: " + "  ".join(now), style="bold")]
        if step:
            losses = [f"{name} {loss:.4g}" for name, loss in step["losses"].items()]
            parts.append(Text(f"loss: {', '.join(losses)}; learning rate {step['lr']:.3g}"))
        if tick:
            parts.append(Text(f"{escape_unprintable(tick['name'])}: {tick['i']:,} of {tick['n']:,}"))
        parts += [self._draw_accuracy(reading) for reading in dict.fromkeys([*self.rows, *self.within])]
        n_learned = self.index + 1
        parts += [
            Text(f"{HELD_OUT.capitalize()}: {_format_row(r, row[:n_learned])}") for r, row in self.held_out.items()
        ]
        return Group(*parts)

    def _draw_accuracy(self, reading: str) -> Table:
        """Return the accuracy matrix so far; of many experiences, the latest rows and columns that fit the terminal.

        Where rows or columns are left out, "..." stands in their place.
        """
        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        drawn.add_column(f"{MODES.get(reading, reading)}, %")
        rows = {f"after {i + 1}": (i + 1, row) for i, row in self.rows.get(reading, {}).items()}
        if reading in self.within:
            after, row = self.within[reading]
            rows[f"{self.index + 1}, {after.removesuffix(' of the run')}"] = self.index + 1, row
        widest = max(len(row) for _, row in rows.values())
        room = max(1, (self.console.width - 28) // 7)
        if widest > room:
            room = max(1, (self.console.width - 33) // 7)
            drawn.add_column("...")
        first = max(0, widest - room)
        columns = range(first, widest)
        for j in columns:
            drawn.add_column(f"on {j + 1}", justify="right")
        drawn.add_column("mean", justify="right")
        tallest = max(1, (self.console.height - 4) // len({*self.rows, *self.within}) - 4)
        if len(rows) > tallest:
            tallest = max(1, tallest - 1)
            drawn.add_row("...")
        for name, (seen, row) in list(rows.items())[-tallest:]:
            shown = [format_percent(row[j]) if j < len(row) else "" for j in columns]
            drawn.add_row(name, *([""] if first else []), *shown, format_percent(_mean(row[:seen])))
        return drawn

    def _left(self, left: float) -> float:
        """Estimate the seconds to the end of the run, if each experience to come takes as long as this one."""
        so_far = time.monotonic() - self.phase_began
        return left + (self.n - self.index - 1) * (self.took or so_far + left)


def _mean(row: list[float | None]) -> float | None:
    known = [share for share in row if share is not None]
    return sum(known) / len(known) if known else None


def _format_row(reading: str, row: list[float | None]) -> str:
    known = " ".join(format_percent(share) for share in row if share is not None)
    return f"{MODES.get(reading, reading)} accuracy {format_percent(_mean(row))} % ({known})"


def _list_classes(classes: list[int], names: list[str]) -> str:
    """Return the names of classes as a phrase: a range, or the first of them, if they are many."""
    if len(names) == 1:
        return f"class {names[0]}"
    if len(names) > 2 and names == [str(k) for k in range(classes[0], classes[-1] + 1)]:
        return f"classes {names[0]} to {names[-1]}"
    if len(names) > NAMED:
        return f"{len(names)} classes: {', '.join(names[:NAMED])}, ..."
    return "classes " + ", ".join(names[:-1]) + f" and {names[-1]}"


def format_duration(seconds: float) -> str:
    """Return a time as a person reads it: ``3.2 s``, ``2:05 min``, ``1:02:05 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h" if minutes >= 60 else f"{minutes}:{rest:02} min"
