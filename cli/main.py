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
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clframe import __version__, compose, registry
from clframe.cli import advice, compare, installed, report, runs, show, streams, tune
from clframe.cli.parameters import DataRoot, Json, Model, Quiet, complete, read_interval, whole_number
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
app.add_typer(installed.plugins_app, name="plugins")
app.add_typer(installed.scenarios_app, name="scenarios")
app.add_typer(runs.app, name="runs")


RunFolderArgument = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
Task = Annotated[
    int | None,
    whole_number("Task of the images: the N-th experience, counted from 1."),
]


@app.callback()
def _clframe(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass  # `main` takes both out of the arguments, so that they work in every place


@app.command()
def run(
    scenario: Annotated[
        str | None,
        typer.Option(
            "--scenario",
            "-s",
            metavar="NAME",
            help="Scenario to learn [default: split-digits].",
            autocompletion=complete("scenario"),
        ),
    ] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin",
            "-p",
            metavar="NAME",
            help="Method to learn with; repeatable [default: plain fine-tuning].",
            autocompletion=complete("plugin"),
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE.yaml", help="File of settings, such as the config.yaml of a run."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="A.B=VALUE", help="One setting, such as ewc.lambda=50 or train.clip=0; repeatable."
        ),
    ] = None,
    setting: Annotated[
        str | None,
        typer.Option(metavar="class|task|domain", help="Evaluation setting: class-, task- or domain-incremental."),
    ] = None,
    model: Model = None,
    epochs: Annotated[int | None, whole_number("Passes over the data of each experience.")] = None,
    iterations: Annotated[int | None, whole_number("Steps per experience, instead of epochs.")] = None,
    batch_size: Annotated[int | None, whole_number("Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate.")] = None,
    seed: Annotated[int | None, whole_number("Seed of all random numbers [default: 0].")] = None,
    limit: Annotated[int | None, whole_number("Images per class, in training and in test data.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="auto|cpu|cuda", help="Device to compute on [default: auto].")
    ] = None,
    data_root: DataRoot = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of this run [default: a new one under runs/].")
    ] = None,
    eval_every: Annotated[
        str | None,
        typer.Option(
            metavar="experience|epoch|N",
            help="How often to evaluate: after each experience, also each epoch, or N steps [default: experience].",
        ),
    ] = None,
    no_tensorboard: Annotated[bool, typer.Option("--no-tensorboard", help="Write no curves.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn a scenario and print its accuracy matrix."""
    from clframe.config import resolve, to_yaml

    def resolve_all() -> Config:
        return resolve(
            scenario=_drop_none(name=scenario, setting=setting, limit=limit),
            model=model,
            plugins=plugin or (),
            yaml_file=config,
            sets=set_ or (),
            train=_drop_none(epochs=epochs, iterations=iterations, batch_size=batch_size, lr=lr),
            run=_drop_none(
                seed=seed,
                device=device,
                data_root=data_root,
                output=output,
                eval_every=read_interval(eval_every),
                tensorboard=False if no_tensorboard else None,
            ),
        )

    def learn(listeners: Sequence[Listener]) -> Results:
        settings = resolve_all()
        from clframe.api import run_config

        with _use_folder(settings):
            return run_config(settings, listeners=listeners)

    if not dry_run:
        _show_run(learn, quiet, json)
        return
    settings = resolve_all()
    compose.manager([registry.build_plugin(name, plugin.options) for name, plugin in settings.plugins.items()])
    if json:
        show.document(settings.model_dump())
    else:
        print(to_yaml(settings), end="")


@app.command()
def resume(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of the run.")],
    allow_env_change: Annotated[
        bool,
        typer.Option("--allow-env-change", help="Continue with another torch, device or number of threads."),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a run that was stopped, to the same figures."""

    def go_on(listeners: Sequence[Listener]) -> Results:
        from clframe.api import resume

        return resume(folder, allow_env_change=allow_env_change, listeners=listeners, progress=False)

    _show_run(go_on, quiet, json)


@app.command()
def extend(
    folder: RunFolderArgument,
    scenario: Annotated[
        str,
        typer.Option(
            "--scenario", "-s", metavar="NAME", help="Scenario to learn next.", autocompletion=complete("scenario")
        ),
    ],
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin",
            "-p",
            metavar="NAME",
            help="Method that joins those of the run, such as lwf; repeatable.",
            autocompletion=complete("plugin"),
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Images of old classes, one folder for each class, for a method that joins."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="One setting that differs from those of the run; repeatable."),
    ] = None,
    epochs: Annotated[int | None, whole_number("Passes over the new data.")] = None,
    iterations: Annotated[int | None, whole_number("Steps on the new data, instead of epochs.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate.")] = None,
    limit: Annotated[int | None, whole_number("Images per class.")] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="Device to compute on.")] = None,
    data_root: DataRoot = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of the new run [default: a new one under runs/].")
    ] = None,
    no_tensorboard: Annotated[bool, typer.Option("--no-tensorboard", help="Write no curves.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the model of a finished run on new data.

    Settings that are not given are those of that run, which stays unchanged.
    """

    def go_on(listeners: Sequence[Listener]) -> Results:
        from clframe.api import extension_config, run_config

        settings = extension_config(
            expand_home(folder),
            {"name": scenario, **_drop_none(limit=limit)},
            plugins={name: {} for name in plugin or ()},
            sets=set_ or (),
            train=_drop_none(epochs=epochs, iterations=iterations, lr=lr),
            run=_drop_none(
                old_images=images,
                device=device,
                data_root=data_root,
                output=output,
                tensorboard=False if no_tensorboard else None,
            ),
        )
        with _use_folder(settings):
            return run_config(settings, listeners=listeners)

    _show_run(go_on, quiet, json)


app.command()(compare.compare)
app.command()(tune.tune)
app.command()(report.report)


@app.command()
def predict(
    folder: RunFolderArgument,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Image files, and folders of image files.")],
    top: Annotated[int, typer.Option(metavar="K", help="Number of classes to print for each image.")] = 1,
    task: Task = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out files that cannot be read, and name them.")
    ] = False,
    json: Json = False,
) -> None:
    """Classify images with the model of a finished run."""
    from clframe.cli.predict import print_predictions

    print_predictions(folder, images, top, task, skip_unreadable, json)


@app.command()
def export(
    folder: RunFolderArgument,
    format_: Annotated[
        str, typer.Option("--format", metavar="safetensors|torch-export|onnx", help="Format of the file.")
    ],
    output: Annotated[str, typer.Option("--output", metavar="FILE", help="File to write.")],
    task: Task = None,
    json: Json = False,
) -> None:
    """Write the model of a finished run to a file.

    The file takes raw images and gives the same scores; both are compared before the file is kept.
    """
    from clframe.cli.export import export_model

    export_model(folder, format_, output, task, json)


@app.command()
def doctor(data_root: DataRoot = None, json: Json = False) -> None:
    """Check versions, device, disk, data and plugins."""
    from clframe.cli.doctor import examine, report

    found = examine(data_root)
    if json:
        show.document(found)
    else:
        report(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; every error is printed here, as a sentence."""
    # GNU's OpenMP, which torch uses on Linux, lets idle threads spin: where another program wants their cores too, a
    # step of a small network takes fifty times as long. Spinning for microseconds is enough.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if given in ([], ["plugins"], ["scenarios"], ["runs"]):
        given.append("--help")
    with streams.guard_streams() as output, streams.stop_on_signals() as signals:
        return _run_command(given, debug, output, signals)


def _run_command(given: list[str], debug: bool, output: streams.Watched, signals: Sequence[int]) -> int:
    """Run the command `given`, print what ends it, and return the exit code; `signals` lists those that came."""
    try:
        code = _dispatch(given)
        if code == INTERRUPTED:
            return _report_stop(signals)
        sys.stdout.flush()
        return code
    except BaseException as error:
        # rich leaves with SystemExit; an error under way, such as that of a run, is printed nevertheless
        if output.broken and (isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)):
            return 0
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        if debug:
            import traceback

            traceback.print_exception(error)
        if signals and isinstance(error, KeyboardInterrupt | typer.Abort):
            return _report_stop(signals)
        code, sentences = _explain(error, advice.find_options(app, given))
        for sentence in sentences:
            show.note(f"clframe: {advice.add_command(app, cut(sentence, SENTENCE), given)}")
        with suppress(OSError):  # a full disk, as printed
            sys.stdout.flush()
        return code


def _dispatch(given: list[str]) -> int:
    """Run the command that the arguments `given` name and return its exit code."""
    if given[:1] == ["--version"]:
        show.line(f"clframe {__version__}")
        return 0
    if given[:2] in (["plugins", "list"], ["scenarios", "list"]) and set(given[2:]) <= {"--json"}:
        installed.list_all(
            "plugin" if given[0] == "plugins" else "scenario", "--json" in given
        )  # typer takes twice the time
        return 0
    try:
        os.getcwd()
    except OSError as error:  # libraries die of it in their own ways
        raise DataError(f"The current folder cannot be used ({reason(error)}): change to one that is there.") from error
    return app(args=given, prog_name="clframe", standalone_mode=False) or 0


def _report_stop(signals: Sequence[int]) -> int:
    """Print what stopped the command and return its exit code."""
    if not signals:
        show.note("Interrupted.")
        return INTERRUPTED
    show.note(f"Stopped by {signal.Signals(signals[0]).name}.")
    return 128 + signals[0]


def _explain(error: BaseException, options: frozenset[str]) -> tuple[int, Sequence[str]]:
    """Return the exit code of an error and the sentences to print, in a command that has these options."""
    usage: Any = typer.BadParameter.__base__  # typer's usage error has no public name
    if isinstance(error, ClframeError):
        return error.code, str(error).split("\n")
    if isinstance(error, usage):
        command = error.ctx.command_path if error.ctx else "clframe"
        message = error.format_message().rstrip(".")
        if message.startswith("Got unexpected extra argument") and "plugin" in (error.ctx.params if error.ctx else {}):
            message += "; for several methods repeat `--plugin`"
        end = "" if message.endswith("?") else "."
        return 2, [f"{message}{end} See `{command} --help`."]
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


def _drop_none(**options: object) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def _use_folder(config: Config) -> Iterator[None]:
    """Give the run a new folder if it names none; a new folder in which nothing was begun is removed afterwards."""
    if config.run.output is not None:
        yield
        return
    config.run.output = str(_make_folder(config))
    try:
        yield
    finally:
        with suppress(OSError):  # it is not empty: the run began
            Path(config.run.output).rmdir()


def _make_folder(config: Config) -> Path:
    """Make a new folder under runs/ and return its path; two processes never get the same one."""
    from datetime import datetime

    methods = "+".join(config.plugins)[:80] or "finetuning"
    scenario = re.sub(r"[/:]+", "-", config.scenario.name)[-80:]  # which may be a path
    name = f"{scenario}-{methods}-{config.run.seed}-{datetime.now():%Y%m%d-%H%M%S}".replace(":", "-")
    for count in itertools.count(1):
        folder = Path("runs", name if count == 1 else f"{name}-{count}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def _show_run(work: Callable[[Sequence[Listener]], Results], quiet: bool, json: bool) -> None:
    """Do the work of a run, show its progress, and print its results."""
    from clframe.cli.live import Live

    with Live(quiet) as live:
        finished = work([live])
    show.results(finished, json)
