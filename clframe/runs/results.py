"""Results of a run: accuracy matrices, the measures computed from them, and their definitions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from clframe.errors import DataError
from clframe.runs import sums
from clframe.runs.files import CONFIG
from clframe.system.reading import blame_file, expand_home, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from clframe.deploy.trained import Trained

RESULTS_FORMAT = 1  # of results.json and model.json; docs/reference/compatibility.md has the rule for changes
RESULTS_FILE = "results.json"
PREDICTIONS = "predictions.safetensors"
Matrix = list[list[float | None]]


class _Measure(BaseModel):
    """The part of a measure that is read."""

    value: float | int | None


@dataclass(frozen=True, repr=False)
class Results:
    """The figures of a finished run, as `results.json` has them.

    Attributes:
        data: the whole of `results.json`: only what a repeat of the run reproduces to the bit.
        timings: the whole of `timings.json`: seconds, images per second, peak memory.
        folder: folder of the run; None if the run kept none.
        answering: makes the trained model of a run of this process; None for the run of another process, and in copies.
    """

    data: Mapping[str, Any]
    timings: Mapping[str, Any]
    folder: Path | None = None
    answering: Callable[[], Trained] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def trained(self) -> Trained:
        """Return the trained model, as `clframe.load` does; it is built at the first access.

        Until then the results hold what the run held: the network, its plugins, the images. Raises `DataError` if
        neither this process nor a run folder has the model.
        """
        if self.answering is not None:
            return self.answering()
        if self.folder is None:
            raise DataError(
                "These results come from another process, and the run kept no folder: ask for `trained` there, or "
                "give the run `output`."
            )
        import clframe  # the front door, which stands above this layer

        return clframe.load(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy for another process holds: the figures, and the path of the folder."""
        return {"data": self.data, "timings": self.timings, "folder": self.folder, "answering": None}

    def __repr__(self) -> str:
        return f"<Results of {self._title()}>"

    def __str__(self) -> str:
        """Return the accuracy matrices and the measures as a table, in percent."""

        def percent(share: float | None) -> str:
            return "-" if share is None else f"{100 * share:.1f}"

        def table(rows: list[list[str]]) -> list[str]:
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]

        lines = [self._title()]
        of_held_out = {f"{reading}-incremental, images held out": m for reading, m in self.validation.items()}
        of_test = {f"{reading}-incremental": m for reading, m in self.accuracy.items()}
        for title, matrix in (of_test | of_held_out).items():
            columns = [f"on {j}" for j in range(1, max(map(len, matrix), default=0) + 1)]
            rows = [
                [f"after {i}", *map(percent, row)]
                for i, row in enumerate(matrix, start=1)
                if any(share is not None for share in row)
            ]
            lines += ["", f"Accuracy in percent, {title}:", *table([["", *columns], *rows])]
        of = self.measures
        names = dict.fromkeys(name for values in of.values() for name, v in values.items() if v is not None)
        measured = [[name.replace("_", " "), *(percent(values.get(name)) for values in of.values())] for name in names]
        lines += ["", *table([["Measure, in percent", *(f"{reading}-incremental" for reading in of)], *measured])]
        return "\n".join([*lines, *self.notes()])

    def _title(self) -> str:
        methods = "+".join(self.data["plugins"]) or "no method"
        where = f", {self.folder}" if self.folder else ""
        return f"{self.data['scenario']} with {methods}, seed {self.data.get('seed')}{where}"

    @property
    def accuracy(self) -> dict[str, Matrix]:
        """Return R for each evaluation mode: `R[i][j]`, from 0 to 1, is the accuracy on experience j after learning i.

        Empty entries are None.
        """
        return dict(self.data["accuracy"])

    @property
    def validation(self) -> dict[str, Matrix]:
        """Return the matrices of `accuracy` on the training images that ``train.val`` held out; {} without it."""
        return dict(self.data.get("validation", {}))

    @property
    def measures(self) -> dict[str, dict[str, float | None]]:
        """Return the measures of each evaluation mode by name; `data` has their formulas and sources."""
        return {
            reading: {name: measure["value"] for name, measure in measures.items()}
            for reading, measures in self.data["measures"].items()
        }

    def notes(self, *, while_learning: bool = True) -> list[str]:
        """Return sentences on the data, such as images that were left out, and on what the figures leave out.

        With `while_learning`, there is one on how the run was evaluated while learning, if it was.
        """
        notes = list(self.data.get("notes", []))
        within = self.data.get("while_learning")
        if while_learning and within:
            every = "epoch" if within["every"] == "epoch" else f"{within['every']:,} steps"
            images = within["images_per_class"]
            on = (
                "all test images"
                if images is None
                else f"{images:,} test images of each class, or all where there are fewer"
            )
            notes.append(
                f"Evaluated while learning every {every}, on {on}: compare the measures while learning only with those "
                "of runs evaluated alike."
            )
        if not self.data.get("extends"):
            return notes
        return [
            *notes,
            "Classes learned before this extension were not measured, as a finished run keeps no images: how much of "
            "them is forgotten is not known. To measure it, let `clframe predict` answer test images of old classes, "
            "or run all experiences in one run.",
        ]

    def final_scores(self, reading: str = "class") -> list[tuple[Tensor, Tensor]]:
        """Return the scores [N, C] of the test images of each experience after the last one, and their labels [N].

        `reading` is the evaluation mode; where the task is given, classes of other tasks have the score -inf. The
        scores are read from `predictions.safetensors`. Raises `DataError` if the run kept none.
        """
        from clframe.model import class_mask, masked
        from clframe.runs.checkpoint import read_tensors

        last, n = len(self.accuracy[reading]) - 1, len(self.data["test_images"])
        folder = self.folder or Path()
        try:
            if not (folder / PREDICTIONS).is_file():
                raise FileNotFoundError(f"no {PREDICTIONS}")
            sums.check(folder, PREDICTIONS)
            saved = read_tensors(folder / PREDICTIONS)
            labels = [saved[f"labels/{on}"] for on in range(n)]
            scores = [saved.get(f"{reading}/{last}/{on}", saved.get(f"class/{last}/{on}")) for on in range(n)]
        except (OSError, KeyError) as error:
            raise DataError(
                f"{self.folder} holds no scores of test images ({error}): `run.predictions` keeps them."
            ) from error
        found = []
        for on, given in enumerate(scores):
            if given is None:
                raise DataError(f"{self.folder} holds no scores of evaluation mode `{reading}` on experience {on + 1}.")
            choices = self.data["classes"][on]
            found.append(
                (masked(given, class_mask(choices, given.shape[1])) if reading == "task" else given, labels[on])
            )
        return found

    def confusion_matrix(self, reading: str = "class") -> list[list[int]]:
        """Count the answers to all test images after the last experience: row = label, column = answer.

        Rows and columns are in the order of the head; `reading` is the evaluation mode. Raises `DataError` as
        `final_scores`.
        """
        import torch

        from clframe.metrics import confusion_matrix

        scores = self.final_scores(reading)
        answers = torch.cat([given.argmax(1) for given, _ in scores])
        labels = torch.cat([labels for _, labels in scores])
        found: list[list[int]] = confusion_matrix(answers, labels, len(self.data["class_names"])).tolist()
        return found

    def accuracy_per_class(self, reading: str = "class") -> dict[str, float | None]:
        """Return the accuracy after the last experience on each class, by its name.

        The accuracy is None for a class without test images, and in the evaluation mode ``task`` for the only class of
        an experience.
        """
        import torch

        from clframe.metrics import accuracy_per_class

        found = accuracy_per_class(torch.tensor(self.confusion_matrix(reading)))
        if reading == "task":
            choosing = {c for group in self.data["classes"] if len(group) > 1 for c in group}
            found = [value if c in choosing else None for c, value in enumerate(found)]
        return dict(zip(self.data["class_names"], found, strict=True))

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """Read the results of the finished run in `folder`. Raises `DataError` if there are none."""
        folder = expand_home(folder)
        results = read_results(folder)
        if sentence := sums.explain_missing(folder):
            warnings.warn(sentence, stacklevel=2)
        return results


def check_finished(path: Path) -> None:
    """Raise `DataError` if `path` is not the folder of a run that is finished."""
    if not path.is_dir():
        raise DataError(f"There is no folder {path}; name the folder of a finished run.")
    if not (path / CONFIG).is_file():
        raise DataError(f"{path} is not a run folder, as it has no config.yaml; name the folder of a finished run.")
    if not (path / RESULTS_FILE).is_file():
        raise DataError(f"The run in {path} is not finished: `clframe resume {path}` goes on with it.")


def read_results(folder: Path) -> Results:
    """Read the results of the finished run in `folder`, without a warning if it has no sums. Raises `DataError`."""
    try:
        if not (folder / RESULTS_FILE).is_file():
            raise DataError(f"there is no {RESULTS_FILE}")
        sums.check(folder, RESULTS_FILE, "timings.json")
        data = read_json(folder / RESULTS_FILE)
        timings = read_json(folder / "timings.json")
    except DataError as error:
        raise DataError(f"{folder} holds no results of a finished run that can be read ({error}).") from error
    check_format(data, folder / RESULTS_FILE)
    with blame_file(folder / RESULTS_FILE):
        _Shape.model_validate(data)
    with blame_file(folder / "timings.json"):
        dict(timings)
    return Results(data, timings, folder)


class _Shape(BaseModel):
    """The part of results.json that must be there for its figures to be read."""

    model_config = ConfigDict(strict=True, extra="ignore")

    scenario: str
    plugins: list[str]
    accuracy: dict[str, list[list[float | int | None]]]
    validation: dict[str, list[list[float | int | None]]] = {}
    measures: dict[str, dict[str, _Measure]]
    classes: list[list[int]]
    class_names: list[str]
    test_images: list[int]


def check_format(data: Any, file: Path) -> None:
    """Raise `DataError` if `data`, which `file` holds, is of a format that this clframe does not read."""
    found = data.get("format") if isinstance(data, Mapping) else None
    if found != RESULTS_FORMAT:
        raise DataError(
            f"{file} has format {found}, and this clframe reads format {RESULTS_FORMAT}: use the clframe that wrote it "
            "(environment.json names it), or run config.yaml again."
        )
