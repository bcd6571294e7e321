"""That model, tokenizer, data and device fit each other: what would else fail late, or go wrong in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError, ModelError
from posttrain.models.float8 import check_float8, float8_of
from posttrain.models.rope import position_limit
from posttrain.runtime import Runtime

if TYPE_CHECKING:
    from posttrain.config import Config


def check_attention(cfg: Config, runtime: Runtime) -> None:
    """Kernels and products that there are on a GPU alone."""
    check_float8(float8_of(cfg.precision), runtime.device)
    if cfg.model.attention == "flex_attention" and runtime.device.type == "cpu":
        raise ConfigError(
            "model.attention=flex_attention needs a GPU: on a CPU its kernel has no backward pass; leave model.attention=auto"
        )


def check_fits(cfg: Config, policy: Any, tokenizer: Any) -> None:
    """The tokenizer's ids must have embeddings, and examples must fit the positions."""
    check_embeddings(policy, tokenizer)
    check_positions(cfg, policy.network.config)


def check_embeddings(policy: Any, tokenizer: Any) -> None:
    """The tokenizer's ids must have embeddings."""
    rows = policy.network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens but the model has embeddings for {rows:,}; "
            "give the model's own tokenizer (model.tokenizer)"
        )


def check_positions(cfg: Config, config: Any) -> None:
    """Examples must fit the positions the model knows."""
    limit = position_limit(config)
    if limit and cfg.data.max_length > limit:
        raise ConfigError(
            f"data.max_length={cfg.data.max_length}, but the model's positions end at {limit}; "
            f"set data.max_length={limit}, or extend them with model.rope_scaling"
        )
