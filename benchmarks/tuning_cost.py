"""What it costs to choose hyper-parameters without looking ahead: three protocols side by side, on three scenarios.

    python benchmarks/tuning_cost.py [--seeds N] [--trials N] [--output FOLDER]

Each method is tuned by `first-2`, by `per-experience`, and by `end-of-stream`, the oracle, which sees validation images
of later experiences; no protocol sees a test image. `accuracy` is the mean final average accuracy of the seeds on test
images, in percent, with Student's 95 % interval in `interval`; `to the oracle` is the mean difference of the pairs,
`p` that of the exact sign-flip test, and `chosen` the values (by `per-experience`, those of the last experience).
The study is a folder, so the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from clframe.experiments import statistics
from clframe.experiments.folder import read_study
from clframe.experiments.outcome import StudyOutcome

SCENARIOS = ("split-digits", "permuted-digits", "rotated-digits")
METHODS = ("ewc", "lwf", "si", "der")
PROTOCOLS = ("first-2", "per-experience", "end-of-stream")
SEEDS = 8
TRIALS = 20  # of each tuning; of each step of `per-experience`, the default


def carry_out(folder: Path, seeds: int, trials: int | None) -> None:
    """Carry out the study, or what is left of it."""
    asked = [part for name in SCENARIOS for part in ("--scenario", name)]
    asked += [part for name in METHODS for part in ("--method", name)]
    asked += [part for name in PROTOCOLS for part in ("--tuned", name)]
    asked += ["--seeds", str(seeds), "--no-baselines", "--set", "train.iterations=200", "--output", str(folder)]
    asked += ["--trials", str(trials)] if trials else []
    command = Path(sysconfig.get_path("scripts")) / "clframe"
    subprocess.run([command, "compare", *asked], check=True, stdout=subprocess.DEVNULL)


def measure(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines of the table of a finished study, and a note on each scenario."""
    outcome = read_study(folder)
    lines, notes = [], []
    for scenario in SCENARIOS:
        costs = []
        for method in METHODS:
            for protocol in PROTOCOLS:
                line, cost = compare(outcome, scenario, method, protocol)
                lines.append(line)
                costs += [] if cost is None else [cost]
        mean = sum(costs) / len(costs)
        notes.append(f"On `{scenario}` the protocols without an oracle are {mean:+.1f} points from it on average.")
    return lines, notes


def compare(outcome: StudyOutcome, scenario: str, method: str, protocol: str) -> tuple[dict[str, Any], float | None]:
    """Return the line of a method that was tuned by `protocol`, and its mean difference to the oracle, in points."""
    oracle = f"{method}[{PROTOCOLS[-1]} (oracle)]"
    name = oracle if protocol == PROTOCOLS[-1] else f"{method}[{protocol}]"
    mode = outcome.modes(scenario)[0]
    figures = [outcome.values(scenario, label, "average_accuracy", mode) for label in (name, oracle)]
    mean = outcome.mean(scenario, name, "average_accuracy", mode)
    pair = None if name == oracle else statistics.compare(figures[0], figures[1])
    run = outcome.cells(scenario, name)[0].config.run
    chosen = run.per_experience[-1] if run.per_experience else (run.tuned or {})["chosen"]
    low, high = mean.interval or (float("nan"), float("nan"))
    line = {
        "scenario": scenario,
        "method": method,
        "protocol": "end-of-stream (oracle)" if name == oracle else protocol,
        "accuracy": f"{100 * (mean.value or 0):.1f}",
        "interval": f"{100 * low:.1f} to {100 * high:.1f}",
        "to the oracle": "" if pair is None or pair.mean is None else f"{100 * pair.mean:+.1f}",
        "p": "" if pair is None else f"{pair.p:.3g}",
        "chosen": ", ".join(f"{option}={value:g}" for option, value in chosen.items()),
    }
    return line, None if pair is None or pair.mean is None else 100 * pair.mean


def main() -> None:
    """Print the table; with the full numbers of seeds and trials, put it into the page of results, too."""
    import report
    import run

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--trials", type=int, help=f"of each tuning; by default those of clframe, which are {TRIALS}")
    parser.add_argument("--output", type=Path, default=Path("runs/tuning-cost"))
    options = parser.parse_args()
    carry_out(options.output, options.seeds, options.trials)
    lines, notes = measure(options.output)
    print(report.table(lines))
    for note in notes:
        print(f"- {note}")
    if options.seeds == SEEDS and options.trials is None:
        report.save_part("tuning_cost", lines, "python benchmarks/tuning_cost.py", notes)
        run.write_page()
    print(f"Study: {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
