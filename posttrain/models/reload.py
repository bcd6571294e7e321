"""Opening a model that was saved: a run, a model directory, an adapter (its base found through its config), or a hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from posttrain.errors import ModelError
from posttrain.models.lineage import fold, is_reward_model, lineage, refuse_parts, resolve_path


def load_saved(path: str, dtype: torch.dtype | str = "auto", merge: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer), ready to generate; adapters are merged into the weights below them where `merge` says so.

    Inner adapters of a stack are always merged, or put in place where they cannot be: an adapter sits on a plain model.
    """
    found = resolve_path(path)
    base, adapters = lineage(found)
    refuse_parts(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(found)
        model: Any = _base_of(found, base, dtype, tokenizer)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        where = "" if Path(found).exists() else "no such path here, and the hub gave: "
        raise ModelError(f"cannot load {path}: {where}{str(error).splitlines()[0]}") from error
    for number, adapter in enumerate(adapters):
        if merge or number < len(adapters) - 1:
            model = fold(model, adapter)
        else:
            from peft import PeftModel

            import posttrain.models.bottleneck  # noqa: F401  # peft knows the method from there

            model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), tokenizer


def _base_of(found: str, base: str, dtype: torch.dtype | str, tokenizer: Any) -> Any:
    """The weights below the adapters; for a reward model with one score, padded as its tokenizer pads."""
    if not is_reward_model(found):
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = AutoConfig.from_pretrained(base)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    if (beside := Path(found) / "posttrain.json").is_file():  # how it pools, for the whole model it may be merged into
        vars(config).update(json.loads(beside.read_text(encoding="utf-8")))
    return AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype=dtype)
