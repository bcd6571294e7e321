"""Opening a model that was saved: a run, a model directory, an adapter (its base found through its config), or a hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import ModelError
from posttrain.models.load import resolve_path


def find_model(path: str) -> str:
    """A run's model/ directory, or the path itself."""
    directory = Path(path).expanduser()
    if (directory / "summary.json").is_file() or (directory / "checkpoints").is_dir():
        if not (directory / "model").is_dir():
            raise ModelError(
                f"the run {path} has no model/ yet: it is not finished. Give one of its checkpoints/step-…/model"
            )
        return str(directory / "model")
    return resolve_path(path)


def lineage(path: str) -> tuple[str, list[str]]:
    """(base model, adapters from the innermost to this one); an adapter's base may itself be an adapter."""
    adapters: list[str] = []
    while (config := Path(path) / "adapter_config.json").is_file():
        if path in adapters:
            raise ModelError(f"{path} names itself as its base model")
        adapters.insert(0, path)
        path = find_model(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
    return path, adapters


def load_saved(path: str, dtype: torch.dtype | str = "auto", merge: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer), ready to generate; adapters are merged into the weights below them where `merge` says so.

    Inner adapters of a stack are always merged: an adapter sits on plain weights.
    """
    found = find_model(path)
    base, adapters = lineage(found)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(found)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        where = "" if Path(found).exists() else "no such path here, and the hub gave: "
        raise ModelError(f"cannot load {path}: {where}{str(error).splitlines()[0]}") from error
    for number, adapter in enumerate(adapters):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
        if merge or number < len(adapters) - 1:
            model = model.merge_and_unload(safe_merge=True)
    return model.eval(), tokenizer
