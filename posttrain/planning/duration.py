"""From what one layer takes to the seconds of a step, of an evaluation and of the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.planning.calibrate import MicroSeconds, Seconds


@dataclass(frozen=True)
class Pace:
    """micro: measured micro-batches, of different sizes. scoring: what the largest takes outside the layers in an evaluation.
    update: of the optimizer, once a step. recomputes: gradient checkpointing goes forward through each layer twice."""

    micro: Sequence[MicroSeconds]
    scoring: Seconds
    update: Seconds
    recomputes: bool

    def step(self, sizes: Sequence[int]) -> Seconds:
        """One optimizer step over micro-batches of these sizes in tokens."""
        return self.update.plus(*(self._between(size, [self._train(m) for m in self.micro]) for size in sizes))

    def reading(self, tokens: float) -> Seconds:
        """Forward passes over so many tokens in all, in micro-batches of the largest size."""
        largest = max(self.micro, key=lambda m: m.tokens)
        return largest.forward.plus(self.scoring).times(tokens / largest.tokens)

    def _train(self, micro: MicroSeconds) -> Seconds:
        again = micro.forward if self.recomputes else Seconds()
        return micro.forward.plus(again, micro.backward, micro.outside)

    def _between(self, size: int, known: Sequence[Seconds]) -> Seconds:
        """Interpolated between the measured sizes; in proportion beyond them."""
        order = np.argsort([m.tokens for m in self.micro])
        tokens = np.array([self.micro[i].tokens for i in order], dtype=float)
        value, spread = (
            float(np.interp(size, tokens, [getattr(known[i], name) for i in order])) for name in ("value", "spread")
        )
        return Seconds(value, spread).times(size / float(np.clip(size, tokens[0], tokens[-1])))


def evaluations(steps: int, eval_every: int | None) -> int:
    """How often a run of so many steps evaluates: before the first step, every eval_every (null: a fifth), and at the end."""
    every = eval_every or max(1, -(-steps // 5))
    return 1 + -(-steps // every)


def mean(parts: Sequence[Seconds]) -> Seconds:
    return Seconds().plus(*parts).times(1 / len(parts)) if parts else Seconds()


def clock(seconds: float) -> str:
    """Seconds below a minute, m:ss below an hour, else h:mm."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes}:{rest:02d} min"
