"""The line of a training step, every train.log_every of them, and what its data has to say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.report.numbers import interval

if TYPE_CHECKING:
    from posttrain.session import Session


def tell_step(session: Session, metrics: dict[str, Any]) -> None:
    """What the stage shows of the step's metrics, the loss scale, the speed; then news of a stream's reading."""
    speed = metrics["tokens_per_second"]
    shown = [f"{name} {_shown(metrics[name])}" for name in session.cfg.stage.shows if name in metrics]
    shown += [f"loss scale {metrics['loss_scale']:,.0f}"] if "loss_scale" in metrics else []
    shown += [f"{speed:,.0f} tok/s"] if speed else []
    session.console.logged(session.state.step, session.steps, "  ".join(shown))
    for line in session.loader.news():
        session.console.line(f"  · {line}")


def _shown(value: Any) -> str:
    """A number of a training line; a score with its interval."""
    if isinstance(value, dict):
        return "unknown"  # of no example
    return interval(value) if hasattr(value, "low") else f"{value:.4f}"
