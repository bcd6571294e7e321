"""What changed since the start, as it is told."""

import math

import numpy as np
import pytest

from posttrain.changes import changes
from posttrain.errors import DataError
from posttrain.evaluate import Evaluation
from posttrain.verify import exact, final_number, number


def evaluation(nll: np.ndarray, accuracy: list[float] | None = None) -> Evaluation:
    records = {"nll_sum": nll, "tokens": np.full(len(nll), 4.0)}
    if accuracy:
        records["accuracy"] = np.array(accuracy + [np.nan] * (len(nll) - len(accuracy)))
    ids = [f"{i:02}" for i in range(len(nll))]
    return Evaluation(0, {}, ids, ids, records)


def told(first: Evaluation, last: Evaluation) -> dict[str, dict]:
    return changes(first, last, 0.95, 400, 0)


@pytest.mark.parametrize("drift", [-0.03, 0.05, 150.0])
def test_perplexity_and_nll_never_disagree(drift: float) -> None:
    start = np.random.default_rng(0).gamma(4, 1.0, 40)
    noise = np.random.default_rng(1).normal(0, 0.1, 40)
    found = told(evaluation(start), evaluation(start + drift + noise * (1 + abs(drift))))
    nll, perplexity = found["nll"], found["perplexity"]
    assert perplexity["better"] == nll["better"]
    before = math.exp(start.sum() / 160)
    assert perplexity["low"] == pytest.approx(before * (math.exp(nll["low"]) - 1))
    assert perplexity["value"] == pytest.approx(before * (math.exp(nll["value"]) - 1))


def test_answers_that_all_stay_the_same_leave_room_for_doubt() -> None:
    same = evaluation(np.ones(10), [1.0, 0.0, 0.0])
    accuracy = told(same, same)["accuracy"]
    assert accuracy["value"] == 0
    assert accuracy["high"] == pytest.approx(1 - 0.025 ** (1 / 3))  # Clopper and Pearson, none of three
    assert accuracy["low"] == -accuracy["high"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [("so 12 and\n#### 1,234", 1234), ("it is 7.", 7), ("10-3=7", 7), ("3-2020", 2020), ("-5", -5), ("x = -5", -5),
     ("none", None)],
)  # fmt: skip
def test_the_number_an_answer_ends_on(answer: str, found: float | None) -> None:
    assert final_number(answer) == found


def test_verdicts() -> None:
    assert exact(" 85\n", "85") is True
    assert exact("", "85") is None
    assert number("the answer is $1,000.0", "#### 1000") is True
    assert number("no idea", "#### 3") is None
    with pytest.raises(DataError, match=r"holds no number; use eval.verifier=exact"):
        number("3", "three")
