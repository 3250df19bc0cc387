"""Printing of commands: tables on a terminal, plain lines in a pipe, one JSON document if asked for."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.system.texts import UNPRINTABLE, escape_unprintable

if TYPE_CHECKING:
    from rich.table import Table

    from clframe.options import Option
    from clframe.runs.results import Results

MODES = {"class": "class-incremental", "task": "task-incremental", "domain": "domain-incremental"}
HELD_OUT = "images held out"  # of the training images, by `train.val`
UNLIMITED = 100_000  # columns of a terminal on which every table fits
Rows = Sequence[Sequence[str]]


def line(text: str = "") -> None:
    """Print one line to stdout; characters of `text` that a terminal would act on become escapes."""
    print(escape_unprintable(text))


def lines(text: str) -> None:
    """Print a text of several lines to stdout."""
    for one in text.split("\n"):
        line(one)


def note(text: str) -> None:
    """Print one line to stderr, as `line` does."""
    print(escape_unprintable(text), file=sys.stderr)


def document(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print `data` as the one JSON document of a command."""
    utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(data, indent=2, ensure_ascii=not utf8, default=str)
    for one in text.split("\n"):  # JSON escapes some of them only
        print(UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", one))


def table(headers: Sequence[str], rows: Rows, numbers: bool = False, spare: Sequence[str] = ()) -> None:
    """Print a table on a terminal; in a pipe a line for each row, with tabs (aligned columns if they are `numbers`).

    Where a terminal is too narrow, the columns in `spare` are left out, the first of them first, and named on stderr.
    """
    headers, rows = (
        [escape_unprintable(header) for header in headers],
        [[escape_unprintable(cell) for cell in row] for row in rows],
    )
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        left_out: list[str] = []
        while (drawn := _draw(headers, rows, numbers, left_out)) and len(left_out) < len(spare):
            if Console(width=UNLIMITED).measure(drawn).maximum <= console.width:
                break
            left_out.append(spare[len(left_out)])
        console.print(drawn)
        if left_out:
            note(f"The terminal is too narrow for {', '.join(left_out)}: `--json` has them.")
    elif numbers:
        widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
        for row in [headers, *rows]:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            line("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    else:
        for row in rows:
            print("\t".join(row))


def _draw(headers: Sequence[str], rows: Rows, numbers: bool, left_out: Sequence[str]) -> Table:
    """Return the table for a terminal, without the columns in `left_out`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    kept = [i for i, header in enumerate(headers) if header not in left_out]
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i in kept:
        drawn.add_column(Text(headers[i]), justify="right" if numbers and i else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(row[i]) for i in kept))
    return drawn


def tree(rows: Sequence[tuple[int, str]]) -> None:
    """Print texts as a tree, each with its level: with guides on a terminal, in a pipe indented by two spaces each."""
    if not sys.stdout.isatty():
        for level, text in rows:
            line("  " * level + text)
        return
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    path = [Tree("", hide_root=True)]
    for level, text in rows:
        path[level + 1 :] = [path[level].add(Text(escape_unprintable(text), overflow="fold"))]
    Console().print(path[0])


def options(found: Sequence[Option]) -> None:
    """Print the table of the options of a plugin or scenario."""
    if not found:
        line("Options: none")
        return
    line("Options:")
    searched = any(option.search for option in found)
    rows = []
    for option in found:
        search = [str(option.search or "")] if searched else []
        rows.append([option.name, option.type, format_default(option), *search, option.doc])
    table(["name", "type", "default", *(["search"] if searched else []), "meaning"], rows)


def format_default(option: Option) -> str:
    """Return the default of an option as YAML and ``--set`` write it."""
    from clframe.options import REQUIRED

    return "(required)" if option.default is REQUIRED else format_value(option.default)


def format_value(given: object) -> str:
    """Return a value as YAML and ``--set`` write it."""
    return given if isinstance(given, str) else json.dumps(given, default=str)


def describe_option(option: Option) -> dict[str, Any]:
    """Return an option as the JSON documents hold it."""
    from clframe.options import REQUIRED

    known = {} if option.default is REQUIRED else {"default": option.default}
    search: dict[str, Any] = {}
    if option.search:
        kept = ("choices",) if option.search.choices else ("low", "high", "log")
        search = {"search": {key: getattr(option.search, key) for key in kept}}
    return {"name": option.name, "type": option.type, **known, **search, "doc": option.doc}


def format_percent(share: float | None) -> str:
    """Return a share of 1 in percent; a dash for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def format_confidence(confidence: float | None) -> str:
    """Return a confidence in percent, never rounded up to certainty; a dash for None."""
    if confidence is None:
        return "-"
    return f"{min(100 * confidence, 99.9):.1f}%" if confidence < 1 else "100.0%"


def results(finished: Results, as_json: bool) -> None:
    """Print the results of a run: the accuracy matrices, the measures, and the folder of the run."""
    folder = str(finished.folder) if finished.folder else None
    curves = folder and finished.folder and (finished.folder / "tensorboard").is_dir()
    command = f"{_find_tensorboard()} --logdir {shlex.quote(folder)}" if folder and curves else None
    if as_json:
        document({"folder": folder, "tensorboard": command, **finished.data, "timings": finished.timings})
        return
    of_held_out = {f"{MODES.get(r, r)}, {HELD_OUT}": matrix for r, matrix in finished.validation.items()}
    tested = any(finished.data["test_images"])  # a run may be given none: `run.test`
    of_test = {MODES.get(r, r): matrix for r, matrix in finished.accuracy.items() if tested}
    for title, matrix in (of_test | of_held_out).items():
        line(f"Accuracy in percent, {title}:")
        columns = range(1, max(map(len, matrix), default=0) + 1)
        table(
            ["", *(f"on {j}" for j in columns)],
            [
                [f"after {i}", *map(format_percent, row)]
                for i, row in enumerate(matrix, start=1)
                if any(share is not None for share in row)  # a joint run learns at its end, all experiences at once
            ],
            numbers=True,
        )
        if not sys.stdout.isatty():
            line()
    measures = finished.measures
    names = list(dict.fromkeys(name for of in measures.values() for name, v in of.items() if v is not None))
    if tested:
        table(
            ["Measure, in percent", *(MODES.get(reading, reading) for reading in measures)],
            [[name.replace("_", " "), *(format_percent(of.get(name)) for of in measures.values())] for name in names],
            numbers=True,
        )
    for sentence in finished.notes():
        line(sentence)
    if folder:
        if not sys.stdout.isatty():
            line()
        line(f"Run folder: {folder}")
    if command:
        line(f"Curves: {command}")


def _find_tensorboard() -> str:
    """Return the command that starts TensorBoard; the one beside this Python if none is on the path."""
    if shutil.which("tensorboard"):
        return "tensorboard"
    beside = Path(sys.executable).with_name("tensorboard")
    return shlex.quote(str(beside)) if beside.exists() else f"{shlex.quote(sys.executable)} -m tensorboard.main"
