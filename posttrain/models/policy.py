"""The wrapped policy: a Batch in, numbers per trained token out. The one log-prob function of every stage.

Everything differentiable happens inside this module's forward, because distributed wrappers hook onto it: calling the
backbone and the output layer apart would escape their gradient synchronisation without an error.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.data.batches import Batch
from posttrain.errors import ModelError
from posttrain.models.logprobs import LogitTransform, TokenStatistics, token_logprobs, token_statistics, weighted_nll
from posttrain.models.router import Router, Routers


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
        self.transform = logit_transform(text_config(network))
        self.accepts_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        self.routers = Routers(self.backbone)
        self.is_mixture = bool(self.routers)

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model itself, adapters inside its modules."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def backbone(self) -> nn.Module:
        """Everything before the output layer."""
        network: Any = self.network
        below: Any = getattr(network, network.base_model_prefix, None)
        below = decoder(network) if below is None else below
        if below is network:
            raise ModelError(
                f"the {network.config.model_type} architecture has no separate decoder below its output layer"
            )
        return below

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
        watched: Any = self.routers.watch() if router else nullcontext([])
        with watched as seen:
            hidden = self.hidden(batch).flatten(0, 1)[batch.predict]  # [N, H]
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
        if seen:
            scores.router = self.routers.balance(seen, batch, text_config(self.network))
        return scores

    def hidden(self, batch: Batch) -> Tensor:
        """The backbone's last states, [R, L, H]. No attention mask: rows are causal and padded on the right, and restarted
        positions make packed rows block-diagonal in the library's own mask (only without a cache and without a mask)."""
        arguments: dict[str, Any] = {"use_cache": False}
        if self.accepts_positions:
            arguments["position_ids"] = batch.position_ids
        elif batch.layout != "padded":
            raise ModelError(f"{self.network.config.model_type} takes no positions; use batch.layout=padded")
        output = self.backbone(input_ids=batch.input_ids, return_dict=True, **arguments)
        return output.last_hidden_state


def decoder(network: Any) -> nn.Module:
    """The text decoder: below the output layer, and beside the towers of a model that also reads images or sound."""
    found = network.get_decoder()
    if found is network and isinstance(getattr(network, "model", None), nn.Module):
        return network.model  # llama4 names it otherwise than its prefix says
    return found


def text_config(network: PreTrainedModel) -> Any:
    """The decoder's own config, where the model also reads images or sound."""
    return network.config.get_text_config(decoder=True)


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
