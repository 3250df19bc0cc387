"""Strict YAML: no repeated keys, anchors, aliases or tags; words such as `no` are texts, and 1e-3 is a number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clframe.errors import UsageError
from clframe.system.texts import cut


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of strict YAML `text`: no repeated key, anchor, alias or tag; ``1e-3`` is a number.

    Raises `UsageError` that names `where`, and the line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{where}{place}: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())}.") from error
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply.") from None


def dump_yaml(value: Any) -> str:
    """Return `value` as YAML that `parse_yaml` reads back."""
    return yaml.dump(_plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


RESOLVERS = (  # those of YAML 1.2: words such as `no` are texts, 1e-3 is a number
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


LONGEST_NUMBER = 300  # characters of a whole number


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, strict."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - filled below

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse anchors, aliases and tags."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read here", event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"the tag {event.tag} is not read here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        """Refuse numbers that no setting can take: Python reads 4,300 digits, and a float has 309."""
        if len(node.value) > LONGEST_NUMBER:
            problem = f"a whole number of {len(node.value):,} digits is too large"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(super().construct_yaml_int(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse keys that are repeated, or are not texts."""
        places: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key.start_mark)
            if key.value in places:
                problem = f"the key `{cut(key.value)}` stands in line {places[key.value]} already"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            places[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes every text that `_Loader`, or a YAML 1.1 reader, would read as another type."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)
for _tag, _pattern, _first in RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def _plain(value: Any) -> Any:
    """Return `value` in the types that YAML has."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
