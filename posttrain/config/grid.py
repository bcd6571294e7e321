"""A sweep's arguments, expanded: `optim.lr=1e-5,1e-6 stage.beta=range(1,4)` is six argument lists.

Sweeps are written in Hydra's grammar: a,b,c or choice(a,b,c), range(start,stop,step), sort(...). A list is cut here, at the
commas that stand in no bracket and no quote, and its items stay as they were typed: Hydra's reader would turn a revision 007
into 7, and has no words for `~`, `#` or `ü`. Without --multirun a comma means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import product

from hydra.core.override_parser.types import RangeSweep
from hydra.errors import HydraException

from posttrain.config.values import override_parser
from posttrain.errors import ConfigError

PAIRS = {"[": "]", "{": "}", "(": ")"}
FORMS = "lists are written a,b,c or choice(a,b,c), numbers also range(1,10,2)"


@dataclass(frozen=True)
class Point:
    """One job of a sweep. arguments: all of a command line's. overrides: what sets this job apart, key=value."""

    arguments: tuple[str, ...]
    overrides: tuple[str, ...]


def expand(argv: list[str]) -> list[Point]:
    """The jobs, the last key varying fastest, as nested loops would. ConfigError where nothing is swept over."""
    values = [_values(argument) for argument in argv]
    swept = [place for place, found in enumerate(values) if len(found) > 1]
    if not swept:
        raise ConfigError(
            f"--multirun is given, but no key has several values; {FORMS}, such as optim.lr=1e-5,1e-6 (without --multirun "
            "a comma is part of the value)"
        )
    keys = [_key(argv[place]) for place in swept]
    twice = next((key for key in keys if [_key(each) for each in argv].count(key) > 1), None)
    if twice:
        raise ConfigError(f"{twice} is given twice, once with several values; keep one")
    return [Point(chosen, tuple(chosen[place] for place in swept)) for chosen in product(*values)]


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+")


def _values(argument: str) -> list[str]:
    """The arguments that this one stands for: itself, or one for each value."""
    option, equals, text = argument.partition("=")
    if not equals or option.startswith("-"):
        return [argument]
    found = _listed(option, text)
    twice = next((value for value in found if found.count(value) > 1), None)
    if twice is not None:
        raise ConfigError(f"{argument}: {twice} is there twice; each value makes one job")
    return [f"{option}={value}" for value in found]


def _listed(key: str, text: str) -> list[str]:
    pieces = split(text)
    if pieces is None:
        raise ConfigError(f"{key}={text}: a bracket or quote does not close; quote the value if it is meant so")
    if len(pieces) > 1:
        return _without_empty(key, text, pieces)
    called = re.fullmatch(r"\s*(\w+)\((.*)\)\s*", text, re.DOTALL)
    if called is None:
        return [text]
    if called[1] == "choice":
        return _without_empty(key, text, split(called[2]) or [])
    return _calculated(key, text)


def _without_empty(key: str, text: str, pieces: list[str]) -> list[str]:
    if not pieces or "" in pieces:
        raise ConfigError(f"{key}={text}: a value is missing between its commas; {FORMS} ('' is an empty text)")
    return pieces


def _calculated(key: str, text: str) -> list[str]:
    """What Hydra's functions give: range and sort; other text in brackets is a plain value."""
    try:
        override = override_parser().parse_override(f"key={text}")
    except HydraException as error:
        if re.match(r"\s*(range|sort|interval|shuffle|glob)\(", text):
            raise ConfigError(f"{key}={text}: {' '.join(str(error).split())}; {FORMS}") from None
        return [text]
    if not override.is_sweep_override():
        return [text]
    swept = override.value()
    if not override.is_discrete_sweep() or getattr(swept, "shuffle", False) or "glob(" in text:
        raise ConfigError(f"{key}={text} has no order in which its jobs could be named and counted; {FORMS}")
    found = list(_range(swept)) if isinstance(swept, RangeSweep) else list(override.sweep_string_iterator())
    if not found:
        raise ConfigError(f"{key}={text} is empty; range(start,stop,step) ends before its stop")
    return found


def _range(swept: RangeSweep) -> Iterator[str]:
    """In decimals, as typed: 0.1, 0.2, 0.3, where sums of floats would come to 0.30000000000000004."""
    value, stop, step = (Decimal(str(number)) for number in (swept.start, swept.stop, swept.step))
    if not step:
        raise ConfigError("range(start,stop,step): step must not be 0")
    while value < stop if step > 0 else value > stop:
        yield f"{value}"
        value += step


def split(text: str) -> list[str] | None:
    """At the commas outside brackets and quotes, blanks around the pieces off; a backslash takes the meaning of what follows.
    None where a bracket or quote does not close."""
    pieces, open_, quote, start, skip = [], [], "", 0, False
    for place, letter in enumerate(text):
        if skip:
            skip = False
        elif letter == "\\":
            skip = True
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and text[:place].rstrip()[-1:] in ("", *",[({:"):
            quote = letter  # where a value begins; elsewhere it is an apostrophe
        elif letter in PAIRS:
            open_.append(PAIRS[letter])
        elif open_ and letter == open_[-1]:
            open_.pop()
        elif letter == "," and not open_:
            pieces.append(text[start:place].strip())
            start = place + 1
    if open_ or quote:
        return None if "," in text else [text]
    return [*pieces, text[start:].strip()] if pieces else [text]
