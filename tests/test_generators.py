"""Generative models: their losses against closed forms and finite differences, their steps, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from clframe import ImageData
from clframe.errors import UsageError
from clframe.model import initialized_by
from clframe.toolkit.generators import (
    VAE,
    WGAN,
    GenerativeModel,
    Mixture,
    conv_problems,
    descend,
    divergence,
    gradient_penalty,
    mix,
    reparametrize,
)
from clframe.toolkit.rehearsal import Rehearsal

SHAPE = (1, 2, 3)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 5, shape: tuple[int, ...] = SHAPE, seed: int = 4) -> Tensor:
    return torch.rand(n, *shape, generator=seeded(seed), dtype=torch.float64)


def small(kind: type = VAE, **options: object) -> GenerativeModel:
    with initialized_by(seeded()):
        return kind(SHAPE, hidden=[4, 3], z=2, **options).double()


def fill(layer: nn.Module, bias: Tensor | float) -> None:
    """Let a linear layer give `bias`, whatever it is given."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.as_tensor(bias))


# ---------------------------------------------------------------------------------------------- VAE


@pytest.mark.parametrize("classes", [None, 2])
def test_the_gradient_of_the_elbo_is_that_of_finite_differences(classes: int | None) -> None:
    """Of every parameter, those of the class prior included."""
    vae = small(classes=classes)
    x, y, noise = images(), torch.tensor([0, 1, 1, 0, 1]), images(5, (2,), seed=9) * 4 - 2

    def loss() -> Tensor:
        total: Tensor = sum(part.sum() for part in vae.losses(x, y, noise))
        return total

    gradients = torch.autograd.grad(loss(), list(vae.parameters()))
    checked = 0
    for parameter, gradient in zip(vae.parameters(), gradients, strict=True):
        flat = parameter.data.view(-1)
        for k in range(len(flat)):
            was, h = flat[k].item(), 1e-6
            flat[k] = was + h
            above = loss().item()
            flat[k] = was - h
            below = loss().item()
            flat[k] = was
            assert gradient.view(-1)[k].item() == pytest.approx((above - below) / (2 * h), rel=1e-6, abs=1e-8)
            checked += abs(gradient.view(-1)[k].item()) > 1e-4
    assert checked > 30
    if classes:
        assert min(g.norm() for g in gradients[:2]) > 1e-3  # the prior's, which are declared first


def test_the_divergence_is_nothing_from_the_prior_and_kullback_leibler_s_elsewhere() -> None:
    zero = torch.zeros(3, 4, dtype=torch.float64)
    assert divergence(zero, zero, zero[:1, :1], zero[:1, :1]).tolist() == [0.0] * 3
    mean, logvar, mean_p, logvar_p = (images(3, (4,), seed=k) * 3 - 1 for k in range(4))
    q, p = (Normal(m, (v / 2).exp()) for m, v in ((mean, logvar), (mean_p, logvar_p)))
    assert torch.allclose(divergence(mean, logvar, mean_p, logvar_p), kl_divergence(q, p).sum(1), rtol=1e-9)
    standard = -(1 + logvar - mean.square() - logvar.exp()).sum(1) / 2
    assert torch.allclose(divergence(mean, logvar, zero[:1, :1], zero[:1, :1]), standard, rtol=1e-9)
    assert divergence(mean, logvar, mean, logvar).abs().max() < 1e-12


def test_draws_have_the_standard_deviation_exp_of_half_the_log_variance() -> None:
    """In the model's own loss and in what it samples. Guards against 0.5 * exp(logvar), as Avalanche's VAE has it."""
    logvar, mean, n = torch.tensor([-2.0, 0.0, 1.5]), torch.tensor([0.3, -2.0, 0.0]), 100_000
    vae = VAE((4,), hidden=[8], z=3, classes=2)
    drawn: list[Tensor] = []
    vae.decoder.register_forward_pre_hook(lambda module, args: drawn.append(args[0]))
    fill(vae.posterior, torch.cat([mean, logvar]))
    with torch.no_grad():
        vae.prior_mean[1], vae.prior_logvar[1] = mean, logvar
        vae.losses(torch.rand(n, 4), torch.ones(n, dtype=torch.int64), vae.noise(n, seeded()))
        vae.sample(n, seeded(), torch.ones(n, dtype=torch.int64))
        drawn.append(reparametrize(mean, logvar, vae.noise(n, seeded())))
        VAE((4,), z=3).decoder.register_forward_pre_hook(lambda module, args: drawn.append(args[0]))
    wrong = 0.5 * logvar.exp()
    for z in drawn:
        assert torch.allclose(z.std(0), (logvar / 2).exp(), rtol=0.02)
        assert torch.allclose(z.mean(0), mean, atol=0.03)
        assert ((z.std(0) / wrong - 1).abs() > 0.02).all()
    assert len(drawn) == 3


def test_the_loss_is_the_mean_over_pixels_and_the_divergence_by_their_number() -> None:
    """A decoder that always gives 1/2 has the loss ln 2; the divergence of a constant posterior is known."""
    for shape in ((1, 2, 3), (12,), (3, 4, 4)):
        vae = VAE(shape, hidden=[4], z=2).double()
        fill(vae.posterior, torch.tensor([1.0, -2.0, 0.0, math.log(3)]))
        fill(vae.decoder[-2], 0.0)
        apart, divergent = vae.losses(images(5, shape), None, torch.zeros(5, 2, dtype=torch.float64))
        assert apart.tolist() == pytest.approx([math.log(2)] * 5)
        wanted = (1 + 4 + 3 - math.log(3) - 1) / 2 / math.prod(shape)
        assert divergent.tolist() == pytest.approx([wanted] * 5, rel=1e-6)


def test_a_reconstruction_is_the_cross_entropy_with_the_image() -> None:
    vae, x, noise = small(), images(), images(5, (2,))
    mean, logvar = vae.encode(x)
    guess = vae(mean + (logvar / 2).exp() * noise)
    wanted = -(x * guess.log() + (1 - x) * (1 - guess).log()).flatten(1).mean(1)
    assert torch.allclose(vae.losses(x, None, noise)[0], wanted, rtol=1e-9)


def test_the_decoder_mirrors_the_encoder() -> None:
    vae = VAE((1, 28, 28))
    widths = [(m.in_features, m.out_features) for m in vae.modules() if isinstance(m, nn.Linear)]
    assert widths == [(784, 400), (400, 400), (400, 200), (100, 400), (400, 400), (400, 784)]
    vae = VAE((3, 32, 32), "conv", [8, 16], z=5)
    maps = [(m.in_channels, m.out_channels) for m in vae.modules() if hasattr(m, "in_channels")]
    assert maps == [(3, 8), (8, 16), (16, 8), (8, 3)]
    assert vae.posterior.in_features == 16 * 8 * 8
    assert sum(p.numel() for p in VAE((4,), z=2, classes=3).parameters()) == 12 + sum(
        p.numel() for p in VAE((4,), z=2).parameters()
    )


def test_the_prior_of_a_class_is_learnt_and_the_class_can_be_sampled() -> None:
    """Images of one bright pixel each, the pixel being the class: what is drawn of a class shows its pixel."""
    rng = seeded()
    with initialized_by(rng):
        vae = VAE((1, 3, 3), hidden=[32], z=4, classes=3)
    y = torch.arange(3).repeat(16)
    x = 0.2 * torch.rand(48, 1, 3, 3, generator=rng)
    x.view(48, 9)[torch.arange(48), y] = 0.95
    optimizer = vae.optimizer(1e-2)
    before = vae.prior_mean.detach().clone()
    for _ in range(200):
        vae.step(optimizer, lambda: mix((x, y, 1.0)), rng)
    assert (vae.prior_mean - before).abs().max() > 0.1
    for label in range(3):
        drawn = vae.sample(200, rng, torch.full((200,), label)).flatten(1)
        assert (drawn.argmax(1) == label).float().mean() > 0.95
    with pytest.raises(ValueError, match="needs the labels `y`"):
        vae.sample(2, rng)


# --------------------------------------------------------------------------------------------- WGAN


class Linear(nn.Module):
    """A critic whose gradient is the same everywhere."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w


def test_the_penalty_of_a_linear_critic_is_that_of_the_length_of_its_weights() -> None:
    w = torch.tensor([3.0, 0.0, 0.0, -4.0, 0.0, 12.0], dtype=torch.float64)  # of length 13
    critic = Linear(w)
    value = gradient_penalty(critic, images(), images(seed=8), torch.rand(5, dtype=torch.float64))
    assert value.tolist() == pytest.approx([144.0] * 5, rel=1e-12)
    (gradient,) = torch.autograd.grad(value.mean(), critic.w)
    assert torch.allclose(gradient, 2 * 12 * w / 13, rtol=1e-9)


def test_the_penalty_is_taken_between_an_image_and_a_fake_of_each_by_itself() -> None:
    """The gradient of ||x||^2 / 2 is x: so its length tells the place."""
    real, fake, place = images(), images(seed=8), torch.tensor([0.0, 1.0, 0.5, 0.25, 0.9], dtype=torch.float64)
    value = gradient_penalty(lambda x: x.flatten(1).square().sum(1) / 2, real, fake, place)
    at = place.view(-1, 1) * real.flatten(1) + (1 - place).view(-1, 1) * fake.flatten(1)
    assert torch.allclose(value, (at.norm(dim=1) - 1).square(), rtol=1e-9)


def test_the_critic_takes_its_steps_alone_and_then_the_generator_one() -> None:
    gan = small(WGAN, critic_steps=3)
    optimizer = gan.optimizer()
    seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def draw() -> Mixture:
        seen.append(tuple([p.detach().clone() for p in part.parameters()] for part in (gan.critic, gan.decoder)))
        return mix((images(), None, 1.0))

    rng = seeded()
    for _ in range(4):
        gan.step(optimizer, draw, rng)
    assert len(seen) == 12
    assert {float(optimizer.state[p]["step"]) for p in gan.critic.parameters()} == {12.0}
    assert {float(optimizer.state[p]["step"]) for p in gan.decoder.parameters()} == {4.0}

    def same(part: int, one: int, other: int) -> bool:
        return all(torch.equal(a, b) for a, b in zip(seen[one][part], seen[other][part], strict=True))

    for k in range(1, 12):
        assert not same(0, k - 1, k)
        assert same(1, k - 1, k) == (k % 3 != 0)
    assert all(p.grad is None for p in gan.parameters())


def test_a_step_of_the_gan_by_hand() -> None:
    """With shares of the images, plain gradient descent, and one step of the critic."""
    gan, other = small(WGAN, critic_steps=1), small(WGAN, critic_steps=1)
    lr, share, rng = 0.1, 0.25, seeded(11)
    now, past = images(4), images(3, seed=8)
    gan.step(torch.optim.SGD(gan.parameters(), lr), lambda: mix((now, None, share), (past, None, 1 - share)), rng)

    rng = seeded(11)
    x = torch.cat([now, past])
    fake = other(torch.randn(7, 2, generator=rng).double()).detach()
    place = torch.rand(7, generator=rng).double()
    at = (place.view(-1, 1, 1, 1) * x + (1 - place).view(-1, 1, 1, 1) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(other.critic(at).sum(), at, create_graph=True)
    each = other.critic(fake) - other.critic(x) + 10 * (slope.flatten(1).square().sum(1).sqrt() - 1) ** 2
    loss = share * each[:4].mean() + (1 - share) * each[4:].mean()
    for p, g in zip(other.critic.parameters(), torch.autograd.grad(loss, list(other.critic.parameters())), strict=True):
        p.data -= lr * g
    loss = -other.critic(other(torch.randn(7, 2, generator=rng).double())).mean()
    parameters = list(other.decoder.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.data -= lr * g
    for name, value in gan.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], rtol=1e-9, atol=1e-12), name


def test_the_gan_learns_two_kinds_of_images() -> None:
    """Dark to the left and bright to the right, or the other way round, in shares of 1/4 and 3/4."""
    rng = seeded(5)
    with initialized_by(rng):
        gan = WGAN((1, 2, 2), hidden=[32], z=4, critic_steps=3)
    left = torch.tensor([0.9, 0.1, 0.9, 0.1]).view(1, 1, 2, 2) + 0.05 * torch.rand(16, 1, 2, 2, generator=rng)
    optimizer = gan.optimizer(2e-3)
    for _ in range(300):
        gan.step(optimizer, lambda: mix((left, None, 0.25), (left.flip(3), None, 0.75)), rng)
    drawn = gan.sample(500, rng)
    of_left = drawn[..., 0] > drawn[..., 1]
    clear = of_left.all(2) | ~of_left.any(2)
    assert clear.float().mean() > 0.9
    assert 0.1 < of_left.float().mean() < 0.4
    assert ((drawn - 0.5).abs().mean() - 0.4).abs() < 0.1


def test_the_sources_settings_of_adam() -> None:
    for model, lr, betas in ((VAE((4,)), 1e-3, (0.9, 0.999)), (WGAN((4,)), 1e-4, (0.0, 0.9))):
        group = model.optimizer().param_groups[0]
        assert (group["lr"], group["betas"]) == (lr, betas)
        assert model.optimizer(0.5).param_groups[0]["lr"] == 0.5


# ------------------------------------------------------------------------------------------ of both


def test_a_mixture_has_exact_shares() -> None:
    x, more = images(3), images(5, seed=6)
    mixed = mix((x, torch.zeros(3), 0.2), (more, torch.ones(5), 0.8))
    assert torch.equal(mixed.x, torch.cat([x, more]))
    assert mixed.y.tolist() == [0.0] * 3 + [1.0] * 5
    assert mixed.weight.tolist() == pytest.approx([0.2 / 3] * 3 + [0.8 / 5] * 5)
    assert mix((x, None, 1.0)).y is None


def test_a_step_of_the_autoencoder_by_hand() -> None:
    """Plain gradient descent on 1/4 of the new images' mean loss and 3/4 of the old ones'."""
    vae, other = small(), small()
    now, past = images(4), images(3, seed=8)
    parts = ((now, None, 0.25), (past, None, 0.75))
    found = vae.step(torch.optim.SGD(vae.parameters(), 0.5), lambda: mix(*parts), seeded(11))
    noise = torch.randn(7, 2, generator=seeded(11)).double()
    of_now, of_past = other.losses(now, None, noise[:4]), other.losses(past, None, noise[4:])
    apart, divergent = (0.25 * a.mean() + 0.75 * b.mean() for a, b in zip(of_now, of_past, strict=True))
    assert found["reconstruction"].item() == pytest.approx(apart.item())
    assert found["divergence"].item() == pytest.approx(divergent.item())
    gradients = torch.autograd.grad(apart + divergent, list(other.parameters()))
    for new, old, gradient in zip(vae.parameters(), other.parameters(), gradients, strict=True):
        assert torch.allclose(new, old - 0.5 * gradient, rtol=1e-9)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("keep_optimizer", [False, True])
def test_a_rehearsal_goes_on_from_its_state_in_the_middle_of_a_set(fresh: bool, keep_optimizer: bool) -> None:
    def built() -> Rehearsal:
        rng = seeded(8)

        def build() -> VAE:
            with initialized_by(rng):
                return VAE((1, 2, 3), hidden=[5], z=2, classes=4)

        return Rehearsal(build, scale=16.0, lr=1e-2)

    sets = [
        ImageData(
            torch.randint(17, (11, 1, 2, 3), generator=seeded(k), dtype=torch.uint8), torch.arange(11) % 2 + 2 * k
        )
        for k in (0, 1)
    ]

    def learn(rehearsal: Rehearsal, t: int, rng: torch.Generator, steps: int) -> None:
        for _ in range(steps):
            rehearsal.learn(sets[t], 1 / (t + 1), 4, 2 * t, rng)

    one, rng = built(), seeded(1)
    one.begin(fresh, keep_optimizer)
    learn(one, 0, rng, 4)
    first = {name: value.clone() for name, value in one.model.state_dict().items()}
    assert one.end("x").keys() == {"reconstruction", "divergence"}
    one.begin(fresh, keep_optimizer)
    learn(one, 1, rng, 2)
    assert all(torch.equal(value, first[name]) for name, value in one.previous.state_dict().items())
    steps = {float(state["step"]) for state in one.optimizer.state.values()}
    assert steps == {6.0 if keep_optimizer and not fresh else 2.0}
    other, again = built(), torch.Generator()
    again.set_state(rng.get_state())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for rehearsal, generator in ((one, rng), (other, again)):
        learn(rehearsal, 1, generator, 5)
    assert one.end("x") == other.end("x")
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name])
        assert torch.equal(one.previous.state_dict()[name], first[name])
    images, y = one.recall(300, 4, rng)
    assert set(y.tolist()) == {0, 1, 2, 3}
    assert 1 < images.max() <= 16


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 4, 12)])
@pytest.mark.parametrize("build", [VAE, WGAN])
def test_images_are_from_0_to_1_in_eval_mode_without_gradients(
    build: Callable[..., GenerativeModel], shape: tuple[int, ...], net: str
) -> None:
    model = build(shape, net, [8, 16], z=5)
    rng = seeded()
    optimizer = model.optimizer()
    model.step(optimizer, lambda: mix((torch.rand(4, *shape, generator=rng), None, 1.0)), rng)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = model.sample(6, seeded(2))
    assert drawn.shape == (6, *shape)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert not drawn.requires_grad
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # what is drawn of an image does not depend on the others: running statistics serve, not the batch's
    alone = model.eval()(model.noise(6, seeded(2))[:2])
    torch.testing.assert_close(alone, drawn[:2], rtol=1e-4, atol=1e-5)


def test_flat_inputs_have_flat_samples() -> None:
    for build in (VAE, WGAN):
        model = build((7,), hidden=[5])
        model.step(model.optimizer(), lambda: mix((torch.rand(3, 7), None, 1.0)), seeded())
        assert model.sample(4, seeded()).shape == (4, 7)


@pytest.mark.parametrize(
    ("shape", "stages", "sentence"),
    [
        (
            (1, 28, 30),
            2,
            "X halves images 2 times and needs sides that are divisible by 4, and these have 28x30 pixels.",
        ),
        (
            (3, 12, 12),
            3,
            "X halves images 3 times and needs sides that are divisible by 8, and these have 12x12 pixels.",
        ),
        ((64,), 2, "X needs images [channels, height, width], and these have the shape [64]."),
    ],
)
def test_what_does_not_suit_convolutions_is_refused(shape: tuple[int, ...], stages: int, sentence: str) -> None:
    assert conv_problems(shape, stages, "X") == [sentence]
    for build in (VAE, WGAN):
        with pytest.raises(UsageError) as caught:
            build(shape, "conv", [4] * stages)
        assert caught.value.problems == (sentence.replace("X", "A convolutional generative model"),)
    assert conv_problems((3, 32, 32), 2, "X") == []


def test_weights_are_the_generator_s_and_torch_s_own_randomness_stays() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    models = []
    for seed in (3, 3, 4):
        with initialized_by(seeded(seed)):
            models.append(VAE((4,), hidden=[5], z=2, classes=2).state_dict())
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert not torch.equal(models[2]["prior_mean"], models[0]["prior_mean"])


def test_a_step_down_moves_what_it_is_told_to_alone() -> None:
    moved, still = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([moved, still], lr=0.5)
    descend(optimizer, (moved * still).sum(), [moved])
    assert (moved.item(), still.item()) == (0.0, 2.0)
    assert (moved.grad, still.grad) == (None, None)
