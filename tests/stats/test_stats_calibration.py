"""Bin edges, equal-mass bins, the corrected interval, reliability bars, folded pairs."""

import math
from fractions import Fraction

import numpy as np
import pytest

from posttrain import stats


@pytest.mark.parametrize("bins", [1, 4, 5, 10, 15, 20, 33, 960])
@pytest.mark.parametrize("low", [Fraction(0), Fraction(1, 2)])
def test_edges_are_the_nearest_doubles(bins: int, low: Fraction) -> None:
    exact = [float(low + (1 - low) * k / bins) for k in range(bins + 1)]  # a Fraction becomes the nearest double
    assert stats.bin_edges(bins, float(low), 1).tolist() == exact


def test_edges_where_other_formulas_go_wrong() -> None:
    linspace, floor = np.linspace(0, 1, 11), np.floor((stats.bin_edges(15, 0.5, 1) - 0.5) / 0.5 * 15)
    assert [k for k in range(11) if linspace[k] != k / 10] == [3, 6, 7]
    assert (floor[:15] != np.arange(15)).sum() == 7
    assert stats.bin_index([0.3, 0.6, 0.7], 10).tolist() == [3, 6, 7]


@pytest.mark.parametrize(("bins", "low"), [(10, 0.0), (15, 0.0), (15, 0.5), (5, 0.5), (1, 0.0)])
def test_a_bin_holds_its_lower_edge_and_the_last_one_both(bins: int, low: float) -> None:
    edges = stats.bin_edges(bins, low, 1)
    assert stats.bin_index(edges, bins, low, 1).tolist() == [*range(bins), bins - 1]
    assert stats.bin_index(np.nextafter(edges[1:], 0), bins, low, 1).tolist() == list(range(bins))


def test_a_float32_softmax_may_exceed_1_by_a_rounding_but_not_by_more() -> None:
    assert stats.bin_index(np.float32(1) + np.finfo(np.float32).eps, 15).item() == 14
    with pytest.raises(ValueError, match="confidence must lie"):
        stats.bin_index(1.001, 15)
    with pytest.raises(ValueError, match="got nan"):
        stats.bin_index(math.nan, 15)


def test_pairs_are_folded() -> None:
    confidence, correct = stats.fold_pairs([0.0, math.log(3), -math.log(3)])
    assert confidence == pytest.approx([0.5, 0.75, 0.75])
    assert correct.tolist() == [0.5, 1, 0]


def test_bin_sums_by_cluster() -> None:
    found = stats.bin_sums([0.1, 0.9, 0.95, 0.2], [1, 0, 1, 0], bins=2, clusters=["b", "a", "b", "b"])
    assert found.items.tolist() == [[0, 1], [2, 1]]
    assert found.confidence == pytest.approx(np.array([[0, 0.9], [0.3, 0.95]]))
    assert found.correct.tolist() == [[0, 0], [1, 1]]


def test_equal_mass_bins_hold_equal_counts() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.beta(8, 1, 3000)  # crowded near 1: equal widths would leave most bins empty
    correct = rng.random(3000) < confidence
    merged = stats.merge_equal_mass(stats.bin_sums(confidence, correct, 15 * 64), 15)
    counts = merged.items.sum(axis=0)
    # a fine bin near 1 holds 3000 * 8 / 960 = 25 items, and no bin is off by more than one fine bin at each end
    assert counts == pytest.approx(np.full(15, 200), abs=50)
    assert merged.confidence.sum() == pytest.approx(confidence.sum())
    straight = stats.bin_sums(confidence, correct, 15, equal_mass=True)
    assert all((one == other).all() for one, other in zip(straight, merged, strict=True))


def test_equal_mass_never_splits_a_fine_bin() -> None:
    counts = np.array([[1.0, 0, 10, 1, 0, 0]])
    merged = stats.merge_equal_mass(stats.BinSums(counts, counts / 2, counts / 4), 4)
    assert merged.items.tolist() == [[11, 1]]
    assert merged.correct.tolist() == [[2.75, 0.25]]


def test_equal_mass_ece_against_sorted_blocks() -> None:
    confidence = (np.arange(600) + 0.5) / 600
    correct = (np.arange(600) % 3 > 0).astype(float)
    blocks = [abs(correct[k : k + 40].mean() - confidence[k : k + 40].mean()) for k in range(0, 600, 40)]
    found = stats.ece(confidence, correct, equal_mass=True, resamples=100)
    assert found.value == pytest.approx(np.mean(blocks))


def simulated(seed: int, tilt: float, size: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.3, 1, size)
    return confidence, (rng.random(size) < confidence - tilt).astype(float)


def test_a_calibrated_model_reaches_down_to_0_and_its_ece_is_its_noise_floor() -> None:
    found = [stats.ece(*simulated(seed, 0), resamples=400) for seed in range(40)]
    assert sum(e.low == 0 for e in found) >= 35  # 38 expected, binomial sd 1.4
    # by hand: Σ_b E|N(0, n_b p(1-p))| / N = √(2/π) Σ_b sqrt(n_b mean p(1-p)) / N over the bins of [.3, 1]
    p = np.linspace(0.3, 1, 70_001)
    variance = np.bincount((p * 15).astype(int).clip(max=14), p * (1 - p)) / len(p) * 2000
    by_hand = math.sqrt(2 / math.pi) * np.sqrt(variance).sum() / 2000
    floor = np.mean([e.noise_floor for e in found])
    assert floor == pytest.approx(by_hand, rel=0.05)
    assert np.mean([e.value for e in found]) == pytest.approx(floor, rel=0.1)
    # for noise alone, g ~ N(0, 1): E|g| = √(2/π); its estimated bias is 2/√π - E|g| (Stein), so 2√(2/π) - 2/√π is left
    left = 2 - math.sqrt(2)
    assert np.mean([e.debiased for e in found]) == pytest.approx(left * floor, rel=0.1)


def test_a_miscalibrated_model_does_not_and_its_debiased_ece_is_nearer_the_truth() -> None:
    found = [stats.ece(*simulated(seed, 0.05, 500), resamples=400) for seed in range(40)]
    large = stats.ece(*simulated(1, 0.2), resamples=400)
    assert large.low > 0.15
    assert large.p_value == 1 / 401
    values = np.array([e.value for e in found])
    assert values.mean() - 0.05 > 3 * values.std() / math.sqrt(40)  # biased upward: the truth is .05
    assert abs(np.mean([e.debiased for e in found]) - 0.05) < (values.mean() - 0.05) / 2
    assert all(e.low <= e.value <= e.high for e in found)


def test_tokens_of_one_document_are_not_independent() -> None:
    confidence, correct = simulated(0, 0.1, 200)
    alone = stats.ece(confidence, correct, resamples=2000)
    ninefold, owner = (np.tile(confidence, 9), np.tile(correct, 9)), np.tile(np.arange(200), 9)
    repeated = stats.ece(*ninefold, clusters=owner, resamples=2000)
    assert repeated.value == pytest.approx(alone.value)
    assert repeated.se == pytest.approx(alone.se, rel=0.1)
    assert repeated.noise_floor == pytest.approx(alone.noise_floor, rel=0.1)
    assert (repeated.n, repeated.clusters) == (1800, 200)


def test_from_bins_is_the_same_as_from_items() -> None:
    confidence, correct = simulated(0, 0.1, 300)
    sums = stats.bin_sums(confidence, correct)
    assert stats.ece_from_bins(*sums) == stats.ece(confidence, correct)
    assert stats.mce_from_bins(*sums) == stats.mce(confidence, correct)


def test_mce_is_decided_by_its_worst_bin_and_says_how_noisy_that_is() -> None:
    confidence, correct = np.r_[np.full(1000, 0.55), [0.95, 0.96]], np.r_[np.tile([1, 1, 0, 1, 0], 200), [0, 0]]
    found = stats.mce(confidence, correct, 10)
    assert found.value == pytest.approx(0.955)
    assert stats.ece(confidence, correct, 10).value == pytest.approx((1000 * 0.05 + 2 * 0.955) / 1002)


def test_reliability_bars() -> None:
    confidence, correct = simulated(0, 0.1, 2000)
    bars = stats.reliability(*stats.bin_sums(confidence, correct))
    assert [(b.low, b.high) for b in bars] == [(k / 15, (k + 1) / 15) for k in range(15)]
    inside = (confidence >= 9 / 15) & (confidence < 10 / 15)
    bar = bars[9]
    assert bar.items == inside.sum() == bar.accuracy.n
    assert bar.confidence == pytest.approx(confidence[inside].mean())
    assert bar.accuracy == stats.wilson(correct[inside].sum(), inside.sum())
    # by hand: gaps .5 .5 .5 -.5 about their mean .25, se = sqrt(4/3 * .75)/4 = .25
    (four,) = stats.reliability(*stats.bin_sums([0.5] * 4, [1, 1, 1, 0], 1))
    assert four.noise == pytest.approx(1.959964 * 0.25)
    assert (bars[0].items, bars[0].confidence, bars[0].accuracy.value, bars[0].noise) == (0, None, None, None)
    gaps = sum(b.items / 2000 * abs(b.accuracy.value - b.confidence) for b in bars if b.items)
    assert gaps == pytest.approx(stats.ece(confidence, correct).value)
    with pytest.raises(ValueError, match="bin_sums"):
        stats.reliability([1, 2], [1, 2], [1, 2])
