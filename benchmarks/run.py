"""All benchmarks, and the page of their results.

    python benchmarks/run.py short          what `make bench` runs: at most 20 minutes
    python benchmarks/run.py full           what `make bench-full` runs: hours with a cold cache; stop it, it goes on
    python benchmarks/run.py campaigns      kills, faults of system calls, flipped bits and hostile inputs
    python benchmarks/run.py page           RESULTS.md again, from what was measured before

`short` measures speed; `--only` picks parts, and the part `replay` runs only so. `full` runs the protocols of
`protocols/index.yaml`, one row per protocol, seed and version of the code in `rows.jsonl`, skips rows that are there,
and then runs the campaigns and `replay`. All end with the page, which `full` also renews after each protocol.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import report

HERE = Path(__file__).resolve().parent
PROTOCOLS = HERE / "protocols"
ROWS = HERE / "rows.jsonl"
PAGE = HERE / "RESULTS.md"
LONG = ("replay",)  # parts of `short` that run only when they are named, or in `full`
CAMPAIGNS = {"kill_resume": 50, "faults": 1_000, "kills": 1_000, "flips": 200, "hostile": 10_000}  # how many of each
Measured = tuple[list[dict[str, Any]], list[str]]


def read_index() -> list[dict[str, Any]]:
    """Return the entries of `protocols/index.yaml`."""
    from clframe.strict_yaml import parse_yaml

    path = PROTOCOLS / "index.yaml"
    entries: list[dict[str, Any]] = parse_yaml(path.read_text(encoding="utf-8"), str(path))["protocols"]
    return entries


def wanted(index: Sequence[Mapping[str, Any]], code: str) -> list[report.Row]:
    """Return what all rows of the index would be called; the first seed of each protocol comes first."""
    rows = [
        {"protocol": entry["name"], "config": report.digest(_file(entry)), "seed": seed, "code": code}
        for entry in index
        for seed in range(entry["seeds"])
    ]
    return sorted(rows, key=lambda row: row["seed"] > 0)


def run_protocol(entry: Mapping[str, Any], seed: int, data_root: Path) -> tuple[float, float]:
    """Return the measure of one run of a protocol, as a fraction, and the run's seconds."""
    from clframe.api import run_config
    from clframe.config import resolve

    config = resolve(
        yaml_file=_file(entry), run={"seed": seed, "data_root": str(data_root), "tensorboard": False, "output": None}
    )
    start = time.perf_counter()
    results = run_config(config)
    value = results.measures[entry["reading"]][entry["measure"]]
    if value is None:
        raise ValueError(f"{entry['name']}: the run has no {entry['measure']}")
    return value, time.perf_counter() - start


def _file(entry: Mapping[str, Any]) -> Path:
    return PROTOCOLS / f"{entry['name']}.yaml"


def write_page() -> None:
    """RESULTS.md, whole or not at all."""
    parts = report.load_parts(HERE / "results")
    text = report.page(parts, read_index(), report.read_rows(ROWS), report.code_version()[0])
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


def full(data_root: Path, only: Sequence[str], campaigns: Sequence[str] = ()) -> None:
    """Run the protocols, row by row, then the campaigns."""
    index = {entry["name"]: entry for entry in read_index()}
    code, commit = report.code_version()
    rows = report.read_rows(ROWS)
    for row in report.missing(rows, wanted(list(index.values()), code)):
        entry = index[row["protocol"]]
        if only and entry["name"] not in only:
            continue
        if lacking := _lacking(entry["needs"], data_root):
            print(f"{entry['name']}: skipped, as {lacking}")
            continue
        value, seconds = run_protocol(entry, row["seed"], data_root)
        about = {"commit": commit, "machine": report.machine(), "versions": report.versions()}
        measured = {"value": value, "seconds": round(seconds, 2), "date": datetime.date.today().isoformat()}
        report.append_row(ROWS, {**row, **measured, **about})
        print(f"{entry['name']}, seed {row['seed']}: {100 * value:.2f} in {seconds:.0f} s", flush=True)
    write_page()
    print(report.table(report.protocol_table(list(index.values()), report.read_rows(ROWS), code)))
    for name in campaigns if not only else ():
        if report.load_parts(HERE / "results").get(name, {}).get("code") != code:
            run_campaign(name)
    if not only and report.load_parts(HERE / "results").get("replay", {}).get("code") != code:
        short(data_root, 9, LONG)


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
    parser.add_argument("--only", nargs="+", default=[], help="parts of `short`, protocols, or campaigns")
    given = parser.parse_args()
    root = data_root(given.data_root)
    if given.what == "short":
        short(root, given.repetitions, given.only)
    elif given.what == "full":
        full(root, given.only, list(CAMPAIGNS))
    elif given.what == "campaigns":
        for name in [name for name in CAMPAIGNS if name in (given.only or CAMPAIGNS)]:
            run_campaign(name)
    else:
        write_page()


if __name__ == "__main__":
    main()
