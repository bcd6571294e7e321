"""samples.jsonl: each evaluation prompt with its answer before training and, once there is one, after."""

from __future__ import annotations

import json
from dataclasses import asdict

from posttrain.evaluate import Sample
from posttrain.rundir import RunDir


def write(run: RunDir, before: list[Sample], now: list[Sample], step: int) -> None:
    """Replace the file; at step 0 the answers are the ones before, and there is none after."""
    earlier = {sample.id: sample for sample in before}
    lines = []
    for sample in now:
        line = {"id": sample.id, "prompt": sample.prompt, "reference": sample.reference}
        line["before"] = asdict(earlier.get(sample.id, sample))
        line["after"] = asdict(sample) | {"step": step} if step else None
        lines.append(json.dumps(line, ensure_ascii=False))
    scratch = run.path / ".samples.jsonl.tmp"
    scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    scratch.replace(run.path / "samples.jsonl")


def read(run: RunDir) -> list[Sample]:
    """The answers before training, as an earlier process wrote them."""
    path = run.path / "samples.jsonl"
    if not path.is_file():
        return []
    return [Sample(**json.loads(line)["before"]) for line in path.read_text(encoding="utf-8").splitlines()]
