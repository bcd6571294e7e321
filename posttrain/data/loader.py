"""The order of examples and the steps made of them: pure functions of seed and step, so that any step can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.data.batches import Batch, collate
from posttrain.data.packing import Packing, Rows
from posttrain.data.split import mix_indices
from posttrain.data.token_dataset import TokenDataset
from posttrain.data.tokens import Examples, TokenGroup
from posttrain.errors import CheckpointError


@dataclass
class Step:
    """One rank's share of an optimizer step.

    tokens, trained_tokens: of the whole step, all ranks (padding not counted). stream: where a stream, or a stage that
        samples, is after it. closes: whether a checkpoint after it can be gone on from, asked once the step is made.
    told: for the log, beside what is measured. measured: name → (sum, count) of this rank's losses, from the trainer.
    rollouts: a few prompts with what was sampled for them, to be looked at.
    """

    number: int
    tokens: int
    trained_tokens: int
    micro_batches: list[Batch]
    stream: dict[str, Any] = field(default_factory=dict)
    closes: Callable[[], bool] = lambda: True
    told: dict[str, Any] = field(default_factory=dict)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, tuple[Any, float]] = field(default_factory=dict)


class Order:
    """Positions into the dataset, epoch after epoch without a seam.

    Each epoch is a fresh seeded permutation (or the file's own order with shuffle off); with mixing weights an epoch still
    has as many draws as there are examples, source i giving its share.
    """

    def __init__(self, sources: np.ndarray, seed: int, shuffle: bool, mix: list[float] | None = None) -> None:
        self.sources, self.seed, self.shuffle, self.mix = sources, seed, shuffle, mix
        self._cached: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def take(self, start: int, count: int) -> np.ndarray:
        """Draws start .. start+count of the endless order."""
        size, parts = len(self.sources), []
        while count > 0:
            epoch, offset = divmod(start, size)
            part = self._epoch(epoch)[offset : offset + count]
            assert len(part), "an epoch has fewer draws than examples"
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._cached[0] != epoch:
            self._cached = (epoch, self._draw(epoch))
        return self._cached[1]

    def _draw(self, epoch: int) -> np.ndarray:
        size = len(self.sources)
        if self.mix:
            members = [np.flatnonzero(self.sources == i) for i in range(len(self.mix))]
            drawn = mix_indices([len(m) for m in members], self.mix, self.seed, epoch, self.shuffle)
            positions = np.concatenate(members)[drawn]
        else:
            positions = np.arange(size)
        if self.shuffle:
            positions = np.random.default_rng([self.seed, epoch]).permutation(positions)
        return positions


class Loader:
    """Steps over a dataset; `size` Groups each, or as many as first reach `tokens` tokens."""

    def __init__(
        self,
        data: TokenDataset,
        order: Order,
        packing: Packing,
        size: int | None,
        tokens: int | None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.data, self.order, self.packing = data, order, packing
        self.size, self.tokens, self.rank, self.world = size, tokens, rank, world

    def count_steps(self, epochs: float) -> int:
        """Optimizer steps in this many epochs; the last may be smaller."""
        draws = round(epochs * len(self.data))
        if self.size:
            return -(-draws // self.size)
        steps = start = 0
        while start < draws:
            start, steps = start + self._count(start, draws), steps + 1
        return steps

    def steps(self, first: int, last: int, draws: int | None = None) -> Iterator[Step]:
        """Steps first .. last-1, counted from 0; `draws` cuts the last step of an epoch-counted run."""
        for number, positions in enumerate(self.positions(first, last, draws), first):
            yield compose(number, self.data, positions, self.packing, self.rank, self.world)

    def positions(self, first: int, last: int, draws: int | None = None) -> Iterator[np.ndarray]:
        """Of each of these steps' Groups in the dataset."""
        start = first * self.size if self.size else sum(self._sizes(first, draws))
        for _ in range(first, last):
            count = self._count(start, draws)
            yield self.order.take(start, count)
            start += count

    def take(self, number: int) -> list[TokenGroup]:
        """The Groups of the draw with this number, counted from 0."""
        assert self.size, "config/check.py asks for batch.size"
        return self.data.groups(self.order.take(number * self.size, self.size))

    def _sizes(self, steps: int, draws: int | None) -> Iterator[int]:
        start = 0
        for _ in range(steps):
            count = self._count(start, draws)
            yield count
            start += count

    def _count(self, start: int, draws: int | None) -> int:
        """Groups in the step that begins at this draw."""
        left = None if draws is None else draws - start
        if self.size:
            return self.size if left is None else min(self.size, left)
        assert self.tokens
        count = total = 0
        while total < self.tokens and (left is None or count < left):
            total += int(self.data.lengths[self.order.take(start + count, 1)[0]])
            count += 1
        return count

    def restore(self, stream: dict[str, Any]) -> list[str]:
        """Steps are a function of their number: there is nothing to go back to."""
        if stream:
            raise CheckpointError("the checkpoint is of a streamed run; go on with data.streaming=true")
        return []

    def metrics(self) -> dict[str, float]:
        """For a log line: all was counted beforehand."""
        return {}

    def news(self) -> list[str]:
        """What a user should know of the data and has not been told yet."""
        return []


def compose(
    number: int, data: TokenDataset | Examples, positions: np.ndarray, packing: Packing, rank: int, world: int
) -> Step:
    """This rank's share of the step that holds the Groups at these positions."""
    micro_batches = []
    widths, heights = (of(packing.layout)[positions] for of in (data.widths, data.heights))
    for rows in packing.plan(widths, world, heights)[rank::world]:
        batch = gather(data, positions, rows, packing.layout)
        micro_batches.append(batch if rows else batch.empty())
    tokens, trained = data.processed(packing.layout)[positions].sum(), data.trained[positions].sum()
    return Step(number, int(tokens), int(trained), micro_batches)


def gather(data: TokenDataset | Examples, positions: np.ndarray, rows: Rows, layout: str) -> Batch:
    """Read the rows' Groups and make their tensors; of no rows any example, which keeps a rank in step with the others."""
    rows = rows or [[0]]
    used = [i for row in rows for i in row]
    local = {i: n for n, i in enumerate(used)}
    groups = data.groups(positions[used])
    return collate(groups, [[local[i] for i in row] for row in rows], layout)


def evaluation_batches(
    data: TokenDataset | Examples, packing: Packing, rank: int = 0, world: int = 1
) -> list[tuple[np.ndarray, Rows]]:
    """This rank's evaluation batches, composed once and the same for any number of ranks. All ranks have equally many, for
    sharded weights are gathered by all together: one that has none left gets one of no rows, whose numbers count for nothing."""
    if not len(data):
        return []
    positions = np.arange(len(data))
    plan = packing.plan(data.widths(packing.layout), heights=data.heights(packing.layout))
    plan += [[] for _ in range(-len(plan) % world)]
    return [(positions, rows) for rows in plan[rank::world]]
