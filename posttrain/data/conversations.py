"""Conversations → token ids and masks: the rendered text's trained characters become trained tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posttrain.data.group import Group, Text
from posttrain.data.template import Rendered, Template, as_messages, conversation
from posttrain.errors import DataError

Ids = dict[str, list[int]]


@dataclass(slots=True)
class Encoded:
    """A prompt and its responses as ids, with masks and the targets' text; `ended`: every answer has an end token."""

    prompt: list[int]
    responses: list[list[int]]
    masks: list[list[bool]]
    targets: list[str]
    ended: bool = True


@dataclass(slots=True)
class Example:
    """What is trained together: a Group and one rendering of each of its responses."""

    group: Group
    views: list[Rendered]

    def texts(self) -> list[str]:
        """All that has to be tokenised: each whole, and each up to where a trained turn starts and stops."""
        return [
            view.text[:stop]
            for view in self.views
            for stop in (len(view.text), *(position for turn in view.turns for position in turn[:2]))
        ]

    def encode(self, ids: Ids, ends: set[int]) -> Encoded:
        """Put together from the ids of its texts."""
        encoded = Encoded([], [], [], [])
        for number, view in enumerate(self.views):
            prompt, response, mask, ended = _encode(view, ids, ends)
            if number and prompt != encoded.prompt:
                raise DataError("the responses' conversations do not begin with the same prompt tokens")
            encoded.prompt, encoded.ended = prompt, encoded.ended and ended
            encoded.responses.append(response)
            encoded.masks.append(mask)
            encoded.targets.append("".join(view.text[turn.start : turn.stop] for turn in view.turns))
        return encoded


def examples(template: Template, group: Group) -> list[Example]:
    """One example, or several where the template shows an answer differently once the conversation goes on."""
    tools: Any = group.columns.get("tools")
    given = len(as_messages(group.prompt, "user"))
    views = [template.render(conversation(group, response), tools, given) for response in group.responses]
    if len(views) == 1:
        return [Example(_part(group, view), [view]) for view in views[0]]
    if any(len(each) > 1 for each in views):
        raise DataError(
            "the chat template shows earlier answers differently once the conversation goes on, so they cannot be "
            "trained together with responses that are compared; give responses of one turn each"
        )
    return [Example(group, [each[0] for each in views])]


def _part(group: Group, view: Rendered) -> Group:
    """The Group up to the message that this rendering ends with."""
    whole = conversation(group, group.responses[0])
    if view.messages == len(whole):
        return group
    return replace(group, prompt=whole[: view.messages - 1], responses=(whole[view.messages - 1 : view.messages],))


def _encode(view: Rendered, ids: Ids, ends: set[int]) -> tuple[list[int], list[int], list[bool], bool]:
    """(prompt, response, mask, whether every answer has an end token); the response begins with the first target."""
    whole, ended = ids[view.text], True
    first, mask = len(whole), np.zeros(len(whole), dtype=bool)
    for turn in reversed(view.turns):
        given = ids[view.text[: turn.start]]
        if whole[: len(given)] != given:
            raise DataError(
                "the tokenised prompt is not a prefix of the tokenised whole: a token spans their border "
                f"({view.text[max(0, turn.start - 10) : turn.start]!r} and {view.text[turn.start : turn.start + 10]!r}); set "
                "model.chat_template to one whose generation prompt ends with a special token or a line break"
            )
        first, stop = max(1, len(given)), common_prefix(whole, ids[view.text[: turn.stop]])
        mask[first:stop] = True
        ended = ended and not (turn.answer and ends.isdisjoint(whole[first:stop]))
    return whole[:first], whole[first:], mask[first:].tolist(), ended


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items two sequences share."""
    if a[: len(b)] == b:
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def as_json(group: Group) -> str:
    """The text-level Group for display and verification."""
    fields = {
        "prompt": _plain(group.prompt),
        "responses": [_plain(r) for r in group.responses],
        "columns": group.columns,
    }
    return json.dumps(fields, ensure_ascii=False, default=str)


def _plain(text: Text | None) -> Any:
    if text is None or isinstance(text, str):
        return text
    return [{"role": m.role, "content": m.content, "train": m.train, "extra": m.extra} for m in text]
