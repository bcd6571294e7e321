"""What the parts of a run take: steps, what is sampled, evaluations, the reference's pass."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.answers import prompt_tokens
from posttrain.data.loader import Loader
from posttrain.data.pipeline import Prepared
from posttrain.planning.calibrate import Calibration, Seconds
from posttrain.planning.duration import Pace, evaluations, mean
from posttrain.planning.rehearsal import Rehearsal, tokens_of
from posttrain.planning.writing import Written, write
from posttrain.sampling import Sampling

if TYPE_CHECKING:
    from posttrain.config import Config
    from posttrain.data.streaming.stream import StreamLoader


LONG_SECONDS = 4.0


@dataclass
class Times:
    """step: of an optimizer step. sampling: of an iteration's answers and their scoring, where the stage samples. evaluation:
    each; reference: once, at the start. tokens: of a step, all ranks. measured: tokens of the micro-batches that were run."""

    step: Seconds
    sampling: Seconds
    evaluation: Seconds
    reference: Seconds
    tokens: float
    steps: int
    updates: int
    evaluations: int
    measured: list[int]

    @property
    def whole(self) -> Seconds:
        """The run, without what loading and saving take."""
        iterations = -(-self.steps // self.updates)
        parts = (self.sampling.times(iterations), self.evaluation.times(self.evaluations), self.reference)
        return self.step.times(self.steps).plus(*parts)


def pace_of(cfg: Config, calibration: Calibration, rehearsal: Rehearsal, trained: int) -> Pace:
    """trained: how many numbers this rank's optimizer moves. The smallest micro-batch is measured too, unless that takes long:
    then times are in proportion to tokens."""
    update, began = calibration.update_seconds(cfg.optim, trained), time.perf_counter()
    micro = [calibration.seconds_of(rehearsal.largest)]
    if time.perf_counter() - began < LONG_SECONDS and tokens_of(rehearsal.smallest) < micro[0].tokens:
        micro.append(calibration.seconds_of(rehearsal.smallest))
    return Pace(micro, calibration.scoring_seconds(rehearsal.largest), update, cfg.train.gradient_checkpointing)


def sampled(cfg: Config, loader: Loader | StreamLoader, calibration: Calibration) -> Written | None:
    """An iteration's answers, where this process writes them."""
    stage: Any = cfg.stage
    if not stage.answer_tokens or stage.rollout_server is not None:
        return None
    assert isinstance(loader, Loader), "a stage that samples is not streamed"
    prompts = [group.prompt for group in loader.take(0)][:: loader.world]
    drawn = Sampling(stage.temperature, stage.top_k, stage.top_p)
    return write(calibration, prompts, stage.samples, stage.max_new_tokens, drawn)


def times_of(
    cfg: Config,
    prepared: Prepared,
    loader: Loader | StreamLoader,
    calibration: Calibration,
    rehearsal: Rehearsal,
    pace: Pace,
    written: Written | None,
    steps: int,
) -> Times:
    stage, layout, world = cfg.stage, loader.packing.layout, loader.world
    sampling = evaluation = reference = Seconds()
    looks = evaluations(steps, cfg.train.eval_every)
    if stage.answer_tokens:
        minibatches = stage.updates / getattr(stage, "epochs", 1)
        read = pace.reading(minibatches * sum(map(sum, rehearsal.sizes)) / len(rehearsal.sizes))
        sampling = read.times(2 if stage.keeps_reference else 1).plus(written.seconds if written else Seconds())
    else:
        evaluation = pace.reading(float(prepared.eval.processed(layout).sum()) / world)
        looks += 1  # once more, at the temperature that was fitted
    if stage.needs_reference(False) == "always":
        reference = evaluation.plus(pace.reading(float(prepared.train.processed(layout).sum()) / world))
    share = 2.0 if stage.answer_tokens else 2 / looks  # greedy and sampled each time; others at the start and the end
    evaluation = evaluation.plus(_answers(cfg, prepared, calibration).times(share / world))
    step = mean([pace.step(sizes) for sizes in rehearsal.sizes])
    tokens = sum(step.tokens for step in rehearsal.steps) / len(rehearsal.steps)
    sizes = [micro.tokens for micro in pace.micro]
    return Times(step, sampling, evaluation, reference, tokens, steps, stage.updates, looks, sizes)


def _answers(cfg: Config, prepared: Prepared, calibration: Calibration) -> Seconds:
    """Those that an evaluation asks for, each as long as it may be."""
    asked = min(cfg.eval.generate, len(prepared.eval)) if cfg.stage.generates else 0
    if not asked:
        return Seconds()
    prompts = [prompt_tokens(group) for group in prepared.eval.groups(range(asked))]
    return write(calibration, prompts, 1, cfg.eval.max_new_tokens, Sampling()).seconds
