"""The maths of ppo as functions of tensors: [B, T] over responses and their token-steps, mask 1 where a step is real.

A step's state is what stands before its token. Steps without the mask are passed over: t+1 is the next step with it, and
whatever stands at the others changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_MAX = 20.0
STD_EPSILON = 1e-4


def shaped_rewards(logprobs: Tensor, reference: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t = -β (log π_old - log π_ref), and R on top at the last real token. [B, T]; scores: R, [B]."""
    mask = mask.bool()
    rewards = torch.where(mask, -beta * (logprobs - reference), 0.0)
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, steps, -1).amax(1)
    rows = (last >= 0).nonzero()[:, 0]
    rewards[rows, last[rows]] += scores[rows].to(rewards)
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438): (advantages, returns), [B, T], 0 off the mask.

    δ_t = r_t + γ V_{t+1} - V_t and Â_t = δ_t + γλ Â_{t+1}, both with 0 past the last real step, where the episode ends.
    Returns are Â + V, the critic's targets.
    """
    real = mask.bool()
    advantages = torch.zeros_like(rewards)
    following = next_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        here = delta + gamma * lam * following
        following = torch.where(real[:, t], here, following)
        next_value = torch.where(real[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(real[:, t], here, 0.0)
    return advantages, torch.where(real, advantages + values, 0.0)


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Σ_{l≥t} γ^{l-t} r_l over real steps, [B, T] (REINFORCE)."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def group_advantages(scores: Tensor) -> Tensor:
    """(R - mean)/(std + 1e-4) over the K responses of each prompt, unbiased std; 0 where all are equal (GRPO). [P, K]

    NaN scores (a failed reward) take no part and get 0.
    """
    known = ~scores.isnan()
    count = known.sum(1, keepdim=True)
    filled = scores.nan_to_num(nan=0.0)
    mean = filled.sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(known, filled - mean, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    highest = scores.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    lowest = scores.nan_to_num(nan=torch.inf).amin(1, keepdim=True)
    return torch.where(highest > lowest, centred / (std + STD_EPSILON), 0.0)


def leave_one_out_advantages(scores: Tensor) -> Tensor:
    """R_i minus the mean of the prompt's other responses (RLOO). [P, K]; NaN scores take no part and get 0."""
    known = ~scores.isnan()
    count, filled = known.sum(1, keepdim=True), scores.nan_to_num(nan=0.0)
    others = (filled.sum(1, keepdim=True) - filled) / (count - 1).clamp(min=1)
    return torch.where(known & (count > 1), filled - others, 0.0)


def clipped_surrogate(
    logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """-min(o Â, clip(o, 1-ε, 1+ε) Â) of each token-step and the ratio o = exp(clip(log π - log π_old, ±20)); any shape.

    dual_clip c > 1: where Â < 0 the loss is at most -c Â (arXiv:1912.09729).
    """
    ratio = (logprobs - old).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss, ratio


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """(V - Ĝ)² of each step, no ½; with `clip` the larger of it and of V kept within ±clip of its old value."""
    loss = (values - returns).square()
    if clip is None:
        return loss
    kept = old + (values - old).clamp(-clip, clip)
    return torch.maximum(loss, (kept - returns).square())


def whiten(values: Tensor, mean: float, std: float) -> Tensor:
    """To mean 0 and deviation 1 of the whole rollout, whose numbers are given."""
    return (values - mean) / (std + 1e-8)
