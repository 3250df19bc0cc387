"""What holds of methods that isolate tasks, on ResNet-18 at full width: 20 steps for each of two tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import clframe
from clframe import Plugin, hookimpl, registry

TRAIN = {"iterations": 20, "batch_size": 8, "optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-3, "threads": 2}


class Witness(Plugin):
    """Keeps the answers of each task's path after each experience, and those of the first network without masks."""

    name = "witness"
    observer = True

    def __init__(self) -> None:
        self.answers: list[list[Tensor]] = []

    @hookimpl
    def after_eval(self, run, experience):
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        predictor = run.model.eval()
        with torch.no_grad():
            told = [torch.full((4,), task) for task in range(experience.index + 1)]
            self.answers.append([predictor(images, task).logits[:, 3 * int(task[0]) :][:, :3] for task in told])
        run.model.train()


@pytest.mark.long
@pytest.mark.parametrize("model", ["resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize("name", ["channel-gating", "duplicate", "packnet", "piggyback"])
def test_what_was_learnt_stays_to_the_bit(tiny: Any, name: str, model: str):
    witness = Witness()
    scenario = tiny(experiences=2, shape=(3, 32, 32), setting="task")
    clframe.run(scenario, model, [registry.build_plugin(name, {}), witness], train=TRAIN, run={"tensorboard": False})
    first, second = witness.answers
    assert torch.equal(second[0], first[0])
    assert not torch.equal(second[1], second[0])
    assert first[0].isfinite().all()


@pytest.mark.long
def test_hat_moves_what_was_learnt_by_what_its_gates_leave_open(tiny: Any):
    witness = Witness()
    scenario = tiny(experiences=2, shape=(3, 32, 32), setting="task")
    options = {"s_max": 1e6}  # gates that are binary to the bit
    clframe.run(scenario, "resnet18", [registry.build_plugin("hat", options), witness], train=TRAIN | {"clip": 0})
    first, second = witness.answers
    torch.testing.assert_close(second[0], first[0], rtol=1e-4, atol=1e-4)
