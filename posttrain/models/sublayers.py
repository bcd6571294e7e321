"""Where a decoder's layers compute: their attention and feed-forward sublayers, in whatever architecture.

A place is the module whose output goes to the residual stream (through the layer's own dropout, scale or norm, where it has
them): the sublayer as a whole, be it a mixture; its last projection, where the sublayer adds the residual itself (bloom,
mpt) or is no module (OPT's fc2). Sublayers that run side by side (gpt-neox, falcon, phi; attention beside a state-space
mixer; a mixture beside its shared part) are a place each, before their sum.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import nn

from posttrain.errors import ModelError
from posttrain.models.decoder import text_decoder

Kind = Literal["attention", "ffn"]

FEED_FORWARD = ("mlp", "ffn", "feed_forward", "feedforward", "moe")
MIXING = ("attn", "attention", "mixer", "mamba", "conv", "temporal", "lstm", "deltanet")
"""Words in a sublayer's name or class. What mixes positions without attention (a recurrence) stands in attention's place."""

ELSEWHERE = ("cross", "encoder_attn")


def find_sublayers(network: Any) -> dict[str, Kind]:
    """Full name of each place → its kind, layer by layer; ModelError for a layer in which none is found."""
    names = {module: name for name, module in network.named_modules()}
    found: dict[str, Kind] = {}
    for number, layer in enumerate(_layers(network)):
        places = _places(layer)
        if not places:
            held = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
            raise ModelError(
                f"no attention or feed-forward sublayer is found in layer {number} of the {network.config.model_type} "
                f"architecture, which holds {held}; take adapter=lora"
            )
        found |= {names[module]: kind for module, kind in places.items()}
    return found


def _layers(network: Any) -> list[nn.Module]:
    """The decoder's layers: of its lists of modules, outside of any other, the heaviest."""
    lists = {n: m for n, m in text_decoder(network).named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise ModelError(
            f"the {network.config.model_type} architecture keeps its layers in no list, so their sublayers are not found; "
            "take adapter=lora"
        )
    heaviest: nn.ModuleList = max(outer, key=parameters_in)
    return list(heaviest)


def parameters_in(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _places(layer: nn.Module) -> dict[nn.Module, Kind]:
    found: dict[nn.Module, Kind] = {}
    for name, child in layer.named_children():
        if next(child.children(), None) is None or any(word in name.lower() for word in ELSEWHERE):
            continue  # norms, dropouts and bare projections; attention to another model's states
        if "norm" in type(child).__name__.lower():
            found |= _places(child)  # dbrx keeps the attention, the residual sum and both norms in one module
        elif kind := _kind(name.lower(), type(child).__name__.lower()):
            found[_last_projection(child) if _adds_residual(child) else child] = kind
    projections = [child for child in layer.children() if isinstance(child, nn.Linear)]
    if found and "ffn" not in found.values() and len(projections) > 1:
        found[projections[-1]] = "ffn"
    return found


def _kind(name: str, cls: str) -> Kind | None:
    """A mixture's attention has both words in its class (GraniteMoeAttention), some have an `mlp` named mixer (nemotron_h)."""
    if any(word in name for word in FEED_FORWARD):
        return "ffn"
    if any(word in cls for word in MIXING):
        return "attention"
    if any(word in cls for word in FEED_FORWARD):
        return "ffn"
    return "attention" if any(word in name for word in MIXING) else None


def _adds_residual(module: nn.Module) -> bool:
    return "residual" in inspect.signature(module.forward).parameters


def _last_projection(module: nn.Module) -> nn.Module:
    return [child for child in module.modules() if isinstance(child, nn.Linear)][-1]


def leaves(names: list[str]) -> str:
    """`mlp, self_attn (60 modules)`"""
    last = sorted({name.rpartition(".")[2] for name in names})
    return f"{', '.join(last)} ({len(names)} modules)"
