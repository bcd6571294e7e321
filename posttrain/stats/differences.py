"""Is A better than B?  Differences on the same examples, with paired intervals and a plain sentence.

The same resamples serve both sides, so what the examples have in common cancels: the interval is as narrow as their
correlation allows.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.stats.estimate import Estimate, Number, finite
from posttrain.stats.inputs import Array
from posttrain.stats.intervals import FEW
from posttrain.stats.scores import Score, divide, estimate, percentile
from posttrain.stats.significance import DETECTABLE, mcnemar, two_sided_p

POINTS = {"accuracy", "pair_accuracy", "token_accuracy", "ece", "ece_equal_mass"}  # told in points, hundredths


@dataclass(frozen=True)
class PairedDifference(Estimate):
    """value = score of A minus score of B, with what is needed to read it.

    value_a, value_b   the two scores
    wins, ties, losses  examples on which A is better, the same, worse (None where an example has no score of its own)
    correlation        of the examples' scores in A and in B (None where one of them never changes)
    p_value, test      two-sided, of no difference: McNemar's exact test for right-or-wrong scores, else value/se
                       against the normal (below 30 examples Student's) distribution
    detectable         the smallest difference this many examples would show in 80 % of cases at the 5 % level
    note               what to keep in mind when reading it, or ""
    """

    metric: str = "score"
    names: tuple[str, str] = ("A", "B")
    lower_is_better: bool = False
    value_a: Number = None
    value_b: Number = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    correlation: Number = None
    p_value: Number = None
    test: str = ""
    detectable: Number = None
    note: str = ""

    @property
    def detected(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def better(self) -> bool | None:
        """True or False where a difference in A's favour or against it was detected, None where none was."""
        return None if not self.detected or self.value is None else (self.value < 0) == self.lower_is_better

    @property
    def sentence(self) -> str:
        """The finding in words: "A is better than B by 4.1 points [1.9, 6.2]", or that none could be seen."""
        text = f"{self.metric}: {self._finding()}"
        return f"{text} ({self.note})" if self.note else text

    def _finding(self) -> str:
        scale, unit = (100, " points") if self.metric in POINTS else (1, "")
        if self.value is None:
            return "no items to compare"
        if self.low is None or self.high is None:
            return f"{abs(self.value) * scale:.3g}{unit} apart, {self.method}"
        if not self.detected:
            many = f"{self.clusters} example" + ("" if self.clusters == 1 else "s")
            able = "" if not self.detectable else f"; {many} could show {self.detectable * scale:.3g}{unit}"
            return f"no detectable change{able}"
        ends = sorted((abs(self.low) * scale, abs(self.high) * scale))
        word = "better" if self.better else "worse"
        size = f"{abs(self.value) * scale:.3g}{unit} [{ends[0]:.3g}, {ends[1]:.3g}]"
        return f"{self.names[0]} is {word} than {self.names[1]} by {size}"


def difference(
    score_a: Score | None,
    score_b: Score | None,
    items_a: tuple[Array, Array],
    items_b: tuple[Array, Array],
    *,
    level: float,
    name: str,
    names: tuple[str, str],
    lower_is_better: bool,
) -> PairedDifference:
    """The comparison, from two scores over the same resamples and each side's (numerators, denominators) [D]."""
    clusters, items = len(items_a[1]), items_a[1].sum()
    context: dict[str, Any] = {"metric": name, "names": names, "lower_is_better": lower_is_better}
    if score_a is None or score_b is None:
        return PairedDifference(None, None, None, None, 0, clusters, "paired bootstrap", **context)
    gap = score_a.minus(score_b)
    found = _interval(gap, items, clusters, level)
    p_value, test = _test(gap.value, found, items_a, items_b)
    return PairedDifference(
        **vars(found),
        **context,
        value_a=finite(score_a.value),
        value_b=finite(score_b.value),
        **_per_example(items_a, items_b, lower_is_better),
        p_value=p_value,
        test=test,
        detectable=None if found.se is None else DETECTABLE * found.se,
        note=_note(items_a[1], items_b[1]),
    )


def _interval(gap: Score, items: float, clusters: int, level: float) -> Estimate:
    if not math.isfinite(gap.value):
        return Estimate(None, None, None, None, int(items), clusters, "too large for a float")
    if len(gap.influence) or clusters < 2:
        found = estimate(gap, items, clusters, level)
        return Estimate(**{**vars(found), "method": "paired " + found.method})
    kept = gap.draws[~np.isnan(gap.draws)]  # no linearisation (ece): the basic interval, which takes the bias off
    q_low, q_high, _ = percentile(kept, level)
    if q_low is None or q_high is None:
        return Estimate(gap.value, None, None, None, int(items), clusters, "paired basic bootstrap, no draws")
    method = "paired basic bootstrap" + (", few examples" if clusters < FEW else "")
    ends = 2 * gap.value - q_high, 2 * gap.value - q_low
    return Estimate(gap.value, *ends, float(kept.std(ddof=1)), int(items), clusters, method)


def _test(
    value: float, found: Estimate, items_a: tuple[Array, Array], items_b: tuple[Array, Array]
) -> tuple[Number, str]:
    single = all((part[1] == 1).all() for part in (items_a, items_b))
    if single and len(items_a[0]) and all(np.isin(part[0], (0.0, 1.0)).all() for part in (items_a, items_b)):
        only_a = int(((items_a[0] == 1) & (items_b[0] == 0)).sum())
        only_b = int(((items_b[0] == 1) & (items_a[0] == 0)).sum())
        return mcnemar(only_a, only_b), "McNemar exact"
    if found.se is None:
        return None, ""
    degrees = found.clusters - 1 if found.clusters < FEW else None
    return two_sided_p(value, found.se, degrees), "t" if degrees else "normal"


def _per_example(items_a: tuple[Array, Array], items_b: tuple[Array, Array], lower_is_better: bool) -> dict[str, Any]:
    if not len(items_a[0]):
        return {}
    one_a, one_b = divide(*items_a), divide(*items_b)
    both = ~np.isnan(one_a) & ~np.isnan(one_b)
    one_a, one_b = one_a[both], one_b[both]
    above, below = int((one_a > one_b).sum()), int((one_a < one_b).sum())
    wins, losses = (below, above) if lower_is_better else (above, below)
    correlation = None
    if len(one_a) > 1 and np.ptp(one_a) > 0 and np.ptp(one_b) > 0:
        correlation = float(np.clip(np.corrcoef(one_a, one_b)[0, 1], -1, 1))
    return {"wins": wins, "ties": len(one_a) - wins - losses, "losses": losses, "correlation": correlation}


def _note(items_a: Array, items_b: Array) -> str:
    differ = int((items_a != items_b).sum())
    if not differ:
        return ""
    return (
        f"item counts differ on {differ} of {len(items_a)} examples: another tokenizer or template? per byte compares"
    )
