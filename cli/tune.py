"""The command `tune`: options of methods are chosen on validation images, by a protocol that cannot peek."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clframe.cli import show
from clframe.cli.parameters import Engine, Json, Methods, Model, Quiet, StudySets, complete, whole_number
from clframe.errors import Interrupted, UsageError
from clframe.system.reading import expand_home, quote_path

if TYPE_CHECKING:
    from clframe.experiments.plan import Refused
    from clframe.experiments.study import Study
    from clframe.experiments.trials import Chosen, Tuning
    from clframe.experiments.tuning import Effort

TUNING = "tuning.yaml"  # the file of a tuning in its folder
FOLDER = "tuning"  # the folder of the tunings of a study, in that of the study
PROTOCOL = "first-K|per-experience|other-scenario:NAME|end-of-stream"


def tune(
    folder: Annotated[str | None, typer.Argument(metavar="[FOLDER]", help="Folder of a tuning to go on with.")] = None,
    scenario: Annotated[
        str | None,
        typer.Option(
            "--scenario", "-s", metavar="NAME", help="Scenario to learn.", autocompletion=complete("scenario")
        ),
    ] = None,
    method: Methods = None,
    model: Model = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            metavar=PROTOCOL,
            help="What the choice may look at; repeatable. first-K: the first K experiences; per-experience: each when "
            "it comes; other-scenario: that one; end-of-stream: all, which is an oracle [default: first-2].",
            show_default=False,
        ),
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A.B=RANGE",
            help="Range of an option, such as er.size=[10,1000,log]; false leaves the option out; repeatable.",
        ),
    ] = None,
    trials: Annotated[
        int | None, whole_number("Values to try [default: 20; by per-experience at most 8 for each step].")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N|FIRST-LAST", help="Seeds of each trial [default: 1].")] = None,
    set_: StudySets = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="STUDY.yaml", help="File of a study with methods to tune.")
    ] = None,
    workers: Annotated[int | None, whole_number("Trials at a time [default: one for each CPU core].")] = None,
    engine: Engine = "local",
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of the tuning [default: a new one under runs/].")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose options of methods on validation images, and write them to files for `run` and `compare`.

    Test images, and experiences that the protocol keeps from the choice, are not given to any trial. Repeating the
    command goes on where it was stopped, to the same choice.
    """
    from clframe.experiments.folder import lock_study
    from clframe.experiments.study import Study
    from clframe.experiments.tuning import tunings_of
    from clframe.experiments.workers import check_device
    from clframe.system.writing import write_text

    asked = _read_flags(scenario, method, model, protocol, search, trials, seeds, set_)
    check_engine(engine, workers)
    if folder is not None and output is not None:
        raise UsageError(f"The tuning has two folders, {quote_path(folder)} and `--output {output}`: name one.")
    if folder is not None:
        path = expand_home(folder)
        study = read_tuning(path).extended(asked)
    else:
        study = Study.from_yaml(config).extended(asked) if config is not None else Study.from_data(asked)
        if not study.tuning.get("protocols"):
            study = study.extended({"tuning": {"protocols": ["first-2"]}})
        path = _new_folder(study) if output is None else expand_home(output)
        _check_new(path, study)
    check_device(study.device, engine)
    tunings = tunings_of(study)
    if not tunings:
        raise UsageError("There is nothing to tune, as all methods are tuned: name one with `--method`.")
    with lock_study(path):
        from clframe.strict_yaml import dump_yaml

        write_text(path / TUNING, dump_yaml(study.written()))
        chosen = carry_out(tunings, path, engine, workers, quiet, f"clframe tune {path}")
    _print_chosen(chosen, path, json)


def tune_study(
    study: Study, path: Path, refused: Sequence[Refused], engine: str, workers: int | None, quiet: bool
) -> Study:
    """Tune the methods of a study before they are compared, and return the study with what was chosen.

    Args:
        study: what is asked for.
        path: the folder of the study, in which the tunings have one of their own.
        refused: methods that cannot learn a scenario, which are not tuned for it.
        engine: as of `compare`.
        workers: likewise.
        quiet: show no progress.

    Raises:
        ClframeError: as `clframe.experiments.tuning.choose`.
    """
    from clframe.experiments.tuning import with_tuned

    tunings = _tunings_without(study, refused)
    folder = path / FOLDER
    folder.mkdir(exist_ok=True)
    return with_tuned(study, carry_out(tunings, folder, engine, workers, quiet, f"clframe compare {path}"))


def list_efforts(study: Study, path: Path, refused: Sequence[Refused]) -> list[tuple[Effort, bool]]:
    """Return the work of each tuning with which `tune_study` would begin, and whether it has ended. Raises likewise."""
    from clframe.experiments.tuning import estimate_effort

    efforts = estimate_effort(_tunings_without(study, refused), path / FOLDER)
    return [(effort, (path / FOLDER / f"{effort.tuning.name}.yaml").is_file()) for effort in efforts]


def _tunings_without(study: Study, refused: Sequence[Refused]) -> list[Tuning]:
    """Return the tunings of a study, but for methods that cannot learn a scenario."""
    from clframe.experiments.tuning import tunings_of

    without = {(one.method, one.scenario) for one in refused}
    return [tuning for tuning in tunings_of(study) if (tuning.method.name, tuning.label) not in without]


def check_engine(engine: str, workers: int | None) -> None:
    """Raise `UsageError` if there is no such engine, or the number of workers is below 1."""
    from clframe.experiments.workers import read_engine

    read_engine(engine)
    if workers is not None and workers < 1:
        raise UsageError(f"`--workers` is {workers}; it must be 1 or more.")


def carry_out(
    tunings: Sequence[Tuning], folder: Path, engine: str, workers: int | None, quiet: bool, command: str
) -> list[Chosen]:
    """Carry out tunings in a folder, show their progress, and return what was chosen.

    Raises:
        Interrupted: with `command`, which goes on.
        ClframeError: as `clframe.experiments.tuning.choose`.
    """
    from clframe.experiments.cells import CellEvent
    from clframe.experiments.children import share_cores
    from clframe.experiments.tuning import choose
    from clframe.experiments.workers import open_engine

    def tell(event: CellEvent) -> None:
        if event.kind == "failed" and event.cell:
            show.note(f"{event.cell.identity} failed: {event.text}")
        elif event.kind == "message" and event.text:
            show.note(event.text)

    def say(text: str) -> None:
        if not quiet:
            show.note(text)

    try:
        with open_engine(engine, workers or share_cores(1), tell) as run:
            return choose(tunings, folder, run, say)
    except Interrupted as error:
        raise Interrupted(
            f"The tuning was stopped, and trials under way are saved: `{command}` goes on.", error.signal
        ) from error
    except KeyboardInterrupt:
        show.note(f"`{command}` goes on with the tuning.")
        raise


def read_tuning(folder: Path) -> Study:
    """Return what the tuning in `folder` was asked for. Raises `UsageError` if there is none."""
    from clframe.experiments.study import Study

    if not (folder / TUNING).is_file():
        raise UsageError(f"{quote_path(folder)} is not the folder of a tuning, as it has no {TUNING}: name another.")
    return Study.from_yaml(folder / TUNING)


def _check_new(path: Path, study: Study) -> None:
    """Refuse a folder that a new tuning cannot have. Raises `UsageError` with the differences to the tuning there."""
    from clframe.runs.files import LOCK

    if not path.exists():
        return
    if not path.is_dir() or (not (path / TUNING).is_file() and {file.name for file in path.iterdir()} - {LOCK}):
        raise UsageError(
            f"The folder {quote_path(path)} is not empty, and is not that of a tuning: name another with `--output`."
        )
    if (path / TUNING).is_file() and (different := study.differences(read_tuning(path))):
        raise UsageError(
            f"{quote_path(path)} holds another tuning: {'; '.join(different)}; go on with that one by `clframe tune "
            f"{path}`, or name another folder with `--output`."
        )


def _read_flags(
    scenario: str | None,
    method: list[str] | None,
    model: str | None,
    protocol: list[str] | None,
    search: list[str] | None,
    trials: int | None,
    seeds: str | None,
    sets: list[str] | None,
) -> dict[str, Any]:
    """Return what the options ask for in the form of a study file. Raises `UsageError`."""
    from clframe.config import parse_sets

    problems: list[str] = []
    tuning = {"protocols": protocol or None, "trials": trials, "seeds": seeds}
    named = [text if "=" in text else f"{text}=null" for text in search or ()]
    asked = {
        "scenarios": [scenario] if scenario else None,
        "methods": method or None,
        "model": model,
        "baselines": False if method else None,
        "set": join_names(parse_sets(sets or (), problems)),
        "search": join_names(parse_sets(named, problems)),
        "tuning": {key: value for key, value in tuning.items() if value is not None} or None,
    }
    if problems:
        raise UsageError(*problems)
    return {key: value for key, value in asked.items() if value is not None}


def join_names(sections: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return values by full name, given by section and option; None if there are none."""
    return {f"{section}.{name}": value for section, of in sections.items() for name, value in of.items()} or None


def _new_folder(study: Study) -> Path:
    """Return the path of a new folder under runs/."""
    names = "+".join(dict.fromkeys(re.sub(r"[/:]+", "-", s["name"])[-40:] for s in study.scenarios))[:80]
    stem = f"tuning-{names}-{datetime.now():%Y%m%d-%H%M%S}"
    path, count = Path("runs", stem), 1
    while path.exists():
        count += 1
        path = Path("runs", f"{stem}-{count}")
    return path


def _print_chosen(chosen: Sequence[Chosen], path: Path, json: bool) -> None:
    """Print what was chosen, and how to use it."""
    if json:
        show.document(
            {
                "folder": str(path),
                "chosen": [
                    {
                        "method": one.tuning.method.name,
                        "scenario": one.tuning.label,
                        "protocol": one.tuning.protocol.label,
                        "accuracy": one.accuracy,
                        "values": one.stamp["chosen"],
                        "per_experience": [dict(entry) for entry in one.per_experience],
                        "file": str(one.file),
                    }
                    for one in chosen
                ],
            }
        )
        return
    rows = []
    for one in chosen:
        entries = one.per_experience or (one.stamp["chosen"],)
        values = "; ".join(
            ", ".join(f"{name}={show.format_value(value)}" for name, value in entry.items()) or "as given"
            for entry in entries
        )
        tuning = one.tuning
        accuracy = show.format_percent(one.accuracy)
        rows.append([tuning.method.name, tuning.label, tuning.protocol.label, accuracy, values])
    show.table(["method", "scenario", "protocol", "held out, %", "chosen"], rows, numbers=True)
    for one in chosen:
        show.line(f"Chosen: {one.file}")
    show.line("`clframe run --config FILE` learns with what was chosen, `clframe compare --method FILE` compares it.")
