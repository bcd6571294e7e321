"""How a run ended, and what changed since its start."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain import stats
from posttrain.evaluate import Evaluation
from posttrain.report.sinks import plain

if TYPE_CHECKING:
    from posttrain.config import EvalConfig


@dataclass
class Summary:
    """summary.json. metrics, start: of the last and the first evaluation; changes: end minus start, paired."""

    run_dir: str
    stage: str
    steps: int
    metrics: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    best_checkpoint: str | None = None
    model_dir: str | None = None
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None
    peak_memory_bytes: int = 0
    stopped_early: bool = False

    def compare(self, first: Evaluation | None, last: Evaluation | None, options: EvalConfig, seed: int) -> None:
        """Fill in metrics, start and changes."""
        if first is None or last is None:
            return
        self.metrics = {name: plain(value) for name, value in last.metrics.items()}
        self.start = {name: plain(value) for name, value in first.metrics.items()}
        self.changes = changes(first, last, options, seed)


def changes(first: Evaluation, last: Evaluation, options: EvalConfig, seed: int) -> dict[str, Any]:
    """End minus start on the same examples, with paired intervals."""
    if not first.ids or not last.ids:
        return {}
    settings: dict[str, Any] = {
        "level": options.confidence_level,
        "resamples": options.resamples or 10_000,
        "seed": seed,
    }
    settings |= {"bins": options.bins, "names": ("end", "start")}
    now, then = ({k: v for k, v in e.records.items() if k != "accuracy"} for e in (last, first))
    found = stats.paired(now, last.ids, then, first.ids, last.clusters, first.clusters, **settings)
    if "accuracy" in last.records and "accuracy" in first.records:
        asked = ~np.isnan(last.records["accuracy"])
        ids = np.array(last.ids)[asked]
        now, then = ({"accuracy": e.records["accuracy"][asked]} for e in (last, first))
        found |= stats.paired(now, ids, then, ids, **settings)
        found["accuracy"] = _if_all_tied(found["accuracy"], len(ids), options.confidence_level)
    if "perplexity" in found:
        found["perplexity"] = _as_nll(found["perplexity"], found["nll"])
    return {name: _told(difference) for name, difference in found.items()}


def _as_nll(perplexity: stats.PairedDifference, nll: stats.PairedDifference) -> stats.PairedDifference:
    """Perplexity is exp(nll), so its change has nll's interval, exponentiated from the start: their verdicts agree."""

    def change(nats: float | None) -> float | None:
        start = perplexity.value_b
        return None if nats is None or start is None or nats > 700 else start * math.expm1(nats)

    low, high, method = change(nll.low), change(nll.high), f"{nll.method}, of nll"
    return replace(perplexity, low=low, high=high, p_value=nll.p_value, test=nll.test, method=method)


def _if_all_tied(accuracy: stats.PairedDifference, n: int, level: float) -> stats.PairedDifference:
    """With no answer changed the resampled difference is 0 always; what can be said is that at most a share of answers
    changes, with Clopper and Pearson's upper limit for none of n."""
    if accuracy.se or not n:
        return accuracy
    limit = 1 - ((1 - level) / 2) ** (1 / n)
    return replace(accuracy, low=-limit, high=limit, method="no answer changed: exact limit of the share that may")


def _told(difference: stats.PairedDifference) -> dict[str, Any]:
    """Every field, the verdict and the sentence."""
    fields = {name: value for name, value in asdict(difference).items() if name not in ("metric", "names")}
    if difference.metric in stats.NEITHER:
        return plain(
            fields | {"better": None, "sentence": f"{difference.metric} is neither better nor worse for changing"}
        )
    return plain(fields | {"better": difference.better, "sentence": difference.sentence})
