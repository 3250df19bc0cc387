"""`clframe compare`: the cells that a study asks for, what it refuses, and how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import yaml

from clframe import registry
from clframe.cli.main import main
from clframe.cli.study_live import StudyLive
from clframe.config import resolve
from clframe.errors import UsageError
from clframe.experiments import cells, plan
from clframe.experiments.folder import read_study
from clframe.experiments.study import Study
from clframe.runs.files import read_config

SHORT = ["--set", "train.iterations=2", "--set", "train.batch_size=8", "--set", "scenario.limit=2"]
SHORT += ["--set", "scenario.experiences=2"]
SMALL = ["--scenario", "split-digits", "--method", "er", "--seeds", "2", *SHORT]  # 6 cells, with the baselines


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run `clframe compare` with `arguments`, check the exit code, and return what it printed."""
    found = main(["compare", "--engine", "inline", *arguments])
    printed = capsys.readouterr()
    assert found == code, printed
    return printed.out, printed.err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the finished study `SMALL`."""
    folder = tmp_path_factory.mktemp("made") / "study"
    assert main(["compare", "--engine", "inline", *SMALL, "--quiet", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    """A copy of that study."""
    return Path(shutil.copytree(made, tmp_path / "study"))


def cell(folder: Path, method: str, seed: int = 0) -> Path:
    """Return the folder of one cell on split-digits."""
    (found,) = (path for path in (folder / "cells").glob(f"{method}-split-digits-seed{seed}-*") if path.is_dir())
    return found


def stamps(folder: Path) -> dict[str, int]:
    """Return when the results of each cell were written, by the name of its folder."""
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob("cells/*/results.json")}


# ------------------------------------------------------------------------------------- cells and table


def test_each_cell_is_a_run_and_the_table_holds_the_means_of_their_figures(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = told(capsys, str(study), "--json")
    found = json.loads(out)["scenarios"]["split-digits"]
    rows = {row["method"]: row for row in found["methods"]}
    assert set(rows) == {"fine-tuning", "joint", "er"}
    assert found["baseline"] == "fine-tuning"
    for method, row in rows.items():
        measures = [
            json.loads((cell(study, method, seed) / "results.json").read_text())["measures"]["class"] for seed in (0, 1)
        ]
        assert row["mean"] == pytest.approx(np.mean([m["average_accuracy"]["value"] for m in measures]))
        assert row["cells"] == 2
    accuracies = [row["mean"] for row in found["methods"]]
    assert accuracies == sorted(accuracies, reverse=True)
    page = (study / "report.html").read_text()
    assert all(f"<th>{method}" in page for method in rows)


def test_a_cell_equals_a_run_of_its_configuration_to_the_bit(study: Path, tmp_path: Path) -> None:
    for method in ("er", "joint"):
        folder = cell(study, method, 1)
        again = tmp_path / method
        assert main(["run", "--quiet", "--config", str(folder / "config.yaml"), "--output", str(again)]) == 0
        for name in ("results.json", "predictions.safetensors", "model.safetensors", "config.yaml"):
            assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_finished_cells_are_not_run_again_and_added_ones_are(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stamps(study)
    assert len(before) == 6
    _, err = told(capsys, str(study))
    assert err == ""
    assert stamps(study) == before
    _, err = told(capsys, str(study), "--method", "ewc", "--seeds", "3")
    after = stamps(study)
    assert {name: after[name] for name in before} == before
    assert len(after) == 4 * 3
    assert [line.partition(" of ")[0] for line in err.splitlines()] == [str(n) for n in range(7, 13)]
    assert Study.read(study).seeds == (0, 1, 2)


def test_cells_that_are_no_longer_asked_for_stay_and_are_listed(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study / "study.yaml"
    file.write_text(file.read_text().replace("seeds: 2", "seeds: [1]").replace("- er", "- ewc"))
    before = stamps(study)
    out, err = told(capsys, str(study))
    gone = {cell(study, "er", seed).name for seed in (0, 1)} | {cell(study, m).name for m in ("fine-tuning", "joint")}
    assert all(name in err for name in gone)
    assert stamps(study).items() >= before.items()
    outcome = read_study(study)
    assert set(outcome.left_out) == gone
    assert {(c.method, c.seed) for c in outcome.finished} == {(m, 1) for m in ("fine-tuning", "joint", "ewc")}
    assert "er " not in out


def test_a_dry_run_prints_the_cells_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = told(capsys, *SMALL, "--dry-run", "--output", str(tmp_path / "new"))
    rows = [line.split() for line in out.splitlines()]
    assert [row[:3] for row in rows[1:7]] == [
        [method, "split-digits", str(seed)] for method in ("fine-tuning", "joint", "er") for seed in (0, 1)
    ]
    assert {row[-1] for row in rows[1:7]} == {"waiting"}
    assert not (tmp_path / "new").exists()


def test_a_dry_run_estimates_the_time_from_finished_cells(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, seconds in ((0, 30.0), (1, 50.0)):
        folder = cell(study, "er", seed)
        (folder / "sums.json").unlink()
        (folder / "timings.json").write_text(json.dumps({"experiences": [{"seconds": seconds}]}))
    found = json.loads(told(capsys, str(study), "--seeds", "2-3", "--no-baselines", "--dry-run", "--json")[0])
    assert [c["state"] for c in found["cells"]] == ["finished", "finished", "waiting", "waiting"]
    assert found["seconds_left"] == pytest.approx(2 * 40.0)


# ------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[list[str], list[str]]] = {  # arguments, and what the sentences must hold
    "an unknown method": (["--method", "ers"], ["`ers`"]),
    "an unknown scenario": (["-s", "split-digit"], ["`split-digit`"]),
    "two equal methods": (["--method", "ewc", "--method", "ewc"], ["`ewc`"]),
    "a method of a plugin twice": (["--method", "er+er"], ["`er+er`"]),
    "orders of a scenario without orders": (["-s", "permuted-digits", "--orders", "2"], ["`permuted-digits`", "2"]),
    "a setting of a plugin that is not there": (["--set", "si.lambda=2"], ["`si`"]),
    "an unknown option": (["--set", "er.sise=2"], ["`er.sise`", "`size`"]),
    "the seed as a setting": (["--set", "run.seed=2"], ["`run.seed`"]),
    "no seeds": (["--seeds", "0"], ["`seeds`"]),
    "a range that is none": (["--seeds", "4-2"], ["4-2"]),
    "plugins as in a run": (["--plugin", "er", "--plugin", "lwf"], ["`--method er`", "`--method er+lwf`"]),
    "several mistakes": (["--method", "ers", "--set", "train.lrr=1"], ["`ers`", "lrr"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused_before_anything_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, named = REFUSED[case]
    _, err = told(capsys, *SMALL, *arguments, "--output", str(tmp_path / "new"), code=2)
    assert all(words in err for words in named), err
    assert all(line.startswith("clframe: ") for line in err.splitlines())
    assert not (tmp_path / "new").exists()


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "a grid over an option that does not exist": (
        {"methods": [{"plugins": ["ewc"], "grid": {"ewc.lamda": [1, 2]}}]},
        "ewc.lamda",
    ),
    "a grid over another plugin": ({"methods": [{"plugins": ["ewc"], "grid": {"er.size": [1, 2]}}]}, "`er.size`"),
    "a grid that is not a list": ({"methods": [{"plugins": ["ewc"], "grid": {"ewc.lambda": 3}}]}, "`ewc.lambda`"),
    "two names for one cell": ({"methods": ["er", {"plugins": ["er"], "name": "b"}]}, "`b`"),
    "two methods of one name": ({"methods": ["er", {"plugins": ["ewc"], "name": "er"}]}, "`er`"),
    "two equal scenarios": ({"scenarios": ["split-digits", {"name": "split-digits", "order": "natural"}]}, "the same"),
    "an unknown key": ({"method": ["er"]}, "`methods`"),
    "an order beside orders": ({"scenarios": [{"name": "split-digits", "order": "random"}], "orders": 2}, "orders"),
}


@pytest.mark.parametrize("case", FILES)
def test_mistakes_in_a_study_file_are_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, named = FILES[case]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"scenarios": ["split-digits"], **data}))
    arguments = ["--config", str(tmp_path / "study.yaml"), *SHORT, "--output", str(tmp_path / "new")]
    _, err = told(capsys, *arguments, code=2)
    assert named in err
    assert len(set(err.splitlines())) == len(err.splitlines())
    assert not (tmp_path / "new").exists()


def test_a_method_that_cannot_learn_a_scenario_is_refused_unless_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-s", "split-digits", "--method", "hat", "--method", "er+joint", "--seeds", "1", *SHORT]
    arguments += ["--output", str(tmp_path / "new")]
    _, err = told(capsys, *arguments, code=2)
    assert "`hat` cannot learn `split-digits`" in err
    assert "`er+joint` cannot learn `split-digits`" in err
    assert "--skip-refused" in err
    assert not (tmp_path / "new" / "cells").exists()
    _, err = told(capsys, *arguments, "--skip-refused")
    assert "`hat`" in err
    outcome = read_study(tmp_path / "new")
    assert {c.method for c in outcome.finished} == {"fine-tuning", "joint"}
    assert {(c.method, c.state) for c in outcome.unfinished} == {("hat", "refused"), ("er+joint", "refused")}


def test_another_study_is_refused_with_the_difference(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.yaml"
    file.write_text((study / "study.yaml").read_text().replace("seeds: 2", "seeds: 7"))
    before = (study / "study.yaml").read_bytes()
    _, err = told(capsys, str(study), "--config", str(file), code=2)
    assert "`seeds` is 7, there 2" in err
    _, err = told(capsys, *SMALL, "--model", "mlp", "--output", str(study), code=2)
    assert "`model`" in err
    assert (study / "study.yaml").read_bytes() == before
    told(capsys, *SMALL, "--output", str(study))  # the same one goes on


def test_folders_that_hold_other_things_or_are_in_use_are_refused(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with filelock.FileLock(study / ".lock"):
        _, err = told(capsys, str(study), code=3)
    assert str(study) in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    told(capsys, *SMALL, "--output", str(tmp_path / "full"), code=2)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    told(capsys, str(tmp_path / "full"), "--method", "er", code=3)
    told(capsys, str(study), "--output", str(tmp_path / "new"), code=2)


# -------------------------------------------------------------------------------- grids, labels, orders


def test_a_grid_makes_variants_named_by_what_differs() -> None:
    grid = {"ewc.lambda": [10, 100], "train.lr": [0.1]}
    study = Study.from_data({"scenarios": ["split-digits"], "methods": [{"plugins": ["ewc"], "grid": grid}]})
    found = {method.name: (method.plugins, method.train) for method in study.methods}
    assert found == {f"ewc[lambda={value},lr=0.1]": ({"ewc": {"lambda": value}}, {"lr": 0.1}) for value in (10, 100)}
    assert Study.from_data(study.written()) == study


def test_settings_of_a_method_win_over_those_of_the_study() -> None:
    study = Study.from_data(
        {
            "scenarios": ["split-digits"],
            "methods": ["er", {"plugins": {"er": {"size": 7}}, "name": "few", "train": {"lr": 0.5}}],
            "train": {"lr": 0.25, "momentum": 0.5, "optimizer": "sgd"},
            "set": {"er.size": 30, "train.momentum": 0.75},
        }
    )
    er, few = (study.configure(study.scenarios[0], method, {}, 3).model_dump() for method in study.methods)
    assert (er["plugins"]["er"]["size"], few["plugins"]["er"]["size"]) == (30, 7)
    assert (er["train"]["lr"], few["train"]["lr"]) == (0.25, 0.5)
    assert er["train"]["momentum"] == few["train"]["momentum"] == 0.75
    assert er["run"]["seed"] == few["run"]["seed"] == 3


def test_a_method_may_have_options_of_the_network_or_another_one() -> None:
    study = Study.from_data(
        {
            "scenarios": ["split-digits"],
            "model": {"name": "mlp", "hidden": [32]},
            "methods": [
                "er",
                {"plugins": "er", "name": "wide", "model": {"hidden": [16]}},
                {"plugins": "er", "name": "conv", "model": "cnn-small"},
                {"plugins": [], "model": {"hidden": [4]}, "name": "small"},
            ],
            "set": {"model.hidden": [8]},
        }
    )
    networks = {}
    for method in study.all_methods:
        model = study.configure(study.scenarios[0], method, {}, 0).model
        networks[method.name] = (model.name, model.options.get("hidden"))
    usual = dict.fromkeys(["fine-tuning", "joint", "er"], ("mlp", [8]))
    assert networks == usual | {"wide": ("mlp", [16]), "conv": ("cnn-small", None), "small": ("mlp", [4])}
    assert Study.from_data(study.written()) == study
    with pytest.raises(UsageError, match="`model` of the method `er` is 3; it must be a name or a mapping"):
        Study.from_data({"scenarios": ["split-digits"], "methods": [{"plugins": "er", "model": 3}]})


def test_class_orders_are_the_same_for_all_methods(tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    arguments = ["--no-baselines", "--method", "er", "--seeds", "1", *SHORT, "--quiet"]
    assert (
        main(["compare", "-s", "split-digits", "--method", "lwf", "--orders", "2", *arguments, "--output", str(two)])
        == 0
    )
    both = ["-s", "split-digits", "-s", "permuted-digits", "--orders", "1"]
    assert main(["compare", "--engine", "inline", *both, *arguments, "--output", str(one)]) == 0
    orders: dict[tuple[str, int | None], list[int]] = {}
    for found in read_study(two).finished:
        orders[found.method, found.order] = json.loads((found.folder / "split.json").read_text())["class_order"]
    assert orders["er", 0] == orders["lwf", 0] != orders["er", 1] == orders["lwf", 1]
    assert {(found.scenario, found.order) for found in read_study(one).finished} == {
        ("split-digits", 0),
        ("permuted-digits", None),  # it has no class orders
    }


def test_extreme_orders_have_the_most_and_the_least_similar_neighbors() -> None:
    study = Study.from_data({"scenarios": ["split-digits"], "orders": 6, "order_sampling": "extreme"})
    options = [plan.order_options(study, study.scenarios[0], seed) for seed in range(6)]
    assert [o["seed"] for o in options] == list(range(6))
    assert [o["order"] for o in options[::3]] == ["random", "random"]
    config = resolve(scenario="split-digits")
    scenario = registry.build_scenario(config.scenario, config.run)
    x = np.concatenate([e.train.x.numpy().reshape(len(e.train.x), -1) for e in scenario])
    y = np.concatenate([e.train.y.numpy() for e in scenario])
    means = np.stack([x[y == digit].mean(0) for digit in range(10)])  # the natural order: labels are digits
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    cosine = means @ means.T
    for seed, best in ((1, max), (4, max), (2, min), (5, min)):
        order = options[seed]["order"]
        assert sorted(order) == list(range(10))
        for i in range(9):
            chosen = cosine[order[i], order[i + 1]]
            assert chosen == pytest.approx(best(cosine[order[i], order[j]] for j in range(i + 1, 10)), abs=1e-6)
    assert options[1]["order"] != options[4]["order"]


# ---------------------------------------------------------------------------------- stale cells and code


def test_the_code_of_a_cell_is_that_of_clframe_and_of_the_modules_it_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = cells.code_of(resolve(scenario="split-digits", plugins=["er"]))
    assert {"clframe.engine", "clframe.toolkit.memory", "clframe.plugins.er", "clframe.scenarios.digits"} <= set(code)
    assert not {"clframe.plugins.ewc", "clframe.cli.main", "clframe.experiments.cells"} & set(code)
    package = tmp_path / "mine_of_others"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "method.py").write_text("import json\nfrom . import parts\nfrom mine_of_others.rest import thing\n")
    (package / "parts.py").write_text("x = 1\n")
    (package / "rest.py").write_text("thing = 1\n")
    (package / "unused.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    names = {f"mine_of_others{part}" for part in ("", ".method", ".parts", ".rest")}
    before = dict(cells._code_from("mine_of_others.method"))
    assert set(before) == names
    (package / "parts.py").write_text("x = 2\n")
    cells.forget_code()
    after = cells._code_from("mine_of_others.method")
    assert {name for name in names if before[name] != after[name]} == {"mine_of_others.parts"}


def test_stale_cells_are_named_with_the_reason_and_run_again_unless_kept(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = cell(study, "er", 0)
    old = new.rename(new.with_name("er-of-old-code"))
    record = new.with_name(f"{new.name}.json").rename(old.with_name(f"{old.name}.json"))
    record.write_text(record.read_text().replace(json.loads(record.read_text())["code"]["clframe.plugins.er"], "0"))
    before = stamps(study)
    _, err = told(capsys, str(study), "--keep-stale")
    assert "`clframe.plugins.er` changed" in err
    assert stamps(study) == before
    assert [c.folder.name for c in read_study(study).finished if c.stale] == [old.name]
    _, err = told(capsys, str(study))
    assert "`clframe.plugins.er` changed" in err
    assert stamps(study).items() > before.items()
    assert (new / "results.json").read_bytes() == (old / "results.json").read_bytes()
    assert not any(c.stale for c in read_study(study).finished)


@pytest.mark.parametrize("name", cells.WITHOUT_FIGURES)
def test_settings_that_change_no_figure_are_not_in_the_address(name: str) -> None:
    values: dict[str, object] = {"output": "a", "data_root": "b", "tensorboard": False, "checkpoint_every": 1.0}
    values |= {"log_every": 7, "tuned": {"protocol": "first-2"}}
    assert cells.settings_of(resolve(run={name: values[name]})) == cells.settings_of(resolve())


def test_other_settings_and_the_order_of_plugins_are_in_the_address() -> None:
    plain = cells.settings_of(resolve())
    for changed in (
        resolve(run={"seed": 1}),
        resolve(train={"lr": 0.5}),
        resolve(scenario={"limit": 3}),
        resolve(model={"name": "mlp"}),
        resolve(plugins=["er", "lwf"]),
        resolve(run={"eval_batch_size": 3}),
    ):
        assert cells.settings_of(changed) != plain
    assert cells.settings_of(resolve(plugins=["er", "lwf"])) != cells.settings_of(resolve(plugins=["lwf", "er"]))


# ------------------------------------------------------------------------------ failures and interruptions


def test_a_cell_that_fails_is_told_and_the_study_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    diverging = {"plugins": ["er"], "name": "far", "train": {"lr": 1e30, "clip": 0.0, "optimizer": "sgd"}}
    file.write_text(
        yaml.safe_dump({"scenarios": ["split-digits"], "methods": [diverging, "er"], "seeds": 1, "baselines": False})
    )
    folder = tmp_path / "new"
    out, err = told(capsys, "--config", str(file), *SHORT, "--output", str(folder), code=4)
    assert "far on split-digits, seed 0 failed" in err
    assert "Failed: far on split-digits, seed 0" in out
    outcome = read_study(folder)
    assert [c.method for c in outcome.finished] == ["er"]
    (failed,) = outcome.unfinished
    assert (failed.method, failed.state) == ("far", "failed")
    assert failed.sentence


def test_an_interrupted_study_goes_on_to_the_same_figures(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show = StudyLive.__call__

    def stop(self: StudyLive, event: Any) -> None:
        show(self, event)
        in_er = event.kind == "progress" and event.cell.method == "er"
        if in_er and event.event["kind"] == "experience" and event.event["index"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StudyLive, "__call__", stop)
    folder = tmp_path / "new"
    _, err = told(capsys, *SMALL, "--quiet", "--output", str(folder), code=130)
    assert f"`clframe compare {folder}`" in err
    assert cells.state_of(cell(folder, "er")) == "stopped"
    assert len(stamps(folder)) == 4
    monkeypatch.undo()
    told(capsys, str(folder), "--quiet")
    assert set(stamps(folder)) == set(stamps(study))
    for name in stamps(study):
        for file in ("results.json", "predictions.safetensors"):
            assert (folder / "cells" / name / file).read_bytes() == (study / "cells" / name / file).read_bytes()


def test_deaths_in_a_row_count_until_there_is_a_new_checkpoint(tmp_path: Path) -> None:
    study = Study.from_data({"scenarios": ["split-digits"], "methods": ["er"], "seeds": 1, "baselines": False})
    (one,) = plan.make_plan(study, tmp_path).cells
    checkpoints = one.folder / "checkpoints"
    cells.begin(one)
    assert [cells.count_death(one), cells.count_death(one)] == [1, 2]
    (checkpoints / "0001").mkdir(parents=True)
    assert [cells.count_death(one), cells.count_death(one), cells.count_death(one)] == [1, 2, 3]
    cells.fail(one, "It died.")
    assert cells.state_of(one.folder) == "failed"
    cells.begin(one)
    assert cells.state_of(one.folder) == "waiting"
    assert cells.count_death(one) == 1


def test_a_run_that_no_checkpoint_holds_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = {"name": "split-digits", "limit": 2}
    asked = {"scenarios": [scenario], "methods": ["er"], "seeds": 1, "baselines": False, "train": {"iterations": 1}}
    (one,) = plan.make_plan(Study.from_data(asked), tmp_path).cells
    one.folder.mkdir(parents=True)
    (one.folder / "config.yaml").write_text(yaml.safe_dump({**one.config.model_dump(), "run": {"seed": 0}}))
    monkeypatch.setattr(registry.plugin_class("er"), "resumes", False)
    cells.run_inline([one], lambda event: None)
    assert cells.state_of(one.folder) == "finished"
    assert (one.folder.with_name(f"{one.folder.name}-stopped-1") / "config.yaml").is_file()
    assert read_config(one.folder).run.seed == 0
