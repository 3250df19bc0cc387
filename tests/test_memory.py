"""Exemplar memory: budgets, herding, reservoir, ring, against brute force and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from clframe import ImageData
from clframe.toolkit.memory import (
    at_random,
    balanced,
    copy_rows,
    draw,
    groups_of,
    herding,
    quota,
    reservoir,
    ring,
    too_small,
)


def images(labels: list[int], task: int = 0, start: int = 0) -> ImageData:
    """Rows with these labels; the pixel of each is its position."""
    index = torch.arange(start, start + len(labels))
    return ImageData(index.to(torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels), index=index, task=task)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_vectors(n: int, width: int = 16) -> Tensor:
    vectors = torch.randn(n, width, generator=generator(), dtype=torch.float64) + 0.5
    return functional.normalize(vectors, dim=1)


def brute_force(features: Tensor, count: int) -> list[int]:
    """The definition: the image after which the mean of those chosen is nearest to the mean of all."""
    mean, chosen = features.mean(0), []
    for k in range(1, count + 1):
        gaps = [
            torch.inf if i in chosen else float((mean - features[[*chosen, i]].sum(0) / k).norm())
            for i in range(len(features))
        ]
        chosen.append(min(range(len(features)), key=gaps.__getitem__))
    return chosen


def test_herding_is_the_greedy_argmin() -> None:
    features = unit_vectors(200)
    assert herding(features, 60).tolist() == brute_force(features, 60)
    uneven = features * torch.linspace(0.5, 2, 200, dtype=torch.float64)[:, None]  # lengths are not taken for granted
    assert herding(uneven, 30).tolist() == brute_force(uneven, 30)


def test_herding_is_the_argmax_form_until_that_repeats_itself() -> None:
    """The authors' code: argmax w.phi, w <- w + mu - phi(p), which may choose an image twice."""
    features = unit_vectors(200)
    mean, w, argmax = features.mean(0), features.mean(0).clone(), []
    while len(argmax) == len(set(argmax)) and len(argmax) < 100:
        argmax.append(int((features @ w).argmax()))
        w += mean - features[argmax[-1]]
    until = len(argmax) - 1 if len(argmax) != len(set(argmax)) else len(argmax)
    assert until > 10
    assert herding(features, until).tolist() == argmax[:until]


def test_herding_has_prefixes_and_no_repeats() -> None:
    features = unit_vectors(50).float()
    whole = herding(features, 80).tolist()
    assert sorted(whole) == list(range(50))
    assert herding(features, 7).tolist() == whole[:7]
    assert herding(features[:0], 3).tolist() == []


def test_the_mean_of_a_herd_follows_the_mean_better_than_chance() -> None:
    features = unit_vectors(200)
    mean = features.mean(0)
    gap = (features[herding(features, 10)].mean(0) - mean).norm()
    at_random = [(features[torch.randperm(200, generator=generator(s))[:10]].mean(0) - mean).norm() for s in range(20)]
    assert gap < min(at_random) / 2


@pytest.mark.parametrize(
    ("total", "groups", "floor", "ceiling"), [(10, 5, 2, 2), (10, 4, 2, 3), (7, 7, 1, 1), (2000, 30, 66, 67)]
)
def test_a_budget_is_shared_evenly(total: int, groups: int, floor: int, ceiling: int) -> None:
    assert quota(total, groups) == floor
    assert quota(total, groups, ceil=True) == ceiling
    assert floor * groups <= total <= ceiling * groups <= total + groups


def test_a_memory_that_is_too_small_is_refused_in_a_sentence() -> None:
    assert too_small(10, 10, "er.size") == []
    (problem,) = too_small(9, 10, "er.size")
    assert all(word in problem for word in ("`er.size` is 9", "10 classes", "one image"))


def test_groups_are_told_apart_by_task_and_label() -> None:
    rows = ImageData.concat([images([1, 0, 1]), images([1, 1], task=1)])
    assert [where.tolist() for where in groups_of(rows)] == [[1], [0, 2], [3, 4]]
    assert groups_of(rows.rows(slice(0))) == []


def test_a_balanced_memory_cuts_old_groups_in_their_order_and_adds_new_ones() -> None:
    first = balanced(None, images([0, 1] * 10), 6, lambda rows, count: torch.arange(len(rows)).flip(0)[:count])
    assert first.index.tolist() == [18, 16, 14, 12, 10, 8, 19, 17, 15, 13, 11, 9]
    second = balanced(
        first, images([2, 2, 3, 2], task=1, start=100), 2, lambda rows, count: torch.arange(len(rows))[:count]
    )
    assert second.index.tolist() == [18, 16, 19, 17, 100, 101, 102]
    assert second.y.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert second.task.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert second.x.flatten().tolist() == second.index.tolist()


def test_a_random_order_depends_on_the_generator_alone() -> None:
    one, same, other = (balanced(None, images([0] * 50), 9, at_random(generator(s))) for s in (1, 1, 2))
    assert one.index.tolist() == same.index.tolist() != other.index.tolist()
    assert len(set(one.index.tolist())) == 9


def test_a_reservoir_holds_what_algorithm_r_holds() -> None:
    """One image after the other, by the definition, with the same draws."""
    rng, memory, seen, slots = generator(), None, 0, []
    by_hand: list[int] = []
    replica = generator()
    for start, count in ((0, 4), (4, 3), (7, 60), (67, 1)):  # the size is reached within a batch
        rows = images([0] * count, start=start)
        memory = reservoir(memory, rows, seen, 5, rng)
        draws = torch.rand(max(0, count - max(0, 5 - start)), generator=replica, dtype=torch.float64).tolist()
        for n in range(start, start + count):
            if n < 5:
                by_hand.append(n)
            else:
                slots.append(int(draws.pop(0) * (n + 1)))
                if slots[-1] < 5:
                    by_hand[slots[-1]] = n
        seen += count
        assert memory.index.tolist() == by_hand
        assert memory.x.flatten().tolist() == by_hand
    assert max(slots) > 5


def test_a_reservoir_is_a_uniform_sample() -> None:
    counts = torch.zeros(40)
    for seed in range(600):
        rng, memory = generator(seed), None
        for start in range(0, 40, 8):
            memory = reservoir(memory, images([0] * 8, start=start), start, 10, rng)
        counts[memory.index] += 1
    assert len(memory) == 10
    # each image is in with probability 1/4: 150 of 600 times, give or take 10.6
    assert (counts - 150).abs().max() < 4.5 * 10.6


def test_a_reservoir_carries_targets_and_never_writes_into_the_data() -> None:
    data = images([0, 1] * 10)
    given = ImageData(data.x, data.y, index=data.index, targets={"z": data.index[:, None].float()})
    before = given.x.clone()
    memory = reservoir(None, given.rows(slice(4)), 0, 4, generator())
    memory = reservoir(memory, given.rows(slice(4, None)), 4, 4, generator())
    assert memory.index.tolist() != [0, 1, 2, 3]
    assert memory.targets["z"].flatten().tolist() == memory.index.tolist()
    assert torch.equal(given.x, before)


def test_a_ring_holds_the_latest_of_each_group() -> None:
    memory = ring(None, images([0, 0, 0, 1]), 2)
    assert memory.index.tolist() == [1, 2, 3]
    memory = ring(memory, images([1, 1, 0], start=10), 2)
    assert memory.index.tolist() == [2, 12, 10, 11]
    memory = ring(memory, images([0], task=1, start=20), 2)
    assert memory.index.tolist() == [2, 12, 10, 11, 20]


def test_drawn_images_are_different_ones() -> None:
    memory = images([0] * 10)
    assert sorted(draw(memory, 10, generator()).index.tolist()) == list(range(10))
    assert len(draw(memory, 30, generator())) == 10
    assert len(set(draw(memory, 6, generator()).index.tolist())) == 6
    counts = torch.zeros(10)
    rng = generator()
    for _ in range(1000):
        counts[draw(memory, 3, rng).index] += 1
    assert (counts - 300).abs().max() < 4.5 * 14.5


def test_an_owned_copy_can_be_written_to() -> None:
    rows = images([0, 1, 2])
    mine = copy_rows(rows)
    mine.x[0], mine.task[0] = 9, 4
    assert rows.x[0] == 0
    assert rows.task.tolist() == [0, 0, 0]
    assert mine.task.tolist() == [4, 0, 0]
