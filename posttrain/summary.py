"""How a run ended, and what changed since its start."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
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
    return {name: _told(difference) for name, difference in found.items()}


def _told(difference: stats.PairedDifference) -> dict[str, Any]:
    """Every field, the verdict and the sentence."""
    fields = {name: value for name, value in asdict(difference).items() if name not in ("metric", "names")}
    return plain(fields | {"better": difference.better, "sentence": difference.sentence})
