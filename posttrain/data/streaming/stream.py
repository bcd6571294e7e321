"""A feed shuffled in blocks, and the steps made of it.

A block is the next shuffle_buffer examples, or what is left of the epoch, permuted by (seed, number of the block). So where a
stream is says where its feeds were when the block began and how many of its examples are used; every rank reads all of it and
makes the same steps, of which each takes its share, as it does of data that lies on a disk.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from posttrain.data.loader import Step, compose
from posttrain.data.packing import Packing
from posttrain.data.streaming.feed import Feed
from posttrain.data.streaming.readers import whole
from posttrain.data.streaming.tally import Tally
from posttrain.data.tokens import Examples, TokenGroup
from posttrain.errors import CheckpointError, DataError


@dataclass
class Stream:
    """One feed of all sources, or with mixing weights one of each; signature: changes with what decides the examples.

    forward: files that are read forward to where a run goes on.
    """

    feeds: list[Feed]
    weights: list[float] | None
    seed: int
    shuffle: bool
    buffer: int
    signature: str
    forward: list[str]

    def __post_init__(self) -> None:
        self.block, self.used, self.seconds = -1, 0, 0.0
        self.examples: list[TokenGroup] = []
        self.begin: list[dict[str, Any]] = []
        self.told: set[str] = set()

    def next(self) -> TokenGroup:
        """The next example."""
        if self.used == len(self.examples):
            self._fill()
        self.used += 1
        return whole(self.examples[self.used - 1])

    def state(self) -> dict[str, Any]:
        """Where the next example is: plain JSON, for a checkpoint."""
        return {"signature": self.signature, "block": self.block, "used": self.used, "feeds": self.begin}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was told."""
        if state["signature"] != self.signature:
            raise CheckpointError(
                "data.train is not the stream that the checkpoint is of: its files have changed, or data.*, train.seed, "
                "the stage or the tokenizer differ, so the place in it means nothing; start a new run (run.dir), from "
                "the checkpoint's model if you like (model.path)"
            )
        for feed, place in zip(self.feeds, state["feeds"], strict=True):
            feed.go_to(place)
        self.block = state["block"] - 1
        self._fill()
        self.used = state["used"]

    def _fill(self) -> None:
        """Read and permute the next block."""
        began = time.monotonic()
        self.examples = []  # not two blocks at once
        self.block, self.begin = self.block + 1, [feed.place() for feed in self.feeds]
        found = self._mixed() if self.weights else self._take(self.feeds[0], self.buffer)
        order = np.random.default_rng([self.seed, self.block]).permutation(len(found)) if self.shuffle else None
        self.examples = found if order is None else [found[position] for position in order]
        self.used, self.seconds = 0, self.seconds + time.monotonic() - began

    def _take(self, feed: Feed, count: int) -> list[TokenGroup]:
        """At least one example: a feed at the end of an epoch begins the next."""
        found = feed.take(count) or feed.take(count)
        if not found:
            raise DataError(
                "data.train: no example is left to train on in the whole of it; look with posttrain inspect"
            )
        return found

    def _mixed(self) -> list[TokenGroup]:
        """Each example from a source drawn with its weight; sources start over one by one, so a block is always full."""
        weights = np.array(self.weights, dtype=np.float64)
        shares = weights / weights.sum()
        drawn = np.random.default_rng([self.seed, self.block, 1]).choice(len(shares), self.buffer, p=shares)
        return [self._take(self.feeds[number], 1)[0] for number in drawn]

    @property
    def tally(self) -> Tally:
        """What became of the rows read so far, up to the end of this block."""
        return reduce(Tally.join, (feed.tally for feed in self.feeds))

    def describe(self) -> str:
        """The order, in words."""
        shuffled = f"shuffled {self.buffer:,} examples at a time (data.shuffle_buffer)"
        if self.weights:
            return f"drawn from the sources by data.mix, {shuffled if self.shuffle else 'each source in its own order'}"
        return shuffled if self.shuffle else "in the order of the files"

    def lines(self) -> list[str]:
        """What was read, dropped or cut so far."""
        tally = self.tally
        epochs = "" if self.weights else f", in epoch {self.feeds[0].epoch + 1} of the data"
        first = (
            f"streamed: {tally.examples:,} examples taken{epochs}, {tally.held_out:,} left out as held out for evaluation "
            f"(an example counts in each epoch); reading and tokenising took {self.seconds:.0f} s"
        )
        return [first, *self._losses(tally)]

    def news(self) -> list[str]:
        """Kinds of losses that have not been told yet; their numbers are in the log, and whole at the end."""
        kinds = {re.sub(r"[\d,.]+", "", line): line for line in self._losses(self.tally)}
        found = [line for kind, line in kinds.items() if kind not in self.told]
        self.told |= kinds.keys()
        return [f"of the data read so far: {line}" for line in found]

    def _losses(self, tally: Tally) -> list[str]:
        notes = [f"{count:,} {what}" for what, count in tally.notes.items()]
        counts = replace(tally.counts, windows=0)  # of whole batches: more than were taken, and no loss
        return [*tally.report.lines(), *notes, *counts.lines(self.feeds[0].reading.encoding)]


class StreamLoader:
    """Steps over a stream; `size` Groups each, or as many as first reach `tokens` tokens. See Loader."""

    def __init__(
        self, stream: Stream, packing: Packing, size: int | None, tokens: int | None, rank: int = 0, world: int = 1
    ) -> None:
        self.stream, self.packing = stream, packing
        self.size, self.tokens, self.rank, self.world = size, tokens, rank, world

    def steps(self, first: int, last: int, draws: int | None = None) -> Iterator[Step]:
        """Steps first .. last-1, from where the stream is; each tells where it is after it."""
        assert draws is None, "a stream is counted in steps"
        for number in range(first, last):
            examples = Examples(self._next())
            step = compose(number, examples, np.arange(len(examples)), self.packing, self.rank, self.world)
            step.stream = self.stream.state()
            yield step

    def _next(self) -> list[TokenGroup]:
        if self.size:
            return [self.stream.next() for _ in range(self.size)]
        assert self.tokens
        found, total = list[TokenGroup](), 0
        while total < self.tokens:
            found.append(self.stream.next())
            total += sum(found[-1].lengths)
        return found

    def restore(self, stream: dict[str, Any]) -> list[str]:
        """Go on where a checkpoint was saved; what a user should know about how."""
        if not stream:
            raise CheckpointError("the checkpoint is of a run that was not streamed; go on with data.streaming=false")
        self.stream.restore(stream)
        names = self.stream.forward
        told = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        return [f"goes on in block {self.stream.block + 1:,} of the stream"] + (
            [f"read forward to where the run goes on, for that kind of file cannot be sought: {told}"] if names else []
        )

    def metrics(self) -> dict[str, float]:
        """How far the stream is, in examples read (a block ahead at most), and what was not used of it."""
        tally = self.stream.tally
        found: dict[str, float] = {
            "examples_read": tally.examples,
            "examples_lost": tally.lost,
            "examples_held_out": tally.held_out,
        }
        return found if self.stream.weights else {"epoch": self.stream.feeds[0].epoch + 1, **found}

    def news(self) -> list[str]:
        """Losses of a kind that was not seen before."""
        return self.stream.news()
