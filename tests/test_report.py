"""Reports: figures equal those of the results files, and a report of an untrusted run is only text."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clframe.config import resolve, to_yaml
from clframe.errors import DataError, UsageError
from clframe.experiments.outcome import read_runs
from clframe.metrics import Measure

CLASSES = [[0, 1], [2, 3], [4, 5]]


def results_of(
    config: Any, accuracy: float, forgetting: float = 0.1, kept: int = 0, names: list[str] | None = None, **more: Any
) -> dict[str, Any]:
    """The content of a results.json that was written by hand, with a given average accuracy."""
    matrix = [
        [1.0 if j == i else accuracy - forgetting * (i - j) / 10 if j < i else None for j in range(len(CLASSES))]
        for i in range(len(CLASSES))
    ]
    measures = {
        "average_accuracy": accuracy,
        "average_incremental_accuracy": accuracy + 0.01,
        "forgetting": forgetting,
        "backward_transfer": -forgetting,
        "forward_transfer": None,
        "learning_accuracy": 0.9 + accuracy / 100,
    }
    of = {name: vars(Measure(value, f"formula of {name}", "a source")) for name, value in measures.items()}
    return {
        "format": 1,
        "scenario": config.scenario.name,
        "setting": "class",
        "plugins": list(config.plugins),
        "forms": {},
        "seed": config.run.seed,
        "readings": {"class": "class-incremental: no task is given", "task": "task-incremental: the task is given"},
        "accuracy": {"class": matrix, "task": matrix},
        "measures": {"class": of, "task": of},
        "baseline": {},
        "classes": CLASSES,
        "class_names": names or [f"class {c}" for c in range(6)],
        "test_images": [10, 10, 10],
        "notes": [],
        "calibration": {"class": {"ece": vars(Measure(forgetting / 2, "formula of ece", "a source"))}},
        "model": {"bytes": 4000, "parameters": 1000},
        "storage": {name: {"bytes": kept, "parameters": kept // 4} for name in config.plugins},
        **more,
    }


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(accuracy, "er", seed=1)`: the folder of a finished run with these figures; no run is made."""

    def make(
        accuracy: float,
        *plugins: str,
        seed: int = 0,
        sets: tuple[str, ...] = (),
        scenario: Mapping[str, Any] | str = "split-digits",
        seconds: float = 2.0,
        **more: Any,
    ) -> Path:
        folder = tmp_path / "runs" / str(len(list(tmp_path.glob("runs/*"))))
        folder.mkdir(parents=True)
        config = resolve(scenario=scenario, plugins=plugins, sets=sets, run={"seed": seed, "output": str(folder)})
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "results.json").write_text(json.dumps(results_of(config, accuracy, **more)))
        timings = {
            "experiences": [{"seconds": seconds / 4, "images": 8, "images_per_second": 32 / seconds}] * 4,
            "peak_memory_bytes": 3 * 10**8,
            "peak_device_memory_bytes": None,
        }
        (folder / "timings.json").write_text(json.dumps(timings))
        environment = {"python": "3.11.7", "torch": "2.15", "processor": "a host", "data_sha256": "0" * 64}
        (folder / "environment.json").write_text(json.dumps(environment))
        return folder

    return make


def by_brute_force(ours: list[float], theirs: list[float]) -> tuple[float, tuple[float, float], float]:
    """Mean, Student's interval and p of all sign flips of paired differences, written down again."""
    from scipy.stats import t

    d = np.array(ours) - np.array(theirs)
    half = t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    flips = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=len(d))]
    p = np.mean([flipped >= abs(d.sum()) - 1e-12 for flipped in flips])
    return d.mean(), (d.mean() - half, d.mean() + half), float(p)


def test_the_table_of_a_scenario_equals_brute_force(write: Write):
    rng = np.random.default_rng(0)
    figures = {
        name: (0.3 + i / 5 + rng.normal(size=6) / 20).tolist() for i, name in enumerate(("fine-tuning", "ewc", "er"))
    }
    folders = [
        write(value, *([] if name == "fine-tuning" else [name]), seed=seed)
        for name, values in figures.items()
        for seed, value in enumerate(values)
    ]
    outcome = read_runs(folders)
    rows = outcome.table("split-digits")
    assert [row.method for row in rows] == ["er", "ewc", "fine-tuning"]
    assert (rows[2].paired, rows[2].p, rows[2].claim) == (None, None, None)
    for row in rows[:2]:
        mean, interval, p = by_brute_force(figures[row.method], figures["fine-tuning"])
        assert row.mean.value == pytest.approx(np.mean(figures[row.method]), abs=1e-15)
        assert row.paired is not None
        assert row.paired.mean == pytest.approx(mean, abs=1e-15)
        assert row.paired.interval == pytest.approx(interval, abs=1e-12)
        assert row.paired.p == p == 2 / 2**6
        assert row.p == 2 * p  # Holm over two equal p values
        assert row.claim is not None
        assert not row.claim.made
        assert row.tenth_percentile == pytest.approx(np.percentile(figures[row.method], 10), abs=1e-15)


def test_class_orders_are_averaged_within_seeds(write: Write):
    values = {(seed, order): 0.1 + 0.03 * seed + 0.002 * order**2 for seed in range(3) for order in range(4)}
    folders = [
        write(value + shift, *plugins, seed=seed, scenario={"name": "split-digits", "order": "random", "seed": order})
        for shift, plugins in ((0.0, ()), (0.2, ("er",)))
        for (seed, order), value in values.items()
    ]
    outcome = read_runs(folders)
    assert {cell.order for cell in outcome.finished} == {0, 1, 2, 3}
    assert [row.mean.count for row in outcome.table("split-digits")] == [3, 3]
    assert [row.mean.count for row in outcome.table("split-digits", unit="order")] == [4, 4]
    row = outcome.table("split-digits")[0]
    assert row.paired is not None
    assert (row.paired.pairs, row.cells) == (3, 12)
    assert row.paired.mean == pytest.approx(0.2)


def test_methods_and_scenarios_are_labeled_by_what_differs(write: Write):
    folders = [
        write(0.1),
        write(0.2, "ewc", sets=("ewc.lambda=10",)),
        write(0.3, "ewc", sets=("ewc.lambda=100",)),
        write(0.4, "er", "lwf"),
        write(0.5, "er", "lwf", sets=("er.size=20",)),
        write(0.6, "joint", sets=("train.lr=0.01",)),
        write(0.6, "joint", sets=("train.lr=0.02",)),
        write(0.7, "joint", scenario={"name": "split-digits", "experiences": 2}),
    ]
    outcome = read_runs(folders)
    assert outcome.methods == [
        *("fine-tuning", "ewc[lambda=10]", "ewc[lambda=100]", "er+lwf[er.size=200]", "er+lwf[er.size=20]"),
        *("joint[train.lr=0.01]", "joint[train.lr=0.02]", "joint[train.lr=0.001]"),
    ]
    assert outcome.scenarios == ["split-digits[experiences=5]", "split-digits[experiences=2]"]
    assert outcome.choose_baseline() == "fine-tuning"
    with pytest.raises(UsageError, match="not a method of this study"):
        outcome.choose_baseline("ewc")


def test_a_run_counts_once_and_its_figures_are_numbers(write: Write):
    first, second = write(0.1, "er"), write(0.1, "er")
    with pytest.raises(UsageError, match="equal settings and the seed 0"):
        read_runs([first, second])
    assert len(read_runs([first, first]).finished) == 1
    data = json.loads((second / "results.json").read_text())
    data["measures"]["class"]["forgetting"]["value"] = float("nan")
    (second / "results.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="has nan as `forgetting`"):
        read_runs([second])
    (second / "results.json").unlink()
    with pytest.raises(DataError, match="is not finished"):
        read_runs([second])
