"""A run that is stopped anywhere, and resumed, ends with the same results to the last bit."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import clframe
from clframe import ImageData, IncrementalNet, Phase, Plugin, Transform, hookimpl, snapshot, testing
from clframe.errors import DataError, Interrupted, RunError, UsageError
from clframe.evaluate import ModelPredictor
from clframe.runs import checkpoint, sums
from clframe.runs.folder import RunFolder
from clframe.system import writing
from clframe.system.writing import save_file

TRAIN = {
    "epochs": 2,
    "batch_size": 10,
    "optimizer": "adam",
    "lr": 0.01,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "keep_optimizer": True,
}


class Busy(Plugin):
    """Uses every kind of state that a plugin can have, and every hook that a resume must not call twice."""

    name = "busy"
    state = ("values", "teacher", "net", "optimizer", "partial", "count")
    predictor_state = ("teacher",)

    def __init__(self) -> None:
        self.values: dict[str, Any] = {"list": [], "tuple": (1, 2.5, None, "x"), 3: True}
        self.teacher: IncrementalNet | None = None
        self.partial = torch.zeros(2)
        self.count = 0

    @hookimpl
    def before_run(self, run):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    @hookimpl
    def grow(self, run, experience):
        run.model.register_parameter(f"scale{experience.index}", nn.Parameter(torch.ones(())))

    @hookimpl
    def before_experience(self, run, experience):
        self.count += 1
        run.model.head[0].requires_grad_(experience.index == 0)

    @hookimpl
    def extra_data(self, run, experience):
        shape = (4, *run.scenario.input_shape)
        x = torch.randint(0, 255, shape, generator=run.rng("busy"), dtype=torch.uint8)
        return ImageData(x, torch.arange(4) % 2, targets={"score": torch.rand(4, 2, generator=run.rng("busy"))})

    @hookimpl
    def phases(self, run, experience):
        return [Phase("warm", iterations=2, only=("head.*",)), Phase("tune", "after", iterations=1, lr=0.1)]

    @hookimpl
    def penalty(self, run, batch, outputs):
        noise = torch.rand(1, generator=run.rng("noise")).item()
        scale = getattr(run.model, f"scale{run.experience.index}")
        terms = {"busy/scale": (scale - noise) ** 2}
        if self.teacher is not None:
            old = self.teacher(batch.x).logits
            terms["busy/teach"] = (old - outputs.logits[:, : old.shape[1]]).pow(2).mean()
        return terms

    @hookimpl
    def extra_batch(self, run, batch):
        shape = (3, *run.scenario.input_shape)
        x = torch.randint(0, 255, shape, generator=run.rng("replay"), dtype=torch.uint8)
        return run.batch(ImageData(x, torch.arange(3) % 2, weight=0.5), augment=run.rng("replay"))

    @hookimpl
    def base_loss(self, run, batch, outputs):
        return run.loss(batch, outputs) * (1 + torch.rand(1, generator=run.rng("noise")).item())

    @hookimpl
    def after_backward(self, run, batch):
        bias = run.model.head[-1].bias
        bias.grad.add_(torch.rand(bias.shape, generator=run.rng("noise")))

    @hookimpl
    def predictor(self, run):
        return ModelPredictor(self.teacher if self.teacher is not None else run.model)

    @hookimpl
    def after_eval(self, run, experience):
        self.values["seen"] = [*self.values.get("seen", []), run.accuracy["class"][-1]]

    @hookimpl
    def after_step(self, run, batch):
        self.optimizer.zero_grad()
        self.net(torch.ones(2)).pow(2).sum().backward()
        self.optimizer.step()

    @hookimpl
    def after_experience(self, run, experience):
        self.teacher = snapshot(run.model)
        ticks = run.ticks("work", 3, resumable=True)
        if ticks.start == 0:
            self.partial = torch.zeros(2)
        for _ in ticks:
            self.partial = self.partial + torch.rand(2, generator=run.rng("busy"))
        self.values["list"] = [*self.values["list"], self.partial, self.net.weight.detach().clone()]

    @hookimpl
    def after_run(self, run):
        self.final: list[Tensor] = [*self.values["list"], torch.tensor(self.count)]


def stream(tiny: Any) -> clframe.Scenario:
    scenario = tiny(shape=(1, 8, 8))
    scenario.transform = Transform(pad=1, flip=True, mean=(0.2,), std=(0.3,))
    return scenario


FILES = ("results.json", "model.safetensors", "model.json", "predictions.safetensors", "split.json")


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*FILES, "config.yaml")}


def test_a_stop_at_any_point_changes_no_bit(tiny, tmp_path: Path):
    runs: list[Busy] = []
    told: list[str] = []

    def begin(folder: Path) -> None:
        runs.append(Busy())
        try:
            clframe.run(stream(tiny), "cnn-small", runs[-1:], train=TRAIN, run={"output": str(folder)})
        except Interrupted as error:
            told.append(str(error))
            raise

    def go_on(folder: Path) -> None:
        assert f"`clframe resume {folder}`" in told[-1]
        resumed = Busy()
        clframe.resume(folder, scenario=stream(tiny), model=None, plugins=[resumed])
        assert all(torch.equal(a, b) for a, b in zip(runs[0].final, resumed.final, strict=True)), folder

    def places(pauses: testing.Pauses) -> range:
        assert len(pauses) > 50
        return range(1, len(pauses) + 1, 6)

    testing.stop_and_resume(tmp_path, begin, go_on, places, (*FILES, "config.yaml"))


def test_many_stops_of_one_run_change_no_bit(tiny, tmp_path: Path):
    clframe.run(stream(tiny), "cnn-small", [Busy()], train=TRAIN, run={"output": str(tmp_path / "whole")})
    folder, stops = tmp_path / "stopped", 0
    with testing.stop_at(7), pytest.raises(Interrupted, match=f"clframe resume {folder}"):
        clframe.run(stream(tiny), "cnn-small", [Busy()], train=TRAIN, run={"output": str(folder)})
    while True:
        stops += 1
        try:
            with testing.stop_at(7):
                clframe.resume(folder, scenario=stream(tiny), plugins=[Busy()])
        except Interrupted:
            continue
        break
    assert stops > 6
    assert files(folder) == files(tmp_path / "whole")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["experience"] for r in records if r["kind"] == "eval"] == [0, 1, 2]


@pytest.mark.parametrize(
    "plugin",
    [
        {"joint": {}},
        {"joint": {"form": "cumulative", "restart": True}},
        {"icarl": {"size": 12, "read_out": "ncm"}},
    ],
    ids=str,
)
def test_a_resume_that_is_stopped_before_its_first_step_changes_no_bit(tiny, tmp_path: Path, plugin: dict[str, Any]):
    """Plugins that keep all experiences are asked again for their images, before the phase under way goes on."""

    def begin(folder: Path) -> None:
        train = TRAIN | {"epochs": 1}
        clframe.run(stream(tiny), "mlp-100", [plugin], train=train, run={"output": str(folder)})

    def go_on(folder: Path) -> None:
        for _ in range(2):
            with testing.stop_at(1), pytest.raises(Interrupted):
                clframe.resume(folder, scenario=stream(tiny))
        clframe.resume(folder, scenario=stream(tiny))

    testing.stop_and_resume(tmp_path, begin, go_on, lambda pauses: range(3, len(pauses), 14), FILES)


def test_a_trained_run_is_loaded_and_answers_as_it_was_evaluated(tiny, tmp_path: Path):
    results = clframe.run(stream(tiny), "cnn-small", [Busy()], train=TRAIN, run={"output": str(tmp_path / "run")})
    trained = clframe.load(tmp_path / "run", plugins=[Busy()])
    saved = load_file(tmp_path / "run" / "predictions.safetensors")
    for on, experience in enumerate(stream(tiny)):
        scores = trained(experience.test.x)
        assert torch.allclose(scores, saved[f"class/2/{on}"], atol=1e-6)
        assert torch.equal(saved[f"labels/{on}"], experience.test.y)
        correct = (scores.argmax(1) == experience.test.y).float().mean().item()
        assert correct == results.accuracy["class"][2][on]
        told = trained(experience.test.x, task=on)
        assert (told.argmax(1) // 2 == on).all()
    assert trained.class_names == tuple(f"class {c}" for c in range(6))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run that was stopped twice, so that it has two checkpoints."""
    folder = tmp_path / "stopped"
    with testing.stop_at(8), pytest.raises(Interrupted):
        clframe.run("split-digits", "mlp-100", ["ewc"], train={"iterations": 12}, run={"output": str(folder)})
    with testing.stop_at(3), pytest.raises(Interrupted):
        clframe.resume(folder)
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["000002", "000003"]
    return folder


class Terms(Plugin):
    """Has a loss term that is never other than 0, and one that is not 0 in the first step of an experience."""

    name = "terms"

    @hookimpl
    def penalty(self, run, outputs):
        nothing = outputs.logits.sum() * 0
        return {"terms/never": nothing, "terms/once": nothing + (run.step == 0)}


def test_a_loss_term_that_is_0_at_every_step_is_told_once_also_over_a_stop(tiny, tmp_path: Path):
    told: list[str] = []
    listeners = [testing.message_listener(told)]
    sentence = "The loss term `terms/never` was 0 at every step of experience 1 of 2."
    clframe.run(tiny(experiences=2), "mlp-100", [Terms()], train={"iterations": 6}, listeners=listeners)
    assert told == [sentence]
    told.clear()
    # in the fourth step of the first experience, after the pauses of two hooks
    with testing.stop_at(7), pytest.raises(Interrupted, match="experience 1 of 2"):
        clframe.run(
            tiny(experiences=2),
            "mlp-100",
            [Terms()],
            train={"iterations": 6},
            run={"output": str(tmp_path / "run")},
            listeners=listeners,
        )
    assert told == []
    clframe.resume(tmp_path / "run", scenario=tiny(experiences=2), plugins=[Terms()], listeners=listeners)
    assert told == [sentence]


@pytest.mark.parametrize("name", ["tree.json", "tensors.safetensors", "manifest.json"])
def test_one_flipped_bit_is_noticed_and_the_older_checkpoint_used(stopped: Path, tmp_path: Path, name: str):
    file = stopped / "checkpoints" / "000003" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    told: list[str] = []
    clframe.resume(stopped, listeners=[testing.message_listener(told)])
    assert len(told) == 1
    assert "000003" in told[0]
    assert "older checkpoint 000002 is used" in told[0]
    whole = tmp_path / "whole"
    clframe.run("split-digits", "mlp-100", ["ewc"], train={"iterations": 12}, run={"output": str(whole)})
    assert (stopped / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_a_resume_without_a_good_checkpoint_never_starts_afresh(stopped: Path):
    for path in (stopped / "checkpoints").glob("*/tensors.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"damaged.*never starts from the beginning"):
        clframe.resume(stopped)
    assert not (stopped / "results.json").exists()


def test_a_checkpoint_that_holds_a_pickle_is_refused(stopped: Path):
    torch.save({"a": 1}, stopped / "checkpoints" / "000003" / "optimizer.pt")
    torch.save({"a": 1}, stopped / "checkpoints" / "000002" / "tensors.safetensors")
    with pytest.raises(DataError, match=r"untrusted: it holds `optimizer.pt`"):
        clframe.resume(stopped)


def test_a_resume_of_a_finished_foreign_or_edited_run_is_refused(stopped: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is not a run folder"):
        clframe.resume(tmp_path / "empty")
    with pytest.raises(DataError, match="is not a run folder"):
        clframe.resume(tmp_path / "missing")
    config = stopped / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("seed: 0", "seed: 1"))
    with pytest.raises(DataError, match=r"config.yaml was edited"):
        clframe.resume(stopped)
    sums = (stopped / "sums.json").read_text()
    (stopped / "sums.json").unlink()  # as an earlier clframe left the folder
    with pytest.raises(DataError, match=r"config.yaml was edited"):
        clframe.resume(stopped)
    config.write_text(before.replace("seed: 0", "seed: [0"))
    with pytest.raises(DataError, match=r"config.yaml.*line"):
        clframe.resume(stopped)
    config.write_text(before)
    (stopped / "sums.json").write_text(sums)
    clframe.resume(stopped)
    with pytest.raises(DataError, match="is finished"):
        clframe.resume(stopped)


def test_another_environment_is_refused_unless_allowed(stopped: Path):
    file = stopped / "environment.json"
    changed = json.loads(file.read_text())
    changed["torch"] = "1.0"
    changed["threads"] = 77
    file.write_text(json.dumps(changed))
    with pytest.raises(DataError, match=r"torch was 1.0, is .*threads was 77, is 1.*--allow-env-change"):
        clframe.resume(stopped)
    clframe.resume(stopped, allow_env_change=True)
    assert (stopped / "results.json").exists()


def test_two_processes_cannot_work_on_one_folder(stopped: Path):
    from filelock import FileLock

    with FileLock(stopped / ".lock", is_singleton=False), pytest.raises(DataError, match="Another process"):
        clframe.resume(stopped)


def test_a_run_folder_that_exists_is_refused_and_left_alone(stopped: Path):
    before = sorted(stopped.rglob("*"))
    with pytest.raises(UsageError, match=f"clframe resume {stopped}"):
        clframe.run("split-digits", run={"output": str(stopped)})
    assert sorted(stopped.rglob("*")) == before


def test_a_full_disk_keeps_the_last_checkpoint(stopped: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(RunError, match=r"No space left on device.*checkpoint is kept"):
            clframe.resume(stopped)
    assert [p.name for p in sorted((stopped / "checkpoints").iterdir())] == ["000002", "000003"]
    clframe.resume(stopped)
    assert (stopped / "results.json").exists()


def test_objects_of_python_must_be_given_again(tiny, tmp_path: Path):
    with testing.stop_at(9), pytest.raises(Interrupted):
        clframe.run(stream(tiny), "cnn-small", [Busy()], train=TRAIN, run={"output": str(tmp_path / "run")})
    with pytest.raises(DataError, match="scenario `tiny` of this run"):
        clframe.resume(tmp_path / "run")
    with pytest.raises(DataError, match="plugin `busy` of this run"):
        clframe.resume(tmp_path / "run", scenario=stream(tiny))


def test_changed_data_is_noticed(tiny, tmp_path: Path):
    with testing.stop_at(9), pytest.raises(Interrupted):
        clframe.run(stream(tiny), "cnn-small", train=TRAIN, run={"output": str(tmp_path / "run")})
    other = stream(tiny)
    other.checksum = "0" * 64
    with pytest.raises(DataError, match="data of `tiny`"):
        clframe.resume(tmp_path / "run", scenario=other)


def test_a_model_that_is_not_the_runs_is_refused(tiny, tmp_path: Path):
    class Flat(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width
            self.layer = nn.Linear(64, width)

        def features(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1))

    with testing.stop_at(9), pytest.raises(Interrupted):
        clframe.run(stream(tiny), Flat(8), train=TRAIN, run={"output": str(tmp_path / "run")})
    with pytest.raises(DataError, match=r"size mismatch for backbone\.layer\.weight"):
        clframe.resume(tmp_path / "run", scenario=stream(tiny), model=Flat(9))


def test_a_run_of_a_device_that_is_gone_needs_leave_to_go_on(stopped: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, environment = stopped / "config.yaml", stopped / "environment.json"
    before = config.read_text()
    changed = json.loads(environment.read_text()) | {"device": "cuda: NVIDIA"}
    environment.write_text(json.dumps(changed))
    config.write_text(before.replace("device: cpu", "device: cuda"))
    (stopped / "sums.json").unlink()
    with pytest.raises(DataError, match=r"device was cuda: NVIDIA, is cpu.*--allow-env-change"):
        clframe.resume(stopped)


def test_what_a_checkpoint_cannot_hold_is_refused_and_names_that_differ_stay_apart():
    tensors: dict[str, Tensor] = {}
    tree = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    back = checkpoint.unpack(checkpoint.pack(tree, tensors), tensors)
    assert (back["a/b"].item(), back["a"]["b"].item()) == (1, 0)
    with pytest.raises(TypeError, match="keys"):
        checkpoint.pack({(1, 2): 3}, tensors)


def test_modules_that_a_phase_froze_are_as_a_resumed_run_finds_them(tiny, tmp_path: Path):
    class Modes(Plugin):
        name = "modes"
        seen: tuple[bool, ...] = ()

        @hookimpl
        def before_experience(self, run, experience):
            run.model.backbone.requires_grad_(False)

        @hookimpl
        def after_experience(self, run, experience):
            self.seen = tuple(m.training for m in run.model.modules())

    modes = Modes()
    clframe.run(stream(tiny), "cnn-small", [modes], train=TRAIN)
    assert all(modes.seen)


# ------------------------------------------------------------------------ written while the run goes on


def opened(path: Path) -> RunFolder:
    folder = RunFolder(path, new=True)
    folder.begin("", {}, {})
    return folder


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the run does while the disk is busy is not in it; the next one waits, and so does the end."""
    busy, original = threading.Event(), checkpoint.write

    def write(*arguments: Any) -> Path:
        assert busy.wait(10)
        return original(*arguments)

    monkeypatch.setattr(checkpoint, "write", write)
    folder, weight, rows = opened(tmp_path / "run"), torch.zeros(3), [1.0]
    folder.save({"weight": weight, "part": weight[1:], "rows": rows})
    weight += 1
    rows.append(2.0)
    assert checkpoint.find_newest(folder.checkpoints) is None
    busy.set()
    folder.save({"weight": weight})
    assert checkpoint.find_newest(folder.checkpoints) is not None
    folder.close()
    found = [checkpoint._read(folder.checkpoints / name) for name in ("000001", "000002")]
    trees = [checkpoint.unpack(*loaded) for loaded in found]
    assert trees[0]["rows"] == [1.0]
    assert torch.equal(trees[0]["weight"], torch.zeros(3))
    assert torch.equal(trees[0]["part"], torch.zeros(2))
    assert torch.equal(trees[1]["weight"], torch.ones(3))


def test_what_kept_a_checkpoint_from_being_written_is_told_once_and_stops_the_run(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At the next checkpoint, or at the end; the one before is kept."""
    original, written = save_file, []

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    folder = opened(tmp_path / "alone")
    for number in range(2):
        folder.save({"number": number})
    with pytest.raises(RunError, match=r"000002 could not be written \(.*No space left.*000001 is kept"):
        folder.save({"number": 2})
    folder.settle()
    folder.close()
    written.clear()
    with pytest.raises(RunError, match=r"000002 could not be written \(.*No space left.*000001 is kept: make room"):
        clframe.run(tiny(), "mlp-100", train=TRAIN, run={"output": str(tmp_path / "run"), "predictions": False})
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["000001"]
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_run_whose_first_checkpoint_fails_is_resumed_from_the_beginning(tmp_path: Path):
    """Nothing is recorded before the first checkpoint is whole; else neither `run` nor `resume` took the folder."""
    given = {"scenario": {"name": "split-digits", "limit": 4}, "model": {"name": "mlp", "hidden": [4]}}
    settings = {"tensorboard": False, "device": "cpu", "log_every": 1}
    whole = clframe.run(**given, train={"iterations": 2}, run=settings)

    def full(path: Path) -> None:
        time.sleep(0.2)  # a run that did not wait would take steps meanwhile
        raise OSError(28, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "sync", lambda path: full(path) if "checkpoints" in str(path) else None)
        with pytest.raises(RunError, match=r"none yet: .* resume"):
            clframe.run(**given, train={"iterations": 2}, run={**settings, "output": str(tmp_path / "run")})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert clframe.resume(tmp_path / "run").data == whole.data


def test_a_kept_optimizer_of_parameters_that_have_other_names_now_is_put_back(tiny, tmp_path: Path):
    """`duplicate` moves the backbone as it grows; until the next step the optimizer has its old names."""
    train = {"iterations": 2, "batch_size": 8, "keep_optimizer": True, "optimizer": "adam"}

    def begin(**run: str) -> clframe.Results:
        settings = {"tensorboard": False, "device": "cpu", **run}
        return clframe.run(tiny(setting="task"), "mlp-100", ["duplicate"], train=train, run=settings)

    def here(engine: Any) -> bool:
        return engine.position.experience == 1 and engine.position.entered and not engine.position.steps

    whole = begin()
    with testing.stop_at(here), pytest.raises(Interrupted):
        begin(output=str(tmp_path / "run"))
    assert clframe.resume(tmp_path / "run", scenario=tiny(setting="task")).data == whole.data


def test_means_of_all_images_are_the_same_where_a_run_is_resumed_at_its_end(tiny, tmp_path: Path):
    """The last experience's images were counted twice there, which moved the means by their last bits."""
    name = "model.safetensors"

    def begin(folder: Path) -> clframe.Results:
        settings = {"tensorboard": False, "device": "cpu", "output": str(folder)}
        plugin = {"icarl": {"size": 24, "read_out": "ncm"}}
        return clframe.run(tiny(), "mlp-100", [plugin], train={"iterations": 2, "batch_size": 8}, run=settings)

    begin(tmp_path / "whole")
    with testing.stop_at(lambda engine: engine.position.experience == len(engine.stream)), pytest.raises(Interrupted):
        begin(tmp_path / "run")
    clframe.resume(tmp_path / "run", scenario=tiny())
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def returning(tiny_arrays: Any, setting: Any) -> clframe.Scenario:
    """Three experiences, of which the last brings the classes of the first back."""
    arrays = tiny_arrays()
    groups = ((0, 1), (2, 3), (0, 1))

    def load(index: int, part: str) -> ImageData:
        x, y = arrays.part(part)
        where = torch.isin(y, torch.tensor(groups[index]))
        return ImageData(x[where], y[where], task=index)

    return clframe.Scenario("returning", setting, groups, arrays.class_names, (1, 4, 4), load)


def move_frozen_names(checkpoints: Path, plugin: str) -> list[str]:
    """Write the newest checkpoint as earlier versions did, where a plugin held the names; return what was frozen."""
    newest = checkpoint.find_newest(checkpoints)
    assert newest
    content = json.loads((newest / "tree.json").read_text())
    entries = dict(content["tree"]["dict"])
    names = entries.pop("frozen")
    content["tree"]["dict"] = list(entries.items())
    dict(entries["plugins"]["dict"])[plugin]["dict"].append(["frozen", names])
    (newest / "tree.json").write_text(json.dumps(content))
    manifest = {name: sums.digest(newest / name) for name in checkpoint.CHECKPOINT_FILES}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    return checkpoint.unpack(names, {})


@pytest.mark.parametrize("held_by", ["the run", "the plugin"])
@pytest.mark.parametrize(
    ("name", "setting"), [("finetune-fc", "class"), ("feature-extraction", "task"), ("lfl", "task")]
)
def test_what_was_frozen_at_a_stop_trains_again_in_the_next_experience(
    name: str, setting: str, held_by: str, tiny_arrays, tmp_path: Path
):
    """The head of the first classes is frozen in the second experience, and learns when these classes come back."""

    def begin(folder: Path) -> None:
        plugins, run = [name, testing.Recorder()], {"tensorboard": False, "device": "cpu", "output": str(folder)}
        clframe.run(returning(tiny_arrays, setting), "mlp-100", plugins, train={"iterations": 3}, run=run)

    def here(engine: Any) -> bool:
        return (engine.position.experience, engine.position.steps) == (1, 2)

    begin(tmp_path / "whole")
    with testing.stop_at(here), pytest.raises(Interrupted):
        begin(tmp_path / "run")
    if held_by == "the plugin":
        assert "head.0.weight" in move_frozen_names(tmp_path / "run" / "checkpoints", name)
    recorder = testing.Recorder()
    clframe.resume(tmp_path / "run", scenario=returning(tiny_arrays, setting), plugins=[recorder])
    assert "head.0.weight" in recorder.changed(-1)
    assert all(parameter.requires_grad for parameter in recorder.model.parameters())
    for file in testing.FILES:
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
