"""Rewards of sampled answers: built-in verifiers and Python functions, these in a worker process with a time limit.

A function takes lists as long as each other, prompts (text), responses (text) and rows (the data row's other columns, a
dict each), and returns a number for each response, or None where it cannot judge one. What raises, hangs, dies or returns
anything else is a failure: counted, told, and fatal where there are too many. A failed response takes no part in learning.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from posttrain.errors import ConfigError, DataError
from posttrain.verify import VERIFIERS, require

NAN = float("nan")
START_SECONDS = 300
"""For a worker to import what a function needs."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """One reward of each response. scores: NaN where it failed. unreadable: no answer could be read (scored 0)."""

    scores: list[float]
    unreadable: int = 0
    failure: str | None = None


Reward = Callable[[Sequence[str], Sequence[str], Sequence[Row]], Judged]


def open_reward(spec: str, seconds: float) -> Reward:
    """The reward called `spec`: exact, number or math (against the row's `answer`), regex:PATTERN (the whole answer matches),
    length:N (minus the share by which an answer's characters exceed N), or module:function."""
    kind, _, argument = spec.partition(":")
    if kind in VERIFIERS and not argument:
        require(kind)
        return Verified(kind)
    if kind == "regex" and argument:
        try:
            return Matched(re.compile(argument, re.DOTALL))
        except re.error as error:
            raise ConfigError(f"stage.rewards: {spec!r} is no regular expression: {error}") from error
    if kind == "length" and argument.isdigit() and int(argument):
        return Lengthy(int(argument))
    if not re.fullmatch(r"[\w.]+:\w+", spec):
        raise ConfigError(
            f"stage.rewards: {spec!r} is none of {', '.join(VERIFIERS)}, model, regex:PATTERN, length:N or module:function"
        )
    return Function(spec, seconds)


@dataclass(frozen=True)
class Verified:
    """1 where the verifier finds the answer right, else 0; what cannot be read is wrong, and counted."""

    name: str

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]) -> Judged:
        if rows and "answer" not in rows[0]:
            raise DataError(
                f"stage.rewards={self.name} compares with the row's `answer`, and the data has no such column (it has "
                f"{', '.join(rows[0]) or 'none'}); name it with data.columns.answer, or give another reward"
            )
        verdicts = [VERIFIERS[self.name](text, str(row["answer"])) for text, row in zip(responses, rows, strict=True)]
        return Judged([float(bool(verdict)) for verdict in verdicts], sum(verdict is None for verdict in verdicts))


@dataclass(frozen=True)
class Matched:
    """1 where the whole response, white space at its ends apart, matches."""

    pattern: re.Pattern[str]

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]) -> Judged:
        return Judged([float(self.pattern.fullmatch(text.strip()) is not None) for text in responses])


@dataclass(frozen=True)
class Lengthy:
    """0 up to `limit` characters, then minus the excess as a share of it, at most 1."""

    limit: int

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]) -> Judged:
        return Judged([-min(1.0, max(0, len(text) - self.limit) / self.limit) for text in responses])


class Function:
    """module:function in a process of its own, started again when it hangs or dies."""

    def __init__(self, spec: str, seconds: float) -> None:
        self.spec, self.seconds = spec, seconds
        find_function(spec)  # what cannot be imported is told before anything is sampled
        self.worker: Worker | None = None

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Row]) -> Judged:
        self.worker = self.worker or Worker(self.spec)
        found = self.worker.ask((list(prompts), list(responses), list(rows)), self.seconds)
        if self.worker.dead:
            self.worker = None
        if isinstance(found, str):
            return Judged([NAN] * len(responses), failure=f"{self.spec} {found}")
        return judged(self.spec, found, len(responses))


def judged(spec: str, found: Any, count: int) -> Judged:
    """What a function returned, as numbers; all of it failed where its length or a value's kind is wrong."""
    values = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(values, list | tuple) or len(values) != count:
        size = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        return Judged([NAN] * count, failure=f"{spec} returned {size} for {count} responses")
    wrong = [v for v in values if v is not None and (isinstance(v, str | bytes) or not isinstance(v, int | float))]
    if wrong:
        return Judged([NAN] * count, failure=f"{spec} returned {wrong[0]!r}, a {type(wrong[0]).__name__}, not a number")
    scores = [NAN if v is None or not math.isfinite(v) else float(v) for v in values]
    bad = sum(v is not None and not math.isfinite(v) for v in values)
    return Judged(scores, failure=f"{spec} returned {bad} values that are not finite" if bad else None)


def find_function(spec: str) -> Callable[..., Any]:
    """The function at module:function; ConfigError where there is none. The working directory is searched too."""
    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"stage.rewards: {spec} cannot be imported: {type(error).__name__}: {error}; it is looked for in the working "
            "directory and among the installed packages"
        ) from error
    if not callable(function):
        raise ConfigError(f"stage.rewards: {spec} is a {type(function).__name__}, not a function")
    found: Callable[..., Any] = function
    return found


class Worker:
    """A process that answers calls of one function."""

    def __init__(self, spec: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(spec, there), daemon=True)
        self.process.start()
        there.close()
        self.dead, self.ready = False, False

    def ask(self, arguments: tuple[Any, ...], seconds: float) -> Any:
        """What the function returned, or in words how it failed."""
        try:
            self.ready = self.ready or (self.pipe.poll(START_SECONDS) and self.pipe.recv()[0])
            if not self.ready:
                self._end()
                return f"was not imported within {START_SECONDS} seconds"
            self.pipe.send(arguments)
            if not self.pipe.poll(seconds):
                self._end()
                return f"took longer than stage.reward_seconds={seconds:g} and was stopped"
            fine, value = self.pipe.recv()
        except (EOFError, OSError):
            self._end()
            return f"died (exit code {self.process.exitcode})"
        return value if fine else f"raised {value}"

    def _end(self) -> None:
        self.dead = True
        self.process.kill()
        self.process.join()
        self.pipe.close()


def serve(spec: str, pipe: Connection) -> None:
    """The worker's loop; its parent's death ends it."""
    function = find_function(spec)
    pipe.send((True, None))
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        try:
            value = function(*arguments)
            answer = (True, value.tolist() if hasattr(value, "tolist") else value)
        except Exception as error:  # it is the user's: whatever it raises is a failure of this call
            answer = (False, f"{type(error).__name__}: {error}")
        try:
            pipe.send(answer)
        except Exception as error:  # what it returned cannot be sent
            pipe.send((False, f"something that cannot be sent to the run: {error}"))
