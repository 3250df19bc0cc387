"""Every method with its name alone, beside plain fine-tuning, on the built-in scenarios of digits that it serves.

    python benchmarks/defaults.py [--seeds N] [--methods NAME ...]

No option is set: what a run says when a user only names the method. A network that a method cannot work on is replaced
by `cnn-small`, for fine-tuning as well. What is printed goes into the page of results, unless methods are chosen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

SCENARIOS = (("split-digits", "task"), ("split-digits", "class"), ("permuted-digits", "domain"))
NETWORKS = (None, "cnn-small")  # of the scenario; with convolutions and batch norms
FINE_TUNING = "fine-tuning"


def one(method: str, scenario: str, setting: str, network: str | None, seed: int) -> tuple[float, int] | None:
    """Return the final average accuracy in percent and the number of messages; None where the run is refused."""
    import clframe
    from clframe.errors import WrongUse

    messages: list[dict[str, Any]] = []
    try:
        results = clframe.run(
            {"name": scenario, "setting": setting},
            network,
            [] if method == FINE_TUNING else [method],
            run={"seed": seed, "predictions": False},
            listeners=[lambda record: messages.append(record) if record["kind"] == "message" else None],
        )
    except WrongUse:
        return None
    value = results.measures[setting]["average_accuracy"]
    assert value is not None
    return 100 * value, len(messages)


def measure(seeds: int, methods: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a line for each method, scenario and setting, and notes on those below fine-tuning or with messages."""
    lines: list[dict[str, Any]] = []
    notes: list[str] = []
    plain: dict[tuple[str, str, str | None], list[float]] = {}

    def figures(method: str, scenario: str, setting: str, network: str | None) -> tuple[list[float], int] | None:
        found = []
        for seed in range(seeds):
            outcome = one(method, scenario, setting, network, seed)
            if outcome is None:
                return None
            found.append(outcome)
            print(f"{method}, {scenario}, {setting}, seed {seed}: {outcome[0]:.1f}", file=sys.stderr, flush=True)
        return [value for value, _ in found], sum(count for _, count in found)

    for method in methods:
        for scenario, setting in SCENARIOS:
            for network in NETWORKS:
                if (outcome := figures(method, scenario, setting, network)) is None:
                    continue
                place = scenario, setting, network
                if place not in plain:
                    alone = figures(FINE_TUNING, *place)
                    assert alone is not None  # fine-tuning serves every setting
                    plain[place] = alone[0]
                values, messages = outcome
                gaps = [a - b for a, b in zip(values, plain[place], strict=True)]
                lines.append(
                    {
                        "method": method,
                        "scenario": scenario,
                        "setting": setting,
                        "network": network or "the scenario's",
                        "average accuracy, %": f"{statistics.mean(values):.1f}",
                        "fine-tuning": f"{statistics.mean(plain[place]):.1f}",
                        "difference": f"{statistics.mean(gaps):+.1f}",
                        "messages": messages,
                    }
                )
                if statistics.mean(gaps) < 0:
                    notes.append(f"`{method}` is below fine-tuning on {scenario}, {setting}: see its page.")
                break
    return lines, [*notes, f"Means over {seeds} seeds, which decide initial weights and batches."]


def main() -> None:
    """Run the methods that the command line names, or all."""
    import report

    from clframe import registry

    every = [
        name
        for name in registry.names("plugin")
        if not (registry.plugin_class(name).observer or registry.plugin_class(name).variants)
    ]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
    given = parser.parse_args()
    lines, notes = measure(given.seeds, given.methods)
    if given.methods == every and given.seeds == 5:
        report.save_part("defaults", lines, "python benchmarks/defaults.py", notes)
    print(report.table(lines))
    for note in notes:
        print(f"- {note}")


if __name__ == "__main__":
    main()
