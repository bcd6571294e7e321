"""Bootstrap intervals of means and ratios, and the perplexity family."""

import math
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from posttrain.stats.estimate import Estimate, finite
from posttrain.stats.inputs import Array, check_level, check_resamples, vector
from posttrain.stats.intervals import percentile_bounds
from posttrain.stats.resampling import resampled_sums
from posttrain.stats.scores import Score, estimate, exponentiated, percentile, ratio, scaled

METHODS = ("auto", "percentile", "bca")


def bootstrap(
    numerators: Any,
    denominators: Any = None,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    method: str = "auto",
) -> Estimate:
    """Mean of numerators [D], or the ratio Σ numerators / Σ denominators [D], over D independent examples.

    method  "auto": percentile bootstrap, Student's t below 30 examples; "percentile" or "bca" always
    se is the linearised one (see `linearised_se`); n and clusters are D; D = 0 or Σ denominators = 0 gives None.
    Rows are sorted by value first, so their order does not show in any bit. Examples are resampled, never the items
    inside them. BCa: Efron (1987), JASA 82:171. ValueError for lengths that differ and for numbers that are not finite.
    """
    check_level(level), check_resamples(resamples)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    above = vector("numerators", numerators)
    below = np.ones(len(above)) if denominators is None else vector("denominators", denominators, len(above), low=0)
    score = _ratio_of_rows(above, below, resamples, seed)
    found = estimate(score, len(above), len(above), level)
    if method == "auto" or score is None or not found.se:
        return found
    if method == "bca":
        low, high = bca_bounds(score, _leave_one_out(above, below), level)
        return Estimate(score.value, low, high, found.se, found.n, found.clusters, "BCa bootstrap")
    low_, high_, name = percentile(score.draws, level)
    return Estimate(score.value, low_, high_, found.se, found.n, found.clusters, name)


def _ratio_of_rows(numerators: Array, denominators: Array, resamples: int, seed: int) -> Score | None:
    if not len(numerators):
        return None
    order = np.lexsort((denominators, numerators))
    rows = np.stack([numerators[order], denominators[order]], axis=1)
    return ratio(rows[:, 0], rows[:, 1], resampled_sums(rows, resamples, seed))


def _leave_one_out(numerators: Array, denominators: Array) -> Array:
    below = denominators.sum() - denominators
    if (below == 0).any():
        raise ValueError("bca needs more than one example with a denominator above 0; try method='percentile'")
    return (numerators.sum() - numerators) / below


def bca_bounds(score: Score, leave_one_out: Array, level: float) -> tuple[float | None, float | None]:
    """Bias-corrected and accelerated interval from the draws [R] and the leave-one-out values [D].

    Efron & Tibshirani (1993), eq. 14.9, 14.14, 14.15; ties with the value count one half, as in scipy.
    """
    draws = score.draws[~np.isnan(score.draws)]
    below = ((draws < score.value).mean() + (draws <= score.value).mean()) / 2
    gaps = leave_one_out.mean() - leave_one_out
    acceleration = (gaps**3).sum() / (6 * (gaps**2).sum() ** 1.5)
    shift = ndtri(below)
    tail = ndtri((1 - level) / 2)
    if not np.isfinite(shift):  # every draw on one side of the value: BCa has nothing to correct with
        low, high = percentile_bounds(draws, level)
        return finite(low), finite(high)
    ends = [ndtr(shift + (shift + z) / (1 - acceleration * (shift + z))) for z in (tail, -tail)]
    low, high = np.quantile(draws, ends)
    return finite(low), finite(high)


def nll(nll_sums: Any, token_counts: Any, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Negative log-likelihood in nats per token, Σ nll_sums / Σ token_counts, both [D], a row an example.

    Pooled over tokens, never a mean of means. n is the number of tokens, clusters the number of examples.
    Interval over examples: see `bootstrap`. No tokens gives None.
    """
    return _per_unit("token_counts", nll_sums, token_counts, level, resamples, seed)


def perplexity(
    nll_sums: Any, token_counts: Any, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """exp(nll): its interval is the exponential of nll's interval, its se the delta method's, perplexity · se(nll)."""
    return exponentiated(nll(nll_sums, token_counts, level=level, resamples=resamples, seed=seed))


def bits_per_token(
    nll_sums: Any, token_counts: Any, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """nll / ln 2: bits per token."""
    return scaled(nll(nll_sums, token_counts, level=level, resamples=resamples, seed=seed), 1 / math.log(2))


def bits_per_byte(
    nll_sums: Any, byte_counts: Any, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Σ nll_sums / (ln 2 Σ byte_counts), [D] each: bits per UTF-8 byte of text, comparable between tokenizers.

    Special tokens have 0 bytes. n is the number of bytes.
    """
    return scaled(_per_unit("byte_counts", nll_sums, byte_counts, level, resamples, seed), 1 / math.log(2))


def bits_per_char(
    nll_sums: Any, char_counts: Any, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Σ nll_sums / (ln 2 Σ char_counts), [D] each: bits per Unicode character. n is the number of characters."""
    return scaled(_per_unit("char_counts", nll_sums, char_counts, level, resamples, seed), 1 / math.log(2))


def _per_unit(name: str, nll_sums: Any, counts: Any, level: float, resamples: int, seed: int) -> Estimate:
    above = vector("nll_sums", nll_sums)
    return pooled(above, vector(name, counts, len(above), low=0), level, resamples, seed)


def pooled(numerators: Array, denominators: Array, level: float, resamples: int, seed: int) -> Estimate:
    """Σ numerators / Σ denominators of a score that cannot be negative; n is Σ denominators."""
    check_level(level), check_resamples(resamples)
    score = _ratio_of_rows(numerators, denominators, resamples, seed)
    return estimate(score, denominators.sum(), len(numerators), level, least=0.0)
