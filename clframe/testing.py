"""The contract of plugins, scenarios and backbones, as checks for `clframe plugins check` or for tests of one's own.

    from clframe import testing

    SUBJECT = testing.plugin("my-method", {"strength": 10.0})

    @pytest.mark.parametrize("check", SUBJECT.checks, ids=str)
    def test_contract(check):
        check(SUBJECT)

The checks need no test framework: they train small networks on a made-up scenario, on one thread of the CPU, and write
to temporary folders only. One that does not hold raises `Broken`, whose text is one sentence.
"""

from __future__ import annotations

import inspect
import pathlib
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

import torch
from torch import Tensor, nn

from clframe import api, compose, contract, registry
from clframe.context import Run
from clframe.data.build import Arrays, change_domains, split_classes
from clframe.data.scenario import Experience, Scenario, Setting
from clframe.data.transform import Transform
from clframe.deploy.trained import Trained
from clframe.engine import AT_PAUSE, Engine
from clframe.errors import ClframeError, Interrupted, UsageError
from clframe.hooks import HOOKS, hookimpl
from clframe.model import IncrementalNet, evaluating, snapshot
from clframe.options import options_of
from clframe.plugin import Plugin
from clframe.runs import checkpoint, state
from clframe.runs.results import Results
from clframe.settings import DEFAULT_SCENARIO, RunSettings

MODEL = "cnn-small"
SETTINGS: tuple[Setting, ...] = ("class", "task", "domain")
SHAPE = (1, 8, 8)  # of the images that plugins are checked with: those of `split-digits`, too
BACKBONE_SHAPE = (3, 32, 32)  # of those that backbones are checked with
TRAIN = {"epochs": 2, "batch_size": 8, "optimizer": "adam", "lr": 0.01, "threads": 1}
FILES = ("results.json", "model.safetensors", "predictions.safetensors")  # what a repeat of a run gives to the bit


class Broken(AssertionError):
    """A part of the contract does not hold; the text says what, and why it matters."""


class NotRun(Exception):
    """A check has nothing to look at; the text says why."""


@dataclass(frozen=True)
class Subject:
    """What is checked: something installed, by its name, or a plugin's class, or the function that builds the others.

    Attributes:
        kind: what it is.
        what: its name, class or function.
        options: with which it is built, by their public names.
        model: name, or name and options, of the backbone that a plugin is checked with.
    """

    kind: registry.Kind
    what: str | Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | Mapping[str, Any] = MODEL

    @property
    def checks(self) -> tuple[Check, ...]:
        """The contract of its kind."""
        return CHECKS[self.kind]

    @property
    def factory(self) -> Any:
        """The class or function. Raises `UsageError` if nothing of that name can be had."""
        if not isinstance(self.what, str):
            return self.what
        return registry.plugin_class(self.what) if self.kind == "plugin" else registry.builder(self.kind, self.what)

    def plugin(self) -> Plugin:
        """A new plugin."""
        if isinstance(self.what, str):
            return registry.build_plugin(self.what, self.options)
        return cast(Plugin, self.what(**self.options))

    def scenario(self) -> Scenario:
        """A new scenario."""
        if isinstance(self.what, str):
            return registry.build_scenario({"name": self.what, **self.options}, RunSettings.model_validate({}))
        return cast(Scenario, self.what(**self.options))

    def backbone(self) -> nn.Module:
        """A new backbone, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if isinstance(self.what, str):
                return registry.build_backbone({"name": self.what, **self.options}, BACKBONE_SHAPE)
            return cast(nn.Module, self.what(BACKBONE_SHAPE, **self.options))


def plugin(
    what: str | type[Plugin], options: Mapping[str, Any] | None = None, model: str | Mapping[str, Any] = MODEL
) -> Subject:
    """A plugin to be checked, by its name or class, in networks with this backbone."""
    return Subject("plugin", what, options or {}, model)


def scenario(what: str | Callable[..., Scenario], options: Mapping[str, Any] | None = None) -> Subject:
    """A scenario to be checked, by its name or the function that builds it."""
    return Subject("scenario", what, options or {})


def backbone(what: str | Callable[..., nn.Module], options: Mapping[str, Any] | None = None) -> Subject:
    """A backbone to be checked, by its name or the function that builds it, on images of `BACKBONE_SHAPE`."""
    return Subject("model", what, options or {})


@dataclass(frozen=True)
class Check:
    """One part of the contract: calling it with a subject raises `Broken` where it does not hold.

    Attributes:
        name: what holds, in a few words.
        why: what is asked, and what for.
        needs_run: it trains, so that it tells nothing of a subject with which nothing can be trained.
    """

    name: str
    why: str
    needs_run: bool
    look: Callable[[Subject, Path], None]

    def __str__(self) -> str:
        return self.name

    def __call__(self, subject: Subject) -> None:
        """Raises `Broken`, or whatever a run with the subject raises."""
        with tempfile.TemporaryDirectory(prefix="clframe-check-") as folder, one_thread(), suppress(NotRun):
            self.look(subject, Path(folder))

    def outcome(self, subject: Subject) -> Outcome:
        """What comes of it; only an interruption by the user is raised."""
        with tempfile.TemporaryDirectory(prefix="clframe-check-") as folder, one_thread():
            try:
                self.look(subject, Path(folder))
            except NotRun as reason:
                return Outcome(self, "not run", str(reason))
            except Interrupted:
                raise
            except (Broken, ClframeError) as error:
                return Outcome(self, "failed", " ".join(str(error).split()))
            except Exception as error:  # of a stranger's code: it may be any
                return Outcome(self, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
        return Outcome(self, "passed")


@dataclass(frozen=True)
class Outcome:
    """What came of a check, and why where it did not pass."""

    check: Check
    result: Literal["passed", "failed", "not run"]
    why: str = ""


def outcomes(subject: Subject) -> Iterator[Outcome]:
    """The outcome of each check of `subject`, as it comes; those that train are left out once a first run failed."""
    failed = ""
    for check in subject.checks:
        if failed and check.needs_run:
            yield Outcome(check, "not run", f"`{failed}` must pass first.")
            continue
        outcome = check.outcome(subject)
        if outcome.result == "failed" and check.look in FIRST:
            failed = check.name
        yield outcome


# ------------------------------------------------------------------------- what the checks are made of


def tiny_arrays(classes: int = 6, per_class: int = 12, shape: Sequence[int] = (1, 4, 4)) -> Arrays:
    """Images of a few classes that a small network can tell apart: one bright pixel a class, on noise."""
    generator = torch.Generator().manual_seed(7)

    def part(count: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(classes).repeat(count)
        x = torch.randint(0, 80, (len(y), *shape), generator=generator, dtype=torch.uint8)
        x.view(len(y), -1)[torch.arange(len(y)), y] = 255
        return x, y

    return Arrays("tiny", *part(per_class), *part(4), tuple(f"class {c}" for c in range(classes)), Transform())


def tiny(setting: Setting = "class", shape: Sequence[int] = SHAPE) -> Scenario:
    """Two experiences of three classes, 24 training images each."""
    return split_classes("tiny", tiny_arrays(shape=shape, per_class=8), experiences=2, setting=setting)


def learn(
    scenario: Scenario, plugins: Sequence[Plugin], model: Any = MODEL, logits: str | None = None, **run: Any
) -> Results:
    """A short run on the CPU, without TensorBoard; `run` holds settings of it."""
    train = TRAIN | {"logits": logits}
    return api.run(scenario, model, plugins, train=train, run={"tensorboard": False, "device": "cpu", **run})


class Idle(Plugin):
    """Does nothing, in every hook, and so owns none."""

    name = "idle"

    def owns(self, hook: str) -> bool:
        """It answers nothing."""
        return False


class IdleObserver(Idle):
    """The same beside plugins that refuse any method beside them."""

    observer = True


for _hook in HOOKS:  # each is a function of its own, as pluggy marks it by an attribute
    exec(f"def {_hook}(self, run): pass\nsetattr(Idle, '{_hook}', hookimpl({_hook}))")


class Watching(Plugin):
    """Keeps the network, and its weights after the first experience and after the last."""

    name = "watching"
    observer = True

    def __init__(self) -> None:
        self.model: nn.Module = nn.Identity()
        self.first: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """What is there before the evaluation."""
        self.model = run.model
        if experience.index == 0:
            self.first = {name: value.clone() for name, value in run.model.state_dict().items()}

    @hookimpl
    def after_eval(self, run: Run) -> None:
        """What is there after it."""
        self.last = {name: value.clone() for name, value in run.model.state_dict().items()}


def serves(subject: Subject) -> Setting:
    """The setting that a plugin is checked in: the first that it serves."""
    return cast(Setting, subject.factory.serves[0])


def hold(truth: object, sentence: str) -> None:
    """Raise `Broken` with this sentence unless it is so."""
    if not truth:
        raise Broken(sentence)


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The names under which the two have not the same tensors, to the bit."""
    return [n for n in {**one, **other} if n not in one or n not in other or not torch.equal(one[n], other[n])]


@contextmanager
def one_thread() -> Iterator[None]:
    """Small networks gain nothing from more, and bits may differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Pauses:
    """The places where runs could have been stopped, in the order in which they came.

    Attributes:
        calls: for each pause the hook, the plugin and the tick under way, as in ``before_experience/icarl/``; empty
            between two hooks and between two steps.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __len__(self) -> int:
        return len(self.calls)

    def within(self, call: str) -> list[int]:
        """Return the numbers, from 1, of the pauses in calls that begin with `call`."""
        return [k for k, name in enumerate(self.calls, start=1) if name.startswith(call)]


@contextmanager
def stop_at(place: int | Callable[[Engine], bool] = 0, by: signal.Signals = signal.SIGTERM) -> Iterator[Pauses]:
    """Stop the runs inside the context as a signal does, and count the places where they can be stopped.

    Args:
        place: the number, from 1, of the pause at which to stop, counted over all runs inside the context (0: count
            only), or a function that is given the engine at each pause and returns whether to stop there.
        by: the signal.

    Yields the pauses that came. A run that is stopped raises `Interrupted`.
    """
    pauses = Pauses()

    def look(engine: Engine) -> None:
        pauses.calls.append(engine.run.hook_call)
        if place(engine) if callable(place) else len(pauses) == place:
            engine.signal = by

    AT_PAUSE.append(look)
    try:
        yield pauses
    finally:
        AT_PAUSE.remove(look)


def same_after_a_stop(
    folder: Path, begin: Callable[[str], Results], go_on: Callable[[Path], Results], blame: str
) -> None:
    """Raise `Broken` unless a run that is stopped, at five places, goes on to the files of the run that is not.

    All but the first and the last resume are stopped again at once, before a step was taken, and resumed once more.
    """
    with stop_at() as pauses:
        begin(str(folder / "whole"))
    last = len(pauses)
    for place in sorted({1, last // 4, last // 2, last - 2, last} - {0, -1}):
        where = f"stopped at pause {place} of {last}"
        stopped = folder / str(place)
        try:
            with stop_at(place):
                begin(str(stopped))
        except Interrupted as error:
            if error.signal != signal.SIGTERM:
                raise
        else:
            raise Broken(f"A run {where} was not stopped: two runs of one seed take other courses. {blame}")
        try:
            if place in (1, last) or not _stopped_at_once(go_on, stopped):
                go_on(stopped)
        except Interrupted:
            raise
        except (ClframeError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise Broken(f"A run {where} could not be resumed: {' '.join(str(error).split())} {blame}") from error
        for file in FILES:
            same = (stopped / file).read_bytes() == (folder / "whole" / file).read_bytes()
            hold(same, f"A run {where} and resumed ends with another {file} than one that was not stopped. {blame}")


def _stopped_at_once(go_on: Callable[[Path], Results], folder: Path) -> bool:
    """Resume the run in `folder` and stop it at its first pause; return whether it finished, as there was none."""
    try:
        with stop_at(1):
            go_on(folder)
    except Interrupted as error:
        if error.signal != signal.SIGTERM:
            raise
        return False
    return True


def documented(subject: Subject, skip: tuple[str, ...]) -> None:
    """Raise `Broken` unless the docstring tells what it is, and what each option means."""
    factory = subject.factory
    hold(factory.__doc__, f"`{factory.__name__}` has no docstring, so `clframe` can tell nobody what it is.")
    lacking = [option.name for option in options_of(factory, skip) if not option.doc]
    hold(
        not lacking,
        f"The option `{lacking and lacking[0]}` is not documented: add it under `Options:` in the docstring.",
    )


# ---------------------------------------------------------------------------------- checks of a plugin


def options_are_documented(subject: Subject, folder: Path) -> None:
    """Each option is documented, and `repr` builds the plugin again."""
    cls, built = subject.factory, subject.plugin()
    documented(subject, ("variant",))
    scope = {cls.__name__: cls, **{name: getattr(pathlib, name) for name in pathlib.__all__}}
    again = eval(repr(built), scope).options
    hold(again == built.options, f"`{built!r}` builds a plugin with the options {again}: store none in another form.")
    strange = [name for name in cls.predictor_state if name not in cls.state]
    hold(not strange, f"`predictor_state` names {strange}, which `state` does not: name it there, too.")


def hooks_are_marked(subject: Subject, folder: Path) -> None:
    """Every hook is marked, spelt as the contract has it, and takes what the contract gives."""
    try:
        compose.manager([subject.plugin()])
    except UsageError as error:
        raise Broken(str(error)) from error


def it_learns(subject: Subject, folder: Path) -> None:
    """It takes part in a run in each setting that it declares in `settings`, and has the state that it declares."""
    for setting in subject.factory.serves:
        built = subject.plugin()
        try:
            results = learn(tiny(setting), [built], subject.model)
        except Interrupted:
            raise
        except UsageError as error:
            raise Broken(
                f"A run in the setting `{setting}` is refused: {error} Declare the `settings` that it serves; or give "
                "it, for these images of 8x8 in six classes, other options or another model."
            ) from error
        except ClframeError as error:
            raise Broken(f"A run in the setting `{setting}` fails: {error}") from error
        except AttributeError:
            missing = [name for name in built.state if not hasattr(built, name)]
            hold(not missing, f"`state` names {missing}, which the plugin never has: a checkpoint could not hold it.")
            raise
        rows = {reading: len(matrix) for reading, matrix in results.accuracy.items()}
        hold(
            rows and set(rows.values()) == {2}, f"A run in the setting `{setting}` has the accuracy rows {rows}, not 2."
        )


def other_settings_are_refused(subject: Subject, folder: Path) -> None:
    """A setting that it does not declare in `settings` is refused before training."""
    others = [setting for setting in SETTINGS if setting not in subject.factory.serves]
    if not others:
        raise NotRun("It serves every setting.")
    for setting in others:
        try:
            learn(tiny(setting), [subject.plugin()], subject.model)
        except UsageError as error:
            told = f"cannot serve the setting `{setting}`" in str(error)
            hold(told, f"The setting `{setting}` is refused for another reason: {error}")
        else:
            raise Broken(f"A run in the setting `{setting}` is not refused.")


def a_stopped_run_resumes_to_the_same_bits(subject: Subject, folder: Path) -> None:
    """Whatever the plugin keeps between two calls is in `state`, and all its randomness from `run.rng`."""
    setting = serves(subject)
    same_after_a_stop(
        folder,
        lambda output: learn(tiny(setting), [subject.plugin()], subject.model, output=output),
        lambda path: api.resume(path, scenario=tiny(setting), plugins=[subject.plugin()]),
        "Name in `state` what the plugin keeps, build modules and optimizers in `before_run` or `grow`, and draw from "
        "`run.rng` only.",
    )


def a_finished_run_loads_and_predicts(subject: Subject, folder: Path) -> None:
    """`clframe.load` gives a model that answers as the run was evaluated."""
    setting = serves(subject)
    scenario = tiny(setting)
    whole = learn(scenario, [subject.plugin()], subject.model, output=str(folder / "run"))
    loaded = api.load(folder / "run", plugins=[subject.plugin()])
    agrees(loaded, whole, scenario, "name in `predictor_state` what `predictor` needs")


def agrees(loaded: Trained, whole: Results, scenario: Scenario, advice: str) -> None:
    """Raise `Broken` unless the loaded model is as often right as the run, on the second experience."""
    test, setting = scenario[1].test, scenario.setting
    reading = setting if setting in whole.accuracy else next(iter(whole.accuracy))
    right = loaded(test.x, 1 if reading == "task" else None).argmax(1) == test.y
    share, wanted = right.sum().item() / len(test), whole.accuracy[reading][1][1]
    hold(share == wanted, f"A loaded run is right in {share:.3f} of the images, the run itself in {wanted}: {advice}.")
    answers_alone(loaded, torch.cat([experience.test.x for experience in scenario]), 1 if reading == "task" else None)


def answers_alone(loaded: Trained, x: Tensor, task: int | None) -> None:
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
        hold(
            torch.allclose(scores, expected, rtol=1e-5, atol=1e-5),
            f"In batches {how} images get other scores than in one of {len(x)}: an answer must not depend on the other "
            "images of its batch.",
        )


def a_plugin_that_does_nothing_changes_nothing_beside_it(subject: Subject, folder: Path) -> None:
    """It depends on no other plugin's being there: not by order, nor by randomness."""
    setting, built = serves(subject), subject.plugin()
    alone, beside = Watching(), Watching()
    learn(tiny(setting), [built, alone], subject.model)
    idle = IdleObserver() if built.isolates or built.keeps_experiences else Idle()
    learn(tiny(setting), [idle, subject.plugin(), beside], subject.model)
    changed = differing(alone.last, beside.last)
    hold(
        not changed,
        f"Beside a plugin that does nothing, `{changed and changed[0]}` is learnt otherwise: draw from `run.rng` only, "
        "and ask for one's own rows by `run.rows_from`.",
    )


def penalties_pull(subject: Subject, folder: Path) -> None:
    """Each penalty has a gradient that is not zero once it is there, and is named by the plugin."""
    built = subject.plugin()
    if "penalty" not in contract.hooks_of(type(built)):
        raise NotRun("It has no penalty.")
    norms: dict[str, float] = {}
    penalty: Callable[..., dict[str, Tensor] | None] = built.penalty  # type: ignore[attr-defined]

    class Probing(Plugin):
        """Asks for the penalties again, after each step."""

        name = "probing"
        observer = True

        @hookimpl
        def after_step(self, run: Run, batch: Any) -> None:
            """The largest gradient of each term."""
            given = {"run": run, "batch": batch, "outputs": run.model(batch.x, batch.task)}
            wanted = inspect.signature(penalty).parameters
            weights = [p for p in run.model.parameters() if p.requires_grad]
            for term, value in (penalty(**{name: given[name] for name in wanted}) or {}).items():
                gradients = (
                    torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
                    if value.requires_grad
                    else ()
                )
                norm = sum(float(g.norm()) for g in gradients if g is not None)
                norms[term] = max(norms.get(term, 0.0), norm)

    learn(tiny(serves(subject)), [built, Probing()], subject.model)
    hold(norms, "`penalty` gave nothing in two experiences.")
    for term, norm in norms.items():
        hold(norm > 0, f"The penalty `{term}` has no gradient, or one of zero: it is detached, or holds nothing.")
        named = term.split("/")[0] == built.name
        hold(named, f"The penalty `{term}` must be named `{built.name}` or `{built.name}/term`.")


def nothing_is_left_behind(subject: Subject, folder: Path) -> None:
    """After the run no module has hooks, or another mode than before, and no parameter is left frozen."""
    watching = Watching()
    learn(tiny(serves(subject)), [subject.plugin(), watching], subject.model)
    for name, module in watching.model.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        hold(not hooked, f"The module `{name}` still has hooks after the run: remove them in `after_run`.")
        hold(module.training, f"The module `{name}` is left in eval mode: set it back where it was changed.")
    frozen = [name for name, p in watching.model.named_parameters() if not p.requires_grad]
    hold(not frozen, f"The parameter `{frozen and frozen[0]}` is left frozen: set `requires_grad` back in `after_run`.")


def it_keeps_no_image_that_it_does_not_declare(subject: Subject, folder: Path) -> None:
    """No training image's bytes are in a checkpoint or another file of the run, unless `keeps_images` says so."""
    if subject.plugin().keeps_images:
        raise NotRun("It declares `keeps_images`.")
    scenario = tiny(serves(subject))
    images = [image for experience in scenario for image in experience.train.x]
    normalized = [scenario.transform.normalize(image[None]) for image in images]
    needles = [t.numpy().tobytes() for t in (*images, *normalized)]
    original = checkpoint.write

    def search(files: Iterator[Path]) -> None:
        for file in files:
            data = file.read_bytes() if file.is_file() else b""
            found = any(needle in data for needle in needles)
            hold(not found, f"The bytes of a training image are in {file.name}: declare `keeps_images = True`.")

    def write(*arguments: Any) -> Path:
        path = original(*arguments)
        search(path.iterdir())
        return path

    with mock.patch.object(checkpoint, "write", write):
        learn(scenario, [subject.plugin()], subject.model, output=str(folder / "run"), checkpoint_every=0.0)
    search((folder / "run").rglob("*"))


def its_state_does_not_grow(subject: Subject, folder: Path) -> None:
    """From the second domain to the fourth, where the network stays as it is, so does its state, unless it `grows`."""
    cls = subject.factory
    if cls.grows:
        raise NotRun("It declares `grows`.")
    if not cls.state:
        raise NotRun("It has no state.")
    if "domain" not in cls.serves:
        raise NotRun("It serves no domains, where alone the network stays as it is.")
    arrays = tiny_arrays(shape=SHAPE, per_class=2)
    scenario = change_domains("tiny", arrays, lambda i, x: x.roll(i, -1), experiences=4)
    built, sizes = subject.plugin(), list[tuple[int, int]]()

    class Weighing(Plugin):
        """Notes bytes and values of the state."""

        name = "weighing"
        observer = True

        @hookimpl
        def after_eval(self) -> None:
            """One entry for each experience."""
            tensors: dict[str, Tensor] = {}
            packed = checkpoint.pack(state.of_plugin(built, built.state), tensors)
            sizes.append((sum(t.nbytes for t in tensors.values()), leaves(packed)))

    learn(scenario, [built, Weighing()], subject.model)
    hold(
        sizes[1] == sizes[2] == sizes[3],
        f"The state has {', '.join(f'{size} bytes in {count} values' for size, count in sizes)} after experiences 1 to "
        "4: keep the same amount, or declare `grows = True`.",
    )


def leaves(packed: Any) -> int:
    """How many values a packed tree holds."""
    if isinstance(packed, dict):
        packed = list(packed.values())
    return sum(map(leaves, packed)) if isinstance(packed, list | tuple) else 1


def it_runs_on_split_digits_and_its_record_runs_again(subject: Subject, folder: Path) -> None:
    """A run on real images, from names and options alone, is recorded so that it runs again to the same figures."""
    if not isinstance(subject.what, str):
        raise NotRun("It is given as a class; install it, and name it, to look at the record of a run.")
    from clframe.strict_yaml import parse_yaml

    name, setting = subject.what, serves(subject)
    options = subject.plugin().public_options()
    first = api.run(
        {"name": DEFAULT_SCENARIO, "setting": setting, "limit": 8},
        subject.model,
        [{name: subject.options}],
        train={"iterations": 4, "threads": 1},
        run={"tensorboard": False, "device": "cpu", "output": str(folder / "run")},
    )
    record = parse_yaml((folder / "run" / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    kept = {option: value for option, value in options.items() if option != "variant"}
    recorded = record["plugins"][name]
    hold(recorded.keys() == kept.keys(), f"The record has the options {sorted(recorded)}, the plugin {sorted(kept)}.")
    record["run"]["output"] = None
    again = api.run(record["scenario"], record["model"], record["plugins"], train=record["train"], run=record["run"])
    hold(
        again.data == first.data,
        "The record of a run on split-digits runs again to other figures: draw from `run.rng` only.",
    )


# -------------------------------------------------------------------------------- checks of a scenario


def scenario_options_are_documented(subject: Subject, folder: Path) -> None:
    """Each option is documented."""
    documented(subject, registry.SUPPLIED)


def its_images_are_what_it_says(subject: Subject, folder: Path) -> None:
    """Each experience has training and test images of the declared shape, classes and task."""
    stream = subject.scenario()
    hold(len(stream) > 0, "It has no experience.")
    for place, experience in enumerate(stream):
        where = f"experience {place + 1} of {len(stream)}"
        hold(experience.index == place, f"The index of {where} is {experience.index}, not {place}.")
        for part in ("train", "test"):
            data = getattr(experience, part)
            hold(len(data), f"There are no {part} images in {where}.")
            shape = tuple(data.x.shape[1:])
            hold(shape == tuple(stream.input_shape), f"The {part} images of {where} are {shape}, not as `input_shape`.")
            strange = sorted(set(data.y.tolist()) - set(experience.classes))
            hold(not strange, f"The label {strange[:1]} in the {part} images of {where} is none of its classes.")
            tasks = data.task.unique().tolist()
            hold(tasks == [experience.task], f"The {part} images of {where} have the tasks {tasks}.")
    last = max(max(classes) for classes in stream.classes)
    hold(last < len(stream.class_names), f"Class {last} has no name: there are {len(stream.class_names)}.")


def it_is_the_same_each_time(subject: Subject, folder: Path) -> None:
    """Two that are built alike, and two passes over one, give the same images; a checksum tells of other data."""
    one, other = subject.scenario(), subject.scenario()
    hold(one.checksum, "It has no `checksum`, by which a resume notices other data.")
    hold(one.checksum == other.checksum, "Two that are built alike have different checksums.")
    for i, (a, b, c) in enumerate(zip(one, other, one, strict=True), start=1):
        for part in ("train", "test"):
            images = [getattr(experience, part) for experience in (a, b, c)]
            alike = all(torch.equal(images[0].x, d.x) and torch.equal(images[0].y, d.y) for d in images[1:])
            hold(alike, f"The {part} images of experience {i} are others the second time: draw from its `seed` only.")


def a_stopped_run_on_it_resumes_to_the_same_bits(subject: Subject, folder: Path) -> None:
    """Plain fine-tuning on it can be stopped, and goes on to the same figures."""
    settings = {"tensorboard": False, "device": "cpu"}
    train = {"iterations": 3, "batch_size": 8, "threads": 1}
    named = {"name": subject.what, **subject.options}
    given = (lambda: named) if isinstance(subject.what, str) else subject.scenario
    same_after_a_stop(
        folder,
        lambda output: api.run(given(), train=train, run={**settings, "output": output}),
        lambda path: api.resume(path, scenario=None if isinstance(subject.what, str) else subject.scenario()),
        "The images must depend on its options alone.",
    )


# -------------------------------------------------------------------------------- checks of a backbone


def backbone_options_are_documented(subject: Subject, folder: Path) -> None:
    """Each option is documented."""
    first = next(iter(inspect.signature(subject.factory).parameters), "")
    documented(subject, (first, *registry.SUPPLIED))


def its_features_are_as_wide_as_it_says(subject: Subject, folder: Path) -> None:
    """`features` gives [B, width] finite numbers, in eval mode the same for each image whatever stands beside it."""
    built = subject.backbone().eval()
    x = torch.rand(5, *BACKBONE_SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = cast(Any, built).features(x)
        alone = cast(Any, built).features(x[:1])
    width = getattr(built, "width", None)
    shape = list(given.shape)
    hold(shape == [5, width], f"`features` gives {shape} for 5 images, and `width` is {width}: it must be [5, width].")
    hold(given.isfinite().all(), "`features` gives numbers that are not finite.")
    hold(
        torch.allclose(given[:1], alone, atol=1e-4), "In eval mode an image's features depend on the others beside it."
    )


def every_parameter_learns(subject: Subject, folder: Path) -> None:
    """Each parameter that requires gradients gets one."""
    built = subject.backbone().train()
    x = torch.rand(8, *BACKBONE_SHAPE, generator=torch.Generator().manual_seed(0))
    cast(Any, built).features(x).square().sum().backward()
    idle = [name for name, p in built.named_parameters() if p.requires_grad and p.grad is None]
    hold(not idle, f"The parameter `{idle and idle[0]}` gets no gradient from `features`: use it, or leave it out.")


def it_is_copied(subject: Subject, folder: Path) -> None:
    """A snapshot, as teachers are, answers the same and shares nothing with the original."""
    net = IncrementalNet(subject.backbone())
    net.grow(2)
    copy = snapshot(net)
    x = torch.rand(2, *BACKBONE_SHAPE, generator=torch.Generator().manual_seed(0))
    with evaluating(net), evaluating(copy), torch.no_grad():
        hold(torch.equal(net(x).logits, copy(x).logits), "A snapshot of it gives other answers than the original.")
    shared = {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in copy.parameters()}
    hold(not shared, "A snapshot of it shares parameters with the original.")


def its_stopped_run_resumes_to_the_same_bits(subject: Subject, folder: Path) -> None:
    """All that it keeps between two steps is in its `state_dict`, and its randomness torch's."""

    def begin(output: str) -> Results:
        return learn(tiny(shape=BACKBONE_SHAPE), [], subject.backbone(), output=output)

    same_after_a_stop(
        folder,
        begin,
        lambda path: api.resume(path, scenario=tiny(shape=BACKBONE_SHAPE), model=subject.backbone()),
        "Keep what lasts as parameters or buffers.",
    )


def its_finished_run_loads_and_predicts(subject: Subject, folder: Path) -> None:
    """`clframe.load` gives a model that answers as the run was evaluated."""
    scenario = tiny(shape=BACKBONE_SHAPE)
    whole = learn(scenario, [], subject.backbone(), output=str(folder / "run"))
    agrees(
        api.load(folder / "run", model=subject.backbone()), whole, scenario, "keep what lasts as parameters or buffers"
    )


def _check(look: Callable[[Subject, Path], None], needs_run: bool = True) -> Check:
    name = look.__name__.removeprefix("scenario_").removeprefix("backbone_").replace("_", " ")
    return Check(name, " ".join((look.__doc__ or "").split()), needs_run, look)


FIRST = (it_learns, its_images_are_what_it_says, its_features_are_as_wide_as_it_says)  # else no run tells anything
CHECKS: dict[registry.Kind, tuple[Check, ...]] = {
    "plugin": (
        _check(options_are_documented, needs_run=False),
        _check(hooks_are_marked, needs_run=False),
        _check(it_learns),
        _check(other_settings_are_refused, needs_run=False),
        _check(a_stopped_run_resumes_to_the_same_bits),
        _check(a_finished_run_loads_and_predicts),
        _check(a_plugin_that_does_nothing_changes_nothing_beside_it),
        _check(penalties_pull),
        _check(nothing_is_left_behind),
        _check(it_keeps_no_image_that_it_does_not_declare),
        _check(its_state_does_not_grow),
        _check(it_runs_on_split_digits_and_its_record_runs_again),
    ),
    "scenario": (
        _check(scenario_options_are_documented, needs_run=False),
        _check(its_images_are_what_it_says),
        _check(it_is_the_same_each_time),
        _check(a_stopped_run_on_it_resumes_to_the_same_bits),
    ),
    "model": (
        _check(backbone_options_are_documented, needs_run=False),
        _check(its_features_are_as_wide_as_it_says),
        _check(every_parameter_learns),
        _check(it_is_copied),
        _check(its_stopped_run_resumes_to_the_same_bits),
        _check(its_finished_run_loads_and_predicts),
    ),
}
