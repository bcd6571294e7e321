"""What a streamed run needs before its first step: formats from the first rows, the evaluation set, a few examples to show.

Held out is what the content's hash says, as for data on a disk; the first data.eval_limit of it, found without reading on,
are the evaluation set, and the rest of that share is trained on by nobody either.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data import cache
from posttrain.data.formats import Report, describe, refuser
from posttrain.data.inputs import Source, check_mix, detect, is_embedded, list_sources, rows_of
from posttrain.data.pipeline import Prepared, encoding_of
from posttrain.data.sources import check_file, is_hub_id, is_text_stream, kind_of, nothing_in
from posttrain.data.streaming.cursors import RowCursor, is_sought
from posttrain.data.streaming.feed import Feed, stop_if_many_lost
from posttrain.data.streaming.identity import keys_of
from posttrain.data.streaming.readers import Reading, RowReader, StreamTokenizer, TextReader, whole
from posttrain.data.streaming.stream import Stream
from posttrain.data.streaming.tally import Tally
from posttrain.data.token_dataset import TokenDataset, Writer, read
from posttrain.data.tokens import Examples, TokenGroup
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain.config import DataConfig
    from posttrain.stages.base import Stage

FIRST_ROWS = 100
"""Rows of each source from which its format is found."""

EVAL_LIMIT = 500
"""Examples held out where neither data.eval nor data.eval_limit is given (conf/config.yaml says so)."""

SHOWN = 64
"""Training examples read beforehand: to show one, and to check the model on."""


def prepare_stream(data: DataConfig, tokenizer: Any, stage: Stage, seed: int) -> Prepared:
    """As `pipeline.prepare`, of data.train as it streams; only the evaluation set is written (to data.cache)."""
    check_mix(data)
    names = {"train": list_sources(data.train), "eval": list_sources(data.eval)}
    sources = [Source(name, number, side) for side in names for number, name in enumerate(names[side])]
    for source in sources:
        source.detected = _first_look(source, data, stage)
    train, given = ([source for source in sources if source.side == side] for side in ("train", "eval"))
    encoding = encoding_of(data, tokenizer, stage)
    fraction = 0.0 if given else data.eval_fraction
    reading = Reading(data, encoding, tokenizer, stage, seed, fraction)
    held_out = Reading(data, encoding, tokenizer, stage, seed, 1.0 if given else fraction, wants_held_out=True)
    keys = keys_of(reading, sources, EVAL_LIMIT)
    directory = cache.cache_root(data.cache) / keys["eval"]
    reused = cache.is_built(directory)
    if not reused:
        cache.build(directory, lambda scratch: _hold_out(scratch, held_out, given or train))
    found = TokenDataset(read(directory / "eval.arrow"))
    lines = _lines(train, given, data, len(found), cache.read_facts(directory))
    stream = _stream(reading, train, keys["train"]) if train else None
    shown = Examples(_first_examples(stream) if stream else [])
    return Prepared(shown, found, lines, {"eval": len(found)}, keys["train"], directory, reused, stream)


def _first_look(source: Source, data: DataConfig, stage: Stage) -> Any:
    """The format, from the first rows; what cannot be streamed is refused."""
    name = source.name
    if not is_embedded(name) and not is_hub_id(name):
        check_file(name)
        if kind_of(name) == ".json" and source.side == "train":
            raise DataError(
                f"{name}: a .json is one document that can only be read whole into memory, so it cannot be streamed; "
                "make it JSON lines (jq -c '.[]' a.json > a.jsonl), or leave data.streaming out"
            )
        if is_text_stream(name, data.document_separator):
            return detect(source, data, stage)
    report = Report()  # of these rows; all are counted when they are read again
    cursor = RowCursor(name, lambda told: iter(rows_of(source, data, told)), refuser(data.on_bad_row, report))
    rows = [row for _, row in islice(cursor, FIRST_ROWS)]
    if not rows:
        raise DataError(nothing_in(name, report.messages))
    found = detect(source, data, stage, rows)
    if found is not None and found.spelling.joins and source.side == "train":
        raise DataError(
            f"{name}: the format {found.format} joins the rows of a prompt, which may stand anywhere, so it cannot be "
            "streamed; write a row a prompt (the format groups: prompt, responses, rewards), or leave data.streaming out"
        )
    return found


def _stream(reading: Reading, train: list[Source], signature: str) -> Stream:
    data, count = reading.data, len(train)
    if data.mix and not sum(data.mix) > 0:
        raise ConfigError(f"data.mix must give a weight above 0 to one source, got {list(data.mix)}")
    limits = [
        None if data.train_limit is None else data.train_limit * (i + 1) // count - data.train_limit * i // count
        for i in range(count)
    ]
    parts = [[i] for i in range(count)] if data.mix else [list(range(count))]
    feeds = [Feed([train[i] for i in part], reading, [limits[i] for i in part], data.shuffle) for part in parts]
    by_separator = data.document_separator is not None
    forward = [s.name for s in train if is_embedded(s.name) or not is_sought(s.name, by_separator)]
    mix = list(data.mix) if data.mix else None
    return Stream(feeds, mix, reading.seed, data.shuffle, data.shuffle_buffer, signature, forward)


def _first_examples(stream: Stream) -> list[TokenGroup]:
    """Of every feed some; then back to the beginning."""
    found = []
    for feed in stream.feeds:
        found += [whole(group) for group in feed.take(-(-SHOWN // len(stream.feeds)))]
        feed.go_to(None)
    if not found:
        raise DataError("data.train: no example is left to train on in the whole of it; look with posttrain inspect")
    return found


def _hold_out(scratch: Path, reading: Reading, sources: list[Source]) -> dict[str, Any]:
    """The evaluation set: of every source its share of the limit, the first that are held out."""
    data = reading.data
    limit = data.eval_limit or (None if reading.fraction == 1 else EVAL_LIMIT)
    worker, tally, writer = StreamTokenizer(reading, names=True), Tally(), Writer(scratch / "eval.arrow", limit)
    tally.counts = worker.counts
    if reading.fraction:
        for number, source in enumerate(sources):
            writer.limit = None if limit is None else limit * (number + 1) // len(sources)
            reader = (TextReader if source.detected is None else RowReader)(source, reading, worker, tally, None)
            while not writer.full and (batch := reader.read()) is not None:
                for group in batch:
                    group.source = source.number
                writer.write(batch)
    writer.close()
    worker.counts.windows = 0  # those past the limit are among them
    if reading.fraction == 1 and tally.total:
        stop_if_many_lost("data.eval", tally, reading)
    if reading.fraction == 1 and not writer.count:
        raise DataError("data.eval: no example is left of what was read; look at it with posttrain inspect")
    return {"lines": [*tally.report.lines(), *worker.counts.lines(reading.encoding)]}


def _lines(train: list[Source], given: list[Source], data: DataConfig, count: int, facts: dict[str, Any]) -> list[str]:
    """How sources are read, alike ones together, and what is held out."""
    alike: dict[str, list[str]] = {}
    for source in [*train, *given]:
        found = f"{describe(source.detected, counted=False)}" if source.detected else "one stream of text"
        alike.setdefault(found, []).append(source.name)
    lines = [
        f"{', '.join(names[:3])}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''}: {found}"
        + ("" if found == "one stream of text" else f" (from the first {FIRST_ROWS} rows)")
        for found, names in alike.items()
    ]
    lines += [f"of the evaluation data: {line}" for line in facts["lines"]]
    if train and not given and data.eval_fraction:
        lines.append(
            f"held out for evaluation: {count:,} examples, the first whose content's hash falls into "
            f"data.eval_fraction={data.eval_fraction:g} (at most data.eval_limit={data.eval_limit or EVAL_LIMIT:,}); the "
            "rest of that share is not trained on either"
        )
    return lines
