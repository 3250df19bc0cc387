"""Peak memory of the process."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def read_peak_memory() -> int:
    """Return the most bytes that this process had in memory, since `reset_peak_memory` where Linux keeps them.

    ``ru_maxrss``, which serves elsewhere, begins with the peak of the process that started this one.
    """
    with suppress(OSError, StopIteration):
        lines = STATUS.read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Let `read_peak_memory` begin with what the process has in memory now, where the system can do so."""
    with suppress(OSError):
        RESET.write_text("5", encoding="ascii")
