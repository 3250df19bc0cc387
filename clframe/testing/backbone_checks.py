"""The contract of backbones: one function for each check, by whose name and docstring the check is reported."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import torch

from clframe import api, registry
from clframe.model import IncrementalNet, evaluating, snapshot
from clframe.runs.results import Results
from clframe.testing.fixtures import learn, require, same_after_a_stop, tiny
from clframe.testing.plugin_checks import check_answers
from clframe.testing.subjects import BACKBONE_SHAPE, Subject, check, check_docstrings

ADVICE = "keep what lasts as parameters or buffers"


@check("model", needs_run=False)
def options_are_documented(subject: Subject, folder: Path) -> None:
    """Check that each option is documented."""
    first = next(iter(inspect.signature(subject.factory).parameters), "")
    check_docstrings(subject, (first, *registry.SUPPLIED))


@check("model", first=True)
def its_features_are_as_wide_as_it_says(subject: Subject, folder: Path) -> None:
    """Check that `features` gives [B, width] finite numbers, in eval mode the same for an image in any batch."""
    built = cast(Any, subject.backbone().eval())
    x = torch.rand(5, *BACKBONE_SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = built.features(x)
        alone = built.features(x[:1])
    width = getattr(built, "width", None)
    shape = list(given.shape)
    require(
        shape == [5, width], f"`features` gives {shape} for 5 images, and `width` is {width}: it must be [5, width]."
    )
    require(given.isfinite().all(), "`features` gives numbers that are not finite.")
    require(
        torch.allclose(given[:1], alone, atol=1e-4), "In eval mode an image's features depend on the others beside it."
    )


@check("model")
def every_parameter_learns(subject: Subject, folder: Path) -> None:
    """Check that each parameter that requires gradients gets one."""
    built = subject.backbone().train()
    x = torch.rand(8, *BACKBONE_SHAPE, generator=torch.Generator().manual_seed(0))
    cast(Any, built).features(x).square().sum().backward()
    for name, parameter in built.named_parameters():
        require(
            parameter.grad is not None or not parameter.requires_grad,
            f"The parameter `{name}` gets no gradient from `features`: use it, or leave it out.",
        )


@check("model")
def it_is_copied(subject: Subject, folder: Path) -> None:
    """Check that a snapshot, as teachers are, answers the same and shares nothing with the original."""
    net = IncrementalNet(subject.backbone())
    net.grow(2)
    copy = snapshot(net)
    x = torch.rand(2, *BACKBONE_SHAPE, generator=torch.Generator().manual_seed(0))
    with evaluating(net), evaluating(copy), torch.no_grad():
        require(torch.equal(net(x).logits, copy(x).logits), "A snapshot of it gives other answers than the original.")
    shared = {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in copy.parameters()}
    require(not shared, "A snapshot of it shares parameters with the original.")


@check("model")
def its_stopped_run_resumes_to_the_same_bits(subject: Subject, folder: Path) -> None:
    """Check that all that it keeps between two steps is in its `state_dict`, and its randomness torch's."""

    def begin(output: str) -> Results:
        return learn(tiny(shape=BACKBONE_SHAPE), model=subject.backbone(), output=output)

    def go_on(path: Path) -> Results:
        return api.resume(path, scenario=tiny(shape=BACKBONE_SHAPE), model=subject.backbone())

    same_after_a_stop(folder, begin, go_on, f"{ADVICE[0].upper()}{ADVICE[1:]}.")


@check("model")
def its_finished_run_loads_and_predicts(subject: Subject, folder: Path) -> None:
    """Check that `clframe.load` gives a model that answers as the run was evaluated."""
    scenario = tiny(shape=BACKBONE_SHAPE)
    whole = learn(scenario, model=subject.backbone(), output=str(folder / "run"))
    check_answers(api.load(folder / "run", model=subject.backbone()), whole, scenario, ADVICE)
