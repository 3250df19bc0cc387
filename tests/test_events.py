"""The events of a run: documented classes, which listeners may also read as mappings."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields

import pytest

import clframe
from clframe import events


def test_every_class_of_events_has_a_kind_and_documents_its_fields() -> None:
    classes = {cls for _, cls in inspect.getmembers(events, inspect.isclass) if issubclass(cls, events.Event)}
    assert classes - {events.Event} == set(events.EVENTS.values())
    assert all(cls.kind == kind for kind, cls in events.EVENTS.items())
    for cls in events.EVENTS.values():
        documented = "\n".join(inspect.cleandoc(vars(base).get("__doc__") or "") for base in cls.__mro__)
        assert [field.name for field in fields(cls) if f"\n    {field.name}: " not in documented] == []


def test_an_event_is_read_as_a_mapping() -> None:
    event = events.Logged(1, 20, {"a": 0.5})
    assert event["kind"] == event.kind == "log"
    assert dict(event) == {"kind": "log", "experience": 1, "total_step": 20, "values": {"a": 0.5}}
    with pytest.raises(KeyError):
        event["keys"]
    with pytest.raises(AttributeError):
        event.experience = 2


def test_listeners_get_events_and_the_folder_their_lines(tiny, tmp_path) -> None:
    heard: list[events.Event] = []
    run = {"output": str(tmp_path / "run"), "tensorboard": False, "log_every": 1, "eval_every": "epoch"}
    clframe.run(tiny(experiences=2), "mlp-100", train={"epochs": 1}, run=run, listeners=[heard.append])
    assert {type(event) for event in heard} >= {
        *(events.Started, events.ExperienceBegan, events.PhaseBegan, events.StepTaken),
        *(events.EvaluatedWithin, events.Evaluated, events.Ended),
    }
    written = [dict(event) for event in heard if event.kind in ("step", "within", "eval", "log")]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in event} for line, event in zip(lines, written, strict=True)] == written
