"""One seed of the digits protocols, cut short, within bounds that no seed has been seen to leave.

`make bench-full` runs the protocols whole. A run of the same length without the method ends at 81 to 92 percent (task
told), or at 17 to 20 (class-incremental).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clframe.api import run_config
from clframe.experiments.study import Study
from clframe.settings import Config

PROTOCOLS = Path(__file__).parent.parent / "benchmarks" / "protocols"


def figure(config: Config) -> float:
    """The average accuracy at the end, in percent."""
    results = run_config(config)
    return 100 * results.measures[config.scenario.options["setting"]]["average_accuracy"]


@pytest.mark.parametrize(
    ("protocol", "iterations", "options", "low", "high"),
    [
        ("digits-task/feature-extraction", 60, {}, 72, 95),
        ("digits-task/finetune-fc", 60, {}, 92, 99.9),
        ("digits-task/lfl-001", 60, {}, 94, 100),
        ("digits-task/lwf", 60, {}, 95, 100),
        ("digits-task-20-seeds/si-10", 60, {}, 91, 99.9),
        ("digits-task/mas-01", 60, {}, 93, 100),
        ("digits-class/lwf-local", 60, {}, 26, 62),
        ("digits-class/lwf-all", 200, {}, 21, 45),
        ("digits-class/er", 60, {}, 65, 90),
        ("digits-task/er", 60, {}, 95, 100),
        ("digits-class/icarl", 60, {}, 70, 88),
        ("digits-task/duplicate", 60, {}, 96, 100),
        ("digits-task/piggyback", 60, {}, 95, 100),
        ("digits-task/packnet", 100, {}, 93, 100),
        ("digits-task/hat", 60, {}, 93, 100),
        ("digits-task-cnn/lwm", 40, {}, 91, 100),
        ("digits-task-cnn/deep-inversion", 50, {"per_class": 20, "iterations": 40}, 94, 100),
        ("digits-class-20-seeds/dgr-hard", 60, {}, 25, 90),
    ],
)
def test_one_short_seed_lies_where_the_method_does(
    protocol: str, iterations: int, options: dict[str, int], low: float, high: float
) -> None:
    name, method_name = protocol.split("/")
    study = Study.from_yaml(PROTOCOLS / f"{name}.yaml")
    (method,) = [method for method in study.methods if method.name == method_name]
    short = replace(method, train={**method.train, "iterations": iterations})
    config = study.configure(study.scenarios[0], short, {}, 0)
    ((name, plugin),) = config.plugins.items()
    config.plugins[name] = replace(plugin, options={**plugin.options, **options})
    assert low <= figure(config) <= high
