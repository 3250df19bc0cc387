"""The loop, on one page, with every hook call of the program; below it what the loop is made of."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from clframe import compose
from clframe.context import Run
from clframe.data.batch import Batch, ImageData, join
from clframe.data.files import READ_AHEAD
from clframe.data.scenario import Experience, Scenario
from clframe.errors import DataError, Interrupted, RunError, UsageError
from clframe.evaluate import EvalPart, ModelPredictor, Readings, Row, evaluate, n_answerable
from clframe.model import seed_torch
from clframe.runs import checkpoint, state
from clframe.runs.folder import RunFolder
from clframe.training import (
    Phase,
    Sampler,
    extend_optimizer,
    make_optimizer,
    rate_factor,
    trained_by,
    training_only,
)

ONE_BY_ONE = (  # hooks that are called of one plugin after the other, and not of all together
    "before_experience",
    "extra_data",
    "phases",
    "extra_batch",
    "after_experience",
    "after_eval",
    "after_run",
)
GENERAL_HINT = "A run with a smaller `train.lr`, or a weaker method, may stay finite."
PULSE = 0.25  # seconds between two records of progress
UNCHECKED = 256  # steps at most whose losses are kept before they are looked at
AT_PAUSE: list[Callable[[Engine], None]] = []  # called at each pause of a run; see `clframe.testing.stop_at`


def learn(engine: Engine) -> None:
    """All experiences that are left."""
    run = engine.run
    for experience in engine.enter_each():  # the head has grown for it, and `grow` was called
        engine.each("before_experience", experience=run.experience)
        extra = engine.each("extra_data", experience=run.experience)
        phases = engine.in_order(engine.each("phases", experience=run.experience))
        data = ImageData.concat([experience.train.to(run.device), *extra.values()])
        for phase in phases:
            with engine.training(phase, data) as batches:
                for batch in batches:
                    step(engine, batch)
        engine.each("after_experience", experience=run.experience)
        engine.evaluate()  # through what `predictor` gives
        engine.each("after_eval", experience=run.experience)
        engine.leave()


def step(engine: Engine, batch: Batch) -> None:
    """One step of the optimizer."""
    run, hook = engine.run, engine.hook
    batch = engine.join_replay(batch, {name: call(run=run, batch=batch) for name, call in engine.replays})
    outputs = run.model(batch.x, batch.task)
    base = hook.base_loss(run=run, batch=batch, outputs=outputs)
    terms = {"base": run.loss(batch, outputs) if base is None else base}
    for named in cast(list[dict[str, Tensor]], hook.penalty(run=run, batch=batch, outputs=outputs)):
        engine.check_terms(terms, named)
        terms.update(named)
    engine.backward(terms)
    hook.after_backward(run=run, batch=batch)
    engine.update()
    hook.after_step(run=run, batch=batch)
    engine.finish_step(batch)


@dataclass
class Position:
    """Where a run stands, to the hook and the tick: what a checkpoint needs to go on at the same place."""

    experience: int = 0
    entered: bool = False  # the head has grown for it
    done: list[list[str]] = field(default_factory=list)  # [hook, plugin]: what is finished in this experience
    phase: int = 0  # phases that are finished in this experience
    steps: int = 0  # of this experience
    effective: dict[str, bool] = field(default_factory=dict)  # its loss terms: whether one was ever another than 0


class Engine:
    """What the loop is made of: the course of one run, and its state.

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
        self.readings = Readings(stream.setting, stream.classes)
        self.position = Position()
        self.collected: dict[str, dict[str, Any]] = {}  # this experience's answers to a hook, by plugin
        self.baseline: dict[str, list[float | None]] = {}  # the untrained network's accuracy
        self.carried: dict[str, float] | None = None  # temperatures of the run that this one extends; None: it is new
        self.timings: list[dict[str, float]] = []  # of each experience
        self.row: Row | None = None  # the latest
        self.oracle = any(plugin.keeps_experiences for plugin in run.plugins)
        self.callers = {hook: compose.callers_one_by_one(manager, run.plugins, hook) for hook in ONE_BY_ONE}
        self.replays = self.callers["extra_batch"]
        self.origins = {plugin.name: k for k, plugin in enumerate(run.plugins, start=1)}  # as `Run.of` knows them
        self.unsaved = [plugin.name for plugin in run.plugins if not plugin.resumes]
        self.two_backwards = any(plugin.needs_task_gradient for plugin in run.plugins)
        self.kept_optimizer: torch.optim.Optimizer | None = None  # aside while another phase than `train` has its own
        self.trained: dict[str, nn.Parameter] = {}
        self.trainable: list[str] | None = None  # as it was before a phase froze what it does not train
        self.resumed: dict[str, Any] | None = None  # state of the phase that a resume goes on with
        self.replay_checked = False
        self.hinted: set[str] = set()  # the plugins whose hints were told
        self.silent: set[str] = set()  # the loss terms of which it was told that they are 0
        self.unchecked: list[tuple[tuple[str, ...], Tensor]] = []  # of each step; see `watch_finite`
        self.signal = 0
        self.last_save = self.last_pulse = time.monotonic()
        self.in_step_since: float | None = None  # the end of the phase's first step, in which torch prepares itself
        self.images_since = 0
        run.pause = self.pause

    # --------------------------------------------------------------------- the course of an experience

    def enter_each(self) -> Iterator[Experience]:
        """The experiences that are left, each when the head has grown for it."""
        run = self.run
        run.emit(
            "start",
            scenario=self.stream.name,
            n_experiences=len(self.stream),
            total_step=run.total_steps,
            accuracy={reading: list(rows) for reading, rows in run.accuracy.items()},
            validation={reading: list(rows) for reading, rows in run.validation.items()},
        )
        if self.oracle:
            run.earlier = [self.stream[i].for_training() for i in range(self.position.experience)]
        for index in range(self.position.experience, len(self.stream)):
            experience = self.stream[index]
            run.describe(self.stream, index)
            run.experience = experience.for_training()
            classes, names = list(experience.classes), [self.stream.class_names[c] for c in experience.classes]
            run.emit("experience", index=index, task=experience.task, classes=classes, class_names=names)
            self.tell_hints()
            if not self.position.entered:
                self.grow(run.experience)
                self.position = Position(index, entered=True)
                self.timings.append({"seconds": 0.0, "images": 0})
                if index == 0:
                    self.evaluate_untrained()
            self.clock = time.monotonic()
            yield experience

    def grow(self, experience: Experience) -> None:
        """Grow the head by what `experience` brings and call ``grow``; replayed on resume and load.

        New weights depend on the seed and on the size of the head alone.
        """
        run = self.run
        known = run.scenario.classes
        coming = known if run.logits == "all" else known[: experience.index + 1]
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            for classes in coming:
                new = max(classes) + 1 - run.model.n_classes
                if new > 0:
                    seed_torch(run.config.run.seed * 1_000_003 + run.model.n_classes + 1, run.device)
                    run.model.grow(new).to(run.device)
        self.hook.grow(run=run, experience=experience)
        run.model.grown = experience.index + 1

    def each(self, hook: str, **arguments: Any) -> dict[str, Any]:
        """Call `hook` of one plugin after the other, but not again what was done before a resume; answers by plugin."""
        run = self.run
        answers = self.collected.setdefault(hook, {})
        for name, call in self.callers[hook]:
            if [hook, name] in self.position.done:
                continue
            run.hook_call = f"{hook}/{name}/"
            for answer in call(run=run, **arguments):  # at most one, as pluggy drops None
                marked = isinstance(answer, ImageData)
                answers[name] = answer.to(run.device).marked(self.origins[name]) if marked else answer
            self.position.done.append([hook, name])
            run.tick_done = {tick: i for tick, i in run.tick_done.items() if not tick.startswith(run.hook_call)}
            run.hook_call = ""
            self.pause()
        return {plugin.name: answers[plugin.name] for plugin in run.plugins if plugin.name in answers}

    def in_order(self, answers: Mapping[str, list[Phase]]) -> list[Phase]:
        """The phases that are left of this experience: the plugins' before and after the one named ``train``."""
        owners: dict[str, str] = {}
        for plugin, phases in answers.items():
            for phase in phases:
                if phase.name in owners:
                    raise UsageError(
                        f"Both `{owners[phase.name]}` and `{plugin}` bring a phase `{phase.name}`; name one of them."
                    )
                owners[phase.name] = plugin
        given = [phase for phases in answers.values() for phase in phases]
        before = [p for p in given if p.place == "before" and p.name != "train"]
        after = [p for p in given if p.place == "after" and p.name != "train"]
        train = [p for p in given if p.name == "train"] or [Phase("train")]
        return [*before, *train, *after][self.position.phase :]

    @contextmanager
    def training(self, phase: Phase, data: ImageData) -> Iterator[Iterator[Batch]]:
        """The batches of `phase` that are left, with its optimizer in place and all that it does not train frozen."""
        run = self.run
        data = data if phase.data is None else phase.data.to(run.device)
        if not len(data):
            raise DataError(f"The scenario `{self.stream.name}` has no training images in {run.progress_label}.")
        run.phase = phase
        self.trained = trained_by(phase, run.model)
        self.trainable = [name for name, p in run.model.named_parameters() if p.requires_grad]
        self.check_labels(data, "the training data")
        self.replay_checked = False
        length = phase.length(run.settings)
        if not self.trained and any(phase.length(run.settings).values()):
            wanted = f" named like {', '.join(f'`{p}`' for p in phase.only)}" if phase.only else ""
            raise UsageError(
                f"The phase `{phase.name}` of {run.progress_label} trains nothing: no parameter{wanted} requires "
                "gradients."
            )
        run.sampler = Sampler(len(data), run.settings.batch_size, run.rng("loader"), run.device, **length)
        run.emit("phase", name=phase.name, steps=run.sampler.steps, experience=run.experience.index)
        with training_only(run.model, self.trained.values()):
            if self.resumed is not None:  # the optimizers were restored with it
                run.sampler.load(self.resumed)
                self.resumed = None
            elif phase.name == "train" and run.optimizer is not None:
                extend_optimizer(run.optimizer, self.trained, run.settings)
            else:
                self.kept_optimizer = run.optimizer
                run.optimizer = make_optimizer(self.trained, run.settings, phase.lr) if run.sampler.steps else None
            self.in_step_since, self.images_since = None, 0
            yield self.batches(data)
            self.check_finite()
        self.trainable = run.sampler = None
        self.position.phase += 1
        if not (phase.name == "train" and run.settings.keep_optimizer):
            run.optimizer, self.kept_optimizer = self.kept_optimizer, None
        self.pause()

    def batches(self, data: ImageData) -> Iterator[Batch]:
        """The batches of the phase under way, at the learning rate of each step."""
        run, sampler = self.run, self.run.sampler
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
        """The experience is finished: the next one begins with a checkpoint."""
        self.tell_silent_terms()
        if self.oracle:
            self.run.earlier.append(self.run.experience)
        self.position = Position(self.position.experience + 1)
        self.collected.clear()
        self.save()
        self.pause()

    # --------------------------------------------------------------------------------- parts of a step

    def join_replay(self, batch: Batch, answers: Mapping[str, list[Batch]]) -> Batch:
        """`batch` and the rows that plugins add to it, each marked with its origin."""
        extra = []
        for name, given in answers.items():
            for rows in given:
                rows.origin = torch.full_like(rows.y, self.origins[name])
                extra.append(rows)
                if not self.replay_checked:
                    self.check_labels(rows, f"what `{name}` adds to a batch")
        self.replay_checked = bool(extra)
        return join([batch, *extra])

    def backward(self, terms: dict[str, Tensor]) -> None:
        """Gradients of the sum of all terms; in two parts where a plugin wants the base loss's own."""
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
        """Clip the gradient and step."""
        run = self.run
        clip = run.settings.clip
        norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        self.watch_finite(norm)
        # on the CPU it costs nothing to ask whether the factor, min(1, clip / (norm + 1e-6)), is 1
        if clip and not (norm.device.type == "cpu" and norm + 1e-6 <= clip):
            nn.utils.clip_grads_with_norm_(self.trained.values(), clip, norm)
        if run.optimizer is not None:
            run.optimizer.step()

    def finish_step(self, batch: Batch) -> None:
        """Count, record, evaluate and save when it is time."""
        run = self.run
        self.position.steps += 1
        run.total_steps += 1
        self.timings[-1]["images"] += len(batch)
        log = run.total_steps % run.config.run.log_every == 0
        if log or len(self.unchecked) == UNCHECKED:
            self.check_finite()
        if log:
            run.emit("step", **self.progress())
        now = time.monotonic()
        if self.in_step_since is None:
            self.in_step_since = now
        else:
            self.images_since += len(batch)
        if self.images_since and now - self.last_pulse >= PULSE:
            self.last_pulse = now
            rate = self.images_since / (now - self.in_step_since)
            left = (run.steps_in_phase - run.step - 1) * len(batch) / rate
            run.emit("progress", **self.progress(), images_per_second=rate, seconds_left=left)
        sampler = cast(Sampler, run.sampler)
        if run.config.run.eval_every == "epoch" and sampler.step % sampler.batches_per_epoch == 0:
            self.evaluate_within()
        self.pause()

    def progress(self) -> dict[str, Any]:
        """The fields of a record about the step that was taken."""
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

    def check_labels(self, data: ImageData | Batch, what: str) -> None:
        """Refuse rows whose label the head lacks, or the chosen logits mask: their loss would be infinite."""
        mask = self.run.mask(data.task)
        n_classes = self.run.model.n_classes
        inside = (data.y >= 0) & (data.y < n_classes)
        if not inside.all():
            raise UsageError(
                f"Label {int(data.y[~inside][0])} in {what} of {self.run.progress_label} is no class of the head, "
                f"which has 0 to {n_classes - 1}: correct the labels, or the classes that the scenario declares."
            )
        if mask is not None:
            inside = mask[data.y] if mask.dim() == 1 else mask.gather(1, data.y[:, None]).squeeze(1)
        if not inside.all():
            label = int(data.y[~inside][0])
            raise UsageError(
                f"Label {label} in {what} of {self.run.progress_label} is masked by "
                f"`train.logits={self.run.logits}`: choose `seen` or `all`."
            )

    def check_terms(self, terms: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
        """Refuse an answer to ``penalty`` that is no dict of new names to scalars: it would replace another term."""
        if not isinstance(named, dict):
            raise UsageError(
                f"A `penalty` hook gave a {type(named).__name__} in {self.run.progress_label}; "
                "it must give a dict of names to scalars, or None."
            )
        for name, term in named.items():
            if name in terms:
                raise UsageError(
                    f"There are two loss terms `{name}` in {self.run.progress_label}; name one by its plugin."
                )
            if term.dim():
                raise UsageError(f"The loss term `{name}` has the shape {list(term.shape)}; it must be a scalar.")

    def watch_finite(self, norm: Tensor) -> None:
        """Keep the step's loss terms and its gradient's norm, on the device, until `check_finite` looks at them."""
        losses = self.run.losses
        # one new tensor: a term may be a view of something large, or of what its plugin will write into
        values = torch.stack([value.to(norm.device, torch.float32) for value in (*losses.values(), norm)])
        self.unchecked.append((tuple(losses), values))

    def check_finite(self) -> None:
        """Raise `RunError` naming what was the first not to be finite, and the step; note which terms are not 0."""
        steps, self.unchecked = self.unchecked, []
        if not steps:
            return
        every = torch.cat([values for _, values in steps]).cpu()
        if every.isfinite().all():
            effective, nonzero = self.position.effective, iter(every.ne(0).tolist())
            for terms, _ in steps:
                effective.update({term: next(nonzero) | effective.get(term, False) for term in terms})
                next(nonzero)  # of the gradient
            return
        first = next(i for i, (_, values) in enumerate(steps) if not values.isfinite().all())
        terms, values = steps[first]
        names = [*(f"loss term `{term}`" for term in terms), "gradient"]
        raise RunError(
            f"The {names[values.isfinite().tolist().index(False)]} became infinite or not a number in "
            f"{self.run.progress_label}, phase `{self.run.phase.name}`, at step "
            f"{self.run.step + 2 - len(steps) + first} of {self.run.steps_in_phase}."
            f"{self.how_to_go_on()} {' '.join(self.hints()) or GENERAL_HINT}"
        )

    def tell_hints(self) -> None:
        """Emit the plugins' hints, those of each plugin once in a run."""
        for plugin in self.run.plugins:
            if plugin.name not in self.hinted and (hints := list(plugin.hints(self.run))):
                self.hinted.add(plugin.name)
                for hint in hints:
                    self.run.emit("message", text=hint)

    def tell_silent_terms(self) -> None:
        """Emit which loss terms were 0 at every step of the experience, each once in a run."""
        run = self.run
        why = ""
        if len(run.previous_classes or run.experience.classes) == 1:
            why = " Only one class was known, and a softmax over one class is always 1: begin with two classes."
        for term, effective in self.position.effective.items():
            if not effective and self.position.steps > 1 and term not in self.silent:
                self.silent.add(term)
                run.emit("message", text=f"The loss term `{term}` was 0 at every step of {run.progress_label}.{why}")

    def hints(self) -> list[str]:
        """What plugins know to keep the run from learning."""
        return [hint for plugin in self.run.plugins for hint in plugin.hints(self.run)]

    def how_to_go_on(self) -> str:
        """A sentence on the checkpoint that is left, or nothing if there is none."""
        if self.folder is None:
            return ""
        with suppress(RunError):  # an error is under way already
            self.folder.settle()
        if self.folder.finished:
            return f" All results were written before: {self.run.folder} is the folder of a finished run."
        kept = checkpoint.newest(self.folder.checkpoints)
        return f" The last good checkpoint is kept: `clframe resume {self.run.folder}` starts from it." if kept else ""

    # -------------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> None:
        """Add a row to each accuracy matrix: of all experiences so far, and of later ones that the head covers.

        With ``train.val``, the matrices of the images held out get a row each, too.
        """
        run, index = self.run, self.run.experience.index
        self.count_seconds()
        if ["evaluate", ""] not in self.position.done:
            rows = {part: self.evaluated(keep_scores=part == "test", part=part) for part in self.parts()}
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
                accuracies = dict(row.accuracy)
                run.emit("eval", experience=index, total_step=run.total_steps, part=part, rows=accuracies)
        self.clock = time.monotonic()

    def count_seconds(self) -> None:
        """Add the time since the clock was set to the experience's, up to its evaluation."""
        if self.position.entered and ["evaluate", ""] not in self.position.done:
            now = time.monotonic()
            self.timings[-1]["seconds"] += now - self.clock
            self.clock = now

    def parts(self) -> list[EvalPart]:
        """Return which images of each experience are evaluated: with ``train.val`` also those held out."""
        return ["test", "val"] if self.stream.val_share else ["test"]

    def evaluated(self, keep_scores: bool, part: EvalPart = "test") -> Row:
        """One evaluation of everything that the head covers, through the predictor, on test or validation images."""
        run = self.run
        return evaluate(
            self.predictor(),
            self.stream,
            self.readings,
            run.experience.index,
            run.model.n_classes,
            run.device,
            run.config.run.eval_batch_size,
            keep_scores,
            part,
        )

    def predictor(self) -> nn.Module:
        """What answers for the run: a plugin's predictor, else the model itself."""
        answer = self.hook.predictor(run=self.run)
        return ModelPredictor(self.run.model) if answer is None else answer

    def evaluate_within(self) -> None:
        """A row after an epoch, which is only recorded."""
        run = self.run
        began = time.monotonic()
        for part in self.parts():
            for reading, accuracy in self.evaluated(keep_scores=False, part=part).accuracy.items():
                run.emit(
                    "within",
                    experience=run.experience.index,
                    phase=run.phase.name,
                    epoch=run.epoch,
                    total_step=run.total_steps,
                    part=part,
                    reading=reading,
                    row=accuracy,
                )
        self.clock += time.monotonic() - began

    def evaluate_untrained(self) -> None:
        """The untrained network's accuracy where it covers later experiences: the baseline of forward transfer."""
        last, n_classes = len(self.stream) - 1, self.run.model.n_classes
        if not last or not self.readings.covers(self.readings.common, 0, last, n_classes):
            return
        n_classes = n_answerable(self.predictor(), n_classes)
        if self.readings.covers(self.readings.common, 0, last, n_classes):
            accuracy = self.evaluated(keep_scores=False).accuracy
            self.baseline = {r: row for r, row in accuracy.items() if self.readings.covers(r, 0, last, n_classes)}

    # ----------------------------------------------------------------------------- saving and stopping

    def close(self) -> None:
        """Call ``after_run`` of every plugin, also after an error; the first error is raised when all were called."""
        first: Exception | None = None
        for _, call in self.callers["after_run"]:
            try:
                call(run=self.run)
            except Exception as error:
                first = first or error
        if first is not None and sys.exc_info()[1] is None:  # an error under way must not be replaced
            raise first

    def pause(self) -> None:
        """Between two pieces of work: stop if a signal asked for it, save if it is time."""
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
        """Begin to write a checkpoint, if the run has a folder, can be resumed, and everything is finite."""
        if self.folder:
            self.check_finite()
            self.count_seconds()
            if not self.unsaved:
                self.folder.save(state.take(self))
        self.last_save = time.monotonic()

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP finish the step, save and stop; a second SIGINT stops at once, without saving."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.signal == number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can be told of signals
            return
        before = {number: signal.signal(number, note) for number in stopping()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def stopping() -> list[signal.Signals]:
    """Return the signals that ask a process to end; without SIGHUP where it is ignored, as under `nohup`."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    hang_up: signal.Signals | None = getattr(signal, "SIGHUP", None)  # which Windows lacks
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        numbers.append(hang_up)
    return numbers
