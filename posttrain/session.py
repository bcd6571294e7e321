"""Everything a run holds before its first step: devices, directory, data, networks, checked against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from posttrain import rundir
from posttrain.checkpoint import TrainState, load_optimizer, load_rng, load_state
from posttrain.data.batches import Packing
from posttrain.data.loader import Loader, Order
from posttrain.data.pipeline import Prepared, prepare
from posttrain.data.tokenize import end_ids, end_of_turn
from posttrain.errors import ConfigError, ModelError, UserError
from posttrain.evaluate import Evaluator
from posttrain.models.load import load_config, load_tokenizer
from posttrain.models.networks import Networks, build_policy
from posttrain.models.probe import check_forward, probe_examples
from posttrain.optim import build_optimizer
from posttrain.report.console import Console
from posttrain.rundir import RunDir
from posttrain.runtime import Runtime, seed_everything, set_rng_state

if TYPE_CHECKING:
    from posttrain.config import Config

T = TypeVar("T")

MICRO_TOKENS = {"cpu": 4_096, "cuda": 16_384}
"""Default token budget of one forward: enough to fill the device, small enough to fit beside the weights."""

OVERHEAD_TOKENS = {"cpu": 64, "cuda": 1_024}
"""What one more forward costs beside its tokens: reading the weights, launching kernels."""


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
    value, error = runtime.share(outcome)
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def open_session(cfg: Config, runtime: Runtime, console: Console, run: RunDir) -> Session:
    """Build it all in the order in which a user's mistakes are cheapest to tell: data before weights."""
    cfg.stage.check()
    model = _resumed_model(cfg, run)
    tokenizer = load_tokenizer(cfg.model)
    prepared = prepare_data(cfg, tokenizer, runtime)
    ends = stop_ids(prepared, tokenizer)
    packing = packing_of(cfg, runtime.device.type)
    order = Order(np.array(prepared.train.column("source")), cfg.train.seed, cfg.data.shuffle, _mix(cfg))
    loader = Loader(
        prepared.train, order, packing, cfg.batch.size, cfg.batch.tokens, rank=runtime.rank, world=runtime.world
    )
    steps, draws = count_steps(cfg, loader)
    seed_everything(cfg.train.seed, 0)
    policy, described = build_policy(
        replace(cfg.model, **model), _resumed_adapter(cfg, run), runtime.compute_dtype, cfg.train.seed,
        cfg.train.gradient_checkpointing,
    )  # fmt: skip
    check_fits(cfg, policy, tokenizer)
    policy.to(runtime.device)
    probe = check_forward(policy, probe_examples(_first(prepared)), packing.layout, runtime.device)
    optimizer = build_optimizer(policy, cfg.optim)
    wrapped = runtime.wrap(policy, find_unused=policy.is_mixture)
    networks = Networks(wrapped, policy, tokenizer, described, source_dtype(cfg))
    evaluator = Evaluator(cfg.stage, networks, prepared.eval, packing, runtime, cfg.eval, ends, cfg.train.seed)
    state = _restore(run, optimizer, runtime, cfg.train.seed)
    return Session(
        cfg, runtime, console, run, prepared, networks, loader, evaluator, optimizer, state, steps, draws, ends, probe
    )  # fmt: skip


def prepare_data(cfg: Config, tokenizer: Any, runtime: Runtime) -> Prepared:
    """Rank 0 tokenises, then every rank opens what it wrote."""
    on_main(runtime, lambda: prepare(cfg.data, tokenizer, cfg.stage, cfg.train.seed) and None)
    return prepare(cfg.data, tokenizer, cfg.stage, cfg.train.seed)


def packing_of(cfg: Config, device: str) -> Packing:
    """batch.* with what was left to `auto` decided: padded, for rows sorted by length waste little; packed where the
    attention kernel skips other documents."""
    flash = str(cfg.model.attention).startswith("flash")
    layout = cfg.batch.layout if cfg.batch.layout != "auto" else ("packed" if flash else "padded")
    budget = cfg.batch.micro_tokens or MICRO_TOKENS[device]
    return Packing(layout, budget, cfg.batch.micro_size, one_row=flash, overhead_tokens=OVERHEAD_TOKENS[device])


def count_steps(cfg: Config, loader: Loader) -> tuple[int, int | None]:
    """Optimizer steps, and how many examples are drawn where epochs count."""
    if cfg.train.steps:
        return cfg.train.steps, None
    return loader.count_steps(cfg.train.epochs), round(cfg.train.epochs * len(loader.data))


def stop_ids(prepared: Prepared, tokenizer: Any) -> set[int]:
    """What ends a generated answer: end-of-text, and the end-of-turn token that training targets close with."""
    found = end_of_turn(_first(prepared), end_ids(tokenizer))
    return {tokenizer.eos_token_id} | ({found} if found is not None else set())


def check_fits(cfg: Config, policy: Any, tokenizer: Any) -> None:
    """The tokenizer's ids must have embeddings, and examples must fit the positions the model knows."""
    rows = policy.network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens but the model has embeddings for {rows:,}; "
            "give the model's own tokenizer (model.tokenizer)"
        )
    limit = getattr(policy.network.config, "max_position_embeddings", None)
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
    return prepared.train.groups(range(min(64, len(prepared.train))))


def _mix(cfg: Config) -> list[float] | None:
    return list(cfg.data.mix) if cfg.data.mix else None


def _resumed_model(cfg: Config, run: RunDir) -> dict[str, Any]:
    """A whole model continues from its checkpoint's weights, read as any other model is."""
    if run.checkpoint is None or cfg.adapter.name != "none":
        return {}
    path = str(run.checkpoint / "model")
    return {
        "path": path,
        "tokenizer": cfg.model.tokenizer or cfg.model.path,
        "init": "weights",
        "gguf_file": None,
        "revision": None,
    }


def _resumed_adapter(cfg: Config, run: RunDir) -> Any:
    """An adapter continues from its checkpoint's, over the same base."""
    if run.checkpoint is None or cfg.adapter.name == "none":
        return cfg.adapter
    return replace(cfg.adapter, path=str(run.checkpoint / "model"))


def _restore(run: RunDir, optimizer: torch.optim.Optimizer, runtime: Runtime, seed: int) -> TrainState:
    seed_everything(seed, runtime.rank)
    if run.checkpoint is None:
        return TrainState()
    load_optimizer(run.checkpoint, optimizer)
    rng = load_rng(run.checkpoint, runtime.rank)
    if rng is not None:
        set_rng_state(rng)
    return load_state(run.checkpoint)


def open_directory(cfg: Config, config: dict[str, Any], runtime: Runtime) -> RunDir:
    """The run directory, chosen on rank 0; errors reach every rank."""
    return on_main(runtime, lambda: rundir.open_run(config, cfg.stage_name))
