"""The wrapped policy: a Batch in, numbers per trained token out. The one log-prob function of every stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.data.batches import Batch
from posttrain.errors import ModelError
from posttrain.models.decoder import Decoder, text_config
from posttrain.models.logprobs import LogitTransform, TokenStatistics, token_statistics, weighted_nll
from posttrain.models.router import Router
from posttrain.models.token_logprobs import token_logprobs


@dataclass
class Scores:
    """What one forward gives, each [N] over the batch's trained tokens unless said otherwise.

    objective: Σ w·nll, scalar, where weights were given. logprobs: nats, detached if weights were given.
    statistics: hit, confidence, entropy, where asked for. router: a mixture's load balance, where there is one.
    """

    logprobs: Tensor
    objective: Tensor | None = None
    statistics: TokenStatistics | None = None
    router: Router | None = None


class Policy(Decoder):
    """A causal language model."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.transform = logit_transform(text_config(self.network))

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
    ) -> Scores:
        """Log-probs of the batch's targets; with `weights` [N] also the weighted objective, its gradient formed at once."""
        states, balance = self.states(batch, router)
        hidden = states.flatten(0, 1)[batch.predict]  # [N, H]
        if weights is not None:
            if not batch.weight:
                weights = torch.zeros_like(weights)
            objective, logprobs = weighted_nll(hidden, self.head, batch.targets, weights, self.transform, smoothing)
            scores = Scores(logprobs, objective)
        elif statistics:
            found = token_statistics(hidden, self.head, batch.targets, self.transform, entropy)
            scores = Scores(found.logprob, statistics=found)
        else:
            scores = Scores(token_logprobs(hidden, self.head, batch.targets, self.transform))
        scores.router = balance
        return scores


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
