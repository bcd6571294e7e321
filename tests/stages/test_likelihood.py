"""pretrain and sft: what is counted, how tokens are weighed, and an example's evaluation record, worked out by hand."""

from collections import Counter

import numpy as np
import pytest
import torch

from posttrain.data.batches import Batch, collate
from posttrain.data.group import Group
from posttrain.data.tokens import TokenGroup
from posttrain.models.token_statistics import TokenStatistics
from posttrain.stages.base import find, names
from posttrain.stages.likelihood import token_records
from posttrain.stages.pretrain import Pretrain
from posttrain.stages.sft import SFT
from posttrain.stats import equal_width


@pytest.fixture
def batch() -> Batch:
    """Two examples: three targets of five tokens, one target of three."""
    groups = [
        TokenGroup("a", "a", [1, 2], [[3, 4, 5]], [[True, True, True]], [6], [5], "{}"),
        TokenGroup("b", "b", [1], [[2, 3]], [[False, True]], [2], [2], "{}"),
    ]
    return collate(groups, [[0], [1]], "padded")


def test_stages_are_found_by_name() -> None:
    assert {"pretrain", "sft"} <= set(names())
    assert "base" not in names()
    assert find("sft") is SFT


def test_by_token_every_target_weighs_one_and_counts_one(batch: Batch) -> None:
    stage = SFT()
    assert stage.token_weights(batch).tolist() == [1, 1, 1, 1]
    assert stage.counts(batch) == {"nll": 4.0, "aux": 8.0}
    assert Pretrain().counts(batch) == stage.counts(batch)


def test_by_sequence_every_example_weighs_one_and_counts_one(batch: Batch) -> None:
    stage = SFT(normalize="sequence")
    assert stage.token_weights(batch).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    assert stage.counts(batch)["nll"] == 2.0


def test_a_batch_that_counts_nothing_has_no_units(batch: Batch) -> None:
    for stage in (SFT(), SFT(normalize="sequence"), Pretrain()):
        assert stage.counts(batch.empty()) == {"nll": 0.0, "aux": 0.0}


def test_an_examples_record_is_its_sums(batch: Batch) -> None:
    statistics = TokenStatistics(
        logprob=torch.tensor([-0.1, -2.0, -0.5, -3.0]),
        top1_hit=torch.tensor([True, False, True, False]),
        confidence=torch.tensor([0.9, 0.5, 0.6, 0.25]),
    )
    found = token_records(statistics, batch, bins=4)
    assert found["nll_sum"] == pytest.approx([2.6, 3.0])
    assert found["tokens"].tolist() == [3, 1]
    assert found["correct"].tolist() == [2, 0]
    assert (found["bytes"].tolist(), found["chars"].tolist()) == ([6, 2], [5, 2])
    assert found["brier_sum"] == pytest.approx([0.01 + 0.25 + 0.16, 0.0625])
    # 64 fine bins to each of the 4: .5 and .25 are the lower ends of theirs, .6 is 153.6/256 and .9 is 230.4/256
    assert found["bin_fine"].tolist() == [256, 256]
    assert [each.tolist() for each in found["bin_at"]] == [[128, 153, 230], [64]]
    # bins [0, .25) [.25, .5) [.5, .75) [.75, 1]
    bins = equal_width(found)
    assert bins["bin_count"].tolist() == [[0, 0, 2, 1], [0, 1, 0, 0]]
    np.testing.assert_allclose(bins["bin_confidence"], [[0, 0, 1.1, 0.9], [0, 0.25, 0, 0]], rtol=1e-6)
    assert bins["bin_correct"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert all(column.dtype == np.float64 for column in bins.values())
    assert all(column.dtype == np.float64 for name, column in found.items() if not name.startswith("bin_"))


def test_of_judged_responses_sft_trains_the_best_and_says_so() -> None:
    notes: Counter[str] = Counter()
    pair = Group("q", ("good", "bad"), rewards=(1.0, 0.0))
    disliked, liked = (Group("q", ("a",), rewards=(reward,)) for reward in (0.0, 1.0))
    plain = Group("q", ("a",))
    kept = list(SFT().groups([pair, disliked, liked, plain], notes))
    assert [group.responses for group in kept] == [("good",), ("a",), ("a",)]
    assert all(group.rewards is None for group in kept)
    assert sorted(notes.values()) == [1, 1]
