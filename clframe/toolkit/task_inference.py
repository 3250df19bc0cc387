"""Which task an image is of, where nobody tells: a classifier on the features of all paths of a network.

For networks that compute something else for each task (`clframe.model.PerTask`), as in section 3.3 of Abati et al.
(CVPR 2020). The paths do not change once they are learnt, so that features are computed once for each image.
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

CLASSIFIER_WIDTH = 64
SHOWN = 64  # images of a generator


class TaskClassifier(nn.Module):
    """Two linear layers, from the features of all paths, one after the other, to one logit for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential()

    @property
    def tasks(self) -> int:
        """How many tasks it tells apart; at first there is one, of which all images are."""
        return self.net[-1].out_features if len(self.net) else 1  # type: ignore[return-value]

    def begin(self, tasks: int, width: int, generator: torch.Generator, like: Tensor) -> None:
        """Replace the network by a new one, for `tasks` and `width` features a path, in the precision of `like`."""
        with initialized_by(generator):
            self._build(tasks * width, tasks)
        self.net.to(like)

    def _build(self, width: int, tasks: int) -> None:
        self.net = nn.Sequential(nn.Linear(width, CLASSIFIER_WIDTH), nn.ReLU(), nn.Linear(CLASSIFIER_WIDTH, tasks))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Its size is that of what is loaded, which may be of fewer tasks than there are now."""
        device = next(self.parameters(), torch.empty(0)).device
        self.net = nn.Sequential()
        if (first := state.get(f"{prefix}net.0.weight")) is not None:
            self._build(first.shape[1], len(state[f"{prefix}net.2.bias"]))
            self.net.to(first.device if device.type == "cpu" else device, first.dtype)
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, features: Tensor) -> Tensor:
        """[B, tasks * width] to [B, tasks]."""
        logits: Tensor = self.net(features) if len(self.net) else features[:, :1] * 0
        return logits

    def learn(self, run: Run, owner: str, images: Sequence[ImageData], iterations: int) -> None:
        """Learn, from new weights on, to tell these images of each task apart; in a batch all tasks are alike.

        The curve ``OWNER/task-classifier`` is the latest loss. The work is that of the plugin `owner`, in ticks.
        """
        rng = run.rng(owner)
        if len(images) == 1:
            return
        self.begin(len(images), run.model.backbone.width, rng, next(run.model.parameters()))
        known = [self._features_of(run, rows) for rows in images]
        starts = torch.tensor([0, *(len(part) for part in known)]).cumsum(0)
        counts, features = starts.diff(), torch.cat(known)
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
        parts = []
        with evaluating(run.model), torch.no_grad():
            for start in range(0, len(rows), run.config.run.eval_batch_size):
                batch = run.batch(rows.rows(slice(start, start + run.config.run.eval_batch_size)))
                parts.append(path_features(run.model, batch.x, self.tasks))
        return torch.cat(parts)


class TaskRehearsal(nn.Module):
    """Images of the tasks learnt so far: a memory of some, or a generator of each task.

    Args:
        size: images in the memory, of all classes together.
        per_class: images of each class, in place of `size`.
        generator_options: of the generators; None: there is a memory.
        iterations: of each generator.
    """

    def __init__(
        self, size: int, per_class: int | None, generator_options: GeneratorOptions | None, iterations: int
    ) -> None:
        super().__init__()
        self.size, self.per_class, self.generator_options, self.iterations = (
            size,
            per_class,
            generator_options,
            iterations,
        )
        self.memory: ImageData | None = None
        self.generators = nn.ModuleList()

    def problems(self, run: Run, owner: str) -> Iterator[str]:
        """A sentence for each reason why `owner`, which has options of these names, cannot have it."""
        if self.generator_options and self.generator_options.net == "conv":
            yield from conv_problems(
                run.scenario.input_shape, len(DEFAULT_WIDTHS["conv"]), f"`{owner}.generator_net=conv`"
            )
        elif self.generator_options is None and self.per_class is None:
            yield from too_small(self.size, len(run.scenario.class_names), f"{owner}.size")

    def grow(self, run: Run, owner: str) -> None:
        """Another task comes."""
        if self.generator_options:
            build = partial(self.generator_options.build, run.scenario.input_shape, 1, run.rng(owner))
            self.generators.append(Rehearsal(build, run.scenario.transform.scale).to(run.device))

    def check(self, run: Run, owner: str, data: ImageData) -> None:
        """Raise `UsageError` if these images of a task are not such as its generator can make."""
        if self.generator_options:
            check_range(data, run.scenario.transform.scale, owner)

    def images(self, run: Run, owner: str) -> list[ImageData]:
        """Of each task before the one under way."""
        if self.memory is not None:
            return [self.memory.rows(self.memory.task == k) for k in range(run.experience.index)]
        drawn = [made.recall(self.size, 1, run.rng(owner))[0] for made in self._made()[:-1]]
        return [ImageData(images, images.new_zeros(len(images), dtype=torch.int64)) for images in drawn]

    def keep(self, run: Run, owner: str, data: ImageData) -> None:
        """Remember the task of these images, all that it has; show what its generator makes of them.

        The run can be saved within, so this should come first in a hook.
        """
        if self.generator_options:
            made = self._made()[-1]
            losses = made.rehearse(run, owner, data, 1.0, self.iterations)
            run.log_images(owner, made.recall(SHOWN, 1, run.rng(owner))[0])
            run.log({f"{owner}/{name}": value for name, value in losses.items()})
        else:
            count = self.per_class or quota(self.size, run.n_seen_classes)
            self.memory = balanced(self.memory, data, count, at_random(run.rng(owner)))

    def _made(self) -> list[Rehearsal]:
        return list(self.generators)  # type: ignore[arg-type]

    def get_extra_state(self) -> ImageData | None:
        """What a state dict holds beside the generators."""
        return self.memory

    def set_extra_state(self, state: ImageData | None) -> None:
        """Take over what `get_extra_state` gave."""
        self.memory = state


def path_features(model: IncrementalNet, x: Tensor, tasks: int) -> Tensor:
    """The features of `x` on the path of each of the first `tasks`, one after the other: [B, tasks * D]."""
    every = (torch.full((len(x),), task, device=x.device) for task in range(tasks))
    return torch.cat([model(x, task).features for task in every], dim=1)


class PathPredictor(Predictor):
    """The logits of the path of an image's task: the one that is told, or that the classifier takes it to be of.

    Where it is not told, classes of other tasks have a score of -inf.

    Args:
        model: the network.
        classifier: of the tasks learnt so far.
        classes: labels of each of these, and of later tasks that may be told.
    """

    def __init__(self, model: IncrementalNet, classifier: TaskClassifier, classes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.model, self.classifier = model, classifier
        self.n_classes: int = max(map(max, classes)) + 1
        self._classes = [list(group) for group in classes]

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Scores [B, C] of all classes of the head."""
        if task is not None:
            told: Tensor = self.model(x, task).logits
            return told
        task = self.classifier(path_features(self.model, x, self.classifier.tasks)).argmax(1)
        logits: Tensor = self.model(x, task).logits
        allowed = torch.stack([class_mask(group, logits.shape[1], x.device) for group in self._classes])
        return masked(logits, allowed[task])
