"""Sampled responses as Groups: one each, or in the shared layout those to a prompt together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.data.tokens import TokenGroup
from posttrain.generation import Generation


def answered(prompt: TokenGroup, answer: Generation, k: int, text: str) -> TokenGroup:
    """The prompt with this response, its tokens and its end token targets."""
    ids = answer.ids if answer.end is None else [*answer.ids, answer.end]
    return TokenGroup(
        id=f"{prompt.id}.{k}", cluster=prompt.cluster, prompt=prompt.prompt, responses=[ids], masks=[[True] * len(ids)],
        bytes=[len(text.encode())], chars=[len(text)], text=prompt.text, kept=answer.kept,
    )  # fmt: skip


def joined(groups: Sequence[TokenGroup]) -> TokenGroup:
    """Responses to one prompt, each a Group of its own, as one Group."""
    first = groups[0]

    def each(name: str) -> list[Any]:
        return [value for group in groups for value in getattr(group, name)]

    tokens = {name: np.concatenate([group.tokens[name] for group in groups]) for name in first.tokens}
    return TokenGroup(
        first.id, first.cluster, first.prompt, each("responses"), each("masks"), each("bytes"), each("chars"), first.text,
        tokens=tokens, kept=None if first.kept is None else each("kept"),
    )  # fmt: skip


def by_prompt(positions: Sequence[int] | np.ndarray, samples: int) -> list[list[int]]:
    """Positions of responses, those to the same prompt together, in the order in which the prompts first come."""
    found: dict[int, list[int]] = {}
    for position in positions:
        found.setdefault(int(position) // samples, []).append(int(position))
    return list(found.values())


def laid_out(
    groups: Sequence[TokenGroup] | Mapping[int, TokenGroup],
    positions: Sequence[int] | np.ndarray,
    samples: int,
    layout: str,
) -> list[TokenGroup]:
    """The responses at these positions as the layout wants them; `samples` to each prompt, beside each other."""
    if layout != "shared":
        return [groups[int(i)] for i in positions]
    return [joined([groups[i] for i in part]) for part in by_prompt(positions, samples)]
