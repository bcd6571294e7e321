"""log π(y_t | ...) per token, differentiable with weights that are known only afterwards (preferences, policy gradients).

∂ log π_t / ∂ h_t = W[y_t] - Σ_v π_v W[v] does not depend on the weight w_t that the loss gives to the token, so where the
output layer is frozen this one vector a token is formed in the forward pass and all that backward does is to scale it.
Where the layer trains, its own gradient Σ_t w_t (onehot - π_t) h_tᵀ needs the probabilities again: they are kept in the
compute dtype while they fit into KEEP_BYTES, and formed anew beyond it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.models.logprobs import Grads as _Grads
from posttrain.models.logprobs import LogitTransform, checkpointed, chunk, chunks, head_size, is_plain_linear, logits_of

KEEP_BYTES = 512 * 2**20
"""Most memory for probabilities that wait for their weights."""


def token_logprobs(hidden: Tensor, head: nn.Module, targets: Tensor, transform: LogitTransform | None = None) -> Tensor:
    """log π(target) in nats, [N] fp32, differentiable in hidden [N, H] and the head."""
    transform = transform or LogitTransform()
    if is_plain_linear(head) and torch.is_grad_enabled():
        found: Tensor = _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, transform)
        return found

    def chunk_logprobs(hidden: Tensor, targets: Tensor) -> Tensor:
        z = logits_of(hidden, head, transform)
        return z.gather(-1, targets[:, None]).squeeze(-1) - z.logsumexp(-1)

    parts = [checkpointed(chunk_logprobs, hidden[p], targets[p]) for p in chunks(targets, head_size(head))]
    return torch.cat(parts)


def token_entropies(hidden: Tensor, head: nn.Module, transform: LogitTransform | None = None) -> Tensor:
    """H(π) in nats of each state's distribution, [N] fp32, differentiable; the logits are computed anew in backward."""
    transform = transform or LogitTransform()

    def chunk_entropies(hidden: Tensor) -> Tensor:
        logprobs = logits_of(hidden, head, transform).log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)

    places = torch.empty(len(hidden), device=hidden.device)
    return torch.cat([checkpointed(chunk_entropies, hidden[p]) for p in chunks(places, head_size(head))])


class _TokenLogprobs(torch.autograd.Function):
    """See the module's docstring. What is kept are gradients of -log π, as `chunk` gives them for weight 1."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        trains_head = any(ctx.needs_input_grad[1:3])
        logprobs = hidden.new_empty(len(targets), dtype=torch.float32)
        directions = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not trains_head else None
        kept, budget = [], KEEP_BYTES if trains_head else 0
        with torch.autocast(device, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for part in chunks(targets, len(weight)):
                keep = budget >= len(targets[part]) * len(weight) * dtype.itemsize
                grad = _nll_grad(
                    hidden[part], w, b, targets[part], transform, logprobs[part], any(ctx.needs_input_grad)
                )
                if directions is not None:
                    directions[part] = grad @ w
                elif keep:
                    kept.append(grad)
                    budget -= grad.numel() * dtype.itemsize
        ctx.transform, ctx.dtype, ctx.kept = transform, dtype, kept
        ctx.save_for_backward(*((directions,) if directions is not None else (hidden, weight, bias, targets)))
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor) -> tuple[Tensor | None, ...]:
        scale = -grad_logprobs[:, None]  # [N, 1]
        if len(ctx.saved_tensors) == 1:
            (directions,) = ctx.saved_tensors
            return (directions * scale).to(directions.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _Grads(ctx.needs_input_grad, hidden, weight, bias)
            w, b = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
            scratch = torch.empty(len(targets), device=hidden.device)
            for i, part in enumerate(chunks(targets, len(weight))):
                if i < len(ctx.kept):
                    grad = ctx.kept[i]
                else:
                    grad = _nll_grad(hidden[part], w, b, targets[part], ctx.transform, scratch[part], True)
                grads.add(part, grad * scale[part].to(ctx.dtype), hidden[part].to(ctx.dtype), w)
        return (*grads.tensors(), None, None)


def _nll_grad(
    hidden: Tensor, w: Tensor, b: Tensor | None, targets: Tensor, transform: LogitTransform, out: Tensor, needed: bool
) -> Tensor:
    """∂(-log π)/∂(raw logits), [n, V] in w's dtype; the log-probs go to `out` [n]."""
    z = transform(F.linear(hidden.to(w.dtype), w, b).float())
    ones = torch.ones_like(out)
    capped = transform.softcap is not None
    logprob, _, grad = chunk(z, targets, ones, 0.0, with_grad=needed, keep_logits=capped)
    out.copy_(logprob)
    return z if grad is None else transform.backward_(grad, z).to(w.dtype)
