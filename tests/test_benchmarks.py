"""The benchmarks' own logic: records, tables, the page, and studies of protocols that say what they mean."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the benchmarks, imported by its path, with its neighbours importable meanwhile."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for neighbour in ("report", "kill_resume", "run"):
        monkeypatch.delitem(sys.modules, neighbour, raising=False)
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("report", monkeypatch)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("run", monkeypatch)


def record(
    protocol: str = "s/p", values: Sequence[float] = (0.5,), code: str = "new", date: str = "2000-01-02"
) -> dict:
    about = {"commit": "abc", "machine": "m", "versions": "v", "seconds": 3.0}
    return {"protocol": protocol, "values": [*values], "code": code, "date": date, **about}


def entry(**changed: object) -> dict:
    return {"measure": "average_accuracy", "expected": 50, "low": 40, "high": 60, "source": "s", **changed}


def test_records_come_back_as_they_were_kept(report: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "protocols.jsonl"
    assert report.read_records(path) == {}
    kept = [record("s/b", [0.1 + 1 / 3, 0.2]), record("s/a")]
    report.keep_records(path, kept)
    assert report.read_records(path) == {one["protocol"]: one for one in kept}
    assert [json.loads(line)["protocol"] for line in path.read_text().splitlines()] == ["s/a", "s/b"]


def test_a_record_is_replaced_by_one_of_other_values_or_code_alone(report: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "protocols.jsonl"
    report.keep_records(path, [record("s/a"), record("s/b"), record("s/c"), record("s/d")])
    later = [
        record("s/a", date="later"),
        record("s/b", [0.6], date="later"),
        record("s/c", code="newer", date="later"),
    ]
    report.keep_records(path, later)
    dates = {name: one["date"] for name, one in report.read_records(path).items()}
    assert dates == {"s/a": "2000-01-02", "s/b": "later", "s/c": "later", "s/d": "2000-01-02"}


def test_summary(report: ModuleType) -> None:
    figures = report.summary([1.0, 2.0, 6.0])
    assert figures == {"mean": 3.0, "sem": pytest.approx(math.sqrt(7 / 3)), "min": 1.0, "max": 6.0, "n": 3}
    assert math.isnan(report.summary([1.0])["sem"])


@pytest.mark.parametrize(("mean", "said"), [(40.0, "pass"), (60.0, "pass"), (39.99, "FAIL"), (60.01, "FAIL")])
def test_verdict(report: ModuleType, mean: float, said: str) -> None:
    assert report.verdict({"mean": mean}, 40, 60) == said


def test_protocol_table(report: ModuleType) -> None:
    records = {"s/q": record("s/q", [0.75]), "s/p": record("s/p", [0.5, 0.6]), "s/gone": record("s/gone")}
    lines = report.protocol_table({"s/p": entry(), "s/q": entry(), "s/unmeasured": entry()}, records)
    assert [line["protocol"] for line in lines] == ["s/p", "s/q"]
    assert lines[0] == {
        "protocol": "s/p",
        "mean": "55.00",
        "SEM": "5.00",
        "min": "50.00",
        "max": "60.00",
        "seeds": "2",
        "expected": "50 [40, 60]",
        "result": "pass",
        "seconds": "3",
        "code": "new",
    }
    assert (lines[1]["SEM"], lines[1]["result"]) == ("-", "FAIL")


def test_table(report: ModuleType) -> None:
    text = report.table([{"name": "a|b", "x": 1.23456}, {"name": "c", "x": None, "more": 7}])
    assert text.splitlines() == [
        "| name | x | more |",
        "| --- | ---: | ---: |",
        "| a\\|b | 1.23 | - |",
        "| c | - | 7 |",
    ]
    assert report.table([]) == ""


def test_parts_are_replaced_one_by_one(report: ModuleType, tmp_path: Path) -> None:
    report.save_part("growth", [{"a": 1}], "make bench", ["first"], tmp_path)
    report.save_part("hook_cost", [{"b": 2}], "make bench", [], tmp_path)
    report.save_part("growth", [{"a": 3}], "make bench", ["second"], tmp_path)
    parts = report.load_parts(tmp_path)
    assert {name: part["lines"] for name, part in parts.items()} == {"growth": [{"a": 3}], "hook_cost": [{"b": 2}]}
    page = report.page(parts, {"s/p": entry()}, {"s/p": record()})
    assert page.index("## Training time") < page.index("## Cost of the hooks") < page.index("## Protocols")
    assert "- second" in page
    assert "first" not in page
    assert "| s/p | 50.00 |" in page


def test_the_version_of_the_code_follows_its_files(report: ModuleType, tmp_path: Path) -> None:
    for folder in report.CODE:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    before, commit = report.code_version(tmp_path)
    assert commit == "not in git"
    (tmp_path / "README.md").write_text("no code")
    assert report.code_version(tmp_path)[0] == before
    (tmp_path / "plugins" / "a.py").write_text("x = 2\n")
    assert report.code_version(tmp_path)[0] != before


def test_the_machine_is_described_without_its_name(report: ModuleType) -> None:
    import platform

    assert "cores" in report.machine()
    assert not platform.node() or platform.node() not in report.machine()


def test_the_index_has_each_method_of_the_studies_once(run: ModuleType) -> None:
    from clframe.experiments.study import Study

    files = [path for path in run.PROTOCOLS.glob("*.yaml") if path.stem != "index"]
    names = [f"{path.stem}/{method.name}" for path in files for method in Study.from_yaml(path).all_methods]
    assert sorted(run.read_index()) == sorted(names)


def test_the_page_is_that_of_the_committed_records(run: ModuleType, report: ModuleType) -> None:
    parts = report.load_parts(run.HERE / "results")
    assert run.PAGE.read_text(encoding="utf-8") == report.page(
        parts, run.read_index(), report.read_records(run.RECORDS)
    )


SIZES = {"digits": (300, 32), "mnist": (2000, 128)}
STRENGTHS = {"001": 0.01, "01": 0.1, "1": 1.0, "3": 3.0, "10": 10.0}  # as the names of protocols have them


def test_ranges_are_well_formed(run: ModuleType) -> None:
    for name, entry in run.read_index().items():
        assert set(entry) == {"measure", "expected", "low", "high", "source"}
        assert 0 <= entry["low"] <= entry["expected"] <= entry["high"] <= 100, name
        assert entry["high"] - entry["low"] <= 24, name
        assert entry["measure"] == ("average_incremental_accuracy" if "cifar100" in name else "average_accuracy")
        assert entry["source"]


def test_every_protocol_resolves_and_is_what_its_name_says(run: ModuleType, context) -> None:
    from clframe import registry

    seeds = {"digits": 5, "mnist": 1, "cifar10": 1, "cifar100": 3}
    studies = run.choose_studies(run.read_index())
    for protocol in run.read_index():
        name, method = protocol.split("/")
        study = studies[name]
        data, setting, *rest = name.split("-")
        group, cnn = "-".join(rest), "cnn" in rest or "gated" in rest
        (chosen,) = [one for one in study.methods if one.name == method]
        config = study.configure(study.scenarios[0], chosen, {}, 3)
        count = {"one-epoch": 10, "1500-steps": 3}.get(group, int(rest[-2]) if rest[-1:] == ["seeds"] else seeds[data])
        assert (study.seeds, study.orders) == (tuple(range(count)), None)
        assert (config.run.seed, config.train.threads) == (3, 1)
        assert config.scenario.name == f"split-{data}"
        assert config.scenario.options["setting"] == setting
        assert config.scenario.options["seed"] is None, "the order must follow the seed of the run"
        assert config.train.clip == 0
        if group == "demo":  # of the authors of MAS
            assert config.scenario.options["order"] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
            assert config.train.logits == "own"
            assert (config.train.of(0).epochs, config.train.of(0).lr) == (10, 0.01)
            assert (config.train.of(1).epochs, config.train.of(1).lr, config.train.batch_size) == (20, 0.001, 150)
        elif group == "one-epoch":
            assert config.scenario.options["order"] == "natural"
            assert config.train.optimizer == "sgd"
            assert (config.train.epochs, config.train.batch_size, config.train.momentum) == (1, 10, 0)
            assert all((p.options["size"], p.options["batch_size"]) == (500, 10) for p in config.plugins.values())
        elif data == "cifar10":
            assert (config.scenario.options["order"], config.scenario.options["limit"]) == ("random", 500)
            assert (config.train.epochs, config.train.batch_size, config.train.lr) == (20, 32, 0.01)
            assert config.train.keep_optimizer is False
        elif method == "channel-gating":
            assert config.scenario.options["order"] == "random"
            digits = (None, 400, 32), [64, 64, 64]
            assert (
                (config.train.epochs, config.train.iterations, config.train.batch_size),
                config.model.options["widths"],
            ) == (digits if data == "digits" else ((None, 1000, 32), [32, 32, 64]))
            assert config.train.keep_optimizer is False
        elif data == "cifar100":
            assert config.scenario.options["order"] == "random"
            assert (config.train.epochs, config.train.batch_size, config.train.lr) == (70, 128, 2.0)
            assert (config.train.milestones, config.train.factor) == ([49, 63], 0.2)
            assert config.model.options["last_relu"] is False
        else:
            assert config.scenario.options["order"] == "random"
            length = (1500, 32) if group == "1500-steps" else SIZES[data]
            assert (config.train.iterations, config.train.batch_size) == length
            assert config.train.keep_optimizer is not cnn
        plugin_name = next((n for n in sorted(registry.names("plugin"), key=len, reverse=True) if n in method), None)
        plugin_name = "generative-replay" if method.startswith("dgr") else plugin_name
        assert [*config.plugins] == ([] if method == "fine-tuning" else [plugin_name])
        plugin = registry.build_plugin(plugin_name, config.plugins[plugin_name].options) if plugin_name else None
        wanted = plugin.wanted_logits(context(setting, plugin)) if plugin else None
        of_seen = cnn or (data == "mnist" and method.startswith("dgr"))
        default = "own" if setting == "task" else "seen" if of_seen else "all"
        assert (config.train.logits or wanted) == (wanted or default)
        options = config.plugins[plugin_name].options if plugin_name else {}
        strength = method.rsplit("-", 1)[-1]
        if plugin_name in ("ewc", "mas", "lfl") and data == "digits":
            assert options["lambda"] == float(STRENGTHS.get(strength, strength))
        if plugin_name == "si":
            assert (options["c"], options["xi"]) == (float(STRENGTHS.get(strength, 10)), 0.1)
        if plugin_name == "lwm":
            assert (options["gamma"], options["layer"]) == (float(STRENGTHS.get(strength, 1)), "net.8")
        if plugin_name == "lwf" and data == "digits":
            assert options["form"] == ("heads" if setting == "task" else strength)
        if plugin_name == "ewc":
            assert options["form"] == ("online" if method.startswith("online") else "offline")
            assert options["labels"] == "exact"


@pytest.fixture
def tiny_studies(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Two studies in place of the protocols, carried out in this process; the list has the commands that ran."""
    from clframe.cli import compare as command

    index = {"digits-a/fine-tuning": entry(), "digits-a/er": entry(), "mnist-b/fine-tuning": entry()}
    train = "train: {iterations: 1}"
    study = f"scenarios: [{{name: split-digits, setting: task, experiences: 2}}]\nbaselines: false\nseeds: 2\n{train}\n"
    (tmp_path / "digits-a.yaml").write_text(f"{study}methods: [fine-tuning, er]\n")
    (tmp_path / "mnist-b.yaml").write_text(f"{study}methods: [fine-tuning]\n")
    for name, value in (("PROTOCOLS", tmp_path), ("HERE", tmp_path), ("PAGE", tmp_path / "RESULTS.md")):
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "RECORDS", tmp_path / "protocols.jsonl")
    monkeypatch.setattr(run, "read_index", lambda: index)
    monkeypatch.setattr(run, "short", lambda *_: None)
    commands: list[tuple[str, ...]] = []

    def carry_out(*words: str, data_root: Path) -> int:
        commands.append(words)
        assert words[0] == "compare"
        return command.compare(words[1], engine="inline", quiet=True)

    monkeypatch.setattr(run, "run_clframe", carry_out)
    monkeypatch.setattr(
        command, "_write_report", lambda outcome, path: None
    )  # plots take most of the time, and nothing is read
    return commands


def test_full_keeps_the_figures_of_the_report(
    run: ModuleType, tiny_studies: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import clframe
    from clframe.runs.results import read_results

    output = tmp_path / "runs"
    run.full(tmp_path, ["digits-a/er"], output)
    alone = run.report.read_records(run.RECORDS)
    assert [*alone] == ["digits-a/er"]
    expected = [
        clframe.run(
            {"name": "split-digits", "setting": "task", "experiences": 2},
            plugins=["er"],
            train={"iterations": 1, "threads": 1},
            run={"seed": seed, "output": None},
        ).measures["task"]["average_accuracy"]
        for seed in range(2)
    ]
    assert alone["digits-a/er"]["values"] == expected
    before = {path: path.stat().st_mtime_ns for path in output.rglob("results.json")}

    run.full(tmp_path, [], output, workers=1)
    records = run.report.read_records(run.RECORDS)
    assert [*records] == ["digits-a/er", "digits-a/fine-tuning"]
    assert records["digits-a/er"] == alone["digits-a/er"]
    assert all(path.stat().st_mtime_ns == before[path] for path in before), "the cells of er are not run again"
    assert len([*output.rglob("results.json")]) == 4
    folders = [path.parent for path in output.rglob("results.json") if path.parent.name.startswith("fine-tuning")]
    found = {read_results(folder).measures["task"]["average_accuracy"] for folder in folders}
    assert found == {*records["digits-a/fine-tuning"]["values"]}
    text = capsys.readouterr().out
    assert f"mnist-b: skipped, as there is no mnist.npz in {tmp_path}; name its folder with --data-root" in text
    assert tiny_studies == [("compare", f"{output}/digits-a"), ("compare", f"{output}/digits-a", "--workers", "1")]
    assert "| digits-a/er |" in run.PAGE.read_text()


def test_full_keeps_no_figures_of_a_method_with_a_failed_cell(
    run: ModuleType,
    tiny_studies: list[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = (tmp_path / "digits-a.yaml").read_text()
    (tmp_path / "digits-a.yaml").write_text(
        study.replace(
            "[fine-tuning, er]",
            "[fine-tuning, {plugins: er, train: {lr: 1e30, clip: 0, optimizer: sgd, iterations: 5}}]",
        )
    )
    with pytest.raises(SystemExit, match="Cells failed in digits-a"):
        run.full(tmp_path, ["digits-a"], tmp_path / "runs")
    assert [*run.report.read_records(run.RECORDS)] == ["digits-a/fine-tuning"]
    assert "digits-a/er: no figures are kept, as a cell is not finished" in capsys.readouterr().out
    monkeypatch.setattr(run, "run_clframe", lambda *_, data_root: 130)
    with pytest.raises(SystemExit) as stopped:
        run.full(tmp_path, ["digits-a"], tmp_path / "runs")
    assert stopped.value.code == 130


def test_full_refuses_a_name_that_the_index_lacks(run: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"no study or protocol digits-tusk, digits/er: .*index\.yaml"):
        run.choose_studies(run.read_index(), ["digits/er", "digits-task", "digits-tusk"])


@pytest.fixture
def method_cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("method_cost", monkeypatch)


def test_a_method_is_compared_within_each_repetition(method_cost: ModuleType) -> None:
    """Guards against ratios of medians: times of a machine that is slow for a while would be divided by others'."""
    job = method_cost.Job
    jobs = [
        job("fine-tuning", rival="fine-tuning"),
        job("fast", {"ewc": {}}, rival="a"),
        job("slow", {"si": {}}, rival="b"),
        job("alone", {"lwf": {}}, setting="task"),
        job("fine-tuning", setting="task"),
    ]
    ours = [[1.0, 10.0, 1.0], [2.0, 20.0, 3.0], [4.0, 30.0, 4.0], [9.0, 9.0, 9.0], [3.0, 3.0, 3.0]]
    theirs = {
        "fine-tuning": [2.0, 20.0, 2.0],
        "a": [4.0, 40.0, 3.0],
        "b": [2.0, 20.0, 2.0],
        method_cost.USUAL_LOADER: [5.0, 50.0, 6.0],
    }
    lines, notes = method_cost.compare(jobs, ours, theirs)
    assert [line["over fine-tuning"] for line in lines] == ["1.00", "2.00", "4.00", "3.00", "1.00"]
    assert [line["over its fine-tuning"] for line in lines] == ["1.00", "2.00", "1.00", None, None]
    assert [line["clframe / Avalanche"] for line in lines] == ["0.50", "0.50", "2.00", None, None]
    assert [line["clframe, ms"] for line in lines[:3]] == ["1.00", "3.00", "4.00"]
    assert notes[0].endswith("NOT reached: slow takes 2.00 times as long.")
    assert "takes 6.00 ms in place of 2.00" in notes[1]
    without = [jobs[i] for i in (0, 1, 3, 4)], [ours[i] for i in (0, 1, 3, 4)]
    assert ": reached; the nearest is " in method_cost.compare(*without, theirs)[1][0]


def test_every_job_has_its_fine_tuning_and_avalanche_each_method_once(method_cost: ModuleType) -> None:
    jobs = method_cost.JOBS
    plain = [job.base for job in jobs if not job.plugins]
    assert len(plain) == len(set(plain))
    assert {job.base for job in jobs} == set(plain)
    assert sorted(job.rival for job in jobs if job.rival) == sorted(method_cost.RIVALS)


def test_every_job_is_timed_with_its_method_at_work(
    method_cost: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against timing a penalty or a teacher that is not there yet."""
    import numpy as np

    import clframe

    rng = np.random.default_rng(0)
    y = np.arange(80) % 10
    x = rng.integers(0, 255, (100, 8, 8), np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=x[:80], y_train=y, x_test=x[80:], y_test=y[:20])
    seen: dict[str, set[str]] = {}
    run = clframe.run

    def spied(*given: object, **named: object) -> object:
        def listen(record: dict) -> None:
            if record["kind"] == "step" and record["experience"] == method_cost.MEASURED:
                terms.update(record["losses"])

        named["run"] = {**named["run"], "log_every": 1}
        return run(*given, **named, listeners=[listen])

    monkeypatch.setattr(clframe, "run", spied)
    monkeypatch.setattr(method_cost, "BATCH", 8)
    monkeypatch.setattr(method_cost, "THREADS", None)
    monkeypatch.setattr(method_cost, "LENGTHS", {"mlp": (1, 1, 2), "cnn-small": (1, 1, 2)})
    for job in method_cost.JOBS:
        terms = seen.setdefault(f"{job.name} {job.setting}", set())
        assert method_cost.in_clframe(job, tmp_path) > 0
    bare = {"fine-tuning", "feature-extraction", "finetune-fc", "lwf, mc"}  # what they do is not a term of the loss
    for name, terms in seen.items():
        job = next(job for job in method_cost.JOBS if f"{job.name} {job.setting}" == name)
        expected = set() if job.name in bare else set(job.plugins)
        assert {term.partition("/")[0] for term in terms} == {"base"} | expected, name


def test_growth_is_late_over_early(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = load("growth", monkeypatch)
    count = growth.EXPERIENCES
    flat = {"seconds": [9.0, 5.0, *[2.0] * (count - 2)], "MiB": [100.0] * count}
    slow = {"seconds": [1.0 + i / 10 for i in range(count)], "MiB": [100.0] * count}
    large = {"seconds": [2.0] * count, "MiB": [100.0 + i for i in range(count)]}
    lines, notes = growth.compare({"flat": flat, "slow": slow, "large": large})
    assert [line["ratio"] for line in lines] == ["1.00", f"{(1 + 4.55) / (1 + 0.55):.2f}", "1.00"]
    assert [line["MiB ratio"] for line in lines] == ["1.000", "1.000", f"{149 / 104:.3f}"]
    assert notes[0].endswith("NOT reached by slow, large.")
    assert growth.compare({"flat": flat})[1][0].endswith("reached by all of them.")


def test_what_importance_may_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    fisher_cost = load("fisher_cost", monkeypatch)
    ratios = {("mlp", "empirical"): 1.2, ("mlp", "mas"): 1.21, ("resnet32", "empirical"): 4.0, ("resnet32", "mas"): 1.0}
    notes = fisher_cost.targets(ratios | {("mlp", "exact"): 9.0, ("resnet32", "exact"): 9.0})
    assert [note.rsplit(": ", 1)[1] for note in notes] == ["NOT reached.", "reached."]


def test_both_ways_of_mas_give_one_thing_for_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch's mean gradient is the gradient of its only image; of two opposite ones it is not."""
    import torch

    from clframe.model import IncrementalNet

    fisher_cost = load("fisher_cost", monkeypatch)
    torch.manual_seed(0)
    model = IncrementalNet(fisher_cost.backbones.mlp((1, 4, 4), hidden=[8]), [3]).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)

    def found(way: str, *images: torch.Tensor) -> dict[str, torch.Tensor]:
        kept: list[dict[str, torch.Tensor]] = []

        def zeros(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            kept.append({name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()})
            return kept[-1]

        monkeypatch.setattr(fisher_cost, "zeros_for", zeros)
        fisher_cost.one_pass(way, model, images, [torch.zeros(len(part), dtype=torch.int64) for part in images])
        return kept[0]

    one_by_one = found("mas, batch mean", x[:1], x[1:])
    together = found("mas", x)
    for name, expected in one_by_one.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-9, atol=0)
    assert not torch.allclose(found("mas, batch mean", x)["head.0.weight"] * 2, together["head.0.weight"], rtol=0.01)


def test_a_slow_while_in_one_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = load("growth", monkeypatch)
    runs = [
        {"seconds": [1.0, 9.0, 3.0], "MiB": [5.0, 6.0, 7.0]},
        {"seconds": [2.0, 1.0, 9.0], "MiB": [5.0, 6.0, 9.0]},
    ]
    assert growth.least(runs) == {"seconds": [1.0, 1.0, 3.0], "MiB": [5.0, 6.0, 7.0]}
