"""Plugins of Avalanche in clframe give the weights that they give in Avalanche, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import clframe
from clframe import Plugin, hookimpl, registry
from clframe.errors import WrongUse
from clframe.model import IncrementalNet
from clframe.plugins import avalanche as adapter
from clframe.training import Sampler

OPTIONS = {
    "AGEM": {"patterns_per_experience": 6, "sample_size": 8},
    "EWC": {"ewc_lambda": 50.0},
    "GEM": {"patterns_per_experience": 6, "memory_strength": 0.1},
    "LFL": {"lambda_e": [0.0, 3.0, 3.0]},
    "LwF": {"alpha": 2.0},
    "MAS": {"lambda_reg": 5.0},
    "Replay": {"mem_size": 10},
    "SI": {"si_lambda": 1000.0},
}
MORE = [
    ("EWC", {"ewc_lambda": 50.0, "mode": "online", "decay_factor": 0.5}),
    ("LwF", {"alpha": [0.0, 1.0, 2.0], "temperature": 3.0}),
    ("Replay", {"mem_size": 7, "batch_size_mem": 3}),
]
TRAIN = {"optimizer": "sgd", "lr": 0.1, "batch_size": 7, "epochs": 3, "clip": 0.0}
SEED = 5


class Recorded(Plugin):
    """Keeps the weights as each experience begins and ends."""

    name = "recorded"
    observer = True

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.after: list[dict[str, torch.Tensor]] = []

    @hookimpl
    def before_experience(self, run):
        self.before.append(copy.deepcopy(run.model.state_dict()))

    @hookimpl
    def after_experience(self, run):
        self.after.append(copy.deepcopy(run.model.state_dict()))


class Callbacks:
    """An Avalanche plugin whose callbacks draw from random numbers of their own, as the adapter has it."""

    def __init__(self, inner, seed):
        self.inner, self.drawing = inner, adapter.Randomness(seed)

    def __getattr__(self, event):
        call = getattr(self.inner, event)

        def drawn(strategy, **kwargs):
            with self.drawing:
                return call(strategy, **kwargs)

        return drawn if event.startswith(("before", "after")) else call


@pytest.fixture
def in_order(monkeypatch):
    """Images are trained on in the order of the data set, here and in Avalanche."""

    def positions(self):
        while self.step < self.steps:
            start = self.step % self.batches_per_epoch * self._batch_size
            self.step += 1
            yield torch.arange(self._n)[start : start + self._batch_size]

    monkeypatch.setattr(Sampler, "__iter__", positions)
    monkeypatch.setattr(adapter.AvalanchePlugin, "arguments", {"shuffle": False})


def scenario_of(name, tiny):
    return tiny(setting="domain" if name == "LFL" else "class")


def in_clframe(name, options, tiny, **train):
    recorded = Recorded()
    plugins = [{f"avalanche:{name}": options}] if name else []
    results = clframe.run(
        scenario_of(name, tiny),
        {"name": "mlp", "hidden": [16]},
        [*plugins, recorded],
        train={**TRAIN, **train},
        run={"device": "cpu", "seed": SEED},
    )
    return recorded, results


def in_avalanche(name, options, tiny, before, **train):
    """The weights after each experience of Avalanche's own strategy, on the same network and images."""
    from avalanche.benchmarks.utils import AvalancheDataset, _make_taskaware_classification_dataset
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.training import Naive, plugins

    scenario = scenario_of(name, tiny)
    train = {**TRAIN, **train}
    net = IncrementalNet(registry.build_backbone({"name": "mlp", "hidden": [16]}, scenario.input_shape))
    model = adapter._view(net)
    inner = getattr(plugins, adapter.TESTED[name][0])(**options)
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed_of(f"avalanche:{name}"))))

    class Images(torch.utils.data.Dataset):
        def __init__(self, data):
            self.x, self.targets = scenario.transform.normalize(data.x), data.y.tolist()

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, i):
            return self.x[i], self.targets[i]

    sets = [_make_taskaware_classification_dataset(Images(e.train), task_labels=0) for e in scenario]
    assert all(isinstance(data, AvalancheDataset) for data in sets)
    benchmark = benchmark_from_datasets(train=sets)
    strategy = None
    after = []
    for experience, start in zip(benchmark.train_stream, before, strict=True):
        for size in [w.shape[0] for k, w in start.items() if k.startswith("head.") and k.endswith("weight")][
            len(net.head) :
        ]:
            net.grow(size)
        if strategy is None:
            net.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=train["lr"], momentum=train.get("momentum", 0.0))
            strategy = Naive(
                model=model,
                optimizer=optimizer,
                criterion=nn.CrossEntropyLoss(),
                train_mb_size=train["batch_size"],
                train_epochs=train["epochs"],
                plugins=[Callbacks(inner, seed)],
                evaluator=None,
            )
        else:  # what is learnt is the strategy's own; only a new head begins as there
            new = {k: v for k, v in start.items() if k.startswith(f"head.{len(net.head) - 1}.")}
            if train.get("logits") != "all" and name != "LFL":
                net.load_state_dict(new, strict=False)
        strategy.train(experience, eval_streams=[], shuffle=False)
        after.append(copy.deepcopy(net.state_dict()))
    return after


def seed_of(name):
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{SEED}/{name}".encode()).digest()[:7], "big")


@pytest.mark.parametrize("logits", ["all", "seen"])
@pytest.mark.parametrize(("name", "options"), [*OPTIONS.items(), *MORE])
def test_weights_are_those_of_avalanche(name, options, logits, tiny, in_order):
    if logits == "seen" and name == "LFL":
        pytest.skip("in domains there is one head")
    ours, results = in_clframe(name, options, tiny, logits=logits)
    theirs = in_avalanche(name, options, tiny, ours.before, logits=logits)
    plain, _ = in_clframe("", {}, lambda **o: scenario_of(name, tiny), logits=logits)
    for a, b in zip(ours.after, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
    assert any(not torch.equal(ours.after[-1][key], plain.after[-1][key]) for key in plain.after[-1])
