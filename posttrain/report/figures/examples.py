"""What became of single examples: margins, lengths, and how each one's score changed."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.report.figures.svg import BAD, BEFORE, GOOD, GRID, INK, NOW, Drawing, Easel, axes
from posttrain.report.numbers import number, signed
from posttrain.report.recorded import Records

BINS = 32
FEW_VALUES = 9
"""Up to so many different values are drawn as bars of their own."""


def margins(easel: Easel, start: Records | None, end: Records | None) -> list[Drawing]:
    """How far the better response is ahead, at the start and at the end."""
    found = {
        label: values[~np.isnan(values)]
        for label, records in (("start", start), ("end", end))
        if records is not None and (values := records.scores("margin")) is not None and not np.isnan(values).all()
    }
    if not found:
        return []

    def paint(figure: Any) -> None:
        ax = axes(figure, "margin of an example's pairs", "examples", top=26)
        edges = _edges(np.concatenate(list(found.values())))
        looks = {"start": {"color": BEFORE, "linestyle": "--"}, "end": {"color": NOW}}
        for label, values in found.items():
            counts, _ = np.histogram(values, edges)
            if label == "end":
                ax.stairs(counts, edges, fill=True, color=NOW, alpha=0.18, linewidth=0)
            ax.stairs(counts, edges, label=label, linewidth=1.6, **looks[label])
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2)
        ax.spines["bottom"].set_color(GRID)

    says = "; ".join(
        f"{label}: median {number(float(np.median(v)))}, {(v > 0).sum():,} of {len(v):,} ahead (above 0)"
        for label, v in found.items()
    )
    return [easel.draw("margins", f"{says}.", paint)]


def lengths(easel: Easel, title: str, edges: Any, counts: Any, max_length: int | None, lost: str) -> Drawing:
    """Tokens an example, with the length at which one is cut; lost: what was cut or dropped, in words."""
    edges, counts = np.asarray(edges, dtype=float), np.asarray(counts, dtype=float)

    def paint(figure: Any) -> None:
        ax = axes(figure, "tokens", "examples", top=26)
        ax.stairs(counts, edges, fill=True, color=NOW, alpha=0.55)
        ax.set_ylim(bottom=0)
        if max_length:
            ax.axvline(max_length, color=BAD, linewidth=1.2, linestyle="--", label=f"data.max_length {max_length:,}")
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1.02))
        ax.spines["bottom"].set_color(GRID)

    filled = np.flatnonzero(counts)
    spread = f"between {edges[filled[0]]:,.0f} and {edges[filled[-1] + 1]:,.0f} tokens" if len(filled) else "none"
    return easel.draw(title, f"{counts.sum():,.0f} examples, {spread}; {lost}.", paint)


def changes(
    easel: Easel, metric: str, values: np.ndarray, lower: bool | None, names: str = "end minus start"
) -> Drawing:
    """Each example's change; lower: whether less is better, None where neither is."""
    up, down = int((values > 0).sum()), int((values < 0).sum())
    ties = len(values) - up - down
    better, worse = (down, up) if lower else (up, down)
    colours = (BAD, GOOD) if lower else (GOOD, BAD)
    if lower is None:
        colours = (NOW, BEFORE)

    def paint(figure: Any) -> None:
        ax = axes(figure, f"change ({names})", "examples")
        width = _paint_changes(ax, values[values != 0], colours)
        if ties:
            ax.bar([0], [ties], width=width, color=INK, alpha=0.75, linewidth=0)
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.spines["bottom"].set_color(GRID)

    words = f"{up:,} up, {down:,} down" if lower is None else f"{better:,} better, {worse:,} worse"
    spread = f"; median {signed(float(np.median(values)))}" if len(values) else ""
    return easel.draw(metric, f"{words}, {ties:,} the same, of {len(values):,} examples{spread}.", paint)


def changes_of(metric: str, start: Records | None, end: Records | None) -> np.ndarray | None:
    """End minus start of the examples that both have a score of; None where there is none."""
    if start is None or end is None:
        return None
    before, after = start.scores(metric), end.scores(metric)
    if before is None or after is None:
        return None
    there = dict(zip(start.ids, before, strict=True))
    pairs = np.array([(value, there.get(i, np.nan)) for i, value in zip(end.ids, after, strict=True)], dtype=float)
    gap = pairs[:, 0] - pairs[:, 1] if len(pairs) else np.empty(0)
    gap = gap[np.isfinite(gap)]
    return gap if len(gap) else None


def _edges(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    return np.linspace(low, high, BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])


def _paint_changes(ax: Any, moved: np.ndarray, colours: tuple[str, str]) -> float:
    """Bars of what rose and what fell, never both in one; the width that the bar of what stayed is to have."""
    distinct, many = np.unique(moved, return_counts=True)
    if len(distinct) < FEW_VALUES:
        width = 0.8 * float(np.diff(np.unique(np.append(distinct, 0.0))).min()) if len(distinct) else 1.0
        middle, counts = distinct, many
    else:
        reach = float(np.abs(moved).max())
        edges = np.linspace(-reach, reach, BINS + 1)  # an even number of bins: 0 is an edge
        middle, counts, width = (edges[:-1] + edges[1:]) / 2, np.histogram(moved, edges)[0], 2 * reach / BINS
    for which, colour in ((middle > 0, colours[0]), (middle < 0, colours[1])):
        ax.bar(middle[which], counts[which], width=0.94 * width, color=colour, alpha=0.75, linewidth=0)
    return width if len(distinct) < FEW_VALUES else width / 2
