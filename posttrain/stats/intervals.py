"""Intervals from a formula (Wilson, Wald, Wilson for clusters, Student's t), and the one read off bootstrap draws."""

import math
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

from posttrain.stats.estimate import Estimate, Number, nothing
from posttrain.stats.identity import as_ids, cluster_sums
from posttrain.stats.inputs import Array, check_level

FEW = 30  # below this many examples the percentile bootstrap is too narrow: Student's t takes its place


def z_quantile(level: float) -> float:
    """z with P(|Z| <= z) = level: 1.959964 at 95 %."""
    return float(ndtri((1 + check_level(level)) / 2))


def t_quantile(level: float, degrees: int) -> float:
    return float(stdtrit(degrees, (1 + check_level(level)) / 2))


def wilson(successes: float, n: float, level: float = 0.95) -> Estimate:
    """A proportion of n independent items with Wilson's score interval.

    Wilson (1927), JASA 22:209; the default recommended by Brown, Cai & DasGupta (2001), Statistical Science 16:101.
    `successes` may hold halves (a tie counts 1/2). se is sqrt(p(1-p)/n). n = 0 gives value None.
    """
    _check_proportion(successes, n)
    if n == 0:
        return nothing("wilson")
    p = successes / n
    low, high = wilson_bounds(p, n, z_quantile(level))
    return Estimate(p, low, high, math.sqrt(p * (1 - p) / n), int(n), int(n), "wilson")


def wald(successes: float, n: float, level: float = 0.95) -> Estimate:
    """A proportion of n independent items with p ± z sqrt(p(1-p)/n), the textbook interval, for comparison.

    Too narrow near 0 and 1 (of no width at 0 and 1); not cut to [0, 1]. Prefer `wilson`. n = 0 gives value None.
    """
    _check_proportion(successes, n)
    if n == 0:
        return nothing("wald")
    p = successes / n
    se = math.sqrt(p * (1 - p) / n)
    z = z_quantile(level)
    return Estimate(p, p - z * se, p + z * se, se, int(n), int(n), "wald")


def wilson_bounds(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's interval for a proportion p of n items (n need not be whole); exactly 0 or 1 where p is."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if p <= 0 else min(p, centre - half)), (1.0 if p >= 1 else max(p, centre + half))


def clustered_wilson(successes: Any, n: Any, level: float = 0.95) -> Estimate:
    """A proportion whose items come in clusters: successes [D] of n [D] items in each of D examples.

    Wilson with the effective number of items n_eff = p(1-p)/SE², SE the linearised error of the ratio; at p = 0 or 1
    n_eff is the number of clusters. n_eff is never above the number of items, and below 30 clusters z is replaced by
    t with D-1 degrees. Korn & Graubard (1998), Survey Methodology 24:193. Plain Wilson where every cluster is one item.
    """
    hits, items = np.asarray(successes, np.float64), np.asarray(n, np.float64)
    hits, items = hits[items > 0], items[items > 0]
    clusters, total = len(hits), math.fsum(items)
    _check_proportion(math.fsum(hits), total)
    if total == 0:
        return nothing("clustered wilson")
    p = min(1.0, math.fsum(hits) / total)
    if (items == 1).all() and np.isin(hits, (0.0, 1.0)).all():
        return wilson(math.fsum(hits), total, level)
    se = linearised_se((hits - p * items) / total)
    n_eff = float(clusters)
    if 0 < p < 1 and se is not None:
        n_eff = min(total, p * (1 - p) / se**2) if se > 0 else total
    few = 2 <= clusters < FEW
    low, high = wilson_bounds(p, n_eff, t_quantile(level, clusters - 1) if few else z_quantile(level))
    return Estimate(p, low, high, se, int(total), clusters, "clustered wilson" + (", t, few examples" if few else ""))


def accuracy(right: Any, clusters: Any, level: float = 0.95) -> Estimate:
    """Share of right answers [D], 1 or 0 and NaN where none was asked for; rows of one cluster [D] are one observation."""
    hits = np.asarray(right, np.float64)
    known = ~np.isnan(hits)
    if not known.any():
        return nothing("clustered wilson")
    columns = {"hits": hits[known], "items": np.ones(int(known.sum()))}
    sums = cluster_sums(columns, as_ids("clusters", clusters, len(hits))[known])
    return clustered_wilson(sums["hits"], sums["items"], level)


def linearised_se(influence: Array) -> Number:
    """sqrt(D/(D-1) Σ e_d²), e_d [D] what example d moves the score by; None for fewer than two examples.

    For a ratio R = ΣS/ΣL, e_d = (S_d - R L_d)/ΣL: Cochran (1977), Sampling Techniques, ch. 6.
    """
    size = len(influence)
    if size < 2:
        return None
    return math.sqrt(size / (size - 1) * math.fsum(np.square(influence)))  # exact: free of order


def t_bounds(value: float, se: float, clusters: int, level: float) -> tuple[float, float]:
    half = t_quantile(level, clusters - 1) * se
    return value - half, value + half


def percentile_bounds(draws: Array, level: float) -> tuple[float, float]:
    """The (1-level)/2 and (1+level)/2 quantiles of the draws [R]. Efron & Tibshirani (1993), ch. 13."""
    tail = (1 - check_level(level)) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _check_proportion(successes: float, n: float) -> None:
    if not (n >= 0 and math.isfinite(n)):
        raise ValueError(f"n must be a number of items, 0 or more; got {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n = {n:g}; got {successes}; were the arguments swapped?")
