"""What an evaluation keeps of each token's logits: log-prob, hit, confidence, entropy, and what a temperature is fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posttrain.models.logprobs import LogitTransform, chunks, head_size, logits_of
from posttrain.stats import temperature_grid

GRID_BYTES = {"cpu": 2**19, "cuda": 2**28}
"""Most memory of the logits whose sums are formed at every temperature in turn: on a CPU they must stay in its cache, which
makes it ten times as fast."""


@dataclass
class TokenStatistics:
    """Detached per-token numbers, each [N], fp32 (top1_hit: bool).

    grid: of M of the tokens, at each β of stats.temperature_grid(): logsumexp(βz) [M, G], its derivative E_β[z] [M, G], and the
    target's own logit [M].
    """

    logprob: Tensor
    entropy: Tensor | None = None
    top1_hit: Tensor | None = None
    confidence: Tensor | None = None
    grid: tuple[Tensor, Tensor, Tensor] | None = None


@torch.no_grad()
def token_statistics(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    transform: LogitTransform | None = None,
    entropy: bool = False,
    fitted: Tensor | None = None,
) -> TokenStatistics:
    """log π(target), top-1 hit, confidence (the largest probability) and on request entropy (nats), in one pass.

    fitted: [M] increasing positions among the targets, whose `grid` is wanted.
    """
    transform = transform or LogitTransform()
    columns: list[tuple[Tensor, ...]] = []
    grids: list[tuple[Tensor, ...]] = []
    for part in chunks(targets, head_size(head)):
        z = logits_of(hidden[part], head, transform)
        lse = z.logsumexp(-1)
        top, index = z.max(-1)
        chosen = z.gather(-1, targets[part, None]).squeeze(-1)
        row: tuple[Tensor, ...] = (chosen - lse, index == targets[part], (top - lse).exp())
        if entropy:
            row += (lse - (z.sub(lse[:, None]).exp_().mul_(z)).sum(-1),)
        columns.append(row)
        if fitted is not None:
            here = fitted[(fitted >= part.start) & (fitted < part.stop)] - part.start
            grids.append((*_on_grid(z[here], top[here]), chosen[here]))
    logprob, hit, confidence, *rest = (torch.cat(column) for column in zip(*columns, strict=True))
    logsumexp, slope, label = (torch.cat(column) for column in zip(*grids, strict=True)) if grids else (None,) * 3
    grid = None if logsumexp is None or slope is None or label is None else (logsumexp, slope, label)
    return TokenStatistics(logprob, rest[0] if rest else None, hit, confidence, grid)


def _on_grid(z: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp(βz) and E_β[z] of logits z [n, V] with maxima top [n], [n, G] each."""
    betas = temperature_grid().tolist()
    found = z.new_empty(2, len(betas), len(z))
    rows = max(1, GRID_BYTES[z.device.type] // (4 * z.shape[-1]))
    for start in range(0, len(z), rows):
        part = slice(start, start + rows)
        below = z[part] - top[part, None]
        weights = torch.empty_like(below)
        for i, beta in enumerate(betas):
            total = torch.mul(below, beta, out=weights).exp_().sum(-1)
            found[0, i, part] = total.log() + beta * top[part]
            found[1, i, part] = weights.mul_(below).sum(-1) / total + top[part]
    return found[0].T, found[1].T
