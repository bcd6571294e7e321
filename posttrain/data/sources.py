"""From what data.train and data.eval name to rows: files, lists, globs and directories of them, and hub ids.

A hub id is `org/name`, `org/name:config`, `org/name@split` or `org/name:config@split` (split is train unless given, and
may be a slice such as `train[:1000]`); `hub:` before it says that it is no path.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import chain
from typing import Any

from posttrain.data.readers import Refuse, Rows, delimited, json_document, json_lines, parquet, stop_at
from posttrain.data.text import documents, open_text, reading
from posttrain.errors import DataError

READERS: dict[str, Callable[[str, Refuse], Rows]] = {
    ".json": json_document,
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".csv": partial(delimited, delimiter=","),
    ".tsv": partial(delimited, delimiter="\t"),
    ".parquet": parquet,
}
EXTENSIONS = (*READERS, ".txt")
ACCEPTED = f"{', '.join(EXTENSIONS)} (all but .parquet also with .gz)"

STREAM = "text_stream"  # the column of the one row that stands for a .txt read as a stream; its value is the path

HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@:]+))?(@(?P<split>.+))?")
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of saved hub datasets


def expand_sources(value: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files and hub ids that a value of data.train stands for: the list's order, names sorted inside each entry.

    An entry is a file, a directory (its files of known kinds, at any depth), a glob (`**` for any depth) or a hub id.
    Two mentions of a file are two sources: that is how some people weigh them.
    """
    entries = [value] if isinstance(value, str | os.PathLike) else list(value)
    if not entries:
        raise DataError("data.train names no file: the list is empty")
    return list(chain.from_iterable(_expand(os.path.expanduser(os.fspath(entry))) for entry in entries))


def _expand(entry: str) -> list[str]:
    if os.path.isdir(entry):
        found = [os.path.join(folder, name) for folder, _, names in os.walk(entry) for name in names]
        files = sorted(path for path in found if _belongs(os.path.relpath(path, entry)))
        if not files:
            raise DataError(f"{entry}: the directory holds no file of a known kind; accepted: {ACCEPTED}")
        return files
    if os.path.exists(entry) or is_hub_id(entry) or not glob.has_magic(entry):
        return [entry]
    files = sorted(path for path in glob.glob(entry, recursive=True) if os.path.isfile(path))
    if not files:
        raise DataError(f"{entry}: no file matches this pattern (working directory {os.getcwd()})")
    return files


def _belongs(relative: str) -> bool:
    hidden = any(part.startswith(".") for part in relative.split(os.sep))
    return not hidden and os.path.basename(relative) not in METADATA and kind_of(relative) in EXTENSIONS


def kind_of(path: str) -> str:
    """The ending that says what kind of file it is, without .gz."""
    return os.path.splitext(path.removesuffix(".gz").lower())[1]


def is_hub_id(source: str) -> bool:
    """Whether a source is looked for on the hub: no such path, no known ending, and not inside an existing folder."""
    if source.startswith("hub:"):
        return True
    if os.path.exists(source) or source.startswith((".", "/", "~")) or kind_of(source) in EXTENSIONS:
        return False
    parent = os.path.dirname(source)
    return bool(HUB_ID.fullmatch(source)) and not (parent and os.path.isdir(parent))


def is_text_stream(source: str, document_separator: str | None = None) -> bool:
    """Whether the source is one stream of text, to be read with `text.text_blocks`."""
    return document_separator is None and kind_of(source) == ".txt"


def read_rows(source: str, document_separator: str | None = None, refuse: Refuse = stop_at) -> Rows:
    """(row number from 1, row) of one file or hub id, streamed; in JSON lines the row number is the line number.

    A .txt gives a row {"text"} a document where there is a document_separator, else the one row {STREAM: path}. refuse: what
    becomes of a line that is no row, such as broken JSON.
    """
    refused: list[DataError] = []

    def told(number: int, error: DataError) -> None:
        refuse(number, error)
        if not refused:
            refused.append(error)

    if is_hub_id(source):
        rows = _hub_rows(source)
    else:
        check_file(source)
        kind = kind_of(source)
        if is_text_stream(source, document_separator):
            rows = _stream_row(source)
        elif kind == ".txt":
            assert document_separator is not None
            rows = ((number, {"text": text}) for number, text in documents(source, document_separator))
        else:
            rows = READERS[kind](source, told)
    first = next(rows, None)
    if first is None:
        raise DataError(nothing_in(source, refused))
    return chain([first], rows)


def nothing_in(source: str, refused: Sequence[object] = ()) -> str:
    """Why a source without a row cannot be used; refused: the first of the rows that could not be read."""
    if refused:
        return f"{source}: none of its rows can be read; the first: {refused[0]}"
    return f"{source}: the file is empty, or holds no rows; give a file with at least one"


def _stream_row(path: str) -> Rows:
    """One row, unless the file is blank."""
    with reading(path), open_text(path) as file:
        if any(not line.isspace() for line in file):
            yield 1, {STREAM: path}


def check_file(path: str) -> None:
    """DataError where there is no such file, or it is of no known kind."""
    if not os.path.exists(path):
        raise DataError(_missing(path))
    if os.path.isdir(path):
        raise DataError(f"{path}: a directory where a file is read; expand_sources lists its files")
    if kind_of(path) not in EXTENSIONS or path.endswith(".parquet.gz"):
        found = os.path.splitext(path)[1] or "no ending"
        raise DataError(f"{path}: unknown kind of file ({found}); accepted: {ACCEPTED}")


def _missing(path: str) -> str:
    """Names the nearest file, or the first folder of the path that does not exist."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        while os.path.dirname(folder) and not os.path.isdir(os.path.dirname(folder)):
            folder = os.path.dirname(folder)
        return f"{path}: no such file: the folder {folder} does not exist (working directory {os.getcwd()})"
    near = get_close_matches(os.path.basename(path), sorted(os.listdir(folder)), n=1)
    tip = f"did you mean {os.path.join(os.path.dirname(path), near[0])}?" if near else f"{folder} has none like it"
    return f"{path}: no such file; {tip}"


def load_hub(source: str, streaming: bool = False) -> Any:
    """The `datasets.Dataset` (memory-mapped) of a hub id, or its `IterableDataset`, of which nothing is kept on disk."""
    import datasets

    match = HUB_ID.fullmatch(source.removeprefix("hub:"))
    if match is None:
        raise DataError(f"{source}: not a hub id; accepted: org/name, org/name:config, org/name@split")
    options = {"streaming": True} if streaming else {}
    try:
        return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train", **options)
    except Exception as error:  # the library's exceptions have no common ancestor
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{_missing(source.removeprefix('hub:'))}; nor does a data set of that name load from the hub: {reason}; "
            f"try {match['name']}:CONFIG@SPLIT, or a file ({ACCEPTED})"
        ) from error


def _hub_rows(source: str) -> Rows:
    for number, row in enumerate(load_hub(source), 1):
        yield number, dict(row)


def read_all(
    sources: Sequence[str], document_separator: str | None = None
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(source, row number, row) of several sources, one after another."""
    for source in sources:
        for number, row in read_rows(source, document_separator):
            yield source, number, row


def fingerprint(source: str) -> str:
    """32 hex digits that change with the content: of a file's bytes, or of a hub data set's cached version."""
    digest = hashlib.blake2b(digest_size=16)
    if is_hub_id(source):
        digest.update(f"{source} {load_hub(source)._fingerprint}".encode())
        return digest.hexdigest()
    check_file(source)
    with reading(source), open(source, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
