"""Sources → rows → Groups → TokenGroups → an Arrow file each for training and evaluation, made once and found again.

The split is by content hash, before anything is tokenised or sharded, so that every rank and every later run holds out the
same examples.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data import cache
from posttrain.data.formats import describe, refuser, to_groups
from posttrain.data.inputs import Source, check_mix, detect, is_embedded, list_sources, rows_of
from posttrain.data.losses import nothing_left, numbers, stop_if_lost
from posttrain.data.sources import fingerprint
from posttrain.data.split import split
from posttrain.data.text import text_blocks
from posttrain.data.token_dataset import TokenDataset, Writer, read
from posttrain.data.tokenize import Encoding, Tokenizer
from posttrain.data.tokens import Examples, TokenGroup
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.config import DataConfig
    from posttrain.data.streaming.stream import Stream
    from posttrain.stages.base import Stage

VERSION = 7
"""Raise when the same text would become other tokens: cached files of other versions are not found."""


@dataclass
class Prepared:
    """Tokenised data. lines: what a user should know about it, in words. stream: where training data comes from when it
    is streamed; `train` then holds its first examples."""

    train: TokenDataset | Examples
    eval: TokenDataset
    lines: list[str]
    counts: dict[str, Any]
    fingerprint: str
    directory: Path
    reused: bool = False
    stream: Stream | None = None

    def facts(self, layout: str) -> list[tuple[str, str]]:
        """What: value, for a plan's table."""
        held_out = f"{len(self.eval):,} evaluation examples"
        if self.stream:
            return [("data", f"streamed: counts unknown; {self.stream.describe()}; {held_out}")]
        if not self.train.counts.any():
            return [("data", f"{len(self.train):,} prompts to train on, {held_out}")]
        processed = int(self.train.processed(layout).sum())
        tokens = f"{processed:,} an epoch, {int(self.train.trained.sum()):,} of them trained"
        if layout == "shared":
            tokens += f" (prompts shared: {processed / int(self.train.lengths.sum()):.0%} of the padded layout's)"
        return [("data", f"{len(self.train):,} training, {held_out}"), ("tokens", tokens)]


def prepare(data: DataConfig, tokenizer: Any, stage: Stage, seed: int) -> Prepared:
    """Tokenise data.train and data.eval, or find what an earlier run tokenised from the same content.

    Without data.train (posttrain eval) there is evaluation data only.
    """
    check_mix(data)
    named = [(name, "train") for name in list_sources(data.train)] + [
        (name, "eval") for name in list_sources(data.eval)
    ]
    sources = [Source(name, number, side) for number, (name, side) in enumerate(named)]
    encoding = encoding_of(data, tokenizer, stage)
    key, fingerprint = data_keys(data, encoding, tokenizer, stage, sources, seed)
    directory = cache.cache_root(data.cache) / key
    reused = cache.is_built(directory)
    if not reused:
        for source in sources:
            source.detected = detect(source, data, stage)
        cache.build(directory, lambda scratch: _tokenize(scratch, data, encoding, tokenizer, stage, sources, seed))
    facts = cache.read_facts(directory)
    train, held_out = (TokenDataset(read(directory / f"{side}.arrow")) for side in ("train", "eval"))
    return Prepared(train, held_out, facts["lines"], facts["counts"], fingerprint, directory, reused)


def encoding_of(data: DataConfig, tokenizer: Any, stage: Stage) -> Encoding:
    """How this run's text becomes tokens, with everything that was left to `auto` decided."""
    template = data.template
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "none"
    policy = data.on_too_long or ("split" if stage.splits_long_documents else "drop")
    if policy == "split" and not stage.splits_long_documents:
        raise DataError(
            "data.on_too_long=split cuts documents into windows, which only pretrain can use; try drop or truncate"
        )
    train_on = getattr(stage, "train_on", "all")
    return Encoding(
        template,
        data.max_length,
        policy,
        train_on,
        stage.splits_long_documents,
        stage.closes_responses,
        stage.answer_tokens,
    )


def data_keys(
    data: DataConfig, encoding: Encoding, tokenizer: Any, stage: Stage, sources: list[Source], seed: int
) -> tuple[str, str]:
    """By what the cache is found again, and by what a run knows its data again. Both change with whatever decides the
    tokens: file contents, reading options, tokenizer, template, split; the first also with what makes reading fail, which
    says nothing of data that has been read."""
    options = asdict(data)
    for name in ("cache", "shuffle", "streaming", "shuffle_buffer", "mix", "train", "eval"):
        options.pop(name, None)
    strictness = {name: options.pop(name) for name in ("on_bad_row", "max_lost_fraction")}
    parts = {
        "version": VERSION,
        "sources": [(s.side, (s.name, None if is_embedded(s.name) else fingerprint(s.name))) for s in sources],
        "options": options,
        "encoding": asdict(encoding),
        "tokenizer": cache.tokenizer_fingerprint(tokenizer),
        "stage": (type(stage).__name__, stage.group_settings(), seed),
    }
    return cache.digest({**parts, "strictness": strictness}), cache.digest(parts)


@contextmanager
def _frozen() -> Iterator[None]:
    """The objects that there are already, the libraries' half a million, are passed over by Python's garbage collector, which
    would otherwise look at all of them again and again while lists of tokens are made."""
    others = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not others:
            gc.unfreeze()


@_frozen()
def _tokenize(
    scratch: Path, data: DataConfig, encoding: Encoding, tokenizer: Any, stage: Stage, sources: list[Source], seed: int
) -> dict[str, Any]:
    worker, notes = Tokenizer(tokenizer, encoding, data.on_bad_row), Counter[str]()
    fraction = 0.0 if any(source.side == "eval" for source in sources) else data.eval_fraction
    train = Writer(scratch / "train.arrow", data.train_limit)
    held_out = Writer(scratch / "eval.arrow", data.eval_limit)
    shares = _shares(sources, {"train": data.train_limit, "eval": data.eval_limit})
    for source in sources:
        before, room = numbers(worker.counts), {"train": train, "eval": held_out}[source.side]
        room.limit = shares[source.number]
        for batch in _batches(_token_groups(source, data, worker, stage, notes, seed)):
            is_eval = split([group.cluster for group in batch], fraction, seed)
            if source.side == "eval":
                held_out.write(batch)
            else:
                sides = list(zip(batch, is_eval, strict=True))
                train.write([group for group, held in sides if not held])
                held_out.write([group for group, held in sides if held])
            if room.full and (held_out.full or not fraction):
                break
        source.counts = numbers(worker.counts) - before
    for writer in (train, held_out):
        writer.close()
    for side, count in (("train", train.count), ("eval", held_out.count)):
        named = [source for source in sources if source.side == side]
        if named and not count:
            raise DataError(nothing_left(f"data.{side}", named, encoding, stage))
        stop_if_lost(f"data.{side}", named, worker.counts, data, encoding)
    lines = [f"{s.name}: {describe(s.detected)}" if s.detected else f"{s.name}: one stream of text" for s in sources]
    lines += [line for s in sources for line in s.report.lines()]
    lines += [f"{count:,} {what}" for what, count in notes.items()]
    lines += worker.counts.lines(encoding)
    return {"counts": {**asdict(worker.counts), "train": train.count, "eval": held_out.count}, "lines": lines}


def _shares(sources: list[Source], limits: dict[str, int | None]) -> list[int | None]:
    """For each source, how many examples its side may hold once it is read: limits are shared equally among sources."""
    shares: list[int | None] = []
    for source in sources:
        limit, same = limits[source.side], [other.number for other in sources if other.side == source.side]
        shares.append(None if limit is None else limit * (same.index(source.number) + 1) // len(same))
    return shares


def _token_groups(
    source: Source, data: DataConfig, worker: Tokenizer, stage: Stage, notes: Counter[str], seed: int
) -> Iterator[TokenGroup]:
    if source.detected is None:
        stream = worker.stream(text_blocks(source.name), source.name)
    else:
        refuse = refuser(data.on_bad_row, source.report)
        rows = ((source.name, number, row) for number, row in rows_of(source, data, refuse))
        groups = to_groups(rows, source.detected, data.on_bad_row, source.report)
        stream = worker.groups(stage.groups(groups, notes, seed))
    for group in stream:
        group.source = source.number
        yield group


def _batches(groups: Iterator[TokenGroup], size: int = 1_000) -> Iterator[list[TokenGroup]]:
    while part := list(islice(groups, size)):
        yield part
