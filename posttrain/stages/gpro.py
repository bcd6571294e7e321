"""Generalised preference optimisation from scalar rewards of K responses y_i to a prompt x.

Behind it: max_π E_π[r] - β KL(π‖π_ref), whose optimum is the tilt π*(y|x) = π_ref(y|x) e^{r/β} / Z(x).

    z_i = log π_θ(y_i|x) - log π_ref(y_i|x)      ρ_i = π_ref/μ where the sampler's log μ is known, else 1
    ω_i = ρ_i e^{r_i/β} / Σ_j ρ_j e^{r_j/β}

    weighted   L_x = -β Σ_i ω_i log π_θ(y_i|x)
    dual       target=tilt     L_x = (1/K) Σ_i ρ_i Ω*(β z_i) - β Σ_i ω_i z_i         Ω*(t) = β(e^{t/β} - 1)
               target=reward   L_x = (1/K) Σ_i ρ_i [Ω*(β z_i) - β r_i z_i]           stationary at e^z = r, r ≥ 0
    pairwise   L_x = Σ over pairs ordered by reward of f(β(z_w - z_l)); with K = 2 and link=logistic this is dpo

weighted reaches the tilt only as K grows with responses drawn from π_ref (or ρ given): for three actions with π_ref =
[.5, .3, .2], r = [0, .5, 1], β = .5 and tilt [.179, .292, .529] its expectation is [.355, .342, .304] at K = 2 and
[.216, .319, .465] at K = 8; dual's stationary point is the tilt itself. A normalised policy cannot meet e^z = r everywhere
unless E_ref[r] = 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from posttrain.data.group import Group
from posttrain.errors import ConfigError, DataError
from posttrain.stages.base import Asked, Loss, Records
from posttrain.stages.preferences import (
    Pairs,
    Preference,
    extremes,
    link_loss,
    matrix,
    means,
    pair_records,
    pairs_in,
    reference_records,
    soft,
)

if TYPE_CHECKING:
    from posttrain.data.batches import Batch
    from posttrain.models.networks import Networks

MINUS_INF = float("-inf")


@dataclass
class GPRO(Preference):
    """Form, target and temperature; see the module's equations."""

    useless: ClassVar[str] = (
        "prompts whose rewards are all equal (K = 1 included) carry no signal; stage.form=dual stage.target=reward reads "
        "rewards one by one, stage=dpo pairs"
    )

    watches: ClassVar[str] = "objective"
    undecided: ClassVar[tuple[str, ...]] = ("reward",)

    form: Literal["weighted", "dual", "pairwise"] = "weighted"
    target: Literal["tilt", "reward"] = "tilt"
    link: Literal["logistic", "hinge", "squared"] = "logistic"
    beta: float = field(default=0.1, metadata={"above": 0})
    z_max: float = field(default=5.0, metadata={"above": 0})
    equal_rewards: Literal["skip", "keep"] = "skip"
    normalize_rewards: Literal["none", "center", "standardize"] = "none"

    def check(self) -> None:
        super().check()
        if self.target == "reward" and self.form != "dual":
            raise ConfigError(f"stage.target=reward is for stage.form=dual, not {self.form}; leave target=tilt")
        if self.target == "reward" and self.normalize_rewards != "none":
            raise ConfigError("stage.target=reward needs rewards as they are, >= 0; leave stage.normalize_rewards=none")

    def group_settings(self) -> dict[str, Any]:
        return {"target": self.target, "equal_rewards": self.equal_rewards}

    def keeps(self, group: Group) -> bool:
        if group.rewards is None:
            raise DataError(
                f"{group.file}, row {group.row}: stage=gpro learns from rewards, and this row has ranks or target_probs "
                "alone; give rewards, or use stage=reward or stage=dpo"
            )
        if self.target == "reward" and min(group.rewards) < 0:
            raise DataError(
                f"{group.file}, row {group.row}: a reward of {min(group.rewards):g}, but stage.target=reward is stationary at "
                "e^z = r and needs rewards >= 0; shift them, or set stage.target=tilt"
            )
        return self.target == "reward" or self.equal_rewards == "keep" or min(group.rewards) < max(group.rewards)

    def needs_reference(self, sampler_known: bool) -> str:
        """form=weighted reads it while training only for ρ = π_ref/μ."""
        return "always" if self.form != "weighted" or sampler_known else "evaluation"

    def units(self, batch: Batch) -> dict[str, float]:
        if self.form == "pairwise":
            return {self.form: float(len(pairs_in(batch).first)) * batch.weight}
        return {self.form: float(batch.groups)}

    def loss(self, networks: Networks, batch: Batch) -> Loss:
        omega = self.omega(batch)  # [groups, K]
        effective = (1 / (omega**2).sum(1)).sum() * batch.weight
        stats = {"effective_responses": (effective, float(batch.groups))}
        if self.form == "weighted":  # the weights are known before the forward pass
            weight = self.beta * _flat(omega, batch)[batch.response]
            scores = networks.policy(batch, weights=weight.float(), router=self.aux_weight > 0)
            if batch.reference is not None:
                stats |= self._stats(self.log_ratios(scores.logprobs, batch), batch)
            return Loss({"weighted": scores.objective}, stats).with_router(scores.router)
        scores = networks.policy(batch, router=self.aux_weight > 0)
        z = self.log_ratios(scores.logprobs, batch)  # [responses]
        stats |= self._stats(z.detach(), batch)
        if self.form == "pairwise":
            total = self.pair_losses(z, pairs_in(batch)).sum() * batch.weight
            return Loss({"pairwise": total}, stats).with_router(scores.router)
        losses = self.dual_losses(z, batch)
        beyond = (z.detach() > self.z_max).double().sum() * batch.weight
        stats["beyond_z_max"] = (beyond, float(batch.responses))
        return Loss({"dual": losses.sum() * batch.weight}, stats).with_router(scores.router)

    def log_ratios(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """z of each response, [responses] fp32."""
        assert batch.reference is not None
        return batch.by_response(logprobs - batch.reference)

    def log_rho(self, batch: Batch) -> Tensor:
        """log π_ref/μ of each response, [responses] fp64; 0 where the sampler's log-probs are not known."""
        if batch.reference is None:
            return torch.zeros_like(batch.rewards)
        known = batch.by_response(batch.reference.double()) - batch.sampler_logprobs
        return known.nan_to_num(nan=0.0)

    def omega(self, batch: Batch) -> Tensor:
        """ω [groups, K] fp64, 0 where a Group has fewer responses."""
        rewards = normalize(matrix(batch.rewards, batch, MINUS_INF), self.normalize_rewards)
        return weights(rewards, self.beta, matrix(self.log_rho(batch), batch, MINUS_INF))

    def pair_losses(self, z: Tensor, pairs: Pairs) -> Tensor:
        """f(β(z_w - z_l)), [P]; a soft preference weighs both directions."""
        gap = z[pairs.first] - z[pairs.second]
        return soft(self.link_of(gap), self.link_of(-gap), pairs.p)

    def link_of(self, gap: Tensor) -> Tensor:
        if self.link == "squared":
            return (gap - 1 / (2 * self.beta)) ** 2
        return link_loss(self.beta * gap, self.link)

    def score(self, networks: Networks, batch: Batch, asked: Asked) -> Records:
        logprobs = networks.policy(batch).logprobs
        z, pairs = self.log_ratios(logprobs, batch).double(), pairs_in(batch)
        records = pair_records(self.beta * (z[pairs.first] - z[pairs.second]), pairs, batch, asked)
        best, worst = extremes(batch)
        whole, tokens = batch.by_response(logprobs).double(), batch.trained_per_response.double()
        for name, index in (("best", best), ("worst", worst)):
            records |= {
                f"nll_{name}_sum": -whole[index].cpu().numpy(),
                f"nll_{name}_count": tokens[index].cpu().numpy(),
            }
        effective = 1 / (self.omega(batch) ** 2).sum(1)
        records |= means({"reward": self.expected_reward(z, batch), "effective_responses": effective})
        records |= self._objective_records(z, whole, pairs, batch)
        return records | reference_records(logprobs, batch)

    def _objective_records(self, z: Tensor, whole: Tensor, pairs: Pairs, batch: Batch) -> Records:
        """What is minimised, over Groups or (pairwise) pairs; z, whole: log ratios and log π, [responses]."""
        if self.form == "pairwise":
            owner, none = batch.group[pairs.first], z.new_zeros(len(batch.ids))
            losses = self.pair_losses(z, pairs).double()
            found = none.index_add(0, owner, losses), none.index_add(0, owner, torch.ones_like(losses))
            return {f"objective_{part}": sums.cpu().numpy() for part, sums in zip(("sum", "count"), found, strict=True)}
        if self.form == "weighted":
            return means({"objective": -self.beta * (self.omega(batch) * matrix(whole, batch, 0.0)).sum(1)})
        return means({"objective": self.dual_losses(z, batch)})

    def dual_losses(self, z: Tensor, batch: Batch) -> Tensor:
        """The dual form's losses, [groups]."""
        rewards, log_rho = (matrix(values, batch, MINUS_INF) for values in (batch.rewards, self.log_rho(batch)))
        given = matrix(z, batch, 0.0), rewards, self.beta, self.target, self.z_max
        return dual_loss(*given, log_rho, self.omega(batch))

    def expected_reward(self, z: Tensor, batch: Batch) -> Tensor:
        """Σ_i v_i r_i, v_i ∝ ρ_i e^{z_i}: the policy's reward on each prompt's responses by self-normalised importance
        weights, [groups]; at z = 0 and ρ = 1 the plain mean."""
        share = (matrix(z, batch, MINUS_INF) + matrix(self.log_rho(batch), batch, 0.0)).softmax(1)
        return (share * matrix(batch.rewards, batch, 0.0)).sum(1)

    def _stats(self, z: Tensor, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        reward = self.expected_reward(z.double(), batch).sum() * batch.weight
        return {"reward": (reward, float(batch.groups))}


def normalize(rewards: Tensor, how: str) -> Tensor:
    """Rewards [groups, K], -inf where there is no response, less their mean (center) and over their deviation too
    (standardize; unbiased, a Group without spread stays 0). Centring leaves ω as it is; dividing rescales β by Group."""
    if how == "none":
        return rewards
    real = rewards.isfinite()
    count = real.sum(1, keepdim=True)
    centred = rewards - rewards.masked_fill(~real, 0).sum(1, keepdim=True) / count
    if how == "center":
        return centred
    deviation = ((centred.masked_fill(~real, 0) ** 2).sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(deviation > 0, centred / deviation.clamp(min=1e-12), centred)


def weights(rewards: Tensor, beta: float, log_rho: Tensor | None = None) -> Tensor:
    """ω [groups, K] from rewards [groups, K] (-inf where there is no response) and log ρ likewise (0 unless given)."""
    log_rho = torch.zeros_like(rewards) if log_rho is None else log_rho.masked_fill(rewards == MINUS_INF, 0.0)
    return (rewards / beta + log_rho).softmax(1)


def weighted_loss(logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """-β Σ_i ω_i log π_θ(y_i|x), [groups], from summed log-probs and rewards [groups, K]."""
    return -beta * (weights(rewards, beta) * logprobs).sum(1)


def dual_loss(
    z: Tensor,
    rewards: Tensor,
    beta: float,
    target: str = "tilt",
    z_max: float = 5.0,
    log_rho: Tensor | None = None,
    omega: Tensor | None = None,
) -> Tensor:
    """The dual form's losses [groups] from log ratios z and rewards [groups, K], -inf rewards where there is no response.

    Above z_max e^z is continued linearly, e^{z_max}(1 + z - z_max): clamping z would take away the gradient that must pull
    it back, and the exponential of a whole response overflows.
    """
    real = rewards != MINUS_INF
    rho = torch.ones_like(rewards) if log_rho is None else log_rho.exp()
    rho = rho.masked_fill(~real, 0.0).to(z)
    near = z.clamp(max=z_max)
    conjugate = beta * (near.expm1() + near.exp() * (z - near))  # Ω*(β z); expm1, for z begins at 0
    k = real.sum(1)
    if target == "reward":
        return (rho * (conjugate - beta * rewards.masked_fill(~real, 0.0).to(z) * z)).sum(1) / k
    omega = weights(rewards, beta, log_rho) if omega is None else omega
    return (rho * conjugate).sum(1) / k - beta * (omega.to(z) * z).sum(1)


def _flat(values: Tensor, batch: Batch) -> Tensor:
    """[groups, K] back to [responses]: the inverse of `matrix`."""
    index = matrix(torch.arange(len(batch.group), device=values.device), batch, -1)
    out = values.new_zeros(len(batch.group))
    real = index >= 0
    return out.index_put((index[real],), values[real])
