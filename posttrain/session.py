"""Everything a run holds before its first step: devices, directory, data, networks, checked against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from posttrain import rundir
from posttrain.checkpoint import TrainState
from posttrain.data.loader import Loader, Order
from posttrain.data.packing import Packing, row_cost
from posttrain.data.pipeline import Prepared, prepare
from posttrain.data.tokenize import end_ids, end_of_turn
from posttrain.data.tokens import TokenGroup
from posttrain.errors import CheckpointError, ConfigError, ModelError, UserError
from posttrain.evaluate import Evaluator
from posttrain.models.load import load_config, load_tokenizer, position_limit
from posttrain.models.networks import Head, Networks, build_network
from posttrain.models.probe import check_forward, check_rope, probe_positions, sliding_window
from posttrain.optim import build_optimizer
from posttrain.reference import Reference, check_start
from posttrain.report.console import Console
from posttrain.resume import restore, resumed
from posttrain.rundir import RunDir
from posttrain.runtime import Runtime, seed_everything

if TYPE_CHECKING:
    from posttrain.config import AdapterConfig, Config, ModelConfig

T = TypeVar("T")

MICRO_TOKENS = {"cpu": 4_096, "cuda": 16_384}
"""Default token budget of one forward: enough to fill the device, small enough to fit beside the weights."""

OVERHEAD_TOKENS = {"cpu": 256, "cuda": 1_024}
"""What one more forward costs beside its tokens: reading the weights, launching kernels."""

SHARED_GAIN = 0.95
"""batch.layout=auto shares prompts where that leaves at most this share of the padded layout's cost."""


@dataclass
class Session:
    """A run, ready to train. steps: of the whole run. draws: examples an epoch-counted run draws, else None."""

    cfg: Config
    runtime: Runtime
    console: Console
    run: RunDir
    prepared: Prepared
    networks: Networks
    loader: Loader
    evaluator: Evaluator
    optimizer: torch.optim.Optimizer
    state: TrainState
    steps: int
    draws: int | None
    ends: set[int]
    probe: dict[str, float]


def on_main(runtime: Runtime, function: Callable[[], T]) -> T:
    """Run on rank 0 and give every rank the result, or the user's error: no rank is left waiting."""
    outcome: tuple[T | None, UserError | None] = (None, None)
    if runtime.is_main:
        try:
            outcome = (function(), None)
        except UserError as error:
            outcome = (None, error)
    value, told = runtime.share(outcome)
    if told is not None:
        raise told
    result: T = value
    return result


def open_session(cfg: Config, runtime: Runtime, console: Console, run: RunDir) -> Session:
    """Build it all in the order in which a user's mistakes are cheapest to tell: data before weights."""
    cfg.stage.check()
    if cfg.adapter.name == "none" and cfg.model.dtype in ("bfloat16", "float16"):
        raise ConfigError(
            f"model.dtype={cfg.model.dtype} would train weights without fp32 masters, and small updates would be rounded away; "
            "leave model.dtype=auto (precision=bf16 computes in bf16), or train an adapter"
        )
    tokenizer = load_tokenizer(cfg.model)
    prepared = prepare_data(cfg, tokenizer, runtime)
    ends = stop_ids(prepared, tokenizer)
    packing = packing_of(cfg, runtime.device.type, prepared)
    order = Order(np.array(prepared.train.column("source")), cfg.train.seed, cfg.data.shuffle, _mix(cfg))
    loader = Loader(
        prepared.train, order, packing, cfg.batch.size, cfg.batch.tokens, rank=runtime.rank, world=runtime.world
    )
    steps, draws = count_steps(cfg, loader)
    if cfg.train.patience is not None and not len(prepared.eval):
        raise ConfigError(f"train.patience={cfg.train.patience} needs scores, but no evaluation example was held out")
    seed_everything(cfg.train.seed, 0)
    model, adapter = resumed(cfg, run)
    policy, described = open_network(
        cfg, runtime, model, adapter, cfg.train.gradient_checkpointing, cfg.stage.head(ends)
    )
    check_fits(cfg, policy, tokenizer)
    check_rope(policy.network.config, np.concatenate([prepared.train.longest, prepared.eval.longest]))
    policy.to(runtime.device)
    probed = probe_positions(prepared.train.longest, sliding_window(policy.network))
    probe, loader.packing = probe_layout(cfg, policy, prepared, prepared.train.groups(probed), packing, runtime)
    optimizer = build_optimizer(policy, cfg.optim)
    state = restore(run, optimizer, runtime, cfg.train.seed)
    probe |= attach_reference(cfg, runtime, prepared, loader, tokenizer, state, policy, probed)
    wrapped = runtime.wrap(policy, find_unused=policy.is_mixture)
    networks = Networks(wrapped, policy, tokenizer, described, source_dtype(cfg))
    evaluator = Evaluator(cfg.stage, networks, prepared.eval, loader.packing, runtime, cfg.eval, ends, cfg.train.seed)
    if state.step > steps:
        raise CheckpointError(f"{run.checkpoint} is at step {state.step}, past this run's end at step {steps}")
    return Session(
        cfg, runtime, console, run, prepared, networks, loader, evaluator, optimizer, state, steps, draws, ends, probe
    )  # fmt: skip


def prepare_data(cfg: Config, tokenizer: Any, runtime: Runtime) -> Prepared:
    """Rank 0 tokenises, then every rank opens what it wrote."""
    on_main(runtime, lambda: prepare(cfg.data, tokenizer, cfg.stage, cfg.train.seed) and None)
    return prepare(cfg.data, tokenizer, cfg.stage, cfg.train.seed)


def packing_of(cfg: Config, device: str, prepared: Prepared) -> Packing:
    """batch.* with what was left to `auto` decided: padded, for rows sorted by length waste little; packed where the
    attention kernel skips other documents; shared where repeating the prompts would cost more."""
    flash = str(cfg.model.attention).startswith("flash")
    layout = cfg.batch.layout if cfg.batch.layout != "auto" else ("packed" if flash else _cheapest(cfg, prepared))
    budget = cfg.batch.micro_tokens or MICRO_TOKENS[device]
    return Packing(layout, budget, cfg.batch.micro_size, one_row=flash, overhead_tokens=OVERHEAD_TOKENS[device])


def _cheapest(cfg: Config, prepared: Prepared) -> str:
    """padded, or shared where its rows cost less by more than the masks they need."""
    data = prepared.train if len(prepared.train) else prepared.eval
    if not len(data) or int(data.counts.max()) < 2:
        return "padded"
    size = int(load_config(cfg.model).get_text_config(decoder=True).hidden_size)
    shared = row_cost(data.widths("shared"), data.heights("shared"), size)
    return "shared" if shared < SHARED_GAIN * row_cost(data.longest, data.counts, size) else "padded"


def probe_layout(
    cfg: Config, policy: Any, prepared: Prepared, groups: list[TokenGroup], packing: Packing, runtime: Runtime
) -> tuple[dict[str, float], Packing]:
    """Check the forward pass on these examples. A layout that was asked for and cannot be is an error; one that `auto` chose
    gives way to padded, and that is said."""
    try:
        return check_forward(policy, groups, packing.layout, runtime.device), packing
    except ModelError as error:
        if cfg.batch.layout != "auto" or packing.layout == "padded":
            raise
        padded = replace(packing, layout="padded")
        found = check_forward(policy, groups, "padded", runtime.device)
        prepared.lines.append(f"batch.layout=auto takes padded: {error}")
        return found, padded


def attach_reference(
    cfg: Config, runtime: Runtime, prepared: Prepared, loader: Loader, tokenizer: Any, state: TrainState, policy: Any,
    probed: list[int],
) -> dict[str, float]:  # fmt: skip
    """Give the data the reference's log-probs where the stage wants them; what the start-up check of them found."""
    sampled = any(group.sampler_logprobs for group in _first(prepared))
    wanted = cfg.stage.needs_reference(sampled)
    if cfg.model.reference is not None and wanted == "never":
        raise ConfigError(f"model.reference is given, but stage={cfg.stage_name} has no reference; leave it out")
    if wanted == "never":
        return {}
    reference = Reference(cfg, runtime, loader.packing, tokenizer, state.reference)
    start = None if state.step else policy
    if len(prepared.eval):
        prepared.eval = reference.attach("eval", prepared.eval, prepared.fingerprint, start)
    if wanted == "always":
        loader.data = prepared.train = reference.attach("train", prepared.train, prepared.fingerprint, start)
    state.reference = reference.keys
    if start is None or cfg.model.reference is not None or wanted != "always":
        return {}
    return {"reference": check_start(policy, prepared.train.groups(probed), loader.packing, runtime)}


def count_steps(cfg: Config, loader: Loader) -> tuple[int, int | None]:
    """Optimizer steps, and how many examples are drawn where epochs count."""
    if cfg.train.steps:
        return cfg.train.steps, None
    epochs = cfg.train.epochs
    assert epochs is not None, "the config gives steps or epochs"
    return loader.count_steps(epochs), round(epochs * len(loader.data))


def stop_ids(prepared: Prepared, tokenizer: Any) -> set[int]:
    """What ends a generated answer: end-of-text, and the end-of-turn token that training targets close with."""
    found = end_of_turn(_first(prepared), end_ids(tokenizer))
    return {tokenizer.eos_token_id} | ({found} if found is not None else set())


def check_fits(cfg: Config, policy: Any, tokenizer: Any) -> None:
    """The tokenizer's ids must have embeddings, and examples must fit the positions."""
    rows = policy.network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens but the model has embeddings for {rows:,}; "
            "give the model's own tokenizer (model.tokenizer)"
        )
    check_positions(cfg, policy.network.config)


def check_positions(cfg: Config, config: Any) -> None:
    """Examples must fit the positions the model knows."""
    limit = position_limit(config)
    if limit and cfg.data.max_length > limit:
        raise ConfigError(
            f"data.max_length={cfg.data.max_length}, but the model's positions end at {limit}; "
            f"set data.max_length={limit}, or extend them with model.rope_scaling"
        )


def source_dtype(cfg: Config) -> torch.dtype | None:
    """What the model came in: a bf16 model is trained in fp32 master weights and saved in bf16 again."""
    if cfg.model.init == "config" or cfg.model.gguf_file:
        return None
    dtype = load_config(cfg.model).dtype
    return dtype if isinstance(dtype, torch.dtype) else None


def _first(prepared: Prepared) -> list[Any]:
    data = prepared.train if len(prepared.train) else prepared.eval
    return data.groups(range(min(64, len(data))))


def _mix(cfg: Config) -> list[float] | None:
    return list(cfg.data.mix) if cfg.data.mix else None


def open_directory(cfg: Config, config: dict[str, Any], runtime: Runtime, verb: str = "train") -> RunDir:
    """The run directory, chosen on rank 0; errors reach every rank."""
    return on_main(runtime, lambda: rundir.open_run(config, cfg.stage_name, verb))


def open_network(
    cfg: Config,
    runtime: Runtime,
    model: ModelConfig,
    adapter: AdapterConfig,
    checkpointing: bool = False,
    head: Head | None = None,
) -> tuple[Any, str]:
    """The network and its adapter's line."""
    return build_network(model, adapter, runtime.compute_dtype, cfg.train.seed, checkpointing, head)
