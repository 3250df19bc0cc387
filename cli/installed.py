"""The commands `plugins` and `scenarios`: what is installed, what it does, whether it is right, and one of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from clframe import registry
from clframe.cli import show
from clframe.cli.parameters import DataRoot, Json, complete

plugins_app = typer.Typer(help="Methods that a run can name with --plugin.")
scenarios_app = typer.Typer(help="Scenarios that a run can name with --scenario.")

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="One option to check with, such as NAME.size=20; repeatable."),
]
NewName = Annotated[str, typer.Argument(metavar="NAME", help="Name in a run: small letters, digits, hyphens.")]
NewFolder = Annotated[
    Path | None, typer.Option("--output", metavar="FOLDER", help="Folder to write [default: NAME, here].")
]
OfPlugins = Annotated[
    Literal["plugin", "backbone"],
    typer.Option(metavar="plugin|backbone", help="Kind of the component [default: plugin].", show_default=False),
]


@plugins_app.command("list")
def list_plugins(json: Json = False) -> None:
    """List all plugins, without importing them."""
    list_all("plugin", json)


@plugins_app.command("show")
def show_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete("plugin"))], json: Json = False
) -> None:
    """Show a plugin, its options and its hooks."""
    from clframe.cli import about

    about.show_plugin(name, json)


@plugins_app.command("check")
def check_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete("plugin"))],
    set_: Sets = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Backbone to check the plugin with [default: cnn-small]."),
    ] = None,
    kind: OfPlugins = "plugin",
    json: Json = False,
) -> int:
    """Check a plugin against the contract, and print what fails and why."""
    from clframe.cli.contract import check_backbone, check_plugin

    if kind == "plugin":
        return check_plugin(name, set_ or (), model, json)
    return check_backbone(name, set_ or (), model, json)


@plugins_app.command("new")
def new_plugin(name: NewName, output: NewFolder = None, kind: OfPlugins = "plugin") -> None:
    """Write a package with a working plugin, as a start for your own."""
    from clframe.cli.new import write

    write("plugin" if kind == "plugin" else "model", name, output)


@scenarios_app.command("check")
def check_scenario(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete("scenario"))],
    set_: Sets = None,
    json: Json = False,
) -> int:
    """Check a scenario against the contract, and print what fails and why."""
    from clframe.cli.contract import check_scenario

    return check_scenario(name, set_ or (), json)


@scenarios_app.command("new")
def new_scenario(name: NewName, output: NewFolder = None) -> None:
    """Write a package with a working scenario, as a start for your own."""
    from clframe.cli.new import write

    write("scenario", name, output)


@scenarios_app.command("list")
def list_scenarios(json: Json = False) -> None:
    """List all scenarios, without importing them."""
    list_all("scenario", json)


@scenarios_app.command("show")
def show_scenario(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete("scenario"))],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="One setting, as in `clframe run`; repeatable."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write the split to a file for --scenario FILE.json."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw some training images of each experience.")
    ] = None,
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """Show a scenario and its options; nothing is downloaded."""
    from clframe.cli import about

    about.show_scenario(name, set_ or (), data_root, save, sheet, json)


def list_all(kind: registry.Kind, json: bool) -> None:
    """Print the name, package and description of everything of this kind that is installed."""
    found = registry.offers(kind)
    if json:
        show.document(
            [{"name": o.name, "package": o.package, "version": o.version, "description": o.description} for o in found]
        )
    else:
        show.table(["name", "package", "description"], [[o.name, o.package, o.description] for o in found])
