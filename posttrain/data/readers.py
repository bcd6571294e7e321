"""One reader a file kind: each yields (row number from 1, row) and names the place of what it cannot read."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from posttrain.data.text import open_text, reading
from posttrain.errors import DataError

Rows = Iterator[tuple[int, dict[str, Any]]]

Refuse = Callable[[int, DataError], None]
"""What becomes of a row, by its number, that is broken by itself: raises, or returns, and the reading goes on behind it."""

EXCERPT_CHARS = 60


def excerpt(value: Any, max_chars: int = EXCERPT_CHARS) -> str:
    """A value as an error shows it: its beginning, on one line."""
    shown = repr(value[: max_chars + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= max_chars else shown[:max_chars] + "…"


def stop_at(number: int, error: DataError) -> NoReturn:
    """Refuse by ending the reading: data.on_bad_row=error."""
    raise DataError(f"{error}, or set data.on_bad_row=skip to skip and count such rows") from None


def json_lines(path: str, refuse: Refuse = stop_at) -> Rows:
    """.jsonl and .ndjson, streamed. The row number is the line number, so that an editor finds it; blank lines pass."""
    with reading(path), open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace() and (row := json_line(path, number, line, refuse)) is not None:
                yield number, row


def json_line(path: str, number: int, line: str, refuse: Refuse = stop_at) -> dict[str, Any] | None:
    """The object on one line; None where there is none and the reading goes on."""
    try:
        row = json.loads(line)
    except ValueError as error:
        if line.strip() == "[":  # no bad row: another kind of file
            raise _broken(path, number, error, line, "a list over several lines is a .json, not a .jsonl") from None
        refuse(number, _broken(path, number, error, line))
        return None
    return _an_object(path, "line", number, row, refuse)


def json_document(path: str, refuse: Refuse = stop_at) -> Rows:
    """.json: a list of objects, one object, or (as many hubs name it) JSON lines."""
    with reading(path), open_text(path) as file:
        text = file.read()
    if not text.strip():
        return
    try:
        whole = json.loads(text)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and text.lstrip()[0] == "{":
            yield from json_lines(path, refuse)
            return
        number = getattr(error, "lineno", 1)
        raise _broken(path, number, error, text.split("\n")[number - 1]) from None
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        if (found := _an_object(path, "row", number, row, refuse)) is not None:
            yield number, found


def _broken(path: str, number: int, error: ValueError, line: str, advice: str = "fix or remove it") -> DataError:
    at = getattr(error, "colno", 1)
    reason = getattr(error, "msg", str(error))
    near = excerpt(line[max(at - 21, 0) : at + 20].rstrip())
    return DataError(f"{path}, line {number}, column {at}: broken JSON: {reason}, near {near}; {advice}")


def _an_object(path: str, unit: str, number: int, row: Any, refuse: Refuse) -> dict[str, Any] | None:
    if isinstance(row, dict):
        return row
    found = f"{path}, {unit} {number}: found {type(row).__name__} ({excerpt(row)})"
    refuse(number, DataError(f'{found}, accepted: an object such as {{"prompt": ..., "completion": ...}}; fix it'))
    return None


def delimited(path: str, refuse: Refuse = stop_at, *, delimiter: str) -> Rows:
    """.csv and .tsv with a header, streamed. Every value is text; an empty cell is None: csv has no other null."""
    csv.field_size_limit(sys.maxsize)  # the default refuses a cell of 128 kB, which a long document is
    with reading(path), open_text(path, newline="") as file:
        table = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next((cells for cells in table if cells), [])
            _check_header(path, header, delimiter)
            number = 0
            for cells in table:
                if not cells:
                    continue
                number += 1
                if len(cells) == len(header):
                    yield number, {name: cell or None for name, cell in zip(header, cells, strict=True)}
                    continue
                found = f"{path}, row {number} (line {table.line_num}): {len(cells)} cells, but the header names "
                known = f"{len(header)} columns ({', '.join(header)}); quote cells that hold {delimiter!r} or newlines"
                refuse(number, DataError(found + known))
        except csv.Error as error:
            raise DataError(
                f"{path}, line {table.line_num}: broken csv: {error}; is a quote left open or not doubled?"
            ) from None


def _check_header(path: str, header: list[str], delimiter: str) -> None:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}, line 1: the header names {', '.join(map(repr, twice))} twice; rename one")
    if len(header) == 1 and (other := next((d for d in ",;\t" if d != delimiter and d in header[0]), None)):
        raise DataError(
            f"{path}, line 1: the header {excerpt(header[0])} is one column separated by {delimiter!r}, "
            f"but holds {other!r}; name a tab-separated file .tsv, and write others with ','"
        )


def parquet(path: str, refuse: Refuse = stop_at, after: int = 0) -> Rows:
    """.parquet, a thousand rows at a time; those after row number `after`, whose row group is sought."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(path):
        try:
            with pq.ParquetFile(path) as file:
                first, number = 0, 0
                while first < file.num_row_groups and number + file.metadata.row_group(first).num_rows <= after:
                    number += file.metadata.row_group(first).num_rows
                    first += 1
                for batch in file.iter_batches(batch_size=1000, row_groups=range(first, file.num_row_groups)):
                    for row in batch.to_pylist():
                        number += 1
                        if number > after:
                            yield number, row
        except pa.ArrowException as error:
            raise DataError(f"{path}: not a readable parquet file: {error}; was it copied whole?") from error
