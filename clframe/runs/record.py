"""Descriptions of a run: its split at the beginning, its results and the description of its model at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from clframe import metrics
from clframe.context import Run
from clframe.data.decode import ImageFormat
from clframe.data.scenario import Scenario
from clframe.data.transform import Transform
from clframe.errors import UsageError
from clframe.model import class_mask, masked
from clframe.renamed import update_mode
from clframe.runs import checkpoint, state
from clframe.runs.results import RESULTS_FORMAT, Results, read_results
from clframe.system.memory import read_peak_memory
from clframe.system.reading import blame_file, expand_home

if TYPE_CHECKING:
    from clframe.engine import Engine

Index = Annotated[int, Field(ge=0)]
LARGEST_IMAGE = 2**28  # values


def collect_results(engine: Engine) -> Results:
    """Return the results of a run that has learned everything; write them, and the model, to its folder if any."""
    run, stream = engine.run, engine.stream
    run.experience = stream[len(stream) - 1].for_training()
    row = engine.evaluator.row or engine.evaluator.evaluate(engine.hook.predictor, keep_scores=True)
    if all(rows[-1] == [None] * len(stream) for rows in run.accuracy.values()):  # the run was not trained
        row = row.blank_copy()
    counts = [len(labels) for labels in row.labels]
    methods = [plugin for plugin in run.plugins if not plugin.observer]
    within = run.evaluations.measures() if run.evaluations is not None else {}
    data = {
        "format": RESULTS_FORMAT,
        "scenario": stream.name,
        "setting": stream.setting,
        "plugins": [plugin.name for plugin in methods],
        "forms": {plugin.name: plugin.form for plugin in methods if plugin.form},
        "seed": run.config.run.seed,
        **({"extends": stream.known[-2]} if len(stream.known) > 1 else {}),  # experiences learned in runs before
        "readings": {reading: _describe_mode(reading, run.logits) for reading in run.accuracy},
        "accuracy": run.accuracy,
        **({"validation": run.validation} if stream.val_share else {}),
        "measures": {
            reading: {
                name: asdict(measure)
                for name, measure in metrics.measures(
                    matrix, counts, _read_joint(run.config.run.joint, reading), engine.evaluator.baseline.get(reading)
                ).items()
            }
            | {name: asdict(measure) for name, measure in within.get(reading, {}).items()}
            for reading, matrix in run.accuracy.items()
        },
        **({"while_learning": run.evaluations.describe()} if run.evaluations is not None else {}),
        "baseline": engine.evaluator.baseline,
        "classes": [list(classes) for classes in stream.classes],
        "class_names": list(stream.class_names),
        "test_images": counts,
        "notes": list(stream.notes),
        "calibration": {
            reading: {
                name: asdict(m)
                for name, m in _measure_calibration(engine, reading, row.scores[reading], row.labels).items()
            }
            for reading in row.accuracy
            if row.kind == "logits"
        },
        "model": _measure_size(dict(run.model.state_dict())),
        "storage": {plugin.name: _measure_size(state.read_plugin_state(plugin, plugin.state)) for plugin in methods},
    }
    timings = {
        "experiences": [
            {**timing, "images_per_second": timing["images"] / timing["seconds"] if timing["seconds"] else None}
            for timing in engine.timings.rows
        ],
        "peak_memory_bytes": read_peak_memory(),
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None,
    }
    results = Results(data, timings, run.folder)
    if engine.folder:
        trained = {
            "model": dict(run.model.state_dict()),
            "plugins": {p.name: state.read_plugin_state(p, p.predictor_state) for p in methods if p.predictor_state},
        }
        temperature, fitted = fit_temperatures(engine)
        description = {
            "format": RESULTS_FORMAT,
            "scenario": _describe_scenario(stream, run),
            "scores": row.kind,
            "temperature": temperature,
            "fitted": fitted,
        }
        for lost in engine.folder.finish(results, trained, description):
            run.tell(lost)
    return results


def fit_temperatures(engine: Engine) -> tuple[dict[str, float], dict[str, Any]]:
    """Fit a temperature to the logits of each evaluation mode on the validation images; also return what it rests on.

    A run that extends another one holds out no images of the old classes. On the new classes alone, which it learned
    last, it is right and confident more often than on all classes. A temperature fitted to them may therefore only
    lower the confidence: it is not below that of the run before, or 1 if that had none.
    """
    stream, carried = engine.stream, engine.carried or {}
    nothing = {"images": 0, "classes": [], "floor": None}
    if not stream.val_share:
        return carried, dict.fromkeys(carried, nothing)
    row = engine.evaluator.evaluate(engine.hook.predictor, keep_scores=True, part="val")
    if row.kind != "logits":
        return {}, {}
    last = len(stream) - 1
    found: dict[str, float] = {}
    about: dict[str, Any] = {}
    for reading, given in row.scores.items():
        rows = [
            _mask_others(scores, engine.evaluator.readings.choices(reading, last, on))
            for on, scores in enumerate(given)
            if scores is not None
        ]
        if rows:
            labels = [row.labels[on] for on, scores in enumerate(given) if scores is not None]
            temperature = metrics.fit_temperature(torch.cat(rows), torch.cat(labels))
            present = sorted(set(torch.cat(labels).tolist()))
            floor = None
            if engine.carried is not None and not {c for group in stream.classes for c in group} <= set(present):
                floor = carried.get(reading, 1.0)
                temperature = max(temperature, floor)
            found[reading] = temperature
            about[reading] = {"images": len(torch.cat(labels)), "classes": present, "floor": floor}
    return found, about


def _mask_others(scores: Tensor, classes: Sequence[int]) -> Tensor:
    """Return `scores` [N, C] with -inf for all but `classes`."""
    return masked(scores, class_mask(classes, scores.shape[1]))


def _measure_calibration(
    engine: Engine, reading: Any, scores: Sequence[Tensor | None], labels: Sequence[Tensor]
) -> dict[str, metrics.Measure]:
    """Measure the calibration over all experiences together; each image has the choices of the evaluation mode."""
    last = len(labels) - 1
    rows = []
    for on, given in enumerate(scores):
        choices = engine.evaluator.readings.choices(reading, last, on)
        if given is None or len(choices) == 1:  # an answer that cannot be wrong says nothing about its confidence
            return {}
        rows.append(_mask_others(given, choices))
    found = metrics.calibration(torch.cat(rows), torch.cat(list(labels)))
    # a predictor may rule out the true class; its NLL is then infinite, which JSON cannot hold
    return {
        name: m if m.value is None or math.isfinite(m.value) else replace(m, value=None) for name, m in found.items()
    }


def _read_joint(folder: str | None, reading: str) -> list[float | None] | None:
    """Read the accuracy on each experience of the joint run in `folder`. Raises `DataError` if it is not finished."""
    return read_results(expand_home(folder)).accuracy.get(reading, [None])[-1] if folder else None


def _describe_mode(reading: str, logits: str) -> str:
    """Return a description of an evaluation mode, for results.json."""
    if reading == "class":
        return "class-incremental: no task is given, the answer is among all classes seen"
    if reading == "domain":
        return "domain-incremental: no task is given, all experiences share their classes"
    head = "multi-head" if logits in ("own", "current") else "masked single head"
    return f"task-incremental ({head}): the task is given, the answer is among its classes"


def _measure_size(kept: Mapping[str, Any]) -> dict[str, int]:
    """Count the bytes and the parameters of what a method keeps between experiences, or of the trained network."""
    tensors: dict[str, Tensor] = {}
    checkpoint.pack(kept, tensors)
    return {
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "parameters": sum(t.numel() for t in tensors.values() if t.is_floating_point()),
    }


def list_experiences(scenario: Scenario) -> dict[str, Any]:
    """Return the content of `split.json`: the classes of each experience, and the positions of validation images."""
    return {
        "class_order": list(scenario.class_order),
        "class_names": list(scenario.class_names),
        "data_sha256": scenario.checksum,
        "experiences": [
            {
                "index": e.index,
                "task": e.task,
                "classes": list(e.classes),
                "val": sorted(e.val.index.tolist()) if scenario.val_share else [],
            }
            for e in scenario
        ],
    }


def _describe_scenario(scenario: Scenario, run: Run) -> dict[str, Any]:
    """Return the description of the scenario in model.json, from which `restore_scenario` builds it."""
    return {
        "name": scenario.name,
        "setting": scenario.setting,
        "classes": [list(classes) for classes in scenario.classes],
        "class_names": list(scenario.class_names),
        "input_shape": list(scenario.input_shape),
        "transform": asdict(scenario.transform),
        "blocks": run.model.blocks,
        "known": list(scenario.known),
    }


def restore_scenario(described: Mapping[str, Any]) -> Scenario:
    """Return the scenario that `model.json` describes, without images. Raises `ValueError` if it describes none."""
    try:
        return _restore(described)
    except UsageError as error:  # the sentence is for user input; the caller names the file
        raise ValueError(str(error)) from error


def _restore(described: Mapping[str, Any]) -> Scenario:
    transform = dict(described["transform"])
    transform |= {name: tuple(transform[name]) for name in ("mean", "std")}
    transform["look"] = ImageFormat(**update_mode(transform["look"])) if transform.get("look") else None
    empty = Scenario(
        described["name"],
        described["setting"],
        described["classes"],
        described["class_names"],
        described["input_shape"],
        lambda index, part: _refuse_images(),
        transform=Transform(**transform),
    )
    empty.known = tuple(described.get("known", empty.known))
    return empty.described()


def check_description(path: Path, description: Mapping[str, Any]) -> Scenario:
    """Check the `description` in model.json of the run folder `path` and return its scenario. Raises `DataError`."""
    with blame_file(path / "model.json"):
        _Described.model_validate(description)
        return restore_scenario(description["scenario"])


class _Transform(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    mean: list[float | int]
    std: list[float | int]
    scale: float | int


class _Scenario(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    setting: Literal["class", "task", "domain"]
    classes: Annotated[list[Annotated[list[Index], Field(min_length=1)]], Field(min_length=1)]
    class_names: list[str]
    input_shape: list[Annotated[int, Field(gt=0, lt=2**20)]]
    transform: _Transform
    known: list[Index] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if max(map(max, self.classes)) >= len(self.class_names):
            raise ValueError("there are classes without a name")
        if self.known is not None and max(self.known, default=0) != len(self.classes):
            raise ValueError("what is known does not end with the last experience")
        if not 0 < math.prod(self.input_shape) < LARGEST_IMAGE:
            raise ValueError(f"images of the shape {self.input_shape} are too large")
        return self


class _Fitted(BaseModel):
    """What a temperature was fitted to."""

    model_config = ConfigDict(strict=True, extra="allow")

    images: Index
    classes: list[Index]
    floor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


class _Described(BaseModel):
    """The content of model.json, but for the state."""

    model_config = ConfigDict(strict=True, extra="allow")

    scenario: _Scenario
    scores: Literal["logits", "distances"] = "logits"
    temperature: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    fitted: dict[str, _Fitted] = {}

    @model_validator(mode="after")
    def _names_classes(self) -> Self:
        named = [c for fitted in self.fitted.values() for c in fitted.classes]
        if max(named, default=0) >= len(self.scenario.class_names):
            raise ValueError("the confidence was fitted to a class without a name")
        return self


def _refuse_images() -> Any:
    raise UsageError("A loaded model has no images: build its scenario again to read them.")
