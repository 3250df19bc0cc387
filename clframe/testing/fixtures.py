"""Small scenarios, short runs, and plugins that watch a run: what the checks are made of."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clframe import api
from clframe.context import Run
from clframe.data.batch import Batch
from clframe.data.build import Arrays, split_classes
from clframe.data.scenario import Experience, Scenario, Setting
from clframe.data.transform import Transform
from clframe.engine import AT_PAUSE, Engine
from clframe.errors import ClframeError, Interrupted, UsageError
from clframe.events import Event, Listener
from clframe.hooks import HOOKS, hookimpl
from clframe.model import Outputs, evaluating
from clframe.plugin import Plugin
from clframe.runs.results import Results
from clframe.settings import TrainSettings

MODEL = "cnn-small"
SETTINGS: tuple[Setting, ...] = ("class", "task", "domain")
SHAPE = (1, 8, 8)  # of the images with which plugins are checked, as in `split-digits`
TRAIN = {"epochs": 2, "batch_size": 8, "optimizer": "adam", "lr": 0.01, "threads": 1}
FILES = ("results.json", "model.safetensors", "predictions.safetensors")  # what a repeated run gives to the bit


class Broken(AssertionError):
    """A part of the contract that does not hold; the text says which one, and why it matters."""


def require(truth: object, sentence: str) -> None:
    """Raise `Broken` with this sentence unless `truth` is true."""
    if not truth:
        raise Broken(sentence)


@contextmanager
def refused(*words: str, error: type[ClframeError] = UsageError) -> Iterator[None]:
    """Raise `Broken` unless the code inside the context is refused in one sentence that has all `words`.

    A test of a refusal names the option, its value and the choices; the sentence around them may change.

    Args:
        words: what the sentence must have, in any order.
        error: the class of the error.
    """
    try:
        yield
    except error as refusal:
        sentences = getattr(refusal, "problems", (str(refusal),))
        require(len(sentences) == 1, f"The refusal should be one sentence: {' '.join(sentences)}")
        missing = [word for word in words if word not in sentences[0]]
        require(not missing, f"The refusal lacks {missing}: {sentences[0]}")
    else:
        raise Broken(f"Nothing is refused; an error with {list(words)} was expected.")


# ------------------------------------------------------------------------------- scenarios and short runs


def tiny_arrays(classes: int = 6, per_class: int = 12, shape: Sequence[int] = (1, 4, 4)) -> Arrays:
    """Return images of classes that a small network can tell apart: one bright pixel for each class, on noise.

    There are `per_class` training images and 4 test images of each class, uint8 in 0 to 255, of `shape` [C, H, W].
    """
    generator = torch.Generator().manual_seed(7)

    def part(count: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(classes).repeat(count)
        x = torch.randint(0, 80, (len(y), *shape), generator=generator, dtype=torch.uint8)
        x.view(len(y), -1)[torch.arange(len(y)), y] = 255
        return x, y

    return Arrays("tiny", *part(per_class), *part(4), tuple(f"class {c}" for c in range(classes)), Transform())


def tiny(setting: Setting = "class", shape: Sequence[int] = SHAPE) -> Scenario:
    """Return two experiences of three classes, 24 training images each."""
    return split_classes("tiny", tiny_arrays(shape=shape, per_class=8), experiences=2, setting=setting)


def learn(
    scenario: Any, *plugins: Any, model: Any = MODEL, listeners: Sequence[Listener] = (), **settings: Any
) -> Results:
    """Train on the CPU, without TensorBoard, with the settings `TRAIN`, and return the results.

    A file of tests writes its common settings once: ``learn = partial(testing.learn, model="mlp-100", lr=0.1)``.

    Args:
        scenario: the scenario, by its name, options or object, as in `clframe.run`.
        plugins: the plugins, likewise.
        model: the backbone, likewise; the run trains a copy of a module.
        listeners: functions that get every record of the run.
        settings: settings of `train` and `run` by their own names, such as ``lr`` and ``seed``; ``iterations`` replace
            the epochs.

    Raises `UsageError` as `clframe.run` does.
    """
    train = TRAIN | {name: settings.pop(name) for name in [*settings] if name in TrainSettings.model_fields}
    if "iterations" in train:
        del train["epochs"]
    run = {"tensorboard": False, "device": "cpu", **settings}
    return api.run(scenario, model, plugins, train=train, run=run, listeners=listeners)


def message_listener(texts: list[str]) -> Callable[[dict[str, Any]], None]:
    """Return a listener that adds the text of each message to the user to `texts`."""

    def listen(record: dict[str, Any]) -> None:
        if record["kind"] == "message":
            texts.append(record["text"])

    return listen


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: small networks gain nothing from more, and bits may differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def state_copy(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a module's parameters and buffers, by name."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Return the names under which two mappings do not hold the same tensor, to the bit."""
    return [n for n in {**one, **other} if n not in one or n not in other or not torch.equal(one[n], other[n])]


# ------------------------------------------------------------------------------------------------ plugins


def _idle(hook: str) -> Callable[[Plugin, Run], None]:
    """Return an implementation of a hook that does nothing."""

    def nothing(self: Plugin, run: Run) -> None:
        """Do nothing."""

    nothing.__name__ = hook
    return hookimpl(nothing)


class Idle(Plugin):
    """A plugin that does nothing in every hook, and so owns none."""

    name = "idle"

    def owns(self, hook: str) -> bool:
        """Return False: no hook is answered."""
        return False


class IdleObserver(Idle):
    """The same plugin beside methods that refuse any method beside them."""

    observer = True


for _hook in HOOKS:
    setattr(Idle, _hook, _idle(_hook))


@dataclass(frozen=True)
class Step:
    """One step of the optimizer.

    Attributes:
        experience: the index of the experience.
        phase: the name of the phase.
        losses: the loss terms, detached, by name; ``base`` is the first.
        batch: the batch, with the replayed rows.
    """

    experience: int
    phase: str
    losses: dict[str, Tensor]
    batch: Batch


class Recorder(Plugin):
    """An observer that keeps what happens in a run, for tests to compare.

    Attributes:
        run: the context of the run, once the run began.
        model: the network.
        steps: all steps, in order.
        before: the network's parameters and buffers as each experience began, after the head had grown.
        after: the same at its end, before the evaluation; plugins that stand after the recorder may still change them.
        evaluated: the same after the evaluation.
        phase_ends: the same after the last step of each phase, by the index of the experience and the phase's name.
        trainable: the names of the parameters that require gradients, at the first step of each experience.
        optimized: the optimizer's settings for each parameter, by name, at the first step of each experience.
        records: all records that listeners get.
    """

    name = "recorder"
    observer = True

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.evaluated: list[dict[str, Tensor]] = []
        self.phase_ends: dict[tuple[int, str], dict[str, Tensor]] = {}
        self.trainable: list[set[str]] = []
        self.optimized: list[dict[str, dict[str, Any]]] = []
        self.records: list[Event] = []

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Listen to the run's records."""
        self.run = run
        self.model = run.model
        run.listeners.append(self.records.append)

    @hookimpl
    def before_experience(self, run: Run) -> None:
        """Copy the network's state."""
        self.before.append(state_copy(run.model))

    @hookimpl
    def after_step(self, run: Run, batch: Batch) -> None:
        """Keep the step's loss terms and batch; at the ends of phases, copy the network's state."""
        if not self.steps or self.steps[-1].experience != run.experience.index:
            groups = run.optimizer.param_groups if run.optimizer else []
            self.trainable.append({name for name, p in run.model.named_parameters() if p.requires_grad})
            self.optimized.append({name: group for group in map(dict, groups) for name in group["names"]})
        self.steps.append(Step(run.experience.index, run.phase.name, dict(run.losses), batch))
        if run.step + 1 == run.steps_in_phase:
            self.phase_ends[run.experience.index, run.phase.name] = state_copy(run.model)

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Copy the network's state."""
        self.after.append(state_copy(run.model))

    @hookimpl
    def after_eval(self, run: Run) -> None:
        """Copy the network's state."""
        self.evaluated.append(state_copy(run.model))

    def changed(self, index: int) -> set[str]:
        """Return the names of the parameters and buffers that experience `index` changed or added."""
        return set(differing(self.before[index], self.after[index]))

    def changed_in_phase(self, index: int, name: str) -> set[str]:
        """Return the names of the parameters and buffers that the phase `name` of experience `index` changed."""
        before = self.before[index]
        for (experience, phase), end in self.phase_ends.items():
            if (experience, phase) == (index, name):
                return set(differing(before, end))
            if experience == index:
                before = end
        raise KeyError(f"experience {index} has no phase `{name}`")

    def losses(self, term: str) -> list[float | None]:
        """Return the values of a loss term, one for each step; None where a step did not have the term."""
        found = [step.losses.get(term) for step in self.steps]
        return [None if value is None else value.item() for value in found]

    def batches(self, experience: int) -> list[Batch]:
        """Return the batches of the experience of that index, one for each step."""
        return [step.batch for step in self.steps if step.experience == experience]

    def phase_steps(self) -> list[tuple[int, str, int]]:
        """Return the phases in order: the index of the experience, the name, and the number of steps."""
        counts: dict[tuple[int, str], int] = {}
        for step in self.steps:
            where = step.experience, step.phase
            counts[where] = counts.get(where, 0) + 1
        return [(*where, count) for where, count in counts.items()]

    def logged(self) -> dict[str, list[float]]:
        """Return the values that plugins logged, by name."""
        values: dict[str, list[float]] = {}
        for record in self.records:
            for name, value in record["values"].items() if record["kind"] == "log" else ():
                values.setdefault(name, []).append(value)
        return values

    def messages(self) -> list[str]:
        """Return the texts of the messages to the user."""
        return [record["text"] for record in self.records if record["kind"] == "message"]


class Answers(Recorder):
    """A recorder that also asks the network, after each experience, about every task so far, on the same images.

    Args:
        x: the images [B, ...] as the network takes them; None: six random ones from 0 to 1.

    Attributes:
        answers: the logits of each task's classes, by the index of the experience and the task.
        asked: the outputs of the network from which they are taken, likewise.
    """

    name = "answers"

    def __init__(self, x: Tensor | None = None) -> None:
        super().__init__()
        self.x = x
        self.answers: list[list[Tensor]] = []
        self.asked: list[list[Outputs]] = []

    @hookimpl
    def after_eval(self, run: Run) -> None:
        """Ask about every task so far; copy the network's state."""
        super().after_eval(run)
        x = self.x
        if x is None:
            x = torch.rand(6, *run.scenario.input_shape, generator=torch.Generator().manual_seed(0))
        with evaluating(run.model), torch.no_grad():
            self.asked.append([run.model(x, torch.full((len(x),), task)) for task in range(run.experience.index + 1)])
        self.answers.append([outputs.head(task).clone() for task, outputs in enumerate(self.asked[-1])])

    def changes(self, measure: Callable[[Tensor, Tensor], Any]) -> list[Any]:
        """Return `measure` of a later and the first answer to a task, for each task and each experience after it."""
        n = len(self.answers)
        return [measure(self.answers[i][j], self.answers[j][j]) for i in range(n) for j in range(i)]

    def same(self) -> bool:
        """Return whether every answer to a task is the one given when the task had just been learned, to the bit."""
        return all(self.changes(torch.equal))

    def drift(self) -> float:
        """Return the largest change of an answer to a task since the task had just been learned."""
        drifts: list[float] = self.changes(lambda later, first: (later - first).abs().max().item())
        return max(drifts)


# --------------------------------------------------------------------------------------- stops and resumes


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
def at_pauses(look: Callable[[Engine], None]) -> Iterator[None]:
    """Call `look` with the engine at each pause of the runs inside the context, before the engine saves."""
    AT_PAUSE.append(look)
    try:
        yield
    finally:
        AT_PAUSE.remove(look)


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
        pauses.calls.append(engine.run._hook_call)
        if place(engine) if callable(place) else len(pauses) == place:
            engine.signal = by

    with at_pauses(look):
        yield pauses


def stop_and_resume(
    folder: Path,
    begin: Callable[[Path], Any],
    go_on: Callable[[Path], Any],
    places: int | Callable[[Pauses], Sequence[int]],
    files: Sequence[str] = FILES,
) -> list[Path]:
    """Stop runs at several places, resume them, and assert that they end with the files of an undisturbed run.

    Args:
        folder: where the folders of the runs are made: ``whole``, and one for each place, named by it.
        begin: begins a run in the folder that it is given.
        go_on: resumes the run in the folder that it is given.
        places: how many places to stop at, spread evenly, or a function that chooses them from all pauses.
        files: the files to compare.

    Returns the folders of the runs that were stopped.
    """
    with stop_at() as pauses:
        begin(folder / "whole")
    chosen = places(pauses) if callable(places) else range(2, len(pauses), max(1, len(pauses) // places))
    assert chosen, "there is no place at which to stop"
    stopped = [folder / str(place) for place in chosen]
    for place, path in zip(chosen, stopped, strict=True):
        assert not _finishes(place, partial(begin, path)), place
        go_on(path)
        for file in files:
            assert (path / file).read_bytes() == (folder / "whole" / file).read_bytes(), (place, file)
    return stopped


def same_after_a_stop(
    folder: Path, begin: Callable[[str], Results], go_on: Callable[[Path], Results], blame: str
) -> None:
    """Raise `Broken` unless a run that is stopped, at five places, goes on to the files of the run that is not.

    All but the first and the last resume are stopped again at once, before a step is taken, and resumed once more.
    """
    with stop_at() as pauses:
        begin(str(folder / "whole"))
    last = len(pauses)
    for place in sorted({1, last // 4, last // 2, last - 2, last} - {0, -1}):
        where = f"stopped at pause {place} of {last}"
        stopped = folder / str(place)
        if _finishes(place, partial(begin, str(stopped))):
            raise Broken(f"A run {where} was not stopped: two runs of one seed take other courses. {blame}")
        try:
            if place in (1, last) or not _finishes(1, partial(go_on, stopped)):
                go_on(stopped)
        except Interrupted:
            raise
        except (ClframeError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise Broken(f"A run {where} could not be resumed: {' '.join(str(error).split())} {blame}") from error
        for file in FILES:
            same = (stopped / file).read_bytes() == (folder / "whole" / file).read_bytes()
            require(same, f"A run {where} and resumed ends with another {file} than one that was not stopped. {blame}")


def _finishes(place: int, go: Callable[[], Any]) -> bool:
    """Stop what `go` runs at its pause of that number; return whether it finished before."""
    try:
        with stop_at(place):
            go()
    except Interrupted as error:
        if error.signal != signal.SIGTERM:
            raise
        return False
    return True
