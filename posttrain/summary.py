"""How a run ended, and what changed since its start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.changes import changes
from posttrain.report.sinks import plain

if TYPE_CHECKING:
    from posttrain.config import EvalConfig
    from posttrain.evaluate import Evaluation


@dataclass
class Summary:
    """summary.json. metrics, start: of the last and the first evaluation; changes: end minus start, paired. slices: the
    stage's own score in each part of the examples that eval.slices names."""

    run_dir: str
    stage: str
    steps: int
    metrics: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    slices: list[dict[str, Any]] = field(default_factory=list)
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
        self.changes = changes(first, last, options.confidence_level, options.resamples, seed)
