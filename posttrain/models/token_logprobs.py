"""log π(y_t | ...) per token, differentiable with weights that are known only afterwards (preferences, policy gradients).

∂ log π_t / ∂ h_t = W[y_t] - Σ_v π_v W[v] does not depend on the weight w_t that the loss gives to the token, so where the
output layer is frozen this one vector a token is formed in the forward pass and all that backward does is to scale it.
Where the layer trains, its own gradient Σ_t w_t (onehot - π_t) h_tᵀ needs the probabilities again: they are kept in the
compute dtype while they fit into KEEP_BYTES, and formed anew beyond it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.models.logprobs import Grads as _Grads
from posttrain.models.logprobs import LogitTransform, checkpointed, chunk, chunks, head_size, is_plain_linear, logits_of

KEEP_BYTES = 512 * 2**20
"""Most memory for probabilities that wait for their weights."""


def token_logprobs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    transform: LogitTransform | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """log π(target) in nats, [N] fp32, differentiable in hidden [N, H] and the head.

    kept: Batch.kept; the distribution is then the one over these tokens alone, each target being one of its own.
    """
    transform = transform or LogitTransform()
    if is_plain_linear(head) and torch.is_grad_enabled():
        found: Tensor = _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, transform, kept)
        return found

    def chunk_logprobs(hidden: Tensor, targets: Tensor, others: Tensor | None) -> Tensor:
        z = logits_of(hidden, head, transform)
        z = z if others is None else z.masked_fill(others, -torch.inf)
        return z.gather(-1, targets[:, None]).squeeze(-1) - z.logsumexp(-1)

    size = head_size(head)
    parts = [
        checkpointed(chunk_logprobs, hidden[p], targets[p], _left_out(kept, p, size)) for p in chunks(targets, size)
    ]
    return torch.cat(parts)


def _left_out(kept: Tensor | None, part: slice, size: int) -> Tensor | None:
    """[n, V] True at the tokens that sampling left out for the targets of this chunk."""
    if kept is None:
        return None
    ends = torch.searchsorted(kept[0].contiguous(), torch.tensor([part.start, part.stop], device=kept.device))
    rows, ids = kept[:, ends[0] : ends[1]]
    found = torch.ones(part.stop - part.start, size, dtype=torch.bool, device=kept.device)
    found[rows - part.start, ids] = False
    return found


def token_entropies(hidden: Tensor, head: nn.Module, transform: LogitTransform | None = None) -> Tensor:
    """H(π) in nats of each state's distribution, [N] fp32, differentiable; the logits are computed anew in backward."""
    transform = transform or LogitTransform()

    def chunk_entropies(hidden: Tensor) -> Tensor:
        logprobs = logits_of(hidden, head, transform).log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)

    places = torch.empty(len(hidden), device=hidden.device)
    return torch.cat([checkpointed(chunk_entropies, hidden[p]) for p in chunks(places, head_size(head))])


def token_kl(
    hidden: Tensor, there: Tensor, policy: Any, reference: Callable[[], AbstractContextManager[Any]], temperature: float
) -> Tensor:
    """KL(π‖π_ref) in nats over the vocabulary at each state, [N] fp32, differentiable in hidden [N, H] and the policy's head.

    there: [N, H] the reference's own states. Both distributions are formed chunk by chunk, and anew in backward.
    """

    def chunk_kl(hidden: Tensor, there: Tensor) -> Tensor:
        logprobs = logits_of(hidden, policy.head, replace(policy.transform, temperature=temperature)).log_softmax(-1)
        with torch.no_grad(), reference() as other:
            others = logits_of(there, other.head, replace(other.transform, temperature=temperature)).log_softmax(-1)
        return (logprobs.exp() * (logprobs - others)).sum(-1)

    places = torch.empty(len(hidden), device=hidden.device)
    parts = [checkpointed(chunk_kl, hidden[p], there[p]) for p in chunks(places, head_size(policy.head))]
    return torch.cat(parts)


class _TokenLogprobs(torch.autograd.Function):
    """See the module's docstring. What is kept are gradients of -log π, as `chunk` gives them for weight 1."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        sampled_from: Tensor | None,
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
                others = _left_out(sampled_from, part, len(weight))
                grad = _nll_grad(
                    hidden[part], w, b, targets[part], transform, logprobs[part], any(ctx.needs_input_grad), others
                )
                if directions is not None:
                    directions[part] = grad @ w
                elif keep:
                    kept.append(grad)
                    budget -= grad.numel() * dtype.itemsize
        ctx.transform, ctx.dtype, ctx.kept, ctx.sampled_from = transform, dtype, kept, sampled_from
        ctx.save_for_backward(*((directions,) if directions is not None else (hidden, weight, bias, targets)))
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor) -> tuple[Tensor | None, ...]:
        scale = -grad_logprobs[:, None]  # [N, 1]
        if len(ctx.saved_tensors) == 1:
            (directions,) = ctx.saved_tensors
            return (directions * scale).to(directions.dtype), None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _Grads(ctx.needs_input_grad, hidden, weight, bias)
            w, b = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
            scratch = torch.empty(len(targets), device=hidden.device)
            for i, part in enumerate(chunks(targets, len(weight))):
                if i < len(ctx.kept):
                    grad = ctx.kept[i]
                else:
                    others = _left_out(ctx.sampled_from, part, len(weight))
                    grad = _nll_grad(hidden[part], w, b, targets[part], ctx.transform, scratch[part], True, others)
                grads.add(part, grad * scale[part].to(ctx.dtype), hidden[part].to(ctx.dtype), w)
        return (*grads.tensors(), None, None, None)


def _nll_grad(
    hidden: Tensor,
    w: Tensor,
    b: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    out: Tensor,
    needed: bool,
    others: Tensor | None,
) -> Tensor:
    """∂(-log π)/∂(raw logits), [n, V] in w's dtype; the log-probs go to `out` [n]. others: [n, V] tokens that are left out."""
    z = transform(F.linear(hidden.to(w.dtype), w, b).float())
    if others is not None:
        z.masked_fill_(others, -torch.inf)
    ones = torch.ones_like(out)
    capped = transform.softcap is not None
    logprob, _, grad = chunk(z, targets, ones, 0.0, with_grad=needed, keep_logits=capped)
    out.copy_(logprob)
    if others is not None and capped:
        z.masked_fill_(others, 0.0)  # there the gradient is 0, and stays it
    return z if grad is None else transform.backward_(grad, z).to(w.dtype)
