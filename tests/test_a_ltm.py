"""A-LTM: the distillation against its formulas, the rows that it is of, and the network that teaches."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clframe import Batch, ImageData, IncrementalNet, Outputs, Plugin, hookimpl, snapshot, testing
from clframe.errors import UsageError
from clframe.plugins.a_ltm import ALTM
from clframe.plugins.deep_inversion import DeepInversion
from clframe.plugins.der import DER
from clframe.testing import Recorder

learn = partial(testing.learn, model="mlp-100", optimizer="sgd", lr=0.05, momentum=0.9, clip=0.0)
# old logits of two heads of two classes, and of a new one: softmaxes of a head are 1/4, 3/4 and 1/2, 1/2
Q = torch.tensor([[0.0, math.log(3), 1.0, 1.0, 9.0, 9.0]], dtype=torch.float64)
Z = torch.tensor([[0.0, 0.0, math.log(4), 0.0, 2.0, -5.0]], dtype=torch.float64)


class Says(nn.Module):
    """A stable network that answers what it is told to."""

    def forward(self, x: Tensor, task: Tensor | None = None) -> Outputs:
        return Outputs(x, Q[:, :4].expand(len(x), -1), [2, 4])


def term(
    a_ltm: ALTM, z: Tensor = Z, *, setting: str = "task", origin: list[int] | None = None, weight: Any = None
) -> Tensor:
    """The penalty in the third of three experiences of two classes."""
    a_ltm.stable = Says()
    n = len(z)
    columns = torch.zeros(n, dtype=torch.int64)
    weights = torch.ones(n) if weight is None else torch.tensor(weight)
    batch = Batch(torch.zeros(n, 1), columns, columns, columns, weights, torch.tensor(origin or [0] * n))
    scenario = SimpleNamespace(setting=setting, classes=((0, 1), (2, 3), (4, 5)))
    old = {"previous_classes": [0, 1, 2, 3], "old_heads": [(0, 1), (2, 3)]}
    logits = "own" if setting == "task" else "seen"
    run: Any = SimpleNamespace(scenario=scenario, experience=SimpleNamespace(index=2), logits=logits, **old)
    terms = a_ltm.penalty(run=run, batch=batch, outputs=Outputs(z, z, [2, 4, 6]))
    assert terms is not None
    assert list(terms) == ["a-ltm"]
    return terms["a-ltm"]


def test_where_tasks_are_told_each_old_head_has_its_cross_entropy() -> None:
    """The sum over heads, at temperature 1: a temperature of 2, or one softmax for both heads, gives other values."""
    # head 0: the student says 1/2, 1/2; head 1: 4/5, 1/5 where 1/2, 1/2 are wanted
    by_hand = math.log(2) - (math.log(4 / 5) + math.log(1 / 5)) / 2
    assert term(ALTM(lambda_=0.7)).item() == pytest.approx(0.7 * by_hand, rel=1e-12)


def test_where_no_task_is_told_the_old_classes_have_one_softmax_together() -> None:
    """Without the new ones, however high these score."""
    e = math.e
    q = [w / (4 + 2 * e) for w in (1, 3, e, e)]  # exp of (0, log 3, 1, 1)
    z = [w / 7 for w in (1, 1, 4, 1)]
    by_hand = -sum(p * math.log(s) for p, s in zip(q, z, strict=True))
    assert term(ALTM(lambda_=0.7), setting="class").item() == pytest.approx(0.7 * by_hand, rel=1e-12)


@pytest.mark.parametrize("setting", ["class", "task"])
def test_l2_is_half_the_squared_distance_of_the_old_logits(setting: str) -> None:
    """Summed over classes, not averaged, with the gradient z - q; the new head has none."""
    z = Z.clone().requires_grad_()
    value = term(ALTM(lambda_=3.0, loss="l2"), z, setting=setting)
    by_hand = (math.log(3) ** 2 + (math.log(4) - 1) ** 2 + 1) / 2
    assert value.item() == pytest.approx(3 * by_hand, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, z)
    wanted = torch.cat([3 * (Z - Q)[:, :4], torch.zeros(1, 2, dtype=torch.float64)], 1)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("on", "counted"), [("new", [1, 1, 0, 0, 0]), ("replay", [0, 0, 1, 1, 1]), ("all", [1, 1, 1, 1, 1])]
)
@pytest.mark.parametrize("weight", [[1.0] * 5, [1.0, 3.0, 0.5, 0.0, 2.0]])
def test_the_mean_is_of_the_chosen_rows_alone(on: Any, counted: list[int], weight: list[float]) -> None:
    """Not of all rows with zeros for the rest; whoever brought a row, it is one of replay."""
    scale = torch.arange(1, 6, dtype=torch.float64)[:, None]
    z = (Z * scale).requires_grad_()
    value = term(ALTM(loss="l2", on=on), z, origin=[0, 0, 1, 2, 7], weight=weight)
    distances = ((Z * scale - Q)[:, :4] ** 2).sum(1) / 2
    share = torch.tensor(weight, dtype=torch.float64) * torch.tensor(counted)
    share /= share.sum()
    assert value.item() == pytest.approx((share * distances).sum().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, z)
    assert (gradient.abs().sum(1) > 0).tolist() == (share > 0).tolist()


def test_a_batch_without_a_chosen_row_adds_nothing() -> None:
    z = Z.clone().requires_grad_()
    value = term(ALTM(on="replay"), z)
    assert value.item() == 0
    assert not torch.autograd.grad(value, z)[0].any()


class Replay(Plugin):
    """Brings three images of the first experience back, from the second one on."""

    name = "replay"
    replays = keeps_images = True

    def __init__(self) -> None:
        self.rows: ImageData | None = None

    @hookimpl
    def extra_batch(self, run, batch: Batch) -> Batch | None:
        return None if self.rows is None else run.batch(self.rows)

    @hookimpl
    def after_experience(self, run, experience) -> None:
        if self.rows is None:
            self.rows = experience.train.rows(slice(0, 3))


class Watch(Recorder):
    """Recomputes each step's term from a copy of its own, and looks at the stable network."""

    def __init__(self, a_ltm: ALTM) -> None:
        super().__init__()
        self.a_ltm = a_ltm
        self.old: IncrementalNet | None = None
        self.wanted: list[float | None] = []

    @hookimpl
    def penalty(self, run, batch: Batch, outputs: Outputs) -> None:
        if self.old is None:
            self.wanted.append(None)
            return
        new = batch.origin == 0
        rows = {"new": new, "replay": ~new, "all": new | True}[self.a_ltm.on]
        old = 2 * run.experience.index
        with torch.no_grad():
            q, z = self.old(batch.x[rows]).logits[:, :old].double(), outputs.logits[rows, :old].double()
        if self.a_ltm.loss == "l2":
            each = ((z - q) ** 2).sum(1) / 2
        elif run.scenario.setting == "task":
            heads = [slice(k, k + 2) for k in range(0, old, 2)]
            each = -sum((q[:, k].softmax(1) * z[:, k].log_softmax(1)).sum(1) for k in heads)
        else:
            each = -(q.softmax(1) * z.log_softmax(1)).sum(1)
        self.wanted.append(0.5 * each.mean().item())

    @hookimpl
    def after_step(self, run, batch) -> None:
        super().after_step(run, batch)
        if self.old is not None:
            self.compare()

    @hookimpl
    def after_experience(self, run, experience) -> None:
        super().after_experience(run, experience)
        self.old = snapshot(run.model)

    @hookimpl
    def after_eval(self, run) -> None:
        """Compare once more, after all plugins have had their turn after the experience."""
        super().after_eval(run)
        self.compare()

    def compare(self) -> None:
        """The stable network is the one that the latest experience ended with, and frozen."""
        assert self.old is not None
        assert self.a_ltm.stable is not None
        assert testing.differing(self.old.state_dict(), self.a_ltm.stable.state_dict()) == []
        assert not any(p.requires_grad or p.grad is not None for p in self.a_ltm.stable.parameters())
        assert not any(m.training for m in self.a_ltm.stable.modules())


@pytest.mark.parametrize("model", ["mlp-100", "cnn-small"])
@pytest.mark.parametrize("on", ["new", "replay", "all"])
@pytest.mark.parametrize(("setting", "loss"), [("task", "cross-entropy"), ("class", "cross-entropy"), ("class", "l2")])
def test_in_a_run_each_step_has_the_term_of_its_rows(tiny, setting: str, loss: Any, on: Any, model: str) -> None:
    """By copies of the network; the stable one answers in eval mode, also where it has batch norms."""
    a_ltm = ALTM(lambda_=0.5, loss=loss, on=on)
    watch = Watch(a_ltm=a_ltm)
    learn(tiny(setting=setting, shape=(1, 8, 8)), Replay(), a_ltm, watch, model=model)
    assert [step.batch.origin.tolist() for step in watch.steps] == [[0] * 8] * 6 + [[0] * 8 + [1] * 3] * 12
    assert watch.losses("a-ltm")[:6] == [None] * 6 == watch.wanted[:6]
    found = watch.losses("a-ltm")[6:]
    assert found == pytest.approx(watch.wanted[6:], rel=1e-5, abs=1e-10)
    assert max(abs(value - found[0]) for value in found[1:6]) > 1e-4  # the flexible network moves


@pytest.mark.parametrize(
    "beside",
    [DER(size=12), DER(size=12, beta=0.0), DeepInversion(per_class=2, iterations=2, batch_size=4)],
    ids=["der++", "der", "deep-inversion"],
)
def test_rows_that_another_method_keeps_out_of_the_default_loss_are_distilled_on(tiny, beside: Plugin) -> None:
    """Their weight is 0, so a weighted mean of them alone has nothing to divide by: they count the same instead."""
    a_ltm = ALTM(lambda_=0.5, loss="l2", on="replay")
    watch = Watch(a_ltm=a_ltm)
    learn(tiny(shape=(1, 8, 8)), beside, a_ltm, watch, model="cnn-small", epochs=1)
    old = watch.losses("a-ltm")[len(watch.batches(0)) :]
    assert old == pytest.approx([value for value in watch.wanted if value is not None], rel=1e-5, abs=1e-10)
    assert min(old[1:]) > 1e-6
    assert all(step.batch.origin.any() for step in watch.steps if step.experience)


@pytest.mark.parametrize("model", ["mlp-100", "cnn-small"])
def test_what_was_learnt_is_consolidated_and_then_rests(tiny, model: str) -> None:
    """After each experience the stable network is the flexible one, and in the next one nothing moves it."""
    a_ltm = ALTM(loss="l2")
    watch = Watch(a_ltm=a_ltm)
    learn(tiny(shape=(1, 8, 8)), a_ltm, watch, model=model)
    assert len(watch.steps) == 18
    assert a_ltm.stable is not None
    assert a_ltm.stable.blocks == [2, 2, 2]


def test_the_flexible_network_begins_as_the_stable_one(tiny) -> None:
    """So the first step of an experience has no distance; the second one has."""
    a_ltm = ALTM(loss="l2")
    watch = Watch(a_ltm=a_ltm)
    learn(tiny(), a_ltm, watch)
    for i in (1, 2):
        values = watch.losses("a-ltm")[6 * i : 6 * i + 6]
        assert values[0] == pytest.approx(0, abs=1e-10)
        assert values[1] is not None
        assert values[1] > 1e-6


def test_replay_needs_somebody_who_brings_images(tiny) -> None:
    with pytest.raises(UsageError, match=r"`a-ltm\.on=replay` .* choose `new`") as caught:
        learn(tiny(), ALTM(on="replay"))
    assert len(caught.value.problems) == 1


def test_images_may_come_with_the_data_of_the_experience(tiny) -> None:
    """`extra_data` brings images of the active form too."""

    class Kept(Plugin):
        name = "kept"
        replays = keeps_images = True

        def __init__(self) -> None:
            self.rows: ImageData | None = None

        @hookimpl
        def extra_data(self, run, experience) -> ImageData | None:
            return self.rows

        @hookimpl
        def after_experience(self, run, experience) -> None:
            self.rows = experience.train

    a_ltm = ALTM(on="replay", lambda_=0.5)
    watch = Watch(a_ltm=a_ltm)
    learn(tiny(), Kept(), a_ltm, watch, batch_size=48)  # all images in each batch
    origins = [sorted(step.batch.origin.tolist()) for step in watch.steps]
    assert origins == [[0] * 24] * 2 + [[0] * 24 + [1] * 24] * 4
    found = watch.losses("a-ltm")
    assert found[:2] == [None, None]
    assert found[2:] == pytest.approx(watch.wanted[2:], rel=1e-5)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("lambda_", -1.0, r"`a-ltm\.lambda` is -1\.0: .* 0\.$"),
        ("loss", "kd", "`a-ltm.loss` is 'kd'.*'cross-entropy' or 'l2'"),
        ("on", "old", "`a-ltm.on` is 'old'.*'new', 'replay' or 'all'"),
    ],
)
def test_wrong_options_are_refused(option: str, value: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        ALTM(**{option: value})


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_first_experience_and_all_without_a_weight_is_fine_tuning_to_the_bit(tiny, strength: float) -> None:
    """The stable network's passes draw nothing and move no running statistics."""
    ours, theirs = Recorder(), Recorder()
    learn(tiny(2, shape=(1, 8, 8)), ALTM(lambda_=strength), ours, model="cnn-small")
    learn(tiny(2, shape=(1, 8, 8)), theirs, model="cnn-small")
    equal = [testing.differing(*states) == [] for states in zip(ours.after, theirs.after, strict=True)]
    assert equal == [True, strength == 0]
