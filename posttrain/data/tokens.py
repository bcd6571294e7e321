"""Token-level groups, and the arrays of them that are kept on disk (Arrow, memory-mapped)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

FEATURES = Features(
    {
        "id": Value("string"),
        "cluster": Value("string"),
        "prompt": List(Value("int32")),
        "responses": List(List(Value("int32"))),
        "masks": List(List(Value("bool"))),
        "bytes": List(Value("int64")),
        "chars": List(Value("int64")),
        "rewards": List(Value("float64")),
        "text": Value("string"),
        "source": Value("int32"),
    }
)


@dataclass(slots=True)
class TokenGroup:
    """A prompt and its K responses as token ids.

    masks: for each response, which of its tokens are targets (a conversation's later user turns are not).
    bytes, chars: for each response, UTF-8 bytes and Unicode characters of the targets' text; special tokens have none.
    cluster: what is resampled together when intervals are formed (windows of one document share theirs).
    text: the text-level Group as JSON, for display and for verifying generated answers.
    """

    id: str
    cluster: str
    prompt: list[int]
    responses: list[list[int]]
    masks: list[list[bool]]
    bytes: list[int]
    chars: list[int]
    text: str
    rewards: list[float] = field(default_factory=list)
    source: int = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt + response, one number a response."""
        return [len(self.prompt) + len(response) for response in self.responses]

    @property
    def trained_tokens(self) -> int:
        return sum(sum(mask) for mask in self.masks)


class TokenDataset:
    """Random access to TokenGroups in an Arrow file; the lengths needed for planning stay in memory.

    lengths: [n] tokens of each Group in the padded layout (its responses, each with the prompt).
    trained: [n] target tokens of each Group.
    """

    def __init__(self, table: Dataset, indices: np.ndarray | None = None) -> None:
        self.table = table
        self.indices = np.arange(len(table)) if indices is None else np.asarray(indices, dtype=np.int64)
        self.lengths, self.longest, self.trained = self._measure()

    def __len__(self) -> int:
        return len(self.indices)

    def groups(self, positions: Sequence[int] | np.ndarray) -> list[TokenGroup]:
        """The Groups at these positions, in this order."""
        if not len(positions):
            return []
        columns = self.table[self.indices[np.asarray(positions)].tolist()]
        names = list(columns)
        return [TokenGroup(**dict(zip(names, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    def column(self, name: str) -> list[Any]:
        """One column, in this dataset's order."""
        values = self.table.with_format("arrow").select_columns([name])[:][name]
        return values.take(self.indices).to_pylist()

    def select(self, positions: np.ndarray) -> TokenDataset:
        return TokenDataset(self.table, self.indices[positions])

    def _measure(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not len(self.table):
            return (np.zeros(0, dtype=np.int64),) * 3
        import pyarrow.compute as pc

        total, longest, trained = [], [], []
        for table in self.table.with_format("arrow").iter(batch_size=10_000):
            prompt = pc.list_value_length(table["prompt"]).to_numpy()
            counts = pc.list_value_length(table["responses"]).to_numpy()
            per_response = pc.list_value_length(pc.list_flatten(table["responses"])).to_numpy()
            trained_each = _sums(pc.list_flatten(table["masks"]).combine_chunks())
            starts = np.r_[0, np.cumsum(counts)[:-1]]
            total.append(np.add.reduceat(per_response, starts) + prompt * counts)
            longest.append(np.maximum.reduceat(per_response, starts) + prompt)
            trained.append(np.add.reduceat(trained_each, starts))
        arrays = (np.concatenate(part).astype(np.int64)[self.indices] for part in (total, longest, trained))
        return tuple(arrays)  # type: ignore[return-value]


class Examples:
    """A few TokenGroups in memory, with what planning needs of them; see TokenDataset."""

    def __init__(self, groups: Sequence[TokenGroup]) -> None:
        self.held = list(groups)
        self.lengths = np.array([sum(group.lengths) for group in groups], dtype=np.int64)
        self.longest = np.array([max(group.lengths) for group in groups], dtype=np.int64)
        self.trained = np.array([group.trained_tokens for group in groups], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.held)

    def groups(self, positions: Sequence[int] | np.ndarray) -> list[TokenGroup]:
        """The Groups at these positions, in this order."""
        return [self.held[position] for position in positions]


def _sums(lists: Any) -> np.ndarray:
    """Sum of each list of booleans in an Arrow list array."""
    values = np.concatenate([[0], np.cumsum(lists.flatten().to_numpy(zero_copy_only=False))])
    lengths = lists.value_lengths().to_numpy()
    stops = np.cumsum(lengths)
    return values[stops] - values[stops - lengths]


class Writer:
    """Writes TokenGroups to an Arrow file, up to `limit` of them; `full` says that it takes no more."""

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.writer, self.limit, self.count = ArrowWriter(path=str(path), features=FEATURES), limit, 0

    @property
    def full(self) -> bool:
        return self.limit is not None and self.count >= self.limit

    def write(self, groups: Sequence[TokenGroup]) -> None:
        if self.limit is not None:
            groups = groups[: self.limit - self.count]
        if groups:
            self.writer.write_batch({name: [getattr(group, name) for group in groups] for name in FEATURES})
            self.count += len(groups)

    def close(self) -> None:
        self.writer.finalize()
        self.writer.close()


def read(path: Path) -> Dataset:
    """The memory-mapped table."""
    return Dataset.from_file(str(path))
