import json
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch

import clframe
from clframe import Plugin, UsageError, hookimpl, registry, testing
from clframe.config import resolve, to_yaml
from clframe.settings import Component, Config, RunSettings, TrainSettings
from clframe.strict_yaml import parse_yaml


def problems(**given):
    with pytest.raises(UsageError) as caught:
        resolve(**given)
    return list(caught.value.problems)


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# what wins


def test_without_anything_it_is_plain_fine_tuning_on_split_digits():
    config = resolve()
    assert config.scenario.name == "split-digits"
    assert config.scenario.options["experiences"] == 5
    assert config.model == Component("mlp-100")
    assert config.plugins == {}
    assert (config.train.iterations, config.train.epochs, config.train.keep_optimizer) == (300, None, True)
    assert config.run == RunSettings()


def test_what_suits_a_scenario_may_name_options_of_the_model():
    config = resolve(scenario="permuted-digits")
    assert config.model == Component("mlp", {"hidden": [256, 256]})
    assert config.train == TrainSettings(optimizer="adam", lr=1e-3, batch_size=32, epochs=10, threads=1)


def test_each_place_wins_over_the_ones_before_it(file):
    path = file("train: {lr: 0.1, batch_size: 8, clip: 2}\nrun: {seed: 1, device: cpu}")
    assert resolve(scenario="split-mnist").train.batch_size == 128
    config = resolve(
        scenario="split-mnist",
        yaml_file=path,
        sets=["train.lr=0.2", "train.clip=3", "run.seed=2"],
        train={"lr": 0.3},
        run={"seed": 3},
    )
    assert (config.train.batch_size, config.train.clip, config.train.lr) == (8, 3.0, 0.3)
    assert (config.run.device, config.run.seed) == ("cpu", 3)


def test_options_reach_scenario_model_and_plugins():
    config = resolve(
        scenario={"limit": 7},
        plugins=["joint"],
        sets=["scenario.experiences=2", "model.hidden=[10,20]", "joint.form=cumulative", "train.lr=1e-3"],
        model="mlp",
    )
    assert (config.scenario.options["limit"], config.scenario.options["experiences"]) == (7, 2)
    assert config.model == Component("mlp", {"hidden": [10, 20]})
    assert config.plugins == {"joint": Component("joint", {"form": "cumulative", "restart": False})}
    assert config.train.lr == 1e-3


def test_a_named_model_does_not_take_the_options_that_suit_another():
    assert resolve(scenario="permuted-digits", model="mlp").model == Component("mlp", {"hidden": [400, 400]})
    assert resolve(scenario="permuted-digits", sets=["model.hidden=[5]"]).model == Component("mlp", {"hidden": [5]})
    assert resolve(scenario="permuted-digits", model="cnn-small").model == Component(
        "cnn-small", {"widths": [32, 32, 64]}
    )


def test_another_scenario_or_model_drops_the_options_of_the_file(file):
    path = file("scenario: {name: split-digits, first: 2}\nmodel: {name: mlp, hidden: [7]}")
    kept = resolve(yaml_file=path, sets=["scenario.limit=3"])
    assert (kept.scenario.options["first"], kept.scenario.options["limit"], kept.model.options["hidden"]) == (2, 3, [7])
    other = resolve(yaml_file=path, scenario="permuted-digits", sets=["scenario.limit=3"], model="mlp-100")
    assert (other.scenario.name, other.scenario.options["limit"]) == ("permuted-digits", 3)
    assert other.model == Component("mlp-100")
    assert "first" not in other.scenario.options


def test_plugins_of_flags_replace_those_of_the_file_and_keep_their_options(file):
    path = file("plugins: {joint: {form: cumulative}, tensorboard: {}}")
    assert list(resolve(yaml_file=path).plugins) == ["joint", "tensorboard"]
    assert resolve(yaml_file=path, plugins=["joint"]).plugins["joint"].options == {
        "form": "cumulative",
        "restart": False,
    }
    assert resolve(yaml_file=path, plugins=[{"joint": {"form": "once"}}]).plugins["joint"].options["form"] == "once"
    assert resolve(yaml_file=file("plugins: [joint]")).plugins["joint"].options["form"] == "once"


@pytest.mark.parametrize(
    ("scenario", "given", "length"),
    [
        ("split-digits", {}, (None, 300)),
        ("split-digits", {"train": {"epochs": 2}}, (2, None)),
        ("permuted-digits", {"sets": ["train.iterations=5"]}, (None, 5)),
        ("permuted-digits", {"train": {"epochs": None, "iterations": 5}}, (None, 5)),
    ],
)
def test_the_users_choice_of_epochs_or_iterations_ends_the_scenarios(scenario, given, length):
    train = resolve(scenario=scenario, **given).train
    assert (train.epochs, train.iterations) == length


def test_set_wins_over_the_file_for_a_plugin_that_only_the_file_names(file):
    path = file("plugins: {ewc: {lambda: 5, labels: exact}}\n")
    plain, changed = (resolve(yaml_file=path, sets=sets).plugins["ewc"].options for sets in ([], ["ewc.lambda=7"]))
    assert (plain["lambda"], changed["lambda"], changed["labels"]) == (5.0, 7.0, "exact")


def test_a_flag_ends_the_other_length_of_the_file_but_two_of_one_place_are_refused(file):
    path = file("train: {epochs: 3}")
    assert resolve(yaml_file=path, train={"iterations": 4}).train.epochs is None
    assert resolve(train={"iterations": 4}, sets=["train.epochs=2"]).train.iterations == 4
    (flags,) = problems(sets=["train.iterations=4", "train.epochs=2"])
    (of_file,) = problems(yaml_file=file("train: {epochs: 3, iterations: 4}"))
    assert flags == of_file
    assert "`train.epochs` and `train.iterations`" in flags


# what is refused


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"scenario": "split-digit"}, "There is no scenario `split-digit`. Did you mean `split-digits`?"),
        ({"model": "mlpp"}, "There is no model `mlpp`. Did you mean `mlp`?"),
        ({"plugins": ["jointt"]}, "There is no plugin `jointt`. Did you mean `joint`?"),
        ({"plugins": ["joint", "joint"]}, "The plugin `joint` is named twice"),
        (
            {"scenario": {"experience": 3}},
            "`scenario.experience` is not an option of the scenario `split-digits`.",
        ),
        (
            {"model": {"name": "mlp", "hidden": "x"}},
            "`model.hidden` is 'x': it should be a valid list.",
        ),
        ({"train": {"lrr": 1}}, "`train.lrr` is not an option of `train`. Did you mean `lr`?"),
        ({"train": {"lr": -1.0}}, "`train.lr` is -1.0: it should be greater than 0."),
        ({"train": {"lr": float("nan")}}, "`train.lr` is nan: it should be a finite number."),
        ({"sets": ["train.lr=.inf"]}, "`train.lr` is inf: it should be a finite number."),
        ({"sets": ["train.epochs=1.5"]}, "`train.epochs` is 1.5: it should be a valid integer."),
        (
            {"run": {"eval_every": "step"}},
            "`run.eval_every` is 'step': it should be 'experience' or 'epoch' or a valid integer.",
        ),
        (
            {"run": {"eval_every": 0}},
            "`run.eval_every` is 0: it should be 'experience' or 'epoch' or greater than or equal to 1.",
        ),
        (
            {"run": {"eval_images": 50}},
            "`run.eval_images` needs `run.eval_every=epoch`, or a number of steps there, such as 10.",
        ),
        ({"train": {"nesterov": True}}, "`train.nesterov` needs a `train.momentum` above 0."),
        (
            {"sets": ["joint.form=once"]},
            "`--set joint...`: the plugin `joint` ",
        ),
        ({"sets": ["jointt.x=1"]}, "`--set jointt...`: there is no plugin `jointt`. Did you mean `joint`?"),
        (
            {"sets": ["lr"]},
            "`--set lr` is not of the form `section.option=value`",
        ),
        ({"sets": ["train.lr=1", "train.lr=2"]}, "`--set train.lr` is given twice; give it once."),
        (
            {"sets": ["train.lr=[1"]},
            "`--set train.lr=[1`, line 1, column 3: expected ',' or ']', but got '<stream end>'.",
        ),
        ({"plugins": ["joint"], "sets": ["joint.restart=true"]}, "`joint.restart` needs `joint.form=cumulative`"),
    ],
)
def test_a_mistake_is_one_sentence(given, sentence):
    found = problems(**given)
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_all_mistakes_are_told_at_once(file):
    found = problems(
        scenario="split-digit",
        model="mlpp",
        plugins=["joint", "jointt"],
        yaml_file=file("sceanrio: x\nrun: {sed: 1}"),
        sets=["train.lr=x", "train.clip=-1", "joint.forms=1", "bad"],
        train={"epochs": 0},
    )
    expected = [
        "sceanrio",
        "`--set bad`",
        "`split-digit`",
        "`mlpp`",
        "`joint.forms`",
        "`jointt`",
        "`train.epochs`",
        "`train.lr`",
        "`train.clip`",
        "`run.sed`",
    ]
    assert len(found) == len(expected)
    assert all(word in "\n".join(found) for word in expected)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("train: {lr: 1, lr: 2}", ", line 1, column 16: the key `lr` stands in line 1 already."),
        ("run: &a {seed: 1}", ", line 1, column 6: anchors and aliases "),
        ("run: *a", ", line 1, column 6: anchors and aliases "),
        ("run: !!python/object:os.system {}", ", line 1, column 6: the tag tag:yaml.org,2002:python/object:os.system"),
        ("run:\n  seed: [1", ", line 2, column 11: expected ',' or ']'"),
        ("{1: 2}", ", line 1, column 2: a key must be a text."),
        ("a: 1\n---\nb: 2", ", line 2, column 1: "),
        ("\x07", ": not YAML: "),
        ("[" * 5000, ": nested too deeply."),
        ("- 1", " scenario, model, plugins, train, run."),
        ("", " must hold a mapping"),
        ("runn: {}", ": there is no section `runn`. Did you mean `run`?"),
        ("run: 5", "`run` is 5; "),
        ("scenario: {name: 5}", "`scenario.name` is 5; it must be a text."),
        ("plugins: ewc", "`plugins` is 'ewc'; "),
        (b"\xff\xfe\xff", " is not UTF-8 text (byte 0): save it as UTF-8."),
        ("#" * 100_001, " larger than 100000 bytes"),
        (f"plugins: [{', '.join(f'p{i}' for i in range(101))}]", "`plugins` names 101 plugins; it can name 100."),
        ("plugins: 3", "`plugins` is 3; "),
        ("plugins: false", "`plugins` is False; "),
        ("train: {lr: " + "1" * 5000 + "}", ", line 1, column 13: a whole number of 5,000 digits is too large."),
    ],
)
def test_a_wrong_file_is_one_sentence(file, content, sentence):
    found = problems(yaml_file=file(content))
    assert len(found) == 1
    assert sentence in found[0]


def test_of_very_many_unknown_sections_the_first_are_named(file):
    found = problems(yaml_file=file("".join(f"k{i}: 1\n" for i in range(1_000))))
    assert len(found) == 21
    assert found[-1].endswith(": nor are 980 more of its names sections.")


def test_a_missing_file_is_named(tmp_path):
    assert problems(yaml_file=tmp_path / "no.yaml") == [
        f"The configuration {tmp_path / 'no.yaml'} cannot be read: No such file or directory."
    ]


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("~", None),
        ("", None),
        ("true", True),
        ("no", "no"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("'1e-3'", "1e-3"),
        ("[100, 1e2]", [100, 100.0]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_values_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text, "x")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("lr", [1e-05, 1e-300, 0.1 + 0.2, 1 / 3, 5e-324, 123456789.123])
def test_a_written_configuration_resolves_to_itself(file, lr):
    config = resolve(
        scenario={"name": "permuted-digits", "limit": 5},
        plugins=["joint"],
        sets=["joint.form=cumulative", "run.device='1e-3'", "run.data_root='no'"],
        train={"lr": lr, "milestones": [1.5], "schedule": "steps"},
    )
    again = resolve(yaml_file=file(to_yaml(config)))
    assert again == config
    assert again.train.lr == lr
    assert to_yaml(again) == to_yaml(config)


def test_a_file_holds_origin_start_and_pinned_among_the_options():
    pinned = {"data": "d", "split": "s"}
    written = {
        "scenario": {"name": "split-digits", "limit": 5, "pinned": pinned},
        "model": {"name": "mlp", "hidden": [3], "start": "runs/a"},
        "plugins": {"duplicate": {"start": "first"}, "mine": {"n": 1, "python object": True}},
        "train": TrainSettings().model_dump(),
        "run": RunSettings().model_dump(),
    }
    config = Config.model_validate(written)
    assert config.scenario == Component("split-digits", {"limit": 5}, pinned=pinned)
    assert config.model == Component("mlp", {"hidden": [3]}, start="runs/a")
    assert config.plugins == {
        "duplicate": Component("duplicate", {"start": "first"}),
        "mine": Component("mine", {"n": 1}, origin="object"),
    }
    assert json.dumps(config.model_dump()) == json.dumps(written)  # in this order, too


@pytest.mark.parametrize(
    ("section", "written", "sentence"),
    [
        ("scenario", 3, "`scenario` is 3: it should be a valid dictionary."),
        ("model", {"hidden": [3]}, "`model` is {'hidden': [3]}: it should have a `name`, which is a text."),
        ("plugins", {"ewc": 3}, "`plugins.ewc` is 3: it should be a valid dictionary."),
        ("model", {"name": "mlp", "start": None}, "`model.start` is None; it must be the folder of a finished run."),
    ],
)
def test_a_part_of_another_form_is_refused_in_a_file(section, written, sentence):
    whole = resolve().model_dump()
    with pytest.raises(UsageError) as caught:
        Config.model_validate(whole | {section: written})
    assert caught.value.problems == (sentence,)


def test_a_start_that_is_no_folder_is_refused_beside_other_mistakes():
    assert problems(model={"name": "mlp", "start": 5}, sets=["scenario.limit=x"]) == [
        "`scenario.limit` is 'x': it should be a valid integer.",
        "`model.start` is 5; it must be the folder of a finished run.",
    ]


def test_the_folder_of_a_run_is_not_part_of_what_is_repeated(file):
    config = resolve(run={"output": "here"})
    assert config.run.output == "here"
    assert resolve(yaml_file=file(to_yaml(config))).run.output is None


def test_all_settings_are_documented():
    assert all(f.description for kind in (TrainSettings, RunSettings) for f in kind.model_fields.values())


# the first experience


class Settings(Plugin):
    """Keeps by what each experience was trained."""

    name = "seeing-settings"
    observer = True

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, object]] = {}

    @hookimpl
    def after_step(self, run, batch):
        group = run.optimizer.param_groups[0]
        found = {
            "optimizer": type(run.optimizer).__name__.lower(),
            "lr": group["lr"],
            "momentum": group.get("momentum"),
            "weight_decay": {g["weight_decay"] for g in run.optimizer.param_groups},
            "clip": run.settings.clip,
            "steps": run.steps_in_phase,
            "batch": max(len(batch), self.seen.get(run.experience.index, {}).get("batch", 0)),
            "norm": float(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()) <= 0.011,
        }
        self.seen[run.experience.index] = found


FIXED = ("optimizer", "lr", "momentum", "weight_decay", "clip", "steps")  # of all steps of an experience
COMMON = {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "clip": 0.0}


def test_the_first_experience_is_trained_by_settings_of_its_own(tiny):
    seeing = Settings()
    first = {"epochs": 3, "batch_size": 6, "optimizer": "adam", "lr": 0.002, "weight_decay": 0.1, "clip": 0.01}
    clframe.run(tiny(), "mlp-100", [seeing], train=COMMON | {"first": first})
    assert seeing.seen[0] == {
        "optimizer": "adam",
        "lr": 0.002,
        "momentum": None,
        "weight_decay": {0.0, 0.1},
        "clip": 0.01,
        "steps": 12,  # 24 images in batches of 6, three times
        "batch": 6,
        "norm": True,
    }
    common = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": {0.0}, "clip": 0.0, "steps": 6}
    assert seeing.seen[1] == seeing.seen[2] == common | {"batch": 8, "norm": False}


@pytest.mark.parametrize(
    ("common", "first", "steps"),
    [
        ({"epochs": 2}, {"iterations": 5}, [5, 6, 6]),
        ({"iterations": 4}, {"epochs": 1}, [3, 4, 4]),
        ({"iterations": 4}, {"lr": 0.01}, [4, 4, 4]),
        ({}, {"epochs": 2}, [6, 3, 3]),
    ],
)
def test_the_first_length_ends_the_common_one(tiny, common, first, steps):
    seeing = Settings()
    clframe.run(tiny(), "mlp-100", [seeing], train={"batch_size": 8, **common, "first": first})
    assert [seeing.seen[i]["steps"] for i in range(3)] == steps


def test_a_first_experience_that_differs_in_nothing_changes_nothing(tiny):
    first = {"lr": 0.05, "epochs": 2}
    with_it = clframe.run(tiny(), "mlp-100", train=COMMON | {"first": first})
    assert with_it.data == clframe.run(tiny(), "mlp-100", train=COMMON).data
    assert with_it.data != clframe.run(tiny(), "mlp-100", train=COMMON | {"first": {"lr": 0.001}}).data


@pytest.mark.parametrize(
    ("first", "sentence"),
    [
        ({"epoch": 3}, "`train.first.epoch` is not an option of `train.first`. Did you mean `epochs`?"),
        ({"logits": "all"}, "`train.first.logits` is not an option of `train.first`."),
        ({"keep_optimizer": True}, "`train.first.keep_optimizer` is not an option of `train.first`."),
        ({"first": {}}, "`train.first.first` is not an option of `train.first`."),
        ({"lr": -1.0}, "`train.first.lr` is -1.0: it should be greater than 0."),
        ({"epochs": 1.5}, "`train.first.epochs` is 1.5: it should be a valid integer."),
        (
            {"epochs": 1, "iterations": 2},
            "`train.first.epochs` and `train.first.iterations` exclude each other",
        ),
        ({"optimizer": "sdg"}, "`train.first.optimizer` is 'sdg': it should be 'sgd', 'adam' or 'adamw'."),
        ({"nesterov": True}, "`train.first.nesterov` needs a `train.first.momentum` above 0."),
        (3, "`train.first` is 3: it should be a valid dictionary."),
    ],
)
def test_a_mistake_in_the_first_experiences_settings_is_one_sentence(first, sentence):
    (found,) = problems(scenario="permuted-digits", train={"first": first})
    assert found.startswith(sentence)


def test_the_first_experiences_settings_exclude_a_kept_optimizer(tiny):
    train, words = {"first": {"lr": 0.1}, "keep_optimizer": True}, "`train.first` and `train.keep_optimizer`"
    (problem,) = problems(scenario="permuted-digits", train=train)
    assert words in problem
    with pytest.raises(UsageError, match=words):
        clframe.run(tiny(), train=train)


def test_the_first_experiences_settings_end_the_kept_optimizer_that_suits_a_scenario():
    config = resolve(scenario="split-digits", sets=["train.first={lr: 0.1}"])
    assert (config.train.keep_optimizer, config.train.first) == (False, {"lr": 0.1})


def test_a_scenario_of_ones_own_does_not_get_what_suits_the_default_one(tiny):
    """Neither when settings are checked: split-digits keeps its optimizer, which would exclude `train.first`."""
    assert resolve().train.keep_optimizer
    results = clframe.run(tiny(), "mlp-100", train={"first": {"epochs": 1}})
    assert len(results.accuracy["class"]) == 3


def test_the_first_experiences_settings_are_kept_in_the_written_configuration(file):
    config = resolve(scenario="permuted-digits", sets=["train.first={epochs: 2, lr: 1e-2, betas: [0.8, 0.9]}"])
    assert config.train.first == {"epochs": 2, "lr": 0.01, "betas": [0.8, 0.9]}
    assert (config.train.of(0).epochs, config.train.of(1).epochs) == (2, 10)
    assert (config.train.of(0).lr, config.train.of(1).lr) == (0.01, 1e-3)
    assert resolve(yaml_file=file(to_yaml(config))) == config


def test_the_first_experiences_settings_are_in_force_after_a_resume(tiny, tmp_path):
    """In the first experience and in the second, to the last bit; the optimizer is of another kind in each."""
    train = COMMON | {"first": {"iterations": 7, "batch_size": 6, "optimizer": "adam", "lr": 0.002}}
    whole: list[Settings] = []
    stopped_in: set[int] = set()

    def begin(folder):
        whole.append(Settings())
        clframe.run(tiny(), "mlp-100", whole[-1:], train=train, run={"output": str(folder), "tensorboard": False})

    def go_on(folder):
        stopped_in.add(len(whole[-1].seen))
        resumed = Settings()
        clframe.resume(folder, scenario=tiny(), plugins=[resumed])
        for i, seen in resumed.seen.items():
            assert {name: seen[name] for name in FIXED} == {name: whole[0].seen[i][name] for name in FIXED}
        assert "iterations: 7" in (folder / "config.yaml").read_text()

    files = ("results.json", "model.safetensors")
    testing.stop_and_resume(tmp_path, begin, go_on, lambda pauses: range(2, len(pauses), 3), files)
    assert {1, 2} < stopped_in


def test_what_suits_a_plugin_comes_between_the_scenario_and_the_user() -> None:
    """`hat` clips as its paper does, unless it is told otherwise."""
    assert resolve().train.clip == 1.0
    assert resolve(plugins=["hat"]).train.clip == 10_000.0
    assert resolve(plugins=["hat"], sets=["train.clip=3"]).train.clip == 3.0
    assert resolve(plugins=["hat"], train={"clip": 0.0}).train.clip == 0.0
    assert resolve(plugins=["hat"]).train.iterations == resolve().train.iterations  # the rest stays the scenario's


def test_the_first_named_plugin_decides_where_they_suit_different_settings() -> None:
    class One(Plugin):
        name = "one"
        suited_train: ClassVar[dict[str, Any]] = {"clip": 2.0, "lr": 0.5}

    class Two(Plugin):
        name = "two"
        suited_train: ClassVar[dict[str, Any]] = {"clip": 3.0, "momentum": 0.5}

    assert registry.suited_train([One(), Two()]) == {"clip": 2.0, "lr": 0.5, "momentum": 0.5}
    assert registry.suited_train([Two(), One()]) == {"clip": 3.0, "lr": 0.5, "momentum": 0.5}
    assert registry.suited_train(["no-such-plugin", "hat"]) == {"clip": 10_000.0}


def test_what_suits_a_plugin_holds_for_objects_too(tiny) -> None:
    clips: list[float] = []

    class Look(Plugin):
        name = "look"
        observer = True
        suited_train: ClassVar[dict[str, Any]] = {"clip": 7.0}

        @hookimpl
        def before_run(self, run):
            clips.append(run.settings.clip)

    clframe.run(tiny(2), "mlp-100", [Look()])
    clframe.run("split-digits", "mlp-100", [Look()], train={"iterations": 1})
    clframe.run(tiny(2), "mlp-100", [Look()], train={"clip": 0.5})
    assert clips == [7.0, 7.0, 0.5]


def test_strict_yaml_stands_alone() -> None:
    """Numbers are read as numbers by a process that imports nothing else of the package."""
    code = "from clframe.strict_yaml import dump_yaml, parse_yaml as p"
    code += "; print(p(dump_yaml(p('[5, 1e-3, no, null]', '')), ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[5, 0.001, 'no', None]\n"
