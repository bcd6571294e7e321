"""The models a run holds, built from `model.*` and `adapter.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from posttrain.models.adapters import add_adapter, quantization
from posttrain.models.load import load_config, load_model
from posttrain.models.policy import Policy

if TYPE_CHECKING:
    from posttrain.config import AdapterConfig, ModelConfig


@dataclass
class Networks:
    """policy: what stages call (wrapped for the ranks). module: the bare Policy inside. tokenizer: its own.

    adapter: a line about it. source_dtype: what the final weights are saved in; None keeps the training dtype.
    """

    policy: Any
    module: Policy
    tokenizer: Any
    adapter: str = "none"
    source_dtype: torch.dtype | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that train."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> None:
        self.policy.train(mode)


def build_policy(
    model: ModelConfig, adapter: AdapterConfig, compute_dtype: torch.dtype, seed: int, checkpointing: bool
) -> tuple[Policy, str]:
    """The policy on the CPU and a line about its adapter.

    Weights that train are fp32 masters; a base frozen under an adapter is held in the compute dtype (model.dtype=auto).
    """
    config = load_config(model)
    frozen = adapter.name != "none"
    dtype = getattr(torch, model.dtype) if model.dtype != "auto" else (compute_dtype if frozen else torch.float32)
    network: Any = load_model(model, config, dtype, seed, quantization(adapter, compute_dtype))
    described = "none"
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    if frozen:
        network, described = add_adapter(network, adapter, seed)
    return Policy(network), described
