"""The fine histogram of records: its equal-width bins are those of the items, its equal-mass bins those of sorted blocks."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from posttrain import stats

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SEED = st.integers(0, 2**32 - 1)
BINS = ("bin_count", "bin_confidence", "bin_correct")
FEW = 200  # resamples


def items(seed: int, size: int, bins: int, low: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence [N] as a float32 softmax gives it, crowded near 1, a third on an edge; correct [N]; example [N] of `size`."""
    rng = np.random.default_rng(seed)
    many = int(rng.integers(1, 20 * size))
    confidence = low + (1 - low) * rng.beta(4, 1, many)
    edges = stats.bin_edges(bins, low, 1)
    on_edge = rng.random(many) < 1 / 3
    confidence[on_edge] = rng.choice(edges, int(on_edge.sum()))
    confidence[~on_edge] = confidence[~on_edge].astype(np.float32)
    return confidence, (rng.random(many) < confidence).astype(float), rng.integers(0, size, many)


def test_what_is_kept_of_an_example() -> None:
    # 64 fine bins to each of two on [.5, 1], 1/256 wide: .5 lies in bin 0, .502 too, .75 is the lower end of 64, 1 in the last
    found = stats.fine_bins([1.0, 0.5, 0.75, 0.502, 1.0], [1, 0.5, 0, 1, 1], [2, 0, 0, 0, 2], 3, 2, 0.5, 1)
    assert found["bin_fine"].tolist() == [128, 128, 128]
    assert [each.tolist() for each in found["bin_at"]] == [[0, 64], [], [127]]
    assert [each.tolist() for each in found["bin_count"]] == [[2, 1], [], [2]]
    assert [each.tolist() for each in found["bin_confidence"]] == [[1.002, 0.75], [], [2]]
    assert [each.tolist() for each in found["bin_correct"]] == [[1.5, 0], [], [2]]
    assert stats.bins_of(found) == 2
    assert stats.equal_width(found)["bin_count"].tolist() == [[2, 1], [0, 0], [0, 2]]
    assert stats.equal_width(found, 1)["bin_correct"].tolist() == [[1.5], [0], [2]]
    left = stats.without(found, np.array([True, False, False]))
    assert [each.tolist() for each in left["bin_count"]] == [[], [], [2]]
    assert found["bin_count"][0].tolist() == [2, 1]


@QUICK
@given(SEED, st.sampled_from([1, 2, 9]), st.sampled_from([1, 3, 10, 15, 33]), st.sampled_from([0.0, 0.5]))
def test_equal_width_bins_are_exactly_those_of_the_items(seed: int, size: int, bins: int, low: float) -> None:
    confidence, correct, owner = items(seed, size, bins, low)
    found = stats.equal_width(stats.fine_bins(confidence, correct, owner, size, bins, low, 1.0))
    where = owner * bins + stats.bin_index(confidence, bins, low, 1)
    for name, values in zip(BINS, (np.ones_like(confidence), confidence, correct), strict=True):
        straight = np.bincount(where, values, size * bins).reshape(size, bins)
        if name == "bin_confidence":  # an edge such as 1/3 is no float32: a sum of them may round
            np.testing.assert_allclose(found[name], straight, rtol=1e-14)
        else:
            assert (found[name] == straight).all()


@QUICK
@given(SEED, st.sampled_from([1, 2, 40, 70]), st.sampled_from([5, 15]), st.sampled_from([0.0, 0.5]))
def test_scores_of_records_are_those_of_the_items(seed: int, size: int, bins: int, low: float) -> None:
    """ece of dense sums alone, as earlier records have them; ece_equal_mass of confidences, from the same resamples."""
    confidence, correct, owner = items(seed, size, bins, low)
    keep = np.unique(owner)
    ids = [f"{i:03}" for i in keep]
    fine = {n: c[keep] for n, c in stats.fine_bins(confidence, correct, owner, size, bins, low, 1.0).items()}
    dense = stats.equal_width(fine)
    reward = {"reward": np.sqrt(np.arange(len(keep)))}
    new = stats.summarise(fine | reward, ids, bins=bins, resamples=FEW)
    old = stats.summarise(dense | reward, ids, bins=bins, resamples=FEW)
    assert new.keys() - old.keys() == {"ece_equal_mass", "ece_equal_mass_noise_floor"}
    assert {name: new[name] for name in old} == old  # dataclasses: every field, every bit
    raw = stats.ece(confidence, correct, bins, low, 1, clusters=owner, equal_mass=True, resamples=FEW)
    told = new["ece_equal_mass"]
    assert told.value == pytest.approx(raw.value, abs=1e-12)
    assert (told.low, told.n, told.clusters) == (pytest.approx(raw.low, abs=0.05), raw.n, raw.clusters)
    assert new["ece_equal_mass_noise_floor"].value == getattr(told, "noise_floor")  # noqa: B009


@QUICK
@given(SEED, st.sampled_from([2, 5, 15]), st.integers(1, 12))
def test_equal_mass_bins_are_the_blocks_of_sorted_confidences(seed: int, bins: int, each: int) -> None:
    """Where no block ends within a fine bin: against numpy's blocks, and scikit-learn's quantile bins."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.choice(np.arange(1, 64 * bins), bins - 1, replace=False)) / (64 * bins)
    edges = np.r_[0, ends, 1]
    confidence = np.concatenate([a + (b - a) * rng.uniform(0.01, 0.99, each) for a, b in pairwise(edges)])
    confidence = rng.permutation(confidence)
    correct = rng.integers(0, 2, len(confidence)).astype(float)
    order = np.argsort(confidence)
    blocks = [
        abs(right.mean() - sure.mean())
        for right, sure in zip(
            np.array_split(correct[order], bins), np.array_split(confidence[order], bins), strict=True
        )
    ]
    true, predicted = calibration_curve(correct, confidence, n_bins=bins, strategy="quantile")
    owner = rng.integers(0, 7, len(confidence))
    columns = stats.fine_bins(confidence, correct, owner, 7, bins)
    found = stats.summarise(columns, range(7), bins=bins, resamples=100)["ece_equal_mass"].value
    assert found == pytest.approx(np.mean(blocks), abs=1e-12)
    assert found == pytest.approx(np.abs(true - predicted).mean(), abs=1e-12)


@QUICK
@given(SEED, st.sampled_from([1, 2, 8]))
def test_within_the_histograms_resolution_for_any_confidences(seed: int, sharpness: int) -> None:
    """Each end of a block may move to the end of its fine bin: an item that does moves Σ|g| by 2 at most."""
    rng = np.random.default_rng(seed)
    confidence, size, bins = rng.beta(sharpness, 1, 3000), 3000, 15
    correct = (rng.random(size) < confidence**1.5).astype(float)
    order = np.argsort(confidence)
    gap = (correct - confidence)[order].reshape(bins, -1).sum(axis=1)
    where = np.floor(confidence[order] * 64 * bins)
    moved = sum((where == where[k]).sum() for k in range(200, size, 200))
    columns = stats.fine_bins(confidence, correct, np.arange(size) % 50, 50, bins)
    found = stats.summarise(columns, range(50), resamples=100)["ece_equal_mass"].value
    assert abs(found - np.abs(gap).sum() / size) <= 2 * moved / size  # type: ignore[operator]


def test_by_hand() -> None:
    """Vectors 2 and 7 of equal-width bins, in blocks of two: Σ|correct - confidence| over the sorted pairs, divided by N."""
    sure, right = [0.95, 0.85, 0.75, 0.65, 0.92, 0.55, 0.88, 0.72], [1, 1, 0, 1, 1, 0, 1, 1]
    columns = stats.fine_bins(sure, right, range(8), 8, 4, 0.5, 1)
    # .55 .65 | .72 .75 | .85 .88 | .92 .95, of which 1, 1, 2, 2 are right: (.2 + .47 + .27 + .13)/8
    assert stats.summarise(columns, range(8), bins=4)["ece_equal_mass"].value == pytest.approx(0.13375)
    sure, right = stats.fold_pairs([2, 0.5, -0.3, 1.2, 0, -1.5, 3, 0.8, 0.1, -0.2])
    columns = stats.fine_bins(sure, right, range(10), 10, 5, 0.5, 1)
    # |h| 0 .1 | .2 .3 | .5 .8 | 1.2 1.5 | 2 3:
    # (|1.5 - 1.024979| + 1.124276 + |2 - 1.312433| + |1 - 1.586099| + |2 - 1.833371|)/10
    assert stats.summarise(columns, range(10), bins=5)["ece_equal_mass"].value == pytest.approx(0.303959, abs=1e-6)


def test_bins_are_chosen_once_for_all_resamples() -> None:
    """A calibrated model's lower limit is 0; an overconfident one's is not; two sides are compared each in its own bins."""
    rng = np.random.default_rng(0)
    owner, confidence = np.arange(2000) % 200, rng.uniform(0.3, 1, 2000)
    right = {tilt: (rng.random(2000) < confidence - tilt).astype(float) for tilt in (0, 0.15)}
    sides = {tilt: stats.fine_bins(confidence, correct, owner, 200) for tilt, correct in right.items()}
    calibrated, off = (stats.summarise(side, range(200))["ece_equal_mass"] for side in sides.values())
    assert calibrated.low == 0
    assert off.low is not None
    assert off.low > 0.1
    change = stats.paired(sides[0.15], range(200), sides[0], range(200))["ece_equal_mass"]
    assert (change.value_a, change.value_b) == (off.value, calibrated.value)
    assert change.low is not None
    assert change.low > 0.08
    assert change.lower_is_better
    assert "points" in change.sentence


def test_records_without_a_fine_histogram_are_compared_in_equal_widths_alone() -> None:
    columns = stats.fine_bins(*items(1, 40, 15, 0.0), 40)
    found = stats.paired(columns, range(40), stats.equal_width(columns), range(40))
    assert found.keys() == {"ece"}
    assert (found["ece"].value, found["ece"].high) == (0, 0)


def broken(**changed: Any) -> dict[str, Any]:
    return stats.fine_bins([0.2, 0.9], [0, 1], [0, 1], 2) | changed


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            broken(bin_fine=[640, 640], bin_at=[[192], [600]]),
            "the 640 fine bins of these records do not make 15 equal ones; give bins=10",
        ),
        (broken(bin_fine=[960, 640]), "the same for all examples"),
        (broken(bin_fine=[64, 64], bin_at=[[192], [100]]), r"bin_at must lie in 0 \.\. 63; got 100 to 192"),
        (broken(bin_correct=[[1.0, 2.0], [3.0]]), "bin_correct must have a number for each bin of bin_at"),
        (broken(bin_confidence=[[float("nan")], [3.0]]), "bin_confidence must be finite"),
        ({k: v for k, v in broken().items() if k != "bin_fine"}, "belong together; bin_fine missing"),
    ],
)
def test_errors_say_what_is_wrong(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stats.summarise(columns, [1, 2])


def test_nothing_to_score_is_none() -> None:
    for examples in (0, 40):
        columns = stats.fine_bins([], [], [], examples)
        assert len(columns["bin_at"]) == examples
        found = stats.summarise(columns, range(examples))
        assert found["ece_equal_mass"].value is found["ece"].value is found["ece_equal_mass_noise_floor"].value is None
