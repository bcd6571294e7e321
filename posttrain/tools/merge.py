"""`posttrain merge RUN OUT`: an adapter, and every adapter below it, folded into whole weights that need no peft; or a checkpoint
whose weights lie in parts put together."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)  # fmt: skip

from posttrain.calibration import FILE
from posttrain.checkpoint import reading
from posttrain.disk import whole_directory, writing
from posttrain.errors import ConfigError, ModelError
from posttrain.models.lineage import SHARDS, is_reward_model, lineage, nonlinear, resolve_path
from posttrain.models.networks import CRITIC, CRITIC_HEAD
from posttrain.models.reload import load_saved
from posttrain.shards import read_weights

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Largest difference of a logit between adapter and merged weights that rounding explains."""


def merge(argv: list[str]) -> None:
    """Merge, save, reload what was saved, and compare its logits with the adapter's."""
    options = _parser().parse_args(argv)
    out = Path(options.out).expanduser()
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give a new directory for the merged model")
    if (Path(options.model).expanduser() / SHARDS).is_dir():
        join(Path(options.model).expanduser(), out, options.dtype)
        return
    inner = Path(options.model).expanduser() / "model"
    if (inner.parent / "state.json").is_file() and inner.is_dir():  # a checkpoint, whose adapter every rank had whole
        options.model = str(inner)
    base, adapters = lineage(resolve_path(options.model))
    if not adapters and not Path(base).is_dir():
        raise ModelError(f"{options.model} does not exist here; give a run, or the directory of an adapter")
    if not adapters:
        raise ModelError(f"{options.model} has no adapter to merge: it is a whole model already")
    if kept := nonlinear(options.model):
        raise ModelError(
            f"{kept[0]} is a bottleneck adapter: between its two layers is a nonlinearity, so no weights of the model compute "
            "the same, and it cannot be merged. Use it as it is (posttrain chat, eval, model.path=...), or train adapter=lora"
        )
    dtype = getattr(torch, options.dtype) if options.dtype != "auto" else "auto"
    probe = torch.arange(8).unsqueeze(0) + 5
    with torch.no_grad():
        before = load_saved(options.model, dtype)[0](probe).logits
    merged, tokenizer = load_saved(options.model, dtype, merge=True)
    with writing(out, "give another OUT"), whole_directory(out, out.with_name(f".{out.name}.tmp")) as scratch:
        merged.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        if (fitted := Path(resolve_path(options.model)) / FILE).is_file():  # it computes the same
            shutil.copyfile(fitted, scratch / FILE)
        with torch.no_grad():
            after = load_saved(str(scratch))[0](probe).logits
        worst = float((before.float() - after.float()).abs().max())
        if not worst <= TOLERANCE.get(merged.dtype, 0.5):
            raise ModelError(f"the merged model's logits differ from the adapter's by {worst:.3g}; it is not usable")
    print(f"merged {len(adapters)} adapter(s) into {base}: {out} (logits agree to {worst:.1g})")


def join(checkpoint: Path, out: Path, dtype: str) -> None:
    """A model directory of a checkpoint in parts; its optimizer stays where it is."""
    folder = checkpoint / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    auto: Any = AutoModelForSequenceClassification if is_reward_model(str(folder)) else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(folder)
    holder: Any = torch.nn.Module()
    holder.model = network = auto.from_config(config, dtype=torch.float32)
    if own_critic := (folder / CRITIC / "config.json").is_file():
        holder.critic = torch.nn.Module()
        config = AutoConfig.from_pretrained(folder / CRITIC)
        holder.critic.model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with reading(checkpoint, SHARDS):
        head = read_weights(checkpoint / SHARDS, holder).all_below("weights.critic.")
    if dtype != "auto":
        network.to(getattr(torch, dtype))
    if (folder / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(folder)
    with writing(out, "give another OUT"), whole_directory(out, out.with_name(f".{out.name}.tmp")) as scratch:
        network.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        if own_critic:
            holder.critic.model.save_pretrained(scratch / CRITIC)
            tokenizer.save_pretrained(scratch / CRITIC)
        elif head:
            (scratch / CRITIC).mkdir()
            save_file(head, scratch / CRITIC / CRITIC_HEAD)
    files = len(list((checkpoint / SHARDS).iterdir()))
    print(
        f"put the {files} parts of {checkpoint} together: {out} ({str(network.dtype).removeprefix('torch.')}; --dtype changes it)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="posttrain merge", description="Fold an adapter into whole weights.")
    parser.add_argument(
        "model", help="a run trained with an adapter, an adapter directory, or a checkpoint of distribution=fsdp"
    )
    parser.add_argument("out", help="a new directory for the merged model")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    return parser
