"""A scenario from a benchmark object; Avalanche itself is not imported here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import clframe
from clframe.errors import DataError, UsageError

pytestmark = pytest.mark.xdist_group("avalanche")  # on one worker: importing Avalanche takes 10 s


class Data(list):
    """A data set: a list of samples, with or without `targets`."""


def samples(labels, task=None, make=lambda value: torch.full((1, 2, 2), float(value))):
    return Data((make(10 * i + y), y, *([] if task is None else [task])) for i, y in enumerate(labels))


def benchmark(train, test=None, tasks=None, **more):
    """A benchmark of these data sets; `tasks` are the `task_label` of each experience."""

    def stream(parts):
        given = [{} if tasks is None else {"task_label": task} for task in tasks or parts]
        return [SimpleNamespace(dataset=d, **g) for d, g in zip(parts, given, strict=False)]

    return SimpleNamespace(train_stream=stream(train), test_stream=stream(test or train), **more)


def read(*groups, task=None, **options):
    return clframe.from_avalanche(benchmark([samples(g) for g in groups]), **options)


def test_labels_are_columns_in_the_order_of_appearance():
    scenario = read([7, 3, 7], [9, 1, 1], [4])
    assert scenario.classes == ((0, 1), (2, 3), (4,))
    assert scenario.class_order == (3, 7, 1, 9, 4)
    assert scenario.class_names == ("3", "7", "1", "9", "4")
    assert scenario[0].train.y.tolist() == [1, 0, 1]
    assert scenario[1].test.y.tolist() == [3, 2, 2]
    assert scenario[1].train.x[:, 0, 0, 0].tolist() == [9.0, 11.0, 21.0]
    assert (scenario.setting, scenario.input_shape) == ("class", (1, 2, 2))


def test_the_benchmark_may_tell_the_order_of_classes_and_their_names():
    given = benchmark([samples([7, 3]), samples([0, 1])], classes_order=[7, 3, 1, 0], classes="abcdefgh")
    scenario = clframe.from_avalanche(given)
    assert scenario.class_order == (7, 3, 1, 0)
    assert scenario.class_names == ("h", "d", "b", "a")
    assert clframe.from_avalanche(given, class_names="ABCDEFGH").class_names == ("H", "D", "B", "A")


def test_classes_may_come_back():
    scenario = read([0, 1], [1, 2], [0, 2])
    assert (scenario.setting, scenario.classes) == ("class", ((0, 1), (1, 2), (0, 2)))


def test_the_same_classes_again_are_domains():
    scenario = read([5, 6], [6, 5])
    assert (scenario.setting, scenario.classes) == ("domain", ((0, 1), (0, 1)))
    assert read([5, 6], [6, 5], setting="task").classes == ((0, 1), (2, 3))


@pytest.mark.parametrize("where", ["task_label", "third item"])
def test_tasks_are_told_by_the_label_or_the_third_item(where):
    if where == "task_label":
        given = benchmark([samples([0, 1]), samples([0, 1])], tasks=[4, 2])
    else:
        given = benchmark([samples([0, 1], 4), samples([0, 1], 2)])
    scenario = clframe.from_avalanche(given)
    assert (scenario.setting, scenario.classes) == ("task", ((0, 1), (2, 3)))
    assert scenario.class_names == ("0 (4)", "1 (4)", "0 (2)", "1 (2)")
    assert scenario[1].train.task.tolist() == [1, 1]
    assert scenario[1].train.y.tolist() == [2, 3]


def test_one_task_for_all_is_no_task():
    assert clframe.from_avalanche(benchmark([samples([0], 0), samples([1], 0)])).setting == "class"


def test_targets_are_read_without_the_images():
    class Counting(Data):
        read = 0
        targets: list[int]

        def __getitem__(self, i):
            Counting.read += 1
            return super().__getitem__(i)

    parts = [Counting(samples([0, 1, 0])), Counting(samples([2, 2, 3]))]
    for part in parts:
        part.targets = [y for _, y in list.__iter__(part)]
    scenario = clframe.from_avalanche(benchmark(parts, tasks=[0, 0]))
    before = Counting.read
    assert before <= 5  # the first image of each part, for the checksum and the shape
    assert len(scenario[1].test) == len(scenario[1].test) == 3
    assert Counting.read == before + 3  # test images are kept
    assert len(scenario[0].train) == 3
    assert Counting.read == before + 6


def test_images_are_read_in_evaluation_mode():
    class Augmented(Data):
        def eval(self):
            return Data(samples([0, 1]))

    parts = [Augmented((torch.rand(1, 2, 2), y) for y in (0, 1))]
    assert clframe.from_avalanche(benchmark(parts))[0].train.x[1, 0, 0, 0] == 11.0


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda v: Image.new("L", (3, 2), v), (1, 2, 3)),
        (lambda v: Image.new("RGB", (3, 2), (v, 0, 0)), (3, 2, 3)),
        (lambda v: np.full((2, 3, 3), v, dtype=np.uint8), (3, 2, 3)),
    ],
)
def test_pictures_and_arrays_become_tensors_of_bytes(make, shape):
    scenario = clframe.from_avalanche(benchmark([samples([0, 1], make=make)]))
    data = scenario[0].train
    assert (scenario.input_shape, data.x.dtype, data.x.shape[1:]) == (shape, torch.uint8, shape)
    assert data.x[1, 0, 0, 0] == 11
    assert scenario.transform == clframe.Transform(scale=255.0)
    assert read([0, 1]).transform == clframe.Transform(scale=1.0)


def test_one_test_experience_for_all_is_cut_by_classes():
    given = benchmark([samples([0, 1]), samples([2])], [samples([2, 1, 0, 2])])
    scenario = clframe.from_avalanche(given)
    assert scenario[0].test.y.tolist() == [1, 0]
    assert scenario[1].test.y.tolist() == [2, 2]
    assert scenario[1].test.index.tolist() == [0, 3]


def test_positions_count_through_all_experiences():
    scenario = read([0, 1, 0], [2, 3])
    assert scenario[0].train.index.tolist() == [0, 1, 2]
    assert scenario[1].train.index.tolist() == [3, 4]


def test_the_checksum_tells_other_labels_and_other_images():
    same = read([0, 1], [2, 3]).checksum
    assert same == read([0, 1], [2, 3]).checksum
    assert same != read([1, 0], [2, 3]).checksum
    other = benchmark([samples([0, 1], make=lambda v: torch.full((1, 2, 2), v + 0.5)), samples([2, 3])])
    assert same != clframe.from_avalanche(other).checksum


def test_it_runs_as_the_same_scenario_from_arrays(tiny):
    scenario = tiny()
    train, test = (
        [Data(zip(e.x, e.y.tolist(), strict=True)) for e in (getattr(experience, part) for experience in scenario)]
        for part in ("train", "test")
    )
    read = clframe.from_avalanche(benchmark(train, test))
    settings = {"epochs": 2, "batch_size": 8}
    a, b = (clframe.run(s, "mlp-100", train=settings, run={"device": "cpu"}) for s in (read, scenario))
    assert a.accuracy == b.accuracy


def refusal(error, given, **options):
    with pytest.raises(error) as caught:
        [experience.train for experience in clframe.from_avalanche(given, **options)]
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_what_cannot_be_read_is_refused():
    assert refusal(UsageError, object()) == (
        "object cannot be read as a benchmark: it needs a `train_stream` of experiences, each with a `dataset`."
    )
    assert "`test_stream`" in refusal(UsageError, SimpleNamespace(train_stream=[SimpleNamespace(dataset=[])]))
    two = [samples([0]), samples([1])]
    assert "2 experiences to learn and 3 to test" in refusal(UsageError, benchmark(two, [*two, samples([0])]))
    assert "have the labels [5]" in refusal(DataError, benchmark(two, [samples([0]), samples([1, 5])]))
    assert "no test images of its classes" in refusal(DataError, benchmark(two, [samples([0])]))
    assert "no training images" in refusal(DataError, benchmark([samples([0]), Data()], two))
    assert "have the tasks [1, 1]" in refusal(UsageError, benchmark(two, tasks=[1, 1]), setting="task")
    assert "there is a class 1" in refusal(UsageError, benchmark(two), class_names=["a"])
    assert "is of type object" in refusal(DataError, benchmark([Data([(object(), 0)])]))
    mixed = Data([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 3, 3), 0)])
    assert "of several shapes" in refusal(DataError, benchmark([mixed]))


def test_an_experience_of_several_tasks_is_refused():
    class Experience:
        dataset = samples([0])

        @property
        def task_label(self):
            raise ValueError("several")

    given = SimpleNamespace(train_stream=[Experience()], test_stream=[Experience()])
    assert refusal(UsageError, given).startswith("There are images of several tasks in experience 0 of `avalanche`")
