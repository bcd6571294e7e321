"""The reliability diagram: how often what the model was this sure of came true, and how much of the gap is chance."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.report.figures.svg import GRID, INK, NOW, SURFACE, WIDTH, Drawing, Easel, axes
from posttrain.report.numbers import number
from posttrain.report.recorded import Records
from posttrain.stats import BIN_COLUMNS, ReliabilityBin, equal_width, reliability
from posttrain.stats.fine_bins import BINS
from posttrain.stats.identity import cluster_sums

HEIGHT = 330


def bars(records: Records | None, level: float, prefix: str = "") -> list[ReliabilityBin]:
    """The bins of an evaluation that hold something; prefix "calibrated_": those at the fitted temperature."""
    kept = records.columns if records is not None and len(records.ids) else {}
    found = {name: kept[prefix + name] for name in BIN_COLUMNS if prefix + name in kept}
    if records is None or not all(name in found for name in BINS):
        return []
    columns = equal_width(found)
    held = columns["bin_count"].sum(axis=1) > 0
    if not held.any():
        return []
    summed = cluster_sums({name: column[held] for name, column in columns.items()}, records.clusters[held])
    low = 0.5 if records.are_pairs else 0.0
    count, confidence, correct = (summed[name] for name in BINS)
    return [bar for bar in reliability(count, confidence, correct, low, level=level) if bar.items]


def diagram(easel: Easel, title: str, found: list[ReliabilityBin], pairs: bool, remark: str) -> Drawing:
    """Accuracy against confidence with Wilson's bars, the band of chance around the diagonal, and the counts beneath."""

    def paint(figure: Any) -> None:
        low = 0.5 if pairs else 0.0
        ax = _square(figure, low)
        _paint_bins(ax, found, low)
        beneath = figure.add_axes((46 / WIDTH, 36 / HEIGHT, (WIDTH - 58) / WIDTH, 50 / HEIGHT))
        _paint_counts(beneath, found, low)

    return easel.draw(title, f"{_says(found, pairs)} {remark}".strip(), paint, height=HEIGHT)


def _square(figure: Any, low: float) -> Any:
    ax = axes(figure, "", "share right", bottom=98)
    ax.set_xlim(low - 0.02, 1.02)
    ax.set_ylim(-0.03, 1.03)
    ax.tick_params(labelbottom=False)
    ax.set_xticks(_ticks(low))
    ax.set_yticks(_ticks(0.0))
    ax.grid(visible=True, axis="both")
    return ax


def _paint_bins(ax: Any, found: list[ReliabilityBin], low: float) -> None:
    ax.plot([low, 1], [low, 1], color=INK, linestyle=(0, (4, 3)), linewidth=1)
    for bar in (bar for bar in found if bar.noise is not None):
        ends = np.array([bar.low, bar.high])
        ax.fill_between(ends, ends - bar.noise, ends + bar.noise, color=INK, alpha=0.16, linewidth=0)
    for bar in found:
        if bar.accuracy.low is not None:
            ax.vlines(bar.confidence, bar.accuracy.low, bar.accuracy.high, color=NOW, linewidth=1.6)
        fill = SURFACE if bar.accuracy.low is None else NOW
        ax.plot([bar.confidence], [bar.accuracy.value], "o", color=NOW, markerfacecolor=fill, markersize=5)


def _paint_counts(ax: Any, found: list[ReliabilityBin], low: float) -> None:
    """On a log scale: most of a good model's tokens are in the last bin."""
    from matplotlib.ticker import LogLocator, NullLocator

    width = found[0].high - found[0].low
    ax.set_yscale("log")
    ax.bar(
        [(bar.low + bar.high) / 2 for bar in found],
        [bar.items for bar in found],
        width=width * 0.86,
        color=NOW,
        alpha=0.55,
    )
    ax.set_ylim(0.6, max(10, 2 * max(bar.items for bar in found)))
    ax.set_xlim(low - 0.02, 1.02)
    ax.yaxis.set_major_locator(LogLocator(numticks=3))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value < 1e4 else f"1e{np.log10(value):.0f}")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    ax.set_xticks(_ticks(low))
    ax.set_xlabel("confidence", labelpad=4)
    ax.set_ylabel("count")
    ax.spines["bottom"].set_color(GRID)


def _ticks(low: float) -> list[float]:
    return [0.5, 0.6, 0.7, 0.8, 0.9, 1.0] if low else [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def _says(found: list[ReliabilityBin], pairs: bool) -> str:
    items, kind = sum(bar.items for bar in found), "pairs" if pairs else "tokens"
    told = [
        abs(bar.accuracy.value - bar.confidence) > bar.noise
        for bar in found
        if bar.noise is not None and bar.accuracy.value is not None and bar.confidence is not None
    ]
    most = max(found, key=lambda bar: bar.items)
    return (
        f"{items:,} {kind}; {sum(told)} of {len(told)} bins with two examples or more lie outside what chance explains. "
        f"The fullest holds {most.items:,}, sure to {number(most.confidence)}, right {number(most.accuracy.value)} of the time."
    )
