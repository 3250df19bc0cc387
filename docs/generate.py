"""Keep what the code says of itself in the pages of the documentation.

    python docs/generate.py               # bring the generated parts of all pages up to date (`make docs-reference`)
    python docs/generate.py build/docs    # copy the pages for the builder, with its settings and the navigation

A generated part of a page stands between two comments,

    <!-- generated: NAME ARGUMENT -->
    <!-- end of the generated part -->

and is what the function NAME of `PARTS` returns for ARGUMENT. So hooks, options, settings, measures, commands and the
Python reference are written in one place, the code; the pages hold a copy, which a test compares with the code.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

import clframe
from clframe import compose, contract, curve, hooks, metrics, registry
from clframe.context import Run
from clframe.hooks import HOOKS, Hooks
from clframe.options import REQUIRED, Option, fields_of, options_of, sections_of
from clframe.settings import RunSettings, TrainSettings

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
END = "<!-- end of the generated part -->"
PART = re.compile(
    rf"^<!-- generated: (\w+) ?(.*?) -->\n(?:(?:(?!<!-- generated:).*\n)*?{END}\n)?",
    re.MULTILINE,
)

# A section for each folder, in the order of reading; a page that is not named here comes last in its folder's section.
FOLDERS = {
    "tutorials": "Tutorials",
    "how-to": "How-to guides",
    "reference": "Reference",
    "explanation": "Explanation",
}
NAVIGATION = [
    "tutorials/getting-started.md",
    "tutorials/see-forgetting.md",
    "tutorials/write-a-method.md",
    "how-to/own-images.md",
    "how-to/trained-model.md",
    "how-to/combine-methods.md",
    "how-to/compare-methods.md",
    "how-to/tune.md",
    "how-to/reports.md",
    "how-to/own-package.md",
    "how-to/resume-elsewhere.md",
    "how-to/notebook.md",
    "how-to/gpu.md",
    "how-to/from-avalanche.md",
    "reference/commands.md",
    "reference/settings.md",
    "reference/methods.md",
    "reference/scenarios.md",
    "reference/measures.md",
    "reference/run-folder.md",
    "reference/events.md",
    "reference/checkpoint-format.md",
    "reference/compatibility.md",
    "reference/figures.md",
    "reference/hooks/index.md",
    *(f"reference/hooks/{name}.md" for name in HOOKS),
    "reference/api.md",
    "reference/tools.md",
    "explanation/concepts.md",
    "explanation/architecture.md",
    "explanation/decisions.md",
]
REST = "More"  # the section of pages outside these folders

ARGUMENTS = {
    "run": "the context of the run: the model, the settings, what is under way, and what a plugin may ask for",
    "experience": "the experience being learned: index, task, classes and training images; no test images",
    "batch": "the rows of this step, with those that plugins added; in `extra_batch` as it was drawn",
    "outputs": "the features and logits of the network for the rows of `batch`, with their graph",
}
FAMILIES = (  # of methods, in the order of the page on methods
    "regularization",
    "distillation",
    "rehearsal",
    "generative and data-free replay",
    "parameter isolation",
    "baseline",
    "observer",
    "adapter",
)
REFUSED = {  # why a pair of methods cannot run together
    "o": "both answer `base_loss`, or both `predictor`, of which a run has one",
    "z": "made for other logits (`train.logits`)",
    "p": "decides alone what of the network a task may use",
    "j": "trains on everything, and is an oracle",
}
WIDTH = 88  # characters of code that a page shows without scrolling
DOC_SECTIONS = (
    "Args",
    "Attributes",
    "Returns",
    "Yields",
    "Raises",
    "Options",
)  # of docstrings
TOOLS = {  # modules that methods share: what of them is of use to a method's author
    "toolkit.memory": "quota groups_of balanced at_random herding reservoir ring draw",
    "toolkit.distill": "soft_cross_entropy kl_divergence hard_cross_entropy sigmoid_cross_entropy grad_cam",
    "toolkit.importance": "Quadratic ImportanceMean label_cotangents path_importance",
    "toolkit.generators": "GenerativeModel VAE WGAN",
    "toolkit.rehearsal": "Rehearsal",
    "toolkit.weight_masks": "WeightMask WeightOwner",
    "toolkit.norms": "TaskNorm",
    "toolkit.warm_up": "warm_up",
    "evaluate": "ModelPredictor TaskPredictor NearestMean",
    "model": "PerTask masked class_mask",
}


# ------------------------------------------------------------------------------------------- parts


def hook(name: str) -> str:
    """Return the part on a hook: signature, contract, place in the loop, arguments and answers."""
    spec = getattr(Hooks, name)
    signature = inspect.signature(spec)
    lines = ["```python", "@hookimpl", signature_of(name), "```", ""]
    lines += [
        prose(inspect.getdoc(spec) or ""),
        "",
        "## When",
        "",
        "```text",
        _loop(name),
        "```",
        "",
    ]
    lines += [
        "## Arguments",
        "",
        "An implementation takes any of them, by these names, in any order.",
        "",
    ]
    arguments = [p for p in signature.parameters.values() if p.name != "self"]
    lines += table(
        ["argument", "type", "what"],
        [[code(p.name), _type(p.annotation), ARGUMENTS[p.name]] for p in arguments],
    )
    lines += ["", "## Answer", "", _answer(spec, str(signature.return_annotation)), ""]
    return "\n".join(lines)


def users(name: str) -> str:
    """Return the table of built-in methods that use a hook."""
    found = [(n, cls) for n, cls in _plugins() if name in contract.hooks_of(cls)]
    rows = [
        [_method_link(n, "../methods.md"), prose(_first_line(getattr(cls, name)))]
        for n, cls in found
    ]
    table_ = table(["method", "what it does there"], rows) if rows else ["None."]
    return "\n".join(["## Built-in methods that use it", "", *table_])


def all_hooks(_: str) -> str:
    """Return the table of hooks in the order of calling."""
    rows = []
    for name in HOOKS:
        spec = getattr(Hooks, name)
        arguments = ", ".join(list(inspect.signature(spec).parameters)[1:])
        rows.append(
            [
                f"[`{name}({arguments})`]({name}.md)",
                _kind(spec),
                prose(_first_line(spec)),
            ]
        )
    return "\n".join(table(["hook", "answers", "what"], rows))


def all_methods(_: str) -> str:
    """Return the table of all plugins, by family."""
    rows = [
        [_method_link(n, ""), prose(_first_line(cls)), cls.family, prose(cls.citation)]
        for family in FAMILIES
        for n, cls in _of_family(family)
    ]
    return "\n".join(table(["method", "what", "family", "paper"], rows))


def methods(family: str) -> str:
    """Return a section for each plugin of a family, out of the docstring of its class."""
    lines = []
    for name, cls in _of_family(family):
        parts = sections_of(cls)
        lines += [f"### `{name}`", "", prose(parts[""]), ""]
        for heading in ("When to use", "Keeps"):
            text = " ".join(parts[heading].split())
            lines += [f"**{heading}.** {prose(text)}", ""]
        if cls.variants:
            variants = ", ".join(code(f"{name}:{variant}") for variant in cls.variants)
            lines += [
                f"It is named by a variant, each of which has options of its own: {variants}. "
                f"`clframe plugins show {name}:{cls.variants[0]}` shows them.",
                "",
            ]
        else:
            lines += [*options(options_of(cls), name), ""]
        rows = [
            [f"[`{h}`](hooks/{h}.md)", prose(_first_line(getattr(cls, h)))]
            for h in contract.hooks_of(cls)
        ]
        lines += [*table(["hook", "what the method does there"], rows), ""]
        facts = {
            "Settings": ", ".join(cls.serves),
            "State": ", ".join(map(code, cls.state)) or "none",
            "Keeps training images": "yes" if cls.keeps_images else "no",
            "Paper": prose(cls.citation) or "none",
        }
        lines += [f"- {fact}: {text}" for fact, text in facts.items()] + [""]
    return "\n".join(lines)


def pairs(_: str) -> str:
    """Return the matrix of pairs of methods: which run together, and why others are refused."""
    found = [n for n, cls in _plugins() if not (cls.observer or cls.variants)]
    rows = [
        [
            f"{k} {code(name)}",
            *(_pair(other, name) for other in found[: k - 1]),
            *[""] * (len(found) - k),
        ]
        for k, name in enumerate(found[1:], start=2)
    ]
    headers = [f"1 {code(found[0])}", *map(str, range(1, len(found)))]
    reasons = "; ".join(f"{code(letter)}: {why}" for letter, why in REFUSED.items())
    legend = f"{code('+')}: they run together; else they are refused. {reasons}."
    return "\n".join([legend, "", *table(headers, rows)])


def _pair(a: str, b: str) -> str:
    """Return ``+`` if two methods with their default options may run together, else the letter of the reason."""
    plugins = [registry.build_plugin(name, {}) for name in (a, b)]
    try:
        compose.manager(plugins)
    except clframe.UsageError:
        return "p" if any(plugin.isolates for plugin in plugins) else "o"
    served = [s for s in ("class", "task", "domain") if s in plugins[0].serves]
    both = [s for s in served if s in plugins[1].serves]
    run = object.__new__(Run)  # of which nothing else is asked here
    run.plugins = plugins
    run.scenario = SimpleNamespace(setting=(both or served)[0])
    oracles = [plugin for plugin in plugins if plugin.keeps_experiences]
    if any(list(oracle.problems(run)) for oracle in oracles):
        return "j"
    wanted = {plugin.wanted_logits(run) for plugin in plugins} - {None}
    return "z" if len(wanted) > 1 else "+"


def scenarios(_: str) -> str:
    """Return a section for each scenario: its options, and what suits it."""
    lines = []
    for name in names("scenario"):
        build = registry.find("scenario", name)[0].load()
        lines += [
            f"## `{name}{_variant(build)}`",
            "",
            prose(_before_options(build)),
            "",
        ]
        lines += [*options(options_of(build, skip=registry.SUPPLIED), "scenario"), ""]
        lines += [*_suits("it", *registry.suited(build, name))]
        for variant in getattr(build, "variants", {}):
            full = f"{name}:{variant}"
            lines += _suits(code(full), *registry.suited(build, full))
        lines += [""]
    return "\n".join(lines)


def _suits(what: str, model: Any, train: dict[str, Any]) -> list[str]:
    """Return two items of a list, on the model and the training settings that suit a scenario."""
    settings = ", ".join(
        code(f"train.{key}={value(given)}") for key, given in train.items()
    )
    return [
        f"- Model that suits {what}: {code(value(model)) if model else 'none named'}",
        f"- Training that suits {what}: {settings or 'the defaults'}",
    ]


def backbones(_: str) -> str:
    """Return a section for each backbone with its options."""
    lines = []
    for name in names("model"):
        build = registry.find("model", name)[0].load()
        lines += [
            f"### `{name}{_variant(build)}`",
            "",
            prose(_before_options(build)),
            "",
        ]
        if found := options_of(build, skip=registry.SUPPLIED):
            lines += [*options(found, "model"), ""]
    return "\n".join(lines)


def settings(section: str) -> str:
    """Return the table of ``train`` or ``run`` settings."""
    model = {"train": TrainSettings, "run": RunSettings}[section]
    return "\n".join(options(fields_of(model), section))


def measures(_: str) -> str:
    """Return the table of all measures of a run with formula and source."""
    import torch

    found = metrics.measures([[1.0]], [1]) | metrics.calibration(
        torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    )
    return measure_table(found)


def measures_while_learning(_: str) -> str:
    """Return the table of the measures of evaluations while learning."""
    return measure_table(curve.measures(curve.Curve([], {}, [], []), "epoch", None))


def measure_table(found: Mapping[str, metrics.Measure]) -> str:
    """Return the table of measures by name, with formula and source."""
    rows = [
        [code(name), prose(m.formula), prose(m.source)] for name, m in found.items()
    ]
    return "\n".join(table(["measure", "formula", "source"], rows))


def events(_: str) -> str:
    """Return a section for each class of events of a run: its kind, its fields, what they mean."""
    from clframe.events import EVENTS

    lines = []
    for kind, cls in EVENTS.items():
        lines += [f"## `{cls.__name__}`", "", f"Kind: {code(kind)}.", ""]
        lines += [
            *definition(cls.__name__, cls),
            *markdown(inspect.getdoc(cls) or ""),
            "",
        ]
    return "\n".join(lines)


def commands(_: str) -> str:
    """Return a section for each command with its arguments and options, as the command line has them."""
    lines = []
    for path, command in _commands():
        arguments = " ".join(
            _argument(p) for p in command.params if p.param_type_name == "argument"
        )
        flags = [
            p
            for p in command.params
            if p.param_type_name == "option" and p.name != "help"
        ]
        usage = " ".join(filter(None, [path, arguments, "[OPTIONS]" if flags else ""]))
        lines += [
            f"## `{path}`",
            "",
            command.help or "",
            "",
            "```text",
            usage,
            "```",
            "",
        ]
        rows = [
            [", ".join(code(name) for name in _flags(p)), prose(p.help or "")]
            for p in flags
        ]
        lines += [*(table(["option", "what"], rows) if rows else []), ""]
    return "\n".join(lines)


def api(_: str) -> str:
    """Return the reference of the public names of `clframe`."""
    rest = [name for name in clframe.__all__ if name not in (*FIRST, "hookimpl")]
    lines = []
    for name in [*FIRST, *rest]:
        found = getattr(clframe, name)
        heading = name if inspect.isclass(found) else f"clframe.{name}"
        lines += documented(
            heading, found, level=2
        )  # `clframe.run` and the class `Run` need anchors of their own
    return "\n".join(lines)


def tools(_: str) -> str:
    """Return the reference of what methods share, module by module."""
    lines = []
    for module, names in TOOLS.items():
        found = importlib.import_module(f"clframe.{module}")
        about = (inspect.getdoc(found) or "").partition("\n\n")[0]
        lines += [f"## `clframe.{module}`", "", prose(about), ""]
        for name in names.split():
            lines += documented(name, getattr(found, name), level=3)
    return "\n".join(lines)


def documented(name: str, found: Any, level: int) -> list[str]:
    """Return the lines on a function, or on a class and what it offers, below a heading of this level."""
    lines = ["#" * level + " " + code(name), ""]
    lines += [*definition(name, found), *markdown(inspect.getdoc(found) or ""), ""]
    if inspect.isclass(found):
        for member, value_ in _members(found):
            lines += ["#" * (level + 1) + " " + code(f"{name}.{member}"), ""]
            function = _function(value_)
            if not isinstance(value_, property):
                lines += definition(member, function)
            lines += [*markdown(inspect.getdoc(function) or ""), ""]
    return lines


def definition(name: str, found: Any) -> list[str]:
    """Return a block of code with the signature of a function, or of the constructor of a class."""
    if inspect.isclass(found) and issubclass(found, BaseException):
        return []
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return []
    parameters = [
        p for p in signature.parameters.values() if p.name not in ("self", "cls")
    ]
    if parameters and all(
        p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    ):
        return []  # a metaclass takes whatever the constructor of a subclass does
    pieces = []
    for before, parameter in zip([None, *parameters], parameters, strict=False):
        keyword_only = parameter.kind is parameter.KEYWORD_ONLY
        if keyword_only and (
            before is None or before.kind is not parameter.KEYWORD_ONLY
        ):
            pieces.append("*")
        pieces.append(_parameter(parameter))
    if signature.return_annotation in (
        inspect.Signature.empty,
        "None",
        None,
    ) or inspect.isclass(found):
        end = ")"
    else:
        end = f") -> {_annotation(signature.return_annotation)}"
    text = f"{name}({', '.join(pieces)}{end}"
    if len(text) > WIDTH:
        inside = "".join(f"    {piece},\n" for piece in pieces)
        text = f"{name}(\n{inside}{end}"
    return ["```python", text, "```", ""]


def _parameter(parameter: inspect.Parameter) -> str:
    """Return a parameter as a definition has it: name, type, default."""
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(
        parameter.kind, ""
    )
    text = star + parameter.name
    typed = parameter.annotation is not parameter.empty
    if typed:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {parameter.default!r}" if typed else f"={parameter.default!r}"
    return text


def _annotation(annotation: Any) -> str:
    """Return a type as the source has it."""
    text = (
        annotation
        if isinstance(annotation, str)
        else getattr(annotation, "__name__", str(annotation))
    )
    return text.replace("'", "")


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a class that it, or a class of clframe below it, documents."""
    seen = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("clframe"):
            continue
        for name, found in vars(base).items():
            function = _function(found)
            is_member = isinstance(found, property) or inspect.isfunction(function)
            if (
                name.startswith("_")
                or name in seen
                or not is_member
                or not inspect.getdoc(function)
            ):
                continue
            seen.add(name)
            yield name, found


def _function(found: Any) -> Any:
    """Return the function behind a property, a class method or a static method; anything else as it is."""
    if isinstance(found, property):
        return found.fget
    if isinstance(found, classmethod | staticmethod):
        return found.__func__
    return found


def markdown(docstring: str) -> list[str]:
    """Return the lines of a docstring as Markdown: sections such as ``Args:`` become lists."""
    lines: list[str] = []
    text: list[str] = []

    def flush() -> None:
        if any(line.strip() for line in text):
            lines.extend([prose("\n".join(text).strip("\n")), ""])
        text.clear()

    rest = docstring.splitlines()
    while rest:
        line = rest.pop(0)
        if not (line.endswith(":") and line[:-1] in DOC_SECTIONS):
            text.append(line)
            continue
        flush()
        lines.extend([f"**{line[:-1]}**", ""])
        body = []
        while rest and (rest[0].startswith("    ") or not rest[0]):
            body.append(rest.pop(0).removeprefix("    "))
        lines.extend([*_entries(body), ""])
    flush()
    return lines[:-1] if lines else []


def _entries(body: list[str]) -> list[str]:
    """Return the indented lines below ``Args:`` and the like as a list, or as text if they are not a list."""
    entries: list[list[str]] = []
    for line in body:
        if not line:
            continue
        if line.startswith(" ") and entries:
            entries[-1].append(line.strip())
        else:
            entries.append([line])
    found = []
    for entry in entries:
        whole_ = " ".join(entry)
        if match := re.match(r"(``?)?(\*{0,2}[\w., ]+?)\1?: (.*)", whole_):
            found.append(f"- {code(match[2])}: {prose(match[3])}")
        else:
            found.append(prose(whole_))
    return found


FIRST = [  # of the public names, in the order in which a reader needs them; `hookimpl` is only a mark
    *("run", "resume", "extend", "load", "Results"),
    *("Trained", "Prediction", "Answer"),
    *("Arrays", "split_classes", "change_domains", "Transform", "Scenario", "suits"),
    *("save_split", "from_avalanche", "as_avalanche"),
    *("Plugin", "Run", "Phase", "Experience", "ImageData", "Batch"),
    *("IncrementalNet", "Outputs", "snapshot", "Predictor"),
]
PARTS: dict[str, Callable[[str], str]] = {
    part.__name__: part
    for part in (
        hook,
        users,
        all_hooks,
        all_methods,
        methods,
        pairs,
        scenarios,
        backbones,
        settings,
        measures,
        measures_while_learning,
        events,
        commands,
        api,
        tools,
    )
}


# ------------------------------------------------------------------------------------------- words


def code(text: str) -> str:
    """Return `text` as code."""
    return f"`{text}`"


def value(given: object) -> str:
    """Return a value as YAML and ``--set`` write it."""
    return given if isinstance(given, str) else json.dumps(given, default=str)


def words(kind: str) -> str:
    """Return the type of an option for readers: its choices one by one."""
    return " or ".join(code(choice) for choice in kind.split(" | "))


def prose(text: str) -> str:
    """Return a docstring as Markdown: all but code and lists is taken word for word."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if p.startswith("    ") else _escaped(p) for p in paragraphs)


def table(headers: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return the lines of a table."""
    cells = [
        headers,
        ["---"] * len(headers),
        *([" ".join(cell.split()) for cell in row] for row in rows),
    ]
    return [
        "| " + " | ".join(_outside_code(r"\|", r"\\|", cell) for cell in row) + " |"
        for row in cells
    ]


def options(found: list[Option], section: str) -> list[str]:
    """Return the table of the options of a plugin, a scenario or a model."""
    rows = []
    searched = any(option.search for option in found)
    for option in found:
        default = (
            "(required)" if option.default is REQUIRED else code(value(option.default))
        )
        search = [str(option.search) if option.search else ""] if searched else []
        rows.append(
            [
                code(f"{section}.{option.name}"),
                words(option.type),
                default,
                *search,
                prose(option.doc),
            ]
        )
    columns = ["option", "type", "default", *["search"] * searched, "meaning"]
    return table(columns, rows) if rows else ["It has no options."]


def signature_of(hook: str) -> str:
    """Return the definition of a hook as a plugin may write it, in lines that fit a page."""
    text = f"def {hook}{inspect.signature(getattr(Hooks, hook))}: ...".replace("'", "")
    return (
        text if len(text) <= WIDTH else re.sub(r"\((.*)\) ->", r"(\n    \1\n) ->", text)
    )


def _escaped(text: str) -> str:
    escaped = _outside_code(r"([*_~\[\]{])", r"\\\1", text)
    return _outside_code("<", "&lt;", escaped)


def _outside_code(pattern: str, new: str, text: str) -> str:
    parts = re.split(r"(``.+?``|`[^`]+`)", text)
    return "".join(
        part if i % 2 else re.sub(pattern, new, part) for i, part in enumerate(parts)
    )


def names(kind: registry.Kind) -> list[str]:
    """Return the names of this kind that clframe itself offers; other packages may be installed beside it."""
    return [offer.name for offer in registry.offers(kind) if offer.package == "clframe"]


def _plugins() -> Iterator[tuple[str, type[clframe.Plugin]]]:
    return ((name, registry.plugin_class(name)) for name in names("plugin"))


def _of_family(family: str) -> list[tuple[str, type[clframe.Plugin]]]:
    if family not in FAMILIES:
        raise LookupError(f"There is no family of methods {family!r}.")
    return [(name, cls) for name, cls in _plugins() if cls.family == family]


def _commands() -> Iterator[tuple[str, Any]]:
    import typer

    from clframe.cli.main import app

    def walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
        inside = getattr(command, "commands", None)
        if inside is None:
            yield path, command
        for name, child in (inside or {}).items():
            yield from walk(f"{path} {name}", child)

    return walk("clframe", typer.main.get_command(app))


def _argument(parameter: Any) -> str:
    shown = parameter.metavar or parameter.name.upper()
    shown = (
        shown + "..." if parameter.nargs == -1 and not shown.endswith("...") else shown
    )
    return shown if parameter.required else f"[{shown}]"


def _flags(parameter: Any) -> list[str]:
    names = [*parameter.opts, *parameter.secondary_opts]
    metavar = (
        "" if parameter.is_flag else " " + (parameter.metavar or parameter.name.upper())
    )
    return [*(name for name in names[1:] if len(names) > 1), names[0] + metavar]


def _loop(name: str) -> str:
    """Return the order of calling, out of the docstring of `clframe.hooks`, with an arrow at the line of this hook."""
    block = inspect.cleandoc(hooks.__doc__ or "").split("\n\n")[1]
    lines = [line[4:] for line in block.splitlines()]
    return "\n".join(
        f"{line}    <-- {name}" if re.search(rf"\b{name}\b", line) else line
        for line in lines
    )


def _kind(spec: Any) -> str:
    if spec.clframe_spec["firstresult"]:
        return "of one owner"
    return (
        "none"
        if str(inspect.signature(spec).return_annotation) == "None"
        else "collected"
    )


def _answer(spec: Any, kind: str) -> str:
    answers = {
        "none": "None: the hook is an event, and its return value is ignored.",
        "collected": f"{code(kind)}. The engine collects the answers of all plugins, in the order in which they were "
        "named, and leaves out `None`.",
        "of one owner": f"{code(kind)}. The first answer that is not `None` counts. Two plugins that own this hook are "
        "refused before training, both named; a plugin that owns it with some options only declares that in its method "
        "`owns`.",
    }
    return answers[_kind(spec)]


def _type(annotation: str) -> str:
    return f"[`{annotation}`](../api.md#{annotation.lower()})"


def _method_link(name: str, page: str) -> str:
    return f"[`{name}`]({page}#{name})"


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n\n")[0].replace("\n", " ")


def _variant(factory: Callable[..., object]) -> str:
    return ":NAME" if "variant" in inspect.signature(factory).parameters else ""


def _before_options(documented: object) -> str:
    """Return the docstring without the sections that the page shows elsewhere, or the command itself."""
    return sections_of(documented)[""].partition("\nRaises:\n")[0].strip()


# ------------------------------------------------------------------------------------------- pages


def files() -> dict[str, Path]:
    """Return the files of the pages, by path in this folder."""
    return {
        file.relative_to(FOLDER).as_posix(): file
        for file in sorted(FOLDER.rglob("*.md"))
    }


def sources() -> dict[str, str]:
    """Return the pages as people wrote them, without what is generated, by path in this folder."""
    return {
        path: written(file.read_text(encoding="utf-8"))
        for path, file in files().items()
    }


def written(page: str) -> str:
    """Return the text of a page without its generated parts; their first comments stay."""
    return PART.sub(
        lambda found: f"<!-- generated: {' '.join(filter(None, found.groups()))} -->\n",
        page,
    )


def whole(page: str) -> str:
    """Return the text of a page with its generated parts as the code has them now."""

    def part(found: re.Match[str]) -> str:
        first = f"<!-- generated: {' '.join(filter(None, found.groups()))} -->"
        return f"{first}\n\n{_tidy(PARTS[found[1]](found[2]))}\n\n{END}\n"

    return PART.sub(part, page)


def _tidy(text: str) -> str:
    """Return `text` without blanks at the ends of lines, and with one empty line at most between others."""
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def stale() -> list[str]:
    """Return the pages, by path in this folder, whose generated parts are not what the code says."""
    texts = {path: file.read_text(encoding="utf-8") for path, file in files().items()}
    return [path for path, text in texts.items() if whole(text) != text]


def update() -> list[str]:
    """Write the generated parts into the pages, and return the pages that changed."""
    changed = stale()
    for path in changed:
        file = FOLDER / path
        file.write_text(whole(file.read_text(encoding="utf-8")), encoding="utf-8")
    return changed


def navigation(paths: Iterable[str]) -> list[Any]:
    """Return the builder's ``nav`` for these pages."""
    paths = set(paths)
    if missing := {"index.md", *NAVIGATION} - paths:
        raise LookupError(
            f"The navigation names pages that are not there: {', '.join(sorted(missing))}."
        )
    ordered = [*NAVIGATION, *sorted(paths - {"index.md", *NAVIGATION})]
    sections: dict[str, list[Any]] = {title: [] for title in (*FOLDERS.values(), REST)}
    for path in ordered:
        sections[FOLDERS.get(path.partition("/")[0], REST)].append(path)
    reference = sections[FOLDERS["reference"]]
    of_hooks = [path for path in reference if path.startswith("reference/hooks/")]
    at = reference.index(of_hooks[0])
    reference[at : at + len(of_hooks)] = [{"Hooks": of_hooks}]
    return ["index.md", *({title: pages} for title, pages in sections.items() if pages)]


def main(out: Path) -> None:
    """Copy all pages, their pictures and the builder's settings into the folder `out`."""
    found = files()
    for path, file in found.items():
        text = file.read_text(encoding="utf-8")
        target = out / "pages" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_inside(text, path), encoding="utf-8")
    shutil.copy(FOLDER / "extra.css", out / "pages" / "extra.css")
    shutil.copytree(FOLDER / "images", out / "pages" / "images", dirs_exist_ok=True)
    config = yaml.safe_load((FOLDER / "mkdocs.yml").read_text(encoding="utf-8"))
    config |= {"docs_dir": "pages", "site_dir": "site", "nav": navigation(found)}
    (out / "mkdocs.yml").write_text(
        yaml.safe_dump(config, sort_keys=False), encoding="utf-8"
    )


def _inside(text: str, path: str) -> str:
    """Return a page for the site, which holds this folder alone: links to other files of the project become text."""

    def link(found: re.Match[str]) -> str:
        target = (FOLDER / path).parent.joinpath(found[2].partition("#")[0]).resolve()
        return found[0] if target.is_relative_to(FOLDER) else found[1]

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)]+)\)", link, text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        for page_ in update():
            print(f"Changed: docs/{page_}")
