"""KL-regularised policy optimisation (arXiv:1707.06347; for language models 1909.08593): max_π E_π[R] - β KL(π‖π_ref).

One iteration: answer batch.size prompts `samples` times each with π_old, score them, form advantages, then `epochs` times
through `minibatches` optimizer steps on

    -min(o_t Â_t, clip(o_t, 1-ε, 1+ε) Â_t) + c_v (V_t - Ĝ_t)² - c_e H_t (+ β ½ (log π - log π_ref)²),   o = π/π_old

a sum over the step's response tokens divided by their number. kl_in=reward puts -β (log π_old - log π_ref) on each token's
reward instead; both have the tilt π_ref e^{R/β}/Z as their optimum. Advantages: gae (a critic), group (GRPO), leave_one_out
(RLOO), return (REINFORCE); policy_gradient.py has the equations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from posttrain.data.group import Group
from posttrain.data.loader import Step, compose
from posttrain.data.tokens import Examples
from posttrain.errors import ConfigError
from posttrain.rollout import Sampling
from posttrain.stages.base import Loss, Stage
from posttrain.stages.experience import Experience, collect
from posttrain.stages.policy_gradient import (
    clipped_surrogate,
    discounted_returns,
    gae,
    group_advantages,
    leave_one_out_advantages,
    shaped_rewards,
    value_loss,
    whiten,
)

if TYPE_CHECKING:
    from posttrain.data.batches import Batch
    from posttrain.models.networks import Networks
    from posttrain.stages.base import Supply

__all__ = ["PPO", "clipped_surrogate", "gae", "group_advantages", "leave_one_out_advantages", "shaped_rewards"]


@dataclass
class PPO(Stage):
    """Sampling, rewards, advantages and the clipped objective; see the module's equations."""

    data_formats: ClassVar[tuple[str, ...]] = ("prompts", "prompt_completion")
    streams: ClassVar[bool] = False
    watches: ClassVar[str] = "reward"

    rewards: list[str] = field(default_factory=lambda: ["number"])
    reward_weights: list[float] | None = None
    reward_seconds: float = field(default=30.0, metadata={"above": 0})
    max_failed_fraction: float = field(default=0.1, metadata={"min": 0, "max": 1})
    reward_clip: float | None = field(default=None, metadata={"above": 0})
    advantage: Literal["gae", "group", "leave_one_out", "return"] = "gae"
    samples: int = field(default=4, metadata={"min": 1})
    temperature: float = field(default=1.0, metadata={"above": 0})
    max_new_tokens: int = field(default=256, metadata={"min": 1})
    missing_end_penalty: float = field(default=0.0, metadata={"min": 0})
    epochs: int = field(default=4, metadata={"min": 1})
    minibatches: int = field(default=1, metadata={"min": 1})
    target_kl: float | None = field(default=None, metadata={"above": 0})
    clip: float = field(default=0.2, metadata={"above": 0})
    dual_clip: float | None = field(default=None, metadata={"above": 1})
    beta: float = field(default=0.05, metadata={"min": 0})
    kl_in: Literal["reward", "loss", "both"] = "reward"
    kl_target: float | None = field(default=None, metadata={"above": 0})
    gamma: float = field(default=1.0, metadata={"above": 0, "max": 1})
    lam: float = field(default=0.95, metadata={"min": 0, "max": 1})
    whiten: bool = True
    value_weight: float = field(default=0.1, metadata={"min": 0})
    value_clip: float | None = field(default=None, metadata={"above": 0})
    entropy_weight: float = field(default=0.0, metadata={"min": 0})

    def check(self) -> None:
        if not self.rewards:
            raise ConfigError("stage.rewards is empty; try [number], [exact] or [my_module:my_function]")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ConfigError(
                f"stage.reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} stage.rewards; give "
                "each reward its weight"
            )
        if self.advantage in ("group", "leave_one_out") and self.samples < 2:
            raise ConfigError(
                f"stage.advantage={self.advantage} compares a prompt's answers, and stage.samples={self.samples}; try "
                "stage.samples=8, or stage.advantage=gae"
            )
        if self.kl_target is not None and not self.beta:
            raise ConfigError("stage.kl_target moves stage.beta, which is 0; try stage.beta=0.05")

    @property
    def needs_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def keeps_reference(self) -> bool:
        return self.beta > 0

    @property
    def answer_tokens(self) -> int:
        return self.max_new_tokens

    @property
    def updates(self) -> int:
        return self.epochs * self.minibatches

    def facts(self) -> list[tuple[str, str]]:
        answers = (
            f"{self.samples} to each prompt, at most {self.max_new_tokens} tokens, temperature {self.temperature:g}"
        )
        whitened = ", whitened" if self.whiten and self.advantage in ("gae", "return") else ""
        penalty = (
            "none" if not self.beta else f"{self.beta:g} in {'reward and loss' if self.kl_in == 'both' else self.kl_in}"
        )
        rescaled = "; whitening rescales it" if whitened and self.beta and self.kl_in != "reward" else ""
        return [
            ("answers", answers),
            (
                "rewards",
                f"{', '.join(self.rewards)}; advantage {self.advantage}{whitened}; KL penalty {penalty}{rescaled}",
            ),
            ("iteration", f"{self.updates} steps: {self.epochs} epochs of {self.minibatches} minibatches"),
        ]

    def group_settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens}

    def groups(self, groups: Iterable[Group], notes: Counter[str], seed: int = 0) -> Iterator[Group]:
        """Prompts alone; a known best response is kept as the column `answer`, for verifiers, where the data has none."""
        for group in groups:
            columns = dict(group.columns)
            if group.responses:
                notes[
                    "have responses, which are not trained on: this stage samples its own (stage=gpro learns from given ones)"
                ] += 1
            if "answer" not in columns and group.responses and isinstance(group.responses[0], str):
                columns["answer"] = group.responses[0]
            yield Group(group.prompt, (), columns=columns, file=group.file, row=group.row)

    def batches(self, networks: Networks, supply: Supply, first: int, last: int) -> Iterator[Step]:
        """Every optimizer step of every iteration; a checkpoint may be made after an iteration's last."""
        iteration, beta, number = supply.state.get("iteration", 0), supply.state.get("beta", self.beta), first
        while number < last:
            sampling = Sampling(self.temperature, seed=supply.seed << 32 | iteration)
            prompts = supply.loader.take(iteration)
            experience = collect(networks, supply, self, prompts, sampling)
            self.add_advantages(experience, beta)
            told = experience.metrics(beta)
            state = {"iteration": iteration + 1, "beta": self.adapted(beta, experience.kl)}
            orders = self.orders(len(experience.groups), supply.seed, iteration)
            rank, world = supply.runtime.rank, supply.runtime.world
            for place, positions in enumerate(orders):
                step = compose(number, Examples(experience.groups), positions, supply.packing, rank, world)
                number += 1
                step.stream, step.told, told = state, told, {}
                over = place + 1 == len(orders) or number == last
                step.closes = cache(lambda step=step, over=over: over or self.moved_far(step, supply))
                yield step
                if step.closes():
                    break
            iteration, beta = state["iteration"], state["beta"]

    def orders(self, count: int, seed: int, iteration: int) -> list[np.ndarray]:
        """Positions of each optimizer step's responses: every epoch in another order."""
        rng = np.random.default_rng([seed, iteration, 1])
        parts = min(self.minibatches, count)
        return [part for _ in range(self.epochs) for part in np.array_split(rng.permutation(count), parts)]

    def moved_far(self, step: Step, supply: Supply) -> bool:
        """Whether the step just made took the policy further than target_kl from the one that sampled; all ranks alike."""
        if self.target_kl is None:
            return False
        total, count = step.measured["approx_kl"]
        found = supply.runtime.global_sum({"sum": float(total), "count": float(count)})
        return found["sum"] > self.target_kl * max(found["count"], 1.0)

    def adapted(self, beta: float, kl: float) -> float:
        """β moved towards stage.kl_target nats a response, by a tenth at most (arXiv:1909.08593)."""
        if self.kl_target is None:
            return beta
        return beta * (1 + 0.1 * max(-1.0, min(1.0, kl / self.kl_target - 1)))

    def add_advantages(self, experience: Experience, beta: float) -> None:
        """advantages (and a critic's returns) of every token, from scores, log-probs and values."""
        e, failed = experience, experience.scores.isnan()[:, None]
        in_reward = beta if self.kl_in != "loss" else 0.0
        rewards = shaped_rewards(e.logprobs, e.reference, e.scores.nan_to_num(nan=0.0), e.mask, in_reward)
        if self.advantage == "gae":
            advantages, returns = gae(rewards, e.values, e.mask, self.gamma, self.lam)
            e.put("returns", torch.where(failed, e.values, returns))  # nothing is known of what they were worth
        elif self.advantage == "return":
            advantages = discounted_returns(rewards, e.mask, self.gamma)
        else:
            whole = torch.where(e.scores.isnan(), torch.nan, rewards.sum(1)).view(-1, self.samples)
            form = group_advantages if self.advantage == "group" else leave_one_out_advantages
            advantages = form(whole).flatten()[:, None] * e.mask
        advantages = advantages.masked_fill(failed, 0.0)
        if self.whiten and self.advantage in ("gae", "return"):
            real = advantages[e.mask.bool() & ~failed]
            advantages = whiten(advantages, float(real.mean()), float(real.std(unbiased=False))) * e.mask * ~failed
        e.put("advantages", advantages)
        e.put("kl_weight", e.mask * (beta if self.kl_in != "reward" else 0.0))

    def weights(self) -> dict[str, float]:
        return {"value": self.value_weight, "entropy": self.entropy_weight}

    def counts(self, batch: Batch) -> dict[str, float]:
        steps = float(batch.trained_tokens)
        terms = [
            "policy",
            *(["value"] if self.needs_critic else []),
            *(["kl"] if self.kl_in != "reward" and self.beta else []),
        ]
        return dict.fromkeys([*terms, *(["entropy"] if self.entropy_weight else [])], steps)

    def loss(self, networks: Networks, batch: Batch) -> Loss:
        columns, weight, steps = batch.columns, batch.weight, float(batch.trained_tokens)
        scores = networks.policy(batch, temperature=self.temperature, entropy=self.entropy_weight > 0)
        surrogate, ratio = clipped_surrogate(
            scores.logprobs, columns["logprobs"], columns["advantages"], self.clip, self.dual_clip
        )
        terms = {"policy": surrogate.sum() * weight}
        if self.needs_critic:
            errors = value_loss(scores.values, columns["values"], columns["returns"], self.value_clip)
            terms["value"] = errors.sum() * weight
        if self.kl_in != "reward" and self.beta:
            gap = scores.logprobs - columns["reference"]
            terms["kl"] = (columns["kl_weight"] * 0.5 * gap.square()).sum() * weight
        if self.entropy_weight:
            terms["entropy"] = -scores.entropy.sum() * weight
        with torch.no_grad():
            log_ratio = scores.logprobs - columns["logprobs"]
            outside = ((ratio - 1).abs() > self.clip).double().sum() * weight
            stats = {
                "approx_kl": ((ratio - 1 - log_ratio).double().sum() * weight, steps),
                "clip_fraction": (outside, steps),
                "ratio_deviation": ((ratio - 1).abs().double().sum() * weight, steps),
            }
        return Loss(terms, stats)
