"""What the page of a comparison shows: sentences, tables, differences with their intervals, who moved most."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain import stats
from posttrain.report import tables
from posttrain.report.answers import answer
from posttrain.report.figures import examples
from posttrain.report.figures.forest import forest
from posttrain.report.figures.svg import Drawing, Easel
from posttrain.report.numbers import signed
from posttrain.report.untrusted import excerpt
from posttrain.report.verdicts import by_chance


def view(comparison: dict[str, Any]) -> dict[str, Any]:
    """For the template."""
    easel = Easel()
    return {
        **{name: comparison.get(name) or [] for name in ("runs", "differs", "warnings")},
        "examples": comparison.get("examples") or 0,
        "level": f"{comparison.get('level', 0.95):.0%}",
        "seed": comparison.get("seed", 0),
        "note": comparison.get("note") or "",
        "sentences": _sentences(comparison),
        "tables": [(table["run"], tables.compared(table)) for table in comparison.get("tables") or []],
        "forests": _forests(comparison, easel),
        "changes": _changes(comparison, easel),
        "movers": [_movers(each) for each in comparison.get("movers") or []],
    }


def _sentences(comparison: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Of each run what was found in its first two scores; the tables have the others."""
    return [
        (
            table["run"],
            [
                row["change"]["sentence"] + by_chance(row["change"], row.get("p_holm"))
                for row in table["rows"][:2]
                if (row.get("change") or {}).get("sentence")
            ],
        )
        for table in comparison.get("tables") or []
    ]


def _forests(comparison: dict[str, Any], easel: Easel) -> list[Drawing]:
    by_metric: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for table in comparison.get("tables") or []:
        for row in table["rows"]:
            if (row.get("change") or {}).get("value") is not None:
                by_metric.setdefault(row["metric"], []).append((table["run"], row["change"]))
    return [forest(easel, metric, rows) for metric, rows in by_metric.items()]


def _changes(comparison: dict[str, Any], easel: Easel) -> list[Drawing]:
    found = []
    for each in comparison.get("changes") or []:
        values = np.array([value for value in each["values"] if value is not None], dtype=float)
        values = values[np.isfinite(values)]
        if len(values):
            metric = each["metric"]
            lower = None if metric in stats.NEITHER else metric in stats.LOWER_IS_BETTER
            title = f"{metric}, {each['run']}"
            found.append(examples.changes(easel, title, values, lower, "run minus baseline"))
    return found


def _movers(each: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": each["run"],
        "metric": each["metric"],
        **{side: [_moved(one) for one in each.get(side) or []] for side in ("losses", "gains")},
    }


def _moved(one: dict[str, Any]) -> dict[str, Any]:
    answers = {"baseline": _given(one.get("baseline")), "now": _given(one.get("now"))}
    return {
        "id": str(one["id"]),
        "change": signed(one.get("change")),
        "prompt": excerpt(str(one.get("question") or "")),
        "reference": excerpt(str(one["reference"])) if one.get("reference") else None,
        "answers": {when: given for when, given in answers.items() if given},
    }


def _given(found: Any) -> Any:
    """An answer: its text alone, or its fields as in samples.jsonl."""
    return answer({"answer": found, "verified": False} if isinstance(found, str) else found)
