"""Every method with its name alone, beside plain fine-tuning, on the built-in scenarios of digits that it serves.

    python benchmarks/defaults.py [--seeds N] [--methods NAME ...]

No option is set: what a run says when a user only names the method. A network that a method cannot work on is replaced
by `cnn-small`, for fine-tuning as well. The lines of each method go into the page of results as soon as its runs end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

SCENARIOS = (("split-digits", "task"), ("split-digits", "class"), ("permuted-digits", "domain"))
NETWORKS = (None, "cnn-small")  # of the scenario; with convolutions and batch norms
FINE_TUNING = "fine-tuning"
SEEDS = 5
Place = tuple[str, str]  # a scenario and a setting
Outcome = tuple[str | None, float, int]  # the network, the final average accuracy in percent, the number of messages


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


def try_networks(
    method: str, scenario: str, setting: str, seed: int, networks: Sequence[str | None] = NETWORKS
) -> Outcome | None:
    """Run the first of `networks` that the method can work on; None where every network is refused."""
    import torch

    torch.set_num_threads(1)
    for network in networks:
        if (found := one(method, scenario, setting, network, seed)) is not None:
            print(f"{method}, {scenario}, {setting}, seed {seed}: {found[0]:.1f}", file=sys.stderr, flush=True)
            return network, *found
    return None


def measure(seeds: int, methods: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines of one method after another: a line for each scenario and setting that it serves."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:

        def submit(
            method: str, place: Place, networks: Sequence[str | None] = NETWORKS
        ) -> list[Future[Outcome | None]]:
            return [pool.submit(try_networks, method, *place, seed, networks) for seed in range(seeds)]

        alone: dict[tuple[Place, str | None], list[Future[Outcome | None]]] = {}
        for method in methods:
            lines = []
            jobs = {place: submit(method, place) for place in SCENARIOS}
            for place, asked in jobs.items():
                outcomes = [found for job in asked if (found := job.result()) is not None]
                if not outcomes:
                    continue
                network = outcomes[0][0]
                if (place, network) not in alone:
                    alone[place, network] = submit(FINE_TUNING, place, [network])
                values = [value for _, value, _ in outcomes]
                rivals = [found[1] for job in alone[place, network] if (found := job.result()) is not None]
                gaps = [a - b for a, b in zip(values, rivals, strict=True)]
                lines.append(
                    {
                        "method": method,
                        "scenario": place[0],
                        "setting": place[1],
                        "network": network or "the scenario's",
                        "average accuracy, %": f"{statistics.mean(values):.1f}",
                        "fine-tuning": f"{statistics.mean(rivals):.1f}",
                        "difference": f"{statistics.mean(gaps):+.1f}",
                        "seeds": seeds,
                        "messages": sum(messages for _, _, messages in outcomes),
                    }
                )
            yield lines


def publish(lines: list[dict[str, Any]], every: Sequence[str]) -> None:
    """Put the lines of one method into the page of results, in place of those that it has there."""
    import report

    before = report.load_parts(report.HERE / "results").get("defaults", {"lines": []})["lines"]
    renewed = {line["method"] for line in lines}
    lines = [*lines, *(line for line in before if line["method"] not in renewed)]
    lines.sort(key=lambda line: every.index(line["method"]))
    below = [line for line in lines if float(line["difference"]) < 0]
    notes = [f"`{line['method']}` is below fine-tuning on {line['scenario']}, {line['setting']}." for line in below]
    notes.append("Means over seeds, which decide initial weights and batches; a page says why a method is below.")
    report.save_part("defaults", lines, "python benchmarks/defaults.py", notes)


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
    for lines in measure(given.seeds, given.methods):
        if lines:
            publish(lines, every)
        print(report.table(lines), flush=True)


if __name__ == "__main__":
    main()
