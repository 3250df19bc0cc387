"""LwM: Grad-CAM against its formulas, attention that trains, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clframe import Batch, IncrementalNet, Outputs, Plugin, Transform, hookimpl, snapshot, split_classes, testing
from clframe.backbones import cnn_small, resnet32
from clframe.errors import RunError, UsageError
from clframe.model import evaluating, normalizing_by_batch
from clframe.plugins.finetune_fc import FinetuneFC
from clframe.plugins.lwm import LwM
from clframe.testing import Recorder
from clframe.toolkit.distill import attention_distance, grad_cam, observe, sigmoid_cross_entropy, soft_cross_entropy

learn = partial(testing.learn, optimizer="sgd", lr=0.05)


class Maps(nn.Module):
    """A convolution whose maps are averaged: the network of class activation maps (Zhou et al., 2016)."""

    width = 5

    def __init__(self, inplace: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(1, 5, 3, padding=1)
        self.after = nn.Identity() if inplace is None else nn.ReLU(inplace=inplace)

    def features(self, x: Tensor) -> Tensor:
        return self.after(self.conv(x)).mean((2, 3))


class Convolutional(nn.Module):
    """Convolution, batch norm, fully connected layer."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 6)

    def features(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3))).relu()


def images(n: int = 6, size: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(5), dtype=dtype)


def perturbed(model: IncrementalNet, scale: float = 0.1) -> IncrementalNet:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * p.abs().mean() * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


class Bench:
    """LwM's penalty outside a run: a teacher of 4 classes, and the student it was, moved a little."""

    def __init__(self, backbone: nn.Module, *, move: float = 0.1, **options: Any) -> None:
        self.model = IncrementalNet(backbone, [2, 2]).double()
        self.lwm = LwM(**options)
        self.lwm.teacher = snapshot(self.model)
        perturbed(self.model, move)
        scenario = SimpleNamespace(input_shape=(1, 8, 8))
        self.run: Any = SimpleNamespace(
            model=self.model, previous_classes=[0, 1, 2, 3], scenario=scenario, device="cpu"
        )
        self.model.float()
        self.lwm.before_run(self.run)
        self.model.double()

    def terms(self, x: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        zeros = torch.zeros(len(x), dtype=torch.int64)
        batch = Batch(x, zeros, zeros, zeros, torch.ones(len(x)) if weight is None else weight, zeros)
        outputs: Outputs = self.model(x)
        return self.lwm.penalty(self.run, batch, outputs)  # type: ignore[return-value]


def test_grad_cam_is_the_class_activation_map_where_maps_are_averaged() -> None:
    """alpha_k = w_bk / HW; guards against maps that are not normalised."""
    model = IncrementalNet(Maps(), [3]).double()
    with observe(model.backbone.conv) as kept:
        logits = model(images()).logits
    b = logits.argmax(1, keepdim=True)
    got = grad_cam(logits.gather(1, b).squeeze(1), kept[0])
    weights = model.head[0].weight[b[:, 0]]
    cam = (weights[:, :, None, None] * kept[0]).sum(1).relu().flatten(1)
    assert torch.allclose(got, cam / cam.norm(dim=1, keepdim=True), rtol=1e-6)
    assert torch.allclose(got.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_grad_cam_is_the_autograd_of_each_image_by_itself() -> None:
    """One score an image: guards against `logits[:, idx]`, which is B x B."""
    model = IncrementalNet(cnn_small((1, 8, 8)), [3]).double().eval()
    x, b = images(), torch.tensor([0, 2, 1, 1, 0, 2])
    with observe(model.backbone.net[3]) as kept:
        logits = model(x).logits
        got = grad_cam(logits[torch.arange(6), b], kept[0])
        for i in range(6):
            z = model(x[i : i + 1]).logits[0, b[i]]
            a = kept[-1]
            alpha = torch.autograd.grad(z, a)[0].mean((2, 3), keepdim=True)
            one = (alpha * a).sum(1).relu().flatten()
            assert torch.allclose(got[i], one / one.norm(), rtol=1e-6, atol=1e-12)


def test_maps_of_zeros_are_finite_and_so_is_their_gradient() -> None:
    a = -torch.ones(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    looks = grad_cam((a.square() * torch.tensor(-1.0)).sum((1, 2, 3)) * -1, a, create_graph=True)
    value = attention_distance(torch.zeros_like(looks), looks).sum() + grad_cam(a.sum((1, 2, 3)), a).sum()
    (gradient,) = torch.autograd.grad(looks.sum(), a, allow_unused=True)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_attention_distance_is_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    q, z = (nn.functional.normalize(torch.rand(50, 16, generator=generator), dim=1) for _ in range(2))
    distances = attention_distance(q, z)
    assert attention_distance(q, q).abs().max() == 0
    assert distances.min() > 0
    assert distances.max() <= 2 * math.sqrt(16)


@pytest.mark.parametrize("backbone", [cnn_small, resnet32])
@pytest.mark.parametrize("base", ["student", "teacher"])
def test_attention_pulls_on_every_live_kernel(backbone: Any, base: str) -> None:
    """Guards against FACIL's LwM, whose attention loss has a gradient of zero."""
    torch.manual_seed(0)
    bench = Bench(backbone((1, 8, 8)), beta=0.0, base=base)
    alive: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_hook(lambda m, a, out, n=n: alive.__setitem__(n, (out > 0).any(0).flatten(1).any(1)))
        for n, m in bench.model.backbone.named_modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    value = bench.terms(images(32))["lwm/attend"]  # the last pass is the student's look
    for hook in hooks:
        hook.remove()
    assert value > 1e-3
    convolutions = {n: m for n, m in bench.model.backbone.named_modules() if isinstance(m, nn.Conv2d)}
    gradients = torch.autograd.grad(value, [m.weight for m in convolutions.values()])
    for (name, _), gradient, live in zip(convolutions.items(), gradients, alive.values(), strict=True):
        assert live.float().mean() > 0.5, name
        assert (gradient.flatten(1).norm(dim=1)[live] > 0).all(), name
    assert all(p.grad is None for p in (*bench.model.parameters(), *bench.lwm.teacher.parameters()))


def test_the_gradient_of_attention_is_that_of_finite_differences() -> None:
    """Through the maps and through their weights, which are gradients themselves."""
    torch.manual_seed(1)
    bench = Bench(Maps(), gamma=3.0, base="teacher")
    weight, x, h = bench.model.backbone.conv.weight, images(), 1e-6
    (gradient,) = torch.autograd.grad(bench.terms(x)["lwm/attend"], weight)
    for place in [(0, 0, 0, 0), (1, 0, 2, 1), (2, 0, 1, 1), (4, 0, 2, 2)]:
        values = []
        for step in (h, -2 * h):
            with torch.no_grad():
                weight[place] += step
            values.append(bench.terms(x)["lwm/attend"].item())
        with torch.no_grad():
            weight[place] += h
        assert gradient[place].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4, abs=1e-8)


def test_equal_networks_look_alike_and_nothing_of_them_moves() -> None:
    """Also while the student trains: modes and running statistics are as the step's own forward pass left them."""
    bench = Bench(cnn_small((1, 8, 8)), move=0.0)
    bench.model.train()
    x = images()
    y, index, task = (torch.zeros(6, dtype=torch.int64) for _ in range(3))
    batch = Batch(x, y, index, task, torch.ones(6), torch.zeros(6))
    outputs = bench.model(x)
    networks = (bench.model, bench.lwm.teacher)
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in networks]
    assert bench.lwm.penalty(bench.run, batch, outputs)["lwm/attend"].item() == pytest.approx(0, abs=1e-9)
    for net, state in zip(networks, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in bench.model.modules())
    assert not any(module.training for module in bench.lwm.teacher.modules())
    norms = [m for net in networks for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.track_running_stats for norm in norms)


@pytest.mark.parametrize("base", ["student", "teacher"])
def test_both_maps_explain_the_same_class(base: str) -> None:
    """Guards against maps of two classes: the argmax of each network by itself."""
    bench = Bench(Maps(), move=2.0, base=base, beta=0.0)
    x = images(40)
    z, q = bench.model(x).logits, bench.lwm.teacher(x).logits
    assert (z.argmax(1) != q.argmax(1)).any()
    b = (z if base == "student" else q).argmax(1)
    looks = []
    for model in (bench.model, bench.lwm.teacher):
        a = model.backbone.conv(x)
        cam = _weights(model)[b][:, :, None, None] * a
        looks.append(nn.functional.normalize(cam.sum(1).relu().flatten(1), dim=1))
    wanted = (looks[0] - looks[1]).abs().sum(1).mean()
    assert bench.terms(x)["lwm/attend"].item() == pytest.approx(wanted.item(), rel=1e-6)


def _weights(model: IncrementalNet) -> Tensor:
    return torch.cat([block.weight for block in model.head])


@pytest.mark.parametrize("distill", ["sigmoid", "softmax"])
def test_answers_are_distilled_over_the_base_classes(distill: str) -> None:
    bench = Bench(Maps(), beta=0.5, distill=distill, temperature=3.0)
    x = images()
    z, q = bench.model(x).logits, bench.lwm.teacher(x).logits
    values = sigmoid_cross_entropy(q, z) if distill == "sigmoid" else soft_cross_entropy(q, z, 3.0)
    assert bench.terms(x)["lwm/distill"].item() == pytest.approx(0.5 * values.mean().item(), rel=1e-9)


def test_gamma_scales_attention() -> None:
    one, two = (Bench(Maps(), gamma=g).terms(images())["lwm/attend"].item() for g in (1.0, 2.5))
    assert two == pytest.approx(2.5 * one, rel=1e-9)


def test_an_activation_that_works_in_place_changes_nothing() -> None:
    values = [Bench(Maps(inplace)).terms(images())["lwm/attend"].item() for inplace in (False, True)]
    assert values[0] == values[1] > 0


def test_a_run_has_both_terms_from_the_second_experience_on_and_leaves_no_hook(tiny) -> None:
    lwm, recorder = LwM(), Recorder()
    learn(tiny(2, shape=(1, 8, 8)), lwm, recorder)
    assert {(step.experience, tuple(step.losses)) for step in recorder.steps} == {
        (0, ("base",)),
        (1, ("base", "lwm/distill", "lwm/attend")),
    }
    assert not any(m._forward_hooks for net in (recorder.model, lwm.teacher) for m in net.modules())


def test_attention_reaches_what_is_behind_frozen_convolutions(tiny) -> None:
    """Their maps stay, but alpha depends on the fully connected layer."""
    norms: list[float] = []

    class Watch(Plugin):
        name = "watch"
        observer = True

        @hookimpl
        def after_step(self, run, batch) -> None:
            if run.experience.index:
                terms = lwm.penalty(run, batch, run.model(batch.x))
                assert set(run.losses) == {"base", "lwm/distill", "lwm/attend"}
                (gradient,) = torch.autograd.grad(terms["lwm/attend"], run.model.backbone.fc.weight)
                norms.append(gradient.norm().item())

    lwm = LwM()
    learn(tiny(2, shape=(1, 8, 8)), lwm, FinetuneFC(), Watch(), model=Convolutional())
    assert len(norms) == 10
    assert min(norms[1:]) > 0


@pytest.mark.parametrize(
    ("option", "value"), [("beta", -1.0), ("gamma", -0.1), ("temperature", 0.0), ("distill", "kd"), ("base", "both")]
)
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        LwM(**{option: value})
    (problem,) = caught.value.problems
    assert f"`lwm.{option}` is {value!r}" in problem


def with_new_head(bench: Bench, push: float = 50.0) -> Bench:
    """A head of new classes, which score highest wherever a network is asked for all."""
    block = bench.model.grow(2)
    with torch.no_grad():
        block.bias += push
    return bench


@pytest.mark.parametrize("base", ["student", "teacher"])
def test_new_classes_have_no_say(base: str) -> None:
    """The class that is explained, and what is distilled, are of the base classes alone.

    Guards against the argmax over all heads (FACIL), which a new class would win here."""
    options: dict[str, Any] = {"move": 2.0, "base": base}
    plain, grown = Bench(Maps(), **options), with_new_head(Bench(Maps(), **options))
    x = images(40)
    assert (grown.model(x).logits.argmax(1) >= 4).all()
    values = [{name: term.item() for name, term in bench.terms(x).items()} for bench in (plain, grown)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    gradient = torch.autograd.grad(sum(grown.terms(x).values()), grown.model.head[2].weight, allow_unused=True)[0]
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("training", [True, False])
def test_a_student_that_has_not_moved_is_looked_at_as_its_teacher_is(training: bool) -> None:
    """By the batch's statistics or, where it rests (as frozen layers do), by the running ones: both in the same way."""
    bench = Bench(cnn_small((1, 8, 8)), move=0.0)
    x = images(40) * 3 + 1
    bench.model.train()(x)  # running statistics that are neither those of the batch nor of a new network
    bench.lwm.teacher = snapshot(bench.model)
    bench.model.train(training)
    terms = bench.terms(x)
    assert terms["lwm/attend"].item() == pytest.approx(0, abs=1e-6)
    p = bench.model(x).logits.sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert terms["lwm/distill"].item() == pytest.approx(entropy.item(), rel=1e-9)


def test_a_teacher_may_be_looked_at_in_eval_mode() -> None:
    """Its maps and answers are then those of the network at rest, while the student normalises by the batch."""
    bench = Bench(cnn_small((1, 8, 8)), move=0.0, gamma=1.0, teacher_norm="running", base="teacher")
    x = images(40) * 3 + 1
    bench.model.train()(x)
    bench.lwm.teacher = snapshot(bench.model)
    terms = bench.terms(x)
    maps = []
    for model in (bench.lwm.teacher.eval(), bench.model.train()):
        with observe(model.backbone.net[8]) as kept:
            q = model(x).logits
        b = q.argmax(1, keepdim=True) if not maps else b  # noqa: F821  # of the teacher
        maps.append(grad_cam(q.gather(1, b).squeeze(1), kept[0]))
    assert terms["lwm/attend"].item() == pytest.approx((maps[0] - maps[1]).abs().sum(1).mean().item(), rel=1e-6)
    assert terms["lwm/attend"].item() > 0.01


def test_a_look_ends_with_an_error_as_well() -> None:
    """Running statistics, their counts and all modes stay, those of a part that rests included."""
    net = cnn_small((1, 8, 8)).double()
    net.net[1].eval()
    x, modes = images(), [module.training for module in net.modules()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    got: list[Tensor] = []

    def fail() -> None:
        with normalizing_by_batch(net, like=net):
            got.append(net(x))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert all(norm.track_running_stats for norm in net.modules() if isinstance(norm, nn.BatchNorm2d))
    assert torch.equal(got[0], net(x))
    assert not torch.allclose(got[0], net.eval()(x))


def test_a_dropout_rests_while_both_look() -> None:
    """Else two networks that are the same would look at different places."""
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(1, affine=False))
    x = images()
    with normalizing_by_batch(net, like=net):
        assert torch.allclose(net(x).mean(), torch.zeros((), dtype=x.dtype), atol=1e-12)
        assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    ("backbone", "layer"),
    [
        (cnn_small, "net.8"),
        (resnet32, "layer3"),
        (lambda shape: Convolutional(), "norm"),
        (lambda shape: Maps(), "after"),
    ],
)
def test_the_layer_is_the_last_that_gives_maps(backbone: Any, layer: str) -> None:
    """Behind the last batch norm, which would mix the images' gradients, and before the mean over the pixels."""
    bench = Bench(backbone((1, 8, 8)))
    assert bench.lwm.layer == layer
    assert not any(module._forward_hooks for module in bench.model.modules())
    bench.model.train()
    with observe(bench.model.backbone.get_submodule(layer)) as maps:
        scores = bench.model(images()).logits[:, 0]
    (gradient,) = torch.autograd.grad(scores[2], maps[0])
    assert gradient[2].any()
    assert not gradient[[0, 1, 3, 4, 5]].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [None, "net.3"])
def test_attention_trains_the_weights_of_its_maps_as_well(layer: str | None, training: bool) -> None:
    """Finite differences where alpha depends on what is trained: behind the layer, and through its batch norm.

    Guards against an alpha that is detached; for the convolution behind `net.3` all of the gradient would be lost."""
    torch.manual_seed(1)
    bench = Bench(cnn_small((1, 8, 8)), beta=0.0, base="teacher", layer=layer)
    bench.model.train(training)
    for norm in bench.model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0  # each look is at the same network
    x, h = images(), 1e-6
    weights = [bench.model.backbone.net[k].weight for k in (0, 3, 6)] + [block.weight for block in bench.model.head]
    gradients = list(torch.autograd.grad(bench.terms(x)["lwm/attend"], weights))
    silent = [k for k in (3, 4) if not gradients[k].any()]  # a head none of whose classes is explained
    assert len(silent) < 2
    for k in silent:
        del weights[k], gradients[k]

    def value() -> float:
        return bench.terms(x)["lwm/attend"].item()

    for weight, gradient in zip(weights, gradients, strict=True):
        for place in gradient.abs().flatten().topk(3).indices.tolist():
            flat = weight.detach().view(-1)
            was = flat[place].item()
            flat[place] = was + h
            above = value()
            flat[place] = was - h
            below = value()
            flat[place] = was
            assert gradient.flatten()[place].abs() > 1e-4
            assert gradient.flatten()[place].item() == pytest.approx((above - below) / (2 * h), rel=1e-4)


@pytest.mark.parametrize("backbone", [Maps(inplace=False), cnn_small((1, 8, 8))])
def test_attention_of_an_image_does_not_depend_on_the_others(backbone: nn.Module) -> None:
    """But for the statistics of the batch; guards against scores [B, B]: one image's map for others' classes."""
    bench = Bench(backbone, beta=0.0, move=2.0)
    bench.model.eval()
    x = images(5)
    together = bench.terms(x)["lwm/attend"].item()
    alone = [bench.terms(x[i : i + 1])["lwm/attend"].item() for i in range(5)]
    assert together == pytest.approx(sum(alone) / 5, rel=1e-9)
    assert len({round(value, 6) for value in alone}) == 5


def test_a_batch_of_one_image_has_no_noise_for_a_map() -> None:
    """Before a batch norm in training its alpha would be exactly 0, and a map of rounding made one of length 1."""
    torch.manual_seed(0)
    bench = Bench(cnn_small((1, 8, 8)), move=1e-3)
    bench.model.float().train()
    bench.lwm.teacher.float()
    assert 0 < bench.terms(images(1, dtype=torch.float32))["lwm/attend"].item() < 0.2


def test_another_plugin_may_call_the_network_within_the_step(tiny) -> None:
    """In any order, with gradients or without: what is learnt stays the same to the bit."""

    class Calls(Plugin):
        name = "calls"
        observer = True

        def __init__(self, gradients: bool = True) -> None:
            self.gradients = gradients

        @hookimpl
        def penalty(self, run, batch, outputs) -> None:
            """Looks at something of its own."""
            with torch.set_grad_enabled(self.gradients), evaluating(run.model):
                run.model(batch.x.flip(0))

    ends: list[dict[str, Tensor]] = []
    for plugins in ([LwM()], [LwM(), Calls()], [Calls(), LwM()], [Calls(gradients=False), LwM()]):
        recorder = Recorder()
        learn(tiny(2, shape=(1, 8, 8)), *plugins, recorder)
        ends.append(recorder.evaluated[-1])
    assert all(testing.differing(end, ends[0]) == [] for end in ends[1:])


def test_where_nothing_is_looked_at_the_gradient_is_nothing_and_finite() -> None:
    """Maps that speak against the class everywhere, and maps of zeros: no division of 0 by 0."""
    for a in (torch.ones(2, 3, 4, 4, dtype=torch.float64), torch.zeros(2, 3, 4, 4, dtype=torch.float64)):
        a.requires_grad_()
        w = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
        looks = grad_cam((w * a.mean((2, 3))).sum(1), a, create_graph=True)
        assert not looks.any()
        elsewhere = nn.functional.normalize(torch.ones_like(looks), dim=1)
        distance = attention_distance(elsewhere, looks)
        assert distance.tolist() == pytest.approx([4.0, 4.0])
        for gradient in torch.autograd.grad(distance.sum(), (a, w)):
            assert not gradient.any()  # nan is something


def test_the_loss_of_labels_is_over_the_current_classes(tiny) -> None:
    """So the head of old classes learns from the distillation alone: without it, nothing changes there."""
    recorder = Recorder()
    learn(tiny(2, shape=(1, 8, 8)), LwM(beta=0.0, gamma=0.0), recorder)
    assert recorder.run.logits == "current"
    first, second = (state["head.0.weight"][:2] for state in recorder.after)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("mlp-100", {}, ("`lwm`", "convolution", "cnn-small or resnet32")),
        ("cnn-small", {"layer": "net.66"}, ("`lwm.layer` is net.66", "`net.6`?")),
        ("cnn-small", {"layer": "net.10"}, ("`lwm.layer=net.10`", "[B, K, H, W]", "`net.0`, `net.3`, `net.6`")),
        ("mlp-100", {"layer": "net.1"}, ("`lwm.layer=net.1`", "[B, K, H, W]", "none")),
    ],
)
def test_the_refusal_is_one_sentence_and_comes_before_training(
    model: str, options: Any, words: tuple[str, ...], tiny
) -> None:
    recorder = Recorder()
    with testing.refused(*words):
        learn(tiny(shape=(1, 8, 8)), LwM(**options), recorder, model=model)
    assert recorder.steps == []


def test_beta_and_gamma_scale_their_own_terms() -> None:
    one, two = (
        {name: term.item() for name, term in Bench(Maps(), beta=b, gamma=g).terms(images()).items()}
        for b, g in ((1.0, 1.0), (0.25, 3.0))
    )
    scaled = {"lwm/distill": 0.25 * one["lwm/distill"], "lwm/attend": 3 * one["lwm/attend"]}
    assert two == pytest.approx(scaled, rel=1e-12)
    assert min(one.values()) > 0


def test_answers_by_hand() -> None:
    """Old logits q = (0, log 3), the student's z = (log 3, 0): as sigmoids, and as softmaxes at temperature 1."""

    class Fixed(nn.Module):
        def __init__(self, answer: list[float]) -> None:
            super().__init__()
            self.backbone = Maps()
            self.answer = torch.tensor([answer], dtype=torch.float64)

        def forward(self, x: Tensor, task: Tensor | None = None) -> Outputs:
            features = self.backbone.features(x)
            return Outputs(features, self.answer + 0 * features[:, :2], [2])

    values = []
    for distill in ("sigmoid", "softmax"):
        bench = Bench(Maps(), distill=distill, temperature=1.0, beta=0.5)
        bench.run.previous_classes = [0, 1]
        bench.lwm.teacher = Fixed([0.0, math.log(3)]).double()
        with torch.no_grad():
            for block in bench.model.head:
                block.weight.zero_()
                block.bias.zero_()
            bench.model.head[0].bias[0] = math.log(3)
        values.append(bench.terms(images())["lwm/distill"].item())
    # sigmoids: 3/4 and 1/2 where 1/2 and 3/4 are wanted; softmaxes: (3/4, 1/4) where (1/4, 3/4) is wanted
    sigmoid = (-(math.log(3 / 4) + math.log(1 / 4)) / 2 + math.log(2)) / 2
    softmax = -(math.log(3 / 4) / 4 + math.log(1 / 4) * 3 / 4)
    assert values == pytest.approx([0.5 * sigmoid, 0.5 * softmax], rel=1e-7)


def test_terms_are_means_over_images_by_their_weights() -> None:
    """An image of weight 0 counts for nothing."""
    bench = Bench(Maps(), move=2.0)
    x, weight = images(4), torch.tensor([1.0, 0.0, 0.5, 2.0])
    together = bench.terms(x, weight)
    alone = [bench.terms(x[i : i + 1]) for i in range(4)]
    for name in ("lwm/distill", "lwm/attend"):
        wanted = sum(w * terms[name].item() for w, terms in zip(weight.tolist(), alone, strict=True)) / 3.5
        assert together[name].item() == pytest.approx(wanted, rel=1e-9)


def test_alpha_is_the_head_s_weight_over_the_area() -> None:
    """And so the map is that of the classic formula to the last constant, before it is made one of length 1."""
    model = IncrementalNet(Maps(), [3]).double()
    with observe(model.backbone.conv) as kept:
        logits = model(images()).logits
    b = torch.tensor([0, 2, 1, 1, 0, 2])
    scores = logits[torch.arange(6), b]
    (gradient,) = torch.autograd.grad(scores.sum(), kept[0], retain_graph=True)
    alpha = model.head[0].weight[b] / 64  # 8 x 8 pixels
    assert torch.allclose(gradient.mean((2, 3)), alpha, rtol=1e-9)
    wanted = torch.einsum("bk,bkhw->bhw", alpha, kept[0]).relu().flatten(1)
    wanted = wanted / wanted.square().sum(1, keepdim=True).sqrt()
    assert torch.allclose(grad_cam(scores, kept[0]), wanted, rtol=1e-6)


class Deep(nn.Module):
    """Two convolutions with activations that work in place, and a fully connected layer; no batch norm."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 6)
        self.act = nn.ReLU(inplace=True)

    def features(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.second(self.act(self.first(x)))).mean((2, 3))).relu()


class ByHand(Plugin):
    """Computes the terms of every third step from copies of both networks, given one image at a time."""

    name = "by-hand"
    observer = True

    def __init__(self, lwm: LwM) -> None:
        self.lwm = lwm
        self.old: IncrementalNet | None = None
        self.wanted: list[dict[str, float]] = []
        self.found: list[dict[str, float]] = []
        self.classes: set[int] = set()  # that were explained
        self.due = False

    @hookimpl
    def penalty(self, run, batch: Batch, outputs: Outputs) -> None:
        self.due = run.step % 3 == 0
        terms = {"base": run.loss(batch, outputs).item()}
        if self.due and self.old is not None:
            n, values = 2 * run.experience.index, []
            for x in batch.x:
                q, z = (model(x[None]).logits[0, :n].detach().sigmoid() for model in (self.old, run.model))
                b = int((z if self.lwm.base == "student" else q).argmax())
                self.classes.add(b)
                distance = (self.look(run.model, x, b) - self.look(self.old, x, b)).abs().sum()
                values.append(torch.stack([-(q * z.log() + (1 - q) * (1 - z).log()).mean(), distance]))
            distilled, attended = torch.stack(values).mean(0).tolist()
            terms |= {"lwm/distill": 0.5 * distilled, "lwm/attend": 3.0 * attended}
        if self.due:
            self.wanted.append(terms)

    def look(self, model: IncrementalNet, x: Tensor, b: int) -> Tensor:
        """The map of class b on one image, in float64."""
        net = snapshot(model).double()
        a = net.backbone.second(net.backbone.first(x[None].double()).relu()).requires_grad_()
        features = net.backbone.fc(a.relu().mean((2, 3))).relu()
        score = torch.cat([block(features) for block in net.head], 1)[0, b]
        alpha = torch.autograd.grad(score, a)[0].mean((2, 3), keepdim=True)
        cam = (alpha * a.detach()).sum(1).clamp(min=0)
        return cam / cam.norm().clamp(min=1e-12)

    @hookimpl
    def after_step(self, run) -> None:
        if self.due:
            self.found.append({name: value.item() for name, value in run.losses.items()})

    @hookimpl
    def after_experience(self, run) -> None:
        self.old = snapshot(run.model)


@pytest.mark.parametrize("setting", ["class", "task"])
@pytest.mark.parametrize("base", ["student", "teacher"])
def test_in_a_run_steps_have_both_terms_by_hand(base: Any, setting: str, tiny_arrays) -> None:
    """Of single images: the teacher is the latest network and sees the augmented view; one class a pair of maps.

    Guards against FACIL's LwM (zero gradient apart): scores [B, B], a class for each network, maps of any length.
    """
    arrays = replace(tiny_arrays(shape=(1, 8, 8)), transform=Transform(mean=(0.3,), std=(0.2,), pad=1, flip=True))
    lwm = LwM(beta=0.5, gamma=3.0, base=base, layer="second")
    watch = ByHand(lwm=lwm)
    torch.manual_seed(0)  # of the network
    learn(split_classes("tiny", arrays, experiences=3, setting=setting), lwm, watch, model=Deep(), lr=0.2, epochs=6)
    assert len(watch.found) == 18
    for found, wanted in zip(watch.found, watch.wanted, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    attend = [terms["lwm/attend"] for terms in watch.found[6:]]
    assert attend[0] == pytest.approx(0, abs=1e-4)  # a network that was just copied looks where its copy does
    assert attend[6] == pytest.approx(0, abs=1e-4)
    assert max(attend) > 0.1
    assert len(watch.classes) > 1


@pytest.mark.parametrize("options", [{}, {"beta": 0.0, "gamma": 0.0}])
def test_the_first_experience_and_all_without_weights_is_fine_tuning_to_the_bit(options: Any, tiny) -> None:
    """Neither the hook nor the second backward pass, nor the teacher's, changes what is learnt."""
    ours, theirs = Recorder(), Recorder()
    learn(tiny(2, shape=(1, 8, 8)), LwM(**options), ours)
    learn(tiny(2, shape=(1, 8, 8)), theirs, logits="current")
    equal = [testing.differing(*states) == [] for states in zip(ours.after, theirs.after, strict=True)]
    assert equal == [True, bool(options)]


def test_an_error_leaves_no_hook_either(tiny) -> None:
    class Fails(Plugin):
        name = "fails"

        @hookimpl
        def after_backward(self, run) -> None:
            self.model = run.model
            if run.experience.index:
                raise ZeroDivisionError

    lwm, fails = LwM(), Fails()
    with pytest.raises(RunError, match="`fails`"):
        learn(tiny(2, shape=(1, 8, 8)), lwm, fails)
    assert not any(m._forward_hooks for net in (fails.model, lwm.teacher) for m in net.modules())
    assert all(p.grad is None for p in lwm.teacher.parameters())


def test_a_layer_that_stands_in_two_places_counts_as_the_last_of_them(tiny):
    """A ReLU that is done on maps and then on vectors gives vectors; the batch norm before it is what is looked at."""

    class Shared(nn.Module):
        width = 4

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.relu, self.fc = nn.ReLU(), nn.Linear(256, 4)

        def features(self, x):
            return self.relu(self.fc(self.relu(self.norm(self.conv(x))).flatten(1)))

    torch.manual_seed(0)
    plugin = LwM()
    scenario = tiny(experiences=2, shape=(1, 8, 8))
    learn(scenario, plugin, model=Shared(), epochs=1, batch_size=12)
    assert plugin.layer == "norm"
