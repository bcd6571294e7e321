"""`posttrain inspect`: examples as the model sees them, trained tokens coloured, and the counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posttrain.models.load import load_tokenizer
from posttrain.report.console import Console
from posttrain.runtime import Runtime
from posttrain.session import prepare_data

if TYPE_CHECKING:
    from posttrain.config import Config

EXAMPLES = 3


def inspect(cfg: Config) -> None:
    """Print the first examples, and the shortest and longest; loads no weights."""
    console, runtime = Console(), Runtime("fp32", "ddp", computes=False)
    tokenizer = load_tokenizer(cfg.model)
    prepared = prepare_data(cfg, tokenizer, runtime)
    lengths, trained, longest = prepared.train.lengths, prepared.train.trained, prepared.train.longest
    chosen = dict.fromkeys([*range(min(EXAMPLES, len(lengths))), int(longest.argmin()), int(longest.argmax())])
    for position in chosen:
        group = prepared.train.groups([position])[0]
        title = f"example {position} (id {group.id}): {lengths[position]} tokens, {trained[position]} trained"
        console.example(group, tokenizer, title)
    quantiles = np.quantile(longest, [0, 0.5, 0.9, 0.99, 1]).astype(int)
    of = f"the first {len(prepared.train):,} examples (streamed: counts unknown)"
    of = of if prepared.stream else f"{len(prepared.train):,} examples"
    console.facts(
        "counts",
        [
            ("training", f"{of}, {lengths.sum():,} tokens, {trained.sum():,} of them trained"),
            ("evaluation", f"{len(prepared.eval):,} examples"),
            ("lengths", "shortest {}, median {}, 90 % {}, 99 % {}, longest {} tokens".format(*quantiles)),
        ],
    )
    for line in prepared.lines:
        console.line(f"  · {line}")
