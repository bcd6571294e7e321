"""`posttrain prepare`: tokenise once, so that a run on many ranks starts at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.models.load import load_tokenizer
from posttrain.report.console import Console
from posttrain.runtime import Runtime
from posttrain.session import prepare_data

if TYPE_CHECKING:
    from posttrain.config import Config


def prepare(cfg: Config) -> None:
    """Write the token cache, or say that it is there."""
    console, runtime = Console(), Runtime("fp32", "ddp", computes=False)
    prepared = prepare_data(cfg, load_tokenizer(cfg.model), runtime)
    for line in prepared.lines:
        console.line(f"  · {line}")
    console.line(
        f"{len(prepared.train):,} training and {len(prepared.eval):,} evaluation examples "
        f"{'are already' if prepared.reused else 'written'} in {prepared.directory}"
    )
