"""The tokenizer in a thread of its own, and what keeps it busy: texts are handed over before the ids in front are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")

Ids = list[list[int]]


class TokenizerThread:
    """Tokenises lists of texts one after another while its owner goes on."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.pool = tokenizer, ThreadPoolExecutor(1)

    def close(self) -> None:
        """Without waiting: who stops early may be the thread itself, by its collector."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def ids(self, texts: list[str]) -> Future[Ids]:
        """Each text's ids, once they are there."""
        return self.pool.submit(self._tokenise, texts)

    def _tokenise(self, texts: list[str]) -> Ids:
        """Whole and as they are. A tokenizer of the tokenizers library is asked itself, without the offsets that
        transformers would have it work out and throw away (a quarter of the time)."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation or backend.padding:  # its file may ask for them, and transformers too has set them aside
            backend.no_truncation()
            backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def in_parts(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last of what is left."""
    while part := list(islice(items, size)):
        yield part


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made before the one in front of it is used."""
    ahead = deque(islice(items, 1))
    for item in items:
        ahead.append(item)
        yield ahead.popleft()
    yield from ahead
