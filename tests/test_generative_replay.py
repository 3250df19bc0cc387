"""Deep generative replay: its shares, its labels, its copies and its generator, step by step and by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import clframe
from clframe import Batch, ImageData, Plugin, Transform, hookimpl, registry, snapshot, split_classes, testing
from clframe.context import Run
from clframe.errors import Interrupted, RunError, UsageError
from clframe.plugins import generative_replay
from clframe.plugins.generative_replay import GenerativeReplay
from clframe.testing import differing, state_copy
from clframe.toolkit.generators import GenerativeModel, Mixture
from clframe.toolkit.rehearsal import Rehearsal

learn = partial(testing.learn, model="mlp-100", batch_size=7, optimizer="sgd", lr=0.05)
SMALL = {"hidden": [12], "z": 3}


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the default number of iterations be the solver's steps, however few."""
    monkeypatch.setattr(generative_replay, "LEAST_ITERATIONS", 1)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return differing(one, other) == []


class Watch(Plugin):
    """Computes each step's loss by hand, with labels of a copy of its own of the solver after each experience."""

    name = "watch"
    observer = True

    def __init__(self, replay: GenerativeReplay) -> None:
        self.replay = replay
        self.old: Any = None
        self.shares: list[tuple[int, float]] = []
        self.found: list[float] = []
        self.wanted: list[float] = []
        self.labels: list[list[int]] = []
        self.added: list[int] = []

    @hookimpl
    def penalty(self, run: Run, batch: Batch, outputs: Any) -> None:
        """Sees what the loss is made of; adds nothing."""
        mine, t = run.rows_from(self.replay, batch), run.experience.index + 1
        n = len(run.previous_classes)
        self.shares.append((t, float(batch.weight[mine].sum() / batch.weight.sum())))
        self.added.append(int(mine.sum()))
        z, y = outputs.logits.detach().double(), batch.y
        own = list(run.experience.classes) if run.logits == "own" else list(range(z.shape[1]))
        loss = -z[~mine][:, own].log_softmax(1)[range(int((~mine).sum())), [own.index(int(k)) for k in y[~mine]]].mean()
        if t > 1:
            with torch.no_grad():
                q = self.old(batch.x[mine]).logits[:, :n].double()
            self.labels.append(y[mine].tolist())
            if self.replay.generator_options.prior == "standard":
                assert y[mine].tolist() == q.argmax(1).tolist()
            loss = loss / t + (1 - 1 / t) * self.replayed(run, q, z[mine], y[mine])
        self.wanted.append(loss.item())

    def replayed(self, run: Run, q: Tensor, z: Tensor, y: Tensor) -> Tensor:
        if run.logits != "own":
            if self.replay.labels == "hard":
                return -z.log_softmax(1)[range(len(z)), y].mean()
            p = (q / self.replay.options["temperature"]).softmax(1)
            return -(p * (z / self.replay.options["temperature"]).log_softmax(1)[:, : q.shape[1]]).sum(1).mean()
        heads = []
        for group in map(list, run.scenario.classes[: run.experience.index]):
            if self.replay.labels == "hard":
                label = q[:, group].argmax(1)
                heads.append(-z[:, group].log_softmax(1)[range(len(z)), label].mean())
            else:
                p = (q[:, group] / self.replay.options["temperature"]).softmax(1)
                heads.append(-(p * (z[:, group] / self.replay.options["temperature"]).log_softmax(1)).sum(1).mean())
        return sum(heads) / len(heads)  # type: ignore[return-value]

    @hookimpl
    def after_step(self, run: Run) -> None:
        self.found.append(float(run.losses["base"]))

    @hookimpl
    def after_experience(self, run: Run) -> None:
        self.old = snapshot(run.model)


# ------------------------------------------------------------------------------------ shares and labels


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize(
    ("setting", "logits", "model"),
    [
        ("class", "seen", "mlp-100"),
        ("class", "all", "mlp-100"),
        ("task", "own", "mlp-100"),
        ("task", "own", "cnn-small"),
        ("task", "seen", "mlp-100"),
        ("domain", None, "mlp-100"),
    ],
)
def test_every_step_has_its_loss_by_hand(setting: str, logits: str | None, model: str, labels: Any, tiny) -> None:
    """The share of replay at t is 1 - 1/t, in smaller last batches too; as many images come back whatever t is."""
    replay = GenerativeReplay(labels=labels, temperature=3.0, **SMALL)
    watch = Watch(replay=replay)
    learn(tiny(setting=setting, shape=(1, 8, 8)), replay, watch, model=model, logits=logits)
    assert len(watch.found) == 24
    assert watch.found == pytest.approx(watch.wanted, rel=1e-4)
    assert [t for t, _ in watch.shares] == [1] * 8 + [2] * 8 + [3] * 8
    for t, share in watch.shares:
        assert share == pytest.approx(1 - 1 / t, abs=1e-6)
    assert watch.added == [0] * 8 + [7, 7, 7, 3, 7, 7, 7, 3] * 2  # 24 images in batches of 7


def test_the_old_solver_chooses_among_old_classes_even_if_unseen_ones_score_higher(tiny) -> None:
    """Guards against an argmax over all outputs, where all of them are there from the start."""

    class Lifts(Plugin):
        name = "lifts"

        @hookimpl
        def after_experience(self, run: Run) -> None:
            """Called before the solver is copied."""
            seen = 2 * (run.experience.index + 1)
            with torch.no_grad():
                for k, block in enumerate(run.model.head):
                    block.bias += 50.0 * (2 * k >= seen)

    for labels in ("hard", "soft"):
        replay = GenerativeReplay(labels=labels, **SMALL)
        watch = Watch(replay=replay)
        learn(tiny(shape=(1, 8, 8)), Lifts(), replay, watch, logits="all", lr=1e-30)
        assert {label for row in watch.labels[:8] for label in row} <= {0, 1}
        assert {label for row in watch.labels[8:] for label in row} <= {0, 1, 2, 3}
        assert len(watch.labels) == 16


def test_a_replayed_row_belongs_to_the_task_of_its_label(tiny) -> None:
    tasks: set[tuple[int, int]] = set()

    class Look(Plugin):
        name = "look"

        @hookimpl
        def penalty(self, run: Run, batch: Batch, outputs: Any) -> None:
            mine = run.rows_from(replay, batch)
            tasks.update(zip(batch.y[mine].tolist(), batch.task[mine].tolist(), strict=True))
            assert (batch.index[mine] == -1).all()

    for prior in ("standard", "class"):
        replay = GenerativeReplay(prior=prior, **SMALL)
        learn(tiny(setting="task", shape=(1, 8, 8)), replay, Look())
    assert tasks == {(0, 0), (1, 0), (2, 1), (3, 1)}


@pytest.mark.parametrize("setting", ["class", "task", "domain"])
def test_with_a_class_prior_old_classes_are_drawn_alike_and_the_drawn_one_is_the_label(setting: str, tiny) -> None:
    """In every setting; where tasks are told, a known label has its own head alone."""
    replay = GenerativeReplay(prior="class", **SMALL)
    drawn: list[Tensor] = []
    labels: list[Tensor] = []
    losses: list[tuple[float, float]] = []

    class Look(Plugin):
        name = "look"

        @hookimpl
        def before_experience(self, run: Run) -> None:
            original = type(replay.generator.model).sample

            def sample(n: int, generator: torch.Generator, y: Tensor) -> Tensor:
                drawn.append(y)
                return original(replay.generator.model, n, generator, y)

            replay.generator.model.sample = sample

        @hookimpl
        def penalty(self, run: Run, batch: Batch, outputs: Any) -> None:
            if run.experience.index == 2:
                mine = run.rows_from(replay, batch)
                labels.append(batch.y[mine])
                z = outputs.logits.detach()
                width = 2 if setting == "task" else z.shape[1]
                per_row = [
                    float(functional.cross_entropy(row[y - y % width : y - y % width + width], y % width))
                    for row, y in zip(z, batch.y, strict=True)
                ]
                weights = batch.weight / batch.weight.sum()
                losses.append((run.loss(batch, outputs).item(), sum((weights * torch.tensor(per_row)).tolist())))

        @hookimpl
        def after_experience(self, run: Run) -> None:
            del replay.generator.model.sample
            if run.experience.index < 2:
                drawn.clear()

    learn(tiny(setting=setting, shape=(1, 8, 8)), replay, Look(), epochs=12)
    steps = len(labels)
    assert steps == 48
    assert all(torch.equal(a, b) for a, b in zip(drawn[:steps], labels, strict=True))
    counts = torch.cat(labels).bincount(minlength=4)
    among = 2 if setting == "domain" else 4
    expected = 288 / among
    assert (counts[:among] - expected).abs().max() < 4 * expected**0.5
    for found, wanted in losses:
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_perfect_generator_makes_it_replay_of_stored_images_with_soft_labels(tiny) -> None:
    """A generator that gives stored images back, and a loop with a memory, written out: the same weights."""
    memory: list[Tensor] = []

    class Perfect(GenerativeModel):
        lr, betas = 1.0, (0.0, 0.0)

        def __init__(self) -> None:
            super().__init__((1, 8, 8), 1)
            self.nothing = nn.Parameter(torch.zeros(()))

        def sample(self, n: int, generator: torch.Generator, y: Tensor | None = None) -> Tensor:
            stored = torch.cat(memory[:-1] or memory)
            return stored[torch.randint(len(stored), (n,), generator=generator)] / 255

        def step(self, *given: Any) -> dict[str, Tensor]:
            return {}

    class PerfectReplay(GenerativeReplay):
        name = "generative-replay"

        @hookimpl
        def before_run(self, run: Run) -> None:
            self.generator = Rehearsal(Perfect, 255.0)

        @hookimpl
        def before_experience(self, run: Run, experience: Any) -> None:
            memory.append(experience.train.x)
            self.begun = run.total_steps
            run.rng(self.name).manual_seed(77 + experience.index)

    for labels in ("soft", "hard"):
        memory.clear()
        keep = testing.Recorder()
        learn(tiny(shape=(1, 8, 8)), PerfectReplay(labels=labels, **SMALL), keep, logits="all", clip=0.0)
        net = keep.model
        net.load_state_dict(keep.before[0])
        for t in (1, 2, 3):
            rng, old = torch.Generator().manual_seed(77 + t - 1), snapshot(net)
            for fresh in (batch.fresh() for batch in keep.batches(t - 1)):
                x, y = fresh.x, fresh.y
                loss = functional.cross_entropy(net(x / 255).logits, y)
                if t > 1:
                    stored = torch.cat(memory[: t - 1])
                    back = stored[torch.randint(len(stored), (len(x),), generator=rng)] / 255
                    q, z = old(back).logits[:, : 2 * t - 2], net(back).logits
                    if labels == "soft":
                        kd = -((q / 2).softmax(1) * (z / 2).log_softmax(1)[:, : 2 * t - 2]).sum(1).mean()
                    else:
                        kd = functional.cross_entropy(z, q.argmax(1))
                    loss = loss / t + (t - 1) / t * kd
                net.zero_grad()
                loss.backward()
                with torch.no_grad():
                    for p in net.parameters():
                        p -= 0.05 * p.grad
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, keep.evaluated[-1][name], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(keep.before[0]["head.0.weight"], keep.evaluated[-1]["head.0.weight"], atol=1e-2)


# ------------------------------------------------------------------------------------------- the copies


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({}, "mlp-100"),
        ({"labels": "soft", "prior": "class"}, "cnn-small"),
        ({"generator": "wgan", "net": "conv", "critic_steps": 2}, "cnn-small"),
    ],
)
def test_copies_are_those_of_the_end_of_the_experience_and_never_change(options: Any, model: str, tiny) -> None:
    """Batch norms' statistics included: both answer in eval mode, and no gradient reaches them."""
    replay = GenerativeReplay(**SMALL | options | ({"hidden": [4, 6]} if "net" in options else {}))
    ends: dict[str, dict[str, Tensor]] = {}
    seen: list[bool] = []
    dreamt: list[bool] = []
    modes: list[bool] = []

    class Look(Plugin):
        name = "look"
        observer = True

        @hookimpl
        def before_run(self, run: Run) -> None:
            run.listeners.append(lambda record: self.tick(run) if record["kind"] == "tick" else None)

        def tick(self, run: Run) -> None:
            """The previous generator is the one that dreamt for the solver, through all of the training."""
            if run.experience.index:
                dreamt.append(same(ends["generator"], state_copy(replay.generator.previous)))
                dreamt.append(not same(ends["generator"], state_copy(replay.generator.model)))

        @hookimpl
        def before_experience(self, run: Run) -> None:
            if replay.solver is not None:
                for module in (*replay.solver.modules(), replay.generator.model.decoder):
                    module.register_forward_pre_hook(lambda module, args: modes.append(module.training))

        @hookimpl
        def after_step(self, run: Run) -> None:
            if replay.solver is not None:
                seen.append(same(ends["solver"], state_copy(replay.solver)))
                seen.append(same(ends["generator"], state_copy(replay.generator.model)))
                parameters = [
                    *replay.solver.parameters(),
                    *replay.generator.parameters(),
                ]
                seen.append(all(p.grad is None for p in parameters))

        @hookimpl
        def after_experience(self, run: Run) -> None:
            for module in (*(replay.solver.modules() if replay.solver else ()), replay.generator.model.decoder):
                module._forward_pre_hooks.clear()

        @hookimpl
        def after_eval(self, run: Run) -> None:
            ends["solver"], ends["generator"] = state_copy(run.model), state_copy(replay.generator.model)
            assert same(ends["solver"], state_copy(replay.solver))

    learn(tiny(shape=(1, 8, 8)), Look(), replay, model=model)
    assert len(seen) == 48
    assert all(seen)
    assert len(dreamt) == 32
    assert all(dreamt)
    assert modes
    assert not any(modes)


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (1, True)])
def test_replayed_images_are_normalised_and_augmented_as_new_ones_are(pad: int, flip: bool, tiny_arrays) -> None:
    """Without augmentation x is (sample - mean) / std; with it, a flip or a crop of that."""
    transform = Transform(mean=(0.3,), std=(0.2,), pad=pad, flip=flip)
    scenario = split_classes("tiny", replace(tiny_arrays(shape=(1, 8, 8)), transform=transform), experiences=2)
    replay = GenerativeReplay(**SMALL)
    drawn: list[Tensor] = []
    given: list[Tensor] = []
    asked: list[Tensor] = []

    class Look(Plugin):
        name = "look"

        @hookimpl
        def before_experience(self, run: Run) -> None:
            if replay.solver is not None:
                original = type(replay.generator.model).sample

                def sample(*args: Any) -> Tensor:
                    drawn.append(original(replay.generator.model, *args))
                    return drawn[-1]

                replay.generator.model.sample = sample
                replay.solver.register_forward_pre_hook(lambda module, args: asked.append(args[0]))

        @hookimpl
        def after_step(self, run: Run, batch: Batch) -> None:
            if replay.solver is not None:
                given.append(batch.x[run.rows_from(replay, batch)])

    learn(scenario, replay, Look())
    plain = [(images - 0.3) / 0.2 for images in drawn[: len(given)]]
    alike = [torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, given, strict=True)]
    assert len(given) > 8
    assert all(alike) if not flip else not any(alike)
    assert all(torch.equal(a, b) for a, b in zip(asked[: len(given)], given, strict=True))  # the same view is labelled


# ---------------------------------------------------------------------------------- the generator's training


class Recorder(Plugin):
    """Keeps what the generator learns from, and its weights before and after."""

    name = "recorder"
    observer = True

    def __init__(self, replay: GenerativeReplay) -> None:
        self.replay = replay
        self.steps: list[list[tuple[Mixture, Tensor | None]]] = []  # of each experience
        self.images: list[ImageData] = []
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.updates: list[int] = []

    @hookimpl
    def after_experience(self, run: Run, experience: Any) -> None:
        """Called before the generator is trained."""
        rehearsal, dreamt = self.replay.generator, []
        self.steps.append([])
        self.images.append(experience.train)
        self.before.append(state_copy(rehearsal.model))
        step, sample = type(rehearsal.model).step, type(rehearsal.previous).sample

        def sampled(*args: Any) -> Tensor:
            dreamt.append(sample(rehearsal.previous, *args))
            return dreamt[-1]

        def stepped(optimizer: Any, draw: Callable[[], Mixture], rng: torch.Generator) -> Any:
            def drawn() -> Mixture:
                mixed = draw()
                self.steps[-1].append((mixed, dreamt.pop() if dreamt else None))
                return mixed

            return step(rehearsal.model, optimizer, drawn, rng)

        rehearsal.previous.sample, rehearsal.model.step = sampled, stepped

    @hookimpl
    def after_eval(self, run: Run) -> None:
        rehearsal = self.replay.generator
        del rehearsal.previous.sample, rehearsal.model.step
        self.after.append(state_copy(rehearsal.model))
        parameter = next(iter(rehearsal.model.decoder.parameters()))
        self.updates.append(int(rehearsal.optimizer.state[parameter]["step"]))


def test_the_generator_learns_new_images_and_its_former_self_s_in_their_shares(tiny_arrays) -> None:
    """Raw images from 0 to 1, whatever the transform does to those of the solver; each once before any comes again."""
    transform = Transform(mean=(0.3,), std=(0.2,), pad=1, flip=True)
    scenario = split_classes("tiny", replace(tiny_arrays(shape=(1, 8, 8)), transform=transform), experiences=3)
    replay = GenerativeReplay(prior="class", **SMALL)
    recorder = Recorder(replay=replay)
    learn(scenario, recorder, replay)
    for t, (steps, images) in enumerate(zip(recorder.steps, recorder.images, strict=True), start=1):
        assert len(steps) == 8  # as many as the solver took, in batches of 7, of which the last is smaller
        stored = [image.numpy().tobytes() for image in images.x]
        met: list[int] = []
        for mixed, dreamt in steps:
            n = 7
            assert mixed.weight[:n].sum().item() == pytest.approx(1 / t, abs=1e-6)
            assert mixed.weight[n:].sum().item() == pytest.approx(1 - 1 / t, abs=1e-6)
            raw = (mixed.x[:n] * 255).round().to(torch.uint8)
            assert torch.equal(raw.float() / 255, mixed.x[:n])
            places = [stored.index(image.numpy().tobytes()) for image in raw]
            assert torch.equal(images.y[places], mixed.y[:n])
            met += places
            assert len(mixed.x) == (n if t == 1 else 2 * n)
            if t > 1:
                assert torch.equal(mixed.x[n:], dreamt)
                assert set(mixed.y[n:].tolist()) <= set(range(2 * t - 2))
        assert len(set(met[:21])) == 21
        assert len(set(met[21:42])) == 21
    for before, after in zip(recorder.before, recorder.after, strict=True):
        assert not same(before, after)
    assert same(recorder.before[1], recorder.after[0])


@pytest.mark.parametrize(
    ("options", "train", "steps", "updates"),
    [
        ({}, {}, 8, [8, 8, 8]),
        ({}, {"keep_optimizer": True}, 8, [8, 16, 24]),
        ({"iterations": 3}, {"keep_optimizer": True}, 3, [3, 6, 9]),
        ({"iterations": 3, "fresh": True}, {"keep_optimizer": True}, 3, [3, 3, 3]),
        ({}, {"epochs": None, "iterations": 5}, 5, [5, 5, 5]),
        ({"generator": "wgan", "critic_steps": 2}, {}, 16, [8, 8, 8]),
    ],
)
def test_it_takes_as_many_steps_as_asked_for(options: Any, train: Any, steps: int, updates: list[int], tiny) -> None:
    replay = GenerativeReplay(**SMALL, **options)
    recorder = Recorder(replay=replay)
    learn(tiny(), recorder, replay, **train)
    assert [len(drawn) for drawn in recorder.steps] == [steps] * 3
    assert recorder.updates == updates


def test_the_default_is_no_less_than_the_least_number_of_iterations(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generative_replay, "LEAST_ITERATIONS", 7)
    for iterations, steps in ((5, 7), (9, 9)):
        replay = GenerativeReplay(**SMALL)
        recorder = Recorder(replay=replay)
        learn(tiny(), recorder, replay, iterations=iterations)
        assert recorder.updates == [steps] * 3


def test_a_fresh_generator_begins_anew_and_another_goes_on(tiny) -> None:
    """With a learning rate of nearly nothing what it ends with is what it began with."""
    for fresh in (False, True):
        replay = GenerativeReplay(fresh=fresh, lr=1e-30, **SMALL)
        recorder = Recorder(replay=replay)
        learn(tiny(), recorder, replay)
        assert same(recorder.after[0], recorder.before[0]) != fresh
        assert same(recorder.after[1], recorder.after[0]) != fresh
        assert same(recorder.after[2], recorder.after[1]) != fresh


def test_what_it_tells_and_shows(tiny, tmp_path: Path) -> None:
    for k, (options, names) in enumerate(
        (
            ({}, {"reconstruction", "divergence"}),
            ({"prior": "class"}, {"reconstruction", "divergence", "agreement"}),
            ({"generator": "wgan"}, {"distance", "penalty"}),
        )
    ):
        recorder = testing.Recorder()
        learn(tiny(), GenerativeReplay(**SMALL, **options), recorder, output=str(tmp_path / str(k)))
        logged = recorder.logged()
        assert set(logged) == {f"generative-replay/{name}" for name in names}
        assert {len(values) for values in logged.values()} == {3}
        pictures = sorted(path.name for path in (tmp_path / str(k) / "pictures").iterdir())
        assert pictures == [f"generative-replay-{i}.png" for i in (1, 2, 3)]


def test_images_that_are_classes_are_seen_as_those_by_the_solver(tiny) -> None:
    """With a class prior that was learnt, the drawn label and the old solver's agree."""
    recorder = testing.Recorder()
    replay = GenerativeReplay(prior="class", hidden=[32], z=4, iterations=400, lr=1e-2)
    learn(tiny(2), replay, recorder, optimizer="adam", lr=1e-2, epochs=15)
    assert min(recorder.logged()["generative-replay/agreement"]) > 0.95
    recorder = testing.Recorder()
    learn(tiny(2), GenerativeReplay(prior="class", iterations=1, **SMALL), recorder)
    assert max(recorder.logged()["generative-replay/agreement"]) < 0.8  # of a generator that learns nothing


def test_flat_inputs_are_learnt_and_not_shown(tiny_arrays, tmp_path: Path) -> None:
    arrays = tiny_arrays()
    flat = replace(
        arrays,
        x_train=arrays.x_train.flatten(1).double() / 255,
        x_test=arrays.x_test.flatten(1).double() / 255,
        transform=Transform(scale=1.0),
    )
    replay = GenerativeReplay(**SMALL)
    watch = Watch(replay=replay)
    learn(split_classes("flat", flat, experiences=3), replay, watch)
    assert watch.found == pytest.approx(watch.wanted, rel=1e-4)
    again = GenerativeReplay(**SMALL)
    learn(split_classes("flat", flat, experiences=3), again, output=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "pictures").exists()


# ----------------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize(
    ("options", "train"),
    [
        ({"prior": "class", "labels": "soft"}, {"keep_optimizer": True}),
        ({"generator": "wgan", "net": "conv", "hidden": [4, 6], "critic_steps": 2}, {}),
        ({"fresh": True}, {"optimizer": "adam"}),
    ],
)
def test_the_generator_s_training_goes_on_to_the_same_bits(options: Any, train: Any, tiny, tmp_path: Path) -> None:
    """After its first iteration, in the middle, and after the last one, when nothing but its end is left."""
    files = ("results.json", "model.safetensors", "predictions.safetensors", "pictures/generative-replay-2.png")

    def built() -> GenerativeReplay:
        return GenerativeReplay(**SMALL | options)

    def run(folder: Path) -> None:
        learn(tiny(shape=(1, 8, 8)), built(), output=str(folder), **train)

    def ticked(tick: int, engine: Any) -> bool:
        done = engine.run._tick_done.get("after_experience/generative-replay/generative-replay")
        return done == tick and engine.run.experience.index == 1

    run(tmp_path / "whole")
    logged = [line for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines() if '"log"' in line]
    for tick in (1, 4, 8):
        folder = tmp_path / str(tick)
        with testing.stop_at(partial(ticked, tick)), pytest.raises(Interrupted):
            run(folder)
        clframe.resume(folder, scenario=tiny(shape=(1, 8, 8)), plugins=[built()])
        for file in files:
            assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
        assert [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"log"' in line] == logged


# --------------------------------------------------------------------------------------------- refusals


def refusal(scenario: Any, *plugins: Plugin, **train: Any) -> str:
    recorder = testing.Recorder()
    with pytest.raises(UsageError) as caught:
        learn(scenario, *plugins, recorder, **train)
    assert recorder.steps == []
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden": []}, ("`generative-replay.hidden` is empty", "width")),
        (
            {"generator": "wgan", "prior": "class"},
            ("`generative-replay.prior=class`", "`generative-replay.generator=vae`"),
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(tiny, options: Any, words: tuple[str, ...]) -> None:
    problem = refusal(tiny(), GenerativeReplay(**options))
    assert all(word in problem for word in words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, ("`generative-replay.temperature` is 0.0", "greater than 0.")),
        ({"iterations": 0}, ("`generative-replay.iterations` is 0", "equal to 1.")),
    ],
)
def test_an_option_out_of_range_is_refused(options: Any, words: tuple[str, ...]) -> None:
    with testing.refused(*words):
        GenerativeReplay(**options)


def test_images_that_do_not_suit_convolutions_are_refused(tiny, tiny_arrays) -> None:
    problem = refusal(tiny(shape=(1, 6, 8)), GenerativeReplay(net="conv"))
    assert all(word in problem for word in ("`generative-replay.net=conv`", "divisible by 4", "6x8"))
    arrays = tiny_arrays()
    flat = replace(arrays, x_train=arrays.x_train.flatten(1), x_test=arrays.x_test.flatten(1))
    problem = refusal(split_classes("flat", flat, experiences=3), GenerativeReplay(net="conv", hidden=[8]))
    assert all(word in problem for word in ("`generative-replay.net=conv`", "[channels, height, width]", "[16]"))


def test_logits_without_old_classes_are_refused(tiny) -> None:
    for setting in ("class", "task"):
        problem = refusal(tiny(setting=setting), GenerativeReplay(), logits="current")
        assert all(word in problem for word in ("`generative-replay`", "`train.logits=current`", "`seen` or `all`"))
    learn(tiny(setting="domain"), GenerativeReplay(**SMALL), logits="current", epochs=1)


def test_two_losses_are_refused(tiny) -> None:
    def balanced() -> Plugin:
        return registry.build_plugin("lwf", {"balance": True})

    for setting, plugins, owners in (
        ("class", (GenerativeReplay(labels="soft"), balanced()), "`generative-replay` and `lwf`"),
        ("task", (balanced(), GenerativeReplay()), "`lwf` and `generative-replay`"),
    ):
        problem = refusal(tiny(setting=setting), *plugins)
        assert "`base_loss`" in problem
        assert owners in problem
    learn(tiny(), GenerativeReplay(**SMALL), balanced(), epochs=1)
    learn(tiny(setting="task"), GenerativeReplay(prior="class", **SMALL), balanced(), epochs=1)


def test_values_that_no_sigmoid_gives_are_refused(tiny_arrays) -> None:
    arrays = tiny_arrays()
    x = arrays.x_train.float() / 255
    x[0] = 0.0
    signed = replace(arrays, x_train=x * 2 - 1, x_test=arrays.x_test.float() / 255, transform=Transform(scale=1.0))
    for given, low, high in ((replace(arrays, transform=Transform(scale=1.0)), "0", "255"), (signed, "-1", "1")):
        problem = refusal(split_classes("tiny", given, experiences=3), GenerativeReplay(**SMALL))
        assert all(word in problem for word in ("`generative-replay`", "0 to 1", f"from {low} to {high}", "the 1 of"))


def test_a_generator_that_diverges_stops_the_run(tiny) -> None:
    with pytest.raises(RunError, match=r"The generator of `generative-replay` diverged, its losses are .*nan"):
        learn(tiny(), GenerativeReplay(lr=1e30, **SMALL))
