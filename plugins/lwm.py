"""Learning without memorizing (Dhar et al., CVPR 2019): answers and attention maps of the old network are distilled."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clframe import Batch, Experience, IncrementalNet, Outputs, Plugin, hookimpl, snapshot
from clframe.context import Run
from clframe.errors import did_you_mean
from clframe.model import evaluating, normalizing_by_batch
from clframe.options import NonNegative, Positive, Search
from clframe.toolkit.distill import attention_distance, grad_cam, observe, sigmoid_cross_entropy, soft_cross_entropy


class LwM(Plugin):
    """Learning without memorizing: distillation of the old network's answers and attention maps, on the new images.

    L = L_C + beta L_D + gamma L_AD. L_C is the cross-entropy over the current classes, L_D distills the logits of the
    old ones (the base classes), and L_AD is the L1 distance of the two networks' Grad-CAM maps, each of length 1, for
    one base class per image, the same in both networks: the one with the top score of the student or the teacher
    (`base`). Gradients of L_AD flow through the map and through its weights, which are gradients themselves; in a
    well-known implementation the gradient is zero. The maps of the student are taken with the normalization of
    training: maps in evaluation mode, at running statistics that the step moves, cost 10 points on digits.

    The paper gives neither beta nor gamma. On digits more attention is less accuracy.

    When to use:
        To study attention.

    Keeps:
        1 number per weight: the teacher. A step costs another forward pass and a second backward pass.

    Hooks:
        `before_run`, `penalty`, `after_experience`

    Options:
        beta: weight of the distillation.
        gamma: weight of the attention distillation.
        distill: `sigmoid`: binary cross-entropy against the teacher's sigmoid, averaged over the base classes;
            `softmax`: as LwF has it.
        temperature: temperature of the softmax distillation.
        base: network whose top-scoring base class the maps explain.
        teacher_norm: normalization of the teacher's batch norms: by the `batch`, where the student's do, so that equal
            networks have equal maps; or by their `running` statistics, as in evaluation mode.
        layer: layer of the backbone, by name, whose output gives the maps. null: the last that gives maps of more than
            one pixel, behind the last convolution's batch norm and ReLU. With a batch norm that trains behind the
            layer, the images of a batch would share their alpha.
    """

    name = "lwm"
    family = "distillation"
    state = ("teacher",)
    citation = "Dhar, Singh, Peng, Wu, Chellappa, Learning without memorizing, CVPR 2019"

    def __init__(
        self,
        *,
        beta: Annotated[NonNegative, Search(0.01, 100, log=True)] = 1.0,
        gamma: Annotated[NonNegative, Search(0.01, 100, log=True)] = 1.0,
        distill: Literal["sigmoid", "softmax"] = "sigmoid",
        temperature: Positive = 2.0,
        base: Literal["student", "teacher"] = "student",
        teacher_norm: Literal["batch", "running"] = "batch",
        layer: str | None = None,
    ) -> None:
        self.beta = beta
        self.gamma = gamma
        self.distill = distill
        self.temperature = temperature
        self.base = base
        self.teacher_norm = teacher_norm
        self.layer = layer
        self.teacher: IncrementalNet | None = None

    def wanted_logits(self, run: Run) -> str | None:
        """Return the setting of `train.logits` for the loss: the current classes, or all classes seen beside replay."""
        alone = "seen" if run.replaying else "current"
        return {"class": alone, "task": "own"}.get(run.scenario.setting)

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence if the layer gives no maps of several pixels, or torch cannot differentiate them twice."""
        layers = dict(run.model.backbone.named_modules())
        convolutions = [f"`{name}`" for name, module in layers.items() if isinstance(module, nn.Conv2d)]
        maps = self._find_map_layers(run)
        if self.layer is not None and self.layer not in layers:
            names = [name for name in layers if name]
            yield f"`lwm.layer` is {self.layer}, which the backbone does not have.{did_you_mean(self.layer, names)}"
        elif self.layer is None and not (maps and convolutions):
            yield (
                "`lwm` compares attention maps, and the backbone has no convolution whose output has several pixels: "
                "choose another model, such as cnn-small or resnet32."
            )
        elif self.layer is not None and self.layer not in maps:
            yield (
                f"The output of `lwm.layer={self.layer}` is not a map [B, K, H, W] of several pixels; choose one of "
                f"the convolutions, {', '.join(convolutions) or 'of which this backbone has none'}."
            )
        elif why := self._why_not_twice(run, self.layer or maps[-1]):
            yield (
                f"`lwm` differentiates the network's answers twice, and torch cannot do that here ({why}): choose "
                "another `--model`, or an `lwm.layer` that the answers depend on."
            )

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Choose the layer of the attention maps, where none was given."""
        self.layer = self.layer or self._find_map_layers(run)[-1]

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return the distillation of outputs and of attention; None in the first experience and for frozen features."""
        if self.teacher is None or not outputs.features.requires_grad:
            return None
        old = run.previous_classes
        q, old_maps = self._logits_and_maps(self.teacher, run, batch)
        z, maps = self._logits_and_maps(run.model, run, batch)
        q = q[:, old]
        z = z[:, old]
        answers = outputs.logits[:, old]
        b = (z if self.base == "student" else q).argmax(1, keepdim=True)
        old_attention = grad_cam(q.gather(1, b).squeeze(1), old_maps)
        attention = grad_cam(z.gather(1, b).squeeze(1), maps, create_graph=True)
        soft = self.distill == "softmax"
        distilled = soft_cross_entropy(q, answers, self.temperature) if soft else sigmoid_cross_entropy(q, answers)
        # beta L_D + gamma L_AD
        return {
            f"{self.name}/distill": self.beta * batch.mean(distilled),
            f"{self.name}/attend": self.gamma * batch.mean(attention_distance(old_attention, attention)),
        }

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Keep a frozen copy of the network as the next teacher."""
        self.teacher = snapshot(run.model)

    def _logits_and_maps(self, model: IncrementalNet, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits [B, C] and maps [B, K, H, W] of `model`, with a graph from the maps to the logits."""
        layer = model.backbone.get_submodule(self.layer)  # type: ignore[arg-type]  # chosen before the run
        # a teacher is in evaluation mode: with itself as the model to follow, its batch norms use running statistics
        like = model if model is self.teacher and self.teacher_norm == "running" else run.model
        # the math kernel is the only form of attention that torch can differentiate twice
        with observe(layer) as maps, normalizing_by_batch(model, like), sdpa_kernel(SDPBackend.MATH):
            return model(batch.x, batch.task).logits, maps[-1]

    @staticmethod
    def _why_not_twice(run: Run, layer: str) -> str:
        """Return why torch cannot differentiate twice from the maps of `layer` to the features; '' if it can."""
        net = run.model
        images = torch.zeros(2, *run.scenario.input_shape, device=run.device)
        try:
            with observe(net.backbone.get_submodule(layer)) as maps, evaluating(net), sdpa_kernel(SDPBackend.MATH):
                score = net.features(images).sum(1)
            attention = grad_cam(score, maps[-1], create_graph=True)
            if attention.requires_grad:
                torch.autograd.grad(attention.sum(), list(net.backbone.parameters()), allow_unused=True)
        except RuntimeError as error:
            return " ".join(str(error).split())[:200].rstrip(".")
        return ""

    @staticmethod
    def _find_map_layers(run: Run) -> list[str]:
        """Return the layers of the backbone that give maps of several pixels, in the order in which they end.

        A layer that is called in several places counts if its last call gives such a map: its maps are taken there.
        """
        found: list[str] = []

        def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
            if name in found:
                found.remove(name)
            if isinstance(output, Tensor) and output.dim() == 4 and output[0, 0].numel() > 1:
                found.append(name)

        with ExitStack() as hooks, torch.no_grad(), evaluating(run.model):
            for name, module in run.model.backbone.named_modules():
                hooks.callback(module.register_forward_hook(partial(note, name)).remove)
            run.model.features(torch.zeros(2, *run.scenario.input_shape, device=run.device))
        return found
