"""Optimizers and learning-rate schedules.

AdamW, decoupled (arXiv:1711.05101): w ← w - lr·(m̂/(√v̂ + eps) + wd·w), no decay on norms, biases and embeddings unless
optim.decay_all (a departure from the bare formula, the usual one).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain.errors import ConfigError
from posttrain.stochastic_rounding import AdamWBF16

if TYPE_CHECKING:
    from posttrain.config import OptimConfig, ScheduleConfig

EIGHT_BIT = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "paged_adamw": "PagedAdamW"}


def build_optimizer(module: nn.Module, optim: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """Over the parameters that train, in two groups: with and without weight decay. seed: of what rounds at random."""
    groups = parameter_groups(module, optim.weight_decay, optim.decay_all)
    betas = (float(optim.betas[0]), float(optim.betas[1]))
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
    if optim.name == "adamw_bf16":
        return AdamWBF16(groups, lr=optim.lr, betas=betas, eps=optim.eps, seed=seed)
    import bitsandbytes

    cls = getattr(bitsandbytes.optim, EIGHT_BIT[optim.name])
    device = next(p.device for g in groups for p in g["params"])
    if device.type == "cpu" and optim.name.startswith("paged"):
        raise ConfigError(
            f"optim.name={optim.name} pages to a GPU's host memory, and there is no GPU; use adamw8bit or adamw"
        )
    optimizer: torch.optim.Optimizer = cls(groups, lr=optim.lr, betas=betas, eps=optim.eps)
    return optimizer


def parameter_groups(module: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """Norms and biases are what has one dimension; embeddings are found by their module's type."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or id(parameter) in embeddings
            (rest if plain and not decay_all else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """The rate of step 0 .. steps-1: linear warm-up, then cosine, linear, constant, or stable and a last decay (wsd)."""
    warmup = warmup_steps(steps, schedule)
    if step < warmup:
        return lr * (step + 1) / warmup
    floor, left = schedule.min_lr_fraction, max(1, steps - warmup)
    progress = (step - warmup) / left
    if schedule.name == "cosine":
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.name == "linear":
        factor = 1 - (1 - floor) * progress
    elif schedule.name == "wsd":
        decay = max(1, round(schedule.decay_fraction * steps))
        factor = min(1.0, floor + (1 - floor) * (steps - step) / decay)
    else:
        factor = 1.0
    return lr * factor


def warmup_steps(steps: int, schedule: ScheduleConfig) -> int:
    """Steps of linear warm-up; a constant schedule has none unless asked."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    if schedule.warmup_fraction is None:
        return 0
    return math.ceil(schedule.warmup_fraction * steps)
