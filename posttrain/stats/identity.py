"""Which row is which example: sorting by id, joining two runs, summing the rows of one cluster.

Sums are taken in the order of the ids, so the order in which ranks delivered their rows does not show in any digit.
"""

from typing import Any

import numpy as np

from posttrain.stats.inputs import Array

SHOWN = 3


def as_ids(name: str, ids: Any, length: int) -> Array:
    """`ids` as an array [D] of one sortable type."""
    array = np.asarray(ids)
    if array.dtype == object:
        if not all(isinstance(value, str) for value in array):
            raise ValueError(f"{name} must be all strings or all integers, got a mixture; try [str(i) for i in {name}]")
        array = array.astype(str)
    if array.size == 0:
        array = array.reshape(0).astype(str)
    if array.ndim != 1 or len(array) != length:
        raise ValueError(f"{name} must hold one id for each of the {length} examples; got shape {array.shape}")
    return array


def sort_by_id(ids: Array, name: str = "ids") -> Array:
    """Positions [D] that sort `ids`; every id must be there once."""
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    repeated = np.unique(ranked[1:][ranked[1:] == ranked[:-1]])
    if len(repeated):
        raise ValueError(
            f"{name} must be unique, but {len(repeated)} occur more than once ({_few(repeated)}); drop a sampler's "
            "padding repeats, number real duplicates (id-2, id-3), and put windows of one document into clusters"
        )
    return order


def join(ids_a: Array, ids_b: Array, names: tuple[str, str] = ("A", "B")) -> tuple[Array, Array]:
    """Positions in A and in B of the same examples, in the order of their ids; refuses sets that differ."""
    order_a, order_b = sort_by_id(ids_a, f"ids of {names[0]}"), sort_by_id(ids_b, f"ids of {names[1]}")
    if ids_a.dtype.kind != ids_b.dtype.kind and len(ids_a) and len(ids_b):
        raise ValueError(f"ids of {names[0]} are {ids_a.dtype}, ids of {names[1]} are {ids_b.dtype}: give one type")
    only_a, only_b = np.setdiff1d(ids_a, ids_b), np.setdiff1d(ids_b, ids_a)
    if len(only_a) or len(only_b):
        raise ValueError(
            f"{names[0]} ({len(ids_a)} examples) and {names[1]} ({len(ids_b)}) were not scored on the same examples: "
            f"{len(only_a)} only in {names[0]}{_named(only_a)}, {len(only_b)} only in {names[1]}{_named(only_b)}; "
            "evaluate both on the same data.eval with the same data.eval_limit"
        )
    return order_a, order_b


def cluster_sums(columns: dict[str, Array], clusters: Array) -> dict[str, Array]:
    """Sum the rows of each cluster: [D] -> [clusters], [D, B] -> [clusters, B], in the order of the cluster ids."""
    order = np.argsort(clusters, kind="stable")
    _, starts = np.unique(clusters[order], return_index=True)
    if not len(starts):
        return columns
    return {name: np.add.reduceat(column[order], starts, axis=0) for name, column in columns.items()}


def _few(ids: Array) -> str:
    return ", ".join(str(value) for value in ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


def _named(ids: Array) -> str:
    return f" ({_few(ids)})" if len(ids) else ""
