"""Networks as people build them (`testing.NETWORKS`), in everything that reads or changes parameters."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clframe import Results, UsageError, load, registry, testing
from clframe.deploy.trained import Trained
from clframe.model import IncrementalNet, snapshot
from clframe.testing import NETWORKS, SHAPE, Answers, learn, seeded, state_copy
from clframe.toolkit.importance import label_cotangents, norm_cotangents
from clframe.toolkit.per_sample import GradientSums, zeros_for


def network(name: str) -> IncrementalNet:
    """The same weights each time."""

    def build() -> IncrementalNet:
        net = IncrementalNet(NETWORKS[name](), [3])
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
        return net

    return seeded(build, 5).eval()


X = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))


def one_by_one(net: nn.Module, x: Tensor, reduce: str) -> dict[str, Tensor]:
    """Sums over images and outputs of the squared, or absolute, gradient of each image alone, in float64."""
    wanted = dict(net.double().named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for row in x.double():
        z = net(row[None]).logits[0]
        p = z.detach().softmax(0)
        losses = [p[k].sqrt() * z.log_softmax(0)[k] for k in range(3)] if reduce == "square" else [z.square().sum()]
        for loss in losses:
            gradients = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True, allow_unused=True)
            for total, g in zip(sums.values(), gradients, strict=True):
                total += 0 if g is None else g.square() if reduce == "square" else g.abs()
    return sums


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(("name", "reduce"), list(itertools.product(NETWORKS, ("square", "abs"))))
def test_importance_is_that_of_a_loop_over_images(name: str, reduce: str):
    """Fisher information and MAS of all parameters, by whatever name; the network is as it was afterwards."""
    net = network(name)
    parameters = dict(net.named_parameters())
    places = [(m, set(m._parameters)) for m in net.modules()]
    before = state_copy(net)
    sums = zeros_for(parameters)
    for part in X.split(3):
        vectors = norm_cotangents if reduce == "abs" else lambda z: label_cotangents(z, "exact")
        GradientSums(net, sums, reduce).add(part, None, vectors)
    wanted = one_by_one(network(name), X, reduce)
    assert {key for key, value in wanted.items() if value.any()} >= {"head.0.weight", "head.0.bias"}
    for key, value in wanted.items():
        assert (sums[key] - value).abs().max() <= 2e-4 * value.abs().max() + 1e-9, key
    after = dict(net.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[key] is parameter for key, parameter in parameters.items())
    assert all(set(m._parameters) == names for m, names in places)
    assert all(isinstance(p, nn.Parameter) for m, _ in places for p in m._parameters.values() if p is not None)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    net(X).logits.sum().backward()
    learning = [key for key, parameter in parameters.items() if parameter.grad is not None and parameter.grad.any()]
    assert {key for key, value in wanted.items() if value.any()} <= set(learning)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_teacher_answers_as_the_network_did_after_its_last_step(name: str):
    """Weights that hooks of torch compute from others are those of now, and stay so when the network learns on."""
    net = network(name)
    net(X).logits.sum().backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.01)
    teacher = snapshot(net)
    wanted = net(X).logits.detach()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    net(X)
    assert torch.allclose(teacher(X).logits, wanted, atol=1e-6)  # attention has a path of its own without gradients
    assert not any(p.requires_grad for p in teacher.parameters())


# -------------------------------------------------------------------------------------- every plugin on them

NAMES = [name for name in registry.names("plugin") if not registry.plugin_class(name).variants]
SMALL: dict[str, dict[str, Any]] = {
    "always-be-dreaming": {"iterations": 2, "batch_size": 6, "noise": 6, "width": 8},
    "channel-gating": {"classifier_iterations": 2, "size": 12},
    "deep-inversion": {"per_class": 2, "iterations": 2},
    "der": {"size": 12},
    "er": {"size": 24},
    "generative-replay": {"hidden": [8], "z": 2, "iterations": 3},
    "icarl": {"size": 24},
}
NEED_MORE = ["lwm", "deep-inversion", "always-be-dreaming"]  # maps of several pixels, batch norms
STILL = ["feature-extraction", "finetune-fc"]  # which train the head, or the end of the network


def learned(name: str, net: nn.Module, folder: Path | None = None, **settings: Any) -> tuple[Results, Answers]:
    """What the plugin `name` learns of two tasks, or classes of two experiences, and each task's answers over time."""
    plugin = registry.build_plugin(name, SMALL.get(name, {}))
    setting: Any = "task" if "task" in plugin.serves else plugin.serves[0]
    answers, output = Answers(), str(folder) if folder else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plugins = [plugin, answers] if plugin.isolates else [plugin]
        settings = {"iterations": 3, "batch_size": 12, "lr": 0.001, **settings}
        results = learn(testing.tiny(setting), *plugins, model=net, output=output, **settings)
    return results, answers


def given(name: str) -> nn.Module:
    return network(name).backbone.train()


def scores(trained: Trained) -> Tensor:
    x = torch.randint(0, 256, (6, *SHAPE), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    answer: Tensor = trained(x, 1 if trained.needs_task else None)
    return answer


@pytest.mark.parametrize("name", NAMES)
def test_in_place_activations_change_nothing_and_the_given_network_stays(name: str, tmp_path: Path):
    """The same scores as those of activations that are not in place; `Results.trained` answers as `load` does."""
    net, found = given("in-place activations"), []
    before = state_copy(net)
    try:
        results, _ = learned(name, net, tmp_path / "run")
    except UsageError as refused:
        with pytest.raises(UsageError, match=re.escape(str(refused))):
            learned(name, given("convolutions"))
        return
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(module.inplace for module in net.modules() if isinstance(module, nn.ReLU))
    assert net.training
    found = scores(results.trained)
    assert results.trained.backbone is not net
    assert torch.equal(found, scores(learned(name, given("convolutions"))[0].trained))
    if registry.plugin_class(name).resumes:
        plugins = [registry.build_plugin(name, SMALL.get(name, {})), Answers()]
        again = load(tmp_path / "run", model=net, plugins=plugins[: 1 + plugins[0].isolates])
        assert torch.equal(scores(again), found)
        assert again.temperature == results.trained.temperature


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["one block at two places", "a layer called twice", "tied weights"])
def test_shared_parameters_learn_or_are_refused(kind: str, name: str):
    """They stay parameters, and those that the plugin trains move; where tasks are isolated, old answers do not."""
    plugin = registry.plugin_class(name)
    try:
        results, answers = learned(name, given(kind))
    except UsageError as refused:
        assert plugin.isolates or name in NEED_MORE
        sentence = str(refused)
        assert any(why in sentence for why in ("weight of another module", "used elsewhere", "choose a", "has none"))
        return
    trained = results.trained
    if plugin.isolates:
        assert answers.same()
    parameters = [p for m in trained.modules() for p in m._parameters.values() if p is not None]
    assert all(isinstance(parameter, nn.Parameter) for parameter in parameters)
    if not plugin.isolates and name not in STILL:
        start = dict(given(kind).named_parameters())
        assert {n for n, p in trained.backbone.named_parameters() if not torch.equal(p, start[n])} == set(start)


@pytest.mark.parametrize("name", NAMES)
def test_float64_networks_learn_as_float32_ones(name: str):
    """In their own precision, and with the same scores but for rounding."""
    plain = {"optimizer": "sgd", "lr": 0.02}  # Adam divides by the size of the gradient, and so enlarges rounding
    try:
        results, _ = learned(name, given("convolutions").double(), **plain)
    except UsageError as refused:
        with pytest.raises(UsageError, match=re.escape(str(refused))):
            learned(name, given("convolutions"), **plain)
        return
    found, wanted = scores(results.trained), scores(learned(name, given("convolutions"), **plain)[0].trained)
    assert found.dtype == torch.float64
    if name in (
        "hat",
        "channel-gating",
    ):  # saturated gates lose in float32 what float64 keeps; noise is drawn otherwise
        assert found[:, 3:].isfinite().all()
        return
    assert torch.allclose(found, wanted.double(), atol=1e-4, rtol=1e-4)
