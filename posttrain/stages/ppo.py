"""KL-regularised policy optimisation (arXiv:1707.06347; for language models 1909.08593): max_π E_π[R] - β KL(π‖π_ref).

One iteration: answer batch.size prompts `samples` times each with π_old, score them, form advantages, then `epochs` times
through `minibatches` optimizer steps on

    -min(o_t Â_t, clip(o_t, 1-ε, 1+ε) Â_t) + c_v (V_t - Ĝ_t)² - c_e H_t (+ β ½ (log π - log π_ref)²),   o = π/π_old

a sum over the step's response tokens divided by their number; kl_estimator=full takes Σ_a π log(π/π_ref) over the vocabulary
in place of half the square. kl_in=reward puts -β (log π_old - log π_ref) on each token's reward instead; both have the tilt
π_ref e^{R/β}/Z as their optimum. Advantages: gae (a critic), group (GRPO), leave_one_out (RLOO), return (REINFORCE);
policy_gradient.py has the equations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from posttrain.data.group import Group
from posttrain.data.loader import Step, compose
from posttrain.data.tokens import Examples
from posttrain.sampling import Sampling
from posttrain.stages.base import Loss, Stage
from posttrain.stages.controls import Controls, with_last
from posttrain.stages.experience import Experience, collect, imagined
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
from posttrain.stages.ppo_options import facts_of, refuse_options

if TYPE_CHECKING:
    from posttrain.data.batches import Batch
    from posttrain.data.tokens import TokenGroup
    from posttrain.models.networks import Networks
    from posttrain.stages.base import Supply

HELD_OUT = 2**32 - 1
"""The number of no iteration."""

__all__ = ["PPO", "clipped_surrogate", "gae", "group_advantages", "leave_one_out_advantages", "shaped_rewards"]


@dataclass
class PPO(Stage):
    """Sampling, rewards, advantages and the clipped objective; see the module's equations."""

    data_formats: ClassVar[tuple[str, ...]] = ("prompts", "prompt_completion")
    streams: ClassVar[bool] = False
    watches: ClassVar[str] = "reward"
    shows: ClassVar[tuple[str, ...]] = ("reward", "kl", "entropy", "response_tokens")

    rewards: list[str] = field(default_factory=lambda: ["number"])
    reward_weights: list[float] | None = None
    reward_seconds: float = field(default=30.0, metadata={"above": 0})
    max_failed_fraction: float = field(default=0.1, metadata={"min": 0, "max": 1})
    normalize_rewards: Literal["none", "running"] = "none"
    reward_clip: float | None = field(default=None, metadata={"above": 0})
    advantage: Literal["gae", "group", "leave_one_out", "return"] = "gae"
    samples: int = field(default=4, metadata={"min": 1})
    temperature: float = field(default=1.0, metadata={"above": 0})
    top_k: int | None = field(default=None, metadata={"min": 1})
    top_p: float = field(default=1.0, metadata={"above": 0, "max": 1})
    max_new_tokens: int = field(default=256, metadata={"min": 1})
    rollout_server: str | None = None
    missing_end_penalty: float = field(default=0.0, metadata={"min": 0})
    epochs: int = field(default=4, metadata={"min": 1})
    minibatches: int = field(default=1, metadata={"min": 1})
    minibatch: Literal["response", "token"] = "response"
    target_kl: float | None = field(default=None, metadata={"above": 0})
    clip: float = field(default=0.2, metadata={"above": 0})
    dual_clip: float | None = field(default=None, metadata={"above": 1})
    beta: float = field(default=0.05, metadata={"min": 0})
    kl_in: Literal["reward", "loss", "both"] = "reward"
    kl_estimator: Literal["k2", "full"] = "k2"
    kl_target: float | None = field(default=None, metadata={"above": 0})
    gamma: float = field(default=1.0, metadata={"above": 0, "max": 1})
    lam: float = field(default=0.95, metadata={"min": 0, "max": 1})
    whiten: bool = True
    value_weight: float = field(default=0.1, metadata={"min": 0})
    critic_warmup: int = field(default=0, metadata={"min": 0})
    value_clip: float | None = field(default=None, metadata={"above": 0})
    entropy_weight: float = field(default=0.0, metadata={"min": 0})

    def check(self) -> None:
        refuse_options(self)

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
    def answers(self) -> int:
        return self.samples

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_in != "reward" and self.beta > 0

    @property
    def updates(self) -> int:
        return self.epochs * self.minibatches

    def facts(self) -> list[tuple[str, str]]:
        return facts_of(self)

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

    def rehearsed(self, groups: list[TokenGroup], layout: str) -> list[TokenGroup]:
        """The first minibatch of an iteration whose answers are all as long as they may be."""
        experience = imagined(groups, self)
        self.add_advantages(experience, experience.scores, self.beta)
        return next(self.minibatches_of(experience, layout, 0, 0))

    def batches(self, networks: Networks, supply: Supply, first: int, last: int) -> Iterator[Step]:
        """Every optimizer step of every iteration; a checkpoint may be made after an iteration's last."""
        controls, number = Controls(**{"beta": self.beta} | supply.state), first
        while number < last:
            iteration = controls.iteration
            prompts = supply.loader.take(iteration)
            sampling = Sampling(self.temperature, self.top_k, self.top_p, seed=supply.seed << 32 | iteration)
            experience = collect(networks, supply, self, prompts, sampling)
            scores = self.shaped_scores(experience, controls)
            self.add_advantages(experience, scores, controls.beta, warming=iteration < self.critic_warmup)
            told, shown = experience.metrics(controls.beta, supply.level), experience.rollouts(controls.iteration)
            controls = replace(controls, iteration=iteration + 1, beta=self.adapted(controls.beta, experience.kl))
            minibatches = self.minibatches_of(experience, supply.packing.layout, supply.seed, iteration)
            rank, world = supply.runtime.rank, supply.runtime.world
            for groups, is_last in with_last(minibatches):
                data = Examples(groups)
                step = compose(number, data, np.arange(len(data)), supply.packing, rank, world)
                number += 1
                step.stream, step.told, told = asdict(controls), told, {}
                step.rollouts = shown
                over = is_last or number == last
                step.closes = cache(lambda step=step, over=over: over or self.moved_far(step, supply))
                yield step
                if step.closes():
                    break

    def held_out(self, networks: Networks, supply: Supply, prompts: list[TokenGroup]) -> list[dict[str, float]]:
        """reward_sampled, and kl, the nats by which the sampled answer has left the reference: what was gained, and its price.
        Drawn with the same random numbers in every evaluation."""
        sampling = Sampling(self.temperature, self.top_k, self.top_p, seed=supply.seed << 32 | HELD_OUT)
        found = collect(networks, supply, replace(self, samples=1), prompts, sampling)
        gaps = (found.logprobs - found.reference).sum(1).tolist()
        metrics = [{"reward_sampled": score} for score in found.scores.tolist()]
        known = networks.frozen is not None
        return [each | {"kl": gap} for each, gap in zip(metrics, gaps, strict=True)] if known else metrics

    def minibatches_of(
        self, experience: Experience, layout: str, seed: int, iteration: int
    ) -> Iterator[list[TokenGroup]]:
        """The Groups of each optimizer step: in every epoch all responses, or all token-steps, in another order."""
        rng = np.random.default_rng([seed, iteration, 1])
        whole, lengths = self.minibatch == "response", [group.trained_tokens for group in experience.groups]
        for _ in range(self.epochs):
            order = rng.permutation(len(lengths) if whole else sum(lengths))
            for part in np.array_split(order, min(self.minibatches, len(order))):
                yield experience.minibatch(part, layout) if whole else experience.token_minibatch(part, layout)

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

    def shaped_scores(self, experience: Experience, controls: Controls) -> Tensor:
        """Scores as they are learned from, [B]: less the penalty of a missing end, over their running deviation, clipped."""
        scores = experience.scores - self.missing_end_penalty * (~experience.finished).double()
        if self.normalize_rewards == "running":
            scores = controls.normalised(scores)
        return scores if self.reward_clip is None else scores.clamp(-self.reward_clip, self.reward_clip)

    def add_advantages(self, experience: Experience, scores: Tensor, beta: float, warming: bool = False) -> None:
        """advantages (and a critic's returns) of every token, from scores [B], log-probs and values.

        warming: the critic alone learns.
        """
        e, failed = experience, scores.isnan()[:, None]
        in_reward = beta if self.kl_in != "loss" else 0.0
        rewards = shaped_rewards(e.logprobs, e.reference, scores.nan_to_num(nan=0.0), e.mask, in_reward)
        if self.advantage == "gae":
            advantages, returns = gae(rewards, e.values, e.mask, self.gamma, self.lam)
            e.put("returns", torch.where(failed, e.values, returns))  # nothing is known of what they were worth
        elif self.advantage == "return":
            advantages = discounted_returns(rewards, e.mask, self.gamma)
        else:
            whole = torch.where(failed[:, 0], torch.nan, rewards.sum(1)).view(-1, self.samples)
            form = group_advantages if self.advantage == "group" else leave_one_out_advantages
            advantages = form(whole).flatten()[:, None] * e.mask
        advantages = advantages.masked_fill(failed, 0.0)
        if self.whiten and self.advantage in ("gae", "return"):
            real = advantages[e.mask.bool() & ~failed] if not failed.all() else torch.zeros(1)
            advantages = whiten(advantages, float(real.mean()), float(real.std(unbiased=False))) * e.mask * ~failed
        learns = 0.0 if warming else 1.0
        e.put("advantages", advantages * learns)
        e.put("kl_weight", e.mask * (beta * learns if self.kl_in_loss else 0.0))
        e.put("learns", e.mask * learns)

    def weights(self) -> dict[str, float]:
        return {"value": self.value_weight, "entropy": self.entropy_weight}

    def counts(self, batch: Batch) -> dict[str, float]:
        terms = ["policy", *(["value"] if self.needs_critic else []), *(["kl"] if self.kl_in_loss else [])]
        return dict.fromkeys([*terms, *(["entropy"] if self.entropy_weight else [])], float(batch.trained_tokens))

    def loss(self, networks: Networks, batch: Batch) -> Loss:
        columns, weight = batch.columns, batch.weight
        full = networks.frozen if self.kl_in_loss and self.kl_estimator == "full" else None
        warming = bool(self.critic_warmup) and not bool(columns["learns"].any())
        scores = networks.policy(
            batch, temperature=self.temperature, entropy=self.entropy_weight > 0, reference=full, values_alone=warming
        )
        logprobs = scores.logprobs if scores.sampled is None else scores.sampled
        surrogate, ratio = clipped_surrogate(logprobs, columns["old"], columns["advantages"], self.clip, self.dual_clip)
        terms = {"policy": surrogate.sum() * weight}
        if self.needs_critic:
            errors = value_loss(scores.values, columns["values"], columns["returns"], self.value_clip)
            terms["value"] = errors.sum() * weight
        if self.kl_in_loss:
            kl = 0.5 * (scores.logprobs - columns["reference"]).square() if full is None else scores.kl
            terms["kl"] = (columns["kl_weight"] * kl).sum() * weight
        if self.entropy_weight:
            terms["entropy"] = -(columns["learns"] * scores.entropy).sum() * weight
        return Loss(terms, *self.watched(ratio.detach(), (logprobs - columns["old"]).detach(), batch))

    def resting(self, networks: Networks, step: Step) -> Iterable[Parameter]:
        """While the critic warms up, everything else."""
        if step.stream["iteration"] > self.critic_warmup:  # it counts iterations that are over when this step is
            return ()
        critic = {*networks.module.critic.parameters()}
        return [parameter for parameter in networks.parameters if parameter not in critic]

    def watched(
        self, ratio: Tensor, log_ratio: Tensor, batch: Batch
    ) -> tuple[dict[str, tuple[Tensor, float]], dict[str, Tensor]]:
        """How far this step's policy is from the one that sampled: means, and the largest ratio."""
        each = {
            "approx_kl": ratio - 1 - log_ratio,
            "clip_fraction": (ratio - 1).abs() > self.clip,
            "ratio_deviation": (ratio - 1).abs(),
        }
        steps = float(batch.trained_tokens)
        means = {name: (values.double().sum() * batch.weight, steps) for name, values in each.items()}
        return means, {"ratio_max": ratio.max() * batch.weight}
