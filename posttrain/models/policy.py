"""The wrapped policy: a Batch in, numbers per trained token out. The one log-prob function of every stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.data.batches import Batch
from posttrain.errors import ModelError
from posttrain.models.decoder import Decoder, text_config
from posttrain.models.logprobs import LogitTransform, TokenStatistics, token_statistics, weighted_nll
from posttrain.models.router import Router
from posttrain.models.token_logprobs import token_entropies, token_logprobs


@dataclass
class Scores:
    """What one forward gives, each [N] over the batch's trained tokens unless said otherwise.

    objective: Σ w·nll, scalar, where weights were given. logprobs: nats, detached if weights were given.
    statistics: hit, confidence, entropy, where asked for. router: a mixture's load balance, where there is one.
    values: the critic's, fp32, of the state before each target; None without a critic.
    """

    logprobs: Tensor
    objective: Tensor | None = None
    statistics: TokenStatistics | None = None
    router: Router | None = None
    values: Tensor | None = None
    entropy: Tensor | None = None


class Policy(Decoder):
    """A causal language model; with `critic` also V(s), a linear layer on the last states that begins at 0."""

    def __init__(self, model: Any, critic: bool = False) -> None:
        super().__init__(model)
        self.transform = logit_transform(text_config(self.network))
        self.critic: nn.Linear | None = None
        if critic:
            self.critic = nn.Linear(text_config(self.network).hidden_size, 1, dtype=torch.float32)
            nn.init.zeros_(self.critic.weight)
            nn.init.zeros_(self.critic.bias)

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
    ) -> Scores:
        """Log-probs of the batch's targets; with `weights` [N] also the weighted objective, its gradient formed at once.

        temperature: of the distribution that log-probs and statistics are of. entropy: of the statistics, or beside
        differentiable log-probs differentiable too.
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
            found = token_statistics(hidden, self.head, batch.targets, transform, entropy)
            scores = Scores(found.logprob, statistics=found)
        else:
            scores = Scores(token_logprobs(hidden, self.head, batch.targets, transform))
            if entropy:
                scores.entropy = token_entropies(hidden, self.head, transform)
        scores.router = balance
        if self.critic is not None:
            scores.values = self.values(hidden)
        return scores

    def values(self, hidden: Tensor) -> Tensor:
        """V of each state [N, H], [N] fp32: in 8 bits of mantissa its differences would be lost."""
        assert self.critic is not None
        with torch.autocast(hidden.device.type, enabled=False):
            return self.critic(hidden.float()).squeeze(-1)


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
