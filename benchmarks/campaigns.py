"""Faults at system calls, kills at them, and flipped bits, on runs of a few images: every figure must come out.

    python benchmarks/campaigns.py faults 1000
    python benchmarks/campaigns.py kills 1000
    python benchmarks/campaigns.py flips 200

`faults` lets one system call of a run, a resume, an export or a sheet fail, in one process. `kills` ends processes with
SIGKILL, at a system call or at a random moment, and stops some resumes with SIGINT before their first step. Afterwards
the run, or what `clframe resume` makes of it, must have the files of one that was left alone, to the last byte.
`flips` flips random bits in each file that a command reads, and every bit of the JSON files: the file is refused by its
name, or the answers are the same. All draws follow from the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from hostile import one_command_tree
from system_calls import ERRORS, FULL, KILL, KILL_WITHIN, LIBRARY, NEED_SPACE, PART, SHORT, Call, Calls, Fault

Measured = tuple[list[dict[str, Any]], list[str]]
Say = Callable[[str], None]

# what must be the same, to the last byte, in a run that was disturbed
FILES = (
    *("results.json", "model.json", "model.safetensors", "predictions.safetensors", "metrics.jsonl"),
    *("split.json", "config.yaml"),
)
LEFT_OUT = {"metrics.jsonl"}  # records are added to its end, so that there is no sum of it
LONGEST = 60  # seconds, after which a process counts as hung
LOST = 99  # the exit code where an exception left `main`
BUG = 70

# options that make a plugin small; all others are at their defaults
SMALL = {
    "always-be-dreaming": "iterations=2 batch_size=8 noise=6 width=4",
    "channel-gating": "classifier_iterations=2 size=12 generator_iterations=1",
    "deep-inversion": "per_class=2 iterations=2",
    "der": "size=12",
    "er": "size=12",
    "generative-replay": "hidden=[8] z=3 iterations=2",
    "icarl": "size=20",
}
# what goes on between two checkpoints in ways of its own, besides every plugin in every setting
HARDER = {
    "er and ewc, held out images": "class er ewc train.val=0.25 run.eval_every=epoch train.epochs=1",
    "kept sgd": "class ewc train.optimizer=sgd train.momentum=0.9 train.keep_optimizer=true train.schedule=cosine",
    "first experience, steps": "task mas train.first={iterations:3,lr:0.01} train.schedule=steps train.milestones=[1]",
    "ewc, lwf, si, mas": "domain ewc lwf si mas",
    "balanced er": "class er er.memory=balanced er.weigh=experiences",
    "ring er": "class er er.memory=ring a-ltm a-ltm.on=replay",
    "online ewc": "domain ewc ewc.form=online ewc.gamma=0.9 ewc.samples=5",
    "batch-wise icarl": "class icarl icarl.batch_size=4 icarl.read_out=output",
    "icarl, means of all": "class icarl icarl.read_out=ncm",
    "joint, cumulative": "class joint joint.form=cumulative joint.restart=true",
    "wgan replay": "class generative-replay generative-replay.generator=wgan generative-replay.labels=soft",
    "adaptive dreams": "class deep-inversion deep-inversion.compete=1 deep-inversion.rounds=2 er",
    "gates, made images": "class channel-gating channel-gating.memory=generative",
    "ternary masks": "task piggyback piggyback.ternary=true piggyback.norm=task",
    "warm-up": "class warm-up lwf er",
    "no predictions": "class lwf run.predictions=false",
}


@dataclass(frozen=True)
class Case:
    """A run that is disturbed.

    Attributes:
        name: of it.
        arguments: of `clframe`, without ``--output``.
        kind: what it is a case of.
    """

    name: str
    arguments: tuple[str, ...]
    kind: str = "plugin"


def case(name: str, words: str, kind: str = "plugin", first: Sequence[str] = ("run",)) -> Case:
    """Return the case that `words` describe: its setting, plugins and settings."""
    setting, *others = words.split()
    plugins = [word for word in others if "=" not in word]
    sets = [f"{plugin}.{option}" for plugin in plugins for option in SMALL.get(plugin, "").split()]
    given = {word.partition("=")[0] for word in others if "=" in word}
    if not given & {"train.iterations", "train.epochs"}:
        sets.append("train.iterations=2")
    sets += [word.replace(":", ": ") for word in others if "=" in word]
    net = ("mlp", "model.hidden=[8,8]") if "finetune-fc" in plugins else ("cnn-small", "model.widths=[4,6]")
    if first[0] == "run":
        sets += [net[1], f"scenario.setting={setting}", "scenario.experiences=2", "train.threads=1"]
        sets += ["train.batch_size=8", "run.checkpoint_every=0", "run.log_every=1"]
        first = [*first, "--model", net[0], *(part for plugin in plugins for part in ("--plugin", plugin))]
    arguments = [*first, "--scenario", "split-digits", "--limit", "4", "--device", "cpu", "--no-tensorboard", "--quiet"]
    return Case(name, (*arguments, *(part for one in sets for part in ("--set", one))), kind)


def cases() -> list[Case]:
    """Return every plugin in every setting that it serves, and the harder cases."""
    from clframe import registry

    found = [case(f"fine-tuning, {setting}", setting) for setting in ("class", "task", "domain")]
    for name in registry.names("plugin"):
        cls = registry.plugin_class(name)
        if not cls.variants and cls.resumes:
            found += [case(f"{name}, {setting}", f"{setting} {name}") for setting in cls.serves]
    return found + [case(name, words, "harder") for name, words in HARDER.items()]


def extension(base: Path) -> Case:
    """Return a run that extends the finished one in `base`."""
    first = ("extend", str(base), "--iterations", "2")
    return case("extension", "class run.checkpoint_every=0 run.log_every=1 train.iterations=2", "harder", first)


# ------------------------------------------------------------------------------------------- commands


class Inline:
    """What writes checkpoints at once, in this thread, so that system calls come in one order."""

    def __init__(self, *given: Any, **named: Any) -> None:
        """Take what an executor takes."""

    def submit(self, call: Callable[..., Any], *given: Any) -> Future[Any]:
        """Return the outcome of `call`."""
        done: Future[Any] = Future()
        try:
            done.set_result(call(*given))
        except BaseException as error:
            done.set_exception(error)
        return done

    def shutdown(self) -> None:
        """Do nothing: nothing is left to do."""


def command(arguments: Sequence[str], *, inline: bool = True) -> tuple[int, str]:
    """Return the exit code of `clframe` with these arguments, run in this process, and what it said."""
    from clframe.cli.main import main

    said = io.StringIO()
    writer = mock.patch("clframe.runs.folder.ThreadPoolExecutor", Inline) if inline else contextlib.nullcontext()
    with writer, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(arguments)
        except BaseException:
            code = LOST
            traceback.print_exc()
    return code, said.getvalue()


def bits(folder: Path) -> dict[str, bytes | None]:
    """Return what must be the same in a run that was disturbed; None: there is no such file."""
    return {name: (folder / name).read_bytes() if (folder / name).is_file() else None for name in FILES}


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """Inside, there is a folder for everything, in memory where the system has such a place: each write is synced."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """Inside, torch uses one thread, and no process is started for a look at the working folder's repository."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with place() as folder, mock.patch("clframe.runs.folder._find_commit", return_value=None), one_command_tree():
            yield folder
    finally:
        torch.set_num_threads(before)


def on_the_way(code: int, said: str) -> str:
    """Return what must never be said or done; '' if nothing."""
    if code == BUG:
        return "exit 70"
    if code == LOST or "Traceback (most recent call last)" in said:
        return "traceback"
    return ""


def again(one: Case, folder: Path) -> list[str]:
    """Return the command that goes on with the run in `folder`: a resume, or the run where nothing was begun."""
    if (folder / "config.yaml").exists():
        return ["resume", str(folder), "--quiet"]
    return [*one.arguments, "--output", str(folder)]


def whole(one: Case, folder: Path, expected: dict[str, bytes | None], inline: bool = True) -> str:
    """Go on with the run in `folder` if it is not finished; return what is wrong with it then, '' if nothing."""
    if not (folder / "results.json").exists():
        code, said = command(again(one, folder), inline=inline)
        if code:
            return f"a run lost: exit {code}: {said[-500:]}"
    found = bits(folder)
    changed = [name for name, content in expected.items() if found[name] != content]
    return f"{', '.join(changed)} differ" if changed else ""


@dataclass(frozen=True)
class Reference:
    """A run that was left alone.

    Attributes:
        files: of it, as `bits` gives them.
        calls: the system calls that it made.
        pauses: how often it could have been stopped by a signal.
        seconds: that it took.
    """

    files: dict[str, bytes | None]
    calls: Sequence[Call]
    pauses: int
    seconds: float


def reference(one: Case, folder: Path) -> Reference:
    """Return the run of a case in the new folder `folder`, left alone."""
    from clframe.testing import stop_at

    began = time.monotonic()
    with Calls(folder.parent) as calls, stop_at() as pauses:
        code, said = command([*one.arguments, "--output", str(folder)])
    assert code == 0, (one, code, said)
    return Reference(bits(folder), calls.made, len(pauses), time.monotonic() - began)


def stopped(one: Case, folder: Path, at: int) -> None:
    """Begin the run of a case in `folder`, and stop it by SIGINT at its pause of number `at`."""
    from clframe.testing import stop_at

    with stop_at(at, by=signal.SIGINT):
        code, said = command([*one.arguments, "--output", str(folder)])
    assert code == 130, (code, said)


@dataclass
class Tally:
    """What was done and found, of one kind of cases."""

    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def found(self, what: str, where: str) -> None:
        """Count a fault of clframe, and keep a note of it."""
        kind = "other bits" if what.endswith("differ") else what.partition(":")[0]
        self.counts[kind] += 1
        self.notes.append(f"{where}: {what}")


# --------------------------------------------------------------------------------------------- faults


def applicable(call: Call) -> list[str]:
    """Return the kinds of faults that a call can meet."""
    if call.name == LIBRARY:
        return ["EMFILE", "EIO"]
    return [*ERRORS, *([FULL] if call.name in NEED_SPACE else []), *([PART, SHORT] if call.name == "write" else [])]


def spread(calls: Sequence[Call], count: int, dice: random.Random) -> list[Fault]:
    """Return `count` faults at calls that are spread evenly, each of a kind that its call can meet."""
    if count >= len(calls):
        places = [*range(len(calls))] * (count // len(calls)) + dice.sample(range(len(calls)), count % len(calls))
    else:
        start = dice.random()
        places = [int((start + k) * len(calls) / count) for k in range(count)]
    return [Fault(at + 1, dice.choice(applicable(calls[at]))) for at in places]


def disturbed(one: Case, begun: Path | None, folder: Path, fault: Fault, expected: dict[str, bytes | None]) -> str:
    """Let a run, or the resume of a copy of `begun`, meet `fault`; return what is wrong afterwards, '' if nothing."""
    if begun is not None:
        shutil.copytree(begun, folder)
    with Calls(folder.parent, fault) as calls:
        code, said = command(again(one, folder))
    wrong = on_the_way(code, said)
    if not wrong and not calls.struck:
        wrong = "the fault was not met"
    if not wrong and fault.kind in (SHORT,) and code:
        wrong = f"a short write ends it: {said[-300:]}"
    if not wrong and code not in (0, 1, 3):
        wrong = f"exit {code}: {said[-300:]}"
    if not wrong and code and len(said.strip().splitlines()) > 3:
        wrong = f"many sentences: {said[-500:]}"
    return wrong or whole(one, folder, expected)


def faults(
    given: Sequence[Case],
    count: int,
    seed: int = 0,
    say: Say = lambda text: None,
    resumes: float = 0.3,
    files: int = 0,
) -> dict[str, Tally]:
    """Let `count` calls fail in runs of the given cases, this share of them in resumes; return what was found.

    So many calls fail besides as there are in `files` in commands that write a file.
    """
    tallies: dict[str, Tally] = {}
    with prepared() as folder:
        for number, one in enumerate(given):
            dice = random.Random(f"{seed} {one.name}")
            known = reference(one, folder / "whole")
            share = count * (number + 1) // len(given) - count * number // len(given)
            of_resume = int(resumes * share + dice.random())
            plan: list[tuple[Path | None, Fault]] = [
                (None, fault) for fault in spread(known.calls, share - of_resume, dice)
            ]
            if of_resume:
                begun = folder / "begun"
                stopped(one, begun, dice.randrange(1, known.pauses))
                copy = Path(shutil.copytree(begun, folder / "copy"))
                with Calls(folder) as calls:
                    code, said = command(again(one, copy))
                if code:
                    tallies.setdefault(one.kind, Tally()).found(f"a run lost: exit {code}: {said[-500:]}", one.name)
                else:
                    plan += [(begun, fault) for fault in spread(calls.made, of_resume, dice)]
            for begun_at, fault in plan:
                inner = folder / "one"
                inner.mkdir()
                wrong = disturbed(one, begun_at, inner / "run", fault, known.files)
                kind = one.kind + (", resumed" if begun_at else "")
                tally = tallies.setdefault(kind, Tally())
                tally.counts["faults"] += 1
                tally.counts[fault.kind] += 1
                if wrong:
                    tally.found(wrong, f"{one.name}{', resume' if begun_at else ''}, {fault}")
                    say(tally.notes[-1])
                shutil.rmtree(inner)
            for entry in list(folder.iterdir()):
                shutil.rmtree(entry)
            say(f"{one.name}: {share} faults")
        if files:
            run = folder / "finished"
            reference(given[0], run)
            tallies["commands that write a file"] = faults_of_writers(writers(run), files, folder, seed, say)
    return tallies


@dataclass(frozen=True)
class Writer:
    """A command that writes a file.

    Attributes:
        name: of it.
        arguments: of `clframe`; the file comes last.
    """

    name: str
    arguments: tuple[str, ...]


def writers(run: Path) -> list[Writer]:
    """Return the commands that write a file, those of a finished `run` among them."""
    from clframe.deploy import export

    formats = [kind for kind in export.FORMATS if kind != "onnx" or all(map(importlib.util.find_spec, export.ONNX))]
    show = ("scenarios", "show", "split-digits")
    return [
        *(Writer(f"export, {kind}", ("export", str(run), "--format", kind, "--output")) for kind in formats),
        Writer("sheet of images", (*show, "--set", "scenario.limit=4", "--sheet")),
        Writer("file of a scenario", (*show, "--save")),
    ]


def faults_of_writers(given: Sequence[Writer], count: int, folder: Path, seed: int, say: Say) -> Tally:
    """Let `count` calls of commands that write a file fail: it is there and whole, or is not there at all."""
    from clframe.deploy import export

    tally, traced = Tally(), {}
    original = export._trace

    def once(module: Any, inputs: Any) -> Any:  # what torch.export traces is the same each time, and takes seconds
        if "program" not in traced:
            traced["program"] = original(module, inputs)
        return traced["program"]

    with mock.patch.object(export, "_trace", once):
        for number, one in enumerate(given):
            dice = random.Random(f"{seed} {one.name}")
            inner = folder / "one"
            contents = []
            for _ in range(2):
                inner.mkdir()
                with Calls(folder) as calls:
                    code, said = command([*one.arguments, str(inner / "file.json")])
                assert code == 0, (one, code, said)
                contents.append((inner / "file.json").read_bytes())
                shutil.rmtree(inner)
            same = contents[0] == contents[1]  # torch and onnx write other bytes each time
            share = count * (number + 1) // len(given) - count * number // len(given)
            for fault in spread(calls.made, share, dice):
                inner.mkdir()
                with Calls(folder, fault) as calls:
                    code, said = command([*one.arguments, str(inner / "file.json")])
                tally.counts["faults"] += 1
                tally.counts[fault.kind] += 1
                wrong = on_the_way(code, said) or ("" if code in (0, 1, 2, 3) else f"exit {code}: {said[-300:]}")
                there = sorted(path.name for path in inner.iterdir())
                if not wrong and there not in ([], ["file.json"]):
                    wrong = f"a part left: {there}, exit {code}: {said[-300:]}"
                if not wrong and code == 0 and not there:
                    wrong = "a file lost: exit 0 and no file"
                if not wrong and there and same and (inner / "file.json").read_bytes() != contents[0]:
                    wrong = "the file differ"
                if wrong:
                    at = calls.made[fault.at - 1] if len(calls.made) >= fault.at else None
                    tally.found(wrong, f"{one.name}, {fault}, {at}")
                    say(tally.notes[-1])
                shutil.rmtree(inner)
    return tally


# ---------------------------------------------------------------------------------------------- kills


def forked(
    arguments: Sequence[str], log: Path, fault: Fault | None = None, moment: float | None = None, stop: bool = False
) -> tuple[int, str]:
    """Return how `clframe` with these arguments ended in a process of its own, and what it said.

    Args:
        arguments: of `clframe`.
        log: file for what it says.
        fault: a kill at a system call; None: none.
        moment: seconds after which it is killed.
        stop: it gets SIGINT before its first step.

    Returns:
        The exit code, or the negated number of the signal that ended it.
    """
    process = os.fork()
    if process == 0:
        code = LOST
        try:
            signal.alarm(LONGEST)  # ends a process that hangs
            interrupting = interrupted() if stop else contextlib.nullcontext()
            calls = Calls(log.parent, fault) if fault else contextlib.nullcontext()
            with interrupting, calls:
                code, said = command(arguments, inline=moment is None)
            log.write_text(said, errors="replace")
        finally:
            os._exit(code)
    if moment is not None:
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), log.read_text() if log.exists() else ""


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Inside, a run gets SIGINT as soon as it has been brought to where it goes on."""
    from clframe.engine import Engine

    original = Engine.remaining

    def remaining(engine: Engine) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        yield from original(engine)

    with mock.patch.object(Engine, "remaining", remaining):
        yield


def killed(
    one: Case, folder: Path, known: Reference, dice: random.Random, count: int, tally: Tally, at: int | None = None
) -> str:
    """Kill a run and its resumes up to `count` times, the first at call `at`; return what is wrong, '' if nothing."""
    log = folder.parent / "said"
    for turn in range(count):
        if (folder / "results.json").exists():
            break
        how = KILL if at else dice.choice((KILL, KILL, KILL_WITHIN, "moment"))
        fault = Fault(at or dice.randrange(1, len(known.calls) // (turn + 1) + 1), how)
        moment = dice.uniform(0, known.seconds / (turn + 1)) if how == "moment" else None
        log.unlink(missing_ok=True)
        code, said = forked(again(one, folder), log, None if moment else fault, moment)
        if code == -signal.SIGKILL:
            tally.counts["kills"] += 1
            tally.counts["at a random moment" if moment else "at a system call"] += 1
        elif code == -signal.SIGALRM:
            return "hang: a process that was not killed"
        elif code:
            return on_the_way(code, said) or f"a run lost: exit {code} after {turn} kills: {said[-500:]}"
        if (folder / "config.yaml").exists() and not (folder / "results.json").exists() and dice.random() < 0.4:
            log.unlink(missing_ok=True)
            code, said = forked(again(one, folder), log, stop=True)
            tally.counts["stops"] += code == 130
            if code not in (0, 130):
                return on_the_way(code, said) or f"a run lost: exit {code} as it is stopped: {said[-500:]}"
    return whole(one, folder, known.files)


def kills(
    given: Sequence[Case], count: int, seed: int = 0, say: Say = lambda text: None, every: Sequence[str] = ()
) -> dict[str, Tally]:
    """End processes of the given cases with SIGKILL at least `count` times; return what was found.

    The cases named in `every` are besides killed once at each system call of a whole run.
    """
    tallies: dict[str, Tally] = {}
    with prepared() as folder:
        gc.collect()
        gc.freeze()  # else a collection in a child would copy all pages
        for number, one in enumerate(given):
            dice = random.Random(f"{seed} kills {one.name}")
            known = reference(one, folder / "whole")
            tally = tallies.setdefault(one.kind, Tally())
            plan: list[int | None] = [*range(1, len(known.calls) + 1)] if one.name in every else []
            wanted = count * (number + 1) // len(given) - count * number // len(given) + len(plan)
            before, tries = tally.counts["kills"], 0
            while plan or (tally.counts["kills"] - before < wanted and tries < 3 * wanted):
                at = plan.pop() if plan else None
                turns = 1 if at else dice.randrange(1, 1 + min(8, max(1, wanted - tally.counts["kills"] + before)))
                inner = folder / "one"
                inner.mkdir()
                wrong = killed(one, inner / "run", known, dice, turns, tally, at)
                tries += 1
                tally.counts["runs"] += 1
                if wrong:
                    tally.found(wrong, f"{one.name}, run {tries}, call {at}")
                    say(tally.notes[-1])
                shutil.rmtree(inner)
            shutil.rmtree(folder / "whole")
            say(f"{one.name}: {tally.counts['kills'] - before} kills in {tries} runs")
    return tallies


# ---------------------------------------------------------------------------------------------- flips


def flip(file: Path, bit: int) -> None:
    """Flip one bit of `file` in place."""
    with file.open("r+b", buffering=0) as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


@dataclass(frozen=True)
class Reader:
    """A command that reads a run folder.

    Attributes:
        name: of it.
        folder: which it reads.
        answer: does it in a copy of that folder, and gives exit code, what was said, and what came of it.
        only: files that are of interest; all if there are none.
    """

    name: str
    folder: Path
    answer: Callable[[Path], tuple[int, str, Any]]
    only: tuple[str, ...] = ()


def readers(folder: Path) -> list[Reader]:
    """Make a finished, an extended and a stopped run in `folder`; return the commands that read them."""
    import numpy as np
    from PIL import Image

    import clframe

    one = case("read", "class er train.val=0.25")
    finished, begun = folder / "finished", folder / "stopped"
    code, said = command([*one.arguments, "--output", str(finished)])
    assert code == 0, said
    stopped(one, begun, 7)
    further = folder / "extension"
    stopped(extension(finished), further, 2)
    image = folder / "image.png"
    Image.fromarray((np.arange(64, dtype=np.uint8) * 4).reshape(8, 8)).save(image)

    def predict(run: Path) -> tuple[int, str, Any]:
        code, said = command(["predict", str(run), str(image), "--json"])
        return code, said, said

    def export(run: Path) -> tuple[int, str, Any]:
        target = run.parent / "exported"
        target.unlink(missing_ok=True)
        code, said = command(["export", str(run), "--format", "safetensors", "--output", str(target)])
        return code, said, target.read_bytes() if target.exists() else None

    def extend(run: Path) -> tuple[int, str, Any]:
        target = run.parent / "extended"
        shutil.rmtree(target, ignore_errors=True)
        code, said = command([*extension(run).arguments, "--output", str(target)])
        found = {name: content for name, content in bits(target).items() if name != "config.yaml"}
        return code, said, found

    def resume(run: Path) -> tuple[int, str, Any]:
        code, said = command(["resume", str(run), "--quiet"])
        return code, said, bits(run)

    def report(run: Path) -> tuple[int, str, Any]:
        try:
            found = clframe.Results.read(run)
            return 0, "", (found.data, found.timings, found.confusion_matrix())
        except clframe.ClframeError as error:
            return 3, str(error), None

    return [
        Reader("predict", finished, predict),
        Reader("export", finished, export),
        Reader("report", finished, report),
        Reader("extend", finished, extend),
        Reader("resume", begun, resume),
        Reader("resume of an extension", further, resume, ("base.json",)),
    ]


def looked_at(reader: Reader, run: Path) -> tuple[list[str], Any]:
    """Return the files of the folder that a command reads, and what comes of it if none is damaged."""
    with Calls(run) as calls:
        code, said, expected = reader.answer(run)
    assert code == 0, (reader.name, said)
    there = {str(path.relative_to(reader.folder)) for path in reader.folder.rglob("*") if path.is_file()}
    read = {call.path for call in calls.made if call.name in ("read", LIBRARY)}
    return sorted((there & read) - LEFT_OUT), expected


def quick_reader(run: Path, name: str) -> Callable[[], Any]:
    """Return what reads the JSON file `name` of a run folder and checks it, as every command does first."""
    from clframe.runs import checkpoint, sums

    if name == sums.SUMS_FILE:
        return lambda: sums.read(run)
    if not name.startswith("checkpoints/"):
        return lambda: sums.check(run, name)

    def load() -> Any:
        told: list[str] = []
        packed, tensors = checkpoint.load(run / "checkpoints", told.append)
        if told:
            raise LookupError(*told)
        return json.dumps(packed), {key: value.numpy().tobytes() for key, value in tensors.items()}

    return load


def flips(
    count: int, seed: int = 0, say: Say = lambda text: None, every: int = 1, only: Sequence[str] = ()
) -> dict[str, Tally]:
    """Flip `count` random bits in each file that a command reads, and every bit of the JSON files.

    Args:
        count: flips in each file, for each command that reads it.
        seed: of the draws.
        say: is given a sentence on each fault.
        every: of the bits of JSON files one in so many.
        only: names of commands; all if there are none.
    """
    tallies: dict[str, Tally] = {}
    with prepared() as folder:
        sets = readers(folder)
        named: dict[tuple[Path, str], None] = {}
        for reader in sets:
            if only and reader.name not in only:
                continue
            copy = folder / "copy" / "run"
            shutil.copytree(reader.folder, copy)
            names, expected = looked_at(reader, copy)
            shutil.rmtree(copy)
            tally = tallies.setdefault(reader.name, Tally())
            changes = reader.name.startswith("resume")
            for name in [name for name in names if name in (reader.only or names)]:
                named[reader.folder, name] = None
                tally.counts["files"] += 1
                dice = random.Random(f"{seed} {reader.name} {name}")
                size = 8 * (reader.folder / name).stat().st_size
                shutil.copytree(reader.folder, copy)
                for bit in (dice.randrange(size) for _ in range(count)):
                    flip(copy / name, bit)
                    code, said, found = reader.answer(copy)
                    judge(tally, f"{reader.name}, bit {bit} of {name}", name, code, said, found == expected, say)
                    if not changes:
                        flip(copy / name, bit)
                    elif code == 0:
                        shutil.rmtree(copy)
                        shutil.copytree(reader.folder, copy)
                    else:
                        shutil.copyfile(reader.folder / name, copy / name)
                shutil.rmtree(copy)
                say(f"{reader.name}: {name}")
        tally = tallies.setdefault("every bit of the JSON files", Tally())
        for run, name in named:
            if name.endswith(".json"):
                tally.counts["files"] += 1
                each_bit(run, name, range(seed % every, 8 * (run / name).stat().st_size, every), tally, say)
                say(f"every bit: {name}")
    return tallies


def judge(tally: Tally, where: str, name: str, code: int, said: str, same: bool, say: Say) -> None:
    """Count what came of a flipped bit."""
    tally.counts["flips"] += 1
    checkpoint = name.split("/")[1] if name.startswith("checkpoints/") else name
    if wrong := on_the_way(code, said):
        tally.found(f"{wrong}: {said[-300:]}", where)
    elif code and (name in said or checkpoint in said):
        tally.counts["refused by name"] += 1
        return
    elif code:
        tally.found(f"refused without its name: {said[-300:]}", where)
    elif same:
        tally.counts["same answers"] += 1
        return
    else:
        tally.found("other answers differ", where)
    say(tally.notes[-1])


def each_bit(run: Path, name: str, bits_of: range, tally: Tally, say: Say) -> None:
    """Flip each of these bits of a JSON file of a run folder."""
    from clframe.errors import ClframeError

    read = quick_reader(run, name)
    expected = read()
    for bit in bits_of:
        flip(run / name, bit)
        code, said, found = 0, "", None
        try:
            found = read()
        except (ClframeError, LookupError) as error:
            code, said = 3, str(error)
        except Exception as error:
            code, said = BUG, repr(error)
        flip(run / name, bit)
        judge(tally, f"bit {bit} of {name}", name, code, said, found == expected, say)


# ---------------------------------------------------------------------------------------- command line

WRONG = ("a run lost", "other bits", "exit 70", "hang", "traceback")
COLUMNS = {
    "faults": ("faults", *ERRORS, FULL, PART, SHORT),
    "kills": ("kills", "at a system call", "at a random moment", "stops", "runs"),
    "flips": ("files", "flips", "refused by name", "same answers"),
}


def lines_of(what: str, tallies: dict[str, Tally]) -> Measured:
    """Return a line of figures for each kind of cases and one of all, and what went wrong."""
    lines = []
    together = Tally()
    for tally in tallies.values():
        together.counts += tally.counts
        together.notes += tally.notes
    for name, tally in {**tallies, "together": together}.items():
        others = sum(tally.counts[kind] for kind in tally.counts if kind not in (*COLUMNS[what], *WRONG))
        shown = {column: tally.counts[column] for column in (*COLUMNS[what], *WRONG)}
        lines.append({"cases": name, **shown, "other faults": others})
    return lines, together.notes[:50]


def measure(what: str, count: int, seed: int = 0) -> Measured:
    """Run one of the campaigns in full."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if what == "faults":
        return lines_of(what, faults(cases(), count, seed, say, files=count // 5))
    if what == "kills":
        return lines_of(what, kills(cases(), count, seed, say, every=("er, class",)))
    return lines_of(what, flips(count, seed, say))


COUNTS = {"faults": 1000, "kills": 1000, "flips": 200}

if __name__ == "__main__":
    from report import table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=COUNTS)
    parser.add_argument("count", type=int, nargs="?")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    asked = parser.parse_args()
    lines, notes = measure(asked.what, asked.count or COUNTS[asked.what], asked.seed)
    print(table(lines))
    for note in notes:
        print(f"- {note}")
    sys.exit(bool(notes))
