"""Batches and their weights: a last batch of one image, rows that do not count, rows of a memory that are new."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import clframe
from clframe import Batch, Scenario
from clframe.errors import UsageError
from clframe.training import Sampler


@pytest.mark.parametrize(
    ("n", "batch_size", "length", "sizes"),
    [
        (12, 11, {"epochs": 1, "iterations": None}, [12]),
        (13, 4, {"epochs": 2, "iterations": None}, [4, 4, 5, 4, 4, 5]),
        (14, 4, {"epochs": 1, "iterations": None}, [4, 4, 4, 2]),
        (12, 4, {"epochs": 1, "iterations": None}, [4, 4, 4]),
        (3, 1, {"epochs": 1, "iterations": None}, [1, 1, 1]),
        (1, 4, {"epochs": 1, "iterations": None}, [1]),
        (3, 4, {"epochs": 1, "iterations": None}, [3]),
        (13, 4, {"epochs": None, "iterations": 4}, [4, 4, 4, 4]),
    ],
)
def test_no_image_is_a_last_batch_alone(
    n: int, batch_size: int, length: dict[str, int | None], sizes: list[int]
) -> None:
    sampler = Sampler(n, batch_size, torch.Generator().manual_seed(0), torch.device("cpu"), **length)
    assert sampler.steps == len(sizes)
    batches = []
    for where in sampler:
        coming = sampler.coming(100)
        batches.append((where, coming))
    assert [len(where) for where, _ in batches] == sizes
    per_epoch = sampler.batches_per_epoch
    for i, (_, coming) in enumerate(batches):
        rest = [where for where, _ in batches[i + 1 : (i // per_epoch + 1) * per_epoch]]
        assert coming.tolist() == [k for where in rest for k in where.tolist()]
    if length["epochs"]:
        first = torch.cat([where for where, _ in batches[:per_epoch]])
        assert sorted(first.tolist()) == list(range(n))


def test_rows_that_do_not_count_leave_value_and_gradient_alone() -> None:
    logits = torch.zeros(3, 2, requires_grad=True)
    masked = logits.masked_fill(torch.tensor([[False, False], [False, False], [True, False]]), -torch.inf)
    zeros = torch.zeros(3, dtype=torch.int64)
    batch = Batch(torch.zeros(3, 1), zeros, zeros, zeros, torch.ones(3), zeros)
    losses = functional.cross_entropy(masked, batch.y, reduction="none")
    assert losses[2].isinf()
    mean = batch.mean(losses, torch.tensor([True, True, False]))
    mean.backward()
    assert mean.item() == pytest.approx(0.693147)
    assert logits.grad is not None
    assert torch.allclose(logits.grad, torch.tensor([[-0.25, 0.25], [-0.25, 0.25], [0.0, 0.0]]))


class Normed(nn.Module):
    """A backbone whose batch norm sees one value of each channel for each image."""

    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def fewer(scenario: Scenario, index: int) -> Scenario:
    """`scenario` with one training image in the experience `index`."""
    load = scenario._load
    scenario._load = lambda i, part: load(i, part).rows(slice(0, 1)) if (i, part) == (index, "train") else load(i, part)
    return scenario


def test_a_batch_of_one_that_must_come_is_refused_before_training(tiny) -> None:
    rule = r"`Normed` has batch normalization, .* and "
    with pytest.raises(UsageError, match=rule + "`train.batch_size` is 1"):
        clframe.run(tiny(), Normed(), train={"epochs": 1, "batch_size": 1})
    with pytest.raises(UsageError, match=rule + "experience 2 of `tiny` "):
        clframe.run(fewer(tiny(), 1), Normed(), train={"epochs": 1})
    # a memory adds rows, from the second experience on
    clframe.run(fewer(tiny(), 1), Normed(), ["er"], train={"epochs": 1})
    with pytest.raises(UsageError, match="experience 1 of `tiny` "):
        clframe.run(fewer(tiny(), 0), Normed(), ["er"], train={"epochs": 1})


@pytest.mark.parametrize("model", ["mlp-100", "cnn-small"])
def test_a_network_that_takes_one_image_learns_from_one(tiny, model: str) -> None:
    results = clframe.run(tiny(shape=(1, 8, 8)), model, train={"epochs": 1, "batch_size": 1})
    assert None not in results.accuracy["class"][-1]
