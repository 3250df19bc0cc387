"""Feature extraction: what is frozen stays to the last bit, also what no gradient moves; a new head learns on top."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clframe
from clframe import Plugin, hookimpl, snapshot, testing
from clframe.errors import RunError, UsageError
from clframe.plugins.feature_extraction import FeatureExtraction, TwoLayers
from clframe.testing import Answers, Recorder

MOVERS = {  # all that moves weights whose gradient is zero
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "decay": "all", "keep_optimizer": True},
    "adam": {"optimizer": "adam", "weight_decay": 0.1, "decay": "all", "keep_optimizer": True},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "decay": "all"},
}


class Small(nn.Module):
    """A convolution with two batch norms, of which one learns nothing, and a layer that a user froze."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.plain = nn.BatchNorm2d(4, affine=False)
            self.linear = nn.Linear(64, 6)
            self.own = nn.Linear(6, 6).requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        x = self.plain(self.norm(self.conv(x)).relu())
        return self.own(self.linear(x.flatten(1)).relu())


learn = partial(testing.learn, model=Small())

HEAD_1 = {"head.1.weight", "head.1.bias"}
HEAD_2 = {"head.2.weight", "head.2.bias"}
OWN = {"backbone.own.weight", "backbone.own.bias"}  # what the user froze


@pytest.mark.parametrize("mover", sorted(MOVERS))
@pytest.mark.parametrize("setting", ["class", "task"])
def test_an_experience_changes_the_new_head_and_nothing_else(tiny, setting: str, mover: str):
    """Guards against rows frozen by zeroing gradients, which momentum, Adam and weight decay move, and against batch
    norms left in training mode, those that learn nothing included."""
    recorder = Recorder()
    learn(tiny(setting=setting), FeatureExtraction(), recorder, **MOVERS[mover])
    first = recorder.changed(0)
    assert {"backbone.conv.weight", "backbone.norm.running_mean", "backbone.plain.running_var"} < first
    assert {"head.0.weight", "head.0.bias"} < first
    assert recorder.changed(1) == HEAD_1
    assert recorder.changed(2) == HEAD_2


def test_without_it_the_same_run_changes_everything(tiny):
    """What the test above asserts is the method's doing."""
    recorder = Recorder()
    learn(tiny(setting="task"), recorder, **MOVERS["adam"])
    trained = {name for name in recorder.after[1] if "backbone.own" not in name}
    assert recorder.changed(1) == trained


@pytest.mark.parametrize("hidden", [None, 5])
def test_where_the_task_is_told_nothing_is_forgotten(tiny, hidden: int | None):
    """R[T][j] = R[j][j], exactly, and so are all scores of an old task."""
    answers = Answers(x=torch.linspace(0, 1, 5 * 16).view(5, 1, 4, 4))
    results = learn(tiny(setting="task"), FeatureExtraction(hidden=hidden), answers, epochs=1)
    rows = results.accuracy["task"]
    assert all(rows[i][j] == rows[j][j] for i in range(3) for j in range(i))
    assert results.measures["task"]["forgetting"] == 0
    assert answers.same()


def test_in_domains_the_one_head_goes_on_learning(tiny):
    recorder = Recorder()
    learn(tiny(setting="domain"), FeatureExtraction(), recorder, **MOVERS["sgd"])
    assert recorder.changed(1) == recorder.changed(2) == {"head.0.weight", "head.0.bias"}


@pytest.mark.parametrize("logits", ["seen", "all"])
def test_a_head_that_stands_from_the_start_is_trained_block_by_block(tiny, logits: str):
    """Blocks of classes to come are not old ones; with the loss over all logits they are trained, too."""
    recorder = Recorder()
    learn(tiny(), FeatureExtraction(), recorder, logits=logits)
    assert recorder.changed(1) == HEAD_1 | (HEAD_2 if logits == "all" else set())
    assert recorder.changed(2) == HEAD_2


def test_features_that_came_with_weights_stay_from_the_first_experience_on(tiny):
    recorder = Recorder()
    learn(tiny(), FeatureExtraction(pretrained=True, hidden=3), recorder, **MOVERS["adam"])
    assert [len(recorder.changed(i)) for i in range(3)] == [4, 4, 4]
    for i in range(3):
        assert {name.split(".")[0] + name.split(".")[1] for name in recorder.changed(i)} == {f"head{i}"}
        assert isinstance(recorder.model.head[i], TwoLayers)
    assert testing.differing(recorder.model.backbone.state_dict(), Small().state_dict()) == []


def test_a_new_head_has_a_hidden_layer_of_that_many_units(tiny):
    recorder = Recorder()
    learn(tiny(), FeatureExtraction(hidden=5), recorder)
    first, *others = recorder.model.head
    assert type(first) is nn.Linear
    for block in others:
        assert {name: tuple(p.shape) for name, p in block.named_parameters()} == {
            "hidden.weight": (5, 6),
            "hidden.bias": (5,),
            "out.weight": (2, 5),
            "out.bias": (2,),
        }
    names = {f"head.2.{layer}.{kind}" for layer in ("hidden", "out") for kind in ("weight", "bias")}
    assert recorder.changed(2) == names
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    p = dict(others[0].named_parameters())
    hidden = (features @ p["hidden.weight"].T + p["hidden.bias"]).clamp(min=0)
    torch.testing.assert_close(others[0](features), hidden @ p["out.weight"].T + p["out.bias"])
    assert recorder.model.blocks == [2, 2, 2]
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    copied_net, expected = snapshot(recorder.model), recorder.model.eval()(x)
    assert torch.equal(copied_net(x).logits, expected.logits)
    assert torch.equal(expected.head(1), others[0](expected.features))
    recorder.model.train()


def test_hidden_layers_are_drawn_from_the_seed_and_leave_the_global_generator_alone(tiny):
    class Around(Plugin):
        observer = True

        def __init__(self) -> None:
            self.states: list[Tensor] = []

        @hookimpl
        def grow(self, run, experience):
            self.states.append(torch.get_rng_state())

    class Before(Around):
        name = "before"

    class After(Around):
        name = "after"

    before, after = Before(), After()
    drawn = []
    for seed in (1, 1, 2):
        recorder = Recorder()
        around = () if drawn else (before, after)
        learn(tiny(), *around[:1], FeatureExtraction(hidden=5), *around[1:], recorder, seed=seed)
        drawn.append([recorder.before[i][f"head.{i}.hidden.weight"] for i in (1, 2)])
    assert all(torch.equal(a, b) for a, b in zip(before.states, after.states, strict=True))
    assert len(before.states) == 3
    first, again, other = drawn
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("options", [{"hidden": 5}, {"hidden": 5, "pretrained": True, "warm_up": 1.0}])
def test_a_stop_anywhere_changes_no_bit(tiny, tmp_path: Path, options: Any):
    """The hidden layers are built again before their weights are loaded, and what was frozen is frozen again."""
    recorders: list[Recorder] = []

    def begin(folder: Path) -> None:
        recorders.append(Recorder())
        learn(tiny(), FeatureExtraction(**options), recorders[-1], epochs=1, **MOVERS["adam"], output=str(folder))

    def go_on(folder: Path) -> None:
        recorders.append(Recorder())
        clframe.resume(folder, scenario=tiny(), model=Small(), plugins=[FeatureExtraction(**options), recorders[-1]])
        assert all(module.training for module in recorders[-1].model.modules())

    testing.stop_and_resume(tmp_path, begin, go_on, places=6)
    assert all(frozen(recorder.model) == OWN for recorder in recorders)
    whole = recorders[0]
    loaded = clframe.load(tmp_path / "whole", model=Small(), plugins=[FeatureExtraction(**options), Recorder()])
    x = tiny()[2].test.x
    whole.model.eval()
    assert torch.equal(loaded(x), whole.model(x.float() / 255).logits)


def frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_as_trainable_as_before(tiny, fails: bool):
    """What the user froze stays frozen; all else is trainable again, also after an error."""

    class Failing(Plugin):
        name = "failing"

        @hookimpl
        def after_step(self, run, batch):
            if fails and run.experience.index == 1:
                assert not run.model.backbone.conv.weight.requires_grad
                assert not run.model.backbone.norm.training
                assert not run.model.backbone.plain.training
                raise KeyError("lost")

    recorder = Recorder()
    plugins = FeatureExtraction(), Failing(), recorder
    if fails:
        with pytest.raises(RunError, match="failing"):
            learn(tiny(), *plugins)
    else:
        learn(tiny(), *plugins)
    assert frozen(recorder.model) == OWN
    assert all(module.training for module in recorder.model.modules())


def test_its_warm_up_is_a_phase_of_the_new_head(tiny):
    recorder = Recorder()
    learn(tiny(), FeatureExtraction(warm_up=1.0), recorder)
    assert [where[:2] for where in recorder.phase_steps()] == [
        (0, "train"),
        *((i, phase) for i in (1, 2) for phase in ("warm-up", "train")),
    ]
    assert recorder.changed(2) == HEAD_2


@pytest.mark.parametrize(("option", "value"), [("warm_up", 0.5), ("hidden", 4)])
def test_what_is_about_new_heads_is_refused_in_domains(tiny, option: str, value: float):
    with testing.refused(f"`feature-extraction.{option}`", "domain", "leave", "`--setting`"):
        learn(tiny(setting="domain"), FeatureExtraction(**{option: value}))
    with pytest.raises(UsageError, match=r"`feature-extraction\.hidden` is 0: .* 1\.$"):
        FeatureExtraction(hidden=0)
