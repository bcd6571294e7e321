"""TokenGroups on disk: an Arrow file, written once and memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from posttrain.data.tokens import Sized, TokenGroup

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
        "ranks": List(Value("float64")),
        "target_probs": List(Value("float64")),
        "sampler_logprobs": List(Value("float64")),
        "margin": Value("float64"),
        "text": Value("string"),
        "source": Value("int32"),
    }
)


class TokenDataset(Sized):
    """Random access to TokenGroups in an Arrow file; the lengths needed for planning stay in memory.

    reference: [trained.sum()] the reference's log-probs of all targets, in this dataset's order, where they are known.
    """

    def __init__(self, table: Dataset, reference: np.ndarray | None = None) -> None:
        self.table, self.reference = table, reference
        self.counts, self.lengths, self.longest, self.shared, self.trained = self._measure()
        self._targets = np.concatenate([[0], np.cumsum(self.trained)])

    def __len__(self) -> int:
        return len(self.table)

    def with_reference(self, reference: np.ndarray) -> TokenDataset:
        """The same Groups with the reference's log-probs of their targets."""
        assert len(reference) == self.trained.sum()
        return TokenDataset(self.table, reference)

    def groups(self, positions: Sequence[int] | np.ndarray) -> list[TokenGroup]:
        """The Groups at these positions, in this order."""
        if not len(positions):
            return []
        columns = self.table[np.asarray(positions).tolist()]
        names = list(columns)
        found = [TokenGroup(**dict(zip(names, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        if self.reference is not None:
            for group, position in zip(found, positions, strict=True):
                group.reference = self.reference[self._targets[position] : self._targets[position + 1]]
        return found

    def column(self, name: str) -> list[Any]:
        """One column."""
        return self.table.with_format("arrow").select_columns([name])[:][name].to_pylist()

    def _measure(self) -> tuple[np.ndarray, ...]:
        import pyarrow.compute as pc

        found: list[list[np.ndarray]] = [[np.zeros(0, dtype=np.int64)] for _ in range(5)]
        for table in self.table.with_format("arrow").iter(batch_size=10_000) if len(self.table) else ():
            prompt = pc.list_value_length(table["prompt"]).to_numpy()
            counts = pc.list_value_length(table["responses"]).to_numpy()
            per_response = pc.list_value_length(pc.list_flatten(table["responses"])).to_numpy()
            trained_each = _sums(pc.list_flatten(table["masks"]).combine_chunks())
            responses, trained = (_by_group(np.add, each, counts) for each in (per_response, trained_each))
            longest = _by_group(np.maximum, per_response, counts)
            measured = (counts, responses + prompt * counts, longest + prompt, responses + prompt, trained)
            for parts, part in zip(found, measured, strict=True):
                parts.append(part)
        return tuple(np.concatenate(parts).astype(np.int64) for parts in found)


def _by_group(function: np.ufunc, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The function over each Group's values, `counts` of them after one another; 0 where it has none."""
    found = np.zeros(len(counts), dtype=np.int64)
    if len(values):
        some = counts > 0
        found[some] = function.reduceat(values, np.r_[0, np.cumsum(counts[some])[:-1]])
    return found


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
