"""Names of earlier versions: each is refused in a sentence that says the new one."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import clframe
from clframe import Plugin, UsageError, compose, hookimpl, renamed
from clframe.config import resolve
from clframe.scenarios.folder import split_folder


@pytest.mark.parametrize(("old", "new"), renamed.PUBLIC.items())
def test_an_old_public_name_names_its_successor(old: str, new: str) -> None:
    for module in (clframe, clframe.errors):
        with pytest.raises(ImportError, match=f"{old}` is now called `.*{new}`"):
            getattr(module, old)
        assert getattr(module, new)
    with pytest.raises(ImportError, match=f"`clframe.{old}` is now called `clframe.{new}`"):
        exec(f"from clframe import {old}")


@pytest.mark.parametrize(("old", "new"), renamed.MODULES.items())
def test_a_module_that_moved_names_its_new_place(old: str, new: str) -> None:
    importlib.import_module(new)
    with pytest.raises(ImportError, match=f"`{old}` is now called `{new}`"):
        exec(f"from clframe import {old.partition('.')[2]}")


def test_an_old_attribute_of_a_plugin_is_refused_before_training() -> None:
    class Old(Plugin):
        name = "old"
        settings = ("class",)

    with pytest.raises(UsageError, match="`settings` of plugin `old` is now called `serves`"):
        compose.manager([Old()])


@pytest.mark.parametrize(("old", "new"), renamed.OF_VALUES.items())
def test_an_old_word_for_a_choice_names_its_successor(tmp_path: Path, old: str, new: str) -> None:
    sentence = f"`scenario.mode` is '{old}', which is now called `{new}`."
    scenario = {"name": "split-folder", "path": str(tmp_path)}
    written = tmp_path / "new.yaml"
    written.write_text(f"scenario: {{name: split-table, path: t.csv, mode: {old}}}\n")
    for work in (
        lambda: resolve(scenario=scenario, sets=[f"scenario.mode={old}"]),
        lambda: resolve(scenario={**scenario, "mode": old}),
        lambda: resolve(yaml_file=written),
        lambda: split_folder(path=tmp_path, mode=old),
    ):
        with pytest.raises(UsageError) as caught:
            work()
        assert caught.value.problems == (sentence,)


@pytest.mark.parametrize(("old", "new"), renamed.OF_RUNS.items())
def test_an_old_attribute_of_a_run_names_its_successor(tiny, old: str, new: str) -> None:
    class Old(Plugin):
        name = "old"

        @hookimpl
        def before_experience(self, run) -> None:
            getattr(run, new)
            getattr(run, old)

    with pytest.raises(clframe.RunError, match=f"`run.{old}` is now called `run.{new}`"):
        clframe.run(tiny(experiences=1), "mlp-100", [Old()], train={"iterations": 1})


@pytest.mark.parametrize(("key", "new"), [("name", "`name`"), ("hidden", r"`options\['hidden'\]`")])
def test_a_part_of_a_configuration_read_as_a_mapping_names_the_attribute(key: str, new: str) -> None:
    with pytest.raises(UsageError, match=f"is now called {new}"):
        resolve(model="mlp-100").model[key]
