"""Scenarios of Avalanche: cut and drawn as the installed Avalanche itself does it, from the same images."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

import clframe
from clframe.errors import UsageError
from clframe.options import options_of
from clframe.registry import SUPPLIED, build_scenario, builder, suited
from clframe.scenarios import sources
from clframe.scenarios.avalanche import BENCHMARKS, ELSEWHERE, benchmark
from clframe.settings import Component

pytestmark = pytest.mark.xdist_group("avalanche")  # on one worker: importing Avalanche takes 10 s

HOME = {"SplitMNIST": "cmnist", "PermutedMNIST": "cmnist", "RotatedMNIST": "cmnist", "SplitFMNIST": "cfashion_mnist"}
SPLITS = ["SplitMNIST", "SplitFMNIST", "SplitCIFAR10", "SplitCIFAR100", "SplitCIFAR110"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root with six training images and two test images of each class of each data set."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, source in sources.SOURCES.items():
        shape, classes = source.image if source.image[2] == 3 else source.image[:2], len(source.class_names)
        y = np.concatenate([rng.permutation(np.arange(n * classes, dtype=np.uint8) % classes) for n in (6, 2)])
        x = rng.integers(100, size=(8 * classes, *shape), dtype=np.uint8)
        x.reshape(len(y), -1)[np.arange(len(y)), y] = 255  # something to learn
        cut = 6 * classes
        np.savez(folder / f"{name}.npz", x_train=x[:cut], y_train=y[:cut], x_test=x[cut:], y_test=y[cut:])
    return folder


class Images(torch.utils.data.Dataset):
    """Images as Avalanche's own data sets give them to its benchmarks."""

    def __init__(self, x, y):
        self.x, self.targets = x.float() / 255, y.tolist()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.targets[i]


@pytest.fixture(scope="module")
def theirs(root):
    """`theirs(name, n, **options)`: Avalanche's own benchmark, its data sets replaced by those of the root."""

    def build(name, experiences, **options):
        module = importlib.import_module(f"avalanche.benchmarks.classic.{HOME.get(name) or 'c' + name[5:].lower()}")
        with pytest.MonkeyPatch.context() as patch:
            for data, arrays in loaded.items():
                getter = lambda *_, a=arrays: (Images(a.x_train, a.y_train), Images(a.x_test, a.y_test))  # noqa: E731
                patch.setattr(module, f"get_{data}_dataset", getter, raising=False)
            with torch.random.fork_rng():
                plain = {"train_transform": None, "eval_transform": None}
                return getattr(module, name)(experiences, **plain, **options)

    loaded = {name: sources.load(name, root) for name in sources.SOURCES}
    HOME["SplitCIFAR110"] = "ccifar100"
    return build


def ours(name, root, **options):
    given = {"seed": 0, **options}
    return benchmark(name, data_root=root, **given)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", SPLITS)
def test_class_orders_and_splits_are_those_of_avalanche(name, seed, theirs, root):
    experiences = 6 if name == "SplitCIFAR110" else 5
    expected = theirs(name, experiences, seed=seed)
    scenario = ours(name, root, experiences=experiences, seed=seed)
    assert list(scenario.class_order) == expected.classes_order
    for i, experience in enumerate(expected.train_stream):
        assert {scenario.class_order[c] for c in scenario.classes[i]} == set(experience.classes_in_this_experience)
        got = [scenario.class_order[c] for c in scenario[i].train.y.tolist()]
        assert sorted(got) == sorted(experience.dataset.targets)


def test_the_first_half_of_cifar100_may_come_at_once(theirs, root):
    expected = theirs("SplitCIFAR100", 6, seed=3, first_exp_with_half_classes=True)
    scenario = ours("SplitCIFAR100", root, experiences=6, seed=3, first=50)
    assert [len(group) for group in scenario.classes] == expected.n_classes_per_exp
    assert list(scenario.class_order) == expected.classes_order


@pytest.mark.parametrize("name", ["PermutedMNIST", "RotatedMNIST"])
@pytest.mark.parametrize("seed", [0, 5])
def test_pixels_are_permuted_and_turned_as_by_avalanche(name, seed, theirs, root):
    expected = theirs(name, 3, seed=seed)
    scenario = ours(name, root, experiences=3, seed=seed)
    for i, experience in enumerate(expected.train_stream):
        got = scenario[i].train
        x, y = (torch.stack([torch.as_tensor(sample[k]) for sample in experience.dataset]) for k in (0, 1))
        assert torch.equal(y, got.y.sort(stable=True).values)  # Avalanche has them class by class
        assert torch.equal(x, got.x[got.y.argsort(stable=True)].float() / 255)
    assert (scenario.setting, scenario.classes[2]) == ("domain", tuple(range(10)))


def test_angles_may_be_given(theirs, root):
    expected = theirs("RotatedMNIST", 2, rotations_list=[30, -75])
    scenario = ours("RotatedMNIST", root, experiences=2, rotations=[30, -75])
    for i, experience in enumerate(expected.test_stream):
        of_class_0 = scenario[i].test.x[scenario[i].test.y == 0]
        assert torch.equal(of_class_0[1].float() / 255, experience.dataset[1][0])


@pytest.mark.parametrize(("name", "setting"), [("SplitMNIST", "class"), ("PermutedMNIST", "domain")])
def test_a_benchmark_object_is_the_same_scenario(name, setting, theirs, root):
    read = clframe.from_avalanche(theirs(name, 5, seed=2), class_names=list("0123456789"))
    scenario = ours(name, root, seed=2)
    assert (read.setting, read.classes, read.class_names) == (setting, scenario.classes, scenario.class_names)
    for i in range(5):
        a, b = read[i].train, scenario[i].train
        order_a, order_b = a.x.flatten(1).sum(1).argsort(), (b.x.float() / 255).flatten(1).sum(1).argsort()
        assert torch.equal(a.y[order_a], b.y[order_b])
        assert torch.equal(a.x[order_a], b.x[order_b].float() / 255)


def test_tasks_of_avalanche_are_tasks(theirs):
    for own in (False, True):
        given = theirs("SplitMNIST", 5, seed=1, return_task_id=True, class_ids_from_zero_in_each_exp=own)
        read = clframe.from_avalanche(given)
        assert read.setting == "task"
        assert read.classes == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
        assert set(read[3].test.y.tolist()) == {6, 7}


def test_accuracy_is_that_of_split_mnist_with_the_same_order(root):
    run = {"data_root": str(root), "device": "cpu", "seed": 4}
    results = clframe.run("avalanche:SplitMNIST", train={"epochs": 3, "batch_size": 4}, run=run)
    order = list(ours("SplitMNIST", root, seed=4).class_order)
    assert order != sorted(order)
    scenario = {"name": "split-mnist", "order": order}
    same = clframe.run(scenario, train={"epochs": 3, "batch_size": 4}, run=run)
    other = clframe.run("split-mnist", train={"epochs": 3, "batch_size": 4}, run=run)
    assert results.accuracy == same.accuracy
    assert results.accuracy != other.accuracy


def test_what_suits_it_goes_by_the_data():
    build = builder("scenario", "avalanche:SplitMNIST")
    assert suited(build, "avalanche:SplitMNIST")[0] == "mlp"
    assert suited(build, "avalanche:SplitCIFAR10")[0] == "resnet32"
    assert suited(build, "avalanche:SplitCIFAR10")[1]["optimizer"] == "sgd"
    assert clframe.config.resolve(scenario="avalanche:SplitCIFAR100").model.name == "resnet32"


def test_every_option_is_documented():
    assert all(option.doc for option in options_of(benchmark, skip=SUPPLIED))
    assert all(name in benchmark.__doc__ for name in BENCHMARKS)


def test_normalisation_and_augmentation_are_those_of_the_data_unless_chosen(root):
    assert not ours("SplitMNIST", root).transform.mean
    assert ours("SplitFMNIST", root, normalize=True).transform.mean == (0.2860,)
    assert ours("SplitCIFAR110", root).transform.augments
    assert ours("SplitCIFAR10", root, normalize=False, augment=False).transform == clframe.Transform()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("SplitMNITS", {}, "Avalanche has no classic benchmark `SplitMNITS`. Did you mean `SplitMNIST`?"),
        ("CORe50", {}, "`clframe.from_avalanche`"),
        ("PermutedMNIST", {"first": 2}, "`scenario.first` has no meaning in `avalanche:PermutedMNIST`"),
        ("SplitCIFAR110", {"first": 2}, "`scenario.first` has no meaning"),
        ("SplitCIFAR110", {"order": [1]}, "each of the class numbers 10 to 109 once"),
        ("RotatedMNIST", {"order": "natural"}, "`scenario.order` has no meaning"),
        ("SplitMNIST", {"rotations": [1]}, "`scenario.rotations` has no meaning"),
        ("RotatedMNIST", {"rotations": [1]}, "`scenario.rotations` has 1 angles for 5 experiences"),
        ("PermutedMNIST", {"seed": 2**32}, "takes seeds below 4294967296"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(name, options, words, root):
    with pytest.raises(UsageError) as caught:
        ours(name, root, **options)
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1


def test_the_name_alone_is_refused(root):
    with pytest.raises(UsageError, match="The scenario `avalanche` needs a variant"):
        build_scenario(Component("avalanche"), clframe.settings.RunSettings())


def test_every_classic_benchmark_of_avalanche_is_known():
    from avalanche.benchmarks import classic

    named = {name for name in dir(classic) if name[0].isupper() and name != "CLEARMetric"}
    assert named == {*BENCHMARKS, *ELSEWHERE}
