"""What pretrain and sft share: the negative log-likelihood of trained tokens, summed, and its per-example records.

    L = -(1/N) Σ_t w_t · log π(y_t | x, y_<t),    N = Σ units over the whole optimizer step

With label smoothing ε the target is (1-ε)·onehot + ε/V (Szegedy et al., arXiv:1512.00567, sec. 7); what evaluation
reports stays the unsmoothed nll.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain.stages.base import Asked, Loss, Records, Stage
from posttrain.stats import fine_bins

if TYPE_CHECKING:
    from posttrain.data.batches import Batch
    from posttrain.models.networks import Networks
    from posttrain.models.token_statistics import TokenStatistics


@dataclass
class Likelihood(Stage):
    """Token-level maximum likelihood; subclasses say which tokens and how they are weighed."""

    label_smoothing: float = field(default=0.0, metadata={"min": 0.0, "below": 1.0})
    aux_weight: float = field(default=0.001, metadata={"min": 0.0})

    def group_settings(self) -> dict[str, Any]:
        return {}  # which turns are trained stands in the encoding

    def weights(self) -> dict[str, float]:
        return {"aux": self.aux_weight}

    def token_weights(self, batch: Batch) -> torch.Tensor:
        """w_t of each trained token, [N]."""
        return torch.ones_like(batch.targets, dtype=torch.float32)

    def units(self, batch: Batch) -> float:
        """What the weights add up to: trained tokens, unless a subclass weighs otherwise."""
        return float(batch.trained_tokens)

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"nll": self.units(batch), "aux": float(batch.sequence_tokens)}

    def loss(self, networks: Networks, batch: Batch) -> Loss:
        weights = self.token_weights(batch)
        scores = networks.policy(batch, weights=weights, smoothing=self.label_smoothing, router=self.aux_weight > 0)
        stats = {"nll": (-scores.logprobs.sum() * batch.weight, float(batch.trained_tokens))}
        return Loss({"nll": scores.objective}, stats).with_router(scores.router)

    def score(self, networks: Networks, batch: Batch, asked: Asked) -> Records:
        fitted = fitted_tokens(batch, asked.fit_every) if asked.fit_every else None
        found = networks.policy(batch, statistics=True, temperature=asked.temperature, fitted=fitted).statistics
        return token_records(found, batch, asked.bins) | (
            fit_records(found, fitted, batch) if fitted is not None else {}
        )


def fitted_tokens(batch: Batch, every: int) -> torch.Tensor:
    """One in `every` of each Group's targets, [M] positions among the batch's; which one comes first is its id's to say, so
    that no place in a document is preferred."""
    owner = batch.group[batch.response]
    first = torch.searchsorted(owner, torch.arange(len(batch.ids), device=owner.device))
    place = torch.arange(len(owner), device=owner.device) - first[owner]
    offset = torch.tensor([zlib.crc32(name.encode()) % every for name in batch.ids], device=owner.device)
    return ((place + offset[owner]) % every == 0).nonzero()[:, 0]


def fit_records(statistics: TokenStatistics, fitted: torch.Tensor, batch: Batch) -> Records:
    """What a temperature is fitted to, summed over each Group's fitted tokens: see stats/temperature_grid.py."""
    assert statistics.grid is not None
    owner = batch.group[batch.response][fitted].cpu()

    def total(values: torch.Tensor) -> np.ndarray:
        sums = torch.zeros(len(batch.ids), *values.shape[1:], dtype=torch.float64)
        return sums.index_add(0, owner, values.double().cpu()).numpy()

    logsumexp, slope, label = statistics.grid
    records = {"grid_logsumexp": total(logsumexp), "grid_slope": total(slope), "grid_label": total(label)}
    return records | {"grid_items": total(torch.ones(len(fitted)))}


def token_records(statistics: TokenStatistics, batch: Batch, bins: int) -> Records:
    """Sums over each Group's target tokens, fp64: the columns of an evaluation record, [groups].

    Calibration: confidence is the largest probability, correct is whether it fell on the target.
    """
    assert statistics.confidence is not None
    assert statistics.top1_hit is not None
    group = batch.group.cpu().numpy()
    owner, count = group[batch.response.cpu().numpy()], len(batch.ids)
    logprob = statistics.logprob.double().cpu().numpy()
    confidence = statistics.confidence.double().cpu().numpy()
    hit = statistics.top1_hit.double().cpu().numpy()

    def total(values: np.ndarray | None) -> np.ndarray:
        return np.bincount(owner, values, count).astype(np.float64)

    return {
        "nll_sum": total(-logprob),
        "tokens": total(None),
        "bytes": np.bincount(group, batch.bytes, count),
        "chars": np.bincount(group, batch.chars, count),
        "correct": total(hit),
        "brier_sum": total((confidence - hit) ** 2),
        **fine_bins(confidence, hit, owner, count, bins),
    }
