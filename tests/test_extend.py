"""A finished run learns more classes later: as if it had learnt them all in one run, to the bit where that can be."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import clframe
from clframe import ImageData, Plugin, Scenario, Transform, change_domains, hookimpl, registry, testing
from clframe.cli.main import main
from clframe.data.listing import HIDDEN_FILES, IMAGES_BESIDE, LeftOut
from clframe.errors import DataError, Interrupted, UsageError
from clframe.plugins.ewc import EWC
from clframe.runs import checkpoint
from clframe.runs.extension import read_old_images

TRAIN = {"epochs": 2, "batch_size": 8, "optimizer": "adam", "lr": 0.01}
METHODS: dict[str, dict[str, Any]] = {
    "a-ltm": {},
    "always-be-dreaming": {"iterations": 10, "batch_size": 8, "noise": 10, "width": 8},
    "channel-gating": {"classifier_iterations": 10, "per_class": 2},
    "deep-inversion": {"per_class": 4, "iterations": 10},
    "der": {"size": 6},
    "duplicate": {},
    "er": {"size": 6},
    "ewc": {},
    "feature-extraction": {},
    "finetune-fc": {},
    "generative-replay": {"hidden": [16], "z": 4, "iterations": 6},
    "hat": {},
    "icarl": {"size": 24, "outputs": "seen"},
    "lfl": {},
    "lwf": {},
    "lwm": {},
    "mas": {},
    "packnet": {},
    "piggyback": {},
    "si": {},
    "warm-up": {},
}


def part(whole: Scenario, start: int, stop: int) -> Scenario:
    """Experiences `start` to `stop` of a scenario as one of its own, whose labels begin at 0."""
    groups = whole.classes[start:stop]
    shift = 0 if whole.setting == "domain" else groups[0][0]

    def load(i: int, of: Any) -> ImageData:
        data = getattr(whole[start + i], of)
        return ImageData(data.x, data.y - shift, index=data.index, task=i)

    classes = [[c - shift for c in group] for group in groups]
    names = whole.class_names[shift : shift + max(map(max, classes)) + 1]
    return Scenario("part", whole.setting, classes, names, whole.input_shape, load, transform=whole.transform)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    return all(torch.equal(value, right[name]) for name, value in left.items())


def learnt_twice(whole: Scenario, folder: Path, plugins: list[Any], model: str = "cnn-small", **train: Any) -> Any:
    """An uninterrupted run of three experiences, and one of two that is extended by the third: folders and results."""
    settings = {"train": TRAIN | train}
    everything = clframe.run(
        whole, model, plugins, **settings, run={"output": str(folder / "whole"), "tensorboard": False}
    )
    clframe.run(
        part(whole, 0, 2), model, plugins, **settings, run={"output": str(folder / "first"), "tensorboard": False}
    )
    run = {"output": str(folder / "extended"), "tensorboard": False}
    return everything, clframe.extend(folder / "first", part(whole, 2, 3), run=run)


@pytest.mark.parametrize(
    ("name", "keep"), [("", False), ("", True), ("ewc", True), *((name, False) for name in ("er", "hat", "icarl"))]
)
def test_a_run_that_is_extended_equals_the_uninterrupted_one_to_the_bit(
    name: str, keep: bool, tiny: Any, tmp_path: Path
):
    setting = registry.plugin_class(name).serves[0] if name else "class"
    model = "mlp-100" if name == "finetune-fc" else "cnn-small"
    plugins = [{name: METHODS[name]}] if name else []
    whole = tiny(shape=(1, 8, 8), setting=setting)
    uninterrupted, extended = learnt_twice(whole, tmp_path, plugins, model, keep_optimizer=keep)
    assert same(tmp_path / "whole", tmp_path / "extended")
    for reading, matrix in extended.accuracy.items():
        assert matrix[0][:2] == uninterrupted.accuracy[reading][0][:2]
        assert matrix[2][:2] == [None, None]
        assert matrix[2][2] == uninterrupted.accuracy[reading][2][2]


@pytest.mark.parametrize("name", ["", *METHODS])
def test_a_run_is_extended_again_and_again_and_stopped_on_the_way(name: str, tiny: Any, tmp_path: Path):
    """One experience, two extensions by one each, the second stopped and resumed: as three in one run, to the bit."""
    setting = registry.plugin_class(name).serves[0] if name else "class"
    model = "mlp-100" if name == "finetune-fc" else "cnn-small"
    plugins, whole = [{name: METHODS[name]}] if name else [], tiny(shape=(1, 8, 8), setting=setting)
    folders, train = [tmp_path / str(i) for i in range(3)], TRAIN | {"keep_optimizer": True}
    clframe.run(whole, model, plugins, train=train, run={"output": str(tmp_path / "whole"), "tensorboard": False})
    clframe.run(part(whole, 0, 1), model, plugins, train=train, run={"output": str(folders[0]), "tensorboard": False})
    clframe.extend(folders[0], part(whole, 1, 2), run={"output": str(folders[1]), "tensorboard": False})
    with testing.stop_at(5), pytest.raises(Interrupted):
        clframe.extend(folders[1], part(whole, 2, 3), run={"output": str(folders[2]), "tensorboard": False})
    extended = clframe.resume(folders[2], scenario=part(whole, 2, 3))
    assert same(tmp_path / "whole", folders[2])
    trained = clframe.load(folders[2])
    assert trained.class_names == whole.class_names
    assert trained.scenario.known == (1, 2, 3)
    task = 2 if setting == "task" else None
    test = whole[2].test
    answers = [p.answers[0].label for p in trained.predict(test.x, task=task)]
    reading = "task" if setting == "task" else "class"
    assert sum(a == b for a, b in zip(answers, test.y.tolist(), strict=True)) / 8 == extended.accuracy[reading][2][2]


def test_a_head_for_all_classes_at_once_learns_otherwise_when_it_does_not_know_of_them(tiny: Any, tmp_path: Path):
    """`train.logits=all`: from the start the uninterrupted run teaches the new columns that they are wrong."""
    whole = tiny(shape=(1, 8, 8))
    learnt_twice(whole, tmp_path, [], "mlp-100", logits="all")
    assert not same(tmp_path / "whole", tmp_path / "extended")
    assert clframe.load(tmp_path / "extended")(whole[2].test.x).shape == (8, 6)
    first, extended = weights(tmp_path / "first"), weights(tmp_path / "extended")
    assert first.keys() < extended.keys()


def test_a_prior_for_each_class_grows_with_the_classes(tiny: Any, tmp_path: Path):
    """Where the new Gaussians begin is drawn later than in one run, so that the bits differ; a resume's do not."""
    whole, options = tiny(shape=(1, 8, 8)), METHODS["generative-replay"] | {"prior": "class"}
    learnt_twice(whole, tmp_path, [{"generative-replay": options}])
    _, tensors = checkpoint.load(tmp_path / "extended" / "checkpoints", print)
    assert tensors["/plugins/generative-replay/generator/model.prior_mean"].shape == (6, 4)
    run = {"output": str(tmp_path / "stopped"), "tensorboard": False}
    with testing.stop_at(12), pytest.raises(Interrupted):
        clframe.extend(tmp_path / "first", part(whole, 2, 3), run=run)
    clframe.resume(tmp_path / "stopped", scenario=part(whole, 2, 3))
    assert same(tmp_path / "stopped", tmp_path / "extended")


def test_domains_are_extended_by_the_same_classes(tiny_arrays: Any, tmp_path: Path):
    whole = change_domains("tiny", tiny_arrays(), lambda i, x: x.roll(i, -1), experiences=3)
    learnt_twice(whole, tmp_path, ["ewc"], "mlp-100")
    assert same(tmp_path / "whole", tmp_path / "extended")
    assert len(clframe.load(tmp_path / "extended").class_names) == 6


def named(tiny: Any, names: Sequence[str]) -> Scenario:
    """One experience of the tiny scenario's classes of these names, in this order."""
    arrays = tiny()
    labels = [arrays.class_names.index(name) for name in names]
    table = torch.full((6,), -1)
    table[labels] = torch.arange(len(labels))

    def load(i: int, of: Any) -> ImageData:
        rows = ImageData.concat([getattr(e, of) for e in arrays])
        return ImageData(rows.x, table[rows.y]).rows(table[rows.y] >= 0)

    return Scenario("named", "class", [range(len(names))], names, (1, 4, 4), load)


def test_a_class_of_an_old_name_is_the_old_class_and_others_get_new_columns(tiny: Any, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    clframe.run(named(tiny, ["class 3", "class 1"]), "mlp-100", train=TRAIN, run={"output": str(first)})
    coming = named(tiny, ["class 5", "class 3", "class 0"])
    results = clframe.extend(first, coming, train={"epochs": 20}, run={"output": str(second)})
    trained = clframe.load(second)
    assert trained.class_names == ("class 3", "class 1", "class 5", "class 0")
    assert results.data["classes"] == [[0, 1], [2, 0, 3]]
    assert results.accuracy["class"][1][1] == 1
    assert [p.name for p in trained.predict(coming[0].test.x[:4])] == [
        coming.class_names[c] for c in coming[0].test.y[:4]
    ]
    assert results.measures["class"]["average_accuracy"] is None
    assert (second / "tensorboard").is_dir()


def test_a_later_task_may_bring_old_classes_again(tiny: Any, tmp_path: Path):
    whole = tiny(shape=(1, 8, 8), setting="task")
    first = {"output": str(tmp_path / "first"), "tensorboard": False}
    clframe.run(part(whole, 0, 2), "cnn-small", train=TRAIN, run=first)
    results = clframe.extend(tmp_path / "first", part(whole, 0, 2), run={"output": str(tmp_path / "second")})
    assert results.data["classes"] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert [a is None for a in results.accuracy["task"][2]] == [True, True, False, False]
    assert None not in results.accuracy["task"][3][2:]
    assert clframe.load(tmp_path / "second").allowed.tolist()[2] == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "options"),
    [("icarl", {"size": 24}), ("icarl", {"size": 24, "outputs": "seen"}), ("lwf", {"form": "mc"})],
)
def test_labels_of_classes_that_are_known_by_name_are_learned(
    name: str, options: dict[str, Any], tiny: Any, tmp_path: Path
):
    """Sigmoid losses give old classes the old network's answers as targets, but images of the extension their labels.

    Turned labels must give the block of these classes other weights, and the classes the answers of the turned labels.
    """
    whole, answers = tiny(shape=(1, 8, 8)), {}
    first = {"output": str(tmp_path / "first"), "tensorboard": False}
    clframe.run(part(whole, 0, 2), "mlp-100", [{name: options}], train=TRAIN, run=first)
    for turned in (False, True):
        coming = part(whole, 0, 1)
        load = coming._load

        def turn(i: int, of: Any, load: Any = load, turned: bool = turned) -> ImageData:
            data = load(i, of)
            return ImageData(data.x, 1 - data.y if turned and of == "train" else data.y, index=data.index, task=i)

        coming._load = turn
        run = {"output": str(tmp_path / f"turned {turned}"), "tensorboard": False, "eval_batch_size": 8}
        results = clframe.extend(tmp_path / "first", coming, train={"epochs": 15}, run=run)
        assert results.data["classes"] == [[0, 1], [2, 3], [0, 1]]
        model = weights(tmp_path / f"turned {turned}")
        (key,) = [key for key in model if key.endswith("head.0.weight")]
        scores = clframe.load(tmp_path / f"turned {turned}").predictor.model
        with torch.no_grad():
            logits = scores(whole.transform.normalize(whole[0].test.x)).logits[:, :2]
        answers[turned] = (model[key], (logits.argmax(1) == whole[0].test.y).float().mean().item())
    assert not torch.equal(answers[False][0], answers[True][0])
    assert answers[False][1] > 0.9
    assert answers[True][1] < 0.1


@pytest.mark.parametrize(
    ("name", "options", "train", "coming", "sentence"),
    [
        ("always-be-dreaming", METHODS["always-be-dreaming"], {}, (0, 1), "brings old ones back"),
        ("channel-gating", METHODS["channel-gating"], {}, (0, 1), "share the class `class 0`"),
        ("er", {"size": 24}, {"logits": "current"}, (1, 2), "`er` brings old classes back, which `train.logits="),
    ],
)
def test_an_extension_is_refused_by_the_rules_of_a_run(
    name: str, options: Any, train: Any, coming: tuple[int, int], sentence: str, tiny: Any, tmp_path: Path
):
    whole = tiny(shape=(1, 8, 8))
    first = {"output": str(tmp_path / "first"), "tensorboard": False}
    clframe.run(part(whole, 0, 1), "cnn-small", [{name: options}], train=TRAIN | train, run=first)
    with pytest.raises(UsageError, match=sentence):
        clframe.extend(tmp_path / "first", part(whole, *coming), run={"output": str(tmp_path / "second")})
    assert not (tmp_path / "second").exists()


def test_the_command_refuses_known_classes_for_a_method_that_isolates_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for folder, names in (("old", "ab"), ("new", "bc")):
        for k, name in enumerate(names):
            for shade in range(4):
                place = Path(folder, name)
                place.mkdir(parents=True, exist_ok=True)
                image = np.full((8, 8), 100 * k + 20 * shade + (folder == "new"), dtype=np.uint8)
                Image.fromarray(image).save(place / f"{shade}.png")
    scenario = ["--scenario", "split-folder", "--set", "scenario.size=8"]
    quiet = ["--quiet", "--no-tensorboard", "--epochs", "1"]
    learn = [*scenario, "--set", "scenario.path=old", "--setting", "task", "--plugin", "hat", "--model", "mlp-100"]
    assert main(["run", *learn, *quiet, "--output", "first"]) == 0
    capsys.readouterr()
    assert main(["extend", "first", *scenario, "--set", "scenario.path=new", *quiet, "--output", "second"]) == 2
    assert "experiences 1 and 2 of `split-folder+split-folder` share the class `b`" in capsys.readouterr().err
    assert not Path("second").exists()


@pytest.mark.parametrize("name", ["channel-gating", "hat", "packnet", "piggyback"])
def test_a_method_that_isolates_tasks_is_extended_by_new_classes_alone(name: str, tiny: Any, tmp_path: Path):
    """Of a task that is not learnt yet there is no accuracy, as the network computes something else for each."""
    whole = tiny(shape=(1, 8, 8), setting="task")
    first = {"output": str(tmp_path / "first"), "tensorboard": False}
    clframe.run(part(whole, 0, 1), "cnn-small", [{name: METHODS[name]}], train=TRAIN, run=first)
    results = clframe.extend(tmp_path / "first", part(whole, 1, 3), run={"output": str(tmp_path / "second")})
    assert [a is None for a in results.accuracy["task"][1]] == [True, False, True]
    assert None not in results.accuracy["task"][2][1:]
    with pytest.raises(UsageError, match=r"`class 0`") as caught:
        clframe.extend(tmp_path / "first", part(whole, 0, 1), run={"output": str(tmp_path / "third")})
    assert f"`{name}`" in str(caught.value)
    assert not (tmp_path / "third").exists()


def test_settings_are_those_of_the_run_unless_given_anew(tiny: Any, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    whole = tiny(shape=(1, 8, 8))
    clframe.run(
        part(whole, 0, 2), "mlp-100", [{"ewc": {"lambda": 7}}], train=TRAIN, run={"output": str(first), "seed": 3}
    )
    before = {f.name: f.read_bytes() for f in first.iterdir() if f.is_file()}
    given = {"plugins": [{"ewc": {"samples": 5}}], "train": {"iterations": 4}}
    clframe.extend(first, part(whole, 2, 3), **given, run={"output": str(second)})
    old, new = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, second))
    assert new["plugins"]["ewc"] == old["plugins"]["ewc"] | {"samples": 5}
    assert new["train"] == old["train"] | {"epochs": None, "iterations": 4}
    assert new["run"]["seed"] == 3
    assert new["run"]["extends"] == str(first.resolve())
    assert {f.name: f.read_bytes() for f in first.iterdir() if f.is_file()} == before


def test_a_run_without_a_length_is_extended_without_one(tiny: Any, tmp_path: Path):
    """Not with the 300 steps that suit split-digits: each experience lasts one epoch in both."""
    first, second, whole = tmp_path / "first", tmp_path / "second", tiny(shape=(1, 8, 8))
    clframe.run(part(whole, 0, 2), "mlp-100", run={"output": str(first)})
    clframe.extend(first, part(whole, 2, 3), run={"output": str(second)})
    old, new = (yaml.safe_load((folder / "config.yaml").read_text())["train"] for folder in (first, second))
    assert (new["epochs"], new["iterations"]) == (None, None)
    assert new == old


def test_a_kept_optimizer_is_left_behind_where_its_settings_change(tiny: Any, tmp_path: Path):
    whole, lr = tiny(shape=(1, 8, 8)), []

    class Watch(Plugin):
        name = "watch"
        observer = True

        @hookimpl
        def after_backward(self, run):
            lr.append((run.optimizer.param_groups[0]["lr"], len(run.optimizer.state)))

    train = TRAIN | {"keep_optimizer": True}
    clframe.run(part(whole, 0, 2), "mlp-100", [Watch()], train=train, run={"output": str(tmp_path / "first")})
    for given, expected in (({}, (0.01, 8)), ({"lr": 0.5}, (0.5, 0))):
        lr.clear()
        clframe.extend(tmp_path / "first", part(whole, 2, 3), plugins=[Watch()], train=given)
        assert lr[0] == expected


def test_objects_of_a_program_are_given_again(tiny: Any, tmp_path: Path):
    class Flat(nn.Module):
        width = 64

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def features(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.flatten(1))

    whole, settings = tiny(shape=(1, 8, 8)), {"train": TRAIN}
    clframe.run(whole, Flat(), [EWC(lambda_=3)], **settings, run={"output": str(tmp_path / "whole")})
    clframe.run(part(whole, 0, 2), Flat(), [EWC(lambda_=3)], **settings, run={"output": str(tmp_path / "first")})
    clframe.extend(
        tmp_path / "first",
        part(whole, 2, 3),
        model=Flat(),
        plugins=[EWC(lambda_=3)],
        run={"output": str(tmp_path / "second")},
    )
    torch.manual_seed(0)
    assert weights(tmp_path / "second")["/model/head.2.weight"].shape == (2, 64)
    with pytest.raises(DataError, match=r"`Flat` .*`clframe\.extend`"):
        clframe.extend(tmp_path / "first", part(whole, 2, 3), plugins=[EWC()])
    with pytest.raises(DataError, match="`ewc` of this run "):
        clframe.extend(tmp_path / "first", part(whole, 2, 3), model=Flat())


# ------------------------------------------------------------------------------------ wrong input


@pytest.fixture
def first(tiny: Any, tmp_path: Path) -> Path:
    clframe.run(tiny(), "mlp-100", ["ewc"], train=TRAIN | {"epochs": 1}, run={"output": str(tmp_path / "first")})
    return tmp_path / "first"


def test_what_cannot_follow_is_refused_in_a_sentence_each(first: Path, tiny: Any, tiny_arrays: Any, tmp_path: Path):
    scenario = tiny()
    with pytest.raises(UsageError, match=r"`tiny` .* `task`, .* `class`"):
        clframe.extend(first, tiny(setting="task"))
    with pytest.raises(UsageError, match=r"`tiny` .* \[1, 8, 8\], .* \[1, 4, 4\]"):
        clframe.extend(first, tiny(shape=(1, 8, 8)))
    scenario.transform = Transform(scale=16)
    with pytest.raises(UsageError, match=r" 16, .* 255"):
        clframe.extend(first, scenario)
    with pytest.raises(UsageError, match="`named` has two classes `class 1`"):
        clframe.extend(first, named(tiny, ["class 1", "class 1"]))
    with pytest.raises(UsageError, match=r"`si` .* join"):
        clframe.extend(first, tiny(), plugins=[{"si": {}}])
    with pytest.raises(UsageError, match=r"`ewc`, .* `ewc` out"):
        clframe.run(tiny(), "mlp-100", run={"extends": str(first)})
    with pytest.raises(UsageError, match=r"network .*first is `mlp-100` "):
        clframe.run(tiny(), "mlp", ["ewc"], run={"extends": str(first)})
    clframe.run(tiny(), "mlp-100", ["joint"], train=TRAIN | {"epochs": 1}, run={"output": str(tmp_path / "joint")})
    with pytest.raises(UsageError, match=r"`joint` .* earlier"):
        clframe.extend(tmp_path / "joint", tiny())


def test_a_run_whose_last_state_is_gone_is_predicted_with_and_not_extended(first: Path, tiny: Any):
    newest = sorted((first / "checkpoints").iterdir())[-1]
    (newest / "tensors.safetensors").write_bytes(b"none")
    with pytest.raises(DataError, match=r"last checkpoint .* damaged"):
        clframe.extend(first, tiny())
    shutil.rmtree(first / "checkpoints")
    with pytest.raises(DataError, match=r"no checkpoint in .*first"):
        clframe.extend(first, tiny())
    assert len(clframe.load(first).predict(tiny()[0].test.x)) == 8


def test_the_command_extends_a_run_and_its_configuration_does_so_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    short = ["--limit", "6", "--iterations", "3", "--no-tensorboard", "--device", "cpu", "--quiet"]
    assert main(["run", *short, "--plugin", "er", "--set", "scenario.experiences=2", "--output", "first"]) == 0
    assert main(["extend", "first", "--scenario", "split-digits", "--limit", "9", "--quiet", "--output", "second"]) == 0
    out = capsys.readouterr().out
    assert "after 3     -     -" in out
    config = yaml.safe_load(Path("second/config.yaml").read_text())
    assert (config["scenario"]["experiences"], config["scenario"]["limit"], config["train"]["iterations"]) == (1, 9, 3)
    assert main(["run", "--config", "second/config.yaml", "--quiet", "--output", "third"]) == 0
    for name in ("results.json", "model.safetensors", "base.json"):
        assert Path("second", name).read_bytes() == Path("third", name).read_bytes()
    assert main(["extend", "third", "--scenario", "split-digits", "--quiet", "--no-tensorboard", "--json"]) == 0
    assert len(list(Path("runs").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nowhere", "--scenario", "split-digits"], 3, "There is no folder nowhere"),
        (["stopped", "--scenario", "split-digits"], 3, "The run in stopped is not finished"),
        (["first"], 2, "Missing option '--scenario'"),
        (["first", "--scenario", "split-digit"], 2, "Did you mean `split-digits`?"),
        (["first", "--scenario", "split-digits", "--set", "scenario.path=x"], 2, "`scenario.path` is not an option"),
        (["first", "--scenario", "split-digits", "--set", "model.hidden=3"], 2, "`model.hidden`"),
        (["first", "--scenario", "split-digits"], 2, "The images of `split-digits` are [1, 8, 8]"),
    ],
)
def test_the_command_explains_wrong_input(
    first: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments,
    code,
    sentence,
):
    monkeypatch.chdir(tmp_path)
    Path("stopped").mkdir()
    Path("stopped/config.yaml").write_text("")
    assert main(["extend", *arguments, "--quiet"]) == code
    assert sentence in capsys.readouterr().err


def photographs(root: Path, names: str) -> Path:
    """A folder of classes of 6 images of one colour each, with some noise."""
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        noise = torch.randint(0, 60, (6, 12, 12, 3), generator=torch.Generator().manual_seed(ord(name)))
        noise[..., k % 3] += 150
        for i, image in enumerate(noise.to(torch.uint8).numpy()):
            Image.fromarray(image).save(root / name / f"{i}.png")
    return root


def test_a_folder_of_one_class_extends_a_run_where_its_loss_is_not_always_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With `train.logits=seen` the class is one among all; with `current` its loss is 0, and the option is named."""
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "old", "abcd")
    photographs(tmp_path / "new", "e")
    short = ["--set", "scenario.size=8", "--model", "mlp", "--epochs", "1", "--no-tensorboard", "--quiet"]
    of_new = ["--scenario", "split-folder", "--set", "scenario.path=new"]
    assert main(["run", *of_new, *short]) == 3
    assert "new has one class, `e`" in capsys.readouterr().err
    for plugin in ("er", "lwf"):
        learn = ["--scenario", "split-folder", "--set", "scenario.path=old", "--plugin", plugin]
        assert main(["run", *learn, *short, "--output", plugin]) == 0
    again = [*of_new, "--epochs", "30", "--lr", "0.01", "--quiet"]
    assert main(["extend", "er", *again, "--output", "more"]) == 0
    results = clframe.Results.read("more")
    assert results.data["classes"] == [[0, 1], [2, 3], [4]]
    assert results.accuracy["class"][2][2] == 1.0
    assert results.accuracy["task"][2][2] is None  # one class among itself: no figure
    assert main(["extend", "lwf", *again, "--output", "no"]) == 2
    told = capsys.readouterr().err
    words = ("Experience 3 of `split-folder+split-folder`", "`e`", "`train.logits=current`", "`lwf.form=seen`")
    assert all(word in told for word in words)
    assert not Path("no").exists()
    assert main(["extend", "lwf", *again, "--set", "lwf.form=seen", "--output", "yes"]) == 0
    assert clframe.load("yes").class_names == ("a", "b", "c", "d", "e")


FROM_FILES = """
import torch
from clframe import Arrays, split_classes

def from_file(*, path: str, experiences: int = 2, setting: str = "class", bright: bool = False):
    '''Classes that a file names, one bright pixel each.

    Options:
        path: of the file.
        experiences: how many.
        setting: class or task.
        bright: images are turned into their negatives.
    '''
    names = open(path).read().split()
    y = torch.arange(len(names)).repeat(8)
    x = torch.zeros(len(y), 1, 4, 4, dtype=torch.uint8)
    x.view(len(y), 16)[torch.arange(len(y)), [ord(name[0]) % 16 for name in names] * 8] = 255
    x = 255 - x if bright else x
    return split_classes("from-file", Arrays("file", x, y, x, y, tuple(names)), experiences=experiences)
"""


def test_an_engineer_adds_classes_by_two_commands_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A scenario of a third party: options are the run's, but for how the classes come."""
    info = tmp_path / "package" / "from_file-0.1.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "package" / "from_file.py").write_text(FROM_FILES)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: from-file\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[clframe.scenarios]\nfrom-file = from_file:from_file\n")
    monkeypatch.syspath_prepend(tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    Path("old.txt").write_text("ant bee cat dog")
    Path("new.txt").write_text("bee eel fox")
    quiet = ["--quiet", "--no-tensorboard"]
    options = ["--set", "scenario.path=old.txt", "--set", "scenario.bright=true", "--plugin", "er", "--epochs", "20"]
    assert main(["run", "--scenario", "from-file", *options, *quiet, "--output", "first"]) == 0
    assert main(["extend", "first", "--scenario", "from-file", "--set", "scenario.path=new.txt", *quiet]) == 0
    folder = next(Path("runs").iterdir())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    expected = {"name": "from-file", "path": "new.txt", "experiences": 1, "setting": "class", "bright": True}
    assert config["scenario"] == expected
    assert clframe.load(folder).class_names == ("ant", "bee", "cat", "dog", "eel", "fox")
    values = np.full((4, 4), 255, dtype=np.uint8)
    values.flat[ord("f") % 16] = 0
    Image.fromarray(values).save("a.png")
    capsys.readouterr()
    assert main(["predict", str(folder), "a.png"]) == 0
    assert capsys.readouterr().out.startswith("a.png\tfox\t")


@pytest.mark.parametrize("name", ["a-ltm", "lfl", "lwf"])
def test_a_method_that_needs_the_old_network_only_joins_a_run_without_it(name: str, tiny: Any, tmp_path: Path):
    """In its first experience the method changes nothing, so that a run with it from the start ends alike."""
    whole = tiny(shape=(1, 8, 8), setting="task")
    clframe.run(whole, "cnn-small", [name], train=TRAIN, run={"output": str(tmp_path / "whole")})
    clframe.run(part(whole, 0, 1), "cnn-small", train=TRAIN, run={"output": str(tmp_path / "first")})
    clframe.extend(tmp_path / "first", part(whole, 1, 3), plugins=name, run={"output": str(tmp_path / "extended")})
    assert same(tmp_path / "whole", tmp_path / "extended")


def written(folder: Path, data: ImageData, names: Sequence[str]) -> None:
    """The images of `data` as files, a folder for each class."""
    for i, (x, y) in enumerate(zip(data.x, data.y.tolist(), strict=True)):
        (folder / names[y]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[0].numpy()).save(folder / names[y] / f"{i}.png")


@pytest.mark.parametrize(
    ("name", "options"), [("ewc", {"labels": "empirical", "samples": None}), ("mas", {"samples": None})]
)
def test_a_method_that_needs_old_images_joins_with_a_folder_of_them(
    name: str, options: dict[str, Any], tiny: Any, tmp_path: Path
):
    """With the images that were learned, its penalty is that of a run with it from the start."""
    whole = tiny(shape=(1, 8, 8))
    run = {"tensorboard": False}
    plugins = [{name: options}]
    clframe.run(part(whole, 0, 1), "mlp-100", plugins, train=TRAIN, run=run | {"output": str(tmp_path / "with")})
    clframe.run(part(whole, 0, 1), "mlp-100", train=TRAIN, run=run | {"output": str(tmp_path / "without")})
    written(tmp_path / "old", whole[0].train, whole.class_names)
    kept = {}
    for first in ("with", "without"):
        settings = run | {"output": str(tmp_path / f"after-{first}")}
        if first == "without":
            with pytest.raises(UsageError, match=f"`{name}` can join the run in .* with images"):
                clframe.extend(tmp_path / first, part(whole, 1, 2), plugins=plugins, run=settings)
            settings["old_images"] = str(tmp_path / "old")
        clframe.extend(tmp_path / first, part(whole, 1, 2), plugins=plugins, run=settings, train={"epochs": 1})
        _, tensors = checkpoint.load(tmp_path / f"after-{first}" / "checkpoints", print)
        kept[first] = {key: value for key, value in tensors.items() if f"/plugins/{name}/" in key}
    assert kept["with"].keys() == kept["without"].keys()
    assert any("precision" in key for key in kept["with"])
    for key, value in kept["with"].items():
        torch.testing.assert_close(value, kept["without"][key], rtol=1e-3, atol=1e-6)


def test_a_folder_of_old_images_has_folders_named_like_learned_classes(tiny: Any, tmp_path: Path):
    whole = tiny(shape=(1, 8, 8))
    clframe.run(part(whole, 0, 1), "mlp-100", train=TRAIN, run={"output": str(tmp_path / "first")})
    (tmp_path / "old" / "class 7").mkdir(parents=True)
    coming, run = part(whole, 1, 2), {"old_images": str(tmp_path / "old")}
    with pytest.raises(UsageError, match=r" class 7, "):
        clframe.extend(tmp_path / "first", coming, plugins="mas", run=run)
    with pytest.raises(DataError, match="which is not a folder"):
        clframe.extend(tmp_path / "first", coming, plugins="mas", run={"old_images": str(tmp_path / "none")})
    with pytest.raises(UsageError, match=r"`run\.old_images`"):
        clframe.extend(tmp_path / "first", coming, plugins="lwf", run=run)


def test_old_images_are_found_by_the_rule_of_training(tiny: Any, tmp_path: Path):
    """Names of classes in any Unicode form; hidden files and folders are left out and counted."""
    whole = tiny()
    whole.class_names = ("caf\u00e9", *whole.class_names[1:])
    photographs(tmp_path / "old", "x")
    (tmp_path / "old" / "x").rename(tmp_path / "old" / "cafe\u0301")
    photographs(tmp_path / "old" / ".trash", "y")
    (tmp_path / "old" / "cafe\u0301" / "._0.png").write_bytes(b"")
    (tmp_path / "old" / "0.png").write_bytes(b"")
    left = LeftOut()
    found = read_old_images(tmp_path / "old", whole, whole[0], left).train
    assert found.y.tolist() == [0] * 6
    assert found.x.shape == (6, 1, 4, 4)
    assert left.counts == {HIDDEN_FILES: 2, IMAGES_BESIDE: 1}


def test_new_classes_alone_do_not_sharpen_the_confidence(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What fits the new classes' images may raise the temperature of the run before, and not lower it."""
    whole, fitted = tiny(shape=(1, 8, 8)), iter([2.0, 2.0, 0.5, 3.0, 0.25, 0.25])
    monkeypatch.setattr(clframe.metrics, "fit_temperature", lambda scores, labels: next(fitted))
    train = TRAIN | {"val": 0.25}
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    clframe.run(part(whole, 0, 1), "mlp-100", train=train, run={"output": first})
    before = clframe.load(first)
    assert before.temperature == {"class": 2, "task": 2}
    assert re.search(r"\(temperature 2\) .* 6 images", before.about_confidence())
    clframe.extend(first, part(whole, 1, 2), run={"output": second})
    after = clframe.load(second)
    assert after.temperature == {"class": 2, "task": 3}
    assert after.fitted["class"] == {"images": 6, "classes": [2, 3], "floor": 2}
    assert "(class 2, class 3)" in after.about_confidence()
    clframe.extend(second, part(whole, 0, 2), run={"output": str(tmp_path / "third")})  # all classes come back
    again = clframe.load(tmp_path / "third")
    assert again.temperature == {"class": 0.25, "task": 0.25}
    assert again.fitted["class"]["floor"] is None


def test_an_extension_without_a_fitted_run_before_is_never_sharper_than_the_network(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = tiny(shape=(1, 8, 8))
    monkeypatch.setattr(clframe.metrics, "fit_temperature", lambda scores, labels: 0.24)
    clframe.run(part(whole, 0, 1), "mlp-100", train=TRAIN, run={"output": str(tmp_path / "first")})
    results = clframe.extend(
        tmp_path / "first", part(whole, 1, 2), train={"val": 0.25}, run={"output": str(tmp_path / "second")}
    )
    assert clframe.load(tmp_path / "second").temperature == {"class": 1, "task": 1}
    assert results.data["extends"] == 1
    assert "were not measured" in results.notes()[0]


def test_results_are_read_from_a_text(tiny: Any, tmp_path: Path):
    results = clframe.run(tiny(), "mlp-100", "ewc", train=TRAIN | {"epochs": 1}, run={"output": str(tmp_path / "r")})
    assert clframe.Results.read(str(tmp_path / "r")).accuracy == results.accuracy
    assert results.data["plugins"] == ["ewc"]


def test_a_question_is_followed_by_no_stop(capsys: pytest.CaptureFixture[str]):
    assert main(["exten"]) == 2
    assert capsys.readouterr().err == "clframe: No such command 'exten'. Did you mean 'extend'? See `clframe --help`.\n"
