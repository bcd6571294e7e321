"""samples.jsonl: each evaluation prompt with its answer before training and, once there is one, after; then, where the stage
samples, a few training prompts with their rollouts in the last iteration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from posttrain.answers import Sample
from posttrain.disk import write_text
from posttrain.report.sinks import plain
from posttrain.rundir import RunDir


def write(
    run: RunDir, before: list[Sample] | None, now: list[Sample], step: int, rollouts: Sequence[dict[str, Any]] = ()
) -> None:
    """Replace the file. before: None at the run's start, whose answers are the ones before; then there is none after."""
    earlier = {sample.id: sample for sample in before or []}
    lines: list[dict[str, Any]] = []
    for sample in now:
        line: dict[str, Any] = {"id": sample.id, "prompt": sample.prompt, "reference": sample.reference}
        first = sample if before is None else earlier.get(sample.id)
        line["before"] = None if first is None else asdict(first)
        line["after"] = None if before is None else asdict(sample) | {"step": step}
        lines.append(line)
    lines += [*rollouts]
    write_text(run.path / "samples.jsonl", "".join(f"{_json(line)}\n" for line in lines))


def _json(line: dict[str, Any]) -> str:
    return json.dumps(plain(line), ensure_ascii=False, allow_nan=False)


def read(run: RunDir, step: int, which: str) -> list[Sample]:
    """The answers "before" training, or those "after" if they are of this step, as an earlier process wrote them."""
    path = run.path / "samples.jsonl"
    if not path.is_file():
        return []
    found = [json.loads(line).get(which) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [Sample(**sample) for sample in found if sample and sample.pop("step", step) == step]


def answers_table(answers: Sequence[Sample]) -> list[dict[str, Any]]:
    """A row an answer, for a tracker."""
    return [
        {"id": a.id, "prompt": a.question, "answer": a.answer, "finished": a.finished}
        | ({"right": bool(a.verdict)} if a.verified else {})
        | a.rewards
        for a in answers
    ]


def rollouts_table(rollouts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a rollout, for a tracker."""
    return [
        {"id": each["id"], "prompt": each["prompt"], "answer": one["answer"], "finished": one["finished"]}
        | {"reward": one["reward"], "kl": one["kl"]}
        | {f"reward/{name}": value for name, value in one["rewards"].items() if len(one["rewards"]) > 1}
        for each in rollouts
        for one in each["rollouts"]
    ]
