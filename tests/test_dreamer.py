"""The generator of dreams: its terms against their formulas in float64, its network, and its training step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe import IncrementalNet, snapshot
from clframe.backbones import cnn_small
from clframe.toolkit.dreamer import (
    Dreamer,
    Generator,
    GeneratorTerms,
    balanced_cross_entropy,
    confidence,
    describe_dreams,
    gaussian_divergence,
    generator_loss,
    head_logits,
    imbalance,
    local_cross_entropy,
    roughness,
)
from clframe.toolkit.inversion import norms_of, observe_norms, reinitialize

NOTHING = GeneratorTerms(0.0, 1e3, 0.0, 0.0, 0.0)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(seed: int, n: int = 5, columns: int = 4) -> Tensor:
    return 3 * torch.randn(n, columns, generator=seeded(seed), dtype=torch.float64)


def images(n: int = 6, shape: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    return torch.randn(n, *shape, generator=seeded(), dtype=torch.float64)


def network() -> IncrementalNet:
    torch.manual_seed(1)
    model = IncrementalNet(cnn_small((1, 8, 8)), [2, 2]).double()
    for norm in norms_of(model):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return snapshot(model)


@pytest.mark.parametrize("temperature", [1.0, 1e3])
def test_confidence_is_the_cross_entropy_against_the_class_that_leads(temperature: float) -> None:
    z = logits(1)
    p = (z / temperature).softmax(1)
    assert confidence(z, temperature).item() == pytest.approx(-p.amax(1).log().mean().item(), rel=1e-12)


def test_imbalance_is_0_of_equal_shares_1_of_one_class_and_its_formula_between() -> None:
    z = logits(1)
    p = z.softmax(1).mean(0)
    wanted = 1 + (p * p.log()).sum() / math.log(4)
    assert imbalance(z).item() == pytest.approx(wanted.item(), rel=1e-12)
    turns = 50 * torch.eye(4, dtype=torch.float64)  # each image is of another class, beyond doubt
    assert imbalance(turns).item() == pytest.approx(0, abs=1e-12)
    assert imbalance(turns[:1].expand(4, 4)).item() == pytest.approx(1, abs=1e-12)
    assert imbalance(torch.zeros(3, 1, requires_grad=True)).item() == 0


def test_imbalance_has_a_finite_gradient_where_a_class_has_no_share() -> None:
    z = torch.tensor([[2000.0, 0.0, -2000.0], [1000.0, 0.0, 0.0]], requires_grad=True)
    assert (z.softmax(1).mean(0) == 0).any()
    imbalance(z).backward()
    assert z.grad.isfinite().all()


def test_divergence_is_that_of_gaussians_the_running_one_first() -> None:
    """The mean over channels, and then over layers, of 32, 32 and 64 channels."""
    model = network()
    with observe_norms(model) as seen:
        model(images())
    layers, swapped = [], []
    for norm, mean, var in seen:
        running = torch.distributions.Normal(norm.running_mean, norm.running_var.sqrt())
        batch = torch.distributions.Normal(mean, var.sqrt())
        layers.append(torch.distributions.kl_divergence(running, batch).mean().item())
        swapped.append(torch.distributions.kl_divergence(batch, running).mean().item())
    assert len(layers) == 3
    assert gaussian_divergence(seen).item() == pytest.approx(sum(layers) / 3, rel=1e-5)
    assert sum(layers) != pytest.approx(sum(swapped), rel=0.1)
    for norm, mean, var in seen:
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    assert gaussian_divergence(seen).item() == pytest.approx(0, abs=1e-12)


def test_roughness_is_what_a_gaussian_takes_off() -> None:
    """Brute force, over a mirrored border; each channel by itself."""
    x = images(2, (2, 6, 7))
    weights = torch.tensor(
        [[math.exp(-(i * i + j * j) / (2 * 2.0)) for j in range(-2, 3)] for i in range(-2, 3)], dtype=torch.float64
    )
    weights /= weights.sum()

    def mirrored(i: int, size: int) -> int:
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    total = 0.0
    for image in x.flatten(0, 1):
        for r in range(6):
            for c in range(7):
                around = sum(
                    weights[i + 2, j + 2] * image[mirrored(r + i, 6), mirrored(c + j, 7)]
                    for i in range(-2, 3)
                    for j in range(-2, 3)
                )
                total += float(image[r, c] - around) ** 2
    assert roughness(x).item() == pytest.approx(total / x.numel(), rel=1e-9)
    assert roughness(torch.full((1, 3, 4, 4), 0.7)).item() == pytest.approx(0, abs=1e-12)


def test_the_loss_is_the_sum_of_its_terms() -> None:
    model, x = network(), images()
    z = model(x).logits
    with observe_norms(model) as seen:
        model(x)
    terms = {
        "confidence": confidence(z, 1e3),
        "balance": imbalance(z),
        "statistics": gaussian_divergence(seen),
        "smooth": roughness(x),
    }
    assert generator_loss(model, x, NOTHING).item() == 0
    for name, term in terms.items():
        found = generator_loss(model, x, GeneratorTerms(**{**vars(NOTHING), name: 0.3})).item()
        assert found == pytest.approx(0.3 * term.item(), rel=1e-12)
        assert found != 0
    told = describe_dreams(model, x)
    assert told["confidence"] == pytest.approx(z.softmax(1).amax(1).mean().item(), rel=1e-12)
    assert told["imbalance"] == pytest.approx(terms["balance"].item(), rel=1e-12)
    assert told["divergence"] == pytest.approx(terms["statistics"].item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 20)])
def test_a_generator_makes_images_of_the_shape_from_the_generator_of_numbers_alone(shape: tuple[int, ...]) -> None:
    net = Generator(shape, noise=7, width=6).eval()
    x, state = net.draw(5, seeded()), torch.get_rng_state()
    assert x.shape == (5, *shape)
    assert torch.equal(net.draw(5, seeded()), x)
    assert torch.equal(torch.get_rng_state(), state)
    one_by_one = torch.cat([net(noise[None]) for noise in torch.randn(5, 7, generator=seeded())])
    assert torch.allclose(one_by_one, x, atol=1e-5)
    assert all(p.grad_fn is None for p in net.parameters())


def test_a_generator_can_make_pixels_of_any_scale() -> None:
    """Its last batch norm learns it: images that are not normalised have neither mean 0 nor variance 1."""
    net = Generator((1, 8, 8), noise=7, width=6)
    last = net.net[-1]
    with torch.no_grad():
        last.weight.fill_(0.25)
        last.bias.fill_(0.5)
    x = net.draw(64, seeded())
    assert x.mean().item() == pytest.approx(0.5, abs=1e-4)
    assert x.std().item() == pytest.approx(0.25, rel=1e-2)
    assert {name for name, _ in last.named_parameters()} == {"weight", "bias"}


def steps(dreamer: Dreamer, teacher: IncrementalNet, draws: torch.Generator, n: int) -> Tensor:
    dreamer.generator.train()
    for _ in range(n):
        dreamer.adam.zero_grad()
        loss = generator_loss(teacher, dreamer.generator.draw(32, draws), GeneratorTerms())
        loss.backward()
        dreamer.adam.step()
    dreamer.generator.eval()
    return loss.detach()


def test_training_lowers_the_divergence_and_leaves_the_teacher_as_it_is() -> None:
    teacher = network().float()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    dreamer = Dreamer((1, 8, 8), noise=10, width=16, lr=0.01)
    reinitialize(dreamer.generator, seeded())
    dreamer.generator.train()
    first = describe_dreams(teacher, dreamer.generator.draw(64, seeded()))
    steps(dreamer, teacher, seeded(), 40)
    last = describe_dreams(teacher, dreamer.generator.draw(64, seeded()))
    assert last["divergence"] < first["divergence"] / 2
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_a_dreamer_goes_on_from_its_state_to_the_same_bits() -> None:
    teacher, ends = network().float(), []
    for stop in (False, True):
        dreamer, draws = Dreamer((1, 8, 8), 10, 8, 0.01), seeded()
        reinitialize(dreamer.generator, seeded(5))
        steps(dreamer, teacher, draws, 3)
        if stop:
            state = dreamer.state_dict()
            dreamer = Dreamer((1, 8, 8), 10, 8, 0.01)
            dreamer.load_state_dict(state)
        steps(dreamer, teacher, draws, 3)
        ends.append(dreamer.generator.draw(4, seeded()))
    assert torch.equal(*ends)


def test_building_a_dreamer_draws_no_numbers() -> None:
    state = torch.get_rng_state()
    dreamer = Dreamer((1, 8, 8), 10, 8, 0.01)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in dreamer.generator.modules())


def test_dreams_are_of_the_classes_that_the_teacher_sees() -> None:
    teacher, dreamer = network().float(), Dreamer((1, 8, 8), 10, 8, 0.01)
    batch = dreamer.draw_batch(9, teacher, torch.tensor([0, 0, 1, 1, 2, 2]), seeded())
    assert torch.equal(batch.x, dreamer.generator.draw(9, seeded()))
    assert not batch.x.requires_grad
    assert torch.equal(batch.y, teacher(batch.x).logits.argmax(1))
    assert torch.equal(batch.task, batch.y // 2)
    assert not batch.weight.any()
    assert (batch.index == -1).all()


def test_the_local_loss_knows_new_classes_alone() -> None:
    z = logits(1, 4, 5).requires_grad_()
    y = torch.tensor([3, 4, 2, 0])
    found = local_cross_entropy(z, y, 2)
    assert torch.allclose(found[:3], functional.cross_entropy(z[:3, 2:], y[:3] - 2, reduction="none"))
    (gradient,) = torch.autograd.grad(found.sum(), z)
    assert not gradient[:, :2].any()


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_balanced_loss_weighs_classes_alike_whatever_the_numbers_of_images(repeats: int) -> None:
    """Four old classes and one new: 4/5 of the mean over old images, 1/5 of that over new ones."""
    z, y = logits(1, 6, 5), torch.tensor([0, 3, 1, 2, 4, 4])
    losses = functional.cross_entropy(z, y, reduction="none")
    wanted = 0.8 * losses[:4].mean() + 0.2 * losses[4:].mean()
    z, y = torch.cat([z[:4], *[z[4:]] * repeats]), torch.cat([y[:4], *[y[4:]] * repeats])
    assert balanced_cross_entropy(z, y, 4).item() == pytest.approx(wanted.item(), rel=1e-12)
    only = balanced_cross_entropy(z[:4], y[:4], 4)
    assert only.item() == pytest.approx(0.8 * losses[:4].mean().item(), rel=1e-12)


def test_scores_are_those_of_the_head() -> None:
    model = network()
    out: Any = model(images())
    assert torch.allclose(head_logits(model, out.features), out.logits, rtol=1e-12)
    assert isinstance(model.head, nn.ModuleList)
