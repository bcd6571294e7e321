"""From an evaluation's records, a row of sums an example, to every score with its interval, and to comparisons.

Columns, fp64, one row an example (a document, or one window of it):

    nll_sum, tokens, bytes, chars            Σ -log p over the scored tokens, and what they cover
    correct                                  tokens whose argmax is the label
    brier_sum                                Σ (confidence - correct)²
    bin_fine, bin_at, bin_count, bin_confidence, bin_correct   a fine histogram of confidences (fine_bins.py); without the first
                                             two [D, B]: items, Σ confidence, Σ correct in equal-width bins alone
    X_sum, X_count                           a score X of its own: pair_accuracy, margin, kl ... (nll of pairs, not tokens)
    grid_logsumexp, grid_slope, grid_label   what a temperature is fitted to, on temperature_grid() (temperature_grid.py)
    grid_items                               how many items these are of, where they are not of all
    anything else                            a number an example, reported as its mean: accuracy, reward ...

A score appears where its columns do. All scores of a call come from the same resamples.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from posttrain.stats.calibration_error import ece_estimate, mce_estimate
from posttrain.stats.differences import PairedDifference, difference
from posttrain.stats.estimate import Estimate, nothing
from posttrain.stats.identity import as_ids, join
from posttrain.stats.inputs import Array, check_level, check_resamples
from posttrain.stats.intervals import clustered_wilson
from posttrain.stats.scores import estimate, exponentiated
from posttrain.stats.table import (
    BINNED,
    GRID,
    GRID_ITEMS,
    RATIOS,
    ROWS,
    Columns,
    available,
    binned,
    calibration_draws,
    calibration_sums,
    gather,
    has_grid,
    is_proportion,
    length,
    resample,
    score_of,
)
from posttrain.stats.temperature_grid import fit_temperature_on_grid, temperature_grid

LOWER_IS_BETTER = {
    "nll",
    "perplexity",
    "bits_per_token",
    "bits_per_byte",
    "bits_per_char",
    "brier",
    "ece",
    "ece_equal_mass",
    "kl",
    "nll_best",
    "objective",
}
NEITHER = {
    "kl", "margin", "reward_chosen", "reward_rejected", "logprob_chosen", "logprob_rejected", "nll_worst", "temperature",
    "effective_responses",
}  # fmt: skip
"""Scores that are not better for being higher or lower."""
COMPARED = {"nll", "perplexity", "bits_per_byte", "token_accuracy", "brier"}


def summarise(
    columns: dict[str, Any],
    ids: Any,
    clusters: Any = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    bins: int = 15,
) -> dict[str, Estimate]:
    """Every score of these records: nll, perplexity, bits_per_token, bits_per_byte, bits_per_char, token_accuracy,
    brier, the mean of every further column, ece, ece_noise_floor (a value alone), mce; of a fine histogram also
    ece_equal_mass with its noise floor, over at most `bins` bins chosen once, from all rows.

    ids [D] are unique; rows are sorted by them, so no digit depends on their order. Rows of one cluster [D] (windows of
    a document) are summed first and resampled together. Ratios have a percentile bootstrap interval (t below 30
    clusters), proportions (token_accuracy and columns of 0, 1/2, 1) Wilson's for clusters, calibration the corrected
    one (calibration_error.py). ValueError for missing shapes, repeated ids, numbers that are not finite.
    """
    check_level(level), check_resamples(resamples)
    rows = gather(columns, ids, clusters, bins)
    (drawn,) = resample([rows], resamples, seed)
    found = {name: _estimate(name, rows, drawn, level) for name in available(rows)}
    for name in binned(rows):
        found |= _calibration(name, rows, drawn, level)
    return found | (_temperature(rows, level, resamples, seed) if has_grid(rows) else {})


def paired(
    columns_a: dict[str, Any],
    ids_a: Any,
    columns_b: dict[str, Any],
    ids_b: Any,
    clusters_a: Any = None,
    clusters_b: Any = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    bins: int = 15,
    names: tuple[str, str] = ("A", "B"),
    lower_is_better: Collection[str] = LOWER_IS_BETTER,
) -> dict[str, PairedDifference]:
    """A minus B on the same examples, joined by id: nll, perplexity, bits_per_byte, token_accuracy, brier, ece,
    ece_equal_mass (each side in its own bins), and every further column that both have (accuracy, pair_accuracy, ...).

    The same resamples serve both sides and all scores. ValueError, saying what differs, for sets of ids or clusters
    that are not the same. Clusters may be given for one side alone. lower_is_better: names of scores.
    """
    check_level(level), check_resamples(resamples)
    ids_a, ids_b = as_ids("ids_a", ids_a, length(columns_a)), as_ids("ids_b", ids_b, length(columns_b))
    order_a, order_b = join(ids_a, ids_b, names)
    groups = _same_clusters(clusters_a, clusters_b, order_a, order_b, names)
    both = [
        gather({name: np.asarray(column)[order] for name, column in columns.items()}, ids_a[order_a], groups, bins)
        for columns, order in ((columns_a, order_a), (columns_b, order_b))
    ]
    drawn = resample(both, resamples, seed)
    shared = [name for name in available(both[0]) if name in available(both[1])]
    compared = [name for name in shared if name in COMPARED or name not in RATIOS]
    compared += [name for name in binned(both[0]) if name in binned(both[1])]
    return {name: _compare(name, both, drawn, level, names, name in lower_is_better) for name in compared}


def _estimate(name: str, rows: Columns, drawn: Columns, level: float) -> Estimate:
    above, below, _ = available(rows)[name]
    if is_proportion(name, rows):
        return clustered_wilson(rows[above], rows[below], level)
    score = score_of("nll" if name == "perplexity" else name, rows, drawn)
    found = estimate(score, rows[below].sum(), len(rows[ROWS]), level, least=0.0 if name in RATIOS else None)
    return exponentiated(found) if name == "perplexity" else found


def _calibration(name: str, rows: Columns, drawn: Columns, level: float) -> dict[str, Estimate]:
    sums, draws = calibration_sums(name, rows), calibration_draws(name, drawn)
    error = ece_estimate(sums, draws, level)
    floor = nothing("mean of the centred null", error.clusters)
    if error.noise_floor is not None:
        floor = Estimate(error.noise_floor, None, None, None, error.n, error.clusters, floor.method)
    found: dict[str, Estimate] = {name: error, f"{name}_noise_floor": floor}
    return found | ({"mce": mce_estimate(sums, draws, level)} if name == "ece" else {})


def _temperature(rows: Columns, level: float, resamples: int, seed: int) -> dict[str, Estimate]:
    items = next(rows[name] for name in (GRID_ITEMS, "nll_count", "tokens") if name in rows)
    names = [f"{i:012d}" for i in range(len(items))]  # the rows are in order already
    value, slope, label = (rows[name] for name in GRID)
    if not (slope.any() or label.any()):  # nothing is told apart, so no temperature is better than another
        return {"temperature": nothing("no margin to fit a temperature to", len(items))}
    fitted = fit_temperature_on_grid(
        temperature_grid(), value, slope, label, items, names, level=level, resamples=resamples, seed=seed
    )
    return {"temperature": fitted}


def _compare(
    name: str, both: list[Columns], drawn: list[Columns], level: float, names: tuple[str, str], lower: bool
) -> PairedDifference:
    score_a, score_b = (score_of(name, rows, draws) for rows, draws in zip(both, drawn, strict=True))
    if name in BINNED:
        items_a, items_b = ((np.empty(0), rows["bin_count"].sum(axis=1)) for rows in both)
    else:
        above, below, _ = available(both[0])[name]
        items_a, items_b = ((rows[above], rows[below]) for rows in both)
    return difference(score_a, score_b, items_a, items_b, level=level, name=name, names=names, lower_is_better=lower)


def _same_clusters(a: Any, b: Any, order_a: Array, order_b: Array, names: tuple[str, str]) -> Array | None:
    """The cluster of each joined example, from whichever side gives them; ValueError where both do and disagree."""
    groups = [
        as_ids(f"clusters_{side}", given, len(order))[order]
        for side, given, order in (("a", a, order_a), ("b", b, order_b))
        if given is not None
    ]
    if len(groups) == 2 and (groups[0] != groups[1]).any():
        raise ValueError(f"{names[0]} and {names[1]} put the same examples into different clusters; cut both alike")
    return groups[0] if groups else None
