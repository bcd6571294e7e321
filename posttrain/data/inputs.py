"""What data.train and data.eval stand for, source by source: files, hub ids, the embedded kinds; their formats and rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.data import embedded
from posttrain.data.columns import Survey
from posttrain.data.formats import Detected, Report, detect_format, refuser
from posttrain.data.readers import Refuse
from posttrain.data.sources import expand_sources, is_text_stream, read_rows
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain.config import DataConfig
    from posttrain.stages.base import Stage


@dataclass
class Source:
    """One file, hub id or embedded kind, and how it is read. counts: what became of its Groups."""

    name: str
    number: int
    side: str
    detected: Detected | None = None
    report: Report = field(default_factory=Report)
    counts: Counter[str] = field(default_factory=Counter)


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


def detect(
    source: Source, data: DataConfig, stage: Stage, rows: Iterable[dict[str, Any]] | None = None
) -> Detected | None:
    """The format of one source, from the columns of all its rows, or of these; None for a text stream, which has none."""
    if is_text_stream(source.name, data.document_separator) and not is_embedded(source.name):
        found: Detected | None = None
        format = "text"
    else:
        refuse = refuser(data.on_bad_row)  # counted when the rows are read again
        survey = Survey().add((row for _, row in rows_of(source, data, refuse)) if rows is None else rows)
        found = detect_format(
            survey, data.format, dict(data.columns or {}), dict(data.reward_weights or {}), source=source.name
        )
        format = found.format
    if stage.data_formats and format not in stage.data_formats:
        name = type(stage).__module__.rpartition(".")[2]
        elsewhere = {
            "text": "; stage=pretrain trains on plain text",
            "prompts": "; stage=ppo and stage=grpo answer prompts themselves",
        }
        other = elsewhere.get(format, "")
        raise DataError(
            f"{source.name}: found the format {format}, but stage={name} trains on {', '.join(stage.data_formats)}{other}"
        )
    return found


def rows_of(source: Source, data: DataConfig, refuse: Refuse) -> Iterable[tuple[int, dict[str, Any]]]:
    """(row number, row); refuse: what becomes of a line that is no row."""
    if not is_embedded(source.name):
        return read_rows(source.name, data.document_separator, refuse)
    _, kind, *rest = source.name.split(":")
    held_out = "held_out" in rest
    count = next((int(part) for part in rest if part.isdigit()), 1_000)
    return enumerate(embedded.rows(kind, count, held_out=held_out), 1)


def is_embedded(source: str) -> bool:
    return str(source).startswith("embedded:")
