"""Draw the picture of README out of the study that `make demo` leaves.

    make demo
    python docs/draw_demo.py runs/demo docs/images/demo.svg

The picture is a file of plain SVG: the same study gives the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from clframe.experiments.folder import read_study
from clframe.experiments.outcome import JOINT

WIDTH, HEIGHT = 760, 300  # of the picture, in pixels
PANEL = 212  # width of the axes of a panel, in pixels
TOP, BOTTOM = 54, 238  # where 100 % and 0 % are, from the upper edge
LEFT = (46, 424)  # where the axes of the two panels begin
APART = 16  # least distance of two labels, in pixels
NEUTRAL = "#555555"  # of joint training, which has no curve
COLORS = ("#d1495b", "#00798c", "#b8860b", "#6a4c93")

Curve = list[float]  # percent after each experience


def main(study: str, picture: str) -> None:
    """Write `picture`: the accuracy of a study's methods on experience 1, and on all experiences so far.

    Each line is the mean over the seeds. Joint training, which learns everything at once, is a dashed line.
    """
    outcome = read_study(Path(study))
    scenario = outcome.scenarios[0]
    mode = outcome.modes(scenario)[0]
    oldest: dict[str, Curve] = {}
    so_far: dict[str, Curve] = {}
    for method in outcome.methods:
        matrices = [
            cell.results.accuracy[mode] for cell in outcome.cells(scenario, method)
        ]
        first = (
            len(matrices[0]) - 1 if method == JOINT else 0
        )  # experience of its first figures
        steps = range(first, len(matrices[0]))
        oldest[method] = [
            100 * mean(matrix[i][0] or 0.0 for matrix in matrices) for i in steps
        ]
        so_far[method] = [
            100 * mean(a or 0.0 for matrix in matrices for a in matrix[i][: i + 1])
            for i in steps
        ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        *draw_panel(LEFT[0], "Accuracy on experience 1, in percent", oldest),
        *draw_panel(LEFT[1], "Average over the experiences so far", so_far),
        "</svg>",
    ]
    Path(picture).write_text("\n".join(parts) + "\n", encoding="utf-8")


def draw_panel(left: int, title: str, curves: dict[str, Curve]) -> Iterator[str]:
    """Yield the elements of one panel: axes, and a curve per method with its last value and its name at the end."""
    steps = max(map(len, curves.values())) - 1
    yield f'<text x="{left}" y="28" font-size="14" font-weight="600" fill="#222222">{title}</text>'
    for percent in (0, 25, 50, 75, 100):
        y = height_of(percent)
        yield f'<line x1="{left}" y1="{y}" x2="{left + PANEL}" y2="{y}" stroke="#e3e3e3"/>'
        yield f'<text x="{left - 8}" y="{y + 4}" text-anchor="end" fill="#666666">{percent}</text>'
    places = [left + PANEL * i // steps for i in range(steps + 1)]
    for i, x in enumerate(places):
        yield f'<text x="{x}" y="{BOTTOM + 20}" text-anchor="middle" fill="#666666">{i + 1}</text>'
    middle = left + PANEL // 2
    yield f'<text x="{middle}" y="{BOTTOM + 42}" text-anchor="middle" fill="#666666">experiences learned</text>'
    colors = iter(COLORS)
    labels = spread([height_of(curve[-1]) + 4 for curve in curves.values()])
    for (name, curve), y in zip(curves.items(), labels, strict=True):
        color = NEUTRAL if name == JOINT else next(colors)
        if name == JOINT:
            level = height_of(curve[-1])
            yield (
                f'<line x1="{left}" y1="{level}" x2="{left + PANEL}" y2="{level}" stroke="{color}" '
                'stroke-width="1.5" stroke-dasharray="5 4"/>'
            )
        else:
            points = [
                (x, height_of(value)) for x, value in zip(places, curve, strict=True)
            ]
            line = " ".join(f"{x},{y}" for x, y in points)
            yield f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2.5"/>'
            yield from (
                f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"/>' for x, y in points
            )
        label = f'<tspan font-weight="600">{curve[-1]:.1f}</tspan>'
        yield f'<text x="{left + PANEL + 9}" y="{y}" fill="{color}">{label} {name}</text>'


def height_of(percent: float) -> float:
    """Return where on the picture a percentage is, in pixels from the upper edge."""
    return round(BOTTOM - (BOTTOM - TOP) * percent / 100, 1)


def spread(heights: Sequence[float]) -> list[float]:
    """Return `heights`, in pixels, with `APART` between two neighbors: whichever is lower moves down."""
    placed: list[float] = list(heights)
    above = -float(APART)
    for index in sorted(range(len(placed)), key=lambda index: placed[index]):
        placed[index] = above = max(placed[index], above + APART)
    return placed


if __name__ == "__main__":
    main(*sys.argv[1:])
