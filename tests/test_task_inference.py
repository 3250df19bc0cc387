"""Which task an image is of: features of all paths, a classifier that sees all tasks alike, what it remembers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clframe import ImageData, Scenario, Transform
from clframe.config import resolve
from clframe.context import Run
from clframe.errors import UsageError
from clframe.model import IncrementalNet, PerTask
from clframe.runs.checkpoint import pack, unpack
from clframe.toolkit.rehearsal import GeneratorOptions
from clframe.toolkit.task_inference import PathPredictor, TaskClassifier, TaskRehearsal, path_features

CPU = torch.device("cpu")
SMALL = GeneratorOptions("wgan", "mlp", hidden=(8,), z=3, critic_steps=1)


class Paths(PerTask):
    """A backbone whose features are the first four pixels, times the number of the task, from 1."""

    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4] * self.scale * (self.task + 1)


def network() -> IncrementalNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = IncrementalNet(Paths(), [2, 2, 2])
    model.select(2)
    return model


def run_of(scenario: Scenario, index: int = 0, **train: Any) -> Run:
    config = resolve(scenario=None, model="mlp", plugins=[], train={"batch_size": 16, **train}, run={"seed": 1})
    run = Run(config, scenario, network(), [], CPU)
    run.model.select(2)
    run.experience = scenario[index]
    return run


def lit(pixel: int, n: int, task: int = 0) -> ImageData:
    """`n` images that are bright at one pixel; a second one tells them from each other."""
    x = torch.zeros(n, 1, 4, 4, dtype=torch.uint8)
    x.view(n, 16)[:, pixel] = 255
    x.view(n, 16)[:, 3] = torch.arange(n) % 256
    return ImageData(x, torch.arange(n) % 2 + 2 * task, task=task, index=torch.arange(n))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed_and_back(value: nn.Module, like: nn.Module) -> None:
    """Through what a checkpoint holds: JSON, and tensors on the CPU."""
    tensors: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(pack(value, tensors)))
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    assert unpack(tree, {name: tensor.detach().clone() for name, tensor in tensors.items()}, like) is like


# -------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_features_are_those_of_all_paths_one_after_the_other(tasks: int) -> None:
    model, x = network(), torch.rand(5, 1, 4, 4, generator=generator())
    found = path_features(model, x, tasks)
    plain = x.flatten(1)[:, :4]
    assert torch.equal(found, torch.cat([plain * (k + 1) for k in range(tasks)], dim=1))
    assert model.backbone.task == model.selected == 2


# ------------------------------------------------------------------------------------------ classifier


def test_a_grown_classifier_is_new_and_the_generators() -> None:
    state = torch.get_rng_state()
    weights = []
    for seed in (1, 1, 2):
        classifier = TaskClassifier()
        assert classifier.tasks == 1
        assert classifier(torch.ones(5, 4)).tolist() == [[0.0]] * 5
        for tasks in (1, 2, 3):
            classifier.begin(tasks, 4, generator(seed), CPU)
            assert classifier.tasks == tasks
        assert classifier(torch.zeros(5, 12)).shape == (5, 3)
        weights.append(classifier.net[0].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(state, torch.get_rng_state())


def test_it_tells_tasks_apart_of_which_it_has_very_unequal_numbers_of_images(tiny) -> None:
    run = run_of(tiny())
    logged: list[dict[str, float]] = []
    run.listeners.append(lambda record: logged.append(record["values"]) if record["kind"] == "log" else None)
    classifier = TaskClassifier()
    classifier.begin(3, 4, generator(), CPU)
    seen: list[Tensor] = []
    hook = classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = [lit(0, 400), lit(1, 40), lit(2, 4)]
    run.model.train()
    classifier.learn(run, "me", images, 300)
    hook.remove()
    for task, rows in enumerate(images):
        features = path_features(run.model, Transform().normalize(rows.x), 3)
        assert (classifier(features).argmax(1) == task).all()
    assert list(logged[0]) == ["me/task-classifier"]
    assert logged[0]["me/task-classifier"] < 0.1
    assert all(module.training for module in run.model.modules())
    assert all(p.grad is None for p in run.model.parameters())
    # each task has a third of every batch, in the mean; and each image its share of that
    drawn = torch.cat(seen)
    assert len(drawn) == 300 * 16
    shares = [(drawn[:, task] == 1).double().mean().item() for task in range(3)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)
    few = drawn[drawn[:, 2] == 1][:, 3]  # the second pixel
    assert few.unique().tolist() == [torch.tensor(k / 255).item() for k in range(4)]
    assert [(few == v).double().mean().item() for v in few.unique()] == pytest.approx([0.25] * 4, abs=0.04)
    assert len(drawn[drawn[:, 1] == 1][:, 3].unique()) == 40


def test_its_draws_are_those_of_its_owner(tiny) -> None:
    weights = []
    for owner in ("me", "me", "you"):
        run, state = run_of(tiny()), torch.get_rng_state()
        classifier = TaskClassifier()
        classifier.begin(2, 4, generator(), CPU)
        classifier.learn(run, owner, [lit(0, 30), lit(1, 3)], 3)
        weights.append(classifier.net[0].weight)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# ------------------------------------------------------------------------------------------- predictor


class Oracle(nn.Module):
    """Takes the brightest of the first pixels for the task."""

    tasks = 2

    def forward(self, features: Tensor) -> Tensor:
        assert features.shape[1] == self.tasks * 4
        return features[:, : self.tasks]


def test_a_told_task_gives_its_path_and_an_untold_one_what_the_classifier_finds() -> None:
    model, x = network(), torch.cat([lit(k, 2).x for k in (1, 0, 1)]).float() / 255
    predictor = PathPredictor(model, Oracle(), [[0, 1], [2, 3]])
    assert (predictor.n_classes, predictor.needs_task, predictor.uses_task) == (4, False, True)
    plain, w, b = x.flatten(1)[:, :4], [h.weight for h in model.head], [h.bias for h in model.head]

    def logits(row: int, task: int) -> list[float]:
        return torch.cat([plain[row] * (task + 1) @ w[k].T + b[k] for k in range(3)]).tolist()

    with torch.no_grad():
        told = predictor(x, torch.tensor([0, 1, 0, 1, 0, 1]))
        untold = predictor(x)
    for row in range(6):
        assert told[row].tolist() == pytest.approx(logits(row, row % 2), rel=1e-5)
        task = [1, 1, 0, 0, 1, 1][row]
        own = slice(2 * task, 2 * task + 2)
        assert untold[row, own].tolist() == pytest.approx(logits(row, task)[own], rel=1e-5)
        assert untold[row].isneginf().tolist() == [c // 2 != task for c in range(6)]
    assert model.backbone.task == 2


# ------------------------------------------------------------------------------------- images of the past


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"size": 12}, (6, 3, 2)), ({"size": 15}, (7, 3, 2)), ({"size": 6, "per_class": 4}, (4, 4, 4))],
)
def test_the_memory_is_within_its_budget_and_uint8(tiny, options: dict[str, int], kept: tuple[int, ...]) -> None:
    scenario = tiny()
    rehearsal = TaskRehearsal(options["size"], options.get("per_class"), None, 1)
    for index, count in enumerate(kept):
        run = run_of(scenario, index)
        rehearsal.grow(run, "me")
        rehearsal.keep(run, "me", scenario[index].train)
        memory = rehearsal.memory
        assert memory.x.dtype == torch.uint8
        assert memory.y.bincount().tolist() == [count] * (2 * index + 2)
        assert "per_class" in options or len(memory) <= options["size"]
        images = rehearsal.images(run, "me")
        assert [set(rows.y.tolist()) for rows in images] == [{2 * k, 2 * k + 1} for k in range(index)]
        assert [rows.task.unique().tolist() for rows in images] == [[k] for k in range(index)]
    for row in range(len(memory)):  # they are the data set's own
        source = scenario[int(memory.task[row])].train
        where = (source.index == memory.index[row]).nonzero().item()
        assert torch.equal(memory.x[row], source.x[where])


def test_a_memory_goes_through_a_checkpoint(tiny) -> None:
    scenario = tiny()
    run, rehearsal = run_of(scenario), TaskRehearsal(6, None, None, 1)
    empty, full = TaskRehearsal(6, None, None, 1), TaskRehearsal(6, None, None, 1)
    packed_and_back(rehearsal, empty)
    assert empty.memory is None
    rehearsal.keep(run, "me", scenario[0].train)
    packed_and_back(rehearsal, full)
    for name in ("x", "y", "index", "task"):
        before, after = getattr(rehearsal.memory, name), getattr(full.memory, name)
        assert torch.equal(before, after)
        assert before.dtype == after.dtype


def test_a_generator_for_each_task_makes_images_of_the_right_shape(tiny) -> None:
    scenario = tiny(shape=(2, 4, 4))
    rehearsal, records = TaskRehearsal(9, None, SMALL, 3), []
    for index in range(3):
        run = run_of(scenario, index)
        run.listeners.append(records.append)
        rehearsal.grow(run, "me")
        rehearsal.keep(run, "me", scenario[index].train)
        made = rehearsal.images(run, "me")
        assert len(made) == index  # the task under way has its own
        assert all(rows.x.shape == (9, 2, 4, 4) and rows.x.dtype == torch.float32 for rows in made)
        assert all(rows.x.min() >= 0 and rows.x.max() <= 255 and rows.x.max() > 1 for rows in made)
    assert rehearsal.memory is None
    assert [sorted(r["values"]) for r in records if r["kind"] == "log"] == [["me/distance", "me/penalty"]] * 3
    assert [r["name"] for r in records if r["kind"] == "images"] == ["me"] * 3


def test_generators_go_through_a_checkpoint_and_draw_the_same(tiny) -> None:
    scenario = tiny()
    rehearsal, loaded = TaskRehearsal(5, None, SMALL, 2), TaskRehearsal(5, None, SMALL, 2)
    for index in range(2):
        run = run_of(scenario, index)
        rehearsal.grow(run, "me")
        rehearsal.keep(run, "me", scenario[index].train)
        loaded.grow(run_of(scenario, index), "me")
    packed_and_back(rehearsal, loaded)
    (a,), (b,) = rehearsal.images(run_of(scenario, 1), "me"), loaded.images(run_of(scenario, 1), "me")
    assert torch.equal(a.x, b.x)
    adam = [made.optimizer.state_dict()["state"] for made in (rehearsal.generators[1], loaded.generators[1])]
    assert len(adam[0]) == len(adam[1]) > 0
    assert all(torch.equal(adam[0][k]["exp_avg"], adam[1][k]["exp_avg"]) for k in adam[0])


def test_what_cannot_be_remembered_is_refused(tiny) -> None:
    def problems(rehearsal: TaskRehearsal, shape: tuple[int, ...] = (1, 4, 4)) -> list[str]:
        return list(rehearsal.problems(run_of(tiny(shape=shape)), "me"))

    assert problems(TaskRehearsal(6, None, None, 1)) == []
    (problem,) = problems(TaskRehearsal(5, None, None, 1))
    assert problem.startswith("`me.size` is 5, and there are 6 classes")
    assert problems(TaskRehearsal(5, 1, None, 1)) == []
    assert problems(TaskRehearsal(5, None, GeneratorOptions("wgan", "mlp"), 1), (1, 3, 5)) == []
    assert problems(TaskRehearsal(5, None, GeneratorOptions("wgan", "conv"), 1), (1, 8, 4)) == []
    assert problems(TaskRehearsal(5, None, GeneratorOptions("wgan", "conv"), 1), (1, 6, 4))[0].startswith(
        "`me.generator_net=conv` "
    )
    bright = ImageData(torch.full((2, 1, 4, 4), 300.0), torch.zeros(2))
    TaskRehearsal(6, None, None, 1).check(run_of(tiny()), "me", bright)
    with pytest.raises(UsageError, match=r"`me` .* 0 to 1"):
        TaskRehearsal(6, None, SMALL, 1).check(run_of(tiny()), "me", bright)
