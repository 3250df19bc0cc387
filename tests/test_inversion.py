"""Dreaming: every term against its formula in float64, teachers that stay as they are, dreams that a network knows."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clframe import ImageData, IncrementalNet, Transform, snapshot
from clframe.backbones import cnn_small, resnet18, resnet32
from clframe.errors import RunError
from clframe.scenarios.digits import digits
from clframe.toolkit.inversion import (
    Dreaming,
    InversionTerms,
    assess_images,
    explain_out_of_memory,
    feature_distance,
    inversion_loss,
    jensen_shannon,
    jitter_images,
    norms_of,
    observe_norms,
    reinitialized_copy,
    select_preview,
    split_targets,
    to_raw,
    total_variation,
    valid_range,
)

NOTHING = InversionTerms(0.0, 0.0, 0.0, 0.0)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 6, shape: tuple[int, ...] = (1, 8, 8), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, *shape, generator=generator(), dtype=dtype)


def logits(seed: int, n: int = 5, columns: int = 4) -> Tensor:
    return 3 * torch.randn(n, columns, generator=generator(seed), dtype=torch.float64)


class Two(nn.Module):
    """Two batch norms, the second one on vectors, between linear maps."""

    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.fc, self.last = nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3)

    def features(self, x: Tensor) -> Tensor:
        return self.last(self.fc(self.norm(self.conv(x)).mean((2, 3))))


def network(backbone: nn.Module | None = None, blocks: tuple[int, ...] = (2, 2), seed: int = 1) -> IncrementalNet:
    """A network of random weights and running statistics, as a teacher is."""
    torch.manual_seed(seed)
    model = IncrementalNet(backbone or cnn_small((1, 8, 8)), blocks).double()
    for norm in norms_of(model):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return snapshot(model)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def trained() -> IncrementalNet:
    """A network that knows the digits 0 to 3."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    arrays = digits()
    x, y = arrays.x_train.float() / 16, arrays.y_train
    x, y = x[y < 4], y[y < 4]
    model = IncrementalNet(cnn_small((1, 8, 8)), [2, 2])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        where = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        functional.cross_entropy(model(x[where]).logits, y[where]).backward()
        optimizer.step()
    return snapshot(model)


# ----------------------------------------------------------------------------------- batch statistics


def test_statistics_are_those_of_the_input_over_batch_and_space() -> None:
    model, x = network(Two()), images()
    with observe_norms(model) as seen:
        model(x)
    first, second = seen
    conv = model.backbone.conv.weight.view(1, 2, 1, 1) * x  # [6, 2, 8, 8]: a 1x1 convolution of one channel
    assert first.norm is model.backbone.norm
    assert torch.allclose(first.mean, torch.stack([conv[:, c].mean() for c in (0, 1)]))
    squares = torch.stack([(conv[:, c] - conv[:, c].mean()).square().sum() / (6 * 64) for c in (0, 1)])
    assert torch.allclose(first.var, squares)
    fc = model.backbone.fc(model.backbone.norm(conv).mean((2, 3)))
    assert second.norm is model.backbone.last
    assert torch.allclose(second.mean, fc.mean(0))
    assert torch.allclose(second.var, (fc - fc.mean(0)).square().mean(0))


def test_r_feature_by_hand() -> None:
    """Two pixels, 1 and 3, weighted 1 and -2: means 2 and -4, variances 1 and 4; running ones 0 and 1."""
    model = snapshot(IncrementalNet(Two(), [2]).double())
    with torch.no_grad():
        model.backbone.conv.weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
        model.backbone.fc.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    x = torch.tensor([1.0, 3.0], dtype=torch.float64).view(2, 1, 1, 1)
    with observe_norms(model) as seen:
        model(x)
    s = 1 / math.sqrt(1 + 1e-5)  # what the first batch norm multiplies by
    means, variances = (2 * s, -4 * s, -2 * s), (s**2, 4 * s**2, s**2)
    first = math.hypot(2, -4) + math.hypot(1 - 1, 4 - 1)
    second = math.hypot(*means) + math.hypot(*(v - 1 for v in variances))
    assert feature_distance(seen).item() == pytest.approx(first + second, rel=1e-12)


@pytest.mark.parametrize("build", [cnn_small, lambda shape: resnet32(shape)])
def test_r_feature_is_zero_on_the_batch_that_the_running_statistics_are_of(build: Any) -> None:
    """Of the biased variance; torch itself would write the unbiased one, and leave 1 / (n - 1) of it."""
    model, x = network(build((1, 8, 8))), images(16)
    for norm in norms_of(model):  # each changes what the later ones see
        with observe_norms(model) as seen:
            model(x)
        found = next(statistics for statistics in seen if statistics.norm is norm)
        norm.running_mean.copy_(found.mean)
        norm.running_var.copy_(found.var)
    with observe_norms(model) as seen:
        model(x)
    assert len(seen) == len(norms_of(model))
    assert feature_distance(seen).item() == pytest.approx(0, abs=1e-3)
    for norm, _, var in seen:
        norm.running_var.copy_(var)
        norm.running_var.mul_(16 * 64 / (16 * 64 - 1))
    unbiased = sum(torch.linalg.vector_norm(var).item() / (16 * 64 - 1) for _, _, var in seen)
    assert feature_distance(seen).item() == pytest.approx(unbiased, rel=1e-6)


def test_a_batch_norm_without_running_statistics_says_nothing() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    assert norms_of(net) == [net[1]]
    assert not norms_of(nn.Linear(2, 2))
    assert len(norms_of(resnet18((3, 32, 32)))) == 20


def test_no_hook_is_left_also_after_an_error() -> None:
    model = network()
    with pytest.raises(ZeroDivisionError), observe_norms(model):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):  # the images have two channels
        inversion_loss(model, images(shape=(2, 8, 8)), torch.zeros(6, dtype=torch.int64), InversionTerms())
    inversion_loss(model, images(), torch.zeros(6, dtype=torch.int64), InversionTerms())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ------------------------------------------------------------------------------------ terms by hand


def test_total_variation_by_hand() -> None:
    """Of (1 2 / 4 8): across 1 and 4, down 3 and 6, along the diagonals 7 and 2; both channels in one norm."""
    x = torch.tensor([[[1.0, 2.0], [4.0, 8.0]], [[0.0, 2.0], [0.0, 0.0]]], dtype=torch.float64)[None]
    across, down, diagonal, other = [1, 4, 2, 0], [3, 6, 0, -2], [7, 0], [2, -2]
    wanted = sum(math.hypot(*differences) for differences in (across, down, diagonal, other))
    assert total_variation(x).item() == pytest.approx(wanted, rel=1e-12)
    assert total_variation(torch.ones(2, 1, 4, 4)).item() == 0
    flat = torch.ones(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    total_variation(flat).backward()
    assert not flat.grad.any()  # and finite, where all neighbours are equal


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_jensen_shannon_is_its_definition(temperature: float) -> None:
    one, other = logits(1), logits(2)
    p, q = (one / temperature).softmax(1), (other / temperature).softmax(1)
    m = (p + q) / 2
    wanted = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2
    assert torch.allclose(jensen_shannon(one, other, temperature), wanted, rtol=1e-10)
    # guards against KL(m || p), which the published code computes
    reversed_ = ((m * (m / p).log()).sum(1) + (m * (m / q).log()).sum(1)) / 2
    assert not torch.allclose(wanted, reversed_, rtol=1e-2)


def test_jensen_shannon_is_symmetric_zero_for_equals_and_at_most_ln_2() -> None:
    one, other = logits(1, 200), logits(2, 200)
    assert torch.allclose(jensen_shannon(one, other), jensen_shannon(other, one), rtol=1e-12)
    assert jensen_shannon(one, one).abs().max() < 1e-12
    assert jensen_shannon(one, one + 5).abs().max() < 1e-12  # the same shares
    values = jensen_shannon(100 * one, 100 * other, 1.0)
    assert values.min() >= 0
    assert values.max() <= math.log(2) + 1e-12
    apart = torch.tensor([[2000.0, 0.0], [-2000.0, 0.0]], dtype=torch.float64)
    assert jensen_shannon(apart[:1], apart[1:], 1.0).item() == pytest.approx(math.log(2), rel=1e-12)


def test_jensen_shannon_has_gradients_where_shares_are_small() -> None:
    """Of a hundred classes all shares are near 0.01, where the published code clamps them, and their gradients."""
    one, other = logits(1, 3, 100) / 30, logits(2, 3, 100) / 30
    one.requires_grad_()
    assert one.softmax(1).max() < 0.02
    jensen_shannon(one, other).sum().backward()
    assert (one.grad != 0).all()
    small = logits(3, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: jensen_shannon(z, logits(4, 2, 3)), small)


def test_masked_logits_take_no_part_in_jensen_shannon_nor_in_its_gradient() -> None:
    one, other = logits(1).requires_grad_(), logits(2)
    mask = torch.tensor([True, False, True, True])
    value = jensen_shannon(one.masked_fill(~mask, -torch.inf), other.masked_fill(~mask, -torch.inf))
    assert torch.allclose(value, jensen_shannon(one[:, mask], other[:, mask]), rtol=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), one)
    assert gradient.isfinite().all()
    assert (gradient != 0).any(0).tolist() == mask.tolist()


def test_the_loss_is_the_sum_of_its_terms() -> None:
    teacher, rival, x = network(), network(seed=2), images()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    z, r = teacher(x).logits, rival(x).logits
    with observe_norms(teacher) as seen:
        teacher(x)
    p = z.log_softmax(1)
    terms = {
        "feature": feature_distance(seen),
        "tv": total_variation(x),
        "l2": sum(image.square().sum().sqrt() for image in x) / 6,
        "compete": 1 - jensen_shannon(z, r, 3.0).mean(),
    }
    base = -sum(p[i, c] for i, c in enumerate(y.tolist())) / 6
    assert inversion_loss(teacher, x, y, NOTHING, None, rival).item() == pytest.approx(base.item(), rel=1e-12)
    for name, term in terms.items():
        weights = InversionTerms(**{**vars(NOTHING), name: 0.3})
        found = inversion_loss(teacher, x, y, weights, None, rival).item()
        assert found == pytest.approx((base + 0.3 * term).item(), rel=1e-12)
        assert found != pytest.approx(base.item(), rel=1e-4)
    without = inversion_loss(teacher, x, y, InversionTerms(0.0, 0.0, 0.0, compete=0.3))
    assert without.item() == pytest.approx(base.item(), rel=1e-12)  # nobody to compete with


def test_where_tasks_are_told_the_loss_is_over_the_logits_of_the_mask() -> None:
    teacher, rival, x, y = network(), network(seed=2), images(4), torch.tensor([0, 1, 2, 3])
    mask = torch.tensor([[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2).bool()
    z, r = (torch.cat([net(x).logits[:2, :2], net(x).logits[2:, 2:]]) for net in (teacher, rival))
    wanted = functional.cross_entropy(z, y % 2) + 0.7 * (1 - jensen_shannon(z, r).mean())
    found = inversion_loss(teacher, x, y, InversionTerms(0.0, 0.0, 0.0, 0.7), mask, rival)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_gradients_reach_the_images_and_nothing_else() -> None:
    teacher, rival, x = network(), network(seed=2), images().requires_grad_()
    before, other = bits(teacher), bits(rival)
    inversion_loss(
        teacher, x, torch.zeros(6, dtype=torch.int64), InversionTerms(1.0, 1.0, 1.0, 1.0), None, rival
    ).backward()
    assert (x.grad != 0).all()
    assert all(p.grad is None for net in (teacher, rival) for p in net.parameters())
    assert unchanged(teacher, before)
    assert unchanged(rival, other)


def test_dreams_repel_the_rival() -> None:
    """Steps down the competition alone: the two networks, which agree at first, end by disagreeing."""
    teacher = network()
    rival = snapshot(teacher)
    with torch.no_grad():
        for p in rival.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator(4), dtype=p.dtype)
    x, y = images(), torch.zeros(6, dtype=torch.int64)
    dreaming = Dreaming()
    dreaming.begin(x, 0.1)
    for _ in range(30):
        dream = dreaming.step(lambda x: 1 - jensen_shannon(teacher(x).logits, rival(x).logits).mean())
    before, after = (jensen_shannon(teacher(v).logits, rival(v).logits).mean().item() for v in (x, dream))
    assert after > 2 * before
    assert inversion_loss(teacher, dream, y, InversionTerms(0, 0, 0, 1.0), None, rival) < 1 + functional.cross_entropy(
        teacher(dream).logits, y
    )


# ------------------------------------------------------------------------------------------ dreaming


def test_dreams_are_known_to_the_teacher_which_stays_as_it_is(trained: IncrementalNet) -> None:
    """200 steps cut R_feature to a tenth, and 9 of 10 dreams are what they are to be."""
    before, y = bits(trained), torch.arange(40) % 4
    noise = torch.randn(40, 1, 8, 8, generator=generator())
    bounds = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    dreaming = Dreaming()
    dreaming.begin(noise, 0.05)
    for _ in range(200):
        x = dreaming.step(lambda x: inversion_loss(trained, x, y, InversionTerms()), bounds)
    (was, guessed), (feature, accuracy) = assess_images(trained, noise, y), assess_images(trained, x, y)
    assert guessed < 0.5
    assert feature < was / 10
    assert accuracy >= 0.9
    assert x.min() == 0
    assert x.max() == 1
    assert unchanged(trained, before)
    assert not any(module.training for module in trained.modules())
    assert not any(module._forward_pre_hooks for module in trained.modules())
    assert not torch.equal(x, noise)  # a copy was dreamt on
    assert noise.min() < -1


def test_a_step_is_adam_s_and_then_back_between_the_bounds() -> None:
    x = torch.tensor([[-1.0, 0.5], [0.02, 0.9]])
    dreaming = Dreaming()
    dreaming.begin(x, 0.1)
    # the first step of Adam is the learning rate against the sign of the gradient
    found = dreaming.step(lambda x: (x * torch.tensor([1.0, -3.0])).sum(), (torch.tensor(0.0), torch.tensor(0.95)))
    assert torch.allclose(found, torch.tensor([[0.0, 0.6], [0.0, 0.95]]), atol=1e-6)


@pytest.mark.parametrize("done", [0, 7])
def test_dreaming_goes_on_from_its_state_to_the_same_bits(done: int) -> None:
    teacher, y = network(), torch.arange(6) % 4
    ends = []
    for stop in (None, done):
        dreaming, draws = Dreaming(), generator()
        dreaming.begin(images(), 0.05)
        for i in range(12):
            if i == stop:
                state = dreaming.state_dict()
                dreaming = Dreaming()
                dreaming.load_state_dict(state)
            x = dreaming.step(
                lambda x, draws=draws: inversion_loss(teacher, jitter_images(x, 1, True, draws), y, InversionTerms())
            )
        ends.append(x)
    assert torch.equal(*ends)
    fresh = Dreaming()
    dreaming.load_state_dict(fresh.state_dict())
    assert dreaming.x is None


def test_jitter_rolls_all_images_alike_and_mirrors_half_the_time() -> None:
    x, draws = images(3), generator()
    assert torch.equal(jitter_images(x, 0, False, draws), x)
    rolls = {
        (down, right, flip): (x.flip(3) if flip else x).roll((down, -right if flip else right), (2, 3))
        for down in range(-2, 3)
        for right in range(-2, 3)
        for flip in (False, True)
    }
    seen = []
    for _ in range(300):
        found = jitter_images(x, 2, True, draws)
        seen += [key for key, rolled in rolls.items() if torch.equal(found, rolled)]
    assert len(seen) == 300
    assert set(seen) == set(rolls)  # to both sides, and no further
    assert 0.4 < sum(flip for _, _, flip in seen) / 300 < 0.6
    again = generator()
    assert torch.equal(jitter_images(x, 2, True, again), jitter_images(x, 2, True, generator()))


@pytest.mark.parametrize(
    "transform",
    [
        Transform(scale=16),
        Transform(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        Transform(scale=1, mean=(0.5,) * 3, std=(0.2,) * 3),
        Transform(scale=1),
    ],
)
def test_raw_images_are_those_that_are_normalised_to_the_dreams(transform: Transform) -> None:
    x = images(4, (3, 5, 5), torch.float32)
    raw = to_raw(x, transform)
    assert raw.dtype == torch.float32
    assert torch.allclose(transform.normalize(raw), x, atol=1e-5)
    pixels = torch.randint(256, (4, 3, 5, 5), generator=generator(), dtype=torch.uint8)
    assert torch.equal(to_raw(transform.normalize(pixels), transform).round().to(torch.uint8), pixels)


def test_the_valid_range_is_that_of_pixels_or_what_occurs() -> None:
    transform = Transform(scale=16, mean=(0.5, 0.25), std=(0.5, 1.0))
    pixels = torch.full((3, 2, 4, 4), 7, dtype=torch.uint8)
    low, high = valid_range(transform, pixels)
    assert low.flatten().tolist() == [-1.0, -0.25]
    assert high.flatten().tolist() == [1.0, 0.75]
    assert (low.shape, high.shape) == ((2, 1, 1), (2, 1, 1))
    low, high = valid_range(Transform(scale=1), torch.tensor([-2.5, 0.0, 4.0, 1.0]).view(1, 1, 2, 2))
    assert (low.item(), high.item()) == (-2.5, 4.0)


@pytest.mark.parametrize(
    ("per_class", "rounds", "batch_size", "sizes"),
    [
        (4, 1, 256, [[12]]),
        (4, 1, 5, [[4, 4, 4]]),
        (4, 1, 7, [[6, 6]]),
        (4, 2, 256, [[6], [6]]),
        (5, 2, 4, [[4, 4], [4, 3]]),
        (1, 4, 4, [[1], [1], [1]]),
    ],
)
def test_targets_are_balanced_in_every_part(per_class: int, rounds: int, batch_size: int, sizes: list) -> None:
    classes = [0, 2, 5]
    parts = split_targets(classes, per_class, rounds, batch_size)
    assert [[len(part) for part in some] for some in parts] == sizes
    together = torch.cat([part for some in parts for part in some]).tolist()
    assert all(together.count(c) == per_class for c in classes)
    for part in (part.tolist() for some in parts for part in some):
        counts = [part.count(c) for c in classes]
        assert max(counts) - min(counts) <= 1


def test_a_rival_begins_anew_from_the_generator_alone() -> None:
    model, state = network(), torch.get_rng_state()
    first, same, other = (reinitialized_copy(model, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert unchanged(same, bits(first))
    for name, value in first.named_parameters():
        if value.dim() > 1:
            assert not torch.equal(value, model.get_parameter(name))
            assert not torch.equal(value, other.get_parameter(name))
    for norm in norms_of(first):
        assert not norm.running_mean.any()
        assert (norm.running_var == 1).all()
    assert [b.out_features for b in first.head] == [2, 2]


def test_an_album_shows_as_many_of_each_class() -> None:
    y = torch.arange(90) % 9
    x = torch.arange(90.0).view(90, 1, 1, 1)
    shown = select_preview(ImageData(x, y))
    labels = [int(value) % 9 for value in shown.flatten()]
    assert labels == [c for c in range(9) for _ in range(7)]
    assert len(select_preview(ImageData(x[:9], y[:9]))) == 9
    many = select_preview(ImageData(torch.zeros(100, 1, 1, 1), torch.arange(100)))
    assert len(many) == 64


# --------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        MemoryError(),
    ],
)
def test_where_memory_ends_the_option_that_needs_less_is_named(error: Exception) -> None:
    run: Any = SimpleNamespace(device="cpu", progress_label="experience 2 of 5")
    with pytest.raises(RunError) as caught, explain_out_of_memory(run, "some.batch_size"):
        raise error
    words = ("Out of memory on cpu", "experience 2 of 5", "smaller `some.batch_size`")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("out of memory")]
)
def test_another_error_is_left_as_it_is(error: Exception) -> None:
    run: Any = SimpleNamespace(device="cpu", progress_label="experience 2 of 5")
    with pytest.raises(type(error)) as caught, explain_out_of_memory(run, "some.batch_size"):
        raise error
    assert caught.value is error
