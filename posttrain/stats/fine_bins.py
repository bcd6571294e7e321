"""The fine histogram that records keep of an example: equal-width bins are sums of its bins, equal-mass bins are chosen
from it.

FINE fine bins make up each equal-width bin, FINE being a power of two, so that the edges they share are the same doubles.
Of an example only those are kept that hold something, at most one an item, in columns [D]:

    bin_fine                                 how many fine bins the range is cut into, the same for all examples
    bin_at                                   an array [held] an example: which of them hold something, in ascending order
    bin_count, bin_confidence, bin_correct   an array [held] an example: items, Σ confidence, Σ correct of each

A fine bin is never split. Where most items are all but certain, the uppermost (of 15 bins: above 959/960) may hold more
than an equal share: whatever is hidden in it is less than 1/480 of the ece, since a confidence can be too low there by no
more than its width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from posttrain.stats.bins import FINE, bin_edges, equal_mass_starts
from posttrain.stats.inputs import Array, check_finite, table, vector

BINS = ("bin_count", "bin_confidence", "bin_correct")
BIN_COLUMNS = ("bin_fine", "bin_at", *BINS)


def fine_bins(
    confidence: Any, correct: Any, owner: Any, examples: int, bins: int = 15, low: float = 0.0, high: float = 1.0
) -> dict[str, Array]:
    """The columns of a fine histogram of items with confidence [N] and correct [N], owner [N] (0 .. examples - 1) their examples.

    A confidence that a rounding has put outside [low, high] falls into the bin at that end.
    """
    fine = FINE * bins
    edges = bin_edges(fine, low, high)[1:-1]
    place = np.asarray(owner, np.int64) * fine + np.searchsorted(edges, confidence, side="right")
    held, which = np.unique(place, return_inverse=True)
    cuts = np.searchsorted(held, np.arange(1, examples) * fine)
    sums: dict[str, Array] = {
        "bin_at": (held % fine).astype(np.int32),
        "bin_count": np.bincount(which, None, len(held)).astype(np.float64),
        "bin_confidence": np.bincount(which, np.asarray(confidence, np.float64), len(held)),
        "bin_correct": np.bincount(which, np.asarray(correct, np.float64), len(held)),
    }
    return {"bin_fine": np.full(examples, fine, np.int32)} | {
        name: _of_arrays(np.split(values, cuts)[:examples]) for name, values in sums.items()
    }


def is_fine(columns: Mapping[str, Any]) -> bool:
    """Whether these records keep a fine histogram, or (of an earlier version, or of the caller's making) [D, B] sums alone."""
    return all(name in columns for name in BIN_COLUMNS)


def bins_of(columns: Mapping[str, Any]) -> int | None:
    """The number of equal-width bins that these records were made for; None where they have none."""
    if is_fine(columns):
        return int(columns["bin_fine"][0]) // FINE if len(columns["bin_fine"]) else None
    shape = np.shape(columns.get("bin_count", ()))
    return shape[1] if len(shape) == 2 else None


def equal_width(columns: Mapping[str, Any], bins: int | None = None) -> dict[str, Array]:
    """bin_count, bin_confidence and bin_correct [D, bins] of equal-width bins, as many as the records were made for unless
    said. ValueError for another number than their fine bins add up to."""
    if not is_fine(columns):
        size, width = len(columns[BINS[0]]), bins or bins_of(columns) or 0
        return {name: table(name, columns[name], (size, width)) for name in BINS}
    flat = _Flat(columns)
    bins = bins or max(1, flat.fine // FINE)
    if flat.fine % bins:
        raise ValueError(
            f"the {flat.fine} fine bins of these records do not make {bins} equal ones; give bins={flat.fine // FINE}"
        )
    return flat.summed(flat.at // max(1, flat.fine // bins), bins)


def equal_mass(columns: Mapping[str, Any], bins: int) -> dict[str, Array]:
    """The same of at most `bins` bins [D, <= bins] with nearly equal numbers of items over all examples: see
    `merge_equal_mass`. The records must be fine."""
    flat = _Flat(columns)
    starts = equal_mass_starts(np.bincount(flat.at, flat.sums["bin_count"], max(1, flat.fine)), bins)
    return flat.summed(np.searchsorted(starts, flat.at, side="right") - 1, len(starts))


def without(columns: Mapping[str, Array], left_out: Array) -> dict[str, Array]:
    """The bin columns of records, with nothing in the bins of the examples left out [D] bool."""
    found = {name: columns[name].copy() for name in BIN_COLUMNS if name in columns}
    for name, column in found.items():
        if column.dtype == object:
            for at in np.flatnonzero(left_out):
                column[at] = column[at][:0]
        elif name in BINS:
            column[left_out] = 0
    return found


class _Flat:
    """Every held fine bin of all examples, one after the other: owner [H] its example, at [H] which it is, sums [H]."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.size = len(columns["bin_at"])
        lengths = {name: [len(part) for part in columns[name]] for name in ("bin_at", *BINS)}
        apart = [name for name in BINS if lengths[name] != lengths["bin_at"]]
        if apart:
            raise ValueError(f"{', '.join(apart)} must have a number for each bin of bin_at, example by example")
        counts = vector("bin_fine", columns["bin_fine"], self.size, low=1)
        if len(np.unique(counts)) > 1:
            raise ValueError(f"bin_fine must be the same for all examples; got {np.unique(counts)}")
        self.fine = int(counts[0]) if self.size else 0
        self.owner = np.repeat(np.arange(self.size), lengths["bin_at"])
        self.at = np.concatenate([np.empty(0), *columns["bin_at"]]).astype(np.int64)
        if len(self.at) and not 0 <= self.at.min() <= self.at.max() < self.fine:
            raise ValueError(f"bin_at must lie in 0 .. {self.fine - 1}; got {self.at.min()} to {self.at.max()}")
        self.sums = {name: np.concatenate([np.empty(0), *columns[name]]) for name in BINS}
        for name, values in self.sums.items():
            check_finite(name, values)

    def summed(self, where: Array, bins: int) -> dict[str, Array]:
        """[D, bins] sums, where [H] saying which bin a fine one goes to."""
        place = self.owner * bins + where
        return {
            name: np.bincount(place, values, self.size * bins).reshape(self.size, bins)
            for name, values in self.sums.items()
        }


def _of_arrays(parts: list[Array]) -> Array:
    """An array [D] of arrays, also where they are equally long."""
    found = np.empty(len(parts), dtype=object)
    for at, part in enumerate(parts):
        found[at] = part
    return found
