"""Before anything is read: that the ranks are as many as was meant, that they reach each other, that they were told the same.

Each of these goes wrong in silence elsewhere: a node that trains alone, a rank that waits for hours in its first collective,
ranks with other settings or versions than the rest.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch.distributed import DistError

from posttrain.alarm import lost_connection
from posttrain.environment import PACKAGES, package_version
from posttrain.errors import ConfigError, TrainingError, tell_here
from posttrain.rundir import flat
from posttrain.runtime import Runtime
from posttrain.together import together

if TYPE_CHECKING:
    from posttrain.config import Config

SHOWN = 3
"""Of what differs between ranks, so many are told."""


def open_runtime(cfg: Config) -> Runtime:
    """The runtime of a config that computes; its ranks have met, and agree."""
    check_not_alone(os.environ, cfg.run.processes)
    with Deadline(cfg.distribution.connect_seconds):
        try:
            split = cfg.distribution
            runtime = Runtime(cfg.precision.name, split.name, offload=split.cpu_offload, zero_stage=split.zero_stage)
            ranks = runtime.global_sum({"ranks": 1.0})["ranks"]
        except RuntimeError as error:
            said = lost_connection(error) or (str(error) if isinstance(error, DistError) else None)
            if said is None:
                raise
            unjoined = TrainingError(f"{_who(os.environ)} cannot join the others ({said}). {advice(os.environ)}")
            tell_here(unjoined, True)  # the ranks do not know of each other yet
            raise unjoined from error
        assert ranks == runtime.world
    with together(runtime, closing=False):
        check_agreement(runtime, cfg.as_dict())
    return runtime


def check_not_alone(environment: Mapping[str, str], expected: int | None) -> None:
    """ConfigError where a scheduler has given this job more than the launcher uses: each node, or task, would train alone.

    run.processes (`expected`) that names the number that runs says that it is meant.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    if expected == world:
        return
    tasks = next(
        (v for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if (v := environment.get(n))), "1"
    )
    if "WORLD_SIZE" not in environment and int(tasks) > 1:
        raise ConfigError(
            f"{tasks} tasks were started, but nothing tells them of each other, so each would train alone; let srun or mpirun "
            "start one torchrun a node (docker/slurm.sh shows how), or set run.processes=1 if that is meant"
        )
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_JOB_NUM_NODES") or "1")
    here = int(environment.get("LOCAL_WORLD_SIZE", str(world)))
    if nodes > 1 and here == world:
        raise ConfigError(
            f"the job has {nodes} nodes, but this run's {world} {'process is' if world == 1 else 'processes are'} on one: the "
            f"others would idle or train alone; give torchrun --nnodes {nodes} and a rendezvous (docker/slurm.sh shows how), "
            f"or set run.processes={world} if that is meant"
        )


class Deadline:
    """Ends this process with a word about what may be wrong where the block takes longer than `seconds`.

    A rank that waits for another in a collective cannot be woken, so it is ended from a thread.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.timer = threading.Timer(seconds, self._expire)
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.timer.cancel()

    def _expire(self) -> None:
        print(unreached(os.environ, self.seconds), file=sys.stderr, flush=True)
        os._exit(1)


def unreached(environment: Mapping[str, str], seconds: float) -> str:
    """What a rank says whose first sum over all ranks does not come."""
    return (
        f"posttrain: error: {_who(environment)} has waited {seconds:g} s for the first sum over all ranks. "
        f"{advice(environment)}; distribution.connect_seconds gives it longer"
    )


def advice(environment: Mapping[str, str]) -> str:
    """Why ranks may not reach each other, and what to try."""
    place = f"{environment.get('MASTER_ADDR', '?')}:{environment.get('MASTER_PORT', '?')}"
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    chosen = ", ".join(f"{name}={environment.get(name, 'unset')}" for name in names)
    return (
        f"Their store is at {place}. Either a rank has not started (see its output), or a firewall is between the nodes, or "
        f"they talk over the wrong network: name the interface that joins them ({chosen}). NCCL_DEBUG=INFO tells more"
    )


def _who(environment: Mapping[str, str]) -> str:
    rank, world = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    return f"rank {rank} of {world} on {socket.gethostname()}"


def check_agreement(runtime: Runtime, config: dict[str, Any]) -> None:
    """ConfigError where a rank was started with other settings, or runs other versions."""
    if runtime.world == 1:
        return
    versions = {name: package_version(name) for name in ("posttrain", *PACKAGES)} | {
        "python": platform.python_version()
    }
    everyone = runtime.gather([(socket.gethostname(), flat(config), versions)])
    for part, what in ((1, "settings"), (2, "versions")):
        ours = everyone[0][part]
        for rank, mine in enumerate(everyone):
            theirs = mine[part]
            names = [n for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n)]
            if names:
                told = ", ".join(f"{n} {theirs.get(n)} there, {ours.get(n)} on rank 0" for n in names[:SHOWN])
                raise ConfigError(
                    f"rank {rank} on {mine[0]} has other {what} than rank 0 on {everyone[0][0]}: {told}"
                    f"{', ...' if len(names) > SHOWN else ''}; start every rank with the same command and environment"
                )


def check_same_data(runtime: Runtime, fingerprint: str) -> None:
    """ConfigError where a rank reads other data: its share of each step would be of other examples."""
    everyone = runtime.gather([(socket.gethostname(), fingerprint)])
    for rank, (host, found) in enumerate(everyone):
        if found != everyone[0][1]:
            raise ConfigError(
                f"rank {rank} on {host} reads other data than rank 0 on {everyone[0][0]}: the files of data.train or data.eval "
                "differ there; give paths that every node sees, or copy the same files to all"
            )
