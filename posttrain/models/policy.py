"""The wrapped policy: a Batch in, numbers per trained token out. The one log-prob function of every stage.

Everything differentiable happens inside this module's forward, because distributed wrappers hook onto it: calling the
backbone and the output layer apart would escape their gradient synchronisation without an error.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.data.batches import Batch
from posttrain.errors import ModelError
from posttrain.models.logprobs import LogitTransform, TokenStatistics, token_logprobs, token_statistics, weighted_nll
from posttrain.models.router import Router


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


class Policy(nn.Module):
    """A causal language model, possibly inside a peft adapter, that reads Batches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        network = self.network
        self.transform = logit_transform(network.config)
        accepted = inspect.signature(self.backbone.forward).parameters
        self.accepts_positions = "position_ids" in accepted
        self.is_mixture = hasattr(network.config, "router_aux_loss_coef") or "output_router_logits" in accepted

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model itself, adapters inside its modules."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def backbone(self) -> nn.Module:
        """Everything before the output layer."""
        network = self.network
        backbone = getattr(network, network.base_model_prefix, None)
        if backbone is None or backbone is network:
            raise ModelError(
                f"the {network.config.model_type} architecture has no separate decoder below its output layer"
            )
        return backbone

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
        output = self._hidden(batch, router and self.is_mixture)
        hidden = output.last_hidden_state.flatten(0, 1)[batch.predict]  # [N, H]
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
        if router and self.is_mixture and output.get("router_logits"):
            scores.router = Router.of(output.router_logits, batch, self.network.config)
        return scores

    def _hidden(self, batch: Batch, router: bool) -> Any:
        """The backbone's output. No attention mask: rows are causal and padded on the right, and restarted positions make
        packed rows block-diagonal in the library's own mask (only without a cache and without a mask)."""
        arguments: dict[str, Any] = {"use_cache": False}
        if self.accepts_positions:
            arguments["position_ids"] = batch.position_ids
        elif batch.layout != "padded":
            raise ModelError(f"{self.network.config.model_type} takes no positions; use batch.layout=padded")
        if router:
            arguments["output_router_logits"] = True
        return self.backbone(input_ids=batch.input_ids, return_dict=True, **arguments)


def logit_transform(config: Any) -> LogitTransform:
    """What this family does to its logits; what it might do besides is found by the start-up check (probe.py)."""
    scale = float(getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0)
    if getattr(config, "logits_scaling", None):
        divides = config.model_type != "hyperclovax"
        scale = 1.0 / config.logits_scaling if divides else config.logits_scaling
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))
