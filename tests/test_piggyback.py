"""Piggyback: a mask for each task over a network that nothing changes; one bit for each weight, and in any order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clframe import IncrementalNet, Plugin, Scenario, hookimpl, split_classes, testing
from clframe.backbones import cnn_small, mlp
from clframe.errors import UsageError
from clframe.model import evaluating
from clframe.plugins.piggyback import Piggyback
from clframe.testing import SHAPE, Answers
from clframe.toolkit.norms import TaskNorm
from clframe.toolkit.weight_masks import WeightMask, find_modules, mask_weights

MOVERS: dict[str, dict[str, Any]] = {  # all that moves weights whose gradient is zero
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "decay": "all", "keep_optimizer": True},
    "sgd": {"optimizer": "sgd", "lr": 1.0, "momentum": 0.9, "weight_decay": 0.1, "decay": "all"},
}
Small = partial(testing.Small, 3, last_relu=True)


class Alike(Plugin):
    """Gives each task the batches and the head that its classes decide, whenever it comes."""

    name = "alike"
    observer = True

    @hookimpl
    def before_experience(self, run, experience):
        first = int(run.scenario.class_names[experience.classes[0]].split()[1])
        run.rng("loader").manual_seed(first)
        with torch.no_grad():
            for parameter in run.model.head[-1].parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(first))


learn = partial(testing.learn, model=Small(), epochs=3, **MOVERS["adam"])


def backbone_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is there of the network itself, by its own names."""
    own = {}
    for name, value in state.items():
        for added in ("parametrizations.", ".original", ".norms.0", "plain.norm."):
            name = name.replace(added, "plain." if added == "plain.norm." else "")
        if name.startswith("backbone.") and ".norms." not in name and ".weight.0." not in name:
            own[name] = value
    return own


# ---------------------------------------------------------------------------------- the masked network


@pytest.mark.parametrize("build", [mlp, cnn_small])
def test_masks_of_ones_and_masks_at_the_start_are_the_backbone_to_the_bit(build: Any):
    net = IncrementalNet(build(SHAPE), [2, 3]).eval()
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(x).logits
        for mask in mask_weights(net.backbone, lambda w: WeightMask(w, 0, 0.01, 0.005)).values():
            mask.begin(torch.empty(mask.shape))
        assert torch.equal(net(x).logits, expected)
        assert all(mask.finish() == 1 for mask in find_modules(net, WeightMask).values())
        assert torch.equal(net(x).logits, expected)


@pytest.mark.parametrize("norm", ["frozen", "task"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_task_begins_with_the_network_as_it_is(tiny, pretrained: bool, norm: Any):
    """In eval mode, to the bit: its masks are open and its norms are the network's."""
    features: list[tuple[Tensor, Tensor]] = []
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))

    class Comparing(Plugin):
        name = "comparing"
        observer = True

        @hookimpl
        def before_experience(self, run, experience):
            plain = Small().eval()
            if experience.index == 0:
                self.given = {f"backbone.{name}": value for name, value in plain.state_dict().items()}
            elif not pretrained and experience.index == 1:
                self.given = {n: v.clone() for n, v in backbone_state(run.model.state_dict()).items()}
            plain.load_state_dict({n.removeprefix("backbone."): v for n, v in self.given.items()})
            with evaluating(run.model), torch.no_grad():
                features.append((run.model(x).features, plain.features(x)))

    learn(tiny(shape=SHAPE, setting="task"), Piggyback(pretrained=pretrained, norm=norm), Comparing())
    assert len(features) == 3
    assert all(torch.equal(ours, plain) for ours, plain in features)


# --------------------------------------------------------------------------------- nothing is forgotten


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize(
    "options", [{}, {"norm": "task"}, {"ternary": True}, {"pretrained": True}, {"pretrained": True, "norm": "task"}]
)
def test_later_tasks_change_no_bit_of_the_backbone_and_of_earlier_answers(tiny, options: Any, mover: str):
    """Weights, biases and what norms hold, those of a norm that learns nothing, too."""
    witness = Answers()
    results = learn(tiny(shape=SHAPE, setting="task"), Piggyback(**options), witness, **MOVERS[mover])
    assert witness.same()
    assert results.measures["task"]["forgetting"] == 0
    first = backbone_state(witness.evaluated[0])
    assert len(first) == 12
    if options.get("pretrained"):
        given = {f"backbone.{name}": value for name, value in Small().state_dict().items()}
        assert all(torch.equal(value, given[name]) for name, value in first.items())
    for state in witness.evaluated[1:]:
        later = backbone_state(state)
        assert later.keys() == first.keys()
        assert all(torch.equal(value, first[name]) for name, value in later.items())
    masks = find_modules(witness.model.backbone, WeightMask)
    assert list(masks) == ["conv", "linear"]
    for mask in masks.values():
        assert len(mask.bits) == (3 if options.get("pretrained") else 2)
        mask.task = 2
        assert 0.01 < (mask.mask() != 1).float().mean() < 0.99  # something was learnt
    assert masks["linear"].bits.shape[1] == (2 if options.get("ternary") else 1)


def test_curves_tell_the_share_of_weights_that_a_task_uses(tiny):
    witness = Answers()
    learn(tiny(shape=SHAPE, setting="task"), Piggyback(), witness, epochs=2)
    told = [record for record in witness.records if record["kind"] == "log"]
    masks = find_modules(witness.model.backbone, WeightMask)
    for record in told:
        if record["experience"]:
            for name, mask in masks.items():
                mask.task = record["experience"]
                assert record["values"][f"piggyback/used/{name}"] == pytest.approx(mask.mask().mean().item())
    assert sum(len(record["values"]) for record in told if record["experience"]) == 4


# ----------------------------------------------------------------------------------------- any order


def stream(tiny_arrays: Any, order: Sequence[int], experiences: int = 3) -> Scenario:
    arrays = tiny_arrays(classes=len(order), shape=SHAPE)
    return split_classes("tiny", arrays, experiences=experiences, setting="task", order=order)


@pytest.mark.parametrize("options", [{}, {"norm": "task"}, {"pretrained": True, "norm": "task"}, {"ternary": True}])
def test_the_order_of_later_tasks_does_not_matter(tiny_arrays, options: Any):
    """With the same batches, each has the same bits, norms and answers, whether it comes second or third."""
    runs = []
    for order in ([0, 1, 2, 3, 4, 5], [0, 1, 4, 5, 2, 3]):
        witness = Answers()
        learn(stream(tiny_arrays, order), Piggyback(**options), Alike(), witness, keep_optimizer=False)
        runs.append(witness)
    one, other = (find_modules(w.model.backbone, WeightMask) for w in runs)
    for name, mask in one.items():
        assert torch.equal(mask.bits[-2:], other[name].bits[[-1, -2]])
        assert not torch.equal(mask.bits[-1], mask.bits[-2])
    for j, k in ((1, 2), (2, 1)):
        assert torch.equal(runs[0].answers[2][j], runs[1].answers[2][k])
    if "norm" in options:
        norms = [find_modules(w.model.backbone, TaskNorm)["norm"].norms for w in runs]
        torch.testing.assert_close(norms[0][-1].running_mean, norms[1][-2].running_mean)
        torch.testing.assert_close(norms[0][-2].weight, norms[1][-1].weight)


# -------------------------------------------------------------------------------------- the optimizer

MASKS = {f"backbone.{layer}.parametrizations.weight.0.real" for layer in ("conv", "linear")}


@pytest.mark.parametrize("norm", ["frozen", "task"])
@pytest.mark.parametrize("mover", MOVERS)
def test_the_optimizer_holds_masks_without_decay_the_new_head_and_the_tasks_norms(tiny, mover: str, norm: Any):
    witness = Answers()
    learn(tiny(shape=SHAPE, setting="task"), Piggyback(norm=norm), witness, **MOVERS[mover])
    for k in (1, 2):
        decays = {name: group["weight_decay"] for name, group in witness.optimized[k].items()}
        norms = {f"backbone.norm.norms.{k}.{p}" for p in ("weight", "bias")} if norm == "task" else set()
        assert decays.keys() == MASKS | norms | {f"head.{k}.weight", f"head.{k}.bias"}
        assert {decays[name] for name in MASKS} == {0}
        assert {decay for name, decay in decays.items() if name not in MASKS} == {0.1}


def test_afterwards_the_model_is_as_trainable_as_before(tiny):
    witness = Answers()
    model = Small()
    model.conv.weight.requires_grad_(False)
    learn(tiny(shape=SHAPE, setting="task"), Piggyback(), witness, model=model)
    frozen = [name for name, p in witness.model.named_parameters() if not p.requires_grad]
    assert frozen == ["backbone.conv.parametrizations.weight.original"]


# -------------------------------------------------------------------------------- what a task costs


@pytest.mark.parametrize("ternary", [False, True])
def test_a_task_costs_a_bit_for_each_weight_and_its_head(tiny_arrays, tmp_path: Path, ternary: bool):
    sizes = []
    for n in (3, 4):
        folder = tmp_path / str(n)
        learn(stream(tiny_arrays, range(2 * n), n), Piggyback(ternary=ternary), output=str(folder))
        tensors = load_file(folder / "model.safetensors")
        assert not any(name.endswith(".real") for name in tensors)
        sizes.append(sum(value.nbytes for value in tensors.values()))
    conv, linear, head = 27, 240, 5 * 2 + 2
    planes = 2 if ternary else 1
    assert sizes[1] - sizes[0] == planes * (-(-conv // 8) + -(-linear // 8)) + 4 * head


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("threshold", [0.02, 0.03])
def test_a_threshold_that_no_mask_exceeds_is_refused(tiny, threshold: float):
    sentence = rf"^`piggyback\.threshold` is {threshold:g}, .* `piggyback\.init`, 0\.02: choose a lower threshold\.$"
    with pytest.raises(UsageError, match=sentence) as caught:
        learn(tiny(shape=SHAPE, setting="task"), Piggyback(init=0.02, threshold=threshold))
    assert len(caught.value.problems) == 1
