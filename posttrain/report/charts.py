"""The charts of a run's page, by section; a chart without data is not drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain import stats
from posttrain.report.figures import calibration, curves, examples, rollouts
from posttrain.report.figures.svg import Drawing, Easel
from posttrain.report.numbers import number
from posttrain.report.recorded import Recorded
from posttrain.report.tables import cell

PER_EXAMPLE = ("accuracy", "pair_accuracy", "reward", "nll")
LENGTH_BINS = 30


def of_run(run: Recorded, easel: Easel) -> dict[str, list[Drawing]]:
    """Section → its charts."""
    trained, evaluated = run.lines.get("train") or [], run.lines.get("eval") or []
    start, end = run.records
    sampled = any("response_tokens" in metrics for _, metrics in trained[-1:])
    return {
        "loss": curves.training(easel, trained, [("loss", "training loss")]),
        "scores": curves.evaluation(easel, evaluated) if run.verb != "eval" else [],  # one point: the table has it
        "rates": curves.training(easel, trained, [("lr", "learning rate"), ("grad_norm", "gradient norm")]),
        "calibration": _calibration(run, easel),
        "margins": examples.margins(easel, start, end),
        "rollouts": rollouts.charts(easel, trained, evaluated) if sampled else [],
        "changes": _changes(run, easel),
        "lengths": _lengths(run, easel),
    }


def level(run: Recorded) -> float:
    """Of the run's intervals."""
    return float((run.config.get("eval") or {}).get("confidence_level") or 0.95)


def _calibration(run: Recorded, easel: Easel) -> list[Drawing]:
    start, end = run.records
    found = []
    sides = [(start, run.first, "at the start" if end else f"at step {start.step:,}" if start else "")]
    sides += [(end, run.last, f"at step {end.step:,}")] if end else []
    for records, line, when in sides:
        if records is not None and (bars := calibration.bars(records, level(run))):
            told = filter(None, (_told(line[1] if line else {}, name) for name in ("ece", "ece_equal_mass")))
            found.append(calibration.diagram(easel, f"reliability {when}", bars, records.are_pairs, " ".join(told)))
    last = end or start
    if last is not None and (bars := calibration.bars(last, level(run), "calibrated_")):
        metrics = run.last[1] if run.last else {}
        names = ("temperature", "ece_uncalibrated", "ece_calibrated")
        remark = " ".join(["Divided by", *filter(None, (_told(metrics, name) for name in names))])
        title = "reliability at the fitted temperature, on the examples it was not fitted to"
        found.append(calibration.diagram(easel, title, bars, last.are_pairs, remark))
    return found


def _told(metrics: dict[str, Any], name: str) -> str:
    told = cell(metrics.get(name))
    return f"{name} {told.value} {told.ends}".strip() + "." if told else ""


def _changes(run: Recorded, easel: Easel) -> list[Drawing]:
    start, end = run.records
    found = []
    for name in dict.fromkeys([*PER_EXAMPLE, run.watched]):
        values = examples.changes_of(name, start, end)
        if values is not None:
            lower = None if name in stats.NEITHER else name in stats.LOWER_IS_BETTER
            found.append(examples.changes(easel, name, values, lower))
    return found


def _lengths(run: Recorded, easel: Easel) -> list[Drawing]:
    given = run.data.get("lengths") or {}
    histograms = {side: (each["edges"], each["counts"]) for side, each in given.items() if each and each.get("counts")}
    if "eval" not in histograms and run.tokens is not None and len(run.tokens):
        counts, edges = np.histogram(run.tokens, LENGTH_BINS)
        histograms["eval"] = (edges.tolist(), counts.tolist())
    titles = {"train": "length of training examples", "eval": "length of evaluation examples"}
    longest = run.data.get("max_length")
    return [
        examples.lengths(easel, titles.get(side, side), *both, longest, lost(run)) for side, both in histograms.items()
    ]


def lost(run: Recorded) -> str:
    """What was cut or dropped, in words."""
    counts = run.data.get("counts") or {}
    dropped, cut = counts.get("too_long"), counts.get("truncated")
    if dropped is None and cut is None:
        return "how many were cut or dropped is not recorded"
    tokens = f" ({counts['cut_tokens']:,} tokens)" if counts.get("cut_tokens") else ""
    of = f" of {counts['groups']:,}" if counts.get("groups") else ""
    return f"{dropped or 0:,}{of} examples were dropped as too long, {cut or 0:,} cut{tokens}"


def noise_floor(run: Recorded) -> str:
    """What the calibration errors would read of a perfectly calibrated model; "" where it is not known."""
    metrics = (run.summary or {}).get("metrics") or (run.last[1] if run.last else {})
    floors = {name: metrics.get(f"{name}_noise_floor") for name in ("ece", "ece_equal_mass")}
    values = {name: floor.get("value") for name, floor in floors.items() if isinstance(floor, dict)}
    return ", ".join(f"{name} {number(value)}" for name, value in values.items() if value is not None)
