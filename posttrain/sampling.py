"""How the next token of an answer is chosen, and from which random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature, then top_k, then top_p. temperature 0: the likeliest token.

    seed: one number for all answers; with the prompt's key and the answer's number it gives that answer's random numbers.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    @property
    def filters(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)


def pick(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of each row [rows], the log-probs of the distribution it was drawn from [rows, V], its own [rows].

    logits: [rows, V]; uniform: [rows] in [0, 1), by which the distribution's inverse is read.
    """
    if sampling.temperature == 0:
        logprobs = logits.float().log_softmax(-1)
        token = logprobs.argmax(-1)
    else:
        logprobs = filtered(logits.float() / sampling.temperature, sampling.top_k, sampling.top_p).log_softmax(-1)
        cumulative = logprobs.exp().cumsum(-1)
        at = torch.searchsorted(cumulative, (uniform.to(cumulative) * cumulative[:, -1])[:, None], right=True)[:, 0]
        at = at.clamp(max=logits.shape[-1] - 1)  # a number that was rounded up to the end
        drawn = logprobs.gather(-1, at[:, None])[
            :, 0
        ].isfinite()  # sums in another order may rise where nothing was left
        token = torch.where(drawn, at, logprobs.argmax(-1))
    return token, logprobs, logprobs.gather(-1, token[:, None])[:, 0]


def kept_ids(logprobs: Tensor) -> list[np.ndarray]:
    """For each row of log-probs [rows, V] the tokens that have any probability, int32."""
    rows, ids = logprobs.isfinite().nonzero(as_tuple=True)
    counts = rows.bincount(minlength=len(logprobs)).cpu().numpy()
    return np.split(ids.to(torch.int32).cpu().numpy(), np.cumsum(counts)[:-1])


def filtered(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """-inf at what is not among the top_k tokens, then at what is not in the smallest set of mass top_p. [rows, V]"""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the likelier ones
        logits = logits.masked_fill(
            torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= top_p), -torch.inf
        )
    return logits


def uniforms(keys: Sequence[int], samples: int, room: int, sampling: Sampling) -> Tensor:
    """[len(keys)·samples, room] numbers in [0, 1), a stream for each answer."""
    if sampling.temperature == 0:
        return torch.zeros(len(keys) * samples, room)
    drawn = [np.random.default_rng([sampling.seed, key, k]).random(room) for key in keys for k in range(samples)]
    return torch.from_numpy(np.stack(drawn))
