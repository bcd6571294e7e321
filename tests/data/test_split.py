"""Held-out rows and mixes: deterministic, by content, duplicates together, exact counts."""

import hashlib
import time

import numpy as np
import pytest

from posttrain.data.split import draws, id_numbers, mix_indices, occurrences, split, with_occurrence
from posttrain.errors import ConfigError


def ids_of(n):
    return [hashlib.blake2b(str(i).encode(), digest_size=8).hexdigest() for i in range(n)]


def test_the_share_is_the_fraction_and_depends_on_the_seed():
    ids = ids_of(20_000)
    held = split(ids, 0.05, 1)
    assert abs(held.sum() - 1000) < 5 * np.sqrt(20_000 * 0.05 * 0.95)  # five standard errors of a binomial count
    other = split(ids, 0.05, 2)
    assert abs((held & other).sum() - 50) < 5 * np.sqrt(50)  # two seeds are independent
    assert (split(ids, 0.05, 1) == held).all()
    assert not split(ids, 0.0, 1).any()
    assert (split(ids, 0.2, 1) | ~held).all()  # a larger fraction only adds


def test_neither_order_nor_neighbours_nor_copies_move_an_example():
    ids = ids_of(2000)
    held = dict(zip(ids, split(ids, 0.3, 0), strict=True))
    shuffled = sorted(ids)[::3]
    assert [held[id] for id in shuffled] == list(split(shuffled, 0.3, 0))
    copies = with_occurrence(ids + ids)
    both = split(copies, 0.3, 0)
    assert (both[:2000] == both[2000:]).all()


def test_known_split():
    """Worked out apart in Python integers; changing the hash would move the examples of every user's runs."""
    assert "".join(map(str, split(ids_of(40), 0.25, 0).astype(int))) == "1000100100110001000111000010000101000010"


def test_ids_of_any_shape():
    hexes = ["00000000000000ff", "00000000000000ff-2", "ffffffffffffffff"]
    assert list(id_numbers(hexes)) == [255, 255, 2**64 - 1]
    mixed = id_numbers([*hexes, "row 7", "row 8"])
    assert list(mixed[:3]) == [255, 255, 2**64 - 1]
    assert mixed[3] != mixed[4]
    assert list(id_numbers([])) == []
    assert (split(id_numbers(hexes), 0.5, 3) == split(hexes, 0.5, 3)).all()


def test_with_occurrence_names_the_kth():
    a, b = ids_of(2)
    assert with_occurrence([a, b, a, a, b]) == [a, b, f"{a}-2", f"{a}-3", f"{b}-2"]
    assert list(occurrences(np.array([5, 5, 2, 5], dtype=np.uint64))) == [1, 2, 1, 3]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_that_cannot_be(fraction):
    with pytest.raises(ConfigError, match=r"data\.eval_fraction must be at least 0 and below 1"):
        split(ids_of(3), fraction, 0)


def test_without_weights_an_epoch_is_each_row_once():
    sizes = [5, 0, 8]
    first, second = (mix_indices(sizes, None, seed=3, epoch=epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(13))
    assert list(first) != list(second)
    assert list(first) == list(mix_indices(sizes, None, seed=3, epoch=0))
    assert list(first) != list(mix_indices(sizes, None, seed=4, epoch=0))
    assert list(mix_indices(sizes, None, shuffle=False)) == list(range(13))


def test_draws_are_the_largest_remainders():
    assert draws([10, 10], [1, 3]) == [5, 15]
    assert draws([5, 5], [1, 1]) == [5, 5]
    assert draws([3, 3, 4], [1, 1, 1]) == [4, 3, 3]  # 3.33 each: the first takes the draw left over
    assert draws([6, 4], [0.55, 0.1]) == [8, 2]  # 8.46 and 1.54
    assert draws([6, 4], [0, 2]) == [0, 10]


def test_a_weighted_source_is_cycled_evenly_and_goes_on_in_the_next_epoch():
    sizes, weights = [10, 90], [1, 1]
    drawn = np.stack([mix_indices(sizes, weights, seed=0, epoch=epoch) for epoch in range(9)])
    assert drawn.shape == (9, 100)
    small = [np.bincount(epoch[epoch < 10], minlength=10) for epoch in drawn]
    assert all((count == 5).all() for count in small)  # 50 draws of 10 rows: each five times
    large = np.bincount(drawn.ravel(), minlength=100)[10:]
    assert (large == 5).all()  # 9 epochs of 50 draws of 90 rows: each five times, across the epochs' seams
    assert set(drawn[0][drawn[0] >= 10]) != set(drawn[1][drawn[1] >= 10])


@pytest.mark.parametrize(
    ("sizes", "weights", "said"),
    [([1, 2], [1], "each of the 2 sources"), ([1, 2], [1, -1], "at least 0"), ([1, 2], [0, 0], "above 0 to one"),
     ([0, 2], [1, 1], "source 1 the weight 1, but it has no rows")],
)  # fmt: skip
def test_weights_that_cannot_be(sizes, weights, said):
    with pytest.raises(ConfigError, match=said):
        mix_indices(sizes, weights)


def test_a_million_ids_take_seconds():
    numbers = np.random.default_rng(0).integers(0, 2**64, 1_000_000, dtype=np.uint64)
    ids = [f"{number:016x}" for number in numbers.tolist()]
    start = time.perf_counter()
    assert (id_numbers(ids) == numbers).all()
    split(ids, 0.05, 0)
    mix_indices([900_000, 100_000], [1, 1])
    assert time.perf_counter() - start < 10  # one or two where nothing else runs
