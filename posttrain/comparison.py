"""Runs against each other, from their records alone: no model is loaded. What `posttrain compare` prints and its page shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from posttrain import stats
from posttrain.changes import RESAMPLES, changes, if_all_tied, told
from posttrain.errors import DataError
from posttrain.report.sinks import plain
from posttrain.report.verdicts import HEADLINES, LEVEL, MEASURED_WITH
from posttrain.sides import Side, names, open_side
from posttrain.stats import Estimate

DERIVED = {"perplexity": "nll"}
"""The same finding told again: no test of its own when their number is corrected for."""
MOVERS = 5
APART = ("run", "log", "stage.name")
"""Config keys whose difference says nothing of the result."""


def compare_runs(runs: list[str], resamples: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Every other run minus the first. DataError where they were not scored on the same examples."""
    sides = [open_side(run, name) for run, name in zip(runs, names(runs), strict=True)]
    baseline, others = sides[0], sides[1:]
    levels = {side.config["eval"]["confidence_level"] for side in sides}
    level = max(levels)
    tables = [_table(baseline, side, level, resamples, seed) for side in others]
    tests = _correct(tables)
    return {
        "runs": [_told(side) for side in sides],
        "examples": len(set(baseline.clusters)) or len(next(iter(baseline.harness.values()), ([],))[0]),
        "level": level,
        "seed": seed,
        "differs": differing([side.config for side in sides]),
        "tables": tables,
        "note": _note(tests, level),
        "movers": [movers for side in others for movers in _movers(baseline, side)],
        "changes": [change for side in others for change in _changes(baseline, side)],
        "warnings": list(_warnings(sides, levels)),
    }


def _table(baseline: Side, side: Side, level: float, resamples: int | None, seed: int) -> dict[str, Any]:
    try:
        found = changes(baseline, side, level, resamples, seed, names=(side.name, baseline.name))
        found |= _harness_changes(baseline, side, level, resamples, seed)
    except ValueError as error:
        raise DataError(f"{error}{_data_differs(baseline, side)}") from error
    if not found:
        raise DataError(
            f"{baseline.name} and {side.name} have no score in common: {_columns(baseline)}; {_columns(side)}"
        )
    rows = [
        {"metric": name, "baseline": baseline.metrics.get(name) or _alone(change["value_b"]),
         "now": side.metrics.get(name) or _alone(change["value_a"]), "change": change, "p_holm": None}
        for name, change in sorted(found.items(), key=lambda item: _rank(item[0]))
    ]  # fmt: skip
    return {"run": side.name, "rows": rows}


def _alone(value: float | None) -> dict[str, Any]:
    """A score that only the records have, without its interval."""
    return plain(Estimate(value, None, None, None, 0, 0, "of the records"))


def _harness_changes(
    baseline: Side, side: Side, level: float, resamples: int | None, seed: int
) -> dict[str, dict[str, Any]]:
    """Of every task of lm-eval's that both have run."""
    found: dict[str, dict[str, Any]] = {}
    for task in sorted(baseline.harness.keys() & side.harness.keys()):
        (ids_a, columns_a, lower), (ids_b, columns_b, _) = side.harness[task], baseline.harness[task]
        names = (f"{side.name} ({task})", f"{baseline.name} ({task})")
        known = stats.paired(
            columns_a,
            ids_a,
            columns_b,
            ids_b,
            level=level,
            resamples=resamples or RESAMPLES,
            seed=seed,
            names=names,
            lower_is_better=lower,
        )
        found |= {f"harness/{task}/{name}": told(if_all_tied(each, level)) for name, each in known.items()}
    return found


def _correct(tables: list[dict[str, Any]]) -> int:
    """p-values that allow for the number of tests (Holm), over all runs and scores; how many tests there are."""
    rows = [row for table in tables for row in table["rows"]]
    tested = [
        row for row in rows
        if row["change"]["p_value"] is not None and row["metric"] not in stats.NEITHER and row["metric"] not in DERIVED
    ]  # fmt: skip
    for row, p in zip(tested, stats.holm([row["change"]["p_value"] for row in tested]), strict=True):
        row["p_holm"] = float(p)
    for table in tables:
        known = {row["metric"]: row["p_holm"] for row in table["rows"]}
        for row in table["rows"]:
            row["p_holm"] = known.get(DERIVED.get(row["metric"], row["metric"]))
    return len(tested)


def _note(tests: int, level: float) -> str:
    if tests < 2:
        return ""
    return (
        f"{tests} scores are compared: though nothing had changed, about {tests * (1 - level):.2g} would lie outside their "
        f"{level:.0%} interval by chance. p (Holm) allows for their number: below {LEVEL:g} a difference holds up among all."
    )


def _movers(baseline: Side, side: Side) -> Iterator[dict[str, Any]]:
    """The examples that lost and gained most."""
    for metric, gain in _gains(baseline, side):
        order = np.argsort(np.nan_to_num(gain), kind="stable")
        picked = {
            "losses": [i for i in order[:MOVERS] if gain[i] < 0],
            "gains": [i for i in order[::-1][:MOVERS] if gain[i] > 0],
        }
        sign = -1 if metric in stats.LOWER_IS_BETTER else 1
        told = {
            kind: [_mover(baseline, side, int(i), sign * gain[i]) for i in places] for kind, places in picked.items()
        }
        yield {"run": side.name, "metric": metric, **told}


def _gains(baseline: Side, side: Side) -> Iterator[tuple[str, np.ndarray]]:
    """(metric, by how much each example is better now), in the order of the baseline's ids."""
    if not (baseline.ids and side.ids):
        return
    place = {name: i for i, name in enumerate(side.ids)}
    order = [place[name] for name in baseline.ids]
    shared = [m for m in HEADLINES if baseline.score_of(m) is not None and side.score_of(m) is not None]
    for metric in shared[:2]:
        before, now = baseline.score_of(metric), side.score_of(metric)
        assert before is not None
        assert now is not None
        yield metric, (now[order] - before) * (-1 if metric in stats.LOWER_IS_BETTER else 1)


def _mover(baseline: Side, side: Side, at: int, change: float) -> dict[str, Any]:
    name = baseline.ids[at]
    before, now = (each.answers.get(name, {}) for each in (baseline, side))
    asked = baseline.questions.get(name) or side.questions.get(name) or now.get("question") or ""
    return {
        "id": name, "question": asked, "change": float(change), "reference": now.get("reference") or before.get("reference"),
        "baseline": before.get("answer"), "now": now.get("answer"),
    }  # fmt: skip


def _changes(baseline: Side, side: Side) -> Iterator[dict[str, Any]]:
    """Of each example by how much it has changed, for a picture."""
    for metric, gain in _gains(baseline, side):
        known = gain[~np.isnan(gain)] * (-1 if metric in stats.LOWER_IS_BETTER else 1)
        yield {"run": side.name, "metric": metric, "values": known.tolist()}


def _warnings(sides: list[Side], levels: set[float]) -> Iterator[str]:
    few = len(set(sides[0].clusters))
    if 0 < few < 30:
        yield f"only {few} examples: intervals are wide (Student's t)"
    if len(levels) > 1:
        yield f"the runs' eval.confidence_level differ ({', '.join(f'{v:g}' for v in sorted(levels))}); {max(levels):g} is used"
    for metric in (m for m in HEADLINES if sum(m in side.metrics for side in sides) > 1):
        if keys := measured_differently(metric, [side.config for side in sides]):
            yield f"{metric} is measured with {', '.join(keys)}, which differs: its difference does not say which run is better"
    if len({side.fingerprint for side in sides}) > 1:
        yield "the runs were tokenised from different data or in different ways; their evaluation examples are the same ones"
    for side in sides[1:]:
        if bool(side.ids) != bool(sides[0].ids):
            yield f"only {(side if side.ids else sides[0]).name} was scored on data; harness tasks alone are compared"
        for task in sorted(side.harness.keys() ^ sides[0].harness.keys()):
            yield f"only {(side if task in side.harness else sides[0]).name} has run the task {task}"
        for task in sorted(side.harness.keys() & sides[0].harness.keys()):
            mine, other = (each.facts.get(task) for each in (sides[0], side))
            if mine != other:
                yield f"{sides[0].name} and {side.name} ran {task} differently: {mine}; {other}"
        yield from _bins_differ(sides[0], side)
        if "tokens" in side.records and "tokens" in sides[0].records:
            mine, other = (dict(zip(s.ids, s.records["tokens"], strict=True)) for s in (sides[0], side))
            if mine != other:
                yield f"{side.name} and {sides[0].name} cut the examples into other tokens: compare bits_per_byte, not nll"


def _bins_differ(baseline: Side, side: Side) -> Iterator[str]:
    bins = [many for each in (baseline, side) if (many := stats.bins_of(each.records))]
    if len(set(bins)) > 1:
        yield f"{baseline.name} and {side.name} have other eval.bins: ece and ece_equal_mass are not compared"
        return
    coarse = [each.name for each in (baseline, side) if not stats.is_fine(each.records)]
    if len(bins) == 2 and len(coarse) == 1:
        yield (
            f"{coarse[0]} keeps no fine histogram, as runs of an earlier version do: ece_equal_mass is not compared; "
            "posttrain eval of its model makes one"
        )


def differing(configs: list[dict[str, Any]]) -> list[list[Any]]:
    """[key, its value in each run] where they are not all the same."""
    flat = [dict(_flat(config)) for config in configs]
    keys = sorted({key for each in flat for key in each})
    rows = [[key, *(each.get(key) for each in flat)] for key in keys if not key.startswith(APART)]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def measured_differently(metric: str, configs: list[dict[str, Any]]) -> list[str]:
    """Keys of the stage with which this score is measured and in which the runs differ; the stage itself, where they are of
    several."""
    stages = [config["stage"] for config in configs]
    if len({stage["name"] for stage in stages}) > 1:
        return [] if metric == "accuracy" else ["stage.name"]
    known = MEASURED_WITH.get(stages[0]["name"], {}).get(metric, ()) if stages else ()
    return [f"stage.{key}" for key in known if any(stage.get(key) != stages[0].get(key) for stage in stages)]


def _data_differs(baseline: Side, side: Side) -> str:
    keys = [
        row for row in differing([baseline.config, side.config]) if row[0].startswith(("data.", "eval.", "train.seed"))
    ]
    told = "; ".join(f"{key}: {a} there, {b} here" for key, a, b in keys)
    return f". Their configs differ in {told}" if told else ""


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _columns(side: Side) -> str:
    return f"{side.name} has {', '.join(sorted(side.metrics)) or 'none'}"


def _rank(metric: str) -> tuple[int, str]:
    return (HEADLINES.index(metric) if metric in HEADLINES else len(HEADLINES)), metric


def _told(side: Side) -> dict[str, Any]:
    stage, model = side.config["stage"]["name"], side.config["model"]["path"]
    return {"name": side.name, "path": str(side.path), "stage": stage, "step": side.step, "model": str(model)}
