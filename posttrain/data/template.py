"""Chat templates: one rendering a conversation, and which of its characters are targets, by construction.

An assistant turn's target text is everything between the template's generation prompt and the end of that turn:
`render(messages[:i], add_generation_prompt)` must be a prefix of `render(messages[:i+1])`, which must be a prefix of the
whole. Nothing is searched for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.group import Group, Message, Text
from posttrain.errors import DataError


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation and its trained turns.

    turns: (start, stop) character positions; text[:start] is what the model is given, text[start:stop] the target.
    """

    text: str
    turns: tuple[tuple[int, int], ...]


class NotPrefixStable(DataError):
    """The template renders a conversation's beginning differently once it goes on."""


def render(tokenizer: Any, messages: Sequence[Message], train_on: str, tools: Any = None) -> Rendered:
    """Render a conversation that ends with an assistant turn; train_on: "all" assistant turns or the "last".

    A message's own `train` flag decides over train_on.
    """
    text = _apply(tokenizer, messages, False, tools)
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    turns = []
    for i, message in enumerate(messages):
        if message.role != "assistant" or not _trained(message, i == last, train_on):
            continue
        start = _apply(tokenizer, messages[:i], True, tools)
        stop = text if i + 1 == len(messages) else _apply(tokenizer, messages[: i + 1], False, tools)
        if not (text.startswith(start) and text.startswith(stop) and len(start) < len(stop)):
            raise NotPrefixStable(_unstable(text, start, stop, i))
        turns.append((len(start), len(stop)))
    return Rendered(text, tuple(turns))


def render_prompt(tokenizer: Any, prompt: Text, tools: Any = None) -> str:
    """The prompt alone, up to and with the generation prompt."""
    return _apply(tokenizer, as_messages(prompt, "user"), True, tools)


def as_messages(text: Text | None, role: str) -> tuple[Message, ...]:
    """Plain text becomes one turn of this role."""
    if text is None:
        return ()
    return (Message(role, text),) if isinstance(text, str) else tuple(text)


def conversation(group: Group, response: Text) -> tuple[Message, ...]:
    """Prompt and response as one conversation."""
    return as_messages(group.prompt, "user") + as_messages(response, "assistant")


def special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches every special token's text, which counts as no bytes of its own."""
    specials = sorted({s for s in tokenizer.all_special_tokens if s}, key=len, reverse=True)
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    words = sorted({*specials, *added}, key=len, reverse=True)
    return re.compile("|".join(re.escape(word) for word in words)) if words else None


def _trained(message: Message, is_last: bool, train_on: str) -> bool:
    if message.train is not None:
        return message.train
    return is_last or train_on == "all"


def _apply(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool, tools: Any) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            [m.as_dict() for m in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **({"tools": tools} if tools else {}),
        )
    except Exception as error:  # Jinja and the template itself raise anything; all of it is about this conversation
        roles = ", ".join(m.role for m in messages)
        raise DataError(f"the chat template refuses the roles [{roles}]: {type(error).__name__}: {error}") from error
    return str(rendered)


def _unstable(text: str, start: str, stop: str, turn: int) -> str:
    part = start if not text.startswith(start) else stop
    split = next((i for i, (a, b) in enumerate(zip(text, part, strict=False)) if a != b), min(len(text), len(part)))
    return (
        f"the chat template renders assistant turn {turn + 1} differently once the conversation goes on "
        f"(whole: …{text[max(0, split - 20) : split + 30]!r}, beginning: …{part[max(0, split - 20) : split + 30]!r}), so its "
        "target tokens are not known; try stage.train_on=last, or another model.chat_template"
    )
