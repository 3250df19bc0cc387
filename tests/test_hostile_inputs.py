"""The first of the generated hostile inputs of `benchmarks/hostile.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# in a process of its own, as it forks: in that of the tests, other threads may hold locks
CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import hostile
ends, faults = hostile.campaign(range(60))
named = [[fault.number, fault.family, fault.what, fault.said] for fault in faults]
families, codes = ({end[i] for end in ends} for i in range(2))
print(json.dumps([sum(ends.values()), sorted(families), sorted(codes), named]))
"""


def test_hostile_inputs_end_in_a_sentence():
    call = [sys.executable, "-c", CODE, str(BENCHMARKS)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=300)
    count, families, codes, faults = json.loads(done.stdout.splitlines()[-1])
    assert faults == []
    assert count == 60
    assert len(families) >= 8
    assert set(codes) <= {0, 1, 2, 3}
    assert {0, 2, 3} <= set(codes)  # some inputs are taken, and others refused
