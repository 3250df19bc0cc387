"""Batches of one image, from which batch normalization cannot learn: refused before training where they must come."""

from __future__ import annotations

import copy

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from clframe.context import Run
from clframe.data.scenario import Scenario
from clframe.data.streams import learned

TOO_FEW = "more than 1 value per channel"  # what torch says then


def single_image_problems(run: Run, stream: Scenario) -> list[str]:
    """Return one sentence for each reason why a batch of one image would come, if the network cannot train on one.

    `clframe.training.Sampler` lets a last image join the batch before: what is left is a `train.batch_size` of 1, and
    an experience of one image that no plugin adds others to.
    """
    if learns_from_one(run):
        return []
    why = []
    to_come = range(learned(run), len(stream))
    if 1 in {run.config.train.of(i).batch_size for i in to_come}:
        why.append("`train.batch_size` is 1: choose 2 or more")
    adding = any(plugin.replays or plugin.keeps_experiences for plugin in run.plugins)
    alone = [i for i in to_come if not (adding and i) and len(stream[i].train) == 1]
    if alone:
        why.append(f"experience {alone[0] + 1} of `{stream.name}` has one training image: give it more")
    model = run.config.model["name"]
    return [
        f"`{model}` has batch normalization, which cannot learn from one value for each channel, and {reason}, or "
        "choose a model without it."
        for reason in why
    ]


def learns_from_one(run: Run) -> bool:
    """Return whether a copy of the backbone can take one image in training mode; the network stays as it is."""
    net = run.model.backbone
    if not any(isinstance(module, _BatchNorm) for module in net.modules()):
        return True
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []), torch.no_grad():
        try:
            copy.deepcopy(net).train().features(torch.zeros(1, *run.scenario.input_shape, device=run.device))
        except Exception as error:  # other errors are told of where they come
            return TOO_FEW not in str(error)
    return True
