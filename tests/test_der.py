"""Dark experience replay: the logits are those of the day, and both terms are what the paper says."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional

from clframe import Plugin, hookimpl, testing
from clframe.errors import UsageError
from clframe.plugins.der import DER

learn = partial(testing.learn, model="mlp-100", optimizer="sgd", lr=0.05)


class Watch(Plugin):
    """Keeps what the network answered for each image at each step, and compares the terms with plain loops."""

    name = "watch"
    observer = True

    def __init__(self, der: DER) -> None:
        self.der = der
        self.answers: dict[int, list[torch.Tensor]] = {}
        self.compared = 0

    @hookimpl
    def penalty(self, run, batch, outputs):
        z = outputs.logits.detach()
        self.by_hand = {"der/logits": [], "der/labels": []}
        for k in range(len(batch)):
            index = int(batch.index[k])
            if batch.origin[k] == 0:
                self.answers.setdefault(index, []).append(z[k])
                continue
            assert batch.weight[k] == 0
            if batch.targets["der/term"][k] == 1:
                # the kept answer is one that this image got at some step, over the classes of that time
                kept = batch.targets["der/logits"][k]
                kept = kept[~kept.isnan()]
                assert any(len(z_then) == len(kept) and torch.equal(z_then, kept) for z_then in self.answers[index])
                self.by_hand["der/logits"].append((z[k, : len(kept)] - kept).square().mean())
            else:
                self.by_hand["der/labels"].append(functional.cross_entropy(z[k], batch.y[k]))

    @hookimpl
    def after_step(self, run, batch):
        weights = {"der/logits": self.der.alpha, "der/labels": self.der.beta}
        for term, values in self.by_hand.items():
            if values:
                expected = weights[term] * float(torch.stack(values).mean())
                assert run.losses[term].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)
                self.compared += 1


@pytest.mark.parametrize("logits", ["seen", "all"])
def test_both_terms_are_those_of_the_paper(tiny, logits: str) -> None:
    der = DER(size=20, alpha=0.3, beta=0.7, batch_size=5)
    watch = Watch(der=der)
    results = learn(tiny(), der, watch, logits=logits)
    assert results.data["forms"] == {"der": "der++"}
    assert watch.compared == 2 * 17  # of 18 steps the first has no memory yet


def test_without_the_labels_it_is_der(tiny) -> None:
    der = DER(size=20, alpha=0.3, beta=0)
    watch = Watch(der=der)
    results = learn(tiny(), der, watch)
    assert results.data["forms"] == {"der": "der"}
    assert watch.compared == 17


def test_without_both_it_is_fine_tuning(tiny) -> None:
    plain, der = learn(tiny()), learn(tiny(), DER(size=20, alpha=0, beta=0))
    assert der.accuracy == plain.accuracy


def test_images_come_back_with_the_classes_of_their_time(tiny) -> None:
    der = DER(size=12, batch_size=4)
    learn(tiny(), der)
    assert der.kept is not None
    known = (~der.kept.targets["der/logits"].isnan()).sum(1)
    assert (known >= der.kept.y + 1).all()
    assert set(known.tolist()) > {6}
    assert len(der.kept) == 12
    assert der.seen == 3 * 2 * 24


def test_a_memory_without_room_for_each_class_is_refused(tiny) -> None:
    with pytest.raises(UsageError, match=r"`der\.size` is 5, .* 6 classes"):
        learn(tiny(), DER(size=5))


def test_it_saves_on_digits_what_fine_tuning_forgets() -> None:
    train = {"iterations": 300, "batch_size": 32, "lr": 1e-3, "optimizer": "adam", "keep_optimizer": True}
    results = learn("split-digits", DER(size=200), **train)
    assert results.measures["class"]["average_accuracy"] > 0.85
