"""Learning without memorizing (Dhar et al., CVPR 2019): the network goes on looking where it looked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from clframe import Batch, Experience, IncrementalNet, Outputs, Plugin, hookimpl, snapshot
from clframe.context import Run
from clframe.distill import (
    attention_distance,
    grad_cam,
    observe,
    sigmoid_cross_entropy,
    soft_cross_entropy,
)
from clframe.errors import did_you_mean
from clframe.model import evaluating
from clframe.options import NonNegative, Positive


class LwM(Plugin):
    """Distils the answers of the last experience's network and its attention maps, on the images of the new one.

    L = L_C + beta L_D + gamma L_AD. L_C is the cross-entropy over the current classes, L_D distils the logits of the
    old ones (the base classes), and L_AD is the L1 distance of the two networks' Grad-CAM maps, each of length 1, for
    one base class per image, the same in both networks. Gradients of L_AD flow through the map and through its weights,
    which are gradients themselves. Both networks look in eval mode: a batch norm in training would let one image's map
    depend on the others.

    The paper gives neither beta nor gamma.

    Options:
        beta: weight of the distillation.
        gamma: weight of the attention distillation.
        distill: `sigmoid`: binary cross-entropy against the teacher's sigmoid, averaged over the base classes;
            `softmax`: as LwF has it.
        temperature: of the softmax distillation.
        base: whose top-scoring base class the maps explain.
        layer: of the backbone, by name; its output is what is looked at. null: the last convolution.
    """

    name = "lwm"
    state = ("teacher",)
    citation = "Dhar, Singh, Peng, Wu, Chellappa, Learning without memorizing, CVPR 2019"

    def __init__(
        self,
        *,
        beta: NonNegative = 1.0,
        gamma: NonNegative = 1.0,
        distill: Literal["sigmoid", "softmax"] = "sigmoid",
        temperature: Positive = 2.0,
        base: Literal["student", "teacher"] = "student",
        layer: str | None = None,
    ) -> None:
        self.beta, self.gamma = beta, gamma
        self.distill, self.temperature = distill, temperature
        self.base, self.layer = base, layer
        self.teacher: IncrementalNet | None = None

    def wanted_logits(self, setting: str) -> str | None:
        """The cross-entropy is over the current classes: there are no images of others."""
        return {"class": "current", "task": "own"}.get(setting)

    def problems(self, run: Run) -> Iterable[str]:
        """There must be maps to look at."""
        layers = dict(run.model.backbone.named_modules())
        convolutions = [f"`{name}`" for name, module in layers.items() if isinstance(module, nn.Conv2d)]
        if self.layer is not None and self.layer not in layers:
            names = [name for name in layers if name]
            yield f"`lwm.layer` is {self.layer}, which the backbone does not have.{did_you_mean(self.layer, names)}"
        elif self.layer is None and not convolutions:
            yield (
                "`lwm` compares attention maps, and the backbone has no convolution: choose another model, such as "
                "cnn-small or resnet32."
            )
        elif not self._gives_maps(run):
            yield (
                f"The output of `lwm.layer={self.layer}` is no map [B, K, H, W]; choose one of the convolutions, "
                f"{', '.join(convolutions) or 'of which this backbone has none'}."
            )

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor] | None:
        """Both distillations; none in the first experience, nor while the features cannot move."""
        if self.teacher is None or not outputs.features.requires_grad:
            return None
        old = run.old_classes
        q, old_maps = self._look(self.teacher, batch)
        z, maps = self._look(run.model, batch)
        q, z, answers = q[:, old], z[:, old], outputs.logits[:, old]
        b = (z if self.base == "student" else q).argmax(1, keepdim=True)
        looked = grad_cam(q.gather(1, b).squeeze(1), old_maps)
        looks = grad_cam(z.gather(1, b).squeeze(1), maps, create_graph=True)
        soft = self.distill == "softmax"
        distilled = soft_cross_entropy(q, answers, self.temperature) if soft else sigmoid_cross_entropy(q, answers)
        return {
            f"{self.name}/distill": self.beta * batch.mean(distilled),
            f"{self.name}/attend": self.gamma * batch.mean(attention_distance(looked, looks)),
        }

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """The network as it is now is the next teacher."""
        self.teacher = snapshot(run.model)

    def _look(self, model: IncrementalNet, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and maps [B, K, H, W] in eval mode, with a graph from these to those."""
        with observe(self._layer(model)) as maps, evaluating(model):
            return model(batch.x, batch.task).logits, maps[-1]

    def _gives_maps(self, run: Run) -> bool:
        with observe(self._layer(run.model)) as maps, torch.no_grad(), evaluating(run.model):
            run.model.features(torch.zeros(2, *run.scenario.input_shape, device=run.device))
        return bool(maps) and maps[-1].dim() == 4

    def _layer(self, model: IncrementalNet) -> nn.Module:
        convolutions = [name for name, m in model.backbone.named_modules() if isinstance(m, nn.Conv2d)]
        return model.backbone.get_submodule(convolutions[-1] if self.layer is None else self.layer)
