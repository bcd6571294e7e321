"""The tables of a page, as rows of finished text: verdicts, slices, evaluations, comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from posttrain import stats
from posttrain.report.numbers import number, signed
from posttrain.report.recorded import Recorded
from posttrain.report.verdicts import SHOWN, UNDECIDED, claims_nothing, holds_up, verdict

MARKS = {"better": "▲", "worse": "▼", "no detectable change": "="}


@dataclass(frozen=True)
class Cell:
    """A number and its interval."""

    value: str
    ends: str = ""


@dataclass(frozen=True)
class Row:
    """One score: at the start, at the end, its change and what is to be said of it. detectable: the smallest change that the
    examples could have shown, where none was seen."""

    name: str
    direction: str
    start: Cell | None
    end: Cell | None
    change: Cell | None = None
    verdict: str = ""
    detectable: str = ""
    counts: str = ""
    p: str = ""
    note: str = ""

    @property
    def mark(self) -> str:
        return MARKS.get(self.verdict, "")


def results(run: Recorded) -> list[Row]:
    """The verdict table: of a finished run start, end and change; of another one the scores so far, without a change."""
    summary = run.summary or {}
    end = summary.get("metrics") or (run.last[1] if run.last else {})
    start = summary.get("start") or (run.first[1] if run.first and run.first is not run.last else {})
    changes = summary.get("changes") or {}
    shown = [name for name in SHOWN if name in end or name in start]
    return [_row(name, start, end, changes.get(name), run.stage) for name in shown]


def _row(name: str, start: dict[str, Any], end: dict[str, Any], change: dict[str, Any] | None, stage: str) -> Row:
    nothing = claims_nothing(name, _value(start.get("ece")), _value(start.get("pair_accuracy")))
    judged = name not in stats.NEITHER and name not in UNDECIDED.get(stage, ()) and not nothing
    return row(name, start.get(name), end.get(name), change, judged)


def row(name: str, start: Any, end: Any, change: dict[str, Any] | None, judged: bool = True) -> Row:
    """One line of a table. judged: whether a change of this score is for better or worse."""
    said = verdict(change) if judged else ""
    able = (change or {}).get("detectable")
    return Row(
        name,
        direction(name, (change or {}).get("lower_is_better")) if judged else "",
        cell(start),
        cell(end),
        None if change is None else cell(change, sign=True),
        said,
        number(able) if said == "no detectable change" and able else "",
        _counts(change) if name not in stats.NEITHER else "",
        p_value((change or {}).get("p_value")),
        str((change or {}).get("note") or ""),
    )


def direction(name: str, lower: bool | None = None) -> str:
    """Which way is better; "" where neither is. lower: where the record itself says it."""
    lower = name in stats.LOWER_IS_BETTER if lower is None else lower
    return "" if name in stats.NEITHER else "lower is better" if lower else "higher is better"


def cell(found: Any, sign: bool = False) -> Cell | None:
    """A number or an estimate's fields as they stand in metrics.jsonl."""
    tell = signed if sign else number
    if not isinstance(found, dict):
        return None if found is None else Cell(tell(found))
    if "is a bound" in str(found.get("method")):
        return Cell(tell(found.get("value")), "(a bound)")
    low, high = found.get("low"), found.get("high")
    ends = "" if low is None or high is None else f"[{tell(low)}, {tell(high)}]"
    return Cell(tell(found.get("value")), ends)


def p_value(p: float | None) -> str:
    """p, not told finer than anyone could use it."""
    return "" if p is None else "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def slices(run: Recorded) -> list[tuple[str, list[tuple[str, int, Row, str]]]]:
    """By column and metric: value, examples, row, Holm's p."""
    found: dict[str, list[tuple[str, int, Row, str]]] = {}
    for part in (run.summary or {}).get("slices") or []:
        change = part.get("change")
        line = row(part["metric"], part.get("start"), part.get("end"), change)
        if line.verdict and not holds_up(change):
            line = replace(line, verdict="no detectable change")
        title = f"{part['metric']} by {part['by']}"
        holm = p_value((change or {}).get("p_holm"))
        found.setdefault(title, []).append((str(part["value"]), int(part["examples"]), line, holm))
    return list(found.items())


def evaluations(run: Recorded, names: Iterable[str]) -> list[tuple[int, list[Cell | None]]]:
    """A row an evaluation, a cell a score: the numbers of the curves."""
    return [(step, [cell(metrics.get(name)) for name in names]) for step, metrics in run.lines.get("eval") or []]


def compared(table: dict[str, Any]) -> list[tuple[Row, str]]:
    """The rows of one run against the baseline, each with Holm's p."""
    return [
        (row(each["metric"], each.get("baseline"), each.get("now"), each.get("change"), each["metric"] not in stats.NEITHER),
         p_value(each.get("p_holm")))
        for each in table["rows"]
    ]  # fmt: skip


def _counts(change: dict[str, Any] | None) -> str:
    wins, ties, losses = ((change or {}).get(part) for part in ("wins", "ties", "losses"))
    return "" if None in (wins, ties, losses) else f"{wins:,} / {ties:,} / {losses:,}"


def _value(found: Any) -> float | None:
    return found.get("value") if isinstance(found, dict) else found
