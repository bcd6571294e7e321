"""A run's memory and time, from its config, its data's shapes and one layer that was run: no weights are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from posttrain.data.pipeline import Prepared
from posttrain.errors import UserError
from posttrain.models.decoder import Decoder
from posttrain.planning.calibrate import Calibration
from posttrain.planning.held import frozen_beside, held_by
from posttrain.planning.memory import AVERAGES_BYTES, Moment, OutsideBytes, Run, most, sharing
from posttrain.planning.rehearsal import Rehearsal, rehearse
from posttrain.planning.skeleton import Skeleton, Unmeasurable
from posttrain.planning.times import Times, pace_of, sampled, times_of
from posttrain.planning.writing import Written

if TYPE_CHECKING:
    from posttrain.config import Config
    from posttrain.data.loader import Loader
    from posttrain.data.streaming.stream import StreamLoader
    from posttrain.runtime import Runtime

ROOM = 0.8
"""Share of the free memory that running one layer may take."""


@dataclass
class Estimate:
    """moments: of the memory of one device. process: what this process holds before any of it, where that is the same memory
    (a CPU). times, measured: None and why not, where a layer could not be run."""

    moments: dict[str, Moment]
    process: int
    times: Times | None
    measured: str


def world_of(cfg: Config, runtime: Runtime) -> int:
    """Ranks of the planned run: those it will be started with, or those there are."""
    return cfg.run.processes or runtime.world


def estimate(
    cfg: Config, runtime: Runtime, prepared: Prepared, loader: Loader | StreamLoader, module: Decoder, steps: int
) -> Estimate:
    """module: the trained network's shapes (models.networks.build_network, shape_only); its parameters become real,
    a layer's worth."""
    world, process = loader.world, resident() if runtime.device.type == "cpu" else 0
    split, gloo = cfg.distribution, runtime.device.type == "cpu" and world > 1
    share = sharing(split.name, world, split.zero_stage, split.cpu_offload, gloo)
    run = Run(
        held_by(module), share, AVERAGES_BYTES[cfg.optim.name], [],
        OutsideBytes(0, 0, 0, 0, 0), False, cfg.train.gradient_checkpointing, runtime.compute_dtype.itemsize,
        2 if cfg.optim.name == "adamw_bf16" else 4, frozen_beside(cfg, module, runtime.compute_dtype),
    )  # fmt: skip
    try:
        rehearsal = rehearse(cfg, prepared, loader, steps)
        calibration = _calibration(cfg, runtime, module, run)
        written = sampled(cfg, loader, calibration)
        runs = _runs(calibration, rehearsal, run, written)
        pace = pace_of(cfg, calibration, rehearsal, round(run.held.trained * run.share.optimizer))
        times = times_of(cfg, prepared, loader, calibration, rehearsal, pace, written, steps)
    except UserError:
        raise
    except Unmeasurable as error:
        return Estimate(run.moments(), process, None, str(error))
    except Exception as error:  # a foreign model's code, run otherwise than it expects
        told = f"{module.network.config.model_type} cannot be run a layer at a time ({type(error).__name__}: {error})"
        return Estimate(run.moments(), process, None, told)
    kinds = calibration.skeleton.kinds
    layers = f"1 of {kinds[0].count}" if len(kinds) == 1 else f"{len(kinds)} of {sum(k.count for k in kinds)}"
    sizes = " and ".join(f"{tokens:,}" for tokens in times.measured)
    measured = f"{layers} layers with random weights, and the output layer, on forwards of {sizes} tokens"
    return Estimate(most(*(each.moments() for each in runs)), process, times, measured)


def _calibration(cfg: Config, runtime: Runtime, module: Decoder, run: Run) -> Calibration:
    """Weights, gradients and AdamW's averages of one layer, weights and gradient of what is outside."""
    needed = 16 * run.held.layer + 8 * run.held.outside
    free = free_bytes(runtime.device)
    if free is not None and needed > ROOM * free:
        raise Unmeasurable(
            f"one layer and the output layer take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        )
    return Calibration(Skeleton(module, runtime.device), cfg.stage, runtime)


def _runs(calibration: Calibration, rehearsal: Rehearsal, run: Run, written: Written | None) -> list[Run]:
    """The run with the largest micro-batch that a step begins with, and with the largest that comes later."""
    found = []
    for batch, accumulates in ((rehearsal.first, False), (rehearsal.later, True)):
        if batch is not None and (
            accumulates or batch is rehearsal.largest
        ):  # else the later one holds more in any case
            layers, outside = calibration.bytes_of(batch, accumulates)
            one = max(each.forward + each.kept for each in layers)
            scoring = one + calibration.scoring_bytes(batch)
            with_it = replace(run, layers=layers, outside=outside, accumulates=accumulates, scoring=scoring)
            found.append(replace(with_it, cache=written.cache, sampling=written.beside) if written else with_it)
    return found


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
