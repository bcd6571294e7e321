"""What changed between two evaluations of the same examples: each score's difference, its paired interval, its verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np

from posttrain import stats
from posttrain.records import Records
from posttrain.report.sinks import plain

RESAMPLES = 10_000


class Scored(Protocol):
    """What was found of examples: see posttrain.evaluate.Evaluation."""

    @property
    def ids(self) -> list[str]: ...

    @property
    def clusters(self) -> list[str]: ...

    @property
    def records(self) -> Records: ...


def changes(
    first: Scored,
    last: Scored,
    level: float,
    resamples: int | None,
    seed: int,
    names: tuple[str, str] = ("end", "start"),
) -> dict[str, Any]:
    """Last minus first on the same examples, with paired intervals. names: of the last and of the first.

    ValueError, saying what differs, where they are not of the same examples.
    """
    if not first.ids or not last.ids:
        return {}
    settings: dict[str, Any] = {"level": level, "resamples": resamples or RESAMPLES, "seed": seed, "names": names}
    now, then = ({k: v for k, v in e.records.items() if k != "accuracy"} for e in (last, first))
    bins = [many for side in (now, then) if (many := stats.bins_of(side))]
    if len(set(bins)) > 1:  # the calibration errors are of different things; the other scores are not
        now, then = ({k: v for k, v in side.items() if not k.startswith("bin_")} for side in (now, then))
    elif bins:
        settings["bins"] = bins[0]
    found = stats.paired(now, last.ids, then, first.ids, last.clusters, first.clusters, **settings)
    if "accuracy" in last.records and "accuracy" in first.records:
        found |= _accuracy(last, first, settings)
    if "perplexity" in found:
        found["perplexity"] = _as_nll(found["perplexity"], found["nll"])
    return {name: told(if_all_tied(difference, level)) for name, difference in found.items()}


def _accuracy(last: Scored, first: Scored, settings: dict[str, Any]) -> dict[str, stats.PairedDifference]:
    """Of the prompts that both have answered."""
    answered = [dict(zip(each.ids, each.records["accuracy"], strict=True)) for each in (last, first)]
    cluster = dict(zip(first.ids, first.clusters, strict=True))
    asked = [{i for i, score in each.items() if score == score} for each in answered]
    both = sorted(asked[0] & asked[1])
    if not both:
        return {}
    now, then = ({"accuracy": np.array([each[i] for i in both])} for each in answered)
    clusters = [cluster[i] for i in both]
    found = stats.paired(now, both, then, both, clusters, clusters, **settings)["accuracy"]
    if asked[0] != asked[1]:
        found = replace(
            found, note=f"of {len(both)} prompts that both have answered; of {len(asked[0] ^ asked[1])} only one has"
        )
    return {"accuracy": found}


def _as_nll(perplexity: stats.PairedDifference, nll: stats.PairedDifference) -> stats.PairedDifference:
    """Perplexity is exp(nll), so its change has nll's interval, exponentiated from the start: their verdicts agree."""

    def change(nats: float | None) -> float | None:
        start = perplexity.value_b
        return None if nats is None or start is None or nats > 700 else start * math.expm1(nats)

    low, high, method = change(nll.low), change(nll.high), f"{nll.method}, of nll"
    return replace(perplexity, low=low, high=high, p_value=nll.p_value, test=nll.test, method=method)


def if_all_tied(found: stats.PairedDifference, level: float) -> stats.PairedDifference:
    """Of right-or-wrong answers none of which changed, the resampled difference is 0 always; what can be said is that at most
    a share of them changes, with Clopper and Pearson's upper limit for none of n."""
    if found.se or not found.clusters or found.test != "McNemar exact":
        return found
    limit = 1 - ((1 - level) / 2) ** (1 / found.clusters)
    return replace(found, low=-limit, high=limit, method="no answer changed: exact limit of the share that may")


def told(difference: stats.PairedDifference) -> dict[str, Any]:
    """Every field, the verdict and the sentence."""
    fields = {name: value for name, value in asdict(difference).items() if name not in ("metric", "names")}
    if difference.metric in stats.NEITHER:
        return plain(
            fields | {"better": None, "sentence": f"{difference.metric} is neither better nor worse for changing"}
        )
    return plain(fields | {"better": difference.better, "sentence": difference.sentence})
