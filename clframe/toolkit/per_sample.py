"""Statistics of per-sample gradients: sums over samples of the squared, or absolute, gradient of each sample alone."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import vjp, vmap
from torch.nn import functional
from torch.nn.modules import batchnorm

from clframe.errors import UsageError
from clframe.model import IncrementalNet, evaluating, graph_of

Reduce = Literal["square", "abs"]


def zeros_for(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros to accumulate statistics of `parameters` in: float32, float64 for parameters that are."""
    return {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        for name, p in parameters.items()
    }


class GradientSums:
    """Sums over samples of the squared, or absolute, gradient of each sample, in eval mode.

    The gradient of a sample is that of a batch of this sample alone; nothing is averaged before it is squared. Linear,
    Conv2d and BatchNorm layers that a forward pass calls once are solved in closed form from their input and the
    gradient of their output, and one forward pass serves all cotangents. Every other parameter (of other layers, of a
    layer called twice, shared, parametrized, of another name, used without its layer being called) goes through
    `torch.func.vmap`, or sample by sample where that fails or gives something else for the first sample.

    The model is left as it was: no hooks, no ``.grad``, the same modes, running statistics and ``requires_grad``.

    Args:
        model: the network.
        sums: tensors to add to, by name of the parameter, as `zeros_for` makes them. Other parameters are left out.
        reduce: ``square`` or ``abs``.
        max_elements: bound on the elements of the temporary tensors (unfolded inputs, per-sample gradients) of one
            layer, though one sample at least is taken at a time. None: 2^20 on the CPU, whose cache holds them, 2^26
            elsewhere.

    Raises:
        UsageError: if samples depend on each other, by a batch norm without running statistics or otherwise.
    """

    def __init__(
        self,
        model: IncrementalNet,
        sums: dict[str, Tensor],
        reduce: Reduce = "square",
        max_elements: int | None = None,
    ) -> None:
        self._model = model
        self._sums = sums
        self._f: Callable[[Tensor], Tensor] = torch.square if reduce == "square" else torch.abs
        self._max_elements = max_elements
        self._parameters = {name: p for name, p in model.named_parameters() if name in sums}
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._layers: list[nn.Module] = []
        self._row_is_sample: set[nn.Module] | None = None
        self._vmap_works: bool | None = None  # not known yet
        for name, module in model.named_modules():
            if isinstance(module, batchnorm._BatchNorm) and module.running_mean is None:
                raise UsageError(
                    f"Importance cannot be computed: the layer `{name}` normalises by the statistics of the batch "
                    "(`track_running_stats=False`), so one image's gradient depends on the others; let it track them."
                )
            # exactly these classes: a subclass, or a forward method of its own, may compute something else
            if type(module) in _CLOSED_FORMS and "forward" not in vars(module):
                self._layers.append(module)

    def add(self, x: Tensor, task: Tensor | None, cotangents: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """Add ``sum_b sum_k f(J_b^T v_kb)`` over the samples b, J_b being the Jacobian of the logits of sample b.

        Args:
            x: [B, ...] normalised images.
            task: [B], as the model takes it.
            cotangents: from the detached logits [B, C] to the vectors v_k [B, C]: gradients, with respect to the
                logits, of losses that are sums over samples.
        """
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False), evaluating(self._model):
            with self._recorded() as calls:
                logits = self._model(x, task).logits
            if self._row_is_sample is None:
                self._look_at_one(x[:1], None if task is None else task[:1], logits[:1])
            vectors = cotangents(logits.detach())
            if logits.requires_grad and vectors:
                solved, rest = self._divide(calls, logits)
                if solved:
                    self._add_closed_form(solved, logits, vectors)
                if rest:
                    del logits, calls, solved
                    self._add_rest(rest, x, task, torch.stack(list(vectors), dim=1))

    @torch.no_grad()
    def add_local(self, x: Tensor, task: Tensor | None, delta: Callable[[Tensor], Tensor]) -> None:
        """Add, for each layer by itself, f of what `delta` makes of its output [B, ...], times its input.

        With ``relu`` for `delta` the sums of a Linear layer are ``f(F_j F_i)``: activities of the units that a weight
        connects, a Hebbian rule. Only Linear and Conv2d layers have such a rule; weights of others stay as they are.
        """
        with torch.autocast(x.device.type, enabled=False), evaluating(self._model):
            with self._recorded() as calls:
                logits = self._model(x, task).logits
            if self._row_is_sample is None:
                self._look_at_one(x[:1], None if task is None else task[:1], logits[:1])
        for call in calls:
            if isinstance(call.module, nn.Linear | nn.Conv2d):
                if call.rows != len(x) or call.module not in (self._row_is_sample or ()):
                    raise UsageError(
                        "A local importance cannot be computed: a layer of the backbone is given something else than a "
                        "row for each image; choose a backbone that treats images so, or another form."
                    )
                for kind, parameter in call.parameters():
                    if id(parameter) in self._names:
                        call.sums[kind] = self._sums[self._names[id(parameter)]]
                form = _CLOSED_FORMS[type(call.module)](call, self._f, self._elements(x.device))
                form.add(delta(call.output))
                form.finish()

    @torch.no_grad()
    def _look_at_one(self, x: Tensor, task: Tensor | None, among_others: Tensor) -> None:
        """What the first sample alone tells of the network, given its logits among others."""
        with self._recorded() as calls:
            alone = self._model(x, task).logits
        # a layer that is given one row for one sample, and B for B, is given samples as rows
        self._row_is_sample = {call.module for call in calls if call.rows == 1}
        # far above what rounding (TF32 included) makes of a batch of another size
        if (alone - among_others).abs().max() > 0.01 * alone.abs().max() + 1e-6:
            raise UsageError(
                "Importance cannot be computed: in eval mode the network's logits of one image depend on the others of "
                "its batch, so one image has no gradient of its own; make the backbone treat each image by itself."
            )

    @contextmanager
    def _recorded(self) -> Iterator[list[_Call]]:
        """The calls of the layers with a closed form, in the forward passes inside."""
        calls: list[_Call] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            a = args[0] if args else kwargs["input"]
            # the edge, not the output: an activation that works in place changes what the output stands for
            edge = get_gradient_edge(output) if output.requires_grad else None
            batched = output.dim() > (3 if isinstance(module, nn.Conv2d) else 1)
            # a copy, as the next layer may work in place; with a graph nobody asks for it
            kept = torch.empty(0) if torch.is_grad_enabled() else output.clone()
            calls.append(_Call(module, a.detach(), a._version, edge, len(output) if batched else 0, kept))

        # first in line, so that the output is the layer's own whatever other hooks make of it
        hooks = [m.register_forward_hook(record, prepend=True, with_kwargs=True) for m in self._layers]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()

    def _divide(self, calls: Sequence[_Call], logits: Tensor) -> tuple[list[_Call], dict[str, nn.Parameter]]:
        """Calls that account for all of a parameter's gradient, and the parameters that none accounts for."""
        graph = graph_of(logits)
        times = Counter(call.module for call in calls)
        solved, rest = [], {n: p for n, p in self._parameters.items() if graph.uses[id(p)]}
        for call in calls:
            whole = (
                times[call.module] == 1
                and call.edge is not None
                and call.edge.node in graph.nodes
                and call.rows == len(logits)
                and call.module in (self._row_is_sample or ())
                and call.input._version == call.version
            )
            for kind, parameter in call.parameters() if whole else ():
                if graph.uses[id(parameter)] == 1 and self._names.get(id(parameter)) in rest:
                    name = self._names[id(parameter)]
                    call.sums[kind] = self._sums[name]
                    del rest[name]
            if call.sums:
                solved.append(call)
        return solved, rest

    def _add_closed_form(self, calls: Sequence[_Call], logits: Tensor, vectors: Sequence[Tensor]) -> None:
        forms = [_CLOSED_FORMS[type(call.module)](call, self._f, self._elements(logits.device)) for call in calls]
        edges = [call.edge for call in calls if call.edge is not None]
        for k, vector in enumerate(vectors):
            more = k + 1 < len(vectors)
            deltas = torch.autograd.grad([logits], edges, [vector], retain_graph=more, allow_unused=True)
            for form, delta in zip(forms, deltas, strict=True):
                if delta is not None:
                    form.add(delta)
        for form in forms:
            form.finish()

    def _add_rest(self, parameters: dict[str, nn.Parameter], x: Tensor, task: Tensor | None, vectors: Tensor) -> None:
        """The same for `parameters` of any layer; `vectors` [B, K, C] holds the cotangents of each sample."""
        if self._vmap_works is None:
            first = None if task is None else task[:1]
            self._vmap_works = self._vmap_agrees(parameters, x[:1], first, vectors[:1])
        if self._vmap_works:
            try:
                found = self._by_vmap(parameters, x, task, vectors)
            except (RuntimeError, ValueError):
                self._vmap_works = False
        if not self._vmap_works:
            found = self._one_by_one(parameters, x, task, vectors)
        for name, value in found.items():
            self._sums[name] += value

    def _vmap_agrees(
        self, parameters: dict[str, nn.Parameter], x: Tensor, task: Tensor | None, vectors: Tensor
    ) -> bool:
        """Return whether vmap works on one sample, and gives what its gradients do, but for rounding.

        Not every module can go: one that reads values, or calls an operator without a batching rule. One that holds
        its parameters in another place as well (a list of them, a function) would compute with those.
        """
        try:
            found = self._by_vmap(parameters, x, task, vectors)
        except (RuntimeError, ValueError):
            return False
        wanted = self._one_by_one(parameters, x, task, vectors)
        return all(
            (found[name] - value).abs().max() <= 0.01 * value.abs().max() + 1e-12 for name, value in wanted.items()
        )

    def _by_vmap(
        self, parameters: dict[str, nn.Parameter], x: Tensor, task: Tensor | None, vectors: Tensor
    ) -> dict[str, Tensor]:
        def of_sample(x: Tensor, task: Tensor | None, vectors: Tensor) -> dict[str, Tensor]:
            def logits(values: dict[str, Tensor]) -> Tensor:
                with _replaced(self._model, {id(parameters[name]): value for name, value in values.items()}):
                    output = self._model(x[None], None if task is None else task[None])
                return output.logits[0]  # type: ignore[no-any-return]

            pull = vjp(logits, {name: p.detach() for name, p in parameters.items()})[1]
            (gradients,) = vmap(pull)(vectors)
            return {name: self._f(g).sum(0) for name, g in gradients.items()}

        found = zeros_for(parameters)
        size = sum(p.numel() for p in parameters.values()) * vectors.shape[1]
        rows = max(1, self._elements(x.device) // size)
        tasks = [None] * len(x) if task is None else task.split(rows)
        for part, part_task, part_vectors in zip(x.split(rows), tasks, vectors.split(rows), strict=False):
            in_dims = (0, None if task is None else 0, 0)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # still faster than one by one
                sums = vmap(of_sample, in_dims)(part, part_task, part_vectors)
            for name, value in sums.items():
                found[name] += value.sum(0)
        return found

    def _one_by_one(
        self, parameters: dict[str, nn.Parameter], x: Tensor, task: Tensor | None, vectors: Tensor
    ) -> dict[str, Tensor]:
        found = zeros_for(parameters)
        for b in range(len(x)):
            logits = self._model(x[b : b + 1], None if task is None else task[b : b + 1]).logits
            for vector in vectors[b]:
                gradients = torch.autograd.grad(
                    [logits], list(parameters.values()), [vector[None]], retain_graph=True, allow_unused=True
                )
                for total, gradient in zip(found.values(), gradients, strict=True):
                    if gradient is not None:
                        total += self._f(gradient)
        return found

    def _elements(self, device: torch.device) -> int:
        return self._max_elements or (1 << 20 if device.type == "cpu" else 1 << 26)


@contextmanager
def _replaced(model: nn.Module, values: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, `model` computes with `values` in the place of its parameters, given by their ids.

    `torch.func.functional_call` leaves its tensors in a module that stands at two places. Tensors that modules compute
    inside and keep, as older weight normalization does, are put back, too.
    """
    places = [(m._parameters, key, p) for m in model.modules() for key, p in m._parameters.items() if id(p) in values]
    kept = [(vars(m), key, v) for m in model.modules() for key, v in vars(m).items() if isinstance(v, Tensor)]
    try:
        for parameters, key, parameter in places:
            parameters[key] = values[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for place, key, value in [*places, *kept]:
            place[key] = value


@dataclass
class _Call:
    """One call of a layer: its input (and the input's version then), its output or where that stands in the graph."""

    module: Any
    input: Tensor
    version: int
    edge: GradientEdge | None
    rows: int
    output: Tensor

    def __post_init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # of the parameters for which this call accounts: weight, bias

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return those that a closed form knows; others that stand in the layer are computed with elsewhere."""
        return [(kind, p) for kind, p in self.module.named_parameters(recurse=False) if kind in ("weight", "bias")]


class _ClosedForm:
    """Adds f(per-sample gradient) of one layer's parameters, given the gradients of its output one by one."""

    def __init__(self, call: _Call, f: Callable[[Tensor], Tensor], max_elements: int) -> None:
        self.module = call.module
        self.input = call.input
        self.sums = call.sums
        self.f = f
        self.max_elements = max_elements

    def add(self, delta: Tensor) -> None:
        """Take `delta` [B, ...], the gradient of the layer's output."""
        raise NotImplementedError

    def finish(self) -> None:
        """All gradients were given."""

    def _add_products(self, delta: Tensor, a: Tensor) -> None:
        """The weight's gradient of sample n is the sum over positions l of ``delta[n, g, :, l] a[n, g, :, l]^T``."""
        gradient = torch.matmul(delta, a.transpose(-2, -1))
        self.sums["weight"] += self.f(gradient).sum(0).view_as(self.sums["weight"])


class _Linear(_ClosedForm):
    """z = W a + b: the gradient of one sample is delta a^T, so its f is f(delta) f(a)^T, summed by one product."""

    def __init__(self, call: _Call, f: Callable[[Tensor], Tensor], max_elements: int) -> None:
        super().__init__(call, f, max_elements)
        self.total: Tensor | None = None

    def add(self, delta: Tensor) -> None:
        if self.input.dim() > 2:
            self._add_positions(delta.flatten(1, -2), self.input.flatten(1, -2))
        else:
            self.total = self.f(delta) if self.total is None else self.total.add_(self.f(delta))

    def finish(self) -> None:
        if self.total is not None:
            if "weight" in self.sums:
                self.sums["weight"].addmm_(self.total.t(), self.f(self.input))
            if "bias" in self.sums:
                self.sums["bias"] += self.total.sum(0)

    def _add_positions(self, delta: Tensor, a: Tensor) -> None:
        """For inputs [B, L, in]: the gradient of a sample is a sum over its positions."""
        if "weight" in self.sums:
            rows = max(1, self.max_elements // self.module.weight.numel())
            for d, part in zip(delta.split(rows), a.split(rows), strict=True):
                self._add_products(d.transpose(1, 2), part.transpose(1, 2))
        if "bias" in self.sums:
            self.sums["bias"] += self.f(delta.sum(1)).sum(0)


class _Conv2d(_ClosedForm):
    """Unfolded, a convolution is a linear layer at every position of its output, and the gradient a sum over them."""

    def add(self, delta: Tensor) -> None:
        conv, groups = self.module, self.module.groups
        if "weight" in self.sums:
            positions = delta.shape[2] * delta.shape[3]
            unfolded = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1] * positions
            rows = max(1, self.max_elements // max(unfolded, conv.weight.numel()))
            for d, part in zip(delta.split(rows), self.input.split(rows), strict=True):
                self._add_products(d.reshape(len(d), groups, -1, positions), self._unfold(part, d.shape[2:]))
        if "bias" in self.sums:
            self.sums["bias"] += self.f(delta.sum((2, 3))).sum(0)

    def _unfold(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """[n, groups, inputs of one output, positions]; `functional.unfold` takes two to five times as long."""
        conv = self.module
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode).contiguous()
        n, channels, row, column = x.stride()
        windows = x.as_strided(
            (*x.shape[:2], *conv.kernel_size, *size),
            (
                n,
                channels,
                row * conv.dilation[0],
                column * conv.dilation[1],
                row * conv.stride[0],
                column * conv.stride[1],
            ),
        )
        return windows.reshape(len(x), conv.groups, -1, size[0] * size[1])


class _BatchNorm(_ClosedForm):
    """In eval mode z = w x^ + b with x^ fixed: the gradients of a sample are sums over its positions."""

    def __init__(self, call: _Call, f: Callable[[Tensor], Tensor], max_elements: int) -> None:
        super().__init__(call, f, max_elements)
        if "weight" in self.sums:
            m = self.module
            self.normalized = functional.batch_norm(self.input, m.running_mean, m.running_var, eps=m.eps)

    def add(self, delta: Tensor) -> None:
        if "weight" in self.sums:
            self.sums["weight"] += self.f(self._over_positions(delta * self.normalized)).sum(0)
        if "bias" in self.sums:
            self.sums["bias"] += self.f(self._over_positions(delta)).sum(0)

    @staticmethod
    def _over_positions(x: Tensor) -> Tensor:
        return x.flatten(2).sum(2) if x.dim() > 2 else x


_CLOSED_FORMS: dict[type[nn.Module], type[_ClosedForm]] = {
    nn.Linear: _Linear,
    nn.Conv2d: _Conv2d,
    nn.BatchNorm1d: _BatchNorm,
    nn.BatchNorm2d: _BatchNorm,
    nn.BatchNorm3d: _BatchNorm,
}
