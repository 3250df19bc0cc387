"""Fine-tuning of fully connected layers: exactly these and the new head move, and what lies below stays as it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clframe
from clframe import testing
from clframe.errors import UsageError
from clframe.plugins.finetune_fc import FinetuneFC
from clframe.testing import Recorder

MOVERS = {  # all that moves weights whose gradient is zero
    "sgd": {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "decay": "all"},
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "decay": "all"},
}


class ConvFC(nn.Module):
    """Two convolutions with batch norms, of which one learns nothing, and two fully connected layers with one."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.convs = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1),
                nn.BatchNorm2d(4, affine=False),
                nn.ReLU(),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.ReLU(),
            )
            self.one = nn.Linear(64, 8)
            self.norm = nn.BatchNorm1d(8)
            self.two = nn.Linear(8, 6)

    def features(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.one(self.convs(x).flatten(1))).relu()).relu()


class Flat(nn.Module):
    """As some write them: all layers in one container, a batch norm that learns nothing behind the convolution."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1),
                nn.BatchNorm2d(4, affine=False),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(64, 6),
                nn.BatchNorm1d(6, affine=False),
                nn.ReLU(),
            )

    def features(self, x: Tensor) -> Tensor:
        return self.net(x)


learn = partial(testing.learn, model=ConvFC(), keep_optimizer=True, **MOVERS["adam"])


def both(*modules: str) -> set[str]:
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


@pytest.mark.parametrize("mover", sorted(MOVERS))
@pytest.mark.parametrize(
    ("last", "layers"),
    [(None, ["backbone.one", "backbone.two"]), (2, ["backbone.one", "backbone.two"]), (1, ["backbone.two"])],
)
def test_behind_convolutions_the_fully_connected_layers_learn(tiny, mover: str, last: int | None, layers: list[str]):
    """All else stays: old heads, convolutions, and running statistics, those of a norm without parameters included.

    Guards against rows frozen by zeroing gradients and against batch norms left in training mode."""
    recorder = Recorder()
    learn(tiny(setting="task"), FinetuneFC(last=last), recorder, **MOVERS[mover])
    assert recorder.changed(0) == set(recorder.after[0])
    assert recorder.changed(1) == both(*layers, "head.1")
    assert recorder.changed(2) == both(*layers, "head.2")


def test_a_norm_without_parameters_goes_with_the_layer_before_it(tiny):
    """In one container with trained layers, that of the frozen convolution keeps its statistics, the other does not."""
    recorder = Recorder()
    learn(tiny(), FinetuneFC(), recorder, model=Flat())
    moved = {f"backbone.net.5.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert recorder.changed(1) == both("backbone.net.4", "head.1") | moved


@pytest.mark.parametrize(("last", "layers"), [(None, ["5"]), (1, ["5"]), (2, ["3", "5"]), (3, ["1", "3", "5"])])
def test_without_convolutions_the_last_layer_learns(tiny, last: int | None, layers: list[str]):
    recorder = Recorder()
    model = {"name": "mlp", "hidden": [8, 7, 6]}
    learn(tiny(), FinetuneFC(last=last), recorder, model=model)
    assert recorder.changed(0) == set(recorder.after[0])
    for i in (1, 2):
        assert recorder.changed(i) == both(*(f"backbone.net.{layer}" for layer in layers), f"head.{i}")


def test_features_that_came_with_weights_stay_from_the_first_experience_on(tiny):
    recorder = Recorder()
    learn(tiny(), FinetuneFC(pretrained=True, last=1), recorder)
    assert [recorder.changed(i) for i in range(3)] == [both("backbone.two", f"head.{i}") for i in range(3)]
    expected = ConvFC().convs.state_dict()
    assert all(torch.equal(v, expected[name]) for name, v in recorder.model.backbone.convs.state_dict().items())


def test_in_domains_the_one_head_goes_on_learning(tiny):
    recorder = Recorder()
    learn(tiny(setting="domain"), FinetuneFC(last=1), recorder)
    assert recorder.changed(1) == recorder.changed(2) == both("backbone.two", "head.0")


def test_its_warm_up_trains_the_new_head_alone(tiny):
    recorder = Recorder()
    learn(tiny(), FinetuneFC(warm_up=1.0), recorder)
    assert [phase for i, phase in recorder.phase_ends if i == 1] == ["warm-up", "train"]
    assert recorder.changed_in_phase(1, "warm-up") == both("head.1")
    assert recorder.changed(1) == both("backbone.one", "backbone.two", "head.1")


@pytest.mark.parametrize("model", [ConvFC, None])
def test_a_stop_anywhere_changes_no_bit(tiny, tmp_path: Path, model: Any):
    """What was frozen is frozen again, and afterwards all is trainable, where it was stopped and where it ended."""

    def begin(folder: Path) -> None:
        recorders.append(Recorder())
        learn(tiny(), FinetuneFC(), recorders[-1], model=model() if model else "mlp-100", output=str(folder))

    def go_on(folder: Path) -> None:
        recorders.append(Recorder())
        given = {"model": model()} if model else {}
        clframe.resume(folder, scenario=tiny(), plugins=[FinetuneFC(), recorders[-1]], **given)

    recorders: list[Recorder] = []
    testing.stop_and_resume(tmp_path, begin, go_on, places=5)
    for recorder in recorders:
        assert all(p.requires_grad for p in recorder.model.parameters())
        assert all(module.training for module in recorder.model.modules())


def test_a_backbone_that_lacks_the_layers_is_refused(tiny):
    scenario = tiny(shape=(1, 8, 8))
    with testing.refused("`finetune-fc`", "`feature-extraction`", "mlp or torchvision:vgg16"):
        learn(scenario, FinetuneFC(), model="cnn-small")
    with testing.refused("`finetune-fc.last` is 3", "`net.1`, `net.3`"):
        learn(scenario, FinetuneFC(last=3), model="mlp-100")
    with testing.refused("`finetune-fc.warm_up`", "domain", "`--setting`"):
        learn(tiny(setting="domain"), FinetuneFC(warm_up=1.0), model="mlp-100")
    with pytest.raises(UsageError, match=r"`finetune-fc\.last` is 0: .* 1\.$"):
        FinetuneFC(last=0)
