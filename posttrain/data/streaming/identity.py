"""By what a stream and its evaluation set are known again, without reading all of the data."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict

from posttrain.data import cache
from posttrain.data.inputs import Source, is_embedded
from posttrain.data.pipeline import VERSION
from posttrain.data.sources import is_hub_id
from posttrain.data.streaming.readers import Reading
from posttrain.data.text import reading as opening

ENDS = 1 << 20
"""Bytes at each end of a file by which, with its size, it is known again."""


def keys_of(reading: Reading, sources: list[Source], default_limit: int) -> dict[str, str]:
    """train: of the stream, for a checkpoint; eval: of the evaluation set, for the cache."""
    free = ("cache", "streaming", "on_bad_row", "max_lost_fraction", "train", "eval", "eval_limit")
    of_stream = {name: value for name, value in asdict(reading.data).items() if name not in free}
    of_eval = {name: value for name, value in of_stream.items() if name not in ("shuffle", "shuffle_buffer", "mix")}
    common = {
        "version": VERSION,
        "encoding": asdict(reading.encoding),
        "tokenizer": cache.tokenizer_fingerprint(reading.tokenizer),
        "stage": (type(reading.stage).__name__, reading.seed, reading.fraction),
    }
    known = [(source.side, _known_by(source)) for source in sources]
    named = [(source.name, _changed(source)) for source in sources]
    limits = (reading.data.eval_limit, default_limit, reading.data.on_bad_row, reading.data.max_lost_fraction)
    streamed = [part for part in known if part[0] == "train"]
    return {
        "train": cache.digest({**common, "sources": streamed, "options": of_stream}),
        "eval": cache.digest({**common, "sources": known, "names": named, "options": of_eval, "limits": limits}),
    }


def _known_by(source: Source) -> str:
    """Size and both ends of a file, the first rows of a hub data set: to read all of it is what streaming avoids."""
    if is_embedded(source.name):
        return source.name
    if is_hub_id(source.name):
        assert source.detected is not None
        return cache.digest({"name": source.name, "rows": source.detected.survey.sample})
    with opening(source.name), open(source.name, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = file.read(ENDS)
        file.seek(max(0, size - ENDS))
        return f"{size} {hashlib.blake2b(ends + file.read(), digest_size=12).hexdigest()}"


def _changed(source: Source) -> int | None:
    """When a file was last changed: its middle may differ where size and ends are the same."""
    is_file = not is_embedded(source.name) and not is_hub_id(source.name)
    return os.stat(source.name).st_mtime_ns if is_file else None
