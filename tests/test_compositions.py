"""Methods side by side: every pair that may run together does, with the effect of both; every other is refused."""

from __future__ import annotations

import importlib.util
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clframe
from clframe import Plugin, compose, contract, hookimpl, registry, testing
from clframe.context import Run
from clframe.errors import UsageError

CLASSES = {name: registry.plugin_class(name) for name in registry.names("plugin")}
METHODS = [name for name, cls in CLASSES.items() if not (cls.observer or cls.variants)]
PAIRS = list(combinations(METHODS, 2))
OPTIONS: dict[str, dict[str, Any]] = {  # where defaults take long
    "always-be-dreaming": {"iterations": 5, "batch_size": 8, "noise": 10, "width": 8},
    "channel-gating": {"classifier_iterations": 5, "size": 12},
    "deep-inversion": {"per_class": 4, "iterations": 5},
    "generative-replay": {"iterations": 5},
}
TRAIN = {"epochs": 1, "batch_size": 12, "optimizer": "sgd", "lr": 0.05}
# terms that a pair lacks, and why: the features that they hold cannot move, nor can the convolution that is looked at
ABSENT = {
    ("feature-extraction", "lfl"): {"lfl"},
    ("feature-extraction", "lwm"): {"lwm/distill", "lwm/attend"},
}
# beside feature extraction these have nothing to hold: all that is old is frozen
NOTHING_TO_HOLD = {"a-ltm", "ewc", "finetune-fc", "lfl", "lwf", "lwm", "mas", "si"}
ISOLATING = {name for name in METHODS if registry.plugin_class(name).isolates}
END = "choose other forms, or run them apart."
USER_END = "leave that out, or choose another form."


class ConvFC(nn.Module):
    """A convolution with a batch norm, and a fully connected layer: what suits every method."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(4)
            self.relu, self.last = nn.ReLU(), nn.ReLU()
            self.fc = nn.Linear(64, 8)

    def features(self, x: Tensor) -> Tensor:
        return self.last(self.fc(self.relu(self.norm(self.conv(x))).flatten(1)))


class Witness(Plugin):
    """Keeps what the second experience was made of: terms, phases, and the weights around them."""

    name = "witness"
    observer = True

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}
        self.ends: dict[str, dict[str, Tensor]] = {}

    @hookimpl
    def before_experience(self, run, experience):
        self.ends["before"] = {name: value.clone() for name, value in run.model.state_dict().items()}
        self.logits = run.logits

    @hookimpl
    def after_step(self, run, batch):
        for name, value in run.losses.items():
            self.losses.setdefault(name, []).append(value.item())
        if run.experience.index == 1:
            self.ends[run.phase.name] = {name: value.clone() for name, value in run.model.state_dict().items()}

    def changed(self, phase: str = "train") -> set[str]:
        """What of the network changed from the beginning of the experience to the end of the phase."""
        before = self.ends["before"]
        return {name for name, v in self.ends[phase].items() if not torch.equal(v, before[name])}


def built(*names: str) -> list[Plugin]:
    return [registry.build_plugin(name, OPTIONS.get(name, {})) for name in names]


def setting_of(*names: str) -> str:
    """A setting that all of them serve; if there is none, one that the first serves."""
    served = [registry.plugin_class(n).serves for n in names]
    return next((s for s in ("class", "task", "domain") if all(s in given for given in served)), served[0][0])


def learn(scenario: Any, plugins: list[Plugin], train: Any = None, **run: Any) -> Witness:
    witness = Witness()
    clframe.run(scenario, ConvFC(), [*plugins, witness], train=TRAIN | (train or {}), run={"tensorboard": False, **run})
    return witness


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether the networks with these weights have other layers, or other weights."""
    return a.keys() != b.keys() or any(not torch.equal(value, b[name]) for name, value in a.items())


SINGLES: dict[tuple[str, str, str | None], Witness] = {}


def alone(tiny: Any, name: str, setting: str, logits: str | None = None) -> Witness:
    """The run of one method by itself, under given logits; each is run once."""
    key = name, setting, logits
    if key not in SINGLES:
        SINGLES[key] = learn(stream(tiny, setting), built(name), {"logits": logits})
    return SINGLES[key]


def stream(tiny: Any, setting: str) -> clframe.Scenario:
    """Two experiences of three classes each."""
    return tiny(experiences=2, shape=(1, 8, 8), setting=setting)


def refusal(run: Run, a: Plugin, b: Plugin) -> tuple[str, ...]:
    """The sentences that refuse the pair, by what both declare; none: it may run."""
    if a.isolates and b.isolates:
        both = f"`{a.name}` and `{b.name}` each decide what of the network a task may use; leave out one of them."
        return (both,)
    for one, other in ((a, b), (b, a)):
        if one.isolates and other.name != "warm-up":
            nothing = (
                f"`{other.name}` has nothing to do beside `{one.name}`, where nothing that was learned can change; "
            )
            return (nothing + "leave out one of them.",)
    for hook in compose.OWNED:
        if all(hook in contract.hooks_of(type(plugin)) and plugin.owns(hook) for plugin in (a, b)):
            return (f"`{hook}` is answered by `{a.name}` and `{b.name}`; a run can have only one of them.",)
    for one, other in ((a, b), (b, a)):
        if other.name in one.conflicts:
            return (f"The plugin `{one.name}` cannot run beside `{other.name}`; leave out one of them.",)
        if one.name == "joint":
            return (f"`joint` trains on all data and cannot run beside `{other.name}`; run them one by one.",)
    wanted = [plugin.wanted_logits(run) for plugin in (a, b)]
    if None not in wanted and wanted[0] != wanted[1]:
        form = f" (form `{b.form}`)" if b.form else ""
        made = f"`{b.name}`{form} is made for `train.logits={wanted[1]}`"
        return (f"{made}, but `{a.name}` for `{wanted[0]}`: {END}",)
    return ()


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=map("+".join, PAIRS))
def test_a_pair_has_the_effect_of_both_or_is_refused(tiny, context, a: str, b: str):
    """Two experiences; the order of naming is without effect, but for rounding."""
    setting = setting_of(a, b)
    sentences = refusal(context(setting, *built(a, b)), *built(a, b))
    if sentences:
        with pytest.raises(UsageError) as caught:
            learn(stream(tiny, setting), built(a, b))
        assert caught.value.problems == sentences
        return
    pair, reverse = learn(stream(tiny, setting), built(a, b)), learn(stream(tiny, setting), built(b, a))
    one, other = alone(tiny, a, setting), alone(tiny, b, setting)
    absent = ABSENT.get((a, b), set())
    assert absent <= one.losses.keys() | other.losses.keys()
    assert pair.losses.keys() == (one.losses.keys() | other.losses.keys()) - absent
    assert pair.ends.keys() == one.ends.keys() | other.ends.keys()  # the phases of both
    assert torch.tensor([value for values in pair.losses.values() for value in values]).isfinite().all()
    end = pair.ends["train"]
    assert all(value.isfinite().all() for value in end.values())
    for name, value in reverse.ends["train"].items():
        torch.testing.assert_close(value, end[name], rtol=1e-4, atol=1e-6)

    if "feature-extraction" in (a, b) and NOTHING_TO_HOLD & {a, b}:
        frozen = alone(tiny, "feature-extraction", setting, pair.logits)
        assert all(torch.equal(value, frozen.ends["train"][name]) for name, value in end.items())
    else:
        for single in (one, other):
            assert differ(end, single.ends["train"])
    changed = pair.changed()
    heads = {name for name in end if name.startswith("head.")}
    if "feature-extraction" in (a, b):
        assert changed == heads - {"head.0.weight", "head.0.bias"}
    elif "finetune-fc" in (a, b):
        assert changed == {"backbone.fc.weight", "backbone.fc.bias"} | heads - {"head.0.weight", "head.0.bias"}
    elif "lfl" in (a, b):
        assert changed == end.keys() - {"head.0.weight", "head.0.bias"}
    if "warm-up" in (a, b) and not {a, b} & ISOLATING:
        assert pair.changed("warm-up") == heads - {"head.0.weight", "head.0.bias"}


def test_the_pairs_are_told_apart_as_they_should_be(context):
    """The test above would see a refusal that nobody meant, or one that is missing."""
    compose = {"a-ltm", "der", "er", "ewc", "feature-extraction", "finetune-fc", "lfl", "lwf", "lwm", "mas", "si"}
    compose |= {"always-be-dreaming", "deep-inversion", "generative-replay", "icarl", "warm-up"}
    two_losses, other_logits = {"always-be-dreaming"}, {"deep-inversion", "lwf", "lwm"}
    assert {"channel-gating", "duplicate", "hat", "packnet", "piggyback"} == ISOLATING
    for a, b in PAIRS:
        if {a, b} & ISOLATING:
            assert len(refusal(context("task", *built(a, b)), *built(a, b))) == ("warm-up" not in (a, b))
        elif "icarl" in (a, b) and (two_losses | other_logits) & {a, b}:
            assert len(refusal(context("class", *built(a, b)), *built(a, b))) == 1
        elif {a, b} <= compose:
            assert refusal(context(setting_of(a, b), *built(a, b)), *built(a, b)) == ()
        elif "joint" in (a, b):
            assert len(refusal(context(setting_of(a, b), *built(a, b)), *built(a, b))) == 1


def problems(scenario: Any, *plugins: Plugin, **train: Any) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        learn(scenario, list(plugins), train)
    return caught.value.problems


def test_two_owners_are_refused_and_one_beside_a_form_that_owns_nothing_runs(tiny):
    class Own(Plugin):
        name = "own-loss"

        @hookimpl
        def base_loss(self, run, batch, outputs):
            return 0.5 * run.loss(batch, outputs)

    for options in ({"form": "mc"}, {"balance": True}):
        assert problems(stream(tiny, "class"), registry.build_plugin("lwf", options), Own()) == (
            "`base_loss` is answered by `lwf` and `own-loss`; a run can have only one of them.",
        )
    witness = learn(stream(tiny, "class"), [Own(), *built("lwf", "ewc")])
    assert witness.losses.keys() == {"base", "lwf", "ewc"}


@pytest.mark.parametrize(
    ("lwf", "partner", "sentence"),
    [
        ({"form": "all"}, "lwm", f"`lwm` is made for `train.logits=current`, but `lwf` for `all`: {END}"),
        ({"form": "seen"}, "lwm", f"`lwm` is made for `train.logits=current`, but `lwf` for `seen`: {END}"),
        ({"form": "mc"}, "lwm", f"`lwm` is made for `train.logits=current`, but `lwf` for `all`: {END}"),
    ],
)
def test_methods_that_are_made_for_other_logits_are_refused(
    tiny, context, lwf: dict[str, str], partner: str, sentence: str
):
    built_lwf = registry.build_plugin("lwf", lwf)
    assert problems(stream(tiny, "class"), built_lwf, *built(partner)) == (sentence,)
    wanted = built_lwf.wanted_logits(context("class"))
    assert problems(stream(tiny, "class"), *built(partner), registry.build_plugin("lwf", lwf)) == (
        f"`lwf` (form `{lwf['form']}`) is made for `train.logits={wanted}`, but `lwm` for `current`: {END}",
    )


def test_a_method_and_a_user_who_want_other_logits_are_refused(tiny):
    assert problems(stream(tiny, "class"), *built("ewc", "lwf"), logits="seen") == (
        f"`lwf` is made for `train.logits=current`, but `train.logits` is seen: {USER_END}",
    )
    assert problems(stream(tiny, "class"), *built("lwm", "lwf"), logits="all") == (
        f"`lwm` is made for `train.logits=current`, but `train.logits` is all: {USER_END}",
        f"`lwf` is made for `train.logits=current`, but `train.logits` is all: {USER_END}",
    )
    assert problems(stream(tiny, "task"), *built("lwf"), logits="all") == (
        f"`lwf` is made for `train.logits=own`, but `train.logits` is all: {USER_END}",
    )


def test_three_methods_are_stopped_and_resumed_to_the_same_bits(tiny, tmp_path: Path):
    names = ("ewc", "lwf", "si")
    train = {"optimizer": "adam", "lr": 0.01, "keep_optimizer": True}
    witnesses: list[Witness] = []

    def begin(folder: Path) -> None:
        witnesses.append(learn(tiny(shape=(1, 8, 8)), built(*names), train, output=str(folder)))

    def go_on(folder: Path) -> None:
        clframe.resume(folder, scenario=tiny(shape=(1, 8, 8)), model=ConvFC(), plugins=[*built(*names), Witness()])

    testing.stop_and_resume(tmp_path, begin, go_on, places=8)
    assert witnesses[0].losses.keys() == {"base", *names}
    assert all(values[-1] > 0 for values in witnesses[0].losses.values())


def why(a: str, b: str, context: Any) -> str:
    """``+`` if the pair may run together, else the letter of the reason."""
    sentences = refusal(context(setting_of(a, b), *built(a, b)), *built(a, b))
    if not sentences:
        return "+"
    if {a, b} & ISOLATING:
        return "p"
    if "joint" in (a, b):
        return "j"
    return "z" if "train.logits" in sentences[0] else "o"


def test_the_matrix_of_pairs_in_the_documentation_is_what_the_code_does(context):
    """Every pair above has run, or was refused."""
    spec = importlib.util.spec_from_file_location("docs_generate", Path(__file__).parent.parent / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = generate.FOLDER.joinpath("how-to/combine-methods.md").read_text(encoding="utf-8")
    part = page.partition("<!-- generated: pairs -->")[2].partition(generate.END)[0]
    legend, _, header, _, *rows = part.strip().splitlines()
    letters = dict(re.findall(r"`([a-z])`: ([^;]+)[;.]", legend))
    assert letters == generate.REFUSED
    assert header.split(" | ")[0] == f"| 1 `{METHODS[0]}`"
    for k, (name, row) in enumerate(zip(METHODS[1:], rows, strict=True), start=2):
        first, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert first == f"{k} `{name}`"
        assert cells[: k - 1] == [why(other, name, context) for other in METHODS[: k - 1]]
        assert not any(cells[k - 1 :])
