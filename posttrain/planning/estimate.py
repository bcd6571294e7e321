"""A run's memory and time, from its config, its data's shapes and one layer that was run: no weights are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from posttrain.answers import prompt_tokens
from posttrain.data.loader import Loader
from posttrain.data.pipeline import Prepared
from posttrain.errors import UserError
from posttrain.models.decoder import Decoder
from posttrain.planning.calibrate import Calibration, Seconds
from posttrain.planning.duration import Pace, evaluations, mean
from posttrain.planning.held import frozen_beside, held_by
from posttrain.planning.memory import MOMENTS_BYTES, Moment, OutsideBytes, Run, sharing
from posttrain.planning.rehearsal import Rehearsal, rehearse
from posttrain.planning.skeleton import Skeleton, Unmeasurable
from posttrain.planning.writing import Written, write
from posttrain.sampling import Sampling

if TYPE_CHECKING:
    from posttrain.config import Config
    from posttrain.data.streaming.stream import StreamLoader
    from posttrain.runtime import Runtime

ROOM = 0.8
"""Share of the free memory that running one layer may take."""


@dataclass
class Times:
    """step: of an optimizer step. sampling: of an iteration's answers and their scoring, where the stage samples. evaluation:
    each; reference: once, at the start. tokens: of a step, all ranks."""

    step: Seconds
    evaluation: Seconds
    sampling: Seconds
    reference: Seconds
    tokens: float
    steps: int
    updates: int
    evaluations: int

    @property
    def whole(self) -> Seconds:
        """The run, without what loading and saving take."""
        iterations = -(-self.steps // self.updates)
        parts = (self.sampling.times(iterations), self.evaluation.times(self.evaluations), self.reference)
        return self.step.times(self.steps).plus(*parts)


@dataclass
class Estimate:
    """moments: of the memory of one device. process: what this process holds before any of it, where that is the same memory
    (a CPU). times, measured: None and why not, where a layer could not be run."""

    moments: dict[str, Moment]
    process: int
    times: Times | None
    measured: str
    rehearsal: Rehearsal | None = field(default=None, repr=False)


def world_of(cfg: Config, runtime: Runtime) -> int:
    """Ranks of the planned run: those it will be started with, or those there are."""
    return cfg.run.processes or runtime.world


def estimate(
    cfg: Config, runtime: Runtime, prepared: Prepared, loader: Loader | StreamLoader, module: Decoder, steps: int
) -> Estimate:
    """module: the trained network's shapes (models.networks.shape_network); its parameters become real, a layer's worth."""
    world, process = loader.world, resident() if runtime.device.type == "cpu" else 0
    options: Any = cfg.distribution
    host, stage = bool(getattr(options, "cpu_offload", False)), int(getattr(options, "zero_stage", 3))
    run = Run(
        held_by(module), sharing(cfg.distribution.name, world, stage, host), MOMENTS_BYTES[cfg.optim.name], [],
        OutsideBytes(0, 0, 0, 0, 0), False, cfg.train.gradient_checkpointing, runtime.compute_dtype.itemsize,
        frozen_beside(cfg, module, runtime.compute_dtype),
    )  # fmt: skip
    try:
        rehearsal = rehearse(cfg, prepared, loader, steps)
        calibration = _calibration(cfg, runtime, module, run)
        run, times = _measured(cfg, prepared, loader, calibration, rehearsal, run, steps)
    except UserError:
        raise
    except Unmeasurable as error:
        return Estimate(run.moments(), process, None, str(error))
    except Exception as error:  # a foreign model's code, run otherwise than it expects
        told = f"{module.network.config.model_type} cannot be run a layer at a time ({type(error).__name__}: {error})"
        return Estimate(run.moments(), process, None, told)
    kinds = calibration.skeleton.kinds
    layers = f"1 of {kinds[0].count}" if len(kinds) == 1 else f"{len(kinds)} of {sum(k.count for k in kinds)}"
    sizes = ", ".join(f"{m.input_ids.numel():,}" for m in rehearsal.samples())
    measured = f"{layers} layers with random weights, and the output layer, on forwards of {sizes} tokens"
    return Estimate(run.moments(), process, times, measured, rehearsal)


def _calibration(cfg: Config, runtime: Runtime, module: Decoder, run: Run) -> Calibration:
    """Weights, gradients and AdamW's averages of one layer, weights and gradient of what is outside."""
    needed = 16 * run.held.layer + 8 * run.held.outside
    free = free_bytes(runtime.device)
    if free is not None and needed > ROOM * free:
        raise Unmeasurable(
            f"one layer and the output layer take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        )
    return Calibration(Skeleton(module, runtime.device), cfg.stage, runtime)


def _measured(
    cfg: Config,
    prepared: Prepared,
    loader: Loader | StreamLoader,
    calibration: Calibration,
    rehearsal: Rehearsal,
    run: Run,
    steps: int,
) -> tuple[Run, Times]:
    layers, outside = calibration.bytes_of(rehearsal.largest, rehearsal.accumulates)
    scoring = calibration.scoring_bytes(rehearsal.largest) + max(each.forward + each.kept for each in layers)
    run = replace(run, layers=layers, outside=outside, accumulates=rehearsal.accumulates, scoring=scoring)
    update = calibration.update_seconds(cfg.optim, round(run.held.trained * run.share.optimizer))
    pace = Pace([calibration.seconds_of(b) for b in rehearsal.samples()], update, cfg.train.gradient_checkpointing)
    stage: Any = cfg.stage
    sampling = answering = Seconds()
    if stage.answer_tokens and stage.rollout_server is None:
        assert isinstance(loader, Loader)
        prompts = [group.prompt for group in loader.take(0)][:: loader.world]
        drawn = Sampling(stage.temperature, stage.top_k, stage.top_p)
        written = write(calibration, prompts, stage.samples, stage.max_new_tokens, drawn)
        run = replace(run, cache=written.cache, sampling=written.beside)
        reads = 2 if run.frozen or stage.keeps_reference else 1
        own = sum(sum(sizes) for sizes in rehearsal.sizes) * stage.minibatches
        sampling = written.seconds.plus(_reading(pace, own).times(reads))
    asked = cfg.eval.generate if len(prepared.eval) and stage.generates else 0
    if asked:
        answers = _answers(cfg, prepared, calibration, asked)
        every = evaluations(steps, cfg.train.eval_every) if stage.answer_tokens else 2
        share = every / evaluations(steps, cfg.train.eval_every) / loader.world
        answering = answers.seconds.times(share * (2 if stage.answer_tokens else 1))  # a sampled one beside the greedy
    tokens = int(prepared.eval.processed(loader.packing.layout).sum()) / loader.world
    evaluation = Seconds() if stage.answer_tokens else _reading(pace, tokens)
    reference = Seconds()
    if stage.needs_reference(False) == "always":
        reference = evaluation.plus(
            _reading(pace, int(prepared.train.processed(loader.packing.layout).sum()) / loader.world)
        )
    number = evaluations(steps, cfg.train.eval_every) + (0 if stage.answer_tokens else 1)  # once more at the temperature
    sizes = mean([Seconds(step.tokens) for step in rehearsal.steps]).value
    times = Times(
        mean([pace.step(step) for step in rehearsal.sizes]), evaluation.plus(answering), sampling, reference, sizes, steps,
        stage.updates, number,
    )  # fmt: skip
    return run, times


def _reading(pace: Pace, tokens: float) -> Seconds:
    """Forward passes over so many tokens, in forwards of the largest size."""
    largest = max(micro.tokens for micro in pace.micro)
    return pace.scoring([largest]).times(tokens / largest)


def _answers(cfg: Config, prepared: Prepared, calibration: Calibration, asked: int) -> Written:
    groups = prepared.eval.groups(range(min(asked, len(prepared.eval))))
    return write(calibration, [prompt_tokens(group) for group in groups], 1, cfg.eval.max_new_tokens, Sampling())


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int | None:
    """Of the device, or of the machine for a CPU; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(lines["MemAvailable"].split()[0]) * 1024
