"""Parameters that the commands of several modules have."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from clframe import registry

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def complete(kind: registry.Kind) -> Callable[[str], list[str]]:
    """Return a function that lists the names of this kind that begin with a given text."""

    def find(incomplete: str) -> list[str]:
        return [name for name in registry.names(kind) if name.startswith(incomplete)]

    return find


def read_whole(text: str) -> int:
    """Read a whole number as `--set` takes it: `2e1` is 20."""
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        number = float(text)
        if number.is_integer() and abs(number) < 2**53:  # above, not every whole number is a float
            return int(number)
    raise typer.BadParameter(f"{text!r} is not a valid integer.")


def read_interval(text: str | None) -> int | str | None:
    """Read a number of steps as `--set` takes it; leave a word as it is, for the settings to accept or refuse."""
    if text is None:
        return None
    try:
        return read_whole(text)
    except typer.BadParameter:
        return text


def whole_number(help: str) -> Any:
    """Return an option that takes a whole number."""
    return typer.Option(metavar="N", parser=read_whole, help=help)


DataRoot = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Folder of the data sets [default: CLFRAME_DATA, or the user's cache]."),
]


# Parameters of commands on many runs; their defaults stand in the commands.
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="A+B",
        help="Plugin, or several that form one method; repeatable.",
        autocompletion=complete("plugin"),
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Backbone [default: the one that suits the scenario].",
        autocompletion=complete("model"),
    ),
]
StudySets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="One setting, such as er.size=200; repeatable."),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="local|dask:ADDRESS|inline",
        help="What carries the runs out: processes here, the workers of a Dask scheduler, or this process.",
    ),
]
