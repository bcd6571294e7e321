"""The text-level data structure every stage trains on: a prompt and its K responses, some with rewards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    role: "system", "user", "assistant", "tool", or whatever the template knows. content: plain text.
    train: whether an assistant turn is a target; None leaves it to the stage (all assistant turns, or the last).
    extra: what else the row's message held (name, tool_calls, ...), handed to the chat template untouched.
    """

    role: str
    content: str
    train: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The message as a chat template reads it."""
        return {"role": self.role, "content": self.content, **self.extra}


Text = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and K responses to it.

    prompt: None (a plain document), text, or the messages before the response.
    responses: K texts, or K message tuples (usually one assistant message each); K = 0 in a file of prompts. What
        data/formats.py makes is all text or all messages, never a mixture of both in one Group.
    rewards: K numbers, or None where the data has none. Pairs: chosen before rejected, rewards 1 and 0; a fractional
        preference p ≥ ½ for the first response gives rewards and target_probs (p, 1-p).
    columns: the row's other columns, for reward functions, verifiers and slices.
    file, row: where it came from (row counts from 1), for error messages.
    ranks: K ranks, 1 the best, ties allowed.
    target_probs: K probabilities that sum to 1.
    sampler_logprobs: K log-probabilities (nats) of the responses under the model that sampled them.
    margin: by how much the chosen response is better, in units of the reward.
    """

    prompt: Text | None
    responses: tuple[Text, ...]
    rewards: tuple[float, ...] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    file: str = ""
    row: int = 0
    ranks: tuple[float, ...] | None = None
    target_probs: tuple[float, ...] | None = None
    sampler_logprobs: tuple[float, ...] | None = None
    margin: float | None = None

    def content_id(self) -> str:
        """A stable 16-hex-digit hash of the text-level content, whatever the template, tokenizer, file or order."""
        content = {"prompt": _plain(self.prompt), "responses": [_plain(r) for r in self.responses]}
        if self.rewards is not None:
            content["rewards"] = list(self.rewards)
        return content_hash(content)


def content_hash(content: Any) -> str:
    """16 hex digits of a JSON-like value; what JSON does not know is taken as its text."""
    encoded = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str).encode()
    return hashlib.blake2b(encoded, digest_size=8).hexdigest()


def _plain(text: Text | None) -> Any:
    if text is None or isinstance(text, str):
        return text
    return [asdict(message) for message in text]


def asked(text: dict[str, Any]) -> str:
    """The prompt of a text-level Group, or its last turn; "" where it has none."""
    prompt = text["prompt"]
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""
