"""The records of an evaluation as a Parquet file: a row an example, so that runs are compared without running a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.stats import BIN_COLUMNS

if TYPE_CHECKING:
    from posttrain.evaluate import Evaluation

Records = dict[str, np.ndarray]
AT_TEMPERATURE = "calibrated_"
LOWER = "lower_is_better"


def write_records(path: Path, evaluation: Evaluation) -> None:
    """id, cluster, the columns of its records, and with the prefix `calibrated_` those at the fitted temperature."""
    columns: dict[str, Any] = {"id": evaluation.ids, "cluster": evaluation.clusters}
    at_temperature = {AT_TEMPERATURE + name: values for name, values in evaluation.calibrated.items()}
    for name, values in (evaluation.records | at_temperature).items():
        columns[name] = values if values.ndim == 1 else list(values)
    write_table(path, columns)


def write_table(path: Path, columns: dict[str, Any], lower_is_better: Sequence[str] = ()) -> None:
    """The whole file or none. lower_is_better: scores of these columns of which that is not known by their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    try:
        table = pa.table(columns).replace_schema_metadata({LOWER: json.dumps(list(lower_is_better))})
        leaves = [
            f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in table.schema
        ]
        sums = [leaf for leaf in leaves if leaf.endswith("bin_confidence.list.element")]
        pq.write_table(
            table,
            scratch,
            compression="zstd",
            use_dictionary=[leaf for leaf in leaves if leaf not in sums],
            use_byte_stream_split=sums,  # all different, their low bytes mostly 0: half the file's size
        )
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def read_records(path: Path) -> tuple[list[str], list[str], Records]:
    """ids, clusters and columns as they were written, those at the fitted temperature left out."""
    table = pq.read_table(path)
    columns = {name: column(table, name) for name in table.column_names[2:] if not name.startswith(AT_TEMPERATURE)}
    return table["id"].to_pylist(), table["cluster"].to_pylist(), columns


def read_lower_is_better(path: Path) -> set[str]:
    """As it was written."""
    found = (pq.read_schema(path).metadata or {}).get(LOWER.encode(), b"[]")
    return set(json.loads(found))


def read_calibrated(path: Path) -> Records:
    """The columns at the fitted temperature; none where none was fitted."""
    table = pq.read_table(path)
    names = [name for name in table.column_names if name.startswith(AT_TEMPERATURE)]
    return {name.removeprefix(AT_TEMPERATURE): column(table, name) for name in names}


def column(table: pa.Table, name: str) -> np.ndarray:
    """[D] numbers, [D, B] numbers, or [D] arrays: those of a fine histogram are of as many bins as hold something."""
    values: np.ndarray = table[name].to_numpy(zero_copy_only=False)
    prefix = AT_TEMPERATURE if name.startswith(AT_TEMPERATURE) else ""
    fine = name.removeprefix(prefix) in BIN_COLUMNS and f"{prefix}bin_at" in table.column_names
    return np.stack(list(values)) if values.dtype == object and len(values) and not fine else values
