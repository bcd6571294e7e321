"""Temperature without logits: from sums per document on a grid of β, fitted on one half of the documents, told on the
other.

An evaluation pass keeps, per document, Σ logsumexp(β z) and its derivative Σ E_β[z] at each β of the grid, and
Σ z_label. Between the grid's points nll is the cubic Hermite interpolant in log β.
"""

import math
from typing import Any

import numpy as np
from scipy.interpolate import CubicHermiteSpline, CubicSpline

from posttrain.stats.calibration import ece_from_bins
from posttrain.stats.calibration_error import CalibrationError
from posttrain.stats.estimate import nothing
from posttrain.stats.fine_bins import BINS, equal_width
from posttrain.stats.identity import as_ids, cluster_sums, sort_by_id
from posttrain.stats.inputs import Array, check_finite, check_level, table, vector
from posttrain.stats.ratios import nll
from posttrain.stats.temperature import Temperature, interval, minimise


def temperature_grid(points: int = 17, low: float = 0.25, high: float = 4.0) -> Array:
    """β = 1/T at which an evaluation keeps its sums: `points` of them, evenly spaced in log β on [low, high]; β = 1
    is among them for an odd number on a range symmetric about 1."""
    if points < 4 or not 0 < low < high:
        raise ValueError(
            f"a grid needs 4 points or more and 0 < low < high; got {points}, {low}, {high}; try 17, 1/4, 4"
        )
    return np.exp(np.linspace(math.log(low), math.log(high), points))


def fit_temperature_on_grid(
    betas: Any,
    logsumexp: Any,
    slope: Any,
    label_logit: Any,
    tokens: Any,
    ids: Any,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Temperature:
    """T from betas [G] and, per document, Σ logsumexp(βz) [D, G], its derivative Σ E_β[z] [D, G], Σ z_label [D] and
    the number of tokens [D].

    The documents, sorted by ids [D], are split in halves by the seed. T, its interval, n and clusters come from the
    first half; nll_before and nll_after from the second. A best T outside the grid sets at_bound. Fewer than two
    documents give None.
    """
    check_level(level)
    grid, sums = _checked(betas, logsumexp, slope, label_logit, tokens, ids)
    size = len(sums["tokens"])
    if size < 2 or not sums["tokens"].any():
        return Temperature(**vars(nothing("temperature needs two documents, to fit on and to report on", size)))
    fit, held = _halves(size, seed)
    x = np.log(grid)
    beta, at_bound = _fit(x, {name: column[fit].sum(axis=0) for name, column in sums.items()})
    slopes = CubicSpline(x, sums["slope"][fit], axis=1)
    curvature = float(slopes(math.log(beta), 1).sum()) / beta
    u = slopes(math.log(beta)) - sums["label"][fit]
    found = interval(beta, at_bound, u, curvature, sums["tokens"][fit].sum(), level)
    curves = CubicHermiteSpline(x, sums["value"][held], sums["slope"][held] * grid, axis=1)
    losses = [
        nll(curves(math.log(b)) - b * sums["label"][held], sums["tokens"][held], level=level, resamples=resamples,
            seed=seed)
        for b in (1.0, beta)
    ]  # fmt: skip
    return Temperature(
        **vars(found), at_bound=at_bound, nll_before=losses[0], nll_after=losses[1], report_on="held out"
    )


def held_out(names: Any, seed: int = 0) -> Array:
    """Of rows of documents `names` [D] (several rows may be of one), which are in the half that a temperature fitted with this
    seed was not fitted on: [D] bool."""
    documents = np.unique(as_ids("names", names, len(names)))
    return np.isin(names, documents[_halves(len(documents), seed)[1]])


def held_out_ece(
    bins: dict[str, Any], names: Any, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> CalibrationError:
    """`ece` of the held-out half alone. bins: the bin columns of records; names: [D] their documents."""
    columns = equal_width(bins)
    chosen = held_out(names, seed)
    documents = as_ids("names", names, len(names))[chosen]
    sums = cluster_sums({name: columns[name][chosen] for name in BINS}, documents)
    return ece_from_bins(*(sums[name] for name in BINS), level=level, resamples=resamples, seed=seed)


def _halves(size: int, seed: int) -> tuple[Array, Array]:
    """Places of the documents, in the order of their names, to fit on and to report on."""
    shuffled = np.random.default_rng(seed).permutation(size)
    return np.sort(shuffled[: size // 2]), np.sort(shuffled[size // 2 :])


def _fit(x: Array, total: dict[str, Array]) -> tuple[float, bool]:
    """β minimising the pooled nll: its slope changes sign in one interval of the grid, where the interpolant's is 0."""
    beta = np.exp(x)
    curve = CubicHermiteSpline(x, total["value"] - beta * total["label"], beta * (total["slope"] - total["label"]))
    above = np.flatnonzero(total["slope"] - total["label"] > 0)
    at = int(above[0]) if len(above) else len(x)
    low, high = max(at - 1, 0), min(at, len(x) - 1)
    log_beta, at_bound = (x[low], True) if low == high else minimise(lambda v: float(curve(v, 1)), x[low], x[high])
    return math.exp(log_beta), at_bound


def _checked(
    betas: Any, logsumexp: Any, slope: Any, label_logit: Any, tokens: Any, ids: Any
) -> tuple[Array, dict[str, Array]]:
    grid = vector("betas", betas)
    if len(grid) < 4 or (np.diff(grid) <= 0).any() or grid[0] <= 0:
        raise ValueError(f"betas must be 4 or more increasing numbers above 0; got {grid}; try temperature_grid()")
    if not grid[0] <= 1 <= grid[-1]:
        raise ValueError(f"betas must reach around 1, the temperature in use; got {grid[0]:g} to {grid[-1]:g}")
    count = vector("tokens", tokens, low=0)
    check_finite("betas", grid)
    shape = (len(count), len(grid))
    order = sort_by_id(as_ids("ids", ids, len(count)))
    sums = {
        "value": table("logsumexp", logsumexp, shape),
        "slope": table("slope", slope, shape),
        "label": vector("label_logit", label_logit, len(count)),
        "tokens": count,
    }
    return grid, {name: column[order] for name, column in sums.items()}
