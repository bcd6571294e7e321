"""What a stage that samples has to show: what the reward cost in KL, and how its answers changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.report.figures.curves import series, several, training
from posttrain.report.figures.svg import BEFORE, GRID, NOW, Drawing, Easel, axes
from posttrain.report.numbers import number
from posttrain.report.recorded import Line

CHARTS = (
    ("response_tokens", "response length, tokens"),
    ("truncated", "share cut at the length limit"),
    ("clip_fraction", "clip fraction"),
    ("entropy", "entropy, nats a token"),
)
SECONDS = {
    "rollout_seconds": "rollout",
    "score_seconds": "score",
    "reward_seconds": "reward",
    "update_seconds": "update",
}
LABELLED = 5


def charts(easel: Easel, trained: Sequence[Line], evaluated: Sequence[Line]) -> list[Drawing]:
    """Everything of a sampling stage that has been logged."""
    return [
        *reward_against_kl(easel, trained, evaluated),
        *training(easel, trained, CHARTS),
        *several(easel, trained, "seconds an iteration", "s", SECONDS),
    ]


def reward_against_kl(easel: Easel, trained: Sequence[Line], evaluated: Sequence[Line]) -> list[Drawing]:
    """Training's points in their order; a held-out evaluation is a cross with both intervals."""
    path = _points(trained, "kl", "reward")
    held = _points(evaluated, "kl", "reward_sampled")
    if not len(path) and not len(held):
        return []

    def paint(figure: Any) -> None:
        ax = axes(figure, "KL to the reference, nats an answer", "reward", top=26)
        if len(path):
            ax.plot(path[:, 1], path[:, 2], ".-", color=NOW, linewidth=0.6, markersize=4, alpha=0.6, label="training")
        _label_steps(ax, path)
        if len(held):
            errors = [np.nan_to_num(np.abs(held[:, c : c + 2].T - held[:, v])) for v, c in ((1, 3), (2, 5))]
            ax.errorbar(
                held[:, 1], held[:, 2], xerr=errors[0], yerr=errors[1], fmt="s", color=BEFORE, markersize=4,
                elinewidth=1.4, label="held out, sampled",
            )  # fmt: skip
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2)
        ax.margins(0.06, 0.12)
        ax.spines["bottom"].set_color(GRID)

    return [easel.draw("reward against KL", _says("training", path) + _says("held out", held), paint, height=270)]


def _points(lines: Sequence[Line], x: str, y: str) -> np.ndarray:
    """[steps, 7]: step, x, y, and the ends of both intervals, where a line has both."""
    across, up = series(lines, x), series(lines, y)
    both, at, on = np.intersect1d(across.steps, up.steps, return_indices=True)
    parts = [both, across.values[at], up.values[on], across.lows[at], across.highs[at], up.lows[on], up.highs[on]]
    return np.stack(parts, axis=1)


def _label_steps(ax: Any, path: np.ndarray) -> None:
    chosen = np.unique(np.linspace(0, len(path) - 1, min(LABELLED, len(path))).round().astype(int))
    for at in chosen:
        step, x, y = path[at, :3]
        ax.annotate(f"{step:.0f}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=9)


def _says(which: str, points: np.ndarray) -> str:
    if not len(points):
        return ""
    (s0, x0, y0), (s1, x1, y1) = points[0, :3], points[-1, :3]
    start = f"{which}: reward {number(y0)} at KL {number(x0)} (step {s0:.0f})"
    return f"{start}. " if s0 == s1 else f"{start}, {number(y1)} at {number(x1)} (step {s1:.0f}). "
