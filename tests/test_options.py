import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from clframe import Plugin, UsageError
from clframe.options import (
    REQUIRED,
    Count,
    NonNegative,
    Option,
    OptionGroup,
    Positive,
    Share,
    flatten_groups,
    options_of,
    sections_of,
    validated,
)


def factory(
    input_shape,
    *,
    lambda_: NonNegative = 100.0,
    samples: Count | None = None,
    labels: Literal["exact", "sampled"] = "exact",
    share: Share = 0.5,
    sizes: tuple[Count, ...] = (1, 2),
    hidden: list[Count] = [4],  # noqa: B006
    path: Path | None = None,
    mixed: int | list[int] = 1,
):
    """Something.

    Options:
        lambda: strength of the
            penalty.
        samples: how many.

    Returns:
        nothing: of note
    """


def problems(**given):
    with pytest.raises(UsageError) as caught:
        validated(factory, given, "ewc", skip=("input_shape",))
    return list(caught.value.problems)


def test_options_are_read_from_the_signature_and_the_docstring():
    found = options_of(factory, skip=("input_shape",))
    assert found[:3] == [
        Option("lambda", "float >= 0", 100.0, "strength of the penalty."),
        Option("samples", "int >= 1 | null", None, "how many."),
        Option("labels", "exact | sampled", "exact", ""),
    ]
    assert [option.type for option in found[3:]] == [
        "float >= 0, <= 1",
        "list of int >= 1",
        "list of int >= 1",
        "Path | null",
        "int | list of int",
    ]
    assert options_of(factory)[0] == Option("input_shape", "Any", REQUIRED, "")


def test_defaults_are_filled_in_and_names_are_those_of_python():
    values = validated(factory, {"lambda": 5}, "ewc", skip=("input_shape",))
    assert values == {
        "lambda_": 5.0,
        "samples": None,
        "labels": "exact",
        "share": 0.5,
        "sizes": (1, 2),
        "hidden": [4],
        "path": None,
        "mixed": 1,
    }
    assert isinstance(values["lambda_"], float)
    assert validated(factory, {"lambda_": 5}, "ewc", skip=("input_shape",)) == values


def test_a_mutable_default_is_not_shared():
    validated(factory, {}, "ewc", skip=("input_shape",))["hidden"].append(9)
    assert validated(factory, {}, "ewc", skip=("input_shape",))["hidden"] == [4]


def test_lists_fill_tuples_and_texts_fill_paths_as_yaml_has_neither():
    values = validated(factory, {"sizes": [3], "path": "a/b"}, "ewc", skip=("input_shape",))
    assert values["sizes"] == (3,)
    assert values["path"] == Path("a/b")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"lamda": 1}, "`ewc.lamda` is not an option of `ewc`. Did you mean `lambda`?"),
        ({"lambda": -1}, "`ewc.lambda` is -1: it should be greater than or equal to 0."),
        ({"lambda": "x"}, "`ewc.lambda` is 'x': it should be a valid number."),
        ({"lambda": True}, "`ewc.lambda` is True: it should be a valid number."),
        ({"lambda": float("nan")}, "`ewc.lambda` is nan: it should be a finite number."),
        ({"lambda": float("inf")}, "`ewc.lambda` is inf: it should be a finite number."),
        ({"samples": 1.5}, "`ewc.samples` is 1.5: it should be a valid integer."),
        ({"samples": True}, "`ewc.samples` is True: it should be a valid integer."),
        ({"samples": 1e300}, "`ewc.samples` is 1e+300: it should be a valid integer."),
        ({"samples": 0}, "`ewc.samples` is 0: it should be greater than or equal to 1."),
        ({"labels": "exakt"}, "`ewc.labels` is 'exakt': it should be 'exact' or 'sampled'."),
        ({"hidden": [3, 0]}, "`ewc.hidden.1` is 0: it should be greater than or equal to 1."),
        ({"sizes": [3, "x"]}, "`ewc.sizes.1` is 'x': it should be a valid integer."),
        ({"mixed": "x"}, "`ewc.mixed` is 'x': it should be a valid integer or a valid list."),
    ],
)
def test_a_wrong_option_is_one_sentence(given, sentence):
    assert problems(**given) == [sentence]


def test_several_wrong_options_are_all_told():
    assert len(problems(lamda=1, share=2, samples="x")) == 3


def test_a_required_option_is_asked_for():
    with pytest.raises(UsageError, match=r"`x\.input_shape` is required"):
        validated(factory, {}, "x")


def test_what_has_no_options_says_so():
    with pytest.raises(UsageError, match=r"`none\.a` is not an option of `none`\. It has no options\."):
        validated(lambda: None, {"a": 1}, "none")


def test_option_names_may_be_those_of_pydantic():
    def build(copy: int = 1, json: int = 2, model_path: int = 3, schema: int = 4) -> None: ...

    assert validated(build, {"copy": 5}, "x") == {"copy": 5, "json": 2, "model_path": 3, "schema": 4}


def test_types_that_exist_for_type_checkers_only_are_explained():
    def build(x: "Missing" = 1) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(UsageError, match="The options of `build` cannot be read"):
        validated(build, {}, "x")


class Small(Plugin):
    name = "small"

    def __init__(self, lambda_: Positive = 1.0, n: Annotated[int, Field(lt=5)] = 2) -> None:
        self.lambda_, self.n = lambda_, n


def test_a_plugin_built_in_python_is_validated_and_its_repr_rebuilds_it():
    with pytest.raises(UsageError) as caught:
        Small(lambda_=-1, n=7)
    assert caught.value.problems == (
        "`small.lambda` is -1: it should be greater than 0.",
        "`small.n` is 7: it should be less than 5.",
    )
    with pytest.raises(TypeError, match="by name only"):
        Small(3)
    assert repr(Small(lambda_=2.0)) == "Small(lambda_=2.0, n=2)"
    assert eval(repr(Small(lambda_=2.0))).options == {"lambda_": 2.0, "n": 2}
    assert Small().public_options() == {"lambda": 1.0, "n": 2}


@dataclass(frozen=True)
class Size(OptionGroup):
    """Sizes.

    Options:
        size: of what.
        lambda: strength.
    """

    size: Count = 4
    lambda_: float = 1.0


@dataclass(frozen=True)
class Larger(Size):
    """Sizes, and a path.

    Options:
        size: of something large.
    """

    size: Count = 40
    path: Path | None = None


LARGEST = Larger(size=400)


@flatten_groups
def build(variant: str, *, first: int = 1, sizes: Size = LARGEST, last: bool = False):
    """Something of sizes.

    It has two paragraphs.

    Options:
        last: the end.
        first: the beginning.
    """
    return variant, first, sizes, last


def test_the_fields_of_an_option_group_are_options_at_its_place():
    assert options_of(build, skip=("variant",)) == [
        Option("first", "int", 1, "the beginning."),
        Option("size", "int >= 1", 400, "of something large."),
        Option("lambda", "float", 1.0, "strength."),
        Option("path", "Path | null", None, ""),
        Option("last", "bool", False, "the end."),
    ]
    assert sections_of(build)[""] == "Something of sizes.\n\nIt has two paragraphs."
    values = validated(build, {"size": 5, "lambda": 2, "path": "a"}, "x", skip=("variant",))
    assert build("v", **values) == ("v", 1, Larger(5, 2.0, Path("a")), False)
    assert build("v") == ("v", 1, LARGEST, False)
    with pytest.raises(UsageError, match=r"`x\.size` is 0: it should be greater than or equal to 1"):
        validated(build, {"size": 0}, "x", skip=("variant",))
    with pytest.raises(UsageError, match=r"`x\.sizes` is not an option of `x`"):
        validated(build, {"sizes": LARGEST}, "x", skip=("variant",))


def test_an_option_group_is_called_as_a_plain_function_is():
    @flatten_groups
    def plain(*, sizes: Size):
        return sizes

    assert plain() == Size()
    assert plain(size=2) == Size(2)
    with pytest.raises(TypeError, match=r"^plain\(\) got an unexpected keyword argument 'sizes'$"):
        plain(sizes=Size())
    with pytest.raises(TypeError, match=r"^build\(\) missing a required argument: 'variant'$"):
        build()


def test_the_same_choices_stand_in_the_same_order_everywhere() -> None:
    """`typing` keeps one of two equal unions: the order that is shown would depend on what was read first."""
    root = Path(__file__).parent.parent
    orders: dict[frozenset[str], set[tuple[str, ...]]] = {}
    for folder in ("clframe", "plugins", "scenarios", "cli"):
        for file in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
                    choices = tuple(ast.unparse(node.slice).strip("()").split(", "))
                    orders.setdefault(frozenset(choices), set()).add(choices)
    assert [found for found in orders.values() if len(found) > 1] == []
