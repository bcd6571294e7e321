"""One source → its TokenGroups, a batch at a time, from a mark on; what is held out for evaluation is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.columns import ROLES
from posttrain.data.documents import Rest, Window
from posttrain.data.encoding import Encoding
from posttrain.data.formats import Detected, Report, refuser, to_groups
from posttrain.data.group import Group
from posttrain.data.inputs import Source, rows_of
from posttrain.data.split import split
from posttrain.data.streaming.cursors import Mark, RowCursor
from posttrain.data.streaming.tally import Tally
from posttrain.data.text import Place, placed_blocks
from posttrain.data.tokenize import Tokenizer
from posttrain.data.tokens import TokenGroup
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.config import DataConfig
    from posttrain.stages.base import Stage

BATCH = 128
"""Groups tokenised at once: what a resumed run may have to tokenise again."""


@dataclass(frozen=True)
class Reading:
    """How sources are read. fraction: share held out for evaluation. wants_held_out: read that share, not the rest."""

    data: DataConfig
    encoding: Encoding
    tokenizer: Any
    stage: Stage
    seed: int
    fraction: float
    wants_held_out: bool = False

    def is_wanted(self, ids: Sequence[str]) -> np.ndarray:
        """bool[n], by content: the same on every rank, in every epoch and in every run with this seed."""
        held_out = split(ids, self.fraction, self.seed) if self.fraction < 1 else np.ones(len(ids), bool)
        return held_out if self.wants_held_out else ~held_out


class StreamTokenizer(Tokenizer):
    """names: give repeats names of their own, as evaluation needs, and count them; of endless data nobody can."""

    def __init__(self, reading: Reading, names: bool = False) -> None:
        super().__init__(reading.tokenizer, reading.encoding, reading.data.on_bad_row)
        self.names = names

    def named(self, window: Window, file: str, first: bool) -> TokenGroup:
        """A stream's window as an example of its own."""
        if first:
            self._check_opening(window.ids)
        return window.token_group(self._name(Group(None, (window.text,), file=file)))

    def _name(self, group: Group) -> str:
        return super()._name(group) if self.names else group.content_id()


class RowReader:
    """Of a source of rows."""

    def __init__(
        self, source: Source, reading: Reading, worker: StreamTokenizer, tally: Tally, mark: Mark | None
    ) -> None:
        assert source.detected is not None
        self.reading, self.worker, self.tally = reading, worker, tally
        on_bad_row = reading.data.on_bad_row
        refuse = refuser(on_bad_row, tally.report)
        self.cursor = RowCursor(source.name, lambda told: iter(rows_of(source, reading.data, told)), refuse, mark)
        rows = ((source.name, number, row) for number, row in self.cursor)
        groups = to_groups(
            _known_columns(rows, source.detected, on_bad_row, tally.report), source.detected, on_bad_row, tally.report
        )
        self.groups = iter(reading.stage.groups(groups, tally.notes, reading.seed))

    def mark(self) -> Mark:
        """Where the next batch begins."""
        return self.cursor.mark()

    def read(self) -> list[TokenGroup] | None:
        """The examples of the next batch, maybe none; None at the end."""
        part = list(islice(self.groups, BATCH))
        if not part:
            return None
        wanted = self.reading.is_wanted([group.content_id() for group in part])
        self.tally.held_out += int((~wanted).sum())
        return list(self.worker.groups([group for group, good in zip(part, wanted, strict=True) if good]))


class TextReader:
    """Of a .txt that is one stream, a block at a time."""

    def __init__(
        self, source: Source, reading: Reading, worker: StreamTokenizer, tally: Tally, mark: Mark | None
    ) -> None:
        self.source, self.reading, self.worker, self.tally = source, reading, worker, tally
        self.place: Place = tuple(mark["place"]) if mark else (0, 0, 0)
        self.rest = Rest.of(mark["rest"]) if mark else worker.documents.begin()
        self.begun: bool = bool(mark and mark["begun"])
        self.ended: bool = bool(mark and mark["ended"])
        self.blocks = placed_blocks(source.name, self.place if mark else None)

    def mark(self) -> Mark:
        """Where the next block begins, and what the blocks before leave to its first window."""
        rest = {"begun": self.begun, "ended": self.ended, "rest": self.rest.state()}
        return {"place": list(self.place), **rest}

    def read(self) -> list[TokenGroup] | None:
        """The windows that the next block completes, maybe none; None at the end."""
        if self.ended:
            return None
        text, self.place = next(self.blocks, (None, self.place))
        if text is None:
            self.ended = True
            return self._groups(self.worker.documents.end(self.rest))
        first, self.begun = not self.begun, True
        text = text.removeprefix(self.worker.opening) if first else text
        return self._groups(self.worker.documents.push(self.rest, text), first)

    def _groups(self, windows: Iterator[Window], first: bool = False) -> list[TokenGroup]:
        name = self.source.name
        found = [self.worker.named(window, name, first and not i) for i, window in enumerate(windows)]
        wanted = self.reading.is_wanted([group.cluster for group in found])
        kept = [group for group, good in zip(found, wanted, strict=True) if good]
        counts = self.worker.counts
        counts.groups, counts.kept = counts.groups + len(kept), counts.kept + len(kept)
        counts.windows += len(kept)
        self.tally.held_out += len(found) - len(kept)
        return kept


def compact(group: TokenGroup) -> TokenGroup:
    """The same in 5 bytes a token, and its text in UTF-8, instead of about 50 and up to 4 a character; `whole` undoes it."""
    ids = [np.array(response, np.int32) for response in group.responses]
    masks = [np.array(mask, np.bool_) for mask in group.masks]
    packed: Any = {"prompt": np.array(group.prompt, np.int32), "responses": ids, "masks": masks}
    packed["text"] = group.text.encode("utf-8", "surrogatepass")
    return replace(group, **packed)


def whole(group: TokenGroup) -> TokenGroup:
    """The lists that a batch is made of."""
    packed: Any = group
    ids, masks = ([part.tolist() for part in parts] for parts in (packed.responses, packed.masks))
    text = packed.text.decode("utf-8", "surrogatepass")
    return replace(group, prompt=packed.prompt.tolist(), responses=ids, masks=masks, text=text)


def _known_columns(
    rows: Iterator[tuple[str, int, dict[str, Any]]], detected: Detected, on_bad_row: str, report: Report
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Refuse rows with a column that plays a role and was not there where the format was found: it would be passed over."""
    known = detected.survey.counts.keys()
    open_roles = [role for role in detected.spelling.optional if role not in detected.roles]
    names = {name for role in open_roles for name in ROLES.get(role, (role,))} - known
    for file, number, row in rows:
        late = [name for name in row if name in names] if names else []
        if not late:
            yield file, number, row
            continue
        message = (
            f"{file}, row {number}, column '{late[0]}': the first {detected.survey.rows:,} rows, from which a stream's "
            "format is found, have no such column, so it would not be read"
        )
        if on_bad_row != "skip":
            raise DataError(
                f"{message}; put a row that has it first, or set data.on_bad_row=skip to skip and count such rows"
            )
        report.rows += 1
        report.skip(message)
