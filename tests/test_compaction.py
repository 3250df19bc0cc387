"""A compacted network answers as the gated one does, with less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clframe import IncrementalNet, backbones
from clframe.toolkit.channel_gates import ConditionalConv, convolutions_of, replace_relus
from clframe.toolkit.compaction import CompactConv, compact
from clframe.toolkit.norms import TaskNorm, add_task_norms
from clframe.toolkit.unit_gates import gate_layers
from clframe.toolkit.weight_masks import find_modules

SHAPE = (3, 16, 16)


def gated(backbone: Any, tasks: int = 2, open_share: float = 0.5) -> IncrementalNet:
    """A gated network of random weights and statistics, of whose channels a random share may open for each task."""
    generator = torch.Generator().manual_seed(3)
    model = IncrementalNet(backbone, [2] * tasks)
    net = model.backbone
    gate_layers(net, convolutions_of(net), SHAPE, lambda conv, norm: ConditionalConv(conv, norm, tasks))
    add_task_norms(net)
    replace_relus(net)
    for task in range(tasks):
        for conv in find_modules(net, ConditionalConv).values():
            conv.add(0.5, generator)
            conv.fired[task] = torch.rand(conv.units, generator=generator) < open_share
            conv.fired[task, 0] = True
        for norm in find_modules(net, TaskNorm).values():
            if task:
                norm.add()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
    model.select(tasks - 1)
    return model.eval()


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("name", ["cnn_small", "resnet32", "resnet18"])
def test_its_answers_are_those_of_the_gated_network(name: str, task: int):
    torch.manual_seed(1)
    model = gated(getattr(backbones, name)(SHAPE))
    small = compact(model, task, SHAPE)
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, found = model(x, torch.full((4,), task)), small(x)
    scale = expected.logits.abs().max().clamp(min=1)
    assert (expected.logits - found.logits).abs().max() <= 1e-6 * scale
    assert (expected.features - found.features).abs().max() <= 1e-6 * expected.features.abs().max().clamp(min=1)
    assert expected.features.abs().max() > 0


def test_only_what_may_open_is_left_and_a_chain_passes_nothing_else_on():
    torch.manual_seed(1)
    model = gated(backbones.cnn_small(SHAPE))
    small = compact(model, 1, SHAPE)
    before = [conv.fired[1] for conv in find_modules(model.backbone, ConditionalConv).values()]
    after = list(find_modules(small.backbone, CompactConv).values())
    assert [conv.layer.out_channels for conv in after] == [int(fired.sum()) for fired in before]
    assert [conv.layer.in_channels for conv in after] == [3, *(int(fired.sum()) for fired in before[:-1])]
    assert [conv.gathers for conv in after] == [True, False, False]
    assert [conv.scatters for conv in after] == [False, False, True]
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())


def test_the_gated_network_is_left_as_it_was():
    torch.manual_seed(1)
    model = gated(backbones.cnn_small(SHAPE))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compact(model, 0, SHAPE)
    assert model.selected == 1
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
