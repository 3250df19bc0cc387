"""Every installed method on streams other than the built-in splits: it learns what it should, or is refused before.

`STREAMS` is the table: a further stream joins by one line, a further plugin by being installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from clframe import Experience, ImageData, Plugin, Results, Scenario, Transform, WrongUse, hookimpl, registry, run
from clframe.context import Run
from clframe.data import Setting
from clframe.distill import incremental_bce
from clframe.streams import first_return
from clframe.training import restart

# options that make a plugin small; all others are at their defaults
SMALL: dict[str, dict[str, Any]] = {
    "always-be-dreaming": {"iterations": 3, "batch_size": 6, "noise": 6, "width": 8},
    "channel-gating": {"classifier_iterations": 3, "size": 12},
    "deep-inversion": {"per_class": 2, "iterations": 3},
    "der": {"size": 12},
    "er": {"size": 24},
    "generative-replay": {"hidden": [8], "z": 2},
    "icarl": {"size": 24},
}
MODELS = {"finetune-fc": "mlp-100"}  # for those that `cnn-small` does not suit
NAMES = [name for name in registry.names("plugin") if not registry.plugin_class(name).variants]


def stream(setting: Setting, classes: Sequence[Sequence[int]], reverse: int | None = None) -> Scenario:
    """A scenario with 8 training images of each class; experience `reverse` has its training labels reversed."""

    def load(index: int, part: str) -> ImageData:
        generator = torch.Generator().manual_seed(100 * index + (part == "test"))
        y = torch.tensor(classes[index]).repeat(8 if part == "train" else 2)
        x = torch.randint(0, 80, (len(y), 1, 8, 8), generator=generator, dtype=torch.uint8)
        x.view(len(y), -1)[torch.arange(len(y)), y] = 255
        if index == reverse and part == "train":
            order = list(classes[index])
            y = torch.tensor([order[-1 - order.index(label)] for label in y.tolist()])
        return ImageData(x, y, task=torch.full_like(y, 0 if setting == "domain" else index))

    names = [f"class {c}" for c in range(max(map(max, classes)) + 1)]
    return Scenario("odd", setting, classes, names, (1, 8, 8), load, transform=Transform())


STREAMS: dict[str, tuple[Setting, list[list[int]]]] = {
    "classes return": ("class", [[0, 1], [2, 3], [0, 1]]),
    "classes return among new ones": ("class", [[0, 1], [1, 2], [3, 0]]),
    "tasks share classes": ("task", [[0, 1], [1, 2], [0, 1]]),
    "domains with other label sets": ("domain", [[0, 1, 2, 3], [0, 1], [2, 3]]),
}


class Watch(Plugin):
    """Keeps the base loss's largest value of each experience, and the network."""

    name = "watch"
    observer = True

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    @hookimpl
    def after_step(self, run: Run) -> None:
        at = run.experience.index
        self.losses[at] = max(self.losses.get(at, 0.0), run.losses["base"].item())

    @hookimpl
    def after_run(self, run: Run) -> None:
        self.weights = {name: value.detach().clone() for name, value in run.model.state_dict().items()}


def learn(name: str, scenario: Scenario, options: dict[str, Any] | None = None) -> tuple[Watch, Results]:
    """Learn it with the plugin `name`; what was seen, and the results."""
    watch = Watch()
    plugin = registry.build_plugin(name, SMALL.get(name, {}) | (options or {}))
    train = {"iterations": 3, "batch_size": 8}
    settings = {"tensorboard": False, "device": "cpu"}
    results = run(scenario, MODELS.get(name, "cnn-small"), [plugin, watch], train=train, run=settings)
    return watch, results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", STREAMS)
def test_it_learns_from_the_labels_of_the_last_experience_or_is_refused(which: str, name: str) -> None:
    setting, classes = STREAMS[which]
    cls = registry.plugin_class(name)
    if name == "always-be-dreaming" and setting != "domain" and setting in cls.settings:  # by its own check
        with pytest.raises(WrongUse, match="brings old ones back"):
            learn(name, stream(setting, classes))
        return
    if setting not in cls.settings or (cls.isolates and setting != "domain"):
        sentence = "cannot serve the setting" if setting not in cls.settings else "share the class"
        with pytest.raises(WrongUse, match=sentence):
            learn(name, stream(setting, classes))
        return
    right, _ = learn(name, stream(setting, classes))
    wrong, _ = learn(name, stream(setting, classes, reverse=len(classes) - 1))
    assert right.losses
    assert all(loss > 1e-6 for loss in right.losses.values())
    assert all(value.isfinite().all() for value in right.weights.values())
    assert any(not torch.equal(value, wrong.weights[key]) for key, value in right.weights.items())


@pytest.mark.parametrize(
    ("name", "options"),
    [("icarl", {}), ("icarl", {"batch_size": 4}), ("icarl", {"outputs": "seen"}), ("lwf", {"form": "mc"})],
)
def test_labels_of_classes_that_come_back_matter_to_sigmoid_losses(name: str, options: dict[str, Any]) -> None:
    classes = [[0, 1], [2, 3], [0, 1]]
    right, _ = learn(name, stream("class", classes), options)
    wrong, _ = learn(name, stream("class", classes, reverse=2), options)
    assert not torch.equal(right.weights["head.0.weight"], wrong.weights["head.0.weight"])


def test_lwf_mc_is_refused_in_domains() -> None:
    with pytest.raises(WrongUse, match=r"`lwf.form=mc` distils classes that an experience does not have"):
        learn("lwf", stream("domain", [[0, 1], [0, 1]]), {"form": "mc"})


def test_hard_and_soft_columns_of_the_sigmoid_loss_by_hand() -> None:
    logits, teacher = torch.zeros(2, 3), torch.zeros(2, 2)
    logits[:] = torch.tensor([1.0, -2.0, 0.5])
    targets = torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.5, 1.0]])  # row 0: column 0 by its label, which is 1
    hard = torch.tensor([[True, False], [False, False]])
    p = logits.sigmoid()
    wanted = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean(1)
    assert torch.allclose(incremental_bce(logits, torch.tensor([1, 2]), teacher, hard=hard), wanted)


class Head(Plugin):
    """Keeps which blocks of the head moved in each experience."""

    name = "head"
    observer = True

    def __init__(self) -> None:
        self.moved: list[list[int]] = []

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        self.before = [block.weight.detach().clone() for block in run.model.head]

    @hookimpl
    def after_experience(self, run: Run) -> None:
        now = [block.weight.detach() for block in run.model.head]
        self.moved.append([k for k, w in enumerate(now) if not torch.equal(w, self.before[k])])


@pytest.mark.parametrize("name", ["feature-extraction", "finetune-fc"])
@pytest.mark.parametrize(
    ("setting", "classes", "moved"),
    [
        ("class", [[0, 1], [2, 3], [0, 1]], [[0], [1], [0]]),
        ("class", [[0, 1], [1, 2], [0]], [[0], [0, 1], [0]]),
        ("domain", [[0, 1, 2, 3], [0, 1], [2, 3]], [[0], [0], [0]]),
        ("domain", [[0, 1], [0, 1, 2], [2, 0]], [[0], [0, 1], [0, 1]]),
    ],
)
def test_a_block_trains_if_the_experience_has_a_class_of_it(
    name: str, setting: Setting, classes: list[list[int]], moved: list[list[int]]
) -> None:
    head = Head()
    train = {"iterations": 3, "batch_size": 8, "logits": "seen"}
    run(stream(setting, classes), "mlp-100", [registry.build_plugin(name, {}), head], train=train, run=QUIET)
    assert head.moved == moved


def test_lfl_trains_the_head_of_a_task_whose_classes_come_back() -> None:
    head = Head()
    lfl = registry.build_plugin("lfl", {})
    train = {"iterations": 3, "batch_size": 8}
    run(stream("task", [[0, 1], [2, 3], [0, 1]]), "mlp-100", [lfl, head], train=train, run=QUIET)
    assert head.moved == [[0], [1], [0]]


QUIET = {"tensorboard": False, "device": "cpu"}


def test_the_first_class_that_comes_back() -> None:
    assert first_return([[0, 1], [2, 3]]) is None
    assert first_return([[0, 1], [2], [3, 1]]) == (0, 2, 1)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_restarted_entries_have_no_moments(kind: Callable[..., torch.optim.Optimizer]) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = kind([weight], lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    weight.square().sum().backward()
    optimizer.step()
    restart(optimizer, [(weight, torch.tensor([[True], [False], [False]]))])
    moments = [v for v in optimizer.state[weight].values() if v.shape == weight.shape]
    assert moments
    assert all(not v[0].any() and v[1:].all() for v in moments)
    restart(None, [(weight, torch.tensor(True))])


class Moments(Plugin):
    """Keeps, as an experience begins, the kept optimizer's moments of every weight that is 0."""

    name = "moments"
    observer = True

    def __init__(self) -> None:
        self.seen: list[bool] = []

    @hookimpl
    def before_experience(self, run: Run, experience: Experience) -> None:
        state = run.optimizer.state if run.optimizer else {}
        for name, p in run.model.named_parameters():
            if "parametrizations.weight.original" in name and p in state:
                self.seen.append(bool(state[p]["exp_avg_sq"][p == 0].any()))


def test_weights_that_packnet_gives_back_begin_without_moments() -> None:
    moments = Moments()
    train = {"iterations": 3, "batch_size": 8, "optimizer": "adam", "keep_optimizer": True}
    packnet = registry.build_plugin("packnet", {})
    run(stream("task", [[0, 1], [2, 3]]), "mlp-100", [packnet, moments], train=train, run=QUIET)
    assert moments.seen
    assert not any(moments.seen)
