"""LoRA and QLoRA through peft: W = W_0 + (α/r)·B·A with W_0 frozen (arXiv:2106.09685), W_0 in 4-bit NF4 for QLoRA
(arXiv:2305.14314)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.decoder import text_decoder
from posttrain.models.lineage import is_reward_model
from posttrain.models.router import Routers

if TYPE_CHECKING:
    from posttrain.config import AdapterConfig


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


def quantization(adapter: AdapterConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """NF4 with double quantisation of the block scales for qlora, else None."""
    if adapter.name != "qlora":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def add_adapter(
    model: PreTrainedModel, adapter: AdapterConfig, seed: int, scores: bool = False
) -> tuple[nn.Module, str]:
    """Freeze the model, put a fresh adapter in (or the trained one at adapter.path); returns it and a line that says what.

    At step 0 a fresh adapter leaves the logits unchanged: B is zero. scores: the model has a score layer, which trains
    and is saved with the adapter.
    """
    if adapter.name == "qlora":
        assert_quantized(model)
        _keep_differentiable(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(seed)
    if adapter.path:
        if scores and not is_reward_model(adapter.path):
            raise ModelError(
                f"adapter.path={adapter.path} is of a language model and has no score layer; give it as "
                f"model.path={adapter.path} without adapter.path: it is folded into its base, under a fresh adapter"
            )
        peft_model: Any = _load(model, adapter.path)
        described = f"{adapter.name} from {adapter.path}"
    else:
        targets = find_targets(model, adapter.targets)
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # any number; peft annotates int
            lora_dropout=adapter.dropout,
            use_rslora=adapter.rslora,
            target_modules=targets,
            fan_in_fan_out=all(type(model.get_submodule(target)).__name__ == "Conv1D" for target in targets),
            task_type="SEQ_CLS" if scores else "CAUSAL_LM",
            modules_to_save=["score"] if scores else None,
        )
        try:
            peft_model = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"adapter.targets={adapter.targets}: {error}") from error
        _assert_adapted(peft_model, targets)
        described = f"{adapter.name} rank {adapter.rank}, alpha {adapter.alpha:g} on {_described(model, targets)}"
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model, described


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
        chosen = [name for name in linear if any(name == t or name.endswith(f".{t}") for t in targets)]
        unmatched = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
        if unmatched:
            raise ModelError(_no_targets(unmatched, linear))
    if not chosen:
        raise ModelError(_no_targets([str(targets)], linear))
    return chosen


def assert_quantized(model: nn.Module) -> int:
    """How many 4-bit modules there are; ModelError at none, for then qlora would silently be lora."""
    count = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
    if not count:
        raise ModelError("adapter=qlora, but no module of this model was quantised to 4 bits; use adapter=lora")
    return count


def parameter_count(module: nn.Module) -> int:
    """Parameters as the architecture has them: two of 4 bits share a byte in memory."""
    states = ((p, getattr(p, "quant_state", None)) for p in module.parameters())
    return sum(p.numel() if state is None else state.shape.numel() for p, state in states)


def _keep_differentiable(model: nn.Module) -> None:
    """On processors with AVX512-BF16, bitsandbytes repacks a 4-bit layer at its first evaluation and from then on multiplies
    by a kernel without a backward: gradients stop there, in training too."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # mypy knows modules and tensors only


def _load(model: PreTrainedModel, path: str) -> PeftModel:
    if not (Path(path).expanduser() / "adapter_config.json").is_file():
        raise ModelError(f"adapter.path={path} holds no adapter_config.json; give a directory that peft saved")
    try:
        if model.device.type == "meta":  # its shape alone: the weights come from rank 0
            config = PeftConfig.from_pretrained(str(Path(path).expanduser()), inference_mode=False)
            return get_peft_model(model, config)
        return PeftModel.from_pretrained(model, str(Path(path).expanduser()), is_trainable=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"adapter.path={path} cannot be read: {reason}; give a directory that peft saved") from error


def _assert_adapted(model: Any, targets: list[str]) -> None:
    """The library maps names of its own accord in some families; what it adapted is compared, not trusted."""
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    if adapted != set(targets):
        differ = ", ".join(sorted(adapted ^ set(targets))[:4])
        raise ModelError(f"adapter.targets: peft adapts other modules than those asked for ({differ}); choose others")


def _linear(model: nn.Module) -> list[str]:
    """Names of the decoder's linear modules: not the output layer, an image tower, a router; nor a state-space mixer's
    projections whose weights fused kernels read directly, past any adapter."""
    network = model if isinstance(model, PreTrainedModel) else None
    routers = Routers(model)
    left_out: set[Any] = {network.get_output_embeddings()} if network else set()
    for router, _ in routers.modules:
        left_out |= set(router.modules())
    for module in model.modules():
        if hasattr(module, "A_log") and hasattr(module, "D"):
            left_out |= {getattr(module, name, None) for name in ("out_proj", "dt_proj")}
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


def _described(model: nn.Module, targets: list[str]) -> str:
    leaves = {target.rpartition(".")[2] for target in targets}
    told = f"{', '.join(sorted(leaves))} ({len(targets)} modules)"
    if leaves & FUSED:
        told += f" (fused projection {', '.join(sorted(leaves & FUSED))} adapted whole)"
    if Routers(model) and not any("expert" in target for target in targets):
        told += " (the mixture's feed-forward layers are not adapted)"
    return told


def _no_targets(wanted: list[str], linear: list[str]) -> str:
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    return f"adapter.targets={','.join(wanted)} matches no linear module here; there are: {leaves}"
