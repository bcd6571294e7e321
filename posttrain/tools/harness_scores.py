"""From lm-eval's samples to scores with our intervals, records that two runs are joined by, and rows to read.

A metric is a ratio of sums over documents: of its values and 1, of its items and their number, or of nats and the words or
bytes they cover. Where that ratio is not lm-eval's own number, lm-eval's is reported, without an interval, and that is said.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from posttrain import stats
from posttrain.data.group import content_hash
from posttrain.data.split import with_occurrence
from posttrain.disk import write_text
from posttrain.records import write_table
from posttrain.stages.base import Records

SAME = 1e-9
"""Our number and lm-eval's are the same when no further apart, relative to numbers above 1."""
EXPONENTIATED = ("perplexity", "weighted_perplexity")
"""lm-eval's aggregations exp(-Σ log p / Σ weight); perplexity has the weight 1."""
Key = tuple[str, str]
"""A metric and the filter its answers went through."""


@dataclass(frozen=True)
class Scoring:
    """How intervals are made."""

    level: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class Sums:
    """A metric is Σ above / Σ below, [D] each, then exponentiated if `kind` is perplexity; bits: of nats and bytes.

    items: it counts items that are 0 or 1, so that Wilson's interval is the one.
    """

    above: np.ndarray
    below: np.ndarray
    kind: str = "mean"
    items: bool = False

    def estimate(self, scoring: Scoring) -> stats.Estimate:
        how: dict[str, Any] = {"level": scoring.level, "resamples": scoring.resamples, "seed": scoring.seed}
        if self.kind == "perplexity":
            return stats.perplexity(self.above, self.below, **how)
        if self.kind == "bits":
            return stats.bits_per_byte(self.above, self.below, **how)
        if self.items:  # plain Wilson where each document is one item
            return stats.clustered_wilson(self.above, self.below, scoring.level)
        kept = self.below > 0
        return stats.bootstrap(self.above[kept], self.below[kept], **how)

    def columns(self, label: str) -> Records:
        """As posttrain.stats reads them: a number a document, or X_sum and X_count whose ratio is X."""
        if self.kind == "mean" and (self.below == 1).all():
            return {label: self.above}
        name = f"{label}_nats" if self.kind == "perplexity" else label
        above = self.above / math.log(2) if self.kind == "bits" else self.above
        return {f"{name}_sum": above, f"{name}_count": self.below}


@dataclass
class TaskScores:
    """One task: ids and columns [D] of its records, its metrics, a row a document to read, and what is to be said."""

    name: str
    ids: list[str]
    columns: Records = field(default_factory=dict)
    metrics: dict[str, stats.Estimate] = field(default_factory=dict)
    sums: dict[Key, Sums] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    lower_is_better: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """harness-<task>.parquet, the records, and harness-<task>.jsonl, the rows."""
        safe = re.sub(r"[^\w.-]", "_", self.name)
        safe += "" if safe == self.name else f"-{content_hash(self.name)[:6]}"  # a/b and a_b are two tasks
        columns = {"id": self.ids, "cluster": self.ids, **self.columns}
        write_table(folder / f"harness-{safe}.parquet", columns, self.lower_is_better)
        lines = [json.dumps(row, ensure_ascii=False, default=_plain) for row in self.rows]
        write_text(folder / f"harness-{safe}.jsonl", "".join(f"{line}\n" for line in lines))


def score_task(
    name: str, samples: Sequence[dict[str, Any]], aggregated: dict[str, Any], task: Any, scoring: Scoring
) -> TaskScores:
    """samples: lm-eval's, one a document and filter. aggregated: its results of the task, keyed "metric,filter"."""
    documents: dict[int, dict[str, dict[str, Any]]] = {}
    for sample in samples:
        documents.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
    each = [documents[number] for number in sorted(documents)]
    firsts = [next(iter(filtered.values())) for filtered in each]
    scores = TaskScores(name, with_occurrence([content_hash(sample["doc"]) for sample in firsts]))
    keys = list(dict.fromkeys((metric, sample["filter"]) for sample in samples for metric in sample["metrics"]))
    labels = labels_of(keys)
    for key in keys:
        metric, filtered_by = key
        values = [d[filtered_by].get(metric) if metric in d[filtered_by]["metrics"] else None for d in each]
        theirs, how = aggregated[f"{metric},{filtered_by}"], _name_of(task.aggregation().get(metric))
        missing = sum(value is None for value in values)
        if missing:
            scores.lines.append(f"harness/{name}: {missing:,} of {len(values):,} documents have no {labels[key]}")
        known = set(scores.columns)
        scores.metrics[labels[key]] = _formed(scores, key, labels[key], _sums(values, how), theirs, how, scoring)
        if task.higher_is_better().get(metric) is False:
            scores.lower_is_better += sorted({re.sub("_(sum|count)$", "", n) for n in scores.columns if n not in known})
    scores.rows = [_row(i, d, labels, task.OUTPUT_TYPE) for i, d in zip(scores.ids, each, strict=True)]
    return scores


def score_group(
    aggregated: dict[str, Any], members: Sequence[TaskScores], scoring: Scoring
) -> dict[str, stats.Estimate]:
    """A group's metrics over the documents of all its tasks, where that is lm-eval's number too."""
    keys = [
        (metric, filtered_by)
        for metric, _, filtered_by in (name.rpartition(",") for name in aggregated)
        if metric and not metric.endswith("_stderr")
    ]
    found = {}
    for key, label in labels_of(keys).items():
        parts = [member.sums[key] for member in members if key in member.sums]
        theirs, how = aggregated[",".join(key)], "mean of the tasks' scores, by their sizes or not"
        documents = sum(len(part.above) for part in parts)
        if not parts or any(part.kind != "mean" for part in parts):
            found[label] = _theirs(theirs, documents, f"lm-eval's {how}: no interval")
            continue
        above, below = np.concatenate([p.above for p in parts]), np.concatenate([p.below for p in parts])
        ours = Sums(above, below, items=all(part.items for part in parts)).estimate(scoring)
        told = f"lm-eval's {how}: no interval, it is not that of their documents ({_number(ours.value)})"
        found[label] = ours if _same(ours.value, theirs) else _theirs(theirs, documents, told)
    return found


def labels_of(keys: Sequence[Key]) -> dict[Key, str]:
    """The metric's name; with its filter where there are several."""
    several = len({filtered_by for _, filtered_by in keys}) > 1
    return {key: ",".join(key) if several else key[0] for key in keys}


def _formed(
    scores: TaskScores, key: Key, label: str, sums: Sums | None, theirs: Any, how: str, scoring: Scoring
) -> stats.Estimate:
    """Our estimate, its columns put among the records; lm-eval's number where it cannot be formed or is another."""
    if sums is None:
        told = f"lm-eval's {how}: no interval, it is not made of a number a document"
        return _theirs(theirs, len(scores.ids), told)
    ours = sums.estimate(scoring)
    if not _same(ours.value, theirs):
        if how == "mean":
            scores.lines.append(
                f"harness/{scores.name}: lm-eval gives {label} as {_number(theirs)}, but the mean of its documents is "
                f"{_number(ours.value)}; lm-eval's is reported"
            )
        told = f"lm-eval's {how}: no interval, it is not the mean of the documents ({_number(ours.value)})"
        return _theirs(theirs, len(scores.ids), told)
    scores.sums[key] = sums
    scores.columns |= sums.columns(label)
    return ours


def _sums(values: Sequence[Any], how: str) -> Sums | None:
    """What the values [D] are sums of; None (a value) adds nothing. how: the name of lm-eval's aggregation."""
    given = [value for value in values if value is not None]
    if given and how in ("weighted_perplexity", "bits_per_byte"):
        pairs = np.array([(-value[0], value[1]) if value is not None else (0.0, 0.0) for value in values], np.float64)
        kind = "bits" if how == "bits_per_byte" else "perplexity"
        return Sums(pairs[:, 0], pairs[:, 1], kind) if np.isfinite(pairs).all() else None
    if given and all(isinstance(value, list) for value in given) and all(_are_numbers(value) for value in given):
        lists = [value if value is not None else [] for value in values]  # several items a document, as ifeval's
    elif given and _are_numbers(given):
        lists = [[value] if value is not None else [] for value in values]
    else:
        return None
    if how in EXPONENTIATED:
        lists = [[-value for value in items] for items in lists]
    above = np.array([math.fsum(items) for items in lists])
    below = np.array([float(len(items)) for items in lists])
    if how in EXPONENTIATED:
        return Sums(above, below, "perplexity")
    return Sums(above, below, items=all(value in (0, 1) for items in lists for value in items))


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float | np.number | np.bool_) and math.isfinite(value) for value in values)


def _same(ours: float | None, theirs: Any) -> bool:
    if ours is None or not _are_numbers([theirs]):
        return False
    return abs(ours - theirs) <= SAME * max(1.0, abs(theirs))


def _theirs(value: Any, documents: int, method: str) -> stats.Estimate:
    finite = float(value) if _are_numbers([value]) else None
    return stats.Estimate(finite, None, None, None, documents, documents, method)


def _name_of(aggregation: Any) -> str:
    """Arbitrary metrics without an aggregation are averaged by lm-eval."""
    return "mean" if aggregation is None else str(getattr(aggregation, "__name__", aggregation))


def _number(value: Any) -> str:
    return f"{value:.9g}" if _are_numbers([value]) else str(value)


def _row(name: str, filtered: dict[str, dict[str, Any]], labels: dict[Key, str], kind: str) -> dict[str, Any]:
    """One document as it went to the model and came back."""
    sample = next(iter(filtered.values()))
    requests = list(zip(sample["arguments"], sample["resps"], strict=True))
    if "acc_mutual_info" in sample["metrics"]:
        requests = requests[: len(requests) // 2]  # the others ask for the choices without a prompt
    prompts = list(dict.fromkeys(arguments[0] for arguments, _ in requests))
    row: dict[str, Any] = {"id": name, "prompt": prompts[0] if len(prompts) == 1 else prompts}
    target = sample["target"]
    if kind in ("multiple_choice", "loglikelihood"):
        choices = [{"text": arguments[1], "logprob": answers[0][0]} for arguments, answers in requests]
        by_place = kind == "multiple_choice" and isinstance(target, int) and 0 <= target < len(choices)
        row["target"] = choices[target]["text"] if by_place else target
        row["answer"] = max(choices, key=lambda choice: choice["logprob"])["text"] if len(choices) > 1 else None
        row["choices"] = choices
    elif kind == "generate_until":
        answers = requests[0][1]
        row |= {"target": target, "answer": answers[0] if len(answers) == 1 else answers}
        row["filtered"] = {by: found["filtered_resps"][0] for by, found in filtered.items()}
    else:
        row |= {"target": target, "answer": None, "logprob": [answers[0] for _, answers in requests]}
    row["metrics"] = {
        label: filtered[by][metric] for (metric, by), label in labels.items() if metric in filtered[by]["metrics"]
    }
    return row


def _plain(value: Any) -> Any:
    """What JSON does not know: numpy's numbers and arrays as Python's, anything else as text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
