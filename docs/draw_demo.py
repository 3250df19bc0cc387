"""Draw the picture of README out of the two runs that `make demo` leaves.

    make demo
    python docs/draw_demo.py runs/demo/finetuning runs/demo/ewc docs/images/demo.svg

The picture is a file of plain SVG: the same runs give the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

from clframe import Results

WIDTH, HEIGHT = 760, 300  # of the picture, in pixels
PANEL = 212  # width of the axes of a panel, in pixels
TOP, BOTTOM = 54, 238  # where 100 % and 0 % are, from the upper edge
LEFT = (46, 424)  # where the axes of the two panels begin
COLORS = (
    "#d1495b",
    "#00798c",
)  # of the first and the second run: told apart by lightness, too


def main(first: str, second: str, picture: str) -> None:
    """Write `picture`, which shows the accuracy of two finished runs on experience 1 and on all experiences so far."""
    runs = [Results.read(Path(folder)) for folder in (first, second)]
    mode = next(iter(runs[0].accuracy))
    matrices = [run.accuracy[mode] for run in runs]
    names = [
        "fine-tuning"
        if not run.data["plugins"]
        else "+".join(run.data["plugins"]).upper()
        for run in runs
    ]
    oldest = [[100 * (row[0] or 0.0) for row in matrix] for matrix in matrices]
    so_far = [
        [
            100 * mean(value or 0.0 for value in row[: i + 1])
            for i, row in enumerate(matrix)
        ]
        for matrix in matrices
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        *panel(LEFT[0], "Accuracy on experience 1, in percent", names, oldest),
        *panel(LEFT[1], "Average over the experiences so far", names, so_far),
        "</svg>",
    ]
    Path(picture).write_text("\n".join(parts) + "\n", encoding="utf-8")


def panel(
    left: int, title: str, names: list[str], curves: list[list[float]]
) -> list[str]:
    """Return the elements of one panel: axes, and a curve per run with its name and its last value at the end."""
    steps = len(curves[0]) - 1
    parts = [
        f'<text x="{left}" y="28" font-size="14" font-weight="600" fill="#222222">{title}</text>'
    ]
    for percent in (0, 25, 50, 75, 100):
        y = height_of(percent)
        parts.append(
            f'<line x1="{left}" y1="{y}" x2="{left + PANEL}" y2="{y}" stroke="#e3e3e3"/>'
        )
        parts.append(
            f'<text x="{left - 8}" y="{y + 4}" text-anchor="end" fill="#666666">{percent}</text>'
        )
    for i in range(steps + 1):
        x = left + PANEL * i // steps
        parts.append(
            f'<text x="{x}" y="{BOTTOM + 20}" text-anchor="middle" fill="#666666">{i + 1}</text>'
        )
    middle = left + PANEL // 2
    parts.append(
        f'<text x="{middle}" y="{BOTTOM + 42}" text-anchor="middle" fill="#666666">experiences learned</text>'
    )
    for name, color, curve in zip(names, COLORS, curves, strict=True):
        points = [
            (left + PANEL * i // steps, height_of(value))
            for i, value in enumerate(curve)
        ]
        line = " ".join(f"{x},{y}" for x, y in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2.5"/>'
        )
        parts += [
            f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"/>' for x, y in points
        ]
        x, y = points[-1]
        label = f'<tspan font-weight="600">{curve[-1]:.1f}</tspan>'
        parts.append(
            f'<text x="{x + 9}" y="{y + 4}" fill="{color}">{label} {name}</text>'
        )
    return parts


def height_of(percent: float) -> float:
    """Return where on the picture a percentage is, in pixels from the upper edge."""
    return round(BOTTOM - (BOTTOM - TOP) * percent / 100, 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
