"""The only loop. It pulls batches from the stage and does every optimizer step itself, for all stages alike."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

import torch

from posttrain import checkpoint
from posttrain.data.loader import Step
from posttrain.errors import Stopped
from posttrain.evaluate import Evaluation
from posttrain.finite import check_finite
from posttrain.meter import Meter
from posttrain.optim import learning_rate
from posttrain.report import narrate
from posttrain.report.console import Console
from posttrain.report.live import LivePage
from posttrain.report.logbook import Logbook
from posttrain.report.progress import tell_step
from posttrain.runfiles import keep_temperature, write_model, write_start, write_summary
from posttrain.saving import collected, save_checkpoint
from posttrain.seeds import rng_state
from posttrain.session import Session, open_directory, open_session
from posttrain.signals import StopRequest
from posttrain.startup import open_runtime
from posttrain.stats import LOWER_IS_BETTER
from posttrain.summary import Summary
from posttrain.together import together

if TYPE_CHECKING:
    from posttrain.config import Config


def train(cfg: Config) -> Summary:
    """The whole run of a config: returns its Summary, written to summary.json too."""
    runtime = open_runtime(cfg)
    console = Console(runtime.is_main)
    config = cfg.as_dict()
    with together(runtime), open_directory(cfg, config, runtime) as run:
        if run.finished:
            summary = Summary(**json.loads((run.path / "summary.json").read_text(encoding="utf-8")))
            console.line(f"{run.path} is already finished ({summary.steps} steps); nothing to do")
            return summary
        return Trainer(open_session(cfg, runtime, console, run), config).run()


class Trainer:
    """Runs a session's steps; `state` is what a checkpoint keeps of it."""

    def __init__(self, session: Session, config: dict[str, Any]) -> None:
        self.session, self.config = session, config
        self.runtime, self.state, self.cfg = session.runtime, session.state, session.cfg
        self.scaler = session.runtime.loss_scaler
        if self.scaler is not None:
            self.scaler.load(self.state.loss_scaler)
        self.meter = Meter(session.runtime, session.cfg.stage.weights(), session.state.pooled)
        self.logbook = Logbook(session.run)
        self.page = LivePage(session.run, session.cfg.log.report and self.runtime.is_main, session.console.line)
        self.stop = StopRequest()
        self.stopping = 0
        self.told: dict[str, Any] = {}
        self.rollouts: list[dict[str, Any]] = []
        self.start: Evaluation | None = None
        self.eval_every = self.cfg.train.eval_every or max(1, -(-session.steps // 5))
        self.save_every = self.cfg.train.save_every or self.eval_every

    def run(self) -> Summary:
        try:
            self._open()
            narrate.plan(self.session)
            with self.stop.listening(self.session.console.line):
                self._begin()
                evaluation = self._fit()
            return self._finish(evaluation)
        finally:
            self.session.console.stop_progress()
            self.logbook.close()

    def _open(self) -> None:
        """The run directory and its logs, on rank 0."""
        if not self.runtime.is_main:
            return
        write_start(self.session, self.config, self._is_over)
        self.logbook.open(self.cfg.log, self.config, self.state.step if self.session.run.checkpoint else None)

    def _begin(self) -> None:
        """Evaluate before the first step, or read back what an earlier process found then."""
        self.start = self.logbook.first_evaluation() if self.session.run.checkpoint else None
        if not self.runtime.share(self.start is not None):
            start = self._evaluate(with_samples=True)
            self.logbook.evaluation(start, None)
            self.start = start
            if self.state.best_value is None:
                self._judge(start)
                self.state.evaluations_since_best = 0  # even where the start's score is not finite
        narrate.start(self.session, self.start)

    def _fit(self) -> Evaluation | None:
        """Every optimizer step; returns the last evaluation."""
        session, state, train = self.session, self.state, self.cfg.train
        if self._is_over:  # killed between the last checkpoint and summary.json
            return self.logbook.evaluation_at(state.step)
        session.networks.train(True)
        evaluation: Evaluation | None = None
        session.console.start_progress(session.steps, state.step)
        looked, saved = state.step, state.step
        for step in self.cfg.stage.batches(session.networks, session.supply, state.step, session.steps):
            self._update(step)
            last = state.step == session.steps
            if state.step % train.log_every == 0 or last:
                self._log()
            if not step.closes():
                continue
            if last or state.step // self.eval_every > looked // self.eval_every:
                evaluation, looked = self._look(last), state.step
            due = state.step // self.save_every > saved // self.save_every or state.best_step == state.step
            if due or self._is_over or self.stopping:
                self._save()
                saved = state.step
            if self._is_over:
                break
            if self.stopping:
                raise Stopped(self.stopping, str(session.run.path))
        return evaluation

    @property
    def _is_over(self) -> bool:
        """All steps are done, or train.patience is at its end."""
        patience = self.cfg.train.patience
        impatient = patience is not None and self.state.evaluations_since_best >= patience
        return self.state.step >= self.session.steps or impatient

    def _update(self, step: Step) -> None:
        """One optimizer step: sums over micro-batches and ranks, divided once by the step's counts."""
        began, runtime, stage, session = time.monotonic(), self.runtime, self.cfg.stage, self.session
        counts, losses = self._global_counts(step), []
        weights = stage.weights()
        for i, micro in enumerate(step.micro_batches):
            with runtime.sync_only(i == len(step.micro_batches) - 1, session.networks.policy):
                loss = stage.loss(session.networks, micro.to(runtime.device))
                parts = [weights.get(k, 1.0) * term / max(counts[k], 1e-9) for k, term in loss.terms.items()]
                total = torch.stack(parts).sum()
                runtime.backward(total * runtime.world)  # DDP averages over ranks; the counts are global already
            self.meter.add_loss(loss, stage.counts(micro))
            for name, (told, count) in loss.stats.items():
                before = step.measured.get(name, (0.0, 0.0))
                step.measured[name] = (before[0] + told, before[1] + count)
            losses.append(total.detach())
        for parameter in stage.resting(session.networks, step):
            parameter.grad = None
        lr = learning_rate(self.state.step, session.steps, self.cfg.optim.lr, self.cfg.schedule)
        for group in session.optimizer.param_groups:
            group["lr"] = lr
        norm, good = runtime.step(
            session.optimizer,
            session.networks.parameters,
            self.cfg.optim.max_grad_norm,
            lambda norm: check_finite(session, norm, torch.stack(losses), step),
        )
        if runtime.world == 1:
            self.stopping = self.stop.number
        self._advance(step, float(norm) if good else None, lr, time.monotonic() - began)

    def _global_counts(self, step: Step) -> dict[str, float]:
        """Units of each loss term over the whole step; a signal to any rank travels along, so that all stop together.

        A rank that hears one later than this waits for the next step: the others must hear of it first.
        """
        counts = {"_signal": float(self.stop.number), "_heard": float(self.stop.number > 0)}
        for micro in step.micro_batches:
            for name, count in self.cfg.stage.counts(micro).items():
                counts[name] = counts.get(name, 0.0) + count
        counts = self.runtime.global_sum(counts)
        signal, ranks = counts.pop("_signal"), counts.pop("_heard")
        self.stopping = self.stop.number or int(signal / ranks) if ranks else 0
        return counts

    def _advance(self, step: Step, norm: float | None, lr: float, seconds: float) -> None:
        state = self.state
        state.step, state.lr, state.stream = state.step + 1, lr, step.stream
        self.told |= step.told
        self.rollouts = step.rollouts or self.rollouts
        state.tokens, state.trained_tokens = state.tokens + step.tokens, state.trained_tokens + step.trained_tokens
        state.seconds += seconds
        self.meter.add_step(norm, self.cfg.optim.max_grad_norm, step.tokens, seconds)
        self.session.console.advance(state.step)

    def _log(self) -> None:
        state, speed, since = self.state, self.meter.tokens_per_second, self.meter.since()
        metrics: dict[str, Any] = dict(self.meter.flush())
        metrics |= self.told | {"lr": state.lr, "tokens": state.tokens, "trained_tokens": state.trained_tokens}
        metrics |= self.session.loader.metrics()
        if self.scaler is not None:
            metrics |= {"loss_scale": self.scaler.value, "skipped_steps": state.skipped_steps}
        metrics |= {"tokens_per_second": speed, "peak_memory_bytes": self.runtime.peak_memory_bytes()}
        if self.cfg.stage.answers:
            metrics |= since
        self.logbook.log("train", state.step, metrics)
        tell_step(self.session, metrics)

    def _look(self, last: bool) -> Evaluation:
        """Evaluate while training; the evaluation that ends the run, by steps or by patience, is a final one."""
        found = self._evaluate(final=last, with_samples=last)
        self._judge(found)
        if self._is_over and not last:
            found = self._evaluate(final=True, with_samples=True)
        if self.runtime.is_main:
            keep_temperature(self.session, found)  # before its line: who finds that finds this
        self.logbook.evaluation(found, self.start, self.rollouts)
        narrate.evaluation(self.session, found)
        self.page.write()
        return found

    def _evaluate(self, final: bool = False, with_samples: bool = False) -> Evaluation:
        return self.session.evaluator(self.state.step, final=final, samples=with_samples)

    def _judge(self, evaluation: Evaluation) -> None:
        """Best so far, and how long since; a score that is not finite is no best.

        The start counts: where no later evaluation beats it, there is no best checkpoint.
        """
        watched, state = self.cfg.stage.watches, self.state
        value = evaluation.value(watched)
        sign = 1 if watched in LOWER_IS_BETTER else -1
        if math.isfinite(value) and (state.best_value is None or sign * value < sign * state.best_value):
            state.best_value, state.best_step, state.evaluations_since_best = value, state.step, 0
        else:
            state.evaluations_since_best += 1

    def _save(self) -> None:
        run, state = self.session.run, self.state
        state.loss_scaler = {} if self.scaler is None else self.scaler.state()
        rng, state.pooled = self.runtime.gather([rng_state()]), self.runtime.gather([self.meter.state()])
        if self.runtime.is_main:
            self.logbook.flush()
        session = self.session
        save_checkpoint(run.checkpoints, state, session.networks, session.optimizer, rng, session.ends, self.runtime)
        if self.runtime.is_main:
            checkpoint.rotate(run.checkpoints, self.cfg.train.keep_checkpoints, state.best_step)
        self.runtime.barrier()

    def _finish(self, evaluation: Evaluation | None) -> Summary:
        session = self.session
        session.console.stop_progress()
        summary = Summary.of(session, self.meter.tokens_per_second)
        weights = collected(session.networks, self.runtime)
        if self.runtime.is_main:
            write_model(session, weights)
            write_summary(session, summary, self.start, evaluation)
            self.page.write(at_end=True)
            narrate.result(session, summary, self.start, evaluation)
        self.runtime.barrier()
        return summary
