"""What stands in a run's directory before its first step, what an evaluation leaves there, and its end. Rank 0 only."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from posttrain import checkpoint
from posttrain.calibration import FILE, usable, write_temperature
from posttrain.disk import whole_directory, write_json, writing
from posttrain.evaluate import Evaluation
from posttrain.examples import describe, write_data
from posttrain.models.export import save_model
from posttrain.report import narrate
from posttrain.rundir import create
from posttrain.slices import sliced
from posttrain.summary import Summary

if TYPE_CHECKING:
    from posttrain.session import Session


def write_start(session: Session, config: dict[str, Any], is_over: bool) -> None:
    """The record of the run, its data and its examples; what is later than the step it goes on from is removed. is_over: no
    step is left to it."""
    cfg, run, step = session.cfg, session.run, session.state.step
    facts = {
        "seed": cfg.train.seed,
        "data_fingerprint": session.prepared.fingerprint,
        "device": session.runtime.describe(),
    }
    create(run, config, cfg.to_yaml(), cfg.overrides, facts)
    dropped = checkpoint.drop_newer(run.checkpoints, step)
    for file in (run.path / "eval").glob("step-*.parquet"):
        if int(file.stem.removeprefix("step-")) > step:  # their lines are cut from metrics.jsonl, too
            file.unlink()
    if not is_over:
        (run.path / "eval" / FILE).unlink(missing_ok=True)
    if dropped:
        session.console.line(f"removed {', '.join(dropped)}: later than the checkpoint that train.resume names")
    rows = narrate.plan_rows(session)
    write_data(run.path / "data.json", session.prepared, rows, cfg.data.max_length, cfg.stage.watches)
    if len(session.prepared.eval):
        with writing(run.path):
            describe(session.prepared.eval).write(run.path / "eval")


def keep_temperature(session: Session, found: Evaluation) -> None:
    """eval/temperature.json, where this evaluation fitted one."""
    if usable(found.metrics) is None:
        return
    with writing(session.run.path):
        write_temperature(
            session.run.path / "eval", found, session.cfg.stage.confidence_of, session.prepared.fingerprint
        )


def write_model(session: Session, weights: dict[str, torch.Tensor] | None) -> None:
    """model/, and the fitted temperature beside its weights. weights: what saving.collected has put together."""
    run, networks = session.run, session.networks
    with writing(run.model), whole_directory(run.model, run.path / ".model.tmp") as scratch:
        save_model(networks, scratch, session.ends, networks.source_dtype, state=weights)
        if (fitted := run.path / "eval" / FILE).is_file():
            shutil.copyfile(fitted, scratch / FILE)


def write_summary(session: Session, summary: Summary, start: Evaluation | None, end: Evaluation | None) -> None:
    """summary.json, whose comparison of the two evaluations is filled in; with it the run is finished."""
    cfg = session.cfg
    summary.compare(start, end, cfg.eval, cfg.train.seed)
    if cfg.eval.slices and end is not None:
        summary.slices = sliced(cfg, session.prepared, start, end)
    with writing(session.run.path):
        write_json(session.run.path / "summary.json", asdict(summary))
