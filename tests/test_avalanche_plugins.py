"""Plugins of Avalanche in clframe give the weights that they give in Avalanche, bit for bit."""

from __future__ import annotations

import copy
import hashlib
import inspect
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import clframe
from clframe import registry
from clframe.avalanche.adapter import silence_warnings
from clframe.cli.main import main
from clframe.errors import DataError, UsageError
from clframe.hooks import HOOKS
from clframe.model import IncrementalNet
from clframe.options import options_of
from clframe.plugins import avalanche as adapter
from clframe.scenarios import avalanche as scenario_adapter
from clframe.settings import Component, RunSettings, TrainSettings
from clframe.testing import Recorder
from clframe.training import Sampler

pytestmark = pytest.mark.xdist_group("avalanche")  # on one worker: importing Avalanche takes 10 s

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
    recorded = Recorder()
    plugins = [{f"avalanche:{name}": options}] if name else []
    clframe.run(
        scenario_of(name, tiny),
        {"name": "mlp", "hidden": [16]},
        [*plugins, recorded],
        train={**TRAIN, **train},
        run={"device": "cpu", "seed": SEED},
    )
    return recorded


def in_avalanche(name, options, tiny, before, **train):
    """The weights after each experience of Avalanche's own strategy, on the same network and images."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset, _make_taskaware_classification_dataset
    from avalanche.training import Naive, plugins

    scenario = scenario_of(name, tiny)
    train = {**TRAIN, **train}
    net = IncrementalNet(registry.build_backbone(Component("mlp", {"hidden": [16]}), scenario.input_shape))
    model = adapter._wrap_network(net)
    inner = getattr(plugins, adapter.TESTED[name][0])(**options)
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed_of(name))))

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
    """Of `run.rng(name)` in a run with this seed."""
    return int.from_bytes(hashlib.sha256(f"{SEED}/avalanche:{name}".encode()).digest()[:7], "big")


@pytest.mark.parametrize("logits", ["all", "seen"])
@pytest.mark.parametrize(("name", "options"), [*OPTIONS.items(), *MORE])
def test_weights_are_those_of_avalanche(name, options, logits, tiny, in_order):
    if logits == "seen" and name == "LFL":
        pytest.skip("in domains there is one head")
    ours = in_clframe(name, options, tiny, logits=logits)
    theirs = in_avalanche(name, options, tiny, ours.before, logits=logits)
    plain = in_clframe("", {}, lambda **o: scenario_of(name, tiny), logits=logits)
    for a, b in zip(ours.after, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
    acts = any(not torch.equal(ours.after[-1][key], plain.after[-1][key]) for key in plain.after[-1])
    assert acts == (name != "SI")  # Avalanche's does nothing on the CPU, which is told


def test_other_plugins_and_wrong_options_are_refused_in_a_sentence(tiny):
    def refusal(plugin, options, **settings):
        with pytest.raises(UsageError) as caught:
            clframe.run(tiny(**settings), "mlp-100", [{plugin: options}], run={"device": "cpu"})
        assert len(caught.value.problems) == 1
        return str(caught.value)

    assert "The plugin `avalanche` needs a variant: write `avalanche:VARIANT`, one of AGEM, EWC" in refusal(
        "avalanche", {}
    )
    assert "`avalanche:MIR` is not among the plugins of Avalanche" in refusal("avalanche:MIR", {})
    assert "Did you mean `EWC`?" in refusal("avalanche:EWCC", {})
    assert refusal("avalanche:EWC", {}) == (
        "`avalanche:EWC.ewc_lambda` is required: give it with `--set avalanche:EWC.ewc_lambda=VALUE`."
    )
    assert "`avalanche:EWC.ewc_lambda` is 'x'" in refusal("avalanche:EWC", {"ewc_lambda": "x"})
    assert (
        "`avalanche:EWC.lambda` is not an option of the plugin `avalanche:EWC`. Did you mean `ewc_lambda`?"
        in refusal("avalanche:EWC", {"ewc_lambda": 1.0, "lambda": 1.0})
    )
    assert "Avalanche refuses these options of `avalanche:EWC`: You need to set `online` mode" in refusal(
        "avalanche:EWC", {"ewc_lambda": 1.0, "decay_factor": 0.5}
    )
    assert "cannot serve the setting `task`" in refusal("avalanche:EWC", {"ewc_lambda": 1.0}, setting="task")
    assert "it serves `domain`" in refusal("avalanche:LFL", {"lambda_e": 1.0})


def test_masks_of_logits_are_refused(tiny):
    with pytest.raises(UsageError, match=r"`avalanche:LwF` .* masked logits: leave `train\.logits=current` out"):
        clframe.run(tiny(), "mlp-100", ["avalanche:LwF"], train={"logits": "current"}, run={"device": "cpu"})


@pytest.mark.parametrize("name", ["GEM", "AGEM", "Replay"])
def test_a_run_is_a_function_of_its_seed_and_leaves_the_generators_of_others_alone(name, tiny):
    def accuracy(seed, draw):
        torch.manual_seed(draw)
        random.seed(draw)
        before = random.getstate()
        recorded = Recorder()
        run = {"device": "cpu", "seed": seed}
        clframe.run(tiny(), "mlp-100", [{f"avalanche:{name}": OPTIONS[name]}, recorded], train=TRAIN, run=run)
        assert random.getstate() == before
        return recorded.after[-1]["head.0.weight"]

    assert torch.equal(accuracy(1, 5), accuracy(1, 6))
    assert not torch.equal(accuracy(1, 5), accuracy(2, 5))


def test_images_that_a_memory_gives_are_augmented_as_those_of_the_experience(tiny):
    def distinct(pad):
        scenario, recorder = tiny(), Recorder()
        scenario.transform = clframe.Transform(pad=pad)
        plugins = [{"avalanche:Replay": {"mem_size": 2}}, recorder]
        clframe.run(scenario, "mlp-100", plugins, train=TRAIN | {"epochs": 6}, run={"device": "cpu"})
        batches = [step.batch for step in recorder.steps]
        return len({row.numpy().tobytes() for batch in batches for row in batch.x[batch.origin == 1]})

    assert distinct(pad=0) == 3  # two of the first experience, then one of each
    assert distinct(pad=2) > 10


def test_two_of_them_run_together_and_beside_plugins_of_clframe(tiny):
    plugins = [{"avalanche:EWC": {"ewc_lambda": 1.0}}, "avalanche:LwF", "mas"]
    losses = []
    listen = lambda record: losses.append(record["losses"]) if record["kind"] == "step" else None  # noqa: E731
    run = {"device": "cpu", "log_every": 1}
    clframe.run(tiny(), "mlp-100", plugins, train=TRAIN, run=run, listeners=[listen])
    assert set(losses[0]) == {"base"}
    assert set(losses[-1]) == {"base", "avalanche:EWC", "avalanche:LwF", "mas"}
    assert all(losses[-1][name] >= 0 for name in losses[-1])


def test_a_run_keeps_no_checkpoint_and_is_refused_to_resume_but_can_be_loaded(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(record):
        if record["kind"] == "eval":
            raise Stop

    def start(output, listeners=()):
        run = {"device": "cpu", "output": str(output), "tensorboard": False, "checkpoint_every": 0.0}
        train = TRAIN | {"epochs": 1}
        return clframe.run("split-digits", "mlp-100", ["avalanche:LwF"], train=train, run=run, listeners=listeners)

    with pytest.raises(Stop):
        start(tmp_path / "a", [stop])
    assert not list(tmp_path.glob("a/checkpoints/*"))
    with pytest.raises(DataError) as caught:
        clframe.resume(tmp_path / "a")
    assert str(caught.value) == (
        f"The run in {tmp_path / 'a'} cannot be resumed: what `avalanche:LwF` keeps is in no checkpoint. Start it "
        f"again with `clframe run --config {tmp_path / 'a' / 'config.yaml'}`."
    )
    results = start(tmp_path / "b")
    with pytest.raises(DataError, match=r"b cannot be extended: what `avalanche:LwF` keeps is in no checkpoint\."):
        clframe.extend(tmp_path / "b", "split-digits")
    assert len(results.accuracy["class"]) == 5
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert clframe.load(tmp_path / "b")(images).shape == (2, 10)


def test_the_page_for_those_who_come_from_avalanche_names_what_exists():
    from avalanche import training
    from avalanche.benchmarks import classic
    from avalanche.core import SupervisedPlugin
    from avalanche.training import plugins

    page = (Path(__file__).parent.parent / "docs" / "how-to" / "from-avalanche.md").read_text(encoding="utf-8")
    rows = {}
    for title in ("Benchmarks", "Methods", "Callbacks", "Settings"):
        lines = page.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()
        cells = [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:-1]] for line in lines if "`" in line]
        rows[title] = [cell for line, cell in zip([x for x in lines if "`" in x], cells, strict=True) if line[0] == "|"]
    scenarios, backends = registry.names("scenario"), {f"avalanche:{name}" for name in scenario_adapter.BENCHMARKS}
    options = {f"scenario.{option.name}" for option in options_of(scenario_adapter.benchmark, skip=registry.SUPPLIED)}
    known = options | {f"train.{name}" for name in TrainSettings.model_fields}
    known |= {f"run.{name}" for name in RunSettings.model_fields}
    builders = [getattr(classic, name) for name in scenario_adapter.BENCHMARKS]
    arguments = {name for build in builders for name in inspect.signature(build).parameters}
    for theirs, ours, *own in rows["Benchmarks"]:
        if own:
            assert all(hasattr(classic, name) for name in theirs)
            assert set(ours) <= backends
            assert set(own[0]) <= set(scenarios)
        else:
            assert set(theirs) <= arguments
            assert set(ours) <= known
    assert {name for row in rows["Benchmarks"] if len(row) == 3 for name in row[1]} == backends
    for theirs, own, inside in rows["Methods"]:
        assert all(hasattr(plugins, name) or hasattr(training, name) for name in theirs)
        assert set(own) <= set(registry.names("plugin"))
        assert all(adapter.TESTED[name.partition(":")[2]][0] == theirs[0] for name in inside)
    assert sum(len(row[2]) for row in rows["Methods"]) == len(adapter.TESTED)
    for theirs, ours in rows["Callbacks"]:
        assert all(hasattr(SupervisedPlugin, name) or name == "criterion" for name in theirs)
        assert set(ours) <= set(HOOKS)
    naive = inspect.signature(training.Naive).parameters
    for theirs, ours, _default in rows["Settings"]:
        assert set(theirs) <= set(naive)
        assert set(ours) <= known
    assert all(len(rows[title]) > 5 for title in rows)


def test_its_options_are_documented_and_those_of_avalanche():
    for variant in adapter.TESTED:
        cls = registry.plugin_class(f"avalanche:{variant}")
        assert all(option.doc for option in options_of(cls))
        assert cls.name == f"avalanche:{variant}"
        assert cls.keeps_images == (variant in ("AGEM", "GEM", "Replay"))
    assert {option.name for option in options_of(registry.plugin_class("avalanche:SI"))} == {
        *("si_lambda", "eps", "excluded_parameters"),
    }


def test_sis_blindness_on_the_cpu_is_told(tiny):
    told = []
    listen = lambda record: told.append(record["text"]) if record["kind"] == "message" else None  # noqa: E731
    plugins = [{"avalanche:SI": {"si_lambda": 1.0}}]
    clframe.run(tiny(), "mlp-100", plugins, train=TRAIN, run={"device": "cpu"}, listeners=[listen])
    assert told[0] == (
        "`avalanche:SI` does nothing on the CPU, where it compares the weights with themselves: use `si`."
    )


def test_what_avalanche_deprecates_and_calls_itself_is_not_told_and_other_warnings_are(tiny, monkeypatch):
    from avalanche.training import plugins

    after = plugins.ReplayPlugin.after_training_exp

    def warning(self, strategy, **kwargs):
        after(self, strategy, **kwargs)
        warnings.warn("the memory is odd", UserWarning, stacklevel=1)

    monkeypatch.setattr(plugins.ReplayPlugin, "after_training_exp", warning)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        clframe.run(tiny(), "mlp-100", [{"avalanche:Replay": {"mem_size": 10}}], train=TRAIN)
        assert warnings.filters == before
    assert [(w.category, str(w.message)) for w in told] == [(UserWarning, "the memory is odd")] * len(tiny())


def test_what_is_not_told_is_no_error_either():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with silence_warnings(DeprecationWarning):
            warnings.warn("theirs", DeprecationWarning, stacklevel=1)
        with pytest.raises(UserWarning, match="ours"), silence_warnings(DeprecationWarning):
            warnings.warn("ours", UserWarning, stacklevel=1)


def test_listing_and_doctor_tell_what_is_broken(capsys):
    for words in (["list"], ["show", "avalanche"]):
        assert main(["plugins", *words]) == 0
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("it cannot save a strategy") == 2
    assert printed.count("Avalanche 0.6.0 gives a forgetting of 0.0") == 2
