"""The command line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import errno
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clframe import __version__, compose, registry
from clframe.cli import advice, show, streams
from clframe.errors import ClframeError, DataError, of_the_system, out_of_memory
from clframe.system.reading import expand_home, reason
from clframe.system.texts import SENTENCE, cut

if TYPE_CHECKING:
    from clframe.events import Listener
    from clframe.runs.results import Results
    from clframe.settings import Config

INTERRUPTED = 130
BUG = 70

app = typer.Typer(
    help="Continual learning with methods you can install, compose and trust.",
    epilog="First steps: clframe run --scenario permuted-digits --plugin ewc",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it reads the same in a pipe, and in a third of the time
    context_settings={"help_option_names": ["-h", "--help"]},
)
plugins_app = typer.Typer(help="Methods that a run can name with --plugin.")
scenarios_app = typer.Typer(help="Scenarios that a run can name with --scenario.")
app.add_typer(plugins_app, name="plugins")
app.add_typer(scenarios_app, name="scenarios")


def _completed(kind: registry.Kind) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in registry.names(kind) if name.startswith(incomplete)]

    return complete


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
DataRoot = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Folder of the data sets [default: CLFRAME_DATA, or the user's cache]."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="One option to check it with, such as NAME.size=20; repeatable."),
]
NewName = Annotated[str, typer.Argument(metavar="NAME", help="How a run will call it: small letters, digits, hyphens.")]
NewFolder = Annotated[
    Path | None, typer.Option("--output", metavar="FOLDER", help="Folder to write [default: NAME, here].")
]
OfPlugins = Annotated[
    Literal["plugin", "backbone"],
    typer.Option(metavar="plugin|backbone", help="What it is [default: plugin].", show_default=False),
]


def read_whole(text: str) -> int:
    """Read a whole number as `--set` takes it: `2e1` is 20."""
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        number = float(text)
        if number.is_integer() and abs(number) < 2**53:  # above, not every whole number is a float
            return int(number)
    raise typer.BadParameter(f"{text!r} is not a valid integer.")


def _whole(help: str) -> Any:
    return typer.Option(metavar="N", parser=read_whole, help=help)


RunFolderArgument = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
Task = Annotated[
    int | None,
    _whole("The images are of task N, the N-th experience; they count from 1."),
]


@app.callback()
def _clframe(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass  # `main` takes these two out of the arguments, so that they work in every place


@app.command()
def run(
    scenario: Annotated[
        str | None,
        typer.Option(
            "--scenario",
            "-s",
            metavar="NAME",
            help="What to learn [default: split-digits].",
            autocompletion=_completed("scenario"),
        ),
    ] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin",
            "-p",
            metavar="NAME",
            help="A method that takes part; repeatable [default: plain fine-tuning].",
            autocompletion=_completed("plugin"),
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE.yaml", help="Settings, such as a run's config.yaml.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="A.B=VALUE", help="One setting, such as ewc.lambda=50 or train.clip=0; repeatable."
        ),
    ] = None,
    setting: Annotated[
        str | None, typer.Option(metavar="class|task|domain", help="What is told at test time, and what is asked.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Backbone [default: what suits the scenario].",
            autocompletion=_completed("model"),
        ),
    ] = None,
    epochs: Annotated[int | None, _whole("Passes over the data of each experience.")] = None,
    iterations: Annotated[int | None, _whole("Steps per experience, instead of epochs.")] = None,
    batch_size: Annotated[int | None, _whole("Images of a step.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate.")] = None,
    seed: Annotated[int | None, _whole("Of everything random [default: 0].")] = None,
    limit: Annotated[int | None, _whole("Images per class, of training and of test data.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="auto|cpu|cuda", help="Where to compute [default: auto].")
    ] = None,
    data_root: DataRoot = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of this run [default: a new one under runs/].")
    ] = None,
    eval_every: Annotated[
        str | None, typer.Option(metavar="experience|epoch", help="How often to evaluate [default: experience].")
    ] = None,
    no_tensorboard: Annotated[bool, typer.Option("--no-tensorboard", help="Write no curves.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn a scenario and print how much of it is remembered."""
    from clframe.config import resolve, to_yaml

    def resolved() -> Config:
        return resolve(
            scenario=_given(name=scenario, setting=setting, limit=limit),
            model=model,
            plugins=plugin or (),
            yaml_file=config,
            sets=set_ or (),
            train=_given(epochs=epochs, iterations=iterations, batch_size=batch_size, lr=lr),
            run=_given(
                seed=seed,
                device=device,
                data_root=data_root,
                output=output,
                eval_every=eval_every,
                tensorboard=False if no_tensorboard else None,
            ),
        )

    def learn(listeners: Sequence[Listener]) -> Results:
        settings = resolved()
        from clframe.api import run_config

        with _in_a_folder(settings):
            return run_config(settings, listeners=listeners)

    if not dry_run:
        _shown(learn, quiet, json)
        return
    settings = resolved()
    compose.manager([registry.build_plugin(name, options) for name, options in settings.plugins.items()])
    if json:
        show.document(settings.model_dump())
    else:
        print(to_yaml(settings), end="")


@app.command()
def resume(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of the run.")],
    allow_env_change: Annotated[
        bool,
        typer.Option("--allow-env-change", help="Go on with another torch, device or number of threads."),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a run that was stopped, to the same figures."""

    def go_on(listeners: Sequence[Listener]) -> Results:
        from clframe.api import resume

        return resume(folder, allow_env_change=allow_env_change, listeners=listeners, progress=False)

    _shown(go_on, quiet, json)


@app.command()
def extend(
    folder: RunFolderArgument,
    scenario: Annotated[
        str,
        typer.Option(
            "--scenario", "-s", metavar="NAME", help="What to learn now.", autocompletion=_completed("scenario")
        ),
    ],
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin",
            "-p",
            metavar="NAME",
            help="A method that joins the run's, such as lwf; repeatable.",
            autocompletion=_completed("plugin"),
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Images of old classes, a folder of each, for a method that joins."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="One setting that is not to be the run's; repeatable."),
    ] = None,
    epochs: Annotated[int | None, _whole("Passes over the new data.")] = None,
    iterations: Annotated[int | None, _whole("Steps, instead of epochs.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate.")] = None,
    limit: Annotated[int | None, _whole("Images per class.")] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")] = None,
    data_root: DataRoot = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of the new run [default: a new one under runs/].")
    ] = None,
    no_tensorboard: Annotated[bool, typer.Option("--no-tensorboard", help="Write no curves.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let the model of a finished run learn more; what is not set is as it was in the run, which stays as it is."""

    def go_on(listeners: Sequence[Listener]) -> Results:
        from clframe.api import extension_config, run_config

        settings = extension_config(
            expand_home(folder),
            {"name": scenario, **_given(limit=limit)},
            plugins={name: {} for name in plugin or ()},
            sets=set_ or (),
            train=_given(epochs=epochs, iterations=iterations, lr=lr),
            run=_given(
                old_images=images,
                device=device,
                data_root=data_root,
                output=output,
                tensorboard=False if no_tensorboard else None,
            ),
        )
        with _in_a_folder(settings):
            return run_config(settings, listeners=listeners)

    _shown(go_on, quiet, json)


@app.command()
def predict(
    folder: RunFolderArgument,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Image files, and folders of them.")],
    top: Annotated[int, typer.Option(metavar="K", help="How many classes of each image to tell.")] = 1,
    task: Task = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out files that cannot be read, and name them.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what images are, by the model of a finished run."""
    from clframe.cli.use import predicted

    predicted(folder, images, top, task, skip_unreadable, json)


@app.command()
def export(
    folder: RunFolderArgument,
    format_: Annotated[str, typer.Option("--format", metavar="safetensors|torch-export|onnx", help="Of the file.")],
    output: Annotated[str, typer.Option("--output", metavar="FILE", help="Where to write it.")],
    task: Task = None,
    json: Json = False,
) -> None:
    """Write the model of a finished run to a file that answers as it does."""
    from clframe.cli.use import exported

    exported(folder, format_, output, task, json)


@app.command()
def doctor(data_root: DataRoot = None, json: Json = False) -> None:
    """Check versions, device, disk, data and plugins."""
    from clframe.cli.doctor import examine, report

    found = examine(data_root)
    if json:
        show.document(found)
    else:
        report(found)


@plugins_app.command("list")
def list_plugins(json: Json = False) -> None:
    """List all plugins; nothing of them is imported."""
    _list("plugin", json)


@plugins_app.command("show")
def show_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=_completed("plugin"))], json: Json = False
) -> None:
    """Show a plugin, its options and its hooks."""
    from clframe.cli.about import about_plugin

    about_plugin(name, json)


@plugins_app.command("check")
def check_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=_completed("plugin"))],
    set_: Sets = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Backbone to check it with [default: cnn-small]."),
    ] = None,
    kind: OfPlugins = "plugin",
    json: Json = False,
) -> int:
    """Check that a plugin holds to the contract: what fails, and why."""
    from clframe.cli.contract import check_backbone, check_plugin

    if kind == "plugin":
        return check_plugin(name, set_ or (), model, json)
    return check_backbone(name, set_ or (), model, json)


@plugins_app.command("new")
def new_plugin(name: NewName, output: NewFolder = None, kind: OfPlugins = "plugin") -> None:
    """Write a package with a plugin that works, to make one's own of."""
    from clframe.cli.new import write

    write("plugin" if kind == "plugin" else "model", name, output)


@scenarios_app.command("check")
def check_scenario(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=_completed("scenario"))],
    set_: Sets = None,
    json: Json = False,
) -> int:
    """Check that a scenario holds to the contract: what fails, and why."""
    from clframe.cli.contract import check_scenario

    return check_scenario(name, set_ or (), json)


@scenarios_app.command("new")
def new_scenario(name: NewName, output: NewFolder = None) -> None:
    """Write a package with a scenario that works, to make one's own of."""
    from clframe.cli.new import write

    write("scenario", name, output)


@scenarios_app.command("list")
def list_scenarios(json: Json = False) -> None:
    """List all scenarios; nothing of them is imported."""
    _list("scenario", json)


@scenarios_app.command("show")
def show_scenario(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=_completed("scenario"))],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="One setting, as `run` takes it; repeatable.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write the split, to run from it with --scenario FILE.json."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw some training images of each experience.")
    ] = None,
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """Show a scenario and its options; nothing is downloaded."""
    from clframe.cli.about import about_scenario

    about_scenario(name, set_ or (), data_root, save, sheet, json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give the exit code; every error ends here, as a sentence."""
    # GNU's OpenMP, which torch uses on Linux, lets idle threads spin: where another program wants their cores too, a
    # step of a small network takes fifty times as long. Spinning for microseconds is enough.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if given in ([], ["plugins"], ["scenarios"]):
        given.append("--help")
    with streams.in_order() as output, streams.stoppable() as signals:
        return _ended(given, debug, output, signals)


def _ended(given: list[str], debug: bool, output: streams.Watched, signals: Sequence[int]) -> int:
    """Do what the arguments `given` ask for and return the exit code; `signals` are those that came meanwhile."""
    try:
        code = _done(given)
        if code == INTERRUPTED:
            return _stopped(signals)
        sys.stdout.flush()
        return code
    except BaseException as error:
        # rich leaves with SystemExit; an error under way, such as that of a run, is told nevertheless
        if output.broken and (isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)):
            return 0
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        if debug:
            import traceback

            traceback.print_exception(error)
        if signals and isinstance(error, KeyboardInterrupt | typer.Abort):
            return _stopped(signals)
        code, sentences = _explained(error, advice.options(app, given))
        for sentence in sentences:
            show.note(f"clframe: {advice.fitting(app, cut(sentence, SENTENCE), given)}")
        with suppress(OSError):  # a full disk, as told
            sys.stdout.flush()
        return code


def _done(given: list[str]) -> int:
    """Do what the arguments `given` ask for; return the exit code."""
    if given[:1] == ["--version"]:
        show.line(f"clframe {__version__}")
        return 0
    if given[:2] in (["plugins", "list"], ["scenarios", "list"]) and set(given[2:]) <= {"--json"}:
        _list("plugin" if given[0] == "plugins" else "scenario", "--json" in given)  # typer takes twice the time
        return 0
    try:
        os.getcwd()
    except OSError as error:  # libraries die of it in their own ways
        raise DataError(f"The current folder cannot be used ({reason(error)}): change to one that is there.") from error
    return app(args=given, prog_name="clframe", standalone_mode=False) or 0


def _stopped(signals: Sequence[int]) -> int:
    """Say what stopped the command and return its exit code."""
    if not signals:
        show.note("Interrupted.")
        return INTERRUPTED
    show.note(f"Stopped by {signal.Signals(signals[0]).name}.")
    return 128 + signals[0]


def _explained(error: BaseException, options: frozenset[str]) -> tuple[int, Sequence[str]]:
    """The exit code of an error and what to tell of it, in a command that has these options."""
    usage: Any = typer.BadParameter.__base__  # typer's error of wrong use has no public name
    if isinstance(error, ClframeError):
        return error.code, str(error).split("\n")
    if isinstance(error, usage):
        command = error.ctx.command_path if error.ctx else "clframe"
        told = error.format_message().rstrip(".")
        if told.startswith("Got unexpected extra argument") and "plugin" in (error.ctx.params if error.ctx else {}):
            told += "; for several methods repeat `--plugin`"
        return 2, [f"{told}{'' if told.endswith('?') else '.'} See `{command} --help`."]
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED, ["Interrupted."]
    if out_of_memory(error):
        if "--batch-size" in options:
            return 1, ["Out of memory: a smaller `--batch-size`, `--limit` or model may fit."]
        limit = " a smaller `--limit` may fit, or" if "--limit" in options else ""
        return 1, [f"Out of memory:{limit} end other programs that hold some of it."]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        elsewhere = ", or write elsewhere with `--output`" if "--output" in options else ""
        return 1, [f"The disk is full{_at(error)}: free some space{elsewhere}."]
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return 1, [f"{error.strerror}{_at(error)}: change the permissions, or name another place."]
    if refused := of_the_system(error):
        return 1, [f"The system refused a file, a process or the like: {refused}."]
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    text = " ".join(f"{error}{notes}".split())
    return BUG, [
        f"A bug of clframe, please report it: {type(error).__name__}: {text}",
        "The same command with `--debug` shows where it happened.",
    ]


def _at(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


def _given(**options: object) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def _in_a_folder(config: Config) -> Iterator[None]:
    """Inside, the run has a folder, a new one if none is named; that goes away if nothing was begun in it."""
    if config.run.output is not None:
        yield
        return
    config.run.output = str(_new_folder(config))
    try:
        yield
    finally:
        with suppress(OSError):  # it is not empty: the run began
            Path(config.run.output).rmdir()


def _new_folder(config: Config) -> Path:
    """Make a folder under runs/ that was not there and return its path; of two processes, each gets its own."""
    from datetime import datetime

    methods = "+".join(config.plugins)[:80] or "finetuning"
    scenario = re.sub(r"[/:]+", "-", config.scenario["name"])[-80:]  # which may be a path
    name = f"{scenario}-{methods}-{config.run.seed}-{datetime.now():%Y%m%d-%H%M%S}".replace(":", "-")
    for count in itertools.count(1):
        folder = Path("runs", name if count == 1 else f"{name}-{count}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def _shown(work: Callable[[Sequence[Listener]], Results], quiet: bool, json: bool) -> None:
    """Do the work of a run, showing its course, and print its results."""
    from clframe.cli.live import Live

    with Live(quiet) as live:
        finished = work([live])
    show.results(finished, json)


def _list(kind: registry.Kind, json: bool) -> None:
    found = registry.offers(kind)
    if json:
        show.document(
            [{"name": o.name, "package": o.package, "version": o.version, "description": o.description} for o in found]
        )
    else:
        show.table(["name", "package", "description"], [[o.name, o.package, o.description] for o in found])
