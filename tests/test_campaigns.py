"""The campaigns of `benchmarks/campaigns.py` and `benchmarks/hostile.py`, with a few fixed draws of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.xdist_group("campaigns")  # on one worker: all look at one process

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# in a process of its own, as it forks: in that of the tests, other threads may hold locks
CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import campaigns, hostile
known = {case.name: case for case in campaigns.cases()}
some = [known[name] for name in ("er, class", "duplicate, task", "joint, cumulative")]
found = {
    "faults": campaigns.faults(some, 24, seed=1),
    "kills": campaigns.kills(some, 9, seed=1),
    "flips": campaigns.flips(2, seed=1, every=997),
}
ends, faults = hostile.campaign(range(60))
hostile_ones = [sum(ends.values()), sorted({end[0] for end in ends}), sorted({end[1] for end in ends})]
tallies = {what: {name: [tally.counts, tally.notes] for name, tally in of.items()} for what, of in found.items()}
print(json.dumps([tallies, hostile_ones, [[fault.number, fault.what, fault.said] for fault in faults]]))
"""


@pytest.fixture(scope="module")
def found() -> Any:
    call = [sys.executable, "-c", CODE, str(BENCHMARKS)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-5_000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["faults", "kills", "flips"])
def test_nothing_is_lost_or_other_than_undisturbed(found: Any, what: str):
    assert [note for _, notes in found[0][what].values() for note in notes] == []


def test_the_campaigns_do_what_they_are_for(found: Any):
    faults, kills, flips = ({name: counts for name, (counts, _) in part.items()} for part in found[0].values())
    assert sum(counts["faults"] for counts in faults.values()) == 24
    assert {*faults} >= {"plugin", "plugin, resumed", "harder"}
    assert sum(counts["kills"] for counts in kills.values()) >= 9
    assert sum(counts.get("stops", 0) for counts in kills.values())
    assert all(counts.get("refused by name") for counts in flips.values())
    assert flips["predict"]["files"] == 4  # config.yaml, model.json, model.safetensors, sums.json
    assert flips["resume"]["same answers"]  # the older checkpoint is taken


def test_hostile_inputs_end_in_a_sentence(found: Any):
    count, families, codes = found[1]
    assert found[2] == []
    assert count == 60
    assert len(families) >= 8
    assert set(codes) <= {0, 1, 2, 3}
    assert {0, 2, 3} <= set(codes)  # some inputs are taken, and others refused
