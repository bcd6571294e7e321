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
    """steps: the first ones, this rank's share. largest: the micro-batch with the most tokens, padding included."""

    steps: list[Step]
    largest: Batch

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches on a rank."""
        return any(len(step.micro_batches) > 1 for step in self.steps)

    @property
    def sizes(self) -> list[list[int]]:
        """Tokens of every micro-batch, step by step."""
        return [[micro.input_ids.numel() for micro in step.micro_batches] for step in self.steps]

    def samples(self) -> list[Batch]:
        """The smallest, the middle and the largest micro-batch: between them times are interpolated."""
        every = sorted((m for step in self.steps for m in step.micro_batches), key=lambda m: m.input_ids.numel())
        chosen = [every[0], every[len(every) // 2], self.largest]
        return list({micro.input_ids.numel(): micro for micro in chosen}.values())


def rehearse(cfg: Config, prepared: Prepared, loader: Loader | StreamLoader, steps: int) -> Rehearsal:
    """As the loader's packing would have them; a stream's are of the examples that were read to show one."""
    seen = 1 if cfg.stage.answer_tokens else STEPS  # answers that are all as long as they may be make equal iterations
    groups = _drawn(cfg, prepared, loader, min(seen, steps))
    packing, world = loader.packing, loader.world
    made = []
    for number, drawn in enumerate(groups):
        data = Examples(cfg.stage.rehearsed([_known(cfg, group) for group in drawn], packing.layout))
        made.append(compose(number, data, np.arange(len(data)), packing, 0, world))
    largest = max((m for step in made for m in step.micro_batches), key=lambda m: m.input_ids.numel())
    return Rehearsal(made, _longest(cfg, prepared, packing, largest))


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


def _longest(cfg: Config, prepared: Prepared, packing: Packing, largest: Batch) -> Batch:
    """The longest training example has a forward of its own if it alone is more than the largest of the first steps."""
    if cfg.stage.answer_tokens or not len(prepared.train):
        return largest
    sizes = prepared.train.widths(packing.layout) * prepared.train.heights(packing.layout)
    if sizes.max() <= largest.input_ids.numel():
        return largest
    groups = [_known(cfg, group) for group in prepared.train.groups([int(sizes.argmax())])]
    return collate(groups, [[0]], packing.layout)
