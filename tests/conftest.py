"""Fixtures that several test files share. Tests run on one thread: small networks gain nothing from more."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clframe import Arrays, ImageData, Plugin, Scenario, split_classes, testing
from clframe.context import Run

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported: no test asks the Hub
os.environ["WANDB_MODE"] = "disabled"  # the plugin does nothing in tests that are not about it


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the data sets of the machine that it runs on."""
    monkeypatch.setenv("CLFRAME_DATA", str(tmp_path / "no-data"))


@pytest.fixture
def tiny_arrays() -> Callable[..., Arrays]:
    return testing.tiny_arrays


@pytest.fixture
def tiny() -> Callable[..., Scenario]:
    """Builds a scenario of 3 experiences of 2 classes, 24 training images each; takes options of split_classes."""

    def build(experiences: int = 3, **options: object) -> Scenario:
        shape = options.pop("shape", (1, 4, 4))
        arrays = testing.tiny_arrays(shape=shape)
        return split_classes("tiny", arrays, experiences=experiences, **options)

    return build


@pytest.fixture
def context() -> Callable[..., Any]:
    """`context(setting, *plugins)`: what `Plugin.wanted_logits` needs of a run of these."""

    def build(setting: str, *plugins: Plugin) -> Any:
        run = object.__new__(Run)
        run.plugins, run.scenario = plugins, SimpleNamespace(setting=setting)
        return run

    return build


@pytest.fixture
def rows() -> Callable[[int], ImageData]:
    """`rows(n)`: n labelled images of the tiny scenario's shape."""
    return lambda n: ImageData(torch.zeros(n, 1, 4, 4, dtype=torch.uint8), torch.arange(n) % 2)
