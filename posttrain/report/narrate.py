"""The story of a run, told in order: plan and example, start, each evaluation, the final table, what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import stats
from posttrain.answers import Sample
from posttrain.evaluate import Evaluation
from posttrain.models.adapters import parameter_count
from posttrain.models.export import NO_PADDING, free_pad
from posttrain.models.lineage import folded
from posttrain.models.reward import RewardModel
from posttrain.models.sharding import numbers
from posttrain.report.console import Console
from posttrain.report.numbers import interval, signed
from posttrain.report.verdicts import SHOWN, claims_nothing, holds_up, verdict

if TYPE_CHECKING:
    from posttrain.config import Config
    from posttrain.session import Session
    from posttrain.summary import Summary

IN_A_LINE = ("accuracy", "pair_accuracy", "objective", "reward", "nll", "perplexity", "token_accuracy", "kl", "ece")
"""Metrics of the line that each evaluation gets."""

SHOWN_SAMPLES = 3


def plan(session: Session) -> None:
    """Before anything is trained: what will happen, and one example as the model sees it."""
    cfg, console, prepared = session.cfg, session.console, session.prepared
    console.facts(f"posttrain {cfg.stage_name}", plan_rows(session))
    pads = free_pad(session.networks.tokenizer, session.ends) is not None
    for line in [*prepared.lines, *([] if cfg.stage.generates or pads else [NO_PADDING])]:
        console.line(f"  · {line}")
    example = prepared.train.groups([0])[0]
    if example.count:
        console.example(example, session.networks.tokenizer)
    else:
        console.example(example, session.networks.tokenizer, "one prompt as the model sees it")
    if len(session.prepared.eval) == 0:
        console.line("\nwarning: no evaluation examples (data.eval_fraction held none out): no score will be reported")
    elif len(session.prepared.eval) < 30:
        console.line(
            f"\nwarning: only {len(session.prepared.eval)} evaluation examples: intervals will be wide (t, few examples)"
        )


def plan_rows(session: Session) -> list[tuple[str, str]]:
    """What: value, for the plan's table."""
    cfg, prepared, loader = session.cfg, session.prepared, session.loader
    module = session.networks.module
    total = parameter_count(module)
    trained = sum(numbers(p) for p in session.networks.parameters)
    size = f"{cfg.batch.size} examples" if cfg.batch.size else f"about {cfg.batch.tokens:,} tokens"
    drawn = session.draws or session.steps // cfg.stage.updates * (cfg.batch.size or 0)
    known = drawn and not prepared.stream
    epochs = f" ({drawn / len(prepared.train):.2g} epochs)" if known else ""
    where = f"{session.run.path}" + (f" (continues at step {session.state.step})" if session.state.step else "")
    dtype = str(module.network.dtype).removeprefix("torch.")
    dtype = f"4 bits and {dtype}" if cfg.adapter.name == "qlora" else dtype
    layout = loader.packing.layout
    reference = cfg.model.reference or "the policy as it starts"
    stops = ", ".join(repr(session.networks.tokenizer.decode([i])) for i in sorted(session.ends))
    return [
        (
            "model",
            f"{cfg.model.path}: {module.network.config.model_type}, {total:,} parameters in {dtype}{folded(cfg.model.path)}",
        ),
        ("trained", f"{trained:,} parameters ({trained / total:.1%}), adapter {session.networks.adapter}"),
        *prepared.facts(layout),
        (
            "steps",
            f"{session.steps:,} of {size}{epochs}, {layout}, <= {loader.packing.micro_tokens:,} tokens a forward",
        ),
        *cfg.stage.facts(),
        ("optimizer", f"{cfg.optim.name}, lr {cfg.optim.lr:g} {cfg.schedule.name}, seed {cfg.train.seed}"),
        ("device", session.runtime.describe()),
        *float8_facts(module),
        ("checked", ", ".join(f"{k} agrees to {v:.0e}" for k, v in session.probe.items())),
        *([("reference", f"{reference}: log-probs computed once")] if session.state.reference else []),
        *([("stops at", stops)] if cfg.stage.generates else []),
        ("run", where),
    ]


def float8_facts(module: Any) -> list[tuple[str, str]]:
    """What precision=fp8 made of the network, and of a critic that is one of its own."""
    critic = getattr(getattr(module, "critic", None), "float8", "")
    return [(name, line) for name, line in (("float8", module.float8), ("its critic", critic)) if line]


def start(session: Session, evaluation: Evaluation | None) -> None:
    """The scores before the first step."""
    if evaluation is not None and evaluation.metrics and session.runtime.is_main:
        session.console.title(f"step {evaluation.step} (before training; {_level(session.cfg)} intervals)")
        session.console.line("  " + _scores(evaluation))
        session.console.title("training")


def evaluation(session: Session, found: Evaluation) -> None:
    """One line an evaluation."""
    if found.metrics and session.runtime.is_main:
        session.console.line(f"step {found.step}/{session.steps}  eval {_scores(found)}")


def result(session: Session, summary: Summary, first: Evaluation | None, last: Evaluation | None) -> None:
    """The final table, a few answers before and after, and what to type next."""
    console = session.console
    if first is not None and last is not None and last.metrics:
        undecided = session.cfg.stage.undecided
        rows = [
            _row(name, first, last, summary.changes.get(name), name not in undecided)
            for name in SHOWN
            if name in last.metrics
        ]
        header = ["", "start", "end", "change", ""]
        console.table(
            f"result on {len(set(last.clusters)):,} evaluation examples ({_level(session.cfg)} intervals)", header, rows
        )
        if "ece_noise_floor" in last.metrics:
            told = [name for name in ("ece", "ece_equal_mass") if f"{name}_noise_floor" in last.metrics]
            floors = ", ".join(f"{name} {interval(_plain(last, f'{name}_noise_floor'))}" for name in told)
            console.line(f"  (a perfectly calibrated model would read {floors} on these examples)")
        if "ece_calibrated" in last.metrics:
            names = ("temperature", "ece_uncalibrated", "ece_calibrated")
            fitted, before, after = (interval(_plain(last, name)) for name in names)
            console.line(
                f"  (temperature {fitted}, fitted on one half; at it the other's ece goes from {before} to {after})"
            )
        _show_samples(session, first.samples, last.samples)
    show_slices(console, summary.slices)
    speed = f", {summary.tokens_per_second:,.0f} tokens/s after the first step" if summary.tokens_per_second else ""
    memory = summary.peak_memory_bytes / 2**30
    stopped = " (stopped early: no better for train.patience evaluations)" if summary.stopped_early else ""
    console.line(
        f"\n{summary.steps:,} steps{stopped}, {summary.tokens:,} tokens in {summary.seconds:.0f} s{speed}, {memory:.1f} GiB peak"
    )
    for line in session.prepared.stream.lines() if session.prepared.stream else []:
        console.line(f"  · {line}")
    if summary.best_checkpoint and session.state.best_step != summary.steps:
        console.line(
            f"model/ holds the last step's weights; the best evaluation's are in {summary.best_checkpoint}/model"
        )
    elif first is not None and last is not None and last.metrics and not summary.best_checkpoint:
        console.line(f"no later evaluation beat the start's {session.cfg.stage.watches}: there is no best checkpoint")
    pads = free_pad(session.networks.tokenizer, session.ends) is not None
    console.facts("next", next_commands(summary, session.networks.module, pads))


def next_commands(summary: Summary, module: Any, pads: bool = True) -> list[tuple[str, str]]:
    """What a user may want to type now. module: the policy or reward model; pads: whether it can be given several texts at
    once."""
    run = summary.run_dir
    there = [name for name in ("samples.jsonl", "report.html") if (Path(run) / name).is_file()]
    files = ", ".join(["metrics.jsonl", *there, "summary.json"])
    use = ("talk to it", f"posttrain chat {run}")
    if isinstance(module, RewardModel):
        alone = "" if pads else ", one text at a time: it has no pad token"
        use = ("load it", f"AutoModelForSequenceClassification.from_pretrained('{run}/model'){alone}")
        if module.model is not module.network:
            use = ("whole weights", f"posttrain merge {run} {run}-merged")
        if module.pooling != "last":
            use = (
                "score with it",
                f"here alone: other tools pool the last token, this pools stage.pooling={module.pooling}",
            )
    return [
        use,
        ("its files", f"{run}/model (weights), {files}"),
        ("again, longer", f"posttrain recipe={run}/config.yaml train.steps={2 * summary.steps} run.dir={run}-longer"),
    ]


def _show_samples(session: Session, before: list[Sample], after: list[Sample]) -> None:
    """A few answers that changed, else the first few."""
    earlier = {sample.id: sample.answer for sample in before}
    changed = [s for s in after if earlier.get(s.id, s.answer) != s.answer]
    chosen = (changed or after)[:SHOWN_SAMPLES]
    if chosen:
        rows = [
            [_short(s.question or s.prompt, 40), _short(earlier.get(s.id, "")), _short(s.answer), _short(s.reference)]
            for s in chosen
        ]
        session.console.table("answers", ["prompt", "before", "after", "reference"], rows)


def show_slices(console: Console, slices: list[dict[str, Any]]) -> None:
    """A row a slice; a change is told as one only if it holds up among as many slices as there are (Holm)."""
    if not slices:
        return
    rows = []
    for row in slices:
        ends = [interval(stats.Estimate(**row[side])) if row[side] else "–" for side in ("start", "end")]
        change = row["change"]
        told = "–" if change is None or change["low"] is None else _change(change)
        said = verdict(change)
        said = "no detectable change" if said and not holds_up(change) else said
        rows.append([row["metric"], f"{row['by']} {row['value']}", f"{row['examples']:,}", *ends, told, said])
    console.table(
        "slices (verdicts corrected for their number)", ["", "", "examples", "start", "end", "change", ""], rows
    )


def _change(change: dict[str, Any]) -> str:
    return f"{signed(change['value'])} [{signed(change['low'])}, {signed(change['high'])}]"


def _row(name: str, first: Evaluation, last: Evaluation, change: dict[str, Any] | None, judged: bool) -> list[str]:
    told = "–" if change is None else _change(change)
    nothing = claims_nothing(name, first.value("ece"), first.value("pair_accuracy"))
    silent = not judged or name in stats.NEITHER or nothing
    said = "" if silent else verdict(change)
    return [name, interval(_plain(first, name)), interval(_plain(last, name)), told, said]


def _plain(evaluation: Evaluation, name: str) -> Any:
    found = evaluation.metrics.get(name)
    return stats.Estimate(**found) if isinstance(found, dict) else found


def _scores(evaluation: Evaluation) -> str:
    names = [name for name in IN_A_LINE if name in evaluation.metrics]
    return "  ".join(f"{name} {interval(_plain(evaluation, name))}" for name in names)


def _short(text: str, width: int = 30) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _level(cfg: Config) -> str:
    return f"{cfg.eval.confidence_level:.0%}"
