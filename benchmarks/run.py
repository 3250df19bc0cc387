"""All benchmarks, and the page of their results.

    python benchmarks/run.py short          what `make bench` runs: at most 20 minutes
    python benchmarks/run.py full           what `make bench-full` runs: hours with a cold cache; stop it, it goes on
    python benchmarks/run.py campaigns      kills, faults of system calls, flipped bits and hostile inputs
    python benchmarks/run.py page           RESULTS.md again, from what was measured before

`short` measures speed; `--only` picks parts, and the part `replay` runs only so. `full` carries out the studies in
`protocols/` by `clframe compare`, each in a folder of its own below `--output`, and keeps the figures of each method in
`results/protocols.jsonl`; `--only` picks studies, or single methods as `STUDY/METHOD`. Then it runs the campaigns and
`replay`. All end with the page, which `full` also renews after each study.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report

if TYPE_CHECKING:
    from clframe.experiments.study import Study

HERE = Path(__file__).resolve().parent
PROTOCOLS = HERE / "protocols"
RECORDS = HERE / "results" / "protocols.jsonl"
PAGE = HERE / "RESULTS.md"
LONG = ("replay",)  # parts of `short` that run only when they are named, or in `full`
CAMPAIGNS = {"kill_resume": 50, "faults": 1_000, "kills": 1_000, "flips": 200, "hostile": 10_000}  # how many of each
FAILED = 4  # exit code of `clframe compare` where a cell failed
BUNDLED = "digits"  # the data set that needs no file
Measured = tuple[list[dict[str, Any]], list[str]]


def read_index() -> dict[str, dict[str, Any]]:
    """Return what is expected of each protocol, as `protocols/index.yaml` has it, by its name."""
    from clframe.strict_yaml import parse_yaml

    path = PROTOCOLS / "index.yaml"
    entries: dict[str, dict[str, Any]] = parse_yaml(path.read_text(encoding="utf-8"), str(path))["protocols"]
    return {name: {"measure": "average_accuracy", **entry} for name, entry in entries.items()}


def choose_studies(names: Sequence[str], only: Sequence[str] = ()) -> dict[str, Study]:
    """Return the studies of the protocols `names`, those in `only` if it has any, each with the methods chosen.

    Args:
        names: of all protocols, `STUDY/METHOD`.
        only: names of studies or of protocols.

    Raises:
        ValueError: if `only` has a name that is neither.
    """
    from clframe.experiments.study import Study

    split = [tuple(name.split("/")) for name in names]
    if unknown := sorted({*only} - {*names} - {study for study, _ in split}):
        raise ValueError(f"There is no study or protocol {', '.join(unknown)}: {PROTOCOLS / 'index.yaml'} lists them.")
    chosen: dict[str, list[str]] = {}
    for study, method in split:
        if not only or study in only or f"{study}/{method}" in only:
            chosen.setdefault(study, []).append(method)
    studies = {study: Study.from_yaml(PROTOCOLS / f"{study}.yaml") for study in chosen}
    return {
        name: replace(study, methods=tuple(method for method in study.methods if method.name in chosen[name]))
        for name, study in studies.items()
    }


def carry_out(study: Study, folder: Path, data_root: Path, workers: int | None) -> int:
    """Carry out a study in `folder`, or what is left of it there; return the exit code of `clframe compare`.

    Cells of methods that were chosen before, or of another version of the study's file, stay in the folder and serve
    again when they are asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study.write(folder)
    return run_clframe("compare", str(folder), *(["--workers", str(workers)] if workers else []), data_root=data_root)


def run_clframe(*arguments: str, data_root: Path) -> int:
    """Run a command of clframe, and return its exit code; Ctrl-C is left to the command, which saves what it does."""
    from clframe.settings import DATA_ROOT

    command = [sys.executable, "-P", "-m", "clframe", *arguments]  # -P: not the checkout in the current folder
    with subprocess.Popen(command, env={**os.environ, DATA_ROOT: str(data_root)}) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def read_figures(name: str, folder: Path, index: Mapping[str, Mapping[str, Any]]) -> list[report.Row]:
    """Return the record of each method of a study, from its report; a method with an unfinished cell has none."""
    from clframe.experiments.report import read_outcome, report_study

    outcome = read_outcome([folder])
    unfinished = {cell.method for cell in outcome.unfinished}
    for method in sorted(unfinished):
        print(f"{name}/{method}: no figures are kept, as a cell is not finished")
    methods = [method for method in outcome.methods if method not in unfinished]
    if not methods:
        return []
    document = json.loads(report_study(outcome, "json"))
    code, commit = report.code_version()
    records = []
    for method in methods:
        cells = sorted((cell for cell in document["cells"] if cell["method"] == method), key=lambda cell: cell["seed"])
        measure, mode = index[f"{name}/{method}"]["measure"], document["scenarios"][0]["mode"]
        records.append(
            {
                "protocol": f"{name}/{method}",
                "values": [cell["measures"][mode][measure] for cell in cells],
                "seconds": round(sum(cell["seconds"] for cell in cells) / len(cells), 2),
                "code": code,
                "commit": commit,
                "date": datetime.date.today().isoformat(),
                "machine": report.machine(),
                "versions": report.versions(),
            }
        )
    return records


def write_page() -> None:
    """Write RESULTS.md, whole or not at all."""
    parts = report.load_parts(HERE / "results")
    text = report.page(parts, read_index(), report.read_records(RECORDS))
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, PAGE)


def short(data_root: Path, repetitions: int, only: Sequence[str]) -> None:
    """Return the parts that measure speed."""

    def avalanche() -> Measured:
        import avalanche_split_mnist

        return avalanche_split_mnist.measure(data_root, repetitions)

    def evaluation_cost() -> Measured:
        import evaluation_cost

        return evaluation_cost.measure(data_root, fewer)

    def fisher_cost() -> Measured:
        import fisher_cost

        return fisher_cost.measure(repetitions // 3)

    def growth() -> Measured:
        import growth

        return growth.measure(data_root)

    def hook_cost() -> Measured:
        import hook_cost

        return hook_cost.measure(fewer)

    def method_cost() -> Measured:
        import method_cost

        return method_cost.measure(data_root, fewer)

    def replay() -> Measured:
        import avalanche_split_mnist as bench

        lines, notes = bench.measure(data_root, repetitions // 3, bench.REPLAY, ("clframe", "avalanche"))
        return lines, [*notes, bench.herding_time()]

    def start_cost() -> Measured:
        import start_cost

        return start_cost.measure(repetitions)

    def streaming() -> Measured:
        import streaming

        return streaming.measure(repetitions // 3)

    fewer = repetitions // 2 + 1  # where they are many or long, so that all parts end within 20 minutes
    parts: dict[str, tuple[Callable[[], Measured], bool]] = {
        "hook_cost": (hook_cost, False),
        "evaluation_cost": (evaluation_cost, True),
        "fisher_cost": (fisher_cost, False),
        "growth": (growth, True),
        "method_cost": (method_cost, True),
        "start_cost": (start_cost, False),
        "streaming": (streaming, False),
        "avalanche": (avalanche, True),
        "replay": (replay, True),
    }
    for name, (measure, needs_mnist) in parts.items():
        if name not in only and (only or name in LONG):
            continue
        if lacking := _lacking("mnist" if needs_mnist else "", data_root):
            print(f"{name}: skipped, as {lacking}")
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        lines, notes = measure()
        report.save_part(name, lines, f"python benchmarks/run.py short --only {name}", notes)
        print(report.table(lines))
        for note in notes:
            print(f"- {note}")
        write_page()


def run_campaign(name: str) -> None:
    """Run one of the campaigns of `CAMPAIGNS`, and renew the page."""
    import campaigns
    import hostile
    import kill_resume

    measure: dict[str, Callable[[int], Measured]] = {"kill_resume": kill_resume.measure, "hostile": hostile.measure}
    count = CAMPAIGNS[name]
    lines, notes = measure[name](count) if name in measure else campaigns.measure(name, count)
    script = f"{name}.py {count}" if name in measure else f"campaigns.py {name} {count}"
    report.save_part(name, lines, f"python benchmarks/{script}", notes)
    print(report.table(lines))
    for note in notes:
        print(f"- {note}")
    write_page()


def full(
    data_root: Path, only: Sequence[str], output: Path, workers: int | None = None, campaigns: Sequence[str] = ()
) -> None:
    """Carry out the studies of the protocols and keep their figures, then run the campaigns.

    A study whose data are missing is left out with a sentence. Raises `SystemExit` where `clframe compare` ends with an
    error or is interrupted; the same command goes on.
    """
    index = read_index()
    failed = []
    for name, study in choose_studies(list(index), only).items():
        data = name.partition("-")[0]
        if lacking := _lacking("" if data == BUNDLED else data, data_root):
            print(f"{name}: skipped, as {lacking}")
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        code = carry_out(study, output / name, data_root, workers)
        if code not in (0, FAILED):
            raise SystemExit(code)
        if code == FAILED:
            failed.append(name)
        report.keep_records(RECORDS, read_figures(name, output / name, index))
        write_page()
    write_page()
    print(report.table(report.protocol_table(index, report.read_records(RECORDS))))
    version = report.code_version()[0]
    for name in campaigns if not only else ():
        if report.load_parts(HERE / "results").get(name, {}).get("code") != version:
            run_campaign(name)
    if not only and report.load_parts(HERE / "results").get("replay", {}).get("code") != version:
        short(data_root, 9, LONG)
    if failed:
        raise SystemExit(f"Cells failed in {', '.join(failed)}: `clframe compare` says why.")


def _lacking(data: str, data_root: Path) -> str:
    there = not data or (data_root / f"{data}.npz").is_file()
    return "" if there else f"there is no {data}.npz in {data_root}; name its folder with --data-root"


def main() -> None:
    """Run the command line."""
    from clframe.settings import data_root

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["short", "full", "campaigns", "page"])
    parser.add_argument(
        "--data-root", help="folder of mnist.npz and others (default: CLFRAME_DATA, else the user's cache)"
    )
    parser.add_argument("--repetitions", type=int, default=9, help="of the parts that compare times")
    parser.add_argument("--only", nargs="+", default=[], help="parts of `short`, studies, protocols, or campaigns")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/protocols"), help="folder of the studies of `full` [%(default)s]"
    )
    parser.add_argument("--workers", type=int, help="runs at a time of `full` (default: one for each CPU core)")
    given = parser.parse_args()
    root = data_root(given.data_root)
    if given.what == "short":
        short(root, given.repetitions, given.only)
    elif given.what == "full":
        try:
            full(root, given.only, given.output, given.workers, list(CAMPAIGNS))
        except ValueError as error:
            parser.error(str(error))
    elif given.what == "campaigns":
        for name in [name for name in CAMPAIGNS if name in (given.only or CAMPAIGNS)]:
            run_campaign(name)
    else:
        write_page()


if __name__ == "__main__":
    main()
