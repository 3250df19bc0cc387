"""What a run ends with: accuracy matrices, the measures drawn from them, and their definitions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clframe.errors import DataError

FORMAT = 1
FILE = "results.json"
Matrix = list[list[float | None]]


@dataclass(frozen=True)
class Results:
    """The figures of a finished run, as `results.json` has them.

    Attributes:
        data: the whole of `results.json`: only what a repeat of the run reproduces to the bit.
        timings: the whole of `timings.json`: seconds, images per second, peak memory.
        folder: of the run; None if it kept none.
    """

    data: Mapping[str, Any]
    timings: Mapping[str, Any]
    folder: Path | None = None

    @property
    def accuracy(self) -> dict[str, Matrix]:
        """For each reading R[i][j], accuracy (0 to 1) on experience j after learning experience i; None where empty."""
        return dict(self.data["accuracy"])

    @property
    def measures(self) -> dict[str, dict[str, float | None]]:
        """For each reading its summary measures by name; formulas and sources are in `data`."""
        return {
            reading: {name: measure["value"] for name, measure in measures.items()}
            for reading, measures in self.data["measures"].items()
        }

    @classmethod
    def read(cls, folder: Path) -> Results:
        """The results of the finished run in `folder`. Raises `DataError` if there are none."""
        try:
            data = json.loads((folder / FILE).read_text(encoding="utf-8"))
            timings = json.loads((folder / "timings.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no results of a finished run ({error}).") from error
        return cls(data, timings, folder)


def to_json(data: Mapping[str, Any]) -> str:
    """The text of a JSON file: stable order, exact floats, matrices one row to a line."""

    def text(value: Any, indent: str) -> str:
        deeper = indent + "  "
        if isinstance(value, Mapping) and value:
            items = ",\n".join(f"{deeper}{json.dumps(str(k))}: {text(v, deeper)}" for k, v in value.items())
            return "{\n" + items + "\n" + indent + "}"
        if (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and any(isinstance(v, list | dict) for v in value)
        ):
            return "[\n" + ",\n".join(deeper + text(v, deeper) for v in value) + "\n" + indent + "]"
        return json.dumps(value, allow_nan=False)

    return text(data, "") + "\n"
