"""Sources → an endless run of tokenised training examples, read on the fly; any place in it can be gone back to.

What a source gives depends on the source alone: its rows are tokenised in batches, and a place names the mark at which a
batch begins and how many of its examples are used. Nothing that is kept grows with the data.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.data.inputs import Source
from posttrain.data.losses import stop_if_lost
from posttrain.data.streaming.cursors import Mark
from posttrain.data.streaming.readers import Reading, RowReader, StreamTokenizer, TextReader, compact
from posttrain.data.streaming.tally import Tally
from posttrain.data.tokens import TokenGroup

CHECK_AFTER = 1_000
"""Groups after which data.max_lost_fraction holds, for few are no share; and at the end of an epoch."""


@dataclass
class Feed:
    """Training examples of some sources, epoch after epoch; limits: the most of each source in an epoch.

    Files come in their order, or with `shuffle` in another order each epoch.
    """

    sources: list[Source]
    reading: Reading
    limits: list[int | None]
    shuffle: bool

    def __post_init__(self) -> None:
        self.worker = StreamTokenizer(self.reading)
        self.go_to(None)

    def take(self, count: int) -> list[TokenGroup]:
        """The next examples, compact; fewer, or none, where the epoch ends."""
        found: list[TokenGroup] = []
        while len(found) < count:
            if self.used == len(self.batch) and not self._refill():
                break
            part = self.batch[self.used : self.used + count - len(found)]
            self.used += len(part)
            found += part
            self.tally.examples += len(part)
        return found

    def place(self) -> dict[str, Any]:
        """Where the next example is: plain JSON."""
        return {"epoch": self.epoch, "file": self.file, "mark": self.mark, "taken": self.taken, "used": self.used,
                "tally": self.tally_before}  # fmt: skip

    def go_to(self, place: dict[str, Any] | None) -> None:
        """Back or forth to a place; None: the beginning."""
        place = place or {"epoch": 0, "file": 0, "mark": None, "taken": 0, "used": 0, "tally": Tally().state()}
        self.epoch, self.file, self.taken = place["epoch"], place["file"], place["taken"]
        self.tally, self.tally_before = Tally.of(place["tally"]), place["tally"]
        vars(self.worker.counts).update(vars(self.tally.counts))  # in place: the template counts there too
        self.tally.counts = self.worker.counts
        self.mark: Mark | None = place["mark"]
        self.batch: list[TokenGroup] = []
        self.used = 0
        self.reader: RowReader | TextReader | None = None
        if self.mark is not None:
            self.reader = self._open(self.mark)
            self._refill()
            self.used = place["used"]
            self.tally.examples += self.used

    def _refill(self) -> bool:
        """The next batch that is not empty; False where the epoch ends, and the next one begins."""
        while self.file < len(self.sources):
            if self.reader is None:
                self.reader, self.taken = self._open(None), 0
            else:
                self.taken += len(self.batch)
            self.mark, self.tally_before = self.reader.mark(), self.tally.state()
            self.batch, self.used = [], 0
            limit = self.limits[self._order()[self.file]]
            read = None if limit is not None and self.taken >= limit else self.reader.read()
            if read is None:
                self.reader, self.file = None, self.file + 1
                continue
            self.batch = [compact(group) for group in (read if limit is None else read[: limit - self.taken])]
            self._check_lost(CHECK_AFTER)
            if self.batch:
                return True
        self._check_lost(1)
        self.epoch, self.file, self.mark, self.taken, self.used = self.epoch + 1, 0, None, 0, 0
        self.batch, self.tally_before = [], self.tally.state()
        return False

    def _order(self) -> list[int]:
        """The sources of this epoch."""
        if not self.shuffle:
            return list(range(len(self.sources)))
        drawn = np.random.default_rng([self.reading.seed, self.epoch]).permutation(len(self.sources))
        return [int(number) for number in drawn]

    def _open(self, mark: Mark | None) -> RowReader | TextReader:
        source = self.sources[self._order()[self.file]]
        kind = TextReader if source.detected is None else RowReader
        return kind(source, self.reading, self.worker, self.tally, mark)

    def _check_lost(self, after: int) -> None:
        """Losing many examples stops the run as soon as it is seen."""
        if self.tally.total >= after:
            stop_if_many_lost("data.train", self.tally, self.reading)


def stop_if_many_lost(key: str, tally: Tally, reading: Reading) -> None:
    """Hold a side to data.max_lost_fraction; key: data.train or data.eval."""
    counts = Counter({"lost": tally.counts.lost, "groups": tally.counts.groups})
    whole = Source(key, 0, key.removeprefix("data."), report=tally.report, counts=counts)
    stop_if_lost(key, [whole], tally.counts, reading.data, reading.encoding)
