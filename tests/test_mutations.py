"""Facts that a deliberate mistake breaks (`benchmarks/mutations.py`), with witnesses of the tests' own."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import clframe
from clframe import ImageData, Plugin, hookimpl, registry, testing
from clframe.model import IncrementalNet
from clframe.plugins.always_be_dreaming import AlwaysBeDreaming
from clframe.plugins.channel_gating import ChannelGating
from clframe.plugins.deep_inversion import DeepInversion
from clframe.plugins.der import DER
from clframe.plugins.er import ER
from clframe.plugins.icarl import ICaRL
from clframe.plugins.packnet import PackNet
from clframe.plugins.warm_up import WarmUp
from clframe.toolkit.channel_gates import ConditionalConv
from clframe.toolkit.dreamer import Dreamer
from clframe.toolkit.generators import VAE, WGAN, mix
from clframe.toolkit.inversion import Dreaming
from clframe.toolkit.task_inference import PathPredictor

learn = partial(testing.learn, optimizer="sgd", lr=0.05, schedule="constant")
SHAPE = testing.SHAPE


def augmenting(**options: Any) -> clframe.Scenario:
    arrays = replace(testing.tiny_arrays(shape=SHAPE), transform=clframe.Transform(pad=2, flip=True))
    return clframe.split_classes("tiny", arrays, experiences=2, **options)


# ------------------------------------------------------------------------------------------ memories

KEEPING = {
    "er reservoir": lambda: ER(size=24),
    "er ring": lambda: ER(size=24, memory="ring"),
    "er balanced": lambda: ER(size=24, memory="balanced"),
    "der": lambda: DER(size=24),
    "icarl": lambda: ICaRL(size=24),
    "icarl drawn": lambda: ICaRL(size=24, batch_size=6),
    "icarl ncm": lambda: ICaRL(size=24, read_out="ncm"),
    "channel-gating": lambda: ChannelGating(size=24, classifier_iterations=2),
}


def memories(plugin: Plugin) -> list[ImageData]:
    """The images among the attributes of `plugin` and of the modules that it holds."""
    holders = [plugin, *(m for v in vars(plugin).values() if isinstance(v, nn.Module) for m in v.modules())]
    return [value for holder in holders for value in vars(holder).values() if isinstance(value, ImageData)]


@pytest.mark.parametrize("build", KEEPING.values(), ids=KEEPING.keys())
def test_a_memory_keeps_images_as_the_data_set_has_them(build: Any) -> None:
    """Not the crops and mirrored images that were trained on, which would be cropped and mirrored again."""
    scenario, plugin = augmenting(), build()
    raw = {int(i): (x, int(y)) for e in scenario for x, y, i in zip(e.train.x, e.train.y, e.train.index, strict=True)}
    learn(scenario, plugin, epochs=1)
    kept = memories(plugin)
    assert sum(map(len, kept)) >= 24
    for memory in kept:
        assert memory.x.dtype == torch.uint8
        for x, y, i in zip(memory.x, memory.y, memory.index, strict=True):
            assert torch.equal(x, raw[int(i)][0])
            assert int(y) == raw[int(i)][1]


def test_each_plugin_that_keeps_images_is_among_those() -> None:
    keeping = {name for name in registry.names("plugin") if registry.plugin_class(name).keeps_images is True}
    assert keeping - {"joint"} == {name.split()[0] for name in KEEPING}  # joint asks the scenario for them each time


@pytest.mark.parametrize("name", ["er reservoir", "er ring", "der", "icarl drawn"])
def test_images_of_a_memory_are_augmented_each_time(name: str) -> None:
    recorder = testing.Recorder()
    learn(augmenting(), KEEPING[name](), recorder)
    views: dict[int, set[bytes]] = {}
    for batch in (step.batch for step in recorder.steps):
        for x, i in zip(batch.x[batch.origin == 1], batch.index[batch.origin == 1], strict=True):
            views.setdefault(int(i), set()).add(x.numpy().tobytes())
    assert max(map(len, views.values())) > 1


@pytest.mark.parametrize("build", [ER, DER])
def test_a_reservoir_is_not_filled_in_other_phases(tiny, build: Any) -> None:
    """A warm-up before, and a retraining after, show images that the training shows, too."""
    plugin = build(size=200)
    learn(tiny(shape=SHAPE), plugin, WarmUp())
    assert plugin.seen == 3 * 2 * 24
    assert len(plugin.kept) == 3 * 2 * 24


def test_der_draws_for_each_of_its_terms(tiny) -> None:
    recorder = testing.Recorder()
    learn(tiny(shape=SHAPE), DER(size=20, batch_size=5), recorder)
    alike = []
    for batch in (step.batch for step in recorder.steps[3:]):
        first, second = (sorted(batch.index[batch.targets["der/term"] == t].tolist()) for t in (1, 2))
        assert len(first) == len(second) == 5
        alike.append(first == second)
    assert sum(alike) <= 1  # 5 of 20 images are the same 5 with a chance of 1 in 15504, at each of 15 steps


# --------------------------------------------------------------------------------------------- iCaRL


class Weights(Plugin):
    """Joins two rows to each batch, of weights 0 and 3, and computes the loss of algorithm 3 by its own copy."""

    name = "weights"

    def __init__(self) -> None:
        self.teacher: nn.Module | None = None
        self.compared: list[int] = []

    @hookimpl
    def extra_batch(self, run, batch):
        rows = run.experience.train.rows(slice(2))
        rows.weight = torch.tensor([0.0, 3.0])
        return run.batch(rows)

    @hookimpl
    def penalty(self, run, batch, outputs):
        z = outputs.logits.detach()
        targets = functional.one_hot(batch.y, z.shape[1]).float()
        if self.teacher is not None:
            with torch.no_grad():
                soft = self.teacher(batch.x).logits.sigmoid()
            old = batch.y < 3
            targets[old, :3] = soft[old, :3]
            targets[~old, :3] = soft[~old, :3]
        losses = functional.binary_cross_entropy_with_logits(z, targets, reduction="none").mean(1)
        self.expected = float((losses * batch.weight).sum() / batch.weight.sum())
        assert set(batch.weight.tolist()) == {0.0, 1.0, 3.0}

    @hookimpl
    def after_step(self, run, batch):
        assert run.losses["base"].item() == pytest.approx(self.expected, rel=1e-4)
        self.compared.append(run.experience.index)

    @hookimpl
    def after_experience(self, run):
        self.teacher = copy.deepcopy(run.model).eval()


def test_icarls_loss_counts_rows_by_their_weight_and_its_teacher_is_in_evaluation_mode() -> None:
    weights = Weights()
    learn(testing.tiny(), ICaRL(size=24), weights, epochs=1)
    assert set(weights.compared) == {0, 1}


TEACHING = {
    "a-ltm": {},
    "always-be-dreaming": {"iterations": 2, "batch_size": 8, "noise": 10, "width": 8},
    "deep-inversion": {"per_class": 2, "iterations": 2},
    "generative-replay": {"hidden": [16], "z": 4, "iterations": 2},
    "icarl": {"size": 24},
    "lfl": {},
    "lwf": {},
    "lwm": {},
}


@pytest.mark.parametrize("name", TEACHING)
def test_a_teacher_is_a_frozen_network_in_evaluation_mode(name: str) -> None:
    plugin = registry.build_plugin(name, TEACHING[name])
    seen: list[int] = []

    class Look(Plugin):
        name = "look"
        observer = True

        @hookimpl
        def after_step(self, run, batch):
            for value in vars(plugin).values():
                if isinstance(value, IncrementalNet) and value is not run.model:
                    assert not any(m.training for m in value.modules())
                    assert not any(p.requires_grad for p in value.parameters())
                    seen.append(run.experience.index)

    learn(testing.tiny(type(plugin).serves[0]), plugin, Look(), epochs=1)
    assert set(seen) == {1}


# -------------------------------------------------------------------------------------------- dreams


def drawn_dreams(plugin: Plugin) -> list[set[bytes]]:
    recorder = testing.Recorder()
    learn(testing.tiny(), plugin, recorder)
    return [{x.numpy().tobytes() for x in batch.x[batch.origin == 1]} for batch in recorder.batches(1)]


def test_every_dream_has_a_chance() -> None:
    """8 of 30 dreams join each of 10 steps."""
    steps = drawn_dreams(DeepInversion(per_class=10, iterations=2))
    assert all(len(step) <= 8 for step in steps)
    assert len(set().union(*steps)) > 16


def test_a_generator_makes_other_dreams_for_each_step() -> None:
    steps = drawn_dreams(AlwaysBeDreaming(iterations=2, batch_size=8, noise=10, width=8))
    assert len(set().union(*steps)) == sum(map(len, steps)) == 2 * 24


def test_annealing_begins_at_the_whole_rate_and_ends_at_none() -> None:
    dreaming = Dreaming()
    dreaming.begin(torch.zeros(1, 1, 4, 4), 0.2)
    rates = []
    for done in (0.0, 1 / 3, 0.5, 1.0):
        dreaming.slow_down(0.2, done)
        rates.append(dreaming.adam.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2, 0.15, 0.1, 0.0])


def test_the_rival_is_taught_in_train_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch norms count the steps, and end with other statistics than those of a new network."""
    original, counts = Dreaming._teach_rival, list[set[int]]()

    def teach(self, *args):
        original(self, *args)
        counts.append({int(v) for n, v in self.rival.items() if n.endswith("num_batches_tracked")})
        assert all(v.abs().sum() > 0 for n, v in self.rival.items() if n.endswith("running_mean"))

    monkeypatch.setattr(Dreaming, "_teach_rival", teach)
    learn(testing.tiny(), DeepInversion(per_class=4, iterations=5, compete=1.0, rounds=3), epochs=1)
    assert len(counts) == 2
    first, second = (next(iter(count)) for count in counts)
    assert second - first == 5


# ---------------------------------------------------------------------------------------- generators


def tracked(module: nn.Module) -> set[int]:
    return {int(v) for n, v in module.state_dict().items() if n.endswith("num_batches_tracked")}


def test_a_generator_of_dreams_is_trained_in_train_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    original, counts = Dreamer.learn, list[set[int]]()

    def learned(self, *args):
        original(self, *args)
        assert not self.generator.training
        counts.append(tracked(self.generator))

    monkeypatch.setattr(Dreamer, "learn", learned)
    learn(testing.tiny(), AlwaysBeDreaming(iterations=7, batch_size=8, noise=10, width=8), epochs=1)
    assert counts == [{7}]


def test_a_wgan_is_trained_in_train_mode_and_its_generator_has_batch_norms() -> None:
    """As in the paper: one before each activation of the generator, and none in the critic."""
    gan = WGAN(SHAPE, "conv", (4, 6), z=3, critic_steps=2)
    kinds = [type(layer).__name__ for layer in gan.decoder.children()]
    assert kinds == ["Linear", "Unflatten", *["BatchNorm2d", "ReLU", "ConvTranspose2d"] * 2]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in gan.critic.modules())
    vae = VAE(SHAPE, "conv", (4, 6), z=3)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in vae.modules())

    gan.eval()
    generator = torch.Generator().manual_seed(0)
    gan.step(gan.optimizer(), lambda: mix((torch.rand(5, *SHAPE), None, 1.0)), generator)
    assert tracked(gan.decoder) == {3}  # two passes for the critic, one for the generator


# ------------------------------------------------------------------------------ gates, masks, clipping


def test_the_share_of_images_that_makes_a_kernel_relevant_counts() -> None:
    """No kernel fires for more than all images, so that with a share of 1 none is fixed."""
    shares: list[float] = []

    class Look(Plugin):
        name = "look"
        observer = True

        @hookimpl
        def after_eval(self, run):
            convs = [m for m in run.model.modules() if isinstance(m, ConditionalConv)]
            shares.append(sum(float(c.used_channels(run.experience.index + 1).any()) for c in convs) / len(convs))

    for relevance in (0.0, 1.0):
        learn(testing.tiny("task"), ChannelGating(relevance=relevance), Look(), epochs=1)
    assert shares == [1.0, 1.0, 0.0, 0.0]


def test_a_task_classifier_learns_from_all_images() -> None:
    plugin, rows = ChannelGating(size=200, classifier_iterations=60), list[torch.Tensor]()
    hook = plugin.classifier.register_forward_pre_hook(
        lambda _, args: rows.append(args[0]) if torch.is_grad_enabled() else None
    )
    learn(testing.tiny(), plugin, lr=0.01, epochs=1)
    hook.remove()
    assert len(torch.cat(rows)) == 60 * 8
    assert len(torch.cat(rows).unique(dim=0)) > 40  # of 48 images of two tasks, some of which may look alike


@pytest.mark.parametrize(
    "build", [PackNet, lambda: ChannelGating(sparsity_after=1.0)], ids=["packnet", "channel-gating"]
)
def test_gradients_that_are_held_have_no_share_in_the_clipping_norm(build: Any) -> None:
    """A step of SGD whose gradient is clipped moves the weights by lr * clip in all, whatever part of them is held."""
    moved: dict[int, list[float]] = {0: [], 1: []}

    class Measure(Plugin):
        name = "measure"
        observer = True

        @hookimpl
        def after_backward(self, run):
            self.before = [p.detach().clone() for p in run.model.parameters()]

        @hookimpl
        def after_step(self, run, batch):
            now = list(run.model.parameters())
            if run.phase.name == "train" and run.step + 1 < run.steps_in_phase:  # the last step prunes
                squares = [(p.detach() - q).square().sum() for p, q in zip(now, self.before, strict=True)]
                moved[run.experience.index].append(float(torch.stack(squares).sum().sqrt()))

    learn(testing.tiny("task"), build(), Measure(), clip=1e-2, lr=1.0)
    assert len(moved[1]) > 4
    for lengths in moved.values():
        assert lengths == pytest.approx([1e-2] * len(lengths), rel=1e-3)


# ---------------------------------------------------------------------------------------- evaluation


def test_evaluation_uses_and_keeps_running_statistics() -> None:
    """A network with batch norms gives each test image the answer that it has alone, and learns nothing from it."""
    statistics: list[dict[str, torch.Tensor]] = []

    class Look(Plugin):
        name = "look"
        observer = True

        def take(self, run: Any) -> None:
            statistics.append({n: b.clone() for n, b in run.model.named_buffers() if "running" in n or "num" in n})
            self.model = copy.deepcopy(run.model).eval()

        @hookimpl
        def after_experience(self, run):
            self.take(run)

        @hookimpl
        def after_eval(self, run):
            self.take(run)

    look, scenario = Look(), testing.tiny()
    results = learn(scenario, look, epochs=1)
    for before, after in zip(statistics[::2], statistics[1::2], strict=True):
        assert before
        assert not testing.differing(before, after)
    for on, experience in enumerate(scenario):
        x = scenario.transform.normalize(experience.test.x)
        with torch.no_grad():
            alone = torch.cat([look.model(x[k : k + 1]).logits for k in range(len(x))]).argmax(1)
        assert results.accuracy["class"][1][on] == (alone == experience.test.y).double().mean().item()


class Paths(nn.Module):
    """A network of two paths, whose logits are 1 on the first and 2 on the second; features are the images."""

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(features=x, logits=(task + 1.0)[:, None].expand(-1, 4))


class Signs(nn.Module):
    """A task classifier for which images above 0 are of the second task."""

    tasks = 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.stack([-features[:, 0], features[:, 0]], 1)


def test_a_path_is_chosen_for_each_image_by_itself() -> None:
    scores = PathPredictor(Paths(), Signs(), [[0, 1], [2, 3]])(torch.tensor([[1.0], [-1.0], [1.0]]))
    low = -torch.inf
    assert scores.tolist() == [[low, low, 2.0, 2.0], [1.0, 1.0, low, low], [low, low, 2.0, 2.0]]


# ------------------------------------------------------------------------------- the table of mutations


def load() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "mutations.py"
    spec = importlib.util.spec_from_file_location("mutations", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module
    spec.loader.exec_module(module)
    return module


def test_each_mutation_still_fits_the_code_and_names_a_test_that_is_there() -> None:
    mutations = load()
    for mutation in mutations.MUTATIONS:
        mutations.mutated(mutation)
        for test in mutation.tests:
            file, name = test.split("::")
            assert f"def {name.split('[')[0]}(" in (mutations.ROOT / file).read_text(), test
    stale = replace(mutations.MUTATIONS[0], search="no such line")
    with pytest.raises(SystemExit, match="occurs 0 times"):
        mutations.mutated(stale)


@pytest.mark.long
def test_each_mutation_is_killed() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "mutations.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
