"""The documentation against the code: all is documented, and what the pages show runs and prints what they say."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch
import typer

import clframe
from clframe import Plugin, compose, contract, metrics, registry
from clframe.cli.main import app, main
from clframe.config import resolve
from clframe.events import EVENTS
from clframe.experiments.search import ranges_of
from clframe.experiments.study import Study
from clframe.experiments.tuning import tunings_of
from clframe.hooks import HOOKS, Hooks
from clframe.options import options_of
from clframe.options import sections_of as sections_of_docstring
from clframe.settings import RunSettings, TrainSettings

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
DECIMAL = re.compile(r"\d+\.\d+")
WIDTH = 88  # characters of code
TOLERANCE = 3.0  # of a figure with decimals: another processor rounds otherwise
COARSE = 15.0  # of those that commands print, which may be the confidence in a single image


def load_generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()
SOURCES = generate.sources()
RUNNING = [
    path for path, text in SOURCES.items() if any(language == "python" for language, _, _ in FENCE.findall(text))
]
# pages whose commands are run, too, and whose blocks are scripts of their own
CARRIED_OUT = ["tutorials/write-a-method.md", "how-to/own-images.md", "how-to/trained-model.md"]


@cache
def pages():
    """The pages with their generated parts, as they are committed."""
    return {path: file.read_text(encoding="utf-8") for path, file in generate.files().items()}


class Reader:
    """Does what a page says, in a folder of its own: writes its files, runs its code, compares what is printed."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.scope = {"__name__": "page"}
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def read(self, path):
        printed, matches = None, alike  # by the latest block, if it was run, and how much of it the page shows
        for language, title, body in FENCE.findall(SOURCES[path]):
            if title:
                self.write(title, body)
            elif language == "python":
                self.capsys.readouterr()
                scope = {"__name__": "page"} if path in CARRIED_OUT else self.scope
                exec(compile(body, path, "exec"), scope)
                printed, matches = self.capsys.readouterr().out, alike
            elif language == "text" and printed is not None:
                assert matches(printed, body), f"{path} says\n{body}but this was printed:\n{printed}"
            elif language == "sh":
                printed, matches = None, has
                if path in CARRIED_OUT:
                    printed = "".join(self.carry_out(line, SOURCES[path]) for line in shell_lines(f"```sh\n{body}```"))

    def write(self, title, body):
        (self.folder / title).write_text(body)
        if title.endswith(".py"):
            self.monkeypatch.delitem(sys.modules, title.removesuffix(".py"), raising=False)
            importlib.invalidate_caches()

    def carry_out(self, line, page):
        """What a command prints, which may fail where the page shows the sentence that says why."""
        words = shlex.split(line)
        self.capsys.readouterr()
        if words[0] == "clframe":
            code = main([*words[1:], *(["--quiet"] if words[1] in ("run", "extend") else [])])
            out, err = self.capsys.readouterr()
            assert code == 0 or (err.strip() and has(page, err)), f"{line} failed:\n{err}"
            return out + err
        if words[0] == "pytest":
            self.run_tests(words[1])
        else:
            assert words == ["pip", "install", "-e", "."]
            self.install()
        return ""

    def install(self):
        """What pip leaves of the package in this folder."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]
        info = self.folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\nSummary: of a page\n")
        groups = project["entry-points"].items()
        entries = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in groups]
        (info / "entry_points.txt").write_text("\n".join(entries))
        registry._offers.cache_clear()

    def run_tests(self, file):
        module = importlib.import_module(file.removesuffix(".py"))
        tests = {name: test for name, test in vars(module).items() if name.startswith("test_")}
        assert tests
        for name, test in tests.items():
            folder = self.folder / name
            folder.mkdir()
            test(**({"tmp_path": folder} if "tmp_path" in inspect.signature(test).parameters else {}))


@pytest.fixture
def reader(tmp_path, monkeypatch, capsys):
    before = set(sys.modules)
    yield Reader(tmp_path, monkeypatch, capsys)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    registry._offers.cache_clear()


def alike(printed, shown, tolerance=TOLERANCE):
    """Whether two texts are the same but for spaces, and for figures that are a little off."""
    words, other = (" ".join(DECIMAL.sub("#", text).split()) for text in (printed, shown))
    figures = zip(DECIMAL.findall(printed), DECIMAL.findall(shown), strict=False)
    return words == other and all(abs(float(a) - float(b)) <= tolerance for a, b in figures)


def has(text, shown):
    """Whether each line of `shown` is in `text`, in their order, with figures that are not far off."""
    words = text.split()
    for line in shown.splitlines():
        n = len(line.split())
        found = (i for i in range(len(words) - n + 1) if alike(" ".join(words[i : i + n]), line, COARSE))
        if (place := next(found, None)) is None:
            return False
        words = words[place + n :]
    return True


# ------------------------------------------------------------------------------ what the pages show


@pytest.mark.parametrize("path", RUNNING)
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(path, reader):
    reader.read(path)
    for cls in [thing for thing in reader.scope.values() if inspect.isclass(thing) and issubclass(thing, Plugin)]:
        if cls is not Plugin:
            check_resume(cls)


def check_resume(cls):
    """A run with the plugin that is stopped goes on to the figures of one that was not, and can be loaded."""

    def stop(record):
        if record["kind"] == "eval" and record["experience"] == 1:
            raise KeyboardInterrupt

    scenario, train = {"name": "split-digits", "limit": 20}, {"iterations": 3}
    whole = clframe.run(scenario, plugins=[cls()], train=train)
    with pytest.raises(KeyboardInterrupt):
        clframe.run(scenario, plugins=[cls()], train=train, run={"output": "stopped"}, listeners=[stop])
    assert clframe.resume("stopped", plugins=[cls()]).accuracy == whole.accuracy
    assert clframe.load("stopped", plugins=[cls()]).class_names == tuple("0123456789")


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_s_page_shows_a_plugin_that_implements_it(name):
    (block,) = (
        body for language, title, body in FENCE.findall(SOURCES[f"reference/hooks/{name}.md"]) if language == "python"
    )
    plugins = re.split(r"^(?=class )", block, flags=re.MULTILINE)
    assert any("(Plugin):" in part and f"@hookimpl\n    def {name}(self" in part for part in plugins)


@pytest.mark.parametrize("path", [*(path for path in SOURCES if path not in CARRIED_OUT), "../README.md"])
def test_commands_name_what_exists(path):
    for line in shell_lines((generate.FOLDER / path).read_text(encoding="utf-8")):
        assert command_problem(line) is None, line


@pytest.mark.parametrize("path", SOURCES)
def test_commands_within_sentences_exist(path):
    known = {" ".join(name.split()[:2]) for name, _ in generate._commands()}
    prose = FENCE.sub("", pages()[path])
    for words in re.findall(r"`(clframe [a-z]+)\b(?!\.)[^`]*`", " ".join(prose.split())):
        assert words in known


def test_a_command_that_does_not_exist_is_noticed():
    assert "No such option" in command_problem("clframe run --epoch 3")
    assert command_problem("clframe dance") == "there is no such command"
    assert "There is no plugin `ecw`" in command_problem("clframe run --plugin ecw")
    assert "`ewc.lamda` is not an option" in command_problem("clframe run --plugin ewc --set ewc.lamda=1")
    assert command_problem("clframe run --plugin ewc --set ewc.lambda=1") is None


def shell_lines(text):
    blocks = [body for language, _, body in FENCE.findall(text) if language == "sh"]
    lines = [line.partition(" #")[0].strip() for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def command_problem(line):
    """Why the command cannot be given as it stands; None if it can. Only those of clframe are looked at."""
    words = shlex.split(line)
    if words[0] != "clframe":
        return None
    command, path = typer.main.get_command(app), ["clframe"]
    words = words[1:]
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            return None if words and words[0].startswith("-") else "there is no such command"
        path.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    try:
        given = command.make_context(" ".join(path), list(words)).params
    except Exception as error:
        return str(getattr(error, "message", error))
    try:
        if path[1:] == ["run"] and given["config"] is None:
            resolve(scenario=given["scenario"], model=given["model"], plugins=given["plugin"], sets=given["set_"] or ())
        elif path[2:] == ["show"] and path[1] != "runs":
            registry.find(path[1].removesuffix("s"), given["name"])
    except clframe.UsageError as error:
        return str(error)
    return None


def test_configurations_in_pages_resolve(tmp_path):
    blocks = [body for text in SOURCES.values() for language, _, body in FENCE.findall(text) if language == "yaml"]
    assert blocks
    for block in blocks:
        (tmp_path / "page.yaml").write_text(block)
        if block.startswith("scenarios:"):
            study = Study.from_yaml(tmp_path / "page.yaml")
            assert study.problems() == []
            assert all(study.configure(s, method, {}, 0) for s in study.scenarios for method in study.all_methods)
            assert all(ranges_of(tuning.study, tuning.source, tuning.method) for tuning in tunings_of(study))
            continue
        config = resolve(yaml_file=tmp_path / "page.yaml")
        compose.manager([registry.build_plugin(name, plugin.options) for name, plugin in config.plugins.items()])


# -------------------------------------------------------------------------- that all is documented


def test_every_hook_has_a_page_with_its_exact_signature_arguments_and_users():
    for name in HOOKS:
        page = pages()[f"reference/hooks/{name}.md"]
        signature = str(inspect.signature(getattr(Hooks, name))).replace("'", "")
        (shown,) = re.findall(rf"^@hookimpl\n(def {name}\(\n?\s*self, run: Run.*?): \.\.\.$", page, re.M | re.S)
        assert re.sub(r"\n *", "", shown) == f"def {name}{signature}"
        assert f"<-- {name}\n" in page
        for argument in list(inspect.signature(getattr(Hooks, name)).parameters)[1:]:
            assert f"\n| `{argument}` | [`" in page
        for plugin in generate.names("plugin"):
            uses = name in contract.hooks_of(registry.plugin_class(plugin))
            assert (f"| [`{plugin}`](../methods.md#{plugin}) |" in page) == uses
    assert generate.signature_of("penalty") == (
        "def penalty(\n    self, run: Run, batch: Batch, outputs: Outputs\n) -> dict[str, Tensor] | None: ..."
    )


def test_the_table_of_hooks_has_them_in_calling_order():
    found = re.findall(r"^\| \[`(\w+)\(.*?\)`\]\((\w+)\.md\) \|", pages()["reference/hooks/index.md"], re.MULTILINE)
    assert found == [(name, name) for name in HOOKS]


def test_every_plugin_and_each_of_its_options_is_documented():
    sections = sections_of(pages()["reference/methods.md"])
    for name in generate.names("plugin"):
        for option in options_of(registry.plugin_class(name), skip=("variant",)):
            assert option.doc, f"{name}.{option.name}"
            assert row_of(f"{name}.{option.name}", sections[name]).endswith(f" | {cell(option.doc)} |")
    assert "`clframe plugins show avalanche:AGEM`" in sections["avalanche"]
    assert row_of("ewc.lambda", sections["ewc"]).startswith("| `ewc.lambda` | `float >= 0` | `100.0` | ")


def row_of(name, text):
    """Return the only row of the tables in `text` whose first cell is `name`."""
    (row,) = re.findall(rf"^\| `{re.escape(name)}` \| .*$", text, re.MULTILINE)
    return row


def cell(text):
    """Return a description as a cell of a table holds it."""
    (row,) = generate.table([], [[generate.prose(text)]])[2:]
    return row.removeprefix("| ").removesuffix(" |")


@pytest.mark.parametrize("name", generate.names("plugin"))
def test_the_docstring_of_a_plugin_has_all_sections_and_names_its_hooks(name):
    cls = registry.plugin_class(name)
    parts = sections_of_docstring(cls)
    for heading in ("", "When to use", "Keeps", "Hooks"):
        assert parts.get(heading), f"{cls.__name__} in {cls.__module__} lacks the section `{heading}:` of its docstring"
    listed = re.findall(r"`(\w+)`", parts["Hooks"])
    hooks = contract.hooks_of(cls)
    assert [h for h in listed if h != "after_run"] == [h for h in hooks if h != "after_run"], (
        f"{name}: section `Hooks:`"
    )
    section = sections_of(pages()["reference/methods.md"])[name]
    for heading in ("When to use", "Keeps"):
        assert f"**{heading}.** " in section
    assert re.findall(r"^\| \[`(\w+)`\]\(hooks/\w+\.md\) \|", section, re.MULTILINE) == hooks


def test_the_table_of_methods_has_each_plugin_once_with_its_citation():
    table = pages()["reference/methods.md"].partition("\n## ")[0]
    rows = re.findall(r"^\| \[`([\w-]+)`\]\(#([\w-]+)\) \| .* \| ([\w -]+) \| (.*?) ?\|$", table, re.MULTILINE)
    assert sorted(name for name, *_ in rows) == generate.names("plugin")
    for name, anchor, family, paper in rows:
        cls = registry.plugin_class(name)
        assert (name, cls.family, cls.citation) == (anchor, family, paper)
    with pytest.raises(LookupError, match="no family of methods 'rehearsals'"):
        generate.methods("rehearsals")


def test_every_scenario_and_backbone_and_each_of_its_options_is_documented():
    sections = sections_of(pages()["reference/scenarios.md"])
    for kind in ("scenario", "model"):
        for name in generate.names(kind):
            build = registry.find(kind, name)[0].load()
            for option in options_of(build, skip=registry.SUPPLIED):
                assert option.doc, f"{name}: {option.name}"
                section = sections[name + generate._variant(build)]
                assert row_of(f"{kind}.{option.name}", section).endswith(f" | {cell(option.doc)} |")
    assert "Raises:" not in pages()["reference/scenarios.md"]
    assert "- Model that suits `avalanche:SplitCIFAR10`: `resnet32`" in sections["avalanche:NAME"]


def test_every_setting_is_documented_with_its_default():
    page = pages()["reference/settings.md"]
    for section, model in (("train", TrainSettings), ("run", RunSettings)):
        for name, field in model.model_fields.items():
            assert field.description
            assert row_of(f"{section}.{name}", page).endswith(f" | {cell(field.description)} |")
    assert row_of("train.batch_size", page).startswith("| `train.batch_size` | `int >= 1` | `32` | ")


def test_every_command_and_each_of_its_options_is_documented():
    sections = sections_of(pages()["reference/commands.md"])
    for path, command in generate._commands():
        assert command.help
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert parameter.help, f"{path} {parameter.name}"
                rows = [row for row in sections[path].splitlines() if row.endswith(f" | {cell(parameter.help)} |")]
                assert any(all(f"`{flag}" in row for flag in parameter.opts) for row in rows), (
                    f"{path} {parameter.opts}"
                )
    assert "| `-p`, `--plugin NAME` | " in sections["clframe run"]


def test_every_measure_is_documented_with_its_formula():
    page = pages()["reference/measures.md"]
    found = metrics.measures([[1.0]], [1]) | metrics.calibration(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    for name, measure in found.items():
        assert row_of(name, page) == f"| `{name}` | {cell(measure.formula)} | {cell(measure.source)} |"
    assert {"average_accuracy", "backward_transfer", "ece", "nll", "confident_errors", "intransigence"} <= set(found)
    assert row_of("forgetting", page).startswith("| `forgetting` | mean over j&lt;T of max\\_i R\\[i,j\\] - R\\[T,j\\]")


def test_every_public_name_is_in_the_reference_with_its_signature_and_members():
    page = pages()["reference/api.md"]
    found = re.findall(r"^## `(?:clframe\.)?(\w+)`$", page, re.MULTILINE)
    assert sorted([*found, "hookimpl"]) == sorted(clframe.__all__)
    sections = sections_of(page)
    assert "split_classes(\n    name: str,\n" in sections["clframe.split_classes"]
    assert "\n- `name`: " in sections["clframe.split_classes"]
    assert {"Run.ticks", "Run.rng", "Trained.predict", "Results.read"} <= set(sections)
    tools = sections_of(pages()["reference/tools.md"])
    for module, names in generate.TOOLS.items():
        assert f"clframe.{module}" in tools
        for name in names.split():
            assert inspect.getdoc(getattr(importlib.import_module(f"clframe.{module}"), name))
            assert name in tools


def test_the_generated_parts_are_what_the_code_says():
    assert generate.stale() == [], "bring them up to date with `make docs-reference`"


def test_a_generated_part_is_written_once_and_only_between_its_comments():
    page = "# Settings\n\n<!-- generated: settings run -->\n\nAfter it.\n"
    once = generate.whole(page)
    assert "| `run.seed` |" in once
    assert once.endswith(f"{generate.END}\n\nAfter it.\n")
    assert generate.whole(once) == once
    assert generate.written(once) == page


def test_every_class_of_events_is_documented_with_its_kind_and_fields():
    sections = sections_of(pages()["reference/events.md"])
    for kind, cls in EVENTS.items():
        section = sections[cls.__name__]
        assert f"\nKind: `{kind}`.\n" in section
        for field in dataclasses.fields(cls):
            assert re.search(rf"\b{field.name}: ", section), f"{kind}: {field.name}"


def test_every_file_of_a_run_folder_is_documented(tmp_path):
    clframe.run("split-digits", train={"iterations": 1}, run={"output": str(tmp_path / "run"), "tensorboard": True})
    clframe.extend(tmp_path / "run", "split-digits", run={"output": str(tmp_path / "extended")})
    for file in tmp_path.glob("*/*"):
        assert f"`{file.name}{'/' * file.is_dir()}`" in pages()["reference/run-folder.md"], file.name


def test_every_exit_code_is_documented():
    errors = [getattr(clframe, name) for name in clframe.__all__ if name.endswith(("Error", "Use", "Failed"))]
    for code in {error.code for error in errors} | {0, 70, 130, 143}:
        assert f"\n| {code} | " in pages()["reference/commands.md"]


def sections_of(page):
    """The text below each heading, by the heading without its code marks."""
    parts = re.split(r"^#{2,3} `?(.*?)`?$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# ------------------------------------------------------------------------------------- how it holds


@pytest.mark.parametrize("path", SOURCES)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", pages()[path])):
        file, _, anchor = target.partition("#")
        linked = (ROOT / "docs" / path).parent.joinpath(file).resolve() if file else ROOT / "docs" / path
        assert linked.is_file(), target
        if linked.suffix == ".md" and linked.is_relative_to(ROOT / "docs"):
            assert linked.relative_to(ROOT / "docs").as_posix() in pages()
        if anchor:
            assert anchor in anchors(pages()[linked.relative_to(ROOT / "docs").as_posix()]), target


def anchors(page):
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_a_page_that_the_navigation_does_not_name_joins_the_section_of_its_folder():
    sections = {title: pages_ for entry in after(["how-to/new.md", "new.md"]) for title, pages_ in entry.items()}
    assert list(sections) == ["Tutorials", "How-to guides", "Reference", "Explanation", "More"]
    assert sections["How-to guides"][-1] == "how-to/new.md"
    assert sections["More"] == ["new.md"]
    assert {"Hooks": ["reference/hooks/index.md", *(f"reference/hooks/{name}.md" for name in HOOKS)]} in sections[
        "Reference"
    ]
    with pytest.raises(LookupError, match=r"reference/methods\.md"):
        generate.navigation([path for path in SOURCES if path != "reference/methods.md"])


def after(added):
    """The navigation with some more pages, but for the first one."""
    return generate.navigation([*SOURCES, *added])[1:]


def test_the_pages_and_the_builder_s_settings_are_written(tmp_path):
    generate.main(tmp_path)
    found = {file.relative_to(tmp_path / "pages").as_posix() for file in (tmp_path / "pages").rglob("*.md")}
    assert found == set(SOURCES)
    assert (tmp_path / "pages" / "images" / "demo.svg").is_file()
    assert "](../../" not in (tmp_path / "pages" / "explanation" / "architecture.md").read_text()
    assert "docs_dir: pages" in (tmp_path / "mkdocs.yml").read_text()


def test_text_of_docstrings_is_taken_word_for_word():
    assert generate.prose("of\n\n    a_b * c") == "of\n\n    a_b * c"
    assert generate.prose("theta*_{k} of `a_b`, R[i] <x>") == r"theta\*\_\{k} of `a_b`, R\[i\] &lt;x>"


def test_figures_may_be_a_little_off_and_words_may_not():
    assert alike("accuracy 61.0 %", "accuracy  60.1 %")
    assert not alike("accuracy 61.0 %", "accuracy 71.0 %")
    assert not alike("5 images", "6 images")
    assert has("on 1 on 2\nafter 1 61.0 -\nafter 2 10.0 99.0", "after 1  60.0  -\n\nafter 2  12.0\n  99.0")
    assert not has("after 1 61.0 -\nafter 2 10.0 99.0", "after 2  10.0  99.0\nafter 1  61.0  -")
    assert not has("after 1 61.0 -", "after 1  11.0  -")


def test_code_fits_a_page_without_scrolling():
    for path, text in SOURCES.items():
        for line in "\n".join(body for _, _, body in FENCE.findall(text)).splitlines():
            assert len(line) <= WIDTH, f"{path}: {line}"


def test_plugins_of_the_pages_have_their_own_names():
    names = [name for text in SOURCES.values() for name in re.findall(r'^    name = "([\w-]+)"$', text, re.MULTILINE)]
    assert len(names) >= len(HOOKS)
    assert not set(names) & set(generate.names("plugin"))
