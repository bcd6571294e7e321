"""`posttrain eval`: a model's scores on data, with intervals; nothing is trained."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from posttrain.evaluate import Evaluator, write_records
from posttrain.models.load import load_tokenizer
from posttrain.models.networks import Networks, build_policy
from posttrain.report import samples
from posttrain.report.console import Console, interval
from posttrain.report.sinks import open_sinks, plain
from posttrain.rundir import create, write_json
from posttrain.runtime import Runtime
from posttrain.session import check_fits, open_directory, packing_of, prepare_data, stop_ids
from posttrain.summary import Summary

if TYPE_CHECKING:
    from posttrain.config import Config


def evaluate(cfg: Config) -> Summary:
    """Score data.eval (or the held-out part of data.train); writes metrics, records and samples to the run directory."""
    runtime = Runtime(cfg.precision.name, cfg.distribution.name)
    console, config = Console(runtime.is_main), cfg.as_dict()
    run = open_directory(cfg, config, runtime)
    tokenizer = load_tokenizer(cfg.model)
    prepared = prepare_data(cfg, tokenizer, runtime)
    ends = stop_ids(prepared, tokenizer)
    policy, described = build_policy(cfg.model, cfg.adapter, runtime.compute_dtype, cfg.train.seed, False)
    check_fits(cfg, policy, tokenizer)
    networks = Networks(runtime.wrap(policy), policy, tokenizer, described)
    packing = packing_of(cfg, runtime.device.type)
    evaluator = Evaluator(cfg.stage, networks, prepared.eval, packing, runtime, cfg.eval, ends, cfg.train.seed)
    found = evaluator(0, final=True, samples=True)
    summary = Summary(str(run.path), cfg.stage_name, 0, metrics={k: plain(v) for k, v in found.metrics.items()})
    if runtime.is_main:
        create(run, config, cfg.to_yaml(), cfg.overrides, {"seed": cfg.train.seed, "device": runtime.describe()})
        for sink in open_sinks(cfg.log, run.path, config, None):
            sink.log(0, "eval", found.metrics, 0.0)
            sink.close()
        write_records(run.records(0), found)
        if found.samples:
            samples.write(run, [], found.samples, 0)
        write_json(run.path / "summary.json", asdict(summary))
        rows = [[name, interval(value), getattr(value, "method", "")] for name, value in found.metrics.items()]
        title = f"{cfg.model.path} on {len(prepared.eval):,} examples ({cfg.eval.confidence_level:.0%} intervals)"
        console.table(title, ["", "value", "method"], rows)
        console.line(f"\nwritten to {run.path}")
    return summary
