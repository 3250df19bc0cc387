"""Values of images in memory that can only be a mistake, and images that training and test share: one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import clframe
from clframe import Arrays, DataError, ImageData, Scenario, Transform, UsageError, change_domains, split_classes

N = 24
RAW = torch.randint(256, (2 * N, 3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 4
NORMAL = Transform(mean=(0.5,) * 3, std=(0.25,) * 3)


def arrays(x: Any = RAW, scale: float = 255.0, tests: Any = None, **rest: Any) -> Arrays:
    tests = x[N:] if tests is None else tests
    return Arrays("shapes", x[:N], Y, tests, Y[: len(tests)], tuple("abcd"), Transform(scale=scale), **rest)


def custom(x: Tensor, scale: float = 255.0, **options: Any) -> Scenario:
    """A scenario of two experiences whose images a function gives, as users write them."""

    def load(i: int, part: str) -> ImageData:
        return ImageData(x[:N] if part == "train" else x[N:], Y % 2 + 2 * i, task=i)

    shape = tuple(x.shape[1:])
    return Scenario(
        "custom", "class", [[0, 1], [2, 3]], tuple("abcd"), shape, load, transform=Transform(scale=scale), **options
    )


def with_value(value: float) -> Tensor:
    x = RAW.float()
    x[5, 0, 0, 0] = value
    return x


WRONG: dict[str, tuple[Callable[[], Any], float, str]] = {
    "floats from 0 to 1": (lambda: RAW.float() / 255, 255, r"from 0 to 1 only, and are divided by 255"),
    "floats of 64 bits in NumPy": (lambda: RAW.numpy() / 255, 255, r"from 0 to 1 only"),
    "floats of 16 bits": (lambda: (RAW.float() / 255).half(), 255, r"from 0 to 1 only"),
    "floats that overshoot": (lambda: RAW.float() / 245, 255, r"from 0 to 1.04 only"),
    "another scale": (lambda: RAW.float() / 255, 16, r"divided by 16 .*or values from 0 to 16"),
    "black and white": (lambda: RAW > 100, 255, r"from 0 to 1 only"),
    "whole numbers 0 and 1": (lambda: (RAW > 100).to(torch.uint8), 255, r"from 0 to 1 only"),
    "normalized": (lambda: NORMAL.normalize(RAW), 255, r"from -2 to 2, .*normalized"),
    "floats from -1 to 1": (lambda: RAW.float() / 127.5 - 1, 255, "normalized"),
    "normalized pixel by pixel": (lambda: 40 * NORMAL.normalize(RAW) / 2, 255, "normalized"),
    "not a number": (lambda: with_value(torch.nan), 255, r"1 of the 24, .* image 5, "),
    "infinity, whatever the scale": (lambda: with_value(torch.inf) / 255, 1, " image 5"),
    "complex numbers": (lambda: RAW.to(torch.complex64), 1, r"complex numbers \(torch.complex64\)"),
    "channels last": (lambda: RAW.permute(0, 2, 3, 1), 255, r"are \[6, 8, 3\], .*height, width and channels"),
    "channels last, of floats": (lambda: RAW.permute(0, 2, 3, 1) / 255, 1, r"x.permute\(0, 3, 1, 2\)"),
    "grey, channels last": (lambda: RAW.permute(0, 2, 3, 1)[..., :1], 255, r"are \[6, 8, 1\]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_arrays_that_can_only_be_a_mistake_are_refused_before_training(kind: str):
    make, scale, words = WRONG[kind]
    x = make()
    with pytest.raises(DataError, match=f"The training images of `shapes` .*{words}") as refused:
        arrays(x, scale)
    assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match="The test images of `shapes`"):
        arrays(RAW.float() / 255 * scale, scale, x[:N])


@pytest.mark.parametrize("kind", [k for k in WRONG if k != "whole numbers 0 and 1"])
def test_a_custom_scenario_is_refused_when_an_experience_is_loaded(kind: str):
    make, scale, words = WRONG[kind]
    stream = custom(torch.as_tensor(make()), scale)
    with pytest.raises(DataError, match=f"The training images of experience 2 of `custom` .*{words}"):
        len(stream[1].train)
    with pytest.raises(DataError, match="The training images of experience 1 of `custom`"):
        clframe.run(stream, "mlp", train={"epochs": 1})


def test_changed_images_are_checked_as_they_are_shown():
    stream = change_domains("turned", arrays(RAW.float()), lambda i, x: x / 255 if i else x, experiences=2)
    assert len(stream[0].train) == N
    for part in ("train", "val", "test"):
        with pytest.raises(DataError, match=r"(training|test) images of experience 2 of `turned`"):
            getattr(stream[1], part)


GOOD: dict[str, tuple[Callable[[], Tensor], float]] = {
    "raw values as floats": (lambda: RAW.float(), 255),
    "floats from 0 to 1 as they are": (lambda: RAW.float() / 255, 1),
    "normalized, as they are": (lambda: NORMAL.normalize(RAW), 1),
    "black": (lambda: RAW * 0.0, 255),
    "raw values that overshoot": (lambda: RAW.float() - 10, 255),
    "centred raw values": (lambda: RAW.float() - 128, 255),
    "dark images beside bright ones": (lambda: torch.cat([RAW[:1] * 0 + 1, RAW[1:]]), 255),
    "small images of many channels": (lambda: RAW[:, :1].expand(-1, 5, -1, -1)[..., :4, :4], 255),
    "channels last is first, too": (lambda: RAW[..., :3], 255),
    "vectors": (lambda: RAW.flatten(1), 255),
}


@pytest.mark.parametrize("kind", GOOD)
def test_what_may_be_meant_is_taken(kind: str):
    make, scale = GOOD[kind]
    x = make()
    assert torch.equal(custom(x, scale)[0].train.x, x[:N])
    taken = arrays(x, scale).x_train
    assert isinstance(taken, Tensor)
    assert torch.equal(taken, x[:N])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("values") / "r"
    stream = split_classes("shapes", arrays(), experiences=2)
    clframe.run(stream, "mlp", train={"epochs": 1}, run={"output": str(folder)})
    return clframe.load(folder)


@pytest.mark.parametrize("kind", [k for k in WRONG if WRONG[k][1] == 255 and k != "whole numbers 0 and 1"])
def test_a_trained_model_takes_raw_images_alone(kind: str, trained: Any):
    x = torch.as_tensor(WRONG[kind][0]())[:N]
    for ask in (trained, trained.predict):
        with pytest.raises(UsageError, match=r"^The images (have values|are \[6, 8)"):
            ask(x)
    expected = trained(RAW[:N])
    assert torch.equal(trained(RAW[:N].float()), expected)
    assert [p.answers[0].label for p in trained.predict(RAW[:N].double())] == expected.argmax(1).tolist()


def test_one_image_of_8_bits_may_be_as_good_as_black(trained: Any):
    x = torch.zeros(1, 3, 6, 8, dtype=torch.uint8)
    x[0, 0, 0, 0] = 1
    assert trained(x).shape == (1, 4)
    assert len(trained.predict(x)) == 1


# ------------------------------------------------------------------------- the same image on both sides


def shared(**options: Any) -> Scenario:
    """Test images 3 and 4 are training image 7, and test image 0 is training image 20."""
    tests = RAW[N:].clone()
    tests[3], tests[4], tests[0] = RAW[7], RAW[7], RAW[20]
    return split_classes("shapes", arrays(tests=tests), experiences=2, **options)


def test_images_in_memory_that_are_learned_and_tested_are_refused():
    with pytest.raises(DataError, match="3 of the 24 test images of `shapes`") as e:
        shared()
    assert "training image 7 and test image 3" in str(e.value)
    assert "`duplicates=drop`" in str(e.value)
    assert "`duplicates=keep`" in str(e.value)


def test_images_in_memory_are_dropped_from_training_or_kept_and_the_results_say_so():
    kept, dropped = shared(duplicates="keep"), shared(duplicates="drop")
    assert [len(e.train) for e in kept] == [12, 12]
    assert [len(e.train) for e in dropped] == [11, 11]  # 7 is of class 3, 20 of class 0
    assert [len(e.test) for e in dropped] == [12, 12]
    rows = [row for e in dropped for row in e.train.x]
    assert not any(torch.equal(row, RAW[i]) for row in rows for i in (7, 20))
    assert kept.checksum != dropped.checksum
    results = clframe.run(dropped, "mlp", train={"epochs": 1})
    [note] = results.data["notes"]
    assert note.endswith(": 2 training images are left out (`duplicates=drop`).")
    assert note in str(results)
    assert kept.notes[0].endswith("(`duplicates=keep`).")


def test_a_class_that_loses_all_training_images_is_named():
    tests = RAW[N:].clone()
    tests[:6] = RAW[:N][Y == 2]
    with pytest.raises(DataError, match="training images of the class `c` of `shapes`"):
        split_classes("shapes", arrays(tests=tests), experiences=2, duplicates="drop")


def test_domains_follow_the_same_rule():
    both = arrays(tests=RAW[5 : 5 + N])

    def same(i: int, x: Tensor) -> Tensor:
        return x

    with pytest.raises(DataError, match="19 of the 24 test images of `shapes`"):
        change_domains("d", both, same, experiences=2)
    assert len(change_domains("d", both, same, experiences=2, duplicates="drop")[1].train) == 5
    with pytest.raises(UsageError, match=r"`scenario.duplicates`"):
        change_domains("d", both, same, experiences=2, duplicates="dorp")


@pytest.mark.parametrize("of", [lambda x: x, lambda x: x.numpy(), lambda x: list(x)])
def test_one_tensor_for_both_parts_is_on_purpose(of: Callable[[Tensor], Any]):
    x = of(RAW[:N])
    one = Arrays("one", x, Y, x, Y, tuple("abcd"))
    for given in (one, one.limited(2)):
        stream = split_classes("one", given, experiences=2, duplicates="drop")
        assert len(stream[0].train) == len(stream[0].test) == len(given.y_train) // 2


@pytest.mark.parametrize("of", [lambda x: x, lambda x: x.numpy()])
def test_a_part_of_the_training_images_is_tested_with_and_said(of: Callable[[Tensor], Any]):
    """A slice of what is learned is on purpose; two slices that overlap are a slip."""
    x = of(RAW)
    part = Arrays("part", x[:N], Y, x[4:8], Y[4:8], tuple("abcd"))
    [note] = split_classes("part", part, experiences=2).notes
    assert re.match("4 of the 4 test images of `part` .* training image 4 and test", note)
    assert [len(e.train) for e in split_classes("part", part, experiences=2, duplicates="drop")] == [10, 10]
    with pytest.raises(DataError, match="2 of the 4 test images"):
        split_classes("part", Arrays("part", x[:N], Y, x[N - 2 : N + 2], Y[:4], tuple("abcd")), experiences=2)


def test_floats_are_compared_by_their_bytes_too():
    x = RAW.float()
    tests = x[N:].clone()
    tests[2] = x[2]
    with pytest.raises(DataError, match="training image 2 and test image 2"):
        split_classes("shapes", arrays(x, tests=tests), experiences=2)
    tests[2, 0, 0, 0] += 1
    assert not split_classes("shapes", arrays(x, tests=tests), experiences=2).notes
