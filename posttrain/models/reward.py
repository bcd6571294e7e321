"""The wrapped reward model: a Batch in, one score a response out, R(x, y) = w·h with h pooled from the last states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.data.batches import Batch
from posttrain.errors import ModelError
from posttrain.models.decoder import Decoder
from posttrain.models.router import Router

Pooling = Literal["last", "mean", "special"]

POOLING_KEY = "posttrain_pooling"
"""Where a saved model's config says how it pools; transformers' own class pools the last token that is no padding."""


@dataclass
class Ratings:
    """What one forward gives. rewards: R of each response, [responses] fp32. router: as in Scores."""

    rewards: Tensor
    router: Router | None = None


class RewardModel(Decoder):
    """A sequence-classification model with one label and no bias (a bias cancels in every loss).

    pooling: last: the last real token, found by length, never by token id. mean: over the completion's tokens. special: the
    last end-of-turn token of the response, one of `ends`.
    """

    def __init__(self, model: Any, pooling: Pooling = "last", ends: Iterable[int] = ()) -> None:
        super().__init__(model)
        self.pooling, self.ends = pooling, sorted(ends)
        setattr(self.network.config, POOLING_KEY, pooling)

    @property
    def head(self) -> nn.Module:
        """The score layer, H → 1."""
        found = getattr(self.network, "score", None)
        if not isinstance(found, nn.Module):
            raise ModelError(f"the {self.network.config.model_type} architecture has no score layer for a reward model")
        return found

    def forward(self, batch: Batch, router: bool = False) -> Ratings:
        """R of each response, and on request a mixture's load balance."""
        states, balance = self.states(batch, router)
        pooled = self._pool(states, batch)
        with torch.autocast(
            pooled.device.type, enabled=False
        ):  # a score in 8 bits would tie where people see a difference
            return Ratings(self._score(pooled.float()).sum(-1), balance)

    def _score(self, pooled: Tensor) -> Tensor:
        """[responses, 1] fp32, also where the weights are held in bf16 (optim=adamw_bf16)."""
        head = self.head
        if type(head) is nn.Linear and head.weight.dtype != torch.float32:
            return nn.functional.linear(pooled, head.weight.float(), None if head.bias is None else head.bias.float())
        scores: Tensor = head(pooled)
        return scores

    def pooled(self, batch: Batch) -> Tensor:
        """The state that each response is scored by, [responses, H]."""
        return self._pool(self.hidden(batch), batch)

    def _pool(self, states: Tensor, batch: Batch) -> Tensor:
        """[R, L, H] → [responses, H]"""
        states = states.flatten(0, 1)
        return self._mean(states, batch) if self.pooling == "mean" else states[self._position(batch)]

    def _mean(self, states: Tensor, batch: Batch) -> Tensor:
        """[responses, H], over each completion's own tokens, in fp32."""
        total = states.new_zeros(len(batch.group), states.shape[-1], dtype=torch.float32)
        total = total.index_add(0, batch.response, states[batch.at].float())
        return (total / batch.trained_per_response[:, None]).to(states.dtype)

    def _position(self, batch: Batch) -> Tensor:
        """[responses] flat positions of the token whose state is scored."""
        if self.pooling == "last":
            return batch.last
        is_end = torch.isin(batch.targets, torch.tensor(self.ends, device=batch.targets.device))
        none = torch.full_like(batch.last, -1)
        found = none.scatter_reduce(0, batch.response[is_end], batch.at[is_end], "amax")
        assert bool((found >= 0).all()), "a response without an end-of-turn token: Encoding.closes appends it"
        return found


def zero_score(network: Any) -> None:
    """A fresh score layer scores everything 0: the first loss is exactly that of a tie, whatever the seed."""
    score = getattr(network, "score", None)
    if not isinstance(score, nn.Linear):
        raise ModelError(f"the {network.config.model_type} architecture has no score layer for a reward model")
    nn.init.zeros_(score.weight)
    if score.bias is not None:
        nn.init.zeros_(score.bias)
        score.bias.requires_grad_(False)
