"""What became of the rows of a stream so far, in numbers that a checkpoint keeps."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.encoding import Counts
from posttrain.data.formats import Report


@dataclass
class Tally:
    """counts, report, notes: as for files that are read whole. held_out: examples left out for evaluation; examples:
    those given out to train on. All over all epochs so far."""

    counts: Counts = field(default_factory=Counts)
    report: Report = field(default_factory=Report)
    notes: Counter[str] = field(default_factory=Counter)
    held_out: int = 0
    examples: int = 0

    @property
    def lost(self) -> int:
        """Groups that were to be trained on and are not."""
        return self.counts.lost + self.report.skipped

    @property
    def total(self) -> int:
        """Groups that were to be trained on."""
        return self.counts.groups + self.report.skipped

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        parts = {"counts": vars(self.counts), "report": {**vars(self.report), "notes": dict(self.report.notes)}}
        return deepcopy({**parts, "notes": dict(self.notes), "held_out": self.held_out, "examples": self.examples})

    @staticmethod
    def of(state: dict[str, Any]) -> Tally:
        """Back from `state`."""
        state = deepcopy(state)
        report = {**state["report"], "notes": Counter(state["report"]["notes"])}
        notes = Counter[str](state["notes"])
        return Tally(Counts(**state["counts"]), Report(**report), notes, state["held_out"], state["examples"])

    def join(self, other: Tally) -> Tally:
        """Both together."""
        mine, theirs = self.state(), other.state()
        return Tally.of(_added(mine, theirs))


def _added(a: Any, b: Any) -> Any:
    """Numbers added, lists joined (without repeats), dictionaries merged."""
    if isinstance(a, dict):
        return {name: _added(a[name], b[name]) if name in a and name in b else (a | b)[name] for name in a | b}
    if isinstance(a, list):
        return list(dict.fromkeys(a + b))
    return a + b
