"""What lm-eval says: its warnings, gathered and counted, and the first line of its errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

EXPECTED = ("`pretrained` model kwarg is not of type `str`", "Passed an already-initialized model")
"""What lm-eval warns of where it is handed a network, as we mean to."""


@contextmanager
def heard() -> Iterator[list[str]]:
    """What lm-eval warns of within the block, filled in at its end: alike but for numbers, it is told once and counted."""
    said: dict[str, list[str]] = {}
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if not text.startswith(EXPECTED):
                said.setdefault(re.sub(r"\d+", "#", text), []).append(text)

    logger, listener = logging.getLogger("lm_eval"), Listener(logging.WARNING)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(listener)
    try:
        yield told
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagated
        told += [f"lm-eval warns{_times(len(texts))}: {texts[0][:300]}" for texts in said.values()]


def _times(count: int) -> str:
    return f" {count:,} times, first" if count > 1 else ""


def first_line(error: Exception) -> str:
    """Of its text; its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
