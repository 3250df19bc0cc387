"""iCaRL: the loss of algorithm 3, exemplars by herding, the nearest mean of exemplars."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import clframe
from clframe import ImageData, Plugin, hookimpl, testing
from clframe.evaluate import NearestMean
from clframe.model import evaluating
from clframe.plugins.icarl import ICaRL
from clframe.testing import learn, refused
from clframe.toolkit.distill import incremental_bce
from clframe.toolkit.memory import herding


class Watch(Plugin):
    """Compares the loss of each step, and the exemplars and answers after each experience, with plain code."""

    name = "watch"
    observer = True

    def __init__(self, icarl: ICaRL) -> None:
        self.icarl = icarl
        self.steps = 0
        self.sizes: list[dict[int, int]] = []
        self.orders: list[dict[int, list[int]]] = []
        self.origins: list[list[int]] = []

    @hookimpl
    def penalty(self, run, batch, outputs):
        """Algorithm 3, output by output."""
        old = 2 * run.experience.index
        with torch.no_grad():
            teacher = (self.icarl.teacher(batch.x).logits / self.icarl.temperature).sigmoid() if old else None
        total = 0.0
        for k in range(len(batch)):
            for c in range(n := outputs.logits.shape[1]):
                g = float(batch.y[k] == c) if c >= old else float(teacher[k, c])
                p = float(outputs.logits[k, c].detach().sigmoid())
                total -= g * torch.tensor(p).log().item() + (1 - g) * torch.tensor(1 - p).log().item()
        assert n == (6 if self.icarl.outputs == "all" else old + 2)
        self.expected = total / (n * len(batch))
        self.origins.append(batch.origin.tolist())

    @hookimpl
    def after_step(self, run, batch):
        assert run.losses["base"].item() == pytest.approx(self.expected, rel=1e-4)
        self.steps += 1

    @hookimpl
    def after_experience(self, run, experience):
        kept = self.icarl.exemplars
        index = {int(i): k for k, i in enumerate(experience.train.index)}
        order = {int(c): kept.index[kept.y == c].tolist() for c in kept.y.unique()}
        self.sizes.append({c: len(positions) for c, positions in order.items()})
        self.orders.append(order)
        for c in experience.classes:  # by herding in normalised features of the network as it is now
            rows = experience.train.rows((experience.train.y == c).nonzero().flatten())
            phi = plain_features(run, rows.x)
            assert [index[i] for i in order[c]] == [index[int(i)] for i in rows.index[herding(phi, len(order[c]))]]

    @hookimpl
    def after_eval(self, run, experience):
        """The answers are those of algorithm 1, image by image."""
        if self.icarl.read_out == "output":
            return
        kept = self.icarl.exemplars
        if self.icarl.read_out == "ncm":
            kept = ImageData.concat([e.train for e in (*run.earlier, experience)])
        means = []
        for c in range(2 * experience.index + 2):
            views = [plain_features(run, kept.x[kept.y == c]).mean(0)]
            if self.icarl.flip:
                views.append(plain_features(run, kept.x[kept.y == c].flip(-1)).mean(0))
            means.append(functional.normalize(torch.stack(views).mean(0), dim=0))
        phi = plain_features(run, experience.train.x)
        expected = [min(range(len(means)), key=lambda c: float((f - means[c]).norm())) for f in phi]
        with evaluating(run.model), torch.no_grad():
            answers = NearestMean(run.model, self.icarl.means)(run.scenario.transform.normalize(experience.train.x))
        assert answers.shape == (len(phi), 6)
        assert answers.argmax(1).tolist() == expected


def plain_features(run: Any, x: Tensor) -> Tensor:
    with evaluating(run.model), torch.no_grad():
        return functional.normalize(run.model.features(run.scenario.transform.normalize(x)), dim=1)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 20},
        {"size": 20, "read_out": "output", "outputs": "seen", "temperature": 2.0},
        {"size": 20, "read_out": "ncm", "flip": True},
        {"per_class": 3, "batch_size": 5, "flip": True},
    ],
    ids=str,
)
def test_it_is_the_papers_algorithm(tiny, options: dict[str, Any]) -> None:
    icarl = ICaRL(**options)
    watch = Watch(icarl=icarl)
    results = learn(tiny(shape=(1, 8, 8)), icarl, watch)
    assert results.data["forms"] == {"icarl": icarl.read_out}
    if icarl.per_class:
        assert watch.sizes == [dict.fromkeys(range(2 * n), 3) for n in (1, 2, 3)]
        assert watch.steps == 18  # the training images are as many as without exemplars
        assert {tuple(o) for o in watch.origins} == {(0,) * 8, (0,) * 8 + (1,) * 5}
    else:
        # ceil(20 / 2) = 10, ceil(20 / 4) = 5, ceil(20 / 6) = 4: at most K and one for each class
        assert watch.sizes == [dict.fromkeys(range(2 * n), m) for n, m in ((1, 10), (2, 5), (3, 4))]
        # 24 images, 24 and 20 exemplars twice
        assert [sum(map(len, watch.origins[a:b])) for a, b in ((0, 6), (6, 18), (18, 30))] == [48, 88, 88]
    for earlier, later in zip(watch.orders[:-1], watch.orders[1:], strict=True):
        for c, order in earlier.items():
            assert later[c] == order[: len(later[c])]  # reduction keeps the order


def test_the_gradient_is_the_distance_to_the_target() -> None:
    """(sigma(z) - g) / (B C); exemplars of old classes get soft targets only."""
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    q, y = torch.randn(4, 2, dtype=torch.float64), torch.tensor([2, 5, 0, 1])
    incremental_bce(z, y, q).mean().backward()
    targets = functional.one_hot(y, 6).double()
    targets[:, :2] = q.sigmoid()
    torch.testing.assert_close(z.grad, (z.detach().sigmoid() - targets) / 24, rtol=1e-10, atol=1e-12)


def test_with_all_images_as_exemplars_the_nearest_mean_is_that_of_all(tiny) -> None:
    scenario = tiny(shape=(1, 8, 8))
    few, every = (learn(scenario, ICaRL(per_class=12, read_out=r)) for r in ("nme", "ncm"))
    assert few.accuracy == every.accuracy


def test_means_with_mirrored_images_do_not_tell_left_from_right(tiny) -> None:
    scenario = tiny(shape=(1, 8, 8))

    class Mirrored(Plugin):
        name = "mirrored"
        observer = True

        @hookimpl
        def after_eval(self, run, experience):
            before = icarl.class_means(run)
            kept = icarl.exemplars
            icarl.exemplars = ImageData(kept.x.flip(-1), kept.y)
            after = icarl.class_means(run)
            icarl.exemplars = kept
            same.append(torch.allclose(before, after, atol=1e-6))

    for flip, expected in ((True, True), (False, False)):
        icarl, same = ICaRL(size=12, flip=flip), []
        learn(scenario, icarl, Mirrored())
        assert same == [expected] * 3


def test_mirrors_are_used_where_training_does(tiny_arrays) -> None:
    arrays = replace(tiny_arrays(shape=(1, 8, 8)), transform=clframe.Transform(flip=True))
    scenario = clframe.split_classes("tiny", arrays, experiences=3)
    default, told, off = (learn(scenario, icarl := ICaRL(size=12, flip=f)) and icarl.means for f in (None, True, False))
    assert torch.equal(default, told)
    assert not torch.equal(default, off)


def test_a_finished_run_answers_without_its_images(tiny, tmp_path: Path) -> None:
    scenario = tiny(shape=(1, 8, 8))
    results = learn(scenario, ICaRL(size=12), output=str(tmp_path / "run"))
    loaded = clframe.load(tmp_path / "run", plugins=[ICaRL(size=12)])
    for on, experience in enumerate(scenario):
        correct = (loaded(experience.test.x).argmax(1) == experience.test.y).double().mean()
        assert float(correct) == pytest.approx(results.accuracy["class"][2][on])
    written = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert not any(image.numpy().tobytes() in written for e in scenario for image in e.train.x)
    assert results.data["calibration"] == {}  # distances are not logits


def test_within_an_experience_new_classes_have_the_mean_of_their_images(tiny) -> None:
    recorder = testing.Recorder()
    learn(tiny(shape=(1, 8, 8)), ICaRL(size=12), recorder, eval_every="epoch", epochs=6)
    rows = [record for record in recorder.records if record["kind"] == "within"]
    last = [r["row"] for r in rows if r["reading"] == "class" and r["experience"] == 2]
    assert last[-1][2] > 0.5  # the classes that have no exemplars yet
    tasks = [r["row"] for r in rows if r["reading"] == "task" and r["experience"] == 0]
    assert tasks[0][1:] == [None, None]  # nor an answer yet


def test_it_is_refused_where_it_cannot_be_right(tiny) -> None:
    class Other(Plugin):
        name = "other"

        @hookimpl
        def predictor(self, run):
            return None

    with refused("`predictor`", "`icarl` and `other`"):
        learn(tiny(shape=(1, 8, 8)), ICaRL(), Other())
    learn(tiny(shape=(1, 8, 8)), ICaRL(read_out="output"), Other())
    with refused("`icarl.size` is 5", "6 classes"):
        learn(tiny(shape=(1, 8, 8)), ICaRL(size=5))
    with refused("`icarl` (form `nme`)", "`train.logits=all`"):
        learn(tiny(shape=(1, 8, 8)), ICaRL(), logits="seen")
    with refused("`icarl`", "setting `task`"):
        learn(tiny(shape=(1, 8, 8), setting="task"), ICaRL())


def test_it_saves_on_digits_what_fine_tuning_forgets() -> None:
    train = {"iterations": 300, "batch_size": 32, "lr": 1e-3, "optimizer": "adam", "keep_optimizer": True}
    results = learn("split-digits", ICaRL(per_class=20), model="mlp-100", **train)
    assert results.measures["class"]["average_accuracy"] > 0.8
