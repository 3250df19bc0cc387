"""HAT (Serra et al., ICML 2018): each task learns an attention over units, and protects these units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from clframe import Batch, Experience, Outputs, Plugin, hookimpl
from clframe.context import Run
from clframe.evaluate import TaskPredictor
from clframe.options import NonNegative, Positive, Search
from clframe.toolkit.norms import TaskNorm, add_task_norms
from clframe.toolkit.probing import propagate_importance
from clframe.toolkit.unit_gates import AttentionGate, gate_layers, gate_problems
from clframe.toolkit.weight_masks import find_modules, layers_of, weight_problems

LEAST_CLIP = 10_000.0  # the norm at which the paper clips gradients
LARGEST = 6.0  # magnitude of an embedding; beyond it the gate's gradient vanishes (appendix of the paper)


class HAT(Plugin):
    """Hard attention to the task: gates a_l = sigmoid(s e_l) multiply the units of each layer l, for an embedding e_l.

    Within an epoch s rises from 1 / s_max to s_max (eq. 3), where it stays for evaluation, so that gates are almost
    binary; the embedding's gradient is freed of the factor that s brings (eq. 5). Where a is the maximum over earlier
    tasks of a unit's attention, a weight from unit j to unit i keeps the share min(a_i, a_j) of its old value in each
    step (eq. 2), and

        L = loss + c sum a_t (1 - a) / sum (1 - a)                                       (eq. 6)

    makes the new task use units that others use, and so saves units for later ones. The paper scales gradients, for
    plain SGD; here the step is scaled, which is the same for plain SGD, and protects from momentum, weight decay and
    Adam's rescaling, too. Units are those of all linear layers and convolutions, gated after their batch norm. Batch
    norms are per task, and all other parameters are frozen after the first experience.

    Curves: `hat/open/LAYER`: the share of the layer's units that the task attends to; `hat/free/LAYER`: the share that
    no task attends to.

    When to use:
        In task-incremental learning, where units rather than single weights should be divided among tasks.

    Keeps:
        1 number per unit, batch norms and a head, per task.

    Hooks:
        `grow`, `before_experience`, `before_step`, `penalty`, `after_backward`, `after_step`, `after_experience`,
        `predictor`

    Options:
        sparsity: c, the weight of the sparsity term.
        s_max: the largest s.
    """

    name = "hat"
    family = "parameter isolation"
    serves = ("task",)
    suited_train: ClassVar[dict[str, float]] = {"clip": LEAST_CLIP}
    isolates = True
    citation = (
        "Serra, Suris, Miron, Karatzoglou, Overcoming catastrophic forgetting with hard attention to the task, 2018"
    )

    def __init__(
        self, *, sparsity: Annotated[NonNegative, Search(0.01, 10, log=True)] = 0.75, s_max: Positive = 400.0
    ) -> None:
        self.sparsity = sparsity
        self.s_max = s_max
        self.kept: dict[nn.Parameter, Tensor] | None = None  # the share of its old value that each weight keeps
        self.before: list[Tensor] = []

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence for layers that cannot be gated: shared, called more than once, or inside an attention."""
        inside = [name for name, m in run.model.backbone.named_modules() if isinstance(m, nn.MultiheadAttention)]
        if inside:
            where = ", ".join(inside)
            yield (
                f"`hat` gates layers where they are called, and the attention {where} reads the weights of its own "
                "layers without calling them: choose another `--model`."
            )
            return
        net = run.model.backbone
        layers = layers_of(net)
        if refused := list(weight_problems(self.name, net, layers, run.config.model.name)):
            yield from refused
        else:
            yield from gate_problems(self.name, net, layers, run.scenario.input_shape)

    def hints(self, run: Run) -> Iterable[str]:
        """Yield a sentence if gradients are clipped: equation 5 makes those of the embeddings large on purpose."""
        if 0 < run.settings.clip < LEAST_CLIP:
            yield (
                f"`hat` makes its embeddings' gradients large, and `train.clip={run.settings.clip:g}` shrinks all "
                f"others with them: set `train.clip=0`, or {LEAST_CLIP:g} as the paper has it."
            )

    @hookimpl
    def grow(self, run: Run, experience: Experience) -> None:
        """Add the gates and batch norms of another task."""
        net = run.model.backbone
        shape = run.scenario.input_shape
        if not experience.index:
            gate_layers(net, layers_of(net), shape, lambda layer, norm: AttentionGate(layer, norm, self.s_max))
            add_task_norms(net)
        for gate in find_modules(net, AttentionGate).values():
            gate.add(run.rng(self.name))
        for norm in find_modules(net, TaskNorm).values():
            if experience.index:
                norm.add()
        run.model.select(experience.task)

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Freeze the heads, embeddings and norms of earlier tasks, and all parameters outside gated layers."""
        self.kept = None
        if not experience.index:
            return
        own = [p for block in run.new_blocks for p in run.model.head[block].parameters()]
        for gate in find_modules(run.model, AttentionGate).values():
            own += [*gate.layer.parameters(), gate.embeddings[-1]]
        for norm in find_modules(run.model, TaskNorm).values():
            own += norm.norms[-1].parameters()
        run.freeze_others(own)

    @hookimpl
    def before_step(self, run: Run) -> None:
        """Anneal the gate temperature s for this step (eq. 3)."""
        last = run.batches_per_epoch - 1
        done = run.step % run.batches_per_epoch / last if last else 1.0
        for gate in find_modules(run.model, AttentionGate).values():
            gate.s = 1 / self.s_max + (self.s_max - 1 / self.s_max) * done

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor]:
        """Return the sparsity term of equation 6."""
        gates = find_modules(run.model, AttentionGate).values()
        # c sum a_t (1 - a) / sum (1 - a) (eq. 6), with a = `used`
        asked = torch.stack([torch.dot(gate.attention(), 1 - gate.used) for gate in gates]).sum()
        free = torch.stack([(1 - gate.used).sum() for gate in gates]).sum()
        return {self.name: self.sparsity * asked / free.clamp(min=1)}

    @hookimpl
    def after_backward(self, run: Run) -> None:
        """Compensate the gradients of embeddings (eq. 5), and keep the weights as they are before the step."""
        gates = find_modules(run.model.backbone, AttentionGate)
        for gate in gates.values():
            gate.compensate_gradient()  # eq. 5
        if self.kept is None:
            used = {name: gate.used for name, gate in gates.items()}
            entering = propagate_importance(run.model.backbone, used, run.scenario.input_shape)
            met = {gate: entering[name] for name, gate in gates.items() if name in entering}  # that lead to features
            self.kept = {p: k for gate, into in met.items() for p, k in gate.kept_shares(into)}
        self.before = [p.detach().clone() for p in self.kept]

    @hookimpl
    def after_step(self, run: Run) -> None:
        """Scale the step of protected weights (eq. 2), and clamp the embeddings."""
        assert self.kept is not None
        with torch.no_grad():
            for (parameter, kept), before in zip(self.kept.items(), self.before, strict=True):
                parameter.lerp_(before, kept)  # eq. 2: the share min(a_i, a_j) of the old value stays
            for gate in find_modules(run.model, AttentionGate).values():
                gate.embeddings[-1].clamp_(-LARGEST, LARGEST)

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Mark the units that the task attends to as used, and log the shares of open and free units."""
        for name, gate in find_modules(run.model.backbone, AttentionGate).items():
            opened = gate.finish()
            run.log({f"hat/open/{name}": opened, f"hat/free/{name}": (gate.used < 0.5).float().mean().item()})

    @hookimpl
    def predictor(self, run: Run) -> nn.Module:
        """Return a predictor with the attention and head of each task."""
        return TaskPredictor(run.model, run.n_seen_classes)
