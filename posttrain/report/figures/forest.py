"""Differences from the baseline with their intervals, one chart a metric, a row a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from posttrain.report.figures.svg import BAD, GOOD, INK, SURFACE, Drawing, Easel, axes
from posttrain.report.numbers import signed

ROW, MARGINS = 34, 60
LABEL_CHARS = 16


def forest(easel: Easel, metric: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> Drawing:
    """rows: each run's name and its change."""

    def paint(figure: Any) -> None:
        ax = axes(figure, "difference from the baseline", left=112)
        ax.grid(visible=True, axis="x")
        ax.grid(visible=False, axis="y")
        ax.axvline(0, color=INK, linewidth=1)
        for at, (_, change) in enumerate(rows):
            colour = {True: GOOD, False: BAD}.get(change.get("better"), INK)  # type: ignore[arg-type]
            if change.get("low") is not None:
                ax.hlines(at, change["low"], change["high"], color=colour, linewidth=1.8)
            fill = colour if change.get("better") is not None else SURFACE
            ax.plot([change["value"]], [at], "o", color=colour, markerfacecolor=fill, markersize=6)
        ax.set_yticks(range(len(rows)), [_label(name) for name, _ in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.spines["left"].set_visible(False)

    told = "; ".join(
        f"{name} {signed(c['value'])} [{signed(c.get('low'))}, {signed(c.get('high'))}]" for name, c in rows
    )
    return easel.draw(metric, f"{told}.", paint, height=MARGINS + ROW * len(rows))


def _label(name: str) -> str:
    """A run's name as matplotlib's font can write it; the table beside has it whole."""
    plain = re.sub(r"[^ -~]", "?", name)
    return plain if len(plain) <= LABEL_CHARS else f"{plain[: LABEL_CHARS - 1]}…"
