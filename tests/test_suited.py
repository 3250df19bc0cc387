"""Values in other types that hold the same, such as NumPy's numbers: taken by every setting and option, by one rule."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import clframe
from clframe import UsageError, registry
from clframe.config import resolve
from clframe.options import suited, validated
from clframe.plugins.ewc import EWC
from clframe.settings import RunSettings, TrainSettings

# options that one of a setting needs beside it
BESIDE: dict[str, dict[str, Any]] = {
    "train.nesterov": {"momentum": 0.5},
    "train.milestones": {"schedule": "steps"},
    "run.eval_images": {"eval_every": "epoch"},
    "scenario.split-folder": {"path": "x"},
    "scenario.split-table": {"path": "x"},
}
# of each type a value that every limit allows, the same in other types, and what is refused
NUMBERS = [np.int64(2), np.float32(2), 2e0, torch.tensor(2)]
WRONG_NUMBERS = [2.5, np.float32(2.5), True, np.bool_(True), "abc", "2", np.nan]
SHARES = [np.float64(0.5), np.float32(0.5), np.array(0.5)]
FORMS: dict[Any, tuple[Any, list[Any], list[Any]]] = {
    int: (2, NUMBERS, WRONG_NUMBERS),
    float: (0.5, SHARES, [True, np.bool_(True), "abc", "0.5", np.nan, np.inf]),
    bool: (True, [np.bool_(True), np.array(True)], [1, 1.0, np.int64(1), "abc", "true"]),
    str: ("a/b", [PurePosixPath("a/b"), np.str_("a/b")], [3, 2.5, True, np.int64(3)]),
    Path: (Path("a/b"), ["a/b"], [3, 2.5, True]),
}
LISTS: dict[Any, tuple[list[Any], type]] = {  # values, and NumPy's type of them
    int: ([2, 3], np.int64),
    float: ([0.5, 0.25], np.float32),
    str: (["a", "b"], np.str_),
}
MAPPING = {"epochs": np.int64(3), "lr": 0.5}


def members(hint: Any) -> list[Any]:
    """The types that `hint` is made of, but for None."""
    if hasattr(hint, "__metadata__"):
        return members(hint.__origin__)
    if get_origin(hint) in (list, tuple, Literal, dict):
        return [hint]
    parts = [part for argument in get_args(hint) for part in members(argument)]
    return [part for part in parts or [hint] if part is not type(None)]


def cases() -> Iterator[tuple[str, Any, Callable[[Any], Any]]]:
    """Of each setting and option its full name, its type, and a function that gives what becomes of a value."""
    for section, kind in (("train", TrainSettings), ("run", RunSettings)):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            if name in kind.model_fields:
                yield f"{section}.{name}", hint, of_settings(kind, name, BESIDE.get(f"{section}.{name}", {}))
    of_variants = {"huggingface": "huggingface:x", "torchvision": "torchvision:resnet18"}
    for kind in ("plugin", "scenario", "model"):
        for name in registry.names(kind):
            if name == "avalanche":  # whose options are those of Avalanche, which takes long to import
                continue
            named = of_variants.get(name, name)
            build = registry.plugin_class(name) if kind == "plugin" else registry.builder(kind, named)
            hints = get_type_hints(build.__init__ if inspect.isclass(build) else build, include_extras=True)
            for option in sorted(hints.keys() - {*registry.SUPPLIED, "return", "options"}):
                beside = BESIDE.get(f"{kind}.{name}", {})
                yield f"{kind}.{name}.{option}", hints[option], of_option(build, option, beside)


def of_settings(kind: type[TrainSettings] | type[RunSettings], name: str, beside: dict[str, Any]) -> Any:
    def put(value: Any) -> Any:
        try:
            return getattr(kind(**beside, **{name: value}), name)
        except ValidationError as error:
            raise UsageError(str(error)) from error

    return put


def of_option(build: Callable[..., Any], name: str, beside: dict[str, Any]) -> Any:
    return lambda value: validated(build, {**beside, name: value}, "x", skip=registry.SUPPLIED)[name]


CASES = {name: (hint, put) for name, hint, put in cases()}


def same(found: Any, expected: Any) -> bool:
    """Whether both are equal, and of equal types all through."""
    return type(found) is type(expected) and repr(found) == repr(expected)


def test_all_sections_are_tried():
    assert len(CASES) > 200
    assert {name.partition(".")[0] for name in CASES} == {"train", "run", "plugin", "scenario", "model"}
    kinds = {str(member) for hint, _ in CASES.values() for member in members(hint)}
    assert {str(kind) for kind in FORMS} <= kinds


@pytest.mark.parametrize("name", CASES)
def test_the_same_in_another_type_is_taken_and_what_is_not_the_same_is_refused(name: str):
    hint, put = CASES[name]
    kinds = members(hint)
    for kind in kinds:
        if kind in FORMS:
            expected, others, refused = FORMS[kind]
            assert same(put(expected), expected)
            for other in others:
                assert same(put(other), expected), other
            for wrong in (value for value in refused if type(value) not in kinds):
                with pytest.raises(UsageError):
                    put(wrong)
        elif kind == list[dict[str, Any]]:
            assert same(put([MAPPING]), [{"epochs": 3, "lr": 0.5}])
        elif get_origin(kind) is list:
            [of] = members(get_args(kind)[0])
            expected, typed = LISTS[of]
            for other in (expected, tuple(expected), np.array(expected), [typed(value) for value in expected]):
                assert same(put(other), expected), other
            for wrong in ([2.5, "x"], [True, True], [3 if of is str else "abc"], np.array([[1, 2], [3, 4]])):
                with pytest.raises(UsageError):
                    put(wrong)
        elif get_origin(kind) is Literal:
            assert same(put(np.str_(get_args(kind)[0])), get_args(kind)[0])
            with pytest.raises(UsageError):
                put(PurePosixPath(get_args(kind)[0]))
        else:
            assert kind == dict[str, Any]
            assert same(put(MAPPING), {"epochs": 3, "lr": 0.5})


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 2e1, 20),
        (int, -0.0, 0),
        (int, 2.0**53, 2.0**53),  # the first whose neighbor is not a float
        (int, float("inf"), float("inf")),
        (int | float, 2.0, 2.0),
        (int | list[int], 2.0, 2),
        (int | list[int], [2.0, 3], [2, 3]),
        (list[list[int]], [[1.0], (2,)], [[1], [2]]),
        (tuple[int, float], [2.0, 2.0], [2, 2.0]),
        (tuple[int, ...], (2.0, 3.0), (2, 3)),
        (Literal[20, "all"], 20.0, 20),
        (Literal["a"], 1.0, 1.0),
        (dict[str, int], {"a": 2.0}, {"a": 2}),
        (dict[str, Any], {"a": 2.0, "b": [np.int8(1)]}, {"a": 2.0, "b": [1]}),
        (Any, 2.0, 2.0),
        (Any, np.float64(2), 2.0),
        (str | Path, Path("a"), Path("a")),
        (str, Path("a"), "a"),
        (bool, np.True_, True),
        (int, True, True),
        (int, "2", "2"),
    ],
)
def test_the_rule_of_one_type(hint: Any, value: Any, expected: Any):
    assert same(suited(hint, value), expected)


def test_an_array_stays_one_where_that_is_asked_for():
    array, tensor = np.zeros(2), torch.zeros(2)
    assert suited(np.ndarray | None, array) is array
    assert suited(Any, tensor) is tensor
    assert suited(torch.Tensor, tensor) is tensor


def test_a_run_takes_them_and_its_record_holds_numbers_that_yaml_has(tmp_path: Path):
    results = clframe.run(
        {"name": "split-digits", "limit": np.int64(2), "order": np.arange(10)},
        {"name": "mlp", "hidden": (np.int64(8), 4.0)},
        {"ewc": {"lambda": np.float32(2), "samples": 2e0}},
        train={"iterations": np.int64(1), "first": {"iterations": 2e0}, "betas": (0.5, 0.9), "threads": 1},
        run={"output": tmp_path / "run", "seed": np.uint8(3), "data_root": tmp_path, "tensorboard": np.bool_(False)},
    )
    assert results.folder == tmp_path / "run"
    again = resolve(yaml_file=tmp_path / "run" / "config.yaml").model_dump()
    assert again["scenario"]["order"] == list(range(10))
    assert again["model"] == {"name": "mlp", "hidden": [8, 4]}
    assert again["plugins"]["ewc"] == EWC(lambda_=np.float32(2), samples=np.int8(2)).public_options()
    assert again["train"]["betas"] == [0.5, 0.9]
    assert json.loads(json.dumps(again)) == again


def test_a_setting_of_the_command_line_takes_a_whole_float_alone():
    assert resolve(sets=["train.batch_size=2e1"]).train.batch_size == 20
    with pytest.raises(UsageError, match=r"`train\.batch_size` is 2.5: it should be a valid integer"):
        resolve(sets=["train.batch_size=25e-1"])


def test_a_path_names_a_scenario_and_the_run_to_start_from(tmp_path: Path):
    with pytest.raises(UsageError, match="There is no scenario `somewhere"):
        resolve(scenario=Path("somewhere"))
    assert resolve(model={"name": "mlp", "start": tmp_path}).model.start == str(tmp_path)
