"""What holds of every method that isolates tasks: stopped and resumed, loaded, refused where no task is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import clframe
from clframe import Plugin, Scenario, registry, testing
from clframe.errors import UsageError
from clframe.model import evaluating
from clframe.testing import SHAPE, Answers, Small, unusual, usual

CASES: list[tuple[str, dict[str, Any], Callable[[], nn.Module]]] = [
    ("channel-gating", {}, usual),
    ("channel-gating", {}, unusual),
    ("duplicate", {"start": "original"}, Small),
    ("duplicate", {"start": "first"}, Small),
    ("hat", {}, usual),
    ("hat", {}, unusual),
    ("packnet", {}, Small),
    ("packnet", {"pretrained": True}, Small),
    ("piggyback", {}, Small),
    ("piggyback", {"norm": "task"}, Small),
    ("piggyback", {"pretrained": True, "norm": "task"}, Small),
    ("piggyback", {"ternary": True}, Small),
]
METHODS = [name for name in registry.names("plugin") if registry.plugin_class(name).isolates]


learn = partial(testing.learn, epochs=1, weight_decay=0.1, keep_optimizer=True)


@pytest.fixture
def stream(tiny: Any) -> Scenario:
    return tiny(shape=SHAPE, setting="task")


def test_every_such_method_is_among_the_cases():
    assert {name for name, _, _ in CASES} == set(METHODS)


@pytest.mark.parametrize(("name", "options", "model"), CASES)
def test_a_stop_anywhere_changes_no_bit(stream: Scenario, tmp_path: Path, name: str, options: Any, model: Any):
    """What is grown is built again before it is loaded, and what was frozen is frozen again."""

    def built() -> list[Plugin]:
        return [registry.build_plugin(name, options)]

    testing.same_after_a_stop(
        tmp_path,
        lambda output: learn(stream, *built(), model=model(), output=output),
        lambda path: clframe.resume(path, scenario=stream, model=model(), plugins=built()),
        f"({name})",
    )


@pytest.mark.parametrize(("name", "options", "model"), CASES)
def test_a_loaded_run_answers_each_task_as_the_run_did(
    stream: Scenario, tmp_path: Path, name: str, options: Any, model: Any
):
    witness = Answers()
    learn(stream, registry.build_plugin(name, options), witness, model=model(), output=str(tmp_path / "run"))
    given = [registry.build_plugin(name, options), Answers()]
    loaded = clframe.load(tmp_path / "run", model=model(), plugins=given)
    for k, experience in enumerate(stream):
        x = experience.test.x
        with evaluating(witness.model), torch.no_grad():
            expected = witness.model(x.float() / 255, torch.full((len(x),), k)).head(k)
        scores = loaded(x, k)
        assert torch.equal(scores[:, list(experience.classes)], expected)
        assert scores.isfinite().sum(1).tolist() == [2] * len(x)
    with pytest.raises(UsageError, match="give `task`"):
        loaded(x)


REFUSED = [(n, s) for n in METHODS for s in ("class", "domain") if s not in registry.plugin_class(n).serves]


@pytest.mark.parametrize(("name", "setting"), REFUSED)
def test_a_setting_that_it_does_not_serve_is_refused(tiny: Any, name: str, setting: str):
    served = " and ".join(f"`{s}`" for s in registry.plugin_class(name).serves)
    with pytest.raises(UsageError, match=f"`{name}` .* `{setting}` .* {served}:"):
        learn(tiny(shape=SHAPE, setting=setting), name, model=usual())
