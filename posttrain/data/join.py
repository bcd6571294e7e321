"""Rows with one scored response each → one Group a prompt."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from posttrain.data.group import Group, Text


def join_prompts(groups: Iterable[Group]) -> Iterator[Group]:
    """Join Groups of equal prompts, in the order of their first rows, which name the joined Group.

    Another column's value stays as it is where its rows agree, and becomes a list, one a response, where they differ.
    """
    joined: dict[Hashable, list[Group]] = {}
    for group in groups:
        joined.setdefault(_key(group.prompt), []).append(group)
    for same in joined.values():
        yield same[0] if len(same) == 1 else _joined(same)


def _key(prompt: Text | None) -> Hashable:
    if prompt is None or isinstance(prompt, str):
        return prompt
    return tuple((m.role, m.content, m.train, repr(sorted(m.extra.items()))) for m in prompt)


def _joined(same: list[Group]) -> Group:
    first = same[0]
    return Group(
        first.prompt,
        tuple(response for group in same for response in group.responses),
        rewards=_concatenated([group.rewards for group in same]),
        columns={name: _column([group.columns.get(name) for group in same]) for name in first.columns},
        file=first.file,
        row=first.row,
        sampler_logprobs=_concatenated([group.sampler_logprobs for group in same]),
    )


def _concatenated(values: list[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    given = [value for value in values if value is not None]
    return tuple(number for value in given for number in value) if len(given) == len(values) else None


def _column(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values
