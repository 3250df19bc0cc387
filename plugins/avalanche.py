"""Plugins of Avalanche inside clframe, through the attributes that they read of a strategy."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from clframe.avalanche.adapter import silence_warnings
from clframe.context import Run
from clframe.data.batch import Batch
from clframe.errors import UsageError, did_you_mean
from clframe.hooks import hookimpl
from clframe.model import IncrementalNet, Outputs, snapshot
from clframe.options import Count, NonNegative, Positive, Share
from clframe.plugin import Plugin

if TYPE_CHECKING:
    from clframe.data.batch import ImageData
    from clframe.data.scenario import Experience

# Variants, each with Avalanche's class and the paper; tests show their weights equal to Avalanche's own, bit for bit.
TESTED = {
    "AGEM": ("AGEMPlugin", "Chaudhry et al., Efficient lifelong learning with A-GEM, ICLR 2019"),
    "EWC": ("EWCPlugin", "Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017"),
    "GEM": ("GEMPlugin", "Lopez-Paz and Ranzato, Gradient episodic memory for continual learning, NeurIPS 2017"),
    "LFL": ("LFLPlugin", "Jung et al., Less-forgetting learning in deep neural networks, arXiv 2016"),
    "LwF": ("LwFPlugin", "Li and Hoiem, Learning without forgetting, TPAMI 2017"),
    "MAS": ("MASPlugin", "Aljundi et al., Memory aware synapses, ECCV 2018"),
    "Replay": ("ReplayPlugin", "Rolnick et al., Experience replay for continual learning, NeurIPS 2019"),
    "SI": (
        "SynapticIntelligencePlugin",
        "Zenke, Poole, Ganguli, Continual learning through synaptic intelligence, 2017",
    ),
}
KEEP_IMAGES = ("AGEM", "GEM", "Replay")
LEFT_OUT = ("device", "storage_policy", "verbose")  # options that are objects, or that the run decides
HINTS: dict[str, dict[str, Any]] = {  # types of options that Avalanche leaves untyped, or types loosely
    "AGEM": {"patterns_per_experience": Count, "sample_size": Count},
    "EWC": {
        "ewc_lambda": NonNegative,
        "mode": Literal["separate", "online"],
        "decay_factor": Share | None,
        "keep_importance_data": bool,
    },
    "GEM": {"patterns_per_experience": Count, "memory_strength": NonNegative},
    "LFL": {"lambda_e": NonNegative | list[NonNegative]},
    "LwF": {"alpha": NonNegative | list[NonNegative], "temperature": Positive},
    "MAS": {"lambda_reg": NonNegative, "alpha": Share},
    "Replay": {"mem_size": Count, "batch_size": Count | None, "batch_size_mem": Count | None},
    "SI": {"si_lambda": NonNegative | list[NonNegative], "eps": Positive, "excluded_parameters": list[str] | None},
}
UNDOCUMENTED = {  # options that Avalanche does not document
    "mem_size": "images that the memory holds at most.",
    "excluded_parameters": "names of parameters that get no penalty, or patterns of such names.",
}


class AvalanchePlugin(Plugin):
    """A plugin of Avalanche 0.6.0, such as `avalanche:EWC`. Known to be broken in Avalanche: it cannot save a strategy,
    its SI does nothing on the CPU, and its forgetting is 0.0 for an experience that it has evaluated once only.

    `--plugin avalanche:EWC --set avalanche:EWC.ewc_lambda=10` runs Avalanche's own plugin with the options of its
    constructor. The variants that can be named give exactly the weights that Avalanche's own strategy gives, bit for
    bit, where the images, their order, the first weights and the optimizer (SGD) are the same, on one thread and
    without clipping (`train.clip=0`). A run with such a plugin cannot be resumed: its state is in no checkpoint.
    Avalanche's checkpoints, loggers and evaluation are not used.

    A plugin is given one head for all classes and no tasks: Avalanche's way in class- and domain-incremental learning;
    LFL serves domains only. Its random draws depend on the run's seed alone.

    The other direction, a plugin of clframe in a strategy of Avalanche, is `clframe.as_avalanche(EWC(), benchmark)`.

    When to use:
        To compare with figures that Avalanche gave.

    Keeps:
        What the plugin of Avalanche keeps; AGEM, GEM and Replay keep images.

    Hooks:
        `before_run`, `before_experience`, `extra_batch`, `penalty`, `after_backward`, `after_step`, `after_experience`
    """

    name = "avalanche"
    family = "adapter"
    citation = "Carta et al., Avalanche: a PyTorch library for deep continual learning, JMLR 2023"
    serves = ("class", "domain")
    variants = tuple(TESTED)
    resumes = False
    known_problems = (
        "Avalanche 0.6.0 cannot save a strategy (PicklingError); clframe does not use its checkpoints.",
        "The SI of Avalanche 0.6.0 does nothing on the CPU, where it compares the weights with themselves; use "
        "clframe's `si`.",
        "Avalanche 0.6.0 gives a forgetting of 0.0 for an experience that it has evaluated once only; clframe leaves "
        "such a cell empty, and does not use its evaluation.",
    )
    arguments: ClassVar[dict[str, Any]] = {}  # passed on to events, as those of a strategy's `train`

    inner: Any = None  # the plugin of Avalanche

    def __init__(self) -> None:
        self.strategy: Any = None
        # batches of Avalanche's own loader, if the plugin has put one in place
        self.memory: Iterator[Any] | None = None

    @classmethod
    def of_variant(cls, variant: str) -> type[Plugin]:
        """Import Avalanche and return the class of ``avalanche:variant``. Raises `UsageError` for an unknown one."""
        if variant not in TESTED:
            raise UsageError(
                f"`avalanche:{variant}` is not among the plugins of Avalanche that are known to give the same results "
                f"in clframe.{did_you_mean(variant, TESTED)}"
            )
        return _make_class(variant)

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence for a missing variant, and for masked logits, which no plugin of Avalanche supports."""
        if self.inner is None:
            yield f"`{self.name}` needs a variant: write `{self.name}:VARIANT`, one of {', '.join(self.variants)}."
        if run.scenario.setting in self.serves and run.logits not in ("all", "seen"):
            yield f"`{self.name}` does not support masked logits: leave `train.logits={run.logits}` out."

    def hints(self, run: Run) -> Iterable[str]:
        """Yield a sentence for SI on the CPU, where Avalanche keeps views of the weights instead of copies."""
        if self.name == "avalanche:SI" and run.device.type == "cpu":
            yield f"`{self.name}` does nothing on the CPU, where it compares the weights with themselves: use `si`."

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Build the stand-in for a strategy and the plugin's random generators."""
        seed = int(torch.randint(2**31, (), generator=run.rng(self.name)))
        self.drawing = Randomness(seed)
        self.loading = Randomness(seed + 1)
        self.strategy = Strategy(run)

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Call the events with which Avalanche's `train` begins, for one experience."""
        strategy = self.strategy
        strategy.enter(run, experience)
        before = strategy.dataloader
        for event in (
            "before_training",
            "before_train_dataset_adaptation",
            "after_train_dataset_adaptation",
            "before_training_exp",
        ):
            self._call(event, **self.arguments)
        self.memory = None if strategy.dataloader is before else _repeat(strategy.dataloader)

    @hookimpl
    def extra_batch(self, run: Run, batch: Batch) -> Batch | None:
        """Begin an iteration, and return the rows of the plugin's memory; None without a memory."""
        if run.step % run.batches_per_epoch == 0:
            self._call("before_training_epoch")
        rows = None
        if self.memory is not None:
            with self.loading:
                x, y, *_ = next(self.memory)
            remembered = y != BLANK
            rows = self.strategy.rows(run, x[remembered], y[remembered])
        self.strategy.see(batch, *([] if rows is None else [rows]))
        self._call("before_training_iteration")
        self._call("before_forward")
        return rows

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return what the plugin adds to the loss; None if that has no gradient."""
        strategy = self.strategy
        strategy.see(batch)
        strategy.mb_output = outputs.logits
        base = run.loss(batch, outputs).detach()
        strategy.loss = base.reshape(1).clone()  # of the shape [1], as in Avalanche, and without the loss's own graph
        self._call("after_forward")
        self._call("before_backward")
        added: Tensor = (strategy.loss - base).sum()
        return {self.name: added} if added.requires_grad else None

    @hookimpl
    def after_backward(self, run: Run) -> None:
        """Call the events between the backward pass and the optimizer's step."""
        self._call("after_backward")
        self._call("before_update")

    @hookimpl
    def after_step(self, run: Run) -> None:
        """Call the events with which an iteration ends, and an epoch after its last iteration."""
        self._call("after_update")
        self._call("after_training_iteration")
        if (run.step + 1) % run.batches_per_epoch == 0:
            self._call("after_training_epoch")

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Call the events with which Avalanche's `train` ends."""
        with silence_warnings(DeprecationWarning):
            self._call("after_training_exp", **self.arguments)
            self._call("after_training")
        self.memory = None

    def _call(self, event: str, **arguments: Any) -> None:
        """Call an event of the plugin, then of the clock, which is the last of a strategy's plugins."""
        with self.drawing:
            getattr(self.inner, event)(self.strategy, **arguments)
        getattr(self.strategy.clock, event)(self.strategy, **arguments)


class Strategy:
    """Attributes that a plugin reads of an Avalanche strategy, and may set, under the same names.

    Attributes:
        model: gives logits [B, C] for images; the run's network is inside.
        optimizer: the optimizer of the run; between the phases of a run a stand-in that can only clear the gradients.
        experience: the experience, with its ``dataset``.
        adapted_dataset: as many rows as the experience has, all blank, as the engine brings the rows of the experience.
        dataloader: over `adapted_dataset`, until a plugin puts another one in place.
        mbatch: images, labels and tasks of the iteration; ``mb_x``, ``mb_y``, ``mb_task_id`` are its parts.
    """

    def __init__(self, run: Run) -> None:
        from avalanche.training.plugins.clock import Clock

        self.clock = Clock()
        self.model: Any = _wrap_network(run.model)
        self.device = run.device
        self.is_training = True
        self.is_eval = False
        self.plugins: list[Any] = []
        self.train_mb_size = self.eval_mb_size = run.settings.batch_size
        self._criterion = nn.CrossEntropyLoss()
        self._run = run
        self.mbatch: list[Tensor] | None = None
        self.mb_output: Tensor | None = None
        self.loss = torch.zeros(1, device=run.device)

    @property
    def optimizer(self) -> Any:
        """The optimizer of the phase, or a stand-in between phases."""
        return self._run.optimizer or Gradients(self.model)

    @property
    def mb_x(self) -> Tensor:
        """Images of the iteration, [B, ...]."""
        assert self.mbatch is not None
        return self.mbatch[0]

    @property
    def mb_y(self) -> Tensor:
        """Labels of the iteration, [B]."""
        assert self.mbatch is not None
        return self.mbatch[1]

    @property
    def mb_task_id(self) -> Tensor:
        """Tasks of the iteration, [B], which are all 0."""
        assert self.mbatch is not None
        return self.mbatch[2]

    def criterion(self) -> Tensor:
        """Return the loss of the iteration."""
        loss: Tensor = self._criterion(self.mb_output, self.mb_y)
        return loss

    def enter(self, run: Run, experience: Experience) -> None:
        """Set the attributes that describe an experience."""
        data = experience.train
        dataset = _make_dataset(Rows(run, data), data.y.tolist())
        classes = sorted(set(data.y.tolist()))
        self.experience = SimpleNamespace(
            dataset=dataset,
            current_experience=experience.index,
            classes_in_this_experience=classes,
            task_label=0,
            task_labels=[0],
        )
        self.train_mb_size = self.eval_mb_size = run.settings.batch_size
        self.adapted_dataset = _make_dataset(Blanks(run, len(data)), [BLANK] * len(data))
        self.dataloader: Any = []

    def see(self, *parts: Batch) -> None:
        """Set the rows of the iteration to those of these batches."""
        x = torch.cat([part.x for part in parts])
        y = torch.cat([part.y for part in parts])
        self.mbatch = [x, y, torch.zeros_like(y)]

    def rows(self, run: Run, x: Tensor, y: Tensor) -> Batch:
        """Return rows of a memory, `x` [M, ...] and `y` [M], as a batch that can join a step."""
        y = y.to(run.device)
        return Batch(
            x.to(run.device),
            y,
            index=torch.full_like(y, -1),
            task=run.task_of(y),
            weight=torch.ones(len(y), device=run.device),
            origin=torch.zeros_like(y),
        )


class Gradients:
    """A stand-in for an optimizer where there is none, which can clear the gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.param_groups: list[dict[str, Any]] = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model."""
        self.model.zero_grad(set_to_none)


class Rows(torch.utils.data.Dataset[Any]):
    """The images of an experience as they are trained on, one by one."""

    def __init__(self, run: Run, data: ImageData) -> None:
        self.run = run
        self.data = data
        self.targets = data.y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        transform = self.run.scenario.transform
        augment = self.run.rng("avalanche/augment") if transform.augments else None
        return self.run.batch(self.data.rows(slice(i, i + 1)), augment).x[0], self.targets[i]


BLANK = -1  # the label of a row that stands for one of the experience's own


class Blanks(torch.utils.data.Dataset[Any]):
    """As many blank images as an experience has: a loader of both these and a memory is asked for the memory only."""

    def __init__(self, run: Run, n: int) -> None:
        self.blank = torch.zeros(run.scenario.input_shape, device=run.device)
        self.targets = [BLANK] * n

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not 0 <= i < len(self.targets):
            raise IndexError(i)
        return self.blank, BLANK


class Randomness:
    """A context with its own random numbers, for code that draws from global generators (torch, numpy, Python)."""

    def __init__(self, seed: int) -> None:
        self.states = (
            torch.Generator().manual_seed(seed).get_state(),
            np.random.RandomState(seed).get_state(),
            random.Random(seed).getstate(),
        )

    def __enter__(self) -> None:
        self.outside = self._take()
        self._put(self.states)

    def __exit__(self, *_: object) -> None:
        self.states = self._take()
        self._put(self.outside)

    def _take(self) -> tuple[Any, ...]:
        return torch.get_rng_state(), np.random.get_state(), random.getstate()

    def _put(self, states: tuple[Any, ...]) -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _make_dataset(rows: torch.utils.data.Dataset[Any], targets: list[int]) -> Any:
    """Return `rows` as a data set of Avalanche, all of one task."""
    from avalanche.benchmarks.utils import _make_taskaware_classification_dataset

    return _make_taskaware_classification_dataset(rows, targets=targets, task_labels=0)


def _repeat(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


@lru_cache(maxsize=len(TESTED))
def _make_class(variant: str) -> type[Plugin]:
    """Return the class of ``avalanche:variant``, whose options are those of Avalanche's constructor."""
    with silence_warnings(Warning):
        from avalanche.training import plugins
    theirs: Any = getattr(plugins, TESTED[variant][0])
    hints = get_type_hints(theirs.__init__) | HINTS[variant]
    given = [
        parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(theirs.__init__).parameters.items()
        if name != "self" and name not in LEFT_OUT
    ]

    def build(self: AvalanchePlugin, **options: Any) -> None:
        AvalanchePlugin.__init__(self)
        try:
            self.inner = theirs(**options)
        except (AssertionError, ValueError) as error:
            raise UsageError(
                f"Avalanche refuses these options of `{self.name}`: {' '.join(str(error).split())}"
            ) from error

    summary = f"The `{theirs.__name__}` of Avalanche, run inside clframe."
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    build.__signature__ = inspect.Signature([own, *given])  # type: ignore[attr-defined]
    build.__annotations__ = {parameter.name: parameter.annotation for parameter in given}
    return type(
        f"Avalanche{variant}",
        (AvalanchePlugin,),
        {
            "__init__": build,
            "__doc__": f"{summary}\n\nOptions:\n{_document_options(theirs)}",
            "__module__": __name__,
            "name": f"avalanche:{variant}",
            "citation": TESTED[variant][1],
            "variants": (),
            "replays": variant == "Replay",
            "keeps_images": variant in KEEP_IMAGES,
            # LFL freezes the last layer once it is trained, so that no class can be added
            "serves": ("domain",) if variant == "LFL" else AvalanchePlugin.serves,
        },
    )


def _document_options(theirs: Any) -> str:
    """Return what Avalanche's own documentation says about each option, in the form that clframe reads."""
    text = f"{inspect.getdoc(theirs)}\n{inspect.getdoc(theirs.__init__)}"
    docs = dict(UNDOCUMENTED)
    for entry in text.split(":param ")[1:]:
        name, _, words = entry.partition(":")
        docs[name] = " ".join(words.split())
    names = [name for name in inspect.signature(theirs.__init__).parameters if name in docs]
    return "".join(f"    {name}: {docs[name]}\n" for name in names)


def _wrap_network(net: IncrementalNet) -> nn.Module:
    """Return `net` as a network of Avalanche, from images to logits."""
    from avalanche.models.base_model import BaseModel

    class View(nn.Module, BaseModel):  # type: ignore[misc]
        def __init__(self, net: IncrementalNet) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x).logits
            return logits

        def get_features(self, x: Tensor) -> Tensor:
            return self.net.features(x)

        def __deepcopy__(self, memo: object) -> nn.Module:
            """Copy without the hooks of others, each module in its current mode."""
            copied = snapshot(self.net)
            for ours, theirs in zip(copied.modules(), self.net.modules(), strict=True):
                ours.training = theirs.training
            view = View(copied)
            view.training = self.training
            return view

    return View(net)
