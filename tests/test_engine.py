"""The loop against a hand-written one, every setting of the training, and what the engine refuses or survives."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

import clframe
from clframe import Arrays, Phase, Plugin, Scenario, Transform, change_domains, hookimpl, split_classes, testing
from clframe.errors import DataError, RunError, UsageError
from clframe.plugins.ewc import EWC
from clframe.strict_yaml import parse_yaml
from clframe.system import writing
from clframe.system.writing import save_file
from clframe.testing import Recorder, refused, state_copy
from clframe.training import training_only

learn = partial(testing.learn, model="mlp-100", epochs=1, lr=0.05, optimizer="sgd", clip=0.0)


class Seeing(Recorder):
    """A recorder that also keeps each step's optimizer, rate, norm of the gradient and mask of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.norms: list[float] = []
        self.masks: list[Any] = []

    @hookimpl
    def before_run(self, run):
        super().before_run(run)
        self.initial = state_copy(run.model)

    @hookimpl
    def after_step(self, run, batch):
        super().after_step(run, batch)
        self.rates.append(run.optimizer.param_groups[0]["lr"])
        self.optimizers.append(run.optimizer)
        gradients = [p.grad.norm() for p in run.model.parameters() if p.grad is not None]
        self.norms.append(torch.stack(gradients).norm().item())
        mask = run.mask(batch.task)
        self.masks.append(None if mask is None else mask.tolist())

    @property
    def indices(self) -> list[Tensor]:
        """The positions of the images of each step."""
        return [step.batch.index for step in self.steps]

    @property
    def counts(self) -> list[int]:
        """The number of steps of each experience."""
        return [len(self.batches(k)) for k in range(3)]


# --------------------------------------------------------------------- right: against a plain loop


@pytest.mark.parametrize("setting", ["class", "task", "domain"])
def test_it_trains_and_evaluates_as_a_hand_written_loop_does(tiny, setting: str):
    seeing = Seeing()
    train = {"optimizer": "adam", "lr": 0.01, "epochs": 3, "clip": 1.0}
    results = learn(tiny(setting=setting), seeing, **train)
    scenario = tiny(setting=setting)
    weights = seeing.initial
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU())
    net.load_state_dict(
        dict(zip(net.state_dict(), [v for k, v in weights.items() if k.startswith("backbone")], strict=True))
    )
    head = nn.Linear(100, seeing.run.model.n_classes)
    heads = [dict(block.state_dict()) for block in fresh_heads(seeing.run.model.blocks)]
    head.load_state_dict({key: torch.cat([h[key] for h in heads]) for key in ("weight", "bias")})
    order = iter(seeing.indices)
    rows = []
    for i, experience in enumerate(scenario):
        seen = list(range(max(experience.classes) + 1))
        active = list(experience.classes) if setting == "task" else seen
        # a head grown later has seen no gradient before: Adam's state begins with the experience, so it is fresh anyway
        optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=0.01)
        at = {int(index): row for row, index in enumerate(experience.train.index)}
        for _ in range(3 * math.ceil(len(experience.train) / 8)):
            where = torch.tensor([at[int(index)] for index in next(order)])
            x, y = experience.train.x[where].float() / 255, experience.train.y[where]
            logits = head(net(x))[:, active]
            loss = functional.cross_entropy(logits, y - active[0])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*net.parameters(), *head.parameters()], 1.0)
            optimizer.step()
        row = []
        for j, other in enumerate(scenario):
            if j > i and setting != "domain":
                row.append(None)
                continue
            allowed = list(other.classes) if setting == "task" else seen
            with torch.no_grad():
                answer = head(net(other.test.x.float() / 255))[:, allowed].argmax(1) + allowed[0]
            row.append((answer == other.test.y).sum().item() / len(answer))
        rows.append(row)
    assert results.accuracy[setting] == rows
    final = [v for k, v in seeing.run.model.state_dict().items() if k.startswith("backbone")]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(final, net.state_dict().values(), strict=True))


def fresh_heads(blocks: list[int]) -> list[nn.Linear]:
    """The heads as a run of seed 0 draws them: from the seed and the size of the head before."""
    heads = []
    for k, size in enumerate(blocks):
        torch.manual_seed(sum(blocks[:k]) + 1)
        heads.append(nn.Linear(100, size))
    return heads


def test_the_same_seed_gives_the_same_figures_and_another_gives_others(tiny):
    first, again, other = Seeing(), Seeing(), Seeing()
    a, b = learn(tiny(), first, seed=3), learn(tiny(), again, seed=3)
    learn(tiny(), other, seed=4)
    assert a.data == b.data
    state, same, different = (s.run.model.state_dict() for s in (first, again, other))
    assert all(torch.equal(state[k], same[k]) for k in state)
    assert not any(torch.equal(state[k], different[k]) for k in state)


def test_a_run_leaves_torch_as_it_was(tiny):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    learn(tiny(), threads=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


# ---------------------------------------------------------------------------------------- settings


def test_iterations_are_complete_batches_of_reshuffled_epochs(tiny):
    seeing = Seeing()
    learn(tiny(), seeing, iterations=7, batch_size=10)
    assert seeing.counts == [7, 7, 7]
    assert all(len(index) == 10 for index in seeing.indices)
    assert len(torch.cat(seeing.indices[:2]).unique()) == 20


def test_epochs_meet_every_image_once(tiny):
    seeing = Seeing()
    learn(tiny(), seeing, epochs=2, batch_size=10)
    assert [len(index) for index in seeing.indices[:6]] == [10, 10, 4] * 2
    assert len(torch.cat(seeing.indices[:3]).unique()) == len(torch.cat(seeing.indices[3:6]).unique()) == 24


def test_schedules_follow_their_formulas(tiny):
    steps, cosine = Seeing(), Seeing()
    learn(tiny(), steps, epochs=4, schedule="steps", milestones=[1, 3], factor=0.5)
    assert steps.rates[:12] == pytest.approx([0.05] * 3 + [0.025] * 6 + [0.0125] * 3)
    assert steps.rates[12] == 0.05  # each experience begins anew
    learn(tiny(), cosine, epochs=4, schedule="cosine")
    assert cosine.rates[:12] == pytest.approx([0.05 * 0.5 * (1 + math.cos(math.pi * s / 12)) for s in range(12)])


def test_the_optimizer_is_new_for_each_experience_unless_kept(tiny):
    new, kept = Seeing(), Seeing()
    learn(tiny(), new, optimizer="adam")
    assert len({id(o) for o in new.optimizers}) == 3
    learn(tiny(), kept, optimizer="adam", keep_optimizer=True)
    assert len({id(o) for o in kept.optimizers}) == 1
    count = {name: int(kept.optimizers[-1].state[p]["step"]) for name, p in kept.run.model.named_parameters()}
    assert count["head.0.weight"] == count["backbone.net.1.weight"] == 9
    assert count["head.1.weight"] == 6
    assert count["head.2.bias"] == 3


def test_a_phase_beside_train_leaves_a_kept_optimizer_alone(tiny):
    class Warm(Plugin):
        name = "warm"

        @hookimpl
        def phases(self, run, experience):
            return [Phase("warm", iterations=4, only=("head.*",)), Phase("tune", "after", iterations=1)]

    seeing = Seeing()
    learn(tiny(), Warm(), seeing, optimizer="adam", keep_optimizer=True)
    assert len({id(o) for o in seeing.optimizers}) == 1 + 2 * 3
    kept = seeing.optimizers[-2]
    count = {name: int(kept.state[p]["step"]) for name, p in seeing.run.model.named_parameters()}
    assert count["head.0.weight"] == count["backbone.net.1.weight"] == 9
    assert count["head.2.weight"] == 3


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimizers_get_their_options(tiny, optimizer: str):
    seeing = Seeing()
    train = {"optimizer": optimizer, "weight_decay": 0.1, "head_lr": 0.2, "betas": [0.8, 0.9], "eps": 1e-7}
    learn(tiny(), seeing, **train, momentum=0.9, nesterov=True)
    last = seeing.optimizers[-1]
    assert type(last).__name__.lower() == optimizer
    groups = {name: group for group in last.param_groups for name in group["names"]}
    assert groups["head.0.weight"]["lr"] == 0.2
    assert groups["backbone.net.1.weight"]["lr"] == 0.05
    assert (groups["head.0.weight"]["weight_decay"], groups["head.0.bias"]["weight_decay"]) == (0.1, 0.0)
    if optimizer == "sgd":
        assert (last.param_groups[0]["momentum"], last.param_groups[0]["nesterov"]) == (0.9, True)
    else:
        assert (tuple(last.param_groups[0]["betas"]), last.param_groups[0]["eps"]) == ((0.8, 0.9), 1e-7)
    learn(tiny(), seeing, weight_decay=0.1, decay="all")
    assert {group["weight_decay"] for group in seeing.optimizers[-1].param_groups} == {0.1}


def test_gradients_are_clipped_by_default_and_not_where_it_is_0(tiny):
    clipped, free = Seeing(), Seeing()
    learn(tiny(), clipped, clip=0.01)
    assert max(clipped.norms) <= 0.01 * (1 + 1e-4)
    learn(tiny(), free)
    assert max(free.norms) > 0.5
    assert clframe.settings.TrainSettings().clip == 1.0


@pytest.mark.parametrize(
    ("setting", "logits", "blocks", "masks"),
    [
        ("class", None, [2, 2], [None, None]),
        ("class", "seen", [2, 2], [None, None]),
        ("class", "all", [2, 2, 2], [None, None]),
        ("class", "current", [2, 2], [[True, True], [False, False, True, True]]),
        ("task", None, [2, 2], [[[True, True]] * 8, [[False, False, True, True]] * 8]),
        ("task", "seen", [2, 2], [None, None]),
    ],
)
def test_which_logits_take_part(tiny, setting: str, logits: str | None, blocks: list[int], masks: list[Any]):
    seeing = Seeing()
    heads: list[list[int]] = []

    class Heads(Plugin):
        name = "heads"
        observer = True

        @hookimpl
        def grow(self, run, experience):
            heads.append(run.model.blocks)

    results = learn(tiny(setting=setting), seeing, Heads(), logits=logits)
    assert heads[1] == blocks
    assert [seeing.masks[0], seeing.masks[3]] == masks
    words = results.data["readings"].get("task", "")
    assert ("multi-head" in words) == (logits == "current" or (setting == "task" and logits is None))


def test_unseen_classes_are_no_answer_and_later_tasks_are_evaluated_where_the_head_covers_them(tiny):
    results = learn(tiny(), logits="all", lr=1e-6)
    assert [row.count(None) for row in results.accuracy["class"]] == [2, 1, 0]
    assert results.accuracy["class"][0][0] >= 0.25  # two classes, not six, to choose from
    assert [row.count(None) for row in results.accuracy["task"]] == [0, 0, 0]
    assert set(results.data["baseline"]) == {"task"}
    assert results.measures["task"]["forward_transfer"] is not None
    domain = learn(tiny(setting="domain"))
    assert [row.count(None) for row in domain.accuracy["domain"]] == [0, 0, 0]
    baseline, matrix = domain.data["baseline"]["domain"], domain.accuracy["domain"]
    expected = ((matrix[0][1] - baseline[1]) + (matrix[1][2] - baseline[2])) / 2
    assert domain.measures["domain"]["forward_transfer"] == pytest.approx(expected)


def test_a_validation_share_is_held_out_by_the_seed(tiny, tmp_path: Path):
    seeing = Seeing()
    learn(tiny(), seeing, val=0.25, output=str(tmp_path / "run"))
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    for experience, index in zip(split["experiences"], (seeing.indices[i : i + 3] for i in (0, 3, 6)), strict=True):
        assert len(experience["val"]) == 6
        assert not set(experience["val"]) & set(torch.cat(index).tolist())
    assert seeing.counts == [3, 3, 3]


def test_curves_within_experiences(tiny, tmp_path: Path):
    learn(tiny(), epochs=3, eval_every="epoch", output=str(tmp_path / "run"), tensorboard=False)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    within = [r for r in records if r["kind"] == "within" and r["reading"] == "class"]
    assert [(r["experience"], r["epoch"]) for r in within] == [(i, e) for i in range(3) for e in range(3)]
    rows = [r["rows"]["class"] for r in records if r["kind"] == "eval"]
    assert [r["row"] for r in within if r["epoch"] == 2] == rows


# --------------------------------------------------------------------------------- one's own parts


class Doubling(nn.Module):
    """A backbone of one's own."""

    width = 16

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((16,), 2.0))

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1) * self.scale


def test_a_model_and_arrays_of_ones_own(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 16, generator=generator) + 4 * functional.one_hot(y, 16)
    arrays = Arrays("mine", x, y, x, y, ("a", "b", "c"), Transform(scale=1.0))
    scenario = split_classes("mine", arrays, experiences=3, order=[2, 0, 1])
    results = clframe.run(scenario, Doubling(), train={"epochs": 20, "lr": 0.05}, run={"output": str(tmp_path / "run")})
    assert results.accuracy["task"][2] == [None] * 3  # one class to choose from: no figure could be another
    trained = clframe.load(tmp_path / "run", model=Doubling())
    assert trained.class_names == ("c", "a", "b")
    assert (trained(x).argmax(1) == torch.tensor([1, 2, 0])[y]).float().mean() == pytest.approx(
        sum(results.accuracy["class"][2]) / 3
    )
    with refused("`Doubling`", "`clframe.load`", error=DataError):
        clframe.load(tmp_path / "run")
    with pytest.raises(UsageError, match="cannot be a backbone"):
        clframe.run(scenario, nn.Linear(2, 2))


def test_a_domain_scenario_of_ones_own(tiny_arrays):
    scenario = change_domains("turned", tiny_arrays(), lambda i, x: x.rot90(i, (2, 3)), experiences=3)
    results = clframe.run(scenario, "mlp-100", train={"epochs": 30, "lr": 0.01})
    assert results.accuracy["domain"][2][2] > 0.9
    assert results.data["setting"] == "domain"


# ------------------------------------------------------------------------------ refusals, bad luck


def test_a_label_that_the_logits_mask_is_an_error_before_training(tiny, rows):
    class Exemplars(Plugin):
        name = "exemplars"

        @hookimpl
        def extra_data(self, run, experience):
            return rows(4) if experience.index else None

    with refused("Label 0", "training data of experience 2 of 3", "`train.logits=current`"):
        learn(tiny(), Exemplars(), logits="current")

    class Replay(Plugin):
        name = "replay"

        @hookimpl
        def extra_batch(self, run, batch):
            return run.batch(rows(2)) if run.experience.index else None

    with refused("Label 0", "`replay`", "batch of experience 2 of 3"):
        learn(tiny(), Replay(), logits="current")
    with refused("`train.logits=own`", "tasks"):
        learn(tiny(setting="domain"), logits="own")


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(tiny, tmp_path: Path, clip: float):
    class Exploding(Plugin):
        name = "exploding"

        @hookimpl
        def penalty(self, run, batch, outputs):
            scale = math.nan if run.experience.index == 1 and run.step == 1 else 0.0
            return {"exploding/term": outputs.logits.sum() * scale}

    with refused("`exploding/term`", "experience 2 of 3", error=RunError):
        learn(tiny(), Exploding(), clip=clip, output=str(tmp_path / "run"), tensorboard=False)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["000001", "000002"]  # of the start and of experience 0: nothing broken was saved
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("log_every", [1, 50])
def test_of_several_that_are_not_finite_the_first_and_its_step_are_named(tiny, log_every: int):
    class Late(Plugin):
        name = "late"

        @hookimpl
        def penalty(self, run, batch, outputs):
            return {
                name: outputs.logits.sum() * (math.nan if run.step >= step else 0.0)
                for name, step in (("late/third", 4), ("late/second", 3))
                if run.step >= step - 1  # the terms of a step are not those of every step
            }

    with refused("`late/second`", "at step 4 of ", error=RunError):
        learn(tiny(), Late(), epochs=5, log_every=log_every)


def test_losses_are_looked_at_before_many_are_kept(tiny, monkeypatch):
    monkeypatch.setattr("clframe.watch.FULL", 2)

    class Exploding(Plugin):
        name = "exploding"
        steps = 0

        @hookimpl
        def penalty(self, run, batch, outputs):
            self.steps += 1
            return {"exploding": outputs.logits.sum() * math.nan}

    plugin = Exploding()
    with refused("`exploding`", "at step 1 of ", error=RunError):
        learn(tiny(), plugin, log_every=1000)
    assert plugin.steps == 2


def test_an_infinite_gradient_is_named(tiny):
    class Rooting(Plugin):
        name = "rooting"

        @hookimpl
        def penalty(self, run, batch, outputs):
            return {"rooting": (outputs.logits.sum() * 0).sqrt()}

    with pytest.raises(RunError, match="The gradient became infinite"):
        learn(tiny(), Rooting(), clip=1.0)


def test_a_device_that_is_not_there_is_refused(tiny):
    if not torch.cuda.is_available():
        with refused("`run.device` is 'cuda'"):
            learn(tiny(), device="cuda")
    with pytest.raises(UsageError, match="choices: auto, cpu, cuda"):
        learn(tiny(), device="abacus")


def test_a_folder_that_cannot_be_written_is_refused(tiny, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        learn(tiny(), output=str(tmp_path / "file" / "run"))


def test_memory_that_runs_out_is_told_in_one_sentence(tiny):
    class Hungry(Plugin):
        name = "hungry"

        @hookimpl
        def penalty(self, run, batch, outputs):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with refused("Out of memory on cpu", "experience 1 of 3", "`train.batch_size`", error=RunError):
        learn(tiny(), Hungry())


def test_an_experience_without_images_is_refused(tiny):
    full = tiny()

    def load(i: int, part: Any) -> clframe.ImageData:
        return full._load(i, part).rows(slice(0, 0)) if part == "train" and i == 1 else full._load(i, part)

    scenario = Scenario("holey", "class", full.classes, full.class_names, full.input_shape, load)
    with refused("`holey`", "training images", "experience 2 of 3", error=DataError):
        learn(scenario)


def test_results_say_what_they_are(tiny, tmp_path: Path):
    results = learn(tiny(), output=str(tmp_path / "run"), seed=5, tensorboard=True)
    data = json.loads((tmp_path / "run" / "results.json").read_text())
    assert data == results.data
    assert (data["scenario"], data["setting"], data["plugins"], data["seed"]) == ("tiny", "class", [], 5)
    assert data["test_images"] == [8, 8, 8]
    measure = data["measures"]["class"]["forgetting"]
    assert set(measure) == {"value", "formula", "source"}
    assert set(data["calibration"]["class"]) == {"ece", "nll", "confident_errors"}
    found = {p.name for p in (tmp_path / "run").iterdir()} - {".lock"}
    assert found == {
        "checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "model.json", "model.safetensors",
        "predictions.safetensors", "results.json", "split.json", "sums.json", "tensorboard", "timings.json",
    }  # fmt: skip
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["data_sha256"] == tiny().checksum
    timings = json.loads((tmp_path / "run" / "timings.json").read_text())
    assert [e["images"] for e in timings["experiences"]] == [24, 24, 24]


def test_confusion_matrix_and_accuracy_per_class_come_from_the_saved_scores(tiny, tmp_path: Path):
    for setting in ("class", "task", "domain"):
        results = learn(tiny(setting=setting), epochs=10, output=str(tmp_path / setting), tensorboard=False)
        matrix = torch.tensor(results.confusion_matrix(setting))
        assert matrix.sum().item() == 24
        share = matrix.diagonal().sum().item() / 24
        assert share == pytest.approx(sum(results.accuracy[setting][-1]) / 3)
        named = clframe.Results.read(tmp_path / setting).accuracy_per_class(setting)
        assert list(named) == list(tiny(setting=setting).class_names)
        assert named[tiny(setting=setting).class_names[1]] == matrix[1, 1].item() / matrix[1].sum().item()
    with pytest.raises(DataError, match="holds no scores"):
        learn(tiny(), predictions=False).confusion_matrix()


def test_intransigence_is_measured_against_a_joint_run(tiny, tmp_path: Path):
    joint = learn(tiny(), "joint", output=str(tmp_path / "joint"))
    results = learn(tiny(), joint=str(tmp_path / "joint"))
    best, matrix = joint.accuracy["class"][-1], results.accuracy["class"]
    expected = sum(best[j] - matrix[j][j] for j in range(3)) / 3
    assert results.measures["class"]["intransigence"] == pytest.approx(expected)


def test_a_plugin_may_write_into_a_batch(tiny):
    class Writing(Plugin):
        name = "writing"

        @hookimpl
        def extra_batch(self, run, batch):
            batch.weight[0] = 3.0
            batch.origin[1] = 7
            self.checked = batch.weight.tolist() == [3.0] + [1.0] * 7 and batch.origin.tolist() == [0, 7] + [0] * 6
            assert run.experience.train.weight.unique().tolist() == [1.0]

    plugin = Writing()
    learn(tiny(), plugin)
    assert plugin.checked


def test_every_plugin_hears_the_end_also_when_one_fails_there(tiny):
    class Failing(Plugin):
        name = "failing"

        @hookimpl
        def after_run(self, run):
            raise KeyError("closing")

    class Closing(Plugin):
        name = "closing"
        closed = False

        @hookimpl
        def after_run(self, run):
            self.closed = True

    plugin = Closing()
    with refused("`failing`", "`after_run`", error=RunError):
        learn(tiny(), Failing(), plugin)
    assert plugin.closed


def test_storage_is_what_the_method_keeps(tiny):
    results = learn(tiny(), "ewc")
    net = 16 * 100 + 100 + 100 * 100 + 100 + 6 * 100 + 6
    assert results.data["storage"]["ewc"]["parameters"] >= 2 * net
    assert results.data["storage"]["ewc"]["bytes"] == pytest.approx(4 * 2 * net, rel=0.01)


def test_a_run_that_is_refused_leaves_no_folder(tiny, tmp_path: Path):
    with pytest.raises(UsageError, match="cannot run beside"):
        clframe.run(tiny(), plugins=["joint", "ewc"], run={"output": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_in_the_last_step_is_never_saved(tiny, tmp_path: Path):
    class Rooting(Plugin):
        name = "rooting"

        @hookimpl
        def penalty(self, run, batch, outputs):
            last = run.experience.index == 1 and run.step == run.steps_in_phase - 1
            return {"rooting": (outputs.logits.sum() * 0).sqrt()} if last else None

    with refused("gradient", "infinite", "experience 2 of 3", error=RunError):
        learn(tiny(), Rooting(), clip=0.0, output=str(tmp_path / "run"), tensorboard=False)
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["000001", "000002"]


def test_a_kept_optimizer_outlives_an_empty_phase(tiny):
    class Empty(Plugin):
        name = "empty"

        @hookimpl
        def phases(self, run, experience):
            return [Phase("empty", iterations=0)]

    seeing = Seeing()
    learn(tiny(), Empty(), seeing, optimizer="adam", keep_optimizer=True)
    count = {n: int(seeing.optimizers[-1].state[p]["step"]) for n, p in seeing.run.model.named_parameters()}
    assert count["backbone.net.1.weight"] == 9


def test_a_phase_that_trains_nothing_is_refused(tiny):
    class Lost(Plugin):
        name = "lost"

        @hookimpl
        def phases(self, run, experience):
            return [Phase("warm", iterations=1, only=("haed.*",))]

    with refused("`warm`", "experience 1 of 3", "`haed.*`"):
        learn(tiny(), Lost())


@pytest.mark.parametrize("label", [-100, -1, 2])
def test_a_label_that_the_head_lacks_is_refused(tiny, label: int):
    class Strange(Plugin):
        name = "strange"

        @hookimpl
        def extra_data(self, run, experience):
            return clframe.ImageData(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.full((3,), label))

    with refused(f"Label {label} ", "training data of experience 1 of 3"):
        learn(tiny(), Strange())


def test_an_experience_without_test_images_has_no_accuracy(tiny_arrays):
    whole = tiny_arrays()
    kept = whole.y_test < 4
    arrays = Arrays("part", whole.x_train, whole.y_train, whole.x_test[kept], whole.y_test[kept], whole.class_names)
    results = learn(split_classes("part", arrays, experiences=3))
    assert [row[2] for row in results.accuracy["class"]] == [None, None, None]
    assert None not in results.accuracy["class"][2][:2]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda logits: {"base": logits.sum()}, ("two", "`base`")),
        (lambda logits: {"odd": logits}, ("`odd`", "[8, 2]", "scalar")),
        (lambda logits: logits.sum(), ("`penalty`", "Tensor")),
    ],
)
def test_a_penalty_that_is_no_new_scalar_is_refused(tiny, answer: Any, words: tuple[str, ...]):
    class Odd(Plugin):
        name = "odd"

        @hookimpl
        def penalty(self, run, batch, outputs):
            return answer(outputs.logits)

    with refused(*words):
        learn(tiny(), Odd())


def test_plugins_may_be_one_mapping_as_in_yaml_and_keep_their_options(tiny, tmp_path):
    plugins = {"ewc": {"lambda": 7.0}, "lwf": {}}
    clframe.run(tiny(), plugins=plugins, train={"iterations": 1}, run={"output": str(tmp_path / "run")})
    recorded = parse_yaml((tmp_path / "run" / "config.yaml").read_text(), "config.yaml")["plugins"]
    assert list(recorded) == ["ewc", "lwf"]
    assert recorded["ewc"]["lambda"] == 7.0


def test_plugin_objects_are_given_once_and_new(tiny):
    with refused("`ewc`", "twice"):
        clframe.run(tiny(), plugins=[EWC(lambda_=1.0), EWC(lambda_=2.0)])
    with refused("`EWC`", "class", "`EWC()`"):
        clframe.run(tiny(), plugins=[EWC])
    ewc = EWC()
    learn(tiny(), ewc)
    with refused("`ewc`", "been in a run"):
        learn(tiny(), ewc)


def test_a_run_folder_that_is_a_file_is_refused(tiny, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        learn(tiny(), output=str(tmp_path / "file"))


def test_a_folder_with_something_else_in_it_is_refused_and_kept(tiny, tmp_path: Path):
    """Nothing is said of resuming a folder that is not a run."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=rf"{re.escape(str(tmp_path))} .* `--output`") as caught:
        learn(tiny(), output=str(tmp_path))
    assert "resum" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_with_nothing_but_a_lock_is_used(tiny, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("")
    assert learn(tiny(), output=str(tmp_path / "run"), tensorboard=False).folder == tmp_path / "run"


def test_a_disk_that_is_full_from_the_beginning_leaves_nothing(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "sync", full)
    with pytest.raises(RunError, match=r"could not be written .*No space left on device"):
        learn(tiny(), output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_while_predictions_are_kept_is_no_bug(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = save_file

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if "predictions" in str(path):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        original(tensors, path)

    monkeypatch.setattr(clframe.runs.checkpoint, "save_file", full)
    with pytest.raises(RunError, match=r"could not be written: .*No space left on device.*predictions"):
        learn(tiny(), output=str(tmp_path / "run"), tensorboard=False)


# ----------------------------------------------------------------- what a phase does not train rests


def nested() -> nn.Module:
    """Norms with parameters and without, beside layers, in containers of their own, and first of all."""
    return nn.Sequential(
        nn.BatchNorm1d(3, affine=False),  # 0
        nn.Linear(3, 3),  # 1
        nn.BatchNorm1d(3),  # 2
        nn.BatchNorm1d(3, affine=False),  # 3
        nn.Dropout(),  # 4
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.Dropout()),  # 5
        nn.Sequential(nn.BatchNorm1d(3, affine=False)),  # 6
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)),  # 7
        nn.BatchNorm1d(3, affine=False),  # 8
    )


@pytest.mark.parametrize(
    ("trained", "resting"),
    [
        (["1", "2", "5.0", "7.0"], set()),
        # a container without anything trained rests as a whole; a norm that learns nothing goes with what precedes it
        (["7.0"], {"1", "2", "3", "5", "5.0", "5.1", "5.2", "6", "6.0"}),
        (["5.0"], {"1", "2", "3", "7", "7.0", "7.1", "8"}),
        (["1"], {"2", "3", "5", "5.0", "5.1", "5.2", "6", "6.0", "7", "7.0", "7.1", "8"}),
        (["2"], {"1", "5", "5.0", "5.1", "5.2", "6", "6.0", "7", "7.0", "7.1", "8"}),
        ([], {"", "0", "1", "2", "3", "4", "5", "5.0", "5.1", "5.2", "6", "6.0", "7", "7.0", "7.1", "8"}),
    ],
)
def test_what_holds_nothing_that_is_trained_rests(trained: list[str], resting: set[str]):
    """Those in eval mode move no statistics in a pass; the others, and only these, do."""
    net = nested()
    own = [p for name in trained for p in net.get_submodule(name).parameters()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with training_only(net, own):
        assert {name for name, module in net.named_modules() if not module.training} == resting
        assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in own}
        net(torch.randn(8, 3))
    moved = {name.rpartition(".")[0] for name, v in net.state_dict().items() if not torch.equal(v, before[name])}
    norms = {name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm1d)}
    assert moved == norms - resting
    assert all(module.training for module in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_after_a_phase_what_was_frozen_before_it_is_frozen_still_also_after_an_error():
    net = nested()
    net[1].weight.requires_grad_(False)
    net[7].eval()

    def fail() -> None:
        with training_only(net, net[5].parameters()):
            assert not net[1].training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["1.weight"]
    assert all(module.training for module in net.modules())  # as a run that is resumed here finds it


def test_the_speed_shown_leaves_out_the_first_step_of_a_phase(tiny, monkeypatch):
    """It is the one in which torch prepares itself: the time left would be many times too long."""

    class Slow(Plugin):
        @hookimpl
        def after_backward(self, run, batch):
            clock[0] += 100.0 if run.step == 0 else 2.0

    clock, shown = [0.0], []
    monkeypatch.setattr("clframe.engine.time.monotonic", lambda: clock[0])
    listener = [lambda record: shown.append(record) if record["kind"] == "progress" else None]
    train = {"iterations": 5, "batch_size": 8}
    clframe.run(tiny(experiences=2), "mlp-100", [Slow()], train=train, listeners=listener)
    assert [record["step"] for record in shown] == [2, 3, 4, 5] * 2
    assert {record["images_per_second"] for record in shown} == {4.0}
    assert [record["seconds_left"] for record in shown] == [6.0, 4.0, 2.0, 0.0] * 2
