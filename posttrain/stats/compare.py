"""Two models on the same examples, from one number an example each."""

from typing import Any

import numpy as np

from posttrain.stats.differences import PairedDifference, difference
from posttrain.stats.identity import as_ids, cluster_sums, join
from posttrain.stats.inputs import Array, check_level, check_resamples, vector
from posttrain.stats.resampling import resampled_sums
from posttrain.stats.scores import ratio


def paired_difference(
    a: Any,
    b: Any,
    denominators_a: Any = None,
    denominators_b: Any = None,
    *,
    ids_a: Any = None,
    ids_b: Any = None,
    clusters: Any = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    name: str = "score",
    names: tuple[str, str] = ("A", "B"),
    lower_is_better: bool = False,
) -> PairedDifference:
    """A minus B, of means of a and b [D], or of Σa/Σdenominators_a and Σb/Σdenominators_b, on the same D examples.

    ids_a, ids_b   join the rows by id (their order is free); without them row d of a and row d of b are one example
    denominators   [D]; with only denominators_a given it serves both sides
    clusters [D]   in the order of a: rows to be summed first
    Interval: paired percentile bootstrap, Student's t below 30 examples. se from the linearised differences. ValueError
    naming what differs where the two sets of ids are not the same.
    """
    check_level(level), check_resamples(resamples)
    sides = _sides(a, b, denominators_a, denominators_b)
    order_a, order_b = _orders(sides, ids_a, ids_b, names)
    columns = {f"{key}_a": sides[f"{key}_a"][order_a] for key in ("above", "below")}
    columns |= {f"{key}_b": sides[f"{key}_b"][order_b] for key in ("above", "below")}
    if clusters is not None:
        columns = cluster_sums(columns, as_ids("clusters", clusters, len(order_a))[order_a])
    rows = np.column_stack([columns[key] for key in ("above_a", "below_a", "above_b", "below_b")])
    sums = resampled_sums(rows, resamples, seed) if len(rows) else np.empty((0, 4))
    return difference(
        ratio(rows[:, 0], rows[:, 1], sums[:, :2]),
        ratio(rows[:, 2], rows[:, 3], sums[:, 2:]),
        (rows[:, 0], rows[:, 1]),
        (rows[:, 2], rows[:, 3]),
        level=level,
        name=name,
        names=names,
        lower_is_better=lower_is_better,
    )


def _sides(a: Any, b: Any, denominators_a: Any, denominators_b: Any) -> dict[str, Array]:
    above_a, above_b = vector("a", a), vector("b", b)
    if denominators_a is None and denominators_b is not None:
        raise ValueError("denominators_b was given without denominators_a; give both, or denominators_a for both sides")
    if denominators_b is None:
        denominators_b = denominators_a
    below = [
        np.ones(len(above)) if given is None else vector(f"denominators_{side}", given, len(above), low=0)
        for side, above, given in (("a", above_a, denominators_a), ("b", above_b, denominators_b))
    ]
    return {"above_a": above_a, "above_b": above_b, "below_a": below[0], "below_b": below[1]}


def _orders(sides: dict[str, Array], ids_a: Any, ids_b: Any, names: tuple[str, str]) -> tuple[Array, Array]:
    size_a, size_b = len(sides["above_a"]), len(sides["above_b"])
    if (ids_a is None) != (ids_b is None):
        raise ValueError("give ids_a and ids_b, or neither; one alone cannot be joined")
    if ids_a is not None:
        return join(as_ids("ids_a", ids_a, size_a), as_ids("ids_b", ids_b, size_b), names)
    if size_a != size_b:
        raise ValueError(f"a has {size_a} examples and b {size_b}: pass ids_a and ids_b to see which are missing")
    order = np.lexsort(tuple(sides.values()))  # by value: the order of the rows must not show in any digit
    return order, order
