"""What a network holds at rest, read off its shapes on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain.companions import is_policy_itself
from posttrain.models.decoder import Decoder
from posttrain.models.load import load_config, load_shape
from posttrain.models.networks import weights_dtype
from posttrain.models.others import other_model, told_of
from posttrain.planning.memory import NF4_BYTES, Held
from posttrain.planning.skeleton import Unmeasurable, layers_of

if TYPE_CHECKING:
    from posttrain.config import Config


def held_by(module: Decoder) -> Held:
    """Of the trained network, a critic of its own included."""
    critic = getattr(module, "critic", None)
    stacks = []
    for decoder in [module, *([critic] if isinstance(critic, Decoder) else [])]:
        try:
            stacks.append(list(layers_of(decoder)))
        except Unmeasurable:
            stacks.append([])
    inside = {p for layers in stacks for layer in layers for p in layer.parameters()}
    outside = [p for p in module.parameters() if p not in inside]
    largest = max(
        (list(layer.parameters()) for layers in stacks for layer in layers),
        key=lambda own: sum(p.numel() for p in own),
        default=[],
    )
    return Held(
        parameters=bytes_of(module.parameters()),
        trained=sum(p.numel() for p in module.parameters() if p.requires_grad),
        beside=sum(p.numel() for p in outside if p.requires_grad),
        layer=sum(p.numel() for p in largest),
        layer_bytes=bytes_of(largest),
        layer_trained=sum(p.numel() for p in largest if p.requires_grad),
        outside=sum(p.numel() for p in outside),
        outside_bytes=bytes_of(outside),
        numbers=sum(p.numel() for p in module.parameters()),
    )


def bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    """In memory; those that will be quantised to 4 bits are still whole in shape."""
    widths = ((p, NF4_BYTES if type(p).__name__ == "Params4bit" else p.element_size()) for p in parameters)
    return round(sum(p.numel() * width for p, width in widths))


def frozen_beside(cfg: Config, module: Decoder, compute_dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """Models that stay on the device beside the trained one: name → bytes.

    Those of model.frozen_device=offload come for each use and are counted; those that compute on the cpu are not.
    """
    found: list[tuple[str, int]] = []
    away = cfg.model.frozen_device == "cpu" and torch.cuda.is_available()
    if cfg.stage.keeps_reference and not is_policy_itself(cfg) and not away:
        own = cfg.model.reference
        shape = _policy(module) if own is None else _other(cfg, own, compute_dtype, "model.reference")
        found.append(("reference", bytes_of(shape.parameters())))
    if cfg.model.reward is not None and not away:
        shape = _other(cfg, cfg.model.reward, compute_dtype, "model.reward", scores=True)
        found.append(("reward model", bytes_of(shape.parameters())))
    return tuple(found)


def _policy(module: Decoder) -> nn.Module:
    """Without its critic: what the reference is a copy of."""
    found: Any = module.model
    return found


def _other(cfg: Config, path: str, compute_dtype: torch.dtype, key: str, scores: bool = False) -> nn.Module:
    model, adapter = other_model(cfg.model, path), replace(cfg.adapter, name="none", path=None)
    with told_of(key), torch.device("meta"):
        shape: nn.Module = load_shape(
            model, load_config(model), weights_dtype(model, adapter, compute_dtype), scores=scores
        )
    return shape
