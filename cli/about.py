"""The commands `plugins show` and `scenarios show`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe import contract, registry
from clframe.cli import show
from clframe.errors import ClframeError, cannot_write
from clframe.options import options_of, sections_of
from clframe.system.reading import expand_home

if TYPE_CHECKING:
    from clframe.data.scenario import Scenario


def show_plugin(name: str, json: bool) -> None:
    """Print description, citation, options, hooks, settings and state of a plugin."""
    offer, _ = registry.find("plugin", name)
    cls = registry.plugin_class(name)
    options = options_of(cls, skip=("variant",))
    facts: dict[str, Any] = {
        **({"family": cls.family} if cls.family else {}),
        "citation": cls.citation,
        "package": f"{offer.package} {offer.version}",
        "hooks": contract.hooks_of(cls),
        "settings": list(cls.serves),
        "state": list(cls.state),
        "conflicts": ["every method that changes what is learned"] if cls.isolates else list(cls.conflicts),
        "keeps training images": cls.keeps_images,
        "can be resumed": cls.resumes,
        **({"variants": [f"{offer.name}:{variant}" for variant in cls.variants]} if cls.variants else {}),
        **({"known problems": list(cls.known_problems)} if cls.known_problems else {}),
    }
    description = _describe(cls)
    sections = sections_of(cls)
    advice = {name: " ".join(sections[name].split()) for name in ("When to use", "Keeps") if name in sections}
    if json:
        known = {key.lower().replace(" ", "_"): value for key, value in (advice | facts).items()}
        listed = [show.describe_option(option) for option in options]
        show.document({"name": cls.name, "description": description, **known, "options": listed})
        return
    show.lines(f"{cls.name}: {description}")
    show.line()
    for name, text in advice.items():
        show.line(f"{name}: {text}")
    if advice:
        show.line()
    show.options(options)
    for key, value in facts.items():
        separator = " " if key == "known problems" else ", "
        text = separator.join(value) if isinstance(value, list) else {True: "yes", False: "no"}.get(value, value)
        show.line(f"{key.capitalize()}: {text or 'none'}")


def show_scenario(
    name: str, sets: Sequence[str], data_root: str | None, save: Path | None, sheet: Path | None, json: bool
) -> None:
    """Print description and options of a scenario, what suits it, and its experiences if its data is at hand.

    Args:
        name: a scenario, or a file with a split.
        sets: settings, as ``--set`` takes them.
        data_root: folder of the data sets.
        save: file to write the split to.
        sheet: file to write a picture of sample images to.
        json: print a JSON document.
    """
    from clframe.config import resolve
    from clframe.data import split_file
    from clframe.scenarios import sources

    if name.endswith(split_file.SUFFIX):
        scenario, name = name, split_file.read_split(Path(name))["name"]
    else:
        scenario = name
    offer, _ = registry.find("scenario", name)
    build = registry.builder("scenario", name)
    options = options_of(build, skip=registry.SUPPLIED)
    description = _describe(build)
    model, train = registry.suited(build, name)
    experiences: list[list[str]] = []
    notes: list[str] = []
    missing = setting = ""
    try:
        with sources.no_downloads():
            config = resolve(scenario=scenario, sets=sets, run={"data_root": data_root} if data_root else None)
            built = registry.build_scenario(config.scenario, config.run)
        if save:
            split_file.write_split(expand_home(save), config.scenario, built, config.run.seed)
        if sheet:
            _draw(expand_home(sheet), built)
        setting = built.setting
        notes = list(built.notes)
        experiences = [[built.class_names[label] for label in classes] for classes in built.classes]
    except ClframeError as error:
        if sets or save or sheet or scenario != name:  # more was asked for than the options
            raise
        missing = str(error)
    if json:
        show.document(
            {
                "name": name,
                "description": description,
                "package": f"{offer.package} {offer.version}",
                "options": [show.describe_option(option) for option in options],
                "model": model,
                "train": train,
                "setting": setting or None,
                "experiences": experiences or None,
                "notes": notes,
                "missing": missing or None,
            }
        )
        return
    show.lines(f"{offer.name}: {description}")
    show.line()
    show.options(options)
    show.line(f"Package: {offer.package} {offer.version}")
    show.line(f"Model that suits it: {show.format_value(model) if model else 'none named'}")
    settings = ", ".join(f"{key}={show.format_value(value)}" for key, value in train.items())
    show.line(f"Training that suits it: {settings or 'the defaults'}")
    if missing:
        show.line(f"Experiences: not known here. {missing}")
    else:
        show.line(f"Setting: {setting}-incremental")
        show.line(f"Experiences: {len(experiences)}")
        for i, names in enumerate(experiences, start=1):
            show.line(f"  {i}: {', '.join(names)}")
        for note in notes:
            show.line(note)
    for what, path in (("Split", save), ("Sheet", sheet)):
        if path:
            show.line(f"{what}: {path}")


def _draw(path: Path, scenario: Scenario) -> None:
    """Write a picture of sample images of each experience to `path`. Raises as `cannot_write` if that fails."""
    from clframe.data.pictures import draw_sheet, encode_png
    from clframe.system.writing import write_bytes

    try:
        write_bytes(path, encode_png(draw_sheet(scenario)))
    except OSError as error:
        raise cannot_write("The sheet", path, error) from error


def _describe(documented: object) -> str:
    """Return the docstring of a class or function without its sections."""
    return sections_of(documented)[""] or "no description"
