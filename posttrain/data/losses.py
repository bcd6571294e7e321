"""What is lost on the way from rows to tokens, and when that stops a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from posttrain.data.encoding import Counts, Encoding
from posttrain.data.inputs import Source
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.config import DataConfig
    from posttrain.stages.base import Stage


def numbers(counts: Counts) -> Counter[str]:
    """Its numbers, with `lost` among them, so that two can be subtracted."""
    return Counter({k: v for k, v in asdict(counts).items() if isinstance(v, int)} | {"lost": counts.lost})


def nothing_left(key: str, sources: list[Source], encoding: Encoding, stage: Stage) -> str:
    """A side that the user named must have examples; why it has none. key: data.train or data.eval."""
    counts = sum((source.counts for source in sources), Counter[str]())
    if not counts["groups"] and stage.useless:
        names = ", ".join(source.name for source in sources[:3])
        return f"{key} ({names}): nothing to learn: {stage.useless}, in all of them"
    if counts["too_long"]:
        every = "all" if counts["too_long"] == counts["groups"] else f"{counts['too_long']:,} of {counts['groups']:,}"
        if encoding.answer_tokens:
            return (
                f"{key}: {every} prompts leave less than stage.max_new_tokens={encoding.answer_tokens} of "
                f"data.max_length={encoding.max_length} tokens to the answer, and none is left; raise the second, or lower the "
                "first"
            )
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
    own = sum((source.counts for source in sources), Counter[str]())
    lost, total = own["lost"] + skipped, own["groups"] + skipped
    if total and lost / total > data.max_lost_fraction:
        of_side: Any = {name: own[name] for name in numbers(counts) if name != "lost"}
        told = "; ".join(
            [*replace(counts, **of_side).lines(encoding), *([f"{skipped:,} bad rows skipped"] if skipped else [])]
        )
        raise DataError(
            f"{key}: {lost:,} of {total:,} examples ({lost / total:.0%}) would not be used, more than "
            f"data.max_lost_fraction={data.max_lost_fraction:g} allows: {told}. Raise data.max_length, set "
            "data.on_too_long=truncate, or allow more"
        )
