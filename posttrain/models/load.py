"""From `model.*` to a tokenizer, a config and a causal language model; what cannot be is refused by name (refusals.py)."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from posttrain.errors import ModelError
from posttrain.models.lineage import fold, lineage, refuse_parts, resolve_path
from posttrain.models.refusals import (
    cannot_read,
    refuse_folding_into_4bit,
    refuse_other_architectures,
    refuse_scores,
    refuse_unfit,
    refuse_unscored,
)
from posttrain.models.reward import zero_score
from posttrain.models.rope import scale_rope

if TYPE_CHECKING:
    from posttrain.config import ModelConfig


def load_config(model: ModelConfig) -> PreTrainedConfig:
    """The architecture, with `model.config.*`, rope_scaling and dropout applied; refuses what is no causal decoder.

    An adapter's is that of the model below it.
    """
    path = resolve_path(model.path)
    base, adapters = lineage(path)
    try:
        config = AutoConfig.from_pretrained(base, **_source(model))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(cannot_read(model, "config", error)) from error
    if adapters and (beside := Path(path) / "posttrain.json").is_file():  # how a reward model pools
        vars(config).update(json.loads(beside.read_text(encoding="utf-8")))
    refuse_other_architectures(config, model)
    _override(config, dict(model.config or {}))
    if model.rope_scaling:
        scale_rope(config, model.rope_scaling)
    if model.dropout != "keep":
        for part in (config, config.get_text_config(decoder=True)):
            for name, value in vars(part).items():
                if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
                    setattr(part, name, 0.0)
    return config


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer, with `model.chat_template` (a file or the template itself) in place of its own."""
    path = resolve_path(model.tokenizer or model.path)
    if not (Path(path) / "tokenizer_config.json").is_file():
        path = lineage(path)[0]  # others save adapters without it
    source = _source(model) if not model.tokenizer else {"trust_remote_code": model.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
    except Exception as error:  # the library raises a dozen kinds here, all of them meaning "no usable tokenizer"
        raise ModelError(cannot_read(model, "tokenizer", error)) from error
    if model.chat_template:
        file = Path(model.chat_template).expanduser()
        is_file = len(model.chat_template) < 4096 and "{" not in model.chat_template
        if is_file and not file.is_file():
            raise ModelError(f"model.chat_template={model.chat_template} is neither a file nor a Jinja template")
        tokenizer.chat_template = file.read_text(encoding="utf-8") if is_file else model.chat_template
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {model.path} has no end-of-text token; set eos_token in its config")
    return tokenizer


def load_model(
    model: ModelConfig,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    seed: int,
    quantization: Any = None,
    scores: bool = False,
) -> Any:
    """Weights in `dtype` on the CPU (or quantised), or random ones from the config for model.init=config.

    scores: with a score layer (zero, if the weights have none) in place of the output layer: a reward model. Where model.path
    is an adapter, it is folded into the weights of its base (a bottleneck adapter is put in place, frozen).
    """
    if scores:
        _prepare_scores(config, model)
    else:
        refuse_scores(model)
    attention = _attention(model)
    if model.init == "config":
        torch.manual_seed(seed)
        network = _auto(scores).from_config(config, dtype=dtype, **attention, **_remote(model))
        if scores:
            zero_score(network)
    else:
        network = _load_weights(model, config, dtype, attention, quantization, scores)
    if not quantization:
        _own_memory(network)
    return network


def load_shape(
    model: ModelConfig, config: PreTrainedConfig, dtype: torch.dtype, quantization: Any = None, scores: bool = False
) -> Any:
    """What load_model gives, without its numbers, under torch.device("meta"): for a plan, and for ranks whose weights come from
    rank 0."""
    if scores:
        _prepare_scores(config, model)
    else:
        refuse_scores(model)
    network: Any = _auto(scores).from_config(config, dtype=dtype, **_attention(model), **_remote(model))
    if quantization:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import get_keys_to_not_convert

        kept = get_keys_to_not_convert(network)
        replace_with_bnb_linear(network, modules_to_not_convert=kept, quantization_config=quantization)
        network.is_loaded_in_4bit = True  # peft looks here for which of its layers fits
    return network


def _attention(model: ModelConfig) -> dict[str, Any]:
    return {"attn_implementation": model.attention} if model.attention not in (None, "auto") else {}


def _remote(model: ModelConfig) -> dict[str, Any]:
    return {"trust_remote_code": model.trust_remote_code}


def _auto(scores: bool) -> Any:
    return AutoModelForSequenceClassification if scores else AutoModelForCausalLM


def _prepare_scores(config: PreTrainedConfig, model: ModelConfig) -> None:
    """One label."""
    refuse_unscored(config, model)
    if config.num_labels != 1:
        config.num_labels = 1


def _load_weights(
    model: ModelConfig,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: dict[str, Any],
    quantization: Any,
    scores: bool,
) -> Any:
    path = resolve_path(model.path)
    base, adapters = lineage(path)
    refuse_parts(base)
    if adapters and quantization:
        refuse_folding_into_4bit(model)
    extra = {"quantization_config": quantization} if quantization else {}
    exact = torch.float32 if adapters else dtype
    network, info = _read(model, base, scores, config=config, dtype=exact, **attention, **extra)
    missing = sorted(info.get("missing_keys", ()))
    if scores and missing == ["score.weight"]:
        missing = []
        zero_score(network)
    refuse_unfit(model, missing, sorted(str(key) for key in info.get("mismatched_keys", ())))
    if model.gguf_file:
        _forget_quantization(network)
    for adapter in adapters:
        network = fold(network, adapter)
    if adapters:
        network.to(dtype).name_or_path = network.config._name_or_path = path  # the base of an adapter that comes on top
    return network


def _read(model: ModelConfig, base: str, scores: bool, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The network in the files, and which weights were missing or did not fit."""
    try:
        loaded: tuple[Any, dict[str, Any]] = _auto(scores).from_pretrained(
            base, output_loading_info=True, **settings, **_source(model)
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(cannot_read(model, "weights", error)) from error
    except SafetensorError as error:
        cut = f"{error}; a .safetensors file there is cut short or is no such file"
        raise ModelError(cannot_read(model, "weights", cut)) from error
    return loaded


def _forget_quantization(network: Any) -> None:
    """GGUF weights are dequantised as they load; the library still calls the model quantised, and would not save it."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(network).pop(name, None)
    vars(network.config).pop("quantization_config", None)


def _source(model: ModelConfig) -> dict[str, Any]:
    source: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.revision:
        source["revision"] = model.revision
    if model.gguf_file:
        source["gguf_file"] = model.gguf_file
    return source


def _own_memory(network: PreTrainedModel) -> None:
    """Copy loaded weights out of the mapped file: a tensor's alignment there changes one-row products, so that a run
    resumed from another file would differ in the last bit."""
    seen: set[int] = set()
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.data_ptr() not in seen:
            tensor.data = tensor.data.clone()
            seen.add(tensor.data_ptr())


def _override(config: PreTrainedConfig, overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        if not hasattr(config, key):
            near = difflib.get_close_matches(key, list(config.to_dict()), n=1)
            hint = f"; did you mean model.config.{near[0]}?" if near else ""
            raise ModelError(f"model.config.{key} is not a key of the {config.model_type} architecture{hint}")
        setattr(config, key, value)
