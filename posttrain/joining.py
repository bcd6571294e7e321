"""Joining the ranks that a launcher has started, and leaving them; the launcher's words must not contradict the config."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from posttrain.errors import ConfigError
from posttrain.precision import check_environment

LAUNCHED_AS = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
"""What a launcher says of the distribution, and the one that agrees with it."""


def join() -> None:
    """A process group, in which one process alone may shard, and which reduces in host memory too."""
    if torch.distributed.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    limit = timedelta(hours=2)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        torch.distributed.init_process_group(backend, timeout=limit)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)


def leave() -> None:
    """Out of the process group, where there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_launcher(precision: str | None, distribution: str) -> None:
    """What the launcher or the environment says must not contradict the config."""
    if precision is not None:
        check_environment(precision)
    for flag in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if distribution == LAUNCHED_AS.get(flag):
            continue
        if os.environ.get(flag, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"distribution={distribution}, but the launcher set {flag}; use an accelerate config without it"
            )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if distribution == "single" and world > 1:
        raise ConfigError(f"distribution=single, but the launcher started {world} processes; set distribution=ddp")
