"""What a sweep ends with: its runs in one table, the best first, each against the first job with a paired interval."""

from __future__ import annotations

from typing import Any

from posttrain.comparison import compare_runs, measured_differently
from posttrain.disk import write_json, writing
from posttrain.errors import DataError
from posttrain.report.console import Console
from posttrain.report.numbers import interval, number, signed
from posttrain.report.page import write_comparison
from posttrain.report.verdicts import HEADLINES, LEVEL, verdict
from posttrain.sides import Side, open_side
from posttrain.stats import LOWER_IS_BETTER, Estimate
from posttrain.sweep.record import Job, Sweep

PAGE, NUMBERS = "compare.html", "compare.json"


def tell(sweep: Sweep, console: Console) -> None:
    """Compare what there is, print the table, write the page and its numbers."""
    done = [job for job in sweep.jobs if job.is_finished]
    sides = {job.name: open_side(str(job.path)) for job in done}
    baseline = next(iter(sides.values()), None)
    apart = {name: _incomparable(baseline, side) for name, side in sides.items() if baseline is not None}
    together = [job for job in done if not apart[job.name]]
    found = _compare(together, apart) if len(together) > 1 else None
    metric, why = _judged_by(done, [sides[job.name] for job in together])
    rows = [row for _, row in sorted(_finished(job, sides[job.name], metric, found, apart) for job in done)]
    rows += [[job.name, *["–"] * 4, _failure(job)] for job in sweep.jobs if not job.is_finished]
    best = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
    title = f"{len(done)} of {len(sweep.jobs)} runs, best first by {metric} ({best})"
    console.table(title, ["", metric, "difference", "p", "p (Holm)", ""], rows)
    for name, reason in apart.items():
        if reason:
            console.line(f"{name} is not comparable with the baseline: {reason}")
    if why:
        console.line(why)
    if found is not None:
        _tell_cautions(found, together, sweep, console)


def _compare(together: list[Job], apart: dict[str, str]) -> dict[str, Any] | None:
    """With the first as the baseline; None, and the reason told of each, where it cannot be."""
    try:
        return compare_runs([str(job.path) for job in together])
    except DataError as error:
        apart |= {job.name: str(error) for job in together[1:]}
        return None


def _incomparable(baseline: Side, side: Side) -> str:
    """Why, or ""."""
    if sorted(side.ids) == sorted(baseline.ids):
        return ""
    shared = len(set(side.ids) & set(baseline.ids))
    return f"{len(side.ids):,} evaluation examples, {shared:,} of them among {baseline.name}'s {len(baseline.ids):,}"


def _judged_by(done: list[Job], sides: list[Side]) -> tuple[str, str]:
    """The metric by which the first run's stage chooses its best checkpoint; another one, and why, where it is measured with
    what the runs differ in."""
    watched = done[0].config.stage.watches if done else HEADLINES[-1]
    configs = [side.config for side in sides]
    keys = measured_differently(watched, configs)
    if not keys:
        return watched, ""
    why = f"{watched}, by which each run chose its best checkpoint, is measured with {', '.join(keys)}, which differs here"
    for metric in HEADLINES:
        if not measured_differently(metric, configs) and all(metric in side.metrics for side in sides):
            return metric, f"{why}: so they are judged by {metric}"
    return watched, f"{why}: this order says little"


def _finished(
    job: Job, side: Side, metric: str, found: dict[str, Any] | None, apart: dict[str, str]
) -> tuple[tuple[bool, bool, float], list[str]]:
    """Where it stands, and its row."""
    score = side.metrics.get(metric)
    value = score.get("value") if isinstance(score, dict) else None
    place = (bool(apart[job.name]), value is None, (value or 0.0) * (1 if metric in LOWER_IS_BETTER else -1))
    shown = interval(Estimate(**score)) if isinstance(score, dict) else "–"
    table = next((each for each in (found or {}).get("tables", []) if each["run"] == job.name), None)
    row = next((each for each in table["rows"] if each["metric"] == metric), None) if table else None
    if row is None:
        is_first = found is not None and found["runs"][0]["name"] == job.name
        return place, [
            job.name,
            shown,
            "–",
            "–",
            "–",
            "baseline" if is_first else "not comparable" if apart[job.name] else "",
        ]
    change = row["change"]
    ends = "" if change["low"] is None else f" [{signed(change['low'])}, {signed(change['high'])}]"
    said = verdict(change)
    if said in ("better", "worse") and (row["p_holm"] or 0.0) > LEVEL:
        said += ", or by chance"
    return place, [
        job.name,
        shown,
        f"{signed(change['value'])}{ends}",
        number(change["p_value"]),
        number(row["p_holm"]),
        said,
    ]


def _failure(job: Job) -> str:
    if job.status in ("waiting", "running"):
        return "not finished"
    return job.status if job.exit_status is None else f"{job.status} (exit status {job.exit_status})"


def _tell_cautions(found: dict[str, Any], together: list[Job], sweep: Sweep, console: Console) -> None:
    left = [job for job in sweep.jobs if job not in together]
    found["warnings"] += [
        f"{job.name} is not compared: {_failure(job) if not job.is_finished else 'other examples'}" for job in left
    ]
    console.line(
        f"\n{found['examples']:,} examples, {found['level']:.0%} paired intervals. {found['note']}\nThe first of "
        f"{len(together)} is partly the luckiest on these very examples: score it on others before relying on its score "
        "(posttrain eval)."
    )
    for warning in found["warnings"]:
        console.line(f"warning: {warning}")
    with writing(sweep.path):
        write_json(sweep.path / NUMBERS, found)
        write_comparison(found, sweep.path / PAGE)
    console.line(f"\nall scores: {sweep.path / PAGE}")
