"""Verifiers: whether a generated answer is right. Each returns True, False, or None where no answer can be read."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable

from posttrain.errors import ConfigError, DataError

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


def math(answer: str, reference: str) -> bool | None:
    """The same value or expression as the library math-verify reads them, LaTeX or plain, with words around: 1/2 = 0.5."""
    from math_verify import parse, verify

    wanted = parse(reference) if "$" in reference or "\\boxed" in reference else parse(f"${reference}$")
    if not wanted:
        raise DataError(
            f"the reference answer {reference[:60]!r} holds no mathematics that can be read; try number or exact"
        )
    given = parse(answer)
    return bool(verify(wanted, given)) if given else None


def require(name: str) -> None:
    """ConfigError where this verifier's library is not installed."""
    if name == "math" and importlib.util.find_spec("math_verify") is None:
        raise ConfigError("the verifier math needs the library math-verify: pip install 'posttrain[math]'")


VERIFIERS: dict[str, Callable[[str, str], bool | None]] = {"exact": exact, "number": number, "math": math}
