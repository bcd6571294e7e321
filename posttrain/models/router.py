"""Load balance of a mixture of experts, sequence-wise (arXiv:2412.19437, eqs. 17-20).

    L_aux = Σ_sequences T_s · E Σ_e f_e m_e

f_e: share of the sequence's tokens sent to expert e (sums to k over e), m_e its mean router probability. Per sequence over
real tokens, weighted by length, because a product of batch means has no sum and count: it would change with the split into
micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.data.batches import Batch


@dataclass
class Router:
    """balance: Σ over layers' mean of T_s·E·Σ f·m, scalar; busiest, idlest: f_e over all tokens (sum over layers)."""

    balance: Tensor
    load: Tensor
    tokens: int

    @classmethod
    def of(cls, router_logits: tuple[Tensor, ...], batch: Batch, config: Any) -> Router:
        """From each layer's router logits [R·L, E]."""
        k = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_k", 2)
        segments = batch.segments.flatten()
        real = segments >= 0
        owner, sequences = segments[real], len(batch.group)
        lengths = torch.zeros(sequences, device=owner.device).index_add_(
            0, owner, torch.ones_like(owner, dtype=torch.float32)
        )
        balance, load = torch.zeros((), device=owner.device), 0.0
        for logits in router_logits:
            probabilities = logits.flatten(0, -2)[real].float().softmax(-1)  # [T, E]
            experts = probabilities.shape[-1]
            sent = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(k, -1).indices, 1.0)
            zeros = probabilities.new_zeros(sequences, experts)
            f = zeros.index_add(0, owner, sent) / lengths[:, None]
            m = zeros.index_add(0, owner, probabilities) / lengths[:, None]
            balance = balance + (lengths * experts * (f * m).sum(-1)).sum()
            load = load + sent.sum(0).detach()
        layers = len(router_logits)
        assert isinstance(load, Tensor)
        return cls(balance * batch.weight / layers, load * batch.weight / layers, int(batch.tokens))

    def stats(self) -> dict[str, tuple[Tensor, float]]:
        """For the log: the loss per token and the busiest and idlest expert's share."""
        tokens = float(self.tokens)
        return {
            "aux_loss": (self.balance.detach(), tokens),
            "expert_load_max": (self.load.max(), tokens),
            "expert_load_min": (self.load.min(), tokens),
        }
