"""Layouts: every target is predicted from the position before it, packing loses and repeats nothing, plans are shared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.batches import collate
from posttrain.data.packing import Packing, best_fit
from posttrain.data.tokens import TokenGroup

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)


def group(name: str, prompt: list[int], response: list[int], mask: list[bool] | None = None) -> TokenGroup:
    return TokenGroup(name, name, prompt, [response], [mask or [True] * len(response)], [len(response)], [1], "{}")


A, B = group("a", [1, 2], [3, 4, 5]), group("b", [6], [7, 8], [False, True])


def test_padded_rows_hold_one_response_each() -> None:
    batch = collate([A, B], [[0], [1]], "padded")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert batch.segments.tolist() == [[0, 0, 0, 0, 0], [1, 1, 1, -1, -1]]
    assert batch.predict.tolist() == [1, 2, 3, 6]  # the positions before tokens 3, 4, 5 and 8
    assert batch.targets.tolist() == [3, 4, 5, 8]
    assert batch.response.tolist() == [0, 0, 0, 1]
    assert (batch.tokens, batch.trained_tokens, batch.responses) == (8, 4, 2)


def test_packed_rows_restart_positions() -> None:
    batch = collate([A, B], [[0, 1]], "packed")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.segments.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert batch.predict.tolist() == [1, 2, 3, 6]
    assert batch.targets.tolist() == [3, 4, 5, 8]


def test_a_first_token_is_never_a_target() -> None:
    with pytest.raises(AssertionError, match="first token"):
        collate([group("a", [], [1, 2])], [[0]], "padded")


def test_an_empty_batch_counts_nothing() -> None:
    empty = collate([A], [[0]], "padded").empty()
    assert (empty.tokens, empty.trained_tokens, empty.responses, empty.weight) == (0, 0, 0, 0.0)
    assert len(empty.targets) == 3  # a forward still has something to do


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("world", [1, 2, 3])
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(10, 200))
def test_a_plan_holds_every_example_once_within_the_budget(
    layout: str, world: int, lengths: list[int], budget: int
) -> None:
    plan = Packing(layout, budget).plan(lengths, world)
    assert len(plan) % world == 0
    assert sorted(i for rows in plan for row in rows for i in row) == list(range(len(lengths)))
    for rows in (rows for rows in plan if rows):
        widths = [sum(lengths[i] for i in row) for row in rows]
        assert len(rows) == 1 or len(rows) * max(widths) <= budget
        assert max(widths) <= max(lengths)


def test_micro_size_is_the_number_of_examples_in_a_forward() -> None:
    plan = Packing("padded", 10, micro_size=3).plan([5] * 8)
    assert [len(rows) for rows in plan] == [3, 3, 2]


def test_padding_is_small_because_neighbours_are_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 64)
    plan = Packing("padded", 4096).plan(lengths)
    padded = sum(len(rows) * max(lengths[row[0]] for row in rows) for rows in plan)
    assert padded + 128 * len(plan) < 1.2 * lengths.sum()


def test_a_forward_more_is_weighed_against_the_padding_it_saves() -> None:
    lengths = [100, 100, 10, 10]
    assert [len(rows) for rows in Packing("padded", 4096, overhead_tokens=50).plan(lengths)] == [2, 2]  # 220 + 2·50
    assert [len(rows) for rows in Packing("padded", 4096, overhead_tokens=500).plan(lengths)] == [4]  # 400 + 500


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    assert best_fit([0, 1, 2, 3], np.array([6, 5, 4, 3]), 10) == [[0, 2], [1, 3]]
    assert best_fit([0, 1, 2], np.array([8, 5, 2]), 10) == [[0, 2], [1]]


def test_one_row_kernels_get_one_row() -> None:
    plan = Packing("packed", 100, one_row=True).plan([10] * 25)
    assert all(len(rows) == 1 for rows in plan)
    assert max(len(rows[0]) for rows in plan) == 10
