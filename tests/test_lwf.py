"""LwF: its forms against their formulas, the teacher, the warm-up, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import clframe
from clframe import Batch, Outputs, Plugin, Scenario, Transform, hookimpl, split_classes, testing
from clframe.context import Run
from clframe.errors import UsageError
from clframe.plugins.lwf import LwF
from clframe.testing import Recorder
from clframe.toolkit.distill import incremental_bce, soft_cross_entropy

learn = partial(testing.learn, model="mlp-100", optimizer="sgd", lr=0.05)
LOGITS = {
    **{"heads": "own", "local": "current", "seen": "seen", "padded": "seen", "padded-mean": "seen"},
    **{"all": "all", "mc": "all"},
}
STILL = {"lr": 1e-30, "clip": 0.0}  # a network that does not move


class Watch(Recorder):
    """Recomputes each step's terms by hand, from a copy of its own of the network after each experience."""

    def __init__(self, lwf: Any) -> None:
        super().__init__()
        self.lwf = lwf
        self.old: Any = None
        self.wanted: list[dict[str, Tensor]] = []
        self.entropy: list[Tensor] = []
        self.logits = ""
        self.widths: list[int] = []  # of the head, in each step

    @hookimpl
    def penalty(self, run, batch: Batch, outputs: Outputs) -> None:
        """Sees what LwF sees; adds nothing."""
        self.logits = run.logits
        self.widths.append(outputs.logits.shape[1])
        z, t, form = outputs.logits.detach(), run.experience.index + 1, self.lwf.form
        wanted = {"base": run.loss(batch, outputs).detach()}
        if self.old is not None:
            with torch.no_grad():
                q = self.old(batch.x).logits
            n = len(run.previous_classes)
            share = (1 - 1 / t) if self.lwf.balance else 1.0
            temperature = self.lwf.temperature

            def kd(q: Tensor, z: Tensor) -> Tensor:
                p = (q / temperature).softmax(1)
                self.entropy.append(-(p * p.clamp(min=1e-30).log()).sum(1).mean())
                return -(p * (z / temperature).log_softmax(1)).sum(1).mean()

            if form == "heads":
                value = sum(kd(q[:, list(c)], z[:, list(c)]) for c in run.scenario.classes[: t - 1])
            elif form in ("local", "seen"):
                value = kd(q[:, :n], z[:, :n])
            elif form == "all":
                value = kd(q, z)
            elif form in ("padded", "padded-mean"):
                p = (q[:, :n] / temperature).softmax(1)
                value = -(p * (z / temperature).log_softmax(1)[:, :n]).sum(1).mean()
                value = value / z.shape[1] if form == "padded-mean" else value
            if form != "mc":
                wanted["lwf"] = self.lwf.lambda_ * share * value
            else:
                wanted["base"] = incremental_bce(z, batch.y, q[:, :n]).mean()
        elif form == "mc":
            wanted["base"] = incremental_bce(z, batch.y, None).mean()
        if self.lwf.balance:
            wanted["base"] = wanted["base"] / t
        self.wanted.append(wanted)

    @hookimpl
    def after_experience(self, run, experience) -> None:
        super().after_experience(run, experience)
        self.old = clframe.snapshot(run.model)

    def compare(self) -> None:
        """Each step has the terms that were computed by hand."""
        assert len(self.steps) == len(self.wanted) > 15
        for step, wanted in zip(self.steps, self.wanted, strict=True):
            assert step.losses.keys() == wanted.keys()
            for name, value in wanted.items():
                assert step.losses[name].item() == pytest.approx(value.item(), rel=1e-4), name


PLACES = [  # form, setting, model
    ("heads", "task", "mlp-100"),
    ("heads", "task", "cnn-small"),
    *((form, "class", "mlp-100") for form in LOGITS if form != "heads"),
    ("local", "class", "cnn-small"),
    ("mc", "class", "cnn-small"),
    ("all", "domain", "mlp-100"),
    ("seen", "task", "mlp-100"),
]


@pytest.mark.parametrize(
    ("form", "setting", "model", "balance"),
    [(*place, balance) for place in PLACES for balance in (False, True) if not (balance and place[0] == "mc")],
)
def test_every_step_has_the_terms_of_the_form(form: str, setting: str, model: str, balance: bool, tiny) -> None:
    options = {} if form == "mc" else {"lambda_": 0.7, "temperature": 3.0, "balance": balance}
    lwf = LwF(form=form, **options)
    watch = Watch(lwf=lwf)
    results = learn(tiny(setting=setting, shape=(1, 8, 8)), lwf, watch, model=model)
    assert watch.logits == LOGITS[form]
    widths = [2, 2, 2] if setting == "domain" else [6, 6, 6] if LOGITS[form] == "all" else [2, 4, 6]
    assert watch.widths == [width for width in widths for _ in range(len(watch.widths) // 3)]
    assert results.data["forms"] == {"lwf": form}
    watch.compare()
    assert {step.experience for step in watch.steps if "lwf" in step.losses} == (set() if form == "mc" else {1, 2})


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_balance_leaves_the_loss_of_replayed_rows_alone(tiny, weight: float) -> None:
    """In experience t only the new images' losses are divided by t."""

    class Replays(Plugin):
        name = "replays"
        replays = keeps_images = True

        def __init__(self) -> None:
            self.rows: Any = None
            self.wanted: list[float] = []
            self.found: list[float] = []

        @hookimpl
        def extra_batch(self, run) -> Batch | None:
            if self.rows is None:
                return None
            brought: Batch = run.batch(self.rows)
            brought.weight.fill_(weight)
            return brought

        @hookimpl
        def penalty(self, run, batch: Batch, outputs: Outputs) -> None:
            losses = -outputs.logits.detach().log_softmax(1)[range(len(batch)), batch.y]
            new, old = losses[:8], losses[8:]
            total = new.sum() / (run.experience.index + 1) + weight * old.sum()
            self.wanted.append((total / (len(new) + weight * len(old))).item())

        @hookimpl
        def after_step(self, run) -> None:
            self.found.append(run.losses["base"].item())

        @hookimpl
        def after_experience(self, run, experience) -> None:
            self.rows = experience.train.rows(slice(0, 5))

    replays = Replays()
    learn(tiny(), LwF(form="seen", balance=True), replays)
    assert len(replays.wanted) == 18
    assert replays.found == pytest.approx(replays.wanted, rel=1e-5)


@pytest.mark.parametrize(("setting", "form"), [("task", "heads"), ("class", "local"), ("domain", "all")])
def test_the_default_form_is_the_settings(setting: str, form: str, tiny) -> None:
    assert learn(tiny(setting=setting), LwF()).data["forms"] == {"lwf": form}


@pytest.mark.parametrize("model", ["mlp-100", "cnn-small"])
def test_distillation_of_a_network_that_did_not_move_is_its_entropy(model: str, tiny) -> None:
    """Targets come from the same weights and the same view; with a batch norm, in eval mode as evaluation is."""

    class Eval(Plugin):
        name = "eval"

        @hookimpl
        def before_experience(self, run) -> None:
            run.model.backbone.requires_grad_(False)  # frozen, so its norms are in eval mode in training as well

    lwf = LwF()
    watch = Watch(lwf=lwf)
    learn(tiny(setting="task", shape=(1, 8, 8)), Eval(), lwf, watch, model=model, **STILL)
    heads = [step for step in watch.steps for _ in range(step.experience) if "lwf" in step.losses]
    assert len(watch.entropy) == len(heads)
    entropies = iter(watch.entropy)
    for step in watch.steps:
        if step.experience:
            entropy = sum(next(entropies).item() for _ in range(step.experience))
            assert step.losses["lwf"].item() == pytest.approx(entropy, rel=1e-5)


def test_the_teacher_is_one_copy_of_the_latest_network_and_answers_in_eval_mode(tiny) -> None:
    lwf = LwF()
    watch = Watch(lwf=lwf)
    seen: list[tuple[bool, bool]] = []

    class Look(Plugin):
        name = "look"

        @hookimpl
        def after_step(self, run) -> None:
            if lwf.teacher is not None:
                state, latest = lwf.teacher.state_dict(), watch.after[-1]
                same = testing.differing(state, latest) == []
                resting = not any(m.training for m in lwf.teacher.modules())
                frozen = not any(p.requires_grad or p.grad is not None for p in lwf.teacher.parameters())
                seen.append((same, resting and frozen))

    learn(tiny(shape=(1, 8, 8)), lwf, watch, Look(), model="cnn-small")
    assert len(seen) > 10
    assert set(seen) == {(True, True)}
    assert LwF.state == ("teacher",)
    assert [name for name, value in vars(lwf).items() if isinstance(value, torch.nn.Module)] == ["teacher"]


def test_the_teacher_sees_the_very_view_that_is_trained_on(tiny_arrays) -> None:
    """Guards against Mammoth's LwF: targets from images that were neither augmented nor normalised."""
    transform = Transform(mean=(0.3,), std=(0.2,), pad=1, flip=True)
    arrays = replace(tiny_arrays(shape=(1, 8, 8)), transform=transform)
    lwf, given, trained = LwF(), [], []

    class Look(Plugin):
        name = "look"

        @hookimpl
        def before_experience(self, run) -> None:
            if lwf.teacher is not None:
                lwf.teacher.register_forward_pre_hook(lambda module, args: given.append(args[0]))

        @hookimpl
        def penalty(self, run, batch, outputs) -> None:
            if lwf.teacher is not None:
                trained.append(batch.x)

    learn(split_classes("tiny", arrays, experiences=2), lwf, Look())
    assert len(given) == len(trained) > 5
    assert all(torch.equal(a, b) for a, b in zip(given, trained, strict=True))
    assert min(float(x.min()) for x in given) < 0  # normalised


@pytest.mark.parametrize(
    ("form", "setting", "model"),
    [
        ("heads", "task", "cnn-small"),
        ("heads", "task", "mlp-100"),
        ("all", "class", "cnn-small"),
        ("padded", "class", "mlp-100"),
    ],
)
def test_warm_up_moves_the_new_head_alone_and_the_targets_are_from_before_it(
    form: str, setting: str, model: str, tiny
) -> None:
    """With momentum and weight decay; buffers of batch norms included.

    Guards against Mammoth's LwF, which records its targets after the warm-up: with `all` and `padded` other targets.
    """
    lwf = LwF(form=form, warm_up=1.0)
    watch = Watch(lwf=lwf)
    mover = {"momentum": 0.9, "weight_decay": 0.1, "decay": "all"}
    learn(tiny(setting=setting, shape=(1, 8, 8)), lwf, watch, model=model, **mover)
    assert [where[:2] for where in watch.phase_steps()][1::2] == [(1, "warm-up"), (2, "warm-up")]
    for i in (1, 2):
        moved = testing.differing(watch.after[i - 1], watch.phase_ends[i, "warm-up"])
        assert set(moved) == {f"head.{i}.weight", f"head.{i}.bias"}
    watch.compare()


def test_old_heads_are_trained(tiny) -> None:
    watch = Watch(lwf=(lwf := LwF()))
    learn(tiny(setting="task"), lwf, watch)
    assert not torch.equal(watch.after[0]["head.0.weight"], watch.after[1]["head.0.weight"])


def test_distillation_holds_old_answers(tiny) -> None:
    """With distillation the old answers to the new images move by a fraction of what they do without."""
    distances = []
    for strength in (0.0, 10.0):
        watch = Watch(lwf=(lwf := LwF(lambda_=strength, form="seen")))
        learn(tiny(2), lwf, watch, epochs=10, optimizer="adam", lr=0.01)
        n, x = 2, tiny(2)[1].train.x.float() / 255
        first, last = watch.after[0], watch.after[1]
        model = clframe.snapshot(watch.old)
        with torch.no_grad():
            now = model(x).logits[:, :n].softmax(1)
            model.load_state_dict({name: first.get(name, value) for name, value in last.items()})
            distances.append((model(x).logits[:, :n].softmax(1) - now).abs().mean().item())
    assert distances[1] < distances[0] / 5


def refusal(scenario: Any, *plugins: Plugin, **train: Any) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        learn(scenario, *plugins, **train)
    return caught.value.problems


class WantsAll(Plugin):
    name = "wants-all"

    def wanted_logits(self, run: Run) -> str:
        return "all"


class OwnLoss(Plugin):
    name = "own-loss"

    @hookimpl
    def base_loss(self, run, batch, outputs):
        return outputs.logits.square().mean()


def test_logits_that_the_form_is_not_made_for_are_refused(tiny) -> None:
    (problem,) = refusal(tiny(), LwF(form="seen"), logits="all")
    assert all(word in problem for word in ("`lwf` (form `seen`)", "`train.logits=seen`", "`train.logits` is all"))
    (problem,) = refusal(tiny(), LwF(form="local"), WantsAll())
    assert all(word in problem for word in ("`wants-all`", "`train.logits=all`", "`lwf` for `current`"))
    learn(tiny(), LwF(form="seen"), logits="seen")  # said twice is said once


@pytest.mark.parametrize("setting", ["class", "domain"])
def test_heads_need_tasks(setting: str, tiny) -> None:
    problems = refusal(tiny(setting=setting), LwF(form="heads"))
    assert any(
        problem.startswith("`lwf.form=heads` ")
        and f"the setting is `{setting}`" in problem
        and problem.endswith("`--setting task`.")
        for problem in problems
    )


def test_local_needs_classes_of_its_own(tiny) -> None:
    (problem,) = refusal(tiny(setting="domain"), LwF(form="local"))
    assert problem.startswith("`lwf.form=local` ")
    assert problem.endswith("in the domain setting choose `all`.")


def test_a_form_with_a_loss_of_its_own_owns_it(tiny) -> None:
    """The other forms leave it to whoever brings one."""
    learn(tiny(), LwF(form="seen"), OwnLoss())
    for lwf in (LwF(form="mc"), LwF(form="seen", balance=True)):
        (problem,) = refusal(tiny(), lwf, OwnLoss())
        assert all(word in problem for word in ("`base_loss`", "`lwf` and `own-loss`"))


@pytest.mark.parametrize("options", [{"lambda_": 2.0}, {"temperature": 1.0}, {"balance": True}])
def test_options_that_mc_does_not_have_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"`lwf\.form=mc` .* `lwf\.lambda`, `lwf\.temperature` and `lwf\.balance`"):
        LwF(form="mc", **options)


@pytest.mark.parametrize(
    ("option", "value"), [("lambda", -1.0), ("temperature", 0.0), ("form", "heads-on"), ("warm_up", -1)]
)
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"`lwf\.{option}`"):
        LwF(**{option: value})


def test_a_hand_value() -> None:
    """Two classes, T = 2: targets (0.75, 0.25), answers (0.5, 0.5)."""
    q, z = torch.tensor([[2 * torch.log(torch.tensor(3.0)), 0.0]]), torch.zeros(1, 2)
    assert soft_cross_entropy(q, z, 2.0).item() == pytest.approx(0.6931472, rel=1e-5)


@pytest.fixture
def moving(tiny_arrays) -> Any:
    """Builds a scenario of two experiences whose images are normalised, cropped and flipped."""
    arrays = replace(tiny_arrays(shape=(1, 8, 8)), transform=Transform(mean=(0.3,), std=(0.2,), pad=1, flip=True))

    def build(setting: str) -> Scenario:
        return split_classes("tiny", arrays, experiences=2, setting=setting)

    return build


@pytest.mark.parametrize("model", ["mlp-100", "cnn-small"])
@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("task", {}),
        ("task", {"balance": True, "warm_up": 1.0}),
        ("class", {}),
        ("class", {"form": "seen"}),
        ("class", {"form": "padded"}),
        ("class", {"form": "padded-mean"}),
        ("class", {"form": "all"}),
        ("domain", {}),
    ],
)
def test_the_first_experience_is_fine_tuning_to_the_bit(model: str, setting: str, options: Any, moving) -> None:
    """With the same `train.logits`; the second one is not."""
    lwf, ours, theirs = LwF(**options), Recorder(), Recorder()
    learn(moving(setting), lwf, ours, model=model, momentum=0.9)
    learn(moving(setting), theirs, model=model, momentum=0.9, logits=LOGITS[lwf.form])
    assert testing.differing(ours.after[0], theirs.after[0]) == []
    assert testing.differing(ours.after[1], theirs.after[1]) != []


@pytest.mark.parametrize(
    ("setting", "form"),
    [
        ("task", "heads"),
        ("class", "local"),
        ("class", "seen"),
        ("class", "padded"),
        ("class", "padded-mean"),
        ("class", "all"),
    ],
)
def test_without_weight_all_of_it_is_fine_tuning_to_the_bit(setting: str, form: str, moving) -> None:
    """The teacher's passes draw nothing and move no running statistics."""
    ours, theirs = Recorder(), Recorder()
    learn(moving(setting), LwF(form=form, lambda_=0.0), ours, model="cnn-small")
    learn(moving(setting), theirs, model="cnn-small", logits=LOGITS[form])
    assert len(ours.after) == 2
    assert all(testing.differing(*states) == [] for states in zip(ours.after, theirs.after, strict=True))


def one_batch(lwf: Any, z: Tensor, q: Tensor, y: list[int], weight: list[float]) -> tuple[Any, Batch, Outputs]:
    """Arguments of LwF's hooks in the second of two experiences of two classes, its teacher saying `q`."""
    lwf.teacher = lambda x, task: Outputs(x, q, [q.shape[1]])
    zeros = torch.zeros(len(z), dtype=torch.int64)
    batch = Batch(torch.zeros(len(z), 1), torch.tensor(y), zeros, zeros, torch.tensor(weight), zeros)
    scenario = SimpleNamespace(setting="class", classes=((0, 1), (2, 3)))
    experience = SimpleNamespace(index=1)
    run = SimpleNamespace(
        scenario=scenario,
        experience=experience,
        previous_classes=[0, 1],
        old_heads=[(0, 1)],
        labeled_columns=lambda batch: None,
    )
    return run, batch, Outputs(z, z, [2, 4])


@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.5, 0.0, 2.0]])
@pytest.mark.parametrize("form", ["heads", "local", "seen", "padded", "padded-mean"])
def test_gradient_of_the_term_by_hand(form: Any, weight: list[float]) -> None:
    """lambda w/sum(w) (s_T(z) - target) / T at the logits that take part and 0 at others; T^2 is nowhere."""
    generator = torch.Generator().manual_seed(3)
    q, z = (torch.randn(3, n, generator=generator, dtype=torch.float64) for n in (2, 4))
    lwf = LwF(form=form, lambda_=0.7, temperature=3.0)
    run, batch, outputs = one_batch(lwf, z.requires_grad_(), q, [2, 3, 2], weight)
    (got,) = torch.autograd.grad(lwf.penalty(run=run, batch=batch, outputs=outputs)["lwf"], z)
    n = 4 if form in ("padded", "padded-mean") else 2
    target = torch.cat([(q / 3).softmax(1), torch.zeros(3, n - 2, dtype=torch.float64)], 1)
    share = torch.tensor(weight, dtype=torch.float64)[:, None] / sum(weight)
    wanted = torch.zeros_like(z)
    strength = 0.7 / 4 if form == "padded-mean" else 0.7
    wanted[:, :n] = strength * share * ((z[:, :n] / 3).softmax(1) - target).detach() / 3
    assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.5, 0.0, 2.0]])
def test_gradient_of_the_loss_of_mc_by_hand(weight: list[float]) -> None:
    """w/sum(w) (sigma(z) - target) / C over all outputs; a row of an old class has soft targets for old classes too.

    Guards against targets sigma(q / T), T = 2 (the GMvandeVen code's iCaRL).
    """
    generator = torch.Generator().manual_seed(3)
    q, z = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    lwf = LwF(form="mc")
    run, batch, outputs = one_batch(lwf, z.requires_grad_(), q, [2, 3, 1], weight)
    (got,) = torch.autograd.grad(lwf.base_loss(run=run, batch=batch, outputs=outputs), z)
    targets = torch.zeros_like(z)
    targets[0, 2] = targets[1, 3] = 1
    targets[:, :2] = q[:, :2].sigmoid()
    share = torch.tensor(weight, dtype=torch.float64)[:, None] / sum(weight)
    assert torch.allclose(got, share * (z.sigmoid() - targets).detach() / 4, rtol=1e-6, atol=1e-12)
    assert lwf.penalty(run=run, batch=batch, outputs=outputs) is None
