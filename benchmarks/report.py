"""What all benchmarks share: measured figures, where they are kept, and the page RESULTS.md built from them."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CODE = ("clframe", "plugins", "scenarios")  # what can change a figure of a protocol
PACKAGES = ("torch", "numpy", "scipy", "pluggy", "safetensors", "tensorboard", "optuna", "distributed", "avalanche-lib")

Row = dict[str, Any]


# Records of protocols: one per protocol, with the value of each seed.


def read_records(path: Path) -> dict[str, Row]:
    """Return the records in a file of JSON lines, by the name of the protocol; {} if there is no file."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["protocol"]: record for record in records}


def keep_records(path: Path, measured: Iterable[Row]) -> None:
    """Put the records `measured` into the file, in place of those of the same protocols, whole or not at all.

    A record that has the same code and values as the one in the file leaves that one, with its date, where it is.
    """
    records = read_records(path)
    for record in measured:
        before = records.get(record["protocol"], {})
        if any(before.get(key) != record[key] for key in ("code", "values")):
            records[record["protocol"]] = record
    temporary = path.with_suffix(".tmp")
    lines = [json.dumps(records[name], sort_keys=True) + "\n" for name in sorted(records)]
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


# Figures.


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard error of the mean (nan for one value), least, greatest and number of `values`."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {
        "mean": statistics.fmean(values),
        "sem": spread,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def verdict(figures: Mapping[str, float], low: float, high: float) -> str:
    """Return ``pass`` if the mean lies in [low, high], else ``FAIL``."""
    return "pass" if low <= figures["mean"] <= high else "FAIL"


def protocol_table(index: Mapping[str, Row], records: Mapping[str, Row]) -> list[Row]:
    """Return one line per protocol that has a record, in the order of `index`: figures in percent beside the range."""
    lines = []
    for name, entry in index.items():
        if name not in records:
            continue
        record = records[name]
        figures = summary([100 * value for value in record["values"]])
        lines.append(
            {
                "protocol": name,
                "mean": f"{figures['mean']:.2f}",
                "SEM": "-" if math.isnan(figures["sem"]) else f"{figures['sem']:.2f}",
                "min": f"{figures['min']:.2f}",
                "max": f"{figures['max']:.2f}",
                "seeds": f"{figures['n']:.0f}",
                "expected": f"{entry['expected']:g} [{entry['low']:g}, {entry['high']:g}]",
                "result": verdict(figures, entry["low"], entry["high"]),
                "seconds": f"{record['seconds']:.0f}",
                "code": record["code"],
            }
        )
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with the keys of the first line as its columns; '' without lines."""
    if not lines:
        return ""
    columns = list(dict.fromkeys(name for line in lines for name in line))

    def cell(value: object) -> str:
        if value is None:
            return "-"
        text = f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)
        return text.replace("|", "\\|")

    body = [[cell(line.get(name)) for name in columns] for line in lines]
    numeric = [all(_is_number(row[i]) for row in body) for i in range(len(columns))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, rule, *body])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == "-"
    return True


# Where and with what a figure was measured.


def machine() -> str:
    """Processor, cores, memory and operating system, without names of hosts, users or folders."""
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        memory = f", {gib:.0f} GiB of memory"
    return f"{processor}, {os.cpu_count()} cores{memory}, {platform.system()}"


def versions() -> str:
    """Python and the packages that matter, those that are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def digest(*paths: Path) -> str:
    """Twelve hexadecimal digits of the contents of files and of the Python files in folders, by relative name."""
    sha = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            sha.update(file.relative_to(path.parent).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return sha.hexdigest()[:12]


def code_version(root: Path = ROOT) -> tuple[str, str]:
    """Return the version of the code that decides figures, as a digest of its files and as git describes it.

    The digest is the same before and after a commit, and differs between two states that are both merely `dirty`. git's
    name is for the reader.
    """
    return digest(*(root / folder for folder in CODE)), _described(root)


def _described(root: Path) -> str:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("log", "-1", "--format=%h", "--", *CODE)
    if not commit:
        return "not in git"
    return commit + ("+dirty" if git("status", "--porcelain", "--", *CODE) else "")


# Parts, and the page that holds them all.


def save_part(
    name: str, lines: Sequence[Mapping[str, Any]], command: str, notes: Sequence[str] = (), folder: Path | None = None
) -> None:
    """Keep one part of RESULTS.md, replacing what was measured before, whole or not at all."""
    folder = folder or HERE / "results"
    folder.mkdir(exist_ok=True)
    code, commit = code_version()
    part = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "code": code,
        "commit": commit,
        "notes": list(notes),
        "lines": [dict(line) for line in lines],
    }
    temporary = folder / f"{name}.json.tmp"
    temporary.write_text(json.dumps(part, indent=1) + "\n")
    os.replace(temporary, folder / f"{name}.json")


def load_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the parts measured so far, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


TITLES = {
    "avalanche": "Split-MNIST beside Avalanche and a hand-written loop",
    "replay": "Split-MNIST with methods that replay, beside Avalanche's",
    "method_cost": "Cost of a training step, by method, beside Avalanche",
    "fisher_cost": "Cost of importance per sample",
    "growth": "Training time and memory from 5 to 50 experiences",
    "hook_cost": "Cost of the hooks",
    "evaluation_cost": "Cost of evaluations while learning",
    "start_cost": "What a command takes before it does anything",
    "streaming": "Images read from files while others are trained on",
    "gated_inference": "A gated network for one task, without the channels that never open",
    "defaults": "Every method with its name alone, beside fine-tuning",
    "icarl_cifar": "iCaRL beside experience replay on CIFAR-10",
    "kill_resume": "Killed at random moments, then resumed",
    "faults": "Faults at system calls, then resumed",
    "kills": "Killed at system calls and at random moments, then resumed",
    "flips": "Flipped bits in the files of a run folder",
    "hostile": "Generated hostile inputs",
    "interval_coverage": "How often intervals of a mean difference hold the true one",
    "tuning_cost": "What it costs to choose hyper-parameters without looking ahead",
}

INTRODUCTION = """\
# Results

Written by `make bench` (the short set) and `make bench-full` (all protocols); each part says how and when it was
measured. Figures of a part are replaced when it is measured again, the others stay."""

PROTOCOLS = """\
Each line is a method of a study in `benchmarks/protocols/`, as `STUDY/METHOD`. `make bench-full` carries out the
studies by `clframe compare`, `python benchmarks/run.py full --only STUDY/METHOD` the runs of one line. A seed
decides class order, initial weights and batches. Accuracies are final average accuracies in percent (of CIFAR-100,
average incremental ones) in the evaluation mode of the setting. `expected` is a published or measured figure with
the range that the mean over seeds must lie in; its source stands in `protocols/index.yaml`. `seconds` are of
learning, a mean over seeds."""


def page(parts: Mapping[str, Mapping[str, Any]], index: Mapping[str, Row], records: Mapping[str, Row]) -> str:
    """Return the text of RESULTS.md: every part that there is, then the table of protocols."""
    sections = [INTRODUCTION]
    for name in [*(n for n in TITLES if n in parts), *(n for n in parts if n not in TITLES)]:
        part = parts[name]
        sections.append(
            f"## {TITLES.get(name, name)}\n\n"
            f"`{part['command']}`, {part['date']}, code {part['code']} ({part['commit']})  "
        )
        sections[-1] += f"\n{part['machine']}  \n{part['versions']}"
        if part["lines"]:
            sections.append(table(part["lines"]))
        if part["notes"]:
            sections.append("\n".join(f"- {note}" for note in part["notes"]))
    lines = protocol_table(index, records)
    if lines:
        used = [records[line["protocol"]] for line in lines]
        where = sorted({(record["machine"], record["versions"]) for record in used})
        commits = sorted({f"{record['code']} ({record['commit']})" for record in used})
        dates = sorted(record["date"] for record in used)
        about = [f"{dates[0]} to {dates[-1]}; code {', '.join(commits)}", *(f"{m}  \n{v}" for m, v in where)]
        sections += ["## Protocols\n\n" + PROTOCOLS, "  \n".join(about), table(lines)]
    return "\n\n".join(sections) + "\n"
