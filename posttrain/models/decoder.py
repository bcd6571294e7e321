"""A transformers decoder that reads Batches: the hidden states that every stage's numbers are made of.

Everything differentiable happens inside a wrapped module's forward, because distributed wrappers hook onto it: calling the
backbone and a head apart would escape their gradient synchronisation without an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.data.batches import Batch
from posttrain.errors import ModelError
from posttrain.models.router import Router, Routers
from posttrain.models.shared_attention import shared_mask


class Decoder(nn.Module):
    """A transformers model, possibly inside a peft adapter; subclasses put a head on its last states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.accepts_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        self.routers = Routers(self.backbone)
        self.is_mixture = bool(self.routers)
        self.gathered_in: torch.dtype | None = None  # where its weights lie in parts on the ranks (sharding.py)
        self.gather_all: Callable[[], AbstractContextManager[None]] | None = None  # where ZeRO 3 has them in parts
        self.float8 = ""  # what precision=fp8 made of its linear modules, in a line

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model itself, adapters inside its modules."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def backbone(self) -> nn.Module:
        """Everything before the output layer."""
        network: Any = self.network
        below: Any = getattr(network, network.base_model_prefix, None)
        below = text_decoder(network) if below is None else below
        if below is network:
            raise ModelError(
                f"the {network.config.model_type} architecture has no separate decoder below its output layer"
            )
        return below

    @contextmanager
    def without_float8(self) -> Iterator[None]:
        """Its linear modules multiply as they would without precision=fp8."""
        converted: list[Any] = [module for module in self.modules() if hasattr(module, "in_float8")]
        for module in converted:
            module.in_float8 = False
        try:
            yield
        finally:
            for module in converted:
                module.in_float8 = True

    @property
    def computes_in(self) -> torch.dtype:
        """The dtype of its weights in a forward pass without autocast."""
        return self.gathered_in or next(self.backbone.parameters()).dtype

    def read(self, batch: Batch) -> Tensor:
        """`hidden`, asked from outside of a forward pass."""
        return self.hidden(batch)

    def own_logits(self, input_ids: Tensor) -> Tensor:
        """The model's own logits of rows that need no padding: [R, L, V], or [R, 1] scores."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def states(self, batch: Batch, router: bool = False) -> tuple[Tensor, Router | None]:
        """The last states [R, L, H]; with `router` also a mixture's load balance, None where it is no mixture."""
        if not router:
            return self.hidden(batch), None
        with self.routers.watch() as seen:
            hidden = self.hidden(batch)
        return hidden, self.routers.balance(seen, batch, text_config(self.network)) if seen else None

    def hidden(self, batch: Batch) -> Tensor:
        """The backbone's last states, [R, L, H].

        padded, packed: no attention mask, for rows are causal and padded on the right, and restarted positions make packed
        rows block-diagonal in the library's own mask (only without a cache and without a mask). shared: our mask.
        """
        arguments: dict[str, Any] = {"use_cache": False}
        if self.accepts_positions:
            arguments["position_ids"] = batch.position_ids
        elif batch.layout != "padded":
            raise ModelError(f"{self.network.config.model_type} takes no positions; use batch.layout=padded")
        if batch.layout == "shared":
            arguments["attention_mask"] = shared_mask(batch, attention_of(self.network))
        output = self.backbone(input_ids=batch.input_ids, return_dict=True, **arguments)
        return output.last_hidden_state


def attention_of(network: Any) -> str:
    """The attention kernel the library chose for this model."""
    return str(getattr(text_config(network), "_attn_implementation", None) or "eager")


def text_decoder(network: Any) -> nn.Module:
    """The text decoder: below the output layer, and beside the towers of a model that also reads images or sound."""
    found = network.get_decoder()
    if found is network and isinstance(getattr(network, "model", None), nn.Module):
        return network.model  # llama4 names it otherwise than its prefix says
    return found


def text_config(network: PreTrainedModel) -> Any:
    """The decoder's own config, where the model also reads images or sound."""
    return network.config.get_text_config(decoder=True)
