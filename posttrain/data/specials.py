"""The tokens that stand between texts: what opens a text, what closes an answer, and what a template makes of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from posttrain.data.tokens import TokenGroup

PROBE = "An answer, to see what follows it."


def special_pattern(tokenizer: Any, also_ordinary: bool = False) -> re.Pattern[str] | None:
    """Matches every special token's text, which counts as no bytes of its own; also_ordinary: any added token's."""
    added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special or also_ordinary}
    words = sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)
    return re.compile("|".join(re.escape(word) for word in words)) if words else None


def beginning(tokenizer: Any) -> list[int]:
    """The ids this tokenizer puts before a text by itself (BOS, or nothing)."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:start])


def closing(tokenizer: Any) -> str | None:
    """What the chat template writes after an answer; None where there is no template or it takes no simple chat."""
    rendered = _probe(tokenizer)
    return rendered.rpartition(PROBE)[2] if PROBE in rendered else None


def end_ids(tokenizer: Any) -> set[int]:
    """Ids that end an answer: end-of-text, and the first token of its own that the chat template writes after one."""
    pattern, after = special_pattern(tokenizer, also_ordinary=True), closing(tokenizer)
    found = pattern.search(after) if pattern and after else None
    own = {tokenizer.convert_tokens_to_ids(found.group())} if found else set()
    return {tokenizer.eos_token_id, *own} - {None}


def end_of_turn(groups: Iterable[TokenGroup], ends: set[int]) -> int | None:
    """The end token that targets hold most often (of several in an answer the first), or None."""
    found: Counter[int] = Counter()
    for group in groups:
        for response, mask in zip(group.responses, group.masks, strict=True):
            found.update(token for token, target in zip(response, mask, strict=True) if target and token in ends)
    return found.most_common(1)[0][0] if found else None


def endless(tokenizer: Any) -> str:
    """Why answers have no end-of-turn token, and what to do about it."""
    after = closing(tokenizer)
    what = "nothing" if not after else repr(after)
    return (
        f"the chat template writes {what} after an answer, and no token to stop at; end the assistant's turn with "
        f"{tokenizer.eos_token} in model.chat_template, or give the tokenizer whose token it is (model.tokenizer)"
    )


def template_facts(tokenizer: Any) -> list[str]:
    """What is worth knowing about this tokenizer and its chat template before training with them."""
    rendered, facts = _probe(tokenizer), []
    opening = "".join(tokenizer.convert_ids_to_tokens(beginning(tokenizer)))
    if rendered and not rendered.startswith(opening):
        facts.append(
            f"conversations begin without {opening}: the chat template writes none, though the tokenizer would"
        )
    if own := end_ids(tokenizer) - {tokenizer.eos_token_id}:
        token = tokenizer.convert_ids_to_tokens(own.pop())
        facts.append(f"answers end with {token}: the saved model stops there, and at {tokenizer.eos_token}")
    if "strftime_now" in str(tokenizer.chat_template):
        facts.append("the chat template writes the day's date into the prompt: another day's tokens differ")
    return facts


def _probe(tokenizer: Any) -> str:
    """A rendered question and answer, "" where that fails: rows tell their own errors."""
    if not tokenizer.chat_template:
        return ""
    chat = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": PROBE}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # templates raise anything
        return ""
