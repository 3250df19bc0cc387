"""Find words that the project's prose does without, in docstrings, comments, help texts, error sentences and pages.

`python tests/prose.py` checks the files that are `HELD` to the list, `python tests/prose.py FILE...` any others. One
line for each finding: file:line, the word, a better one. The exit code is 1 if there is any.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Files that are held to the list: patterns below the root.
HELD = [
    *(
        "*.md",
        "docs/**/*.md",
        "docs/*.py",
        "benchmarks/*.md",
        "benchmarks/*.py",
        "examples/**/*.md",
        "examples/**/*.py",
    ),
    *("clframe/**/*.py", "cli/*.py", "plugins/**/*.py", "scenarios/*.py"),
]
# Words that stand for themselves: keys of files that must stay readable, or old words that a reader still takes.
ALLOWED = {
    "clframe/experiments/children.py": {"cancelled"},  # a state of Dask's tasks
    "clframe/experiments/cluster.py": {"cancelled"},  # a state of Dask's futures
    "clframe/renamed.py": {"colour", "grey"},  # which it refuses
    "plugins/mas.py": {"springs"},  # a name in checkpoints
    "plugins/si.py": {"springs"},
}

PLAIN = {
    "anew": "again, from the start",
    "heed(s|ed|ing)?": "use, apply, follow",
    "thereof|therein|thereby|lest": "plain words",
    "who(m|ever|mever|soever)": "a noun, such as `the user` or `a caller`",
    "(no|some)body|no one|someone": "a noun, such as `a user`, or the passive",
    "one's own": "your own, custom",
    "such as will do": "that suffices",
    "springs?": "penalty",
    r"(is|are|was|were|be|been)\s+(?-i:no|none)": "`is not a`, `are not`; `is not one of`",  # but `is None` is code
}
Z = (
    "categor|character|custom|final|general|initial|item|local|material|maxim|minim|modern|normal|optim|organ|parallel"
    "|parametr|parameter|penal|quant|random|real|recogn|regular|serial|special|stabil|standard|summar|synchron|vector"
    "|visual"
)
AMERICAN = {
    rf"(re|de|un)?({Z})is(e[sdr]?|ers|ing|able|ations?)": "the same with z",
    "analys(e[sd]?|ing)": "analyze",
    "artefacts?": "artifact",
    "behaviours?": "behavior",
    "centre[sd]?": "center",
    r"colour\w*": "color",
    r"favour\w*": "favor",
    "grey(s|scale)?": "gray",
    "(un|mis)?(cancel|label|model|travel)l(ed|ing|er)": "the same with one l",
    "(mis)?spelt|burnt|learnt": "the same with -ed",
    "licen(ce|ces|ced)": "license",
    r"neighbour\w*": "neighbor",
    "whilst|amongst": "while, among",
}
WORDS = PLAIN | AMERICAN
# Phrases that are right, though an unwanted one is in them.
RIGHT = (
    r"there(\s+\w+)?\s+(is|are|was|were|be|been)\s+(no|none)",
    r"(is|are|was|were|be|been)\s+no\s+(longer|more|less|fewer|faster|slower|larger|smaller|better|worse|later|earlier)",
)
PATTERN = re.compile(rf"\b(?:{'|'.join(RIGHT)}|(?P<word>{'|'.join(WORDS)}))\b", re.IGNORECASE)


def better(word: str) -> str:
    """Return what to write in place of a word that `PATTERN` found."""
    return next(text for pattern, text in WORDS.items() if re.fullmatch(pattern, word, re.IGNORECASE))


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield pieces of prose with the number of their first line: a whole page; strings and comments of a module."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield 1, content
        return
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("COMMENT", "FSTRING_MIDDLE"):
            yield token.start[0], token.string
        elif kind == "STRING":
            formatted = "f" in token.string.partition(token.string[-1])[0].lower()  # before Python 3.12
            yield token.start[0], re.sub(r"\{[^{}\n]*\}", "", token.string) if formatted else token.string


def findings(path: Path) -> Iterator[str]:
    """Yield one line for each word in a file that stands in the list and is not allowed there."""
    if not PATTERN.search(path.read_text(encoding="utf-8")):
        return
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
    for first, text in texts(path):
        for match in PATTERN.finditer(text):
            word = match["word"]
            if word and word.lower() not in ALLOWED.get(name, ()):
                yield f"{name}:{first + text.count(chr(10), 0, match.start())}: {word!r}: {better(word)}"


def held(patterns: Iterable[str] = HELD) -> list[Path]:
    """Return the files that the patterns name, each of which must name one at least."""
    found = {pattern: sorted(ROOT.glob(pattern)) for pattern in patterns}
    empty = [pattern for pattern, paths in found.items() if not paths]
    if empty:
        raise FileNotFoundError(f"no file is called as {empty} in HELD of tests/prose.py say")
    return [path for paths in found.values() for path in paths]


def main(arguments: list[str]) -> int:
    """Print the findings in the named files, or in those held to the list, and return the exit code."""
    paths = [Path(name).resolve() for name in arguments] or held()
    lines = [line for path in paths for line in findings(path)]
    print("\n".join(lines) if lines else f"No unwanted word in {len(paths)} files.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
