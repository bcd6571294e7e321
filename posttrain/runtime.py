"""Accelerate behind one small face: device, precision, ranks, reductions, seeds. Stages never see it."""

from __future__ import annotations

import atexit
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import wraps
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils import logging as transformers_logging

from posttrain.alarm import Alarm
from posttrain.allocator import keep_freed_memory
from posttrain.errors import ConfigError
from posttrain.joining import LAUNCHED_AS, check_launcher, join, leave
from posttrain.models.sharding import shard, whole
from posttrain.precision import COMPUTE, LossScaler, check_device, described
from posttrain.zero import Zero, check_installed
from posttrain.zero3 import Zero3


class Runtime:
    """One per process. `precision` and `distribution` are the names of those config groups.

    computes: False where only data is read, so that what precision the launcher or the environment names plays no part.
    offload, zero_stage: distribution.cpu_offload and .zero_stage.
    """

    def __init__(
        self, precision: str, distribution: str, computes: bool = True, offload: bool = False, zero_stage: int = 2
    ) -> None:
        check_launcher(precision if computes else None, distribution)
        transformers_logging.set_verbosity_error()  # what matters of its warnings is checked, and said by us
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        handlers = [
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # rank 0 may prepare data for long
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ]
        self.shards, self.offload = distribution == "fsdp", offload
        self.zeros, self.zero_stage = distribution == "deepspeed", zero_stage
        self.zero: Zero | None = None
        if self.zeros:
            check_installed()
        if self.shards or self.zeros:
            for flag in LAUNCHED_AS:  # agreed with; what is in parts, and how, is decided here
                os.environ.pop(flag, None)
            join()
        AcceleratorState._reset_state()  # a process may hold several runs, one after another, each with its own precision
        # autocast and the loss scale are ours alone (Accelerate has neither for fp16 on a CPU): never twice
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=handlers
        )
        self.precision, self.compute_dtype = precision, COMPUTE[precision]
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.world, self.is_main = self.accelerator.num_processes, self.accelerator.is_main_process
        if self.device.type == "cpu":
            keep_freed_memory()
        self.alarm = Alarm(self.rank, self.world) if self.world > 1 and "MASTER_PORT" in os.environ else None
        check_device(precision, self.device)
        self.loss_scaler = LossScaler(self.device) if precision == "fp16" else None

    def describe(self) -> str:
        """Device, precision and world size in one line."""
        kind = "FSDP" if self.shards else f"DeepSpeed ZeRO {self.zero_stage}" if self.zeros else "DDP"
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "none"
        processes = "1 process" if self.world == 1 else f"{self.world} processes ({kind}, {backend})"
        precision = described(self.precision, self.device)
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {precision}, {processes}"
        return f"CPU ({torch.get_num_threads()} threads), {precision}, {processes}"

    def reads_weights(self, by_all: bool) -> bool:
        """Whether this rank reads a network's weights itself. Where they will lie in parts rank 0 alone does, and the others
        make the shape: else a machine would hold them once a GPU. by_all: networks.read_by_all."""
        return not self.shards or self.is_main or by_all

    def place(self, network: Any, by_all: bool) -> Any:
        """The network on the device, or each rank's part of it. by_all: as in reads_weights."""
        if not self.shards:
            return network.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.world,))
        shard(network, mesh, self.compute_dtype, self.offload, full=by_all or self.world == 1)
        return network

    def wrap(
        self,
        module: nn.Module,
        find_unused: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        max_norm: float = 0.0,
    ) -> nn.Module:
        """What was placed, under autocast where precision says so, gradients synchronised over ranks.

        find_unused: a forward may leave parameters without a gradient (experts that no token was sent to). optimizer, max_norm:
        of a run that trains.
        """
        if self.shards:
            return module
        if self.zeros and optimizer is not None:
            if find_unused:
                raise ConfigError(
                    "distribution=deepspeed with a mixture of experts: ZeRO adds up gradients in the order in which they come, "
                    "and an expert that a rank sends no token to has none there; set distribution=fsdp"
                )
            half = self.compute_dtype if self.compute_dtype != torch.float32 else None
            kind = Zero3 if self.zero_stage == 3 else Zero
            self.zero = kind(module, optimizer, self.offload, half, max_norm)
            return self.zero
        self._autocast_forward(module)
        self.accelerator.ddp_handler.find_unused_parameters = find_unused
        wrapped: nn.Module = self.accelerator.prepare(module)
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            # decoders' buffers never change; broadcasting them would tie evaluation's forwards together
            wrapped.broadcast_buffers = False
        return wrapped

    @contextmanager
    def autocast(self, device: torch.device | None = None) -> Iterator[None]:
        """The run's precision, for code that does not go through the wrapped module (generation). device: another one."""
        device = device or self.device
        with torch.autocast(device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            yield

    def _autocast_forward(self, module: nn.Module) -> None:
        """The module's forward under autocast; bound to it as a method is, so that a copy of the module has its own."""
        forward = type(module).forward

        @wraps(forward)
        def under(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with self.autocast():
                return forward(this, *args, **kwargs)

        module.forward = MethodType(under, module)

    def sync_only(self, last: bool, module: nn.Module) -> Any:
        """Gradients are reduced in the last micro-batch's backward only; but where they lie in parts in each, for a rank has no
        room to gather them whole."""
        if self.zero is not None:
            self.zero.accumulates(last)
            return nullcontext()
        return nullcontext() if last or self.shards else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        if self.zero is not None:
            self.zero.backward(loss)
        else:
            self.accelerator.backward(loss if self.loss_scaler is None else self.loss_scaler.scale(loss))

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        max_norm: float,
        check: Callable[[Tensor], bool],
    ) -> tuple[Tensor, bool]:
        """One step of the optimizer, clipped to max_norm; returns the global norm before, and whether anything was updated.
        check: of that norm, whether to update; where it raises or says no, nothing has moved."""
        if self.zero is not None:
            norm = self.zero.step()
            return norm, check(norm)
        if self.loss_scaler is not None:
            self.loss_scaler.unscale(optimizer)
        norm = self.clip(parameters, max_norm)
        good = check(norm)
        if good:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, good

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

    def close(self) -> None:
        """What this run holds. The ranks stay joined: the next run in this process cannot join them anew by the same store."""
        if self.alarm:
            self.alarm.stop()
        if self.zero is not None:
            self.zero.close()
        self.accelerator.free_memory()
        atexit.unregister(leave)
        atexit.register(leave)
