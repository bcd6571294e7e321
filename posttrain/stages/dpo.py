"""Direct preference optimisation (arXiv:2305.18290, eq. 7).

    h = β[(log π_θ(y_w|x) - log π_ref(y_w|x)) - (log π_θ(y_l|x) - log π_ref(y_l|x))]
    L = -(1/P) Σ log σ(h)                                P pairs of the optimizer step; other links f(h) below

log π(y|x) is the sum over the response's tokens, the end-of-turn token included. A Group of K responses gives all its
untied pairs from one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from posttrain.data.group import Group
from posttrain.data.preferences import pairs_of, standings
from posttrain.errors import ConfigError
from posttrain.stages.base import Asked, Loss, Records
from posttrain.stages.preferences import (
    Pairs,
    Preference,
    extremes,
    link_loss,
    means,
    pair_records,
    pair_stats,
    pairs_in,
    reference_records,
    soft,
)

if TYPE_CHECKING:
    from posttrain.data.batches import Batch
    from posttrain.models.networks import Networks

Link = Literal["logistic", "hinge", "squared", "robust", "conservative", "odds_ratio"]


@dataclass
class DPO(Preference):
    """β and the link; see the module's equation. Variants: SimPO (arXiv:2405.14734) is reference_free and length_normalized
    with target_margin γ; ORPO (arXiv:2403.07691, eq. 6) is link=odds_ratio with nll_weight=1, its λ being β."""

    useless: ClassVar[str] = (
        "prompts without a better and a worse response (K = 1, or all tied); stage=gpro stage.form=dual stage.target=reward "
        "reads responses one by one"
    )

    beta: float = field(default=0.1, metadata={"above": 0})
    link: Link = "logistic"
    flip_probability: float = field(default=0.0, metadata={"min": 0.0, "below": 0.5})
    length_normalized: bool = False
    reference_free: bool = False
    target_margin: float = field(default=0.0, metadata={"min": 0.0})
    nll_weight: float = field(default=0.0, metadata={"min": 0.0})
    pairs: Literal["all", "best_worst", "sample"] = "all"

    def check(self) -> None:
        super().check()
        if self.flip_probability and self.link not in ("robust", "conservative"):
            raise ConfigError(
                f"stage.flip_probability={self.flip_probability:g} is for stage.link=robust or conservative, "
                f"not {self.link}; set one of these, or leave it 0"
            )
        if self.target_margin and self.link in ("squared", "odds_ratio"):
            raise ConfigError(f"stage.target_margin has no meaning with stage.link={self.link}; leave it 0")
        if self.link == "odds_ratio" and not self.nll_weight:
            raise ConfigError("stage.link=odds_ratio (ORPO) needs its likelihood term; set stage.nll_weight=1")

    @property
    def without_reference(self) -> bool:
        """Whether the loss reads the policy alone; evaluation still tells the distance from the reference."""
        return self.reference_free or self.link == "odds_ratio"

    def needs_reference(self, sampler_known: bool) -> str:
        return "evaluation" if self.without_reference else "always"

    def group_settings(self) -> dict[str, Any]:
        return {"pairs": self.pairs}

    def keeps(self, group: Group) -> bool:
        scores = standings(group)
        assert scores is not None
        return min(scores) < max(scores) or (len(scores) == 2 and group.target_probs is not None)

    def select(self, group: Group, seed: int) -> Group:
        if self.pairs == "all" or len(group.responses) == 2:
            return group
        return next(pairs_of(group, self.pairs, seed))

    def weights(self) -> dict[str, float]:
        return super().weights() | {"nll": self.nll_weight}

    def units(self, batch: Batch) -> dict[str, float]:
        n = float(len(pairs_in(batch).first)) * batch.weight
        return {"preference": n, "nll": n} if self.nll_weight else {"preference": n}

    def loss(self, networks: Networks, batch: Batch) -> Loss:
        scores = networks.policy(batch, router=self.aux_weight > 0)
        logprobs, pairs = scores.logprobs, pairs_in(batch)  # [N]
        h = self.margins(logprobs, pairs, batch)  # [P]
        losses = soft(self.link_of(h), self.link_of(-h - 2 * self.target_margin), pairs.p)
        terms = {"preference": losses.sum() * batch.weight}
        if self.nll_weight:
            per_token = batch.by_response(logprobs) / batch.trained_per_response
            terms["nll"] = -per_token[pairs.first].sum() * batch.weight
        return Loss(terms, self._stats(logprobs.detach(), h.detach(), batch)).with_router(scores.router)

    def margins(self, logprobs: Tensor, pairs: Pairs, batch: Batch) -> Tensor:
        """h of each pair, [P]; the target margin γ taken off."""
        if self.link == "odds_ratio":
            mean = batch.by_response(logprobs) / batch.trained_per_response  # log p of a token, geometric mean
            mean = mean.clamp(max=-1e-6)  # a certain response has no finite odds
            score = mean - torch.log(-torch.expm1(mean))  # log odds, log p/(1-p)
            return score[pairs.first] - score[pairs.second]
        gap = batch.by_response(self.log_ratios(logprobs, batch))
        if self.length_normalized:
            gap = gap / batch.trained_per_response
        return self.beta * (gap[pairs.first] - gap[pairs.second]) - self.target_margin

    def log_ratios(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """log π_θ - log π_ref of each token, [N]; without the reference log π_θ alone."""
        if self.reference_free:
            return logprobs
        assert batch.reference is not None
        return logprobs - batch.reference

    def link_of(self, h: Tensor) -> Tensor:
        """f(h), [P]; ORPO's is weighted by its λ, which is β."""
        if self.link == "squared":  # IPO, arXiv:2310.12036, eq. 17
            return (h / self.beta - 1 / (2 * self.beta)) ** 2
        found = link_loss(h, self.link, self.flip_probability)
        return self.beta * found if self.link == "odds_ratio" else found

    def score(self, networks: Networks, batch: Batch, asked: Asked) -> Records:
        logprobs = networks.policy(batch).logprobs
        pairs = pairs_in(batch)
        records = pair_records(self.margins(logprobs, pairs, batch) + self.target_margin, pairs, batch, asked)
        records |= means(self._of_extremes(logprobs, batch))
        return records | (reference_records(logprobs, batch) if batch.reference is not None else {})

    def _stats(self, logprobs: Tensor, h: Tensor, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        return pair_stats(h, batch) | {
            name: (values.sum() * batch.weight, float(batch.groups))
            for name, values in self._of_extremes(logprobs, batch).items()
        }

    def _of_extremes(self, logprobs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What is told of each prompt's best and worst response, [groups]: log π, and the implicit reward."""
        best, worst = extremes(batch)
        whole = batch.by_response(logprobs)
        found = {"logprob_chosen": whole[best], "logprob_rejected": whole[worst]}
        if batch.reference is not None:
            implicit = self.beta * batch.by_response(logprobs - batch.reference)
            found |= {"reward_chosen": implicit[best], "reward_rejected": implicit[worst]}
        return found


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    link: str = "logistic",
    flip_probability: float = 0.0,
) -> Tensor:
    """Losses [B] of pairs from summed log-probs [B] in nats; link: logistic, hinge, squared, robust, conservative."""
    stage = DPO(beta=beta, link=link, flip_probability=flip_probability)  # type: ignore[arg-type]
    stage.check()
    return stage.link_of(beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)))
