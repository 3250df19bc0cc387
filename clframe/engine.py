"""The loop, on one page, with the hook calls of a training run; below it what the loop is made of."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from clframe import compose, events
from clframe.checks import check_labels, check_terms
from clframe.context import Run
from clframe.data.batch import Batch, ImageData, join
from clframe.data.scenario import Experience, Scenario
from clframe.errors import DataError, Interrupted, RunError
from clframe.evaluate import Evaluator, PredictorHook
from clframe.model import seed_torch
from clframe.options import searched
from clframe.runs import state
from clframe.runs.folder import RunFolder, how_to_go_on
from clframe.runs.record import collect_results
from clframe.runs.results import Results
from clframe.system.signals import noting
from clframe.training import Phase, Trainer, in_order
from clframe.watch import Advice, StepReporter, Timings

ONE_BY_ONE = (  # hooks called on one plugin after another, not on all together
    "before_experience",
    "extra_data",
    "phases",
    "extra_batch",
    "after_experience",
    "after_eval",
    "after_run",
)
GENERAL_HINT = "A run with a smaller `train.lr`, or a weaker method, may stay finite."
AT_PAUSE: list[Callable[[Engine], None]] = []  # called at each pause of a run; see `clframe.testing.stop_at`


def learn(engine: Engine, begin: Callable[[], None]) -> Results:
    """Learn every experience that is left, and return the results.

    Args:
        engine: of the run.
        begin: brings the run to where it begins, or goes on: to its start, a checkpoint, or the end of another run.
    """
    run, hook = engine.run, engine.hook
    try:
        hook.before_run(run=run)
        begin()
        for experience in engine.remaining():
            if not engine.position.entered:
                engine.grow_head(run.experience)
                hook.grow(run=run, experience=run.experience)
                engine.enter(hook.predictor)
            engine.one_by_one("before_experience", experience=run.experience)
            extra = engine.one_by_one("extra_data", experience=run.experience)
            phases = in_order(engine.one_by_one("phases", experience=run.experience))
            data = ImageData.concat([experience.train.to(run.device), *extra.values()])
            for phase in phases[engine.position.phase :]:
                with engine.training(phase, data) as batches:
                    for batch in batches:
                        step(engine, batch)
            engine.one_by_one("after_experience", experience=run.experience)
            engine.evaluate(hook.predictor)
            engine.one_by_one("after_eval", experience=run.experience)
            engine.leave()
        return collect_results(engine)
    finally:
        engine.end("after_run")


def step(engine: Engine, batch: Batch) -> None:
    """Take one step of the optimizer."""
    run, hook = engine.run, engine.hook
    batch = engine.join_replay(batch, {name: call(run=run, batch=batch) for name, call in engine.calls["extra_batch"]})
    hook.before_step(run=run, batch=batch)
    outputs = run.model(batch.x, batch.task)
    base = hook.base_loss(run=run, batch=batch, outputs=outputs)
    terms = {"base": run.loss(batch, outputs) if base is None else base}
    for named in cast(list[dict[str, Tensor]], hook.penalty(run=run, batch=batch, outputs=outputs)):
        check_terms(run, terms, named)
        terms.update(named)
    engine.trainer.backward(terms)
    hook.after_backward(run=run, batch=batch)
    engine.trainer.update()
    hook.after_step(run=run, batch=batch)
    engine.count_step(batch)
    engine.evaluate_within(hook.predictor)
    engine.pause()


@dataclass
class Position:
    """The place of a run, to the hook and the tick, at which a resume continues."""

    experience: int = 0
    entered: bool = False  # the head has grown for it
    done: list[list[str]] = field(default_factory=list)  # [hook, plugin]: what is finished in this experience
    phase: int = 0  # phases that are finished in this experience
    steps: int = 0  # of this experience
    effective: dict[str, bool] = field(default_factory=dict)  # by loss term, whether it was ever nonzero


class Engine:
    """The course of one run, and its state: the parts that the loop is made of.

    Args:
        run: the context that hooks are given.
        stream: the scenario, with its images.
        folder: the open run folder; None: nothing is kept.
    """

    def __init__(self, run: Run, stream: Scenario, folder: RunFolder | None) -> None:
        self.run = run
        self.stream = stream
        self.folder = folder
        manager = compose.manager(run.plugins)
        self.hook = compose.callers(manager)
        self.evaluator = Evaluator(run, stream)
        self.trainer = Trainer(run)
        self.timings = Timings()
        self.reporter = StepReporter(run)
        self.advice = Advice(run)
        self.position = Position()
        self.collected: dict[str, dict[str, Any]] = {}  # this experience's answers to a hook, by plugin
        self.carried: dict[str, float] | None = None  # temperatures of the run that this one extends; None: it is new
        self.calls = {hook: compose.callers_one_by_one(manager, run.plugins, hook) for hook in ONE_BY_ONE}
        self.origins = {
            plugin.name: k for k, plugin in enumerate(run.plugins, start=1)
        }  # the same numbers as in `Run.rows_from`
        self.again = [plugin.name for plugin in run.plugins if plugin.keeps_experiences]  # a resume asks them again
        self.unsaved = [plugin.name for plugin in run.plugins if not plugin.resumes]
        self.replay_checked = False
        self.signal = 0
        self.last_save = time.monotonic()
        run._pause = self.pause

    # --------------------------------------------------------------------- the course of an experience

    def remaining(self) -> Iterator[Experience]:
        """Yield the experiences that are left, and describe each to the plugins."""
        run = self.run
        accuracy = {mode: list(rows) for mode, rows in run.accuracy.items()}
        validation = {mode: list(rows) for mode, rows in run.validation.items()}
        run._emit(events.Started(self.stream.name, len(self.stream), run.total_steps, accuracy, validation))
        if self.again:
            run.earlier = [self.stream[i].for_training() for i in range(self.position.experience)]
        for index in range(self.position.experience, len(self.stream)):
            experience = self.stream[index]
            run._describe(self.stream, index)
            run.experience = experience.for_training()
            self.set_options(index)
            classes = list(experience.classes)
            names = [self.stream.class_names[c] for c in classes]
            run._emit(events.ExperienceBegan(index, experience.task, classes, names))
            self.advice.tell_hints()
            self.timings.count()
            yield experience

    def set_options(self, index: int) -> None:
        """Give plugins the options that the experience has of its own (`run.per_experience`), else those of the run."""
        if self.run.config.run.per_experience is None:
            return
        changes = self.run.config.run.changes_of(index)
        for plugin in self.run.plugins:
            for option, parameter in searched(type(plugin)).items():
                setattr(plugin, parameter, changes.get(f"{plugin.name}.{option}", plugin.options[parameter]))

    def grow_head(self, experience: Experience) -> None:
        """Thaw what plugins froze, and grow the head for `experience`; repeated on resume and load, before ``grow``.

        New weights depend on the seed and on the size of the head alone.
        """
        run = self.run
        run._thaw()
        known = run.scenario.classes
        coming = known if run.logits == "all" else known[: experience.index + 1]
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            for classes in coming:
                new = max(classes) + 1 - run.model.n_classes
                if new > 0:
                    seed_torch(run.config.run.seed * 1_000_003 + run.model.n_classes + 1, run.device)
                    run.model.grow(new).to(run.device)
        run.model.grown = experience.index + 1

    def enter(self, predictor: PredictorHook) -> None:
        """Begin the experience for which the head has grown; before the first one, evaluate the untrained network."""
        index = self.run.experience.index
        self.position = Position(index, entered=True)
        if index == 0:
            self.evaluator.measure_untrained(predictor)
        self.timings.begin()

    def one_by_one(self, hook: str, **arguments: Any) -> dict[str, Any]:
        """Call `hook` of one plugin after another, without those done before a resume; return the answers by plugin."""
        run = self.run
        answers = self.collected.setdefault(hook, {})
        for name, call in self.calls[hook]:
            if [hook, name] in self.position.done:
                continue
            run._hook_call = f"{hook}/{name}/"
            for answer in call(run=run, **arguments):  # at most one, as pluggy drops None
                marked = isinstance(answer, ImageData)
                answers[name] = answer.to(run.device).marked(self.origins[name]) if marked else answer
            self.position.done.append([hook, name])
            run._tick_done = {tick: i for tick, i in run._tick_done.items() if not tick.startswith(run._hook_call)}
            run._hook_call = ""
            self.pause()
        return {plugin.name: answers[plugin.name] for plugin in run.plugins if plugin.name in answers}

    @contextmanager
    def training(self, phase: Phase, data: ImageData) -> Iterator[Iterator[Batch]]:
        """Yield the batches that are left of `phase`, with its optimizer in place and everything else frozen."""
        run = self.run
        data = data if phase.data is None else phase.data.to(run.device)
        if not len(data):
            raise DataError(
                f"The scenario `{self.stream.name}` has no training images in {run.progress_label}; add some."
            )
        check_labels(run, data, "the training data")
        self.replay_checked = False
        with self.trainer.training(phase, data) as batches:
            self.reporter.begin_phase()
            yield batches
            self.check_finite()
        self.position.phase += 1
        self.pause()

    def leave(self) -> None:
        """Finish the experience: the next one begins with a checkpoint."""
        if self.position.steps > 1:
            self.advice.tell_silent_terms(self.position.effective)
        if self.again:
            self.run.earlier.append(self.run.experience)
        self.position = Position(self.position.experience + 1)
        self.collected.clear()
        self.save()
        self.pause()

    # --------------------------------------------------------------------------------- parts of a step

    def join_replay(self, batch: Batch, answers: Mapping[str, list[Batch]]) -> Batch:
        """Return `batch` joined by the rows that plugins add, each marked with its origin."""
        extra = []
        for name, given in answers.items():
            for rows in given:
                rows.origin = torch.full_like(rows.y, self.origins[name])
                extra.append(rows)
                if not self.replay_checked:
                    check_labels(self.run, rows, f"what `{name}` adds to a batch")
        self.replay_checked = bool(extra)
        return join([batch, *extra])

    def count_step(self, batch: Batch) -> None:
        """Count the step that was taken, and record its losses and the progress when it is time."""
        run = self.run
        self.position.steps += 1
        run.total_steps += 1
        self.timings.rows[-1]["images"] += len(batch)
        log = run.total_steps % run.config.run.log_every == 0
        if log or self.trainer.watch.full:
            self.check_finite()
        self.reporter.report(len(batch), log=log)

    # ---------------------------------------------------------------------------------------- refusals

    def check_finite(self) -> None:
        """Raise `RunError` naming the loss term or gradient that was the first not to be finite, and the step."""
        found = self.trainer.watch.look(self.position.effective)
        if found is None:
            return
        run = self.run
        steps_ago, what = found
        raise RunError(
            f"The {what} became infinite or not a number in {run.progress_label}, phase `{run.phase.name}`, at step "
            f"{run.step + 1 - steps_ago} of {run.steps_in_phase}."
            f"{how_to_go_on(self.folder)} {' '.join(self.advice.hints()) or GENERAL_HINT}"
        )

    # -------------------------------------------------------------------------------------- evaluation

    def evaluate(self, predictor: PredictorHook) -> None:
        """Add a row to each accuracy matrix, and keep its scores, unless a run that was resumed has it already."""
        self.timings.end()
        if ["evaluate", ""] in self.position.done:
            return
        row = self.evaluator.add_rows(predictor, blank=not self.position.steps)
        if self.folder and self.run.config.run.predictions:
            self.folder.keep_scores(self.position.experience, row)
        self.position.done.append(["evaluate", ""])

    def evaluate_within(self, predictor: PredictorHook) -> None:
        """Record a row while learning, where ``run.eval_every`` asks for that."""
        if self.evaluator.is_due(self.position.steps):
            with self.timings.stopped():
                self.evaluator.record(predictor)

    # ----------------------------------------------------------------------------- saving and stopping

    def end(self, hook: str) -> None:
        """Call `hook`, the last one, of every plugin, also after an error; then raise the first of their errors."""
        first: Exception | None = None
        for _, call in self.calls[hook]:
            try:
                call(run=self.run)
            except Exception as error:
                first = first or error
        self.run._thaw()
        if first is not None and sys.exc_info()[1] is None:  # an error under way must not be replaced
            raise first

    def pause(self) -> None:
        """Stop between two pieces of work if a signal asked for it, and save if it is time."""
        for look in AT_PAUSE:
            look(self)
        if self.signal:
            self.save()
            if self.folder:
                self.folder.settle()
            name = signal.Signals(self.signal).name
            if self.unsaved:
                how = f"a run with `{self.unsaved[0]}` cannot be resumed"
            elif self.folder:
                how = f"`clframe resume {self.folder.path}` goes on from here"
            else:
                how = "this run keeps no folder"
            raise Interrupted(f"Stopped by {name} in {self.run.progress_label}; {how}.", self.signal)
        if time.monotonic() - self.last_save >= self.run.config.run.checkpoint_every:
            self.save()

    def save(self) -> None:
        """Begin to write a checkpoint if the run has a folder and can be resumed.

        Raises `RunError` if a loss or gradient is not finite, or an earlier write failed.
        """
        if self.folder:
            self.check_finite()
            self.timings.count()
            if not self.unsaved:
                self.folder.save(self.state())
        self.last_save = time.monotonic()

    def state(self) -> dict[str, Any]:
        """Return everything that decides how the run continues."""
        run, folder = self.run, self.folder
        kept = {plugin.name: plugin for plugin in run.plugins}
        return {
            "position": {
                **asdict(self.position),
                "done": [[hook, name] for hook, name in self.position.done if not self._asked_again(hook, name)],
            },
            "model": dict(run.model.state_dict()),
            **run._state(),
            **self.trainer.state(),
            "extra_data": {
                name: data
                for name, data in self.collected.get("extra_data", {}).items()
                if not self._asked_again("extra_data", name)
            },
            "phases": {n: [vars(phase) for phase in given] for n, given in self.collected.get("phases", {}).items()},
            **self.evaluator.state(),
            **self.timings.state(),
            "plugins": {name: state.read_plugin_state(plugin, plugin.state) for name, plugin in kept.items()},
            "config": folder.config_sum() if folder else None,
            "metrics": folder.metrics_size() if folder else 0,
        }

    def load(self, values: Mapping[str, Any]) -> None:
        """Continue from the state `values`, when the network has grown and the plugins have their own."""
        self.run._load(values)
        self.trainer.load(values)
        self.evaluator.load(values)
        self.timings.load(values)
        if self.position.entered and ["evaluate", ""] not in self.position.done:
            self.timings.go_on()
        self.collected = {
            "extra_data": values["extra_data"],
            "phases": {name: [Phase(**given) for given in phases] for name, phases in values["phases"].items()},
        }

    def _asked_again(self, hook: str, plugin: str) -> bool:
        """Return whether a resume calls `hook` of `plugin` again, as no checkpoint holds its answer."""
        return hook == "extra_data" and plugin in self.again

    def stoppable(self) -> AbstractContextManager[None]:
        """Return a context in which a signal lets the run finish its step, save and stop; a second one stops it."""

        def note(number: int) -> None:
            if self.signal == number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        return noting(note)
