"""The spellings of a preference between two responses, and of a thumb up or down on one."""

from __future__ import annotations

import re
from typing import Any, TypeGuard

from posttrain.data.group import Message, Text
from posttrain.data.messages import prompt, response, text_or_messages
from posttrain.data.rows import Row, shown

A_RESPONSE = "text that is not empty, a message, or a list of messages"

LABELS = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5, "response_a": 1.0, "response_b": 0.0, "true": 1.0, "false": 0.0}


def is_label(value: Any) -> bool:
    """Whether a value of a `label` column may be a thumb up or down (and no class of a classification task)."""
    return str(value).strip().lower() in LABELS


def label(row: Row) -> float:
    """1 or 0."""
    accepted = "true or false, 1 or 0 (a label of another kind is left alone with data.format=prompt_completion)"
    value = row.need("label", accepted)
    if not is_label(value):
        row.fail("label", shown(value), accepted)
    return LABELS[str(value).strip().lower()]


def pair(row: Row) -> tuple[Text, tuple[Text, Text]]:
    """prompt, (chosen, rejected), whether or not these two repeat the prompt's messages."""
    chosen, rejected = (text_or_messages(row, role, row.need(role, A_RESPONSE)) for role in ("chosen", "rejected"))
    if not (_opens_with_prompt(chosen) and _opens_with_prompt(rejected)):
        return prompt(row), (response(row, "chosen", row.get("chosen")), response(row, "rejected", row.get("rejected")))
    asked, responses = _split_common_turns(row, chosen, rejected)
    given = prompt(row)
    among = given in {m.content for m in asked} if isinstance(given, str) else given[-1] in asked
    if not among:
        row.fail("prompt", shown(row.get("prompt")), "a prompt that is among the turns chosen and rejected begin with")
    return asked, responses


def conversation_pair(row: Row) -> tuple[Text, tuple[Text, Text]]:
    """The conversation up to the answer, (chosen, rejected)."""
    return prompt(row, "messages"), tuple(  # type: ignore[return-value]
        response(row, role, row.need(role, A_RESPONSE)) for role in ("chosen", "rejected")
    )


def pair_with_prompt_inside(row: Row) -> tuple[Text, tuple[Text, Text]]:
    """What chosen and rejected have in common, (the rest of chosen, the rest of rejected)."""
    chosen, rejected = (text_or_messages(row, role, row.need(role, A_RESPONSE)) for role in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_common_text(row, chosen, rejected)
    if not (_opens_with_prompt(chosen) and _opens_with_prompt(rejected)):
        accepted = "a prompt column, or two message lists (or two texts) that begin with the same prompt"
        row.fail("chosen", "there is no prompt: not in a column, nor in front of chosen and rejected", accepted)
    return _split_common_turns(row, chosen, rejected)


def _opens_with_prompt(text: Text) -> TypeGuard[tuple[Message, ...]]:
    return not isinstance(text, str) and text[0].role != "assistant"


def _split_common_turns(row: Row, a: Text, b: Text) -> tuple[tuple[Message, ...], tuple[Text, Text]]:
    """Cut after the turns in common, so that both responses begin with an assistant turn, the last at the latest."""
    assert not isinstance(a, str)
    assert not isinstance(b, str)
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    cut = min(common, len(a) - 1, len(b) - 1)
    while cut > 0 and not a[cut].role == b[cut].role == "assistant":
        cut -= 1
    if cut == 0:
        accepted = "two conversations with the same turns up to an assistant turn"
        row.fail("chosen", "chosen and rejected do not begin with the same prompt", accepted)
    for role, turns in (("chosen", a), ("rejected", b)):
        if turns[-1].role != "assistant":
            row.fail(
                role, f"the conversation ends with a {turns[-1].role} turn", "one that ends with an assistant turn"
            )
    return a[:cut], (a[cut:], b[cut:])


def _split_common_text(row: Row, a: str, b: str) -> tuple[str, tuple[str, str]]:
    """Cut after the last "\\n\\nAssistant:" in common (Anthropic's HH), else before the last white space in common."""
    common = a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]
    marker = "\n\nAssistant:"
    if (at := common.rfind(marker)) >= 0:
        cut = at + len(marker)
    else:
        cut = max((space.start() for space in re.finditer(r"\s+", common)), default=0)
    if not (a[:cut].strip() and a[cut:].strip() and b[cut:].strip()):
        accepted = "a prompt column, or two texts that begin with the same prompt and go on with a response"
        row.fail("chosen", "found no prompt that chosen and rejected both begin with and go on from", accepted)
    return a[:cut], (a[cut:], b[cut:])


def preferred_pair(row: Row) -> tuple[Text, tuple[Text, Text], float]:
    """prompt, (the better response, the other), the probability p ≥ ½ that the first is preferred; ½ is a tie."""
    accepted = "1 or a (the first is better), 0 or b, a fraction between, or tie"
    value = row.need("preference", accepted)
    p = PREFERENCES.get(str(value).strip().lower())
    p = row.number_at("preference", value, accepted) if p is None else p
    if not 0 <= p <= 1:
        row.fail("preference", shown(value), accepted)
    a, b = (response(row, role, row.need(role, A_RESPONSE)) for role in ("response_a", "response_b"))
    return prompt(row), ((a, b) if p >= 0.5 else (b, a)), max(p, 1 - p)
