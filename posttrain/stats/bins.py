"""Calibration bins: the edges, who falls where, and the sums per example that every calibration score is made of."""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from posttrain.stats.identity import as_ids, cluster_sums
from posttrain.stats.inputs import Array, check_bins, vector

FINE = 64  # fine bins to each equal-mass bin
SLACK = 1e-6  # a float32 softmax may exceed 1 by this much


class BinSums(NamedTuple):
    """Per example and bin: items, Σ confidence, Σ correct; fp64 [D, B] each."""

    items: Array
    confidence: Array
    correct: Array


def bin_edges(bins: int, low: float = 0.0, high: float = 1.0) -> Array:
    """The bins + 1 edges of equal-width bins on [low, high], fp64, each with a single rounding.

    k/B on [0, 1] and (B+k)/(2B) on [.5, 1]: one division each. (linspace misplaces .3, .6 and .7.)
    """
    check_bins(bins)
    if not low < high:
        raise ValueError(f"low must be below high, got low={low}, high={high}; try 0 and 1, or 0.5 and 1 for pairs")
    return (bins * low + np.arange(bins + 1) * (high - low)) / bins


def bin_index(confidence: Any, bins: int = 15, low: float = 0.0, high: float = 1.0) -> Array:
    """Bin 0 .. bins-1 of each confidence (any shape): bin b is [edge b, edge b+1), the last one closed.

    Found by searching the edges, not by a floor formula, which misplaces values that lie on an edge.
    """
    edges = bin_edges(bins, low, high)
    values = np.asarray(confidence, dtype=np.float64)
    outside = ~((values >= low - SLACK) & (values <= high + SLACK))
    if outside.any():
        raise ValueError(
            f"confidence must lie in [{low:g}, {high:g}]; got {values[outside][0]} ({int(outside.sum())} such in all); "
            "try low=0, high=1, or fold pairs first with fold_pairs(margins)"
        )
    return np.searchsorted(edges[1:-1], values, side="right")


def fold_pairs(margins: Any) -> tuple[Array, Array]:
    """Confidence and correctness [P] of a preference model from its margins h [P], chosen minus rejected.

    The label is always "chosen wins", so pairs are folded: confidence σ(|h|), on [.5, 1], is that of the answer the
    model prefers, and it is correct where h > 0; a tie is half correct. Use with low=.5, high=1.
    """
    h = vector("margins", margins)
    return expit(np.abs(h)), np.where(h > 0, 1.0, np.where(h == 0, 0.5, 0.0))


def bin_sums(
    confidence: Any,
    correct: Any,
    bins: int = 15,
    low: float = 0.0,
    high: float = 1.0,
    clusters: Any = None,
    equal_mass: bool = False,
) -> BinSums:
    """Sums per example and bin [D, B] of items with confidence [N] in [low, high] and correct [N] in [0, 1].

    clusters [N] names the example of each item; without it each item is an example of its own (D = N). equal_mass
    merges FINE * bins fine bins into at most `bins` of nearly equal counts. The result does not depend on the order of
    the items: they are sorted by value, the examples by name.
    """
    sure = vector("confidence", confidence)
    right = vector("correct", correct, len(sure), low=0)
    if len(right) and right.max() > 1:
        raise ValueError(f"correct must be between 0 and 1 (1 right, 0 wrong, 1/2 a tie); got {right.max():g}")
    group = np.zeros(len(sure)) if clusters is None else as_ids("clusters", clusters, len(sure))
    order = np.lexsort((right, sure, group))
    sure, right, group = sure[order], right[order], group[order]
    check_bins(bins)
    where = bin_index(sure, FINE * bins if equal_mass else bins, low, high)
    if equal_mass:
        starts = equal_mass_starts(np.bincount(where, minlength=FINE * bins), bins)
        where, bins = np.searchsorted(starts, where, side="right") - 1, len(starts)
    columns = {}
    for name, values in {"items": np.ones(len(sure)), "confidence": sure, "correct": right}.items():
        columns[name] = np.zeros((len(sure), bins))
        columns[name][np.arange(len(sure)), where] = values
    return BinSums(**(columns if clusters is None else cluster_sums(columns, group)))


def merge_equal_mass(sums: BinSums, bins: int = 15) -> BinSums:
    """Merge a fine histogram [D, F] into at most `bins` bins with nearly equal numbers of items.

    Nguyen & O'Connor (2015), arXiv:1508.05154 (adaptive binning). A fine bin is never split, so where many items
    share one the result has fewer, unequal bins.
    """
    starts = equal_mass_starts(sums.items.sum(axis=0), check_bins(bins))
    return BinSums(*(np.add.reduceat(column, starts, axis=1) for column in sums))


def equal_mass_starts(counts: Array, bins: int) -> Array:
    """The fine bins [<= bins] at which the merged ones begin, from the fine bins' counts [F]."""
    mass = np.cumsum(counts)
    cuts = np.searchsorted(mass, mass[-1] * np.arange(1, bins) / bins, side="left") + 1
    return np.unique(np.concatenate([[0], cuts[(cuts < len(mass)) & (mass[-1] > 0)]])).astype(np.int64)


def totals(sums: BinSums) -> BinSums:
    """Column sums [B], each correctly rounded (so free of any order)."""
    return BinSums(*(np.array([math.fsum(column) for column in part.T]) for part in sums))
