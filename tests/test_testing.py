"""Each check of the contract fails where it should, alone, and says why."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clframe import Arrays, Interrupted, Plugin, Scenario, Transform, hookimpl, split_classes, testing
from clframe.model import snapshot
from clframe.testing.plugin_checks import options_of_repr

CHECKS = {check.name: check for check in testing.CHECKS["plugin"]}


def why(subject: testing.Subject, name: str) -> str:
    """Why the check of that name fails."""
    outcome = next(check for check in subject.checks if check.name == name).outcome(subject)
    assert outcome.result == "failed", outcome
    assert "\n" not in outcome.why
    return outcome.why


class Undocumented(Plugin):
    """Has an option that nobody explains."""

    name = "bad"

    def __init__(self, size: int = 1) -> None:
        self.size = size


class Changed(Plugin):
    """Changes the options that it was given.

    Options:
        sizes: a list.
    """

    name = "bad"

    def __init__(self, sizes: list[int] | None = None) -> None:
        self.sizes = sizes

    def __repr__(self) -> str:
        return "Changed(sizes=[1])"


class Stateless(Plugin):
    """Names a state that it never has."""

    name = "bad"
    state = ("anchor",)


class Unmarked(Plugin):
    """Forgets the mark."""

    name = "bad"

    def penalty(self, run):
        return {}


class Raises(Plugin):
    """Raises in one setting."""

    name = "bad"

    @hookimpl
    def before_experience(self, run):
        if run.scenario.setting == "domain":
            raise IndexError("no such\nplace")


class Anything(Plugin):
    """Declares that it serves tasks, and its own refusal is about something else."""

    name = "bad"
    serves = ("task",)

    def problems(self, run):
        raise ValueError("nothing to do with settings")


class Forgetful(Plugin):
    """Counts without declaring it, so that a resume counts anew."""

    name = "bad"

    def __init__(self) -> None:
        self.count = 0

    @hookimpl
    def penalty(self, run):
        self.count += 1
        return {"bad": self.count * sum(p.square().sum() for p in run.model.parameters()) * 1e-3}


class LateState(Plugin):
    """Builds a declared module too late for a resume."""

    name = "bad"
    state = ("net",)

    def __init__(self) -> None:
        self.net: nn.Module | None = None

    @hookimpl
    def before_experience(self, run):
        self.net = nn.Linear(1, 1)


class Unpredictable(Plugin):
    """Its predictor needs what a load does not bring back."""

    name = "bad"
    state = ("shift",)

    def __init__(self) -> None:
        self.shift = 0

    @hookimpl
    def after_experience(self, run):
        self.shift = 1

    @hookimpl
    def predictor(self, run):
        plugin = self

        class Shifted(nn.Module):
            def forward(self, x, task=None):
                return run.model(x, task).logits.roll(plugin.shift, 1)

        return Shifted()


class Global(Plugin):
    """Asks for rows by a number of its own."""

    name = "bad"

    @hookimpl
    def penalty(self, run):
        place = run.plugins.index(self)
        return {"bad": (1 + place) * sum(p.square().sum() for p in run.model.parameters()) * 1e-3}


class Detached(Plugin):
    """A penalty that trains nothing."""

    name = "bad"

    @hookimpl
    def penalty(self, run):
        return {"bad": sum(p.detach().square().sum() for p in run.model.parameters())}


class Misnamed(Plugin):
    """A penalty under another's name."""

    name = "bad"

    @hookimpl
    def penalty(self, run):
        return {"good": sum(p.square().sum() for p in run.model.parameters()) * 1e-3}


class Hooked(Plugin):
    """Leaves a forward hook."""

    name = "bad"

    @hookimpl
    def before_run(self, run):
        run.model.backbone.register_forward_hook(lambda *_: None)


class Asleep(Plugin):
    """Leaves a module in eval mode."""

    name = "bad"

    @hookimpl
    def after_experience(self, run):
        run.model.backbone.eval()


class Frozen(Plugin):
    """Leaves a parameter frozen."""

    name = "bad"

    @hookimpl
    def before_run(self, run):
        next(run.model.backbone.parameters()).requires_grad_(False)


class Secret(Plugin):
    """Keeps an image in secret."""

    name = "bad"
    state = ("memory",)

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    @hookimpl
    def after_experience(self, run, experience):
        self.memory = experience.train.x[:1].clone()


class SecretNormalized(Secret):
    """Keeps it as the network sees it."""

    @hookimpl
    def after_experience(self, run, experience):
        self.memory = run.batch(experience.train.rows(slice(1))).x.clone()


class Growing(Plugin):
    """Keeps a teacher of each experience."""

    name = "bad"
    state = ("teachers",)

    def __init__(self) -> None:
        self.teachers: list[Any] = []

    @hookimpl
    def after_experience(self, run):
        self.teachers.append(snapshot(run.model))


@pytest.mark.parametrize(
    ("bad", "name", "sentence"),
    [
        (Undocumented, "options are documented", "option `size` .* add it under `Options:`"),
        (Changed, "options are documented", r"the options \{'sizes': \[1\]\}: store"),
        (Stateless, "it learns", r"`state` names \['anchor'\]"),
        (Unmarked, "hooks are marked", "`penalty` of plugin `bad` .* lacks"),
        (Raises, "it learns", "setting `domain` .* `bad` .* `before_experience`: IndexError: no such place"),
        (Anything, "other settings are refused", "ValueError: nothing to do with settings"),
        (Forgetful, "a stopped run resumes to the same bits", r"another results\.json .* in `state`"),
        (LateState, "a stopped run resumes to the same bits", "State `net` of plugin `bad` .* `before_run` or `grow`"),
        (Unpredictable, "a finished run loads and predicts", "right in .* name in `predictor_state`"),
        (
            Global,
            "a plugin that does nothing changes nothing beside it",
            r"`backbone\.net\.0\.weight` .* draw from `run\.rng` only",
        ),
        (Detached, "penalties pull", "penalty `bad` has no gradient"),
        (Misnamed, "penalties pull", "`good` must be named `bad` or `bad/term`"),
        (Hooked, "nothing is left behind", "`backbone` still has hooks"),
        (Asleep, "nothing is left behind", "is left in eval mode"),
        (Frozen, "nothing is left behind", "`.*` is left frozen: set `requires_grad` back in `after_run`"),
        (
            Secret,
            "it keeps no image that it does not declare",
            r"image .* tensors\.safetensors: .* `keeps_images = True`",
        ),
        (SecretNormalized, "it keeps no image that it does not declare", r"image .* tensors\.safetensors: "),
        (Growing, "its state does not grow", "bytes in .* experiences 1 to 4: .* `grows = True`"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_told_how(bad: type[Plugin], name: str, sentence: str):
    assert re.search(sentence, why(testing.plugin(bad), name))


def test_the_options_of_a_repr_are_read_without_running_it():
    text = "EWC(a=[1, None], b=PosixPath('x'), c={'k': (PosixPath('y'), -1.0)})"
    assert options_of_repr(text, "EWC") == {"a": [1, None], "b": Path("x"), "c": {"k": (Path("y"), -1.0)}}
    for wrong in ("EWC(", "Other(a=1)", "EWC(1)", "EWC(a=__import__('os'))", "EWC(a=b)"):
        with pytest.raises(ValueError, match=r"."):
            options_of_repr(wrong, "EWC")


def test_what_a_plugin_declares_is_not_looked_at():
    class Keeping(Secret):
        keeps_images = True

    class Grown(Growing):
        grows = True

    for cls, name in ((Keeping, "it keeps no image that it does not declare"), (Grown, "its state does not grow")):
        outcome = CHECKS[name].outcome(testing.plugin(cls))
        assert (outcome.result, outcome.why[:12]) == ("not run", "It declares ")
        CHECKS[name](testing.plugin(cls))


def test_a_check_that_is_called_raises():
    with pytest.raises(testing.Broken, match=r"option `size` .* `Options:`"):
        CHECKS["options are documented"](testing.plugin(Undocumented))


def test_after_a_first_run_that_fails_nothing_else_is_trained():
    found = {o.check.name: o for o in testing.outcomes(testing.plugin(Raises))}
    assert [name for name, o in found.items() if o.result == "failed"] == ["it learns"]
    assert {o.why for o in found.values() if o.check.needs_run and o.result == "not run"} == {
        "`it learns` must pass first."
    }


def test_an_interruption_by_the_user_is_no_outcome():
    class Interrupting(Plugin):
        """Is stopped."""

        name = "bad"

        @hookimpl
        def before_run(self, run):
            raise Interrupted("Stopped.", 2)

    with pytest.raises(Interrupted):
        list(testing.outcomes(testing.plugin(Interrupting)))


def test_every_check_says_what_it_asks():
    for kind, checks in testing.CHECKS.items():
        assert len({check.name for check in checks}) == len(checks)
        assert all(check.why.endswith(".") and check.needs_run in (True, False) for check in checks), kind


# scenarios and backbones

X, Y = torch.randint(0, 256, (24, 1, 4, 4), dtype=torch.uint8), torch.arange(24) % 4


def stream(x: Tensor = X, y: Tensor = Y, **changes: Any) -> Scenario:
    built = split_classes("made", Arrays("made", x, y, x, y, tuple("abcd"), Transform()), experiences=2)
    for name, value in changes.items():
        setattr(built, name, value)
    return built


def good() -> Scenario:
    """Four classes."""
    return stream()


def mislabelled() -> Scenario:
    """Declares other classes than its images have."""
    return stream(classes=[(0, 2), (1, 3)])


def random_images() -> Scenario:
    """Other images each time."""
    return stream(torch.randint(0, 256, X.shape, dtype=torch.uint8))


def strange_shape() -> Scenario:
    """Declares another shape."""
    return stream(input_shape=(1, 5, 5))


def unsummed() -> Scenario:
    """Has no checksum."""
    return stream(checksum="")


@pytest.mark.parametrize(
    ("build", "name", "sentence"),
    [
        (lambda: stream(), "options are documented", "`<lambda>` has no docstring"),
        (
            strange_shape,
            "its images are what it says",
            "The train images of experience 1 of 2 are (1, 4, 4), not as `input_shape`",
        ),
        (
            mislabelled,
            "its images are what it says",
            "The label [1] in the train images of experience 1 of 2 is not one of its classes",
        ),
        (random_images, "it is the same each time", "different checksums"),
        (unsummed, "it is the same each time", "no `checksum`"),
        (random_images, "a stopped run on it resumes to the same bits", "depend on its options alone"),
    ],
)
def test_a_scenario_that_breaks_the_contract_is_told_how(build: Callable[..., Scenario], name: str, sentence: str):
    assert sentence in why(testing.scenario(build), name)


@pytest.mark.parametrize(
    "subject", [testing.scenario(good), testing.scenario("permuted-digits"), testing.backbone("mlp")]
)
def test_what_holds_to_the_contract_passes(subject: testing.Subject):
    assert {outcome.result for outcome in testing.outcomes(subject)} == {"passed"}


class Net(nn.Module):
    """A backbone that may be broken."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault, self.width, self.calls = fault, 3 + (fault == "width"), 0
        self.layer = nn.Linear(3 * 32 * 32, 3)
        self.idle = nn.Linear(1, 1) if fault == "idle" else None

    def features(self, x: Tensor) -> Tensor:
        self.calls += self.training
        y = self.layer(x.flatten(1))
        y = y - y.mean(0) if self.fault == "beside" else y
        return y * (1 + self.calls % 7) if self.fault == "counts" else y


@pytest.mark.parametrize(
    ("fault", "name", "sentence"),
    [
        ("width", "its features are as wide as it says", "`features` gives [5, 3] for 5 images, and `width` is 4"),
        (
            "beside",
            "its features are as wide as it says",
            "depend on the others beside it",
        ),
        ("idle", "every parameter learns", "`idle.weight` gets no gradient"),
        ("counts", "its stopped run resumes to the same bits", "parameters or buffers"),
    ],
)
def test_a_backbone_that_breaks_the_contract_is_told_how(fault: str, name: str, sentence: str):
    def build(input_shape: Any) -> nn.Module:
        return Net(fault)

    assert sentence in why(testing.backbone(build), name)
