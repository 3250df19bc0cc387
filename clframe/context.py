"""`Run`: the context that every hook is given."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe.curve import Evaluations
from clframe.data.batch import Batch, ImageData
from clframe.data.pictures import draw_grid
from clframe.data.scenario import Experience, Scenario
from clframe.events import Event, ImagesLogged, Listener, Logged, Message, Tick
from clframe.model import IncrementalNet, Outputs, class_mask, evaluating, freeze, masked, thaw
from clframe.plugin import Plugin
from clframe.renamed import OF_RUNS, now_called
from clframe.settings import Config, TrainSettings
from clframe.training import Phase, Sampler


class Run:
    """The context of a run: what hooks may read, and what they may ask for.

    Attributes:
        model: the network.
        scenario: its description, without images; in an extended run, what was known when the current experience was
            learned.
        experience: the one being learned, without test images.
        earlier: the experiences learned before it; only for plugins that declare ``keeps_experiences``.
        phase: the stretch of training under way.
        optimizer: of the phase; a plugin may set it to None in ``before_experience`` to have a kept one built again.
        accuracy: by evaluation mode, the rows of `R[i][j]` so far, from 0 to 1, None where empty.
        validation: likewise, on the training images that ``train.val`` holds out; empty without it.
        evaluations: all evaluations so far, for the measures while learning; None with ``run.eval_every=experience``.
        losses: detached scalars of the latest step, by the name of the term.
        task_gradients: gradients of the base loss alone, by parameter name, where a plugin has ``needs_task_gradient``.
        total_steps: steps of the whole run so far.
        config: the whole configuration.
        folder: the run folder; None if the run keeps none.
        is_loaded: whether this is a finished run that was loaded, in which nothing is trained.
        device: where model and data are.
        plugins: in the order of calling.
        listeners: called with each event of the run (`clframe.events`); see `log`.
    """

    def __init__(
        self,
        config: Config,
        scenario: Scenario,
        model: IncrementalNet,
        plugins: Sequence[Plugin],
        device: torch.device,
        listeners: Sequence[Listener] = (),
        folder: Path | None = None,
    ) -> None:
        self.config = config
        self._settings: dict[int, TrainSettings] = {}  # by experience, as steps ask for them
        self.device = device
        self._describe(scenario, 0)
        self.model = model.to(device).train()
        self.plugins = tuple(plugins)
        self.listeners = list(listeners)
        self.folder = folder
        self.experience: Experience = self.scenario[0]
        self.earlier: list[Experience] = []
        self.phase = Phase("train")
        self.optimizer: torch.optim.Optimizer | None = None
        self.accuracy: dict[str, list[list[float | None]]] = {}
        self.validation: dict[str, list[list[float | None]]] = {}
        self.evaluations: Evaluations | None = None
        self._begin_evaluations()
        self.losses: dict[str, Tensor] = {}
        self.task_gradients: dict[str, Tensor] = {}
        self.total_steps = 0
        wanted = [logits for plugin in plugins if (logits := plugin.wanted_logits(self))]
        default = wanted[0] if wanted else "own" if scenario.setting == "task" else "seen"
        self.logits: str = config.train.logits or default
        self._generators: dict[str, torch.Generator] = {}
        self._sampler: Sampler | None = None
        self.is_loaded = False
        self.frozen: list[str] = []  # names of parameters that `freeze` froze for the experience
        self._hook_call = ""  # the call that a resume would repeat; within a step, or in another hook, there is none
        self._tick_done: dict[str, int] = {}  # by `_hook_call` and name
        self._pause: Callable[[], None] = lambda: None  # set by the engine: save or stop, if it is time

    def _describe(self, scenario: Scenario, index: int) -> None:
        """Expose only what was known of `scenario` at experience `index`; later extensions stay hidden."""
        self.scenario = scenario.described(index)
        n_classes = len(self.scenario.class_names)
        self._classes_of_task = torch.stack(
            [class_mask(classes, n_classes, self.device) for classes in self.scenario.classes]
        )

    def _begin_evaluations(self) -> None:
        """Begin to collect the evaluations while learning, if the configuration asks for any."""
        run = self.config.run
        self.evaluations = None if run.eval_every == "experience" else Evaluations(run.eval_every, run.eval_images)

    @property
    def step(self) -> int:
        """The step of the phase under way, from 0."""
        return self._sampler.step - 1 if self._sampler else 0

    @property
    def steps_in_phase(self) -> int:
        """Steps of the phase under way."""
        return self._sampler.steps if self._sampler else 0

    @property
    def batches_per_epoch(self) -> int:
        """Steps in an epoch of the phase under way; 1 between phases."""
        return self._sampler.batches_per_epoch if self._sampler else 1

    @property
    def epoch(self) -> int:
        """Epoch of the step under way, from 0."""
        return self.step // self.batches_per_epoch

    if not TYPE_CHECKING:  # for type checkers, only what is defined exists

        def __getattr__(self, name: str) -> Any:
            if name in OF_RUNS:
                raise AttributeError(now_called(f"run.{name}", f"run.{OF_RUNS[name]}"))
            raise AttributeError(f"`Run` has no attribute {name!r}")

    @property
    def progress_label(self) -> str:
        """The experience under way as people count: ``experience 1 of 5`` has index 0."""
        return f"experience {self.experience.index + 1} of {len(self.scenario)}"

    @property
    def settings(self) -> TrainSettings:
        """The training settings of the experience under way."""
        index = self.experience.index
        if index not in self._settings:
            self._settings[index] = self.config.train_of(index)
        return self._settings[index]

    @property
    def previous_classes(self) -> list[int]:
        """Labels of the experiences before the one under way; in the domain setting all, from the second one on."""
        return sorted({c for group in self.scenario.classes[: self.experience.index] for c in group})

    @property
    def n_seen_classes(self) -> int:
        """Classes of the experience under way and those before it: labels from 0 on, without a gap."""
        return max(c for group in self.scenario.classes[: self.experience.index + 1] for c in group) + 1

    @property
    def old_heads(self) -> list[tuple[int, ...]]:
        """Labels of each earlier experience, those that are the same set once, in the order in which they came first.

        Where the task is told, they are the heads that were learned: a task that comes back has the head that it had.
        """
        heads: dict[frozenset[int], tuple[int, ...]] = {}
        for group in self.scenario.classes[: self.experience.index]:
            heads.setdefault(frozenset(group), group)
        return list(heads.values())

    @property
    def old_blocks(self) -> list[int]:
        """Blocks of the head, by number, that have earlier classes and none of the experience under way.

        This is the one rule of which blocks an experience may train: a block trains if the experience has a class of
        it. Tasks of a plugin that isolates share no class, so that there every earlier task's block is an old one.
        """
        return [k for k in self.model.blocks_of(self.previous_classes) if k not in self.current_blocks]

    @property
    def current_blocks(self) -> list[int]:
        """Blocks of the head, by number, that have a class of the experience under way: those that it trains."""
        return self.model.blocks_of(self.experience.classes)

    @property
    def new_blocks(self) -> list[int]:
        """Blocks of the head, by number, that have classes which no earlier experience had; none in domains."""
        return self.model.blocks_of(set(self.experience.classes).difference(self.previous_classes))

    def labeled_columns(self, batch: Batch) -> Tensor | None:
        """Return the old columns that learn from the labels of `batch`, [B, old classes] bool; None: there are none.

        They are those of earlier classes that come back with the experience under way, for rows whose label it has
        and which no plugin added to the batch. Every other old column is left to what an earlier network says.
        """
        back = torch.tensor([c in self.experience.classes for c in self.previous_classes], device=batch.y.device)
        if not back.any():
            return None
        own = (batch.origin == 0) & torch.isin(batch.y, batch.y.new_tensor(list(self.experience.classes)))
        return own[:, None] & back

    @property
    def replaying(self) -> list[str]:
        """The names of the plugins that bring images of earlier classes back."""
        return [plugin.name for plugin in self.plugins if plugin.replays]

    def rows_from(self, plugin: Plugin, batch: Batch) -> Tensor:
        """Return which rows of `batch` were added by `plugin`, [B] bool."""
        return batch.origin == self.plugins.index(plugin) + 1

    def rng(self, name: str) -> torch.Generator:
        """Return the generator (on the CPU) of this name: a plugin's only source of randomness, in checkpoints, too."""
        if name not in self._generators:
            digest = hashlib.sha256(f"{self.config.run.seed}/{name}".encode()).digest()
            self._generators[name] = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return self._generators[name]

    def batch(self, rows: ImageData, augment: torch.Generator | None = None) -> Batch:
        """Return `rows` as the model takes them, on the device; augmented if a generator is given."""
        return self.scenario.transform.batch(rows.to(self.device), augment)

    def mask(self, task: Tensor) -> Tensor | None:
        """Return which logits take part in the loss (``train.logits``), for rows of these tasks [B].

        [C] or [B, C] bool for a head of C classes; None: all of them.
        """
        if self.logits == "own":
            return self._classes_of_task[:, : self.model.n_classes][task]
        if self.logits == "current":
            return self._classes_of_task[self.experience.index, : self.model.n_classes]
        return None

    def task_of(self, y: Tensor) -> Tensor:
        """Return the first task that has the class, for each of the labels `y` [B]."""
        return self._classes_of_task[:, y].to(torch.uint8).argmax(0)

    def loss(self, batch: Batch, outputs: Outputs) -> Tensor:
        """Return the weighted cross-entropy over the logits that take part: sum(w * l) / sum(w)."""
        logits = masked(outputs.logits, self.mask(batch.task))
        return batch.mean(functional.cross_entropy(logits, batch.y, reduction="none"))

    def freeze(self, patterns: Iterable[str]) -> None:
        """Keep parameters from training in the experience under way, by patterns (as in shells) of their names.

        To be called in ``before_experience``, with everything that must not train in this experience. Frozen parameters
        are in no optimizer, so weight decay and momentum do not move them either. They stay frozen until the next
        experience begins, or the run ends; a checkpoint holds which they are. Parameters that were frozen before, such
        as those that a user froze, stay as they are.
        """
        self.frozen += freeze(self.model, patterns)

    def freeze_others(self, trained: Iterable[nn.Parameter | None]) -> None:
        """Keep all parameters but `trained` from training in the experience under way; see `freeze`."""
        kept = {id(parameter) for parameter in trained}
        self.freeze([name for name, parameter in self.model.named_parameters() if id(parameter) not in kept])

    def _thaw(self) -> None:
        """Let the parameters that `freeze` froze be trained again; the engine calls this between experiences."""
        thaw(self.model, self.frozen)
        self.frozen = []

    def features(self, rows: ImageData, *, mirrored: bool = False) -> Tensor:
        """Return the features [N, D] of `rows`, in evaluation mode and without gradients, with progress.

        The images are not augmented; where `mirrored`, they are mirrored left to right.
        """
        size = self.config.run.eval_batch_size
        found = []
        with evaluating(self.model), torch.no_grad():
            for i in self.ticks("features", math.ceil(len(rows) / size)):
                x = self.batch(rows.rows(slice(i * size, (i + 1) * size))).x
                found.append(self.model.features(x.flip(-1) if mirrored else x))
        return torch.cat(found)

    def ticks(self, name: str, n: int, *, resumable: bool = False) -> Ticks:
        """Iterate over ``range(n)`` in a long piece of work of a hook: with progress, and a stop by Ctrl-C.

        Where `resumable`, the run may be saved between two ticks, and after a resume the iteration goes on at
        `Ticks.start`; partial results must be in the plugin's declared state. Else the hook's work is done again. A run
        is saved within the hooks that are called once an experience; within a step, `resumable` changes nothing.
        """
        return Ticks(self, name, n, resumable)

    def log(self, values: Mapping[str, float]) -> None:
        """Record named values: in `metrics.jsonl`, in TensorBoard, with every other listener."""
        self._emit(Logged(self.experience.index, self.total_steps, dict(values)))

    def log_images(self, name: str, images: Tensor) -> None:
        """Show `images` [N, C, H, W], raw as those of the data set, as one picture of the experience under way.

        They are one picture, row by row, in the run folder and in TensorBoard. `name` begins with the plugin's.
        """
        picture = draw_grid(images.float() / self.scenario.transform.scale)
        self._emit(ImagesLogged(name, self.experience.index, picture))

    def tell(self, text: str) -> None:
        """Send a message for the user to all listeners."""
        self._emit(Message(text))

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the context."""
        cuda = self.device.type == "cuda"
        return {
            "ticks": dict(self._tick_done),
            "total_steps": self.total_steps,
            "frozen": self.frozen,
            "rng": {name: generator.get_state() for name, generator in self._generators.items()},
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._tick_done.update(state["ticks"])
        self.total_steps = state["total_steps"]
        self.frozen = state["frozen"]
        for name, generator in state["rng"].items():
            self.rng(name).set_state(generator)
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _emit(self, event: Event) -> None:
        """Give `event` to all listeners."""
        for listener in self.listeners:
            listener(event)


class Ticks:
    """The iterations of one long piece of work of a hook; see `Run.ticks`.

    Attributes:
        start: the first iteration that is left to do: 0, unless the run was resumed within this work.
    """

    def __init__(self, run: Run, name: str, n: int, resumable: bool) -> None:
        self._run, self._name, self._n = run, name, n
        self._key, self._resumable = run._hook_call + name, resumable and bool(run._hook_call)
        self.start = run._tick_done.get(self._key, 0)

    def __iter__(self) -> Iterator[int]:
        for i in range(self.start, self._n):
            yield i
            self._run._emit(Tick(self._name, i + 1, self._n))
            if self._resumable:
                self._run._tick_done[self._key] = i + 1
                self._run._pause()
