"""One seed of the digits protocols, within bounds that no seed has been seen to leave; `make bench-full` has the rest.

A run of the same protocol without the method ends at 85 to 97 (task told) or at 20 percent (class-incremental).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from clframe.api import run_config
from clframe.config import resolve

PROTOCOLS = Path(__file__).parent.parent / "benchmarks" / "protocols"


@pytest.mark.parametrize(
    ("protocol", "low", "high"),
    [
        ("digits-task-feature-extraction", 72, 95),
        ("digits-task-finetune-fc", 90, 100),
        ("digits-task-lfl-001", 93, 100),
        ("digits-task-lwf", 98, 100),
        ("digits-task-si-10", 88, 100),
        ("digits-task-mas-01", 94, 100),
        ("digits-class-lwf-local", 28, 62),
        ("digits-class-lwf-all", 19, 45),
        ("digits-task-cnn-lwm", 96, 100),
        ("digits-class-er", 88, 98),
        ("digits-task-er", 96, 100),
        ("digits-class-icarl", 84, 95),
        ("digits-class-dgr-hard", 30, 85),
        ("digits-task-dgr", 90, 100),
        ("digits-task-cnn-deep-inversion", 96, 100),
        ("digits-task-duplicate", 98, 100),
        ("digits-task-piggyback", 97, 100),
        ("digits-task-packnet", 96, 100),
        ("digits-task-hat", 92, 100),
        ("digits-task-cnn-channel-gating", 95, 100),
    ],
)
def test_one_seed_lies_where_the_method_does(protocol: str, low: float, high: float) -> None:
    config = resolve(yaml_file=PROTOCOLS / f"{protocol}.yaml", run={"tensorboard": False, "output": None, "seed": 0})
    results = run_config(config)
    reading = protocol.split("-")[1]
    assert low <= 100 * results.measures[reading]["average_accuracy"] <= high
