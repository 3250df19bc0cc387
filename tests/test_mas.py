from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import clframe
from clframe import Arrays, Plugin, Scenario, hookimpl, split_classes, testing
from clframe.context import Run
from clframe.data.batch import Batch
from clframe.data.scenario import Experience
from clframe.errors import DataError, UsageError
from clframe.plugins.mas import MAS
from clframe.testing import Recorder
from clframe.toolkit import importance

Weights = dict[str, Tensor]
learn = partial(testing.learn, optimizer="sgd", lr=0.1, clip=0.0)
STILL = {"lr": 1e-30}  # training that moves nothing


class Double(nn.Module):
    """A backbone in float64, so that identities can be asked for to many digits."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.net, self.width = nn.Sequential(*layers).double(), width
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))  # the head takes its type from a parameter

    def features(self, x: Tensor) -> Tensor:
        return self.net(x.double())


def mlp() -> Double:
    torch.manual_seed(1)
    return Double(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(inplace=True), nn.Linear(8, 5), nn.ReLU(), width=5)


def linear() -> Double:
    return Double(nn.Flatten(), width=16)


def convolutions() -> Double:
    torch.manual_seed(1)
    first, second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, (3, 2), stride=2)
    return Double(first, nn.ReLU(inplace=True), second, nn.ReLU(), nn.Flatten(), width=8)


def cnn_small() -> Double:
    from clframe.backbones import cnn_small

    torch.manual_seed(1)
    return Double(cnn_small((1, 4, 4)), width=64)


def by_single_images(model: nn.Module, batch: Batch, mask: Tensor | None) -> Weights:
    """Mean over images of |d ||z||^2 / d theta|, by autograd of one image after the other, in eval mode."""
    model = copy.deepcopy(model).eval()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for b in range(len(batch)):
        z = model(batch.x[b : b + 1], batch.task[b : b + 1]).logits[0]
        if mask is not None:
            z = z[mask if mask.dim() == 1 else mask[b]]
        gradients = torch.autograd.grad(z.square().sum(), list(parameters.values()), allow_unused=True)
        for (name, _), gradient in zip(parameters.items(), gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.abs()
    return {name: value / len(batch) for name, value in total.items()}


class Witness(Recorder):
    """Keeps weights, images and the importance by autograd of each experience, the penalty and its gradient by step."""

    def __init__(self, mas: MAS | None) -> None:
        super().__init__()
        self.mas = mas
        self.weights: list[Weights] = []
        self.new: list[Weights] = []
        self.images: list[Batch] = []
        self.importance: list[Weights] = []  # of `mas` before it took in the experience
        self.gradients: list[Weights] = []
        self.at_step: list[Weights] = []

    @hookimpl
    def after_backward(self, run: Run, batch: Batch) -> None:
        net = copy.deepcopy(run.model)
        base = run.loss(batch, net(batch.x, batch.task))
        names, parameters = zip(*net.named_parameters(), strict=True)
        of_base = torch.autograd.grad(base, parameters, allow_unused=True)
        total = {n: p.grad for n, p in run.model.named_parameters()}
        self.gradients.append({n: total[n] - g for n, g in zip(names, of_base, strict=True) if g is not None})
        self.at_step.append(copied(run.model))

    @hookimpl
    def after_experience(self, run: Run, experience: Experience) -> None:
        super().after_experience(run, experience)
        batch = run.batch(experience.train)
        mask = run.mask(batch.task)
        self.weights.append(copied(run.model))
        self.images.append(batch)
        self.new.append(by_single_images(run.model, batch, mask))
        if self.mas is not None:
            self.importance.append(dict(self.mas.penalties.precision))


def copied(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(scenario: Scenario, mas: MAS | None, *others: Plugin, model: Any = None, **settings: Any) -> Witness:
    witness = Witness(mas=mas)
    learn(scenario, witness, *others, *([mas] if mas else []), model=model or mlp(), **settings)
    return witness


def omega(scenario: Scenario, **options: Any) -> Weights:
    """The importance after a run that moves nothing."""
    train = {k: options.pop(k) for k in list(options) if k in ("batch_size", "logits")}
    model, others = options.pop("model", mlp()), options.pop("others", ())
    mas = MAS(**{"heads": True} | options)
    run(scenario, mas, *others, model=model, **STILL | train)
    return mas.penalties.precision


def apart(got: Weights, wanted: Weights) -> float:
    """The largest difference, relative to the largest value of each tensor."""
    assert got.keys() == wanted.keys()
    return max(
        ((got[n] - w).abs().max() / w.abs().max().clamp(min=torch.finfo(w.dtype).tiny)).item()
        for n, w in wanted.items()
        if got[n].any() or w.any()
    )


# ------------------------------------------------------------------------- the sensitivity


def test_linear_network_has_a_closed_form(tiny: Callable[..., Scenario]) -> None:
    """Omega_ij = 2 E[|z_i| |x_j|] for z = W x + b, and 2 E[|z_i|] for the bias."""
    mas = MAS(heads=True)
    seen = run(tiny(1), mas, model=linear())
    x, w = seen.images[0].x.flatten(1).double(), seen.weights[0]
    z = x @ w["head.0.weight"].T + w["head.0.bias"]
    got = mas.penalties.precision
    assert torch.allclose(got["head.0.weight"], 2 * torch.einsum("ni,nj->ij", z.abs(), x.abs()) / len(x), rtol=1e-9)
    assert torch.allclose(got["head.0.bias"], 2 * z.abs().mean(0), rtol=1e-9)
    assert got["backbone.unused"].item() == 0


def test_outputs_times_c_are_importance_times_c_squared(tiny: Callable[..., Scenario]) -> None:
    """Guards against a norm that is not squared (FACIL): it would be times c."""

    class Scale(Plugin):
        name = "scale"

        @hookimpl
        def before_experience(self, run: Run) -> None:
            with torch.no_grad():
                for p in run.model.head.parameters():
                    p.mul_(3.0)

    plain, scaled = omega(tiny(1), heads=False), omega(tiny(1), heads=False, others=[Scale()])
    assert apart(scaled, {name: 9 * value for name, value in plain.items()}) < 1e-9
    assert plain["backbone.net.1.weight"].max() > 1e-3


def test_labels_play_no_part(tiny_arrays: Callable[..., Arrays]) -> None:
    arrays = tiny_arrays()
    before = omega(split_classes("tiny", arrays, experiences=1))
    generator = torch.Generator().manual_seed(0)
    arrays.y_train = arrays.y_train[torch.randperm(len(arrays.y_train), generator=generator)]
    after = omega(split_classes("tiny", arrays, experiences=1))
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("model", [mlp, cnn_small])
@pytest.mark.parametrize(
    ("setting", "logits"), [("class", "seen"), ("class", "current"), ("class", "all"), ("task", "own")]
)
def test_importance_is_that_of_single_images_and_is_added_up(
    setting: str, logits: str, model: Callable[[], nn.Module], tiny: Callable[..., Scenario]
) -> None:
    """Omega_k = Omega_{k-1} + mean of |d ||z||^2 / d theta| by autograd image by image, z the logits in the loss.

    Guards against the absolute value of a batch's mean gradient, batch statistics of batch norms, a norm that is not
    squared, logits that have no part in the loss, and importance that is blended half and half (FACIL, Avalanche).
    """
    mas = MAS(lambda_=0.1, heads=True)
    seen = run(tiny(2, setting=setting), mas, model=model(), logits=logits)
    first, second = seen.new
    assert apart(seen.importance[1], first) < 1e-6
    both = {name: value + first.get(name, 0) for name, value in second.items()}
    assert apart(mas.penalties.precision, both) < 1e-6
    assert all(first[name].max() > 1e-3 for name in first if name.startswith("head.0"))
    if logits in ("own", "current"):  # the old head has no say, and no new importance
        assert second["head.0.weight"].max() == 0
    assert second["head.1.weight"].max() > 1e-3
    weights = seen.weights[-1]
    assert all(torch.equal(mas.penalties.anchor[name], weights[name]) for name in both)


def test_gradient_of_the_batch_mean_is_another_thing(tiny: Callable[..., Scenario]) -> None:
    """The tests above can tell: gradients of images differ in sign, and their mean is clearly smaller."""
    mas = MAS(heads=True)
    seen = run(tiny(1), mas, model=linear(), epochs=10)
    net = copy.deepcopy(seen.model).eval()
    norm = net(seen.images[0].x, None).logits.square().sum(1).mean()
    (mean,) = torch.autograd.grad(norm, [net.get_parameter("head.0.weight")])
    assert mean.abs().sum() < 0.8 * mas.penalties.precision["head.0.weight"].sum()


def test_size_of_batches_changes_nothing(tiny: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "CHUNK", 1)  # batches of the training's size
    ticks: list[list[int]] = []

    def found(batch_size: int) -> Weights:
        mas = MAS(heads=True)
        ticks.append([])
        count = ticks[-1]
        listeners = [lambda record: count.append(record["n"]) if record["kind"] == "tick" else None]
        run(tiny(1), mas, batch_size=batch_size, listeners=listeners, **STILL)
        return mas.penalties.precision

    assert apart(found(1), found(50)) < 1e-9
    assert apart(found(7), found(50)) < 1e-9
    assert [len(t) for t in ticks] == [72, 2, 11, 2]


def test_heads_are_left_out_unless_asked_for(tiny: Callable[..., Scenario]) -> None:
    backbone = [n for n, _ in mlp().named_parameters(prefix="backbone")]
    without, with_heads = MAS(), MAS(heads=True)
    run(tiny(2), without)
    run(tiny(2), with_heads)
    assert sorted(without.penalties.anchor) == sorted(backbone)
    heads = [f"head.{k}.{kind}" for k in (0, 1) for kind in ("bias", "weight")]
    assert sorted(with_heads.penalties.anchor) == sorted(backbone + heads)


def test_frozen_weights_have_no_new_importance(tiny: Callable[..., Scenario]) -> None:
    """Frozen from the start they have no spring; frozen later they keep the importance that they had."""

    class Freeze(Plugin):
        name = "freeze"

        @hookimpl
        def before_experience(self, run: Run, experience: Experience) -> None:
            run.model.get_parameter("backbone.net.1.weight").requires_grad_(False)
            run.model.get_parameter("backbone.net.1.bias").requires_grad_(not experience.index)

    class Look(Plugin):
        """Called after `mas`."""

        name = "look"

        @hookimpl
        def after_experience(self) -> None:
            found.append(dict(mas.penalties.precision))

    found: list[Weights] = []
    mas = MAS()
    learn(tiny(2), Freeze(), mas, Look(), model=mlp())
    assert "backbone.net.1.weight" not in mas.penalties.anchor
    first, second = found
    assert torch.equal(first["backbone.net.1.bias"], second["backbone.net.1.bias"])
    assert first["backbone.net.1.bias"].max() > 0
    assert (second["backbone.net.3.bias"] > first["backbone.net.3.bias"]).any()


def test_samples_choose_images(tiny: Callable[..., Scenario]) -> None:
    """`samples` images, drawn by the plugin's own generator; the global one and the training are left alone."""
    few, same, more, whole = MAS(samples=5), MAS(samples=5), MAS(samples=71), MAS()
    weights = [run(tiny(1), mas).weights[0] for mas in (few, same, more, whole)]
    assert all(torch.equal(weights[0][n], w[n]) for w in weights for n in w)
    name = "backbone.net.1.weight"
    assert torch.equal(few.penalties.precision[name], same.penalties.precision[name])
    assert not torch.allclose(few.penalties.precision[name], more.penalties.precision[name], rtol=1e-3)
    # 71 of 72: the one that is missing accounts for the difference, so the sum of the others is within the whole
    left_out = 72 * whole.penalties.precision[name] - 71 * more.penalties.precision[name]
    assert (left_out > -1e-12).all()
    assert left_out.max() > 0
    singles = MAS(samples=1)
    seen = run(tiny(1), singles)
    candidates = [
        by_single_images(seen.model, row_of(seen.images[0], b), None)[name] for b in range(len(seen.images[0]))
    ]
    assert sum(torch.allclose(c, singles.penalties.precision[name], rtol=1e-9, atol=1e-15) for c in candidates) == 1


def row_of(batch: Batch, b: int) -> Batch:
    return Batch(*(getattr(batch, n)[b : b + 1] for n in ("x", "y", "index", "task", "weight", "origin")))


# ---------------------------------------------------------------------------- the penalty


def test_penalty_has_no_half_and_one_anchor(tiny: Callable[..., Scenario]) -> None:
    """lambda sum Omega (theta - theta*)^2 with the gradient 2 lambda Omega (theta - theta*), theta* the latest weights.

    Guards against an extra 1/2 (FACIL).
    """
    strength = 0.1
    mas = MAS(lambda_=strength, heads=True)
    seen = run(tiny(), mas)
    steps = len(seen.steps) // 3
    assert seen.losses("mas")[:steps] == [None] * steps
    assert seen.losses("mas")[steps] == 0
    for step in (steps + 2, 2 * steps + 4):
        k = step // steps
        held, anchor, theta = seen.importance[k], seen.weights[k - 1], seen.at_step[step]
        value = sum((held[n] * (theta[n] - anchor[n]) ** 2).sum().item() for n in anchor)
        assert value > 1e-5
        assert seen.losses("mas")[step] == pytest.approx(strength * value, rel=1e-9)
        pulls = {n: 2 * strength * held[n] * (theta[n] - anchor[n]) for n in anchor if n != "backbone.unused"}
        assert apart({n: seen.gradients[step][n] for n in pulls}, pulls) < 1e-9


def test_first_experience_and_strength_0_are_finetuning(tiny: Callable[..., Scenario]) -> None:
    without, none, strong = run(tiny(2), None), run(tiny(2), MAS(lambda_=0.0)), run(tiny(2), MAS(lambda_=2.0))
    assert all(torch.equal(none.weights[1][name], w) for name, w in without.weights[1].items())
    assert all(torch.equal(strong.weights[0][name], w) for name, w in without.weights[0].items())
    assert not torch.equal(strong.weights[1]["backbone.net.1.weight"], without.weights[1]["backbone.net.1.weight"])


def test_a_strong_penalty_holds_the_weights_that_mattered(tiny: Callable[..., Scenario]) -> None:
    """The distance to the first weights, measured by their importance, shrinks at least tenfold."""
    distances = []
    for strength in (0.0, 100.0):
        seen = run(tiny(2), MAS(lambda_=strength), epochs=10, optimizer="adam", lr=0.01)
        held, anchor = seen.importance[1], seen.weights[0]
        distances.append(sum((held[n] * (seen.weights[1][n] - anchor[n]) ** 2).sum().item() for n in held))
    assert distances[1] < distances[0] / 10


# --------------------------------------------------------------------- unlabelled images


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
@pytest.mark.parametrize("form", ["global", "local"])
def test_importance_of_images_of_ones_own(form: str, dtype: Any, tiny: Callable[..., Scenario], tmp_path: Path) -> None:
    """Raw images in a file, without labels, take the place of the experience's; they go through the run's transform."""
    images = np.random.default_rng(0).integers(0, 256, (13, 1, 4, 4)).astype(dtype)
    np.save(tmp_path / "images.npy", images)
    mas, own = MAS(form=form, images=tmp_path / "images.npy"), MAS(form=form)
    seen = run(tiny(2, setting="task"), mas)
    run(tiny(2, setting="task"), own)
    batch = row_of(seen.images[1], 0)
    x = torch.from_numpy(images).double() / 255
    batch.x, batch.task = x, torch.ones(13, dtype=torch.int64)
    batch.y = torch.zeros(13, dtype=torch.int64)
    net, name = copy.deepcopy(seen.model).eval(), "backbone.net.1.weight"
    if form == "global":
        wanted = by_single_images(net, batch, torch.arange(6) >= 3)[name]
    else:
        a = x.flatten(1)
        wanted = torch.relu(net.backbone.net[1](a)).T @ a / 13
    new = mas.penalties.precision[name] - seen.importance[1][name]
    assert torch.allclose(new, wanted.detach(), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(mas.penalties.precision[name], own.penalties.precision[name], rtol=0.01)


def test_images_can_be_named_in_a_config_and_found_by_a_resume(tiny: Callable[..., Scenario], tmp_path: Path) -> None:
    file = tmp_path / "images.npy"
    np.save(file, np.full((3, 1, 8, 8), 7, np.uint8))
    scenario = {"name": "split-digits", "experiences": 5, "limit": 4}
    plugin = {"mas": {"images": str(file), "samples": 2}}
    learn(scenario, plugin, model={"name": "mlp", "hidden": [4]}, epochs=1, output=str(tmp_path / "run"))
    assert f"images: {file}" in (tmp_path / "run" / "config.yaml").read_text()
    assert clframe.load(tmp_path / "run")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("wrong", ["missing", "shape", "flat", "scalar", "empty", "pickle", "text", "npz", "strings"])
def test_images_that_cannot_be_used_are_refused(wrong: str, tiny: Callable[..., Scenario], tmp_path: Path) -> None:
    """Before training, in one sentence with the path; nothing is unpickled."""
    file = tmp_path / "images.npy"
    arrays: dict[str, Any] = {
        "shape": np.zeros((3, 1, 4, 5), np.uint8),
        "flat": np.zeros((3, 16), np.uint8),
        "scalar": np.zeros(()),
        "empty": np.zeros((0, 1, 4, 4)),
        "strings": np.full((3, 1, 4, 4), "x"),
        "pickle": np.array([Bomb()], dtype=object),
    }
    if wrong in arrays:
        np.save(file, arrays[wrong], allow_pickle=True)
    elif wrong == "text":
        file.write_text("no images")
    elif wrong == "npz":
        with file.open("wb") as stream:
            np.savez(stream, x=np.zeros((3, 1, 4, 4)))
    steps: list[Any] = []
    with pytest.raises((DataError, UsageError)) as refused:
        run(tiny(2), MAS(images=file), listeners=[steps.append])
    assert steps == []
    text = str(refused.value)
    assert str(file) in text
    assert text.endswith(".")
    assert "\n" not in text
    if wrong in ("shape", "flat", "scalar"):
        assert re.search(r"`mas\.images`.* are \(.*\), not \(1, 4, 4\)", text)
    assert not Bomb.went_off


class Bomb:
    went_off = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (_explode, ())


def _explode() -> None:
    Bomb.went_off = True


# ----------------------------------------------------------------------- the local form


def test_local_form_is_the_mean_product_of_activities(tiny: Callable[..., Scenario]) -> None:
    """Omega_ij = mean of F_i F_j, layer by layer: after the ReLU, with |x_j| for the input of the first layer."""
    normalised = tiny(1)
    object.__setattr__(normalised.transform, "mean", (0.3,))
    object.__setattr__(normalised.transform, "std", (0.5,))
    mas = MAS(form="local", heads=True)
    seen = run(normalised, mas)
    x, w = seen.images[0].x.flatten(1).double(), seen.weights[0]
    assert (x < 0).any()
    h = torch.relu(x @ w["backbone.net.1.weight"].T + w["backbone.net.1.bias"])
    f = torch.relu(h @ w["backbone.net.3.weight"].T + w["backbone.net.3.bias"])
    z = torch.relu(f @ w["head.0.weight"].T + w["head.0.bias"])
    wanted = {
        "backbone.unused": torch.zeros(1, dtype=torch.float64),
        "backbone.net.1.weight": h.T @ x.abs() / len(x),
        "backbone.net.1.bias": h.mean(0),
        "backbone.net.3.weight": f.T @ h / len(x),
        "backbone.net.3.bias": f.mean(0),
        "head.0.weight": z.T @ f / len(x),
        "head.0.bias": z.mean(0),
    }
    assert apart(mas.penalties.precision, wanted) < 1e-9
    assert all(value.max() > 1e-3 for name, value in wanted.items() if name != "backbone.unused")


def test_local_form_of_convolutions(tiny: Callable[..., Scenario]) -> None:
    """Of each image the sum over positions of the output times the pixel that the weight meets there, unfolded."""
    mas = MAS(form="local")
    seen = run(tiny(2), mas, model=convolutions(), lr=0.01)
    total: Weights = {}
    for batch, w in zip(seen.images, seen.weights, strict=True):
        x = batch.x.double()
        first, second = (w[f"backbone.net.{k}.weight"] for k in (0, 2))
        a = torch.relu(functional.conv2d(x, first, w["backbone.net.0.bias"], padding=1))
        b = torch.relu(functional.conv2d(a, second, w["backbone.net.2.bias"], stride=2))
        parts = {"0": (x, a, {"kernel_size": 3, "padding": 1}), "2": (a, b, {"kernel_size": (3, 2), "stride": 2})}
        for layer, (into, out, how) in parts.items():
            columns = functional.unfold(into, **how)
            products = torch.einsum("nop,nip->noi", out.flatten(2), columns).abs().mean(0)
            for kind, value in (("weight", products), ("bias", out.sum((2, 3)).mean(0))):
                name = f"backbone.net.{layer}.{kind}"
                total[name] = total.get(name, 0) + value.view_as(w[name])
    got = {n: value for n, value in mas.penalties.precision.items() if n != "backbone.unused"}
    assert apart(got, total) < 1e-9
    assert all(value.max() > 1e-3 for value in total.values())


# ----------------------------------------------------------------- what a pass leaves behind


@pytest.mark.parametrize("form", ["global", "local"])
def test_nothing_is_left_on_the_model_and_running_statistics_stay(form: str, tiny: Callable[..., Scenario]) -> None:
    """Guards against importance that is found in train mode, which moves running statistics (FACIL, Avalanche)."""
    seen: dict[str, Any] = {}

    class Look(Plugin):
        """Called before and after `mas` by its place among the plugins."""

        def __init__(self) -> None:
            pass

        @hookimpl
        def after_experience(self, run: Run) -> None:
            model = run.model
            hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
            modes = [m.training for m in model.modules()]
            state = {name: value.clone() for name, value in model.state_dict().items()}
            flags = [p.requires_grad for p in model.parameters()]
            seen[self.name] = (state, modes, hooks, flags, torch.get_rng_state())

    class Before(Look):
        name = "before"

    class After(Look):
        name = "after"

    learn(tiny(1), Before(), MAS(form=form), After(), model=cnn_small())
    before, after = seen["before"], seen["after"]
    assert any(name.endswith("running_mean") for name in before[0])
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert before[1:4] == after[1:4]
    assert all(before[1])
    assert torch.equal(before[4], after[4])


# ------------------------------------------------------------------- large penalties and refusals


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_learns_beside_a_penalty_that_it_would_overshoot(momentum: float, tiny: Callable[..., Scenario]) -> None:
    mas = MAS(lambda_=1e5)
    witness = run(tiny(2), mas, epochs=10, momentum=momentum)
    assert 0.1 * 2e5 * max(p.max().item() for p in mas.penalties.precision.values()) > 2 * (1 + momentum)
    assert witness.messages() == []
    assert all(p.isfinite().all() for p in witness.model.parameters())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lambda", -1.0),
        ("lambda", float("nan")),
        ("form", "locally"),
        ("samples", 0),
        ("samples", 2.5),
        ("images", 3),
        ("heads", "no"),
        ("alpha", 0.5),
    ],
)
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"`mas\.{option}`"):
        MAS(**{option: value})


def test_a_finished_run_is_loaded_without_its_images(tiny: Callable[..., Scenario], tmp_path: Path) -> None:
    images = tmp_path / "images.npy"
    np.save(images, np.zeros((4, 1, 4, 4), dtype=np.uint8))
    results = learn(tiny(2), MAS(images=images), model="mlp", epochs=1, output=str(tmp_path / "run"))
    images.unlink()
    loaded = clframe.load(tmp_path / "run", plugins=[MAS(images=images)])
    test = tiny(2)[1].test
    assert (loaded(test.x).argmax(1) == test.y).sum() / len(test) == pytest.approx(results.accuracy["class"][1][1])
