"""Sources → rows → Groups → TokenGroups → an Arrow file each for training and evaluation, made once and found again.

The split is by content hash, before anything is tokenised or sharded, so that every rank and every later run holds out the
same examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data import cache, embedded
from posttrain.data.columns import Survey
from posttrain.data.formats import Detected, Report, describe, detect_format, to_groups
from posttrain.data.sources import expand_sources, fingerprint, is_text_stream, read_rows
from posttrain.data.split import split
from posttrain.data.text import text_blocks
from posttrain.data.tokenize import Counts, Encoding, Tokenizer
from posttrain.data.tokens import Examples, TokenDataset, TokenGroup, Writer, read
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain.config import DataConfig
    from posttrain.data.streaming.stream import Stream
    from posttrain.stages.base import Stage

VERSION = 6
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
        processed = int(self.train.processed(layout).sum())
        tokens = f"{processed:,} an epoch, {int(self.train.trained.sum()):,} of them trained"
        if layout == "shared":
            tokens += f" (prompts shared: {processed / int(self.train.lengths.sum()):.0%} of the padded layout's)"
        return [("data", f"{len(self.train):,} training, {held_out}"), ("tokens", tokens)]


@dataclass
class Source:
    """One file, hub id or embedded kind, and how it is read. counts: what became of its Groups."""

    name: str
    number: int
    side: str
    detected: Detected | None = None
    report: Report = field(default_factory=Report)
    counts: Counter[str] = field(default_factory=Counter)


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
    key = cache_key(data, encoding, tokenizer, stage, sources, seed)
    directory = cache.cache_root(data.cache) / key
    reused = cache.is_built(directory)
    if not reused:
        for source in sources:
            source.detected = detect(source, data, stage)
        cache.build(directory, lambda scratch: _tokenize(scratch, data, encoding, tokenizer, stage, sources, seed))
    facts = cache.read_facts(directory)
    train, held_out = (TokenDataset(read(directory / f"{side}.arrow")) for side in ("train", "eval"))
    return Prepared(train, held_out, facts["lines"], facts["counts"], key, directory, reused)


def check_mix(data: DataConfig) -> None:
    """data.mix must have a weight for each file that data.train stands for, folders and globs spelled out."""
    if not data.mix:
        return
    names = list_sources(data.train)
    if len(names) != len(data.mix):
        raise ConfigError(
            f"data.mix has {len(data.mix)} weights, but data.train stands for {len(names)} files ({', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}); give each its weight"
        )


def list_sources(value: Any) -> list[str]:
    """data.train or data.eval as a list of sources; `embedded:KIND[:COUNT][:held_out]` names the package's own data."""
    if value is None:
        return []
    entries = [value] if isinstance(value, str) else list(value)
    return [s for entry in entries for s in ([entry] if is_embedded(entry) else expand_sources(entry))]


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
    return Encoding(template, data.max_length, policy, train_on, stage.splits_long_documents, stage.closes_responses)


def cache_key(
    data: DataConfig, encoding: Encoding, tokenizer: Any, stage: Stage, sources: list[Source], seed: int
) -> str:
    """Changes with whatever decides the tokens: file contents, reading options, tokenizer, template, split."""
    options = asdict(data)
    for name in ("cache", "shuffle", "streaming", "shuffle_buffer", "mix", "train", "eval"):
        options.pop(name, None)
    parts = {
        "version": VERSION,
        "sources": [(s.side, (s.name, None if is_embedded(s.name) else fingerprint(s.name))) for s in sources],
        "options": options,
        "encoding": asdict(encoding),
        "tokenizer": cache.tokenizer_fingerprint(tokenizer),
        "stage": (type(stage).__name__, stage.group_settings(), seed),
    }
    return cache.digest(parts)


def detect(
    source: Source, data: DataConfig, stage: Stage, rows: Iterable[dict[str, Any]] | None = None
) -> Detected | None:
    """The format of one source, from the columns of all its rows, or of these; None for a text stream, which has none."""
    if is_text_stream(source.name, data.document_separator) and not is_embedded(source.name):
        found: Detected | None = None
        format = "text"
    else:
        survey = Survey().add((row for _, row in rows_of(source, data)) if rows is None else rows)
        found = detect_format(
            survey, data.format, dict(data.columns or {}), dict(data.reward_weights or {}), source=source.name
        )
        format = found.format
    if stage.data_formats and format not in stage.data_formats:
        name = type(stage).__module__.rpartition(".")[2]
        other = "; stage=pretrain trains on plain text" if format == "text" else ""
        raise DataError(
            f"{source.name}: found the format {format}, but stage={name} trains on {', '.join(stage.data_formats)}{other}"
        )
    return found


def _tokenize(
    scratch: Path, data: DataConfig, encoding: Encoding, tokenizer: Any, stage: Stage, sources: list[Source], seed: int
) -> dict[str, Any]:
    worker, notes = Tokenizer(tokenizer, encoding, data.on_bad_row), Counter[str]()
    fraction = 0.0 if any(source.side == "eval" for source in sources) else data.eval_fraction
    train = Writer(scratch / "train.arrow", data.train_limit)
    held_out = Writer(scratch / "eval.arrow", data.eval_limit)
    shares = _shares(sources, {"train": data.train_limit, "eval": data.eval_limit})
    for source in sources:
        before, room = _numbers(worker.counts), {"train": train, "eval": held_out}[source.side]
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
        source.counts = _numbers(worker.counts) - before
    for writer in (train, held_out):
        writer.close()
    for side, count in (("train", train.count), ("eval", held_out.count)):
        named = [source for source in sources if source.side == side]
        if named and not count:
            raise DataError(_nothing_left(f"data.{side}", named, encoding, stage))
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
        rows = ((source.name, number, row) for number, row in rows_of(source, data))
        groups = to_groups(rows, source.detected, data.on_bad_row, source.report)
        stream = worker.groups(stage.groups(groups, notes, seed))
    for group in stream:
        group.source = source.number
        yield group


def rows_of(source: Source, data: DataConfig) -> Iterable[tuple[int, dict[str, Any]]]:
    if not is_embedded(source.name):
        return read_rows(source.name, data.document_separator)
    _, kind, *rest = source.name.split(":")
    held_out = "held_out" in rest
    count = next((int(part) for part in rest if part.isdigit()), 1_000)
    return enumerate(embedded.rows(kind, count, held_out=held_out), 1)


def _batches(groups: Iterator[TokenGroup], size: int = 1_000) -> Iterator[list[TokenGroup]]:
    while part := list(islice(groups, size)):
        yield part


def is_embedded(source: str) -> bool:
    return str(source).startswith("embedded:")


def _numbers(counts: Counts) -> Counter[str]:
    """Its numbers, with `lost` among them, so that two can be subtracted."""
    return Counter({k: v for k, v in asdict(counts).items() if isinstance(v, int)} | {"lost": counts.lost})


def _nothing_left(key: str, sources: list[Source], encoding: Encoding, stage: Stage) -> str:
    """A side that the user named must have examples; why it has none. key: data.train or data.eval."""
    counts = sum((source.counts for source in sources), Counter[str]())
    if not counts["groups"] and stage.useless:
        names = ", ".join(source.name for source in sources[:3])
        return f"{key} ({names}): nothing to learn: {stage.useless}, in all of them"
    if counts["too_long"]:
        every = "all" if counts["too_long"] == counts["groups"] else f"{counts['too_long']:,} of {counts['groups']:,}"
        return (
            f"{key}: {every} examples are longer than data.max_length={encoding.max_length} tokens, and none is left; "
            "raise it, or set data.on_too_long=truncate"
        )
    if counts["nothing_trained"]:
        return (
            f"{key}: no example has a token to train on ({counts['nothing_trained']:,} were read); "
            "look at them with posttrain inspect"
        )
    if counts["kept"] or counts["groups"]:
        return f"{key}: no example is left after holding out data.eval_fraction; give more rows, or a smaller fraction"
    return f"{key}: no example is left of what was read"


def stop_if_lost(key: str, sources: list[Source], counts: Counts, data: DataConfig, encoding: Encoding) -> None:
    """Losing a few examples is told; losing many of data.train or of data.eval stops the run."""
    skipped = sum(source.report.skipped for source in sources)
    lost = sum(source.counts["lost"] for source in sources) + skipped
    total = sum(source.counts["groups"] for source in sources) + skipped
    if total and lost / total > data.max_lost_fraction:
        told = "; ".join([*counts.lines(encoding), *([f"{skipped:,} bad rows skipped"] if skipped else [])])
        raise DataError(
            f"{key}: {lost:,} of {total:,} examples ({lost / total:.0%}) would not be used, more than "
            f"data.max_lost_fraction={data.max_lost_fraction:g} allows: {told}. Raise data.max_length, set "
            "data.on_too_long=truncate, or allow more"
        )
