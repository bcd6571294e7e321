"""Token log-probabilities without a (B, L, V) tensor: the output layer runs at chosen positions only, in chunks.

Two ways through the same chunk arithmetic:

- `weighted_nll`: the caller knows each token's weight before the forward pass (pretrain, sft), so the objective
  Σ_t w_t · nll_t and its gradient are both formed chunk by chunk in the forward pass; backward multiplies by a scalar.
- `token_logprobs` (token_logprobs.py): log π(y_t | ...) per token, for weights known only afterwards.

Products run in the autocast dtype where autocast is on, everything after the logits in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Size of one chunk's fp32 logits; bounds the memory of the output layer whatever the batch. Each further chunk is one more
pass over the layer's whole gradient, so much smaller ones cost time."""


ROWS = 4096
"""Rows of the output layer's gradient that are added to at a time."""


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to its logits after the output layer, and a sampling temperature: z ← cap·tanh(scale·z / cap) / T."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn ∂/∂(transformed) into ∂/∂(raw) in place; `logits` are the transformed ones."""
        if self.softcap is not None:
            grad.mul_(1 - (logits * (self.temperature / self.softcap)) ** 2)
        factor = self.scale / self.temperature
        return grad.mul_(factor) if factor != 1.0 else grad


def chunks(targets: Tensor, vocab_size: int) -> list[slice]:
    """Slices of `targets` [N] whose fp32 logits stay within CHUNK_BYTES."""
    size = max(16, CHUNK_BYTES[targets.device.type] // (4 * vocab_size))
    return [slice(start, min(start + size, len(targets))) for start in range(0, len(targets), size)]


def weighted_nll(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    weights: Tensor,
    transform: LogitTransform | None = None,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Σ_t w_t·[-(1-ε) log π_t - (ε/V) Σ_v log π_v] and the detached log-probs.

    Args:
        hidden: [N, H], the states that predict `targets` [N]; weights: [N], known before backward.
        head: the output layer; a plain linear one gets its gradient formed here, any other goes through autograd.
        smoothing: ε in [0, 1).

    Returns:
        The scalar objective (nats) and log π(target) [N], fp32.
    """
    transform = transform or LogitTransform()
    if is_plain_linear(head):
        return _WeightedNLL.apply(hidden, head.weight, head.bias, targets, weights, transform, smoothing)
    objective, logprobs = hidden.new_zeros((), dtype=torch.float32), []
    for part in chunks(targets, head_size(head)):
        z = checkpointed(logits_of, hidden[part], head, transform)
        logprob = z.gather(-1, targets[part, None]).squeeze(-1) - z.logsumexp(-1)
        uniform = z.mean(-1) - z.logsumexp(-1) if smoothing else 0.0
        objective = objective - (weights[part] * ((1 - smoothing) * logprob + smoothing * uniform)).sum()
        logprobs.append(logprob.detach())
    return objective, torch.cat(logprobs)


def is_plain_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the head is exactly weight and bias: no quantised subclass, no adapter inside, no hooks but those of ZeRO 3, which
    gather its weight (zero3.py has it here)."""
    if type(head) is not nn.Linear:
        return False
    return hasattr(head, "ds_id") or not (head._forward_hooks or head._forward_pre_hooks)


def head_size(head: nn.Module) -> int:
    """V, the number of logits."""
    weight = head.weight
    assert isinstance(weight, Tensor)
    return int(getattr(head, "out_features", weight.shape[0]))


def logits_of(hidden: Tensor, head: nn.Module, transform: LogitTransform) -> Tensor:
    """[n, V] fp32."""
    weight = getattr(head, "weight", None)
    if weight is not None and weight.is_floating_point() and not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)
    if is_plain_linear(head):  # not a call of it: ranks have different numbers of chunks, and ZeRO 3 counts calls
        return transform(nn.functional.linear(hidden, head.weight, head.bias).float())
    return transform(head(hidden).float())


def checkpointed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*inputs)
    result = torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


class _WeightedNLL(torch.autograd.Function):
    """The objective with both gradients formed in forward; see weighted_nll."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        transform: LogitTransform,
        smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            grads = Grads(ctx.needs_input_grad, hidden, weight, bias)
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            objective = hidden.new_zeros((), dtype=torch.float32)
            logprobs = hidden.new_empty(len(targets), dtype=torch.float32)
            with_grad, capped = any(ctx.needs_input_grad), transform.softcap is not None
            parts = chunks(targets, len(weight))
            room = _Room(parts, w)
            for part in parts:
                h = hidden[part].to(dtype)
                z = transform(room.logits(h, w, b))
                logprob, loss, grad = chunk(z, targets[part], weights[part], smoothing, with_grad, keep_logits=capped)
                logprobs[part] = logprob
                objective += loss
                if grad is not None:
                    grads.add(part, room.rounded(transform.backward_(grad, z)), h, w)
        ctx.save_for_backward(*grads.tensors())
        ctx.mark_non_differentiable(logprobs)
        return objective, logprobs

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (None if t is None else t.mul_(grad_objective.to(t.dtype)) for t in ctx.saved_tensors)
        return hidden, weight, bias, None, None, None, None


class _Room:
    """Memory for one chunk's logits, used again by the next: fresh pages cost a processor more than the arithmetic on them."""

    def __init__(self, parts: list[slice], w: Tensor) -> None:
        size = parts[0].stop if parts else 0
        self.product = w.new_empty(size, len(w))
        self.exact = self.product if w.dtype == torch.float32 else w.new_empty(size, len(w), dtype=torch.float32)

    def logits(self, h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """[n, V] fp32 of h [n, H], multiplied in its dtype."""
        product = self.product[: len(h)]
        if b is None:
            torch.mm(h, w.T, out=product)
        else:
            torch.addmm(b, h, w.T, out=product)
        return self.exact[: len(h)].copy_(product)

    def rounded(self, grad: Tensor) -> Tensor:
        """[n, V] in the products' dtype, where the logits were before."""
        return self.product[: len(grad)].copy_(grad)


class Grads:
    """Accumulates the gradients that are asked for: hidden in its own dtype, weight and bias in theirs."""

    def __init__(self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        make = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk is written, not added
        self.weight = make(weight) if needed[1] else None
        self.bias = torch.zeros_like(bias) if bias is not None and needed[2] else None
        self.product: Tensor | None = None

    def add(self, part: slice, grad: Tensor, h: Tensor, w: Tensor) -> None:
        """grad: ∂/∂logits [n, V] of this chunk, in the compute dtype; chunks come in order, from the first."""
        if self.hidden is not None:
            self.hidden[part] = grad @ w
        if self.weight is not None:
            self._add_weight(part.start == 0, grad.T, h, self.weight)
        if self.bias is not None:
            self.bias += grad.float().sum(0).to(self.bias.dtype)

    def _add_weight(self, first: bool, grad: Tensor, h: Tensor, weight: Tensor) -> None:
        """weight += grad [V, n] · h [n, H]."""
        if grad.dtype == weight.dtype:
            torch.mm(grad, h, out=weight) if first else weight.addmm_(grad, h)
            return
        self.product = h.new_empty(weight.shape) if self.product is None else self.product
        torch.mm(grad, h, out=self.product)
        if first:
            weight.copy_(self.product)
            return
        for rows, product in zip(weight.split(ROWS), self.product.split(ROWS), strict=True):
            rows += product  # a sum of two dtypes first writes a copy of its second

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


def chunk(
    z: Tensor, targets: Tensor, weights: Tensor, smoothing: float, with_grad: bool, keep_logits: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs [n], loss (scalar) and ∂loss/∂z [n, V] of one chunk of logits z [n, V].

    ∂loss/∂z_v = w·[π_v - (1-ε)·1(v = target) - ε/V]. Works in z's own memory unless `keep_logits`: on a processor the
    passes over [n, V] are what this costs.
    """
    chosen, top = z.gather(-1, targets[:, None]), z.amax(-1, keepdim=True)
    mean = z.mean(-1, keepdim=True) if smoothing else None
    exp = torch.sub(z, top).exp_() if keep_logits else z.sub_(top).exp_()
    total = exp.sum(-1, keepdim=True)
    lse = top + total.log()
    logprob = (chosen - lse).squeeze(-1)
    per_token = logprob if mean is None else (1 - smoothing) * logprob + smoothing * (mean - lse).squeeze(-1)
    loss = -(weights * per_token).sum()
    if not with_grad:
        return logprob, loss, None
    scale = weights[:, None]
    grad = exp.mul_(scale / total)
    if smoothing:
        grad.sub_(scale * (smoothing / z.shape[-1]))
    return logprob, loss, grad.scatter_add_(-1, targets[:, None], (smoothing - 1) * scale)
