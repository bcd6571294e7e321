"""Tests and their adjustment: McNemar, a two-sided p from value and se, Holm, the smallest detectable difference."""

from typing import Any

import numpy as np
from scipy.special import bdtr, ndtr, stdtr

from posttrain.stats.inputs import Array, vector

# z(.975) + z(.80): a true difference of this many standard errors is detected at 5 % in 80 % of cases.
DETECTABLE = 2.8015852


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test from the counts of discordant pairs. McNemar (1947), Psychometrika 12:153.

    Under no difference, only_a is binomial(only_a + only_b, 1/2); no discordant pairs give p = 1.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts must be 0 or more, got {only_a} and {only_b}")
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def two_sided_p(value: float, se: float, degrees: int | None = None) -> float:
    """P(|Z| >= |value/se|), Z normal or, with `degrees`, Student's; 1 for no difference at all."""
    if value == 0:
        return 1.0
    if se == 0:
        return 0.0
    t = -abs(value) / se
    return 2 * float(ndtr(t) if degrees is None else stdtr(degrees, t))


def smallest_detectable(se: float) -> float:
    """The difference that this standard error would show in 80 % of cases at the 5 % level: 2.8016 se."""
    if not se >= 0:
        raise ValueError(f"se must be 0 or more, got {se}")
    return DETECTABLE * se


def holm(p_values: Any) -> Array:
    """p-values [m] adjusted for m comparisons, in the order given. Holm (1979), Scand. J. Statistics 6:65.

    Rejecting where the adjusted p is below .05 keeps the chance of any false finding below 5 %, whatever their
    dependence. Use it for slices and for tables of many scores.
    """
    p = vector("p_values", p_values, low=0)
    if len(p) and p.max() > 1:
        raise ValueError(f"p_values must be between 0 and 1, got {p.max():g}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
