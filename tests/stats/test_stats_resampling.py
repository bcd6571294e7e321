"""The weights-by-rows product: exact sums, the right distribution, the shortcuts for many rows and few values."""

import math

import numpy as np
import pytest
import scipy.stats

from posttrain import stats
from posttrain.stats import resampling


def test_sums_are_exact_so_no_blas_or_thread_count_can_change_a_bit() -> None:
    rng = np.random.default_rng(0)
    rows = resampling._on_grid(rng.lognormal(0, 3, (3000, 4)) * np.array([1e-9, 1, -1e9, 3]), 3000)
    weights = rng.multinomial(3000, np.full(3000, 1 / 3000), size=20).astype(float)
    exact = [[math.fsum(w * column) for column in rows.T] for w in weights]  # fsum rounds once, at the end
    assert (weights @ rows == exact).all()
    assert (weights[:, ::-1] @ rows[::-1] == exact).all()


def test_the_grid_moves_nothing_that_matters() -> None:
    rng = np.random.default_rng(0)
    rows = rng.lognormal(0, 3, (100_000, 1))
    moved = np.abs(resampling._on_grid(rows, len(rows)) - rows).sum()
    assert moved < 1e-6 * rows.std() * math.sqrt(len(rows))
    whole = rng.integers(0, 2000, (100_000, 3)).astype(float)
    assert (resampling._on_grid(whole, len(whole)) == whole).all()


@pytest.mark.parametrize("size", [7, 500, 20_000])
def test_chunks_do_not_show(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(size).normal(size=(size, 3))
    whole = resampling.resampled_sums(rows, 100, 5)
    monkeypatch.setattr(resampling, "CHUNK_WEIGHTS", 3 * size + 1)
    monkeypatch.setattr(resampling, "BLOCK_WEIGHTS", 2 * size + 1)
    assert (resampling.resampled_sums(rows, 100, 5) == whole).all()
    assert (resampling.resampled_sums(rows, 100, 6) != whole).any()


def test_every_resample_draws_d_examples_and_every_draw_is_equally_likely() -> None:
    weights = resampling.resampled_sums(np.eye(50), 4000, 0)  # the sums of unit vectors are the weights themselves
    assert (weights.sum(axis=1) == 50).all()
    assert (weights == np.rint(weights)).all()
    counts = weights.sum(axis=0)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    # one example's weight is binomial(50, 1/50)
    expected = scipy.stats.binom.pmf(np.arange(6), 50, 1 / 50)
    seen = np.array([(weights == k).mean() for k in range(6)])
    assert seen == pytest.approx(expected, abs=0.005)
    # two examples' weights are negatively correlated, -1/(D-1), and nothing else
    assert np.cov(weights.T)[~np.eye(50, dtype=bool)].mean() == pytest.approx(-1 / 50, abs=0.002)


def test_few_distinct_rows_have_the_exact_distribution() -> None:
    right = np.r_[np.ones(300), np.zeros(700)]
    sums = resampling.resampled_sums(np.stack([right, np.ones(1000)], 1), 50_000, 0)
    assert (sums[:, 1] == 1000).all()
    assert scipy.stats.kstest(sums[:, 0] + np.random.default_rng(0).uniform(-0.5, 0.5, 50_000),
                              lambda x: _binomial_plus_uniform(x)).pvalue > 1e-3  # fmt: skip


def _binomial_plus_uniform(x: np.ndarray) -> np.ndarray:
    whole = np.floor(x + 0.5)
    below = scipy.stats.binom.cdf(whole - 1, 1000, 0.3)
    return below + (x + 0.5 - whole) * scipy.stats.binom.pmf(whole, 1000, 0.3)


def test_few_distinct_rows_are_found_whole() -> None:
    rows = np.array([[1, 0.5], [0, 0.5], [1, 0.5], [1, 0.25], [0, 0.5]])
    values, counts = resampling._few_distinct(rows)  # type: ignore[misc]
    assert dict(zip(map(tuple, values.tolist()), counts.tolist(), strict=True)) == {
        (0, 0.5): 2, (1, 0.25): 1, (1, 0.5): 2,
    }  # fmt: skip
    assert resampling._few_distinct(np.arange(65.0)[:, None]) is None
    late = np.r_[np.zeros(2000), np.arange(100)][:, None]  # looks constant at first
    assert resampling._few_distinct(late) is None


def test_random_groups_keep_the_totals_and_the_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 60, 30_011).astype(float)
    sums = tokens * rng.gamma(2, 1, len(tokens))
    whole = stats.nll(sums, tokens, resamples=2000)
    monkeypatch.setattr(resampling, "MAX_ROWS", 3000)
    grouped = stats.nll(sums, tokens, resamples=2000)
    assert (grouped.value, grouped.se) == (whole.value, whole.se)
    # relative error of a width: 1/sqrt(2*3000) from the groups, about 3.5 % from 2,000 draws; three sigma of both
    assert grouped.high - grouped.low == pytest.approx(whole.high - whole.low, rel=0.13)
    assert grouped.high - grouped.low == pytest.approx(2 * 1.96 * whole.se, rel=0.11)
    assert grouped.low < grouped.value < grouped.high
    generator = np.random.default_rng(0)
    assert resampling._random_groups(np.ones((30_011, 1)), generator).sum() == 30_011
    assert np.ptp(resampling._random_groups(np.ones((30_011, 1)), generator)) == 1


def test_a_huge_set_stays_small_in_memory() -> None:
    found = stats.bootstrap(np.arange(150_000.0), np.full(150_000, 2.0), resamples=100)
    assert found.value == pytest.approx(149_999 / 4)
    assert found.clusters == 150_000
