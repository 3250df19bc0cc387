"""What a command takes before it does anything: processor time and memory of commands that only look around.

    python benchmarks/start_cost.py

Each command runs in a process of its own, in turns with `python -c pass` and with the import of torch, which none of
them needs. `CPU s` and `least` are the median and the least of user and system time, imports included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

TARGET = 0.4  # seconds of processor time
COMMANDS = ("--version", "--help", "plugins list", "scenarios list")
# The peak is that of the process's own memory: ru_maxrss begins with that of the process which started it.
END = (
    "; import json, resource; used = resource.getrusage(resource.RUSAGE_SELF); "
    "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')); "
    "print(json.dumps([used.ru_utime + used.ru_stime, int(peak) / 1024]), file=sys.stderr)"
)


def _program(command: str) -> str:
    if command in COMMANDS:
        return f"import sys; from clframe.cli.main import main; main({command.split()!r})" + END
    return f"import sys; {command}" + END


def once(command: str) -> tuple[float, float]:
    """Seconds of the processor and MiB of a process that carries out `command`, of clframe or of Python."""
    done = subprocess.run([sys.executable, "-c", _program(command)], capture_output=True, text=True, check=True)
    seconds, mib = json.loads(done.stderr.splitlines()[-1])
    return seconds, mib


def measure(repetitions: int = 9) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of the table, and notes that compare them with the target."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ("pass", *COMMANDS, "import torch")}
    for _ in range(repetitions):
        for name, measured in runs.items():
            measured.append(once(name))
    lines, slow = [], []
    for name, measured in runs.items():
        seconds = [one[0] for one in measured]
        if name in COMMANDS and min(seconds) >= TARGET:
            slow.append(f"`clframe {name}`")
        lines.append(
            {
                "command": f"`clframe {name}`" if name in COMMANDS else f'`python -c "{name}"`',
                "CPU s": f"{statistics.median(seconds):.2f}",
                "least": f"{min(seconds):.2f}",
                "MiB": f"{max(one[1] for one in measured):.0f}",
            }
        )
    reached = f"missed by {', '.join(slow)}" if slow else "reached by all of them"
    return lines, [f"The least is under {TARGET} s: {reached}.", f"{repetitions} repetitions in turns."]


if __name__ == "__main__":
    from report import table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=9)
    lines, notes = measure(parser.parse_args().repetitions)
    print(table(lines))
    for note in notes:
        print(f"- {note}")
