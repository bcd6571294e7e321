"""Which answers a page shows, and how each stands: before beside after, right or wrong in words."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from posttrain.report.numbers import number
from posttrain.report.recorded import Recorded
from posttrain.report.untrusted import Excerpt, excerpt

SHOWN = 24
OPEN = 6
"""Of those shown, so many are open at once; the rest is unfolded."""
ROLLOUTS = 8
"""Rollouts shown of a prompt."""


@dataclass(frozen=True)
class Answer:
    """One answer. said: right, wrong or nothing; notes: what else is known of it."""

    text: Excerpt
    said: str = ""
    notes: tuple[str, ...] = ()

    @property
    def mark(self) -> str:
        return {"right": "✓", "wrong": "✗"}.get(self.said, "")


@dataclass(frozen=True)
class Asked:
    """A prompt with its answers by when they were given, and what would have been right."""

    id: str
    prompt: Excerpt
    whole_prompt: Excerpt | None
    answers: dict[str, Answer]
    reference: Excerpt | None
    kind: str = ""


KINDS = {
    0: "right before, wrong now",
    1: "wrong before, right now",
    2: "still wrong",
    3: "another answer",
    4: "the same",
}


def chosen(run: Recorded) -> tuple[list[Asked], int]:
    """The answers shown, a fair part of each kind, and how many there are."""
    kinds: dict[int, list[dict[str, Any]]] = {}
    for line in run.answers:
        kinds.setdefault(_kind(line), []).append(line)
    in_turn = zip_longest(*([(kind, line) for line in kinds[kind]] for kind in sorted(kinds)))  # no kind hides another
    lines = [found for each in in_turn for found in each if found][:SHOWN]
    return [_asked(line, KINDS[kind] if line.get("after") else "") for kind, line in lines], len(run.answers)


def counted(run: Recorded) -> list[tuple[str, int]]:
    """How many answers there are of each kind, of those that have one before and one after."""
    both = [_kind(line) for line in run.answers if line.get("after") and line.get("before")]
    return [(KINDS[kind], both.count(kind)) for kind in sorted(set(both))]


def rollouts(run: Recorded) -> list[tuple[Asked, int, Any]]:
    """Prompts of the last iteration with their answers, how many there were, and the iteration."""
    found = []
    for line in run.rollouts:
        given = [one for one in line["rollouts"] if isinstance(one, dict)]
        answers = {f"answer {k + 1}": _rewarded(one) for k, one in enumerate(given[:ROLLOUTS])}
        prompt = excerpt(str(line.get("prompt", "")))
        found.append((Asked(str(line.get("id", "")), prompt, None, answers, None), len(given), line.get("iteration")))
    return found


def answer(given: dict[str, Any] | None) -> Answer | None:
    """One answer as samples.jsonl has it."""
    if not isinstance(given, dict):
        return None
    verdict, said = given.get("verdict"), ""
    if given.get("verified", True):
        said = (
            "right" if verdict is True else "wrong" if verdict is False else "unreadable" if "verdict" in given else ""
        )
    rewards = given.get("rewards")
    notes = [f"{name} {_told(value)}" for name, value in rewards.items()] if isinstance(rewards, dict) else []
    if given.get("finished") is False:
        notes.append("cut at the length limit")
    return Answer(excerpt(str(given.get("answer", ""))), said, tuple(notes))


def _asked(line: dict[str, Any], kind: str) -> Asked:
    sides = {"before": line.get("before"), "after": line.get("after")}
    some = next(side for side in (sides["after"], sides["before"]) if isinstance(side, dict))
    prompt, question = str(line.get("prompt", some.get("prompt", ""))), str(some.get("question") or "")
    if sides["after"] is None:
        sides = {"answer": some}
    answers = {when: found for when, given in sides.items() if (found := answer(given)) is not None}
    whole = excerpt(prompt) if question and question != prompt else None
    reference = str(line.get("reference", some.get("reference", "")) or "")
    return Asked(
        str(line.get("id", "")),
        excerpt(question or prompt),
        whole,
        answers,
        excerpt(reference) if reference else None,
        kind,
    )


def _rewarded(one: dict[str, Any]) -> Answer:
    notes = [f"reward {_told(one.get('reward'))}"]
    rewards = one.get("rewards")
    if isinstance(rewards, dict) and len(rewards) > 1:
        notes += [f"{name} {_told(value)}" for name, value in rewards.items()]
    if one.get("kl") is not None:
        notes.append(f"KL {_told(one['kl'])}")
    if one.get("finished") is False:
        notes.append("cut at the length limit")
    return Answer(excerpt(str(one.get("answer", ""))), "", tuple(notes))


def _kind(line: dict[str, Any]) -> int:
    before, after = line.get("before"), line.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return 4
    was, is_now = bool(before.get("verdict")), bool(after.get("verdict"))
    if after.get("verified") and was != is_now:
        return 1 if is_now else 0
    if after.get("verified") and not is_now:
        return 2
    return 4 if before.get("answer") == after.get("answer") else 3


def _told(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)
