"""Always be dreaming: its losses by hand, the way that each gradient takes, and stops while the generator learns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import clframe
from clframe import Batch, IncrementalNet, Plugin, hookimpl, snapshot, testing
from clframe.backbones import cnn_small
from clframe.errors import RunError, UsageError
from clframe.plugins.always_be_dreaming import AlwaysBeDreaming
from clframe.testing import Recorder, differing, learn, state_copy
from clframe.toolkit import dreamer

SHORT: dict[str, Any] = {"iterations": 6, "batch_size": 8, "noise": 10, "width": 8}


class Bench:
    """The losses outside a run: a teacher of 4 classes, a student of 6, three new images and two dreams."""

    def __init__(self, *, move: float = 0.3, **options: Any) -> None:
        self.plugin = AlwaysBeDreaming(**options)
        torch.manual_seed(1)
        self.model = IncrementalNet(cnn_small((1, 8, 8)), [2, 2]).double()
        self.plugin.teacher = snapshot(self.model)
        self.model.grow(2)
        with torch.no_grad():
            for p in self.model.parameters():
                p += move * p.abs().mean() * torch.randn_like(p)
        self.model.eval()
        self.run: Any = SimpleNamespace(model=self.model)
        x, y = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.tensor([4, 5, 4, 3, 0])
        weight = torch.tensor([1.0, 2.0, 1.0, 0, 0])
        self.batch = Batch(x, y, torch.full((5,), -1), y // 2, weight, torch.tensor([0, 0, 0, 1, 1]))

    @property
    def outputs(self) -> Any:
        return self.model(self.batch.x)

    def terms(self) -> dict[str, Tensor]:
        outputs = self.outputs
        base = self.plugin.base_loss(self.run, self.batch, outputs)
        return {"base": base, **self.plugin.penalty(self.run, self.batch, outputs)}

    def moved(self, term: str) -> set[str]:
        """The parts of the network that a term trains."""
        parameters = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(self.terms()[term], list(parameters.values()), allow_unused=True)
        found = {n for n, g in zip(parameters, gradients, strict=True) if g is not None and g.abs().max() > 1e-12}
        return {name.removesuffix(".weight").removesuffix(".bias") for name in found}


def test_the_losses_by_hand() -> None:
    bench = Bench(mu=0.3)
    terms, z = bench.terms(), bench.outputs.logits
    y = bench.batch.y
    local = functional.cross_entropy(z[:3, 4:], y[:3] - 4, reduction="none")
    assert terms["base"].item() == pytest.approx((local * torch.tensor([0.25, 0.5, 0.25])).sum().item(), rel=1e-6)
    losses = functional.cross_entropy(z, y, reduction="none")
    head = 4 / 6 * losses[3:].mean() + 2 / 6 * losses[:3].mean()
    assert terms["always-be-dreaming/head"].item() == pytest.approx(head.item(), rel=1e-6)
    old: Any = bench.plugin.teacher
    weight = torch.cat([block.weight for block in old.head])
    apart = (bench.outputs.features - old(bench.batch.x).features) @ weight.T  # the bias takes no part
    assert terms["always-be-dreaming/distill"].item() == pytest.approx(
        0.3 * apart.square().sum().item() / (5 * 4), rel=1e-6
    )
    assert len(terms) == 3


def test_each_loss_trains_what_it_is_for() -> None:
    """The local one nothing of the old head; that of the head only the head; that of features nothing of the head."""
    bench = Bench()
    backbone = {n.rsplit(".", 1)[0] for n, _ in bench.model.named_parameters() if n.startswith("backbone.")}
    assert bench.moved("base") == backbone | {"head.2"}
    assert bench.moved("always-be-dreaming/head") == {"head.0", "head.1", "head.2"}
    assert bench.moved("always-be-dreaming/distill") == backbone
    sum(bench.terms().values()).backward()
    assert all(p.grad is None for p in bench.plugin.teacher.parameters())


def test_features_that_have_not_moved_are_not_pulled() -> None:
    bench = Bench(move=0.0)
    term = bench.terms()["always-be-dreaming/distill"]
    assert term.item() == pytest.approx(0, abs=1e-12)
    gradients = torch.autograd.grad(term, list(bench.model.backbone.parameters()))
    assert all(g.abs().max() < 1e-12 for g in gradients)


class Watch(Recorder):
    """What a run of the plugin, named first, shows its network."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[Batch, Tensor]] = []
        self.generators: list[dict[str, Tensor]] = []

    @hookimpl
    def before_run(self, run):
        super().before_run(run)
        self.plugin = run.plugins[0]

    @hookimpl
    def extra_data(self, run, experience):
        """The generator has learnt: neither the teacher nor the run's network has moved."""
        if experience.index:
            teacher = self.plugin.teacher.state_dict()
            assert differing(teacher, self.after[-1]) == []
            assert not set(teacher) & set(differing(teacher, run.model.state_dict()))
            assert not any(m._forward_pre_hooks for m in self.plugin.teacher.modules())
            assert not any(m.training for m in self.plugin.dreamer.generator.modules())
            self.generators.append(state_copy(self.plugin.dreamer.generator))

    @hookimpl
    def after_step(self, run, batch):
        super().after_step(run, batch)
        if run.experience.index:
            self.shown.append((batch, run.rows_from(self.plugin, batch)))
            assert set(run.losses) == {"base", "always-be-dreaming/head", "always-be-dreaming/distill"}
        else:
            assert set(run.losses) == {"base"}

    @hookimpl
    def after_experience(self, run, experience):
        super().after_experience(run, experience)
        if experience.index:
            assert differing(self.generators[-1], self.plugin.dreamer.generator.state_dict()) == []


def test_in_a_run_each_step_has_new_dreams_of_the_old_classes(tiny) -> None:
    watch = Watch()
    learn(tiny(shape=(1, 8, 8)), AlwaysBeDreaming(**SHORT, replay=5), watch)
    assert len(watch.shown) == 2 * 6
    rows = [batch.x[mine] for batch, mine in watch.shown]
    assert all(len(x) == 5 for x in rows)
    assert len({x.sum().item() for x in rows}) == 12
    for i, (batch, mine) in enumerate(watch.shown):
        assert batch.y[mine].max() < 2 * (i // 6 + 1)
        assert (batch.weight == (~mine).float()).all()
    first, second = watch.generators
    names = [name for name, value in first.items() if value.dim() > 1]
    assert names
    assert not any(torch.equal(first[name], second[name]) for name in names)
    assert set(watch.logged()) == {f"always-be-dreaming/{what}" for what in ("confidence", "imbalance", "divergence")}
    assert all(len(values) == 2 for values in watch.logged().values())


def test_each_generator_begins_anew_and_so_does_its_optimizer(tiny) -> None:
    """With steps too small to be seen, what differs between two experiences is the beginning."""
    watch, steps = Watch(), []

    class Steps(Plugin):
        name = "steps"
        observer = True

        @hookimpl
        def after_experience(self, run, experience):
            steps.extend({int(state["step"]) for state in watch.plugin.dreamer.adam.state.values()})

    learn(tiny(shape=(1, 8, 8)), AlwaysBeDreaming(**SHORT | {"lr": 1e-9}), watch, Steps())
    first, second = (generator["first.weight"] for generator in watch.generators)
    assert (first - second).abs().mean() > 0.1
    assert steps == [6, 6]


def test_a_run_stopped_while_the_generator_learns_goes_on_to_the_same_bits(tiny, tmp_path: Path) -> None:
    options = SHORT | {"iterations": 3}

    results: list[clframe.Results] = []

    def begin(folder: Path) -> None:
        plugin = AlwaysBeDreaming(**options)
        results.append(learn(tiny(shape=(1, 8, 8)), plugin, output=str(folder), epochs=1, batch_size=24))

    def go_on(folder: Path) -> None:
        resumed = clframe.resume(folder, scenario=tiny(shape=(1, 8, 8)), plugins=[AlwaysBeDreaming(**options)])
        assert resumed.data == results[0].data

    files = ("results.json", "model.safetensors", "metrics.jsonl", "pictures/always-be-dreaming-3.png")
    stopped = testing.stop_and_resume(
        tmp_path, begin, go_on, lambda pauses: pauses.within("before_experience/always-be-dreaming/"), files
    )
    assert len(stopped) == 2 * 3


def test_a_first_experience_of_one_class_is_learnt(tiny_arrays) -> None:
    """The teacher of the first experience has one class: nothing to balance, and no loss that is not finite."""
    scenario = clframe.split_classes("tiny", tiny_arrays(shape=(1, 8, 8), classes=3), experiences=2, first=1)
    watch = Watch()
    learn(scenario, AlwaysBeDreaming(**SHORT), watch)
    assert watch.logged()["always-be-dreaming/imbalance"][0] == 0


def test_where_memory_ends_the_run_fails_and_says_what_needs_less(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(*given: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(dreamer, "generator_loss", loss)
    with pytest.raises(RunError) as caught:
        learn(tiny(2, shape=(1, 8, 8)), AlwaysBeDreaming(**SHORT))
    words = ("Out of memory on cpu", "experience 2 of 2", "smaller `always-be-dreaming.batch_size`")
    assert all(word in str(caught.value) for word in words)


def returning(tiny_arrays: Any) -> clframe.Scenario:
    """A scenario whose second experience brings class 1 back."""
    arrays = tiny_arrays(shape=(1, 8, 8), classes=3)
    groups = ((0, 1), (1, 2))

    def load(i: int, part: str) -> clframe.ImageData:
        x, y = (arrays.x_train, arrays.y_train) if part == "train" else (arrays.x_test, arrays.y_test)
        where = (y == groups[i][0]) | (y == groups[i][1])
        return clframe.ImageData(x[where], y[where])

    return clframe.Scenario("returning", "class", groups, arrays.class_names, (1, 8, 8), load)


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        ("mlp-100", (1, 8, 8), ("batch norm", "choose a model", "cnn-small, resnet32 or resnet18")),
        ("mlp-100", (64,), ("[channels, height, width]", "[64]", "choose a scenario of images")),
        ("cnn-small", (1, 8, 6), ("divisible by 4", "8 x 6", "choose another scenario, or `deep-inversion`")),
        ("cnn-small", None, ("experience 2 of `returning`", "choose a scenario", "share no class")),
    ],
)
def test_the_refusal_is_one_sentence_and_comes_before_training(
    model: str, shape: tuple[int, ...] | None, words: tuple[str, ...], tiny, tiny_arrays
) -> None:
    recorder = Recorder()
    with pytest.raises(UsageError) as caught:
        learn(tiny(shape=shape) if shape else returning(tiny_arrays), AlwaysBeDreaming(**SHORT), recorder, model=model)
    (problem,) = caught.value.problems
    assert all(word in problem for word in ("`always-be-dreaming`", *words))
    assert recorder.steps == []


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("iterations", 0, "equal to 1"), ("temperature", 0.0, "than 0"), ("mu", -1.0, "equal to 0")],
)
def test_an_option_out_of_range_is_refused_in_one_sentence(option: str, value: float, least: str) -> None:
    with pytest.raises(UsageError) as caught:
        AlwaysBeDreaming(**{option: value})
    (problem,) = caught.value.problems
    assert problem.startswith(f"`always-be-dreaming.{option}` is {value}: ")
    assert problem.endswith(f"{least}.")
