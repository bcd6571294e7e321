"""Reward modelling: a scalar R(x, y) = w·h that orders the responses of a prompt as people did.

    bradley_terry   -log σ(R⁺ - R⁻ - margin), mean over the prompt's untied pairs        (arXiv:2203.02155, eq. 1)
    hinge           max(0, margin - (R⁺ - R⁻))
    mse             (R⁺ - R⁻ - margin)²
    listwise        -Σ_j q_j log softmax_j(R), q from target_probs, else on the best, shared among ties
    plackett_luce   -Σ_j log softmax over the candidates not yet placed, best first

The unit is the prompt: L = (1/G) Σ_g L_g over the G prompts of the optimizer step that have something to order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from posttrain.data.group import Group
from posttrain.data.preferences import standings
from posttrain.errors import ConfigError
from posttrain.models.networks import Head
from posttrain.stages.base import Asked, Loss, Records
from posttrain.stages.preferences import (
    Pairs,
    Preference,
    extremes,
    matrix,
    means,
    pair_records,
    pair_stats,
    pairs_in,
    soft,
)

if TYPE_CHECKING:
    from posttrain.data.batches import Batch
    from posttrain.models.networks import Networks

OVER_LISTS = ("listwise", "plackett_luce")


@dataclass
class Reward(Preference):
    """The loss over a prompt's responses, and how their states are pooled into one (models/reward.py)."""

    generates: ClassVar[bool] = False
    useless: ClassVar[str] = "prompts without a better and a worse response (K = 1, or all tied)"

    objective: Literal["bradley_terry", "hinge", "mse", "listwise", "plackett_luce"] = "bradley_terry"
    pooling: Literal["last", "mean", "special"] = "last"
    margin: float | None = None
    centering: float = field(default=0.0, metadata={"min": 0.0})

    def check(self) -> None:
        super().check()
        if self.objective in ("hinge", "mse") and self.margin is not None and self.margin <= 0:
            raise ConfigError(
                f"stage.objective={self.objective} with stage.margin={self.margin:g} is content with equal scores; set a "
                "margin > 0, or leave it null, which is 1"
            )

    def group_settings(self) -> dict[str, Any]:
        return {}

    def keeps(self, group: Group) -> bool:
        scores = standings(group)
        assert scores is not None
        return min(scores) < max(scores) or (len(scores) > 1 and group.target_probs is not None)

    def head(self, ends: set[int]) -> Head:
        return Head(self.pooling, frozenset(ends))

    @property
    def closes_responses(self) -> bool:
        return self.pooling == "special"

    def weights(self) -> dict[str, float]:
        return super().weights() | {"centering": self.centering}

    def units(self, batch: Batch) -> dict[str, float]:
        pairs, n = pairs_in(batch), float(batch.groups)
        if self.objective not in OVER_LISTS:
            n = float(len(batch.group[pairs.first].unique())) * batch.weight
        return {self.objective: n, "centering": n} if self.centering else {self.objective: n}

    def loss(self, networks: Networks, batch: Batch) -> Loss:
        ratings = networks.policy(batch, router=self.aux_weight > 0)
        rewards, pairs = ratings.rewards, pairs_in(batch)  # [responses]
        terms: dict[str, Tensor] = {self.objective: self.objective_of(rewards, pairs, batch).sum() * batch.weight}
        if self.centering:
            both = (rewards[pairs.first] + rewards[pairs.second]) ** 2
            terms["centering"] = _mean_by_group(both, pairs, batch).sum() * batch.weight
        detached, (best, worst) = rewards.detach(), extremes(batch)
        stats = pair_stats(detached[pairs.first] - detached[pairs.second], batch)
        for name, index in (("reward_chosen", best), ("reward_rejected", worst)):
            stats[name] = (detached[index].sum() * batch.weight, float(batch.groups))
        return Loss(terms, stats).with_router(ratings.router)

    @property
    def usual_margin(self) -> float:
        """Of pairs whose row has no margin."""
        return self.margin if self.margin is not None else float(self.objective in ("hinge", "mse"))

    def objective_of(self, rewards: Tensor, pairs: Pairs, batch: Batch) -> Tensor:
        """Losses of the Groups, [groups]; 0 where a Group has no pair to order."""
        if self.objective == "listwise":
            return listwise_loss(matrix(rewards, batch, float("-inf")), _targets(batch).to(rewards))
        if self.objective == "plackett_luce":
            stand = matrix(batch.standings, batch, float("-inf"))
            return plackett_luce_loss(matrix(rewards, batch, float("-inf")), stand)
        margin = batch.margin.nan_to_num(nan=self.usual_margin)[batch.group[pairs.first]].to(rewards)
        h = rewards[pairs.first] - rewards[pairs.second]
        losses = soft(pairwise_loss(h, self.objective, margin), pairwise_loss(-h, self.objective, margin), pairs.p)
        return _mean_by_group(losses, pairs, batch)

    def score(self, networks: Networks, batch: Batch, asked: Asked) -> Records:
        rewards = networks.policy(batch).rewards.double()
        pairs = pairs_in(batch)
        records = pair_records(rewards[pairs.first] - rewards[pairs.second], pairs, batch, asked)
        best, worst = extremes(batch)
        records |= means({"reward_chosen": rewards[best], "reward_rejected": rewards[worst]})
        return records | _list_records(rewards, batch)


def pairwise_loss(h: Tensor, objective: str, margin: Tensor | float = 0.0) -> Tensor:
    """Losses [P] of score differences h = R⁺ - R⁻ [P]: bradley_terry, hinge or mse."""
    if objective == "hinge":
        return relu(margin - h)
    if objective == "mse":
        return (h - margin) ** 2
    assert objective == "bradley_terry", objective
    return -logsigmoid(h - margin)


def listwise_loss(rewards: Tensor, targets: Tensor) -> Tensor:
    """-Σ_j q_j log softmax_j(R), [groups]; rewards [groups, K], -inf where there is no response; targets q [groups, K]."""
    return -(targets * rewards.log_softmax(1).masked_fill(targets == 0, 0.0)).sum(1)


def plackett_luce_loss(rewards: Tensor, standings: Tensor | None = None) -> Tensor:
    """-Σ_j log softmax over j and the candidates below it, [groups]; rewards and standings [groups, K], -inf where a Group
    has fewer responses. Without standings the responses stand best first. Equal scores of K ordered responses: log K!.

    Ties: each of the tied is placed against those below, in no order among themselves.
    """
    if standings is None:
        standings = -torch.arange(rewards.shape[1], device=rewards.device).expand_as(rewards).to(rewards)
    real = rewards != float("-inf")
    below = (standings[:, None, :] < standings[:, :, None]) | torch.eye(rewards.shape[1], device=rewards.device).bool()
    against = rewards[:, None, :].masked_fill(~(below & real[:, None, :]), float("-inf"))  # [groups, j, candidates]
    placed = torch.where(real, against.logsumexp(2) - rewards, 0.0)
    return placed.masked_fill(~real, 0.0).sum(1)


def _targets(batch: Batch) -> Tensor:
    """q [groups, K]: target_probs, else 1 on the best, shared among ties."""
    stand, given = matrix(batch.standings, batch, float("-inf")), matrix(batch.target_probs, batch, 0.0)
    best = (stand == stand.amax(1, keepdim=True)).double()
    best = best / best.sum(1, keepdim=True)
    return torch.where(given.isnan().any(1, keepdim=True), best, given)


def _mean_by_group(values: Tensor, pairs: Pairs, batch: Batch) -> Tensor:
    """The mean over each Group's pairs [P] → [groups]."""
    owner = batch.group[pairs.first]
    many = torch.bincount(owner, minlength=len(batch.ids)).clamp(min=1)
    return values.new_zeros(len(batch.ids)).index_add(0, owner, values) / many


def _list_records(rewards: Tensor, batch: Batch) -> Records:
    """For Groups of more than two: whether the best-scored response is (among) the best, and Spearman's rank correlation."""
    counts = torch.bincount(batch.group).cpu().numpy()
    owner, given, judged = (t.cpu().numpy() for t in (batch.group, rewards, batch.standings))
    best, correlation, many = (np.zeros(len(counts)) for _ in range(3))
    for g in np.flatnonzero(counts > 2):
        mine, theirs = given[owner == g], judged[owner == g]
        if theirs.min() == theirs.max():
            continue
        top = mine == mine.max()
        many[g] = 1
        best[g] = (theirs[top] == theirs.max()).mean()  # equal scores share the credit
        correlation[g] = spearman(mine, theirs)
    return {
        "best_accuracy_sum": best, "best_accuracy_count": many,
        "rank_correlation_sum": correlation, "rank_correlation_count": many,
    }  # fmt: skip


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation with average ranks; 0 where one of them is constant."""
    x, y = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    size = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / size if size else 0.0
