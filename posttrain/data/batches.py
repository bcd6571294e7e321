"""TokenGroups → tensors. A Batch alone knows its layout; a stage sees only trained tokens and the responses they belong to.

padded: one response a row. packed: several share a row; attention and positions restart at each. Layouts never change what a
step holds: its Groups are chosen first, and packing happens within the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from posttrain.data.tokens import TokenGroup


@dataclass
class Batch:
    """One forward pass.

    input_ids, position_ids: [R, L]. Rows are padded on the right; causal attention never looks there.
    segments: [R, L] the response each position belongs to, -1 at padding.
    predict: [N] flat positions (row·L + column) whose hidden state predicts a target; targets: [N] the ids predicted.
    response: [N] which response a target belongs to; group: [responses] which Group a response belongs to.
    ids, clusters: the Groups' ids and resampling clusters; bytes, chars: [responses] of the targets' text.
    weight: 1, or 0 for a batch that only keeps the ranks in step and counts nothing.
    """

    layout: str
    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    predict: Tensor
    targets: Tensor
    response: Tensor
    group: Tensor
    trained_per_response: Tensor
    ids: list[str]
    clusters: list[str]
    bytes: np.ndarray
    chars: np.ndarray
    weight: float = 1.0

    @property
    def responses(self) -> int:
        return len(self.group) if self.weight else 0

    @property
    def trained_tokens(self) -> int:
        return len(self.targets) if self.weight else 0

    @property
    def tokens(self) -> int:
        """Processed tokens, without padding."""
        return self._tokens if self.weight else 0

    def __post_init__(self) -> None:
        self._tokens = int((self.segments >= 0).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        if str(self.input_ids.device) == str(device):
            return self
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()}
        return Batch(**moved)

    def by_response(self, values: Tensor) -> Tensor:
        """Sum values [N] of trained tokens over each response: [responses]."""
        return values.new_zeros(len(self.group)).index_add(0, self.response, values)

    def empty(self) -> Batch:
        """The same tensors counting nothing."""
        return replace(self, weight=0.0)


class Sized(Protocol):
    """What planning needs of a dataset."""

    lengths: np.ndarray
    longest: np.ndarray


Rows = list[list[int]]
"""One micro-batch: its rows, each a list of positions into the step's Groups."""


@dataclass(frozen=True)
class Packing:
    """How a step becomes micro-batches.

    layout: "padded" or "packed". micro_tokens: token budget of one forward, padding included. micro_size: Groups in one
    forward instead. one_row: the attention kernel takes one packed row at a time. overhead_tokens: what one more forward
    costs, in tokens: below it padding is cheaper than splitting.
    """

    layout: str
    micro_tokens: int
    micro_size: int | None = None
    one_row: bool = False
    overhead_tokens: int = 128

    def plan(self, longest: Sequence[int] | np.ndarray, world: int = 1) -> list[Rows]:
        """Micro-batches over Groups of these lengths (tokens), their number a multiple of `world`; some may be empty.

        A function of the lengths alone, so that every rank makes the same plan without a word.
        """
        lengths = np.asarray(longest, dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        if self.micro_size:
            chunks = [order[i : i + self.micro_size].tolist() for i in range(0, len(order), self.micro_size)]
            micros = [self._rows(chunk, lengths, max(self.micro_tokens, int(lengths[chunk].sum()))) for chunk in chunks]
        elif self.layout == "packed":
            rows = best_fit(order, lengths, self._capacity(lengths))
            per = 1 if self.one_row else max(1, self.micro_tokens // max(sum(lengths[r]) for r in rows))
            micros = [rows[i : i + per] for i in range(0, len(rows), per)]
        else:
            micros = self._padded(order, lengths)
        return _multiple(micros, world)

    def _capacity(self, lengths: np.ndarray) -> int:
        """Tokens of one packed row: the whole budget for kernels that skip other documents, else the longest example, for
        a masked kernel's cost grows with the square of the row."""
        longest = int(lengths.max())
        return max(longest, self.micro_tokens) if self.one_row else longest

    def _rows(self, chunk: list[int], lengths: np.ndarray, capacity: int) -> Rows:
        if self.layout == "padded":
            return [[i] for i in chunk]
        return best_fit(chunk, lengths, capacity if self.one_row else int(lengths[chunk].max()))

    def _padded(self, order: np.ndarray, lengths: np.ndarray) -> list[Rows]:
        """Cut the examples, longest first, where the padded tokens and the overhead of each forward sum to the least."""
        widths = lengths[order]
        cost, cut = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)
        for stop in range(1, len(order) + 1):
            first = max(0, stop - max(1, self.micro_tokens // int(widths[stop - 1])))
            starts = np.arange(first, stop)
            padded = (stop - starts) * widths[starts]
            total = np.where((padded <= self.micro_tokens) | (starts == stop - 1), cost[starts] + padded, np.inf)
            best = int(total.argmin())
            cost[stop], cut[stop] = total[best] + self.overhead_tokens, starts[best]
        stops, stop = [], len(order)
        while stop:
            stops.append(stop)
            stop = int(cut[stop])
        return [[[int(i)] for i in order[cut[stop] : stop]] for stop in reversed(stops)]


def best_fit(order: Sequence[int] | np.ndarray, lengths: np.ndarray, capacity: int) -> Rows:
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


def collate(groups: Sequence[TokenGroup], rows: Rows, layout: str, extra_padding: int = 0) -> Batch:
    """Tensors of one micro-batch. Only tokens after a row's first can be targets."""
    sequences = [[(g, k) for g in row for k in range(len(groups[g].responses))] for row in rows]
    if layout == "padded":
        sequences = [[item] for row in sequences for item in row]
    width = max(sum(groups[g].lengths[k] for g, k in row) for row in sequences) + extra_padding
    shape = (len(sequences), width)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments = np.full(shape, -1, np.int64)
    predict: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    response: list[np.ndarray] = []
    owner: list[int] = []
    trained: list[int] = []
    sizes: list[int] = []
    chars: list[int] = []
    for r, row in enumerate(sequences):
        at = 0
        for g, k in row:
            group, number = groups[g], len(owner)
            tokens = np.array(group.prompt + group.responses[k])
            stop = at + len(tokens)
            ids[r, at:stop], positions[r, at:stop], segments[r, at:stop] = tokens, np.arange(len(tokens)), number
            chosen = np.flatnonzero(group.masks[k]) + len(group.prompt)
            assert not len(chosen) or chosen[0] > 0, "a sequence's first token has nothing to be predicted from"
            predict.append(r * width + at + chosen - 1)
            targets.append(tokens[chosen])
            response.append(np.full(len(chosen), number))
            owner.append(g)
            trained.append(len(chosen))
            sizes.append(group.bytes[k])
            chars.append(group.chars[k])
            at = stop
        if layout == "padded":
            positions[r, at:] = np.arange(at, width)
    used = sorted(set(owner))
    rank = {g: i for i, g in enumerate(used)}
    return Batch(
        layout=layout,
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        predict=torch.from_numpy(np.concatenate(predict)),
        targets=torch.from_numpy(np.concatenate(targets)),
        response=torch.from_numpy(np.concatenate(response)),
        group=torch.tensor([rank[g] for g in owner]),
        trained_per_response=torch.tensor(trained),
        ids=[groups[g].id for g in used],
        clusters=[groups[g].cluster for g in used],
        bytes=np.array(sizes, dtype=np.float64),
        chars=np.array(chars, dtype=np.float64),
    )
