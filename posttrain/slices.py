"""Scores of slices of the evaluation examples, and whether a slice has changed when as many are looked at as there are."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain import stats
from posttrain.changes import changes
from posttrain.evaluate import Evaluation
from posttrain.examples import describe, slices
from posttrain.report.sinks import plain

if TYPE_CHECKING:
    from posttrain.config import Config, EvalConfig
    from posttrain.data.pipeline import Prepared


def sliced(cfg: Config, prepared: Prepared, first: Evaluation | None, last: Evaluation) -> list[dict[str, Any]]:
    """Of eval.slices, the score that the stage is judged by, and accuracy where answers were verified. p_holm: of no change,
    corrected for the number of all these looks (Holm's method)."""
    if not last.ids:
        return []
    of = slices(cfg.eval.slices, describe(prepared.eval))
    metrics = dict.fromkeys(name for name in ("accuracy", cfg.stage.watches) if name in last.metrics)
    rows = [row for name in metrics for row in slice_scores(first, last, of, name, cfg.eval, cfg.train.seed)]
    tested = [row["change"] for row in rows if row["change"] and row["change"]["p_value"] is not None]
    for change, p in zip(tested, stats.holm([change["p_value"] for change in tested]), strict=True):
        change["p_holm"] = float(p)
    return rows


def slice_scores(
    first: Evaluation | None,
    last: Evaluation,
    of: dict[str, dict[str, str]],
    metric: str,
    options: EvalConfig,
    seed: int,
) -> list[dict[str, Any]]:
    """The metric in each slice: its start, end and change. of: by → id → slice."""
    rows: list[dict[str, Any]] = []
    for by, label in of.items():
        for value in sorted({label[i] for i in last.ids}, key=_natural):
            chosen = np.array([label[i] == value for i in last.ids])
            end, start = part(last, chosen), part(first, chosen) if first and first.ids == last.ids else None
            row: dict[str, Any] = {"by": by, "value": value, "examples": int(chosen.sum()), "metric": metric}
            row |= {"start": start and score(start, metric, options, seed), "end": score(end, metric, options, seed)}
            rows.append(
                row
                | {
                    "change": changes(start, end, options.confidence_level, options.resamples, seed).get(metric)
                    if start
                    else None
                }
            )
    return rows


def part(found: Evaluation, chosen: np.ndarray) -> Evaluation:
    """These examples alone, [D] bool; without what only calibration needs."""
    keep = {n: c[chosen] for n, c in found.records.items() if not n.startswith(("bin_", "grid_"))}
    ids, clusters = (np.array(names)[chosen].tolist() for names in (found.ids, found.clusters))
    return replace(found, ids=ids, clusters=clusters, records=keep, metrics={}, samples=[], calibrated={})


def score(found: Evaluation, metric: str, options: EvalConfig, seed: int) -> dict[str, Any] | None:
    """One metric of these records; None where none of them has it."""
    level = options.confidence_level
    if metric == "accuracy":
        known = stats.accuracy(found.records["accuracy"], found.clusters, level)
        return plain(known) if known.value is not None else None
    columns = {name: column for name, column in found.records.items() if name != "accuracy"}
    scores = stats.summarise(
        columns,
        found.ids,
        found.clusters,
        level=level,
        resamples=options.resamples or 10_000,
        seed=seed,
        bins=options.bins,
    )
    return plain(scores[metric]) if metric in scores else None


def _natural(value: str) -> tuple[float, str]:
    """Numbers and ranges of them in their order, then words."""
    number = re.match(r"-?\d+(\.\d+)?(e[+-]?\d+)?", value)
    return (float(number[0]) if number else float("inf")), value
