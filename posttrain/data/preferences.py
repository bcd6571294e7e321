"""What the judged responses of a Group say: which is best, which pairs they make, and what is odd about them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Literal

from posttrain.data.group import Group, Text


def standings(group: Group) -> tuple[float, ...] | None:
    """K numbers by which the responses order, higher is better (only their order counts); None where nothing judges."""
    if group.rewards is not None:
        return group.rewards
    if group.target_probs is not None:
        return group.target_probs
    return None if group.ranks is None else tuple(-rank for rank in group.ranks)


def best_response(group: Group) -> Text | None:
    """The response to imitate (sft on labelled, ranked or paired data): chosen, label true, the best rank or reward.

    None where there is none: a tie of a pair, a label false, rewards of which none is positive and none beats another.
    A response that nothing judges is its own best; among equals the first is taken.
    """
    scores = standings(group)
    if not group.responses:
        return None
    if scores is None:
        return group.responses[0]
    best = max(scores)
    tied = best == min(scores) and len(scores) > 1
    if tied and group.target_probs is not None:
        return None
    if best == min(scores) and group.rewards is not None and best <= 0:
        return None
    return group.responses[scores.index(best)]


def pairs_of(group: Group, how: Literal["all", "best_worst", "sample"] = "all", seed: int = 0) -> Iterator[Group]:
    """The pairs (better before worse, rewards 1 and 0) that a Group of K judged responses makes; ties make none.

    best_worst: the best with the worst, the first among equals. sample: one of all, by seed and content. The pair's
    `margin` is the Group's if it has one, else the difference of the rewards where there are any.
    """
    scores = standings(group)
    if scores is None:
        return
    ordered = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(range(len(scores)), 2)]
    untied = [(i, j) for i, j in ordered if scores[i] != scores[j]]
    if not untied:
        return
    if how == "best_worst":
        untied = [(scores.index(max(scores)), scores.index(min(scores)))]
    elif how == "sample":
        untied = [random.Random(f"{seed} {group.content_id()}").choice(untied)]
    for i, j in untied:
        sampled = group.sampler_logprobs
        yield replace(
            group,
            responses=(group.responses[i], group.responses[j]),
            rewards=(1.0, 0.0),
            ranks=None,
            target_probs=None if group.target_probs is None or len(scores) > 2 else (scores[i], scores[j]),
            sampler_logprobs=None if sampled is None else (sampled[i], sampled[j]),
            margin=scores[i] - scores[j]
            if group.margin is None and group.rewards and len(scores) > 2
            else group.margin,
        )


def oddities(groups: Iterable[Group]) -> Counter[str]:
    """How many Groups are of no or little use to learn a preference from, by reason: for the plan to name."""
    found: Counter[str] = Counter()
    for group in groups:
        scores, k = standings(group), len(group.responses)
        found["prompts with one response"] += k == 1
        found["prompts whose responses are judged equal"] += k > 1 and scores is not None and min(scores) == max(scores)
        found["prompts with the same response twice"] += k > 1 and _repeats(group.responses)
        found["pairs whose chosen and rejected are the same"] += k == 2 and group.responses[0] == group.responses[1]
    return +found


def _repeats(responses: tuple[Text, ...]) -> bool:
    return any(a == b for a, b in combinations(responses, 2))
