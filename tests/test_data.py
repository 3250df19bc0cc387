from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from clframe.data.batch import Batch, ImageData, join
from clframe.data.build import Arrays, change_domains, split_classes, suits
from clframe.data.scenario import Scenario
from clframe.data.transform import Transform
from clframe.errors import DataError, UsageError


def arrays(classes: int = 4, train: int = 5, test: int = 2) -> Arrays:
    """`train` and `test` images of each class, interleaved; every image holds its own number."""

    def part(count: int, start: int) -> tuple[Tensor, Tensor]:
        number = torch.arange(start, start + count * classes, dtype=torch.uint8)
        return number.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone(), torch.arange(count * classes) % classes

    x_train, y_train = part(train, 0)
    x_test, y_test = part(test, 100)
    return Arrays("toy", x_train, y_train, x_test, y_test, tuple("abcdefghijkl"[:classes]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Transform


def test_normalize_scales_subtracts_the_mean_and_divides_by_the_deviation():
    x = torch.randint(256, (3, 2, 4, 5), dtype=torch.uint8, generator=seeded())
    mean, std = (0.25, 0.5), (0.5, 2.0)
    expected = torch.stack([(x[:, c].double() / 255 - mean[c]) / std[c] for c in range(2)], dim=1)
    out = Transform(mean=mean, std=std).normalize(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(Transform(scale=16).normalize(x), x.float() / 16)


@pytest.mark.parametrize("transform", [Transform(), Transform(scale=2, mean=(0.5,), std=(2.0,))])
def test_normalize_leaves_a_users_float_images_alone(transform):
    x = torch.rand(2, 1, 3, 3, generator=seeded())
    before = x.clone()
    assert not torch.equal(transform.normalize(x), x)
    assert torch.equal(x, before)


def test_normalize_lets_gradients_through_after_use_in_inference_mode():
    transform = Transform(mean=(0.125,), std=(0.25,))
    with torch.inference_mode():
        transform.normalize(torch.zeros(1, 1, 2, 2))
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    transform.normalize(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / (255 * 0.25)))


@pytest.mark.parametrize(("pad", "flip"), [(4, True), (1, False), (0, True)])
def test_augment_equals_cropping_and_flipping_image_by_image(pad, flip):
    x = torch.randint(1, 256, (40, 3, 7, 6), dtype=torch.uint8, generator=seeded())
    draws = seeded(5)
    top, left = torch.randint(2 * pad + 1, (2, 40, 1), generator=draws).squeeze(-1).tolist()
    mirrored = torch.randint(1 + flip, (40,), generator=draws).tolist()
    expected = []
    for image, t, s, m in zip(x, top, left, mirrored, strict=True):
        padded = torch.zeros(3, 7 + 2 * pad, 6 + 2 * pad, dtype=torch.uint8)
        padded[:, pad : pad + 7, pad : pad + 6] = image
        crop = padded[:, t : t + 7, s : s + 6]
        expected.append(crop.flip(2) if m else crop)
    out = Transform(pad=pad, flip=flip).augment(x, seeded(5))
    assert out.dtype == torch.uint8
    assert torch.equal(out, torch.stack(expected))
    assert len(set(mirrored)) == 1 + flip


def test_augment_leaves_what_is_no_image_and_what_needs_nothing():
    vectors, images = torch.rand(3, 8), torch.rand(3, 1, 4, 4)
    assert Transform(pad=2, flip=True).augment(vectors, seeded()) is vectors
    assert Transform().augment(images, seeded()) is images
    assert not Transform().augments
    assert Transform(flip=True).augments


def test_batch_augments_only_with_a_generator():
    rows = ImageData(torch.randint(256, (8, 1, 4, 4), dtype=torch.uint8, generator=seeded()), torch.zeros(8))
    transform = Transform(pad=1)
    assert torch.equal(transform.batch(rows).x, rows.x.float() / 255)
    augmented = transform.batch(rows, seeded(3))
    assert torch.equal(augmented.x, transform.augment(rows.x, seeded(3)).float() / 255)
    assert torch.equal(augmented.index, torch.full((8,), -1))


# ImageData and Batch


def test_image_data_fills_columns_and_picks_rows():
    x = torch.arange(4.0).view(4, 1)
    data = ImageData(x, torch.tensor([3, 1, 0, 2], dtype=torch.uint8), task=7, targets={"old": x * 10})
    assert data.y.dtype == torch.int64
    assert data.task.tolist() == [7] * 4
    assert data.weight.tolist() == [1.0] * 4
    assert data.origin.tolist() == [0] * 4
    assert data.index.tolist() == [-1] * 4
    for where in (torch.tensor([2, 0]), torch.tensor([True, False, True, False])):
        picked = data.rows(where)
        assert torch.equal(picked.x, x[where])
        assert torch.equal(picked.y, data.y[where])
        assert torch.equal(picked.targets["old"], x[where] * 10)
    assert data.to("cpu") is data
    assert data.marked(2).origin.tolist() == [2] * 4
    assert data.origin.tolist() == [0] * 4


def test_image_data_refuses_labels_that_are_too_few():
    with pytest.raises(DataError, match="3 images came with 2 labels"):
        ImageData(torch.zeros(3, 1), torch.zeros(2))


def test_concat_keeps_order_and_fills_missing_targets_with_zeros():
    a = ImageData(torch.zeros(2, 1), torch.tensor([0, 1]), task=0, origin=0)
    b = ImageData(torch.ones(1, 1), torch.tensor([2]), task=1, origin=2, targets={"z": torch.ones(1, 3)})
    both = ImageData.concat([a, b])
    assert both.x.flatten().tolist() == [0, 0, 1]
    assert both.y.tolist() == [0, 1, 2]
    assert both.task.tolist() == [0, 0, 1]
    assert both.origin.tolist() == [0, 0, 2]
    assert both.targets["z"].tolist() == [[0] * 3, [0] * 3, [1] * 3]
    assert ImageData.concat([a]) is a


def test_join_keeps_order_and_fills_missing_targets_with_zeros():
    def batch(count: int, **targets: Tensor) -> Batch:
        return Transform(scale=1).batch(ImageData(torch.rand(count, 2), torch.arange(count), targets=targets))

    a, b, c = batch(2, s=torch.full((2,), 3.0)), batch(1), batch(2, t=torch.ones(2, 2, dtype=torch.int64))
    joined = join([a, b, c])
    assert len(joined) == 5
    assert torch.equal(joined.x, torch.cat([a.x, b.x, c.x]))
    assert joined.y.tolist() == [0, 1, 0, 0, 1]
    assert joined.targets["s"].tolist() == [3, 3, 0, 0, 0]
    assert joined.targets["t"].tolist() == [[0, 0], [0, 0], [0, 0], [1, 1], [1, 1]]
    assert joined.targets["t"].dtype == torch.int64
    assert join([a]) is a


# Arrays


def test_arrays_hold_labels_of_any_integer_type_as_int64():
    toy = arrays()
    for dtype in (torch.uint8, torch.int16, torch.int32):
        made = Arrays("n", toy.x_train, toy.y_train.to(dtype), toy.x_test, toy.y_test.to(dtype), tuple("abcd"))
        assert torch.equal(made.y_train, toy.y_train)
        assert made.y_train.dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"y_train": torch.zeros(3, dtype=torch.int64)}, "20 training images and 3 labels"),
        ({"y_test": torch.full((8,), 4)}, "test labels of `toy` go from 4 to 4; for 4 classes they must lie in 0 to 3"),
        ({"y_test": torch.full((8,), -1)}, "go from -1 to -1"),
        ({"y_train": torch.zeros(20)}, "training labels of `toy` are torch.float32"),
        ({"y_train": torch.zeros(20, 1, dtype=torch.int64)}, r"torch.int64 \[20, 1\]"),
        ({"x_test": torch.zeros(8, 1, 3, 2)}, r"\[1, 2, 2\], the test images \[1, 3, 2\]"),
        ({"x_test": torch.zeros(0, 1, 2, 2), "y_test": torch.zeros(0, dtype=torch.int64)}, "has no test images"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, sentence):
    toy = arrays()
    fields = {key: getattr(toy, key) for key in ("x_train", "y_train", "x_test", "y_test")}
    with pytest.raises(DataError, match=sentence):
        Arrays("toy", **(fields | change), class_names=tuple("abcd"))


def test_limited_takes_the_first_images_of_each_class():
    limited = arrays(classes=3, train=4, test=2).limited(1)
    assert limited.y_train.tolist() == [0, 1, 2]
    assert limited.x_train[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert limited.x_test[:, 0, 0, 0].tolist() == [100, 101, 102]
    limited = arrays(classes=2, train=4, test=2).limited(3)
    assert limited.x_train[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert limited.y_test.tolist() == [0, 1, 0, 1]
    toy = arrays()
    assert toy.limited(None) is toy


def test_checksum_is_sha256_of_images_and_labels():
    toy = arrays()
    parts = [t.numpy().tobytes() for t in (toy.x_train, toy.y_train, toy.x_test, toy.y_test)]
    expected = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    assert toy.checksum() == expected
    toy.x_test[0, 0, 0, 0] += 1
    assert toy.checksum() != expected


# Scenarios


def labels_of(scenario: Scenario, part: str = "train") -> list[list[int]]:
    return [sorted(set(getattr(experience, part).y.tolist())) for experience in scenario]


@pytest.mark.parametrize("part", ["train", "test"])
def test_split_classes_labels_of_each_setting(part):
    apart = [[0, 1], [2, 3], [4, 5]]
    for setting, expected in (("class", apart), ("task", apart), ("domain", [[0, 1]] * 3)):
        scenario = split_classes("s", arrays(6), experiences=3, setting=setting)
        assert labels_of(scenario, part) == expected
        assert [list(group) for group in scenario.classes] == expected
        assert scenario.setting == setting
        assert [set(getattr(e, part).task.tolist()) for e in scenario] == [{0}, {1}, {2}]
    assert scenario.class_names == ("place 0", "place 1")


def test_split_classes_with_an_order_and_a_larger_first_group():
    order = [5, 0, 3, 1, 4, 2]
    data = arrays(6)
    scenario = split_classes("s", data, experiences=3, first=4, order=order)
    assert scenario.classes == ((0, 1, 2, 3), (4,), (5,))
    assert scenario.class_names == ("f", "a", "d", "b", "e", "c")
    assert scenario.class_order == tuple(order)
    for experience in scenario:
        for part, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
            rows = getattr(experience, part)
            assert torch.equal(rows.x, x[rows.index])
            assert [order[label] for label in rows.y.tolist()] == y[rows.index].tolist()
    assert sorted(i for e in scenario for i in e.train.index.tolist()) == list(range(30))
    assert split_classes("s", data, experiences=1, first=6).classes == (tuple(range(6)),)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"experiences": 4}, "`scenario.experiences` is 4: 6 classes of toy cannot be divided evenly"),
        ({"experiences": 3, "first": 3}, "`scenario.experiences` is 3 with `scenario.first` 3"),
        ({"experiences": 2, "first": 6}, "is 2 with"),
        ({"experiences": 1, "first": 5}, "is 1 with"),
        ({"experiences": 7}, "is 7"),
        ({"experiences": 2, "first": 8}, "is 2 with"),
        ({"experiences": 2, "order": [0, 1, 2, 3, 4, 4]}, "`scenario.order` is .*class numbers 0 to 5 once"),
        ({"experiences": 2, "order": [0, 1]}, "`scenario.order`"),
        ({"experiences": 2, "first": 2, "setting": "domain"}, "`scenario.first` is 2; .* at least 4"),
    ],
)
def test_split_classes_refuses(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        split_classes("s", arrays(6), **options)


def test_change_domains_labels_and_images_of_each_setting():
    data = arrays(3)

    def change(i: int, x: Tensor) -> Tensor:
        return x + i

    shared = change_domains("d", data, change, experiences=2)
    assert shared.classes == ((0, 1, 2), (0, 1, 2))
    assert shared.class_names == ("a", "b", "c")
    assert labels_of(shared) == labels_of(shared, "test") == [[0, 1, 2]] * 2
    for setting in ("class", "task"):
        apart = change_domains("d", data, change, experiences=2, setting=setting)
        assert apart.classes == ((0, 1, 2), (3, 4, 5))
        assert labels_of(apart) == labels_of(apart, "test") == [[0, 1, 2], [3, 4, 5]]
        assert apart.class_names == ("a (0)", "b (0)", "c (0)", "a (1)", "b (1)", "c (1)")
    for scenario in (shared, apart):
        for i, experience in enumerate(scenario):
            assert torch.equal(experience.train.x, data.x_train + i)
            assert torch.equal(experience.test.x, data.x_test + i)
            assert experience.train.index.tolist() == list(range(15))
            assert set(experience.test.task.tolist()) == {i}


def test_iterating_is_fresh_each_time_and_images_are_loaded_once():
    loads: list[tuple[int, str]] = []

    def load(i: int, part: str) -> ImageData:
        loads.append((i, part))
        return ImageData(torch.zeros(2, 1), torch.tensor([0, 1]) + 2 * i)

    scenario = Scenario("s", "class", [(0, 1), (2, 3), (4, 5)], "abcdef", (1,), load)
    pairs = [(a.index, b.index) for a in scenario for b in scenario]
    assert pairs == [(i, j) for i in range(3) for j in range(3)]
    assert loads == []
    experience = scenario[1]
    assert experience.train is experience.train
    assert loads == [(1, "train")]
    assert (len(scenario), scenario[2].classes) == (3, (4, 5))
    for outside in (-1, 3):
        with pytest.raises(IndexError, match="has 3 experiences"):
            scenario[outside]


def test_plugins_get_no_test_images():
    scenario = split_classes("s", arrays(), experiences=2)
    experience = scenario[1]
    handed = experience.for_training()
    assert handed.train is experience.train
    assert len(handed.val) == 0
    assert (handed.index, handed.task, handed.classes) == (1, 1, (2, 3))
    with pytest.raises(UsageError, match="asked for test images"):
        _ = handed.test
    described = scenario.described()
    assert (described.classes, described.class_names) == (scenario.classes, scenario.class_names)
    assert described.checksum == scenario.checksum
    with pytest.raises(UsageError, match="train images of experience 0 were asked for"):
        _ = described[0].train


@pytest.mark.parametrize(
    ("classes", "names", "sentence"),
    [
        ([(0, 1), (3,)], "abcd", r"Experience 1 .* brings the labels \[3\]; new labels must continue from 2"),
        ([(1, 0)], "ab", "Experience 0"),
        ([(0, 1), (2,)], "ab", "3 labels, but 2 class names"),
        ([], "ab", "0 labels"),
    ],
)
def test_labels_must_be_contiguous_and_named(classes, names, sentence):
    with pytest.raises(UsageError, match=sentence):
        Scenario("s", "class", classes, names, (1,), lambda i, part: ImageData(torch.zeros(0, 1), torch.zeros(0)))


def test_labels_may_come_back():
    scenario = Scenario("s", "class", [(0, 1), (0, 2)], "abc", (1,), lambda i, part: pytest.fail("read"))
    assert scenario.classes == ((0, 1), (0, 2))


# Validation


def held_out(seed: int, share: float = 0.2, train: int = 10) -> tuple[list[list[int]], list[list[int]]]:
    scenario = split_classes("s", arrays(4, train), experiences=2)
    scenario.hold_out(share, seed)
    return [e.train.index.tolist() for e in scenario], [e.val.index.tolist() for e in scenario]


def test_validation_split_is_stratified_disjoint_and_complete():
    scenario = split_classes("s", arrays(4, train=10), experiences=2)
    whole = [sorted(e.train.index.tolist()) for e in scenario]
    scenario.hold_out(0.2, seed=1)
    for experience, expected in zip(scenario, whole, strict=True):
        assert experience.val.y.bincount()[list(experience.classes)].tolist() == [2, 2]
        assert experience.train.y.bincount()[list(experience.classes)].tolist() == [8, 8]
        assert sorted(experience.train.index.tolist() + experience.val.index.tolist()) == expected
        assert len(experience.test) == 4


def test_validation_split_is_a_function_of_the_seed():
    assert held_out(3) == held_out(3)
    splits = [held_out(seed) for seed in range(5)]
    assert all(a != b for a in splits for b in splits if a is not b)
    assert len({str([sorted(i // 4 for i in held) for held in val]) for _, val in splits}) > 1


def test_nothing_is_held_out_by_default_and_never_the_last_image_of_a_class():
    train, val = held_out(0, share=0.0)
    assert [len(rows) for rows in train] == [20, 20]
    assert val == [[], []]
    train, val = held_out(0, share=0.9, train=1)
    assert [len(rows) for rows in train] == [2, 2]
    assert val == [[], []]


# suits


def test_suits_marks_a_builder_with_its_defaults():
    train = {"epochs": 3}

    @suits(backbone={"name": "mlp", "hidden": [256, 256]}, train=train)
    def build() -> Scenario:
        raise NotImplementedError

    marks = vars(build)
    assert marks["backbone"] == {"name": "mlp", "hidden": [256, 256]}
    assert marks["train"] == train
    assert marks["train"] is not train
