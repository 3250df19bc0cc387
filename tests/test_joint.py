"""Joint training: the oracle, once on everything or cumulatively."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import clframe
from clframe import Plugin, hookimpl
from clframe.errors import UsageError
from clframe.plugins.joint import Joint
from clframe.testing import Recorder, differing

TRAIN = {"epochs": 1, "batch_size": 8, "lr": 0.05, "optimizer": "sgd", "clip": 0.0}


def test_joint_training_of_one_experience_is_plain_training(tiny):
    plain, joint = Recorder(), Recorder()
    a = clframe.run(tiny(experiences=1), "mlp-100", [plain], train=TRAIN)
    b = clframe.run(tiny(experiences=1), "mlp-100", ["joint", joint], train=TRAIN)
    assert a.accuracy == b.accuracy
    assert differing(plain.evaluated[-1], joint.evaluated[-1]) == []


@pytest.mark.parametrize(("train", "steps"), [({"epochs": 2}, 18), ({"epochs": None, "iterations": 5}, 15)])
def test_joint_trains_once_with_the_iterations_of_all_experiences(tiny, train: dict[str, Any], steps: int):
    recorder = Recorder()
    results = clframe.run(tiny(), "mlp-100", ["joint", recorder], train={**TRAIN, **train})
    assert recorder.phase_steps() == [(2, "train", steps)]
    assert {int(i) for batch in recorder.batches(2) for i in batch.index} <= set(range(72))
    rows = results.accuracy["class"]
    assert rows[:2] == [[None] * 3] * 2
    assert None not in rows[2]
    assert results.measures["class"]["average_accuracy"] == pytest.approx(sum(rows[2]) / 3)
    assert results.measures["class"]["forgetting"] is None


@pytest.mark.parametrize("restart", [False, True])
def test_cumulative_joint_trains_after_each_experience_on_all_so_far(tiny, restart: bool):
    starts: list[dict[str, Tensor]] = []

    class Starts(Plugin):
        name = "starts"
        observer = True

        @hookimpl
        def extra_batch(self, run, batch):
            if run.step == 0:
                starts.append({k: v.clone() for k, v in run.model.state_dict().items()})

    recorder = Recorder()
    options = {"joint": {"form": "cumulative", "restart": restart}}
    results = clframe.run(tiny(), "mlp-100", [options, Starts(), recorder], train=TRAIN)
    assert [len(recorder.batches(i)) for i in range(3)] == [3, 6, 9]
    assert len({int(i) for batch in recorder.batches(2) for i in batch.index}) == 72
    assert all(torch.equal(starts[0][k], starts[2][k]) == restart for k in starts[0])
    assert [row.count(None) for row in results.accuracy["class"]] == [2, 1, 0]


def test_joint_refuses_a_method_beside_it(tiny):
    with pytest.raises(UsageError, match=r"`joint` .*beside `ewc`"):
        clframe.run(tiny(), plugins=["joint", "ewc"])
    with pytest.raises(UsageError, match=r"`joint.restart` needs `joint.form=cumulative`"):
        clframe.run(tiny(), plugins=[{"joint": {"restart": True}}])


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"epochs": None, "iterations": 5, "first": {"iterations": 20}}, 30),  # 20 + 5 + 5
        ({"epochs": 1, "first": {"epochs": 4}}, 18),  # 24 images are 3 batches: 12 + 3 + 3
        ({"epochs": None, "iterations": 5, "first": {"epochs": 4}}, 22),
    ],
)
@pytest.mark.parametrize("form", ["once", "cumulative"])
def test_joint_takes_the_steps_of_the_first_experience_too(tiny, form: str, train: dict[str, Any], steps: int):
    recorder = Recorder()
    clframe.run(tiny(), "mlp-100", [Joint(form=form), recorder], train={**TRAIN, **train})
    assert len(recorder.batches(2)) == steps
