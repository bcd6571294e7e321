"""What holds for any input: order and seed, clusters, bounds, nothing to score."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import stats

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
SEED = st.integers(0, 2**32 - 1)
FEW = 200  # resamples


def records(rng: np.random.Generator, size: int, bins: int = 15) -> dict[str, np.ndarray]:
    tokens = rng.integers(1, 40, size)
    owner = np.repeat(np.arange(size), tokens)
    confidence = rng.beta(4, 2, len(owner))
    correct = rng.random(len(owner)) < confidence
    sums = stats.bin_sums(confidence, correct, bins, clusters=owner)
    return {
        "nll_sum": tokens * rng.gamma(2, 1, size),
        "tokens": tokens.astype(float),
        "bytes": tokens * 4.0,
        "chars": tokens * 3.0,
        "correct": np.bincount(owner, correct),
        "brier_sum": np.bincount(owner, (confidence - correct) ** 2),
        "bin_count": sums.items,
        "bin_confidence": sums.confidence,
        "bin_correct": sums.correct,
        "accuracy": rng.integers(0, 2, size).astype(float),
        "reward": rng.normal(size=size),
    }


def permuted(columns: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    return {name: column[order] for name, column in columns.items()}


@QUICK
@given(SEED, st.sampled_from([1, 2, 3, 29, 30, 70, 110]), st.booleans())
def test_summarise_is_the_same_bits_in_any_order(seed: int, size: int, clustered: bool) -> None:
    rng = np.random.default_rng(seed)
    columns, ids = records(rng, size), np.array([f"id{k:03}" for k in range(size)])
    clusters = rng.integers(0, 9, size).astype(str) if clustered else None
    order = rng.permutation(size)
    first = stats.summarise(columns, ids, clusters, resamples=FEW)
    again = stats.summarise(
        permuted(columns, order), ids[order], None if clusters is None else clusters[order], resamples=FEW
    )
    assert first == again  # dataclasses: every field, every bit


@QUICK
@given(SEED, st.sampled_from([1, 2, 20, 64, 65, 90, 150]))  # 64 distinct rows or fewer take another way
def test_functions_without_ids_are_the_same_bits_in_any_order(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, n = rng.normal(size=size), rng.normal(size=size), rng.integers(1, 9, size).astype(float)
    confidence, correct = rng.random(size), rng.integers(0, 2, size)
    groups = rng.integers(0, 5, size)
    z, y = rng.normal(size=(size, 3)), rng.integers(0, 3, size)
    order = rng.permutation(size)
    for run in (
        lambda o: stats.bootstrap(a[o], n[o], resamples=FEW),
        lambda o: stats.bootstrap(a[o], method="percentile", resamples=FEW),
        lambda o: stats.perplexity(n[o] * 1.1, n[o], resamples=FEW),
        lambda o: stats.ece(confidence[o], correct[o], resamples=FEW),
        lambda o: stats.ece(confidence[o], correct[o], clusters=groups[o], equal_mass=True, resamples=FEW),
        lambda o: stats.mce(confidence[o], correct[o], clusters=groups[o], resamples=FEW),
        lambda o: stats.brier(confidence[o], correct[o], resamples=FEW),
        lambda o: stats.paired_difference(a[o], b[o], n[o], resamples=FEW),
        lambda o: stats.paired_difference(a[o], b[o], clusters=groups[o], resamples=FEW),
        lambda o: stats.clustered_wilson(n[o] / 9, n[o]),
        lambda o: stats.fit_temperature(z[o], y[o], clusters=groups[o], resamples=FEW),
    ):
        assert run(order) == run(np.arange(size))


@QUICK
@given(SEED, st.integers(2, 60))
def test_the_join_is_by_id_and_the_same_bits_in_any_order(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, ids = records(rng, size), records(rng, size), rng.permutation(1000)[:size]
    first, second = rng.permutation(size), rng.permutation(size)
    expected = stats.paired(a, ids, b, ids, resamples=FEW)
    shuffled = stats.paired(permuted(a, first), ids[first], permuted(b, second), ids[second], resamples=FEW)
    assert shuffled == expected
    plain = stats.paired_difference(a["reward"], b["reward"], ids_a=ids, ids_b=ids, resamples=FEW)
    mixed = stats.paired_difference(
        a["reward"][first], b["reward"][second], ids_a=ids[first], ids_b=ids[second], resamples=FEW
    )
    assert mixed == plain
    assert plain.value == pytest.approx(expected["reward"].value)


@QUICK
@given(SEED, st.integers(2, 50))
def test_windows_of_one_document_count_as_one_example(seed: int, size: int) -> None:
    """Cutting each document into windows changes nothing once they are clustered."""
    rng = np.random.default_rng(seed)
    pieces = {name: rng.integers(0, 64, (size, 3)).astype(float) for name in ("nll_sum", "bytes", "chars")}
    pieces["tokens"] = rng.integers(1, 64, (size, 3)).astype(float)
    pieces["correct"] = rng.integers(0, pieces["tokens"] + 1).astype(float)
    whole = stats.summarise({k: v.sum(axis=1) for k, v in pieces.items()}, np.arange(size), resamples=FEW)
    windows = stats.summarise(
        {k: v.ravel() for k, v in pieces.items()}, np.arange(3 * size), np.repeat(np.arange(size), 3), resamples=FEW
    )
    assert windows == whole
    assert windows["nll"].clusters == size


@QUICK
@given(SEED, st.integers(1, 60))
def test_bounds(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    found = stats.summarise(records(rng, size), np.arange(size), resamples=FEW)
    for name, e in found.items():
        if e.low is None:
            assert name == "ece_noise_floor" or size == 1 or "overflow" in e.method, name
            continue
        assert e.low <= e.value <= e.high, name
        if name in ("token_accuracy", "accuracy", "ece", "mce", "brier"):
            assert e.low >= 0, name
        if name in ("token_accuracy", "accuracy", "ece", "mce"):
            assert e.high <= 1, name
    assert found["perplexity"].value == math.exp(found["nll"].value)
    assert found["bits_per_byte"].value == pytest.approx(found["nll"].value / math.log(2) / 4)
    assert found["mce"].value >= found["ece"].value - 1e-12


@QUICK
@given(SEED, st.floats(0.01, 100), st.integers(2, 60))
def test_units_change_units_only(seed: int, factor: float, size: int) -> None:
    rng = np.random.default_rng(seed)
    sums, tokens = rng.gamma(2, 1, size), rng.integers(1, 9, size).astype(float)
    one, other = (stats.bootstrap(sums * f, tokens, resamples=FEW) for f in (1, factor))
    for name in ("value", "low", "high", "se"):
        assert getattr(other, name) == pytest.approx(factor * getattr(one, name), rel=1e-6)


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).normal(size=100)
    assert stats.bootstrap(values, seed=1) == stats.bootstrap(values, seed=1)
    assert stats.bootstrap(values, seed=1) != stats.bootstrap(values, seed=2)


def test_nothing_to_score_is_none_never_zero() -> None:
    empty: list[float] = []
    found = [
        stats.nll(empty, empty), stats.perplexity(empty, empty), stats.bits_per_byte([3.0, 1.0], [0, 0]),
        stats.bootstrap(empty), stats.wilson(0, 0), stats.wald(0, 0), stats.clustered_wilson(empty, empty),
        stats.ece(empty, empty), stats.mce(empty, empty), stats.brier(empty, empty),
        stats.ece(empty, empty, equal_mass=True), stats.paired_difference(empty, empty),
        stats.fit_temperature(np.empty((0, 4)), np.empty(0, int)),
    ]  # fmt: skip
    columns = {name: column[:0] for name, column in records(np.random.default_rng(0), 3).items()}
    found += stats.summarise(columns, []).values()
    found += stats.paired(columns, [], columns, []).values()
    unscored = {name: 0 * column for name, column in records(np.random.default_rng(0), 40).items()}
    found += [stats.summarise(unscored, range(40))[name] for name in ("nll", "token_accuracy", "ece", "mce", "brier")]
    assert len(found) > 30
    for e in found:
        assert (e.value, e.low, e.high, e.se, e.n) == (None, None, None, None, 0)
        assert str(e) == "no items"


def test_one_example_has_a_value_and_no_interval() -> None:
    columns = records(np.random.default_rng(0), 1)
    found = stats.summarise(columns, ["only"])
    for name in ("nll", "perplexity", "ece", "mce", "brier", "reward"):
        assert found[name].value is not None
        assert found[name].low is found[name].high is found[name].se is None
        assert "one example" in found[name].method
    assert found["accuracy"].low is not None  # Wilson needs no second example


def test_no_variation_gives_an_interval_of_no_width_and_perfect_scores_keep_theirs() -> None:
    constant = stats.nll([2.2] * 50, [2] * 50)
    assert constant.low == constant.value == constant.high == 1.1
    perfect = stats.summarise({"correct": np.full(40, 5.0), "tokens": np.full(40, 5.0)}, range(40))["token_accuracy"]
    # all right in 40 documents of 5 tokens: as sure as 40 items, not 200; 40/(40 + 1.959964²)
    assert (perfect.value, perfect.high, perfect.n, perfect.clusters) == (1, 1, 200, 40)
    assert perfect.low == pytest.approx(40 / (40 + 1.959964**2), abs=1e-6)


def test_a_score_that_cannot_be_negative_has_no_negative_end() -> None:
    for found in (
        stats.nll([0.1, 20.0], [1, 1]),
        stats.brier([0.9, 0.1, 0.2], [1, 1, 0]),
        stats.summarise({"nll_sum": [0.1, 20.0], "tokens": [1, 1]}, [1, 2])["nll"],
    ):
        assert found.low == 0
        assert found.high > found.value
    assert stats.perplexity([0.1, 20.0], [1, 1]).low == 1
    assert stats.summarise({"reward": [0.1, 20.0]}, [1, 2])["reward"].low < 0


def test_resamples_without_any_item_are_left_out_and_counted() -> None:
    found = stats.bits_per_byte(np.arange(40.0), np.r_[np.zeros(38), 100, 90], resamples=2000)
    left_out = int(found.method.split(", ")[1].split()[0])
    assert left_out == pytest.approx(2000 * (1 - 2 / 40) ** 40, rel=0.2)  # 257 expected, sd 15
    assert found.low > 0


def test_few_clusters_widen_wilson_and_agreeing_clusters_do_not_narrow_it() -> None:
    hits, items = [1, 3, 4, 2, 5], [5, 5, 5, 5, 5]
    found = stats.clustered_wilson(hits, items)
    # by hand: p = .6, e = (-2, 0, 1, -1, 2)/25, SE² = 5/4 * 10/625 = .02, n_eff = .24/.02 = 12, t(.975, 4) = 2.776445
    z2 = 2.776445**2
    half = 2.776445 / (1 + z2 / 12) * math.sqrt(0.24 / 12 + z2 / 576)
    centre = (0.6 + z2 / 24) / (1 + z2 / 12)
    assert (found.value, found.se) == pytest.approx((0.6, math.sqrt(0.02)))
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-6)
    for odd in (2, 3):  # all half right, or all but one: (nearly) no spread, yet 160 items at most
        agreeing, plain = stats.clustered_wilson([*[2.0] * 39, odd], [4] * 40), stats.wilson(78 + odd, 160)
        assert (agreeing.low, agreeing.high) == pytest.approx((plain.low, plain.high))


def test_overflow_is_none_not_infinity() -> None:
    found = stats.perplexity([700.0, 800.0], [1, 1])
    assert found.value is None
    assert "too large" in found.method
    wide = stats.perplexity([300.0, 800.0], [1, 1])
    assert wide.value == pytest.approx(math.exp(550))
    assert wide.high is None


def test_as_dict_has_the_seven_fields_in_plain_types() -> None:
    found = stats.summarise(records(np.random.default_rng(0), 40), range(40))["ece"].as_dict()
    assert list(found) == ["value", "low", "high", "se", "n", "clusters", "method"]
    assert [type(v) for v in found.values()] == [float, float, float, float, int, int, str]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: stats.nll([1.0, math.nan], [1, 1]), "finite.*position"),
        (lambda: stats.nll([1.0], [1, 1]), "token_counts has 2 examples, but 1"),
        (lambda: stats.nll([1.0, 2.0], [1, -1]), "at least 0.*-1 at position 1"),
        (lambda: stats.nll([[1.0]], [[1]]), "one dimension"),
        (lambda: stats.wilson(30, 20), "between 0 and n = 20"),
        (lambda: stats.wilson(-1, 20), "between 0 and n"),
        (lambda: stats.wilson(1, -2), "0 or more"),
        (lambda: stats.wilson(1, 2, level=95), "level must be between 0 and 1, got 95; try 0.95"),
        (lambda: stats.bootstrap([1.0, 2.0], resamples=10), "resamples.*at least 100, got 10"),
        (lambda: stats.bootstrap([1.0, 2.0], method="BCA"), "auto, percentile, bca"),
        (lambda: stats.ece([0.5, 1.2], [1, 1]), r"lie in \[0, 1\]; got 1.2"),
        (lambda: stats.ece([0.4], [1], low=0.5), "fold_pairs"),
        (lambda: stats.ece([0.5], [2]), "correct must be between 0 and 1"),
        (lambda: stats.ece([0.5], [1], bins=0), "bins"),
        (lambda: stats.ece([0.5], [1], low=1, high=0), "low must be below high"),
        (lambda: stats.brier([1.5], [1]), "confidence must lie"),
        (lambda: stats.holm([0.2, 1.2]), "between 0 and 1"),
        (lambda: stats.smallest_detectable(-1), "0 or more"),
        (lambda: stats.mcnemar(-1, 2), "0 or more"),
        (lambda: stats.summarise({}, []), "columns is empty"),
        (lambda: stats.summarise({"tokens": [1, 2]}, ["a", "a"]), r"unique.*1 occur more than once \(a\)"),
        (lambda: stats.summarise({"tokens": [1, 2]}, ["a"]), "one id for each of the 2"),
        (lambda: stats.summarise({"tokens": [1, 2]}, np.array(["a", 1], object)), "all strings or all integers"),
        (lambda: stats.summarise({"bin_count": np.ones((2, 15))}, [1, 2]), "belong together; bin_confidence"),
        (lambda: stats.summarise({"nll": [1.0]}, [1]), "nll cannot be a column"),
        (lambda: stats.summarise({k: np.ones((2, 9)) for k in ("bin_count", "bin_confidence", "bin_correct")}, [1, 2]),
         r"shape \(2, 15\).*got \(2, 9\)"),
    ],
)  # fmt: skip
def test_errors_say_what_was_given_and_what_is_allowed(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        call()
