from __future__ import annotations

import inspect
from importlib.metadata import entry_points

import numpy as np
import pytest
import torch
from torch.nn import functional

from clframe import registry
from clframe.data.build import Arrays
from clframe.data.transform import Transform
from clframe.errors import DataError, UsageError
from clframe.options import options_of, validated
from clframe.scenarios import cifar, digits, mnist, sources, streams
from clframe.settings import TrainSettings

BUILDERS = [
    digits.split_digits,
    digits.permuted_digits,
    digits.rotated_digits,
    mnist.split_mnist,
    mnist.split_fmnist,
    mnist.permuted_mnist,
    mnist.rotated_mnist,
    cifar.split_cifar10,
    cifar.split_cifar100,
]
OF_FILES = BUILDERS[3:]
SPLITS = [build for build in BUILDERS if "order" in inspect.signature(build).parameters]
DATA = {
    mnist.split_fmnist: "fmnist",
    cifar.split_cifar10: "cifar10",
    cifar.split_cifar100: "cifar100",
}
ORDER_OF_SEED_0 = (6, 1, 0, 5, 3, 8, 7, 9, 2, 4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root with three training images and one test image of each class, of each data set."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, shape, classes in (
        ("mnist", (28, 28), 10),
        ("fmnist", (28, 28), 10),
        ("cifar10", (32, 32, 3), 10),
        ("cifar100", (32, 32, 3), 100),
    ):
        x = rng.integers(256, size=(4 * classes, *shape), dtype=np.uint8)
        y = np.arange(4 * classes, dtype=np.uint8) % classes
        cut = 3 * classes
        np.savez(folder / f"{name}.npz", x_train=x[:cut], y_train=y[:cut], x_test=x[cut:], y_test=y[cut:])
    return folder


def built(build, root, **options):
    return build(**({"data_root": root} if build in OF_FILES else {}), **options)


def named(build):
    return build.__name__


# All builders


@pytest.mark.parametrize(
    "offer", [o for o in registry.offers("scenario") if o.package == "clframe"], ids=lambda o: o.name
)
def test_the_description_that_is_read_from_the_source_is_that_of_the_docstring(offer):
    assert offer.description == " ".join(offer.load().__doc__.partition("\n\n")[0].split())


@pytest.mark.parametrize("build", BUILDERS, ids=named)
def test_every_option_is_documented_and_has_a_default(build):
    options = [option for option in options_of(build) if option.name != "data_root"]
    assert all(option.doc for option in options)
    assert set(validated(build, {}, "scenario", skip=("data_root",))) == {option.name for option in options}
    assert build.__doc__.count("Options:") == 1
    for option, value in (("experiences", 0), ("limit", 0), ("setting", "both"), ("seed", -1)):
        if option in {o.name for o in options}:
            with pytest.raises(UsageError, match=f"`scenario.{option}` is {value!r}"):
                validated(build, {option: value}, "scenario", skip=("data_root",))


@pytest.mark.parametrize("build", BUILDERS, ids=named)
def test_every_builder_suits_a_backbone_and_valid_training_settings(build):
    model = build.backbone if isinstance(build.backbone, str) else build.backbone["name"]
    assert model in {point.name for point in entry_points(group="clframe.backbones")}
    settings = TrainSettings(**build.train)
    assert (settings.epochs is None) != (settings.iterations is None)


def test_entry_points_name_the_builders():
    points = {p.name: p.load() for p in entry_points(group="clframe.scenarios") if p.dist.name == "clframe"}
    assert {build.__name__.replace("_", "-") for build in BUILDERS} <= set(points)
    assert points["split-cifar"] is points["split-cifar10"] is cifar.split_cifar10
    for build in BUILDERS:
        assert points[build.__name__.replace("_", "-")] is build


@pytest.mark.parametrize("setting", ["class", "task", "domain"])
@pytest.mark.parametrize("build", BUILDERS, ids=named)
def test_every_scenario_in_every_setting(build, setting, root):
    scenario = built(build, root, setting=setting, experiences=2, limit=2)
    arrays_classes = 100 if build is cifar.split_cifar100 else 10
    each = arrays_classes // 2 if build in SPLITS else arrays_classes
    shared = tuple(range(each))
    assert scenario.name == build.__name__.replace("_", "-")
    assert scenario.setting == setting
    assert scenario.classes == (shared, shared if setting == "domain" else tuple(range(each, 2 * each)))
    assert len(scenario.class_names) == each * (1 if setting == "domain" else 2)
    for i, experience in enumerate(scenario):
        for data, per_class in ((experience.train, 2), (experience.test, 2 if "digits" in scenario.name else 1)):
            assert data.x.shape == (each * per_class, *scenario.input_shape)
            assert data.x.dtype == torch.uint8
            assert sorted(set(data.y.tolist())) == list(scenario.classes[i])
            assert set(data.task.tolist()) == {i}
    assert len(scenario.checksum) == 64


def test_default_shapes_of_the_streams(root):
    sizes = {build: [len(group) for group in built(build, root).classes] for build in BUILDERS}
    assert sizes[digits.split_digits] == sizes[mnist.split_mnist] == sizes[cifar.split_cifar10] == [2] * 5
    assert sizes[cifar.split_cifar100] == sizes[digits.permuted_digits] * 2 == [10] * 10
    assert sizes[mnist.permuted_mnist] == [10] * 10
    assert sizes[mnist.rotated_mnist] == sizes[digits.rotated_digits] == [10] * 5


# Splits


@pytest.mark.parametrize("build", SPLITS, ids=named)
def test_orders(build, root):
    natural = built(build, root)
    count = len(natural.class_order)
    assert natural.class_order == tuple(range(count))
    first, again, other = (built(build, root, order="random", seed=seed).class_order for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(count))
    chosen = list(range(count))[::-1]
    reversed_ = built(build, root, order=chosen)
    assert reversed_.class_order == tuple(chosen)
    assert reversed_.class_names == natural.class_names[::-1]
    assert built(build, root, order="random").class_order == built(build, root, order="random", seed=0).class_order
    with pytest.raises(UsageError, match=r"`scenario.order` is \[0, 1\]"):
        built(build, root, order=[0, 1])


def test_the_order_of_a_seed_never_changes(root):
    assert built(digits.split_digits, root, order="random", seed=0).class_order == ORDER_OF_SEED_0


def test_first_experience_may_be_larger(root):
    scenario = built(cifar.split_cifar100, root, first=50, experiences=6)
    assert [len(group) for group in scenario.classes] == [50, 10, 10, 10, 10, 10]


def test_icarl_order(root):
    order = built(cifar.split_cifar100, root, order="icarl").class_order
    assert order[:16] == (68, 56, 78, 8, 23, 84, 90, 65, 74, 76, 40, 89, 3, 92, 55, 9)
    assert sorted(order) == list(range(100))
    with pytest.raises(UsageError, match=r"`scenario\.order` is 'icarl'"):
        validated(cifar.split_cifar10, {"order": "icarl"}, "scenario", skip=("data_root",))


def test_normalisation_and_augmentation_are_options(root):
    assert built(mnist.split_mnist, root).transform == Transform()
    assert built(mnist.split_mnist, root, normalize=True).transform == Transform(mean=(0.1307,), std=(0.3081,))
    assert built(mnist.split_fmnist, root, normalize=True).transform == Transform(mean=(0.286,), std=(0.353,))
    assert built(mnist.rotated_mnist, root, normalize=True).transform.mean == (0.1307,)
    transform = built(cifar.split_cifar10, root).transform
    assert (transform.pad, transform.flip) == (4, True)
    assert (transform.mean, transform.std) == ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    assert built(cifar.split_cifar100, root, normalize=False, augment=False).transform == Transform()
    assert built(digits.split_digits, root).transform == Transform(scale=16)


# Digits


def test_digits_are_scikit_learns_in_a_fixed_split():
    from sklearn.datasets import load_digits

    published = load_digits()
    arrays = digits.digits()
    order = np.random.RandomState(0).permutation(1797)
    for x, y, rows in (
        (arrays.x_train, arrays.y_train, order[:1297]),
        (arrays.x_test, arrays.y_test, order[1297:]),
    ):
        np.testing.assert_array_equal(x[:, 0].numpy(), published.images[rows])
        np.testing.assert_array_equal(y.numpy(), published.target[rows])
    assert (len(arrays.y_train), len(arrays.y_test)) == (1297, 500)
    assert (int(arrays.x_train.min()), int(arrays.x_train.max())) == (0, 16)
    assert arrays.checksum() == digits.digits().checksum()


def test_digits_without_scikit_learn_or_with_a_damaged_file(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="not installed; install it"):
        digits.split_digits()
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    folder = tmp_path / "datasets" / "data"
    with pytest.raises(DataError, match="install scikit-learn again"):
        digits.split_digits()
    folder.mkdir(parents=True)
    (folder / "digits.csv.gz").write_bytes(b"\x1f\x8b????")
    with pytest.raises(DataError, match=r"digits\.csv\.gz"):
        digits.split_digits()


# Permutations


@pytest.mark.parametrize("build", [digits.permuted_digits, mnist.permuted_mnist], ids=named)
def test_every_experience_has_a_permutation_of_its_own(build, root):
    scenario = built(build, root, experiences=4, seed=7)
    original = digits.digits() if "digits" in scenario.name else plain_mnist(root)
    orders = []
    for experience in scenario:
        pixels = original.x_train[0].numel()
        ramp = torch.arange(pixels)
        x, x0 = experience.train.x.flatten(1), original.x_train.flatten(1)
        order = torch.from_numpy(streams.random_state(7, experience.index).permutation(pixels))
        assert torch.equal(order.sort().values, ramp)
        assert torch.equal(x, x0[:, order])
        assert torch.equal(experience.test.x.flatten(1), original.x_test.flatten(1)[:, order])
        orders.append(tuple(order.tolist()))
    assert len(set(orders)) == 4


def plain_mnist(root) -> Arrays:
    return sources.load("mnist", root)


def test_a_permutation_depends_on_the_seed_and_the_index_alone(root):
    few, many = (digits.permuted_digits(experiences=n, seed=1) for n in (5, 10))
    assert torch.equal(few[3].train.x, many[3].train.x)
    other = digits.permuted_digits(experiences=5, seed=2)
    assert not torch.equal(few[3].train.x, other[3].train.x)
    assert torch.equal(few[3].train.x, few[3].train.x)
    task = digits.permuted_digits(experiences=5, seed=1, setting="task")
    assert torch.equal(few[3].train.x, task[3].train.x)


def test_channels_are_permuted_alike():
    x = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8).expand(-1, 3, -1, -1)
    y = torch.tensor([0, 1])
    arrays = Arrays("grey", x, y, x, y, ("a", "b"))
    moved = streams.permute_pixels("p", arrays, streams.Permuted(experiences=1, seed=0))[0].train.x
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert torch.equal(moved[:, 0], moved[:, 2])


# Rotations


def test_right_angles_move_pixels_exactly():
    x = torch.randint(256, (3, 2, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for quarter in range(5):
        assert torch.equal(streams.rotate(x, 90 * quarter), torch.rot90(x, quarter, (2, 3)))
        assert torch.equal(streams.rotate(x, 90 * quarter, chunk=2), torch.rot90(x, quarter, (2, 3)))


def test_rotation_interpolates_bilinearly_and_rounds():
    x = torch.randint(256, (1, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    turned = streams.rotate(x, 30.0)[0, 0]
    image = functional.pad(x[0, 0].double(), (2,) * 4)
    cosine, sine = np.cos(np.pi / 6), np.sin(np.pi / 6)
    for row in range(8):
        for column in range(8):
            across, down = column - 3.5, row - 3.5
            s = min(max(cosine * across - sine * down + 3.5, -1.5), 8.5)
            t = min(max(sine * across + cosine * down + 3.5, -1.5), 8.5)
            i, j = int(np.floor(t)), int(np.floor(s))
            corner = image[i + 2 : i + 4, j + 2 : j + 4]
            weights = torch.tensor([[1 - (t - i)], [t - i]]) @ torch.tensor([[1 - (s - j), s - j]])
            assert abs(float((corner * weights).sum()) - int(turned[row, column])) <= 0.5 + 1e-3


@pytest.mark.parametrize("build", [digits.rotated_digits, mnist.rotated_mnist], ids=named)
def test_experiences_are_turned_evenly(build, root):
    scenario = built(build, root, experiences=4, max_angle=360.0)
    original = digits.digits() if "digits" in scenario.name else plain_mnist(root)
    for quarter, experience in enumerate(scenario):
        assert torch.equal(experience.train.x, torch.rot90(original.x_train, quarter, (2, 3)))
        assert torch.equal(experience.test.x, torch.rot90(original.x_test, quarter, (2, 3)))
    half = built(build, root, experiences=2)
    assert torch.equal(half[1].train.x, torch.rot90(original.x_train, 1, (2, 3)))
