"""The contract of `clframe.testing`, held by every plugin that is installed, and what is asked of built-ins besides."""

from __future__ import annotations

from typing import Any

import pytest

from clframe import Plugin, UsageError, contract, registry, run, testing
from clframe.testing import Recorder

NAMES = [name for name in registry.names("plugin") if not registry.plugin_class(name).variants]
CHECKS = testing.CHECKS["plugin"]
# options that make a plugin fit the tiny scenario, where its defaults do not, or take long
SMALL: dict[str, dict[str, Any]] = {
    "always-be-dreaming": {"iterations": 10, "batch_size": 8, "noise": 10, "width": 8},
    "channel-gating": {"classifier_iterations": 10, "size": 12},
    "deep-inversion": {"per_class": 4, "iterations": 10},
    "der": {"size": 10},
    "er": {"size": 10},
    "generative-replay": {"hidden": [16], "z": 4, "iterations": 6},
    "icarl": {"size": 24},
}
MODELS: dict[str, str] = {"finetune-fc": "mlp-100"}  # of those that `cnn-small` does not suit
# methods that act on what was learnt before leave the first experience as fine-tuning does
LIKE_FINETUNING_AT_FIRST = {
    "a-ltm",
    "always-be-dreaming",
    "deep-inversion",
    "duplicate",
    "ewc",
    "feature-extraction",
    "finetune-fc",
    "generative-replay",
    "lfl",
    "lwf",
    "lwm",
    "mas",
    "piggyback",
    "si",
    "tensorboard",
    "wandb",
    "warm-up",
}
# what leaves a check nothing to look at: the plugin says so, or has none of it
NOT_RUN = {
    "other settings are refused": lambda cls: len(cls.serves) == 3,
    "penalties pull": lambda cls: "penalty" not in contract.hooks_of(cls),
    "it keeps no image that it does not declare": lambda cls: cls.keeps_images,
    "its state does not grow": lambda cls: not cls.state or "domain" not in cls.serves,
}


def subject(name: str) -> testing.Subject:
    return testing.plugin(name, SMALL.get(name), MODELS.get(name, testing.MODEL))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_the_contract(check: testing.Check, name: str):
    outcome = check.outcome(subject(name))
    nothing_to_see = NOT_RUN.get(check.name, lambda cls: False)(registry.plugin_class(name))
    assert (outcome.result, outcome.why if outcome.result == "failed" else "") == (
        "not run" if nothing_to_see else "passed",
        "",
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_is_built_without_options_and_cited_and_its_hooks_are_documented(name: str):
    cls = registry.plugin_class(name)
    assert cls().name == name
    assert cls.observer or cls.citation
    assert all(getattr(cls, hook).__doc__ for hook in contract.hooks_of(cls))
    with pytest.raises(UsageError, match=f"`{name}.nonsense` is not an option"):
        cls(**{"nonsense": 1})


@pytest.mark.parametrize("name", sorted(LIKE_FINETUNING_AT_FIRST & set(NAMES)))
def test_the_first_experience_is_learnt_as_without_it(name: str, context):
    """A method that is made for other logits is compared with fine-tuning under these."""
    setting, model = testing.serves(subject(name)), subject(name).model
    plugin, with_it, without = subject(name).plugin(), Recorder(), Recorder()
    testing.learn(testing.tiny(setting), plugin, with_it, model=model)
    wanted = plugin.wanted_logits(context(setting, plugin))
    testing.learn(testing.tiny(setting), without, model=model, logits=wanted)
    assert testing.differing(with_it.after[0], without.after[0]) == []


def test_a_plugin_that_serves_tasks_only_is_refused_elsewhere(tiny):
    class TaskOnly(Plugin):
        name = "task-only"
        serves = ("task",)

    with pytest.raises(UsageError, match="`task-only` cannot serve the setting `class` of `tiny`; it serves `task`"):
        run(tiny(), plugins=[TaskOnly()])


@pytest.mark.parametrize("name", [n for n in NAMES if not registry.plugin_class(n).state])
def test_a_plugin_without_state_serves_a_second_run_as_a_new_one_does(name: str):
    """Such an object is not refused in another run, so nothing of the first may be left in it."""
    setting, plugin = testing.serves(subject(name)), subject(name).plugin()
    recorders = [Recorder(), Recorder()]
    for recorder in recorders:
        testing.learn(testing.tiny(setting), plugin, recorder, model=subject(name).model)
    assert len(recorders[0].after) > 1
    for first, second in zip(recorders[0].after, recorders[1].after, strict=True):
        assert testing.differing(first, second) == []
