"""The seven vectors of the statistics charter, worked out by hand elsewhere, to their six digits."""

import math
from typing import Any

import numpy as np
import pytest

from posttrain import stats

SIX = 6e-7  # the last of six digits, rounded either way


def six(expected: float) -> Any:
    """Equal to it in six digits."""
    return pytest.approx(expected, abs=SIX)


def test_vector_1_perplexity_family() -> None:
    sums, ones = [2.3, 1.8, 3.1, 2.0, 1.5, 2.8, 1.9, 2.5], np.ones(8)
    assert stats.nll(sums, ones).value == six(2.2375)
    assert stats.perplexity(sums, ones).value == six(9.369877)
    assert stats.bits_per_token(sums, ones).value == six(3.228030)


CONFIDENCE = [0.95, 0.85, 0.75, 0.65, 0.92, 0.55, 0.88, 0.72]
CORRECT = [1, 1, 0, 1, 1, 0, 1, 1]


def test_vector_2_calibration() -> None:
    assert stats.ece(CONFIDENCE, CORRECT, bins=4, low=0.5, high=1).value == six(0.25375)
    assert stats.mce(CONFIDENCE, CORRECT, bins=4, low=0.5, high=1).value == six(0.55)
    assert stats.brier(CONFIDENCE, CORRECT).value == six(0.138962)
    assert stats.ece(CONFIDENCE, CORRECT, bins=10).value == six(0.22125)
    assert stats.ece(CONFIDENCE, CORRECT).value == six(0.29125)


def test_vector_3_proportions() -> None:
    wald, wilson = stats.wald(870, 1000), stats.wilson(870, 1000)
    assert wald.se == six(0.010635)
    assert wilson.se == six(0.010635)
    assert wald.low == six(0.849156)
    assert wald.high == six(0.890844)
    assert wilson.low == six(0.847732)
    assert wilson.high == six(0.889436)
    none, every = stats.wilson(0, 20), stats.wilson(20, 20)
    assert (none.low, every.high) == (0, 1)
    assert none.high == six(0.161125)
    assert every.low == six(0.838875)


NLL, TOKENS, BYTES = [20, 8, 45, 3, 30, 12], [10, 2, 30, 1, 20, 5], [41, 9, 118, 4, 85, 19]


def test_vector_4_ratios() -> None:
    found = stats.nll(NLL, TOKENS)
    assert found.value == six(1.735294)
    assert found.se == six(0.170593)
    assert stats.bootstrap(NLL, TOKENS).se == six(0.170593)
    assert stats.perplexity(NLL, TOKENS).value == six(5.670595)
    assert stats.perplexity(NLL, TOKENS).se == pytest.approx(5.670595 * 0.170593, abs=5e-6)  # rounded factors
    assert stats.bits_per_byte(NLL, BYTES).value == six(0.616804)
    # six examples: t with 5 degrees, whose 97.5 % point is 2.570582 in any table
    assert found.low == pytest.approx(1.735294 - 2.570582 * 0.170593, abs=2e-6)
    assert found.high == pytest.approx(1.735294 + 2.570582 * 0.170593, abs=2e-6)
    assert "t, few examples" in found.method
    assert (found.n, found.clusters) == (68, 6)


def test_vector_5_paired() -> None:
    a = [1] * 60 + [1] * 15 + [0] * 6 + [0] * 19
    b = [1] * 60 + [0] * 15 + [1] * 6 + [0] * 19
    found = stats.paired_difference(a, b)
    assert found.value == six(0.09)
    assert found.se == six(0.045160)
    assert found.p_value == six(0.078354)
    # the charter's .126521 is a product of rounded factors: 2.801585 * .0451597 = .1265186
    assert found.detectable == pytest.approx(0.126521, abs=3e-6)
    assert (found.wins, found.ties, found.losses) == (15, 79, 6)
    assert found.test == "McNemar exact"


def test_vector_6_temperature() -> None:
    found = stats.fit_temperature(np.tile([2.0, 0.0], (10, 1)), [0] * 7 + [1] * 3)
    assert found.value == six(2.360445)
    assert found.nll_before is not None
    assert found.nll_after is not None
    assert found.nll_before.value == six(0.726928)
    assert found.nll_after.value == six(0.610864)
    assert not found.at_bound


def test_vector_7_pairs() -> None:
    margins = np.array([2, 0.5, -0.3, 1.2, 0, -1.5, 3, 0.8, 0.1, -0.2])
    confidence, correct = stats.fold_pairs(margins)
    assert correct.mean() == six(0.65)
    assert stats.nll(np.log1p(np.exp(-margins)), np.ones(10)).value == six(0.597543)
    assert stats.ece(confidence, correct, bins=5, low=0.5, high=1).value == six(0.231409)


def test_the_vectors_through_the_records() -> None:
    columns = {"nll_sum": NLL, "tokens": TOKENS, "bytes": BYTES}
    found = stats.summarise(columns, ids=list("fbdeac"))
    assert found["nll"].value == six(1.735294)
    assert found["nll"].se == six(0.170593)
    assert found["perplexity"].value == six(5.670595)
    assert found["bits_per_byte"].value == six(0.616804)
    assert found["bits_per_token"].value == six(1.735294 / math.log(2))
