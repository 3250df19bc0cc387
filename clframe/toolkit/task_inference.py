"""Task inference: a classifier on the features of all paths of a network, for images whose task is not given.

It is for networks that compute something different for each task (`clframe.model.PerTask`), as in section 3.3 of Abati
et al. (CVPR 2020). A task's path does not change once it is learned, so that features are computed once for each image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe.data.batch import ImageData
from clframe.evaluate import Predictor
from clframe.model import IncrementalNet, class_mask, evaluating, initialized_by, masked
from clframe.toolkit.generators import DEFAULT_WIDTHS, check_range, conv_problems
from clframe.toolkit.memory import at_random, balanced, quota, too_small
from clframe.toolkit.rehearsal import GeneratorOptions, Rehearsal

if TYPE_CHECKING:
    from clframe.context import Run

CLASSIFIER_WIDTH = 64  # units of the hidden layer of the task classifier
SHOWN = 64  # images of a generator that are logged


class TaskClassifier(nn.Module):
    """A classifier of tasks: two linear layers from the concatenated features of all paths to a logit for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential()

    @property
    def tasks(self) -> int:
        """Return the number of tasks; at first there is one, to which all images belong."""
        return self.net[-1].out_features if len(self.net) else 1  # type: ignore[return-value]

    def begin(self, tasks: int, width: int, generator: torch.Generator, like: Tensor) -> None:
        """Replace the network by a new one.

        Args:
            tasks: number of tasks.
            width: number of features of each path.
            generator: on the CPU, for the initial weights.
            like: a tensor of the precision and device of the network.
        """
        with initialized_by(generator):
            self._build(tasks * width, tasks)
        self.net.to(like)

    def _build(self, width: int, tasks: int) -> None:
        """Set up the layers for `width` inputs and `tasks` outputs."""
        self.net = nn.Sequential(nn.Linear(width, CLASSIFIER_WIDTH), nn.ReLU(), nn.Linear(CLASSIFIER_WIDTH, tasks))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a network of the size in `state`, which may be for fewer tasks than there are now."""
        device = next(self.parameters(), torch.empty(0)).device
        self.net = nn.Sequential()
        if (first := state.get(f"{prefix}net.0.weight")) is not None:
            self._build(first.shape[1], len(state[f"{prefix}net.2.bias"]))
            self.net.to(first.device if device.type == "cpu" else device, first.dtype)
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, tasks * width] to logits [B, tasks]."""
        logits: Tensor = self.net(features) if len(self.net) else features[:, :1] * 0
        return logits

    def learn(self, run: Run, owner: str, images: Sequence[ImageData], iterations: int) -> None:
        """Train a new network to classify these images by task; each batch draws all tasks with equal probability.

        The curve ``OWNER/task-classifier`` is the latest loss.

        Args:
            run: the run, in whose ticks the training is counted.
            owner: name of the plugin, for its random numbers, its progress and its curve.
            images: the images of each task.
            iterations: number of steps of Adam.
        """
        rng = run.rng(owner)
        if len(images) == 1:
            return
        self.begin(len(images), run.model.backbone.width, rng, next(run.model.parameters()))
        known = [self._features_of(run, rows) for rows in images]
        starts = torch.tensor([0, *(len(part) for part in known)]).cumsum(0)
        counts = starts.diff()
        features = torch.cat(known)
        optimizer = torch.optim.Adam(self.parameters(), 1e-3)
        loss = features.new_zeros(())
        for _ in run.ticks(f"{owner} task classifier", iterations):
            task = torch.randint(len(known), (run.settings.batch_size,), generator=rng)
            where = starts[task] + (torch.rand(len(task), generator=rng) * counts[task]).long()
            loss = functional.cross_entropy(self(features[where.to(run.device)]), task.to(run.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.log({f"{owner}/task-classifier": loss.item()})

    def _features_of(self, run: Run, rows: ImageData) -> Tensor:
        """Return the features of the images `rows` on all paths, [N, tasks * width], in evaluation mode."""
        parts = []
        with evaluating(run.model), torch.no_grad():
            for start in range(0, len(rows), run.config.run.eval_batch_size):
                batch = run.batch(rows.rows(slice(start, start + run.config.run.eval_batch_size)))
                parts.append(path_features(run.model, batch.x, self.tasks))
        return torch.cat(parts)


class TaskRehearsal(nn.Module):
    """Images of the tasks learned so far, from an exemplar memory or from a generative model of each task.

    Args:
        size: number of images in the memory, for all classes together; with generators, of each task.
        per_class: number of images of each class, in place of `size`.
        generator_options: options of the generators; None: there is a memory.
        iterations: number of training steps of each generator.
    """

    def __init__(
        self, size: int, per_class: int | None, generator_options: GeneratorOptions | None, iterations: int
    ) -> None:
        super().__init__()
        self.size = size
        self.per_class = per_class
        self.generator_options = generator_options
        self.iterations = iterations
        self.memory: ImageData | None = None
        self.generators = nn.ModuleList()

    def problems(self, run: Run, owner: str) -> Iterator[str]:
        """Yield a sentence for each reason why the plugin `owner`, which has options of these names, cannot use it."""
        if self.generator_options and self.generator_options.net == "conv":
            yield from conv_problems(
                run.scenario.input_shape, len(DEFAULT_WIDTHS["conv"]), f"`{owner}.generator_net=conv`"
            )
        elif self.generator_options is None and self.per_class is None:
            yield from too_small(self.size, len(run.scenario.class_names), f"{owner}.size")

    def grow(self, run: Run, owner: str) -> None:
        """Add the generator of another task, if there are generators."""
        if self.generator_options:
            build = partial(self.generator_options.build, run.scenario.input_shape, 1, run.rng(owner))
            self.generators.append(Rehearsal(build, run.scenario.transform.scale).to(run.device))

    def check(self, run: Run, owner: str, data: ImageData) -> None:
        """Raise `UsageError` if the values of these images are outside the range of generated ones."""
        if self.generator_options:
            check_range(data, run.scenario.transform.scale, owner)

    def images(self, run: Run, owner: str) -> list[ImageData]:
        """Return images of each task before the current one: those of the memory, or generated ones."""
        if self.memory is not None:
            return [self.memory.rows(self.memory.task == k) for k in range(run.experience.index)]
        drawn = [rehearsal.recall(self.size, 1, run.rng(owner))[0] for rehearsal in self._rehearsals()[:-1]]
        return [ImageData(images, images.new_zeros(len(images), dtype=torch.int64)) for images in drawn]

    def keep(self, run: Run, owner: str, data: ImageData) -> None:
        """Keep images of the latest task, or train its generator and log images that it generates.

        The run can be saved in the middle of the training, so that this call should come first in a hook.

        Args:
            run: the run.
            owner: name of the plugin, for its random numbers, its progress and its curves.
            data: all images of the task.
        """
        if self.generator_options:
            rehearsal = self._rehearsals()[-1]
            losses = rehearsal.rehearse(run, owner, data, 1.0, self.iterations)
            run.log_images(owner, rehearsal.recall(SHOWN, 1, run.rng(owner))[0])
            run.log({f"{owner}/{name}": value for name, value in losses.items()})
        else:
            count = self.per_class or quota(self.size, run.n_seen_classes)
            self.memory = balanced(self.memory, data, count, at_random(run.rng(owner)))

    def _rehearsals(self) -> list[Rehearsal]:
        """Return the generators of the tasks, in order."""
        return list(self.generators)  # type: ignore[arg-type]

    def get_extra_state(self) -> ImageData | None:
        """Return the content of a state dict besides the generators: the memory."""
        return self.memory

    def set_extra_state(self, state: ImageData | None) -> None:
        """Restore what `get_extra_state` returned."""
        self.memory = state


def path_features(model: IncrementalNet, x: Tensor, tasks: int) -> Tensor:
    """Return the features of `x` on the paths of the first `tasks`, concatenated: [B, tasks * D]."""
    batch_tasks = (torch.full((len(x),), task, device=x.device) for task in range(tasks))
    return torch.cat([model(x, task).features for task in batch_tasks], dim=1)


class PathPredictor(Predictor):
    """The predictor by the path of an image's task, which is given or inferred by a classifier: its logits.

    If the task is inferred, classes of other tasks have the score -inf.

    Args:
        model: the network.
        classifier: the classifier of the tasks learned so far.
        classes: the labels of each of these tasks, and of later tasks that may be given.
    """

    def __init__(self, model: IncrementalNet, classifier: TaskClassifier, classes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.model = model
        self.classifier = classifier
        self.n_classes: int = max(map(max, classes)) + 1
        self._classes = [list(group) for group in classes]

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Return the scores [B, C] of all classes of the head."""
        if task is not None:
            scores: Tensor = self.model(x, task).logits
            return scores
        task = self.classifier(path_features(self.model, x, self.classifier.tasks)).argmax(1)
        logits: Tensor = self.model(x, task).logits
        allowed = torch.stack([class_mask(group, logits.shape[1], x.device) for group in self._classes])
        return masked(logits, allowed[task])
