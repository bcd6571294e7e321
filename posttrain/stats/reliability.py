"""The reliability diagram's numbers: how often the items of each confidence bin came true."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.stats.bins import BinSums, bin_edges
from posttrain.stats.estimate import Estimate, Number
from posttrain.stats.inputs import check_level, table
from posttrain.stats.intervals import clustered_wilson, linearised_se, z_quantile


@dataclass(frozen=True)
class ReliabilityBin:
    """One bar: items with confidence in [low, high).

    confidence  mean confidence; None in an empty bin
    accuracy    share correct, with Wilson's interval (for clusters)
    noise       half-width around the diagonal within which the bin's accuracy would fall if it were calibrated
                (at the level asked for); None where fewer than two examples reach the bin
    """

    low: float
    high: float
    items: int
    confidence: Number
    accuracy: Estimate
    noise: Number


def reliability(
    bin_count: Any, bin_confidence: Any, bin_correct: Any, low: float = 0.0, high: float = 1.0, level: float = 0.95
) -> list[ReliabilityBin]:
    """A reliability diagram's bins from sums per example and bin, [D, B] each, over equal-width bins on [low, high].

    From raw confidences: `reliability(*bin_sums(confidence, correct, bins))`. For bins of equal mass
    (`merge_equal_mass`) the edges reported are not those of the bins: use each bin's mean confidence instead.
    """
    check_level(level)
    shape = np.shape(bin_count)
    if len(shape) != 2:
        raise ValueError(f"bin_count must have shape (examples, bins); got {shape}; try the output of bin_sums")
    parts = {"bin_count": bin_count, "bin_confidence": bin_confidence, "bin_correct": bin_correct}
    sums = BinSums(*(table(name, part, (shape[0], shape[1])) for name, part in parts.items()))
    edges = bin_edges(shape[1], low, high)
    return [_bar(sums, at, float(edges[at]), float(edges[at + 1]), level) for at in range(shape[1])]


def _bar(sums: BinSums, at: int, low: float, high: float, level: float) -> ReliabilityBin:
    items, confidence, correct = (part[:, at] for part in sums)
    accuracy = clustered_wilson(correct, items, level)
    count = items.sum()
    if not count:
        return ReliabilityBin(low, high, 0, None, accuracy, None)
    gap = correct - confidence
    here = items > 0
    se = linearised_se((gap - gap.sum() / count * items)[here] / count)
    noise = None if se is None else z_quantile(level) * se
    return ReliabilityBin(low, high, int(count), float(confidence.sum() / count), accuracy, noise)
