"""Which linear modules an adapter's targets mean, in whatever architecture."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.bottleneck import Bottleneck
from posttrain.models.decoder import text_decoder
from posttrain.models.router import Routers

FUSED = {
    "query_key_value", "c_attn", "qkv_proj", "Wqkv", "W_pack", "qkv", "in_proj_qkvz", "in_proj_qkv", "kv_proj", "kv_b_proj",
}  # fmt: skip
"""Projections that hold values beside queries or keys: adapted whole."""

NAMES = {
    "qv": {"q_proj", "v_proj", "q_b_proj", "q_lin", "v_lin", "Wq", "Wv", "v_proj_current", "v_proj_delayed", *FUSED},
    "qkvo": {"k_proj", "o_proj", "k_lin", "Wk", "kv_a_proj_with_mqa"},
}
ELSEWHERE_TOO = {
    "qv": {"query", "value", "q", "v", "receptance"},
    "qkvo": {"key", "k", "out_proj", "dense", "c_proj", "output"},
}
"""Names that mean this only inside an attention (or like) module."""

EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""In a mixture peft takes these for its experts' weights, shared experts and dense layers included."""


def find_targets(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Full names of the linear modules that `adapter.targets` means in this architecture; ModelError where none does.

    qv: query and value projections (a fused projection whole); qkvo: also key and output; all-linear: every linear
    layer of the decoder but the output layer; a list: modules whose name ends so.
    """
    linear = _linear(model)
    if isinstance(targets, str) and targets not in ("qv", "qkvo", "all-linear"):
        targets = [targets]
    if targets == "all-linear":
        chosen = linear
    elif targets in ("qv", "qkvo"):
        kinds = ("qv",) if targets == "qv" else ("qv", "qkvo")
        wanted, only_inside = ({name for kind in kinds for name in sets[kind]} for sets in (NAMES, ELSEWHERE_TOO))
        leaves = {name: name.rpartition(".")[2] for name in linear}
        chosen = [n for n, leaf in leaves.items() if leaf in wanted or (leaf in only_inside and _in_attention(n))]
    else:
        chosen = [name for name in linear if any(named_by(name, t) for t in targets)]
        unmatched = [t for t in targets if not any(named_by(name, t) for name in linear)]
        if unmatched:
            raise ModelError(_no_targets(unmatched, linear))
    if not chosen:
        raise ModelError(_no_targets([str(targets)], linear))
    return chosen


def named_by(module: str, name: str) -> bool:
    """Whether a module's full name is, or ends with, what was asked for."""
    return module == name or module.endswith(f".{name}")


def _linear(model: nn.Module) -> list[str]:
    """Names of the decoder's linear modules: not the output layer, an image tower, a router; nor a state-space mixer's
    projections whose weights fused kernels read directly, past any adapter; nor a bottleneck adapter below, or a projection
    that holds one: merged into that, an update would come before the adapter and not beside it."""
    network = model if isinstance(model, PreTrainedModel) else None
    routers = Routers(model)
    left_out: set[Any] = {network.get_output_embeddings()} if network else set()
    for router, _ in routers.modules:
        left_out |= set(router.modules())
    for module in model.modules():
        if hasattr(module, "A_log") and hasattr(module, "D"):
            left_out |= {getattr(module, name, None) for name in ("out_proj", "dt_proj")}
        if isinstance(module, Bottleneck):
            left_out |= set(module.modules())
        if any(isinstance(child, Bottleneck) for child in module.children()):
            left_out.add(module)
    kept = set(text_decoder(network).modules()) if network else set(model.modules())
    names = [n for n, m in model.named_modules() if _is_linear(m) and m in kept and m not in left_out]
    return [n for n in names if not (routers and n.rpartition(".")[2] in EXPERT_NAMES)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Linear4bit", "Conv1D")


def _in_attention(name: str) -> bool:
    parent = name.rpartition(".")[0].lower()
    return any(
        word in parent.rpartition(".")[2] for word in ("attn", "attention", "mixer", "self", "mlstm", "temporal")
    )


def _no_targets(wanted: list[str], linear: list[str]) -> str:
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    return f"adapter.targets={','.join(wanted)} matches no linear module here; there are: {leaves}"
