"""A trained model as a file for other programs: safetensors, torch.export, ONNX; its scores are checked first."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clframe.data.transform import Transform, affine
from clframe.errors import ClframeError, RunError, UsageError, did_you_mean, of_the_system
from clframe.evaluate import ModelPredictor
from clframe.model import IncrementalNet, masked
from clframe.runs import checkpoint
from clframe.system.writing import create, write_beside

if TYPE_CHECKING:
    from clframe.deploy.trained import Trained

Format = Literal["safetensors", "torch-export", "onnx"]
FORMATS: tuple[str, ...] = get_args(Format)
ONNX = ("onnx", "onnxscript")  # packages that torch.onnx needs
TOLERANCE = 1e-4  # largest difference of scores, relative to the largest score: other kernels round differently
BATCHES = (2, 5)  # numbers of images: the first batch is traced, both are compared


@dataclass(frozen=True)
class Exported:
    """A file that holds an exported model, and how the file was checked.

    Attributes:
        path: path of the file.
        format: format of the file.
        inputs: description of each input of the model, by name.
        difference: largest difference of the file's scores from those of the run's model; None: the file was not run.
        checked_with: package that ran the file; None: no package that can run it is installed.
    """

    path: Path
    format: str
    inputs: dict[str, str]
    difference: float | None
    checked_with: str | None


class Deployed(nn.Module):
    """A module from raw images to scores: normalization, network, and the choice of the task's classes.

    Args:
        trained: the model of a finished run.
        task: task of all images; None: `forward` is given the tasks if ``takes_task``, else none.
    """

    def __init__(self, trained: Trained, task: int | None) -> None:
        super().__init__()
        # a copy, as tracing changes the module
        self.predictor = copy.deepcopy(trained.predictor).eval().requires_grad_(False)
        self.fixed = task
        self.takes_task = task is None and trained.needs_task
        transform, dims = trained.scenario.transform, len(trained.scenario.input_shape) - 1
        factor, shift = find_constants(transform, dims)
        self.factor: Tensor
        self.shift: Tensor
        self.allowed: Tensor
        self.register_buffer("factor", factor)
        self.register_buffer("shift", shift)
        self.register_buffer("allowed", trained.allowed.clone())
        self.divides = not transform.mean
        self.passes_task = bool(getattr(self.predictor, "uses_task", True))
        if task is not None:
            for net in self.modules():
                if isinstance(net, IncrementalNet) and net.selected is not None:
                    net.select(task)

    def forward(self, images: Tensor, task: Tensor | None = None) -> Tensor:
        """Compute scores [B, C] of raw `images` [B, ...], within the tasks [B] int64 if it takes them."""
        x = images.to(torch.float32)
        x = x / self.factor if self.divides else x * self.factor + self.shift
        if self.fixed is not None:
            task = torch.full(
                images.shape[:1], self.fixed, device=images.device
            )  # `len` would become a constant of the graph
        scores: Tensor = self.predictor(x, task if self.passes_task else None)
        return scores if task is None else masked(scores, self.allowed[:, : scores.shape[1]][task])


def find_constants(transform: Transform, dims: int) -> tuple[Tensor, Tensor]:
    """Return the divisor of raw values, and zero; or, if there is a mean, the factor and the shift of raw values."""
    if not transform.mean:
        return torch.tensor(transform.scale, dtype=torch.float32), torch.zeros(())
    factor, shift = affine(transform, dims, torch.device("cpu"))
    return factor.clone(), shift.clone()


def export(trained: Trained, path: Path, kind: str, task: int | None) -> Exported:
    """Write `trained` to the file `path`, and check the scores of the model read from it; see `Trained.export`."""
    if kind not in FORMATS:
        raise UsageError(f"There is no format `{kind}`." + did_you_mean(kind, FORMATS))
    if path.exists():
        raise UsageError(f"{path} exists already: name another file.")
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder {path.parent} to write {path.name} into; make it, or name another.")
    module = build_module(trained, task, kind)
    inputs = [draw_example(trained, module, n) for n in BATCHES]
    write = {"safetensors": _safetensors, "torch-export": _torch_export, "onnx": _onnx}[kind]
    try:
        with write_beside(path) as beside, torch.no_grad(), _silence_exporters():
            loaded, checked_with = write(trained, module, inputs, beside)
            differences = []
            for given in inputs:
                expected = trained(*given) if task is None else trained(*given, task)
                differences += [_compare(expected, loaded(*given))] if loaded else []
            difference = max(differences, default=None)
            if difference is not None and difference > TOLERANCE:
                raise RunError(
                    f"The exported model does not answer as the run's does: its scores differ by {difference:.2g} of "
                    "the largest; nothing was written, so choose another format."
                )
    except Exception as error:
        if isinstance(error, ClframeError) or not (refused := of_the_system(error)):
            raise
        raise RunError(f"{path} could not be written: {refused}; make room, or name another file.") from error
    described = {"images": f"{str(inputs[0][0].dtype).removeprefix('torch.')} [B, {_shape(trained)}]"}
    if module.takes_task:
        described["task"] = "int64 [B], from 0"
    return Exported(path, kind, described, difference, checked_with)


def build_module(trained: Trained, task: int | None, kind: str) -> Deployed:
    """Build the module to export. Raises `UsageError` if its computation depends on data in a way that no graph can."""
    if task is not None:
        trained.reading(task)
    by_task = any(isinstance(m, IncrementalNet) and m.selected is not None for m in trained.modules())
    if by_task and task is None and kind != "safetensors":
        raise UsageError(
            f"This network computes something else for each task, and a file of format `{kind}` holds one computation: "
            "fix a task (`--task`)."
        )
    module = Deployed(trained, task)
    if by_task and task is not None:  # the path of the task is selected, so that none is inferred
        net = next(m for m in module.modules() if isinstance(m, IncrementalNet) and m.selected is not None)
        module.predictor = ModelPredictor(net).eval()
        module.passes_task = False
        for part in list(net.modules()):
            _apply_mask(part)
    return module


def _apply_mask(part: nn.Module) -> None:
    """Replace weights under a mask by the masked weights.

    torch's `remove_parametrizations` does not serve here: it changes the class, which a copy shares with its original.
    """
    if not parametrize.is_parametrized(part):
        return
    weights = {name: getattr(part, name).detach().clone() for name in part.parametrizations}  # type: ignore[union-attr]
    part.__class__ = parametrize.type_before_parametrizations(part)
    del part.parametrizations
    for name, value in weights.items():
        part.register_parameter(name, nn.Parameter(value, requires_grad=False))


def draw_example(trained: Trained, module: Deployed, n: int) -> tuple[Tensor, ...]:
    """Draw `n` random raw images, and tasks if the module takes them."""
    generator = torch.Generator().manual_seed(n)
    scale, shape = trained.scenario.transform.scale, (n, *trained.scenario.input_shape)
    if scale > 1:
        images = torch.randint(int(min(scale, 255)) + 1, shape, generator=generator, dtype=torch.uint8)
    else:
        images = torch.rand(shape, generator=generator)
    return (images, torch.arange(n) % len(trained.scenario)) if module.takes_task else (images,)


Written = tuple[Callable[..., Tensor] | None, str | None]


def describe_model(trained: Trained) -> dict[str, str]:
    """Return what a user of the file needs besides, as texts of JSON by name: the same in every format.

    ``look`` is how image files become raw images (`clframe.data.decode.ImageFormat`); null if the model was not trained
    on image files.
    """
    scenario = trained.scenario
    look = scenario.transform.look
    return {
        "class_names": json.dumps(scenario.class_names),
        "classes": json.dumps(scenario.classes),
        "input_shape": json.dumps(scenario.input_shape),
        "normalization": json.dumps(
            {k: v for k, v in asdict(scenario.transform).items() if k in ("scale", "mean", "std")}
        ),
        "scores": trained.scores,
        "temperature": json.dumps(trained.temperature),
        "look": json.dumps(asdict(look) if look else None),
    }


def _safetensors(trained: Trained, module: Deployed, inputs: Any, path: Path) -> Written:
    checkpoint.write_tensors(path, dict(module.state_dict()), describe_model(trained))
    empty = copy.deepcopy(module)
    for value in empty.state_dict().values():
        value.zero_()
    empty.load_state_dict(checkpoint.read_tensors(path))
    return empty, "clframe"


def _torch_export(trained: Trained, module: Deployed, inputs: Any, path: Path) -> Written:
    program = _trace(module, inputs[0])
    content = BytesIO()  # torch's own writing ends the process if the system refuses it
    extra = {"class_names.json": json.dumps(trained.class_names), "about.json": json.dumps(describe_model(trained))}
    torch.export.save(program, content, extra_files=extra)
    with create(path) as file:
        file.write(content.getbuffer())
    return torch.export.load(path).module(), "torch"


def _onnx(trained: Trained, module: Deployed, inputs: Any, path: Path) -> Written:
    if missing := [name for name in ONNX if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"The format `onnx` needs {' and '.join(f'`{name}`' for name in missing)}: pip install 'clframe[onnx]'."
        )
    names = ["images", "task"][: len(inputs[0])]
    traced = _trace(module, inputs[0])
    try:
        program = torch.onnx.export(traced, dynamo=True, input_names=names, output_names=["scores"], verbose=False)
        assert program is not None
        program.model.metadata_props.update(describe_model(trained))
        content = (
            program.model_proto.SerializeToString()
        )  # torch's own writing chooses the format by the name of the file
    except (RuntimeError, ValueError, TypeError) as error:
        if of_the_system(error):
            raise
        raise UsageError(_explain_refusal("torch.onnx", error.__cause__ or error)) from error
    with create(path) as file:
        file.write(content)
    if importlib.util.find_spec("onnxruntime") is None:
        return None, None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def answer(*given: Tensor) -> Tensor:
        values = {name: value.numpy() for name, value in zip(names, given, strict=True)}
        return torch.from_numpy(session.run(None, values)[0])

    return answer, "onnxruntime"


def _trace(module: Deployed, given: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Trace the graph of the module for any number of images. Raises `UsageError` if there is none."""
    many = {0: torch.export.Dim("batch", min=1)}
    try:
        return torch.export.export(
            module, given, dynamic_shapes=tuple(many for _ in given) if len(given) > 1 else (many,)
        )
    except Exception as error:  # the errors of torch.export have no common base
        raise UsageError(_explain_refusal("torch.export", error)) from error


def _explain_refusal(what: str, error: BaseException) -> str:
    """Return a sentence on a model that an exporter cannot follow."""
    text = " ".join(str(error).split())[:200]
    return (
        f"{what} cannot follow what this model computes ({type(error).__name__}: {text}); the format `safetensors` can "
        "hold its weights."
    )


def _compare(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference, relative to the largest score; infinite if they rule out different classes."""
    ruled_out = expected.isinf()
    if expected.shape != found.shape or not torch.equal(ruled_out, found.isinf()):
        return float("inf")
    a, b = expected[~ruled_out], found[~ruled_out]
    return float((a - b).abs().max() / a.abs().max().clamp(min=1))


def _shape(trained: Trained) -> str:
    return ", ".join(map(str, trained.scenario.input_shape))


@contextmanager
def _silence_exporters() -> Iterator[None]:
    """Silence the exporters' own logs and warnings, which are of no use to a user."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
