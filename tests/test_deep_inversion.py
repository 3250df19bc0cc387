"""DeepInversion: its losses by hand, what the student is shown, the rival, and stops within a dream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import clframe
from clframe import (
    Batch,
    ImageData,
    IncrementalNet,
    Outputs,
    Transform,
    change_domains,
    hookimpl,
    snapshot,
    split_classes,
    testing,
)
from clframe.backbones import cnn_small
from clframe.errors import RunError, UsageError
from clframe.plugins.deep_inversion import DeepInversion
from clframe.plugins.lwf import LwF
from clframe.testing import Recorder, differing, learn, state_copy
from clframe.toolkit import inversion
from clframe.toolkit.inversion import jensen_shannon

SHORT: dict[str, Any] = {"per_class": 4, "iterations": 6}


class Bench:
    """The plugin's penalties outside a run: a teacher of 4 classes, a student of 6, 2 dreams and 3 new images."""

    def __init__(self, setting: str, *, move: float = 0.3, **options: Any) -> None:
        self.plugin = DeepInversion(**options)
        torch.manual_seed(1)
        model = IncrementalNet(cnn_small((1, 8, 8)), [2, 2]).double()
        self.plugin.teacher = snapshot(model)
        if setting != "domain":
            model.grow(2)
        with torch.no_grad():
            for p in model.parameters():
                p += move * p.abs().mean() * torch.randn_like(p)
        self.model = model.eval()
        scenario = SimpleNamespace(setting=setting, classes=((0, 1), (2, 3), (4, 5)))
        origin = torch.tensor([0, 0, 0, 1, 1])
        self.run: Any = SimpleNamespace(
            scenario=scenario,
            experience=SimpleNamespace(index=2),
            old_heads=[(0, 1), (2, 3)],
            rows_from=lambda plugin, batch: batch.origin == 1,
        )
        x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
        y, task = torch.tensor([4, 5, 4, 3, 0]), torch.tensor([2, 2, 2, 1, 0])
        self.batch = Batch(x, y, torch.full((5,), -1), task, torch.tensor([1.0, 2.0, 1.0, 0, 0]), origin)
        self.z, self.q = model(x).logits, self.plugin.teacher(x).logits

    def terms(self) -> dict[str, Tensor]:
        outputs: Outputs = self.model(self.batch.x)
        return self.plugin.penalty(self.run, self.batch, outputs)  # type: ignore[return-value]


def kl(q: Tensor, z: Tensor, temperature: float) -> Tensor:
    p, s = (q / temperature).softmax(-1), (z / temperature).softmax(-1)
    return (p * (p / s).log()).sum(-1)


WEIGHT = torch.tensor([0.25, 0.5, 0.25])  # of the new images


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_distillations_by_hand_among_classes(temperature: float) -> None:
    """On dreams over all classes seen, where the old network knows no new ones; on new images over the old ones."""
    bench = Bench("class", dreams=0.7, distill=3.0, temperature=temperature)
    terms, z, q = bench.terms(), bench.z, bench.q
    p = (q[3:] / temperature).softmax(1)
    s = (z[3:] / temperature).softmax(1)
    dreams = (p * (p / s[:, :4]).log()).sum(1).mean()  # 0 log 0 = 0 for the new ones
    known = (WEIGHT * kl(q[:3], z[:3, :4], temperature)).sum()
    assert terms["deep-inversion/dreams"].item() == pytest.approx(0.7 * dreams.item(), rel=1e-6)
    assert terms["deep-inversion/distill"].item() == pytest.approx(3 * known.item(), rel=1e-6)
    assert set(terms) == {"deep-inversion/dreams", "deep-inversion/distill"}


def test_the_distillations_by_hand_of_told_tasks() -> None:
    """A dream of class 3 counts in the second head, one of class 0 in the first; new images in both."""
    bench = Bench("task", dreams=0.7, distill=3.0)
    terms, z, q = bench.terms(), bench.z, bench.q
    dreams = (kl(q[3, 2:], z[3, 2:4], 1.0) + kl(q[4, :2], z[4, :2], 1.0)) / 2
    both = kl(q[:3, :2], z[:3, :2], 1.0) + kl(q[:3, 2:], z[:3, 2:4], 1.0)
    assert terms["deep-inversion/dreams"].item() == pytest.approx(0.7 * dreams.item(), rel=1e-6)
    assert terms["deep-inversion/distill"].item() == pytest.approx(3 * (WEIGHT * both).sum().item(), rel=1e-6)


def test_the_distillations_by_hand_in_domains() -> None:
    bench = Bench("domain")
    terms, z, q = bench.terms(), bench.z, bench.q
    values = kl(q, z, 1.0)
    assert terms["deep-inversion/dreams"].item() == pytest.approx(values[3:].mean().item(), rel=1e-6)
    assert terms["deep-inversion/distill"].item() == pytest.approx((WEIGHT * values[:3]).sum().item(), rel=1e-6)


@pytest.mark.parametrize("setting", ["class", "task", "domain"])
def test_where_the_student_says_what_the_teacher_says_there_is_no_gradient(setting: str) -> None:
    """Among classes new ones have a share in the student, so there they are given none first."""
    bench = Bench(setting, move=0.0)
    if setting == "class":
        bench.model.head[2].bias.data.fill_(-1000.0)
    terms = bench.terms()
    for term in terms.values():
        assert term.item() == pytest.approx(0, abs=1e-12)
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-12 for p in bench.model.parameters())
    assert all(p.grad is None for p in bench.plugin.teacher.parameters())


def test_dreams_push_new_classes_down() -> None:
    """Guards against a KL over old classes alone: the gradient of a new logit is its mean share in the dreams."""
    bench = Bench("class", distill=0.0)
    bench.terms()["deep-inversion/dreams"].backward()
    shares = bench.z[3:].softmax(1)[:, 4:].mean(0)
    assert torch.allclose(bench.model.head[2].bias.grad, shares, rtol=1e-6)


class Watch(Recorder):
    """What a run shows its network, beside deep inversion, which must be named first."""

    def __init__(self) -> None:
        super().__init__()
        self.dreams: list[ImageData] = []
        self.base: list[tuple[float, float]] = []

    @hookimpl
    def before_run(self, run):
        super().before_run(run)
        self.plugin = run.plugins[0]

    @property
    def shown(self) -> list[Batch]:
        """The batches of all experiences but the first."""
        return [step.batch for step in self.steps if step.experience]

    @hookimpl
    def extra_data(self, run, experience):
        """Dreams are made: neither the teacher nor the run's network has moved."""
        if experience.index:
            self.dreams.append(self.plugin.images)
            teacher = self.plugin.teacher.state_dict()
            assert differing(teacher, self.after[-1]) == []
            assert not set(teacher) & set(differing(teacher, run.model.state_dict()))
            for net in (run.model, self.plugin.teacher):
                assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
            assert all(module.training for module in run.model.modules())

    @hookimpl
    def penalty(self, run, batch, outputs):
        if run.experience.index:
            mask = run.mask(batch.task)
            z = outputs.logits if mask is None else outputs.logits.masked_fill(~mask, -torch.inf)
            new = batch.origin == 0
            hand = functional.cross_entropy(z[new], batch.y[new])
            self.base.append((hand.item(), run.loss(batch, outputs).item()))


@pytest.mark.parametrize("setting", ["class", "task"])
def test_in_a_run_the_student_sees_what_was_dreamt(setting: str, tiny_arrays) -> None:
    """Normalised as images are, with the labels and the task of their class, none counted in the loss of labels."""
    arrays = replace(tiny_arrays(shape=(1, 8, 8)), transform=Transform(mean=(0.3,), std=(0.2,)))
    deep, watch = DeepInversion(**SHORT, replay=5), Watch()
    learn(split_classes("tiny", arrays, experiences=3, setting=setting), deep, watch)
    assert len(watch.shown) == 2 * 6
    for k, images in enumerate(watch.dreams):
        assert images.y.bincount().tolist() == [4] * 2 * (k + 1)
        assert torch.equal(images.task, images.y // 2)
        assert images.x.min() >= 0  # raw, and clipped
        assert images.x.max() <= 255
        assert not images.x.frac().eq(0).all()  # no rounding to pixels
    for i, batch in enumerate(watch.shown):
        mine = watch.run.rows_from(deep, batch)
        assert mine.sum() == 5
        assert (batch.weight == (~mine).float()).all()
        images = watch.dreams[i // 6]
        dreamt = arrays.transform.normalize(images.x)
        for x, y, task in zip(batch.x[mine], batch.y[mine], batch.task[mine], strict=True):
            same = (dreamt == x).flatten(1).all(1)
            assert (images.y[same] == y).any()
            assert task == y // 2
    for hand, base in watch.base:
        assert base == pytest.approx(hand, rel=1e-6)


def test_in_a_run_dreams_are_of_the_latest_network_and_what_they_reached_is_told(tiny) -> None:
    deep, watch = DeepInversion(per_class=4, iterations=60), Watch()
    learn(tiny(shape=(1, 8, 8)), deep, watch, epochs=15)  # until statistics have forgotten where they began
    assert not torch.equal(watch.dreams[0].x, watch.dreams[1].x[: len(watch.dreams[0])])
    told = watch.logged()
    assert set(told) == {
        f"deep-inversion/{what}/{of}" for what in ("feature", "accuracy") for of in ("noise", "dreams")
    }
    assert all(len(values) == 2 for values in told.values())
    noise, dreams = told["deep-inversion/feature/noise"], told["deep-inversion/feature/dreams"]
    assert all(after < before / 3 for before, after in zip(noise, dreams, strict=True))
    transform = watch.run.scenario.transform
    images = watch.dreams[1]
    teacher = snapshot(watch.run.model)
    teacher.head = teacher.head[:2]
    teacher.load_state_dict(watch.after[1])  # as it was after the second experience
    found = inversion.assess_images(teacher, transform.normalize(images.x), images.y)
    last = (dreams[1], told["deep-inversion/accuracy/dreams"][1])
    assert found == pytest.approx(last, rel=1e-3)


def test_dreams_are_augmented_as_images_are(tiny_arrays) -> None:
    """By a crop, here of one pixel to each side; and the teacher answers to the view that the student sees."""
    arrays = replace(tiny_arrays(shape=(1, 8, 8)), transform=Transform(pad=1))
    deep, watch = DeepInversion(**SHORT), Watch()
    learn(split_classes("tiny", arrays, experiences=2), deep, watch)
    views = functional.pad(arrays.transform.normalize(deep.images.x), (1,) * 4)
    windows = torch.stack([v[:, i : i + 8, j : j + 8] for v in views for i in range(3) for j in range(3)])
    shown = torch.cat([batch.x[watch.run.rows_from(deep, batch)] for batch in watch.shown])
    matches = [(windows == x).flatten(1).all(1).nonzero().flatten() for x in shown]
    assert all(len(found) for found in matches)
    assert len({int(found[0]) % 9 for found in matches}) > 4


def test_the_teacher_is_shown_a_part_at_a_time(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = inversion.inversion_loss

    def loss(teacher: Any, x: Tensor, y: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(x))
        return original(teacher, x, y, *rest)

    monkeypatch.setattr(inversion, "inversion_loss", loss)
    watch = Watch()
    learn(tiny(2, shape=(1, 8, 8)), DeepInversion(per_class=7, iterations=2, batch_size=5), watch)
    assert sizes == [5, 5] + [4] * 8
    assert watch.dreams[0].y.bincount().tolist() == [7, 7, 7]


@pytest.mark.parametrize("setting", ["class", "task"])
def test_a_dream_is_sought_among_the_classes_of_its_task_where_that_is_told(
    setting: str, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[tuple[list[int], Any]] = []
    original = inversion.inversion_loss

    def loss(teacher: Any, x: Tensor, y: Tensor, weights: Any, mask: Any, rival: Any) -> Tensor:
        masks.append((y.tolist(), None if mask is None else mask.int().tolist()))
        return original(teacher, x, y, weights, mask, rival)

    monkeypatch.setattr(inversion, "inversion_loss", loss)
    learn(tiny(shape=(1, 8, 8), setting=setting), DeepInversion(per_class=1, iterations=1))
    wanted = ([[1, 1], [1, 1]], [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2) if setting == "task" else (None, None)
    assert masks == [([0, 1], wanted[0]), ([0, 1, 2, 3], wanted[1])]


def test_in_rounds_a_rival_learns_and_the_next_dreams_compete_with_it(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[IncrementalNet | None, int]] = []
    moved: list[bool] = []
    original = inversion.inversion_loss

    def loss(teacher: Any, x: Tensor, y: Tensor, weights: Any, mask: Any, rival: IncrementalNet | None) -> Tensor:
        if rival is not None:
            assert not any(module.training for module in rival.modules())
            assert not any(p.requires_grad for p in rival.parameters())
            assert rival is not teacher
            if calls and calls[-1][0] is rival:
                moved.append(differing(rival.state_dict(), before[-1]) != [])
            before.append(state_copy(rival))
        calls.append((rival, len(x)))
        return original(teacher, x, y, weights, mask, rival)

    before: list[dict[str, Tensor]] = []
    monkeypatch.setattr(inversion, "inversion_loss", loss)
    watch = Watch()
    learn(tiny(2, shape=(1, 8, 8)), DeepInversion(per_class=6, iterations=5, compete=1.0, rounds=3), watch)
    assert [size for _, size in calls] == [6] * 15
    rivals = [rival for rival, _ in calls]
    assert rivals[:5] == [None] * 5
    assert len({id(rival) for rival in rivals[5:10]}) == len({id(rival) for rival in rivals[10:]}) == 1
    assert not any(moved)  # while dreaming
    assert differing(before[0], before[-1]) != []  # between the rounds
    assert watch.dreams[0].y.bincount().tolist() == [6, 6, 6]
    dreaming = watch.plugin.dreaming
    assert (dreaming.rival, dreaming.rival_optimizer, dreaming.x, dreaming.images) == (None,) * 4


def test_a_rival_comes_to_say_what_the_teacher_says_on_the_dreams(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    apart: list[float] = []

    class Judge(Watch):
        @hookimpl
        def extra_data(self, run, experience):
            super().extra_data(run, experience)
            if experience.index:
                x = run.batch(self.plugin.images.rows(slice(0, 16))).x  # those of the first round
                rival = rivals[-1]
                with torch.no_grad():
                    q = self.plugin.teacher(x).logits
                    apart.extend(
                        jensen_shannon(q, net(x).logits, 1.0).mean().item() for net in (fresh[-1].eval(), rival)
                    )

    rivals: list[IncrementalNet] = []
    fresh: list[IncrementalNet] = []
    original, reinitialized_copy = inversion.inversion_loss, inversion.reinitialized_copy

    def loss(*given: Any) -> Tensor:
        rivals.extend(net for net in given[5:] if net is not None)
        return original(*given)

    def note_fresh(*given: Any) -> IncrementalNet:
        net = reinitialized_copy(*given)
        fresh.append(snapshot(net))
        return net

    monkeypatch.setattr(inversion, "inversion_loss", loss)
    monkeypatch.setattr(inversion, "reinitialized_copy", note_fresh)
    learn(tiny(2, shape=(1, 8, 8)), DeepInversion(per_class=16, iterations=40, compete=1.0, rounds=2), Judge())
    untaught, taught = apart
    assert len(fresh) == 1
    assert taught < untaught / 3


def test_competition_finds_images_that_the_rival_does_not_know(tiny) -> None:
    """More than without it: the last round's dreams, judged by the rival of that round."""
    found = []
    original = inversion.Dreaming._round

    def judged(self: Any, run: Any, name: str, k: int, teacher: Any, recipe: Any, parts: Any) -> None:
        original(self, run, name, k, teacher, recipe, parts)
        if k:
            x = run.batch(self.images.rows(slice(-len(parts[0]), None))).x
            with torch.no_grad():
                found.append(jensen_shannon(teacher(x).logits, self._rival(teacher)(x).logits).mean().item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inversion.Dreaming, "_round", judged)
        for compete in (1e-9, 10.0):
            options = {"per_class": 8, "iterations": 30, "rounds": 2, "compete": compete, "feature": 0.1}
            learn(tiny(2, shape=(1, 8, 8)), DeepInversion(**options), epochs=8)
    assert found[1] > 2 * found[0]


@pytest.mark.parametrize("compete", [0.0, 0.5])
def test_a_run_stopped_within_a_dream_goes_on_to_the_same_bits(compete: float, tiny, tmp_path: Path) -> None:
    """At every step of the dreams, of the rival, and between them."""
    options = {"per_class": 3, "iterations": 2, "batch_size": 4, "compete": compete, "rounds": 2}

    results: list[clframe.Results] = []

    def begin(folder: Path) -> None:
        plugin = DeepInversion(**options)
        results.append(learn(tiny(2, shape=(1, 8, 8)), plugin, output=str(folder), epochs=1, batch_size=24))

    def go_on(folder: Path) -> None:
        resumed = clframe.resume(folder, scenario=tiny(2, shape=(1, 8, 8)), plugins=[DeepInversion(**options)])
        assert resumed.data == results[0].data

    files = ("results.json", "model.safetensors", "metrics.jsonl", "pictures/deep-inversion-2.png")
    stopped = testing.stop_and_resume(
        tmp_path, begin, go_on, lambda pauses: pauses.within("before_experience/deep-inversion/"), files
    )
    assert len(stopped) == (3 * 2 if not compete else 2 * 2 + 2 + 2)  # of nine dreams, four at a time, or five and four


def test_domains_are_dreamt_of_with_all_classes(tiny_arrays) -> None:
    arrays = tiny_arrays(shape=(1, 8, 8), classes=3)
    deep, watch = DeepInversion(**SHORT), Watch()
    scenario = change_domains("tiny", arrays, lambda i, x: x.roll(i, -1), experiences=2)
    learn(scenario, deep, watch)
    assert watch.dreams[0].y.bincount().tolist() == [4, 4, 4]


def test_beside_a_method_of_its_own_loss_both_have_their_terms(tiny) -> None:
    """LwF takes the form that old images coming back ask for."""
    lwf, recorder = LwF(), Recorder()
    learn(tiny(2, shape=(1, 8, 8)), lwf, DeepInversion(**SHORT), recorder)
    assert lwf.form == "seen"
    terms = {name for step in recorder.steps for name in step.losses}
    assert terms == {"base", "lwf", "deep-inversion/dreams", "deep-inversion/distill"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("out of memory")])
def test_where_memory_ends_the_run_fails_and_says_what_needs_less(
    error: Exception, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*given: Any) -> Tensor:
        raise error

    monkeypatch.setattr(inversion, "inversion_loss", loss)
    with pytest.raises(RunError) as caught:
        learn(tiny(2, shape=(1, 8, 8)), DeepInversion(**SHORT))
    words = ("Out of memory on cpu", "experience 2 of 2", "smaller `deep-inversion.batch_size`")
    assert all(word in str(caught.value) for word in words)


class NoStatistics(nn.Module):
    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        ("mlp-100", (1, 8, 8), ("batch norm", "choose a model", "cnn-small, resnet32 or resnet18")),
        (NoStatistics(), (1, 8, 8), ("batch norm", "choose a model", "cnn-small, resnet32 or resnet18")),
        ("mlp-100", (64,), ("[channels, height, width]", "[64]", "choose a scenario of images")),
    ],
)
def test_the_refusal_is_one_sentence_and_comes_before_training(
    model: Any, shape: tuple[int, ...], words: tuple[str, ...], tiny
) -> None:
    recorder = Recorder()
    with pytest.raises(UsageError) as caught:
        learn(tiny(shape=shape), DeepInversion(), recorder, model=model)
    (problem,) = caught.value.problems
    assert all(word in problem for word in ("`deep-inversion`", *words))
    assert recorder.steps == []


@pytest.mark.parametrize("logits", ["all", "current"])
def test_other_logits_are_refused(logits: str, tiny) -> None:
    """Dreams are of old classes, whose loss over the current ones would be infinite."""
    with pytest.raises(UsageError) as caught:
        learn(tiny(shape=(1, 8, 8)), DeepInversion(), logits=logits)
    (problem,) = caught.value.problems
    assert all(word in problem for word in ("`deep-inversion`", "`train.logits=seen`", f"is {logits}: leave"))


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("per_class", 0, "equal to 1"),
        ("lr", 0.0, "than 0"),
        ("feature", -1.0, "equal to 0"),
        ("rounds", 1, "equal to 2"),
        ("temperature", 0.0, "than 0"),
    ],
)
def test_an_option_out_of_range_is_refused_in_one_sentence(option: str, value: float, least: str) -> None:
    with pytest.raises(UsageError) as caught:
        DeepInversion(**{option: value})
    (problem,) = caught.value.problems
    assert problem.startswith(f"`deep-inversion.{option}` is {value}: ")
    assert problem.endswith(f"{least}.")
