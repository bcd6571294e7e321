"""Causal language modelling.

    L = -(1/N) Σ_t log π(x_t | x_<t),    N = all predicted tokens of the optimizer step

Documents may share a row: attention and positions restart at each, and a document's first token is never predicted from
the one before it.
"""

from dataclasses import dataclass
from typing import ClassVar

from posttrain.stages.likelihood import Likelihood


@dataclass
class Pretrain(Likelihood):
    """Every token of every document is a target."""

    data_formats: ClassVar[tuple[str, ...]] = ("text", "prompt_completion", "messages")
    splits_long_documents: ClassVar[bool] = True
