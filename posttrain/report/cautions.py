"""What to keep in mind before believing a run's numbers, read off its record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posttrain.report.numbers import number
from posttrain.report.recorded import Recorded
from posttrain.report.verdicts import SHOWN

FEW_EXAMPLES = 30
TRUNCATED_SHARE = 0.1
RIGHT_OR_WRONG = ("accuracy", "pair_accuracy", "best_accuracy", "token_accuracy")


def cautions(run: Recorded) -> list[str]:
    """A sentence each; the gravest first."""
    found = [*_of_the_run(run), *_of_scores(run), *_of_generation(run), *_of_data(run)]
    return [*found, *(f"{what}: this page lacks it." for what in run.unreadable)]


def examples_of(metrics: dict[str, Any]) -> int:
    """Independent examples behind these scores."""
    return max(
        [found["clusters"] for found in metrics.values() if isinstance(found, dict) and found.get("clusters")] or [0]
    )


def _of_the_run(run: Recorded) -> Iterator[str]:
    summary = run.summary or {}
    if summary.get("stopped_early"):
        yield f"Stopped early at step {summary['steps']:,}: no better for train.patience evaluations."
    if run.last is None:
        yield "No evaluation has been recorded: there is no score to report."
    best = summary.get("best_checkpoint")
    if run.summary and run.verb == "train" and summary.get("changes") and not best:
        yield f"No later evaluation beat the start's {run.watched}: there is no best checkpoint."


def _of_scores(run: Recorded) -> Iterator[str]:
    metrics = run.last[1] if run.last else {}
    if 0 < (many := examples_of(metrics)) < FEW_EXAMPLES:
        yield f"Only {many} evaluation examples: the intervals are wide (Student's t), and a change must be large to be seen."
    for name in SHOWN:
        found = metrics.get(name)
        if not isinstance(found, dict):
            continue
        value, method = found.get("value"), str(found.get("method") or "")
        if value is None:
            yield f"{name} could not be formed: {method}."
        elif "is a bound" in method:
            yield f"The best {name} lies at or beyond a bound of the range searched ({number(value)}): no value to use blindly."
        elif name in RIGHT_OR_WRONG and value in (0, 1):
            yield f"{name} is {value:g}: {'every' if value else 'no'} example is right, so these examples tell nothing finer."
    yield from _ties(run)


def _ties(run: Recorded) -> Iterator[str]:
    name = run.watched
    change = (run.summary or {}).get("changes", {}).get(name) or {}
    counted = [change.get(part) for part in ("wins", "ties", "losses")]
    whole = [part for part in counted if isinstance(part, int)]
    if len(whole) == 3 and whole[1] > sum(whole) / 2:
        yield f"Many ties: {whole[1]:,} of {sum(whole):,} examples have the same {name} at the start and the end."


def _of_generation(run: Recorded) -> Iterator[str]:
    trained = run.lines.get("train") or []
    share = trained[-1][1].get("truncated") if trained else None
    if isinstance(share, int | float) and share > TRUNCATED_SHARE:
        yield f"{share:.0%} of the answers sampled last were cut at stage.max_new_tokens."
    given = [line.get("after") or line.get("before") for line in run.answers]
    cut = sum(answer.get("finished") is False for answer in given if isinstance(answer, dict))
    if cut and run.stage != "pretrain":  # a document goes on: its continuation is cut by design
        yield f"{cut:,} of {len(given):,} generated answers were cut at eval.max_new_tokens before they had ended."


def _of_data(run: Recorded) -> Iterator[str]:
    counts = run.data.get("counts") or {}
    lost = sum(counts.get(part) or 0 for part in ("too_long", "nothing_trained", "unrenderable"))
    if lost:
        yield f"{lost:,} of {counts.get('groups') or 0:,} examples read were dropped: no score speaks of them (see Data)."
    if counts.get("truncated"):
        yield f"{counts['truncated']:,} examples were cut at data.max_length (see Data)."
