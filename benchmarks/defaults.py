"""Every method with its name alone, beside plain fine-tuning, on the built-in scenarios of digits that it serves.

    python benchmarks/defaults.py [--seeds N] [--methods NAME ...]

No option is set: what a run says when a user only names the method. A network that a method cannot work on is replaced
by `cnn-small`, for fine-tuning as well. Over five seeds the lines of the chosen methods go into the page of results.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

SCENARIOS = (("split-digits", "task"), ("split-digits", "class"), ("permuted-digits", "domain"))
NETWORKS = (None, "cnn-small")  # of the scenario; with convolutions and batch norms
FINE_TUNING = "fine-tuning"
SEEDS = 5
Tried = tuple[str | None, list[float], int] | None


def one(method: str, scenario: str, setting: str, network: str | None, seed: int) -> tuple[float, int] | None:
    """Return the final average accuracy in percent and the number of messages; None where the run is refused."""
    import clframe
    from clframe.errors import UsageError

    messages: list[dict[str, Any]] = []
    try:
        results = clframe.run(
            {"name": scenario, "setting": setting},
            network,
            [] if method == FINE_TUNING else [method],
            run={"seed": seed, "predictions": False},
            listeners=[lambda record: messages.append(record) if record["kind"] == "message" else None],
        )
    except UsageError:
        return None
    value = results.measures[setting]["average_accuracy"]
    assert value is not None
    return 100 * value, len(messages)


def tried(method: str, scenario: str, setting: str, seeds: int, networks: Sequence[str | None] = NETWORKS) -> Tried:
    """Return the first of `networks` that the method can work on, its figures, and the number of messages."""
    import torch

    torch.set_num_threads(1)
    for network in networks:
        found = []
        for seed in range(seeds):
            if (outcome := one(method, scenario, setting, network, seed)) is None:
                break
            found.append(outcome)
            print(f"{method}, {scenario}, {setting}, seed {seed}: {outcome[0]:.1f}", file=sys.stderr, flush=True)
        if found:
            return network, [value for value, _ in found], sum(count for _, count in found)
    return None


def measure(seeds: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return a line for each method, scenario and setting that it serves."""
    lines = []
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        asked = [(method, *place) for method in methods for place in SCENARIOS]
        found = dict(zip(asked, pool.map(tried, *zip(*asked, strict=True), [seeds] * len(asked)), strict=True))
        places = {(scenario, setting, it[0]) for (_, scenario, setting), it in found.items() if it}
        alone = {place: pool.submit(tried, FINE_TUNING, *place[:2], seeds, [place[2]]) for place in places}
        for (method, scenario, setting), outcome in found.items():
            if outcome is None:
                continue
            network, values, messages = outcome
            fine_tuning = alone[scenario, setting, network].result()
            assert fine_tuning is not None  # which serves every setting
            gaps = [a - b for a, b in zip(values, fine_tuning[1], strict=True)]
            lines.append(
                {
                    "method": method,
                    "scenario": scenario,
                    "setting": setting,
                    "network": network or "the scenario's",
                    "average accuracy, %": f"{statistics.mean(values):.1f}",
                    "fine-tuning": f"{statistics.mean(fine_tuning[1]):.1f}",
                    "difference": f"{statistics.mean(gaps):+.1f}",
                    "messages": messages,
                }
            )
    return lines


def main() -> None:
    """Run the methods that the command line names, or all, and renew their lines of the page of results."""
    import report

    from clframe import registry

    every = [
        name
        for name in registry.names("plugin")
        if not (registry.plugin_class(name).observer or registry.plugin_class(name).variants)
    ]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
    given = parser.parse_args()
    lines = measure(given.seeds, given.methods)
    if given.seeds == SEEDS:
        before = report.load_parts(report.HERE / "results").get("defaults", {"lines": []})["lines"]
        lines += [line for line in before if line["method"] not in given.methods]
        lines.sort(key=lambda line: every.index(line["method"]))
        below = [line for line in lines if float(line["difference"]) < 0]
        notes = [f"`{line['method']}` is below fine-tuning on {line['scenario']}, {line['setting']}." for line in below]
        notes.append(
            f"Means over {SEEDS} seeds, which decide initial weights and batches; a page says why a method is below."
        )
        report.save_part("defaults", lines, "python benchmarks/defaults.py", notes)
    print(report.table(lines))


if __name__ == "__main__":
    main()
