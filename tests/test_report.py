"""Reports: figures equal those of the results files, and a report of an untrusted run is only text."""

from __future__ import annotations

import base64
import copy
import csv
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import clframe
from clframe.cli.main import main
from clframe.config import resolve, to_yaml
from clframe.curve import Curve
from clframe.curve import measures as curve_measures
from clframe.errors import DataError, UsageError
from clframe.experiments import plots
from clframe.experiments.evaluations import Evaluations, average_seen, read_evaluations
from clframe.experiments.folder import read_study
from clframe.experiments.outcome import FinishedCell, StudyOutcome, UnfinishedCell, read_runs
from clframe.experiments.rendering import FORMATS
from clframe.experiments.report import report_study
from clframe.experiments.run_report import report_run
from clframe.metrics import Measure
from clframe.registry import build_scenario
from clframe.runs.files import read_config
from clframe.runs.results import Results

CLASSES = [[0, 1], [2, 3], [4, 5]]


def results_of(
    config: Any, accuracy: float, forgetting: float = 0.1, kept: int = 0, names: list[str] | None = None, **more: Any
) -> dict[str, Any]:
    """The content of a results.json that was written by hand, with a given average accuracy."""
    matrix = [
        [1.0 if j == i else accuracy - forgetting * (i - j) / 10 if j < i else None for j in range(len(CLASSES))]
        for i in range(len(CLASSES))
    ]
    measures = {
        "average_accuracy": accuracy,
        "average_incremental_accuracy": accuracy + 0.01,
        "forgetting": forgetting,
        "backward_transfer": -forgetting,
        "forward_transfer": None,
        "learning_accuracy": 0.9 + accuracy / 100,
    }
    of = {name: vars(Measure(value, f"formula of {name}", "a source")) for name, value in measures.items()}
    return {
        "format": 1,
        "scenario": config.scenario.name,
        "setting": "class",
        "plugins": list(config.plugins),
        "forms": {},
        "seed": config.run.seed,
        "readings": {"class": "class-incremental: no task is given", "task": "task-incremental: the task is given"},
        "accuracy": {"class": matrix, "task": matrix},
        "measures": {"class": of, "task": of},
        "baseline": {},
        "classes": CLASSES,
        "class_names": names or [f"class {c}" for c in range(6)],
        "test_images": [10, 10, 10],
        "notes": [],
        "calibration": {"class": {"ece": vars(Measure(forgetting / 2, "formula of ece", "a source"))}},
        "model": {"bytes": 4000, "parameters": 1000},
        "storage": {name: {"bytes": kept, "parameters": kept // 4} for name in config.plugins},
        **more,
    }


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(accuracy, "er", seed=1)`: the folder of a finished run with these figures; no run is made."""

    def make(
        accuracy: float,
        *plugins: str,
        seed: int = 0,
        sets: tuple[str, ...] = (),
        scenario: Mapping[str, Any] | str = "split-digits",
        seconds: float = 2.0,
        **more: Any,
    ) -> Path:
        folder = tmp_path / "runs" / str(len(list(tmp_path.glob("runs/*"))))
        folder.mkdir(parents=True)
        config = resolve(scenario=scenario, plugins=plugins, sets=sets, run={"seed": seed, "output": str(folder)})
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "results.json").write_text(json.dumps(results_of(config, accuracy, **more)))
        timings = {
            "experiences": [{"seconds": seconds / 4, "images": 8, "images_per_second": 32 / seconds}] * 4,
            "peak_memory_bytes": 3 * 10**8,
            "peak_device_memory_bytes": None,
        }
        (folder / "timings.json").write_text(json.dumps(timings))
        environment = {"python": "3.11.7", "torch": "2.15", "processor": "a host", "data_sha256": "0" * 64}
        (folder / "environment.json").write_text(json.dumps(environment))
        return folder

    return make


def by_brute_force(ours: list[float], theirs: list[float]) -> tuple[float, tuple[float, float], float]:
    """Mean, Student's interval and p of all sign flips of paired differences, written down again."""
    from scipy.stats import t

    d = np.array(ours) - np.array(theirs)
    half = t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    flips = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=len(d))]
    p = np.mean([flipped >= abs(d.sum()) - 1e-12 for flipped in flips])
    return d.mean(), (d.mean() - half, d.mean() + half), float(p)


def test_the_table_of_a_scenario_equals_brute_force(write: Write):
    rng = np.random.default_rng(0)
    figures = {
        name: (0.3 + i / 5 + rng.normal(size=6) / 20).tolist() for i, name in enumerate(("fine-tuning", "ewc", "er"))
    }
    folders = [
        write(value, *([] if name == "fine-tuning" else [name]), seed=seed)
        for name, values in figures.items()
        for seed, value in enumerate(values)
    ]
    outcome = read_runs(folders)
    rows = outcome.table("split-digits")
    assert [row.method for row in rows] == ["er", "ewc", "fine-tuning"]
    assert (rows[2].paired, rows[2].p, rows[2].claim) == (None, None, None)
    for row in rows[:2]:
        mean, interval, p = by_brute_force(figures[row.method], figures["fine-tuning"])
        assert row.mean.value == pytest.approx(np.mean(figures[row.method]), abs=1e-15)
        assert row.paired is not None
        assert row.paired.mean == pytest.approx(mean, abs=1e-15)
        assert row.paired.interval == pytest.approx(interval, abs=1e-12)
        assert row.paired.p == p == 2 / 2**6
        assert row.p == 2 * p  # Holm over two equal p values
        assert row.claim is not None
        assert not row.claim.made
        assert row.tenth_percentile == pytest.approx(np.percentile(figures[row.method], 10), abs=1e-15)


def test_the_upper_bound_is_shown_beside_the_tests_and_counts_in_none(write: Write):
    figures = {"fine-tuning": 0.2, "er": 0.6, "joint": 0.9}
    folders = [
        write(value + seed / 100, *([] if name == "fine-tuning" else [name]), seed=seed)
        for name, value in figures.items()
        for seed in range(6)
    ]
    joint, er, _ = read_runs(folders).table("split-digits")
    assert (joint.method, joint.p, joint.claim) == ("joint", None, None)
    assert joint.paired is not None
    assert joint.paired.mean == pytest.approx(0.7)
    assert er.p == 2 / 2**6  # as if it were compared alone
    assert er.claim is not None
    assert er.claim.made


def test_class_orders_are_averaged_within_seeds(write: Write):
    values = {(seed, order): 0.1 + 0.03 * seed + 0.002 * order**2 for seed in range(3) for order in range(4)}
    folders = [
        write(value + shift, *plugins, seed=seed, scenario={"name": "split-digits", "order": "random", "seed": order})
        for shift, plugins in ((0.0, ()), (0.2, ("er",)))
        for (seed, order), value in values.items()
    ]
    outcome = read_runs(folders)
    assert {cell.order for cell in outcome.finished} == {0, 1, 2, 3}
    assert [row.mean.count for row in outcome.table("split-digits")] == [3, 3]
    assert [row.mean.count for row in outcome.table("split-digits", unit="order")] == [4, 4]
    row = outcome.table("split-digits")[0]
    assert row.paired is not None
    assert (row.paired.pairs, row.cells) == (3, 12)
    assert row.paired.mean == pytest.approx(0.2)


def test_methods_and_scenarios_are_labeled_by_what_differs(write: Write):
    folders = [
        write(0.1),
        write(0.2, "ewc", sets=("ewc.lambda=10",)),
        write(0.3, "ewc", sets=("ewc.lambda=100",)),
        write(0.4, "er", "lwf"),
        write(0.5, "er", "lwf", sets=("er.size=20",)),
        write(0.6, "joint", sets=("train.lr=0.01",)),
        write(0.6, "joint", sets=("train.lr=0.02",)),
        write(0.7, "joint", scenario={"name": "split-digits", "experiences": 2}),
    ]
    outcome = read_runs(folders)
    assert outcome.methods == [
        *("fine-tuning", "ewc[lambda=10]", "ewc[lambda=100]", "er+lwf[er.size=200]", "er+lwf[er.size=20]"),
        *("joint[train.lr=0.01]", "joint[train.lr=0.02]", "joint[train.lr=0.001]"),
    ]
    assert outcome.scenarios == ["split-digits[experiences=5]", "split-digits[experiences=2]"]
    assert outcome.choose_baseline() == "fine-tuning"
    with pytest.raises(UsageError, match="not a method of this study"):
        outcome.choose_baseline("ewc")


def test_a_run_counts_once_and_its_figures_are_numbers(write: Write):
    first, second = write(0.1, "er"), write(0.1, "er")
    with pytest.raises(UsageError, match="equal settings and the seed 0"):
        read_runs([first, second])
    assert len(read_runs([first, first]).finished) == 1
    data = json.loads((second / "results.json").read_text())
    data["measures"]["class"]["forgetting"]["value"] = float("nan")
    (second / "results.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="has nan as `forgetting`"):
        read_runs([second])
    (second / "results.json").unlink()
    with pytest.raises(DataError, match="is not finished"):
        read_runs([second])


# Reports of studies.


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, its tables, the text of its style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: dict[str, str] = {}
        self._path: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._path.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._path and self._path.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag = self._path[-1] if self._path else ""
        self.texts[tag] = self.texts.get(tag, "") + data
        if self.tables and {"td", "th"} & {*self._path}:
            self.tables[-1][-1][-1] += data


def cell_of(
    method: str,
    accuracy: float,
    *,
    seed: int = 0,
    scenario: str = "split-digits",
    order: int | None = None,
    experiences: int = 3,
    folder: str = "cells/one",
    **more: Any,
) -> FinishedCell:
    """A cell that was never run; no file is read for it."""
    config = CONFIGS.setdefault(seed, resolve(scenario="split-digits", run={"seed": seed}))
    data = results_of(config, accuracy, **more)
    if experiences != len(CLASSES):
        rng = np.random.default_rng(seed)
        matrix = [[None if j > i else rng.random() for j in range(experiences)] for i in range(experiences)]
        data |= {"accuracy": {"class": matrix, "task": matrix}, "test_images": [10] * experiences}
        data |= {"classes": [[2 * i, 2 * i + 1] for i in range(experiences)]}
        data |= {"class_names": [f"class {c}" for c in range(2 * experiences)]}
    timings = {"experiences": [{"seconds": 0.5}] * 4, "peak_memory_bytes": 3e8, "peak_device_memory_bytes": None}
    return FinishedCell(
        method, scenario, seed, order, Path(folder), Results(data, timings), config, "clframe run --config c.yaml"
    )


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure that a test looks at comes from the bootstrap."""
    monkeypatch.setattr("clframe.experiments.statistics.RESAMPLES", 99)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages have no plots of scenarios, each of which takes a tenth of a second."""
    monkeypatch.setattr("clframe.experiments.report._draw_scenario", lambda document, scenario: [])


CONFIGS: dict[int, Any] = {}
EVIL = "<script>alert(1)</script>"


def study_of(seeds: int = 6, scenarios: tuple[str, ...] = ("split-digits",), **more: Any) -> StudyOutcome:
    rng = np.random.default_rng(0)
    return StudyOutcome(
        tuple(
            cell_of(method, base + rng.normal() / 50, seed=seed, scenario=scenario, **more)
            for scenario in scenarios
            for method, base in (("fine-tuning", 0.2), ("ewc", 0.3), ("er", 0.7))
            for seed in range(seeds)
        )
    )


def test_a_page_shows_the_figures_of_the_results(no_plots: None):
    outcome = study_of()
    page = Page(report_study(outcome))
    header, *rows = page.tables[0]
    assert [row[0] for row in rows] == ["er", "ewc", "fine-tuning"]
    figures = {
        m: [c.results.measures["class"]["average_accuracy"] for c in outcome.cells("split-digits", m)]
        for m in outcome.methods
    }
    for row in rows:
        shown = dict(zip(header, row, strict=True))
        mine = np.array(figures[row[0]])
        half = 2.5705818366147395 * mine.std(ddof=1) / math.sqrt(6)  # the 0.975 quantile for 5 degrees of freedom
        assert shown["accuracy"] == f"{100 * mine.mean():.1f} ± {100 * half:.1f}"
        assert shown["forgetting"] == "10.0 ± 0.0"
        assert shown["ECE"] == "5.0 ± 0.0"
        assert (shown["time"], shown["peakmemory"], shown["byteskept"], shown["runs"]) == ("2 s", "300 MB", "0 B", "6")
        if row[0] != "fine-tuning":
            mean, (low, high), p = by_brute_force(figures[row[0]], figures["fine-tuning"])
            assert shown["difference"] == f"{100 * mean:+.1f} ± {50 * (high - low):.1f}"
            assert (p, shown["p"]) == (2 / 64, "0.062")
        assert shown["claim"] == ("" if row[0] == "fine-tuning" else "none")


def test_all_formats_hold_the_same_figures():
    outcome = study_of(seeds=8)
    document = json.loads(report_study(outcome, "json"))
    table = list(csv.DictReader(StringIO(report_study(outcome, "csv"))))
    rows = document["scenarios"][0]["rows"]
    assert [row["method"] for row in rows] == [row["method"] for row in table]
    for row, line in zip(rows, table, strict=True):
        mine = [c.results.measures["class"]["average_accuracy"] for c in outcome.cells("split-digits", row["method"])]
        assert row["average_accuracy"]["value"] == pytest.approx(np.mean(mine), abs=1e-15)
        assert float(line["average_accuracy"]) == row["average_accuracy"]["value"]
        assert line["claimed"] == ("" if row["method"] == "fine-tuning" else "true")
        if row["difference"]:
            assert float(line["p_holm"]) == row["difference"]["p_holm"] == 2 * 2 / 2**8
    text = report_study(outcome, "md")
    for row in rows:
        percent = f"{100 * row['average_accuracy']['value']:.1f} ±"
        assert percent in text
        assert percent.replace("±", r"$\pm$") in report_study(outcome, "latex")
    assert len(document["cells"]) == 24
    assert {cell["command"] for cell in document["cells"]} == {"clframe run --config c.yaml"}


def test_nothing_is_claimed_where_so_few_pairs_cannot_show_it():
    document = json.loads(report_study(study_of(seeds=3), "json"))
    (scenario,) = document["scenarios"]
    assert scenario["smallest_p"] == 2 * 2 / 2**3
    assert "no difference is claimed here. It takes 7 pairs at least." in scenario["statement"]
    assert [row["difference"] and row["difference"]["claimed"] for row in scenario["rows"]] == [False, False, None]
    (scenario,) = json.loads(report_study(study_of(seeds=7), "json"))["scenarios"]
    assert [row["finding"] for row in scenario["rows"]] == ["better", "better", None]


def test_a_page_is_only_text_whatever_the_names_are():
    cells = [
        cell_of(method, 0.3 + seed / 50 + 0.2 * (method == EVIL), seed=seed, scenario=EVIL, names=[EVIL] * 6)
        for method in (EVIL, "fine-tuning")
        for seed in range(2)
    ]
    failed = UnfinishedCell(EVIL, EVIL, 3, None, "failed", EVIL)
    text = report_study(StudyOutcome(tuple(cells), (failed,), (EVIL,), notes=(EVIL,)))
    check_harmless(text)
    assert Page(text).tables[0][1][0] == EVIL
    assert "\\textless{}script\\textgreater{}" in report_study(StudyOutcome(tuple(cells)), "latex")
    assert "<script>" not in report_study(StudyOutcome(tuple(cells)), "md")
    assert "'=1" in report_study(StudyOutcome((cell_of("=1+1", 0.3),)), "csv")


def check_harmless(text: str) -> None:
    """Fail unless a page runs, loads and links to nothing, and says so to the browser."""
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    assert "http" not in text.lower().replace("http-equiv", "")
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.texts["style"].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def test_latex_and_markdown_show_special_characters():
    outcome = StudyOutcome((cell_of(r"a_b & 50% #1 {x} $y ^~\ |", 0.5), cell_of("fine-tuning", 0.4)))
    text = report_study(outcome, "latex", costs=False)
    assert r"a\_b \& 50\% \#1 \{x\} \$y \textasciicircum{}\textasciitilde{}\textbackslash{} \textbar{} & 50.0" in text
    assert r"\caption{split-digits (class-incremental): 3 experiences, seeds 0, 1 class order." in text
    assert "Protocol: mlp-100, " in text
    assert [line for line in text.split("\n") if line.count("rule")] == [
        r"    \toprule",
        r"    \midrule",
        r"    \bottomrule",
    ]
    rows = [line for line in text.split("\n") if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {7}
    table = [line for line in report_study(outcome, "md").split("\n") if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[:4]}) == 1


def test_two_renderings_are_equal_and_none_has_costs_without_them():
    first, second = (study_of(seeds=2) for _ in range(2))
    for one in FORMATS:
        text = report_study(first, one, costs=False)
        assert text == report_study(second, one, costs=False)
        assert not re.search(r"\d\d\d\d-\d\d-\d\d|300 MB|seconds|peak", text)
    assert all(str(date.today()) in report_study(first, one) for one in ("md", "json"))


def test_a_page_of_eight_methods_and_ten_seeds_is_small():
    cells = [
        cell_of(f"method-{m}", 0.3 + m / 20 + seed / 500, seed=seed, experiences=20)
        for m in range(8)
        for seed in range(10)
    ]
    text = report_study(StudyOutcome(tuple(cells)))
    assert len(text.encode()) < 500_000
    assert "Left out to keep this page small" not in text
    check_harmless(text)


def test_a_page_that_would_be_too_large_says_what_is_left_out(no_plots: None, monkeypatch: pytest.MonkeyPatch):
    whole = report_study(study_of())
    monkeypatch.setattr("clframe.experiments.report.LIMIT", len(whole.encode()) - 1)
    assert "Left out to keep this page small: matrices;" in report_study(study_of())
    monkeypatch.setattr("clframe.experiments.report.LIMIT", 1)
    assert (
        "Left out to keep this page small: matrices, commands, plots of costs and calibration, other plots;"
        in report_study(study_of())
    )


def test_aggregates_over_scenarios_equal_brute_force(no_plots: None):
    names = tuple(f"s{i}" for i in range(8))
    outcome = study_of(seeds=2, scenarios=names)
    document = json.loads(report_study(outcome, "json"))
    for row in document["across"]["rows"]:
        values = [
            [c.results.measures["class"]["average_accuracy"] for c in outcome.cells(name, row["method"])]
            for name in names
        ]
        middle = sorted(itertools.chain(*values))[4:-4]
        assert row["interquartile_mean"]["value"] == pytest.approx(np.mean(middle), abs=1e-12)
        rank = {"er": 1.0, "ewc": 2.0, "fine-tuning": 3.0}[row["method"]]
        assert row["average_rank"] == rank
        if row["method"] != "fine-tuning":
            assert row["probability_of_improvement"]["value"] == 1.0
    assert document["across"]["critical_difference"] == pytest.approx(2.343701 * math.sqrt(3 * 4 / (6 * 8)), abs=1e-4)
    assert "critical-difference diagram of average ranks" in report_study(outcome)
    fewer = report_study(study_of(seeds=2, scenarios=names[:7]))
    assert "A critical-difference diagram is drawn from 8 scenarios on." in fewer


def test_what_cannot_be_reported_is_refused():
    outcome = study_of(seeds=2)
    with pytest.raises(UsageError, match="Did you mean `html`"):
        report_study(outcome, "htm")
    with pytest.raises(UsageError, match="needs runs in several class orders"):
        report_study(outcome, unit="order")
    with pytest.raises(UsageError, match="not a method of this study"):
        report_study(outcome, baseline="nothing")
    with pytest.raises(DataError, match="nothing to report"):
        report_study(StudyOutcome((), (UnfinishedCell("er", "split-digits", 0, None, "waiting"),)))


# Reports of runs, and the command.


def test_a_run_that_kept_no_scores_is_reported_without_them(write: Write):
    text = report_run(write(0.4, "er", names=[EVIL] * 6))
    check_harmless(text)
    assert "holds no scores of test images" in text
    assert "has no metrics.jsonl" in text
    assert "Errors are not shown as images" in text


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real study of two runs, which were evaluated every 2 of the 5 steps of an experience."""
    folder = tmp_path_factory.mktemp("study") / "study"
    asked = ["-s", "split-digits", "--method", "er", "--seeds", "2", "--no-baselines", "--set", "train.iterations=5"]
    asked += ["--set", "run.eval_every=2"]
    assert main(["compare", *asked, "--output", str(folder), "--quiet"]) == 0
    return folder


@pytest.mark.xdist_group("a real study")
def test_a_real_run_is_reported_with_its_errors(study: Path):
    folder = next((study / "cells").glob("*seed0*/"))
    results = Results.read(folder)
    document = json.loads(report_run(folder, "json"))
    answers = document["answers"]["class"]
    confusion = np.array(answers["confusion"])
    assert confusion.sum() == sum(results.data["test_images"])
    right = sum(a * n for a, n in zip(results.accuracy["class"][-1], results.data["test_images"], strict=True))
    assert confusion.trace() == round(right)
    ece = sum(share * abs(accuracy - confidence) for confidence, accuracy, share in answers["reliability"])
    assert ece == pytest.approx(results.data["calibration"]["class"]["ece"]["value"], abs=1e-9)

    page = report_run(folder)
    check_harmless(page)
    assert page == report_run(folder)
    assert len(page.encode()) < 500_000
    pictures = [a["src"] for tag, a in Page(page).elements if tag == "img"]
    assert len(pictures) == 12
    scores = results.final_scores()
    confidence = [given.double().softmax(1).max(1) for given, _ in scores]
    wrong = [
        (-float(c), on, i)
        for on, (found, (_, labels)) in enumerate(zip(confidence, scores, strict=True))
        for i, c in enumerate(found.values)
        if int(found.indices[i]) != int(labels[i])
    ]
    scenario = build_scenario(read_config(folder).scenario, read_config(folder).run)
    for source, (_, on, i) in zip(pictures, sorted(wrong), strict=False):
        image = Image.open(BytesIO(base64.b64decode(str(source).partition(",")[2])))
        expected = scenario[on].test.x[i, 0].double() / scenario.transform.scale * 255
        assert np.array_equal(np.asarray(image)[:, :, 0], expected.round().numpy())


@pytest.mark.xdist_group("a real study")
def test_other_data_are_never_shown_as_those_of_the_run(study: Path, tmp_path: Path):
    folder = shutil.copytree(next((study / "cells").glob("*seed0*/")), tmp_path / "copy")
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**environment, "data_sha256": "0" * 64}))
    page = report_run(folder)
    assert "on this machine are not those of the run" in page
    assert "<img" not in page


@pytest.mark.xdist_group("a real study")
def test_the_command_reports_studies_and_runs(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Write
):
    file = tmp_path / "report.html"
    assert main(["report", str(study), "--output", str(file), "--without-costs"]) == 0
    assert capsys.readouterr().out == f"Report: {file}\n"
    text = file.read_text()
    check_harmless(text)
    assert "clframe run --config cells/er-split-digits-seed0-" in text
    assert str(tmp_path) not in text
    run = str(next((study / "cells").glob("*seed1*/")))
    assert main(["report", run, "--format", "md"]) == 0
    assert capsys.readouterr().out.startswith("# er on split-digits, seed 1\n")
    others = [str(write(0.2 + seed / 10, seed=seed)) for seed in range(2)]
    assert main(["report", str(study), *others, "--format", "csv", "--baseline", "er"]) == 0
    table = list(csv.DictReader(StringIO(capsys.readouterr().out)))
    assert {(row["method"], row["baseline"]) for row in table} == {("fine-tuning", "er"), ("er", "")}
    for arguments, code, words in (
        ([run, "--baseline", "er"], 2, "one run is compared with nothing"),
        ([run, str(study)], 2, "report them one after the other"),
        ([str(tmp_path)], 3, "is not a run folder"),
        ([run, "--output", str(tmp_path)], 2, "cannot be written"),
        ([run, "--format", "pdf"], 2, "pdf"),
    ):
        assert main(["report", *arguments]) == code
        assert words in capsys.readouterr().err


def test_a_curve_is_of_test_images_and_of_those_of_the_run_s_evaluations(tmp_path: Path):
    """Images that are held out have rows of their own, and the end of an experience is evaluated on all images, too."""
    run = {"eval_every": 2, "eval_images": 3, "output": str(tmp_path), "tensorboard": False}
    scenario = {"name": "split-digits", "limit": 20}
    theirs = clframe.run(scenario, train={"iterations": 5, "val": 0.3, "threads": 1}, run=run).measures["class"]
    (cell,) = read_runs([tmp_path]).finished
    found = read_evaluations(cell, "class")
    assert found is not None
    assert found.steps == [2, 4, 5, 7, 9, 10, 12, 14, 15, 17, 19, 20, 22, 24, 25]
    assert list(found.curve.counts) == [6] * 5
    assert all((6 * value).is_integer() for row in found.curve.rows for value in row if value is not None)
    again = curve_measures(found.curve, 2, 3)
    assert {name: measure.value for name, measure in again.items()} == {name: theirs[name] for name in again}


@pytest.mark.xdist_group("a real study")
def test_a_report_has_the_measures_and_curves_of_evaluations_while_learning(study: Path):
    outcome = read_study(study)
    for cell in outcome.finished:
        found = read_evaluations(cell, "class")
        assert found is not None
        assert found.steps == [2, 4, 5, 7, 9, 10, 12, 14, 15, 17, 19, 20, 22, 24, 25]
        assert found.ends == [5, 10, 15, 20, 25]
        again = curve_measures(found.curve, 2, None)
        theirs = cell.results.measures["class"]
        assert {name: measure.value for name, measure in again.items()} == {name: theirs[name] for name in again}

    document = json.loads(report_study(outcome, "json"))
    within = document["scenarios"][0]["while_learning"]
    first, second = (read_evaluations(cell, "class") for cell in outcome.finished)
    assert first is not None
    assert second is not None
    for point, n in zip(within["curves"]["er"], range(15), strict=True):
        values = [
            float(np.average(of.curve.rows[n][: n // 3 + 1], weights=of.curve.counts[: n // 3 + 1]))
            for of in (first, second)
        ]
        assert point["step"] == first.steps[n]
        assert point["value"] == pytest.approx(np.mean(values), abs=1e-12)
    table = list(csv.DictReader(StringIO(report_study(outcome, "csv"))))
    for name in ("anytime_accuracy", "average_minimum_accuracy", "worst_case_accuracy", "windowed_forgetting_10"):
        figures = [cell.results.measures["class"][name] for cell in outcome.finished]
        assert within["rows"][0][name]["value"] == pytest.approx(np.mean(figures), abs=1e-15)
        assert float(table[0][name]) == within["rows"][0][name]["value"]
    shown = f"{100 * within['rows'][0]['anytime_accuracy']['value']:.1f} ± "
    text = report_study(outcome, costs=False)
    check_harmless(text)
    assert text == report_study(read_study(study), costs=False)
    header, row = Page(text).tables[1]
    assert header[:2] == ["method", "anytime accuracy"]
    assert row[1].startswith(shown)
    assert f"| er | {shown}" in report_study(outcome, "md")
    assert 'aria-label="accuracy on split-digits at each evaluation"' in text

    run = outcome.finished[0].folder
    lines = list(csv.DictReader(StringIO(report_run(run, "csv"))))
    at = [
        (line["step"], line["on"], float(line["value"]))
        for line in lines
        if line["measure"] == "accuracy_while_learning"
    ]
    assert len(at) == 3 * (1 + 2 + 3 + 4 + 5)
    assert at[-1] == ("25", "5", outcome.finished[0].results.accuracy["class"][-1][-1])
    assert 'aria-label="accuracy while learning"' in report_run(run, images=False)


@pytest.mark.xdist_group("a real study")
def test_evaluations_that_do_not_compare_or_cannot_be_read_are_said(study: Path, tmp_path: Path):
    outcome = read_study(study)
    other = copy.deepcopy(outcome.finished[1])
    other.results.data["while_learning"]["every"] = 3
    mixed = replace(outcome, finished=(outcome.finished[0], other))
    text = report_study(mixed, "md")
    assert "(every 2 steps on all test images; every 3 steps on all test images), which do not compare." in text
    assert "anytime accuracy |" not in text.partition("## Measures")[0]

    folder = shutil.copytree(outcome.finished[0].folder, tmp_path / "copy")
    (folder / "metrics.jsonl").write_text('{"kind": "within"}\n')
    damaged = replace(outcome, finished=(replace(outcome.finished[0], folder=folder), outcome.finished[1]))
    found = json.loads(report_study(replace(damaged, folder=None), "json"))["scenarios"][0]["while_learning"]
    assert found["statement"].endswith("Curves leave out 1 run whose metrics.jsonl is missing or damaged.")
    assert {point["count"] for point in found["curves"]["er"]} == {1}
    assert "Accuracy while learning: " in report_run(folder, "md")


def test_an_axis_of_percent_shows_what_percent_can_be():
    assert plots._limit((-80.0, 180.0), [20.0, 30.0]) == (-4.0, 104.0)  # intervals of two runs
    assert plots._limit((10.0, 90.0), [20.0, 30.0]) == (10.0, 90.0)
    assert plots._limit((-80.0, 50.0), [-10.0]) == (-14.0, 50.0)  # forgetting may be negative


def test_runs_of_unequal_steps_count_with_their_latest_evaluation():
    def run(*points: tuple[int, float]) -> Evaluations:
        return Evaluations(
            [s for s, _ in points], Curve([0] * len(points), {0: len(points) - 1}, [[a] for _, a in points], [10])
        )

    points = average_seen({(0, None): run((2, 0.2), (4, 0.4), (8, 0.8)), (1, None): run((3, 0.3), (6, 0.6))}, "seed")
    assert [(step, round(one.value or 0, 12)) for step, one in points] == [(3, 0.25), (4, 0.35), (6, 0.5)]
