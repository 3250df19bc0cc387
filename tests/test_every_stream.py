"""Every installed method on streams other than the built-in splits: it learns what it should, or is refused before.

`STREAMS` is the table: a further stream joins by one line, a further plugin by being installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe import (
    Batch,
    Experience,
    ImageData,
    Outputs,
    Plugin,
    Scenario,
    Transform,
    UsageError,
    contract,
    extend,
    hookimpl,
    registry,
    run,
    testing,
)
from clframe.context import Run
from clframe.data.scenario import Setting
from clframe.data.streams import find_returning_class
from clframe.model import evaluating
from clframe.toolkit import inversion
from clframe.toolkit.distill import incremental_bce
from clframe.training import restart

# options that make a plugin small; all others are at their defaults
SMALL: dict[str, dict[str, Any]] = {
    "always-be-dreaming": {"iterations": 2, "batch_size": 4, "noise": 4, "width": 4},
    "channel-gating": {"classifier_iterations": 2, "size": 12},
    "deep-inversion": {"per_class": 2, "iterations": 2},
    "der": {"size": 12},
    "er": {"size": 12},
    "generative-replay": {"hidden": [8], "z": 2, "iterations": 2},
    "icarl": {"size": 12},
}
NAMES = [name for name in registry.names("plugin") if not registry.plugin_class(name).variants]
QUIET = {"tensorboard": False, "device": "cpu"}
EACH = 4  # training images of a class


class Net(nn.Module):
    """A small network that suits every method: a convolution with a batch norm, and a fully connected layer."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.maps = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            self.last = nn.Linear(64, self.width)

    def features(self, x: Tensor) -> Tensor:
        return self.last(self.maps(x).flatten(1)).relu()


def images(classes: Sequence[Sequence[int]], index: int, part: str) -> ImageData:
    """Images of 4 x 4 pixels, in which one pixel tells the class."""
    generator = torch.Generator().manual_seed(100 * index + (part == "test"))
    y = torch.tensor(classes[index]).repeat(EACH if part == "train" else 2)
    x = torch.randint(0, 80, (len(y), 1, 4, 4), generator=generator, dtype=torch.uint8)
    x.view(len(y), -1)[torch.arange(len(y)), y] = 255
    return ImageData(x, y)


def stream(setting: Setting, classes: Sequence[Sequence[int]], reverse: int = -1, without: int = -1) -> Scenario:
    """A scenario of `images`; experience `reverse` has its training labels reversed, class `without` has none."""

    def load(index: int, part: str) -> ImageData:
        data = images(classes, index, part)
        if part == "train" and index == reverse:
            order = list(classes[index])
            y = torch.tensor([order[-1 - order.index(label)] for label in data.y.tolist()])
            data = ImageData(data.x, y)
        return data.rows((data.y != without).nonzero().flatten()) if part == "train" else data

    names = [f"class {c}" for c in range(max(map(max, classes)) + 1)]
    return Scenario("odd", setting, classes, names, (1, 4, 4), load, transform=Transform())


SPLIT = [[0, 1], [2, 3]]


class Stream(NamedTuple):
    """A stream, and how it is learned; `setting` is None where each method has the first that it serves."""

    setting: Setting | None
    classes: list[list[int]]
    train: Mapping[str, Any] = {}
    double: bool = False
    without: int = -1
    steps: Sequence[int] = ()  # of each experience; empty: 2
    options: Mapping[str, Mapping[str, Any]] = {}  # of single plugins


STREAMS: dict[str, Stream] = {
    "classes return": Stream("class", [[0, 1], [2, 3], [0, 1]]),
    "classes return among new ones": Stream("class", [[0, 1], [1, 2], [3, 0]]),
    "tasks share classes": Stream("task", [[0, 1], [1, 2], [0, 1]]),
    "domains with other label sets": Stream("domain", [[0, 1, 2, 3], [0, 1], [2, 3]]),
    "single classes": Stream("class", [[0, 1], [2], [3]]),
    "single classes in tasks": Stream("task", [[0, 1], [2], [3]]),
    "no image of a class": Stream("class", [[0, 1, 2], [3, 4]], without=1),
    "a last batch of one image, and another length of the first": Stream(
        None, SPLIT, {"epochs": 1, "iterations": None, "batch_size": 7, "first": {"epochs": 3}}, steps=(3, 1)
    ),
    "a float64 network": Stream(None, SPLIT, double=True),
    "one class first": Stream("class", [[0], [1, 2], [3, 4]], {"logits": "seen"}, options={"lwf": {"form": "seen"}}),
}


class Watch(Plugin):
    """Keeps of each experience the largest base loss and the steps of the phase `train`; compares figures with its own.

    A plugin with a predictor of its own has figures that only that predictor gives: those are not compared.
    """

    name = "watch"
    observer = True

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.steps: dict[int, int] = {}
        self.terms: dict[tuple[int, str], float] = {}  # the largest absolute value of each loss term
        self.told: list[str] = []

    @hookimpl
    def after_step(self, run: Run) -> None:
        at = run.experience.index
        self.losses[at] = max(self.losses.get(at, 0.0), run.losses["base"].item())
        self.steps[at] = self.steps.get(at, 0) + (run.phase.name == "train")
        for term, value in run.losses.items():
            self.terms[at, term] = max(self.terms.get((at, term), 0.0), value.abs().item())

    @hookimpl
    def after_eval(self, run: Run, experience: Experience) -> None:
        classes, seen = run.scenario.classes, sorted({*run.previous_classes, *experience.classes})
        others = [type(plugin) for plugin in run.plugins if plugin is not self]
        if experience.index < len(classes) - 1 or any("predictor" in contract.hooks_of(cls) for cls in others):
            return
        for reading, rows in run.accuracy.items():
            for on in range(experience.index + 1):
                data = images(classes, on, "test")
                with torch.no_grad(), evaluating(run.model):
                    scores = run.model(data.x / 255).logits
                among = list(classes[on]) if reading == "task" else seen
                right = torch.tensor(among)[scores[:, among].argmax(1)] == data.y
                assert rows[-1][on] == (right.double().mean().item() if len(among) > 1 else None)

    @hookimpl
    def after_run(self, run: Run) -> None:
        self.weights = {name: value.detach().clone() for name, value in run.model.state_dict().items()}


def learn(
    name: str, scenario: Scenario, options: Mapping[str, Any] = {}, *, double: bool = False, **train: Any
) -> Watch:
    """Learn it with the plugin `name`; what was seen."""
    watch = Watch()
    plugin = registry.build_plugin(name, SMALL.get(name, {}) | options)
    train = {"iterations": 2, "batch_size": 8} | train
    net = Net().double() if double else Net()
    listen = lambda record: watch.told.append(record["text"]) if record["kind"] == "message" else None  # noqa: E731
    run(scenario, net, [plugin, watch], train=train, run=QUIET, listeners=[listen])
    return watch


def refusal(which: str, name: str) -> str:
    """What a sentence says that refuses the method on the stream; empty: it works."""
    cls, asked = registry.plugin_class(name), STREAMS[which]
    setting = asked.setting or cls.serves[0]
    if setting not in cls.serves:
        return "cannot serve the setting"
    if find_returning_class(asked.classes) and setting != "domain":
        if name == "always-be-dreaming":
            return "brings old ones back"
        if cls.isolates:
            return "share the class"
    if which == "single classes" and name in ("always-be-dreaming", "channel-gating", "lwf", "lwm"):
        return "one class, `class 2`"
    if which == "one class first" and name in ("channel-gating", "icarl", "lwm"):
        return "is made for `train.logits="
    if which == "single classes in tasks" and name != "joint":
        return r"Experience 2 of `odd` \(and 1 more\) has one class, `class 2`"
    return ""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", STREAMS)
def test_it_learns_from_the_labels_of_the_last_experience_or_is_refused(which: str, name: str) -> None:
    asked, last = STREAMS[which], len(STREAMS[which].classes) - 1
    setting = asked.setting or registry.plugin_class(name).serves[0]

    def learned(reverse: int = -1) -> Watch:
        scenario = stream(setting, asked.classes, reverse, asked.without)
        return learn(name, scenario, asked.options.get(name, {}), double=asked.double, **asked.train)

    if sentence := refusal(which, name):
        with pytest.raises(UsageError, match=sentence) as caught:
            learned()
        if setting == "domain":  # in which classes come back as they should: that is not a reason
            assert "share the class" not in str(caught.value)
        return
    right = learned()
    steps = dict(enumerate(asked.steps or [2] * len(asked.classes)))
    if name == "joint":  # which learns once
        steps = {last: sum(steps.values())}
    if name == "icarl" and "epochs" in asked.train:  # exemplars join the images
        steps[last] = 3
    assert right.steps == steps
    one_class_first = which == "one class first"
    assert all(loss > 1e-6 for at, loss in right.losses.items() if at or not one_class_first)
    silent = {term: at for (at, term), value in reversed(right.terms.items()) if not value and steps[at] > 1}
    sentences = [f"The loss term `{term}` was 0 at every step of experience {at + 1} of" for term, at in silent.items()]
    told = [text for text in right.told if text.startswith("The loss term")]
    assert len(told) == len(sentences)
    assert all(any(text.startswith(sentence) for text in told) for sentence in sentences)
    assert all("Only one class was known" in text for text in told)
    assert all(value.isfinite().all() for value in right.weights.values())
    wanted = torch.float64 if asked.double else torch.float32
    assert {w.dtype for n, w in right.weights.items() if n.endswith("head.0.weight")} == {wanted}
    if which == "classes return":  # of the others the terms are compared below
        wrong = learned(last)
        assert any(not torch.equal(value, wrong.weights[key]) for key, value in right.weights.items())


@pytest.mark.parametrize(
    ("name", "options"),
    [("icarl", {}), ("icarl", {"batch_size": 4}), ("icarl", {"outputs": "seen"}), ("lwf", {"form": "mc"})],
)
def test_labels_of_classes_that_come_back_matter_to_sigmoid_losses(name: str, options: dict[str, Any]) -> None:
    classes = [[0, 1], [2, 3], [0, 1]]
    right = learn(name, stream("class", classes), options)
    wrong = learn(name, stream("class", classes, reverse=2), options)
    assert not torch.equal(right.weights["head.0.weight"], wrong.weights["head.0.weight"])


def test_lwf_mc_is_refused_in_domains() -> None:
    with pytest.raises(UsageError, match=r"`lwf\.form=mc` .*: choose `all`, or `--setting class`"):
        learn("lwf", stream("domain", [[0, 1], [0, 1]]), {"form": "mc"})


def test_hard_and_soft_columns_of_the_sigmoid_loss_by_hand() -> None:
    logits, teacher = torch.zeros(2, 3), torch.zeros(2, 2)
    logits[:] = torch.tensor([1.0, -2.0, 0.5])
    targets = torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.5, 1.0]])  # row 0: column 0 by its label, which is 1
    hard = torch.tensor([[True, False], [False, False]])
    p = logits.sigmoid()
    wanted = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean(1)
    assert torch.allclose(incremental_bce(logits, torch.tensor([1, 2]), teacher, hard=hard), wanted)


def test_old_columns_whose_labels_are_learned_by_hand() -> None:
    """Of the experience's own rows, the columns of its own classes; a replayed row, or another label, has none."""
    found: list[Any] = []

    class Asks(Plugin):
        name = "asks"
        observer = True

        @hookimpl
        def before_experience(self, run: Run) -> None:
            y, origin = torch.tensor([1, 4, 0, 1]), torch.tensor([0, 0, 0, 2])
            rows = Batch(torch.zeros(4, 1), y, y, y, torch.ones(4), origin)
            columns = run.labeled_columns(rows)
            found.append(None if columns is None else columns.int().tolist())

    run(stream("class", [[0, 1], [2, 3], [1, 4]]), Net(), [Asks()], train={"iterations": 1}, run=QUIET)
    assert found == [None, None, [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]]


def test_an_experience_of_one_class_that_was_learned_does_not_count_in_an_extension(tmp_path: Path) -> None:
    train, first = {"iterations": 2, "batch_size": 8}, {"output": str(tmp_path / "first")}
    run(stream("class", [[0], [1, 2]]), "mlp-100", train=train | {"logits": "seen"}, run=QUIET | first)
    coming = stream("class", [[0, 1]])
    coming.class_names = ("new", "newer")
    results = extend(tmp_path / "first", coming, train={"logits": "current"}, run={"output": str(tmp_path / "second")})
    assert results.data["classes"] == [[0], [1, 2], [3, 4]]
    coming.classes = ((0,),)
    with pytest.raises(UsageError, match=r"Experience 3 of `odd\+odd` has one class, `new`"):
        extend(tmp_path / "first", coming, train={"logits": "current"}, run={"output": str(tmp_path / "third")})


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
        ("class", [[0, 1], [2, 3], [4, 5], [0, 1]], [[0], [1], [2], [0]]),
        ("domain", [[0, 1, 2, 3], [0, 1], [2, 3]], [[0], [0], [0]]),
        ("domain", [[0, 1], [0, 1, 2], [2, 0]], [[0], [0, 1], [0, 1]]),
    ],
)
def test_a_block_trains_if_the_experience_has_a_class_of_it(
    name: str, setting: Setting, classes: list[list[int]], moved: list[list[int]]
) -> None:
    head = Head()
    train = {"iterations": 2, "batch_size": 8, "logits": "seen"}
    run(stream(setting, classes), Net(), [registry.build_plugin(name, {}), head], train=train, run=QUIET)
    assert head.moved == moved


def test_lfl_trains_the_head_of_a_task_whose_classes_come_back() -> None:
    head = Head()
    lfl = registry.build_plugin("lfl", {})
    train = {"iterations": 2, "batch_size": 8}
    run(stream("task", [[0, 1], [2, 3], [0, 1]]), Net(), [lfl, head], train=train, run=QUIET)
    assert head.moved == [[0], [1], [0]]


def test_the_first_class_that_comes_back() -> None:
    assert find_returning_class([[0, 1], [2, 3]]) is None
    assert find_returning_class([[0, 1], [2, 0]]) == (0, 1, 0)
    assert find_returning_class([[0, 1], [2], [3, 1]]) == (0, 2, 1)


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
    train = {"iterations": 2, "batch_size": 8, "optimizer": "adam", "keep_optimizer": True}
    packnet = registry.build_plugin("packnet", {})
    run(stream("task", [[0, 1], [2, 3]]), Net(), [packnet, moments], train=train, run=QUIET)
    assert moments.seen
    assert not any(moments.seen)


BACK = [[0, 1], [2, 3], [1, 0], [4, 5]]  # the first task comes back


class Teacher(Plugin):
    """Keeps the network of the experience before, in eval mode, and compares terms of the last one with `losses`."""

    name = "teacher"
    observer = True

    def __init__(self) -> None:
        self.wanted: list[dict[str, float]] = []
        self.found: list[dict[str, float]] = []
        self.losses: Callable[[Tensor, Tensor, Batch], dict[str, Tensor]] = lambda q, z, batch: {}

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Outputs) -> None:
        if run.experience.index == len(run.scenario) - 1:
            with torch.no_grad():
                self.wanted.append(
                    {n: v.item() for n, v in self.losses(self.old(batch.x).logits, outputs.logits, batch).items()}
                )

    @hookimpl
    def after_step(self, run: Run) -> None:
        if run.experience.index == len(run.scenario) - 1:
            self.found.append({name: run.losses[name].item() for name in self.wanted[-1]})

    @hookimpl
    def after_experience(self, run: Run) -> None:
        self.old = copy.deepcopy(run.model).eval()


def apart(q: Tensor, z: Tensor, temperature: float, *, entropy: bool = False) -> Tensor:
    """The cross-entropy, or KL divergence, within each of the heads of `BACK` that were learned, [B, 2]."""
    parts = []
    for head in ([0, 1], [2, 3]):
        p, log = (q[:, head] / temperature).softmax(1), (z[:, head] / temperature).log_softmax(1)
        parts.append((p * ((p.log() if entropy else 0) - log)).sum(1))
    return torch.stack(parts, 1)


def of_lwf(q: Tensor, z: Tensor, batch: Batch) -> dict[str, Tensor]:
    return {"lwf": apart(q, z, 2.0).sum(1).mean()}


def of_a_ltm(q: Tensor, z: Tensor, batch: Batch) -> dict[str, Tensor]:
    return {"a-ltm": apart(q, z, 1.0).sum(1).mean()}


def of_deep_inversion(q: Tensor, z: Tensor, batch: Batch) -> dict[str, Tensor]:
    heads, new = apart(q, z, 1.0, entropy=True), batch.origin == 0
    dreams = heads[~new, batch.y[~new] // 2]
    return {"deep-inversion/distill": heads[new].sum(1).mean(), "deep-inversion/dreams": dreams.mean()}


def of_generative_replay(q: Tensor, z: Tensor, batch: Batch) -> dict[str, Tensor]:
    new = batch.origin == 0
    own = functional.cross_entropy(z[new][:, 4:], batch.y[new] - 4)
    replayed = [functional.cross_entropy(z[~new][:, g], q[~new][:, g].argmax(1)) for g in ([0, 1], [2, 3])]
    return {"base": own / 4 + (replayed[0] + replayed[1]) / 2 * 3 / 4}


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("lwf", of_lwf),
        ("a-ltm", of_a_ltm),
        ("deep-inversion", of_deep_inversion),
        ("generative-replay", of_generative_replay),
    ],
)
def test_a_task_that_comes_back_is_one_head(name: str, losses: Any) -> None:
    teacher = Teacher()
    teacher.losses = losses
    plugin = registry.build_plugin(name, SMALL.get(name, {}))
    train = {"iterations": 3, "batch_size": 8, "lr": 0.1}
    run(stream("task", BACK), Net(), [plugin, teacher], train=train, run=QUIET)
    assert len(teacher.wanted) == 3
    for wanted, found in zip(teacher.wanted, teacher.found, strict=True):
        assert all(value > 1e-4 for value in wanted.values())
        assert found == pytest.approx(wanted, rel=1e-4)


def soft(q: Tensor, z: Tensor, temperature: float) -> Tensor:
    """The cross-entropy of two softmaxes of these logits, [B]."""
    return -((q / temperature).softmax(1) * (z / temperature).log_softmax(1)).sum(1)


def bce(targets: Tensor, z: Tensor) -> Tensor:
    """The mean over columns of -t log sigmoid(z) - (1 - t) log(1 - sigmoid(z)), [B]."""
    p = z.sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean(1)


OLD, NOW = [0, 1, 2], [3, 0]  # classes of `AGAIN` that were learned, and those of its last experience
AGAIN = [[0, 1], [1, 2], NOW]


def among(z: Tensor, y: Tensor, columns: list[int]) -> Tensor:
    """The mean cross-entropy among these columns."""
    return functional.cross_entropy(z[:, columns], torch.tensor([columns.index(label) for label in y.tolist()]))


def with_share(q: Tensor, z: Tensor, temperature: float) -> Tensor:
    """`soft`, in which the class that is new has no share of the old network's softmax."""
    p = functional.pad((q / temperature).softmax(1), (0, 1))
    return -(p * (z / temperature).log_softmax(1)).sum(1)


def sigmoids(q: Tensor, z: Tensor, batch: Batch) -> Tensor:
    """Labels in the columns of classes of the experience, for its own rows; for others in that of the new class."""
    targets = functional.one_hot(batch.y, 4).float()
    targets[:, 1:3] = q[:, 1:3].sigmoid()
    old = batch.origin > 0
    targets[old, 0] = q[old, 0].sigmoid()
    return bce(targets, z).mean()


def entropy(q: Tensor) -> Tensor:
    return -(q.softmax(1) * q.log_softmax(1)).sum(1)


Losses = Callable[[Tensor, Tensor, Batch], dict[str, Tensor]]
TERMS: list[tuple[str, dict[str, Any], Losses]] = [
    (
        "lwf",
        {"form": "local"},
        lambda q, z, b: {"base": among(z, b.y, NOW), "lwf": soft(q[:, OLD], z[:, OLD], 2).mean()},
    ),
    (
        "lwf",
        {"form": "seen"},
        lambda q, z, b: {"base": among(z, b.y, [0, 1, 2, 3]), "lwf": soft(q[:, OLD], z[:, OLD], 2).mean()},
    ),
    (
        "lwf",
        {"form": "padded"},
        lambda q, z, b: {"base": among(z, b.y, [0, 1, 2, 3]), "lwf": with_share(q, z, 2).mean()},
    ),
    ("lwf", {"form": "padded-mean"}, lambda q, z, b: {"lwf": with_share(q, z, 2).mean() / 4}),
    ("lwf", {"form": "all"}, lambda q, z, b: {"lwf": soft(q, z, 2).mean()}),
    ("lwf", {"form": "mc"}, lambda q, z, b: {"base": sigmoids(q, z, b)}),
    ("icarl", {"outputs": "seen"}, lambda q, z, b: {"base": sigmoids(q, z, b)}),
    ("icarl", {"outputs": "seen", "batch_size": 4}, lambda q, z, b: {"base": sigmoids(q, z, b)}),
    (
        "lwm",
        {"teacher_norm": "running"},
        lambda q, z, b: {"base": among(z, b.y, NOW), "lwm/distill": bce(q[:, OLD].sigmoid(), z[:, OLD]).mean()},
    ),
    ("a-ltm", {}, lambda q, z, b: {"a-ltm": soft(q[:, OLD], z[:, OLD], 1).mean()}),
    ("a-ltm", {"loss": "l2"}, lambda q, z, b: {"a-ltm": (q[:, OLD] - z[:, OLD]).square().sum(1).mean() / 2}),
    (
        "deep-inversion",
        {},
        lambda q, z, b: {
            "base": among(z[b.origin == 0], b.y[b.origin == 0], [0, 1, 2, 3]),
            "deep-inversion/distill": (soft(q[:, OLD], z[:, OLD], 1) - entropy(q))[b.origin == 0].mean(),
            "deep-inversion/dreams": (with_share(q, z, 1) - entropy(q))[b.origin > 0].mean(),
        },
    ),
    (
        "generative-replay",
        {},
        lambda q, z, b: {
            "base": among(z[b.origin == 0], b.y[b.origin == 0], [0, 1, 2, 3]) / 3
            + among(z[b.origin > 0], q[b.origin > 0].argmax(1), [0, 1, 2, 3]) * 2 / 3
        },
    ),
]


@pytest.mark.parametrize(("name", "options", "losses"), TERMS)
def test_each_column_has_its_target_where_classes_return_among_new_ones(
    name: str, options: dict[str, Any], losses: Losses
) -> None:
    teacher = Teacher()
    teacher.losses = losses
    plugin = registry.build_plugin(name, SMALL.get(name, {}) | options)
    train = {"iterations": 3, "batch_size": 6, "lr": 0.1}
    run(stream("class", AGAIN), Net(), [plugin, teacher], train=train, run=QUIET)
    assert len(teacher.wanted) == 3
    for wanted, found in zip(teacher.wanted, teacher.found, strict=True):
        assert all(value > 1e-4 for value in wanted.values())
        assert found == pytest.approx(wanted, rel=1e-4)


def test_old_heads_are_each_set_of_classes_once() -> None:
    seen: list[list[tuple[int, ...]]] = []

    class Heads(Plugin):
        name = "heads"
        observer = True

        @hookimpl
        def before_experience(self, run: Run) -> None:
            seen.append(run.old_heads)

    run(stream("task", [*BACK, [4, 0]]), Net(), [Heads()], train={"iterations": 1}, run=QUIET)
    assert seen == [[], [(0, 1)], [(0, 1), (2, 3)], [(0, 1), (2, 3)], [(0, 1), (2, 3), (4, 5)]]


def test_old_answers_of_one_class_each_are_distilled_among_all_that_take_part_in_the_loss() -> None:
    """Among the one class of a head every softmax is 1, so that nothing would be held."""
    recorder = testing.Recorder()
    train = {"iterations": 2, "batch_size": 8, "logits": "seen"}
    a_ltm = registry.build_plugin("a-ltm", {})
    run(stream("task", [[0], [1], [2, 3]]), Net(), [a_ltm, recorder], train=train, run=QUIET)
    assert min(step.losses["a-ltm"].item() for step in recorder.steps if step.experience == 2) > 1e-3


def test_a_dream_is_of_its_class_among_all_classes_of_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 2 is new in the second task, whose class 1 is the first task's: alone it would not be a choice."""
    asked: set[tuple[int, tuple[bool, ...]]] = set()
    original = inversion.inversion_loss

    def look(teacher: Any, x: Tensor, y: Tensor, weights: Any, mask: Tensor, rival: Any = None) -> Tensor:
        asked.update((label, tuple(row)) for label, row in zip(y.tolist(), mask.tolist(), strict=True))
        return original(teacher, x, y, weights, mask, rival)

    monkeypatch.setattr(inversion, "inversion_loss", look)
    learn("deep-inversion", stream("task", [[0, 1], [1, 2], [3, 4]]))
    first, second = (True, True, False), (False, True, True)
    assert asked == {(0, first[:2]), (1, first[:2]), (0, first), (1, first), (2, second)}


@pytest.mark.parametrize("name", ["always-be-dreaming", "deep-inversion", "der", "er", "generative-replay", "joint"])
@pytest.mark.parametrize("setting", ["class", "domain"])
def test_replayed_classes_must_take_part_in_the_loss(setting: Setting, name: str) -> None:
    if setting not in registry.plugin_class(name).serves:
        return
    classes = [[0, 1], [2, 3]] if setting == "class" else [[0, 1, 2], [0, 1]]
    sentence = "is made for `train.logits=seen`" if name in ("always-be-dreaming", "deep-inversion") else "brings old"
    if name == "deep-inversion" and setting == "domain":
        sentence = "brings old"
    with pytest.raises(UsageError, match=f"`{name}` .*{sentence}"):
        learn(name, stream(setting, classes), logits="current")
    if setting == "domain":  # nothing is left out
        learn(name, stream(setting, [[0, 1], [0, 1]]), logits="current")


def test_a_class_without_images_is_drawn_from_no_prior() -> None:
    recorder = testing.Recorder()
    replay: Any = registry.build_plugin("generative-replay", SMALL["generative-replay"] | {"prior": "class"})
    train = {"iterations": 12, "batch_size": 8}
    run(stream("class", [[0, 1, 2], [3, 4], [5, 6]], without=1), Net(), [replay, recorder], train=train, run=QUIET)
    batches = [step.batch for step in recorder.steps]
    assert {label for batch in batches for label in batch.y[batch.origin > 0].tolist()} == {0, 2, 3, 4}
    state = replay.generator.get_extra_state()
    assert state["met"] == [0, 2, 3, 4, 5, 6]
    del state["met"]  # as an earlier clframe wrote it: any class is drawn
    replay.generator.set_extra_state(state)
    assert set(replay.generator.recall(200, 4, torch.Generator())[1].tolist()) == {0, 1, 2, 3}


def test_a_class_without_images_leaves_the_means_of_exemplars() -> None:
    """Those of all images, which a finished run does not have, are for the time within the experience alone."""
    found = []

    class Look(Plugin):
        name = "look"
        observer = True

        @hookimpl
        def after_eval(self, run: Run) -> None:
            rows = icarl.exemplars
            with torch.no_grad(), evaluating(run.model):
                features = functional.normalize(run.model.features(rows.x / 255), dim=1)
            for label in range(len(icarl.means)):
                mean = functional.normalize(features[rows.y == label].mean(0), dim=0)
                found.append(label)
                assert torch.allclose(icarl.means[label], mean, atol=1e-5, equal_nan=True)

    icarl: Any = registry.build_plugin("icarl", {"per_class": 2})
    train = {"iterations": 2, "batch_size": 8}
    run(stream("class", [[0, 1, 2], [3, 4]], without=1), Net(), [icarl, Look()], train=train, run=QUIET)
    assert found == [0, 1, 2, 0, 1, 2, 3, 4]
    assert icarl.means.isnan().any(1).tolist() == [False, True, False, False, False]
