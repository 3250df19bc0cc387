"""Plugins of clframe inside a strategy of Avalanche give the weights that they give in clframe."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import clframe
from clframe import Plugin, hookimpl, registry
from clframe.avalanche.adapter import AvalancheModel, as_avalanche
from clframe.errors import UsageError
from clframe.plugins.ewc import EWC
from clframe.plugins.finetune_fc import FinetuneFC
from clframe.plugins.icarl import ICaRL
from clframe.plugins.lfl import LFL
from clframe.plugins.lwf import LwF
from clframe.plugins.mas import MAS
from clframe.plugins.si import SI
from clframe.training import Sampler

pytestmark = pytest.mark.xdist_group("avalanche")  # on one worker: importing Avalanche takes 10 s

TRAIN = {"optimizer": "sgd", "lr": 0.1, "batch_size": 7, "epochs": 3, "clip": 0.0, "logits": "all"}
CLASSES = 6


class Net(nn.Module):
    """The same network for both: a backbone of clframe, and with its last layer a model of Avalanche."""

    width = 16

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def features(self, x):
        return torch.relu(self.first(x.flatten(1)))

    def forward(self, x):
        return self.last(self.features(x))


class Backbone(Net):
    """Without the last layer, which is the head."""

    def __init__(self):
        super().__init__()
        del self.last


class SameHead(Plugin):
    """Begins with the head of `Net`, and keeps the weights of each experience's end."""

    name = "same-head"
    observer = True

    def __init__(self) -> None:
        self.after: list[list[torch.Tensor]] = []

    @hookimpl
    def before_experience(self, run, experience):
        if experience.index:
            return
        last, begin = Net().last, 0
        for block in run.model.head:
            end = begin + block.out_features
            with torch.no_grad():
                block.weight.copy_(last.weight[begin:end])
                block.bias.copy_(last.bias[begin:end])
            begin = end

    @hookimpl
    def after_experience(self, run):
        first, head = run.model.backbone.first, run.model.head
        parts = [torch.cat([getattr(block, n).detach() for block in head]) for n in ("weight", "bias")]
        self.after.append([p.detach().clone() for p in (first.weight, first.bias)] + parts)


def in_order(self):
    while self.step < self.steps:
        start = self.step % self.batches_per_epoch * self._batch_size
        self.step += 1
        yield torch.arange(self._n)[start : start + self._batch_size]


def in_clframe(plugins, scenario, monkeypatch):
    monkeypatch.setattr(Sampler, "__iter__", in_order)
    same = SameHead()
    clframe.run(scenario, Backbone(), [same, *plugins], train=TRAIN, run={"device": "cpu", "seed": 0})
    return same.after


def benchmark_of(scenario, numbers=None, tasks=(0, 0, 0)):
    """The benchmark of Avalanche with the images of `scenario`, its classes numbered by `numbers`."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import _make_taskaware_classification_dataset

    numbers = numbers or list(range(CLASSES))

    class Images(torch.utils.data.Dataset):
        def __init__(self, data):
            self.x, self.targets = scenario.transform.normalize(data.x), [numbers[c] for c in data.y.tolist()]

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, i):
            return self.x[i], self.targets[i]

    parts = {
        part: [
            _make_taskaware_classification_dataset(Images(getattr(e, part)), task_labels=task)
            for e, task in zip(scenario, tasks, strict=True)
        ]
        for part in ("train", "test")
    }
    return benchmark_from_datasets(**parts)


def in_avalanche(plugins, benchmark, numbers=None):
    from avalanche.training import Naive

    model = Net()
    if numbers:
        with torch.no_grad():
            for parameter in (model.last.weight, model.last.bias):
                parameter[numbers] = parameter.clone()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=TRAIN["lr"]),
        train_mb_size=TRAIN["batch_size"],
        train_epochs=TRAIN["epochs"],
        plugins=plugins,
        evaluator=None,
    )
    after = []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[], shuffle=False)
        weights = copy.deepcopy([p.detach() for p in model.parameters()])
        if numbers:
            weights[2], weights[3] = weights[2][numbers], weights[3][numbers]
        after.append(weights)
    return after


def difference(a, b):
    return max(float((p - q).abs().max()) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True))


METHODS = [
    lambda: EWC(lambda_=50.0),
    lambda: EWC(lambda_=50.0, form="online", labels="sampled", samples=10, heads=False),
    lambda: LwF(lambda_=2.0, form="all"),
    lambda: SI(c=20.0),
    lambda: MAS(lambda_=2.0),
    lambda: MAS(lambda_=2.0, form="local", heads=True),
]


@pytest.mark.parametrize("setting", ["class", "domain"])
@pytest.mark.parametrize("make", METHODS)
def test_weights_are_those_of_clframe(make, setting, tiny, monkeypatch):
    scenario = tiny(setting=setting)
    if setting == "domain":
        monkeypatch.setitem(globals(), "CLASSES", 2)
    ours = in_clframe([make()], scenario, monkeypatch)
    plain = in_clframe([], scenario, monkeypatch)
    given = benchmark_of(scenario)
    theirs = in_avalanche([as_avalanche(make(), given)], given)
    assert difference(ours, theirs) < 1e-6
    assert difference(ours, plain) > 1e-4


def test_two_of_them_add_up(tiny, monkeypatch):
    scenario = tiny()
    ours = in_clframe([EWC(lambda_=20.0), LwF(form="all")], scenario, monkeypatch)
    given = benchmark_of(scenario)
    theirs = in_avalanche([as_avalanche(EWC(lambda_=20.0), given), as_avalanche(LwF(form="all"), given)], given)
    assert difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("make", [METHODS[0], METHODS[2]])
def test_classes_may_be_numbered_in_any_order(make, tiny, monkeypatch):
    numbers = [4, 5, 0, 2, 1, 3]
    scenario = tiny()
    given = benchmark_of(scenario, numbers)
    ours = in_clframe([make()], scenario, monkeypatch)
    theirs = in_avalanche([as_avalanche(make(), given)], given, numbers)
    assert difference(ours, theirs) < 1e-5  # sums are in another order


def test_around_gives_what_goes_into_the_last_layer_and_scores_by_label():
    net, x = Net(), torch.rand(5, 1, 4, 4)
    around = AvalancheModel(net, torch.tensor([2, 0, 1, 5]))
    outputs = around(x)
    assert torch.equal(outputs.features, net.features(x))
    assert torch.equal(outputs.logits, net(x)[:, [2, 0, 1, 5]])
    assert (around.n_classes, AvalancheModel(net, torch.arange(6)).order) == (4, None)
    assert [name for name, _ in around.named_parameters()] == [
        *("head.0.weight", "head.0.bias", "backbone.first.weight", "backbone.first.bias"),
    ]
    copied = clframe.snapshot(around)
    assert torch.equal(copied(x).logits, outputs.logits)
    assert not net.last._forward_pre_hooks


def refusal(plugin, scenario, model=None, tasks=(0, 0, 0)):
    from avalanche.training import Naive

    given = benchmark_of(scenario, tasks=tasks)
    model = model or Net()
    with pytest.raises(UsageError) as caught:
        Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            plugins=[as_avalanche(plugin, given)],
            evaluator=None,
        ).train(given.train_stream, eval_streams=[])
    assert len(caught.value.problems) == 1
    return str(caught.value)


class Isolating(Plugin):
    name = "isolating"
    isolates = True

    @hookimpl
    def after_step(self, run):
        raise AssertionError("the run was to be refused")


def classes_again(scenario):
    """`scenario`, whose last experience is its first again."""
    load, classes = scenario._load, [*scenario.classes[:-1], scenario.classes[0]]

    def other(index, part):
        return load(index % (len(classes) - 1), part)

    return clframe.Scenario("again", "class", classes, scenario.class_names, scenario.input_shape, other)


def test_what_has_no_place_there_is_refused_in_a_sentence(tiny):
    from avalanche.models import DynamicModule

    assert "no place for its hook `extra_data`" in refusal(ICaRL(), tiny())
    assert "no place for its hook `base_loss`" in refusal(LwF(form="mc"), tiny())
    assert "is made for `train.logits=current`" in refusal(LwF(form="local"), tiny())
    assert "`finetune-fc` cannot run inside Avalanche" in refusal(FinetuneFC(), tiny())
    assert "`lfl` cannot run inside Avalanche" in refusal(LFL(), tiny())
    assert "in phases of its own" in refusal(LwF(form="all", warm_up=1.0), tiny())
    assert "share the class `0`" in refusal(Isolating(), classes_again(tiny()))
    assert "several tasks" in refusal(EWC(), tiny(), tasks=(0, 1, 2))
    assert "must end in a linear layer of at least 6 scores" in refusal(EWC(), tiny(), nn.Linear(16, 3))
    growing = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), type("Growing", (nn.Identity, DynamicModule), {})())
    assert "a model that grows" in refusal(EWC(), tiny(), growing)


RUNS_THERE = {"a-ltm", "ewc", "lwf", "lwm", "mas", "si"}
METHODS = [n for n in registry.names("plugin") if not registry.plugin_class(n).variants and n not in RUNS_THERE]


@pytest.mark.parametrize("name", METHODS)
def test_every_other_method_is_refused_before_the_first_step(name, tiny):
    from avalanche.training import Naive

    given, model = benchmark_of(tiny()), Net()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        adapted = as_avalanche(registry.build_plugin(name, {}), given)
        Naive(model=model, optimizer=optimizer, plugins=[adapted], evaluator=None).train(given.train_stream)

    with pytest.raises(UsageError, match=f"`{name}`"):
        train()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
