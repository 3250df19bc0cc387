"""The progress of a study on stderr: a live table on a terminal, a line for each cell in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from clframe.cli.live import format_duration
from clframe.cli.show import format_percent
from clframe.system.texts import escape_unprintable

if TYPE_CHECKING:
    from clframe.experiments.cells import Cell, CellEvent

REDRAW = 0.25  # seconds
RANKED = 12  # methods at most that the ranking so far has for each scenario


class StudyLive:
    """A function that shows the events of a study, and a context that restores the terminal.

    Args:
        cells: all cells of the study, finished or not.
        quiet: show nothing but messages and failures.
    """

    def __init__(self, cells: Sequence[Cell], quiet: bool = False) -> None:
        from clframe.experiments.cells import state_of

        self.console = Console(stderr=True, highlight=False)
        self.quiet = quiet
        self.screen: Screen | None = None
        if self.console.is_terminal and not quiet:
            self.screen = Screen(console=self.console, auto_refresh=False, transient=True)
        self.n = len(cells)
        self.running: dict[Cell, str] = {}
        self.experiences = 0  # of the cell that runs in this process
        self.failed = 0
        self.accuracy: dict[str, dict[str, list[float]]] = {}  # by scenario and method, of cells that are finished
        self.done = 0
        for cell in cells:
            if state_of(cell.folder) == "finished":
                self._count(cell)
        self.done_before = self.done
        self.began = time.monotonic()
        self.drawn = 0.0

    def __enter__(self) -> Self:
        if self.screen:
            self.screen.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.screen:
            self.screen.stop()

    def __call__(self, event: CellEvent) -> None:
        """Show one event of the study, at once or when the table is drawn next."""
        cell = event.cell
        if event.kind == "message" or cell is None:
            self._say(event.text)
        elif event.kind in ("began", "went on"):
            self.running[cell] = "from its checkpoint" if event.kind == "went on" else ""
        elif event.kind == "progress":
            self._note_progress(event)
        elif event.kind == "finished":
            self.running.pop(cell, None)
            accuracy = self._count(cell)
            if not self.screen:
                self._plain(f"{self.done} of {self.n}: {cell.identity}: {format_percent(accuracy)} %")
        elif event.kind == "failed":
            self.running.pop(cell, None)
            self.failed += 1
            self._say(f"{cell.identity} failed: {event.text}")
        else:
            self.running.pop(cell, None)
        self._draw_soon(now=event.kind != "progress")

    def _note_progress(self, event: CellEvent) -> None:
        """Keep how far a running cell is."""
        run, cell = event.event, event.cell
        if cell is None:
            return
        if run is None:
            self.running[cell] = event.text
        elif run["kind"] == "start":
            self.experiences = run["n_experiences"]
        elif run["kind"] == "experience":
            self.running[cell] = f"experience {run['index'] + 1} of {self.experiences}"
        elif run["kind"] == "progress":
            place = f"experience {run['experience'] + 1} of {self.experiences}"
            self.running[cell] = f"{place}, step {run['step']:,} of {run['steps']:,}"

    def _count(self, cell: Cell) -> float | None:
        """Count a finished cell, and return its average accuracy in the first evaluation mode."""
        from clframe.runs.results import read_results

        self.done += 1
        measures = next(iter(read_results(cell.folder).measures.values()), {})
        accuracy = measures.get("average_accuracy")
        if accuracy is not None:
            self.accuracy.setdefault(cell.scenario, {}).setdefault(cell.method, []).append(accuracy)
        return accuracy

    def _say(self, text: str) -> None:
        self.console.print(escape_unprintable(text), markup=False, soft_wrap=True)

    def _plain(self, text: str) -> None:
        if not self.quiet:
            print(escape_unprintable(text), file=sys.stderr, flush=True)

    # ----------------------------------------------------------------------------------------- drawing

    def _draw_soon(self, now: bool) -> None:
        moment = time.monotonic()
        if self.screen and (now or moment - self.drawn >= REDRAW):
            self.drawn = moment
            self.screen.update(self._draw(), refresh=True)

    def _draw(self) -> Group:
        """Return the whole display: counts, the cells under way, the ranking so far."""
        counts = [f"{self.done} of {self.n} cells done", f"{len(self.running)} running", f"{self.failed} failed"]
        took = self.done - self.done_before
        if took:
            left = (time.monotonic() - self.began) / took * (self.n - self.done - self.failed)
            counts.append(f"about {format_duration(left)} left")
        parts: list[Text | Table] = [Text(", ".join(counts), style="bold")]
        for cell, place in self.running.items():
            parts.append(Text(f"  {escape_unprintable(cell.identity)}{f': {place}' if place else ''}"))
        parts += [self._rank(scenario) for scenario in self.accuracy]
        return Group(*parts)

    def _rank(self, scenario: str) -> Table:
        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        drawn.add_column(Text(f"{escape_unprintable(scenario)}, so far"))
        drawn.add_column("accuracy, %", justify="right")
        drawn.add_column("cells", justify="right")
        means = {method: sum(values) / len(values) for method, values in self.accuracy[scenario].items()}
        for method in sorted(means, key=lambda method: -means[method])[:RANKED]:
            count = len(self.accuracy[scenario][method])
            drawn.add_row(Text(escape_unprintable(method)), format_percent(means[method]), str(count))
        return drawn
