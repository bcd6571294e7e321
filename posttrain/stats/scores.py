"""A score seen in the three ways its uncertainty needs: the value, each example's influence, the bootstrap draws."""

import math
from dataclasses import dataclass

import numpy as np

from posttrain.stats.estimate import Estimate, Number, finite, nothing
from posttrain.stats.inputs import Array
from posttrain.stats.intervals import FEW, linearised_se, percentile_bounds, t_bounds


@dataclass(frozen=True)
class Score:
    """value; influence [D], what each example moves it by (its linearised error); draws [R] over the resamples.

    Draws are NaN for a resample that holds nothing to divide by.
    """

    value: float
    influence: Array
    draws: Array

    def times(self, factor: float) -> "Score":
        return Score(self.value * factor, self.influence * factor, self.draws * factor)

    def minus(self, other: "Score") -> "Score":
        """The paired difference: examples and resamples must be the same on both sides."""
        return Score(self.value - other.value, self.influence - other.influence, self.draws - other.draws)

    def exp(self) -> "Score":
        """exp of the score; the influence by the delta method. Inf where it overflows."""
        with np.errstate(over="ignore", invalid="ignore"):
            value = float(np.exp(self.value))
            return Score(value, self.influence * value, np.exp(self.draws))


def ratio(numerators: Array, denominators: Array, sums: Array) -> Score | None:
    """R = ΣS/ΣL over S, L [D], with resampled sums [R, 2] of both; None where ΣL = 0."""
    total = math.fsum(denominators)
    if total == 0:
        return None
    value = math.fsum(numerators) / total
    return Score(value, (numerators - value * denominators) / total, divide(sums[:, 0], sums[:, 1]))


def divide(numerators: Array, denominators: Array) -> Array:
    """Elementwise quotient, NaN where the denominator is 0."""
    return np.divide(numerators, denominators, out=np.full(len(numerators), np.nan), where=denominators != 0)


def estimate(score: Score | None, n: float, clusters: int, level: float, least: Number = None) -> Estimate:
    """Linearised se; percentile bootstrap interval; Student's t with D-1 degrees below 30 examples.

    `least` is a bound the score cannot fall below (0 for an nll): the lower end is not let past it.
    """
    if score is None or clusters == 0:
        return nothing("percentile bootstrap", clusters)
    value, se = score.value, linearised_se(score.influence)
    low: Number
    high: Number
    if se is None:
        low, high, method = None, None, "one example, no interval"
    elif se <= 1e-12 * abs(value):  # every example agrees: rounding would be the whole width
        low, high, method = value, value, "no variation between examples"
    elif clusters < FEW:
        low, high = (finite(end) for end in t_bounds(value, se, clusters, level))
        method = "t, few examples"
    else:
        low, high, method = percentile(score.draws, level)
    if least is not None and low is not None:
        low = min(value, max(low, least))
    return Estimate(value, low, high, None if se is None else finite(se), int(n), clusters, method)


def percentile(draws: Array, level: float) -> tuple[Number, Number, str]:
    """Percentile interval over the draws that exist, saying how many do not."""
    kept = draws[~np.isnan(draws)]
    if not len(kept):
        return None, None, "percentile bootstrap, every resample empty"
    low, high = percentile_bounds(kept, level)
    lost = len(draws) - len(kept)
    note = f", {lost} empty resamples left out" if lost else ""
    return finite(low), finite(high), "percentile bootstrap" + note


def exponentiated(of: Estimate) -> Estimate:
    """exp of a score and of its interval's ends; se by the delta method, exp(value) se."""
    if of.value is None:
        return of

    def exp(number: Number) -> Number:
        return None if number is None or number > 709.78 else math.exp(number)

    value = exp(of.value)
    se = None if of.se is None or value is None else finite(of.se * value)
    note = "" if value is not None else ", too large for a float"
    return Estimate(value, exp(of.low), exp(of.high), se, of.n, of.clusters, of.method + note)


def scaled(of: Estimate, factor: float) -> Estimate:
    """The same score in other units (factor > 0)."""

    def times(number: Number) -> Number:
        return None if number is None else number * factor

    return Estimate(times(of.value), times(of.low), times(of.high), times(of.se), of.n, of.clusters, of.method)
