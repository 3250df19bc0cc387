"""Budgets of `clframe compare`: what is solved for them, what finished runs then keep and take, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import clframe
from clframe.api import run_config
from clframe.cli.main import main
from clframe.config import resolve
from clframe.data.scenario import Scenario
from clframe.experiments import budget
from clframe.experiments.plan import make_plan
from clframe.experiments.study import Study
from clframe.plugins.er import ER
from clframe.settings import Config

D, H, B = 64, 16, 8  # values of a digit, hidden units, images of a step
STUDY = {
    "scenarios": [{"name": "split-digits", "experiences": 2, "limit": 20}],  # 5 and 5 classes of 20 images
    "model": {"name": "mlp", "hidden": [H]},
    "seeds": 1,
    "train": {"batch_size": B},
}
LONG = {**STUDY, "train": {"batch_size": B, "iterations": 12}}


def planned(tmp_path: Path, methods: list[Any], limits: dict[str, Any], **more: Any) -> dict[str, budget.Held]:
    """Return what a study's one budget decides for each method."""
    study = Study.from_data({**STUDY, "methods": methods, "budget": limits, **more})
    return {method: held for (method, _), (held,) in make_plan(study, tmp_path / "study").held.items()}


def compare(tmp_path: Path, study: dict[str, Any], *arguments: str) -> Path:
    """Carry out a study, and return its folder."""
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(study))
    folder = tmp_path / "study"
    call = ["compare", "--engine", "inline", "--quiet", "--config", str(tmp_path / "asked.yaml")]
    assert main([*call, "--output", str(folder), *arguments]) == 0
    return folder


def read(folder: Path, method: str, name: str) -> Any:
    """Return a JSON file of the one cell of a method."""
    (path,) = (folder / "cells").glob(f"{method}-split-digits-*/{name}")
    return json.loads(path.read_text())


def bytes_kept(results: Any) -> int:
    return sum(kept["bytes"] for kept in results["storage"].values())


# --------------------------------------------------------------------------------------------- bytes

MEMORIES: dict[str, dict[str, Any]] = {  # plugins of a method
    "reservoir": {"er": {}},
    "balanced": {"er": {"memory": "balanced"}},
    "herding": {"icarl": {}},
    "beside a teacher": {"er": {}, "lwf": {}},
    "two memories": {"er": {}, "der": {}},
}


def enlarge(config: Config, images: int) -> Config:
    """Return `config` with so many more images in each memory."""
    plugins = config.model_dump()["plugins"]
    for options in plugins.values():
        if "size" in options:
            options["size"] += images
    return Config.model_validate({**config.model_dump(), "plugins": plugins})


def test_runs_keep_to_the_bytes_and_no_larger_memory_would(tmp_path: Path) -> None:
    limit = 8_050
    methods = [{"name": name, "plugins": plugins} for name, plugins in MEMORIES.items()]
    study = Study.from_data({**LONG, "methods": methods, "baselines": False, "budget": {"bytes": limit}})
    for cell in make_plan(study, tmp_path / "study").cells:
        step = 10 if cell.method in ("balanced", "herding", "two memories") else 1  # 10 classes share these memories
        configs = [enlarge(cell.config, images) for images in (0, step)]
        for config in configs:
            config.run.output = None
        kept, more = (bytes_kept(run_config(config).data) for config in configs)
        assert kept <= limit < more, (cell.method, kept, more)


def test_a_memory_that_all_images_fit_into_is_not_made_larger(tmp_path: Path) -> None:
    assert planned(tmp_path, ["er"], {"bytes": "1GB"})["er"].settings == {"er.size": 10 * 20}


def test_the_declaration_of_a_plugin_decides_what_is_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(tmp_path, ["er", "ewc"], {"bytes": "4kB"})
    assert {method: dict(held.settings) for method, held in found.items()} == {
        "fine-tuning": {},
        "joint": {},
        "er": {"er.size": 40},  # 64 of the image, 3 times 8 and 3 times 4 of its columns
        "ewc": {},
    }
    assert found["joint"].describe(0.0) == "an oracle, not held to 4 kB"
    assert found["ewc"].describe(9_680.0) == "9.68 kB of 4 kB, not solvable"
    monkeypatch.setattr(ER, "memory_options", ())
    assert planned(tmp_path, ["er"], {"bytes": "4kB"})["er"].settings == {}


def test_a_memory_that_the_method_does_not_use_is_not_solvable(tmp_path: Path) -> None:
    scenario = {**STUDY["scenarios"][0], "setting": "task"}
    options = {"classifier_iterations": 1}
    held = planned(
        tmp_path,
        [{"plugins": {"channel-gating": options}}],
        {"bytes": "4kB"},
        scenarios=[scenario],
        model={"name": "cnn-small", "widths": [2]},
        baselines=False,
    )["channel-gating"]
    assert not held.settings
    assert "does not depend" in held.reason


# -------------------------------------------------------------------------------------------- length


def test_steps_are_those_of_an_experience_and_joint_training_has_their_sum(tmp_path: Path) -> None:
    images = {}
    for cell in make_plan(Study.from_data({**STUDY, "budget": {"steps": 3}}), tmp_path / "study").cells:
        cell.config.run.output = None
        images[cell.method] = [row["images"] for row in run_config(cell.config).timings["experiences"]]
    assert images == {"fine-tuning": [3 * B, 3 * B], "joint": [0, 6 * B]}


def count(c: int, rows: int = B) -> int:
    """Return the multiply-adds of a step of a network D-H-c on so many rows, counted by hand.

    Forward, both layers; backward, the weights of both, and what the second layer passes back to the first.
    """
    return rows * (D * H + H * c) + rows * (D * H + H * c) + rows * H * c


COUNTED = {  # share of steps, and multiply-adds of one, in the experiences with 5 and with 10 outputs
    "fine-tuning": [(1, count(5)), (1, count(10))],
    "er": [(1, count(5, 2 * B)), (1, count(10, 2 * B))],
    "lwf": [(1, count(5)), (1, count(10) + B * (D * H + H * 5))],  # the old network goes forward
    "joint": [(0, 0), (2, count(10))],
}


@pytest.mark.parametrize("method", COUNTED)
def test_multiply_adds_of_a_step_are_those_counted_by_hand(method: str) -> None:
    plugins = [] if method == "fine-tuning" else [method]
    config = resolve(
        scenario=STUDY["scenarios"][0],
        model=STUDY["model"],
        plugins=plugins,
        train={"batch_size": B, "threads": 1},
    )
    assert budget.count_macs(config) == COUNTED[method]


def test_iterations_are_the_most_that_the_multiply_adds_allow(tmp_path: Path) -> None:
    limit = 1_000_000
    found = planned(tmp_path, ["er"], {"macs": "1M"})
    for method in ("fine-tuning", "er", "joint"):
        one = sum(share * macs for share, macs in COUNTED[method]) / 2
        iterations = found[method].settings["train.iterations"]
        assert iterations * one <= limit < (iterations + 1) * one
        assert found[method].uses == iterations * one


def test_milestones_keep_their_place_in_the_course() -> None:
    train = {"epochs": 10, "schedule": "steps", "milestones": [5, 8]}
    config = resolve(scenario="split-digits", train=train)
    held = budget.apply(config, {"train.iterations": 200}).train
    assert (held.epochs, held.iterations, held.milestones) == (None, 200, [100, 160])


# ------------------------------------------------------------------- the study, its cells and its texts


def test_what_is_solved_stands_in_cells_dry_run_table_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = {**LONG, "methods": ["er", "ewc"], "baselines": False, "budget": {"bytes": "4kB"}}
    folder = compare(tmp_path, study)
    printed = capsys.readouterr().out
    assert "4 kB of 4 kB by er.size=40" in printed
    ewc = budget.format_amount("bytes", bytes_kept(read(folder, "ewc", "results.json")))
    assert f"{ewc} of 4 kB, not solvable" in printed
    assert "4 kB of 4 kB by er.size=40" in (folder / "report.html").read_text()
    for form in ("md", "csv", "latex", "json"):
        assert main(["report", str(folder), "--format", form]) == 0
        assert "4 kB of 4 kB by er.size=40" in capsys.readouterr().out
    assert main(["compare", str(folder), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "er on split-digits: 4 kB of 4 kB by er.size=40" in printed
    assert "ewc on split-digits: 4 kB, not solvable: no option" in printed
    assert "2 cells, 0 to carry out" in printed
    assert Study.read(folder).budget == {"bytes": 4000}
    (config,) = (folder / "cells").glob("er-*/config.yaml")
    assert main(["run", "--quiet", "--config", str(config), "--output", str(tmp_path / "again")]) == 0
    for name in ("results.json", "model.safetensors"):
        assert (config.parent / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_solution_is_measured_once_and_again_for_another_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.from_data({**STUDY, "methods": ["er"], "baselines": False, "budget": {"bytes": "4kB"}})
    folder = tmp_path / "study"
    folder.mkdir()
    first = make_plan(study, folder)
    first.write(folder)
    measured = []
    short = budget._run_shortly
    monkeypatch.setattr(budget, "_run_shortly", lambda *given: measured.append(1) or short(*given))
    assert make_plan(study, folder).held == first.held
    assert [cell.address for cell in make_plan(study, folder).cells] == [cell.address for cell in first.cells]
    assert not measured
    (held,) = make_plan(study.extended({"budget": {"bytes": "5kB"}}), folder).held["er", "split-digits"]
    assert held.settings == {"er.size": 50}
    assert measured


def test_a_short_run_reads_no_test_image(tiny: Any) -> None:
    whole = tiny(2)
    parts = []

    def load(index: int, part: Any) -> Any:
        parts.append(part)
        return getattr(whole[index], part)

    watched = Scenario("tiny", whole.setting, whole.classes, whole.class_names, whole.input_shape, load)
    few = budget.pick_few(watched, 0)
    for experience in few:
        counts = experience.train.y.unique(return_counts=True)[1].tolist()
        assert counts == [budget.EACH] * len(experience.classes)
        assert len(experience.test) == len(experience.train)
    assert set(parts) == {"train"}


# -------------------------------------------------------------------------------------- what is refused

AMOUNTS: dict[str, dict[Any, int | None]] = {
    "bytes": {"4MB": 4_000_000, "4 MiB": 2**22, "1.5kB": 1_500, 1000: 1_000, "1e3": 1_000, "0": None, "1.0005kB": None},
    "steps": {500: 500, "500": 500, "2.5": None, "4k": None, True: None, -3: None},
    "macs": {"20G": 20 * 10**9, "0.5M": 500_000, "4MB": None, "nan": None, "inf": None},
}


def test_amounts_have_units() -> None:
    for kind, amounts in AMOUNTS.items():
        for given, value in amounts.items():
            if value is None:
                with pytest.raises(clframe.errors.UsageError, match=kind):
                    budget.read_budget({kind: given}, "budget")
            else:
                assert budget.read_budget({kind: given}, "budget") == {kind: value}


REFUSED: dict[str, tuple[list[str], list[str]]] = {  # arguments, and what the sentence must hold
    "an unknown kind": (["--budget", "byte=4MB"], ["`byte`", "`bytes`"]),
    "no amount": (["--budget", "bytes"], ["`bytes=4MB`"]),
    "a kind twice": (["--budget", "steps=4", "--budget", "steps=5"], ["`steps`", "twice"]),
    "not a number": (["--budget", "macs=many"], ["'many'", "20G"]),
    "two kinds for one setting": (["--budget", "macs=1G", "--budget", "steps=5"], ["`train.iterations`"]),
    "bytes beside a size": (["--budget", "bytes=4kB", "--set", "er.size=30"], ["`er.size` is 30", "40"]),
    "bytes beside images of a class": (
        ["--budget", "bytes=4kB", "--set", "er.per_class=3", "--set", "er.memory=ring"],
        ["`er.per_class` is 3"],
    ),
    "steps beside iterations": (["--budget", "steps=4", "--set", "train.iterations=5"], ["`train.iterations` is 5"]),
    "steps beside epochs": (["--budget", "steps=4", "--set", "train.epochs=5"], ["`train.epochs` is 5"]),
    "macs beside iterations": (["--budget", "macs=1M", "--set", "train.iterations=5"], ["`train.iterations` is 5"]),
    "steps beside those of the first": (
        ["--budget", "steps=4", "--set", "train.first={iterations: 5}"],
        ["`train.first.iterations` is 5"],
    ),
    "no room for an image": (["--budget", "bytes=99"], ["`er` cannot learn", "100 B", "99 B"]),
    "no room for each class": (["--budget", "bytes=900"], ["900 B", "`er.size` is 9", "10 classes"]),
    "no room for a step": (["--budget", "macs=1k"], ["38.53 k multiply-adds", "1 k multiply-adds"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_budgets_are_refused_before_training(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, named = REFUSED[case]
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump({**STUDY, "methods": ["er"], "baselines": False}))
    call = ["compare", "--engine", "inline", "--config", str(tmp_path / "asked.yaml"), *arguments]
    assert main([*call, "--output", str(tmp_path / "study")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "--skip-refused" not in line]
    assert len(lines) == 1, lines
    assert all(words in lines[0] for words in named), lines
    assert not (tmp_path / "study").exists()


def test_equal_settings_do_not_contradict_a_budget(tmp_path: Path) -> None:
    assert planned(tmp_path, ["er"], {"bytes": "4kB"}, set={"er.size": 40})["er"].settings == {"er.size": 40}
    held = planned(tmp_path, ["er"], {"steps": 4}, set={"train.iterations": 4})["er"]
    assert held.settings == {"train.iterations": 4}
