"""Rotary positions made longer than a model was trained with: `model.rope_scaling`, and how far the positions then reach."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from posttrain.errors import ModelError


def scale_rope(config: PreTrainedConfig, scaling: dict[str, Any]) -> None:
    """rope_scaling = {type, factor, ...} as the library defines them; ntk: θ ← b·s^{d/(d-2)}, no other change."""
    scaling = dict(scaling)
    kind, current = scaling.pop("type", scaling.pop("rope_type", None)), getattr(config, "rope_parameters", None)
    allowed = ("linear", "dynamic", "yarn", "llama3", "longrope", "ntk")
    if kind not in allowed:
        raise ModelError(f"model.rope_scaling.type={kind}; allowed: {', '.join(allowed)}")
    if not current or "rope_theta" not in current:
        raise ModelError(
            f"model.rope_scaling: the {config.model_type} architecture has no single rotary embedding to scale"
        )
    if kind != "longrope" and not isinstance(scaling.get("factor"), int | float):
        raise ModelError(f"model.rope_scaling.type={kind} needs model.rope_scaling.factor, a number such as 4")
    if kind == "ntk":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = int(size * current.get("partial_rotary_factor", 1.0))  # d is what rotates
        theta = float(current["rope_theta"]) * float(scaling["factor"]) ** (size / (size - 2))
        config.rope_parameters = {**current, "rope_theta": theta}
    else:
        if kind in ("yarn", "llama3", "longrope", "dynamic"):
            scaling.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        config.rope_parameters = {**current, **scaling, "rope_type": kind}
    if "factor" in scaling and kind != "dynamic":  # dynamic scales from the length the config names, whatever is longer
        config.max_position_embeddings = int(config.max_position_embeddings * float(scaling["factor"]))


def position_limit(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest example the positions are made for; None where they have no end.

    The library's config names the length before scaling (`dynamic` by definition, yarn in many models' files) or after it.
    """
    known = getattr(config, "max_position_embeddings", None)
    scaling = getattr(config, "rope_parameters", None) or {}
    kind, factor = scaling.get("rope_type"), scaling.get("factor")
    if not known or kind not in ("dynamic", "yarn", "llama3", "longrope") or not isinstance(factor, int | float):
        return known
    original = known if kind == "dynamic" else scaling.get("original_max_position_embeddings") or known
    return max(known, int(original * factor))


def check_rope(config: Any, lengths: np.ndarray, most: int | None = None) -> None:
    """ModelError where the library's positions of one example would depend on the examples beside it and before it.

    lengths: of all examples; of a stream they are not known beforehand, and `most` is what one of its examples may have.
    `dynamic` takes its frequencies from the longest sequence seen, `longrope` one of two sets by the longest of a batch.
    """
    scaling = getattr(config, "rope_parameters", None) or {}
    kind, known = scaling.get("rope_type"), getattr(config, "max_position_embeddings", None)
    if kind not in ("dynamic", "longrope") or not known or not len(lengths):
        return
    original = known if kind == "dynamic" else scaling.get("original_max_position_embeddings") or known
    if max(most or 0, lengths.max()) > original and (kind == "dynamic" or most or lengths.min() <= original):
        longer = f"{int((lengths > original).sum()):,} of {len(lengths):,} examples"
        told = f"a stream's examples may have {most}" if most else longer
        raise ModelError(
            f"rope scaling of type {kind}: beyond {original} tokens ({told}) an example's "
            "positions depend on the examples beside it and before it, and so would every score. Use "
            f"model.rope_scaling.type=yarn, ntk or linear, or data.max_length={original}"
        )
