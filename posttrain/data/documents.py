"""Documents and streams → windows of at most max_length tokens, every token predicted exactly once.

Neighbouring windows overlap by one token: the last target of one is the given first token of the next, so that cutting
costs no prediction. A document's windows share its cluster; windows of a stream are examples of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.data.tokens import TokenGroup
from posttrain.errors import ModelError


@dataclass(slots=True)
class Tokens:
    """ids [n] with, for each token, the bytes, characters and end position of the text it adds."""

    ids: np.ndarray
    bytes: np.ndarray
    ends: np.ndarray

    def join(self, other: Tokens) -> Tokens:
        pairs = ((self.ids, other.ids), (self.bytes, other.bytes), (self.ends, other.ends))
        return Tokens(*(np.concatenate(pair) for pair in pairs))


@dataclass(slots=True)
class Rest:
    """What a stream's blocks so far leave to the next window: tokens and their text."""

    tokens: Tokens
    text: str

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        tokens = self.tokens
        return {"ids": tokens.ids.tolist(), "bytes": tokens.bytes.tolist(), "ends": tokens.ends.tolist(),
                "text": self.text}  # fmt: skip

    @staticmethod
    def of(state: dict[str, Any]) -> Rest:
        """Back from `state`."""
        return Rest(Tokens(*(np.array(state[name], np.int64) for name in ("ids", "bytes", "ends"))), state["text"])


@dataclass(slots=True)
class Window:
    """One window: its ids, the text of its targets, and its place in the document."""

    ids: list[int]
    bytes: int
    text: str
    index: int
    count: int

    def token_group(self, document: str) -> TokenGroup:
        """The window as a Group whose first token is given and whose others are targets; document: its id."""
        return TokenGroup(
            id=document if self.count == 1 else f"{document}.{self.index}",
            cluster=document,
            prompt=self.ids[:1],
            responses=[self.ids[1:]],
            masks=[[True] * (len(self.ids) - 1)],
            bytes=[self.bytes],
            chars=[len(self.text)],
            text=json.dumps({"prompt": None, "responses": [self.text], "columns": {}}, ensure_ascii=False),
        )


class Documents:
    """Cuts plain documents; needs a tokenizer that knows where each token ends in the text."""

    def __init__(self, tokenizer: Any, bos: list[int], eos: int, encoding: Any) -> None:
        self.tokenizer, self.bos, self.eos = tokenizer, bos, eos
        self.splits, self.max_length = encoding.on_too_long == "split", encoding.max_length

    def split(self, texts: list[str]) -> Iterator[list[Window]]:
        """For each text its windows: one, unless it is too long and the policy is to split."""
        for text, tokens in zip(texts, self._tokenize(texts), strict=True):
            ids = [*self.bos, *tokens.ids.tolist()]
            if not ids or ids[-1] != self.eos:
                ids.append(self.eos)
            ends = np.r_[np.zeros(len(self.bos), np.int64), tokens.ends]
            sizes = np.r_[np.zeros(len(self.bos), np.int64), tokens.bytes]
            pad = len(ids) - len(ends)
            whole = Tokens(np.array(ids), np.r_[sizes, [0] * pad], np.r_[ends, [len(text)] * pad])
            yield list(self._windows(whole, text))

    def stream(self, blocks: Iterable[str]) -> Iterator[Window]:
        """Windows of a stream given as consecutive blocks of text; holds one block at a time."""
        rest = self.begin()
        for block in blocks:
            yield from self.push(rest, block)
        yield from self.end(rest)

    def begin(self) -> Rest:
        """Nothing but the beginning-of-text."""
        return Rest(Tokens(np.array(self.bos, np.int64), *(np.zeros(len(self.bos), np.int64) for _ in range(2))), "")

    def push(self, rest: Rest, block: str) -> Iterator[Window]:
        """The windows that a stream's next block completes; `rest` becomes what is left over."""
        tokens = next(iter(self._tokenize([block])))
        tokens.ends = tokens.ends + len(rest.text)
        whole, text = rest.tokens.join(tokens), rest.text + block
        while len(whole.ids) > self.max_length:
            yield self._window(whole, text, 0, self.max_length, 0, 1)
            whole = Tokens(*(part[self.max_length - 1 :] for part in (whole.ids, whole.bytes, whole.ends)))
        rest.text = text[whole.ends[0] :] if len(whole.ends) else ""
        whole.ends = whole.ends - whole.ends[:1].sum()
        rest.tokens = whole

    def end(self, rest: Rest) -> Iterator[Window]:
        """The last windows of a stream, with the end-of-text; none of a stream that had no text."""
        if len(rest.tokens.ids) == len(self.bos):
            return
        last = Tokens(np.array([self.eos]), np.zeros(1, np.int64), np.array([len(rest.text)]))
        whole = rest.tokens.join(last)
        for index in range(0, len(whole.ids) - 1, self.max_length - 1):
            yield self._window(whole, rest.text, index, index + self.max_length, 0, 1)

    def _windows(self, tokens: Tokens, text: str) -> Iterator[Window]:
        length = len(tokens.ids)
        if length <= self.max_length or not self.splits:
            if length > 1:
                yield self._window(tokens, text, 0, length, 0, 1)
            return
        starts = range(0, length - 1, self.max_length - 1)
        for index, start in enumerate(starts):
            yield self._window(tokens, text, start, start + self.max_length, index, len(starts))

    def _window(self, tokens: Tokens, text: str, start: int, stop: int, index: int, count: int) -> Window:
        ids = tokens.ids[start:stop].tolist()
        last = min(stop, len(tokens.ids)) - 1
        piece = text[tokens.ends[start] : tokens.ends[last]]
        return Window(ids, int(tokens.bytes[start + 1 : last + 1].sum()), piece, index, count)

    def _tokenize(self, texts: list[str]) -> Iterator[Tokens]:
        if not self.tokenizer.is_fast:
            raise ModelError(
                "plain documents need a tokenizer that tells where each token ends (a tokenizer.json); this one does not"
            )
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ends = np.array([stop for _, stop in offsets], dtype=np.int64)
            ends = np.maximum.accumulate(ends) if len(ends) else ends
            cumulative = np.r_[0, np.cumsum(utf8_lengths(text))]
            yield Tokens(np.array(ids, dtype=np.int64), np.diff(cumulative[ends], prepend=0), ends)


def utf8_lengths(text: str) -> np.ndarray:
    """Bytes of each character in UTF-8."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
