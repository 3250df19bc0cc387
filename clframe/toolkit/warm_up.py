"""The phase in which a new head is trained alone, before the whole network."""

from __future__ import annotations

from collections.abc import Iterator

from clframe.context import Run
from clframe.plugin import Plugin
from clframe.training import Phase


def warm_up(run: Run, share: float) -> list[Phase] | None:
    """Return a phase before ``train`` that trains the new head alone (Li and Hoiem, LwF, 2017, section 3.1).

    None in the first experience, whose head is new but has no trained network below it, and for a share of 0.

    Args:
        run: the run, when the head has grown.
        share: length of the phase, relative to the experience's own training.
    """
    blocks = run.new_blocks
    if not share or not run.experience.index or not blocks:
        return None
    epochs, iterations = (n and max(1, round(share * n)) for n in Phase("train").length(run.settings).values())
    return [Phase("warm-up", "before", epochs, iterations, only=tuple(f"head.{k}.*" for k in blocks))]


def warm_up_problems(run: Run, plugin: Plugin) -> Iterator[str]:
    """Yield reasons why `plugin`, whose attribute ``warm_up`` asks for the phase, cannot have it."""
    asking = [p.name for p in run.plugins if getattr(p, "warm_up", 0)]
    if plugin.name in asking and "domain" in plugin.serves:  # else that is refused already
        yield from no_new_heads(run, f"`{plugin.name}.warm_up`")
    if plugin.name in asking[:-1]:
        yield f"Both `{plugin.name}` and `{asking[-1]}` bring a phase `warm-up`; leave one out."


def no_new_heads(run: Run, asked_by: str) -> list[str]:
    """Return the sentence that refuses `asked_by`, which needs new heads, in the domain setting."""
    if run.scenario.setting != "domain":
        return []
    return [
        f"{asked_by} trains the head of new classes, and in the domain setting no experience brings any: leave it out, "
        "or choose another `--setting`."
    ]
