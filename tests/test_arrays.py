"""What `Arrays`, `Transform` and `Trained.predict` take: values as people hold them, or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clframe import Arrays, DataError, Transform, UsageError, load, run, split_classes, testing

X = torch.arange(6 * 16, dtype=torch.uint8).view(6, 1, 4, 4)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def arrays(x: Any, y: Any, **rest: Any) -> Arrays:
    return Arrays("shapes", x, y, x, y, ("a", "b", "c"), **rest)


KINDS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "NumPy arrays": lambda: (X.numpy(), Y.numpy()),
    "lists of arrays and of numbers": lambda: (list(X.numpy()), Y.tolist()),
    "lists of tensors": lambda: (list(X), list(Y)),
    "nested lists of numbers, as real ones": lambda: (X.float().tolist(), tuple(Y.tolist())),
    "an array that runs backwards": lambda: (X.flip(0).numpy()[::-1], Y.flip(0).numpy()[::-1]),
    "labels of the other byte order": lambda: (X, Y.numpy().astype(">i4")),
    "labels of NumPy in a list": lambda: (X, list(Y.numpy())),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_values_of_other_kinds_are_the_tensors_that_they_stand_for(kind: str):
    taken = arrays(*KINDS[kind]())
    for x, y in ((taken.x_train, taken.y_train), (taken.x_test, taken.y_test)):
        assert torch.equal(x.to(torch.float64), X.to(torch.float64))
        assert torch.equal(y, Y)
        assert y.dtype == torch.int64


@pytest.mark.filterwarnings("error")
def test_an_array_that_cannot_be_written_is_taken_and_stays_as_it_is():
    x = X.numpy().copy()
    x.flags.writeable = False
    taken = arrays(x, Y).x_train
    assert isinstance(taken, torch.Tensor)
    taken.zero_()
    assert x.any()


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (X, ["a", "b", "c"] * 2, "The training labels of `shapes` cannot become a tensor"),
        (X, None, "The training labels of `shapes` cannot become a tensor"),
        ([[1, 2], [3]], Y, "The training images of `shapes` cannot become a tensor"),
        ([X[0], X[0, :, 1:]], Y, "all images of one shape"),
        (X, 1.5, "must be integers"),
    ],
)
def test_values_of_no_shape_or_kind_are_told(x: Any, y: Any, words: str):
    with pytest.raises(DataError, match=words):
        arrays(x, y)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": (0.5,)}, "1 values of `mean` and 0 of `std`"),
        ({"std": (0.5,)}, "0 values of `mean` and 1 of `std`"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 2}, "3 values of `mean` and 2 of `std`"),
        ({"mean": (0.5,), "std": (0.0,)}, "each must be above 0"),
        ({"mean": (float("nan"),), "std": (1.0,)}, "`scale` must be above 0"),
        ({"scale": 0.0}, "`scale` must be above 0"),
    ],
)
def test_a_transform_that_is_none_is_told(options: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words):
        Transform(**options)


def test_a_transform_takes_arrays_and_one_number():
    wanted = (X.float() / 255 - 0.5) / 0.25
    for mean, std in ((0.5, 0.25), (np.array([0.5]), torch.tensor([0.25])), ([0.5], [0.25])):
        assert torch.allclose(Transform(mean=mean, std=std).normalize(X), wanted, atol=1e-6)


def test_a_transform_for_other_channels_is_told_where_the_scenario_is_built():
    three = Transform(mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(UsageError, match=r"is for 3 channels, and the images, \[1, 4, 4\], have 1"):
        split_classes("shapes", arrays(X, Y, transform=three), experiences=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    run(testing.tiny(), {"name": "mlp", "hidden": [32]}, train={"epochs": 1}, run={"output": str(folder / "r")})
    return load(folder / "r")


def test_pictures_that_pillow_holds_are_answered_as_their_files(trained: Any, tmp_path: Path):
    generator = np.random.default_rng(0)
    height, width = trained.scenario.input_shape[1:]
    pixels = [
        generator.integers(0, 256, (height, width), dtype=np.uint8),
        generator.integers(0, 256, (2 * height, 3 * width, 3), dtype=np.uint8),
        generator.integers(0, 256, (height, width, 4), dtype=np.uint8),
    ]
    pictures, files = [Image.fromarray(p) for p in pixels], []
    for i, picture in enumerate(pictures):
        files.append(tmp_path / f"{i}.png")
        picture.save(files[-1])
    found, wanted = trained.predict(pictures), trained.predict(files)
    assert [p.answers for p in found] == [p.answers for p in wanted]
    assert trained.predict(pictures[1])[0].answers == trained.predict(files[1])[0].answers
    assert [np.array_equal(np.asarray(p), before) for p, before in zip(pictures, pixels, strict=True)] == [True] * 3


def test_a_turned_picture_is_turned_and_stays_as_it_is(trained: Any, tmp_path: Path):
    height, width = trained.scenario.input_shape[1:]
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        found = trained.predict(opened)
        assert opened.getexif()[274] == 3
    upright = trained.predict(picture.rotate(180))
    assert found[0].answers == upright[0].answers != trained.predict(picture)[0].answers


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([3], "was given a `int`"),
        (["x.png", np.zeros((1, 8, 8))], "was given array and file"),
        ([Image.new("F", (8, 8), float("nan"))], "cannot be read"),
    ],
)
def test_what_is_no_image_is_told(trained: Any, images: Any, words: str):
    with pytest.raises((UsageError, DataError), match=words):
        trained.predict(images)
