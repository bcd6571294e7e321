"""How a step becomes micro-batches: which Groups share a forward pass, and which share a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Rows = list[list[int]]
"""One micro-batch: its rows, each a list of positions into the step's Groups."""

Lengths = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Packing:
    """How a step becomes micro-batches.

    layout: "padded", "packed" or "shared". micro_tokens: token budget of one forward, padding included. micro_size: Groups
    in one forward instead. one_row: the attention kernel takes one packed row at a time. overhead_tokens: what one more
    forward costs, in tokens: below it padding is cheaper than splitting.
    """

    layout: str
    micro_tokens: int
    micro_size: int | None = None
    one_row: bool = False
    overhead_tokens: int = 128

    def plan(self, widths: Lengths, world: int = 1, heights: Lengths | None = None) -> list[Rows]:
        """Micro-batches over Groups of these widths (tokens of its widest row), their number a multiple of `world`; some may
        be empty. heights: tensor rows that each Group takes, 1 unless given (padded: one a response).

        A function of the lengths alone, so that every rank makes the same plan without a word.
        """
        lengths = np.asarray(widths, dtype=np.int64)
        rows = np.ones_like(lengths) if heights is None else np.asarray(heights, dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        if self.micro_size:
            chunks = [order[i : i + self.micro_size].tolist() for i in range(0, len(order), self.micro_size)]
            micros = [self._rows(chunk, lengths, max(self.micro_tokens, int(lengths[chunk].sum()))) for chunk in chunks]
        elif self.layout == "packed":
            packed = best_fit(order, lengths, self._capacity(lengths))
            per = 1 if self.one_row else max(1, self.micro_tokens // max(sum(lengths[r]) for r in packed))
            micros = [packed[i : i + per] for i in range(0, len(packed), per)]
        else:
            micros = self._rectangles(order, lengths, rows)
        return _multiple(micros, world)

    def _capacity(self, lengths: np.ndarray) -> int:
        """Tokens of one packed row: the whole budget for kernels that skip other documents, else the longest example, for
        a masked kernel's cost grows with the square of the row."""
        longest = int(lengths.max())
        return max(longest, self.micro_tokens) if self.one_row else longest

    def _rows(self, chunk: list[int], lengths: np.ndarray, capacity: int) -> Rows:
        if self.layout != "packed":
            return [[i] for i in chunk]
        return best_fit(chunk, lengths, capacity if self.one_row else int(lengths[chunk].max()))

    def _rectangles(self, order: np.ndarray, lengths: np.ndarray, heights: np.ndarray) -> list[Rows]:
        """Cut the examples, longest first, where the padded tokens and the overhead of each forward sum to the least."""
        widths, above = lengths[order], np.concatenate([[0], np.cumsum(heights[order])])
        cost, cut = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)
        for stop in range(1, len(order) + 1):
            first = max(0, stop - max(1, self.micro_tokens // int(widths[stop - 1])))
            starts = np.arange(first, stop)
            padded = (above[stop] - above[starts]) * widths[starts]
            total = np.where((padded <= self.micro_tokens) | (starts == stop - 1), cost[starts] + padded, np.inf)
            best = int(total.argmin())
            cost[stop], cut[stop] = total[best] + self.overhead_tokens, starts[best]
        stops, stop = [], len(order)
        while stop:
            stops.append(stop)
            stop = int(cut[stop])
        return [[[int(i)] for i in order[cut[stop] : stop]] for stop in reversed(stops)]


def best_fit(order: Lengths, lengths: np.ndarray, capacity: int) -> Rows:
    """Best-fit decreasing: each item goes into the fullest row that still has room for it."""
    rows: Rows = []
    room = np.zeros(0, dtype=np.int64)
    for index in order:
        length = int(lengths[index])
        fitting = np.where(room >= length, room, np.iinfo(np.int64).max)
        best = int(fitting.argmin()) if len(fitting) else -1
        if best < 0 or room[best] < length:
            rows.append([int(index)])
            room = np.append(room, capacity - length)
        else:
            rows[best].append(int(index))
            room[best] -= length
    return rows


def _multiple(micros: list[Rows], world: int) -> list[Rows]:
    """Split the largest micro-batches, or add empty ones, until every rank has equally many."""
    while len(micros) % world:
        largest = max(range(len(micros)), key=lambda i: len(micros[i]))
        if len(micros[largest]) < 2:
            micros.append([])
            continue
        half = len(micros[largest]) // 2
        micros[largest : largest + 1] = [micros[largest][:half], micros[largest][half:]]
    return micros


def row_cost(widths: Lengths, heights: Lengths, hidden_size: int) -> float:
    """Relative cost of rows of these widths: a decoder layer takes 24 H² operations a token beside 4 H·L for attention
    over a row of L tokens (masked or not), that is L·(1 + L/6H) in units of the first."""
    length = np.asarray(widths, dtype=np.float64)
    return float((np.asarray(heights) * length * (1 + length / (6 * hidden_size))).sum())
