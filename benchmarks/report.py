"""What all benchmarks share: rows of measured figures, where they are kept, and the page RESULTS.md built from them."""

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
PACKAGES = ("torch", "numpy", "pluggy", "safetensors", "tensorboard", "avalanche-lib")

Row = dict[str, Any]


# Rows of protocols: one per protocol, seed and version of the code.


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file of JSON lines; a last line that a crash left incomplete is skipped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line in a single write, on a line of its own even if the file ends in half a line."""
    line = json.dumps(row, sort_keys=True) + "\n"
    with path.open("ab") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            line = "\n" + line
        os.write(file.fileno(), line.encode())
        os.fsync(file.fileno())


def key(row: Mapping[str, Any]) -> tuple[str, str, int, str]:
    """Return what makes a row: the protocol, the digest of its file, the seed, and the version of the code."""
    return row["protocol"], row["config"], row["seed"], row["code"]


def missing(rows: Iterable[Row], wanted: Iterable[Row]) -> list[Row]:
    """Return the wanted rows that are not among `rows` yet, in the order wanted, each once."""
    have = {key(row) for row in rows}
    left = {key(row): row for row in wanted if key(row) not in have}
    return list(left.values())


def latest(rows: Iterable[Row], code: str | None = None) -> list[Row]:
    """Of each protocol the rows of one version of code and file: of `code` if there are any, else the newest.

    A row that was measured twice counts as measured last.
    """
    chosen: dict[str, tuple[str, str]] = {}
    rows = list(rows)
    for row in rows:
        current = chosen.get(row["protocol"])
        if current is None or code is None or row["code"] == code or current[1] != code:
            chosen[row["protocol"]] = (row["config"], row["code"])
    unique = {key(row): row for row in rows if chosen[row["protocol"]] == (row["config"], row["code"])}
    return list(unique.values())


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


def verdict(figures: Mapping[str, float], low: float, high: float, seeds: int) -> str:
    """``pass`` if the mean lies in [low, high], ``FAIL`` if not, ``pass so far`` while seeds are missing."""
    if not low <= figures["mean"] <= high:
        return "FAIL"
    return "pass" if figures["n"] >= seeds else f"pass so far ({figures['n']:.0f} of {seeds} seeds)"


def protocol_table(index: Sequence[Mapping[str, Any]], rows: Iterable[Row], code: str | None = None) -> list[Row]:
    """One line per protocol that has rows, in the order of `index`: figures in percent beside what was expected."""
    grouped: dict[str, list[Row]] = {}
    for row in latest(rows, code):
        grouped.setdefault(row["protocol"], []).append(row)
    lines = []
    for entry in index:
        measured = grouped.get(entry["name"], [])
        if not measured:
            continue
        figures = summary([100 * row["value"] for row in measured])
        lines.append(
            {
                "protocol": entry["name"],
                "reading": entry["reading"],
                "mean": f"{figures['mean']:.2f}",
                "SEM": "-" if math.isnan(figures["sem"]) else f"{figures['sem']:.2f}",
                "min": f"{figures['min']:.2f}",
                "max": f"{figures['max']:.2f}",
                "seeds": f"{figures['n']:.0f}",
                "expected": f"{entry['expected']:g} [{entry['low']:g}, {entry['high']:g}]",
                "result": verdict(figures, entry["low"], entry["high"], entry["seeds"]),
                "seconds": f"{statistics.fmean(row['seconds'] for row in measured):.0f}",
                "code": measured[-1]["code"],
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

    The digest is what rows are kept by: it is the same before and after a commit, and differs between two states
    that are both merely `dirty`. git's name is for the reader.
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
Each line is one file of `benchmarks/protocols/`, run over several seeds with `make bench-full`; a seed decides class
order, initial weights and batches. Accuracies are final average accuracies in percent. `expected` is a published or
measured figure with the range that the mean over seeds must lie in; its source stands in `protocols/index.yaml`."""


def page(
    parts: Mapping[str, Mapping[str, Any]],
    index: Sequence[Mapping[str, Any]],
    rows: Iterable[Row],
    code: str | None = None,
) -> str:
    """RESULTS.md: every part that there is, then the table of protocols."""
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
    rows = list(rows)
    lines = protocol_table(index, rows, code)
    if lines:
        used = latest(rows, code)
        where = sorted({(row["machine"], row["versions"]) for row in used})
        commits = sorted({f"{row['code']} ({row['commit']})" for row in used})
        dates = sorted(row["date"] for row in used)
        about = [f"{dates[0]} to {dates[-1]}; code {', '.join(commits)}", *(f"{m}  \n{v}" for m, v in where)]
        sections += ["## Protocols\n\n" + PROTOCOLS, "  \n".join(about), table(lines)]
    return "\n\n".join(sections) + "\n"
