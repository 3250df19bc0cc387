"""The report of one run: its matrices, curves, losses, errors and environment, in the formats of a study's report.

Like `report`, this module imports neither torch nor matplotlib before a report needs them.
"""

from __future__ import annotations

import base64
import itertools
import math
import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.errors import ClframeError, DataError
from clframe.experiments import plots, rendering
from clframe.experiments.document import describe_protocol, list_environments, list_measures
from clframe.experiments.evaluations import describe_interval, read_evaluations, read_metrics
from clframe.experiments.outcome import FinishedCell, read_runs
from clframe.experiments.rendering import MODES, Format, count, thin_out
from clframe.experiments.report import WIDEST, check_format, thin_matrix
from clframe.runs.files import ENVIRONMENT
from clframe.system.reading import blame_file, read_json
from clframe.system.texts import cut

if TYPE_CHECKING:
    from torch import Tensor

LINES = 8  # experiences with a curve of their own
POINTS = 200  # of a curve; more losses are averaged, more accuracies are thinned out
MOST_CLASSES = 20  # of a confusion matrix that is drawn
CONFUSIONS = 10  # pairs of classes that are listed
ERRORS = 12  # images that are shown
THUMBNAIL = 64  # pixels along the longer side at most
BINS = 15  # of confidence, as of the expected calibration error
PARTS = ("images", "confusion matrix", "plots")
DEFINITIONS = {
    "reliability": (
        f"accuracy and mean confidence of the test images in each of {BINS} equal bins of confidence, after the last "
        "experience",
        "Guo et al. 2017",
    ),
    "time": ("seconds of learning, summed over experiences; evaluation is not counted", "this project"),
    "peak memory": (
        "most memory of torch on the device, or most resident memory of the process on a CPU",
        "this project",
    ),
}


def report_run(folder: Path, format: Format = "html", *, costs: bool = True, images: bool = True) -> str:
    """Return the report of the finished run in `folder` as a text.

    Args:
        folder: folder of the run.
        format: of the text. `json` has every figure, `csv` measures and accuracy matrices, a line for each figure.
        costs: include times, memory, host and date, which differ between repetitions of one run.
        images: show test images in HTML, for which the scenario of the run is built again.

    Raises:
        UsageError: there is no such format.
        DataError: the run is not finished, or a file of it is damaged.
    """
    check_format(format)
    cell = read_runs([folder]).finished[0]
    document = describe_run(cell, costs=costs)
    if format == "json":
        from clframe.system.writing import to_json

        return to_json(document)
    if format == "csv":
        return _to_csv(document)
    if format == "md":
        return rendering.render("run.md", **document, thin=thin_matrix, widest=WIDEST)
    if format == "latex":
        return rendering.render("run.tex", **document, thin=thin_matrix, widest=WIDEST)
    return _to_html(cell, document, images)


def describe_run(cell: FinishedCell, *, costs: bool) -> dict[str, Any]:
    """Return every figure of a run as one document; `left_out` has a sentence for each part that cannot be made."""
    data = cell.results.data
    left_out: list[str] = []
    modes = sorted(cell.results.accuracy, key=lambda mode: mode != data.get("setting"))
    answers: dict[str, Any] = {}
    for mode in modes:
        try:
            answers[mode] = _describe_answers(cell, mode)
        except DataError as error:
            left_out.append(f"Confusions and confidence, {MODES.get(mode, mode)}: {error}")
    losses: dict[str, list[tuple[float, float]]] = {}
    try:
        losses = _read_losses(cell.folder)
    except DataError as error:
        left_out.append(f"Losses: {error}")
    evaluations = None
    try:
        evaluations = _describe_evaluations(cell, modes[0]) if modes else None
    except DataError as error:
        left_out.append(f"Accuracy while learning: {error}")
    seconds, memory = (cell.measure(name, "") for name in ("seconds", "peak_memory"))
    environment = read_json(cell.folder / ENVIRONMENT) if (cell.folder / ENVIRONMENT).is_file() else {}
    command = environment.get("command") if isinstance(environment, dict) else None
    return {
        "kind": "run",
        "title": f"{cell.method} on {cell.scenario}, seed {cell.seed}",
        "method": cell.method,
        "scenario": cell.scenario,
        "seed": cell.seed,
        "folder": str(cell.folder),
        "command": cell.command,
        "began_with": shlex.join(map(str, command)) if costs and isinstance(command, list) else None,
        "protocol": describe_protocol([cell]),
        "modes": {mode: str(data.get("readings", {}).get(mode, MODES.get(mode, mode))) for mode in modes},
        "classes": [[str(data["class_names"][c]) for c in group] for group in data["classes"]],
        "test_images": data["test_images"],
        "accuracy": {mode: cell.results.accuracy[mode] for mode in modes},
        "validation": cell.results.validation,
        "values": _list_values(cell, modes),
        "bytes_kept": cell.measure("bytes_kept", ""),
        "network_bytes": data.get("model", {}).get("bytes"),
        **({"seconds": seconds, "peak_memory": memory, "date": date.today().isoformat()} if costs else {}),
        "costs": costs,
        "answers": answers,
        "losses": losses,
        **({"while_learning": evaluations} if evaluations else {}),
        "settings": _list_changed(cell),
        "notes": cell.results.notes(),
        "left_out": left_out,
        "measures": list_measures([data], DEFINITIONS, costs),
        "environments": list_environments([cell.folder], costs),
    }


def _list_values(cell: FinishedCell, modes: Sequence[str]) -> list[dict[str, Any]]:
    """Return name and value of each measure in each evaluation mode; those that no mode has are left out."""
    parts = (cell.results.data["measures"], cell.results.data.get("calibration", {}))
    names = dict.fromkeys(name for part in parts for measures in part.values() for name in measures)
    rows = [{"name": name, "values": [cell.measure(name, mode) for mode in modes]} for name in names]
    return [row for row in rows if any(value is not None for value in row["values"])]


def _list_changed(cell: FinishedCell) -> dict[str, str]:
    """Return the settings of the run that differ from the defaults, as texts."""
    from clframe.config import list_defaults, list_settings

    settings, defaults = list_settings(cell.config), list_defaults(cell.config)
    skip = ("plugins", "scenario.name", "run.data_root")
    changed = {name: value for name, value in settings.items() if name not in skip}
    return {name: cut(str(v)) for name, v in changed.items() if name not in defaults or defaults[name] != v}


def _describe_answers(cell: FinishedCell, mode: str) -> dict[str, Any]:
    """Return what the network answered to the test images in the end: confusions, and bins of confidence."""
    import torch

    from clframe.metrics import confusion_matrix

    names = [str(name) for name in cell.results.data["class_names"]]
    scores = cell.results.final_scores(mode)
    with blame_file(cell.folder / "predictions.safetensors"):
        answers = torch.cat([given.argmax(1) for given, _ in scores])
        labels = torch.cat([labels for _, labels in scores])
        matrix = confusion_matrix(answers, labels, len(names)).tolist()
        wrong = [
            (row[c], names[label], names[c], row[c] / sum(row))
            for label, row in enumerate(matrix)
            for c in range(len(names))
            if c != label and row[c]
        ]
        bins = []
        if mode in cell.results.data.get("calibration", {}) and cell.results.data["calibration"][mode]:
            confidence, right = _find_confidence(scores)
            place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
            for number in range(BINS):
                of = place == number
                if of.any():
                    share = float(of.double().mean())
                    bins.append((float(confidence[of].mean()), float(right[of].mean()), share))
    return {
        "confusion": matrix,
        "confusions": [
            {"label": label, "answer": answer, "images": images, "share": share}
            for images, label, answer, share in sorted(wrong, key=lambda one: (-one[0], -one[3]))[:CONFUSIONS]
        ],
        "reliability": bins,
    }


def _find_confidence(scores: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return confidence and correctness [N] (1 or 0) of the answers to all test images, both float64."""
    import torch

    found = [given.double().softmax(1).max(1) for given, _ in scores]
    labels = torch.cat([labels for _, labels in scores])
    return torch.cat([one.values for one in found]), (torch.cat([one.indices for one in found]) == labels).double()


def _read_losses(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the points (step, loss) of each loss by name, averaged over stretches of steps where there are many."""
    found: dict[str, list[tuple[float, float]]] = {}
    with read_metrics(folder, "step") as records:
        for record in records:
            for name, value in record["losses"].items():
                if math.isfinite(value):
                    found.setdefault(str(name), []).append((float(record["total_step"]), float(value)))
    return {name: _average_points(points) for name, points in found.items()}


def _describe_evaluations(cell: FinishedCell, mode: str) -> dict[str, Any] | None:
    """Return the accuracy on each experience at each evaluation while learning; None if there was none.

    Raises `DataError` as `read_evaluations`.
    """
    found = read_evaluations(cell, mode)
    if found is None:
        return None
    shown = thin_out(len(found.steps), POINTS)
    return {
        "interval": describe_interval(cell.results.data["while_learning"]),
        "mode": mode,
        "evaluations": len(found.steps),
        "ends": found.ends,
        "points": [{"step": found.steps[n], "accuracy": list(found.curve.rows[n])} for n in shown],
    }


def _average_points(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= POINTS:
        return points
    ends = [round(i * len(points) / POINTS) for i in range(POINTS + 1)]
    stretches = [points[begin:end] for begin, end in itertools.pairwise(ends)]
    return [(sum(x for x, _ in of) / len(of), math.fsum(y for _, y in of) / len(of)) for of in stretches]


# Formats.


def _to_csv(document: dict[str, Any]) -> str:
    """Return a line for each measure and for each entry of an accuracy matrix; experiences count from 1."""
    modes = list(document["modes"])
    rows: list[list[Any]] = [
        [mode, row["name"], None, None, value]
        for row in document["values"]
        for mode, value in zip(modes, row["values"], strict=True)
        if value is not None
    ]
    for part in ("accuracy", "validation"):
        for mode, matrix in document[part].items():
            name = "accuracy" if part == "accuracy" else "validation_accuracy"
            entries = ((i, j, value) for i, row in enumerate(matrix, 1) for j, value in enumerate(row, 1))
            rows += [[mode, name, i, j, value] for i, j, value in entries if value is not None]
    for name in ("bytes_kept", "network_bytes", "seconds", "peak_memory"):
        rows.append([None, name, None, None, document[name]]) if document.get(name) is not None else None
    headers = ["mode", "measure", "after", "on", "value"]
    if within := document.get("while_learning"):
        headers.append("step")
        rows = [[*row, None] for row in rows]
        for point in within["points"]:
            known = ((on, share) for on, share in enumerate(point["accuracy"], 1) if share is not None)
            rows += [[within["mode"], "accuracy_while_learning", None, on, share, point["step"]] for on, share in known]
    return rendering.to_csv(headers, rows)


def _to_html(cell: FinishedCell, document: dict[str, Any], images: bool) -> str:
    """Return the page; parts that would make it too large are left out, and the page says so."""
    errors, sentence = _find_errors(cell) if images else ([], "Test images are not shown.")
    figures = _draw(document)
    page = ""
    for number in range(len(PARTS) + 1):
        parts = PARTS[:number]
        page = rendering.render_page(
            "run.html",
            **document,
            figures=[] if "plots" in parts else figures,
            errors=[] if "images" in parts else errors,
            errors_sentence=sentence,
            draw_confusion="confusion matrix" not in parts,
            confusions=_shade_confusions(document),
            parts_left_out=parts,
            thin=thin_matrix,
            widest=WIDEST,
        )
        if len(page.encode("utf-8")) < rendering.LIMIT:
            break
    return page


def _shade_confusions(document: dict[str, Any]) -> dict[str, Any]:
    """Return the confusion matrix of each evaluation mode as a heat map of shares; of many classes there is none."""
    names = [cut(name, 12) for group in document["classes"] for name in group]
    found = {}
    for mode, answers in document["answers"].items():
        rows = [(i, row) for i, row in enumerate(answers["confusion"]) if sum(row)]
        if len(answers["confusion"]) <= MOST_CLASSES:
            labels = dict(enumerate(names)) if len(set(names)) == len(answers["confusion"]) else {}
            shares = [(labels.get(i, i), [entry / sum(row) for entry in row]) for i, row in rows]
            found[mode] = {"columns": [labels.get(i, i) for i in range(len(answers["confusion"]))], "rows": shares}
    return found


def _draw(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the plots of a run, each with a caption and the names of its lines."""
    from markupsafe import Markup

    drawn = []
    mode = next(iter(document["modes"]))
    matrix = document["accuracy"][mode]
    shown = thin_out(max(map(len, matrix), default=0), LINES)
    curves = []
    for on in shown:
        entries = ((after, row[on] if len(row) > on else None) for after, row in enumerate(matrix, start=1))
        points = [(float(after), float(entry)) for after, entry in entries if entry is not None]
        curves.append(plots.Line(f"on {on + 1}", points))
    if any(curve.points for curve in curves):
        svg = plots.draw_lines(curves, "experiences learned", "accuracy, %", "accuracy on each experience")
        caption = f"Accuracy on the test images of each experience, {MODES.get(mode, mode)}."
        drawn.append(
            {"svg": Markup(svg), "caption": caption, "keys": [curve.label for curve in curves], "marked": True}
        )
    if within := document.get("while_learning"):
        drawn.append(_draw_evaluations(within, shown))
    if document["losses"]:
        lines = [plots.Line(name, points) for name, points in document["losses"].items()]
        svg = plots.draw_lines(lines, "step", "loss", "losses while learning", percent=False, whole=False)
        drawn.append(
            {
                "svg": Markup(svg),
                "caption": "Losses of training.",
                "keys": [line.label for line in lines],
                "marked": False,
            }
        )
    for mode, answers in document["answers"].items():
        if answers["reliability"]:
            svg = plots.draw_reliability(answers["reliability"], f"reliability, {MODES.get(mode, mode)}")
            caption = (
                f"Reliability, {MODES.get(mode, mode)}: accuracy in bins of confidence. Points stand at the mean "
                "confidence of a bin, as large as its share of the images; the dashed line is exact calibration."
            )
            drawn.append({"svg": Markup(svg), "caption": caption, "keys": [], "marked": True})
    return drawn


def _draw_evaluations(within: dict[str, Any], shown: Sequence[int]) -> dict[str, Any]:
    """Return the plot of the accuracy on each experience of `shown` at all evaluations while learning."""
    from markupsafe import Markup

    lines = []
    for on in shown:
        entries = (
            (one["step"], one["accuracy"][on] if len(one["accuracy"]) > on else None) for one in within["points"]
        )
        points = [(float(step), float(accuracy)) for step, accuracy in entries if accuracy is not None]
        lines.append(plots.Line(f"on {on + 1}", points))
    svg = plots.draw_lines(lines, "steps", "accuracy, %", "accuracy while learning", marked=False, ends=within["ends"])
    caption = (
        f"Accuracy on each experience while learning, {MODES.get(within['mode'], within['mode'])}, evaluated "
        f"{within['interval']}. Vertical lines: ends of experiences."
    )
    return {"svg": Markup(svg), "caption": caption, "keys": [line.label for line in lines], "marked": False}


def _find_errors(cell: FinishedCell) -> tuple[list[dict[str, str]], str]:
    """Return the most confident errors with their images, and a sentence: what they are, or why there are none."""
    import torch

    from clframe.launch import check_named
    from clframe.registry import build_scenario

    data = cell.results.data
    mode = next((mode for mode, measures in data.get("calibration", {}).items() if measures), None)
    if mode is None:
        return [], "Errors are not shown, as the answers of this run have no confidence."
    try:
        scores = cell.results.final_scores(mode)
        if data.get("extends"):
            raise DataError("This run extends another one, and only the images of its last experiences are there.")
        scenario = build_scenario(check_named(cell.config.scenario, "scenario"), cell.config.run)
        environment = read_json(cell.folder / ENVIRONMENT)
        if scenario.checksum != environment.get("data_sha256"):
            raise DataError(f"The data of {cell.scenario} on this machine are not those of the run.")
        if len(scenario.input_shape) != 3:
            raise DataError(f"The data of {cell.scenario} are not images.")
        found = []
        for on, (given, labels) in enumerate(scores):
            confidence, answers = given.double().softmax(1).max(1)
            wrong = (answers != labels).nonzero().flatten()
            top = wrong[confidence[wrong].argsort(descending=True, stable=True)][:ERRORS]
            of = zip(confidence[top].tolist(), top.tolist(), answers[top].tolist(), labels[top].tolist(), strict=True)
            found += [(c, on, *rest) for c, *rest in of]
        found = sorted(found, key=lambda one: -one[0])[:ERRORS]
        shown = []
        tests: dict[int, Any] = {}
        for confidence_of, on, place, answer, label in found:
            test = tests.setdefault(on, scenario[on].test)
            if int(test.y[place]) != label:
                raise DataError(f"The test images of {cell.scenario} on this machine are not those of the run.")
            image = test.rows(torch.tensor([place])).x[0].float() / scenario.transform.scale
            shown.append(
                {
                    "image": _draw_thumbnail(image),
                    "label": cut(str(data["class_names"][label]), 30),
                    "answer": cut(str(data["class_names"][answer]), 30),
                    "confidence": f"{100 * min(confidence_of, 0.999):.1f}",
                    "experience": str(on + 1),
                }
            )
    except (ClframeError, IndexError) as error:
        return [], f"Errors are not shown as images: {error}"
    if not shown:
        return [], "Every answer is right."
    return shown, f"The {count(len(shown), 'most confident error')} in the end, {MODES.get(mode, mode)}."


def _draw_thumbnail(image: Tensor) -> str:
    """Return an image [C, h, w] from 0 to 1 as the address of a small PNG within a page."""
    from io import BytesIO

    import torch
    from PIL import Image

    channels = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    pixels = (channels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
