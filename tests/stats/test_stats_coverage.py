"""Nominal 95 % intervals hold the truth about 95 times in 100: a small simulation (the large one: tests/benchmarks)."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "stats.py"
spec = importlib.util.spec_from_file_location("stats_benchmark", SCRIPT)
assert spec is not None
assert spec.loader is not None
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

TRIALS = 250  # the standard error of a coverage of 95 % is 1.4 points


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("nll, percentile", 0.89, 0.985),
        ("perplexity, percentile", 0.89, 0.985),
        ("Wilson, p = .95", 0.91, 0.99),
        ("clustered Wilson, p = .9", 0.90, 0.99),
        ("ece, calibrated", 0.90, 1.0),
        ("ece, off by 5 %", 0.85, 0.99),
        ("ece, off by 15 %", 0.85, 0.99),
        ("ece_equal_mass, calibrated", 0.90, 1.0),
        ("ece_equal_mass, off by 15 %", 0.85, 0.99),
        ("paired ratio", 0.89, 0.985),
        ("paired accuracy", 0.90, 0.99),
        ("paired ece", 0.86, 0.99),
        ("temperature", 0.89, 0.99),
    ],
)
def test_coverage_at_100_examples(name: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "RESAMPLES", 500)
    assert least <= benchmark.coverage(name, 100, TRIALS) <= most


def test_student_beats_the_bootstrap_below_30_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "RESAMPLES", 300)
    found = {}
    for method in ("auto", "percentile"):
        simulate, truth = benchmark.ratio(method)
        rng = benchmark.np.random.default_rng(1)
        intervals = [simulate(rng, 10) for _ in range(400)]
        found[method] = sum(e.low <= truth <= e.high for e in intervals) / 400
    assert found["auto"] > found["percentile"] + 0.03
    assert found["auto"] > 0.85  # skewed data: t is better, not perfect
