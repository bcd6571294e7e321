"""How a page begins: which run this is, how far it has come, and its main finding; and how to make it again."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from typing import Any

from posttrain.report.cautions import examples_of
from posttrain.report.recorded import Recorded
from posttrain.report.verdicts import HEADLINES


def sentence(run: Recorded, now: datetime | None = None) -> str:
    """The run in a sentence or two: stage, model, data, how it ended or where it is."""
    model = (run.config.get("model") or {}).get("path")
    if run.verb == "eval":
        return f"A score of {model} as stage {run.stage}{_data(run)}. Nothing was trained."
    return f"{run.stage} of {model}{_data(run)}. {_state(run, now)}"


def findings(run: Recorded) -> list[str]:
    """What changed, in the words of summary.json: the headline score, and the one by which checkpoints are chosen."""
    changes = (run.summary or {}).get("changes") or {}
    headline = next((name for name in HEADLINES if name in changes), None)
    names = dict.fromkeys(name for name in (headline, run.watched) if name in changes)
    return [str(changes[name]["sentence"]) for name in names if changes[name].get("sentence")]


def commands(run: Recorded) -> list[tuple[str, str]]:
    """What to type to have it again: the settings it was given, its record, and how it was called."""
    called = run.environment.get("command")
    verb = [] if run.verb == "train" else [run.verb]
    rows = [("as it was asked", shlex.join(["posttrain", *verb, *run.overrides]))] if run.overrides else []
    if run.verb == "train":
        again = ["posttrain", f"recipe={run.path}/config.yaml", f"run.dir={run.path}-again"]
        rows.append(("from its record, to the last default", shlex.join(again)))
    if isinstance(called, list):
        rows.append(("as it was called", shlex.join(str(word) for word in called)))
    return rows


def is_unfinished(run: Recorded) -> bool:
    """Whether more is to come, or would have."""
    return run.summary is None


def _state(run: Recorded, now: datetime | None) -> str:
    summary = run.summary
    steps = (run.config.get("train") or {}).get("steps")
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    if summary is not None:
        early = ", stopped early" if summary.get("stopped_early") else ""
        return f"{summary.get('steps', 0):,} steps{early}, {_spent(summary)}."
    if run.running:
        return f"Running: step {run.step:,}{of}, written at {(now or datetime.now(UTC)):%Y-%m-%d %H:%M:%S} UTC."
    return f"Not finished: stopped at step {run.step:,}{of}; the same command goes on from its last checkpoint."


def _spent(summary: dict[str, Any]) -> str:
    speed, memory = summary.get("tokens_per_second"), summary.get("peak_memory_bytes")
    parts = [f"{summary.get('tokens') or 0:,} tokens in {summary.get('seconds') or 0:,.0f} s"]
    parts += [f"{speed:,.0f} tokens/s after the first step"] if speed else []
    return ", ".join(parts + ([f"{memory / 2**30:.1f} GiB peak"] if memory else []))


def _data(run: Recorded) -> str:
    facts = run.data.get("facts")
    told = [row[1] for row in facts if isinstance(row, list) and len(row) == 2 and row[0] == "data"] if facts else []
    if told:
        return f" on {told[0]}"
    many = examples_of(run.last[1]) if run.last else 0
    return f" on {many:,} evaluation examples" if many else ""
