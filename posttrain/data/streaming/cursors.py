"""Reading a source from a mark on: where an earlier reading stopped, in plain JSON.

JSON lines, .parquet and .txt are sought, and a hub data set has a state of its own; other kinds, and what is gzipped, are
read forward to the mark, without being tokenised.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from typing import Any

from posttrain.data.readers import Refuse, Rows, json_line, parquet, stop_at
from posttrain.data.sources import is_hub_id, kind_of, load_hub
from posttrain.data.text import open_bytes, reading
from posttrain.errors import DataError

Mark = dict[str, Any]

LINES = (".jsonl", ".ndjson")
SOUGHT = (*LINES, ".parquet", ".txt")


class RowCursor(Iterator[tuple[int, dict[str, Any]]]):
    """(row number, row) of one source; `mark()` tells where the next row begins.

    forward: the same rows from the first on, for kinds that cannot be sought. refuse: what becomes of a line that is no row.
    """

    def __init__(
        self, source: str, forward: Callable[[Refuse], Rows], refuse: Refuse = stop_at, mark: Mark | None = None
    ) -> None:
        self.source, self.forward, self.refuse = source, forward, refuse
        self.row: int = mark["row"] if mark else 0
        self.at: Any = mark["at"] if mark else None
        self.hub: Any = None
        self.rows = self._open()

    def __next__(self) -> tuple[int, dict[str, Any]]:
        self.row, row = next(self.rows)
        return self.row, row

    def mark(self) -> Mark:
        """Plain JSON."""
        return {"row": self.row, "at": self.hub.state_dict() if self.hub is not None else self.at}

    def _open(self) -> Rows:
        if is_hub_id(self.source):
            return self._hub()
        kind = kind_of(self.source)
        if kind in LINES:
            return self._lines()
        if kind == ".parquet":
            return parquet(self.source, after=self.row)
        return self._forward(self.row)

    def _forward(self, before: int) -> Rows:
        """Those after row `before`; what was refused up to there was counted when it was first read."""
        rows = self.forward(lambda number, error: self.refuse(number, error) if number > before else None)
        return ((number, row) for number, row in rows if number > before)

    def _lines(self) -> Rows:
        """As `json_lines`, by bytes: `at` is the position after the last line read."""
        number, self.at = self.row, self.at or 0
        with reading(self.source), open_bytes(self.source) as file:
            file.seek(self.at)
            for line in file:
                number, start, self.at = number + 1, self.at, self.at + len(line)
                text = (line if start else line.removeprefix(codecs.BOM_UTF8)).decode()
                if not text.isspace() and (row := json_line(self.source, number, text, self.refuse)) is not None:
                    yield number, row

    def _hub(self) -> Rows:
        self.hub = load_hub(self.source, streaming=True)
        if self.at is not None:
            self.hub.load_state_dict(self.at)
        return self._hub_rows(self.row)

    def _hub_rows(self, number: int) -> Rows:
        try:
            for number, row in enumerate(self.hub, number + 1):  # noqa: B020  (the error names it)
                yield number, dict(row)
        except DataError:
            raise
        except Exception as error:  # the library's exceptions have no common ancestor
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{self.source}: reading stopped after row {number:,}: {reason}; when it can be read again, the same "
                "command goes on from the last checkpoint"
            ) from error


def is_sought(source: str, by_separator: bool) -> bool:
    """Whether a reading can begin in the middle without passing over what is before."""
    if is_hub_id(source):
        return True
    documents = by_separator and kind_of(source) == ".txt"
    return kind_of(source) in SOUGHT and not source.endswith(".gz") and not documents
