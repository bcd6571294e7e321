"""The wrapped policy: a Batch in, numbers per trained token out. The one log-prob function of every stage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.data.batches import Batch
from posttrain.errors import ModelError
from posttrain.models.decoder import Decoder, text_config
from posttrain.models.logprobs import LogitTransform, weighted_nll
from posttrain.models.router import Router
from posttrain.models.token_logprobs import token_entropies, token_kl, token_logprobs
from posttrain.models.token_statistics import TokenStatistics, token_statistics


@dataclass
class Scores:
    """What one forward gives, each [N] over the batch's trained tokens unless said otherwise.

    objective: Σ w·nll, scalar, where weights were given. logprobs: nats, detached if weights were given.
    statistics: hit, confidence, entropy, where asked for. router: a mixture's load balance, where there is one.
    values: the critic's, fp32, of the state before each target; None without a critic. kl: to a reference, over the vocabulary.
    sampled: log-probs among the tokens that sampling left to draw from (Batch.kept), where it left some out.
    """

    logprobs: Tensor
    objective: Tensor | None = None
    statistics: TokenStatistics | None = None
    router: Router | None = None
    values: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    sampled: Tensor | None = None


class Policy(Decoder):
    """A causal language model; with a critic also V(s), from a linear layer on its last states or from a model of its own."""

    def __init__(self, model: Any, critic: nn.Linear | ValueModel | None = None) -> None:
        super().__init__(model)
        self.transform = logit_transform(text_config(self.network))
        self.critic: nn.Linear | ValueModel | None = critic

    @property
    def head(self) -> nn.Module:
        """The output layer."""
        head = self.network.get_output_embeddings()
        if head is None:
            raise ModelError(f"the {self.network.config.model_type} architecture has no output layer to train on")
        return head

    def forward(
        self,
        batch: Batch,
        weights: Tensor | None = None,
        smoothing: float = 0.0,
        statistics: bool = False,
        entropy: bool = False,
        router: bool = False,
        temperature: float = 1.0,
        reference: Callable[[], AbstractContextManager[Policy]] | None = None,
        values_alone: bool = False,
        bare: bool = False,
        fitted: Tensor | None = None,
    ) -> Scores:
        """Log-probs of the batch's targets; with `weights` [N] also the weighted objective, its gradient formed at once.

        temperature: of the distribution that log-probs and statistics are of. entropy: of the statistics, or beside
        differentiable log-probs differentiable too. reference: asks for the KL to the policy that it gives. values_alone: the
        critic's gradient ends at the states that it reads. bare: neither values nor `sampled`, as of a reference.
        fitted: [M] the targets whose statistics have what a temperature is fitted to.
        """
        transform = self.transform if temperature == 1 else replace(self.transform, temperature=temperature)
        states, balance = self.states(batch, router)
        hidden = states.flatten(0, 1)[batch.predict]  # [N, H]
        if weights is not None:
            if not batch.weight:
                weights = torch.zeros_like(weights)
            objective, logprobs = weighted_nll(hidden, self.head, batch.targets, weights, transform, smoothing)
            scores = Scores(logprobs, objective)
        elif statistics:
            found = token_statistics(hidden, self.head, batch.targets, transform, entropy, fitted)
            scores = Scores(found.logprob, statistics=found)
        else:
            scores = Scores(token_logprobs(hidden, self.head, batch.targets, transform))
            if entropy:
                scores.entropy = token_entropies(hidden, self.head, transform)
            if reference is not None:
                with torch.no_grad(), reference() as other:
                    read = (
                        other.hidden if other is self else other.read
                    )  # itself without its adapter: inside its forward
                    there = read(batch).flatten(0, 1)[batch.predict]
                scores.kl = token_kl(hidden, there, self, reference, temperature)
        if batch.kept is not None and not bare:
            scores.sampled = token_logprobs(hidden, self.head, batch.targets, transform, batch.kept)
        scores.router = balance
        if self.critic is not None and not bare:
            scores.values = self.values(batch, hidden.detach() if values_alone else hidden)
        return scores

    def values(self, batch: Batch, hidden: Tensor) -> Tensor:
        """V of each target's state, [N] fp32: in 8 bits of mantissa its differences would be lost. hidden: [N, H]"""
        if isinstance(self.critic, ValueModel):
            found: Tensor = self.critic(batch)
            return found
        assert isinstance(self.critic, nn.Linear)
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.critic(hidden.float()).sum(-1)  # of one: a view would warn under fsdp
        return values


class ValueModel(Decoder):
    """A critic of its own: a model with a score layer, read at the state before each target."""

    def forward(self, batch: Batch) -> Tensor:
        """V, [N] fp32."""
        hidden = self.hidden(batch).flatten(0, 1)[batch.predict]
        with torch.autocast(hidden.device.type, enabled=False):
            score: Any = self.network.score
            values: Tensor = score(hidden.float()).sum(-1)
        return values


def value_head(policy: Policy) -> nn.Linear:
    """V(s) on the policy's own last states, 0 at first."""
    head = nn.Linear(text_config(policy.network).hidden_size, 1, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def logit_transform(config: Any) -> LogitTransform:
    """What this family does to its logits; what it might do besides is found by the start-up check (probe.py)."""
    scale = _number(config, "logit_scale", "lm_head_multiplier") or 1.0
    divisor = _number(config, "logits_scaling", "logits_mup_width_multiplier")
    if divisor:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    cap = _number(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return LogitTransform(scale, cap)


def _number(config: Any, *names: str) -> float | None:
    """The first of these that the config sets to a number."""
    found = [getattr(config, name, None) for name in names]
    return next((float(value) for value in found if isinstance(value, int | float)), None)
