"""`posttrain merge RUN OUT`: an adapter, and every adapter below it, folded into whole weights that need no peft."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from posttrain.calibration import FILE
from posttrain.disk import whole_directory, writing
from posttrain.errors import ConfigError, ModelError
from posttrain.models.lineage import lineage, nonlinear, resolve_path
from posttrain.models.reload import load_saved

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Largest difference of a logit between adapter and merged weights that rounding explains."""


def merge(argv: list[str]) -> None:
    """Merge, save, reload what was saved, and compare its logits with the adapter's."""
    options = _parser().parse_args(argv)
    out = Path(options.out).expanduser()
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give a new directory for the merged model")
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="posttrain merge", description="Fold an adapter into whole weights.")
    parser.add_argument("model", help="a run trained with an adapter, or an adapter directory")
    parser.add_argument("out", help="a new directory for the merged model")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    return parser
