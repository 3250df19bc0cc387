"""The state of a run in progress as one tree: collected for a checkpoint, and restored by a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from clframe.data.batch import ImageData
from clframe.errors import DataError
from clframe.model import IncrementalNet, snapshot
from clframe.plugin import Plugin
from clframe.runs.checkpoint import collect_grown, unpack

if TYPE_CHECKING:
    from clframe.engine import Engine


Row = list[float | int | None]


class _Kinds(BaseModel):
    """The types of the plain entries of a checkpoint; a value of another type would end the run later."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True, protected_namespaces=())

    ticks: dict[str, int]
    total_steps: int
    model: dict[str, Tensor]
    trainable: list[str]
    frozen: list[str] = []  # before it was kept, plugins held a part each
    sampler: _Order | None
    extra_data: dict[str, ImageData]
    phases: dict[str, list[_Fields]]
    rng: dict[str, Tensor]
    torch_rng: Tensor
    cuda_rng: Tensor | None = None
    accuracy: dict[str, list[Row]]
    validation: dict[str, list[Row]] = {}  # not there without `train.val`, and before it was kept
    baseline: dict[str, Row]
    evaluations: _Evaluations | None = None  # there with `run.eval_every=epoch` or steps; not before it was kept
    timings: list[dict[str, float | int]]


class _Evaluations(BaseModel):
    model_config = _Kinds.model_config

    experience: Tensor
    total_step: Tensor
    end: Tensor
    accuracy: dict[str, Tensor]
    counts: list[int]
    whole: bool


class _Position(BaseModel):
    model_config = _Kinds.model_config

    experience: Annotated[int, Field(ge=0)]
    entered: bool
    done: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    phase: Annotated[int, Field(ge=0)]
    steps: Annotated[int, Field(ge=0)]
    effective: dict[str, bool] = {}  # not there before it was kept


class _Order(BaseModel):
    model_config = _Kinds.model_config

    step: int
    order: Tensor


class _Fields(BaseModel):
    model_config = _Kinds.model_config

    name: str
    place: Literal["before", "after"]
    epochs: int | None
    iterations: int | None
    lr: float | int | None
    only: tuple[str, ...]
    data: ImageData | None


def read_position(packed: Any) -> dict[str, Any]:
    """Return the fields of `Position` in a packed checkpoint. Raises `ValidationError` if their types are wrong."""
    return dict(_Position.model_validate(unpack(dict(packed["dict"])["position"], {})))


def restore(engine: Engine, packed: Any, tensors: Mapping[str, Tensor]) -> None:
    """Restore in a new engine the state that `Engine.state` returned; replays ``grow``, after ``before_run``.

    Raises `DataError` if the configuration of the run folder has changed.
    """
    entries = dict(packed["dict"])
    if engine.folder:
        engine.folder.check_config(entries["config"])
        engine.folder.cut_metrics(entries["metrics"])
    _restore(engine, packed, tensors, keep_optimizer=True)


def take_over(engine: Engine, packed: Any, tensors: Mapping[str, Tensor], *, keep_optimizer: bool) -> None:
    """Restore in a new engine the state in which the extended run ended, with its optimizer if `keep_optimizer`.

    What was not measured then stays empty: the accuracy on later experiences, and that of an untrained network.
    """
    _restore(engine, packed, tensors, keep_optimizer)
    n = len(engine.stream)
    engine.evaluator.baseline = {}
    engine.run._begin_evaluations()
    for rows in (*engine.run.accuracy.values(), *engine.run.validation.values()):
        rows[:] = [[*row, *[None] * (n - len(row))] for row in rows]


def _restore(engine: Engine, packed: Any, tensors: Mapping[str, Tensor], keep_optimizer: bool) -> None:
    run, position = engine.run, engine.position
    entries = dict(packed["dict"])

    for name, item in read_position(packed).items():
        setattr(position, name, item)
    if not 0 <= position.experience <= len(engine.stream):
        raise ValueError(f"the run is in experience {position.experience + 1} of {len(engine.stream)}")
    structures = regrow(engine, position.experience + position.entered, packed)
    values = {
        name: unpack(entries[name], tensors, device=run.device) for name in _Kinds.model_fields if name in entries
    }
    _Kinds.model_validate(values)
    saved = dict(entries["plugins"]["dict"])
    values.setdefault("frozen", frozen_by_plugins(saved))
    for name in ("optimizer", "kept_optimizer"):
        packed_optimizer = entries[name] if keep_optimizer else None
        values[name] = packed_optimizer and unpack(packed_optimizer["optimizer"], tensors, device=run.device)
    load_model(run.model, values["model"])
    for plugin in run.plugins:
        if plugin.name in saved:  # an observer may have been added
            load_plugin_state(plugin, saved[plugin.name], tensors, structures, run.device)
    engine.load(values)


def frozen_by_plugins(saved: Mapping[str, Any]) -> list[str]:
    """Return what plugins had frozen in a checkpoint from before the run held that."""
    states = [dict(packed["dict"]) for packed in saved.values()]
    return [name for state in states for name in unpack(state.get("frozen", []), {})]


def load_model(model: IncrementalNet, values: Mapping[str, Tensor]) -> None:
    """Load weights into the model. Raises `DataError` if they are those of another network."""
    try:
        model.load_state_dict(values)
    except RuntimeError as error:
        what = " ".join(str(error).partition("\n")[2].split())
        raise DataError(f"The saved weights do not fit this model; give the one of the run. ({what})") from error


def read_plugin_state(plugin: Plugin, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the attributes of `plugin` that are declared under `names`."""
    return {name: getattr(plugin, name) for name in names}


def regrow(engine: Engine, count: int, packed: Any) -> dict[int, IncrementalNet]:
    """Replay the growth of the first `count` experiences and return the structures that teachers in `packed` need."""
    structures = {}
    needed = collect_grown(packed)
    for index in range(count):
        engine.run._describe(engine.stream, index)
        engine.run.experience = experience = engine.stream[index].for_training()
        engine.grow_head(experience)
        engine.hook.grow(run=engine.run, experience=experience)
        if engine.run.model.grown in needed:
            structures[engine.run.model.grown] = snapshot(engine.run.model)
    return structures


def load_plugin_state(
    plugin: Plugin,
    packed: Any,
    tensors: Mapping[str, Tensor],
    structures: Mapping[int, IncrementalNet],
    device: torch.device,
) -> None:
    """Set the attributes that `read_plugin_state` returned; `structures` are the networks to rebuild teachers in."""
    for saved, data in packed["dict"]:
        name = plugin.former_state.get(saved, saved)
        before = getattr(plugin, name, None)
        try:
            after = unpack(data, tensors, before, structures, device)
        except AttributeError as error:
            raise DataError(
                f"State `{name}` of plugin `{plugin.name}` is a module or an optimizer that does not exist yet; "
                "a plugin builds those in `before_run` or `grow`."
            ) from error
        setattr(plugin, name, after)
