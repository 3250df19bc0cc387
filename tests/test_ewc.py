from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clframe import Plugin, testing
from clframe.context import Run
from clframe.data.scenario import Experience
from clframe.errors import UsageError
from clframe.hooks import hookimpl
from clframe.plugins.ewc import EWC
from clframe.testing import Recorder
from clframe.toolkit.importance import label_cotangents
from clframe.toolkit.per_sample import GradientSums, zeros_for

QUICK = {"epochs": 1, "batch_size": 32, "optimizer": "sgd", "lr": 0.05}
learn = partial(testing.learn, model={"name": "mlp", "hidden": [16]}, **QUICK)


class Witness(Recorder):
    """A recorder that also keeps, after each experience, the weights and the Fisher information by public functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[dict[str, Tensor]] = []
        self.fisher: list[dict[str, Tensor]] = []

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        super().after_experience(run, experience)
        parameters = dict(run.model.named_parameters())
        self.weights.append({name: p.detach().clone() for name, p in parameters.items()})
        sums = zeros_for(parameters)
        batch = run.batch(experience.train)
        mask = run.mask(batch.task)
        GradientSums(run.model, sums).add(batch.x, batch.task, lambda z: label_cotangents(z, "exact", mask))
        self.fisher.append({name: total / len(batch) for name, total in sums.items()})


def run(ewc: EWC | None, scenario: str = "permuted-digits", experiences: int = 3, **settings: Any) -> Witness:
    witness = Witness()
    given = {"name": scenario, "experiences": experiences, "limit": 12}
    learn(given, *([ewc] if ewc else []), witness, **settings)
    return witness


def value(theta: dict[str, Tensor], terms: list[tuple[float, dict[str, Tensor], dict[str, Tensor]]]) -> float:
    """sum of strength/2 F (theta - anchor)^2 over the terms."""
    return sum(
        strength / 2 * (f.double() * (theta[n].double() - anchor[n].double()) ** 2).sum().item()
        for strength, fisher, anchor in terms
        for n, f in fisher.items()
    )


@pytest.mark.parametrize("scenario", ["permuted-digits", "split-digits"])
def test_offline_penalty_is_a_term_for_each_experience(scenario: str) -> None:
    """Kirkpatrick et al., eq. 3, also while the head grows."""
    ewc = EWC(lambda_=30.0, samples=None)
    seen = run(ewc, scenario, experiences=5)
    theta = {name: torch.randn_like(w) for name, w in seen.weights[-1].items()}
    terms = [(30.0, f, w) for f, w in zip(seen.fisher, seen.weights, strict=True)]
    got = 30.0 * ewc.penalties(theta).item()
    assert got == pytest.approx(value(theta, terms), rel=1e-4)
    assert got > 1


@pytest.mark.parametrize("gamma", [None, 0.5])
def test_online_penalty_has_one_anchor_and_fades(gamma: float | None) -> None:
    """F~_t = gamma F~_{t-1} + F_t, and gamma F~_{t-1} in the loss."""
    ewc = EWC(lambda_=30.0, form="online", gamma=gamma, samples=None)
    seen = run(ewc)
    fading = 1.0 if gamma is None else gamma
    (f1, f2, f3), anchor = seen.fisher, seen.weights[-1]
    theta = {name: w + 1 for name, w in anchor.items()}
    wanted = value(theta, [(30.0 * fading**k, f, anchor) for k, f in ((3, f1), (2, f2), (1, f3))])
    assert 30.0 * fading * ewc.penalties(theta).item() == pytest.approx(wanted, rel=1e-4)
    steps = len(seen.steps) // 3
    second = seen.losses("ewc")[steps : 2 * steps]
    offline = run(EWC(lambda_=30.0 * fading, samples=None)).losses("ewc")[steps : 2 * steps]
    assert second == pytest.approx(offline, rel=1e-4)  # one task: the same but for gamma


def test_offline_and_online_are_one_after_one_experience() -> None:
    offline, online = EWC(samples=None), EWC(form="online", gamma=0.7, samples=None)
    weights = run(offline, experiences=1).weights[-1]
    run(online, experiences=1)
    theta = {name: w + 0.1 for name, w in weights.items()}
    assert online.penalties(theta).item() == offline.penalties(theta).item() > 0


def test_online_with_gamma_1_and_equal_anchors_is_the_sum() -> None:
    """With a learning rate of (almost) 0 all anchors are equal, and both forms are one."""
    offline, online = EWC(samples=None), EWC(form="online", gamma=1.0, samples=None)
    weights = run(offline, lr=1e-30).weights[-1]
    run(online, lr=1e-30)
    theta = {name: w + 0.1 for name, w in weights.items()}
    assert online.penalties(theta).item() == pytest.approx(offline.penalties(theta).item(), rel=1e-5)
    for name in weights:
        assert torch.allclose(online.penalties.precision[name], offline.penalties.precision[name], rtol=1e-5)


def test_penalty_begins_at_zero_in_the_second_experience() -> None:
    penalties = run(EWC(lambda_=30.0), experiences=2).losses("ewc")
    half = len(penalties) // 2
    assert penalties[:half] == [None] * half
    assert penalties[half] == 0
    assert all(p > 0 for p in penalties[half + 1 :])


def test_first_experience_is_that_of_finetuning() -> None:
    with_ewc, without = run(EWC(lambda_=1e3)), run(None)
    assert all(torch.equal(with_ewc.weights[0][name], w) for name, w in without.weights[0].items())
    assert not torch.equal(with_ewc.weights[1]["backbone.net.1.weight"], without.weights[1]["backbone.net.1.weight"])


def test_a_strong_penalty_holds_the_weights_that_mattered() -> None:
    """The distance to the first weights, measured by the Fisher information, shrinks at least tenfold."""
    distances = []
    for strength in (0.0, 1e3):
        seen = run(EWC(lambda_=strength, samples=None), experiences=2, epochs=5, optimizer="adam", lr=1e-3)
        distances.append(value(seen.weights[1], [(1.0, seen.fisher[0], seen.weights[0])]))
    assert distances[1] < distances[0] / 10


def test_heads_may_be_left_out() -> None:
    ewc = EWC(heads=False)
    run(ewc)
    assert list(ewc.penalties.anchor) == ["backbone.net.1.weight", "backbone.net.1.bias"]


def test_frozen_parameters_are_left_out() -> None:
    class Freeze(Plugin):
        name = "freeze"

        @hookimpl
        def before_experience(self, run: Run) -> None:
            run.model.backbone.get_parameter("net.1.weight").requires_grad_(False)

    ewc = EWC()
    learn(
        {"name": "permuted-digits", "experiences": 2, "limit": 5}, ewc, Freeze(), model={"name": "mlp", "hidden": [8]}
    )
    assert list(ewc.penalties.anchor) == ["backbone.net.1.bias", "head.0.weight", "head.0.bias"]


def test_samples_are_drawn_without_touching_the_global_generator() -> None:
    few, same, more = EWC(samples=7), EWC(samples=7), EWC(samples=20)
    for ewc in (few, same, more):
        run(ewc, experiences=1)
    name = "backbone.net.1.weight"
    assert torch.equal(few.penalties.precision[name], same.penalties.precision[name])
    assert not torch.allclose(few.penalties.precision[name], more.penalties.precision[name], rtol=1e-3)
    assert torch.equal(few.penalties.anchor[name], more.penalties.anchor[name])


def test_labels_choose_the_fisher_information() -> None:
    found = {}
    for labels in ("exact", "sampled", "empirical", "argmax"):
        ewc = EWC(labels=labels, samples=None)
        run(ewc, experiences=1)
        found[labels] = ewc.penalties.precision["head.0.bias"]
    assert found["sampled"].sum().item() == pytest.approx(found["exact"].sum().item(), rel=0.3)
    for labels in ("sampled", "empirical", "argmax"):
        assert not torch.allclose(found[labels], found["exact"], rtol=1e-3)


@pytest.mark.parametrize("labels", ["exact", "empirical"])
@pytest.mark.parametrize(("model", "setting"), [("mlp", "task"), ("cnn-small", "class")])
def test_fisher_information_is_that_of_single_images(model: str, setting: str, labels: str) -> None:
    """By autograd of one image after the other, in eval mode, over the logits that take part.

    Guards against the square of a batch's mean gradient (Avalanche, FACIL, PyCIL), squares weighted by the probability
    of the true label (Mammoth), values cut off at 1e-4 (PyCIL), and statistics of the batch (FACIL, PyCIL).
    """
    wanted: dict[str, Tensor] = {}

    class Autograd(Plugin):
        name = "autograd"

        @hookimpl
        def after_experience(self, run: Run, experience: Experience) -> None:
            batch, net = run.batch(experience.train), copy.deepcopy(run.model).eval().double()
            active = list(experience.classes) if setting == "task" else list(range(run.model.n_classes))
            parameters = dict(net.named_parameters())
            wanted.clear()
            wanted.update({name: torch.zeros_like(p) for name, p in parameters.items()})
            for b in range(len(batch)):
                log_p = net(batch.x[b : b + 1].double(), batch.task[b : b + 1]).logits[0, active].log_softmax(0)
                own = active.index(int(batch.y[b]))
                for y in [own] if labels == "empirical" else range(len(active)):
                    weight = 1.0 if labels == "empirical" else log_p[y].exp().item()
                    found = torch.autograd.grad(log_p[y], list(parameters.values()), retain_graph=True)
                    for total, gradient in zip(wanted.values(), found, strict=True):
                        total += weight * gradient**2 / len(batch)

    ewc = EWC(labels=labels, samples=None, form="online", gamma=0.0)  # the latest experience alone
    learn(
        {"name": "split-digits", "experiences": 5, "limit": 6, "setting": setting},
        Autograd(),
        ewc,
        model={"name": "mlp", "hidden": [8]} if model == "mlp" else model,
        epochs=2,
    )
    assert ewc.penalties.precision.keys() == wanted.keys()
    for name, value in wanted.items():
        got = ewc.penalties.precision[name].double()
        assert torch.allclose(got, value, rtol=1e-3, atol=1e-4 * value.max().item()), name
    assert max(value.max().item() for value in wanted.values()) > 1e-3


@pytest.mark.parametrize("form", ["offline", "online"])
def test_sgd_learns_beside_a_penalty_that_it_would_overshoot(form: str) -> None:
    """Without clipping: the weights that mattered stay where they were, and nothing diverges or is warned of."""
    told: list[str] = []
    ewc = EWC(lambda_=1e6, form=form, gamma=0.5 if form == "online" else None)
    results = learn(
        {"name": "permuted-digits", "experiences": 2, "limit": 12},
        ewc,
        clip=0.0,
        epochs=20,
        listeners=[testing.message_listener(told)],
    )
    assert 0.05 * 1e6 * max(f.max().item() for f in ewc.penalties.precision.values()) > 100  # far above the bound of 2
    assert told == []
    learnt, kept = results.accuracy["domain"][0][0], results.accuracy["domain"][1][0]
    assert learnt is not None
    assert kept is not None
    assert kept > learnt - 0.05


def test_nothing_is_left_on_the_model_and_running_statistics_stay() -> None:
    statistics: list[Tensor] = []

    class Look(Plugin):
        name = "look"

        @hookimpl
        def after_eval(self, run: Run) -> None:
            statistics.append(run.model.get_buffer("backbone.net.1.running_mean").clone())

    results = []
    for plugins in ([Look()], [EWC(lambda_=0.0), Look()]):
        learn({"name": "permuted-digits", "experiences": 1, "limit": 5}, *plugins, model="cnn-small")
        results.append(statistics.pop())
    assert torch.equal(*results)
    witness = run(EWC(), experiences=1)
    model = witness.model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_state_is_small_after_an_experience() -> None:
    ewc = EWC()
    run(ewc, experiences=2)
    assert ewc.mean.partial == {}
    assert len(ewc.mean.rows) == 0
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in ewc.penalties.anchor.values())


def test_online_and_offline_asked_at_once_is_refused() -> None:
    with pytest.raises(UsageError, match=r"`ewc\.gamma` is .* but `ewc\.form` is offline"):
        EWC(gamma=0.9)
    with pytest.raises(UsageError, match=r"ewc\.gamma"):
        EWC(form="online", gamma=1.5)
    with pytest.raises(UsageError, match=r"ewc\.lambda"):
        EWC(lambda_=-1.0)
    with pytest.raises(UsageError, match=r"ewc\.labels"):
        EWC(labels="true")
