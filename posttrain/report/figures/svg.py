"""From a matplotlib figure to SVG inside a page: the page's colours and fonts, ids of its own, nothing else of matplotlib's.

Colours are drawn as sentinels that give way to the page's CSS variables, so one drawing serves light and dark.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from posttrain.report.untrusted import one_line

WIDTH, HEIGHT = 360, 220
"""Units of a chart's viewBox: about the pixels that it gets in a column, so its text is as large as it is drawn."""

INK, GRID, NOW, BEFORE, SURFACE = "#010203", "#010204", "#010205", "#010206", "#010207"
GOOD, BAD, THIRD = "#010208", "#010209", "#01020a"
VARIABLES = {
    INK: "--muted", GRID: "--grid", NOW: "--now", BEFORE: "--before", SURFACE: "--paper", GOOD: "--good", BAD: "--bad",
    THIRD: "--third",
}  # fmt: skip
SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "posttrain", "text.parse_math": False, "font.size": 10.5, "axes.linewidth": 0.8,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK,
    "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True, "xtick.major.size": 3,
    "ytick.major.size": 0, "xtick.major.width": 0.8, "lines.linewidth": 1.6, "hatch.linewidth": 0.8,
    "legend.frameon": False, "legend.fontsize": 10.5, "legend.borderaxespad": 0, "legend.handlelength": 1.6,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One figure of a page. says: its finding in a sentence with its numbers, for those who cannot see it and those who can."""

    title: str
    says: str
    svg: Markup


@dataclass
class Easel:
    """Draws the figures of one page, and numbers them: two pages of the same run are the same bytes."""

    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def draw(self, title: str, says: str, paint: Callable[[Any], None], height: int = HEIGHT) -> Drawing:
        """A figure on which `paint` has drawn."""
        with canvas(WIDTH, height) as figure:
            paint(figure)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", transparent=True)
        title, says = one_line(title), one_line(says)
        return Drawing(title, says, inline(buffer.getvalue().decode(), f"f{next(self.numbers)}", f"{title}: {says}"))


@contextmanager
def canvas(width: int, height: int) -> Iterator[Any]:
    """An empty figure; within the block matplotlib has this page's settings, after it the user's again."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        yield Figure(figsize=(width / 72, height / 72), dpi=72)


def axes(figure: Any, x: str, y: str = "", left: int = 46, top: int = 12, bottom: int = 36, **options: Any) -> Any:
    """One pair of axes that fills the figure but for its margins, given in the figure's units."""
    from matplotlib.ticker import MaxNLocator

    width, height = figure.get_size_inches() * 72
    box = (left / width, bottom / height, (width - left - 12) / width, (height - top - bottom) / height)
    found = figure.add_axes(box, **options)
    found.set_xlabel(x, labelpad=4)
    found.set_ylabel(y)
    for axis, ticks in ((found.xaxis, 5), (found.yaxis, 4)):
        axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(lambda value, _: tick(value))
    return found


def tick(value: float) -> str:
    """A tick's number, short."""
    text = f"{value:.4g}" if abs(value) < 10_000 or abs(value) >= 1e15 else f"{value / 1_000:,.4g}k"
    return text.replace("e-0", "e-").replace("-", "−")


def inline(drawn: str, prefix: str, says: str) -> Markup:
    """matplotlib's file as an element of a page: scaled by its viewBox, ids prefixed, said in words."""
    body = drawn[drawn.index("<svg") :]
    # the metadata has the time: without it two drawings of the same are the same
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*"', "<g", re.sub(r"\s*\n\s*", " ", body))  # groups are referred to by nothing
    body = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}-", body)
    body = re.sub(r"font-family: [^;]*; | transform=\"rotate\(-0 [^\"]*\"", "", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="([^"]*)"', body)
    assert box is not None
    opening = f'<svg viewBox="{box.group(1)}" role="img" aria-labelledby="{prefix}-says">'
    said = f'<title id="{prefix}-says">{escape(says)}</title>'
    return Markup(opening + said + body[body.index(">") + 1 :].strip())
