"""One evaluation of one run, as its directory has it: a side of a comparison. Neither torch nor a model is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from posttrain.errors import ConfigError, DataError
from posttrain.examples import FILE as EXAMPLES
from posttrain.examples import read_described
from posttrain.records import Records, read_lower_is_better, read_records
from posttrain.report.sinks import read_metrics

T = TypeVar("T")


@dataclass(frozen=True)
class Side:
    """One evaluation of one run. answers: id → its line of samples.jsonl's answer. questions: id → what was asked.
    harness: task → ids and columns of its documents, and those of which lower is better; facts: how each was run."""

    name: str
    path: Path
    step: int
    config: dict[str, Any]
    ids: list[str]
    clusters: list[str]
    records: Records
    metrics: dict[str, Any]
    questions: dict[str, str]
    answers: dict[str, dict[str, Any]]
    fingerprint: str | None
    harness: dict[str, tuple[list[str], Records, set[str]]]
    facts: dict[str, Any]

    def score_of(self, metric: str) -> np.ndarray | None:
        """[D], one metric of each example, NaN where it has none; None where the records do not have it."""
        if metric == "nll" and "tokens" in self.records:
            above, below = self.records["nll_sum"], self.records["tokens"]
        elif f"{metric}_sum" in self.records:
            above, below = self.records[f"{metric}_sum"], self.records[f"{metric}_count"]
        else:
            return self.records.get(metric)
        return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def open_side(given: str, name: str | None = None) -> Side:
    """RUN, whose last evaluation is taken, or RUN@STEP. ConfigError where there is none, DataError for a damaged file."""
    path, step = _place(given)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{given} is no run: {path / 'config.json'} does not exist; give the directory of a run")
    found = {int(file.stem.removeprefix("step-")): file for file in (path / "eval").glob("step-*.parquet")}
    harness = (
        {}
        if step is not None
        else {
            file.stem.removeprefix("harness-"): _read(file, _task)
            for file in sorted((path / "eval").glob("harness-*.parquet"))
        }
    )
    if not found and not harness:
        raise ConfigError(f"{given} has no evaluation with records to compare ({path / 'eval'})")
    chosen = max(found, default=0) if step is None else step
    if step is not None and step not in found:
        raise ConfigError(f"{given}: no evaluation at step {step}; there are {', '.join(map(str, sorted(found)))}")
    ids, clusters, records = _read(found[chosen], read_records) if found else ([], [], {})
    line = _read(path / "metrics.jsonl", lambda file: read_metrics(file, "eval", chosen))
    config, environment = (_read(path / f, _json) for f in ("config.json", "environment.json"))
    if "eval" not in config:
        raise ConfigError(f"{path / 'config.json'} is no run's of posttrain; give the directory of a run")
    return Side(
        name or path.name, path, chosen, config, ids, clusters, records, line[1] if line else {},
        _read(path / "eval" / EXAMPLES, lambda file: _questions(file.parent)),
        _read(path / "samples.jsonl", lambda file: _answers(file, chosen)),
        environment.get("data_fingerprint"), harness, environment.get("harness") or {},
    )  # fmt: skip


def _place(given: str) -> tuple[Path, int | None]:
    """The run's directory and the step asked for: a directory whose name ends in @5 is one."""
    found = re.fullmatch(r"(.+)@([0-9]+)", given)
    if found and not (Path(given).expanduser() / "config.json").is_file():
        return Path(found[1]).expanduser(), int(found[2])
    return Path(given).expanduser(), None


def _read(file: Path, function: Callable[[Path], T]) -> T:
    """DataError, naming it, where it cannot be read."""
    try:
        return function(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__}: {error}); it is damaged") from error


def names(runs: list[str]) -> list[str]:
    """Short and told apart: the last part of each path, what was given where two end alike, numbered where that is the same."""
    short = [
        _place(run)[0].resolve().name + (f"@{_place(run)[1]}" if _place(run)[1] is not None else "") for run in runs
    ]
    told = [name if short.count(name) == 1 else run for name, run in zip(short, runs, strict=True)]
    return [name if told.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(told)]


def _task(file: Path) -> tuple[list[str], Records, set[str]]:
    ids, _, columns = read_records(file)
    return ids, columns, read_lower_is_better(file)


def _questions(folder: Path) -> dict[str, str]:
    found = read_described(folder)
    return dict(zip(found.ids, found.questions, strict=True)) if found else {}


def _answers(path: Path, step: int) -> dict[str, dict[str, Any]]:
    """What was answered in this evaluation: the file has the first one's answers and the last one's."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    found = {}
    for line in lines:
        after, before = line.get("after"), line.get("before")
        answer = after if after and after["step"] == step else before if step == 0 or after is None else None
        if answer:
            found[line["id"]] = {**answer, "reference": line["reference"]}
    return found


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
