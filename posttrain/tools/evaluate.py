"""`posttrain eval`: a model's scores on data, with intervals; nothing is trained."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from posttrain.calibration import write_temperature
from posttrain.companions import check_companions
from posttrain.disk import write_json, writing
from posttrain.errors import ConfigError, DataError
from posttrain.evaluate import Evaluation, Evaluator
from posttrain.frozen import open_frozen
from posttrain.layout import beyond_budget, packing_of, probe_layout
from posttrain.models.load import load_tokenizer
from posttrain.models.networks import Networks
from posttrain.models.probe import probe_positions, sliding_window
from posttrain.models.rope import check_rope
from posttrain.reference import Reference
from posttrain.report.console import Console, interval
from posttrain.report.logbook import Logbook
from posttrain.report.sinks import plain
from posttrain.rundir import RunDir, create
from posttrain.runtime import Runtime
from posttrain.session import (
    check_attention,
    check_fits,
    open_directory,
    open_network,
    open_supply,
    prepare_data,
    stop_ids,
)
from posttrain.summary import Summary

if TYPE_CHECKING:
    from posttrain.config import Config


def evaluate(cfg: Config) -> Summary:
    """Score data.eval (or the held-out part of data.train); writes metrics, records and samples to the run directory."""
    runtime = Runtime(cfg.precision.name, cfg.distribution.name)
    config = cfg.as_dict()
    with runtime.together(), open_directory(cfg, config, runtime, "eval") as run:
        return _evaluate(cfg, config, run, runtime)


def _evaluate(cfg: Config, config: dict[str, Any], run: RunDir, runtime: Runtime) -> Summary:
    console = Console(runtime.is_main)
    check_attention(cfg, runtime)
    tokenizer = load_tokenizer(cfg.model)
    _check_reference(cfg, tokenizer)
    prepared = prepare_data(cfg, tokenizer, runtime)
    if not len(prepared.eval):
        raise DataError(
            f"nothing to score: data.eval_fraction={cfg.data.eval_fraction:g} held none out; give data.eval"
        )
    ends = stop_ids(prepared, tokenizer)
    policy, described = open_network(cfg, runtime, cfg.model, cfg.adapter, head=cfg.stage.head(ends))
    check_fits(cfg, policy, tokenizer)
    check_rope(policy.network.config, prepared.eval.longest)
    policy.to(runtime.device)
    packing = packing_of(cfg, runtime.device.type, prepared)
    probed = probe_positions(prepared.eval.longest, sliding_window(policy.network))
    examples = [group if group.count else group.in_two() for group in prepared.eval.groups(probed)]
    _, packing = probe_layout(cfg, policy, prepared, examples, packing, runtime)
    prepared.lines += beyond_budget(prepared, packing, cfg.data.max_length)
    if cfg.stage.needs_reference(False) != "never":
        reference = Reference(cfg, runtime, packing, {}, prepared.eval.groups(probed), console.line)
        prepared.eval = reference.attach("eval", prepared.eval, prepared.fingerprint, policy)
    networks = Networks(runtime.wrap(policy), policy, tokenizer, described)
    evaluator = Evaluator(cfg.stage, networks, prepared.eval, packing, runtime, cfg.eval, ends, cfg.train.seed)
    if cfg.stage.answer_tokens:
        supply = open_supply(cfg, runtime, packing, ends, tokenizer, run)
        if cfg.model.reference is not None:
            networks.frozen = open_frozen(cfg, runtime, policy, is_start=False)
        evaluator.answers.judge = supply.judge
        evaluator.answers.sampled = partial(cfg.stage.held_out, networks, supply)
    found = evaluator(0, final=True, samples=True)
    summary = Summary(str(run.path), cfg.stage_name, 0, metrics={k: plain(v) for k, v in found.metrics.items()})
    if runtime.is_main:
        facts = {"seed": cfg.train.seed, "data_fingerprint": prepared.fingerprint, "device": runtime.describe()}
        create(run, config, cfg.to_yaml(), cfg.overrides, facts, "eval")
        _write(cfg, run, config, found, summary)
        with writing(run.path):
            write_temperature(run.path, found, cfg.stage.confidence_of, prepared.fingerprint)
        for line in prepared.lines:
            console.line(f"  · {line}")
        rows = [[name, interval(value), getattr(value, "method", "")] for name, value in found.metrics.items()]
        title = f"{cfg.model.path} on {len(prepared.eval):,} examples ({cfg.eval.confidence_level:.0%} intervals)"
        console.table(title, ["", "value", "method"], rows)
        console.line(f"\nwritten to {run.path}")
    return summary


def _check_reference(cfg: Config, tokenizer: Any) -> None:
    if cfg.model.critic is not None:
        raise ConfigError("model.critic is of training alone: posttrain eval asks no critic; leave it out")
    if cfg.stage.needs_reference(False) != "never" and cfg.model.reference is None:
        raise ConfigError(
            f"posttrain eval stage={cfg.stage_name} measures how far a model has come from a reference; set "
            "model.reference to the model it was trained from"
        )
    check_companions(cfg, tokenizer)


def _write(cfg: Config, run: RunDir, config: dict[str, Any], found: Evaluation, summary: Summary) -> None:
    logbook = Logbook(run)
    try:
        logbook.open(cfg.log, config, None)
        logbook.evaluation(found, None)
    finally:
        logbook.close()
    with writing(run.path):
        write_json(run.path / "summary.json", asdict(summary))
