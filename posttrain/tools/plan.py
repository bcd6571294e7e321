"""`posttrain plan`: what a run would do, before it does anything; loads no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from posttrain.companions import check_companions
from posttrain.layout import beyond_budget, packing_of
from posttrain.models.adapters import add_adapter
from posttrain.models.lineage import folded
from posttrain.models.load import load_config, load_shape, load_tokenizer
from posttrain.optim import warmup_steps
from posttrain.report.console import Console
from posttrain.session import check_attention, check_positions, count_steps, open_loader, prepare_data
from posttrain.startup import open_runtime

if TYPE_CHECKING:
    from posttrain.config import Config

GIB = 2**30


def plan(cfg: Config) -> None:
    """Data counts, tokens, steps and the memory of weights, gradients and optimizer."""
    console, runtime = Console(), open_runtime(cfg)
    check_attention(cfg, runtime)
    tokenizer = load_tokenizer(cfg.model)
    check_companions(cfg, tokenizer)
    prepared = prepare_data(cfg, tokenizer, runtime)
    packing = packing_of(cfg, runtime.device.type, prepared)
    prepared.lines += beyond_budget(prepared, packing, cfg.data.max_length)
    steps, draws = count_steps(cfg, open_loader(cfg, prepared, packing))
    model, described = _on_meta(cfg)
    check_positions(cfg, model.config)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    epochs = (
        0 if prepared.stream else (draws or steps // cfg.stage.updates * (cfg.batch.size or 0)) / len(prepared.train)
    )
    rows = [
        ("stage", cfg.stage_name),
        ("model", f"{cfg.model.path}: {model.config.model_type}, {total:,} parameters{folded(cfg.model.path)}"),
        ("trained", f"{trained:,} parameters ({trained / total:.1%}), adapter {described}"),
        *prepared.facts(packing.layout),
        ("steps", f"{steps:,}" + (f" ({epochs:.2g} epochs)" if epochs else "") + f", {packing.layout}"),
        *cfg.stage.facts(),
        (
            "schedule",
            f"{cfg.schedule.name}, peak {cfg.optim.lr:g} after {warmup_steps(steps, cfg.schedule)} warm-up steps",
        ),
        *_reference(cfg),
        ("device", runtime.describe()),
        ("memory", _memory(cfg, model, runtime.compute_dtype)),
    ]
    console.facts("plan (nothing was trained, no weights were loaded)", rows)
    for line in prepared.lines:
        console.line(f"  · {line}")


def _reference(cfg: Config) -> list[tuple[str, str]]:
    wanted = cfg.stage.needs_reference(False)
    told = {"always": "once over the data, before the first step", "evaluation": "once over the evaluation data"}
    if wanted == "never":
        return []
    return [("reference", f"{cfg.model.reference or 'the policy as it starts'}: log-probs computed {told[wanted]}")]


def _on_meta(cfg: Config) -> tuple[Any, str]:
    """The model's shapes without its numbers, and its adapter's line."""
    scores = cfg.stage.head(set()) is not None
    with torch.device("meta"):
        model: Any = load_shape(load_config(cfg.model), scores=scores)
        if cfg.adapter.name == "none":
            return model, "none"
        plain = type(cfg.adapter)(**{**vars(cfg.adapter), "name": cfg.adapter.name.replace("qlora", "lora")})
        model, described = add_adapter(model, plain, cfg.train.seed, scores)
    return model, described.replace(plain.name, cfg.adapter.name, 1)


def _memory(cfg: Config, model: Any, compute: torch.dtype) -> str:
    """fp32 masters, gradients and two moments for what trains; a frozen base in the compute dtype, its linear layers in
    4 bits (and 1/8 bit of block scales) under qlora."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    quantized = 0
    if cfg.adapter.name == "qlora":
        head = model.get_base_model().get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        quantized = sum(m.weight.numel() for m in linear if not m.weight.requires_grad)
    width = 2.0 if compute != torch.float32 and cfg.adapter.name != "none" else 4.0
    each = 2.0 if cfg.optim.name == "adamw_bf16" else 4.0  # a weight that trains, its gradient, one of its moments
    moments = 2.0 if "8bit" in cfg.optim.name else 2 * each
    weights = (frozen - quantized) * width + quantized * (0.5 + 0.127 / 8) + trained * each
    state = trained * (each + moments)
    return f"weights {weights / GIB:.2f} GiB, gradients and optimizer {state / GIB:.2f} GiB, activations beside them"
