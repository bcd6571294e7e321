"""Temperature scaling: the one number T that makes softmax(logits / T) fit best.

    nll(β) = Σ_t [logsumexp(β z_t) - β z_t,label],  β = 1/T              Guo et al. (2017), arXiv:1706.04599, sec. 4.2

nll is convex in β (not in T) and its slope Σ (E_β[z] - z_label) is monotone, so a bracketed root finder cannot miss.
Fitting lowers the nll of the half it was fitted on; it promises nothing about the ece.

Interval: T is an M-estimate; β's error is the sandwich sqrt(D/(D-1) Σ u_d²) / H, u_d example d's slope and H the
curvature, taken on the scale of log T, on which the interval is symmetric and stays positive.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from posttrain.stats.estimate import Estimate, nothing
from posttrain.stats.identity import as_ids, cluster_sums
from posttrain.stats.inputs import Array, check_finite, check_level
from posttrain.stats.intervals import FEW, linearised_se, t_quantile, z_quantile
from posttrain.stats.ratios import nll

T_BOUNDS = (0.05, 20.0)
CHUNK_LOGITS = 4_000_000  # logits taken to fp64 at a time


@dataclass(frozen=True)
class Temperature(Estimate):
    """The fitted T.

    at_bound    the best T lies at or beyond the end of the range searched: no interval, and not a T to use blindly
    nll_before  nats per item at T = 1, on the examples `report_on` names
    nll_after   the same at the fitted T
    report_on   "fitted" (the examples T was fitted on) or "held out"
    """

    at_bound: bool = False
    nll_before: Estimate | None = None
    nll_after: Estimate | None = None
    report_on: str = "fitted"


def fit_temperature(
    logits: Any, labels: Any, *, clusters: Any = None, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Temperature:
    """T in [.05, 20] that minimises the nll of logits [N, V] (any float type) under labels [N] (class numbers).

    clusters [N] names the example each item belongs to. nll_before and nll_after are those of the same items; to report
    on others, use `fit_temperature_on_grid`. No items give None; logits that are all equal leave T at 1.
    """
    check_level(level)
    z, y, names = _checked(logits, labels, clusters)
    if not len(y):
        return Temperature(**vars(nothing("temperature")))

    def slope(beta: float) -> float:
        return math.fsum(_moments(z, y, beta)[:, 1])

    beta, at_bound = minimise(slope, 1 / T_BOUNDS[1], 1 / T_BOUNDS[0])
    before, after = _by_cluster(_moments(z, y, 1.0), names), _by_cluster(_moments(z, y, beta), names)
    found = interval(beta, at_bound, after[:, 1], math.fsum(after[:, 2]), len(y), level)
    losses = [nll(part[:, 0], after[:, 3], level=level, resamples=resamples, seed=seed) for part in (before, after)]
    return Temperature(**vars(found), at_bound=at_bound, nll_before=losses[0], nll_after=losses[1])


def interval(beta: float, at_bound: bool, slopes: Array, curvature: float, n: float, level: float) -> Estimate:
    """T = 1/beta with its sandwich interval from the examples' slopes [D] at beta and the curvature Σ d²nll/dβ²."""
    size = len(slopes)
    error = linearised_se(slopes)
    if at_bound or error is None or curvature <= 0:
        why = "one example" if error is None else f"T = {1 / beta:g} is a bound" if at_bound else "T has no effect"
        return Estimate(1 / beta, None, None, None, int(n), size, f"{why}, no interval")
    relative = error / curvature / beta  # se of log T = se of log β
    half = relative * (t_quantile(level, size - 1) if size < FEW else z_quantile(level))
    method = "sandwich on log T" + (", t, few examples" if size < FEW else "")
    low, high = (math.exp(max(-700.0, min(700.0, end))) / beta for end in (-half, half))
    ends = max(low, min(T_BOUNDS[0], 1 / beta)), min(high, max(T_BOUNDS[1], 1 / beta))
    if ends != (low, high):
        method += ", cut at the range searched"
    return Estimate(1 / beta, *ends, relative / beta, int(n), size, method)


def minimise(slope: Callable[[float], float], low: float, high: float) -> tuple[float, bool]:
    """The root of an increasing slope in [low, high], and whether it lies at or beyond an end; 1 for a flat one."""
    at_low, at_high = slope(low), slope(high)
    if at_low == at_high == 0:
        return 1.0, False
    if at_low >= 0:
        return low, True
    if at_high <= 0:
        return high, True
    return float(brentq(slope, low, high, xtol=1e-12, rtol=1e-12)), False


def _moments(z: Array, y: Array, beta: float) -> Array:
    """[N, 4]: each item's nll at beta, its slope E_β[z] - z_label, its curvature Var_β[z], and a 1 to count it."""
    found = np.ones((len(y), 4))
    step = max(1, CHUNK_LOGITS // z.shape[1])
    for start in range(0, len(y), step):
        part = slice(start, start + step)
        logits = z[part].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        label = logits[np.arange(len(logits)), y[part]]
        total = logsumexp(beta * logits, axis=1)
        p = np.exp(beta * logits - total[:, None])
        mean = (p * logits).sum(axis=1)
        found[part, 0] = total - beta * label
        found[part, 1] = mean - label
        found[part, 2] = (p * (logits - mean[:, None]) ** 2).sum(axis=1)
    return found


def _by_cluster(rows: Array, names: Array | None) -> Array:
    if names is None:
        return rows
    order = np.lexsort(rows.T)  # the order of the items must not show in any digit
    return cluster_sums({"rows": rows[order]}, names[order])["rows"]


def _checked(logits: Any, labels: Any, clusters: Any) -> tuple[Array, Array, Array | None]:
    z, y = np.asarray(logits), np.asarray(labels)
    if z.ndim != 2 or z.shape[1] < 2:
        raise ValueError(f"logits must have shape (items, classes), two classes or more; got {z.shape}")
    if y.shape != (len(z),) or (y.size and y.dtype.kind not in "iub"):
        raise ValueError(f"labels must be {len(z)} whole numbers, the class of each item; got {y.dtype} {y.shape}")
    y = y.astype(np.int64)
    if y.size and not (y.min() >= 0 and y.max() < z.shape[1]):
        raise ValueError(f"labels must be in 0 .. {z.shape[1] - 1}; got {y.min()} to {y.max()}; drop masked items")
    check_finite("logits", z)
    return z, y, None if clusters is None else as_ids("clusters", clusters, len(y))
