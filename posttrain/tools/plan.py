"""`posttrain plan`: what a run would do, hold and take, before it does anything; loads no weights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from posttrain.companions import check_companions
from posttrain.fits import check_attention, check_positions
from posttrain.layout import beyond_budget, packing_of
from posttrain.models.adapters import parameter_count
from posttrain.models.lineage import folded
from posttrain.models.load import load_tokenizer
from posttrain.models.networks import build_network
from posttrain.optim import warmup_steps
from posttrain.planning.duration import clock
from posttrain.planning.estimate import Estimate, estimate, world_of
from posttrain.planning.memory import peak, total
from posttrain.report.console import Console
from posttrain.session import count_steps, open_loader, prepare_data
from posttrain.startup import open_runtime

if TYPE_CHECKING:
    from posttrain.config import Config
    from posttrain.runtime import Runtime

GIB = 2**30


def plan(cfg: Config) -> None:
    """Data counts, tokens, steps, the memory of every part, and how long it will take."""
    runtime = open_runtime(cfg)
    console = Console(runtime.is_main)
    check_attention(cfg, runtime)
    tokenizer = load_tokenizer(cfg.model)
    check_companions(cfg, tokenizer)
    prepared = prepare_data(cfg, tokenizer, runtime)
    packing = packing_of(cfg, runtime.device.type, prepared)
    prepared.lines += beyond_budget(prepared, packing, cfg.data.max_length)
    world = world_of(cfg, runtime)
    loader = open_loader(cfg, prepared, packing, 0, world)
    steps, draws = count_steps(cfg, loader)
    head, critic = cfg.stage.head(set()), cfg.stage.needs_critic
    module, described = build_network(
        cfg.model, cfg.adapter, runtime.compute_dtype, cfg.train.seed, head=head, critic=critic, shape_only=True
    )
    check_positions(cfg, module.network.config)
    everything = parameter_count(module)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    epochs = (
        0 if prepared.stream else (draws or steps // cfg.stage.updates * (cfg.batch.size or 0)) / len(prepared.train)
    )
    kind = module.network.config.model_type
    found = estimate(cfg, runtime, prepared, loader, module, steps)
    rows = [
        ("stage", cfg.stage_name),
        ("model", f"{cfg.model.path}: {kind}, {everything:,} parameters{folded(cfg.model.path)}"),
        ("trained", f"{trained:,} parameters ({trained / everything:.1%}), adapter {described}"),
        *prepared.facts(packing.layout),
        ("steps", f"{steps:,}" + (f" ({epochs:.2g} epochs)" if epochs else "") + f", {packing.layout}"),
        *cfg.stage.facts(),
        (
            "schedule",
            f"{cfg.schedule.name}, peak {cfg.optim.lr:g} after {warmup_steps(steps, cfg.schedule)} warm-up steps",
        ),
        *_reference(cfg),
        ("device", runtime.describe() + (f", planned for {world}" if world != runtime.world else "")),
        *_time(cfg, found, world),
        ("memory", _memory(cfg, runtime, found, world)),
    ]
    console.facts("plan (nothing was trained, no weights were loaded)", rows)
    _table(console, found)
    for line in prepared.lines:
        console.line(f"  · {line}")


def _reference(cfg: Config) -> list[tuple[str, str]]:
    wanted = cfg.stage.needs_reference(False)
    told = {"always": "once over the data, before the first step", "evaluation": "once over the evaluation data"}
    if wanted == "never":
        return []
    return [("reference", f"{cfg.model.reference or 'the policy as it starts'}: log-probs computed {told[wanted]}")]


def _time(cfg: Config, found: Estimate, world: int) -> list[tuple[str, str]]:
    """A step, what is sampled, an evaluation, the run; and what of it was measured."""
    if found.times is None:
        return [("time", f"not known: {found.measured}")]
    times = found.times
    step, whole = times.step, times.whole
    rows = [
        ("a step", f"{_seconds(step.value)} ± {_seconds(step.spread, 1)} s, {times.tokens / step.value:,.0f} tokens/s")
    ]
    if times.sampling.value:
        rows.append(
            ("sampling", f"at most {_seconds(times.sampling.value)} s an iteration, answers as long as they may be")
        )
    if times.reference.value:
        rows.append(("reference pass", f"{clock(times.reference.value)}, once"))
    rows.append(("evaluation", f"{clock(times.evaluation.value)} each, {times.evaluations} of them"))
    without = "without loading, saving" + (" and what the ranks tell each other" if world > 1 else "")
    rows.append(("the run", f"{clock(whole.value)} ± {clock(whole.spread)}, {without}"))
    return [*rows, ("measured", found.measured)]


def _seconds(value: float, digits: int = 2) -> str:
    """So many digits that mean something, and no exponent."""
    return f"{float(f'{value:.{digits}g}'):,g}"


def _memory(cfg: Config, runtime: Runtime, found: Estimate, world: int) -> str:
    """The most at once, whether there is as much, and what to change where there is not."""
    moment, size = peak(found.moments)
    size += found.process
    # on a CPU the resident set was seen to be half as large again: the allocator keeps what loading has used
    where = "in each process, which keeps some of what it frees besides" if found.process else "on each device"
    told = f"{size / GIB:.2f} GiB at most {where}, in {moment}" + (
        "" if found.times else f"; what is computed comes on top, not measured: {found.measured}"
    )
    there = device_bytes(runtime.device)
    needed = size * (world if runtime.device.type == "cpu" else 1)
    if there is None or needed <= there:
        return told + ("" if there is None else f"; there are {there / GIB:.1f} GiB")
    return f"{told}; there are only {there / GIB:.1f} GiB: {_instead(cfg, found, moment)}"


def _instead(cfg: Config, found: Estimate, moment: str) -> str:
    """What makes the largest parts smaller, those that cost least first."""
    parts = found.moments[moment]
    state = sum(parts.get(name, 0) for name in ("parameters", "gradients", "optimizer"))
    ways = []
    if parts.get("activations", 0) > 0.2 * total(parts):
        ways += ["a smaller batch.micro_tokens"]
        ways += [] if cfg.train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    if state > 0.4 * total(parts):
        ways += ["optim=adamw8bit"] if cfg.optim.name == "adamw" else []
        ways += ["adapter=lora"] if cfg.adapter.name == "none" else []
        ways += ["adapter=qlora"] if cfg.adapter.name == "lora" else []
        ways += ["distribution=fsdp on more devices"] if cfg.distribution.name in ("single", "ddp") else []
    if parts.get("answers' cache", 0) > 0.2 * total(parts):
        ways += ["a smaller stage.max_new_tokens"]
    if {"reference", "reward model"} & {*parts} and cfg.model.frozen_device == "device":
        ways += ["model.frozen_device=offload"]
    return "try " + ", ".join(ways or ["a smaller batch.micro_tokens"])


def _table(console: Console, found: Estimate) -> None:
    """A line a part, a column a moment, GiB."""
    moments = found.moments
    names = list(dict.fromkeys(name for moment in moments.values() for name, size in moment.items() if size))
    rows = [[name, *(_gib(moment.get(name, 0)) for moment in moments.values())] for name in names]
    if found.process:
        rows.append(["this process", *(_gib(found.process) for _ in moments)])
    rows.append(["together", *(_gib(total(moment) + found.process) for moment in moments.values())])
    console.table("memory of one device, GiB", ["", *moments], rows)


def _gib(size: int) -> str:
    return f"{size / GIB:.3f}" if size else "–"


def device_bytes(device: torch.device) -> int | None:
    """All memory of the device, or of the machine for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    names = os.sysconf_names
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None
