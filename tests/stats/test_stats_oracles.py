"""Agreement with libraries that know nothing of ours: scipy.stats.bootstrap and statsmodels, over random inputs."""

from unittest.mock import patch

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from torchmetrics.functional.classification import binary_calibration_error

from posttrain import stats

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
COUNTS = st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@QUICK
@given(COUNTS, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_and_wald_are_those_of_statsmodels(counts: tuple[int, int], level: float) -> None:
    for function, method in ((stats.wilson, "wilson"), (stats.wald, "normal")):
        found = function(*counts, level=level)
        low, high = proportion_confint(*counts, alpha=1 - level, method=method)
        # statsmodels cuts Wald at 0 and 1; ours tells the formula's ends
        ours = np.clip([found.low, found.high], 0, 1)
        assert ours == pytest.approx([low, high], abs=1e-9)


@QUICK
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_that_of_statsmodels(only_a: int, only_b: int) -> None:
    expected = mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue
    assert stats.mcnemar(only_a, only_b) == pytest.approx(min(1, expected), rel=1e-9)


@QUICK
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    with patch("gc.collect"):  # which statsmodels calls each time
        expected = multipletests(p_values, method="holm")[1]
    assert stats.holm(p_values) == pytest.approx(expected, abs=1e-12)


def ratio_of(sums: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
    return sums.sum(axis=axis) / tokens.sum(axis=axis)


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("size", [12, 80])
@pytest.mark.parametrize("seed", [1, 2])
def test_bootstrap_of_a_ratio_is_that_of_scipy(method: str, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 60, size).astype(float)
    sums = tokens * rng.gamma(2, 1, size)
    oracle = scipy.stats.bootstrap((sums, tokens), ratio_of, paired=True, vectorized=True, n_resamples=20_000,
                                   method=method, rng=rng)  # fmt: skip
    found = stats.bootstrap(sums, tokens, resamples=20_000, method=method)
    # the Monte Carlo error of a 2.5 % quantile of 20,000 draws is 0.02 standard deviations; two of them, at 4 sigma
    assert found.low == pytest.approx(oracle.confidence_interval.low, abs=0.11 * oracle.standard_error)
    assert found.high == pytest.approx(oracle.confidence_interval.high, abs=0.11 * oracle.standard_error)


def test_bca_differs_from_percentile_where_it_should() -> None:
    rng = np.random.default_rng(0)
    skewed = rng.lognormal(0, 1.2, 60)
    plain, corrected = (stats.bootstrap(skewed, method=m) for m in ("percentile", "bca"))
    assert corrected.low - plain.low > 0.05 * plain.se
    assert corrected.high - plain.high > 0.2 * plain.se


@pytest.mark.parametrize("size", [30, 400])
def test_bootstrap_of_a_mean_is_that_of_scipy(size: int) -> None:
    rng = np.random.default_rng(size)
    values = rng.exponential(size=size)
    oracle = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=rng)
    found = stats.bootstrap(values, resamples=20_000)
    assert found.value == pytest.approx(values.mean())
    assert found.se == pytest.approx(scipy.stats.sem(values))
    assert found.low == pytest.approx(oracle.confidence_interval.low, abs=0.11 * found.se)
    assert found.high == pytest.approx(oracle.confidence_interval.high, abs=0.11 * found.se)


def test_t_interval_is_that_of_scipy() -> None:
    values = np.random.default_rng(3).normal(size=11)
    low, high = scipy.stats.t.interval(0.9, 10, loc=values.mean(), scale=scipy.stats.sem(values))
    found = stats.bootstrap(values, level=0.9)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_paired_t_is_that_of_scipy() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=12), rng.normal(size=12)
    found, oracle = stats.paired_difference(a, b), scipy.stats.ttest_rel(a, b)
    assert found.p_value == pytest.approx(oracle.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval()))
    assert found.correlation == pytest.approx(scipy.stats.pearsonr(a, b)[0])


def test_paired_bootstrap_is_that_of_scipy() -> None:
    rng = np.random.default_rng(5)
    tokens = rng.integers(1, 60, 90).astype(float)
    a, b = tokens * rng.gamma(2, 1, 90), tokens * rng.gamma(2, 1.1, 90)
    oracle = scipy.stats.bootstrap((a, b, tokens), lambda x, y, n, axis=-1: ratio_of(x, n, axis) - ratio_of(y, n, axis),
                                   paired=True, vectorized=True, n_resamples=20_000, method="percentile",
                                   rng=rng)  # fmt: skip
    found = stats.paired_difference(a, b, tokens, resamples=20_000)
    assert found.se == pytest.approx(oracle.standard_error, rel=0.05)
    assert found.low == pytest.approx(oracle.confidence_interval.low, abs=0.11 * oracle.standard_error)
    assert found.high == pytest.approx(oracle.confidence_interval.high, abs=0.11 * oracle.standard_error)


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), min_size=1, max_size=60),
    st.sampled_from([1, 2, 3, 5, 6, 10, 12, 15, 20]),
)
def test_ece_mce_and_brier_are_their_definitions(items: list[tuple[int, int]], bins: int) -> None:
    """Against exact whole-number arithmetic: confidence k/60 lies in bin k*bins//60."""
    by_bin: dict[int, list[tuple[float, float]]] = {}
    for k, half in items:
        by_bin.setdefault(min(k * bins // 60, bins - 1), []).append((k / 60, half / 2))
    gaps = [abs(sum(c for _, c in b) / len(b) - sum(p for p, _ in b) / len(b)) for b in by_bin.values()]
    weights = [len(b) / len(items) for b in by_bin.values()]
    confidence, correct = [k / 60 for k, _ in items], [half / 2 for _, half in items]
    found = stats.ece(confidence, correct, bins, resamples=100)
    assert found.value == pytest.approx(sum(w * g for w, g in zip(weights, gaps, strict=True)), abs=1e-12)
    assert stats.mce(confidence, correct, bins, resamples=100).value == pytest.approx(max(gaps), abs=1e-12)
    squares = [(p - c) ** 2 for p, c in zip(confidence, correct, strict=True)]
    assert stats.brier(confidence, correct, resamples=100).value == pytest.approx(sum(squares) / len(squares))


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 400), st.sampled_from([1, 4, 10, 15, 20]), st.floats(0.3, 3))
def test_ece_and_mce_are_those_of_torchmetrics(seed: int, size: int, bins: int, sharpness: float) -> None:
    """Its fp32 edges are off by a rounding, so confidences keep away from them."""
    rng = np.random.default_rng(seed)
    confidence = (rng.integers(0, bins, size) + rng.uniform(0.01, 0.99, size)) / bins
    correct = rng.random(size) < confidence**sharpness
    given_to = torch.tensor(confidence), torch.tensor(correct)
    expected = {norm: float(binary_calibration_error(*given_to, n_bins=bins, norm=norm)) for norm in ("l1", "max")}
    assert stats.ece(confidence, correct, bins, resamples=100).value == pytest.approx(expected["l1"], abs=1e-6)
    assert stats.mce(confidence, correct, bins, resamples=100).value == pytest.approx(expected["max"], abs=1e-6)


@QUICK
@given(st.integers(0, 10**6), st.floats(0.2, 5), st.sampled_from([2, 7, 40]))
def test_temperature_is_that_of_a_general_minimiser(seed: int, true: float, classes: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (80, classes))
    p = scipy.special.softmax(z / true, axis=1)
    y = (p.cumsum(axis=1) < rng.random((80, 1))).sum(axis=1).clip(max=classes - 1)

    def loss(log_t: float) -> float:
        scaled = z / np.exp(log_t)
        return -(scaled[range(80), y] - scipy.special.logsumexp(scaled, axis=1)).mean()

    best = scipy.optimize.minimize_scalar(loss, bounds=np.log([0.05, 20]), method="bounded", options={"xatol": 1e-10})
    found = stats.fit_temperature(z, y, resamples=100)
    assert found.value is not None
    assert loss(np.log(found.value)) <= best.fun + 1e-12
    if not found.at_bound:
        assert found.value == pytest.approx(np.exp(best.x), rel=1e-4)
        assert found.nll_after.value == pytest.approx(best.fun)  # type: ignore[union-attr]
