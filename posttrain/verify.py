"""Verifiers: whether a generated answer is right. Each returns True, False, or None where no answer can be read."""

from __future__ import annotations

import re
from collections.abc import Callable

from posttrain.errors import DataError

NUMBER = re.compile(r"(?<![\d)])-?\$?\d[\d,]*(?:\.\d+)?")
MARKER = "####"


def exact(answer: str, reference: str) -> bool | None:
    """The same text, white space at the ends apart. An empty answer cannot be read."""
    return answer.strip() == reference.strip() if answer.strip() else None


def number(answer: str, reference: str) -> bool | None:
    """The same final number: the one after the last `####` (GSM8K), else the last in the text; 1,000 = 1000 = 1000.0."""
    given, wanted = final_number(answer), final_number(reference)
    if wanted is None:
        raise DataError(f"the reference answer {reference[:60]!r} holds no number; use eval.verifier=exact")
    return None if given is None else given == wanted


def final_number(text: str) -> float | None:
    """The number an answer ends on, or None."""
    found = NUMBER.findall(text.rpartition(MARKER)[2]) if MARKER in text else NUMBER.findall(text)
    if not found:
        return None
    chosen = found[0] if MARKER in text else found[-1]
    return float(chosen.replace(",", "").replace("$", ""))


VERIFIERS: dict[str, Callable[[str, str], bool | None]] = {"exact": exact, "number": number}
