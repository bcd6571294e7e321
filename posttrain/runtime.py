"""Accelerate behind one small face: device, precision, ranks, reductions, seeds. Stages never see it."""

from __future__ import annotations

import atexit
import os
import random
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils import logging as transformers_logging

from posttrain.alarm import AGAIN, Alarm, lost_connection
from posttrain.allocator import keep_freed_memory
from posttrain.errors import ConfigError, Stopped, TrainingError, tell_here
from posttrain.models.sharding import shard, whole

MIXED = {"fp32": "no", "tf32": "no", "bf16": "bf16"}
COMPUTE = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


class Runtime:
    """One per process. `precision` and `distribution` are the names of those config groups.

    computes: False where only data is read, so that what precision the launcher or the environment names plays no part.
    offload: distribution.cpu_offload.
    """

    def __init__(self, precision: str, distribution: str, computes: bool = True, offload: bool = False) -> None:
        _check_launcher(precision if computes else None, distribution)
        transformers_logging.set_verbosity_error()  # what matters of its warnings is checked, and said by us
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        handlers = [
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # rank 0 may prepare data for long
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ]
        self.shards, self.offload = distribution == "fsdp", offload
        if self.shards:
            os.environ.pop("ACCELERATE_USE_FSDP", None)  # agreed with; what is sharded, and how, is decided here
            _join()
        AcceleratorState._reset_state()  # a process may hold several runs, one after another, each with its own precision
        self.accelerator = Accelerator(
            mixed_precision=MIXED[precision], cpu=not torch.cuda.is_available(), kwargs_handlers=handlers
        )
        self.precision, self.compute_dtype = precision, COMPUTE[precision]
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.world, self.is_main = self.accelerator.num_processes, self.accelerator.is_main_process
        if self.device.type == "cpu":
            keep_freed_memory()
        self.alarm = Alarm(self.rank, self.world) if self.world > 1 and "MASTER_PORT" in os.environ else None
        if self.device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported():
            raise ConfigError("precision=bf16, but this GPU has no bf16; try precision=fp32")

    def describe(self) -> str:
        """Device, precision and world size in one line."""
        kind = "FSDP" if self.shards else "DDP"
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "none"
        processes = "1 process" if self.world == 1 else f"{self.world} processes ({kind}, {backend})"
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {self.precision}, {processes}"
        return f"CPU ({torch.get_num_threads()} threads), {self.precision}, {processes}"

    def reads_weights(self, quantized: bool) -> bool:
        """Whether this rank reads a network's weights itself. Where they will lie in parts rank 0 alone does, and the others
        make the shape: else a machine would hold them once a GPU. What is quantised as it is read, all read."""
        return not self.shards or self.is_main or quantized

    def place(self, network: Any, quantized: bool = False) -> Any:
        """The network on the device, or each rank's part of it."""
        if not self.shards:
            return network.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.world,))
        shard(network, mesh, self.compute_dtype, self.offload, full=quantized or self.world == 1)
        return network

    def wrap(self, module: nn.Module, find_unused: bool = False) -> nn.Module:
        """What was placed, under autocast where precision says so, gradients synchronised over ranks.

        find_unused: a forward may leave parameters without a gradient (experts that no token was sent to).
        """
        if self.shards:
            return module
        self.accelerator.ddp_handler.find_unused_parameters = find_unused
        wrapped: nn.Module = self.accelerator.prepare(module)
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            # decoders' buffers never change; broadcasting them would tie evaluation's forwards together
            wrapped.broadcast_buffers = False
        return wrapped

    @contextmanager
    def autocast(self, device: torch.device | None = None) -> Iterator[None]:
        """The run's precision, for code that does not go through the wrapped module (generation). device: another one."""
        if device is None or device.type == self.device.type:
            with self.accelerator.autocast():
                yield
        else:
            with torch.autocast(device.type, self.compute_dtype, enabled=MIXED[self.precision] != "no"):
                yield

    def sync_only(self, last: bool, module: nn.Module) -> Any:
        """Gradients are reduced in the last micro-batch's backward only; but where they lie in parts in each, for a rank has no
        room to gather them whole."""
        return nullcontext() if last or self.shards else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Rescale to max_norm; returns the global norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(parameters, max_norm)
        assert isinstance(norm, Tensor)
        return whole(norm)

    def global_sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sum over ranks, in fp64; every rank must give the same keys."""
        if self.world == 1:
            return dict(values)
        reduced = self.accelerator.reduce(
            torch.tensor([float(values[k]) for k in sorted(values)], dtype=torch.float64, device=self.device), "sum"
        )
        return dict(zip(sorted(values), reduced.tolist(), strict=True))

    def gather(self, items: list[Any]) -> list[Any]:
        """All ranks' items, on every rank, in rank order."""
        return list(gather_object(items)) if self.world > 1 else items

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        box = [value]
        broadcast_object_list(box, from_process=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return self.global_sum({"flag": float(flag)})["flag"] > 0

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def peak_memory_bytes(self) -> int:
        """Largest memory so far: of the device, or the process's resident set on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @contextmanager
    def together(self, closing: bool = True) -> Iterator[None]:
        """The run itself: an error on one rank ends all, and is told once, by the rank that met it first. closing: the run is
        over with this block."""
        try:
            yield
        except Stopped:  # by all ranks after the same step
            self.close()
            raise
        except Exception as error:
            said = lost_connection(error)
            if said is None:
                self._fail(error)
                raise
            lost = TrainingError(
                f"rank {self.rank} on {socket.gethostname()} lost another rank, which ended, or was killed, without a word: its "
                f"own output, or its machine's log, may say why ({said}); {AGAIN}"
            )
            self._fail(lost, lost=True)
            raise lost from error
        if closing:
            self.close()

    def close(self) -> None:
        """What this run holds. The ranks stay joined: the next run in this process cannot join them anew by the same store."""
        if self.alarm:
            self.alarm.stop()
        self.accelerator.free_memory()
        atexit.unregister(_leave)
        atexit.register(_leave)

    def _fail(self, error: Exception, lost: bool = False) -> None:
        """Tell the other ranks, or the error that another rank told before; then leave, so that none waits for this one.

        lost: another is gone.
        """
        if self.alarm:
            with suppress(ValueError):  # outside the main thread
                # the launcher, which may see the same, would end this process before it has told its error
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
        first = self.alarm.ring(f"{type(error).__name__}: {error}") if self.alarm else None
        self.close()
        if self.alarm is None:
            return
        tell_here(error, first is None)
        if first:
            error.add_note(f"rank {first[0]} had failed before: {first[1]}")
        if self.device.type == "cpu":  # NCCL would wait for what is under way
            _leave()
        self.alarm.linger(lost)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def seed_everything(seed: int, rank: int) -> None:
    """Python, numpy and torch; each rank draws its own numbers."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def rng_state() -> dict[str, Any]:
    """Everything random in this process, for a checkpoint."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    numpy = (kind, np.asarray(keys).tolist(), *rest)  # plain values: safe to load
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Back to where `rng_state` was called."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


LAUNCHED_AS = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
"""What a launcher says of the distribution, and the one that agrees with it."""


def _join() -> None:
    """A process group, in which one process alone may shard, and which reduces in host memory too."""
    if torch.distributed.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    limit = timedelta(hours=2)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        torch.distributed.init_process_group(backend, timeout=limit)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)


def _check_launcher(precision: str | None, distribution: str) -> None:
    """What the launcher or the environment says must not contradict the config."""
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision is not None and said not in ("no", MIXED[precision]):
        raise ConfigError(
            f"precision={precision}, but the launcher or environment says ACCELERATE_MIXED_PRECISION={said}; "
            f"unset it (or its accelerate config), or set precision={said}"
        )
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
