"""The models a run holds, built from `model.*` and `adapter.*`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from posttrain.errors import ModelError
from posttrain.models.adapters import add_adapter, quantization
from posttrain.models.decoder import Decoder, text_decoder
from posttrain.models.float8 import Float8, convert
from posttrain.models.lineage import SHARDS, nonlinear, resolve_path
from posttrain.models.load import load_config, load_model, load_shape
from posttrain.models.others import other_model, told_of
from posttrain.models.policy import Policy, ValueModel, value_head
from posttrain.models.reward import POOLING_KEY, Pooling, RewardModel

if TYPE_CHECKING:
    from posttrain.config import AdapterConfig, ModelConfig

CRITIC, CRITIC_HEAD = "critic", "value_head.safetensors"
"""Beside a policy's weights, in a folder where no other tool takes it for some of them: a critic that is a model of its own, or
the value head on the policy."""


@dataclass(frozen=True)
class Head:
    """What a reward model has in place of the output layer; see models/reward.py."""

    pooling: Pooling
    ends: frozenset[int]


@dataclass
class Networks:
    """policy: what stages call (wrapped for the ranks). module: the bare one inside, a Policy or a RewardModel.
    tokenizer: its own.

    adapter: a line about it. source_dtype: what the final weights are saved in; None keeps the training dtype. frozen: a
    context that gives the reference, a Policy that does not train, where a stage that samples keeps one.
    """

    policy: Any
    module: Any
    tokenizer: Any
    adapter: str = "none"
    source_dtype: torch.dtype | None = None
    frozen: Callable[[], AbstractContextManager[Any]] | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that train."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> None:
        self.policy.train(mode)


def build_network(
    model: ModelConfig,
    adapter: AdapterConfig,
    compute_dtype: torch.dtype,
    seed: int,
    checkpointing: bool = False,
    head: Head | None = None,
    critic: bool = False,
    float8: Float8 | None = None,
    shape_only: bool = False,
) -> tuple[Decoder, str]:
    """The network on the CPU and a line about its adapter: a policy (with `critic` also a critic), or with `head` a reward
    model.

    Weights that train are fp32 masters; a base frozen under an adapter is held in the compute dtype (model.dtype=auto).
    float8: what its linear modules (a critic's of its own, too) multiply in under autocast, where that is not bf16.
    shape_only: no weights are read; they come from rank 0 (sharding.py).
    """
    with torch.device("meta") if shape_only else nullcontext():
        return _build(model, adapter, compute_dtype, seed, checkpointing, head, critic, float8, shape_only)


def _build(
    model: ModelConfig,
    adapter: AdapterConfig,
    compute_dtype: torch.dtype,
    seed: int,
    checkpointing: bool,
    head: Head | None,
    critic: bool,
    float8: Float8 | None,
    shape_only: bool,
) -> tuple[Decoder, str]:
    config = load_config(model)
    if head is not None:
        _check_pooling(config, model, adapter, head)
    dtype, quantized = weights_dtype(model, adapter, compute_dtype), quantization(adapter, compute_dtype)
    network = _network(model, config, dtype, seed, quantized, head is not None, shape_only)
    if checkpointing:
        _recompute_activations(network)
    decoder, described = _assembled(network, adapter, seed, head, float8)
    if critic and isinstance(decoder, Policy):
        if model.critic is None:
            decoder.critic = head_on(decoder, adapter.path or model.path)
        else:
            decoder.critic = load_critic(model, seed, checkpointing, shape_only)
            if float8 is not None:
                decoder.critic.float8 = convert(decoder.critic, float8, adapted=False)
    return decoder, described


def read_by_all(model: ModelConfig, adapter: AdapterConfig) -> bool:
    """Whether the network's shape is not known before its weights are read: it is quantised as it is, or has adapters in place
    that no config of it tells of."""
    return adapter.name == "qlora" or bool(nonlinear(model.path))


def weights_dtype(model: ModelConfig, adapter: AdapterConfig, compute_dtype: torch.dtype) -> torch.dtype:
    """What the model's own weights are held in."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    return compute_dtype if adapter.name != "none" else torch.float32


def _assembled(
    network: Any, adapter: AdapterConfig, seed: int, head: Head | None, float8: Float8 | None
) -> tuple[Decoder, str]:
    """The network with its adapter, as a policy or with `head` as a reward model."""
    described = "none"
    _freeze_towers(network)
    if adapter.name != "none":
        network, described = add_adapter(network, adapter, seed, scores=head is not None)
    decoder: Decoder = Policy(network) if head is None else RewardModel(network, head.pooling, head.ends)
    if float8 is not None:
        decoder.float8 = convert(decoder, float8, adapted=adapter.name != "none")
    return decoder, described


def head_on(policy: Policy, directory: str | None) -> torch.nn.Linear:
    """The value head that was saved beside these weights; where there is none it begins at 0."""
    head = value_head(policy)
    path = Path(resolve_path(directory) if directory else "") / CRITIC / CRITIC_HEAD
    if directory and path.is_file() and not head.weight.is_meta:
        head.load_state_dict(load_file(path))
    return head


def _network(
    model: ModelConfig, config: Any, dtype: torch.dtype, seed: int, quantization: Any, scores: bool, shape_only: bool
) -> Any:
    if not shape_only:
        return load_model(model, config, dtype, seed, quantization, scores)
    return load_shape(model, config, dtype, quantization, scores)


def load_critic(model: ModelConfig, seed: int, checkpointing: bool, shape_only: bool = False) -> ValueModel:
    """The model at model.critic in fp32: a reward model with its score layer, any other with one that begins at 0."""
    with told_of("model.critic"):
        own = other_model(model, model.critic)
        if (
            Path(resolve_path(own.path)).parent.parent / SHARDS
        ).is_dir():  # CHECKPOINT/model/critic: read with the policy
            own = replace(own, init="config")
        network: Any = _network(own, load_config(own), torch.float32, seed, None, True, shape_only)
        _freeze_towers(network)
        if checkpointing:
            _recompute_activations(network)
        return ValueModel(network)


def _recompute_activations(network: Any) -> None:
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"the {network.config.model_type} architecture cannot recompute activations; set "
            "train.gradient_checkpointing=false"
        ) from error


def _check_pooling(config: Any, model: ModelConfig, adapter: AdapterConfig, head: Head) -> None:
    """A reward model must go on pooling as it was trained."""
    trained = getattr(config, POOLING_KEY, None)
    beside = Path(adapter.path or "").expanduser() / "posttrain.json"
    if adapter.path and beside.is_file():
        trained = json.loads(beside.read_text(encoding="utf-8")).get(POOLING_KEY)
    if trained not in (None, head.pooling):
        raise ModelError(
            f"{adapter.path or model.path} was trained with stage.pooling={trained}, not {head.pooling}: its scores would mean "
            f"nothing; set stage.pooling={trained}"
        )


def _freeze_towers(network: Any) -> None:
    """A model that also reads images or sound: text never reaches those parts, so they neither train nor decay."""
    reached = {*text_decoder(network).parameters(), *network.get_input_embeddings().parameters()}
    head = network.get_output_embeddings() or getattr(network, "score", None)
    reached |= set(head.parameters()) if head is not None else set()
    for parameter in network.parameters():
        if parameter not in reached:
            parameter.requires_grad_(False)
