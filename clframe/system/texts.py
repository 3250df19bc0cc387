"""Untrusted texts as parts of sentences and on a terminal."""

from __future__ import annotations

import math
import re

SENTENCE = 2_000  # characters of a sentence at most
SENTENCES = 100  # sentences of an error, or lines of one, at most
# control characters and escape codes, line separators, changes of direction, and surrogates
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def cut(text: str, length: int = 200) -> str:
    """Return `text`, without its middle part if it is longer than `length` characters."""
    half = (length - 5) // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def quote(value: object, length: int = 200) -> str:
    """Return `value` as Python writes it, for a sentence, cut to `length` characters."""
    try:
        return cut(repr(value), length)
    except ValueError:  # from a whole number of more than 4,300 digits
        return f"a {type(value).__name__} of too many digits"


def escape_unprintable(text: str) -> str:
    """Return `text` in one line that a terminal can only show: other characters become escapes such as ``\\x1b``."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def shorten_lines(text: str) -> str:
    """Return `text`, the sentences of an error, with long ones cut, and a count in place of the last of very many."""
    lines = text.split("\n")
    more = [f"... and {len(lines) - SENTENCES:,} more."] if len(lines) > SENTENCES else []
    return "\n".join([cut(line, SENTENCE) for line in lines[:SENTENCES]] + more)


def by_name(text: str) -> tuple[int, float, str]:
    """Return a key that sorts names as people do: numbers by their value, then other names by the alphabet."""
    try:
        number = float(text)
    except ValueError:
        number = math.inf
    return (0, number, text) if math.isfinite(number) else (1, 0.0, text)  # a class may be called `nan`
