"""Calibration: does a confidence of 80 % come true in 80 % of cases?  Expected and maximum calibration error, Brier.

    ece = Σ_b (n_b/N) |accuracy_b - confidence_b| = Σ_b |g_b|,   g_b = (Σ correct - Σ confidence in bin b) / N
                                                                  Naeini et al. (2015), AAAI; Guo et al. (2017), eq. 3

The plug-in ece is biased upward: even a calibrated model shows Σ|noise|, and no percentile interval of it covers 0.
So the draws are centred: Σ_b |g*_b - g_b| over resamples of the examples is the ece of a calibrated model with this
much data. Its mean is the noise floor; where it exceeds the ece seen in more than 5 % of resamples, 0 is in the
interval. Otherwise the interval is the basic one, [2 ece - q_hi, 2 ece - q_lo]. Departure from the basic interval:
the upper end is at least the value itself.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import erf

from posttrain.stats.bins import BinSums, totals
from posttrain.stats.estimate import Estimate, Number
from posttrain.stats.inputs import Array
from posttrain.stats.intervals import FEW, percentile_bounds
from posttrain.stats.scores import Score, divide


@dataclass(frozen=True)
class CalibrationError(Estimate):
    """An ece or mce with what is needed to read it.

    noise_floor  what a calibrated model would show on average with this much data
    p_value      how often a calibrated model would show as much; above .05 the lower limit is 0
    debiased     the ece less its expected bias (None for mce)
    """

    noise_floor: Number = None
    p_value: Number = None
    debiased: Number = None


def gaps(sums: BinSums) -> Array:
    """Σ correct - Σ confidence per example and bin [D, B]: with the counts all that resampling needs."""
    return sums.correct - sums.confidence


def ece_estimate(sums: BinSums, draws: tuple[Array, Array], level: float) -> CalibrationError:
    """ece with its corrected interval from sums [D, B] and resampled (gaps [R, B], counts [R, B])."""
    whole = totals(sums)
    items = math.fsum(whole.items)
    if items == 0:
        return _nothing(len(sums.items))
    g = np.array([math.fsum(column) for column in gaps(sums).T]) / items  # [B]
    drawn = _per_item(draws)  # [R, B]
    value = math.fsum(np.abs(g))
    found = _corrected(value, np.abs(drawn).sum(1), np.abs(drawn - g).sum(1), int(items), len(sums.items), level)
    return CalibrationError(**{**vars(found), "debiased": _debiased(sums, g, items, value)})


def mce_estimate(sums: BinSums, draws: tuple[Array, Array], level: float) -> CalibrationError:
    """mce with its corrected interval from sums [D, B] and resampled (gaps [R, B], counts [R, B])."""
    whole = totals(sums)
    held = whole.items > 0
    if not held.any():
        return _nothing(len(sums.items))
    gap = np.array([math.fsum(column) for column in gaps(sums).T])[held] / whole.items[held]  # [bins that hold items]
    drawn = np.divide(
        draws[0][:, held],
        draws[1][:, held],
        out=np.broadcast_to(gap, draws[0][:, held].shape).copy(),
        where=draws[1][:, held] > 0,
    )  # a bin that a resample left empty says nothing new: it stays where it was
    top = np.abs(drawn).max(1)
    return _corrected(
        float(np.abs(gap).max()), top, np.abs(drawn - gap).max(1), int(whole.items.sum()), len(sums.items), level
    )


def ece_score(sums: BinSums, draws: tuple[Array, Array]) -> Score | None:
    """ece as a Score, for differences: it has no useful linearisation near 0, so its influence is empty."""
    items = math.fsum(sums.items.sum(axis=0))
    if items == 0:
        return None
    g = np.array([math.fsum(column) for column in gaps(sums).T]) / items
    return Score(math.fsum(np.abs(g)), np.empty(0), np.abs(_per_item(draws)).sum(1))


def _per_item(draws: tuple[Array, Array]) -> Array:
    items = draws[1].sum(axis=1)
    return np.stack([divide(column, items) for column in draws[0].T], axis=1)


def _corrected(value: float, drawn: Array, null: Array, n: int, clusters: int, level: float) -> CalibrationError:
    kept = ~np.isnan(drawn)
    drawn, null = drawn[kept], null[kept]
    if clusters < 2 or not len(drawn):
        return CalibrationError(value, None, None, None, n, clusters, "one example, no interval")
    p_value = (1 + int((null >= value).sum())) / (1 + len(null))
    q_low, q_high = percentile_bounds(drawn, level)
    low = 0.0 if p_value > 1 - level else min(value, max(0.0, 2 * value - q_high))
    high = min(1.0, max(value, 2 * value - q_low))
    method = "basic bootstrap with a centred null" + (", few examples" if clusters < FEW else "")
    return CalibrationError(
        value,
        low,
        high,
        float(drawn.std(ddof=1)),
        n,
        clusters,
        method,
        noise_floor=float(null.mean()),
        p_value=p_value,
    )


def _debiased(sums: BinSums, g: Array, items: float, value: float) -> Number:
    """ece less Σ_b (E|N(g_b, se_b)| - |g_b|), at least 0: Kumar, Liang & Ma (2019), arXiv:1909.10155, app. on L1."""
    size = len(sums.items)
    if size < 2:
        return None
    influence = (gaps(sums) - g * sums.items.sum(axis=1, keepdims=True)) / items  # [D, B]
    se = np.sqrt(size / (size - 1) * (influence**2).sum(axis=0))
    safe = np.where(se > 0, se, 1.0)
    folded = safe * math.sqrt(2 / math.pi) * np.exp(-((g / safe) ** 2) / 2) + g * erf(g / safe / math.sqrt(2))
    return max(0.0, value - float(np.where(se > 0, folded - np.abs(g), 0.0).sum()))


def _nothing(clusters: int) -> CalibrationError:
    return CalibrationError(None, None, None, None, 0, clusters, "basic bootstrap with a centred null")
