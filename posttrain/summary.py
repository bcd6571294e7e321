"""How a run ended, and what changed since its start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.changes import changes
from posttrain.checkpoint import name_of
from posttrain.report.sinks import plain

if TYPE_CHECKING:
    from posttrain.config import EvalConfig
    from posttrain.evaluate import Evaluation
    from posttrain.session import Session


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

    @classmethod
    def of(cls, session: Session, tokens_per_second: float | None) -> Summary:
        """Of a run that has just made its last step; what its evaluations found is yet to be filled in."""
        state, run = session.state, session.run
        best = run.checkpoints / name_of(state.best_step or 0)
        return cls(
            run_dir=str(run.path),
            stage=session.cfg.stage_name,
            steps=state.step,
            best_checkpoint=str(best) if best.is_dir() else None,
            model_dir=str(run.model),
            tokens=state.tokens,
            trained_tokens=state.trained_tokens,
            seconds=state.seconds,
            tokens_per_second=tokens_per_second,
            peak_memory_bytes=session.runtime.peak_memory_bytes(),
            stopped_early=state.step < session.steps,
        )

    def compare(self, first: Evaluation | None, last: Evaluation | None, options: EvalConfig, seed: int) -> None:
        """Fill in metrics, start and changes."""
        if first is None or last is None:
            return
        self.metrics = {name: plain(value) for name, value in last.metrics.items()}
        self.start = {name: plain(value) for name, value in first.metrics.items()}
        self.changes = changes(first, last, options.confidence_level, options.resamples, seed)
