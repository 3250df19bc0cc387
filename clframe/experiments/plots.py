"""Plots of a report as SVG: text and lines in the colors of the page around them, equal to the byte each time.

matplotlib draws each plot with placeholders for colors. What it writes is then reduced to what stands inside of an HTML
page: colors become classes (`s3` strokes and `f3` fills with color 3) or ``currentColor``, style attributes, which a
strict content policy forbids, become attributes of the elements, and names that no element refers to go.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from clframe.experiments.statistics import Estimate, Interval
from clframe.system.texts import cut, escape_unprintable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = 8  # of the palette, which the style of the page defines; further series differ by dashes and markers
INK = "#000001"  # placeholder of the color of the text
FAINT = "#000002"  # placeholder of the color of grid lines
MARKERS = "os^DvPX*"
# The same markers around (0, 0), for keys.
SHAPES = (
    "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1 -4 0Z",
    "M-3.5 -3.5H3.5V3.5H-3.5Z",
    "M0 -4L4 4H-4Z",
    "M0 -5L5 0L0 5L-5 0Z",
    "M0 4L4 -4H-4Z",
    "M-1.5 -4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    "M-2.2 -4.4L0 -2.2L2.2 -4.4L4.4 -2.2L2.2 0L4.4 2.2L2.2 4.4L0 2.2L-2.2 4.4L-4.4 2.2L-2.2 0L-4.4 -2.2Z",
    "M0 -5L1.2 -1.6H4.8L1.9 .6L2.9 4L0 1.9L-2.9 4L-1.9 .6L-4.8 -1.6H-1.2Z",
)
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
WIDTH = 4.0  # inches, of 72 pixels each
HEIGHT = 2.9
MARGIN = 4.0  # percent beyond 0 and 100 that an axis shows
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clframe",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: its metrics place all texts
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
}
STYLE = re.compile(r' style="([^"]*)"')
DIGITS = re.compile(r"(\.\d\d)\d+")  # hundredths of a pixel suffice
ID = re.compile(r' id="([^"]*)"')
COMMON = {"font-size: 9px", "stroke-linecap: square", "stroke-linejoin: miter"}  # the page has them
PRESENTATION = {"stroke-width", "stroke-dasharray", "stroke-dashoffset", "stroke-opacity", "fill-opacity", "opacity"}
PRESENTATION |= {"stroke-linecap", "stroke-linejoin", "font-size", "text-anchor", "font-weight"}


@dataclass(frozen=True)
class Line:
    """A line of a plot: `points` are (x, mean) in the order of x, `bands` their intervals, None where there is none."""

    label: str
    points: Sequence[tuple[float, float]]
    bands: Sequence[Interval | None] = ()


@dataclass(frozen=True)
class Bar:
    """An estimate with its interval in a row of a plot; `series` chooses the color, a `hollow` mark claims nothing."""

    label: str
    estimate: Estimate
    series: int
    hollow: bool = False


def draw_bars(bars: Sequence[Bar], xlabel: str, title: str, *, zero: bool = False) -> str:
    """Draw estimates with intervals, one in a row, the first on top, in percent; `zero` draws a line at 0."""
    shown = [bar for bar in bars if bar.estimate.value is not None]
    figure, axes = _begin(height=0.75 + 0.26 * max(2, len(shown)))
    for place, bar in enumerate(shown):
        value = 100 * (bar.estimate.value or 0.0)
        color = _color(bar.series)
        if bar.estimate.interval:
            low, high = (100 * end for end in bar.estimate.interval)
            axes.plot([low, high], [place, place], color=color, linewidth=1.6, solid_capstyle="butt")
        face = "none" if bar.hollow else color
        axes.plot(value, place, MARKERS[bar.series % 8], color=color, markerfacecolor=face, markersize=5)
    if zero:
        axes.axvline(0, color=INK, linewidth=0.8)
    else:
        axes.set_xlim(*_limit(axes.get_xlim(), [100 * (bar.estimate.value or 0.0) for bar in shown]))
    axes.set_yticks(range(len(shown)), [_short(bar.label) for bar in shown])
    axes.set_ylim(max(2, len(shown)) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel(xlabel)
    return _to_svg(figure, title)


def draw_lines(
    lines: Sequence[Line],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    percent: bool = True,
    whole: bool = True,
    marked: bool = True,
    ends: Sequence[float] = (),
) -> str:
    """Draw lines with bands over numbers such as those of experiences.

    Args:
        lines: the line at each place has the color, the marker and the dashes of that place.
        xlabel: label of the axis.
        ylabel: label of the axis.
        title: what the plot shows, for readers who do not see it.
        percent: multiply the values by 100.
        whole: x has whole numbers only; else y has a logarithmic axis, where all values are above 0.
        marked: draw a marker at each point of a line of whole numbers, unless there are many.
        ends: where to draw thin vertical lines.
    """
    figure, axes = _begin()
    scale = 100.0 if percent else 1.0
    for place, line in enumerate(lines):
        x = [x for x, _ in line.points]
        y = [scale * y for _, y in line.points]
        color = _color(place)
        pieces = [(x, band) for (x, _), band in zip(line.points, line.bands, strict=False) if band]
        if len(pieces) > 1:
            low, high = ([scale * band[end] for _, band in pieces] for end in (0, 1))
            axes.fill_between([x for x, _ in pieces], low, high, color=color, alpha=0.18, linewidth=0)
        marker = MARKERS[place % 8] if whole and marked and len(x) <= 25 else ""
        axes.plot(x, y, color=color, marker=marker, markersize=3.5, linestyle=_dashes(place), linewidth=1.4)
    for x_of_end in ends:
        axes.axvline(x_of_end, color=FAINT, linewidth=0.6, zorder=0)
    if whole:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    elif all(y > 0 for line in lines for _, y in line.points):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter("")
    values = [scale * y for line in lines for _, y in line.points]
    if percent and values:
        axes.set_ylim(*_limit(axes.get_ylim(), values))
    axes.grid(axis="y")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _to_svg(figure, title)


def draw_scatter(
    points: Mapping[str, tuple[float, float] | None],
    xlabel: str,
    ylabel: str,
    title: str,
    write: Callable[[float], str],
) -> str:
    """Draw a point (x, share) for each label, at the logarithm of x; points of x = 0 stand at the left.

    A label without a point keeps its color free; `write` returns the text of a tick.
    """
    figure, axes = _begin()
    positive = [point[0] for point in points.values() if point and point[0] > 0]
    low = math.log10(min(positive)) if positive else 0.0
    high = math.log10(max(positive)) if positive else 0.0
    if high - low < 1:  # a decade at least, so that small differences look small
        low, high = (low + high - 1) / 2, (low + high + 1) / 2
    zero = low - 0.2 * (high - low)  # where 0 stands
    steps = (1, 2, 5) if high - low < 1.6 else (1, 3) if high - low < 3 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = {math.log10(step) + decade: write(step * 10.0**decade) for decade in decades for step in steps}
    ticks = {x: text for x, text in ticks.items() if low - 0.05 <= x <= high + 0.05}
    for place, point in enumerate(points.values()):
        if point:
            x = math.log10(point[0]) if point[0] > 0 else zero
            axes.plot(x, 100 * point[1], MARKERS[place % 8], color=_color(place), markersize=6)
            if point[0] <= 0:
                ticks[zero] = "0"
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(min([low, *ticks]) - 0.08 * (high - low), high + 0.08 * (high - low))
    axes.grid()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _to_svg(figure, title)


def draw_reliability(bins: Sequence[tuple[float, float, float]], title: str) -> str:
    """Draw accuracy over confidence: a bar for each bin (mean confidence, accuracy, share of the images).

    The diagonal is where a confidence equals the share of right answers.
    """
    figure, axes = _begin(height=3.4)
    width = 100 / 15
    for confidence, accuracy, share in bins:
        left = math.floor(min(confidence, 0.999999) * 15) * width
        axes.bar(left, 100 * accuracy, width, align="edge", color=_color(0), alpha=0.35, edgecolor=_color(0))
        axes.plot(
            100 * confidence, 100 * accuracy, "o", color=_color(1), markersize=2 + 8 * math.sqrt(share), clip_on=False
        )
    axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    return _to_svg(figure, title)


def draw_ranks(ranks: Mapping[str, float], difference: float, title: str) -> str:
    """Draw a critical-difference diagram: average ranks, and bars over groups that the test does not tell apart."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    count = len(ordered)
    figure, axes = _begin(width=6.0, height=0.9 + 0.24 * ((count + 1) // 2 + 3))
    groups: list[tuple[float, float]] = []
    for place, (_, low) in enumerate(ordered):
        high = max(rank for _, rank in ordered[place:] if rank - low <= difference)
        if high > low and not (groups and groups[-1][1] >= high):
            groups.append((low, high))
    bottom = len(groups) * 0.35 + 0.4
    for level, (low, high) in enumerate(groups):
        y = -0.35 * (level + 1)
        axes.plot([low - 0.04, high + 0.04], [y, y], color=INK, linewidth=2.6, solid_capstyle="butt")
    half = (count + 1) // 2
    for place, (label, rank) in enumerate(ordered):
        left = place < half
        y = -(bottom + (place if left else count - 1 - place))
        end = 1 - 0.15 if left else count + 0.15
        axes.plot([rank, rank, end], [0, y, y], color=INK, linewidth=0.7)
        side = end - 0.06 if left else end + 0.06
        axes.text(side, y, f"{_short(label)} ({rank:.2f})", ha="right" if left else "left", va="center")
    axes.plot([1, 1 + difference], [0.9, 0.9], color=_color(1), linewidth=1.6)
    axes.text(1.06 + difference, 0.9, f"critical difference {difference:.2f}", va="center")
    axes.plot([1, count], [0, 0], color=INK, linewidth=0.8)
    for rank in range(1, count + 1):
        axes.plot([rank, rank], [0, 0.12], color=INK, linewidth=0.8)
        axes.text(rank, 0.2, str(rank), ha="center", va="bottom")
    axes.set_xlim(1 - 0.6 * count / 2, count + 0.6 * count / 2)
    axes.axis("off")
    return _to_svg(figure, title)


def draw_key(place: int, marked: bool = True) -> str:
    """Return a piece of the line of a series with its marker, to stand before its name."""
    dashes = _dashes(place)
    pattern = "" if dashes == "-" else f' stroke-dasharray="{" ".join(f"{2 * length:g}" for length in dashes[1])}"'
    color = place % COLORS
    line = f'<path d="M0 6H40" fill="none" stroke-width="2.5" class="s{color}"{pattern}/>'
    shape = f'<path d="{SHAPES[place % 8]}" transform="translate(20 6)" class="f{color}"/>' if marked else ""
    return f'<svg class="key" viewBox="0 0 40 12" aria-hidden="true">{line}{shape}</svg>'


# Between matplotlib and the page.


def _begin(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    with _settings():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
    axes.set_axisbelow(True)
    return figure, axes


@contextmanager
def _settings() -> Iterator[None]:
    """Use matplotlib's own defaults and `SETTINGS` inside, whatever the user has configured."""
    import matplotlib

    settings: dict[Any, Any] = dict(matplotlib.rcParamsDefault)
    settings.pop("backend")  # setting one would load it
    settings.update(SETTINGS)
    with matplotlib.rc_context(settings):
        yield


def _limit(ends: tuple[float, float], values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis of percent, cut to what percent can be and to `values`.

    Intervals of two or three runs may reach far beyond, and would leave little room for what lies between.
    """
    return max(ends[0], min(0.0, *values) - MARGIN), min(ends[1], max(100.0, *values) + MARGIN)


def _color(place: int) -> str:
    """Return the placeholder of a color of the palette."""
    return f"#0001{place % COLORS:02x}"


def _dashes(place: int) -> Any:
    return DASHES[(place // COLORS + place % 2) % len(DASHES)]


def _short(label: str) -> str:
    return cut(escape_unprintable(label), 26)


def _to_svg(figure: Figure, title: str) -> str:
    """Return the figure as an SVG element of an HTML page, which says `title` to readers who do not see it."""
    from html import escape

    stream = StringIO()
    with _settings():
        figure.savefig(
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = stream.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = STYLE.sub(lambda found: _to_attributes(found[1]), body)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r"#([\w-]+)[\")]", body))
    body = ID.sub(lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    body = re.sub(r"\s*\n\s*", "\n", body).replace("\n<", "<").replace("\n", " ")
    body = re.sub(r' (?:d|x|y|transform|width|height)="[^"]*"', lambda found: DIGITS.sub(r"\1", found[0]), body)
    body = re.sub(r' transform="rotate\(-0[^"]*"|<path d="[^"]*" fill="none"/>', "", body)
    for _ in range(3):
        body = re.sub(r"<g>((?:<(?!/?g\b)[^>]*>|[^<])*)</g>", r"\1", body)  # groups without attributes
    size = [72 * length for length in figure.get_size_inches()]
    view = " ".join(f"{length:g}" for length in (0, 0, *size))
    return f'<svg viewBox="{view}" width="{size[0]:g}" role="img" aria-label="{escape(title)}">{body}</svg>'


def _to_attributes(style: str) -> str:
    """Return a style as attributes and classes; what the page's style says for all texts is left out."""
    attributes, classes = "", []
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if declaration.strip() in COMMON:
            continue
        if name in ("fill", "stroke"):
            if value == INK:
                classes.append(f"{name[0]}i")
            elif value == FAINT:
                classes.append(f"{name[0]}g")
            elif value.startswith("#0001"):
                classes.append(f"{name[0]}{int(value[5:], 16)}")
            else:
                attributes += f' {name}="{value}"'
        elif name in PRESENTATION:
            attributes += f' {name}="{value}"'
    return attributes + (f' class="{" ".join(classes)}"' if classes else "")
