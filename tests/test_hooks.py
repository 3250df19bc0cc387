"""Each of the fifteen hooks, proven by a small plugin: when it is called, with what, and what its answer does."""

from __future__ import annotations

import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import clframe
from clframe import Batch, Phase, Plugin, hookimpl, testing
from clframe.context import Run
from clframe.errors import Interrupted, RunError, UsageError
from clframe.evaluate import Predictor
from clframe.hooks import HOOKS

learn = partial(testing.learn, model="mlp-100", epochs=1, optimizer="sgd", lr=0.05, clip=0.0)


class Observing(Plugin):
    """Implements every hook and notes each call."""

    name = "observing"
    observer = True

    def __init__(self) -> None:
        self.calls: list[str] = []

    @hookimpl
    def before_run(self, run):
        self.calls.append("before_run")

    @hookimpl
    def grow(self, run, experience):
        assert run.model.n_classes == max(experience.classes) + 1
        self.calls.append(f"grow {experience.index}")

    @hookimpl
    def before_experience(self, run, experience):
        self.calls.append(f"before_experience {experience.index}")

    @hookimpl
    def extra_data(self, run, experience):
        self.calls.append(f"extra_data {experience.index}")

    @hookimpl
    def phases(self, run, experience):
        self.calls.append(f"phases {experience.index}")

    @hookimpl
    def extra_batch(self, run, batch):
        self.calls.append(f"extra_batch {run.step}")

    @hookimpl
    def before_step(self, run, batch):
        self.calls.append(f"before_step {run.step}")

    @hookimpl
    def base_loss(self, run, batch, outputs):
        self.calls.append(f"base_loss {run.step}")

    @hookimpl
    def penalty(self, run, batch, outputs):
        self.calls.append(f"penalty {run.step}")

    @hookimpl
    def after_backward(self, run, batch):
        assert all(p.grad is not None for p in run.model.parameters())
        self.calls.append(f"after_backward {run.step}")

    @hookimpl
    def after_step(self, run, batch):
        self.calls.append(f"after_step {run.step}")

    @hookimpl
    def after_experience(self, run, experience):
        assert len(run.accuracy.get("class", [])) == experience.index
        self.calls.append(f"after_experience {experience.index}")

    @hookimpl
    def predictor(self, run):
        self.calls.append("predictor")

    @hookimpl
    def after_eval(self, run, experience):
        assert len(run.accuracy["class"]) == experience.index + 1
        self.calls.append(f"after_eval {experience.index}")

    @hookimpl
    def after_run(self, run):
        self.calls.append("after_run")


def test_all_hooks_are_called_in_the_order_of_the_contract(tiny):
    plugin = Observing()
    learn(tiny(), plugin)
    step = ["extra_batch", "before_step", "base_loss", "penalty", "after_backward", "after_step"]
    expected = ["before_run"]
    for i in range(3):
        expected += [f"{name} {i}" for name in ("grow", "before_experience", "extra_data", "phases")]
        expected += [f"{name} {s}" for s in range(3) for name in step]  # 24 images in batches of 8
        expected += [f"after_experience {i}", "predictor", f"after_eval {i}"]
    assert plugin.calls == [*expected, "after_run"]
    assert {call.split()[0] for call in plugin.calls} == set(HOOKS)
    assert len(HOOKS) == 15


def test_before_run_may_refuse_the_run(tiny):
    class Refusing(Plugin):
        name = "refusing"

        @hookimpl
        def before_run(self, run):
            raise UsageError("no layer `conv5` here")

    with pytest.raises(UsageError, match="conv5"):
        learn(tiny(), Refusing())


def test_grow_adds_structure_that_is_trained(tiny):
    class Scale(Plugin):
        name = "scale"

        @hookimpl
        def grow(self, run, experience):
            run.model.register_parameter(f"scale{experience.index}", nn.Parameter(torch.ones(())))

        @hookimpl
        def penalty(self, run, batch, outputs):
            return {"scale": (getattr(run.model, f"scale{run.experience.index}") - 3) ** 2}

        @hookimpl
        def after_run(self, run):
            self.scales = [getattr(run.model, f"scale{i}").item() for i in range(3)]

    plugin = Scale()
    learn(tiny(), plugin)
    # three steps of gradient descent, from 1, on (s - 3)^2 with rate 0.05
    assert plugin.scales == pytest.approx([3 - 2 * 0.9**3] * 3, rel=1e-6)


def test_before_experience_sees_no_test_images_and_freezes(tiny):
    class Freezing(Plugin):
        name = "freezing"

        @hookimpl
        def before_experience(self, run, experience):
            with pytest.raises(UsageError, match="test images"):
                _ = experience.test
            with pytest.raises(UsageError, match="only describes"):
                _ = run.scenario[0].train
            if experience.index == 1:
                run.model.backbone.requires_grad_(False)
                self.before = [p.clone() for p in run.model.backbone.parameters()]

        @hookimpl
        def after_run(self, run):
            assert all(torch.equal(a, b) for a, b in zip(self.before, run.model.backbone.parameters(), strict=True))
            self.checked = True

    plugin = Freezing()
    learn(tiny(), plugin)
    assert plugin.checked


def test_extra_data_joins_the_experiences_own_and_is_marked(tiny, rows):
    class Exemplars(Plugin):
        name = "exemplars"

        def __init__(self) -> None:
            self.origins: Counter[int] = Counter()

        @hookimpl
        def extra_data(self, run, experience):
            return rows(5) if experience.index else None

        @hookimpl
        def after_step(self, run, batch):
            self.origins.update((run.experience.index, o) for o in batch.origin.tolist())

    plugin = Exemplars()
    learn(tiny(), Observing(), plugin)
    assert plugin.origins == {(0, 0): 24, (1, 0): 24, (1, 2): 5, (2, 0): 24, (2, 2): 5}


def test_phases_run_before_and_after_train_over_what_they_may_train(tiny):
    class Warm(Plugin):
        name = "warm"

        def __init__(self) -> None:
            self.seen: list[tuple[str, int]] = []
            self.moved: dict[str, set[str]] = {}

        @hookimpl
        def phases(self, run, experience):
            if experience.index == 0:
                return [
                    Phase("tune", "after", iterations=2, lr=0.5, only=("head.*",)),
                    Phase("warm", epochs=1, only=("head.0.*",)),
                ]
            return None

        @hookimpl
        def extra_batch(self, run, batch):
            self.before = {n: p.detach().clone() for n, p in run.model.named_parameters()}

        @hookimpl
        def after_step(self, run, batch):
            if run.experience.index == 0:
                self.seen.append((run.phase.name, run.steps_in_phase))
                moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, self.before[n])}
                self.moved.setdefault(run.phase.name, set()).update(moved)
                assert run.optimizer.param_groups[0]["lr"] == (0.5 if run.phase.name == "tune" else 0.05)

    plugin = Warm()
    learn(tiny(), plugin)
    assert plugin.seen == [("warm", 3)] * 3 + [("train", 3)] * 3 + [("tune", 2)] * 2
    head = {"head.0.weight", "head.0.bias"}
    assert plugin.moved["warm"] == plugin.moved["tune"] == head
    assert plugin.moved["train"] > head


def test_a_frozen_trunk_keeps_its_batch_norm_statistics(tiny):
    class Warm(Plugin):
        name = "warm"

        @hookimpl
        def phases(self, run, experience):
            return [Phase("train", epochs=1, only=("head.*",))]

        @hookimpl
        def before_experience(self, run, experience):
            self.before = {n: v.clone() for n, v in run.model.backbone.state_dict().items()}

        @hookimpl
        def after_experience(self, run, experience):
            after = run.model.backbone.state_dict()
            assert any("running_mean" in n for n in after)
            assert all(torch.equal(v, after[n]) for n, v in self.before.items())
            self.checked = True

    plugin = Warm()
    mover = {"weight_decay": 0.1, "momentum": 0.9, "decay": "all"}
    learn(tiny(shape=(1, 8, 8)), plugin, model="cnn-small", **mover)
    assert plugin.checked


def test_two_plugins_may_not_bring_one_phase(tiny):
    def bringing(label: str) -> Plugin:
        class Bringing(Plugin):
            name = label

            @hookimpl
            def phases(self, run, experience):
                return [Phase("warm-up", epochs=1)]

        return Bringing()

    with pytest.raises(UsageError, match=r"`one` and `two`.*`warm-up`"):
        learn(tiny(), bringing("one"), bringing("two"))


class Doubling(Plugin):
    """Brings a row back and, before the forward pass, doubles the images and weights of the whole batch."""

    name = "doubling"

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    @hookimpl
    def extra_batch(self, run, batch):
        return run.batch(run.experience.train.rows(slice(0, 1)))

    @hookimpl
    def before_step(self, run, batch):
        assert batch.origin.tolist() == [0] * (len(batch) - 1) + [1]  # the row of `extra_batch` has joined
        assert not run.losses or run.step  # the losses of this step are still to come
        self.sum = 2 * batch.x.sum().item()
        batch.x *= 2

    @hookimpl
    def penalty(self, run, batch, outputs):
        self.seen.append((len(batch), batch.x.sum().item() / self.sum))
        with torch.no_grad():
            assert torch.allclose(run.model(batch.x, batch.task).logits, outputs.logits, atol=1e-6)


def test_before_step_edits_the_batch_that_the_network_is_given(tiny):
    plugin = Doubling()
    learn(tiny(experiences=1), plugin)
    assert plugin.seen
    assert all(ratio == pytest.approx(1) for _, ratio in plugin.seen)


class Freezing(Plugin):
    """Freezes the backbone in the second of three experiences alone."""

    name = "freezing"

    def __init__(self) -> None:
        self.trainable: list[tuple[int, bool]] = []

    @hookimpl
    def grow(self, run, experience):
        assert all(p.requires_grad for p in run.model.parameters())

    @hookimpl
    def before_experience(self, run, experience):
        if experience.index == 1:
            run.freeze(["backbone.*"])

    @hookimpl
    def after_eval(self, run, experience):
        self.trainable.append((experience.index, all(p.requires_grad for p in run.model.backbone.parameters())))

    @hookimpl
    def after_run(self, run):
        self.model = run.model


def test_what_a_plugin_freezes_trains_again_in_the_next_experience(tiny):
    plugin = Freezing()
    learn(tiny(experiences=3), plugin)
    assert plugin.trainable == [(0, True), (1, False), (2, True)]
    last = Freezing()
    learn(tiny(experiences=2), last)
    assert all(p.requires_grad for p in last.model.parameters())


def test_extra_batch_adds_weighted_rows_that_no_other_plugin_sees(tiny):
    class Replay(Plugin):
        name = "replay"

        @hookimpl
        def extra_batch(self, run, batch):
            assert len(batch) == 8  # the original, also for the second of two
            part = {n: getattr(batch, n)[:2] for n in ("x", "y", "index", "task", "origin")}
            return Batch(**part, weight=torch.full((2,), 3.0), targets={"old": torch.ones(2, 4)})

        @hookimpl
        def penalty(self, run, batch, outputs):
            assert batch.origin.tolist() == [0] * 8 + [1] * 2 + [2] * 2
            assert batch.targets["old"].sum(1).tolist() == [0] * 8 + [4] * 4
            losses = functional.cross_entropy(outputs.logits, batch.y, reduction="none")
            self.expected = (losses[:8].sum() + 3 * losses[8:].sum()) / (8 + 4 * 3)

        @hookimpl
        def after_step(self, run, batch):
            assert torch.allclose(run.losses["base"], self.expected)
            self.checked = True

    class Second(Replay):
        name = "second"

    plugins = Replay(), Second()
    learn(tiny(), *plugins)
    assert all(plugin.checked for plugin in plugins)


def test_base_loss_replaces_the_cross_entropy(tiny):
    class Zero(Plugin):
        name = "zero"

        @hookimpl
        def base_loss(self, run, batch, outputs):
            return outputs.logits.sum() * 0  # a zero counts as an answer

    names: set[str] = set()
    values: list[float] = []

    def listen(record):
        if record["kind"] == "step":
            names.update(record["losses"])
            values.append(record["losses"]["base"])

    learn(tiny(), Zero(), log_every=1, listeners=[listen])
    assert names == {"base"}
    assert values == [0.0] * 9


def test_penalties_are_summed_and_named(tiny):
    class Pulling(Plugin):
        name = "pulling"

        @hookimpl
        def penalty(self, run, batch, outputs):
            self.bias = run.model.head[0].bias
            return {"pulling/one": self.bias.sum(), "pulling/two": 2 * self.bias.sum()}

        @hookimpl
        def base_loss(self, run, batch, outputs):
            return outputs.logits.sum() * 0

        @hookimpl
        def after_backward(self, run, batch):
            assert self.bias.grad.tolist() == [3.0] * 2
            assert set(run.losses) == {"base", "pulling/one", "pulling/two"}
            self.checked = True

    plugin = Pulling()
    learn(tiny(), plugin)
    assert plugin.checked


def test_after_backward_edits_gradients_before_clipping(tiny):
    class Silencing(Plugin):
        name = "silencing"

        @hookimpl
        def after_backward(self, run, batch):
            for p in run.model.parameters():
                p.grad.zero_()
            run.model.head[0].bias.grad.fill_(7.0)

        @hookimpl
        def after_step(self, run, batch):
            moved = run.model.head[0].bias.grad
            assert moved.norm().item() == pytest.approx(1.0, rel=1e-4)  # clipped afterwards
            self.checked = True

    plugin = Silencing()
    learn(tiny(), plugin, clip=1.0)
    assert plugin.checked


def test_task_gradients_are_those_of_the_base_loss_alone(tiny):
    class Wanting(Plugin):
        name = "wanting"
        needs_task_gradient = True

        @hookimpl
        def penalty(self, run, batch, outputs):
            self.task = torch.autograd.grad(run.loss(batch, outputs), run.model.head[0].weight, retain_graph=True)[0]
            return {"wanting": 0.01 * outputs.logits.pow(2).sum()}

        @hookimpl
        def after_backward(self, run, batch):
            assert torch.equal(run.task_gradients["head.0.weight"], self.task)
            assert not torch.allclose(run.model.head[0].weight.grad, self.task)
            self.checked = True

    plugin = Wanting()
    learn(tiny(), plugin)
    assert plugin.checked


def test_after_step_may_restore_what_must_not_move(tiny):
    class Restoring(Plugin):
        name = "restoring"

        @hookimpl
        def before_experience(self, run, experience):
            self.kept = run.model.head[0].weight[0].detach().clone()

        @hookimpl
        def after_step(self, run, batch):
            assert not torch.equal(run.model.head[0].weight[0], self.kept)
            with torch.no_grad():
                run.model.head[0].weight[0] = self.kept

        @hookimpl
        def after_experience(self, run, experience):
            assert torch.equal(run.model.head[0].weight[0], self.kept)
            self.checked = True

    plugin = Restoring()
    learn(tiny(), plugin)
    assert plugin.checked


def test_after_experience_comes_before_evaluation(tiny):
    class Breaking(Plugin):
        name = "breaking"

        @hookimpl
        def after_experience(self, run, experience):
            with torch.no_grad():
                for block in run.model.head:
                    block.weight.zero_()
                    block.bias.zero_()
                run.model.head[0].bias[0] = 1.0  # everything is class 0 now

    assert learn(tiny(), Breaking()).accuracy["class"] == [[0.5, None, None], [0.5, 0.0, None], [0.5, 0.0, 0.0]]


def test_the_predictor_answers_for_the_run(tiny):
    class Constant(Predictor):
        needs_task = True

        def __init__(self, n_classes: int) -> None:
            super().__init__()
            self.n_classes = n_classes

        def forward(self, x, task=None):
            assert task is not None
            return torch.arange(self.n_classes).expand(len(x), -1).float()  # the last class of each task

    class Answering(Plugin):
        name = "answering"

        @hookimpl
        def predictor(self, run):
            return Constant(run.model.n_classes)

    results = learn(tiny(), Answering())
    assert results.accuracy == {"task": [[0.5, None, None], [0.5, 0.5, None], [0.5, 0.5, 0.5]]}


def test_after_run_is_called_after_an_error_and_the_culprit_is_named(tiny):
    class Failing(Plugin):
        name = "failing"

        @hookimpl
        def after_step(self, run, batch):
            raise KeyError("lost")

    watching = Observing()
    with pytest.raises(RunError, match=r"`failing` .* `after_step`: KeyError: 'lost'") as caught:
        learn(tiny(), watching, Failing())
    assert watching.calls[-1] == "after_run"
    assert "in plugin 'failing', hook 'after_step'" in caught.value.__cause__.__notes__


class Working(Plugin):
    """Long work in a hook, in ticks that may be resumed, with draws from its own generator."""

    name = "working"
    state = ("partial", "total")

    def __init__(self, resumable: bool = True) -> None:
        self.resumable = resumable
        self.partial = torch.zeros(3)
        self.total = torch.zeros(3)
        self.begun: list[int] = []

    @hookimpl
    def after_experience(self, run, experience):
        ticks = run.ticks("dream", 6, resumable=self.resumable)
        self.begun.append(ticks.start)
        if ticks.start == 0:
            self.partial = torch.zeros(3)
        for _ in ticks:
            self.partial = self.partial + torch.rand(3, generator=run.rng("working"))
        self.total = self.total + self.partial

    @hookimpl
    def after_run(self, run):
        self.final = self.total.clone()


@pytest.mark.parametrize("resumable", [True, False])
def test_ticks_report_progress_and_resume_in_their_middle(tiny, tmp_path: Path, resumable: bool):
    whole = Working(resumable=resumable)
    ticks: list[tuple[int, int]] = []
    learn(tiny(), whole, listeners=[lambda r: ticks.append((r["i"], r["n"])) if r["kind"] == "tick" else None])
    assert ticks == [(i, 6) for i in range(1, 7)] * 3

    seen = 0

    def interrupt(record):
        nonlocal seen
        if record["kind"] == "tick":
            seen += 1
            if seen == 9:  # the third tick of the second experience
                signal.raise_signal(signal.SIGTERM)

    stopped, resumed = Working(resumable=resumable), Working(resumable=resumable)
    with pytest.raises(Interrupted):
        learn(tiny(), stopped, output=str(tmp_path / "run"), tensorboard=False, listeners=[interrupt])
    clframe.resume(tmp_path / "run", scenario=tiny(), plugins=[resumed])
    # without resumable ticks the hook is finished before the run stops
    assert resumed.begun == ([3, 0] if resumable else [0])
    assert torch.equal(resumed.final, whole.final)


def test_ticks_within_a_step_are_all_done_each_time(tiny):
    class Stepping(Plugin):
        name = "stepping"

        def __init__(self) -> None:
            self.done = 0

        @hookimpl
        def after_step(self, run, batch):
            for _ in run.ticks("inner", 2, resumable=True):
                self.done += 1

    stepping, steps = Stepping(), Observing()
    learn(tiny(), stepping, steps)
    assert stepping.done == 2 * sum(c.startswith("after_step") for c in steps.calls) > 0


class Owner(Plugin):
    """Brings a loss of its own where it is told to."""

    name = "owner"

    def __init__(self, *, owning: bool = True) -> None:
        self.owning = owning

    def owns(self, hook: str) -> bool:
        assert hook in ("base_loss", "predictor")
        return self.owning

    @hookimpl
    def base_loss(self, run, batch, outputs):
        return 2 * run.loss(batch, outputs) if self.owning else None


class Another(Owner):
    name = "another"


@pytest.mark.parametrize(("one", "two"), [(True, False), (False, True), (False, False)])
def test_a_plugin_whose_options_leave_a_hook_alone_does_not_own_it(tiny, one: bool, two: bool):
    """The one that answers is heard, whoever comes first; where none does, the default stands."""
    factors: set[float] = set()

    class Comparing(Plugin):
        name = "comparing"

        @hookimpl
        def penalty(self, run, batch, outputs):
            self.plain = run.loss(batch, outputs).item()

        @hookimpl
        def after_step(self, run, batch):
            factors.add(run.losses["base"].item() / self.plain)

    learn(tiny(), Owner(owning=one), Another(owning=two), Comparing())
    assert factors == {2.0 if one or two else 1.0}


def test_two_plugins_whose_options_make_them_owners_are_refused(tiny):
    # a plugin owns what it implements, unless it says otherwise
    with testing.refused("`base_loss`", "`owner`, `observing` and `another`"):
        learn(tiny(), Owner(), Observing(), Another())
    with testing.refused("`base_loss`", "`another` and `owner`"):
        learn(tiny(), Another(), Owner())


def wanting(label: str, **wanted: str) -> Any:
    """A plugin whose loss is made for these logits, by setting."""

    class Wanting(Plugin):
        name = label

        def wanted_logits(self, run: Run) -> str | None:
            return wanted.get(run.scenario.setting)

        @hookimpl
        def before_run(self, run):
            self.seen = run.logits

    return Wanting()


def test_the_logits_that_a_plugin_is_made_for_are_in_force_where_none_were_chosen(tiny):
    first, second, none = (
        wanting("first", **{"class": "current"}),
        wanting("second", **{"class": "current"}),
        wanting("n"),
    )
    results = learn(tiny(), none, first, second)
    assert first.seen == second.seen == none.seen == "current"
    chosen, plain = learn(tiny(), logits="current").data, learn(tiny()).data
    for part in ("accuracy", "readings", "measures"):
        assert results.data[part] == chosen[part] != plain[part]
    for setting, default in (("class", "seen"), ("task", "own"), ("domain", "seen")):
        indifferent = wanting("indifferent")
        learn(tiny(setting=setting), indifferent)
        assert indifferent.seen == default
    elsewhere = wanting("first", **{"class": "current"})
    learn(tiny(setting="task"), elsewhere)
    assert elsewhere.seen == "own"
    chosen = wanting("n")
    learn(tiny(), chosen, logits="all")
    assert chosen.seen == "all"


def test_logits_that_a_plugin_is_not_made_for_are_refused(tiny):
    one, two = wanting("one", **{"class": "current"}), wanting("two", **{"class": "all"})
    two.form = "wide"
    for plugins, train, words in (
        ((one,), {"logits": "seen"}, ("`one`", "`train.logits=current`", "`train.logits` is seen")),
        ((one, two), {}, ("`two` (form `wide`)", "`train.logits=all`", "`one` for `current`")),
        ((two, one), {}, ("`one`", "`train.logits=current`", "`two` for `all`")),
        ((two, wanting("n"), one), {"logits": "all"}, ("`one`", "`train.logits=current`", "`train.logits` is all")),
    ):
        with testing.refused(*words):
            learn(tiny(), *plugins, **train)
    with pytest.raises(UsageError) as caught:
        learn(tiny(), one, two, logits="seen")
    assert len(caught.value.problems) == 2


class Hinting(Plugin):
    """Knows from the second experience on what is wrong, and makes the loss of experience `at` no number."""

    name = "hinting"

    def hints(self, run):
        return [f"`hinting.x` is too large for {run.progress_label}."] if run.experience.index else []

    @hookimpl
    def base_loss(self, run, batch, outputs):
        return run.loss(batch, outputs) * (float("nan") if run.experience.index == self.at else 1.0)

    at = -1


def test_hints_are_told_once_as_an_experience_begins(tiny):
    told: list[tuple[str, Any]] = []

    def listen(record):
        if record["kind"] in ("experience", "message"):
            told.append((record["kind"], record.get("text", record.get("index"))))

    learn(tiny(), Hinting(), listeners=[listen])
    assert told == [
        ("experience", 0),
        ("experience", 1),
        ("message", "`hinting.x` is too large for experience 2 of 3."),
        ("experience", 2),
    ]


@pytest.mark.parametrize("at", [0, 2])
def test_hints_take_the_place_of_general_advice_where_a_loss_diverges(tiny, at: int):
    plugin = Hinting()
    plugin.at = at
    with pytest.raises(RunError) as caught:
        learn(tiny(), plugin)
    advice, hint = "`train.lr`", "`hinting.x` is too large for experience 3 of 3."
    assert (hint in str(caught.value), advice in str(caught.value)) == (at == 2, at == 0)


@pytest.mark.parametrize("needed", [True, False])
def test_a_penalty_without_a_gradient_is_a_constant(tiny, needed: bool):
    """Also where the backward pass is in two parts: what is trained is the same as without it, and it is recorded."""

    class Constant(Plugin):
        name = "constant"
        needs_task_gradient = needed

        def __init__(self, *, value: float = 0.0, terms: int = 2) -> None:
            self.value, self.terms = value, terms

        @hookimpl
        def penalty(self, run, batch, outputs):
            return {f"constant/{i}": torch.tensor(self.value) for i in range(self.terms)}

        @hookimpl
        def after_step(self, run, batch):
            self.losses = {name: value.item() for name, value in run.losses.items()}
            if needed:
                assert all(torch.equal(run.task_gradients[n], p.grad) for n, p in run.model.named_parameters())

        @hookimpl
        def after_run(self, run):
            self.weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}

    class Pulling(Plugin):
        name = "pulling"

        @hookimpl
        def penalty(self, run, batch, outputs):
            return {"pulling": 0.0 * outputs.logits.sum()}

    constant, none, beside = Constant(value=3.0), Constant(terms=0), Constant(value=3.0)
    learn(tiny(), constant)
    learn(tiny(), none)
    learn(tiny(), Pulling(), beside)
    assert {n: v for n, v in constant.losses.items() if n != "base"} == {"constant/0": 3.0, "constant/1": 3.0}
    assert set(beside.losses) == {"base", "constant/0", "constant/1", "pulling"}
    assert all(torch.equal(value, none.weights[name]) for name, value in constant.weights.items())
    assert all(torch.allclose(value, none.weights[name]) for name, value in beside.weights.items())
