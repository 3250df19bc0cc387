"""What people pass from Python in other kinds: taken, if it says the same, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import clframe
from clframe import testing
from clframe.errors import ClframeError
from clframe.plugins.ewc import EWC

ARRAYS = testing.tiny_arrays(shape=(1, 8, 8))
TRAIN = {"iterations": 2, "batch_size": 8}


def scenario(**options: Any) -> clframe.Scenario:
    return clframe.split_classes("tiny", ARRAYS, **{"experiences": 3, **options})


def run(scenario_: Any = None, plugins: Any = (), **options: Any) -> clframe.Results:
    return clframe.run(scenario_ or scenario(), "mlp-100", plugins, **{"train": TRAIN, "progress": False, **options})


def arrays(**changed: Any) -> clframe.Arrays:
    return clframe.Arrays(**{**{name: getattr(ARRAYS, name) for name in ARRAYS.__dataclass_fields__}, **changed})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of two finished runs: `plain`, and `told`, which answers within a task only."""
    folder = tmp_path_factory.mktemp("runs")
    run(run={"output": folder / "plain", "tensorboard": False})
    run(scenario(setting="task"), "hat", run={"output": folder / "told", "tensorboard": False})
    return folder


def check(work: Callable[[], object], said: str) -> None:
    """The refusal has all parts of `said`, which ... separates."""
    with testing.refused(*said.split("... "), error=ClframeError):
        work()


# ----------------------------------------------------------------------------------------- of a run


@pytest.mark.parametrize(
    ("plugins", "names"),
    [
        ("er", ["er"]),
        (("er", {"ewc": {"lambda": 1}}), ["er", "ewc"]),
        (["ewc", {"er": {}, "lwf": {}}], ["ewc", "er", "lwf"]),
        ((name for name in ["er", "ewc"]), ["er", "ewc"]),
        ({"er"}, ["er"]),
        ({"er": None, "ewc": {}}, ["er", "ewc"]),
        (EWC(), ["ewc"]),
        (None, []),
    ],
)
def test_plugins_come_one_by_one_or_as_any_collection(plugins: Any, names: list[str]):
    assert run(plugins=plugins).data["plugins"] == names


def test_one_function_is_a_listener():
    records: list[Any] = []
    run(listeners=records.append)
    assert [r["experience"] for r in records if r["kind"] == "eval"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: run(plugins=3), "`plugins` is [3]; ... mapping ... list of names"),
        (lambda: run(plugins=EWC), "`EWC` is a class; ... `EWC()`"),
        (lambda: run(train="epochs"), "`train` is 'epochs'; ... mapping"),
        (lambda: run(train=["epochs"]), "`train` is ['epochs']; ... mapping"),
        (lambda: run(train={1: 2}), "`train` has the name 1, ... texts"),
        (lambda: run(run="out"), "`run` is 'out'; ... mapping"),
        (lambda: run({"name": "split-digits", 3: 4}), "`scenario` has the name 3, ... texts"),
        (lambda: run(ARRAYS), "`tiny` is `Arrays`, and no scenario yet: cut experiences from it with "),
        (lambda: clframe.run(5), "`scenario` is 5; ... mapping"),
        (lambda: clframe.Results.read(None), "None is a `NoneType`: ... path"),
        (lambda: clframe.load(3), "3 is a `int`: ... path"),
        (lambda: clframe.resume(3), "3 is a `int`: ... path"),
    ],
)
def test_another_kind_is_refused_in_one_sentence(work: Callable[[], object], said: str):
    check(work, said)


# ----------------------------------------------------------------------------------- of a scenario


def test_numpys_numbers_cut_a_scenario_as_pythons_do():
    orders: list[Any] = [[5, 4, 3, 2, 1, 0], np.arange(6)[::-1], torch.arange(6).flip(0), range(5, -1, -1)]
    for order in orders:
        found = clframe.split_classes("x", ARRAYS, experiences=np.int64(3), first=np.uint8(2), order=order)
        assert found.classes == ((0, 1), (2, 3), (4, 5))
        assert found.class_order == (5, 4, 3, 2, 1, 0)
    assert len(clframe.change_domains("x", ARRAYS, lambda i, x: x, experiences=np.int64(2))) == 2


def test_a_scenario_of_numpys_labels_and_names_is_written_and_read(tmp_path: Path):
    def load(index: int, part: str) -> clframe.ImageData:
        x, y = ARRAYS.part(part)
        where = (y // 3 == index).nonzero().flatten()
        return clframe.ImageData(x[where], y[where], task=index)

    groups = np.arange(6).reshape(2, 3)
    transform = clframe.Transform(scale=np.float32(255), mean=np.array([0.5]), std=[np.float64(0.5)], pad=np.int64(1))
    names = np.array(list("abcdef"))
    own = clframe.Scenario("own", "class", groups, names, np.array([1, 8, 8]), load, transform=transform)
    results = run(own, run={"output": tmp_path / "r", "tensorboard": False})
    assert clframe.Results.read(tmp_path / "r").data["class_names"] == list("abcdef")
    assert clframe.load(tmp_path / "r").scenario.transform == clframe.Transform(mean=(0.5,), std=(0.5,), pad=1)
    assert results.data["classes"] == [[0, 1, 2], [3, 4, 5]]
    numbered = clframe.split_classes("n", arrays(class_names=range(6)), experiences=3)
    assert numbered.class_names == ("0", "1", "2", "3", "4", "5")


def domains(change: Any) -> Any:
    return clframe.change_domains("d", ARRAYS, change, experiences=2)[1].train.x


class Turning(nn.Module):
    """As torchvision's transforms are: called with images alone."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flip(-1)


class Any2(nn.Module):
    """As torchvision's second transforms are: each argument is changed."""

    def forward(self, *inputs: Any) -> Any:
        return inputs


def test_images_may_be_changed_by_any_function_of_two_arguments():
    flipped = ARRAYS.x_train.flip(-1)
    assert torch.equal(domains(lambda i, x: x.flip(-1) if i else x), flipped)
    assert torch.equal(domains(lambda i, x: np.ascontiguousarray(x.numpy()[..., ::-1])), flipped)
    assert torch.equal(domains(lambda *given: Turning()(given[1])), flipped)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Turning(), "`change` of `d`, a `Turning`, ... `change(i, x)`"),
        (lambda x: x, "`change` of `d`, a `function`, ... `change(i, x)`"),
        (Any2(), "`change` of `d` gives a `tuple` for images [72, 1, 8, 8]: ... shape"),
        (lambda i, x: None, "`change` of `d` gives a `NoneType` for images [72, 1, 8, 8]"),
        (lambda i, x: x[1:], "`change` of `d` gives [71, 1, 8, 8] for images [72, 1, 8, 8]"),
        (None, "`change` of `d` is None: give a function `change(i, x)`."),
    ],
)
def test_what_cannot_change_images_is_refused(change: Any, said: str):
    check(lambda: domains(change), said)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: scenario(experiences=2.5), "`scenario.experiences` is 2.5: ... integer"),
        (lambda: scenario(experiences="3"), "`scenario.experiences` is '3': ... integer"),
        (lambda: scenario(experiences=True), "`scenario.experiences` is True: ... integer"),
        (lambda: scenario(setting="clas"), "`scenario.setting` is 'clas': it should be 'class', 'task' or 'domain'."),
        (lambda: clframe.split_classes("n", (1, 2), experiences=3), "The images of `n` are given as a `tuple`: put "),
        (lambda: arrays(transform=lambda x: x), "The transform of `tiny` is a `function`, and only a `clframe.Trans"),
        (lambda: arrays(transform=Turning()), "The transform of `tiny` is a `Turning`, and only a `clframe.Transform`"),
        (lambda: arrays(class_names=6), "The class names of `tiny` are 6: ... list"),
        (lambda: clframe.Transform(pad=1.5), "`Transform.pad` is 1.5: ... integer"),
        (lambda: clframe.Transform(pad=-1), "`Transform.pad` is -1: ... 0."),
        (lambda: clframe.Transform(scale="255"), "`Transform.scale` is '255': ... number"),
        (lambda: clframe.Transform(mean="a", std="b"), "`Transform.mean` is 'a': ... number"),
    ],
)
def test_what_cuts_no_scenario_is_refused(work: Callable[[], object], said: str):
    check(work, said)


# ------------------------------------------------------------------------------ of the trained model


def test_images_come_as_tensors_arrays_lists_or_pictures(folders: Path):
    trained, x = clframe.load(folders / "plain"), ARRAYS.x_test[:3]
    expected = [one.answers for one in trained.predict(x)]
    for images in (x.numpy(), x.numpy().astype(float), list(x), list(x.numpy()), (one for one in x.numpy())):
        assert [one.answers for one in trained.predict(images)] == expected
    pictures = [Image.fromarray(one[0]) for one in x.numpy()]
    assert [one.answers for one in trained.predict(pictures)] == expected
    assert [one.name for one in trained.predict(pictures[0])] == [expected[0][0].name]
    assert [one.answers for one in trained.predict(x, top=np.int64(1))] == expected
    assert torch.equal(trained(x.numpy()), trained(x))


def test_tasks_come_as_numbers_of_any_kind_or_one_for_each_image(folders: Path, tmp_path: Path):
    trained, x = clframe.load(folders / "told"), ARRAYS.x_test[:3]
    several: list[Any] = [[0, 2, 1], np.array([0, 2, 1]), torch.tensor([0, 2, 1]), (0, 2, 1)]
    for task in several:
        assert torch.equal(trained(x, task), trained(x, torch.tensor([0, 2, 1])))
        assert [one.name for one in trained.predict(x, task=task)] == [
            trained.predict(x[i : i + 1], task=t)[0].name for i, t in enumerate([0, 2, 1])
        ]
    for one in (np.int64(2), 2.0, torch.tensor(2)):
        assert [found.answers for found in trained.predict(x, task=one)] == [
            found.answers for found in trained.predict(x, task=2)
        ]
    assert trained.export(tmp_path / "m.pt2", "torch-export", task=np.int64(0)).difference < 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "a"}, "`task` is 'a'; ... whole number"),
        ({"task": 0.5}, "`task` is 0.5; ... whole number"),
        ({"task": True}, "`task` is True; ... whole number"),
        ({"task": torch.tensor([0.0, 1.0])}, "`task` is tensor([0., 1.]); ... whole number"),
        ({"task": 7}, "task 7: ... 0 to 2."),
        ({"task": [0]}, "2 images and 1 tasks; "),
        ({"top": 0}, "`top` is 0; ... 1 at least"),
        ({"top": 2.5}, "`top` is 2.5; ... whole number"),
        ({"top": "a"}, "`top` is 'a'; ... whole number"),
    ],
)
def test_another_question_is_refused(folders: Path, options: dict[str, Any], said: str):
    trained = clframe.load(folders / "plain")
    check(lambda: trained.predict(ARRAYS.x_test[:2], **options), said)


@pytest.mark.parametrize(
    "images", [None, 3, np.array(["a", "b"]), np.array([None]), [[1, 2], [3, 4]], [Path("x"), "y", 3]]
)
def test_what_is_no_image_is_refused(folders: Path, images: Any):
    check(lambda: clframe.load(folders / "plain").predict(images), "")
