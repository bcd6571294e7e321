"""What the console writes of numbers and files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import stats
from posttrain.report.numbers import interval


def test_a_fit_that_ended_at_its_bound_says_so() -> None:
    assert interval(stats.Estimate(4.0, None, None, None, 10, 10, "T = 4 is a bound, no interval")) == "4.000 (a bound)"
    assert interval(stats.Estimate(0.5, 0.4, 0.6, 0.1, 10, 10, "percentile")) == "0.500 [0.400, 0.600]"


@pytest.mark.parametrize("generate", [0, 2])
def test_files_that_are_not_there_are_not_named(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str], generate: int
) -> None:
    run("run.dir=r", "train.steps=1", f"eval.generate={generate}")
    assert Path("r/samples.jsonl").exists() == bool(generate)
    assert ("samples.jsonl" in (told := capsys.readouterr().out)) == bool(generate)
    assert "report.html" not in told
