"""Text of models, data and configs, made harmless and visible: what would hide, reorder or end a line is written out.

Escaping for HTML is the templates' part; this part is what HTML would let through. Nothing is left out without a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f"
    + "".join(chr(plane + end) for plane in range(0x1_0000, 0x11_0000, 0x1_0000) for end in (0xFFFE, 0xFFFF))
    + "]"
)
"""Controls but for newline and tab, what sets a direction, what has no width, surrogates without their other half, and
numbers that are no characters. The joiners U+200C and U+200D stay: words and emoji need them."""

HEAD, TAIL = 3_000, 1_000
"""Characters shown of a text that is longer than both together."""

LONG_CHARS, LONG_LINES = 600, 12
"""From here on a text scrolls in a box of its own."""


def visible(text: str) -> str:
    """The text with every character that cannot be seen written out, as ⟨U+202E⟩. (The pictures U+2400 to U+2421 are in
    few fonts.)"""
    return UNSEEN.sub(lambda found: f"⟨U+{ord(found.group()):04X}⟩", text)


def one_line(text: str) -> str:
    """A text for a cell or a title: visible, and where it is long its beginning and end, saying what is left out."""
    cut = excerpt(text)
    return f"{cut.head} … {cut.omitted:,} characters not shown … {cut.tail}" if cut.omitted else cut.head


@dataclass(frozen=True)
class Excerpt:
    """What is shown of a text: all of it in head, or head and tail with the number of characters between them."""

    head: str
    omitted: int = 0
    tail: str = ""

    @property
    def long(self) -> bool:
        """Whether it gets a box that scrolls."""
        return bool(self.omitted) or len(self.head) > LONG_CHARS or self.head.count("\n") >= LONG_LINES


def excerpt(text: str, head: int = HEAD, tail: int = TAIL) -> Excerpt:
    """The whole text, visible, or its beginning and end where it is longer than both."""
    if len(text) <= head + tail:
        return Excerpt(visible(text))
    return Excerpt(visible(text[:head]), len(text) - head - tail, visible(text[-tail:]))
