"""Which examples are held out, and how sources are mixed: pure functions of content and seed, the same on every rank.

Nothing here depends on the order of the rows, on the number of ranks, or on the process's hash seed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from posttrain.errors import ConfigError

Numbers = npt.NDArray[np.uint64]

HEX_DIGITS = 16  # of Group.content_id, 64 bits
CONTENT_ID = re.compile(r"[0-9a-f]{16}(-.*)?")


def id_numbers(ids: Sequence[str]) -> Numbers:
    """uint64[n]: the ids' leading 16 hex digits as numbers, so without the suffix of `with_occurrence`.

    Ids of another shape (a foreign data set's own) are hashed, their suffix included.
    """
    heads = [id[:HEX_DIGITS] for id in ids]
    try:
        packed = bytes.fromhex("".join(heads))
        if len(packed) == 8 * len(heads) and all(map(_is_content_id, ids)):
            return np.frombuffer(packed, dtype=">u8").astype(np.uint64)
    except ValueError:
        pass
    hashed = (int(id[:HEX_DIGITS], 16) if _is_content_id(id) else _hash64(id) for id in ids)
    return np.fromiter(hashed, dtype=np.uint64, count=len(ids))


def _is_content_id(id: str) -> bool:
    return CONTENT_ID.fullmatch(id) is not None


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def split(ids: Sequence[str] | Numbers, eval_fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """bool[n]: whether each example is held out for evaluation.

    Held out is what hash(id without suffix, seed) / 2^64 < eval_fraction, so copies of an example land on the same
    side, and adding rows moves no other. The share held out is eval_fraction in expectation: of a few rows maybe none.
    """
    if not 0 <= eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction must be at least 0 and below 1, got {eval_fraction}; try 0.05")
    numbers = ids if isinstance(ids, np.ndarray) else id_numbers(ids)
    uniform = (_mix(numbers ^ np.uint64(_hash64(f"split {seed}"))) >> np.uint64(11)) * 2.0**-53  # [n], in [0, 1)
    return np.asarray(uniform < eval_fraction)


def _mix(x: Numbers) -> Numbers:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): ids that differ in one bit get unrelated numbers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def occurrences(numbers: Numbers) -> npt.NDArray[np.int64]:
    """int64[n]: 1 where a number occurs first, 2 where it occurs again, and so on."""
    order = np.argsort(numbers, kind="stable")
    ranked = numbers[order]
    place = np.arange(len(ranked))
    starts = np.ones(len(ranked), dtype=bool)
    starts[1:] = ranked[1:] != ranked[:-1]
    first = np.maximum.accumulate(np.where(starts, place, 0))  # where the run of equals begins
    counts = np.empty(len(ranked), dtype=np.int64)
    counts[order] = place - first + 1
    return counts


def with_occurrence(ids: Sequence[str]) -> list[str]:
    """The ids made unique: an example's first occurrence keeps its id, its k-th (k = 2, 3, ...) gets the suffix -k."""
    unique = list(ids)
    counts = occurrences(id_numbers(ids))
    for i in np.flatnonzero(counts > 1):
        unique[i] = f"{unique[i]}-{counts[i]}"
    return unique


def without_occurrence(id: str) -> str:
    """The id that an example shares with its copies: they are one observation, made several times."""
    return id.partition("-")[0]


def mix_indices(
    sizes: Sequence[int],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
) -> npt.NDArray[np.int64]:
    """int64[N], N = Σ sizes: the rows of one epoch as indices into the sources laid end to end.

    Source i has round(N · w_i / Σw) of the draws (largest remainder, so that they sum to N; without weights, sizes_i).
    They run through seeded permutations of the source, one after another and on from epoch to epoch, so a source's rows
    are used equally often, give or take one. shuffle=False keeps every source's rows, and the sources, in their order.
    """
    counts = draws(sizes, weights)
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    parts = [
        offset + _cycle(size, count, epoch * count, (seed, source) if shuffle else None)
        for source, (size, count, offset) in enumerate(zip(sizes, counts, offsets, strict=True))
    ]
    indices = np.concatenate(parts)
    if shuffle:
        np.random.default_rng([seed, len(sizes), epoch]).shuffle(indices)
    return indices


def draws(sizes: Sequence[int], weights: Sequence[float] | None = None) -> list[int]:
    """How many of an epoch's N = Σ sizes draws each source has."""
    if weights is None:
        return list(sizes)
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (len(sizes),) or not np.isfinite(w).all() or (w < 0).any() or w.sum() <= 0:
        raise ConfigError(
            f"data.mix must give a weight of at least 0 to each of the {len(sizes)} sources, and above 0 to one; "
            f"got {list(weights)}"
        )
    if empty := [i for i, size in enumerate(sizes) if size == 0 and w[i] > 0]:
        raise ConfigError(f"data.mix gives source {empty[0] + 1} the weight {w[empty[0]]:g}, but it has no rows")
    total = sum(sizes)
    shares = total * w / w.sum()
    counts = np.floor(shares).astype(np.int64)
    short = total - int(counts.sum())
    counts[np.argsort(counts - shares, kind="stable")[:short]] += 1
    return [int(count) for count in counts]


def _cycle(size: int, count: int, start: int, key: tuple[int, int] | None) -> npt.NDArray[np.int64]:
    """int64[count]: the draws start, start + 1, ... of an endless run of permutations of `size` rows."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    parts = []
    for lap in range(start // size, (start + count - 1) // size + 1):
        order = np.arange(size) if key is None else np.random.default_rng([*key, lap]).permutation(size)
        low, high = max(start - lap * size, 0), min(start + count - lap * size, size)
        parts.append(order[low:high])
    return np.concatenate(parts).astype(np.int64)
