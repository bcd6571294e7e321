"""What evaluation examples are, beside their scores: their text, length and columns; and the slices that those make."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from posttrain.data.group import asked
from posttrain.disk import write_json
from posttrain.errors import ConfigError
from posttrain.records import write_table

if TYPE_CHECKING:
    from posttrain.data.pipeline import Prepared
    from posttrain.data.token_dataset import TokenDataset

FILE = "examples.parquet"
LENGTH = "length"
"""The slice by tokens, which is no column."""
MAX_SLICES = 12
"""Of one column; further values are put together, numbers into quarters."""
QUARTERS = (0.25, 0.5, 0.75)


@dataclass
class Described:
    """ids, clusters, tokens (of the longest response with the prompt), questions as a person asked them, other columns."""

    ids: list[str]
    clusters: list[str]
    tokens: list[int]
    questions: list[str]
    columns: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """examples.parquet, columns as JSON."""
        columns = [json.dumps(each, ensure_ascii=False, default=str) for each in self.columns]
        names = {"id": self.ids, "cluster": self.clusters, "tokens": self.tokens, "question": self.questions}
        write_table(folder / FILE, names | {"columns": columns})


def write_data(path: Path, prepared: Prepared, facts: list[tuple[str, str]], max_length: int, watches: str) -> None:
    """data.json: what was read, dropped and cut, in words and numbers; the plan's table; lengths as histograms.
    watches: the metric by which the stage is judged."""
    sides = {"train": prepared.train, "eval": prepared.eval}
    found = {"lines": prepared.lines, "facts": facts, "counts": prepared.counts, "max_length": max_length}
    lengths = {side: histogram(data.longest) for side, data in sides.items() if len(data)}
    write_json(path, found | {"lengths": lengths, "watches": watches})


def histogram(lengths: np.ndarray, bins: int = 30) -> dict[str, list[float]]:
    """edges [bins + 1] and counts [bins] of whole numbers."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    edges = np.unique(np.linspace(low, high, min(bins, high - low) + 1).round())
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}


def describe(data: TokenDataset) -> Described:
    """In the dataset's order."""
    texts = [json.loads(text) for text in data.column("text")]
    questions = [asked(text) or str(next(iter(text["responses"]), "")) for text in texts]  # a document is its own
    columns = [text["columns"] for text in texts]
    return Described(data.column("id"), data.column("cluster"), data.longest.tolist(), questions, columns)


def read_described(folder: Path) -> Described | None:
    """What `write` has put there; None where there is none."""
    if not (folder / FILE).is_file():
        return None
    table = pq.read_table(folder / FILE).to_pydict()
    columns = [json.loads(text) for text in table["columns"]]
    return Described(table["id"], table["cluster"], table["tokens"], table["question"], columns)


def check_slices(wanted: list[str], examples: Described) -> None:
    """eval.slices names columns that some evaluation example has, or length."""
    known = sorted({name for columns in examples.columns for name in columns})
    for name in wanted:
        if name == LENGTH and name in known:
            raise ConfigError(
                f"eval.slices names {LENGTH}, which is the examples' tokens, but the data has a column of that name, too; "
                "rename that"
            )
        if name != LENGTH and name not in known:
            raise ConfigError(
                f"eval.slices names {name!r}, which no evaluation example has; they have "
                f"{', '.join(known) or 'no other columns'}, and {LENGTH}"
            )


def slices(wanted: list[str], examples: Described) -> dict[str, dict[str, str]]:
    """by → id → the slice that the example is in."""
    found = {}
    for name in wanted:
        values = examples.tokens if name == LENGTH else [columns.get(name) for columns in examples.columns]
        found[name] = dict(zip(examples.ids, labels(values), strict=True))
    return found


def labels(values: list[Any]) -> list[str]:
    """A slice for each value: itself, numbers of many kinds by quarters, the rarest of many texts together."""
    numbers = [_number(value) for value in values]
    finite = [number for number in numbers if number is not None]
    if len({*finite}) > MAX_SLICES and all(n is not None or v is None for n, v in zip(numbers, values, strict=True)):
        return _quarters(numbers)
    texts = ["(none)" if value is None else str(value) for value in values]
    counts = Counter(texts)
    if len(counts) <= MAX_SLICES:
        return texts
    kept = {text for text, _ in counts.most_common(MAX_SLICES - 1)}
    rest = f"({len(counts) - len(kept)} others)"
    return [text if text in kept else rest for text in texts]


def _number(value: Any) -> float | None:
    """None for what is no number, or none that can be ordered."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _quarters(numbers: list[float | None]) -> list[str]:
    """Lowest to highest, ends included, as they occur: 12-40, 41-77 ...; None is (none)."""
    known = np.array([number for number in numbers if number is not None])
    place = np.searchsorted(np.unique(np.quantile(known, QUARTERS)), known, side="left")
    ends = {p: (float(known[place == p].min()), float(known[place == p].max())) for p in np.unique(place)}
    for digits in range(6, 18):  # as many as tell them apart
        names = {p: f"{low:.{digits}g}-{high:.{digits}g}" for p, (low, high) in ends.items()}
        written = [f"{end:.{digits}g}" for pair in ends.values() for end in dict.fromkeys(pair)]
        if len(set(written)) == len(written):
            break
    rest = iter(place)
    return ["(none)" if number is None else names[next(rest)] for number in numbers]
