"""The micro-batches that a run's first steps would have, and the largest one that may come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posttrain.data.batches import Batch, collate
from posttrain.data.loader import Loader, Step, compose
from posttrain.data.packing import Packing
from posttrain.data.pipeline import Prepared
from posttrain.data.streaming.stream import StreamLoader
from posttrain.data.tokens import Examples, TokenGroup

if TYPE_CHECKING:
    from posttrain.config import Config

STEPS = 8
"""How many of the first steps are looked at."""


@dataclass
class Rehearsal:
    """steps: the first ones, this rank's share. first, later: the largest micro-batch, padding included, of those that a step
    begins with, and of those that find gradients of earlier ones; None where steps have but one."""

    steps: list[Step]
    first: Batch
    later: Batch | None

    @property
    def largest(self) -> Batch:
        return max((self.first, *([self.later] if self.later else [])), key=tokens_of)

    @property
    def sizes(self) -> list[list[int]]:
        """Tokens of every micro-batch, step by step."""
        return [[tokens_of(micro) for micro in step.micro_batches] for step in self.steps]

    @property
    def smallest(self) -> Batch:
        return min((micro for step in self.steps for micro in step.micro_batches), key=tokens_of)


def tokens_of(micro: Batch) -> int:
    """Padding included."""
    return micro.input_ids.numel()


def rehearse(cfg: Config, prepared: Prepared, loader: Loader | StreamLoader, steps: int) -> Rehearsal:
    """As the loader's packing would have them; a stream's are of the examples that were read to show one."""
    seen = 1 if cfg.stage.answer_tokens else STEPS  # answers that are all as long as they may be make equal iterations
    groups = _drawn(cfg, prepared, loader, min(seen, steps))
    packing, world = loader.packing, loader.world
    made = []
    for number, drawn in enumerate(groups):
        data = Examples(cfg.stage.rehearsed([_known(cfg, group) for group in drawn], packing.layout))
        made.append(compose(number, data, np.arange(len(data)), packing, 0, world))
    first = max((step.micro_batches[0] for step in made), key=tokens_of)
    later = max((micro for step in made for micro in step.micro_batches[1:]), key=tokens_of, default=None)
    return Rehearsal(made, _longest(cfg, prepared, packing, first), later)


def _drawn(cfg: Config, prepared: Prepared, loader: Loader | StreamLoader, steps: int) -> list[list[TokenGroup]]:
    """The Groups of each of the first steps."""
    if isinstance(loader, StreamLoader):
        size, shown = cfg.batch.size, len(prepared.train)
        if size is None:
            assert cfg.batch.tokens
            size = max(1, round(cfg.batch.tokens / float(prepared.train.lengths.mean())))
        return [prepared.train.groups(np.arange(size) % shown)]
    return [loader.data.groups(positions) for positions in loader.positions(0, steps)]


def _known(cfg: Config, group: TokenGroup) -> TokenGroup:
    """With room for the reference's log-probs, where the stage reads some."""
    if cfg.stage.needs_reference(False) != "never":
        group.reference = np.zeros(group.trained_tokens, dtype=np.float32)
    return group


def _longest(cfg: Config, prepared: Prepared, packing: Packing, first: Batch) -> Batch:
    """The longest training example, with which its step begins, if it alone is more than these steps begin with."""
    if cfg.stage.answer_tokens or not len(prepared.train):
        return first
    sizes = prepared.train.widths(packing.layout) * prepared.train.heights(packing.layout)
    if sizes.max() <= tokens_of(first):
        return first
    groups = [_known(cfg, group) for group in prepared.train.groups([int(sizes.argmax())])]
    return collate(groups, [[0]], packing.layout)
