"""What went on over the steps: the training loss, the scores of each evaluation with their intervals, rates and norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from posttrain.report.figures.svg import BEFORE, GRID, INK, NOW, SURFACE, THIRD, Drawing, Easel, axes
from posttrain.report.numbers import interval, number
from posttrain.report.recorded import Line
from posttrain.stats import Estimate

EVALUATED = (
    "accuracy", "pair_accuracy", "best_accuracy", "reward", "reward_sampled", "objective", "nll", "perplexity",
    "token_accuracy", "kl", "ece",
)  # fmt: skip
"""Scores worth a curve, in order of interest."""

MOST = 8
"""Curves of evaluations on a page; the table beside them has every score."""

STYLES = ((NOW, "-", "o"), (BEFORE, "--", "s"), (THIRD, ":", "^"), (INK, "-.", "D"))


class Series(NamedTuple):
    """A metric over the steps, with its intervals' ends where it has some (NaN elsewhere)."""

    steps: np.ndarray
    values: np.ndarray
    lows: np.ndarray
    highs: np.ndarray


def series(lines: Iterable[Line], metric: str) -> Series:
    """Every line's value of this metric that is one."""
    found = []
    for step, metrics in lines:
        given = metrics.get(metric)
        value, low, high = (given.get(k) for k in ("value", "low", "high")) if isinstance(given, dict) else (given,) * 3
        if isinstance(value, int | float):
            ends = (low, high) if isinstance(given, dict) and low is not None and high is not None else (np.nan, np.nan)
            found.append((step, value, *ends))
    return Series(*np.array(found, dtype=float).reshape(-1, 4).T)


def training(easel: Easel, lines: Sequence[Line], metrics: Sequence[tuple[str, str]]) -> list[Drawing]:
    """A chart a metric of the training lines, of those that have a value; metrics: each with its chart's title."""
    return [
        easel.draw(title, _course(found), partial(_line, found))
        for name, title in metrics
        if len((found := series(lines, name)).steps)
    ]


def evaluated(lines: Sequence[Line]) -> list[str]:
    """The scores that get a curve; perplexity says what nll says, so it is the first to go."""
    names = [name for name in EVALUATED if len(series(lines, name).steps)]
    if len(names) > MOST and "perplexity" in names:
        names.remove("perplexity")
    return names[:MOST]


def evaluation(easel: Easel, lines: Sequence[Line]) -> list[Drawing]:
    """A chart a score, with the band of its intervals."""
    found = {name: series(lines, name) for name in evaluated(lines)}
    return [easel.draw(name, _course(each), partial(_band, each)) for name, each in found.items()]


def several(easel: Easel, lines: Sequence[Line], title: str, unit: str, metrics: dict[str, str]) -> list[Drawing]:
    """One chart of metrics in the same unit; metrics: name → how it is called in the legend. None where there are none."""
    found = {label: each for name, label in metrics.items() if len((each := series(lines, name)).steps)}
    if not found:
        return []

    def paint(figure: Any) -> None:
        ax = axes(figure, "step", unit, top=26, left=52)
        for (label, each), (colour, dashes, marker) in zip(found.items(), STYLES, strict=False):
            alone = marker if len(each.steps) == 1 else None
            ax.plot(each.steps, each.values, color=colour, linestyle=dashes, marker=alone, label=label)
        _steps(ax, np.concatenate([each.steps for each in found.values()]))
        ax.set_ylim(bottom=0)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=len(found), columnspacing=1)

    ends = ", ".join(f"{label} {number(float(each.values[-1]))}" for label, each in found.items())
    return [easel.draw(title, f"At the last step: {ends} {unit}.", paint)]


def _line(found: Series, figure: Any) -> None:
    ax = axes(figure, "step")
    ax.plot(found.steps, found.values, color=NOW, marker="o" if len(found.steps) == 1 else None, markersize=5)
    if not np.isnan(found.lows).all():
        ax.fill_between(found.steps, found.lows, found.highs, color=NOW, alpha=0.18, linewidth=0)
    _steps(ax, found.steps)


def _band(found: Series, figure: Any) -> None:
    """The band joins the intervals; each evaluation is a point, and one that has no interval is hollow."""
    ax = axes(figure, "step")
    bounded = ~np.isnan(found.lows)
    ax.plot(found.steps, found.values, color=NOW)
    ax.fill_between(found.steps[bounded], found.lows[bounded], found.highs[bounded], color=NOW, alpha=0.18, linewidth=0)
    if bounded.any():
        ax.vlines(found.steps[bounded], found.lows[bounded], found.highs[bounded], color=NOW, linewidth=1)
    for which, fill in ((bounded, NOW), (~bounded, SURFACE)):
        ax.plot(found.steps[which], found.values[which], "o", color=NOW, markerfacecolor=fill, markersize=4.5)
    _steps(ax, found.steps)


def _steps(ax: Any, steps: np.ndarray) -> None:
    """Whole steps; a single point stands in the middle."""
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.margins(x=0.03, y=0.12)
    if steps.min() == steps.max():
        ax.set_xlim(steps[0] - 1, steps[0] + 1)
        ax.set_xticks([steps[0]])
    ax.spines["bottom"].set_color(GRID)


def _course(found: Series) -> str:
    """First and last, and where it was lowest and highest, in words."""
    first, last = (_told(found, at) for at in (0, -1))
    if len(found.steps) == 1:
        return f"{first} at step {found.steps[0]:,.0f}, the only one so far."
    low, high = (int(at) for at in (found.values.argmin(), found.values.argmax()))
    extremes = f"lowest {number(found.values[low])} at {found.steps[low]:,.0f}, highest {number(found.values[high])} at"
    ends = f"{first} at step {found.steps[0]:,.0f}, {last} at step {found.steps[-1]:,.0f}"
    return f"{ends}" + (f"; {extremes} {found.steps[high]:,.0f}." if len(found.steps) > 2 else ".")


def _told(found: Series, at: int) -> str:
    value, low, high = (float(part[at]) for part in found[1:])
    if np.isnan(low):
        return number(value)
    return interval(Estimate(value, low, high, None, 0, 0, ""))
