"""Calibration scores from confidences or from sums per example: ece, mce, Brier. The theory: calibration_error.py."""

from typing import Any

import numpy as np

from posttrain.stats.bins import BinSums, bin_index, bin_sums
from posttrain.stats.calibration_error import CalibrationError, ece_estimate, gaps, mce_estimate
from posttrain.stats.estimate import Estimate
from posttrain.stats.inputs import Array, check_level, check_resamples, vector
from posttrain.stats.ratios import pooled
from posttrain.stats.resampling import resampled_sums


def ece(
    confidence: Any,
    correct: Any,
    bins: int = 15,
    low: float = 0.0,
    high: float = 1.0,
    *,
    clusters: Any = None,
    equal_mass: bool = False,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> CalibrationError:
    """Expected calibration error of items with confidence [N] in [low, high] and correct [N] (1, 0, or 1/2 for a tie).

    clusters [N] names the example (document) each item belongs to; examples are resampled. equal_mass merges a fine
    histogram of 64 * bins into bins of nearly equal counts. se is the standard deviation of the draws. n is N. No items
    give value None. ValueError for a confidence outside [low, high].
    """
    sums = bin_sums(confidence, correct, bins, low, high, clusters, equal_mass)
    return ece_from_bins(*sums, level=level, resamples=resamples, seed=seed)


def mce(
    confidence: Any,
    correct: Any,
    bins: int = 15,
    low: float = 0.0,
    high: float = 1.0,
    *,
    clusters: Any = None,
    equal_mass: bool = False,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> CalibrationError:
    """Maximum calibration error, max_b |accuracy_b - confidence_b| over the bins that hold items; arguments as `ece`.

    A bin of two items can decide it: read it beside its noise floor.
    """
    sums = bin_sums(confidence, correct, bins, low, high, clusters, equal_mass)
    return mce_from_bins(*sums, level=level, resamples=resamples, seed=seed)


def brier(confidence: Any, correct: Any, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Mean of (confidence - correct)², items [N] each an example of its own. Brier (1950), Monthly Weather Review 78:1.

    Interval and se as `bootstrap`, the lower end not below 0.
    """
    bin_index(confidence, 1)
    sure = vector("confidence", confidence)
    squares = (sure - vector("correct", correct, len(sure), low=0)) ** 2
    return pooled(squares, np.ones(len(squares)), level, resamples, seed)


def ece_from_bins(
    bin_count: Any,
    bin_confidence: Any,
    bin_correct: Any,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> CalibrationError:
    """`ece` from sums per example and bin, [D, B] each: items, Σ confidence, Σ correct. Rows sorted by the caller."""
    check_level(level), check_resamples(resamples)
    sums = BinSums(*(np.asarray(part, np.float64) for part in (bin_count, bin_confidence, bin_correct)))
    return ece_estimate(sums, _resampled(sums, resamples, seed), level)


def mce_from_bins(
    bin_count: Any,
    bin_confidence: Any,
    bin_correct: Any,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> CalibrationError:
    """`mce` from sums per example and bin, [D, B] each."""
    check_level(level), check_resamples(resamples)
    sums = BinSums(*(np.asarray(part, np.float64) for part in (bin_count, bin_confidence, bin_correct)))
    return mce_estimate(sums, _resampled(sums, resamples, seed), level)


def _resampled(sums: BinSums, resamples: int, seed: int) -> tuple[Array, Array]:
    bins = sums.items.shape[1]
    if not len(sums.items):
        return np.empty((0, bins)), np.empty((0, bins))
    drawn = resampled_sums(np.concatenate([gaps(sums), sums.items], axis=1), resamples, seed)
    return drawn[:, :bins], drawn[:, bins:]
