"""A run as its directory tells it: what a page is made of. Nothing of a model or of training is imported here."""

from __future__ import annotations

import fcntl
import json
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.errors import CheckpointError, ConfigError
from posttrain.records import column
from posttrain.report.verdicts import watched

Line = tuple[int, dict[str, Any]]
"""A step and its metrics."""

NOT_NEEDED = ("grid_logsumexp", "grid_slope", "grid_label")


@dataclass(frozen=True)
class Records:
    """One evaluation's records: a row an example, in the order of the ids."""

    step: int
    ids: list[str]
    clusters: np.ndarray
    columns: dict[str, np.ndarray]

    def scores(self, metric: str) -> np.ndarray | None:
        """[D], this metric of each example, NaN where it has none; None where the records do not tell it."""
        above = self.columns.get(f"{metric}_sum")
        if above is None:
            alone = self.columns.get(metric)
            return alone if alone is not None and alone.ndim == 1 else None
        below = self.columns.get(f"{metric}_count", self.columns.get("tokens") if metric == "nll" else None)
        if below is None:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(below > 0, above / below, np.nan)

    @property
    def are_pairs(self) -> bool:
        """Whether what is calibrated is which of two responses is better."""
        return "pair_accuracy_sum" in self.columns or "nll_count" in self.columns


@dataclass(frozen=True)
class Recorded:
    """What a run directory holds; whatever it lacks is empty or None."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, list[Line]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    running: bool = False
    unreadable: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        return str((self.config.get("stage") or {}).get("name", ""))

    @property
    def watched(self) -> str:
        """The metric by which the best checkpoint is chosen."""
        return str(self.data.get("watches") or watched(self.stage))

    @property
    def verb(self) -> str:
        return str(self.config.get("verb", "train"))

    @property
    def step(self) -> int:
        """The last step that anything is known of."""
        found = [line[0] for lines in self.lines.values() for line in lines[-1:]]
        return max([*found, (self.summary or {}).get("steps", 0)])

    @property
    def first(self) -> Line | None:
        return self.lines["eval"][0] if self.lines.get("eval") else None

    @property
    def last(self) -> Line | None:
        return self.lines["eval"][-1] if self.lines.get("eval") else None

    @cached_property
    def records(self) -> tuple[Records | None, Records | None]:
        """Per-example records of the first and the last evaluation that have some; the last is None where it is the first."""
        files = sorted((self.path / "eval").glob("step-*.parquet"))
        ends = [_records(file, self.unreadable) for file in dict.fromkeys([*files[:1], *files[-1:]])]
        return (ends[0] if ends else None), (ends[1] if len(ends) > 1 else None)

    @cached_property
    def tokens(self) -> np.ndarray | None:
        """[D], the tokens of each evaluation example."""
        file = self.path / "eval" / "examples.parquet"
        with suppress(OSError, pa.ArrowException, KeyError):
            return np.asarray(pq.read_table(file, columns=["tokens"])["tokens"].to_numpy(), dtype=float)
        return None


def read_run(path: Path) -> Recorded:
    """ConfigError where this is no run's directory; a file that cannot be read is named in `unreadable`."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} holds no config.json, so it is no run of posttrain; give a run's directory")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be read: {error}; give another run") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path / 'config.json'} is no run's of posttrain; give a run's directory")
    bad: list[str] = []
    samples, summary = _jsonl(path / "samples.jsonl", bad), _json(path / "summary.json", bad)
    return Recorded(
        path=path,
        config=config,
        environment=_json(path / "environment.json", bad) or {},
        overrides=_text(path / "overrides.txt").splitlines(),
        summary=summary,
        data=_json(path / "data.json", bad) or {},
        lines=_by_split(_jsonl(path / "metrics.jsonl", bad)),
        answers=[line for line in samples if isinstance(line.get("before") or line.get("after"), dict)],
        rollouts=[line for line in samples if isinstance(line.get("rollouts"), list)],
        running=summary is None and _is_held(path / ".lock"),
        unreadable=bad,
    )


def _by_split(lines: list[dict[str, Any]]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        if isinstance(line.get("step"), int) and isinstance(line.get("metrics"), dict):
            found.setdefault(str(line.get("split")), []).append((line["step"], line["metrics"]))
    return found


def _records(file: Path, bad: list[str]) -> Records | None:
    try:
        names = [name for name in pq.read_schema(file).names if name not in NOT_NEEDED]
        table = pq.read_table(file, columns=names).sort_by("id")
        columns = {name: column(table, name) for name in names if name not in ("id", "cluster")}
        clusters = np.asarray(table["cluster"].to_pylist(), dtype=str)
        return Records(int(file.stem.removeprefix("step-")), table["id"].to_pylist(), clusters, columns)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        bad.append(f"eval/{file.name} cannot be read: {error}")
        return None


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _json(path: Path, bad: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with suppress(ValueError):
        found = json.loads(_text(path))
        if isinstance(found, dict):
            return found
    bad.append(f"{path.name} cannot be read")
    return None


def _jsonl(path: Path, bad: list[str]) -> list[dict[str, Any]]:
    """Its lines; the last may still be being written, so one without its end is left out, any other is told of."""
    lines, found, failed = _text(path).split("\n"), [], 0
    for line in lines[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            failed += 1
    good = [line for line in found if isinstance(line, dict)]
    failed += len(found) - len(good)
    if failed:
        bad.append(f"{failed} of {path.name}'s lines cannot be read")
    return good


def _is_held(lock: Path) -> bool:
    """Whether a process has locked it (posttrain/claim.py): the run goes on at this moment."""
    try:
        with lock.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except OSError:
        pass
    return False
