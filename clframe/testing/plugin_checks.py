"""The contract of plugins: one function for each check, by whose name and docstring the check is reported."""

from __future__ import annotations

import ast
import inspect
import pathlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clframe import api, compose, contract
from clframe.context import Run
from clframe.data.batch import Batch
from clframe.data.build import change_domains
from clframe.data.scenario import Scenario
from clframe.deploy.trained import Trained
from clframe.engine import Engine
from clframe.errors import ClframeError, Interrupted, RunError, UsageError
from clframe.hooks import hookimpl
from clframe.plugin import Plugin
from clframe.runs import checkpoint, state
from clframe.runs.results import Results
from clframe.settings import DEFAULT_SCENARIO
from clframe.strict_yaml import parse_yaml
from clframe.testing.fixtures import (
    SETTINGS,
    SHAPE,
    Broken,
    Idle,
    IdleObserver,
    Recorder,
    at_pauses,
    differing,
    learn,
    require,
    same_after_a_stop,
    tiny,
    tiny_arrays,
)
from clframe.testing.subjects import NotRun, Subject, check, check_docstrings, serves


@check("plugin", needs_run=False)
def options_are_documented(subject: Subject, folder: Path) -> None:
    """Check that each option is documented, and `repr` builds the plugin again."""
    cls = subject.factory
    built = subject.plugin()
    check_docstrings(subject, ("variant",))
    try:
        again = cls(**options_of_repr(repr(built), cls.__name__)).options
    except ValueError as error:
        raise Broken(f"`{built!r}` does not build the plugin: {error}") from error
    require(
        again == built.options,
        f"`{built!r}` builds a plugin with the options {again}: store none in another form.",
    )
    strange = [name for name in cls.predictor_state if name not in cls.state]
    require(not strange, f"`predictor_state` names {strange}, which `state` does not: name it there, too.")


def options_of_repr(text: str, name: str) -> dict[str, Any]:
    """Return the arguments of a call such as `EWC(lambda_=1.0)`, which may hold literals and paths.

    Raises `ValueError` if `text` is not such a call of `name`.
    """
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"it is not an expression ({error.msg})") from error
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != name or call.args:
        raise ValueError(f"it is not a call of `{name}` with named arguments")
    return {str(argument.arg): _value(argument.value) for argument in call.keywords}


def _value(node: ast.expr) -> Any:
    """Return the value of a literal, or of a path, alone or in a list, tuple or dict."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in pathlib.__all__:
        return Path(*map(ast.literal_eval, node.args))
    if isinstance(node, ast.List | ast.Tuple):
        values = [_value(item) for item in node.elts]
        return tuple(values) if isinstance(node, ast.Tuple) else values
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {ast.literal_eval(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    return ast.literal_eval(node)


@check("plugin", needs_run=False)
def hooks_are_marked(subject: Subject, folder: Path) -> None:
    """Check that every hook is marked, spelled as the contract has it, and takes what the contract gives."""
    try:
        compose.manager([subject.plugin()])
    except UsageError as error:
        raise Broken(str(error)) from error


@check("plugin", first=True)
def it_learns(subject: Subject, folder: Path) -> None:
    """Check that it runs in each setting that it declares in `serves`, and has the state that it declares."""
    for setting in subject.factory.serves:
        built = subject.plugin()
        try:
            results = learn(tiny(setting), built, model=subject.model)
        except Interrupted:
            raise
        except UsageError as error:
            raise Broken(
                f"A run in the setting `{setting}` is refused: {error} Declare in `serves` the settings that the "
                "plugin serves; or give it, for these images of 8x8 in six classes, other options or another model."
            ) from error
        except ClframeError as error:
            raise Broken(f"A run in the setting `{setting}` fails: {error}") from error
        except AttributeError:
            missing = [name for name in built.state if not hasattr(built, name)]
            require(
                not missing, f"`state` names {missing}, which the plugin never has: a checkpoint could not hold it."
            )
            raise
        rows = {reading: len(matrix) for reading, matrix in results.accuracy.items()}
        require(
            rows and set(rows.values()) == {2}, f"A run in the setting `{setting}` has the accuracy rows {rows}, not 2."
        )


@check("plugin", needs_run=False)
def other_settings_are_refused(subject: Subject, folder: Path) -> None:
    """Check that a setting that it does not declare in `serves` is refused before training."""
    others = [setting for setting in SETTINGS if setting not in subject.factory.serves]
    if not others:
        raise NotRun("It serves every setting.")
    for setting in others:
        try:
            learn(tiny(setting), subject.plugin(), model=subject.model)
        except UsageError as error:
            expected = f"cannot serve the setting `{setting}`" in str(error)
            require(expected, f"The setting `{setting}` is refused for another reason: {error}")
        else:
            raise Broken(f"A run in the setting `{setting}` is not refused.")


@check("plugin")
def a_stopped_run_resumes_to_the_same_bits(subject: Subject, folder: Path) -> None:
    """Check that `state` holds all that the plugin keeps between two calls, and that it draws from `run.rng` alone."""
    setting = serves(subject)

    def begin(output: str) -> Results:
        return learn(tiny(setting), subject.plugin(), model=subject.model, output=output)

    def go_on(path: Path) -> Results:
        return api.resume(path, scenario=tiny(setting), plugins=[subject.plugin()])

    same_after_a_stop(
        folder,
        begin,
        go_on,
        "Name in `state` what the plugin keeps, build modules and optimizers in `before_run` or `grow`, and draw from "
        "`run.rng` only.",
    )


@check("plugin")
def a_finished_run_loads_and_predicts(subject: Subject, folder: Path) -> None:
    """Check that `clframe.load` gives a model that answers as the run was evaluated."""
    scenario = tiny(serves(subject))
    whole = learn(scenario, subject.plugin(), model=subject.model, output=str(folder / "run"))
    loaded = api.load(folder / "run", plugins=[subject.plugin()])
    check_answers(loaded, whole, scenario, "name in `predictor_state` what `predictor` needs")


def check_answers(loaded: Trained, whole: Results, scenario: Scenario, advice: str) -> None:
    """Raise `Broken` unless the loaded model is as often right as the run, on the second experience."""
    test = scenario[1].test
    reading = scenario.setting if scenario.setting in whole.accuracy else next(iter(whole.accuracy))
    task = 1 if reading == "task" else None
    right = loaded(test.x, task).argmax(1) == test.y
    share = right.sum().item() / len(test)
    wanted = whole.accuracy[reading][1][1]
    require(
        share == wanted, f"A loaded run is right in {share:.3f} of the images, the run itself in {wanted}: {advice}."
    )
    check_independence(loaded, torch.cat([experience.test.x for experience in scenario]), task)


def check_independence(loaded: Trained, x: Tensor, task: int | None) -> None:
    """Raise `Broken` unless the scores of an image are the same in batches of any size, order and company."""
    x = x.repeat(-(-128 // len(x)), *[1] * (x.dim() - 1))
    whole = loaded(x, task)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    others = {
        "of 1": torch.cat([loaded(x[k : k + 1], task) for k in range(16)]),
        "of 7": torch.cat([loaded(part, task) for part in x.split(7)]),
        "in another order": torch.empty_like(whole).index_copy_(0, order, loaded(x[order], task)),
    }
    for how, scores in others.items():
        expected = whole[: len(scores)]
        require(
            torch.allclose(scores, expected, rtol=1e-5, atol=1e-5),
            f"In batches {how} images get other scores than in one of {len(x)}: an answer must not depend on the other "
            "images of its batch.",
        )


@check("plugin")
def a_plugin_that_does_nothing_changes_nothing_beside_it(subject: Subject, folder: Path) -> None:
    """Check that it depends on the presence of no other plugin: neither by order, nor by randomness."""
    setting = serves(subject)
    built = subject.plugin()
    alone = Recorder()
    beside = Recorder()
    learn(tiny(setting), built, alone, model=subject.model)
    idle = IdleObserver() if built.isolates or built.keeps_experiences else Idle()
    learn(tiny(setting), idle, subject.plugin(), beside, model=subject.model)
    for name in differing(alone.evaluated[-1], beside.evaluated[-1]):
        raise Broken(
            f"Beside a plugin that does nothing, `{name}` is learned otherwise: draw from `run.rng` only, and ask for "
            "the plugin's own rows by `run.rows_from`."
        )


class _PenaltyProbe(Plugin):
    """An observer that asks a plugin for its penalties again after each step, and keeps their largest gradients."""

    name = "penalty-probe"
    observer = True

    plugin: Plugin

    def __init__(self) -> None:
        self.norms: dict[str, float] = {}

    @hookimpl
    def after_step(self, run: Run, batch: Batch) -> None:
        """Keep the largest gradient of each term."""
        given = {"run": run, "batch": batch, "outputs": run.model(batch.x, batch.task)}
        penalty: Callable[..., dict[str, Tensor] | None] = self.plugin.penalty  # type: ignore[attr-defined]
        wanted = inspect.signature(penalty).parameters
        terms = penalty(**{name: given[name] for name in wanted}) or {}
        for term, value in terms.items():
            norm = _gradient_norm(value, run.model) if value.requires_grad else 0.0
            self.norms[term] = max(self.norms.get(term, 0.0), norm)


def _gradient_norm(value: Tensor, model: nn.Module) -> float:
    """Return the sum of the norms of the gradients of `value` for each parameter."""
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
    return sum(float(gradient.norm()) for gradient in gradients if gradient is not None)


@check("plugin")
def penalties_pull(subject: Subject, folder: Path) -> None:
    """Check that each penalty has a gradient that is not zero once it is there, and is named by the plugin."""
    built = subject.plugin()
    if "penalty" not in contract.hooks_of(type(built)):
        raise NotRun("It has no penalty.")
    probe = _PenaltyProbe()
    probe.plugin = built
    learn(tiny(serves(subject)), built, probe, model=subject.model)
    require(probe.norms, "`penalty` gave nothing in two experiences.")
    for term, norm in probe.norms.items():
        require(norm > 0, f"The penalty `{term}` has no gradient, or one of zero: it is detached, or holds nothing.")
        named = term.split("/")[0] == built.name
        require(named, f"The penalty `{term}` must be named `{built.name}` or `{built.name}/term`.")


@check("plugin")
def nothing_is_left_behind(subject: Subject, folder: Path) -> None:
    """Check that after the run no module has hooks, or another mode than before, and no parameter is left frozen."""
    recorder = Recorder()
    learn(tiny(serves(subject)), subject.plugin(), recorder, model=subject.model)
    for name, module in recorder.model.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        require(not hooked, f"The module `{name}` still has hooks after the run: remove them in `after_run`.")
        require(module.training, f"The module `{name}` is left in eval mode: set it back where it was changed.")
    for name, parameter in recorder.model.named_parameters():
        require(
            parameter.requires_grad,
            f"The parameter `{name}` is left frozen: set `requires_grad` back in `after_run`.",
        )


@check("plugin")
def it_keeps_no_image_that_it_does_not_declare(subject: Subject, folder: Path) -> None:
    """Check that no training image's bytes are in a checkpoint or another file, unless it declares `keeps_images`."""
    if subject.plugin().keeps_images:
        raise NotRun("It declares `keeps_images`.")
    scenario = tiny(serves(subject))
    images = [image for experience in scenario for image in experience.train.x]
    normalized = [scenario.transform.normalize(image[None]) for image in images]
    needles = [t.numpy().tobytes() for t in (*images, *normalized)]
    searched: set[str] = set()
    found: list[str] = []

    def search(files: Iterable[Path]) -> None:
        for file in files:
            data = file.read_bytes() if file.is_file() else b""
            if any(needle in data for needle in needles):
                found.append(file.name)

    def look(engine: Engine) -> None:
        if engine.folder is None:
            return
        engine.folder.settle()
        for path in engine.folder.checkpoints.glob("[0-9]*"):
            if path.name not in searched:
                search(path.iterdir())
                searched.add(path.name)

    try:
        with at_pauses(look):  # each pause writes a checkpoint, of which the folder keeps the latest two
            learn(scenario, subject.plugin(), model=subject.model, output=str(folder / "run"), checkpoint_every=0.0)
    except RunError:
        if not found:
            raise
    search((folder / "run").rglob("*"))
    for name in found:
        raise Broken(f"The bytes of a training image are in {name}: declare `keeps_images = True`.")
    left = [path.name for path in (folder / "run" / "checkpoints").glob("[0-9]*")]
    written = {f"{number:06d}" for number in range(1, int(max(left)) + 1)}
    require(written == {*searched, *left}, "A checkpoint was removed before it was searched for images.")


class _StateScale(Plugin):
    """An observer that measures the state of a plugin after each experience: bytes of tensors, number of values."""

    name = "state-scale"
    observer = True

    plugin: Plugin

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    @hookimpl
    def after_eval(self) -> None:
        """Add the size at the end of an experience."""
        tensors: dict[str, Tensor] = {}
        packed = checkpoint.pack(state.read_plugin_state(self.plugin, self.plugin.state), tensors)
        self.sizes.append((sum(t.nbytes for t in tensors.values()), count_leaves(packed)))


@check("plugin")
def its_state_does_not_grow(subject: Subject, folder: Path) -> None:
    """Check that its state, like the network, keeps its size from domain 2 to domain 4, unless it `grows`."""
    cls = subject.factory
    if cls.grows:
        raise NotRun("It declares `grows`.")
    if not cls.state:
        raise NotRun("It has no state.")
    if "domain" not in cls.serves:
        raise NotRun("It serves no domains, where alone the network stays as it is.")
    arrays = tiny_arrays(shape=SHAPE, per_class=2)
    scenario = change_domains("tiny", arrays, lambda i, x: x.roll(i, -1), experiences=4)
    built = subject.plugin()
    scale = _StateScale()
    scale.plugin = built
    learn(scenario, built, scale, model=subject.model)
    require(
        scale.sizes[1] == scale.sizes[2] == scale.sizes[3],
        f"The state has {', '.join(f'{size} bytes in {count} values' for size, count in scale.sizes)} after "
        "experiences 1 to 4: keep the same amount, or declare `grows = True`.",
    )


def count_leaves(packed: Any) -> int:
    """Return how many values a packed tree of dicts, lists and tuples holds."""
    if isinstance(packed, dict):
        packed = list(packed.values())
    return sum(map(count_leaves, packed)) if isinstance(packed, list | tuple) else 1


@check("plugin")
def it_runs_on_split_digits_and_its_record_runs_again(subject: Subject, folder: Path) -> None:
    """Check that a run on real images, from names and options alone, has a record that runs to the same figures."""
    if not isinstance(subject.what, str):
        raise NotRun("It is given as a class; install it, and name it, to look at the record of a run.")
    name = subject.what
    options = subject.plugin().public_options()
    first = api.run(
        {"name": DEFAULT_SCENARIO, "setting": serves(subject), "limit": 8},
        subject.model,
        [{name: subject.options}],
        train={"iterations": 4, "threads": 1},
        run={"tensorboard": False, "device": "cpu", "output": str(folder / "run")},
    )
    record = parse_yaml((folder / "run" / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    kept = {option: value for option, value in options.items() if option != "variant"}
    recorded = record["plugins"][name]
    require(
        recorded.keys() == kept.keys(), f"The record has the options {sorted(recorded)}, the plugin {sorted(kept)}."
    )
    record["run"]["output"] = None
    again = api.run(record["scenario"], record["model"], record["plugins"], train=record["train"], run=record["run"])
    require(
        again.data == first.data,
        "The record of a run on split-digits runs again to other figures: draw from `run.rng` only.",
    )
