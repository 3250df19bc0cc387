"""Texts of a report: templates, each with the escapes of its format, and numbers as readers see them."""

from __future__ import annotations

import base64
import csv
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clframe.experiments import plots
from clframe.system.texts import escape_unprintable

if TYPE_CHECKING:
    from jinja2 import Environment

Format = Literal["html", "md", "csv", "latex", "json"]
FORMATS: tuple[Format, ...] = ("html", "md", "csv", "latex", "json")
LIMIT = 500_000  # bytes of an HTML report
SHADES = 20  # of a heat map, which the style defines
MODES = {"class": "class-incremental", "task": "task-incremental", "domain": "domain-incremental"}
MARKDOWN = re.compile(r"([\\`*_\[\]<>|#&])")
LATEX = {
    "\\": r"\textbackslash{}",
    **{character: "\\" + character for character in "{}$&#_%"},
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "{''}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "Σ": r"$\Sigma$",
    "√": r"$\surd$",
    "[": "{[}",  # an optional argument of the command before it, at the beginning of a row
}


def render(template: str, **values: Any) -> str:
    """Return the template of that name, filled with `values`; what is not marked as safe is escaped."""
    return _environment(Path(template).suffix).get_template(template).render(**values)


def render_page(template: str, **values: Any) -> str:
    """Return an HTML page that loads and runs nothing: its content policy allows its one style sheet, by its hash."""
    from markupsafe import Markup

    css = (Path(__file__).with_name("templates") / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode("utf-8")).digest()).decode("ascii")
    return render(template, css=Markup(css), css_hash=digest, **values)


def to_csv(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a CSV table. None becomes an empty cell; a text that spreadsheets would compute gets an apostrophe."""
    stream = StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(headers)
    for row in rows:
        writer.writerow([_to_cell(value) for value in row])
    return stream.getvalue()


def _to_cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    text = escape_unprintable(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _environment(suffix: str) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    escapes = {".html": None, ".md": escape_markdown, ".tex": escape_latex}
    escape = escapes[suffix]

    def finalize(value: Any) -> Any:
        if value is None:
            return ""
        if isinstance(value, Markup):
            return value
        text = escape_unprintable(value) if isinstance(value, str) else str(value)
        return escape(text) if escape else text

    brackets: dict[str, Any] = (
        {} if suffix != ".tex" else dict(zip(DELIMITERS, ("<%", "%>", "<<", ">>", "<#", "#>"), strict=True))
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=suffix == ".html",
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **brackets,
    )
    environment.filters |= {
        "percent": format_percent,
        "points": format_points,
        "estimate": format_estimate,
        "p": format_p,
        "size": format_size,
        "time": format_time,
        "words": format_words,
        "mode": lambda mode: MODES.get(mode, mode),
        "shade": find_shade,
        "label": lambda text: re.sub(r"[^\w.:-]+", "-", text).strip("-"),
    }
    environment.globals["draw_key"] = lambda place, marked=True: Markup(plots.draw_key(place, marked))
    return environment


DELIMITERS = (
    *("block_start_string", "block_end_string", "variable_start_string", "variable_end_string"),
    *("comment_start_string", "comment_end_string"),
)


def escape_markdown(text: str) -> str:
    """Return a text that Markdown shows as it is, within a table, too."""
    return MARKDOWN.sub(r"\\\1", text)


def escape_latex(text: str) -> str:
    """Return a text that LaTeX sets as it is."""
    negative = re.match(r"-(?=\d)", text)  # else a hyphen would stand for the sign
    return ("$-$" if negative else "") + "".join(LATEX.get(c, c) for c in text[bool(negative) :])


# Numbers.


def format_percent(share: float | None) -> str:
    """Return a share of 1 in percent, without the sign; a dash for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def format_points(share: float | None) -> str:
    """Return a difference of shares in percentage points, with its sign; a dash for None."""
    if share is None:
        return "-"
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def format_estimate(estimate: Mapping[str, float | None] | None, kind: str = "percent") -> str:
    """Return an estimate with half the width of its interval, such as ``93.1 ± 0.8``; `kind` names the unit."""
    if estimate is None or estimate["value"] is None:
        return "-"
    write = {"percent": format_percent, "points": format_points, "size": format_size, "time": format_time}[kind]
    text = write(estimate["value"])
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None or kind in ("size", "time"):
        return text
    return f"{text} ± {50 * (high - low):.1f}"


def format_p(p: float | None) -> str:
    """Return a probability with two digits; a dash for None."""
    if p is None:
        return "-"
    return "<0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def format_size(count: float | None) -> str:
    """Return a number of bytes in decimal units; a dash for None."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.3g} {unit}"


def format_time(seconds: float | None) -> str:
    """Return a duration; a dash for None."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def format_words(name: str) -> str:
    """Return the name of a measure as words."""
    return {"ece": "ECE", "nll": "NLL"}.get(name, name.replace("_", " "))


def find_shade(share: float | None) -> str:
    """Return the class of the style for a cell of a heat map; an empty text for None."""
    return "" if share is None else f"h{round(SHADES * min(1.0, max(0.0, share)))}"


def format_numbers(numbers: Iterable[int]) -> str:
    """Return whole numbers as ranges, such as ``0-4, 7``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs)


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def thin_out(length: int, most: int) -> list[int]:
    """Return at most `most` of the indices below `length`, evenly spaced, with the first and the last."""
    if length <= most:
        return list(range(length))
    return sorted({round(i * (length - 1) / (most - 1)) for i in range(most)})
