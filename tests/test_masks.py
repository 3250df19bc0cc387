"""Parts of a network that belong to tasks: masks of weights, owners, held entries, norms and gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clframe.backbones import FeatureNet, cnn_small, mlp, resnet18, resnet32
from clframe.toolkit.norms import TaskNorm, add_task_norms
from clframe.toolkit.probing import find_followers, propagate_importance
from clframe.toolkit.unit_gates import AttentionGate, gate_layers
from clframe.toolkit.weight_masks import (
    PinnedEntries,
    WeightMask,
    WeightOwner,
    find_modules,
    layers_of,
    mask_weights,
    pack_bits,
    threshold,
    unpack_bits,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(build: Any, *args: Any, **options: Any) -> nn.Module:
    """A module whose weights, and statistics of norms, are drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net: nn.Module = build(*args, **options)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                if module.affine:
                    nn.init.normal_(module.weight)
                    nn.init.normal_(module.bias)
    return net


def set_task(net: nn.Module, task: int) -> None:
    for module in net.modules():
        if hasattr(module, "task"):
            module.task = task


# ------------------------------------------------------------------------------------ masks of weights


def test_a_real_mask_becomes_1_above_the_threshold_and_minus_1_below_0_if_ternary():
    """Strictly above: at the threshold it is 0."""
    real = torch.tensor([-0.5, -0.0, 0.0, 0.1, 0.25, 0.2500001, 3.0])
    assert threshold(real, 0.25).tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert threshold(real, 0.25, ternary=True).tolist() == [-1, 0, 0, 0, 0, 1, 1]
    assert threshold(real.double(), 0.25).dtype == torch.float64


@pytest.mark.parametrize("ternary", [False, True])
def test_backward_the_threshold_is_the_identity(ternary: bool):
    real = torch.randn(50, generator=generator()).requires_grad_()
    grad = torch.randn(50, generator=generator(1))
    threshold(real, 0.1, ternary).backward(grad)
    assert torch.equal(real.grad, grad)


@pytest.mark.parametrize("ternary", [False, True])
def test_the_real_mask_of_a_layer_gets_the_gradient_of_the_masked_weight_times_the_weight(ternary: bool):
    """Mallya et al., eq. 3 and 4: for y = (W m) x and the loss g y, dL/dm = (g x^T) W, where the mask is 0, too."""
    layer = seeded(nn.Linear, 4, 3).double()
    weight = layer.weight.detach().clone()
    (mask,) = mask_weights(nn.Sequential(layer), lambda w: WeightMask(w, 0, 0.01, 0.005, ternary)).values()
    mask.begin(weight)
    with torch.no_grad():
        mask.real.copy_(torch.linspace(-0.02, 0.03, 12).view(3, 4))
    x, g = (torch.randn(5, n, dtype=torch.float64, generator=generator(n)) for n in (4, 3))
    y = layer(x)
    expected = (weight * threshold(mask.real, 0.005, ternary)).detach()
    torch.testing.assert_close(y, x @ expected.T + layer.bias, rtol=1e-12, atol=1e-12)
    (y * g).sum().backward()
    torch.testing.assert_close(mask.real.grad, (g.T @ x) * weight, rtol=1e-12, atol=1e-12)
    assert 0 < (expected == 0).sum() < 12
    assert (mask.real.grad != 0).all()


@pytest.mark.parametrize("n", range(1, 21))
def test_bits_are_packed_by_eight_and_come_back(n: int):
    bits = torch.rand(n, generator=generator(n)) < 0.5
    data = pack_bits(bits)
    assert (data.dtype, data.shape) == (torch.uint8, (-(-n // 8),))
    assert torch.equal(unpack_bits(data, n), bits)
    assert torch.equal(unpack_bits(pack_bits(torch.ones(n, dtype=torch.bool)), n), torch.ones(n, dtype=torch.bool))


def weight_mask(first: int = 1, ternary: bool = False, shape: tuple[int, ...] = (3, 5)) -> tuple[Tensor, WeightMask]:
    weight = torch.randn(shape, generator=generator())
    return weight, WeightMask(weight, first, 0.01, 0.005, ternary)


def learn_mask(mask: WeightMask, weight: Tensor, task: int) -> Tensor:
    """Begin the task, draw its real mask, and finish; the mask as it was while it was real."""
    mask.begin(weight)
    mask.task = task
    assert torch.equal(mask.mask(), torch.ones_like(weight))
    with torch.no_grad():
        mask.real.copy_(torch.randn(weight.shape, generator=generator(task)) * 0.01)
    real = mask.mask().detach().clone()
    assert mask.finish() == pytest.approx((real != 0).float().mean().item())
    return real


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_each_task_has_its_mask_and_those_before_the_first_have_the_weight_itself(first: int, ternary: bool):
    weight, mask = weight_mask(first, ternary)
    assert mask(weight) is weight
    masks = [learn_mask(mask, weight, first + k) for k in range(3)]
    assert len({tuple(m.flatten().tolist()) for m in masks}) == 3
    assert any((m < 0).any() for m in masks) == ternary
    assert mask.bits.shape == (3, 2 if ternary else 1, 2)  # 15 weights are 2 bytes a plane
    for task in range(first):
        mask.task = task
        assert mask(weight) is weight
    for k, expected in enumerate(masks):
        mask.task = first + k
        assert torch.equal(mask.mask(), expected)
        assert torch.equal(mask(weight), weight * expected)


def test_while_a_task_is_learnt_the_earlier_masks_are_their_bits():
    weight, mask = weight_mask()
    old = learn_mask(mask, weight, 1)
    mask.begin(weight)
    assert isinstance(mask.real, nn.Parameter)
    for task, expected in ((0, torch.ones_like(weight)), (1, old), (2, torch.ones_like(weight))):
        mask.task = task
        assert torch.equal(mask(weight), weight * expected)
    assert mask.mask().requires_grad


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("ternary", [False, True])
def test_a_mask_is_loaded_whether_or_not_its_task_is_learnt(ternary: bool, finished: bool):
    """Into one that was begun as often, as growth is replayed: a real mask that is not saved is gone."""
    weight, mask = weight_mask(ternary=ternary)
    masks = [learn_mask(mask, weight, k) for k in (1, 2)]
    mask.begin(weight)
    with torch.no_grad():
        mask.real.copy_(torch.randn(weight.shape, generator=generator(9)) * 0.01)
    mask.task = 3
    masks.append(mask.mask().detach().clone())
    if finished:
        mask.finish()
    saved = copy.deepcopy(mask.state_dict())
    assert ("real" in saved) is not finished
    _, loaded = weight_mask(ternary=ternary)
    for _ in range(3):
        loaded.begin(weight)
    loaded.load_state_dict(saved)
    assert (loaded.real is None) is finished
    for k, expected in enumerate(masks, start=1):
        loaded.task = k
        assert torch.equal(loaded.mask(), expected)


def test_masks_are_put_over_every_linear_layer_and_convolution_and_found_by_the_layer():
    net = seeded(cnn_small, (1, 8, 8), widths=[2, 3])
    made = mask_weights(net, lambda w: WeightMask(w, 0, 0.01, 0.005))
    assert list(made) == ["net.0", "net.3"]
    assert find_modules(net, WeightMask) == made
    assert find_modules(net, WeightOwner) == {}


# --------------------------------------------------------------------------------------------- owners


def test_a_task_takes_the_largest_of_what_is_free_and_the_rest_is_0():
    weight = nn.Parameter(torch.tensor([[0.1, -0.9, 0.3, 0.0], [-0.5, 0.2, 0.8, -0.4]]))
    owner = WeightOwner(weight)
    owner.take(weight, 0.5)
    assert owner.owner.tolist() == [[0, 1, 0, 0], [1, 0, 1, 1]]
    torch.testing.assert_close(weight.data, torch.tensor([[0.0, -0.9, 0.0, 0.0], [-0.5, 0.0, 0.8, -0.4]]))
    assert owner.owner.dtype == torch.uint8
    with torch.no_grad():
        weight[0] = torch.tensor([0.05, -0.9, -0.06, 0.01])
        weight[1, 1] = 0.04
    owner.latest = 1
    owner.take(weight, 0.25)  # one of the four that are free, however large the others are
    assert owner.owner.tolist() == [[0, 1, 2, 0], [1, 0, 1, 1]]
    torch.testing.assert_close(weight.data, torch.tensor([[0.0, -0.9, -0.06, 0.0], [-0.5, 0.0, 0.8, -0.4]]))


def test_a_task_sees_what_it_and_those_before_it_own_and_the_latest_sees_all():
    weight = torch.arange(1.0, 7.0).view(2, 3)
    owner = WeightOwner(weight)
    owner.owner.copy_(torch.tensor([[1, 2, 0], [3, 1, 0]]))
    owner.latest = 2
    seen = {0: [[1, 0, 0], [0, 5, 0]], 1: [[1, 2, 0], [0, 5, 0]], 2: [[1, 2, 3], [4, 5, 6]]}
    for task, expected in seen.items():
        owner.task = task
        assert owner(weight).tolist() == expected
    owner.latest = 3  # another comes, and the one before sees its own alone
    owner.task = 2
    assert owner(weight).tolist() == [[1, 2, 0], [4, 5, 0]]


def test_equal_magnitudes_are_taken_in_order_and_a_rest_of_none_takes_none():
    weight = nn.Parameter(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    owner = WeightOwner(weight)
    owner.take(weight, 0.5)
    assert owner.owner.tolist() == [1, 1, 0, 0]
    owner.latest = 1
    owner.take(weight, 1.0)
    owner.latest = 2
    owner.take(weight, 0.5)
    assert owner.owner.tolist() == [1, 1, 2, 2]


# ----------------------------------------------------------------------------------------------- held


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_held_entries_stay_to_the_bit_and_the_others_move(optimizer: str):
    """With momentum that is there already, decay, and a mask that is broadcast."""
    weight, bias = (nn.Parameter(torch.randn(shape, generator=generator())) for shape in ((4, 3), (4,)))
    steps: Any = {
        "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    }
    stepper = steps[optimizer]([weight, bias])

    def step(held: PinnedEntries | None) -> None:
        stepper.zero_grad()
        (weight.sin().sum() + bias.square().sum()).backward()
        if held:
            held.clear_gradients()
            assert (weight.grad[rows] == 0).all()
        stepper.step()
        if held:
            held.put_back()

    rows = torch.tensor([True, False, True, False])
    step(None)
    before = weight.detach().clone(), bias.detach().clone()
    held = PinnedEntries([(weight, rows[:, None]), (bias, rows)])
    for _ in range(3):
        step(held)
    for parameter, old in zip((weight, bias), before, strict=True):
        assert torch.equal(parameter[rows], old[rows])
        assert (parameter[~rows] != old[~rows]).all()


def test_what_has_no_gradient_is_held_too():
    weight = nn.Parameter(torch.ones(2))
    held = PinnedEntries([(weight, torch.tensor([True, False]))])
    held.clear_gradients()
    with torch.no_grad():
        weight.fill_(5)
    held.put_back()
    assert weight.tolist() == [1, 5]


# ---------------------------------------------------------------------------------------------- norms


def test_each_task_has_statistics_of_its_own_and_a_new_norm_is_as_new():
    norm = nn.BatchNorm2d(3, momentum=0.5)
    with torch.no_grad():
        norm.weight.fill_(2)
    norm.running_mean.fill_(7)
    norm.requires_grad_(False)
    by_task = TaskNorm(norm)
    by_task.add()
    new = by_task.norms[1]
    assert new is not norm
    assert (new.weight.tolist(), new.bias.tolist()) == ([1] * 3, [0] * 3)
    assert (new.running_mean.tolist(), new.running_var.tolist()) == ([0] * 3, [1] * 3)
    assert all(p.requires_grad for p in new.parameters())
    assert (norm.weight.tolist(), norm.running_mean.tolist(), norm.weight.requires_grad) == ([2] * 3, [7] * 3, False)
    assert new.momentum == 0.5
    x = torch.randn(4, 3, 2, 2, generator=generator())
    before = copy.deepcopy(norm.state_dict())
    by_task.task = 1
    assert torch.equal(by_task(x), copy.deepcopy(new)(x))
    assert (new.running_mean != 0).all()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    by_task.task = 0
    moved = copy.deepcopy(new.state_dict())
    assert torch.equal(by_task(x), copy.deepcopy(norm)(x))
    assert all(torch.equal(value, moved[name]) for name, value in new.state_dict().items())


def test_norms_are_put_by_task_once_wherever_they_stand():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.BatchNorm2d(2)
            self.norms = nn.ModuleList([nn.BatchNorm2d(2), nn.BatchNorm2d(3)])

    net = Listed()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    add_task_norms(net)
    assert list(find_modules(net, TaskNorm)) == ["first", "norms.0", "norms.1"]
    names = [name for name, _ in net.named_modules()]
    add_task_norms(net)
    assert [name for name, _ in net.named_modules()] == names
    assert [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == norms


# ---------------------------------------------------------------------------------------------- gates

NETS = {
    "cnn-small": (lambda: seeded(cnn_small, (1, 8, 8), widths=[4, 4, 6]), (1, 8, 8)),
    "resnet32": (lambda: seeded(resnet32, (3, 8, 8)), (3, 8, 8)),
    "resnet18": (lambda: seeded(resnet18, (3, 8, 8)), (3, 8, 8)),
}


@pytest.mark.parametrize("name", NETS)
def test_each_convolution_finds_its_norm(name: str):
    build, shape = NETS[name]
    net = build()
    found = find_followers(net, layers_of(net), (nn.BatchNorm2d,), shape)
    if name == "cnn-small":
        assert found == {"net.0": "net.1", "net.3": "net.4", "net.6": "net.7"}
        return
    expected = {conv: conv.replace("conv", "bn").replace("downsample.0", "downsample.1") for conv in layers_of(net)}
    assert found == expected
    assert len(found) == {"resnet32": 31, "resnet18": 20}[name]


def open_gates(net: nn.Module, shape: tuple[int, ...]) -> dict[str, AttentionGate]:
    """The net's layers behind gates of one task that are 1 to the last bit."""
    gates = gate_layers(net, layers_of(net), shape, lambda layer, norm: AttentionGate(layer, norm, 400.0))
    for gate in gates.values():
        gate.add(generator())
        with torch.no_grad():
            gate.embeddings[0].fill_(1.0)
    return gates


@pytest.mark.parametrize("name", NETS)
def test_a_gated_net_with_open_gates_is_the_net_to_the_bit(name: str):
    build, shape = NETS[name]
    plain, net = build().eval(), build()
    gates = open_gates(net, shape)
    assert list(gates) == list(layers_of(plain))
    assert all(isinstance(gate.norm, TaskNorm) for gate in gates.values())
    assert not any(type(m) is nn.BatchNorm2d for n, m in net.named_modules() if ".norms." not in n)
    direct = {n for n, gate in gates.items() if gate.active is not None}
    if name == "cnn-small":
        assert direct == set(gates)
    else:  # the second of a block is added to the shortcut first
        assert direct == {n for n in gates if n.endswith("conv1")}
    x = torch.randn(3, *shape, generator=generator(2))
    with torch.no_grad():
        assert torch.equal(net.eval().features(x), plain.features(x))


def test_a_norm_that_does_not_follow_directly_stays_where_it_is():
    """What is done in place, or does nothing in eval mode, gives the tensor that it took."""
    layers = [nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(2)]
    layers += [nn.Conv2d(2, 2, 3), nn.Dropout(0.5), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten()]

    def build() -> nn.Module:
        return seeded(lambda: FeatureNet(nn.Sequential(*layers), 32))

    plain, net = copy.deepcopy(build()).eval(), copy.deepcopy(build())
    assert find_followers(net, layers_of(net), (nn.BatchNorm2d,), (1, 8, 8)) == {}
    assert find_followers(net, layers_of(net), (nn.ReLU,), (1, 8, 8)) == {"net.0": "net.1"}
    open_gates(net, (1, 8, 8))
    assert [name for name, m in net.named_modules() if type(m) is nn.BatchNorm2d] == ["net.2", "net.5"]
    x = torch.randn(3, 1, 8, 8, generator=generator())
    assert torch.equal(net.eval().features(x), plain.features(x))


class Early(nn.Module):
    """Norms stand before convolutions, and beside shortcuts that take the same."""

    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.before, self.after, self.relu, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(), nn.ReLU()

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.after(self.conv(self.relu(self.before(x))))
        return (x + y + self.last(y)).mean((2, 3))


def test_a_norm_or_an_activation_beside_a_shortcut_stays_where_it_is():
    """The shortcut would take what they make of the output."""
    plain, net = seeded(Early).eval(), seeded(Early)
    assert find_followers(net, layers_of(net), (nn.BatchNorm2d,), (1, 8, 8)) == {"conv": "after"}
    assert find_followers(net, {"after": net.after, "before": net.before}, (nn.ReLU,), (1, 8, 8)) == {"before": "relu"}
    gates = open_gates(net, (1, 8, 8))
    assert gates["conv"].active is gates["stem"].active is None
    x = torch.randn(3, 1, 8, 8, generator=generator())
    with torch.no_grad():
        assert torch.equal(net.eval().features(x), plain.features(x))


class Tokens(nn.Module):
    """Linear layers on tokens, as many as they have units."""

    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

    def features(self, x: Tensor) -> Tensor:
        return self.two(self.relu(self.one(x.view(-1, 4, 4)))).mean(1)


def test_units_of_a_linear_layer_are_the_last_dimension():
    plain, net = seeded(Tokens), seeded(Tokens)
    gates = open_gates(net, (1, 4, 4))
    values = torch.tensor([1.0, 0.0, 1.0, 0.0])
    with torch.no_grad():
        gates["one"].embeddings[0].copy_(2 * values - 1)
        x = torch.randn(3, 1, 4, 4, generator=generator())
        expected = plain.two(plain.one(x.view(-1, 4, 4)).relu() * values).mean(1)
        torch.testing.assert_close(net.eval().features(x), expected)
    found = propagate_importance(net, used(one=[1.0, 0.5, 0.25, 0.0], two=[0.0] * 4), (1, 4, 4))
    assert {name: value.tolist() for name, value in found.items()} == {"one": [1] * 4, "two": [1, 0.5, 0.25, 0]}


def test_gates_multiply_what_comes_out_of_norm_and_activation():
    net = seeded(cnn_small, (1, 8, 8), widths=[3])
    plain = copy.deepcopy(net).eval()
    (gate,) = open_gates(net, (1, 8, 8)).values()
    with torch.no_grad():
        gate.embeddings[0].copy_(torch.tensor([-1.0, 0.0, 1.0]))
        x = torch.randn(2, 1, 8, 8, generator=generator())
        expected = plain.features(x) * torch.tensor([0.0, 0.5, 1.0])
        torch.testing.assert_close(net.eval().features(x), expected)


# --------------------------------------------------------------------------------------------- reached


def used(**units: list[float]) -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in units.items()}


def gated(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    open_gates(net, shape)
    return net


def test_what_enters_a_layer_of_a_chain_is_what_the_layer_before_gives():
    net = gated(seeded(mlp, (1, 2, 2), hidden=[3, 2]), (1, 2, 2))
    found = propagate_importance(net, used(**{"net.1": [1.0, 0.25, 0.0], "net.3": [1.0, 0.0]}), (1, 2, 2))
    assert {name: value.tolist() for name, value in found.items()} == {
        "net.1": [1, 1, 1, 1],  # pixels
        "net.3": [1, 0.25, 0],
    }


def test_a_flattened_map_brings_each_channel_as_often_as_it_has_pixels():
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2)]
    net = gated(seeded(lambda: FeatureNet(nn.Sequential(*layers), 2)), (1, 6, 6))
    found = propagate_importance(net, used(**{"net.0": [0.0, 0.5], "net.5": [0.0, 1.0]}), (1, 6, 6))
    assert found["net.0"].tolist() == [1]
    assert found["net.5"].tolist() == [0] * 4 + [0.5] * 4


def test_a_shortcut_of_option_a_adds_its_units_to_those_in_the_middle():
    """The first block of the second stage takes 16 channels to 32: those of the shortcut are the 8th to the 23rd."""
    net = gated(NETS["resnet32"][0](), (3, 8, 8))
    units = {name: torch.zeros(gate.units) for name, gate in find_modules(net, AttentionGate).items()}
    units["conv1"][3] = 0.5
    units["layer1.2.conv2"][3] = 0.25
    units["layer1.1.conv1"][2] = 1.0
    units["layer2.0.conv2"][0] = 1.0
    found = propagate_importance(net, units, (3, 8, 8))
    assert found.keys() == units.keys()
    assert found["conv1"].tolist() == [1, 1, 1]

    def entering(name: str) -> dict[int, float]:
        return {i: v for i, v in enumerate(found[name].tolist()) if v}

    assert entering("layer1.0.conv1") == entering("layer1.2.conv1") == {3: 0.5}
    assert entering("layer1.1.conv2") == {2: 1.0}
    assert entering("layer2.0.conv1") == {3: 0.75}
    assert entering("layer2.0.conv2") == {}
    assert entering("layer2.1.conv1") == entering("layer2.4.conv1") == {0: 1.0, 11: 0.75}
    assert entering("layer3.1.conv1") == {16: 1.0, 27: 0.75}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2)])
def test_what_passes_another_norm_counts_as_used(norm: nn.Module):
    """A norm of constant maps would give zeros: no protection at all."""
    layers = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2), norm, nn.Conv2d(2, 1, 3), nn.Flatten()]
    net = gated(seeded(lambda: FeatureNet(nn.Sequential(*layers), 4)), (1, 8, 8))
    found = propagate_importance(net, used(**{"net.0": [0.5, 0.0], "net.4": [0.0]}), (1, 8, 8))
    assert found["net.4"].tolist() == [1, 1]


def test_parameters_that_are_in_no_layer_pass_on_what_they_take():
    """However small they are, as scales of branches often begin."""

    class Branch(nn.Module):
        width = 2

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.scale = nn.Linear(4, 2), nn.Linear(2, 2), nn.Parameter(torch.tensor([1e-6, -1.0]))

        def features(self, x: Tensor) -> Tensor:
            return self.two(self.scale * self.one(x.flatten(1)))

    net = gated(seeded(Branch), (1, 2, 2))
    before = copy.deepcopy(net.state_dict())
    assert propagate_importance(net, used(one=[0.5, 1.0], two=[0.0, 0.0]), (1, 2, 2))["two"].tolist() == [0.5, 1.0]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_looking_for_what_is_reached_changes_nothing():
    net = gated(NETS["cnn-small"][0](), (1, 8, 8)).train()
    before = copy.deepcopy(net.state_dict())
    propagate_importance(net, {name: gate.used for name, gate in find_modules(net, AttentionGate).items()}, (1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


# ------------------------------------------------------------------------------------- hard attention


@pytest.mark.parametrize("s", [0.01, 1.0, 7.0])
def test_compensating_gives_the_gradient_of_sigmoid_e_times_s_max(s: float):
    """Serra et al., eq. 5: the embedding's gradient as if s stood nowhere in the gate, scaled by s_max."""
    gate = AttentionGate(seeded(nn.Linear, 3, 5), None, 20.0).double()
    gate.add(generator())
    gate.s = s
    e = gate.embeddings[0]
    x, g = (torch.randn(4, n, dtype=torch.float64, generator=generator(n)) for n in (3, 5))
    (gate(x) * g).sum().backward()
    gate.compensate_gradient()
    into_gate = (gate.layer(x) * g).sum(0).detach()  # dL/da
    free = e.detach().clone().requires_grad_()
    (free.sigmoid() * into_gate).sum().backward()
    torch.testing.assert_close(e.grad, 20.0 * free.grad, rtol=1e-9, atol=1e-12)


def test_compensating_stays_finite_where_gates_are_steep():
    gate = AttentionGate(seeded(nn.Linear, 3, 2), None, 400.0)
    gate.add(generator())
    with torch.no_grad():
        gate.embeddings[0].copy_(torch.tensor([6.0, -6.0]))
    gate(torch.ones(1, 3)).sum().backward()
    gate.compensate_gradient()
    assert gate.embeddings[0].grad.isfinite().all()


def test_a_weight_keeps_the_lesser_of_what_its_two_units_are_used():
    """min(a_i, a_j) for the weight from unit j to unit i, a_i for its bias (eq. 2)."""
    gate = AttentionGate(nn.Linear(3, 2), None, 400.0)
    gate.used.copy_(torch.tensor([0.5, 1.0]))
    (weight, kept), (bias, kept_bias) = gate.kept_shares(torch.tensor([0.25, 0.75, 0.0]))
    assert weight is gate.layer.weight
    assert bias is gate.layer.bias
    assert kept.tolist() == [[0.25, 0.5, 0.0], [0.25, 0.75, 0.0]]
    assert kept_bias.tolist() == [0.5, 1.0]


def test_in_a_convolution_in_groups_a_weight_has_the_unit_of_its_group():
    gate = AttentionGate(nn.Conv2d(4, 4, 3, groups=2, bias=False), None, 400.0)
    gate.used.copy_(torch.tensor([1.0, 0.5, 1.0, 0.0]))
    ((weight, kept),) = gate.kept_shares(torch.tensor([0.1, 0.2, 0.6, 0.7]))
    assert kept.shape == weight.shape == (4, 2, 3, 3)
    expected = torch.tensor([[0.1, 0.2], [0.1, 0.2], [0.6, 0.7], [0.0, 0.0]])
    assert torch.equal(kept, expected[:, :, None, None].expand(4, 2, 3, 3))


def test_a_closed_task_adds_what_it_attends_to():
    gate = AttentionGate(nn.Linear(3, 3), None, 2.0)
    for values in ([1.0, -1.0, 0.0], [-2.0, 3.0, -1.0]):
        gate.add(generator())
        with torch.no_grad():
            gate.embeddings[-1].copy_(torch.tensor(values))
        assert gate.finish() == pytest.approx(1 / 3)
    a = 1 / (1 + torch.exp(torch.tensor([-2.0, -6.0, 0.0])))
    torch.testing.assert_close(gate.used, a)


def test_answers_use_the_largest_s_and_training_the_one_of_the_step():
    gate = AttentionGate(nn.Linear(3, 2), None, 50.0)
    for _ in range(2):
        gate.add(generator())
        with torch.no_grad():
            gate.embeddings[-1].fill_(0.01 * len(gate.embeddings))
    gate.s, gate.task = 3.0, 1
    torch.testing.assert_close(gate.attention(), torch.full((2,), 0.06).sigmoid())
    gate.eval()
    torch.testing.assert_close(gate.attention(), torch.full((2,), 1.0).sigmoid())
    gate.task = 0
    torch.testing.assert_close(gate.attention(), torch.full((2,), 0.5).sigmoid())
    assert not gate.embeddings[0].decays
