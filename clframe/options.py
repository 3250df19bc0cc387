"""Constructors as schemas: what a plugin, scenario or backbone can be told, by signature and docstring."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from clframe.errors import UsageError, did_you_mean
from clframe.renamed import OF_VALUES
from clframe.system.texts import cut, quote

# Types for the signatures of plugins, scenarios and backbones.
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]

Result = TypeVar("Result")

STRICT = ConfigDict(allow_inf_nan=False, strict=True, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Search:
    """A range in which `clframe tune` searches a value, declared beside what is valid: `Annotated[float, Search(...)]`.

    A plugin's option with a range may change from one experience to the next (``run.per_experience``), so the plugin
    reads it from the attribute of the parameter's name wherever it is used. Less of it means a weaker method.

    Attributes:
        low: least value.
        high: largest value.
        log: whether the logarithm is searched evenly; `low` is then above 0.
        choices: values to choose from, in place of a range.

    Raises:
        ValueError: if there is neither a range nor a choice.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise ValueError("a search needs `low` and `high`, or `choices`")
        if self.choices:
            return
        if self.low is None or self.high is None or not -math.inf < self.low < self.high < math.inf:
            raise ValueError("the lower end of a search must be below the upper end, and both must be finite")
        if self.log and self.low <= 0:
            raise ValueError("the lower end of a search on a logarithmic scale must be above 0")

    def __str__(self) -> str:
        if self.choices:
            return " | ".join(map(str, self.choices))
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"


@dataclass(frozen=True)
class Option:
    """An option: public name, type in words, default (`REQUIRED` if none), documentation, and range of a search."""

    name: str
    type: str
    default: object
    doc: str
    search: Search | None = None


UNION_MEMBER = re.compile(r"[\[(]|^(constrained-)?(int|float|str|bool)$")  # names of them in pydantic's problems
EXACT = 2**53  # above, not every whole number is a float
STRANGERS = 20  # names at most that are not known and get a sentence of their own each
KEPT = 1_024  # constructors, or parameters of them, of which is kept what was read of them
SECTIONS = ("When to use", "Keeps", "Hooks", "Options")  # headings that docstrings may have
REQUIRED: Any = inspect.Parameter.empty


def public_name(parameter: str) -> str:
    """Return the name outside Python: ``lambda_`` is ``lambda``; the underscore only avoids a reserved word."""
    return parameter.rstrip("_")


def options_of(factory: Callable[..., object], skip: tuple[str, ...] = ()) -> list[Option]:
    """Return the options of a class or function in the order of its signature, without those named in `skip`."""
    docs = _documented(factory)
    hints = _hints(factory)
    found = []
    for p in _parameters(factory, skip):
        name, hint = public_name(p.name), hints.get(p.name, Any)
        found.append(Option(name, _type_in_words(hint), p.default, docs.get(name, ""), _find_search(hint)))
    return found


def searched(factory: Callable[..., object]) -> dict[str, str]:
    """Return the options of a class or function that declare a range of a search: public names to parameter names."""
    hints = _hints(factory)
    return {public_name(p.name): p.name for p in _parameters(factory, ()) if _find_search(hints.get(p.name))}


def _find_search(hint: Any) -> Search | None:
    """Return the range that `Annotated` adds to a type, or to a member of a union."""
    own = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Search)]
    inside = [] if get_origin(hint) is Literal else [found for part in get_args(hint) if (found := _find_search(part))]
    return next(iter([*own, *inside]), None)


class OptionGroup:
    """A group of options that several constructors share: the base class of frozen dataclasses.

    Each field is an option, with its name, type and default, documented under ``Options:`` in the docstring of the
    dataclass or of a base class. `flatten_groups` makes the fields options of a function.
    """


def flatten_groups(build: Callable[..., Result]) -> Callable[..., Result]:
    """Return `build` with the fields of its option groups as parameters, each at the place of its group.

    A parameter is a group if its type, or its default, is an `OptionGroup`; the values of that default are then the
    defaults of the fields. `build` itself is called with the groups. The docstring of what is returned has all
    options, in the order of the parameters.

    Raises:
        TypeError: when it is called with an argument that it does not take, or without one that it needs.
    """
    hints = get_type_hints(build, include_extras=True)
    docs = _documented(build)
    groups: dict[str, type[OptionGroup]] = {}
    parameters = []
    for parameter in inspect.signature(build).parameters.values():
        default = parameter.default
        group = type(default) if isinstance(default, OptionGroup) else hints.get(parameter.name)
        if not (inspect.isclass(group) and issubclass(group, OptionGroup)):
            parameters.append(parameter.replace(annotation=hints.get(parameter.name, Any)))
            continue
        groups[parameter.name] = group
        for base in reversed(group.__mro__):
            docs |= _documented(base)
        types_ = get_type_hints(group, include_extras=True)
        for field in _fields(group):
            value = getattr(default, field.name) if isinstance(default, group) else field.default
            value = REQUIRED if value is dataclasses.MISSING else value
            parameters.append(
                inspect.Parameter(field.name, parameter.kind, default=value, annotation=types_[field.name])
            )
    signature = inspect.Signature(parameters, return_annotation=hints.get("return", Any))

    @functools.wraps(build)
    def flat(*args: Any, **kwargs: Any) -> Result:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{build.__name__}() {error}") from None
        bound.apply_defaults()
        values = dict(bound.arguments)
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in _fields(group)})
        return build(**values)

    flat.__signature__ = signature  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": signature.return_annotation}
    listed = "".join(f"    {name}: {docs[name]}\n" for p in parameters if (name := public_name(p.name)) in docs)
    flat.__doc__ = f"{sections_of(build)['']}\n\nOptions:\n{listed}"
    return flat


def _fields(group: type[OptionGroup]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cast(Any, group))


def fields_of(settings: type[BaseModel]) -> list[Option]:
    """Return the fields of a settings model (such as `clframe.settings.TrainSettings`) as options, in order."""
    hints = get_type_hints(settings, include_extras=True)
    return [
        Option(name, _type_in_words(hints[name]), field.default, field.description or "", _find_search(hints[name]))
        for name, field in settings.model_fields.items()
    ]


def validated(
    factory: Callable[..., object],
    given: Mapping[str, object],
    where: str,
    skip: tuple[str, ...] = (),
    owner: str = "",
) -> dict[str, Any]:
    """Return `given` (by public or parameter name) checked against the signature of `factory`, by parameter name.

    Every parameter is present in the answer, defaults included. `owner` is how errors call the thing that has
    the options, by default `where`. Raises `UsageError` with one sentence for each problem, each naming the
    option as ``where.option``.
    """
    parameters = {public_name(p.name): p for p in _parameters(factory, skip)}
    _hints(factory)  # which raises where they cannot be read
    named = {public_name(name): value for name, value in given.items()}
    problems = unknown(named, parameters, where, owner or f"`{where}`")
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in named:
            hint, adapter = _adapter(_constructor(factory), parameter.name)
            try:
                values[parameter.name] = adapter.validate_python(suited(hint, named[name]))
            except ValidationError as error:
                problems += _explain_renamed(hint, named[name], f"{where}.{name}") or explain(error, f"{where}.{name}")
        elif parameter.default is REQUIRED:
            problems.append(f"`{where}.{name}` is required: give it with `--set {where}.{name}=VALUE`.")
        else:
            values[parameter.name] = copy.deepcopy(parameter.default)
    if problems:
        raise UsageError(*problems)
    return values


def unknown(given: Iterable[str], known: Iterable[str], where: str, owner: str) -> list[str]:
    """Return one sentence for each name in `given` that is not among the `known` options of `owner`."""
    known = list(known)
    strangers = [name for name in given if name not in known]
    sentences = [
        f"`{where}.{cut(name)}` is not an option of {owner}." + (did_you_mean(name, known) or " It has no options.")
        for name in strangers[:STRANGERS]
    ]
    if more := strangers[STRANGERS:]:
        sentences.append(f"Nor are {len(more):,} more names in `{where}` options of {owner}.")
    return sentences


def explain(error: ValidationError, where: str) -> list[str]:
    """Return one sentence for each value that pydantic refused, with the option's full name and the value."""
    reasons: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        # pydantic adds the tried member of a union to the place; what a person wrote ends before it
        parts = [
            str(part)
            for part in problem["loc"]
            if not re.search(r"[\[(]|^(constrained-)?(int|float|str|bool)$", str(part))
        ]
        reason = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should", 1)
        if problem["type"] == "value_error" and not parts:
            reasons[reason] = []  # about a group of settings as a whole: it names them itself
            continue
        said = reasons.setdefault(
            f"`{'.'.join(filter(None, [where, *map(cut, parts)]))}` is {quote(problem['input'])}", []
        )
        said.append(reason.removeprefix("it should be ") if said else reason)
    return [": ".join([place, *filter(None, [" or ".join(said)])]) + "." for place, said in reasons.items()]


def _explain_renamed(hint: Any, value: object, where: str) -> list[str]:
    """Return the sentence that refuses the old word for a choice of today, with the new one; none for other values."""
    new = OF_VALUES.get(value) if isinstance(value, str) else None
    return [f"`{where}` is {value!r}, which is now called `{new}`."] if new in _choices(_members(hint)) else []


def _constructor(factory: Callable[..., object]) -> Callable[..., object]:
    """Return the function whose signature `factory` has, by which what was read of it is kept."""
    if inspect.isclass(factory):
        return factory.__init__
    return factory if isinstance(factory, Hashable) else type(factory).__call__


def _parameters(factory: Callable[..., object], skip: tuple[str, ...]) -> list[inspect.Parameter]:
    return [p for p in _signature(_constructor(factory)) if p.name not in skip]


@lru_cache(KEPT)
def _signature(constructor: Callable[..., object]) -> list[inspect.Parameter]:
    parameters = inspect.signature(constructor).parameters.values()
    return [p for p in parameters if p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _hints(factory: Callable[..., object]) -> dict[str, Any]:
    try:
        return _read_hints(_constructor(factory))
    except NameError as error:
        raise UsageError(
            f"The options of `{factory.__name__}` cannot be read: {error}; "
            "the types of options must be imported when the module runs, not only for type checking."
        ) from error


@lru_cache(KEPT)
def _read_hints(constructor: Callable[..., object]) -> dict[str, Any]:
    return get_type_hints(constructor, include_extras=True)


@lru_cache(KEPT)
def _adapter(constructor: Callable[..., object], parameter: str) -> tuple[Any, TypeAdapter[Any]]:
    """Return the type of a parameter, and what validates its values: building that takes most of a validation."""
    hint = _read_hints(constructor).get(parameter, Any)
    return hint, TypeAdapter(_lenient(hint), config=STRICT)


def suited(hint: Any, value: Any) -> Any:
    """Return `value` in the type that `hint` asks for, where another type holds the same value.

    A number of NumPy becomes one of Python; an array, or a tuple, becomes a list where a list is asked for; a whole
    float, such as ``2e1``, an integer where only integers are asked for; a path a text where no path is asked for.
    Every other value stays as it is, for the validation to accept or refuse.
    """
    members = _members(hint)
    classes = tuple(member for member in members if inspect.isclass(member))
    if _of_numpy(value) or (hasattr(value, "tolist") and Any not in members and not isinstance(value, classes)):
        value = value.tolist()
    if isinstance(value, float) and float not in members and Any not in members:
        return _whole(value) if int in members or _whole(value) in _choices(members) else value
    if isinstance(value, PurePath) and str in members and not isinstance(value, classes):
        return str(value)
    if isinstance(value, dict) and (of := _first(members, dict)):
        held = (get_args(of) or (Any, Any))[1]
        return {name: suited(held, item) for name, item in value.items()}
    if isinstance(value, list | tuple | range) and (of := _first(members, list, tuple, Sequence)):
        hints = [hint for hint in get_args(of) if hint is not ...] or [Any]
        items = [suited(hints[min(i, len(hints) - 1)], item) for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) and (of is Any or _holds(of, tuple)) else items
    return value


def _members(hint: Any) -> list[Any]:
    """Return the types that `hint` allows, without what `Annotated` adds to them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _members(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in arguments for member in _members(part)]
    return [hint]


def _choices(members: Iterable[Any]) -> list[Any]:
    return [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]


def _first(members: Iterable[Any], *kinds: type) -> Any:
    """Return the first of `members` that allows a value of one of `kinds`; None: there is none."""
    return next((member for member in members if member is Any or _holds(member, *kinds)), None)


def _holds(hint: Any, *kinds: type) -> bool:
    return hint in kinds or get_origin(hint) in kinds


def _of_numpy(value: object) -> bool:
    """Return whether `value` is a number of NumPy, which need not be imported for it."""
    return type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0


def _whole(value: float) -> int | float:
    """Return a whole number as an integer, if a float can tell it from the next one."""
    return int(value) if value.is_integer() and abs(value) < EXACT else value


def _lenient(hint: Any) -> Any:
    """Return `hint` with tuples that a list may fill and paths that a string may fill: YAML has neither."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return Union[tuple(_lenient(part) for part in arguments)]  # noqa: UP007 - the members are computed
    if origin is Annotated:
        return Annotated[_lenient(arguments[0]), *arguments[1:]]
    if origin is tuple or (inspect.isclass(hint) and issubclass(hint, (tuple, Path))):
        return Annotated[hint, Strict(False)]
    return hint


def sections_of(documented: object) -> dict[str, str]:
    """Split the docstring of a class or function into its sections, by heading; the description before them is "".

    A section is a line of `SECTIONS` with a colon, and the indented lines below, which lose their indent.
    """
    sections = {"": ""}
    heading = ""
    for line in (inspect.getdoc(documented) or "").splitlines():
        if line.endswith(":") and line[:-1] in SECTIONS:
            heading = line[:-1]
            sections[heading] = ""
            continue
        if line and not line.startswith(" "):
            heading = ""
        sections[heading] += (line.removeprefix("    ") if heading else line) + "\n"
    return {name: text.strip() for name, text in sections.items()}


def _documented(factory: Callable[..., object]) -> dict[str, str]:
    """Return the lines ``name: text`` under ``Options:`` of the docstring; deeper lines continue the text."""
    doc = inspect.getdoc(factory) or ""
    _, found, section = doc.partition("\nOptions:\n")
    entries: dict[str, str] = {}
    name = ""
    for line in section.splitlines() if found else []:
        if line and not line.startswith(" "):
            break
        if start := re.match(r" {4}(\w+): (.*)", line):
            name = public_name(start[1])
            entries[name] = start[2]
        elif name and line.strip():
            entries[name] += " " + line.strip()
    return entries


def _type_in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [limit for field in arguments[1:] for limit in getattr(field, "metadata", [])]
        words = {"Gt": "> {0.gt}", "Ge": ">= {0.ge}", "Lt": "< {0.lt}", "Le": "<= {0.le}"}
        bounds = [words[type(limit).__name__].format(limit) for limit in limits if type(limit).__name__ in words]
        return " ".join([_type_in_words(arguments[0]), *([", ".join(bounds)] if bounds else [])])
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if part is type(None) else _type_in_words(part) for part in arguments)
    if origin in (list, tuple):
        return "list of " + _type_in_words(arguments[0]) if arguments else "list"
    return getattr(hint, "__name__", str(hint))
