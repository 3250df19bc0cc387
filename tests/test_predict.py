"""The model of a finished run says what image files are, with a confidence that was fitted to images held out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clframe
from clframe.cli.main import main
from clframe.data.files import image_files, image_format_of, read_image
from clframe.errors import DataError, UsageError
from clframe.metrics import fit_temperature, negative_log_likelihood

TRAIN = {"epochs": 4, "batch_size": 8, "optimizer": "adam", "lr": 0.01}


@pytest.fixture
def run(tiny: Any, tmp_path: Path) -> Any:
    def build(*plugins: Any, name: str = "run", model: str = "mlp-100", **options: Any) -> Path:
        train = TRAIN | options.pop("train", {})
        clframe.run(
            tiny(**options), model, plugins, train=train, run={"output": str(tmp_path / name), "tensorboard": False}
        )
        return tmp_path / name

    return build


def drawn(path: Path, bright: int, size: tuple[int, int] = (4, 4), mode: str = "L") -> Path:
    """An image of class `bright` of the tiny scenario."""
    values = np.zeros((4, 4), dtype=np.uint8)
    values.flat[bright] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).convert(mode).resize(size, Image.Resampling.NEAREST).save(path)
    return path


# ------------------------------------------------------------------------------------ temperature


def test_a_temperature_that_logits_were_multiplied_by_is_recovered():
    """Labels drawn from softmax(z) are best told by z: what is multiplied by 3 is divided by 3 again."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    y = torch.multinomial(z.softmax(1), 1, generator=generator).flatten()
    t = fit_temperature(z, y)
    assert t == pytest.approx(1, abs=0.03)
    assert fit_temperature(3 * z, y) == pytest.approx(3 * t, rel=1e-9)
    assert fit_temperature(z / 4, y) == pytest.approx(t / 4, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_nll_is_lowest_at_the_temperature_and_answers_stay(seed: int):
    generator = torch.Generator().manual_seed(seed)
    z = 5 * torch.randn(50, 4, generator=generator)
    y = torch.multinomial((z / 3).softmax(1), 1, generator=generator).flatten()
    z[:25, 3] = -torch.inf  # ruled out, for some even the label
    t, rows = fit_temperature(z, y), torch.isfinite(z.gather(1, y[:, None])).flatten()
    nll = [negative_log_likelihood(z[rows] / at, y[rows]) for at in (t, 1.0, t * 1.01, t / 1.01)]
    assert all(nll[0] <= other for other in nll[1:])
    assert torch.equal((z / t).argmax(1), z.argmax(1))


def test_where_there_is_nothing_to_learn_from_the_temperature_is_one():
    assert fit_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)) == 1
    assert fit_temperature(torch.eye(3), torch.arange(3)) == 1
    assert fit_temperature(torch.full((3, 3), -torch.inf), torch.arange(3)) == 1
    assert fit_temperature(-torch.eye(3), torch.arange(3)) == pytest.approx(100)  # worse than chance: as high as goes


def test_a_finished_run_holds_the_temperature_of_each_reading_and_confidences_use_it(run: Any, tiny: Any):
    folder = run(train={"val": 0.25, "lr": 0.1, "epochs": 8})
    trained = clframe.load(folder)
    held = tiny()
    held.hold_out(0.25, 0)
    val = [experience.val for experience in held]
    x, y = torch.cat([rows.x for rows in val]), torch.cat([rows.y for rows in val])
    scores = trained(x)
    assert trained.temperature["class"] == pytest.approx(fit_temperature(scores, y), rel=1e-4)
    assert set(trained.temperature) == {"class", "task"}
    assert trained.temperature["class"] > 1.5  # it forgot, and is sure of itself
    [one] = trained.predict(x[:1])
    expected = (scores[:1].double() / trained.temperature["class"]).softmax(1).max().item()
    assert one.confidence == pytest.approx(expected, rel=1e-6)
    before, after = (negative_log_likelihood(scores / t, y) for t in (1.0, trained.temperature["class"]))
    assert after < before


def test_without_validation_images_the_confidence_is_the_networks_own(run: Any, tiny: Any):
    trained = clframe.load(run())
    x = tiny()[0].test.x[:2]
    assert trained.temperature == {}
    assert [p.confidence for p in trained.predict(x)] == trained(x).double().softmax(1).max(1).values.tolist()


def test_distances_have_no_confidence(run: Any, tiny: Any, capsys: pytest.CaptureFixture[str]):
    folder = run({"icarl": {"size": 12}}, shape=(1, 8, 8), model="cnn-small", train={"val": 0.2})
    trained = clframe.load(folder)
    assert (trained.scores, trained.temperature) == ("distances", {})
    [one] = trained.predict(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert one.confidence is None
    image = drawn(folder / "image.png", 0)
    assert main(["predict", str(folder), str(image)]) == 0
    printed = capsys.readouterr()
    assert printed.out.split("\t")[2].strip() == "-"
    assert "answers by distances, which give no confidence" in printed.err


# ------------------------------------------------------------------------------------ image files


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_any_mode_gives_the_same_values(tmp_path: Path, mode: str, channels: int):
    values = np.array([[0, 255, 0], [255, 0, 255]], dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    image.save(tmp_path / "image.tif")
    found = read_image(tmp_path / "image.tif", image_format_of((channels, 2, 3)), 255)
    assert found.dtype == torch.uint8
    assert found.tolist() == [values.tolist()] * channels


def test_an_image_of_another_size_covers_the_models_and_is_cut_around_its_centre(tmp_path: Path):
    values = np.zeros((4, 12), dtype=np.uint8)
    values[:, 4:8] = 200
    Image.fromarray(values).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png", image_format_of((1, 4, 4)), 255).tolist() == [[[200] * 4] * 4]
    assert torch.allclose(
        read_image(tmp_path / "wide.png", image_format_of((1, 4, 4)), 16), torch.full((1, 4, 4), 200 * 16 / 255)
    )
    assert read_image(tmp_path / "wide.png", image_format_of((3, 2, 2)), 255).shape == (3, 2, 2)


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path):
    values = np.array([[255, 0], [0, 0]], dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png", image_format_of((1, 2, 2)), 255).tolist() == [[[0, 0], [0, 255]]]


def test_folders_are_searched_for_images_and_named_files_are_taken_as_they_are(tmp_path: Path):
    for name in ("b.png", "a.JPG", "deep/c.bmp"):
        drawn(tmp_path / "in" / name, 0)
    (tmp_path / "in" / "notes.txt").write_text("none")
    odd = tmp_path / "odd"
    odd.write_bytes((tmp_path / "in" / "b.png").read_bytes())
    found = image_files([tmp_path / "in", odd])
    assert [p.name for p in found] == ["a.JPG", "b.png", "c.bmp", "odd"]


def test_predict_names_classes_of_files_of_any_size_and_mode(run: Any, tmp_path: Path):
    trained = clframe.load(run(experiences=1, train={"epochs": 20}))
    for c in range(6):
        size = 4 + 8 * c
        drawn(tmp_path / "in" / f"{c}.png", c, (size, size), ["L", "RGB", "RGBA", "P", "1", "LA"][c])
    found = trained.predict(tmp_path / "in", top=2)
    assert [p.name for p in found] == [f"class {c}" for c in range(6)]
    assert [p.path.name for p in found if p.path] == [f"{c}.png" for c in range(6)]
    assert all(len(p.answers) == 2 and p.answers[0].confidence >= p.answers[1].confidence for p in found)
    assert all(p.answers[0].label == c for c, p in enumerate(found))


def test_a_task_leaves_its_classes_alone(run: Any, tiny: Any):
    trained = clframe.load(run(setting="task"))
    x = tiny()[1].test.x
    assert trained.needs_task
    with pytest.raises(UsageError, match="answers within a task only"):
        trained.predict(x)
    found = trained.predict(x, task=1, top=6)
    assert {a.name for p in found for a in p.answers} == {"class 2", "class 3"}
    assert all(math.isclose(sum(a.confidence for a in p.answers), 1) for p in found)
    mixed = trained.predict(x[:3], task=torch.tensor([0, 1, 2]), top=6)
    assert [p.answers[0].label // 2 for p in mixed] == [0, 1, 2]


def test_arrays_are_taken_as_one_or_as_a_list(run: Any, tiny: Any):
    trained, x = clframe.load(run()), tiny()[0].test.x
    expected = trained.predict(x)
    assert len(expected) == 8
    for given in (x.numpy(), list(x), list(x.numpy())):
        assert trained.predict(given) == expected
    assert trained.predict([]) == []
    with pytest.raises(UsageError, match=r"several shapes, such as \[1, 4, 4\] and \[1, 5, 5\]"):
        trained.predict([x[0], torch.zeros(1, 5, 5)])


# ------------------------------------------------------------------------------------ wrong input


def test_wrong_input_is_told_in_a_sentence_each(run: Any, tmp_path: Path):
    trained = clframe.load(run())
    image = drawn(tmp_path / "image.png", 1)
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:40])
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"broken\.png .*\n.*notes\.txt "):
        trained.predict([tmp_path / "broken.png", image, tmp_path / "notes.txt"])
    skipped: list[str] = []
    found = trained.predict([tmp_path / "broken.png", image], skipped=skipped)
    assert [p.path for p in found] == [image]
    assert len(skipped) == 1
    with pytest.raises(DataError, match=r"image in the folder .*empty"):
        trained.predict(tmp_path / "empty")
    with pytest.raises(DataError, match=r"There is no file or folder .*nothing"):
        trained.predict(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"task 3: .* 0 to 2"):
        trained.predict(image, task=3)
    with pytest.raises(UsageError, match="`top` is 0"):
        trained.predict(image, top=0)
    with pytest.raises(UsageError, match=r"\[3, 4, 4\], .*\[1, 4, 4\]"):
        trained.predict(torch.zeros(2, 3, 4, 4))
    with pytest.raises(UsageError, match="2 images and 3 tasks"):
        trained.predict(torch.zeros(2, 1, 4, 4), task=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"\[5, 4, 4\]"):
        clframe.load(run(name="odd", shape=(5, 4, 4))).predict(image)


def test_the_command_prints_a_line_for_each_image_and_json(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = run(train={"val": 0.25})
    images = [str(drawn(tmp_path / "in" / f"{c}.png", c)) for c in (4, 5)]
    assert main(["predict", str(folder), str(tmp_path / "in")]) == 0
    out, err = capsys.readouterr()
    assert [line.split("\t")[:2] for line in out.splitlines()] == [[images[0], "class 4"], [images[1], "class 5"]]
    assert re.search(r"The confidence \(temperature [\d.]+\) was fitted to 18 images held out\.", err)
    assert main(["predict", str(folder), *images, "--json", "--top", "2", "--task", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(p["classes"]) for p in found["predictions"]] == [2, 2]
    assert {c["name"] for p in found["predictions"] for c in p["classes"]} == {"class 0", "class 1"}
    assert found["temperature"] == clframe.load(folder).temperature["task"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nowhere", "x.png"], 3, "There is no folder nowhere"),
        (["folder", "x.png"], 3, "folder is not a run folder"),
        (["stopped", "x.png"], 3, "`clframe resume stopped`"),
        (["run", "x.png"], 3, "There is no file or folder x.png"),
        (["run"], 2, "Missing argument 'IMAGES...'"),
        (["run", "run", "--top", "0"], 2, "`--top` is 0; it must be 1 at least"),
        (["run", "run", "--task", "4"], 2, "`--task` is 4, "),
        (["run", "run/config.yaml"], 3, "The image run/config.yaml cannot be read: it is not an image of a known kind"),
    ],
)
def test_the_command_explains_wrong_input(
    run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments,
    code,
    sentence,
):
    run(train={"epochs": 1})
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("stopped").mkdir()
    Path("stopped/config.yaml").write_text("")
    assert main(["predict", *arguments]) == code
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert sentence in err
