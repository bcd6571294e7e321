"""Two models on the same examples: the join, the refusals, the sentence, the counts."""

from typing import Any

import numpy as np
import pytest

from posttrain import stats


def test_a_run_compared_with_itself_says_no_change() -> None:
    rng = np.random.default_rng(0)
    columns = {"nll_sum": rng.gamma(2, 9, 80), "tokens": rng.integers(1, 9, 80), "accuracy": rng.integers(0, 2, 80)}
    for name, found in stats.paired(columns, range(80), columns, range(80)).items():
        assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
        assert (found.wins, found.ties, found.losses) == (0, 80, 0)
        assert found.sentence == f"{name}: no detectable change"
        assert found.better is None


def test_the_sentence_of_a_detected_difference() -> None:
    a, b = np.r_[np.ones(90), np.zeros(10)], np.r_[np.ones(60), np.zeros(40)]
    found = stats.paired_difference(a, b, name="accuracy", names=("lora", "base"))
    assert found.detected
    assert found.better
    assert found.sentence.startswith("accuracy: lora is better than base by 30 points [2")
    assert stats.paired_difference(b, a, name="accuracy").sentence.startswith(
        "accuracy: A is worse than B by 30 points"
    )


def test_lower_is_better_for_losses() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, 60)
    a, b = ({"nll_sum": tokens * rng.gamma(20, rate, 60), "tokens": tokens} for rate in (0.08, 0.1))
    found = stats.paired(a, range(60), b, range(60))
    assert list(found) == ["nll", "perplexity"]
    assert found["nll"].value < 0
    assert found["nll"].better
    assert found["nll"].wins > found["nll"].losses
    assert "A is better than B by 0." in found["nll"].sentence
    assert found["perplexity"].value_a == pytest.approx(np.exp(a["nll_sum"].sum() / tokens.sum()))
    assert found["perplexity"].value == pytest.approx(found["perplexity"].value_a - found["perplexity"].value_b)


def test_the_perplexity_difference_has_the_delta_methods_error() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, 400).astype(float)
    a, b = ({"nll_sum": tokens * rng.gamma(20, rate, 400), "tokens": tokens} for rate in (0.08, 0.1))
    found = stats.paired(a, range(400), b, range(400))["perplexity"]
    draws = rng.multinomial(400, np.full(400, 1 / 400), 20_000).astype(float)
    moved = np.exp(draws @ a["nll_sum"] / (draws @ tokens)) - np.exp(draws @ b["nll_sum"] / (draws @ tokens))
    assert found.se == pytest.approx(moved.std(), rel=0.06)
    assert (found.low, found.high) == pytest.approx(np.quantile(moved, [0.025, 0.975]), abs=0.13 * found.se)


def test_pairing_makes_the_interval_narrow() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 200)
    a, b = hard + rng.normal(0.2, 1, 200), hard + rng.normal(0, 1, 200)
    paired, mixed = stats.paired_difference(a, b), stats.paired_difference(a, rng.permutation(b))
    assert paired.correlation > 0.9
    assert paired.se < mixed.se / 3
    assert paired.detectable == pytest.approx(2.8016 * paired.se, rel=1e-5)


def test_what_could_have_been_detected_is_detected_in_80_percent_of_cases() -> None:
    rng = np.random.default_rng(0)
    trials, size = 400, 60
    effect = stats.smallest_detectable(1 / np.sqrt(size))
    found = [stats.paired_difference(rng.normal(effect, 1, size), np.zeros(size), resamples=400) for _ in range(trials)]
    assert np.mean([e.detected for e in found]) == pytest.approx(0.80, abs=0.07)  # binomial sd .02, percentile optimism


def test_sets_that_differ_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"base \(3 examples\) and lora \(3\).*1 only in base \(x\), 1 only in lora \(z\)"
    ):
        stats.paired_difference([1, 2, 3], [1, 2, 3], ids_a=list("xyw"), ids_b=list("wyz"), names=("base", "lora"))
    with pytest.raises(ValueError, match=r"0 only in B.*data\.eval_limit"):
        stats.paired({"reward": [1.0, 2]}, [1, 2], {"reward": [1.0]}, [1])
    with pytest.raises(ValueError, match=r"a has 3 examples and b 2: pass ids_a"):
        stats.paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="one alone"):
        stats.paired_difference([1, 2], [1, 2], ids_a=[1, 2])
    with pytest.raises(ValueError, match="unique"):
        stats.paired_difference([1, 2], [1, 2], ids_a=[1, 1], ids_b=[1, 1])
    with pytest.raises(ValueError, match="one type"):
        stats.paired_difference([1, 2], [1, 2], ids_a=[1, 2], ids_b=["1", "2"])
    with pytest.raises(ValueError, match="denominators_b was given without"):
        stats.paired_difference([1, 2], [1, 2], denominators_b=[1, 2])
    with pytest.raises(ValueError, match="different clusters"):
        stats.paired({"reward": [1.0, 2]}, [1, 2], {"reward": [1.0, 2]}, [1, 2], ["p", "q"], ["p", "p"])


def test_clusters_of_either_side_serve_both() -> None:
    rng = np.random.default_rng(0)
    a, b = {"reward": rng.normal(size=90)}, {"reward": rng.normal(size=90)}
    groups, back = np.arange(90) // 3, np.arange(90)[::-1]
    reversed_b = {"reward": b["reward"][back]}
    left = stats.paired(a, range(90), reversed_b, back, clusters_a=groups)
    right = stats.paired(a, range(90), reversed_b, back, clusters_b=groups[back])
    assert left == right == stats.paired(a, range(90), b, range(90), groups, groups)
    assert left["reward"].clusters == 30
    sums = [side["reward"].reshape(30, 3).sum(axis=1) for side in (a, b)]
    assert left["reward"].se == pytest.approx((sums[0] - sums[1]).std(ddof=1) / np.sqrt(30) / 3)


def test_scores_that_only_one_run_has_are_left_out() -> None:
    a, b = {"nll_sum": np.arange(40.0), "tokens": np.ones(40), "reward": np.arange(40.0)}, {"reward": np.arange(40.0)}
    assert list(stats.paired(a, range(40), b, range(40))) == ["reward"]


def test_another_tokenizer_is_noted() -> None:
    sums = np.arange(1.0, 41)
    a = {"nll_sum": sums, "tokens": np.full(40, 5), "bytes": np.full(40, 20)}
    found = stats.paired(a, range(40), a | {"tokens": np.r_[np.full(30, 5), np.full(10, 6)]}, range(40))
    assert "differ on 10 of 40 examples" in found["nll"].sentence
    assert found["bits_per_byte"].note == ""


def test_mcnemar_is_for_single_right_or_wrong_answers_only() -> None:
    a, b = [1, 0, 1, 1, 0] * 8, [0, 0, 1, 1, 1] * 8
    assert stats.paired_difference(a, b).test == "McNemar exact"
    assert stats.paired_difference([0.5, *a[1:]], b).test == "normal"
    assert stats.paired_difference(a, b, clusters=np.arange(40) // 2).test == "t"
    # one right answer in each cluster of two is a score of 1/2, not a right answer
    assert stats.paired_difference([1, 0] * 40, [0, 0] * 40, clusters=np.arange(80) // 2).test == "normal"


def test_ece_differences_are_paired_too() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 3000)
    owner, luck = np.arange(3000) // 10, rng.random(3000)
    sides: list[dict[str, Any]] = []
    for tilt in (0.0, 0.15):
        sums = stats.bin_sums(confidence, luck < confidence - tilt, clusters=owner)
        sides.append({"bin_count": sums.items, "bin_confidence": sums.confidence, "bin_correct": sums.correct})
    found = stats.paired(sides[0], range(300), sides[1], range(300))["ece"]
    assert found.better
    assert found.low < -0.13 < found.high
    assert (found.wins, found.n, found.clusters) == (None, 3000, 300)
    assert "points" in found.sentence


def test_holm_by_hand() -> None:
    # .005*4, .01*3, .03*2, .04*1, the last raised to the one before it
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
