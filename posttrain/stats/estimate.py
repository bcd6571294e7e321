"""One number with its uncertainty: what every function of `posttrain.stats` returns."""

import math
from dataclasses import dataclass

import numpy as np

Number = float | None


@dataclass(frozen=True)
class Estimate:
    """A score, its interval and how both were found.

    value      the score; None where there was nothing to score (n = 0), never NaN and never 0
    low, high  ends of the interval at the level asked for; None where no interval can be had (one example; overflow)
    se         standard error, in the units of `value`
    n          items scored, in the units of the score's denominator (tokens, bytes, pairs, answers)
    clusters   independent examples (documents, prompts, pair groups) the items came from; this is what the width
               of the interval depends on
    method     how low and high were found, in words
    """

    value: Number
    low: Number
    high: Number
    se: Number
    n: int
    clusters: int
    method: str

    def __post_init__(self) -> None:
        for name in ("value", "low", "high", "se"):
            number = getattr(self, name)
            if number is not None:
                assert math.isfinite(number), f"{name} is {number}: a missing number is None"
                object.__setattr__(self, name, float(number))
        object.__setattr__(self, "n", int(self.n))
        object.__setattr__(self, "clusters", int(self.clusters))

    def as_dict(self) -> dict[str, float | int | str | None]:
        """The seven fields, as metrics.jsonl stores them: JSON-ready, null for what is missing."""
        return {name: getattr(self, name) for name in ("value", "low", "high", "se", "n", "clusters", "method")}

    def __str__(self) -> str:
        if self.value is None:
            return "no items"
        if self.low is None or self.high is None:
            return f"{self.value:.6g} [{self.method}]"
        return f"{self.value:.6g} [{self.low:.6g}, {self.high:.6g}]"


def finite(number: float) -> Number:
    """`number` as a float, or None where it is NaN or infinite (an exponential that overflowed, say)."""
    return float(number) if np.isfinite(number) else None


def nothing(method: str, clusters: int = 0) -> Estimate:
    """The estimate of a score over no items."""
    return Estimate(None, None, None, None, 0, clusters, method)
