"""What the functions of this package accept: arrays, levels, seeds; ValueError for anything else."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def vector(name: str, values: Any, length: int | None = None, low: float | None = None) -> Array:
    """`values` as fp64 [D], finite, at least `low`, of the given length."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(
            f"{name} must have one dimension, one number an example; got shape {array.shape}; try .ravel()"
        )
    check_finite(name, array)
    if length is not None and len(array) != length:
        raise ValueError(f"{name} has {len(array)} examples, but {length} are needed; give one number an example")
    if low is not None and len(array) and array.min() < low:
        where = int(array.argmin())
        raise ValueError(f"{name} must be at least {low:g}; got {array[where]:g} at position {where}")
    return array


def table(name: str, values: Any, shape: tuple[int, int]) -> Array:
    """`values` as fp64 of exactly this shape, finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape} (examples, bins); got {array.shape}")
    check_finite(name, array)
    return array


def check_finite(name: str, array: Array) -> None:
    bad = ~np.isfinite(array)
    if bad.any():
        where = np.argwhere(bad)[0].tolist()
        raise ValueError(
            f"{name} must be finite; got {array[tuple(where)]} at position {where} ({int(bad.sum())} such in all); "
            "find what produced it rather than leave it out"
        )


def check_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}; try 0.95")
    return float(level)


def check_resamples(resamples: int) -> int:
    if resamples != int(resamples) or resamples < 100:
        raise ValueError(f"resamples must be a whole number of at least 100, got {resamples}; try 10000")
    return int(resamples)


def check_bins(bins: int) -> int:
    if bins != int(bins) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1, got {bins}; try 15")
    return int(bins)
