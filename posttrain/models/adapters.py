"""Adapters beside frozen weights, fresh or trained, through peft.

LoRA: W = W_0 + (α/r)·B·A (arXiv:2106.09685), α/√r with rslora (arXiv:2312.03732). QLoRA: W_0 in 4-bit NF4 (arXiv:2305.14314).
DoRA: W = m·V/‖V‖ with V = W_0 + (α/r)·B·A, m begins as W_0's norms by output (arXiv:2402.09353). Bottleneck: bottleneck.py.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.bottleneck import fresh_bottleneck
from posttrain.models.lineage import NONLINEAR, is_reward_model
from posttrain.models.router import Routers
from posttrain.models.sharding import numbers
from posttrain.models.sublayers import leaves
from posttrain.models.targets import FUSED, find_targets, named_by

if TYPE_CHECKING:
    from posttrain.config import AdapterConfig


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

    At step 0 a fresh adapter leaves the logits unchanged: B, or W_up, is zero. scores: the model has a score layer, which
    trains and is saved with the adapter.
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
        peft_model: Any = _load(model, adapter)
        described = f"{adapter.name} from {adapter.path}"
    else:
        task = "SEQ_CLS" if scores else "CAUSAL_LM"
        peft_model, described = (
            fresh_bottleneck(model, adapter, task, parameter_count(model))
            if adapter.name == "bottleneck"
            else _fresh_lora(model, adapter, task)
        )
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if adapter.name != "bottleneck" and adapter.dora and not adapter.path:
        _exact_magnitudes(peft_model)
    settings = peft_model.peft_config["default"]
    base = settings.base_model_name_or_path
    if base and Path(base).is_dir():  # it is read from other working directories, too
        settings.base_model_name_or_path = os.path.abspath(base)
    return peft_model, described


def _fresh_lora(model: PreTrainedModel, adapter: AdapterConfig, task: str) -> tuple[PeftModel, str]:
    targets = find_targets(model, adapter.targets)
    own = {key: _pattern(key, getattr(adapter, key), targets) for key in ("ranks", "alphas")}
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # any number; peft annotates int
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        rank_pattern=own["ranks"],
        alpha_pattern=own["alphas"],
        target_modules=targets,
        fan_in_fan_out=all(type(model.get_submodule(target)).__name__ == "Conv1D" for target in targets),
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    try:
        peft_model: Any = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"adapter.targets={adapter.targets}: {error}") from error
    _assert_adapted(peft_model, targets, adapter.dora)
    ranks, alphas = (_several(getattr(adapter, key)) for key in ("ranks", "alphas"))
    kinds = "".join(f", {kind}" for kind, chosen in (("rsLoRA", adapter.rslora), ("DoRA", adapter.dora)) if chosen)
    told = f"{adapter.name} rank {adapter.rank}{ranks}, alpha {adapter.alpha:g}{alphas}{kinds}"
    return peft_model, f"{told} on {_described(model, targets)}"


def _pattern(key: str, values: dict[str, Any], targets: list[str]) -> dict[str, Any]:
    """adapter.ranks or adapter.alphas as peft's patterns; ModelError for a name that no adapted module has."""
    for name in values:
        if not any(named_by(target, name) for target in targets):
            raise ModelError(f"adapter.{key}.{name} matches no adapted module; adapted are: {leaves(targets)}")
    return {re.escape(name): value for name, value in values.items()}


def _exact_magnitudes(model: nn.Module) -> None:
    """m as the forward pass computes the norms, in fp32: peft takes it in the weights' dtype, and the rounding of bf16 would
    change the logits at step 0."""
    for module in model.modules():
        if hasattr(module, "lora_magnitude_vector") and "default" in module.lora_magnitude_vector:  # type: ignore[operator]
            layer: Any = module
            dora, weight = (
                layer.lora_magnitude_vector["default"],
                dequantize_module_weight(layer.get_base_layer()).float(),
            )
            update = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).to(weight.device)
            dora.weight.data = dora.get_weight_norm(weight, update, layer.scaling["default"]).detach()


def assert_quantized(model: nn.Module) -> int:
    """How many 4-bit modules there are; ModelError at none, for then qlora would silently be lora."""
    count = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
    if not count:
        raise ModelError("adapter=qlora, but no module of this model was quantised to 4 bits; use adapter=lora")
    return count


def parameter_count(module: nn.Module) -> int:
    """Parameters as the architecture has them: two of 4 bits share a byte in memory."""
    states = ((p, getattr(p, "quant_state", None)) for p in module.parameters())
    return sum(numbers(p) if state is None else state.shape.numel() for p, state in states)


def _keep_differentiable(model: nn.Module) -> None:
    """On processors with AVX512-BF16, bitsandbytes repacks a 4-bit layer at its first evaluation and from then on multiplies
    by a kernel without a backward: gradients stop there, in training too."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # mypy knows modules and tensors only


def _load(model: PreTrainedModel, adapter: AdapterConfig) -> PeftModel:
    path = Path(str(adapter.path)).expanduser()
    if not (path / "adapter_config.json").is_file():
        raise ModelError(f"adapter.path={adapter.path} holds no adapter_config.json; give a directory that peft saved")
    try:
        kind = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"adapter.path={adapter.path} cannot be read: {error}; give a directory that peft saved"
        ) from error
    if (kind == NONLINEAR) != (adapter.name == "bottleneck"):
        fitting = "bottleneck" if kind == NONLINEAR else "lora (or qlora)"
        raise ModelError(
            f"adapter.path={adapter.path} is a {kind} adapter, but adapter={adapter.name}; set adapter={fitting}"
        )
    try:
        if model.device.type == "meta":  # its shape alone: the weights come from rank 0
            config = PeftConfig.from_pretrained(str(path))
            config.inference_mode = False  # peft saves true, and the file beats a keyword
            return get_peft_model(model, config)
        return PeftModel.from_pretrained(model, str(path), is_trainable=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"adapter.path={adapter.path} cannot be read: {reason}; give a directory that peft saved"
        ) from error


def _assert_adapted(model: Any, targets: list[str], dora: bool) -> None:
    """The library maps names of its own accord in some families; what it adapted is compared, not trusted."""
    adapted = {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    if adapted.keys() != set(targets):
        differ = ", ".join(sorted(adapted.keys() ^ set(targets))[:4])
        raise ModelError(f"adapter.targets: peft adapts other modules than those asked for ({differ}); choose others")
    plain = [name for name, module in adapted.items() if dora != ("default" in module.lora_magnitude_vector)]
    if plain:
        raise ModelError(f"adapter.dora={str(dora).lower()}, but peft made it otherwise in {', '.join(plain[:4])}")


def _described(model: nn.Module, targets: list[str]) -> str:
    told = leaves(targets)
    if fused := FUSED & {target.rpartition(".")[2] for target in targets}:
        told += f" (fused projection {', '.join(sorted(fused))} adapted whole)"
    if Routers(model) and not any("expert" in target for target in targets):
        told += " (the mixture's feed-forward layers are not adapted)"
    return told


def _several(values: dict[str, Any]) -> str:
    """` (q_proj 8, v_proj 32)` behind the value of all others."""
    return f" ({', '.join(f'{name} {value:g}' for name, value in values.items())})" if values else ""
