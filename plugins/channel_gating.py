"""Conditional channel gated networks (Abati et al., CVPR 2020): each task opens the channels that an image needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clframe import Batch, Experience, Outputs, Plugin, hookimpl
from clframe.context import Run
from clframe.evaluate import TaskPredictor
from clframe.options import Count, NonNegative, Search, Share
from clframe.toolkit.channel_gates import (
    ConditionalConv,
    add_channel_gates,
    convolutions_of,
    finish_task,
    frozen_names,
    unreachable_gates,
)
from clframe.toolkit.generators import Net
from clframe.toolkit.norms import TaskNorm
from clframe.toolkit.rehearsal import GeneratorOptions
from clframe.toolkit.task_inference import PathPredictor, TaskClassifier, TaskRehearsal
from clframe.toolkit.unit_gates import gate_problems
from clframe.toolkit.weight_masks import PinnedEntries, find_modules, weight_problems


class ChannelGating(Plugin):
    """Channel gates of each task, which open what an image needs; kernels whose gates fired are fixed for later tasks.

    A gate sees the average pixel of the convolution's input (two linear layers) and is binary: noisy in training, with
    a straight-through gradient, and deterministic in evaluation. Gates multiply the output of the batch norm, of which
    each task has its own. They act behind the ReLU: a ReLU behind a shut gate would keep it from ever learning to open,
    as its gradient at 0 is 0. L = loss + sparsity / layers * sum of the open shares (eq. 4).

    After an experience the kernels whose gates fired for any of its images (held-out validation images, if there are
    any) are fixed for good, and the others are drawn again (section 3.2). Channels that never fired stay shut for the
    task, so its answers stay equal to the bit. Other parameters of the backbone are fixed after the first experience.

    In class-incremental learning a task classifier (section 3.3) chooses the path and the head: it reads the features
    of all paths and is trained after each experience on the new images and on remembered ones, of all tasks alike. The
    remembered images are kept (`size` or `per_class`), or made by a Wasserstein GAN of each task (`memory=generative`).

    On a ResNet each convolution has gates of its own, 1x1 convolutions of shortcuts included, by the average pixel of
    its own input. `clframe.toolkit.compaction.compact` builds a network of one task's channels alone.

    Noisy gates learn slowly: on MNIST, 1,000 steps a task of Adam at a rate of 0.001 end at 92.9 %, at a rate of 0.01
    that falls (`train.schedule=cosine`) at 99.1 %.

    Curves: `channel-gating/open/LAYER`: the mean share of open gates, `channel-gating/free/LAYER`: of kernels that are
    left to train; `channel-gating/task-classifier`: the classifier's latest loss, and that of a generator, `distance`
    and `penalty`.

    When to use:
        Where answers should cost less computation, too.

    Keeps:
        Gates, batch norms and a head per task; in class-incremental learning images for the task classifier, or a GAN
        per task.

    Hooks:
        `grow`, `before_experience`, `penalty`, `after_backward`, `after_step`, `after_experience`, `predictor`

    Options:
        sparsity: lambda_s, the weight of the sparsity term, which shuts gates.
        sparsity_after: share of an experience's steps without the sparsity term, in the beginning.
        relevance: share of the images for which a channel must fire to belong to the task; a channel that fires less is
            shut for the task and stays free.
        bias: bias of new gates' logits, so that most gates are open at first.
        memory: images for the task classifier: `episodic`: images that are kept; `generative`: a Wasserstein GAN of
            each task.
        size: images in the episodic memory, of all classes together.
        per_class: images of each class in the episodic memory, in place of `size`.
        classifier_iterations: steps of the task classifier, after each experience.
        generator_iterations: steps of each task's GAN.
        generator_net: network of the GAN, of fully connected (`mlp`) or convolutional (`conv`) layers.
    """

    name = "channel-gating"
    family = "parameter isolation"
    state = ("past", "classifier")
    predictor_state = ("classifier",)
    serves = ("task", "class")
    # noisy gates learn slowly: at a constant rate of 0.001, 300 steps a task end at 94 % on split-digits, with these
    # settings at 99.8 %
    suited_train: ClassVar[dict[str, Any]] = {"optimizer": "adam", "lr": 0.01, "schedule": "cosine"}
    isolates = True
    keeps_images = True
    memory_options = ("size", "per_class")
    citation = "Abati et al., Conditional channel gated networks for task-aware continual learning, CVPR 2020"

    def __init__(
        self,
        *,
        sparsity: Annotated[NonNegative, Search(0.01, 100, log=True)] = 1.0,
        sparsity_after: Share = 0.25,
        relevance: Share = 0.0,
        bias: float = 1.5,
        memory: Literal["episodic", "generative"] = "episodic",
        size: Count = 1000,
        per_class: Count | None = None,
        classifier_iterations: Count = 400,
        generator_iterations: Count = 2000,
        generator_net: Net = "mlp",
    ) -> None:
        self.sparsity = sparsity
        self.sparsity_after = sparsity_after
        self.relevance = relevance
        self.bias = bias
        self.classifier_iterations = classifier_iterations
        generator_options = GeneratorOptions("wgan", generator_net) if memory == "generative" else None
        self.past = TaskRehearsal(size, per_class, generator_options, generator_iterations)
        self.classifier = TaskClassifier()
        self.held: PinnedEntries | None = None

    def wanted_logits(self, run: Run) -> str:
        """Return `own`: a task's path is trained with the classes of the task."""
        return "own"

    def problems(self, run: Run) -> Iterable[str]:
        """Yield a sentence for a backbone that cannot be gated, or a memory that cannot train the task classifier."""
        net = run.model.backbone
        convolutions = convolutions_of(net)
        shape = run.scenario.input_shape
        model = run.config.model.name
        refused = list(weight_problems(self.name, net, convolutions, model)) if convolutions else []
        refused = refused or gate_problems(self.name, net, convolutions, shape)
        if not convolutions:
            yield f"`{self.name}` gates convolutions, and `{model}` has none: choose another `--model`."
        elif refused:
            yield from refused
        elif silent := unreachable_gates(net, shape):
            where = ", ".join(silent)
            yield f"`{self.name}` can never open shut gates of {where}: their activations should be `nn.ReLU` modules."
        if run.scenario.setting == "class":
            yield from self.past.problems(run, self.name)

    def hints(self, run: Run) -> Iterable[str]:
        """Yield a sentence if layers have no free kernel left: a new task has only gates, norms and a head there."""
        convs = find_modules(run.model.backbone, ConditionalConv)
        if full := [name for name, conv in convs.items() if conv.used_channels(run.experience.index).all()]:
            where = ", ".join(full)
            yield f"`{self.name}` has no free kernel left in {where}: a larger `{self.name}.sparsity` leaves more."

    @hookimpl
    def grow(self, run: Run, experience: Experience) -> None:
        """Add the gates and batch norms of another task."""
        net = run.model.backbone
        rng = run.rng(self.name)
        if not experience.index:
            add_channel_gates(net, run.scenario.input_shape, len(run.scenario))
        for conv in find_modules(net, ConditionalConv).values():
            conv.add(self.bias, rng)
        for norm in find_modules(net, TaskNorm).values():
            if experience.index:
                norm.add()
        if run.scenario.setting == "class":
            self.past.grow(run, self.name)
        run.model.select(experience.task)

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        """Freeze everything that earlier tasks own; single kernels are held in each step."""
        heads = [f"head.{k}.*" for k in run.old_blocks]
        run.freeze([*frozen_names(run.model, experience.index), *heads])
        self.held = None
        if run.scenario.setting == "class":
            self.past.check(run, self.name, experience.train)

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return the mean share of open gates (eq. 4); None in the first steps, by `sparsity_after`."""
        if run.step < self.sparsity_after * run.steps_in_phase:
            return None
        convs = find_modules(run.model.backbone, ConditionalConv).values()
        shares = [conv.latest.mean() for conv in convs if conv.latest is not None]
        return {self.name: self.sparsity * torch.stack(shares).mean()}

    @hookimpl
    def after_backward(self, run: Run) -> None:
        """Clear the gradients of kernels that fired for earlier tasks."""
        if self.held is None:
            convs = find_modules(run.model.backbone, ConditionalConv).values()
            self.held = PinnedEntries(
                pair for conv in convs for pair in conv.entries(conv.used_channels(run.experience.index))
            )
        self.held.clear_gradients()

    @hookimpl
    def after_step(self, run: Run) -> None:
        """Restore the fixed kernels, which momentum or weight decay may have moved."""
        assert self.held is not None
        self.held.put_back()

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        """Fix the kernels that fired, draw the others again, and train the task classifier, if one is needed."""
        data = experience.train.to(run.device)
        rng = run.rng(self.name)
        infers_task = run.scenario.setting == "class"
        if infers_task:  # first, as a checkpoint may be written before this hook ends
            self.past.keep(run, self.name, data)
        curves = finish_task(run, experience.val.to(run.device) if len(experience.val) else data, rng, self.relevance)
        run.log({f"{self.name}/{curve}": value for curve, value in curves.items()})
        if infers_task:
            images = [*self.past.images(run, self.name), data]
            self.classifier.learn(run, self.name, images, self.classifier_iterations)

    @hookimpl
    def predictor(self, run: Run) -> nn.Module:
        """Return a predictor with the path and head of the given task, or of the one that the classifier infers."""
        if run.scenario.setting == "task":
            return TaskPredictor(run.model, run.n_seen_classes)
        return PathPredictor(run.model, self.classifier, run.scenario.classes[: run.experience.index + 1])
