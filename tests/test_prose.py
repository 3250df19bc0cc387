"""The list of unwanted words against planted ones: `make check` runs it over the project."""

from __future__ import annotations

from pathlib import Path

import prose
import pytest

MODULE = '''"""A module.

It penalises
whoever reads."""

whoever = grey = 1  # names are not prose, but this heeds nothing


def colour(nobody: int) -> str:
    return f"{grey} grey {nobody}" + r"""
        behaviour"""  # fine
'''


def test_words_are_found_in_docstrings_comments_and_texts_and_not_in_names(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(MODULE)
    assert [line.removeprefix(f"{path}:") for line in prose.findings(path)] == [
        "3: 'penalises': the same with z",
        "4: 'whoever': a noun, such as `the user` or `a caller`",
        "6: 'heeds': use, apply, follow",
        "10: 'grey': gray",
        "11: 'behaviour': behavior",
    ]


def test_a_page_is_looked_through_as_a_whole(tmp_path: Path):
    path = tmp_path / "page.md"
    path.write_text("# One\n\nAnew,\nnormalized and normalised.\n")
    assert [line.split(": ")[1] for line in prose.findings(path)] == ["'Anew'", "'normalised'"]


def test_words_that_are_right_are_left_alone(tmp_path: Path):
    path = tmp_path / "page.md"
    path.write_text(
        "Raise noise likewise; exercise, promise, precise, wise; users who see colors, learned or labeled.\n"
    )
    assert list(prose.findings(path)) == []


def test_a_thing_is_not_said_to_be_no_thing(tmp_path: Path):
    path = tmp_path / "page.md"
    path.write_text(
        "Label 3 is no class of the head, which\nare\nno options, was none of these, or must be no folder.\n"
        "There is no plugin, there may be none, there\n    are no images; it is no longer, no faster and no folder "
        "`is None`.\n"
    )
    assert [line.removeprefix(f"{path}:") for line in prose.findings(path)] == [
        "1: 'is no': `is not a`, `are not`; `is not one of`",
        "2: 'are\\nno': `is not a`, `are not`; `is not one of`",
        "3: 'was none': `is not a`, `are not`; `is not one of`",
        "3: 'be no': `is not a`, `are not`; `is not one of`",
    ]


def test_an_allowed_word_is_allowed_in_its_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    monkeypatch.setattr(prose, "ALLOWED", {"one.md": {"grey"}})
    for name in ("one.md", "two.md"):
        (tmp_path / name).write_text("Grey, anew.")
    assert [line.split(": ")[1] for line in prose.findings(tmp_path / "one.md")] == ["'anew'"]
    assert [line.split(": ")[1] for line in prose.findings(tmp_path / "two.md")] == ["'Grey'", "'anew'"]


def test_every_allowed_word_stands_in_its_file(monkeypatch: pytest.MonkeyPatch):
    allowed = prose.ALLOWED
    monkeypatch.setattr(prose, "ALLOWED", {})
    for name, words in allowed.items():
        assert words == {line.split("'")[1].lower() for line in prose.findings(prose.ROOT / name)}, name


def test_what_is_held_to_the_list_exists_and_passes(capsys: pytest.CaptureFixture[str]):
    assert prose.main([]) == 0
    assert capsys.readouterr().out.startswith("No unwanted word in ")
    with pytest.raises(FileNotFoundError, match="nothing/here"):
        prose.held(["nothing/here/*.py"])


def test_findings_are_printed_and_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "page.md").write_text("Whoever.")
    assert prose.main([str(tmp_path / "page.md")]) == 1
    assert "page.md:1: 'Whoever': a noun" in capsys.readouterr().out
