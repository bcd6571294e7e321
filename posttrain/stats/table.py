"""The table behind an evaluation's scores: checked columns, sorted by id, summed by cluster, resampled together."""

import math
from typing import Any

import numpy as np

from posttrain.stats.bins import BinSums
from posttrain.stats.calibration_error import ece_score, gaps
from posttrain.stats.fine_bins import BIN_COLUMNS, BINS, equal_mass, equal_width, is_fine
from posttrain.stats.identity import as_ids, cluster_sums, sort_by_id
from posttrain.stats.inputs import Array, table, vector
from posttrain.stats.resampling import resampled_sums
from posttrain.stats.scores import Score, ratio

Columns = dict[str, Array]

BITS = 1 / math.log(2)
RATIOS = {  # name: numerator, denominator, factor; in the order reported
    "nll": ("nll_sum", "tokens", 1.0),
    "perplexity": ("nll_sum", "tokens", 1.0),
    "bits_per_token": ("nll_sum", "tokens", BITS),
    "bits_per_byte": ("nll_sum", "bytes", BITS),
    "bits_per_char": ("nll_sum", "chars", BITS),
    "token_accuracy": ("correct", "tokens", 1.0),
    "brier": ("brier_sum", "tokens", 1.0),
}
MASS = ("(mass) count", "(mass) confidence", "(mass) correct")  # our own: equal-mass bins
BINNED = {"ece": BINS, "ece_equal_mass": MASS}  # the calibration errors and the sums they are of
GRID = ("grid_logsumexp", "grid_slope", "grid_label")
GRID_ITEMS = "grid_items"
PROPORTIONS = {"token_accuracy", "pair_accuracy", "best_accuracy"}
AT_LEAST_0 = {"tokens", "bytes", "chars", "correct", "brier_sum", GRID_ITEMS}
KNOWN = {"nll_sum", *AT_LEAST_0, *BIN_COLUMNS, *GRID}
TAKEN = {*RATIOS, *BINNED, *(f"{name}_noise_floor" for name in BINNED), "mce"}
ROWS = "(rows)"  # our own column: how many rows were summed into the cluster
GAP = "(gap) "  # among the draws, before the score's name: Σ correct - Σ confidence per bin


def gather(columns: dict[str, Any], ids: Any, clusters: Any, bins: int) -> Columns:
    """fp64 columns [D] or [D, bins], checked, sorted by id, summed by cluster, with the number of rows in each. Of a fine
    histogram the equal-width bins, and the equal-mass ones that all rows together give."""
    size = length(columns)
    _check_names(columns)
    order = sort_by_id(as_ids("ids", ids, size))
    rows = {}
    for name, column in columns.items():
        if name in BIN_COLUMNS:
            continue
        if name in GRID[:2]:
            rows[name] = table(name, column, (size, np.shape(column)[-1]))[order]
        else:
            rows[name] = vector(name, column, size, 0.0 if name in AT_LEAST_0 else None)[order]
    if BINS[0] in columns:
        rows |= {name: column[order] for name, column in equal_width(columns, bins).items()}
    if is_fine(columns):
        rows |= {name: part[order] for name, part in zip(MASS, equal_mass(columns, bins).values(), strict=True)}
    rows[ROWS] = np.ones(size)
    return rows if clusters is None else cluster_sums(rows, as_ids("clusters", clusters, size)[order])


def resample(sides: list[Columns], resamples: int, seed: int) -> list[Columns]:
    """Resampled sums of every column, [R] or [R, B], of all sides, from one product."""
    parts: list[tuple[int, str, Array]] = []
    for side, rows in enumerate(sides):
        needed = {name: column for name, column in rows.items() if name not in (*BINS, *MASS, *GRID, GRID_ITEMS)}
        for name in binned(rows):
            needed |= {GAP + name: gaps(calibration_sums(name, rows)), BINNED[name][0]: rows[BINNED[name][0]]}
        parts += [(side, name, column) for name, column in needed.items()]
    size = len(parts[0][2])
    flat = np.concatenate([column.reshape(size, math.prod(column.shape[1:])) for _, _, column in parts], axis=1)
    sums = resampled_sums(flat, resamples, seed) if size else np.empty((0, flat.shape[1]))
    drawn: list[Columns] = [{} for _ in sides]
    at = 0
    for side, name, column in parts:
        width = math.prod(column.shape[1:])
        drawn[side][name] = sums[:, at : at + width].reshape(len(sums), *column.shape[1:])
        at += width
    return drawn


def available(rows: Columns) -> dict[str, tuple[str, str, float]]:
    """The ratios these columns allow, name: (numerator, denominator, factor); means of further columns come last.

    Columns X_sum and X_count give X.
    """
    pairs = {name.removesuffix("_sum") for name in rows if name.endswith("_sum")}
    pairs = {name for name in pairs if f"{name}_count" in rows}
    known = {name: spec for name, spec in RATIOS.items() if spec[0] in rows and spec[1] in rows}
    known |= {name: (f"{name}_sum", f"{name}_count", 1.0) for name in sorted(pairs)}
    used = KNOWN | {ROWS, *MASS} | {f"{name}_{part}" for name in pairs for part in ("sum", "count")}
    return known | {name: (name, ROWS, 1.0) for name in rows if name not in used}


def score_of(name: str, rows: Columns, drawn: Columns) -> Score | None:
    """One score over these rows and their draws; None where there is nothing to score."""
    if name in BINNED:
        return ece_score(calibration_sums(name, rows), calibration_draws(name, drawn))
    above, below, factor = available(rows)[name]
    found = ratio(rows[above], rows[below], np.stack([drawn[above], drawn[below]], axis=1))
    if found is None:
        return None
    return found.exp() if name == "perplexity" else found.times(factor)


def is_proportion(name: str, rows: Columns) -> bool:
    """PROPORTIONS, and further columns whose every row is 0, 1/2 or 1 (checked on the sums of the clusters)."""
    if name in PROPORTIONS or name not in rows:
        return name in PROPORTIONS
    twice = 2 * rows[name]
    return bool(((twice >= 0) & (twice <= 2 * rows[ROWS]) & (twice == np.rint(twice))).all())


def binned(rows: Columns) -> list[str]:
    """The calibration errors that these rows have bins for."""
    return [name for name, columns in BINNED.items() if columns[0] in rows]


def has_grid(rows: Columns) -> bool:
    return all(name in rows for name in GRID)


def calibration_sums(name: str, rows: Columns) -> BinSums:
    return BinSums(*(rows[column] for column in BINNED[name]))


def calibration_draws(name: str, drawn: Columns) -> tuple[Array, Array]:
    """Of each resample: Σ correct - Σ confidence, and items, per bin [R, B]."""
    return drawn[GAP + name], drawn[BINNED[name][0]]


def length(columns: dict[str, Any]) -> int:
    if not columns:
        raise ValueError("columns is empty; give at least nll_sum and tokens, or a column of one number an example")
    return len(next(iter(columns.values())))


def _check_names(columns: dict[str, Any]) -> None:
    parts = BIN_COLUMNS if {"bin_at", "bin_fine"} & set(columns) else BINS
    missing = [name for name in parts if name not in columns]
    if 0 < len(missing) < len(parts):
        told = f"{', '.join(parts[:-1])} and {parts[-1]}"
        raise ValueError(f"{told} belong together; {', '.join(missing)} missing")
    taken = sorted(set(columns) & (TAKEN | {ROWS, *MASS}))
    if taken:
        raise ValueError(
            f"{', '.join(taken)} cannot be a column: scores are made here, from sums; give {', '.join(sorted(KNOWN))}"
        )
