"""`posttrain eval`: a model's scores on data and on tasks of lm-eval's, with intervals; nothing is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from posttrain.calibration import write_temperature
from posttrain.companions import check_companions
from posttrain.data.pipeline import Prepared
from posttrain.disk import write_json, writing
from posttrain.errors import ConfigError, DataError
from posttrain.evaluate import Evaluation, Evaluator
from posttrain.examples import check_slices, describe, write_data
from posttrain.fits import check_attention, check_embeddings, check_fits
from posttrain.frozen import open_frozen
from posttrain.layout import beyond_budget, packing_of, probe_layout
from posttrain.models.load import load_tokenizer
from posttrain.models.networks import Networks, read_by_all
from posttrain.models.probe import probe_positions, sliding_window
from posttrain.models.rope import check_rope
from posttrain.models.sharding import gathered
from posttrain.reference import Reference
from posttrain.report import narrate
from posttrain.report.console import Console
from posttrain.report.live import LivePage
from posttrain.report.logbook import Logbook
from posttrain.report.numbers import interval
from posttrain.report.sinks import plain
from posttrain.rundir import RunDir, create
from posttrain.runtime import Runtime
from posttrain.session import on_main, open_directory, open_network, prepare_data
from posttrain.slices import sliced
from posttrain.startup import open_runtime
from posttrain.summary import Summary
from posttrain.supply import let_judge, open_supply, stop_ids
from posttrain.together import together
from posttrain.tools.harness import HarnessResult, run_tasks
from posttrain.tools.harness_tasks import open_tasks

if TYPE_CHECKING:
    from posttrain.config import Config


def evaluate(cfg: Config) -> Summary:
    """Score data.eval (or the held-out part of data.train), and run eval.harness, alone where no data is given; writes
    metrics, records and samples to the run directory."""
    runtime = open_runtime(cfg)
    config = cfg.as_dict()
    with together(runtime), open_directory(cfg, config, runtime, "eval") as run:
        return _evaluate(cfg, config, run, runtime)


@dataclass
class Scored:
    """What is scored, and what was found. prepared: None where the harness alone is run."""

    policy: Any
    prepared: Prepared | None
    found: Evaluation


def _evaluate(cfg: Config, config: dict[str, Any], run: RunDir, runtime: Runtime) -> Summary:
    console = Console(runtime.is_main)
    check_attention(cfg, runtime)
    tokenizer = load_tokenizer(cfg.model)
    tasks = open_tasks(cfg.eval, runtime.world) if cfg.eval.harness else None
    alone = cfg.data.train is None and cfg.data.eval is None
    scored = _open(cfg, runtime, tokenizer) if alone else _score(cfg, run, runtime, console, tokenizer)
    found, harness = scored.found, HarnessResult()
    if tasks is not None:
        with gathered(scored.policy):
            harness = run_tasks(cfg, tasks, scored.policy.network, tokenizer, runtime)
        found.metrics |= harness.metrics
    summary = Summary(str(run.path), cfg.stage_name, 0, metrics={k: plain(v) for k, v in found.metrics.items()})
    if runtime.is_main:
        if scored.prepared and cfg.eval.slices:
            summary.slices = sliced(cfg, scored.prepared, None, found)
        facts = {"seed": cfg.train.seed, "device": runtime.describe()}
        facts |= {"data_fingerprint": scored.prepared.fingerprint} if scored.prepared else {}
        facts |= {"harness": harness.facts} if harness.facts else {}
        create(run, config, cfg.to_yaml(), cfg.overrides, facts, "eval")
        if scored.prepared:
            _describe(cfg, run, scored.prepared, found)
        _write(cfg, run, config, found, harness, summary)
        LivePage(run, cfg.log.report, console.line).write(at_end=True)
        _tell(cfg, run, console, scored, harness, summary)
    return summary


def _open(cfg: Config, runtime: Runtime, tokenizer: Any) -> Scored:
    """The model alone, a policy whatever the stage."""
    policy, _ = open_network(cfg, runtime, cfg.model, cfg.adapter)
    check_embeddings(policy, tokenizer)
    runtime.place(policy, read_by_all(cfg.model, cfg.adapter))
    return Scored(policy, None, Evaluation(0, {}))


def _score(cfg: Config, run: RunDir, runtime: Runtime, console: Console, tokenizer: Any) -> Scored:
    """The stage's scores on the evaluation data."""
    _check_reference(cfg, tokenizer)
    prepared = prepare_data(cfg, tokenizer, runtime)
    if not len(prepared.eval):
        raise DataError(
            f"nothing to score: data.eval_fraction={cfg.data.eval_fraction:g} held none out; give data.eval"
        )
    if cfg.eval.slices:
        on_main(runtime, lambda: check_slices(cfg.eval.slices, describe(prepared.eval)))
    ends = stop_ids(prepared, tokenizer)
    policy, described = open_network(cfg, runtime, cfg.model, cfg.adapter, head=cfg.stage.head(ends))
    check_fits(cfg, policy, tokenizer)
    check_rope(policy.network.config, prepared.eval.longest)
    runtime.place(policy, read_by_all(cfg.model, cfg.adapter))
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
        let_judge(evaluator, networks, supply)
    return Scored(policy, prepared, evaluator(0, final=True, samples=True))


def _tell(cfg: Config, run: RunDir, console: Console, scored: Scored, harness: HarnessResult, summary: Summary) -> None:
    products = [scored.policy.float8] if scored.policy.float8 else []
    for line in [*(scored.prepared.lines if scored.prepared else ()), *products, *harness.lines]:
        console.line(f"  · {line}")
    rows = [[name, interval(value), getattr(value, "method", "")] for name, value in scored.found.metrics.items()]
    what = [f"{len(scored.prepared.eval):,} examples"] if scored.prepared else []
    what += [", ".join(cfg.eval.harness)] if cfg.eval.harness else []
    title = f"{cfg.model.path} on {' and '.join(what)} ({cfg.eval.confidence_level:.0%} intervals)"
    console.table(title, ["", "value", "method"], rows)
    narrate.show_slices(console, summary.slices)
    console.line(f"\nwritten to {run.path}")


def _check_reference(cfg: Config, tokenizer: Any) -> None:
    if cfg.model.critic is not None:
        raise ConfigError("model.critic is of training alone: posttrain eval asks no critic; leave it out")
    if cfg.stage.needs_reference(False) != "never" and cfg.model.reference is None:
        raise ConfigError(
            f"posttrain eval stage={cfg.stage_name} measures how far a model has come from a reference; set "
            "model.reference to the model it was trained from"
        )
    check_companions(cfg, tokenizer, trains=False)


def _describe(cfg: Config, run: RunDir, prepared: Prepared, found: Evaluation) -> None:
    """What the examples are, and a temperature that was fitted to them."""
    write_data(run.path / "data.json", prepared, [], cfg.data.max_length, cfg.stage.watches)
    with writing(run.path):
        describe(prepared.eval).write(run.path / "eval")
        write_temperature(run.path / "eval", found, cfg.stage.confidence_of, prepared.fingerprint)


def _write(
    cfg: Config, run: RunDir, config: dict[str, Any], found: Evaluation, harness: HarnessResult, summary: Summary
) -> None:
    logbook = Logbook(run)
    try:
        logbook.open(cfg.log, config, None)
        logbook.evaluation(found, None)
        if harness.tasks and not found.ids:  # else its line has them all
            logbook.log("eval", found.step, found.metrics)
    finally:
        logbook.close()
    with writing(run.path):
        for scores in harness.tasks:
            scores.write(run.path / "eval")
        write_json(run.path / "summary.json", asdict(summary))
