"""The loop, on one page, with the hook calls of a training run; below it what the loop is made of."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from clframe import compose, events
from clframe.checks import check_labels, check_terms
from clframe.context import Run
from clframe.data.batch import Batch, ImageData, join
from clframe.data.files import READ_AHEAD
from clframe.data.scenario import Experience, Scenario
from clframe.errors import DataError, Interrupted, RunError, UsageError
from clframe.evaluate import Evaluator, PredictorHook, Row
from clframe.model import seed_torch
from clframe.runs import checkpoint, state
from clframe.runs.folder import RunFolder
from clframe.runs.record import collect_results
from clframe.runs.results import Results
from clframe.system.signals import noting
from clframe.training import (
    Phase,
    Sampler,
    extend_optimizer,
    make_optimizer,
    rate_factor,
    trained_by,
    training_only,
)
from clframe.watch import LossWatch, Rate, Stopwatch

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
            phases = engine.in_order(engine.one_by_one("phases", experience=run.experience))
            data = ImageData.concat([experience.train.to(run.device), *extra.values()])
            for phase in phases:
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
    engine.backward(terms)
    hook.after_backward(run=run, batch=batch)
    engine.update()
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
        self.position = Position()
        self.collected: dict[str, dict[str, Any]] = {}  # this experience's answers to a hook, by plugin
        self.baseline: dict[str, list[float | None]] = {}  # the untrained network's accuracy
        self.carried: dict[str, float] | None = None  # temperatures of the run that this one extends; None: it is new
        self.timings: list[dict[str, float]] = []  # of each experience
        self.row: Row | None = None  # the latest
        self.oracle = any(plugin.keeps_experiences for plugin in run.plugins)
        self.calls = {hook: compose.callers_one_by_one(manager, run.plugins, hook) for hook in ONE_BY_ONE}
        self.origins = {
            plugin.name: k for k, plugin in enumerate(run.plugins, start=1)
        }  # the same numbers as in `Run.rows_from`
        self.unsaved = [plugin.name for plugin in run.plugins if not plugin.resumes]
        self.two_backwards = any(plugin.needs_task_gradient for plugin in run.plugins)
        self.kept_optimizer: torch.optim.Optimizer | None = None  # aside while another phase than `train` has its own
        self.trained: dict[str, nn.Parameter] = {}
        self.trainable: list[str] | None = None  # as it was before a phase froze what it does not train
        self.resumed: dict[str, Any] | None = None  # state of the phase that a resume goes on with
        self.replay_checked = False
        self.hinted: set[str] = set()  # the plugins whose hints were told
        self.silent: set[str] = set()  # the loss terms of which it was told that they are 0
        self.losses = LossWatch()
        self.clock = Stopwatch()
        self.rate = Rate()
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
        if self.oracle:
            run.earlier = [self.stream[i].for_training() for i in range(self.position.experience)]
        for index in range(self.position.experience, len(self.stream)):
            experience = self.stream[index]
            run._describe(self.stream, index)
            run.experience = experience.for_training()
            classes = list(experience.classes)
            names = [self.stream.class_names[c] for c in classes]
            run._emit(events.ExperienceBegan(index, experience.task, classes, names))
            self.tell_hints()
            self.clock.lap()
            yield experience

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
        self.timings.append({"seconds": 0.0, "images": 0})
        if index == 0:
            self.baseline = self.evaluator.baseline(predictor)
        self.clock.lap()

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

    def in_order(self, answers: Mapping[str, list[Phase]]) -> list[Phase]:
        """Return the remaining phases in order: those before ``train``, ``train``, and those after it."""
        owners: dict[str, str] = {}
        for plugin, phases in answers.items():
            for phase in phases:
                if phase.name in owners:
                    raise UsageError(
                        f"Both `{owners[phase.name]}` and `{plugin}` bring a phase `{phase.name}`; leave one out."
                    )
                owners[phase.name] = plugin
        given = [phase for phases in answers.values() for phase in phases]
        before = [p for p in given if p.place == "before" and p.name != "train"]
        after = [p for p in given if p.place == "after" and p.name != "train"]
        train = [p for p in given if p.name == "train"] or [Phase("train")]
        return [*before, *train, *after][self.position.phase :]

    @contextmanager
    def training(self, phase: Phase, data: ImageData) -> Iterator[Iterator[Batch]]:
        """Yield the batches that are left of `phase`, with its optimizer in place and everything else frozen."""
        run = self.run
        data = data if phase.data is None else phase.data.to(run.device)
        if not len(data):
            raise DataError(f"The scenario `{self.stream.name}` has no training images in {run.progress_label}.")
        run.phase = phase
        self.trained = trained_by(phase, run.model)
        self.trainable = [name for name, p in run.model.named_parameters() if p.requires_grad]
        check_labels(run, data, "the training data")
        self.replay_checked = False
        length = phase.length(run.settings)
        if not self.trained and any(phase.length(run.settings).values()):
            wanted = f" named like {', '.join(f'`{p}`' for p in phase.only)}" if phase.only else ""
            raise UsageError(
                f"The phase `{phase.name}` of {run.progress_label} trains nothing: no parameter{wanted} requires "
                "gradients."
            )
        run._sampler = Sampler(len(data), run.settings.batch_size, run.rng("loader"), run.device, **length)
        run._emit(events.PhaseBegan(phase.name, run._sampler.steps, run.experience.index))
        with training_only(run.model, self.trained.values()):
            if self.resumed is not None:  # the optimizers were restored with it
                run._sampler.load(self.resumed)
                self.resumed = None
            elif phase.name == "train" and run.optimizer is not None:
                extend_optimizer(run.optimizer, self.trained, run.settings)
            else:
                self.kept_optimizer = run.optimizer
                run.optimizer = make_optimizer(self.trained, run.settings, phase.lr) if run._sampler.steps else None
            self.rate.begin()
            yield self.batches(data)
            self.check_finite()
        self.trainable = run._sampler = None
        self.position.phase += 1
        if not (phase.name == "train" and run.settings.keep_optimizer):
            run.optimizer, self.kept_optimizer = self.kept_optimizer, None
        self.pause()

    def batches(self, data: ImageData) -> Iterator[Batch]:
        """Yield the batches of the phase under way, at the learning rate of each step."""
        run, sampler = self.run, self.run._sampler
        if sampler is None or not sampler.steps:
            return
        augment = run.rng("loader") if run.scenario.transform.augments else None
        optimizer = cast(torch.optim.Optimizer, run.optimizer)
        for where in sampler:
            if run.settings.schedule != "constant":
                factor = rate_factor(run.settings, run.step, sampler)
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * factor
            data.expect(where)
            data.expect(sampler.coming(max(READ_AHEAD, 2 * len(where))))
            yield run.scenario.transform.batch(data.rows(where), augment)

    def leave(self) -> None:
        """Finish the experience: the next one begins with a checkpoint."""
        self.tell_silent_terms()
        if self.oracle:
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

    def backward(self, terms: dict[str, Tensor]) -> None:
        """Compute the gradients of the sum of all terms; in two passes where a plugin needs those of the base loss."""
        run = self.run
        for parameter in self.trained.values():  # what the optimizer's own `zero_grad` does, in a tenth of its time
            parameter.grad = None
        if self.two_backwards:
            terms["base"].backward(retain_graph=len(terms) > 1)
            run.task_gradients = {n: p.grad.clone() for n, p in self.trained.items() if p.grad is not None}
            rest = [term for name, term in terms.items() if name != "base" and term.requires_grad]
            if rest:
                torch.stack(rest).sum().backward()
        else:
            total = terms["base"]
            for name, term in terms.items():
                total = total if name == "base" else total + term
            total.backward()
        run.losses = {name: term.detach() for name, term in terms.items()}

    def update(self) -> None:
        """Clip the gradient and take the optimizer's step."""
        run = self.run
        clip = run.settings.clip
        norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        self.losses.keep(run.losses, norm)
        # on the CPU it costs nothing to ask whether the factor, min(1, clip / (norm + 1e-6)), is 1
        if clip and not (norm.device.type == "cpu" and norm + 1e-6 <= clip):
            nn.utils.clip_grads_with_norm_(self.trained.values(), clip, norm)
        if run.optimizer is not None:
            run.optimizer.step()

    def count_step(self, batch: Batch) -> None:
        """Count the step that was taken, and record its losses and the progress when it is time."""
        run = self.run
        self.position.steps += 1
        run.total_steps += 1
        self.timings[-1]["images"] += len(batch)
        log = run.total_steps % run.config.run.log_every == 0
        if log or self.losses.full:
            self.check_finite()
        if log:
            run._emit(events.StepTaken(**self.progress()))
        if rate := self.rate.count(len(batch)):
            left = (run.steps_in_phase - run.step - 1) * len(batch) / rate
            run._emit(events.Progress(**self.progress(), images_per_second=rate, seconds_left=left))

    def progress(self) -> dict[str, Any]:
        """Return the fields of an event about the step that was taken."""
        run = self.run
        return {
            "experience": run.experience.index,
            "phase": run.phase.name,
            "epoch": run.epoch,
            "step": run.step + 1,
            "steps": run.steps_in_phase,
            "total_step": run.total_steps,
            "losses": {name: loss.item() for name, loss in run.losses.items()},
            "lr": run.optimizer.param_groups[0]["lr"] if run.optimizer else 0.0,
        }

    # ---------------------------------------------------------------------------------------- refusals

    def check_finite(self) -> None:
        """Raise `RunError` naming the loss term or gradient that was the first not to be finite, and the step."""
        found = self.losses.look(self.position.effective)
        if found is None:
            return
        run = self.run
        steps_ago, what = found
        raise RunError(
            f"The {what} became infinite or not a number in {run.progress_label}, phase `{run.phase.name}`, at step "
            f"{run.step + 1 - steps_ago} of {run.steps_in_phase}."
            f"{self.how_to_go_on()} {' '.join(self.hints()) or GENERAL_HINT}"
        )

    def tell_hints(self) -> None:
        """Emit the plugins' hints, those of each plugin once in a run."""
        for plugin in self.run.plugins:
            if plugin.name not in self.hinted and (hints := list(plugin.hints(self.run))):
                self.hinted.add(plugin.name)
                for hint in hints:
                    self.run.tell(hint)

    def tell_silent_terms(self) -> None:
        """Emit which loss terms were 0 at every step of the experience, each once in a run."""
        run = self.run
        why = ""
        if len(run.previous_classes or run.experience.classes) == 1:
            why = " Only one class was known, and a softmax over one class is always 1: begin with two classes."
        for term, effective in self.position.effective.items():
            if not effective and self.position.steps > 1 and term not in self.silent:
                self.silent.add(term)
                run.tell(f"The loss term `{term}` was 0 at every step of {run.progress_label}.{why}")

    def hints(self) -> list[str]:
        """Return the plugins' warnings about settings that may prevent learning."""
        return [hint for plugin in self.run.plugins for hint in plugin.hints(self.run)]

    def how_to_go_on(self) -> str:
        """Return a sentence on the checkpoint that is left; an empty text if there is none."""
        if self.folder is None:
            return ""
        with suppress(RunError):  # an error is under way already
            self.folder.settle()
        if self.folder.finished:
            return f" All results were written before: {self.run.folder} is the folder of a finished run."
        kept = checkpoint.find_newest(self.folder.checkpoints)
        return f" The last good checkpoint is kept: `clframe resume {self.run.folder}` starts from it." if kept else ""

    # -------------------------------------------------------------------------------------- evaluation

    def evaluate(self, predictor: PredictorHook) -> None:
        """Add a row to each accuracy matrix: of all experiences so far, and of later ones that the head covers.

        With ``train.val``, the matrices of the images held out get a row each, too.
        """
        run, index = self.run, self.run.experience.index
        self.count_seconds()
        if ["evaluate", ""] not in self.position.done:
            parts = self.evaluator.parts
            rows = {p: self.evaluator.evaluate(predictor, keep_scores=p == "test", part=p) for p in parts}
            if not self.position.steps:  # nothing was trained, so there is nothing to say of it
                rows = {part: row.blank_copy() for part, row in rows.items()}
            self.row = rows["test"]
            for part, row in rows.items():
                matrices = run.accuracy if part == "test" else run.validation
                for reading, accuracy in row.accuracy.items():
                    matrices.setdefault(reading, []).append(accuracy)
            if self.folder and run.config.run.predictions:
                self.folder.keep_scores(index, self.row)
            self.position.done.append(["evaluate", ""])
            for part, row in rows.items():
                accuracies = {str(mode): values for mode, values in row.accuracy.items()}
                run._emit(events.Evaluated(index, run.total_steps, part, accuracies))
        self.clock.lap()

    def count_seconds(self) -> None:
        """Add the seconds since the latest lap to the current experience, until it is evaluated."""
        if self.position.entered and ["evaluate", ""] not in self.position.done:
            self.timings[-1]["seconds"] += self.clock.lap()

    def evaluate_within(self, predictor: PredictorHook) -> None:
        """Record a row at the end of an epoch, where ``run.eval_every`` asks for that; it enters no matrix."""
        run = self.run
        if run.config.run.eval_every != "epoch" or (run.step + 1) % run.batches_per_epoch:
            return
        with self.clock.stopped():
            for part in self.evaluator.parts:
                for reading, accuracy in self.evaluator.evaluate(predictor, part=part).accuracy.items():
                    place = (run.experience.index, run.phase.name, run.epoch, run.total_steps)
                    run._emit(events.EpochEvaluated(*place, part, reading, accuracy))

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
            self.count_seconds()
            if not self.unsaved:
                self.folder.save(state.collect(self))
        self.last_save = time.monotonic()

    def stoppable(self) -> AbstractContextManager[None]:
        """Return a context in which a signal lets the run finish its step, save and stop; a second one stops it."""

        def note(number: int) -> None:
            if self.signal == number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        return noting(note)
