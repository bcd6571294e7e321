"""What a run writes as it goes, and reads back when it goes on: metrics, per-example records, answers. Rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from posttrain.disk import writing
from posttrain.evaluate import Evaluation
from posttrain.records import read_calibrated, read_records, write_records
from posttrain.report import samples
from posttrain.report.sinks import Sink, open_sinks, read_metrics
from posttrain.rundir import RunDir

SHOWN = 16
"""Answers of an evaluation that a tracker is given."""


class Logbook:
    """One per process; until it is opened, and on other ranks for good, it writes nothing."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.sinks, self.began = run, list[Sink](), time.monotonic()

    def open(self, options: Any, config: dict[str, Any], resumed_at: int | None) -> None:
        """resumed_at: the step of the checkpoint that the run goes on from; lines after it are cut."""
        with writing(self.run.path):
            self.sinks = open_sinks(options, self.run.path, config, resumed_at)

    def log(self, split: str, step: int, metrics: dict[str, Any]) -> None:
        """A line in every sink."""
        with writing(self.run.path):
            for sink in self.sinks:
                sink.log(step, split, metrics, time.monotonic() - self.began)

    def evaluation(self, found: Evaluation, start: Evaluation | None, rollouts: Sequence[dict[str, Any]] = ()) -> None:
        """Records and answers, then the line. start: the run's first evaluation, None when this is it. rollouts: what training
        sampled last, to be looked at."""
        if not self.sinks:
            return
        if found.ids:
            path = self.run.records(found.step)
            with writing(path):
                write_records(path, found)
        if found.samples:
            with writing(self.run.path):
                samples.write(self.run, None if start is None else start.samples, found.samples, found.step, rollouts)
                for sink in self.sinks:
                    sink.table(found.step, "samples", samples.answers_table(found.samples[:SHOWN]))
                    if rollouts:
                        sink.table(found.step, "rollouts", samples.rollouts_table(rollouts))
        if found.ids:
            self.log("eval", found.step, found.metrics)

    def first_evaluation(self) -> Evaluation | None:
        """What an earlier process found before its first step."""
        line = read_metrics(self.run.path / "metrics.jsonl", "eval") if self.sinks else None
        return self._read(*line, "before") if line else None

    def evaluation_at(self, step: int) -> Evaluation | None:
        """What an earlier process found at this step."""
        line = read_metrics(self.run.path / "metrics.jsonl", "eval", step) if self.sinks else None
        return self._read(*line, "after") if line else None

    def flush(self) -> None:
        with writing(self.run.path):
            for sink in self.sinks:
                sink.flush()

    def close(self) -> None:
        for sink in self.sinks:
            with suppress(OSError):  # a disk that refuses has been told when it first did
                sink.close()
        self.sinks = []

    def _read(self, step: int, metrics: dict[str, Any], which: str) -> Evaluation | None:
        path = self.run.records(step)
        if not path.is_file():
            return None
        ids, clusters, records = read_records(path)
        answers = samples.read(self.run, step, which)
        return Evaluation(step, metrics, ids, clusters, records, answers, read_calibrated(path))
