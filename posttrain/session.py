"""Everything a run holds before its first step: devices, directory, data, networks, checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from posttrain import frozen, reference, rundir
from posttrain.checkpoint import TrainState
from posttrain.claim import Claim
from posttrain.companions import check_companions
from posttrain.data.loader import Loader, Order
from posttrain.data.packing import Packing
from posttrain.data.pipeline import Prepared, prepare
from posttrain.data.streaming.prepare import prepare_stream
from posttrain.data.streaming.stream import StreamLoader
from posttrain.data.token_dataset import TokenDataset
from posttrain.errors import CheckpointError, ConfigError, UserError
from posttrain.evaluate import Evaluator
from posttrain.examples import check_slices, describe
from posttrain.fits import check_attention, check_fits
from posttrain.layout import beyond_budget, packing_of, probe_networks
from posttrain.models.float8 import float8_of
from posttrain.models.load import load_config, load_tokenizer
from posttrain.models.networks import Head, Networks, build_network, read_by_all
from posttrain.models.probe import probe_positions, sliding_window
from posttrain.models.rope import check_rope
from posttrain.models.sharding import reshard
from posttrain.optim import build_optimizer
from posttrain.report.console import Console
from posttrain.resume import loading, restore, resumed
from posttrain.rundir import RunDir
from posttrain.runtime import Runtime
from posttrain.seeds import rng_state, seed_everything, set_rng_state
from posttrain.stages.base import Supply
from posttrain.startup import check_same_data
from posttrain.supply import let_judge, open_supply, stop_ids

if TYPE_CHECKING:
    from posttrain.config import AdapterConfig, Config, ModelConfig

T = TypeVar("T")


@dataclass
class Session:
    """A run, ready to train. steps: of the whole run. draws: examples an epoch-counted run draws, else None."""

    cfg: Config
    runtime: Runtime
    console: Console
    run: RunDir
    prepared: Prepared
    networks: Networks
    loader: Loader | StreamLoader
    evaluator: Evaluator
    optimizer: torch.optim.Optimizer
    state: TrainState
    steps: int
    draws: int | None
    ends: set[int]
    probe: dict[str, float]
    supply: Supply


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
    check_attention(cfg, runtime)
    tokenizer = load_tokenizer(cfg.model)
    check_companions(cfg, tokenizer)
    prepared = open_data(cfg, tokenizer, runtime, run)
    ends = stop_ids(prepared, tokenizer)
    packing = packing_of(cfg, runtime.device.type, prepared)
    loader = open_loader(cfg, prepared, packing, runtime.rank, runtime.world)
    steps, draws = count_steps(cfg, loader)
    if cfg.train.patience is not None and not len(prepared.eval):
        raise ConfigError(f"train.patience={cfg.train.patience} needs scores, but no evaluation example was held out")
    seed_everything(cfg.train.seed, 0)
    policy, described = open_policy(cfg, runtime, run, prepared, tokenizer, ends)
    probed = probe_positions(prepared.train.longest, sliding_window(policy.network))
    probe, loader.packing = probe_networks(cfg, policy, prepared, probed, packing, runtime)
    prepared.lines += beyond_budget(prepared, loader.packing, cfg.data.max_length)
    reshard(policy)  # the probes' weights are whole still; the optimizer's are each rank's part
    optimizer = build_optimizer(policy, cfg.optim, cfg.train.seed)
    state = restore(run, policy, optimizer, runtime, cfg.train.seed)
    start, drawn = None if state.step else policy, rng_state()
    state.reference, found = reference.attach(
        cfg, runtime, prepared, loader.packing, state.reference, start, probed, console.line
    )
    probe |= found
    if isinstance(loader, Loader) and isinstance(prepared.train, TokenDataset):
        loader.data = prepared.train  # now with its reference
    networks = Networks(wrap(cfg, runtime, policy, optimizer), policy, tokenizer, described, source_dtype(cfg))
    evaluator = Evaluator(cfg.stage, networks, prepared.eval, loader.packing, runtime, cfg.eval, ends, cfg.train.seed)
    supply = open_supply(cfg, runtime, loader.packing, ends, tokenizer, run)
    supply.loader, supply.draws, supply.state = loader, draws, state.stream
    if cfg.stage.keeps_reference:
        networks.frozen = frozen.open_frozen(cfg, runtime, policy, is_start=start is not None)
    set_rng_state(drawn)  # building a reference draws numbers that the run must not miss
    if not cfg.stage.answer_tokens:
        prepared.lines += loader.restore(state.stream) if state.step else []
    let_judge(evaluator, networks, supply)
    if state.step > steps:
        raise CheckpointError(f"{run.checkpoint} is at step {state.step}, past this run's end at step {steps}")
    return Session(
        cfg, runtime, console, run, prepared, networks, loader, evaluator, optimizer, state, steps, draws, ends, probe, supply
    )  # fmt: skip


def open_data(cfg: Config, tokenizer: Any, runtime: Runtime, run: RunDir) -> Prepared:
    """The data, the same on every rank and, where the run goes on, as it was; with the columns of eval.slices."""
    prepared = prepare_data(cfg, tokenizer, runtime)
    check_same_data(runtime, prepared.fingerprint)
    if not prepared.stream:
        on_main(runtime, lambda: rundir.check_data(run, prepared.fingerprint))
    if cfg.eval.slices:
        on_main(runtime, lambda: check_slices(cfg.eval.slices, describe(prepared.eval)))
    return prepared


def open_policy(
    cfg: Config, runtime: Runtime, run: RunDir, prepared: Prepared, tokenizer: Any, ends: set[int]
) -> tuple[Any, str]:
    """What trains, from its start or its checkpoint: it fits the data and lies on the device; and its adapter's line."""
    with loading(run):
        model, adapter = resumed(cfg, run)
        policy, described = open_network(
            cfg, runtime, model, adapter, cfg.train.gradient_checkpointing, cfg.stage.head(ends), cfg.stage.needs_critic
        )
    check_fits(cfg, policy, tokenizer)
    lengths = np.concatenate([prepared.train.longest, prepared.eval.longest])
    check_rope(policy.network.config, lengths, cfg.data.max_length if prepared.stream else None)
    runtime.place(policy, read_by_all(model, adapter))
    return policy, described


def wrap(cfg: Config, runtime: Runtime, policy: Any, optimizer: torch.optim.Optimizer) -> torch.nn.Module:
    """The policy as the loop calls it; a mixture of experts, its own or its critic's, may leave parameters unused."""
    critic = getattr(policy, "critic", None)
    find_unused = policy.is_mixture or getattr(critic, "is_mixture", False)
    return runtime.wrap(policy, find_unused, optimizer, cfg.optim.max_grad_norm)


def prepare_data(cfg: Config, tokenizer: Any, runtime: Runtime) -> Prepared:
    """Rank 0 tokenises (of a stream the evaluation data alone), then every rank opens what it wrote."""
    make = prepare_stream if cfg.data.streaming else prepare
    on_main(runtime, lambda: make(cfg.data, tokenizer, cfg.stage, cfg.train.seed) and None)
    return make(cfg.data, tokenizer, cfg.stage, cfg.train.seed)


def open_loader(
    cfg: Config, prepared: Prepared, packing: Packing, rank: int = 0, world: int = 1
) -> Loader | StreamLoader:
    """Where steps come from."""
    if prepared.stream:
        return StreamLoader(prepared.stream, packing, cfg.batch.size, cfg.batch.tokens, rank, world)
    assert isinstance(prepared.train, TokenDataset)
    mix = list(cfg.data.mix) if cfg.data.mix else None
    order = Order(np.array(prepared.train.column("source")), cfg.train.seed, cfg.data.shuffle, mix)
    return Loader(prepared.train, order, packing, cfg.batch.size, cfg.batch.tokens, rank, world)


def count_steps(cfg: Config, loader: Loader | StreamLoader) -> tuple[int, int | None]:
    """Optimizer steps, and how many examples are drawn where epochs count; refuses a run that would train nothing."""
    if cfg.train.steps:
        return cfg.train.steps, None
    epochs, warmup = cfg.train.epochs, cfg.schedule.warmup_steps
    assert epochs is not None, "the config gives steps or epochs"
    assert isinstance(loader, Loader), "a stream is counted in steps"
    steps, examples = loader.count_steps(epochs), len(loader.data)
    if not steps:
        raise ConfigError(
            f"train.epochs={epochs:g} of {examples:,} training examples is less than one, so the run would have no step; "
            "try train.epochs=1, or train.steps=1"
        )
    if warmup is not None and warmup >= steps * cfg.stage.updates:
        raise ConfigError(
            f"schedule.warmup_steps={warmup} leaves nothing of the {steps:,} steps in train.epochs={epochs:g}; "
            f"try {steps // 10}"
        )
    return steps * cfg.stage.updates, round(epochs * examples)


def source_dtype(cfg: Config) -> torch.dtype | None:
    """What the model came in: a bf16 model is trained in fp32 master weights and saved in bf16 again."""
    if cfg.model.init == "config" or cfg.model.gguf_file:
        return None
    dtype = load_config(cfg.model).dtype
    return dtype if isinstance(dtype, torch.dtype) else None


@contextmanager
def open_directory(cfg: Config, config: dict[str, Any], runtime: Runtime, verb: str = "train") -> Iterator[RunDir]:
    """The run directory, chosen on rank 0 and this run's alone within the block; errors reach every rank."""
    claim = Claim()
    try:
        yield on_main(runtime, lambda: rundir.open_run(config, cfg.stage_name, claim, verb))
    finally:
        claim.release()


def open_network(
    cfg: Config,
    runtime: Runtime,
    model: ModelConfig,
    adapter: AdapterConfig,
    checkpointing: bool = False,
    head: Head | None = None,
    critic: bool = False,
) -> tuple[Any, str]:
    """The network and its adapter's line."""
    float8 = float8_of(cfg.precision)
    shape_only = not runtime.reads_weights(read_by_all(model, adapter))
    return build_network(
        model, adapter, runtime.compute_dtype, cfg.train.seed, checkpointing, head, critic, float8, shape_only
    )
