"""Networks as people build them (`networks_table`), in everything that reads or changes parameters."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks_table import NETWORKS, SHAPE
from torch import Tensor, nn

from clframe.importance import label_cotangents, norm_cotangents
from clframe.model import IncrementalNet, snapshot
from clframe.per_sample import GradientSums, zeros_for


def network(name: str) -> IncrementalNet:
    """The same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = IncrementalNet(NETWORKS[name](), [3])
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
    return net.eval()


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
    before = {key: value.detach().clone() for key, value in net.state_dict().items()}
    sums = zeros_for(parameters)
    for part in X.split(3):
        vectors = norm_cotangents if reduce == "abs" else lambda z: label_cotangents(z, "exact")
        GradientSums(net, sums, reduce).add(part, None, vectors)  # type: ignore[arg-type]
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
