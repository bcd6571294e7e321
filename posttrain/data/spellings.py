"""Every accepted spelling of a row, in one table: the roles it needs, and the function that makes a Group of it.

A new spelling is a line of SPELLINGS; a new name for a column is a word in columns.ROLES; a new name for a speaker is a
line of messages.SPEAKERS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain.data.group import Group, Text
from posttrain.data.messages import prompt, response, same_kind, split_last_turn
from posttrain.data.pairs import conversation_pair, is_label, label, pair, pair_with_prompt_inside, preferred_pair
from posttrain.data.rows import Row


@dataclass(frozen=True)
class Spelling:
    """A way to write one of the formats.

    needs: the roles by which it is recognised; optional: others it reads; build: the row's Group.
    likely: whether a sampled row looks like it, where the column names alone could mean something else.
    asked_only: never detected, only taken when data.format asks for its format. joins: equal prompts become one Group.
    """

    format: str
    name: str
    needs: tuple[str, ...]
    build: Callable[[Row], Group]
    optional: tuple[str, ...] = ("system",)
    likely: Callable[[Any], bool] | None = None
    asked_only: bool = False
    joins: bool = False


def _text(row: Row) -> Group:
    return _group(row, None, (row.text("text"),))


def _group(row: Row, asked: Text | None, responses: tuple[Text, ...], **more: Any) -> Group:
    if asked is not None:
        asked, responses = same_kind(asked, responses)
    return Group(asked, responses, columns=row.rest(), file=row.file, row=row.number, **more)


def _completion(row: Row) -> Text:
    return response(row, "completion", row.need("completion", "text that is not empty, or assistant messages"))


def _prompt_completion(row: Row) -> Group:
    return _group(row, prompt(row), (_completion(row),))


def _alpaca_prompt(row: Row) -> Text:
    """instruction, newline, input, stripped."""
    text = f"{row.optional_text('instruction')}\n{row.optional_text('input')}".strip()
    return prompt(row, "instruction", text or row.text("instruction"))


def _alpaca(row: Row) -> Group:
    return _group(row, _alpaca_prompt(row), (row.text("output"),))


def _messages(row: Row) -> Group:
    asked, answer = split_last_turn(row)
    return _group(row, asked, (answer,))


def _pair(row: Row) -> Group:
    return _group(row, *pair(row), rewards=(1.0, 0.0), margin=_margin(row))


def _conversation_pair(row: Row) -> Group:
    return _group(row, *conversation_pair(row), rewards=(1.0, 0.0), margin=_margin(row))


def _pair_with_prompt_inside(row: Row) -> Group:
    return _group(row, *pair_with_prompt_inside(row), rewards=(1.0, 0.0), margin=_margin(row))


def _preferred_pair(row: Row) -> Group:
    asked, responses, p = preferred_pair(row)
    soft = (p, 1 - p) if p < 1 else None
    return _group(row, asked, responses, rewards=(p, 1 - p), target_probs=soft, margin=_margin(row))


def _labelled(row: Row) -> Group:
    return _group(row, prompt(row), (_completion(row),), rewards=(label(row),))


def _labelled_messages(row: Row) -> Group:
    asked, answer = split_last_turn(row, cut_trailing=False)
    return _group(row, asked, (answer,), rewards=(label(row),))


def _margin(row: Row) -> float | None:
    value = row.get("margin")
    return None if value is None else row.number_at("margin", value)


def _groups(row: Row) -> Group:
    asked = prompt(row, "prompt" if "prompt" in row.roles else "messages")
    listed = row.listed("responses", "a list of responses, each text or assistant messages")
    responses = tuple(response(row, "responses", item) for item in listed)
    k = len(responses)
    signals = {role: row.numbers(role, k) for role in ("ranks", "target_probs") if row.get(role) is not None}
    if row.reward_weights:
        columns = [[w * r for r in row.numbers(column, k)] for column, w in row.reward_weights.items()]
        signals["rewards"] = tuple(map(sum, zip(*columns, strict=True)))
    elif row.get("rewards") is not None or not signals:
        signals["rewards"] = row.numbers("rewards", k, "a finite number for each response, or ranks, or target_probs")
    if any(rank < 1 for rank in signals.get("ranks", ())):
        row.fail("ranks", f"found a rank of {min(signals['ranks']):g}", "ranks from 1, the best, on; ties allowed")
    if (probs := signals.get("target_probs")) and (min(probs) < 0 or abs(sum(probs) - 1) > 1e-3):
        row.fail("target_probs", f"found {probs}, whose sum is {sum(probs):g}", "probabilities that sum to 1")
    if row.get("sampler_logprobs") is not None:
        signals["sampler_logprobs"] = row.numbers("sampler_logprobs", k)
    return _group(row, asked, responses, **signals)


def _score(row: Row) -> dict[str, Any]:
    """The reward, and the sampler's log-probability, which every row has if the file has it."""
    if row.reward_weights:
        columns = row.reward_weights.items()
        reward = sum(w * row.number_at(column, row.need(column, "a finite number")) for column, w in columns)
    else:
        reward = row.number_at("reward", row.need("reward", "a finite number"))
    if "sampler_logprob" not in row.roles:
        return {"rewards": (reward,)}
    sampled = row.number_at("sampler_logprob", row.need("sampler_logprob", "a finite number in every row, or in none"))
    return {"rewards": (reward,), "sampler_logprobs": (sampled,)}


def _scored(row: Row) -> Group:
    return _group(row, prompt(row), (_completion(row),), **_score(row))


def _scored_messages(row: Row) -> Group:
    asked, answer = split_last_turn(row, cut_trailing=False)
    return _group(row, asked, (answer,), **_score(row))


def _prompts(row: Row) -> Group:
    return _group(row, prompt(row), ())


def _message_prompts(row: Row) -> Group:
    return _group(row, prompt(row, "messages"), ())


def _alpaca_prompts(row: Row) -> Group:
    return _group(row, _alpaca_prompt(row), ())


_JUDGED = ("system", "margin")
_MANY = ("system", "rewards", "ranks", "target_probs", "sampler_logprobs")
_ONE = ("system", "sampler_logprob")

# The first that fits most rows wins, so the spelling that asks for more comes before the one that asks for less.
# fmt: off
SPELLINGS = (
    Spelling("pairs", "pairs", ("prompt", "chosen", "rejected"), _pair, _JUDGED),
    Spelling("pairs", "ShareGPT pairs", ("messages", "chosen", "rejected"), _conversation_pair, _JUDGED),
    Spelling("pairs", "pairs with the prompt inside", ("chosen", "rejected"), _pair_with_prompt_inside, _JUDGED),
    Spelling("pairs", "preferences", ("prompt", "response_a", "response_b", "preference"), _preferred_pair, _JUDGED),
    Spelling("groups", "groups", ("prompt", "responses"), _groups, _MANY),
    Spelling("groups", "groups after a conversation", ("messages", "responses"), _groups, _MANY),
    Spelling("scored", "scored", ("prompt", "completion", "reward"), _scored, _ONE, joins=True),
    Spelling("scored", "scored conversations", ("messages", "reward"), _scored_messages, _ONE, joins=True),
    Spelling("pairs", "labelled conversations (KTO)", ("messages", "label"), _labelled_messages, likely=is_label),
    Spelling("pairs", "labelled completions (KTO)", ("prompt", "completion", "label"), _labelled, likely=is_label),
    Spelling("messages", "conversations", ("messages",), _messages),
    Spelling("prompt_completion", "prompt and completion", ("prompt", "completion"), _prompt_completion),
    Spelling("prompt_completion", "alpaca", ("instruction", "output"), _alpaca, ("input", "system")),
    Spelling("text", "documents", ("text",), _text, ()),
    Spelling("text", "a stream of text", ("text_stream",), _text, ()),  # no row: to_groups refuses it
    Spelling("prompts", "prompts", ("prompt",), _prompts),
    Spelling("prompts", "conversations to go on with", ("messages",), _message_prompts, asked_only=True),
    Spelling("prompts", "alpaca prompts", ("instruction",), _alpaca_prompts, ("input", "system"), asked_only=True),
)
# fmt: on
FORMATS = tuple(dict.fromkeys(spelling.format for spelling in SPELLINGS))
