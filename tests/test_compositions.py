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
from clframe.testing import Recorder, refused

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


class Witness(Recorder):
    """A recorder of two experiences, of which the second is compared."""

    @hookimpl
    def before_experience(self, run):
        super().before_experience(run)
        self.logits = run.logits

    @property
    def terms(self) -> set[str]:
        """The names of all loss terms."""
        return {name for step in self.steps for name in step.losses}

    @property
    def end(self) -> dict[str, Tensor]:
        """The network after the last step of the second experience."""
        return self.phase_ends[1, "train"]


def built(*names: str) -> list[Plugin]:
    return [registry.build_plugin(name, OPTIONS.get(name, {})) for name in names]


def setting_of(*names: str) -> str:
    """A setting that all of them serve; if there is none, one that the first serves."""
    served = [registry.plugin_class(n).serves for n in names]
    return next((s for s in ("class", "task", "domain") if all(s in given for given in served)), served[0][0])


def learn(scenario: Any, *plugins: Plugin, **settings: Any) -> Witness:
    witness = Witness()
    testing.learn(scenario, *plugins, witness, **{"model": ConvFC(), **TRAIN, **settings})
    return witness


SINGLES: dict[tuple[str, str, str | None], Witness] = {}


def alone(tiny: Any, name: str, setting: str, logits: str | None = None) -> Witness:
    """The run of one method by itself, under given logits; each is run once."""
    key = name, setting, logits
    if key not in SINGLES:
        SINGLES[key] = learn(stream(tiny, setting), *built(name), logits=logits)
    return SINGLES[key]


def stream(tiny: Any, setting: str) -> clframe.Scenario:
    """Two experiences of three classes each."""
    return tiny(experiences=2, shape=(1, 8, 8), setting=setting)


def refusal(run: Run, a: Plugin, b: Plugin) -> tuple[str, ...]:
    """What the refusal of the pair must name, by what both declare, after the kind of reason; none: it may run."""
    if a.isolates and b.isolates:
        return "isolates", f"`{a.name}` and `{b.name}`"
    for one, other in ((a, b), (b, a)):
        if one.isolates and other.name != "warm-up":
            return "isolates", f"`{other.name}`", f"beside `{one.name}`"
    for hook in compose.OWNED:
        if all(hook in contract.hooks_of(type(plugin)) and plugin.owns(hook) for plugin in (a, b)):
            return "owned", f"`{hook}`", f"`{a.name}` and `{b.name}`"
    for one, other in ((a, b), (b, a)):
        if other.name in one.conflicts or one.name == "joint":
            return "joint", f"`{one.name}`", f"cannot run beside `{other.name}`"
    wanted = [plugin.wanted_logits(run) for plugin in (a, b)]
    if None not in wanted and wanted[0] != wanted[1]:
        form = f" (form `{b.form}`)" if b.form else ""
        return "logits", f"`{b.name}`{form}", f"`train.logits={wanted[1]}`", f"`{a.name}` for `{wanted[0]}`"
    return ()


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=map("+".join, PAIRS))
def test_a_pair_has_the_effect_of_both_or_is_refused(tiny, context, a: str, b: str):
    """Two experiences; the order of naming is without effect, but for rounding."""
    setting = setting_of(a, b)
    reason = refusal(context(setting, *built(a, b)), *built(a, b))
    if reason:
        with refused(*reason[1:]):
            learn(stream(tiny, setting), *built(a, b))
        return
    pair, reverse = learn(stream(tiny, setting), *built(a, b)), learn(stream(tiny, setting), *built(b, a))
    one, other = alone(tiny, a, setting), alone(tiny, b, setting)
    absent = ABSENT.get((a, b), set())
    assert absent <= one.terms | other.terms
    assert pair.terms == (one.terms | other.terms) - absent
    assert pair.phase_ends.keys() == one.phase_ends.keys() | other.phase_ends.keys()  # the phases of both
    assert all(value.isfinite() for step in pair.steps for value in step.losses.values())
    end = pair.end
    assert all(value.isfinite().all() for value in end.values())
    for name, value in reverse.end.items():
        torch.testing.assert_close(value, end[name], rtol=1e-4, atol=1e-6)

    if "feature-extraction" in (a, b) and NOTHING_TO_HOLD & {a, b}:
        frozen = alone(tiny, "feature-extraction", setting, pair.logits)
        assert testing.differing(end, frozen.end) == []
    else:
        for single in (one, other):
            assert testing.differing(end, single.end) != []
    changed = pair.changed(1)
    heads = {name for name in end if name.startswith("head.")}
    if "feature-extraction" in (a, b):
        assert changed == heads - {"head.0.weight", "head.0.bias"}
    elif "finetune-fc" in (a, b):
        assert changed == {"backbone.fc.weight", "backbone.fc.bias"} | heads - {"head.0.weight", "head.0.bias"}
    elif "lfl" in (a, b):
        assert changed == end.keys() - {"head.0.weight", "head.0.bias"}
    if "warm-up" in (a, b) and not {a, b} & ISOLATING:
        assert pair.changed_in_phase(1, "warm-up") == heads - {"head.0.weight", "head.0.bias"}


def test_the_pairs_are_told_apart_as_they_should_be(context):
    """The test above would see a refusal that nobody meant, or one that is missing."""
    compose = {"a-ltm", "der", "er", "ewc", "feature-extraction", "finetune-fc", "lfl", "lwf", "lwm", "mas", "si"}
    compose |= {"always-be-dreaming", "deep-inversion", "generative-replay", "icarl", "warm-up"}
    two_losses, other_logits = {"always-be-dreaming"}, {"deep-inversion", "lwf", "lwm"}
    assert {"channel-gating", "duplicate", "hat", "packnet", "piggyback"} == ISOLATING
    for a, b in PAIRS:
        if {a, b} & ISOLATING:
            assert bool(refusal(context("task", *built(a, b)), *built(a, b))) == ("warm-up" not in (a, b))
        elif "icarl" in (a, b) and (two_losses | other_logits) & {a, b}:
            assert refusal(context("class", *built(a, b)), *built(a, b))
        elif {a, b} <= compose:
            assert refusal(context(setting_of(a, b), *built(a, b)), *built(a, b)) == ()
        elif "joint" in (a, b):
            assert refusal(context(setting_of(a, b), *built(a, b)), *built(a, b))


def test_two_owners_are_refused_and_one_beside_a_form_that_owns_nothing_runs(tiny):
    class Own(Plugin):
        name = "own-loss"

        @hookimpl
        def base_loss(self, run, batch, outputs):
            return 0.5 * run.loss(batch, outputs)

    for options in ({"form": "mc"}, {"balance": True}):
        with refused("`base_loss`", "`lwf` and `own-loss`"):
            learn(stream(tiny, "class"), registry.build_plugin("lwf", options), Own())
    witness = learn(stream(tiny, "class"), Own(), *built("lwf", "ewc"))
    assert witness.terms == {"base", "lwf", "ewc"}


@pytest.mark.parametrize(("form", "wanted"), [("all", "all"), ("seen", "seen"), ("mc", "all")])
def test_methods_that_are_made_for_other_logits_are_refused(tiny, form: str, wanted: str):
    with refused("`lwm`", "`train.logits=current`", f"`lwf` for `{wanted}`"):
        learn(stream(tiny, "class"), registry.build_plugin("lwf", {"form": form}), *built("lwm"))
    with refused(f"`lwf` (form `{form}`)", f"`train.logits={wanted}`", "`lwm` for `current`"):
        learn(stream(tiny, "class"), *built("lwm"), registry.build_plugin("lwf", {"form": form}))


def test_a_method_and_a_user_who_want_other_logits_are_refused(tiny):
    with refused("`lwf`", "`train.logits=current`", "`train.logits` is seen"):
        learn(stream(tiny, "class"), *built("ewc", "lwf"), logits="seen")
    with refused("`lwf`", "`train.logits=own`", "`train.logits` is all"):
        learn(stream(tiny, "task"), *built("lwf"), logits="all")
    with pytest.raises(UsageError) as caught:
        learn(stream(tiny, "class"), *built("lwm", "lwf"), logits="all")
    for name, problem in zip(("lwm", "lwf"), caught.value.problems, strict=True):
        assert all(word in problem for word in (f"`{name}`", "`train.logits=current`", "`train.logits` is all"))


def test_three_methods_are_stopped_and_resumed_to_the_same_bits(tiny, tmp_path: Path):
    names = ("ewc", "lwf", "si")
    train = {"optimizer": "adam", "lr": 0.01, "keep_optimizer": True}
    witnesses: list[Witness] = []

    def begin(folder: Path) -> None:
        witnesses.append(learn(tiny(shape=(1, 8, 8)), *built(*names), **train, output=str(folder)))

    def go_on(folder: Path) -> None:
        clframe.resume(folder, scenario=tiny(shape=(1, 8, 8)), model=ConvFC(), plugins=[*built(*names), Witness()])

    testing.stop_and_resume(tmp_path, begin, go_on, places=8)
    assert witnesses[0].terms == {"base", *names}
    assert all(value > 0 for value in witnesses[0].steps[-1].losses.values())


def why(a: str, b: str, context: Any) -> str:
    """``+`` if the pair may run together, else the letter of the reason."""
    reason = refusal(context(setting_of(a, b), *built(a, b)), *built(a, b))
    if not reason:
        return "+"
    if {a, b} & ISOLATING:
        return "p"
    if "joint" in (a, b):
        return "j"
    return {"logits": "z", "owned": "o"}[reason[0]]


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
