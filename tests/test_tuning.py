"""Choosing hyper-parameters: what is searched, what a tuning run is given, and that nothing but the study decides."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch

from clframe import Scenario, registry, testing
from clframe.data.scenario import Part
from clframe.options import Search, fields_of, options_of, searched, validated
from clframe.settings import TrainSettings

NAMES = [name for name in registry.names("plugin") if not registry.plugin_class(name).variants]
# options that make a plugin cheap on the tiny scenario
SMALL: dict[str, dict[str, Any]] = {
    "always-be-dreaming": {"iterations": 2, "batch_size": 8, "noise": 10, "width": 8},
    "channel-gating": {"classifier_iterations": 2, "size": 12, "sparsity_after": 0.0},
    "deep-inversion": {"per_class": 2, "iterations": 2},
    "der": {"size": 10},
    "er": {"size": 10},
    "generative-replay": {"hidden": [8], "z": 4, "iterations": 2},
    "icarl": {"size": 24},
}
MODELS = {"finetune-fc": "mlp-100"}  # of those that `cnn-small` does not suit
# weights of terms that train a generator or dreams, not the network that learns the scenario
OF_GENERATORS = {
    "always-be-dreaming": {"confidence", "balance", "statistics", "smooth"},
    "deep-inversion": {"feature", "tv", "l2", "compete"},
}
learn = partial(testing.learn, iterations=3, lr=0.1, optimizer="sgd")


def setting_of(name: str) -> Any:
    """Return a setting that the plugin serves."""
    return registry.plugin_class(name).serves[0]


# ------------------------------------------------------------------------------------ search ranges


def test_every_strength_declares_a_range_that_holds_its_default() -> None:
    for name in NAMES:
        cls = registry.plugin_class(name)
        for option in options_of(cls):
            strength = re.search(r"\bweight of|strength", option.doc) and option.type.startswith("float")
            assert bool(option.search) == bool(strength and option.name not in OF_GENERATORS.get(name, ())), option
            if option.search:
                low, high, default = option.search.low, option.search.high, option.default
                assert low is not None
                assert high is not None
                assert isinstance(default, float)
                assert low <= default <= high
                for end in (low, high):
                    assert validated(cls, {option.name: end}, name)
    (lr,) = (option for option in fields_of(TrainSettings) if option.search)
    assert (lr.name, str(lr.search)) == ("lr", "0.0001 to 1, log")


@pytest.mark.parametrize(
    ("low", "high", "log", "choices"),
    [(None, None, False, ()), (1, None, False, ()), (2, 1, False, ()), (0, 1, True, ()), (0, 1, False, (1,))],
)
def test_a_range_that_is_none_is_refused(low: Any, high: Any, log: bool, choices: Any) -> None:
    with pytest.raises(ValueError, match="search"):
        Search(low, high, log, choices)


# ------------------------------------------------------------------- settings of single experiences


@pytest.mark.parametrize("name", [name for name in NAMES if searched(registry.plugin_class(name))])
def test_a_strength_that_each_experience_has_of_its_own_is_that_strength(name: str) -> None:
    """Given to each experience, a value is the option itself, to the bit; another one for the second is not."""
    options = searched(registry.plugin_class(name))
    of_option = {option.name: option for option in options_of(registry.plugin_class(name))}
    values = {option: of_option[option].search.low for option in options}
    scenario = testing.tiny(setting_of(name))

    def end(per_experience: Any, given: dict[str, Any]) -> dict[str, Any]:
        plugin = {name: {**SMALL.get(name, {}), **given}}
        results = learn(scenario, plugin, model=MODELS.get(name, testing.MODEL), per_experience=per_experience)
        return dict(results.trained.predictor.state_dict())

    named = {f"{name}.{option}": value for option, value in values.items()}
    whole = end(None, values)
    apart = end([named, named], {})
    assert whole.keys() == apart.keys()
    assert all(torch.equal(whole[key], apart[key]) for key in whole)
    other = end([named], {})
    assert any(not torch.equal(whole[key], other[key]) for key in whole)


@pytest.mark.parametrize("keep", [False, True])
def test_a_learning_rate_that_each_experience_has_of_its_own_is_that_rate(keep: bool) -> None:
    def end(per_experience: Any, lr: float) -> dict[str, Any]:
        results = learn(
            testing.tiny(), per_experience=per_experience, lr=lr, keep_optimizer=keep, optimizer="adam", head_lr=0.02
        )
        return dict(results.trained.predictor.state_dict())

    whole, apart = end(None, 0.01), end([{"train.lr": 0.01}, {"train.lr": 0.01}], 0.02)
    assert all(torch.equal(whole[key], apart[key]) for key in whole)
    first = end([{"train.lr": 0.02}], 0.01)
    assert any(not torch.equal(whole[key], first[key]) for key in whole)


def test_other_settings_do_not_change_within_a_run() -> None:
    with testing.refused("`er.size`", "experience 2", "`train.lr`"):
        learn(testing.tiny(), {"er": {"size": 10}}, per_experience=[{}, {"er.size": 5}])
    with testing.refused("`ewc.lambda` is -1", "experience 1"):
        learn(testing.tiny(), "ewc", per_experience=[{"ewc.lambda": -1}])
    with testing.refused("`train.lr` is 'fast'", "experience 1"):
        learn(testing.tiny(), "ewc", per_experience=[{"train.lr": "fast"}])
    with testing.refused("`lwf.lambda`", "`train.lr`"):
        learn(testing.tiny(), "ewc", per_experience=[{"lwf.lambda": 1}])


# -------------------------------------------------------------------------- what a run is not given


def watched(scenario: Scenario, reads: Counter[tuple[int, Part]]) -> Scenario:
    """Return `scenario` with a loader that counts what is read of it."""
    load = scenario._load

    def count(index: int, part: Part) -> Any:
        reads[index, part] += 1
        return load(index, part)

    scenario._load = count
    return scenario


@pytest.mark.parametrize("name", ["fine-tuning", *NAMES])
def test_a_run_that_is_given_less_reads_no_test_image_and_no_later_experience(name: str) -> None:
    """Over all plugins: an instrumented scenario counts what is read, whoever reads it."""
    reads: Counter[tuple[int, Part]] = Counter()
    setting = "class" if name == "fine-tuning" else setting_of(name)
    arrays = testing.tiny_arrays(shape=testing.SHAPE, classes=9, per_class=8)
    scenario = watched(three_experiences(arrays, setting), reads)
    plugins = [] if name == "fine-tuning" else [{name: SMALL.get(name, {})}]
    results = learn(
        scenario,
        *plugins,
        model=MODELS.get(name, testing.MODEL),
        iterations=1,
        val=0.25,
        experiences=2,
        test=False,
    )
    assert set(reads) == {(0, "train"), (1, "train")}
    for matrix in results.accuracy.values():
        assert matrix == [[None, None]] * 2
    for matrix in results.validation.values():
        assert None not in matrix[1]
    assert results.data["test_images"] == [0, 0]
    assert len(results.data["classes"]) == 2


def three_experiences(arrays: Any, setting: Any) -> Scenario:
    """Return three experiences of three classes."""
    from clframe import split_classes

    return split_classes("tiny", arrays, experiences=3, setting=setting)


def test_what_a_run_is_given_is_what_the_whole_scenario_has() -> None:
    """A run of the first experiences holds out and learns what a run of all of them does."""
    whole, part = three_experiences(testing.tiny_arrays(9), "class"), three_experiences(testing.tiny_arrays(9), "class")
    part = part.cut(2, test=False)
    for scenario in (whole, part):
        scenario.hold_out(0.25, 3)
    for i in range(2):
        for name in ("train", "val"):
            assert torch.equal(getattr(whole[i], name).x, getattr(part[i], name).x)
        assert len(part[i].test) == 0
    assert (len(part), part.class_names, part.class_order) == (2, whole.class_names[:6], tuple(range(6)))
    assert part.checksum == whole.checksum
    with pytest.raises(IndexError, match="2 experiences"):
        part[2]
    with pytest.raises(IndexError, match="none with number 2"):
        part._load(2, "train")


def test_a_run_of_which_nothing_would_be_measured_is_refused() -> None:
    with testing.refused("`run.test`", "`train.val`"):
        learn(testing.tiny(), test=False)
    with testing.refused("`run.experiences` is 3", "`tiny` has 2"):
        learn(testing.tiny(), experiences=3)
