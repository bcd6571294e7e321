"""Our own loop of generation, token after token over attention's cache; and what an answer is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.models.policy import Policy
from posttrain.sampling import Sampling, kept_ids, pick

LEAVE = 0.75
"""Rows leave the batch once at most this share of it is still being written: each time copies the others' cache."""


@dataclass(frozen=True)
class Generation:
    """One answer: its ids without the end token; the end token that closed it, or None where the length limit did.

    logprobs: nats of the ids and the end token under the distribution they were drawn from. kept: for each of them the
    tokens that top_k and top_p left to draw from, where they were set.
    """

    ids: list[int]
    end: int | None
    logprobs: list[float]
    kept: list[np.ndarray] | None = None

    @property
    def finished(self) -> bool:
        return self.end is not None


class KVCacheGenerator:
    """Our own loop over attention's cache."""

    def __init__(self, policy: Policy, ends: set[int], pad: int, sampling: Sampling, device: Any) -> None:
        self.network, self.pad, self.sampling, self.device = policy.network, pad, sampling, device
        self.ends = torch.tensor(sorted(ends), device=device)
        known = inspect.signature(self.network.forward).parameters
        self.positions = "position_ids" in known
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def __call__(self, prompts: Sequence[list[int]], uniforms: Tensor, samples: int, room: int) -> list[Generation]:
        ids, mask = (t.to(self.device) for t in left_padded(prompts, self.pad))
        rows = len(prompts) * samples
        logits, cache = self._forward(ids, mask, mask.cumsum(-1).sub(1).clamp(min=0), None)
        if samples > 1:
            cache.batch_repeat_interleave(samples)
            logits, mask = (t.repeat_interleave(samples, 0) for t in (logits, mask))
        uniforms = uniforms.to(self.device)
        tokens = torch.full((rows, room), self.pad, device=self.device)
        logprobs = torch.zeros(rows, room, device=self.device)
        kept: list[list[np.ndarray]] | None = [[] for _ in range(rows)] if self.sampling.filters else None
        lengths = torch.full((rows,), room, device=self.device)
        here = torch.arange(rows, device=self.device)  # the answers that the batch's rows are
        alive = torch.ones(rows, dtype=torch.bool, device=self.device)
        for t in range(room):
            token, distribution, logprob = pick(logits, self.sampling, uniforms[here, t])
            written = here[alive]
            if kept is not None:
                for row, ids_left in zip(written.tolist(), kept_ids(distribution[alive]), strict=True):
                    kept[row].append(ids_left)
            tokens[written, t], logprobs[written, t] = token[alive], logprob[alive]
            ended = alive & torch.isin(token, self.ends)
            lengths[here[ended]] = t + 1
            alive = alive & ~ended
            left = int(alive.sum())
            if not left or t + 1 == room:
                break
            if left <= LEAVE * len(alive):
                still = alive.nonzero()[:, 0]
                cache.batch_select_indices(still)
                here, mask, token, alive = here[still], mask[still], token[still], alive[still]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits, cache = self._forward(token[:, None], mask, mask.sum(-1, keepdim=True) - 1, cache)
        return self._answers(tokens, logprobs, lengths, kept)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The last position's logits, [rows, V], and the cache."""
        where = {"position_ids": positions} if self.positions else {}
        output = self.network(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **where, **self.last_only
        )
        return output.logits[:, -1], output.past_key_values

    def _answers(
        self, tokens: Tensor, logprobs: Tensor, lengths: Tensor, kept: list[list[np.ndarray]] | None
    ) -> list[Generation]:
        ends = set(self.ends.tolist())
        found = []
        for row, (ids, nats, length) in enumerate(
            zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
        ):
            ids = ids[:length]
            end = ids[-1] if ids[-1] in ends else None
            left = None if kept is None else kept[row]
            found.append(Generation(ids if end is None else ids[:-1], end, nats[:length], left))
        return found


def left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids and mask, [R, width]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
