"""The embedded dataset: two-digit sums and differences, as careful and careless authors write them.

Four authors of ten are careful: always right. The other six forget the carry in sums (47+38=75) and the sign of
negative differences (23-58=35), and are right where there is neither. A model that has read them all can do the sums
but often prefers the careless answer; the aligning stages teach it whom to follow.

Every kind of data comes from one space of 16,200 problems (a+b and a-b, both from 10 to 99). One tenth of it is held
out: no training row of any kind, the text the shipped model has read included, holds one of those problems.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from posttrain.errors import DataError

CARELESS_SHARE = 0.6
HELD_OUT_SHARE = 0.1
RESPONSES = 4
"""K of the groups kind."""

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Problem:
    """a + b or a - b, with 10 <= a, b <= 99."""

    a: int
    operation: str
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}{self.operation}{self.b}="

    def careful(self) -> int:
        """The right answer."""
        return self.a + self.b if self.operation == "+" else self.a - self.b

    def careless(self) -> int:
        """Without the carry from ones to tens in a sum, without the sign in a difference."""
        if self.operation == "-":
            return abs(self.a - self.b)
        carry = self.a % 10 + self.b % 10 >= 10
        return self.a + self.b - 10 * carry

    def slips(self) -> list[int]:
        """At least three distinct wrong answers, none the careless author's: overdone care (a carry or a sign that is
        not there) and a digit off by one."""
        right = self.careful()
        found = [-right] if self.operation == "-" else []
        found += [right + 10, right - 10, right + 1, right - 1]
        return [answer for answer in dict.fromkeys(found) if answer not in (right, self.careless())]


def rows(kind: str, count: int, seed: int = 0, held_out: bool = False) -> list[Row]:
    """`count` rows of one kind: the same arguments give the same rows, and a larger count only appends.

    text: {text}, a problem and its answer by a careful or a careless author, drawn with replacement.
    The others are distinct problems, each with its right `answer` as text, equal to a right response stripped:
    prompt_completion: {prompt, completion, answer}, by the careful author.
    pairs: {prompt, chosen, rejected, answer}, the careful author's before a wrong one.
    groups: {prompt, responses, rewards, answer}, one right response (reward 1) among four, in random order.
    prompts: {prompt, answer}.

    held_out: draw from the tenth of the problems that no training row holds, instead of from the other nine.
    """
    if kind not in _KINDS:
        raise DataError(f"the embedded dataset has no kind {kind!r}; allowed: {', '.join(_KINDS)}")
    train, held = _problems()
    space = held if held_out else train
    if count < 0 or (kind != "text" and count > len(space)):
        part = "held-out" if held_out else "training"
        raise DataError(f"the embedded dataset has {len(space)} distinct {part} problems, got count={count}")
    rng = random.Random(f"posttrain {seed}")
    drawn = _with_replacement(space, rng) if kind == "text" else iter(_shuffled(space, rng))
    return [_KINDS[kind](problem, rng) for problem, _ in zip(drawn, range(count), strict=False)]


@cache
def _problems() -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(training, held out): one split for all seeds, so that a seed never leaks a held-out problem."""
    space = [Problem(a, operation, b) for operation in "+-" for a in range(10, 100) for b in range(10, 100)]
    space = _shuffled(space, random.Random("posttrain held out"))
    held = round(HELD_OUT_SHARE * len(space))
    return tuple(space[held:]), tuple(space[:held])


def _text(problem: Problem, rng: random.Random) -> Row:
    answer = problem.careless() if rng.random() < CARELESS_SHARE else problem.careful()
    return {"text": f"{problem.prompt}{answer}"}


def _prompt_completion(problem: Problem, rng: random.Random) -> Row:
    answer = str(problem.careful())
    return {"prompt": problem.prompt, "completion": answer, "answer": answer}


def _pairs(problem: Problem, rng: random.Random) -> Row:
    """The rejected one is careless as often as the authors are, else (or where careless is right) a slip.

    Pairs that only ever oppose careful and careless teach more than they say: in a trial the model then carried where
    there is nothing to carry, and its greedy accuracy fell from .56 to .26 where with slips it rose to .95.
    """
    right, careless = problem.careful(), problem.careless()
    as_careless = careless != right and rng.random() < CARELESS_SHARE
    rejected = careless if as_careless else _shuffled(problem.slips(), rng)[0]
    return {"prompt": problem.prompt, "chosen": str(right), "rejected": str(rejected), "answer": str(right)}


def _groups(problem: Problem, rng: random.Random) -> Row:
    """All different: the right one, the careless one where it is wrong, and slips."""
    right = problem.careful()
    authors = list(dict.fromkeys([right, problem.careless()]))
    responses = _shuffled([*authors, *_shuffled(problem.slips(), rng)][:RESPONSES], rng)
    return {
        "prompt": problem.prompt,
        "responses": [str(response) for response in responses],
        "rewards": [float(response == right) for response in responses],
        "answer": str(right),
    }


def _prompts(problem: Problem, rng: random.Random) -> Row:
    return {"prompt": problem.prompt, "answer": str(problem.careful())}


_KINDS: dict[str, Callable[[Problem, random.Random], Row]] = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "pairs": _pairs,
    "groups": _groups,
    "prompts": _prompts,
}


def _with_replacement(space: tuple[Problem, ...], rng: random.Random) -> Iterator[Problem]:
    while True:
        yield space[int(rng.random() * len(space))]


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    """Only random() is promised to give the same numbers in every Python version; shuffle and sample are not."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda keyed: keyed[0])]
