"""LoRA and QLoRA through peft: W = W_0 + (α/r)·B·A with W_0 frozen (arXiv:2106.09685), W_0 in 4-bit NF4 for QLoRA
(arXiv:2305.14314)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from posttrain.errors import ModelError

if TYPE_CHECKING:
    from posttrain.config import AdapterConfig

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels on every machine without a GPU

FUSED = ("query_key_value", "c_attn", "qkv_proj", "Wqkv", "W_pack", "in_proj_qkvz")
NAMES = {
    "qv": ("q_proj", "v_proj", "query", "value", "q_b_proj", "q_lin", "v_lin", "kv_b_proj"),
    "o": ("o_proj", "out_proj", "dense", "c_proj"),
    "k": ("k_proj", "key", "k_lin"),
}


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


def add_adapter(model: PreTrainedModel, adapter: AdapterConfig, seed: int) -> tuple[nn.Module, str]:
    """Freeze the model, put a fresh adapter in (or the trained one at adapter.path); returns it and a line that says what.

    At step 0 a fresh adapter leaves the logits unchanged: B is zero.
    """
    if adapter.name == "qlora":
        assert_quantized(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(seed)
    if adapter.path:
        peft_model: Any = _load(model, adapter.path)
        described = f"{adapter.name} from {adapter.path}"
    else:
        targets = find_targets(model, adapter.targets)
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            use_rslora=adapter.rslora,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        peft_model = get_peft_model(model, config)
        described = f"{adapter.name} rank {adapter.rank}, alpha {adapter.alpha:g} on {_short(targets)}"
        fused = sorted({t.rpartition(".")[2] for t in targets} & set(FUSED))
        if fused:
            described += f" (fused projection {', '.join(fused)} adapted whole)"
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model, described


def find_targets(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Full names of the linear modules that `adapter.targets` means in this architecture; ModelError where none does.

    qv: query and value projections (a fused projection whole); qkvo: also key and output; all-linear: every linear
    layer of the decoder but the output layer; a list: modules whose name ends so.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
    if isinstance(targets, str) and targets not in ("qv", "qkvo", "all-linear"):
        targets = [targets]
    if targets == "all-linear":
        chosen = linear
    elif targets in ("qv", "qkvo"):
        wanted = {*NAMES["qv"], *FUSED} | ({*NAMES["k"], *NAMES["o"]} if targets == "qkvo" else set())
        attention = [name for name in linear if _in_attention(name)]
        chosen = [name for name in attention if name.rpartition(".")[2] in wanted]
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


def _load(model: PreTrainedModel, path: str) -> PeftModel:
    if not (Path(path).expanduser() / "adapter_config.json").is_file():
        raise ModelError(f"adapter.path={path} holds no adapter_config.json; give a directory that peft saved")
    return PeftModel.from_pretrained(model, str(Path(path).expanduser()), is_trainable=True)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Linear4bit", "Conv1D")


def _in_attention(name: str) -> bool:
    parent = name.rpartition(".")[0].lower()
    return any(word in parent.rpartition(".")[2] for word in ("attn", "attention", "mixer", "self"))


def _short(targets: list[str]) -> str:
    return ", ".join(sorted({t.rpartition(".")[2] for t in targets})) + f" ({len(targets)} modules)"


def _no_targets(wanted: list[str], linear: list[str]) -> str:
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    return f"adapter.targets={','.join(wanted)} matches no linear module here; there are: {leaves}"
