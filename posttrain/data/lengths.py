"""The length policy: what becomes of a Group longer than data.max_length tokens."""

from __future__ import annotations

from typing import Any

from posttrain.data.encoding import Counts, Encoding
from posttrain.data.tokens import TokenGroup
from posttrain.errors import DataError


def fits(group: TokenGroup, encoding: Encoding, counts: Counts, tokenizer: Any, ends: set[int]) -> bool:
    """Apply the length policy; False drops the Group (counted). ends: tokens that end a turn."""
    if encoding.closes:
        _close(group, ends, tokenizer.eos_token_id)
    if not group.count:
        return _prompt_fits(group, encoding, counts)
    longest = group.longest
    if longest > encoding.max_length and not _shorten(group, longest, encoding, counts, tokenizer, ends):
        counts.too_long += 1
        return False
    if not group.trained_tokens:
        counts.nothing_trained += 1
        return False
    return True


def _prompt_fits(group: TokenGroup, encoding: Encoding, counts: Counts) -> bool:
    """A prompt to be answered is never cut: it would be another question. Room is left for the answer."""
    room = encoding.max_length - encoding.answer_tokens
    if len(group.prompt) > room and encoding.on_too_long == "error":
        raise DataError(
            f"prompt {group.id} has {len(group.prompt)} tokens, over the {room} that data.max_length={encoding.max_length} "
            f"leaves beside stage.max_new_tokens={encoding.answer_tokens}; raise the one or lower the other"
        )
    counts.too_long += len(group.prompt) > room
    return len(group.prompt) <= room


def _shorten(
    group: TokenGroup, longest: int, encoding: Encoding, counts: Counts, tokenizer: Any, ends: set[int]
) -> bool:
    policy, room = encoding.on_too_long, encoding.max_length - len(group.prompt)
    if policy == "error":
        raise DataError(
            f"example {group.id} has {longest} tokens, over data.max_length={encoding.max_length}; "
            "raise it, or set data.on_too_long=drop or truncate"
        )
    if policy != "truncate" or room <= 0 or not any(any(mask[:room]) for mask in group.masks):
        return False
    if group.sampler_logprobs:
        counts.say("dropped, not cut: the sampler's log-probs are of whole responses")
        return False
    counts.truncated += 1
    different = len(set(map(tuple, group.responses)))
    counts.cut_tokens += sum(max(0, length - encoding.max_length) for length in group.lengths)
    for k, (response, mask) in enumerate(zip(group.responses, group.masks, strict=True)):
        if len(response) <= room:
            continue
        end = _closing(response, mask, ends) if encoding.closes else None
        if end is not None:
            response, mask = [*response[: room - 1], end], [*mask[: room - 1], True]
        group.responses[k], group.masks[k] = response[:room], mask[:room]
        kept = [token for token, target in zip(response[:room], mask[:room], strict=True) if target]
        text = tokenizer.decode(kept, skip_special_tokens=True)
        group.bytes[k], group.chars[k] = len(text.encode()), len(text)
    if len(set(map(tuple, group.responses))) < different:
        counts.say("have responses that differ only beyond data.max_length, and are the same once cut")
    return True


def _close(group: TokenGroup, ends: set[int], end: int) -> None:
    """End every response that has no end-of-turn token with `end`."""
    for response, mask in zip(group.responses, group.masks, strict=True):
        if _closing(response, mask, ends) is None:
            response.append(end)
            mask.append(True)


def _closing(response: list[int], mask: list[bool], ends: set[int]) -> int | None:
    """The last of a response's targets that ends a turn."""
    targets = [token for token, target in zip(response, mask, strict=True) if target]
    return next((token for token in reversed(targets) if token in ends), None)
