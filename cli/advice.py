"""Advice in errors that suits the command at hand: no option is named that the command does not have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import typer

EVERYWHERE = frozenset(("--help", "-h", "--debug", "--version"))
OPTION = re.compile(r"(?<![\w/.-])--[a-z]+(?:-[a-z]+)*")
COMMAND = re.compile(r"`clframe [^`]*`")  # it has options of its own


@lru_cache(maxsize=1)
def list_options(app: typer.Typer) -> dict[tuple[str, ...], frozenset[str]]:
    """Return the options of each command, by its words, such as ``("plugins", "list")``."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], frozenset[str]]]:
        inner = getattr(command, "commands", None)
        for name, one in (inner or {}).items():
            yield from walk(one, (*words, name))
        if inner is None:
            named = (option for p in command.params for option in (*p.opts, *p.secondary_opts))
            yield words, EVERYWHERE.union(option for option in named if option.startswith("-"))

    return dict(walk(typer.main.get_command(app), ()))


def find_options(app: typer.Typer, given: Sequence[str]) -> frozenset[str]:
    """Return the options of the command that the arguments `given` begin with."""
    return next(
        (known for words, known in list_options(app).items() if tuple(given[: len(words)]) == words), EVERYWHERE
    )


def add_command(app: typer.Typer, sentence: str, given: Sequence[str]) -> str:
    """Return `sentence`; if it names options that the command in `given` lacks, followed by the command that has them.

    Plugins, scenarios and run folders serve several commands, and cannot tell which of them is running.
    """
    known = find_options(app, given)
    lacking = [o for o in dict.fromkeys(OPTION.findall(COMMAND.sub("", sentence))) if o not in known]
    owners = [(words, [o for o in lacking if o in of]) for words, of in list_options(app).items()]
    words, named = max(owners, key=lambda owner: len(owner[1]))  # of equals the first, which is `run`
    if not named:
        return sentence
    listed = " and ".join(f"`{option}`" for option in named)
    are = "is an option" if len(named) == 1 else "are options"
    return f"{sentence} ({listed} {are} of `clframe {' '.join(words)}`.)"
