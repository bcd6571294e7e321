"""Attention in the shared layout: each of a prompt's K responses sees the prompt and itself.

The kernels that take a dense mask compute what it hides as well. So that at least the prompts, the longest part of a row that
is worth sharing, are computed once and as a triangle, sdpa is called twice: for what every row begins with, and for the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from posttrain.data.batches import Batch
from posttrain.errors import ModelError

SHORTEST = 64
"""Tokens of prompt below which a second call costs more than it saves."""


def shared_mask(batch: Batch, attention: str) -> Any:
    """Who sees whom when K responses stand behind one prompt: what comes before, in the prompt or in the same response.

    sdpa: bool [R, 1, L, L], True where attended. eager: additive fp32, since it adds what it is given. flex: a block mask,
    whose blocks of other responses are never computed (arXiv:2410.20305 for pairs).
    """
    assert batch.is_prompt is not None
    segments, is_prompt = batch.segments, batch.is_prompt  # [R, L]
    owner = torch.where(segments >= 0, batch.group[segments.clamp(min=0)], -1)  # [R, L], the Group of each position
    if attention == "flex_attention":
        return _block_mask(segments, is_prompt, owner)
    if attention not in ("sdpa", "eager"):
        raise ModelError(f"batch.layout=shared needs model.attention=sdpa, eager or flex_attention, not {attention}")
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    prompt = is_prompt[:, None, :] & (owner[:, :, None] == owner[:, None, :])
    allowed = (causal & (same | prompt))[:, None]
    if attention == "sdpa":
        allowed.shared_prefix = _prefix(batch, owner)  # type: ignore[attr-defined]
        return allowed
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)


def _block_mask(segments: Tensor, is_prompt: Tensor, owner: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = segments[row, query] == segments[row, key]
        prompt = is_prompt[row, key] & (owner[row, query] == owner[row, key])
        return (query >= key) & (same | prompt)

    rows, width = segments.shape
    return create_block_mask(visible, rows, None, width, width, device=str(segments.device))


def _prefix(batch: Batch, owner: Tensor) -> int:
    """Tokens that every row begins with which are of its first prompt: there attention is plainly causal."""
    assert batch.is_prompt is not None
    first = batch.is_prompt & (owner == owner[:, :1])
    return int(first.cumprod(1).sum(1).min())


def sdpa_in_two(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The library's sdpa [R, heads, L, D] → [R, L, heads, D]; with a mask of `shared_mask` in two calls, of the same result."""
    prefix = getattr(attention_mask, "shared_prefix", 0)
    if (
        attention_mask is None
        or prefix < SHORTEST
        or query.shape[2] != key.shape[2]
        or args
        or "position_bias" in kwargs
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    q, k, v = (tensor[:, :, :prefix] for tensor in (query, key, value))
    first, _ = sdpa_attention_forward(module, q, k, v, None, **kwargs | {"is_causal": True})
    rest, _ = sdpa_attention_forward(module, query[:, :, prefix:], key, value, attention_mask[:, :, prefix:], **kwargs)
    return torch.cat([first, rest], 1), None


AttentionInterface.register("sdpa", sdpa_in_two)
