"""LFL: the pull on the features against its formula, what is frozen, and what the pull does to a run."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from clframe import Batch, IncrementalNet, Plugin, hookimpl, snapshot, testing
from clframe.errors import UsageError
from clframe.plugins.lfl import LFL
from clframe.testing import Recorder, differing, state_copy

ADAM = {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "decay": "all", "keep_optimizer": True}


class Named(nn.Module):
    """A backbone whose last layer is called as a classifier often is, with a batch norm."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first = nn.Linear(16, 8)
            self.norm = nn.BatchNorm1d(8)
            self.classifier = nn.Linear(8, 6)

    def features(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.first(x.flatten(1))).relu())


learn = partial(testing.learn, model=Named())


class Witness(Recorder):
    """Also keeps terms, modes and statistics of each step, and compares the teacher."""

    def __init__(self, lfl: LFL | None = None) -> None:
        super().__init__()
        self.lfl = lfl
        self.modes: set[bool] = set()
        self.teachers: list[dict[str, Tensor]] = []
        self.statistics: list[Tensor] = []

    @hookimpl
    def before_experience(self, run):
        super().before_experience(run)
        if self.lfl and self.lfl.teacher is not None:
            self.teachers.append(state_copy(self.lfl.teacher))
            assert not any(module.training for module in self.lfl.teacher.modules())
            assert not any(p.requires_grad for p in self.lfl.teacher.parameters())

    @hookimpl
    def after_step(self, run, batch):
        super().after_step(run, batch)
        self.modes.update(module.training for module in run.model.backbone.modules())
        if "backbone.norm.running_mean" in run.model.state_dict():
            self.statistics.append(run.model.backbone.norm.running_mean.clone())
        if self.teachers:
            assert differing(self.lfl.teacher.state_dict(), self.teachers[-1]) == []


@pytest.mark.parametrize("weights", [[1.0] * 5, [1.0, 3.0, 0.0, 0.5, 2.0]])
def test_the_pull_and_its_gradient_are_those_of_the_formula(weights: list[float]):
    """lambda/2 ||f_old - f||^2 averaged over the batch, with the gradient lambda (f - f_old) / B, and none in the head.

    Guards against the mean over features in place of half their sum (Avalanche's LFL)."""
    lfl = LFL(lambda_=0.3)
    net = IncrementalNet(Named(), blocks=[2, 3]).double().eval()
    lfl.teacher = snapshot(net)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.backbone.parameters():
            p += torch.randn(p.shape, generator=generator, dtype=p.dtype)
    x = torch.randn(5, 1, 4, 4, generator=generator, dtype=torch.float64)
    column = torch.zeros(5, dtype=torch.int64)
    batch = Batch(x, column, column, column, torch.tensor(weights), column)
    outputs = net(x)
    (pull,) = lfl.penalty(run=SimpleNamespace(), batch=batch, outputs=outputs).values()
    away = outputs.features - lfl.teacher.features(x)
    share = torch.tensor(weights, dtype=torch.float64)[:, None] / sum(weights)
    assert pull.item() == pytest.approx((0.3 / 2 * share * away**2).sum().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(pull, outputs.features, retain_graph=True)
    torch.testing.assert_close(gradient, 0.3 * share * away.detach(), rtol=1e-12, atol=0)
    of_head = torch.autograd.grad(pull, list(net.head.parameters()), allow_unused=True, retain_graph=True)
    assert all(g is None or not g.any() for g in of_head)
    of_teacher = [p.grad for p in lfl.teacher.parameters()]
    assert of_teacher == [None] * len(of_teacher)
    assert away.abs().min() > 0.01


def test_in_a_run_the_term_is_that_of_the_last_experiences_network(tiny):
    """The copy is replaced after each experience; at its first step the pull is 0, as nothing has moved."""
    lfl, expected = LFL(lambda_=0.5), []

    class Computing(Plugin):
        name = "computing"
        observer = True

        def __init__(self) -> None:
            self.old = None

        @hookimpl
        def penalty(self, run, batch, outputs):
            if self.old is not None:
                away = self.old.features(batch.x) - outputs.features.detach()
                expected.append((0.5 * 0.5 * (away.double() ** 2).sum() / len(batch)).item())

        @hookimpl
        def after_experience(self, run, experience):
            self.old = snapshot(run.model)

    witness = Witness(lfl=lfl)
    learn(tiny(setting="task"), lfl, Computing(), witness, model="mlp-100", epochs=2, lr=0.01)
    found = witness.losses("lfl")
    assert found[:6] == [None] * 6
    assert len(witness.batches(0)) == 6
    values = found[6:]
    assert values == pytest.approx(expected, rel=1e-5)
    assert values[0] == values[6] == 0  # the first steps of the second and the third experience
    assert min(values[1:6] + values[7:]) > 0
    assert len(witness.teachers) == 2
    for after, teacher in zip(witness.after, witness.teachers, strict=False):
        assert differing(after, teacher) == []


@pytest.mark.parametrize("setting", ["domain", "task", "class"])
def test_the_last_layer_of_what_is_old_stays_to_the_last_bit(tiny, setting: str):
    """Under Adam, kept from the first experience, and weight decay. The backbone is trained, its last layer as well.

    Guards against freezing the one last layer that is found by name (Avalanche's LFL)."""
    lfl = LFL()
    witness = Witness(lfl=lfl)
    results = learn(tiny(setting=setting), lfl, witness, **ADAM)
    backbone = {name for name in witness.after[0] if name.startswith("backbone.")}
    assert witness.changed(0) == set(witness.after[0])
    for i in (1, 2):
        new = set() if setting == "domain" else {f"head.{i}.weight", f"head.{i}.bias"}
        assert witness.changed(i) == backbone | new
    assert results.data["forms"] == {"lfl": "paper" if setting == "domain" else "multi-head"}
    assert all(p.requires_grad for p in witness.model.parameters())
    assert all(module.training for module in witness.model.modules())


def test_the_network_stays_in_training_mode(tiny):
    """Its batch norm goes on in every step.

    Guards against a model left in eval mode when the old features are taken (Avalanche's LFL)."""
    witness = Witness()
    learn(tiny(setting="domain"), LFL(), witness, **ADAM)
    assert witness.modes == {True}
    assert len(witness.statistics) == 18
    assert not any(torch.equal(a, b) for a, b in zip(witness.statistics, witness.statistics[1:], strict=False))


def test_a_strong_pull_is_feature_extraction(tiny):
    """Features of the new images move less than a thousandth of what they move without it."""

    class Moving(Plugin):
        name = "moving"
        observer = True

        @hookimpl
        def before_experience(self, run, experience):
            self.x = run.batch(experience.train).x
            self.before = run.model.features(self.x).detach()

        @hookimpl
        def after_experience(self, run, experience):
            self.distance = (run.model.features(self.x).detach() - self.before).norm().item()

    distances = []
    for strength in (0.0, 1e5):
        moving = Moving()
        # all images in each batch, and a learning rate that ends at 0: nothing but the pull decides where features end
        train = {"iterations": 200, "optimizer": "adam", "lr": 0.001, "schedule": "cosine", "batch_size": 24}
        model = {"name": "mlp", "hidden": [16]}
        learn(tiny(experiences=2, setting="task"), LFL(lambda_=strength), moving, model=model, **train)
        distances.append(moving.distance)
    assert distances[0] > 1
    assert distances[1] < 1e-3 * distances[0]


def test_while_the_features_cannot_move_there_is_no_pull(tiny):
    witness = Witness()
    learn(tiny(setting="task"), LFL(warm_up=0.5), witness, **ADAM)
    assert [(step.experience, step.phase) for step in witness.steps if "lfl" not in step.losses] == [
        (0, "train")
    ] * 6 + [(i, "warm-up") for i in (1, 2) for _ in range(3)]


@pytest.mark.parametrize(
    ("form", "setting", "fits"),
    [
        ("multi-head", "class", "task"),
        ("multi-head", "domain", "task"),
        ("paper", "task", "domain"),
        ("paper", "class", "domain"),
    ],
)
def test_a_form_that_does_not_fit_the_setting_is_refused(tiny, form: str, setting: str, fits: str):
    with testing.refused(f"`lfl.form={form}`", f"`{setting}`", f"`--setting {fits}`"):
        learn(tiny(setting=setting), LFL(form=form))


@pytest.mark.parametrize(("form", "setting"), [("paper", "domain"), ("multi-head", "task")])
def test_a_form_that_is_named_is_the_one_that_the_setting_means(tiny, form: str, setting: str):
    named, meant = Witness(), Witness()
    learn(tiny(setting=setting), LFL(form=form), named, **ADAM)
    learn(tiny(setting=setting), LFL(), meant, **ADAM)
    assert differing(named.after[2], meant.after[2]) == []


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match=r"`lfl\.lambda` is -1\.0: .* 0\.$"):
        LFL(lambda_=-1.0)
    with pytest.raises(UsageError, match=r"`lfl.form` is 'both'.*'paper' or 'multi-head'"):
        LFL(form="both")
