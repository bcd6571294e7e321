"""What goes on from one iteration of ppo to the next, and how its steps are counted off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass
class Controls:
    """What goes on from one iteration to the next. rewards: count, mean and sum of squared deviations of all so far."""

    beta: float
    iteration: int = 0
    rewards: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def normalised(self, scores: Tensor) -> Tensor:
        """Scores [B] less the mean and over the deviation of all so far, these included (Welford's sums); NaN stays."""
        known = scores[~scores.isnan()]
        count, mean, squares = self.rewards
        for value in known.tolist():
            count, before = count + 1, mean
            mean += (value - mean) / count
            squares += (value - before) * (value - mean)
        self.rewards[:] = count, mean, squares
        return (scores - mean) / ((squares / max(count - 1, 1)) ** 0.5 + 1e-8)


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each with whether it is the last, known once the next has been asked for."""
    found = iter(items)
    for item in found:
        for after in found:
            yield item, False
            item = after
        yield item, True
