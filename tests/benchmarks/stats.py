"""Times and simulated coverage of posttrain.stats, as markdown tables.

    python tests/benchmarks/stats.py [--quick] [--trials N] [--only WORD]

Coverage: how often a nominal 95 % interval holds the truth, over fresh data sets of D examples. A fair table needs
2,000 trials (standard error 0.5 points); --quick takes 200 and leaves out the million ratio rows.
"""

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
from scipy.special import expit, logsumexp

from posttrain import stats
from posttrain.stats.resampling import resampled_sums

SIZES = (30, 100, 300)
RESAMPLES = 1000
TOKENS = 20  # on average, in an example

Rng = np.random.Generator
Simulation = Callable[[Rng, int], stats.Estimate]


def documents(rng: Rng, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Skewed per-document nll [D] and unequal lengths [D]; longer documents are easier, so the ratio is no mean."""
    tokens = 1 + rng.poisson(rng.gamma(2, TOKENS / 2, size))
    rate = rng.gamma(4, 0.5, size) * (1 + 1 / np.sqrt(tokens))
    return rng.gamma(tokens, rate), tokens.astype(float)


def ratio(method: str = "auto") -> tuple[Simulation, float]:
    sums, tokens = documents(np.random.default_rng(99), 4_000_000)
    truth = sums.sum() / tokens.sum()
    return lambda rng, d: stats.bootstrap(*documents(rng, d), resamples=RESAMPLES, method=method), truth


def perplexity() -> tuple[Simulation, float]:
    truth = np.exp(ratio()[1])
    return lambda rng, d: stats.perplexity(*documents(rng, d), resamples=RESAMPLES), truth


def proportion(interval: Callable[..., stats.Estimate], p: float) -> tuple[Simulation, float]:
    return lambda rng, d: interval(rng.binomial(d, p), d), p


def clustered(p: float) -> tuple[Simulation, float]:
    def simulate(rng: Rng, d: int) -> stats.Estimate:
        tokens = 1 + rng.poisson(TOKENS, d)
        return stats.clustered_wilson(rng.binomial(tokens, rng.beta(5 * p, 5 * (1 - p), d)), tokens)

    return simulate, p


def predictions(rng: Rng, size: int, tilt: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, correctness and document of each token. Documents differ in how sure the model is, and (by a shared
    uniform draw for part of the tokens) in how often it is right; P(correct | confidence) = confidence - tilt."""
    tokens = 1 + rng.poisson(TOKENS, size)
    owner = np.repeat(np.arange(size), tokens)
    confidence = expit(rng.normal(1.5, 1, size)[owner] + rng.normal(0, 1, len(owner)))
    luck = np.where(rng.random(len(owner)) < 0.2, rng.random(size)[owner], rng.random(len(owner)))
    return confidence, (luck < np.clip(confidence - tilt * confidence, 0, 1)).astype(float), owner


def calibration(score: Callable[..., stats.Estimate], tilt: float) -> tuple[Simulation, float]:
    sure, _, _ = predictions(np.random.default_rng(99), 100_000, tilt)
    right = np.clip(sure - tilt * sure, 0, 1)
    where = stats.bin_index(sure)
    gap, items = np.bincount(where, right - sure, 15), np.bincount(where, minlength=15)
    truth = np.abs(gap / items).max() if score is stats.mce else np.abs(gap).sum() / items.sum()

    def simulate(rng: Rng, d: int) -> stats.Estimate:
        sure, right, owner = predictions(rng, d, tilt)
        return score(sure, right, clusters=owner, resamples=RESAMPLES)

    return simulate, float(truth)


def equal_mass(*items: np.ndarray, clusters: np.ndarray, resamples: int) -> stats.Estimate:
    """The gap has one sign everywhere, so the truth is that of any bins."""
    return stats.ece(*items, clusters=clusters, equal_mass=True, resamples=resamples)


def paired_mean() -> tuple[Simulation, float]:
    def simulate(rng: Rng, d: int) -> stats.Estimate:
        shared = rng.exponential(size=d)
        return stats.paired_difference(shared + rng.exponential(0.5, d), shared + rng.exponential(0.4, d),
                                       resamples=RESAMPLES)  # fmt: skip

    return simulate, 0.1


def paired_ratio() -> tuple[Simulation, float]:
    def simulate(rng: Rng, d: int) -> stats.Estimate:
        sums, tokens = documents(rng, d)
        return stats.paired_difference(sums + 0.1 * tokens * rng.exponential(size=d), sums, tokens, resamples=RESAMPLES)

    return simulate, 0.1


def paired_accuracy() -> tuple[Simulation, float]:
    def simulate(rng: Rng, d: int) -> stats.Estimate:
        kind = rng.random(d)  # 55 % both right, 17 % only A, 8 % only B
        return stats.paired_difference(kind < 0.72, (kind < 0.55) | (kind > 0.92), resamples=RESAMPLES)

    return simulate, 0.72 - 0.63


def paired_ece() -> tuple[Simulation, float]:
    truth = calibration(stats.ece, 0.15)[1] - calibration(stats.ece, 0.05)[1]

    def simulate(rng: Rng, d: int) -> stats.Estimate:
        sides = []
        seed = int(rng.integers(2**32))
        for tilt in (0.15, 0.05):
            sure, right, owner = predictions(np.random.default_rng(seed), d, tilt)
            sums = stats.bin_sums(sure, right, clusters=owner)
            sides.append({"bin_count": sums.items, "bin_confidence": sums.confidence, "bin_correct": sums.correct})
        return stats.paired(sides[0], range(d), sides[1], range(d), resamples=RESAMPLES)["ece"]

    return simulate, truth


def temperature() -> tuple[Simulation, float]:
    def simulate(rng: Rng, d: int) -> stats.Estimate:
        logits = rng.normal(0, 3, (5 * d, 8))
        p = np.exp(logits / 1.7 - logsumexp(logits / 1.7, axis=1, keepdims=True))
        labels = (p.cumsum(axis=1) < rng.random((5 * d, 1))).sum(axis=1).clip(max=7)
        return stats.fit_temperature(logits, labels, clusters=np.repeat(np.arange(d), 5), resamples=100)

    return simulate, 1.7


COVERAGE: dict[str, Callable[[], tuple[Simulation, float]]] = {
    "nll, percentile": ratio,
    "nll, BCa": lambda: ratio("bca"),
    "perplexity, percentile": perplexity,
    "Wilson, p = .5": lambda: proportion(stats.wilson, 0.5),
    "Wilson, p = .95": lambda: proportion(stats.wilson, 0.95),
    "Wald, p = .5": lambda: proportion(stats.wald, 0.5),
    "Wald, p = .95": lambda: proportion(stats.wald, 0.95),
    "clustered Wilson, p = .5": lambda: clustered(0.5),
    "clustered Wilson, p = .9": lambda: clustered(0.9),
    "ece, calibrated": lambda: calibration(stats.ece, 0.0),
    "ece, off by 5 %": lambda: calibration(stats.ece, 0.05),
    "ece, off by 15 %": lambda: calibration(stats.ece, 0.15),
    "ece_equal_mass, calibrated": lambda: calibration(equal_mass, 0.0),
    "ece_equal_mass, off by 5 %": lambda: calibration(equal_mass, 0.05),
    "ece_equal_mass, off by 15 %": lambda: calibration(equal_mass, 0.15),
    "mce, calibrated": lambda: calibration(stats.mce, 0.0),
    "mce, off by 5 %": lambda: calibration(stats.mce, 0.05),
    "mce, off by 15 %": lambda: calibration(stats.mce, 0.15),
    "paired mean": paired_mean,
    "paired ratio": paired_ratio,
    "paired accuracy": paired_accuracy,
    "paired ece": paired_ece,
    "temperature": temperature,
}


def coverage(name: str, size: int, trials: int, seed: int = 0) -> float:
    """The share of `trials` data sets of `size` examples whose interval holds the truth."""
    simulate, truth = COVERAGE[name]()
    rng = np.random.default_rng([seed, size])
    held = 0
    for _ in range(trials):
        found = simulate(rng, size)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    return held / trials


def few_examples(trials: int) -> None:
    print(f"\n| below 30 examples | D | coverage, % ({trials} trials) |\n|---|---|---|")
    for name, methods in {"nll": ("auto", "percentile")}.items():
        for method in methods:
            simulate, truth = ratio(method)
            for size in (10, 20):
                rng = np.random.default_rng(size)
                found = [simulate(rng, size) for _ in range(trials)]
                held = np.mean([e.low <= truth <= e.high for e in found])
                print(f"| {name}, {'t' if method == 'auto' else method} | {size} | {100 * held:.1f} |", flush=True)


def timings(quick: bool) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(10_000, 48))
    right = rng.random(1_000_000) < 0.3
    sums, tokens = rng.exponential(50, 1_000_000), rng.integers(1, 100, 1_000_000)
    cases: list[tuple[str, float, Callable[[], object]]] = [
        ("10,000 examples x 48 columns", 2, lambda: resampled_sums(rows, 10_000, 0)),
        ("1,000,000 proportions", 1, lambda: stats.bootstrap(right)),
        ("1,000,000 ratio rows", 40, lambda: stats.bootstrap(sums, tokens)),
    ]
    print("| 10,000 resamples of | seconds | processor seconds | at most |\n|---|---|---|---|")
    for name, limit, run in cases[: 2 if quick else 3]:
        start, busy = time.perf_counter(), time.process_time()
        run()
        took, worked = time.perf_counter() - start, time.process_time() - busy
        print(f"| {name} | {took:.2f} | {worked:.2f} | {limit} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nPeak memory of the process: {peak:.2f} GiB (at most 2).")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--only", default="", help="rows whose name holds this word")
    options = parser.parse_args()
    trials = options.trials or (200 if options.quick else 2000)
    if not options.only:
        timings(options.quick)
        few_examples(trials)
    heads = " | ".join(f"D = {size}" for size in SIZES)
    print(f"\n| coverage, % ({trials} trials) | {heads} |\n|---|{'---|' * len(SIZES)}")
    for name in COVERAGE:
        if options.only in name:
            found = [f"{100 * coverage(name, size, trials):.1f}" for size in SIZES]
            print(f"| {name} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
